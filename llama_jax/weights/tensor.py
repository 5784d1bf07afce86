"""Lazy tensors: tensors in files that have not been read, and the operations that make new lazy tensors of them.

Files are read by byte range and never mapped. The process has its own copy of the data, so later changes of a file have
no effect, and a truncated file is an error instead of a signal. Pages of the file do not count as memory of the
process.

Every format returns its tensors as lazy tensors. Differences in row order and packing between formats are removed by
wrapping lazy tensors in others, so that loading and saving do not depend on the format. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llama_jax.files import File

Index = tuple[slice, ...]  # one contiguous slice for each dimension, with whole-number bounds
Empty = Callable[[tuple[int, ...], np.dtype], np.ndarray]  # makes an uninitialized array
FLOATS = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))  # the dtypes of weights

ALIGNMENT = 64  # bytes; jax can use memory on this boundary on a CPU without a copy
_BLOCK = 1 << 22  # bytes that are converted or written at a time; a block stays in the CPU cache
_LEAST_RUN = 1 << 10  # bytes; shorter pieces of rows are read together with the bytes between them
_WIDEST = 1 << 17  # numbers in a row of any embedding: 405B has 16,384


class QuantizedParts(NamedTuple):
    """The exact parts of a tensor (out, in) that is stored in groups of 32 along `in`, each with one scale.

    Attributes:
        bits: 8 or 4.
        values: int8 (out, in), or uint8 (out, in / 2) with two numbers in a byte, packed as in ops/quant.py.
        scales: float16 (out, in / 32).
    """

    bits: int
    values: LazyTensor
    scales: LazyTensor


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read yet.

    Attributes:
        dtype: dtype of the array that `read` returns.
        shape: shape of the tensor.
        fill: function of (out, index). It writes the part `index` of the tensor into `out`, a C-contiguous array, and
            casts to the dtype of `out`.
        kind: name of the type in the file, e.g. "BF16" or "Q4_K".
        nbytes: size in the file, in bytes.
        quantized: the exact parts of a quantized tensor that our quantized leaves can hold, else None.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    fill: Callable[[np.ndarray, Index], None]
    kind: str
    nbytes: int
    quantized: QuantizedParts | None = None

    def read(
        self, index: Sequence[slice] | None = None, dtype: npt.DTypeLike | None = None, empty: Empty | None = None
    ) -> np.ndarray:
        """Reads the tensor, or a part of it, into new memory that jax can use on a CPU without a copy.

        Args:
            index: a part of the tensor; None for all of it.
            dtype: dtype of the result; None for that of the tensor.
            empty: makes the memory; the default is `aligned`.
        """
        whole = tuple(slice(0, n) for n in self.shape)
        part = whole if index is None else (*index, *whole[len(index) :])
        bounds = tuple(slice(*s.indices(n)[:2]) for s, n in zip(part, self.shape, strict=True))
        shape = tuple(max(0, s.stop - s.start) for s in bounds)
        out = (empty or aligned)(shape, self.dtype if dtype is None else np.dtype(dtype))
        if out.size:
            self.fill(out, bounds)
        return out

    def blocks(self, dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        """Reads the tensor as blocks of rows, for writers. One block at a time is in memory."""
        for _, part in row_blocks(tuple(slice(0, n) for n in self.shape), self.dtype.itemsize):
            yield self.read(part, dtype)

    def cast(self, dtype: np.dtype, what: str) -> LazyTensor:
        """The tensor cast to another dtype. `what` names it in the error about values beyond float16's range."""
        if dtype == self.dtype:
            return self

        def fill(out: np.ndarray, index: Index) -> None:
            with np.errstate(over="ignore"):
                self.fill(out, index)
            if out.dtype == np.float16 and not np.isfinite(out).all():
                raise ValueError(f"{what} has values beyond the range of float16: write bfloat16 or float32")

        return dataclasses.replace(self, dtype=np.dtype(dtype), fill=fill, quantized=None)


def equal(a: LazyTensor, b: LazyTensor) -> bool:
    """True if two tensors are equal bit for bit. The first rows are compared first, and usually decide it."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.kind != b.kind or a.shape[-1] > _WIDEST:
        return False
    head = (slice(0, 16),)
    if a.read(head).tobytes() != b.read(head).tobytes():
        return False
    return all(x.tobytes() == y.tobytes() for x, y in zip(a.blocks(), b.blocks(), strict=True))


def main_dtype(tensors: Iterable[LazyTensor]) -> np.dtype:
    """The dtype of most elements of these tensors."""
    sizes: dict[np.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=sizes.__getitem__)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array on a 64-byte boundary."""
    size = math.prod(shape) * dtype.itemsize
    pool = np.empty(size + ALIGNMENT, np.uint8)
    start = -pool.ctypes.data % ALIGNMENT
    return pool[start : start + size].view(dtype).reshape(shape)


def stored(file: File, start: int, dtype: np.dtype, shape: tuple[int, ...], *, kind: str | None = None) -> LazyTensor:
    """A lazy tensor whose elements are stored in a file in C order, beginning at byte `start`."""

    def fill(out: np.ndarray, index: Index) -> None:
        if out.dtype == dtype:
            _read_rows(file, start, dtype, shape, index, out)
            return
        for at, part in row_blocks(index, dtype.itemsize):
            scratch = np.empty(tuple(s.stop - s.start for s in part), dtype)
            _read_rows(file, start, dtype, shape, part, scratch)
            np.copyto(out[at], scratch, casting="unsafe")

    return LazyTensor(dtype, shape, fill, kind or dtype.name, math.prod(shape) * dtype.itemsize)


