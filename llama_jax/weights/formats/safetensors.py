"""Reader and writer of safetensors files. Files are not trusted, and only requested tensors are read.

The format (huggingface.co/docs/safetensors): eight bytes of header length, little-endian; that many bytes of JSON that
give the dtype, shape and byte range of each tensor; then their data, without gaps. Everything in the header is checked
against the size of the file before any data is read. Every error is one line that names the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.errors import brief
from llama_jax.files import parse_json, whole_file
from llama_jax.weights.formats.shard_index import open_shards
from llama_jax.weights.tensor import File, LazyTensor, stored

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
_MAX_HEADER = 1_500_000  # bytes: as JSON it takes up to 25 times as much memory; 405B's largest has 20,000
_MAX_RANK = 32
INDEX = "model.safetensors.index.json"
_KEYS = {"dtype", "shape", "data_offsets"}


def open_file(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of one file by name. Only the header is read. Raises ValueError (one line) for a damaged file."""
    path = Path(path)
    file = File(path)
    size = file.size
    if size < 8:
        raise ValueError(f"{path}: {size} bytes is too short for a safetensors file (cut off?)")
    lead = file.read(0, 8)
    if lead == b"version ":
        raise ValueError(f"{path}: a Git LFS pointer: run `git lfs pull` to fetch the file itself")
    length = int.from_bytes(lead, "little")
    if length + 8 > size or length > _MAX_HEADER:
        raise ValueError(
            f"{path}: its header claims {length:,} bytes, but the file has {size - 8:,} after the length "
            f"(and a header of {_MAX_HEADER:,} is allowed): cut off, or not a safetensors file"
        )
    header = parse_json(file.read(8, length), f"{path}: header")
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
        raise ValueError(f"{path}: its tensors end at byte {end:,} of {space:,}: the rest belongs to no tensor")
    return {
        name: stored(file, start + 8 + length, DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]))
        for start, _, name in spans
    }


def open_folder(folder: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a folder by their names.

    They are those of model.safetensors, else of the shards that model.safetensors.index.json lists, else of the only
    *.safetensors file. Shards must be files of the folder itself. Raises ValueError (one line) for a missing or damaged
    file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / "model.safetensors").is_file():
        return open_file(folder / "model.safetensors")
    index = folder / INDEX
    if index.is_file():
        return open_shards(index, ".safetensors", open_file)
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
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes tensors to one file, a block of rows at a time. The file appears under its name when it is complete.

    Args:
        path: the file; one of this name is replaced.
        tensors: tensors by name.
        metadata: strings by name, for the header.
        progress: called with the number of bytes that were written since the last call.

    Raises:
        ValueError: a tensor has a dtype that the format does not support.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(
                f"{path}: tensor {name!r} has dtype {tensor.dtype}; allowed: {', '.join(map(str, _NAMES))}"
            )
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the numbers
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for block in tensor.blocks():
                file.write(block.reshape(-1).view(np.uint8).data)
                progress(block.nbytes)


def _check_tensor(path: Path, name: str, info: Any, space: int) -> tuple[int, int]:
    """The first and last byte of a tensor. Its dtype, shape and byte range must agree and fit into `space` bytes."""
    where = f"{path}: tensor {brief(name)}"
    if not isinstance(info, dict) or info.keys() != _KEYS:
        raise ValueError(f"{where} must be described by dtype, shape and data_offsets, got {brief(info)}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has dtype {brief(dtype)}; supported: {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > _MAX_RANK:
        raise ValueError(f"{where} has shape {brief(shape)}; it must be at most {_MAX_RANK} whole numbers")
    if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= space:
        raise ValueError(
            f"{where} has data_offsets {brief(offsets)}; they must be [start, end] within the file's {space:,} "
            "bytes of data (cut off?)"
        )
    width = DTYPES[dtype].itemsize
    if math.prod(n for n in shape if n) * width > 1 << 62:
        raise ValueError(f"{where} has shape {brief(shape)}, which is larger than any memory")
    need, given = math.prod(shape) * width, offsets[1] - offsets[0]
    if need != given:
        raise ValueError(f"{where} needs {need:,} bytes ({dtype} {brief(shape)}), but data_offsets give it {given:,}")
    return offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in values)
