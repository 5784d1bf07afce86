"""Reader and writer of GGUF files. Files are not trusted, and only requested tensors are read.

The format (github.com/ggml-org/ggml, docs/gguf.md): a magic number, a version and two counts; metadata as keys with
typed values; the name, dimensions, type and offset of each tensor; then the tensors, aligned. Numbers are
little-endian, and dimensions are listed innermost first. This module knows nothing about Llama. Everything in the
header is checked against the size of the file, and every error is one line that names the file. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from llama_jax.errors import brief, nearest
from llama_jax.files import File, whole_file
from llama_jax.gguf_header import ARRAY, BOOL, MAGIC, NUMBERS, STRING, Header, Value, shown
from llama_jax.weights.formats import gguf_blocks
from llama_jax.weights.tensor import Index, LazyTensor, QuantizedParts, stored

PLAIN: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BITS = {"Q8_0": 8, "Q4_0": 4}  # the types that our quantized leaves can hold
WRITTEN = (*PLAIN, *_BITS)

# The numbers of ggml's types (ggml.h), including withdrawn ones. Not all of them are read here.
_TYPES: dict[int, str] = dict(
    enumerate(
        "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S "
        "IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 "
        "IQ4_NL_4_8 IQ4_NL_8_8 MXFP4 NVFP4 Q1_0".split()
    )
)
_ALIGNMENT = 32  # bytes, unless the metadata has general.alignment
_STEP = 1 << 20  # numbers that are converted at a time; they stay in the CPU cache
_MAX_RANK = 4
_MAX_PARTS = 512  # each is an open file
_PART = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class GGUF:
    """A GGUF file, or all parts of a split one, whose tensors have not been read.

    Attributes:
        path: path that was opened.
        version: version of the format.
        metadata: values by key. A float32 becomes the shortest decimal number that rounds to it.
        entries: tensors by name, as (out, in). Quantized ones are read as float32.
        size: size of all parts in bytes.
    """

    path: Path
    version: int
    metadata: dict[str, Value]
    entries: dict[str, LazyTensor]
    size: int


def open_file(path: str | os.PathLike[str]) -> GGUF:
    """Opens a GGUF file, or all parts of a split one (name-00001-of-00003.gguf) by the path of any of them.

    Only headers are read. Raises ValueError (one line) for a damaged or missing file.
    """
    path = Path(path)
    named = _PART.fullmatch(path.name)
    number, count = (int(named["number"]), int(named["count"])) if named else (1, 1)
    if not 1 <= number <= count <= _MAX_PARTS:
        raise ValueError(
            f"{path}: its name says part {number} of {count}; parts must be 1 to the count, at most {_MAX_PARTS}"
        )
    parts: list[GGUF] = []
    entries: dict[str, LazyTensor] = {}
    spent = 0
    for i in range(1, count + 1):
        part = path.with_name(f"{named['stem']}-{i:05}-of-{count:05}.gguf") if named else path
        if i != number and not part.is_file():
            raise ValueError(f"{part}: missing, though {path.name} is one of {count} parts: fetch all into one folder")
        found, spent = _open_part(part, spent)
        _check_part(found, i, count)
        twice = next((name for name in found.entries if name in entries), None)
        if twice is not None:
            raise ValueError(f"{part}: tensor {brief(twice)} is already in an earlier part")
        entries |= found.entries
        parts.append(found)
    total = parts[0].metadata.get("split.tensors.count", len(entries))
    if type(total) is not int or total != len(entries):
        raise ValueError(f"{path}: split.tensors.count is {shown(total)}, but its {count} parts hold {len(entries)}")
    return dataclasses.replace(parts[0], path=path, entries=entries, size=sum(part.size for part in parts))


def save_file(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Value],
    tensors: Mapping[str, tuple[LazyTensor, str]],
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes version 3 of the format, some rows at a time. The file appears under its name when it is complete.

    Args:
        path: the file; one of this name is replaced.
        metadata: values by key. An int is written as uint32 (int64 where it does not fit), a float as float32.
        tensors: tensors by name, each with the type to write, one of WRITTEN. A tensor stored in that type is copied.
        progress: called with the number of bytes that were written since the last call.

    Raises:
        ValueError: a type or a value cannot be written, or a number is not finite in its type.
    """
    path = Path(path)
    header = [MAGIC, _u32(3), _u64(len(tensors)), _u64(len(metadata))]
    header += [_text(key) + _value(value) for key, value in metadata.items()]
    end = 0
    for name, (entry, kind) in tensors.items():
        if kind not in WRITTEN:
            raise ValueError(f"{path}: kind {kind!r} is not written{nearest(kind, WRITTEN) or '.'} Allowed: {WRITTEN}")
        dims = b"".join(map(_u64, reversed(entry.shape)))
        number = next(number for number, known in _TYPES.items() if known == kind)
        header.append(_text(name) + _u32(len(entry.shape)) + dims + _u32(number) + _u64(end))
        end += -(-_stored_bytes(f"{path}: tensor {name!r}", kind, entry.shape) // _ALIGNMENT) * _ALIGNMENT
    text = b"".join(header)
    with np.errstate(over="ignore"), whole_file(path) as file:
        file.write(text + bytes(-len(text) % _ALIGNMENT))
        for name, (entry, kind) in tensors.items():
            written = 0
            try:
                for piece in _encoded(entry, kind):
                    file.write(piece.reshape(-1).view(np.uint8).data)
                    written += piece.nbytes
                    progress(piece.nbytes)
            except FloatingPointError:
                raise ValueError(
                    f"{path}: tensor {name!r} holds a number that is not finite, or is too large for {kind}"
                ) from None
            file.write(bytes(-written % _ALIGNMENT))


def _open_part(path: Path, spent: int) -> tuple[GGUF, int]:
    """Opens one file; returns it and the memory that headers have taken so far."""
    file = File(path)
    header = Header(file, spent)
    version, tensors, metadata = header.start()
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment must be a power of two, got {shown(alignment)}")
    infos = [_tensor_info(header, i) for i in range(tensors)]
    begin = -(-header.at // alignment) * alignment
    entries: dict[str, LazyTensor] = {}
    end, last = 0, ""
    for name, kind, shape, start in sorted(infos, key=lambda info: info[3]):
        where = f"{path}: tensor {brief(name)}"
        if name in entries:
            raise ValueError(f"{where} appears twice")
        length = _stored_bytes(where, kind, shape)
        if start % alignment:
            raise ValueError(f"{where} starts at byte {start:,}, which is not a multiple of {alignment}")
        if start < end:
            raise ValueError(f"{where} starts at byte {start:,}, within {brief(last)}, which ends at {end:,}")
        end, last = start + length, name
        if begin + end > file.size:
            raise ValueError(
                f"{where} ends at byte {begin + end:,}, but the file has {file.size:,} (cut off? fetch it again)"
            )
        if kind in PLAIN:
            entries[name] = stored(file, begin + start, PLAIN[kind], shape, kind=kind)
        else:
            entries[name] = _in_blocks(file, begin + start, kind, shape, where)
    ordered = {name: entries[name] for name, *_ in infos}
    return GGUF(path, version, metadata, ordered, file.size), header.spent


def _tensor_info(header: Header, number: int) -> tuple[str, str, tuple[int, ...], int]:
    """Reads the name, type, shape (outermost first) and offset of a tensor."""
    path = header.file.path
    name = header.text(f"the name of tensor {number + 1}")
    what = f"tensor {brief(name)}"
    rank = header.whole(4, what)
    if rank > _MAX_RANK:
        raise ValueError(f"{path}: {what} has {rank:,} dimensions; at most {_MAX_RANK} are allowed")
    shape = tuple(header.whole(8, what) for _ in range(rank))[::-1]
    if 0 in shape:
        raise ValueError(f"{path}: {what} has shape {shape}; each dimension must be at least 1")
    kind = header.whole(4, what)
    known = _TYPES.get(kind, f"unknown number {kind}")
    if known not in PLAIN and known not in gguf_blocks.BLOCKS:
        read = ", ".join((*PLAIN, *gguf_blocks.BLOCKS))
        raise ValueError(f"{path}: {what} is of type {known}, which is not supported; supported: {read}")
    return name, known, shape, header.whole(8, what)


def _stored_bytes(where: str, kind: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor in a file, in bytes. `where` names it in error messages."""
    if kind in PLAIN:
        return math.prod(shape) * PLAIN[kind].itemsize
    numbers, size = gguf_blocks.BLOCKS[kind]
    if len(shape) < 2 or shape[-1] % numbers:
        raise ValueError(
            f"{where} is {kind} of shape {shape}: it must be a matrix whose row length is a multiple of {numbers}"
        )
    return math.prod(shape) // numbers * size


def _in_blocks(file: File, start: int, kind: str, shape: tuple[int, ...], where: str) -> LazyTensor:
    """A lazy tensor that is stored in blocks of a quantized type."""
    numbers, size = gguf_blocks.BLOCKS[kind]
    raw = stored(file, start, np.dtype(np.uint8), (*shape[:-1], shape[-1] // numbers * size))

    def entry(per: int, dtype: type[np.generic], decode: Callable[[np.ndarray], np.ndarray]) -> LazyTensor:
        """A lazy tensor of `per` elements of each block. `decode` makes them from rows of whole blocks."""

        def fill(out: np.ndarray, index: Index) -> None:
            rows, columns = index[0], index[-1]
            first, last = columns.start // per, -(-columns.stop // per)
            within = slice(columns.start - first * per, columns.stop - first * per)
            step = max(1, _STEP // (out.size // len(out)))
            for low in range(rows.start, rows.stop, step):
                high = min(low + step, rows.stop)
                part = raw.read((slice(low, high), *index[1:-1], slice(first * size, last * size)))
                try:
                    decoded = decode(part.reshape(-1, part.shape[-1]))
                except FloatingPointError:
                    raise ValueError(f"{where} has a scale that is not finite: fetch the file again") from None
                decoded = decoded.reshape(*part.shape[:-1], -1)[..., within]
                np.copyto(out[low - rows.start : high - rows.start], decoded, casting="unsafe")

        full = (*shape[:-1], shape[-1] // numbers * per)
        return LazyTensor(np.dtype(dtype), full, fill, kind, raw.nbytes)

    whole = entry(numbers, np.float32, functools.partial(gguf_blocks.dequantize, kind))
    bits = _BITS.get(kind)
    if bits is None or len(shape) != 2:
        return whole
    scales = entry(1, np.float16, lambda b: gguf_blocks.half(b.reshape(-1, size)[:, :2]))
    if bits == 8:
        values = entry(32, np.int8, lambda b: b.reshape(-1, size)[:, 2:].view(np.int8))
    else:
        values = entry(16, np.uint8, lambda b: b.reshape(-1, size)[:, 2:])
    return dataclasses.replace(whole, quantized=QuantizedParts(bits, values, scales))


def _check_part(part: GGUF, number: int, count: int) -> None:
    """Raises ValueError if a part of a split file has another number or count than its name says."""
    says = [part.metadata.get(key, 0) for key in ("split.no", "split.count")]
    due = [number - 1, count]
    if not all(type(n) is int for n in says) or (says != due and not (count == 1 and says == [0, 0])):
        raise ValueError(
            f"{part.path}: split.no and split.count are {', '.join(map(shown, says))}, but its name means "
            f"{due[0]}, {due[1]}; keep the names that parts were given (...-00001-of-00003.gguf)"
        )


def _encoded(entry: LazyTensor, kind: str) -> Iterator[np.ndarray]:
    """Encodes a tensor as bytes of the type `kind`, some rows at a time. FloatingPointError for non-finite numbers."""
    if kind in PLAIN:
        for block in entry.blocks(PLAIN[kind]):
            if not np.isfinite(block).all():
                raise FloatingPointError
            yield block
        return
    pieces = entry.quantized if entry.quantized is not None and entry.quantized.bits == _BITS[kind] else None
    step = max(1, _STEP // entry.shape[1])
    for low in range(0, entry.shape[0], step):
        rows = (slice(low, low + step),)
        if pieces is None:
            yield gguf_blocks.quantize(kind, entry.read(rows, np.dtype(np.float32)))
            continue
        scales = pieces.scales.read(rows)[..., None]
        values = pieces.values.read(rows).reshape(*scales.shape[:2], -1)
        yield np.concatenate([scales.view(np.uint8), values.view(np.uint8)], axis=2)


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def _u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return _u64(len(data)) + data


def _value(value: Value) -> bytes:
    """The bytes of a metadata value, after the number of its type."""
    if isinstance(value, str):
        return _u32(STRING) + _text(value)
    if isinstance(value, bool):
        return _u32(BOOL) + bytes([value])
    if isinstance(value, list):
        return _u32(ARRAY) + _u32(STRING) + _u64(len(value)) + b"".join(map(_text, value))
    if isinstance(value, int):
        array = np.asarray(value, np.uint32 if 0 <= value < 1 << 32 else np.int64)
    else:
        array = np.asarray(value, np.float32 if isinstance(value, float) else None)
    number = next((number for number, dtype in NUMBERS.items() if dtype == array.dtype), None)
    if number is None or array.ndim > 1:
        raise ValueError(f"metadata must be strings, numbers, or lists of them, got {shown(value)}")
    lead = _u32(ARRAY) + _u32(number) + _u64(array.size) if array.ndim else _u32(number)
    return lead + array.astype(NUMBERS[number]).tobytes()