def of_array(array: Callable[[], np.ndarray], dtype: np.dtype, shape: tuple[int, ...]) -> LazyTensor:
    """A lazy tensor whose contents the function `array` returns as an array in memory. It is called at each read."""

    def fill(out: np.ndarray, index: Index) -> None:
        np.copyto(out, array()[index], casting="unsafe")

    return LazyTensor(dtype, shape, fill, dtype.name, math.prod(shape) * dtype.itemsize)


def joined(parts: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """The concatenation of tensors of one dtype along `axis`."""
    ends = np.cumsum([part.shape[axis] for part in parts]).tolist()
    shape = list(parts[0].shape)
    shape[axis] = ends[-1]

    def fill(out: np.ndarray, index: Index) -> None:
        lead = (slice(None),) * axis
        for part, end in zip(parts, ends, strict=True):
            begin = end - part.shape[axis]
            start, stop = max(index[axis].start, begin), min(index[axis].stop, end)
            if start >= stop:
                continue
            inner = (*index[:axis], slice(start - begin, stop - begin), *index[axis + 1 :])
            target = out[(*lead, slice(start - index[axis].start, stop - index[axis].start))]
            if target.flags.c_contiguous:
                part.fill(target, inner)
                continue
            for at, block in row_blocks(inner, part.dtype.itemsize):
                target[at] = part.read(block, out.dtype)

    total = sum(part.nbytes for part in parts)
    return LazyTensor(parts[0].dtype, tuple(shape), fill, parts[0].kind, total)


def transposed(entry: LazyTensor) -> LazyTensor:
    """The transpose of a matrix."""

    def fill(out: np.ndarray, index: Index) -> None:
        rows, columns = index
        for at, block in row_blocks((columns, rows), entry.dtype.itemsize):
            np.copyto(out[:, at[0]], entry.read(block).T, casting="unsafe")

    return LazyTensor(entry.dtype, entry.shape[::-1], fill, entry.kind, entry.nbytes)


def reordered(entry: LazyTensor, period: int, order: np.ndarray) -> LazyTensor:
    """A tensor with its rows permuted within each group of `period`: row i of a group is its old row order[i]."""

    def fill(out: np.ndarray, index: Index) -> None:
        start, stop = index[0].start, index[0].stop
        per_row = max(1, math.prod(s.stop - s.start for s in index[1:])) * entry.dtype.itemsize
        step = max(1, _BLOCK // (per_row * period)) * period
        for low in range(start // period * period, stop, step):
            high = min(low + step, -(-stop // period) * period)
            rows = entry.read((slice(low, high), *index[1:]), out.dtype)
            rows = rows.reshape(-1, period, *rows.shape[1:])[:, order].reshape(rows.shape)
            first, last = max(low, start), min(high, stop)
            out[first - start : last - start] = rows[first - low : last - low]

    pieces = entry.quantized
    if pieces is not None:
        pieces = QuantizedParts(
            pieces.bits, reordered(pieces.values, period, order), reordered(pieces.scales, period, order)
        )
    return dataclasses.replace(entry, fill=fill, quantized=pieces)


def row_blocks(index: Index, itemsize: int) -> list[tuple[Index, Index]]:
    """Blocks of rows of about 4 MB that make up a part: the index of each within the part, and within the tensor."""
    if not index:
        return [((), ())]
    per_row = max(1, math.prod(s.stop - s.start for s in index[1:])) * itemsize
    step = max(1, _BLOCK // per_row)
    first, last = index[0].start, index[0].stop
    return [
        ((slice(low - first, min(low + step, last) - first),), (slice(low, min(low + step, last)), *index[1:]))
        for low in range(first, last, step)
    ]


def _read_rows(file: File, start: int, dtype: np.dtype, shape: tuple[int, ...], index: Index, out: np.ndarray) -> None:
    """Reads a part into `out`, an array of the same dtype, in runs of bytes that are as long as possible."""
    whole = [i for i, (s, n) in enumerate(zip(index, shape, strict=True)) if s.stop - s.start != n]
    inner = whole[-1] if whole else 0  # the dimensions after this one are read whole
    strides = [math.prod(shape[i + 1 :]) * dtype.itemsize for i in range(len(shape))]
    data = out.reshape(-1).view(np.uint8).data
    if not shape:
        file.read_into(data, start)
        return
    run = (index[inner].stop - index[inner].start) * strides[inner]
    outer = [range(s.start, s.stop) for s in index[:inner]]
    if not outer:
        file.read_into(data, start + index[0].start * strides[0])
    elif inner == 1 and run < _LEAST_RUN and run * 16 > strides[0]:
        _read_through(file, start, dtype, shape, index, out)
    else:
        done = 0
        for at in np.ndindex(*map(len, outer)):
            offset = sum(r[i] * stride for r, i, stride in zip(outer, at, strides[:inner], strict=True))
            file.read_into(data[done : done + run], start + offset + index[inner].start * strides[inner])
            done += run


def _read_through(
    file: File, start: int, dtype: np.dtype, shape: tuple[int, ...], index: Index, out: np.ndarray
) -> None:
    """Reads a part with short pieces of many rows: whole rows are read, a block at a time, and the pieces copied."""
    rows = (index[0], *(slice(0, n) for n in shape[1:]))
    for at, block in row_blocks(rows, dtype.itemsize):
        scratch = np.empty((block[0].stop - block[0].start, *shape[1:]), dtype)
        _read_rows(file, start, dtype, shape, block, scratch)
        out[at] = scratch[(slice(None), *index[1:])]
