"""Reading and writing safetensors files, without trusting them and without reading more than is asked for.

The format (huggingface.co/docs/safetensors): eight bytes of header length, little-endian; that many bytes of JSON that
give each tensor's dtype, shape and place; then the numbers, without gaps. Everything the header says is held against
the size of the file before a byte of data is touched, and every refusal is one line that names the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.config import nearest

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the reference implementation
_MAX_INDEX = 100_000_000
_MAX_RANK = 32
_KEYS = {"dtype", "shape", "data_offsets"}

Slices = tuple[slice | np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor that has not been read yet.

    Attributes:
        dtype: of its numbers.
        shape: its dimensions.
        array: makes the whole array; for a file, a read-only view of the mapped pages, which costs nothing.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    array: Callable[[], np.ndarray]

    def read(self, slices: Slices | None = None) -> np.ndarray:
        """The array, or a part of it; a view of the file (of its touched pages only) unless `slices` holds indices."""
        whole = self.array()
        return whole if slices is None else whole[slices]


def open_file(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """The tensors of one file, by name; reads its header only. Raises ValueError (one line) if it is not sound."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path}: {size} bytes is too short for a safetensors file (cut off?)")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER or length + 8 > size:
            raise ValueError(
                f"{path}: its header claims {length:,} bytes, but the file has {size - 8:,} after the length "
                f"(and {_MAX_HEADER:,} are allowed): cut off, or not a safetensors file"
            )
        header = _json(file.read(length), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must be an object of strings")
    space = size - 8 - length
    spans = [(*_check_tensor(path, name, info, space), name) for name, info in header.items()]
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            word = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise ValueError(f"{path}: tensor {name!r} {word} (it starts at byte {start}, after {end})")
        end = stop
    if end != space:
        raise ValueError(f"{path}: its tensors end at byte {end:,} of {space:,}: there is unclaimed data")
    pages = np.memmap(path, np.uint8, mode="r")
    at = {name: (start + 8 + length, stop + 8 + length) for start, stop, name in spans}
    return {name: _entry(pages, *at[name], header[name]) for name in header}


def open_folder(folder: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """The tensors of a folder: model.safetensors, else the shards that model.safetensors.index.json lists, else the
    one *.safetensors file there is.

    Shards must be files of the folder itself. Raises ValueError (one line) for whatever is not sound.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / "model.safetensors").is_file():
        return open_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _open_shards(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return open_file(files[0])
    if files:
        raise ValueError(
            f"{folder}: {len(files)} safetensors files ({files[0].name}, ...), but no model.safetensors.index.json "
            "to say which holds what: download that file too"
        )
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".gguf"))
    found = f"; it has {', '.join(others[:3])}, which is another format" if others else ""
    raise ValueError(f"{folder}: no safetensors file in this folder{found}")


def save_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorEntry | np.ndarray | Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to one file, holding one of them in memory at a time.

    The file appears under its name only when it is whole.

    Args:
        path: the file; one of this name is replaced.
        tensors: by name; numpy or jax arrays, or TensorEntries, whose arrays are made when their turn comes.
        metadata: strings by name.

    Raises:
        ValueError: a dtype that the format has no name for, or an array unlike what its entry announced.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        dtype = np.dtype(tensor.dtype)
        if dtype not in _NAMES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {dtype}; allowed: {', '.join(map(str, _NAMES))}")
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in tensors.items():
                array = tensor.read() if isinstance(tensor, TensorEntry) else np.asarray(tensor)
                if array.shape != tuple(tensor.shape) or array.dtype != tensor.dtype:
                    raise ValueError(
                        f"{path}: tensor {name!r} was announced as {tensor.dtype} {tuple(tensor.shape)}, "
                        f"but is {array.dtype} {array.shape}"
                    )
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _entry(pages: np.ndarray, start: int, stop: int, info: dict[str, Any]) -> TensorEntry:
    dtype, shape = DTYPES[info["dtype"]], tuple(info["shape"])
    return TensorEntry(dtype, shape, lambda: pages[start:stop].view(dtype).reshape(shape))


def _check_tensor(path: Path, name: str, info: Any, space: int) -> tuple[int, int]:
    """The first and last byte of a tensor, after checking that its dtype, shape and place agree with `space`."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(info, dict) or info.keys() != _KEYS:
        raise ValueError(f"{where} must be described by dtype, shape and data_offsets, got {_brief(info)}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has dtype {_brief(dtype)}; read here: {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > _MAX_RANK:
        raise ValueError(f"{where} has shape {_brief(shape)}; it must be at most {_MAX_RANK} whole numbers")
    if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= space:
        raise ValueError(
            f"{where} has data_offsets {_brief(offsets)}; they must be [start, end] within the file's {space:,} "
            "bytes of data (cut off?)"
        )
    width = DTYPES[dtype].itemsize
    if math.prod(n for n in shape if n) * width > 1 << 62:
        raise ValueError(f"{where} has shape {_brief(shape)}, which is beyond any memory")
    need, given = math.prod(shape) * width, offsets[1] - offsets[0]
    if need != given:
        raise ValueError(f"{where} needs {need:,} bytes ({dtype} {_brief(shape)}), but data_offsets give it {given:,}")
    return offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in values)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object whose keys are all different; anything else is one ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the name {_brief(key)} appears twice")
            found[key] = value
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or a repeated name
        raise ValueError(f"{where} is not sound JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {_brief(value)}")
    return value


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file, at most 100 MB; ValueError (one line) for anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > _MAX_INDEX:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes is more than the {_MAX_INDEX:,} allowed")
    return _json(path.read_bytes(), str(path))


def _open_shards(folder: Path, index: Path) -> dict[str, TensorEntry]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map must be an object of file names, got {_brief(places)}")
    shards: dict[str, dict[str, TensorEntry]] = {}
    for name, shard in places.items():
        bare = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & set("/\\:\0")
        if not bare:
            raise ValueError(
                f"{index}: tensor {_brief(name)} is said to be in {_brief(shard)}; it must be the bare name of a "
                ".safetensors file in this folder"
            )
        if shard not in shards:
            if not (folder / shard).is_file():
                raise ValueError(f"{folder / shard}: missing, though {index.name} lists it: download it again")
            shards[shard] = open_file(folder / shard)
        if name not in shards[shard]:
            near = nearest(name, list(shards[shard]))
            raise ValueError(f"{folder / shard}: no tensor {name!r}, though {index.name} lists it{near}")
    return {name: shards[shard][name] for name, shard in places.items()}
