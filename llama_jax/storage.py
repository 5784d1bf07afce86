"""Files behind addresses such as gs://BUCKET/FOLDER: fsspec lists them, and they are downloaded before they are read.

fsspec reads gs:// with the package gcsfs, s3:// with s3fs, and others with packages of their own; those find their
credentials as always. A download is kept in the user's cache under a name that covers the address and the version of
each file, so that a file that has changed is downloaded again.

Floor 0: this module does not import jax.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_jax import progress
from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.files import expanded

_THREADS = 8
_MARGIN = 1 << 28  # bytes that stay free on the disk


@dataclasses.dataclass(frozen=True)
class Stored:
    """A file behind an address.

    Attributes:
        name: Path below the address; for an address that is a file, or a pattern, the path from the address's root.
        size: Bytes.
        version: Hash of the store's information about the file, which changes when the contents change.
        path: Path for `filesystem`.
    """

    name: str
    size: int
    version: str
    path: str


def is_url(text: str) -> bool:
    """True for an address of a store: SCHEME://..., but not file://, which names a path of this machine."""
    return "://" in text and local_path(text) is None


def local_path(text: str) -> str | None:
    """The path that a file:// address names; the text itself if it has no scheme; None for other addresses."""
    if text.startswith("file://"):
        return text.removeprefix("file://")
    return None if "://" in text else text


def find(url: str) -> list[Stored]:
    """The files of an address: one file, all files below a folder, or those that match a pattern, sorted by name.

    Raises:
        ConfigError: no such file, a package that is not installed, no access or no network.
    """
    fs, root = open_store(url)
    try:
        if any(sign in root for sign in "*?["):
            found = {path: info for path, info in fs.glob(root, detail=True).items() if info["type"] == "file"}
            start = ""
        elif fs.isfile(root):
            found, start = {root: fs.info(root)}, root.rpartition("/")[0]
        else:
            found, start = fs.find(root, detail=True), root
        stored = _stored(found, start)
    except Exception as error:  # each store raises errors of its own
        raise refused(url, error) from error
    if any(".." in file.name.split("/") for file in stored):
        raise ConfigError(f"{url} has a file with .. in its name, which could lead outside the folder: rename it")
    if not stored:
        raise ConfigError(f"{url} has no files: check the spelling, and that you have access to it")
    return stored


def download(url: str, files: Sequence[Stored], folder: Path) -> dict[str, Path]:
    """Copies files to a folder under their names, except those that it already has. Returns the path of each file by
    its name.

    The needed space is compared with the free space first. Both are printed before a long download.

    Raises:
        ConfigError: there is no room, or a file cannot be read.
    """
    fs, _ = open_store(url)
    paths = {file.name: folder / file.name for file in files}
    missing = [file for file in files if not paths[file.name].is_file()]
    if not missing:
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.size for file in missing)
    check_room(url, total, folder, count=len(missing))
    with progress.progress_bar(total, "downloading") as bar:

        def fetch(file: Stored) -> None:
            path = paths[file.name]
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as partial:
                copy = Path(partial, "file")
                fs.get_file(file.path, str(copy))
                if copy.stat().st_size != file.size:
                    raise OSError(f"{file.name} changed during the download: start again")
                os.replace(copy, path)
            bar.update(file.size)

        try:
            with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(fetch, missing))
        except Exception as error:
            raise refused(url, error) from error
    return paths


def download_folder(url: str) -> Path:
    """Downloads all files of an address, and returns their folder in the cache. Raises as `find` and `download`."""
    open_store(url)[0].invalidate_cache()  # a run may have replaced files since
    files = find(url)
    folder = cache_folder(url, files)
    download(url, files, folder)
    return folder


class Store:
    """A folder of a store that is written to. Every failure is a ConfigError of one line.

    Args:
        url: The address of the folder, which need not exist.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, root = open_store(url)
        self._root = root.rstrip("/")

    def files(self) -> dict[str, Stored]:
        """The files below the folder by name; none if it does not exist."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise refused(self._url, error) from error
        return {file.name: file for file in _stored(found, self._root)}

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        return self._try(self._fs.cat_file, f"{self._root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Write a small file at once."""
        self._make_parent(name)
        self._try(self._fs.pipe_file, f"{self._root}/{name}", data)

    def put(self, path: Path, name: str) -> None:
        """Copy a file of this machine to the store; FileNotFoundError if it does not exist."""
        if not path.is_file():
            raise FileNotFoundError(path)
        self._make_parent(name)
        try:
            self._try(self._fs.put_file, str(path), f"{self._root}/{name}")
        except ConfigError:
            if not path.is_file():
                raise FileNotFoundError(path) from None
            raise

    def delete(self, name: str) -> None:
        """Delete a file, if it is still there."""
        try:
            self._fs.rm_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return
        except Exception as error:
            raise refused(self._url, error) from error

    def _make_parent(self, name: str) -> None:
        """Make the folder of a file, which stores of objects need not have."""
        self._try(self._fs.makedirs, f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)

    def _try(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except Exception as error:
            raise refused(self._url, error, "written to or read") from error


def work_folder(output: str, process: int | None = None) -> Path:
    """The folder of this machine that a run works in: `output`, or one in the cache for an address of a store.

    Args:
        output: The path or the address.
        process: The number of this process; each has a folder of its own for an address, which has a part of the run.
            None for a run of one process, whose folder is whole.
    """
    if not is_url(output):
        return expanded(local_path(output) or output)
    name = hashlib.sha256(output.rstrip("/").encode()).hexdigest()[:32]
    return cache_root() / "runs" / (name if process is None else f"{name}.{process}")


def check_room(name: str, size: int, folder: Path, *, count: int) -> None:
    """Check that a download fits on the disk of a folder that exists, and print its size if it is not small.

    Raises:
        ConfigError: there is less free space than the download needs.
    """
    free = shutil.disk_usage(folder).free
    if size > free - _MARGIN:
        raise ConfigError(
            f"{name}: the download needs {size_text(size)}, but {folder} has {size_text(free)} free: make room, or "
            "move the cache to a larger disk (HF_HOME for the hub, LLAMA_JAX_CACHE or XDG_CACHE_HOME for other stores)"
        )
    if size > _MARGIN and progress.enabled:
        files = "1 file" if count == 1 else f"{count} files"
        print(
            f"downloading {files} of {name}: {size_text(size)} to {folder}, which has {size_text(free)} free",
            file=sys.stderr,
        )


def cache_root() -> Path:
    """The folder of llama_jax in the user's cache; LLAMA_JAX_CACHE names another."""
    chosen = os.environ.get("LLAMA_JAX_CACHE", "")
    if chosen and chosen.lower() != "off":
        return expanded(chosen)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llama_jax"


def cache_folder(url: str, files: Sequence[Stored], *, in_place: bool = False) -> Path:
    """The folder of the cache for these versions of the files of an address; with `in_place` another (remote_files)."""
    identity = [url.rstrip("/"), *(f"{file.name} {file.version}" for file in files)]
    return (
        cache_root()
        / ("in_place" if in_place else "downloads")
        / hashlib.sha256("\n".join(identity).encode()).hexdigest()[:32]
    )


def _stored(found: dict[str, dict[str, Any]], start: str) -> list[Stored]:
    """The files of a listing of fsspec, each named by its path below `start`."""
    # An empty object of a folder's name is how some consoles make a folder.
    files = {path: info for path, info in found.items() if not path.endswith("/")}
    return [
        Stored(path.removeprefix(start).lstrip("/"), int(info["size"] or 0), _version(info), path)
        for path, info in sorted(files.items())
    ]


# The packages that fsspec needs, by the scheme of an address.
_PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
}


def open_store(url: str) -> tuple[Any, str]:
    """The filesystem of an address, and the path on it."""
    import fsspec
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        remedy = f": pip install {_PACKAGES[scheme]}" if scheme in _PACKAGES else ""
        raise ConfigError(
            f"{url}: {scheme}:// needs a package that is not installed{remedy} ({' '.join(str(error).split())})"
        ) from None
    except Exception as error:
        known = fsspec.available_protocols()
        if scheme not in known:
            near = nearest(scheme, known) or ";"
            raise ConfigError(
                f"{url}: no store is named {scheme!r}{near} common ones are gs, s3, az and https"
            ) from None
        raise refused(url, error) from error
    return fs, str(path)


def _version(info: dict[str, Any]) -> str:
    """A hash for the contents of a file: of the store's checksum or generation, or else of its size and time."""
    keys = ("etag", "ETag", "generation", "md5Hash", "crc32c", "mtime", "LastModified", "last_modified", "created")
    facts = [info.get("size"), *(info[key] for key in keys if info.get(key) is not None)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def refused(url: str, error: Exception, word: str = "read") -> ConfigError:
    """The error of a store in one line."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, FileNotFoundError):
        return ConfigError(f"{url} does not exist: check the spelling, and that you have access to it")
    text = " ".join(str(error).split())
    return ConfigError(f"{url} cannot be {word} ({type(error).__name__}: {brief(text, 300)}): check access and network")


def size_text(size: int) -> str:
    """A number of bytes with three digits and a decimal prefix, such as 1.23 GB."""
    number, prefixes = float(size), ["", "k", "M", "G", "T"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        del prefixes[0]
    return f"{number:{',.0f' if number >= 99.5 else '.3g'}} {prefixes[0]}B"
