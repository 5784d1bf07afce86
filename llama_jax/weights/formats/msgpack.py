"""Reader of flax.serialization files, which locates the arrays in a file without reading them.

The file is MessagePack (github.com/msgpack/msgpack/blob/master/spec.md): maps with string keys, whose leaves are
extension values of type 1 that hold [shape, dtype name, bytes in C order]. An array of more than 2**30 bytes is a map
instead, of its shape and of the pieces of the flattened array (flax/serialization.py, `_chunk`). Only headers are read,
and the array data are skipped. Any other MessagePack value is an error of one line that names the file.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from llama_jax.weights.tensor import File, Index, LazyTensor, joined, stored

_DTYPES = {
    np.dtype(t).name: np.dtype(t)
    for t in (ml_dtypes.bfloat16, "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
}
_CHUNKED = "__msgpack_chunked_array__"
_MAX_DEPTH = 16  # maps within each other; a Llama has 5
_MAX_ITEMS = 1 << 13  # items of all maps together; Llama 405B in float32 has about 6,100
_MAX_NAME = 256  # characters of a whole name, "model/layers/..."
_MAX_RANK = 32
_WINDOW = 1 << 12  # bytes that are read at a time for headers
_BLOCK = 1 << 22  # bytes of whole rows that are read at a time from an array in chunks

_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}  # first byte -> length
_TRUE = 0xC3

Node = dict[str, "Node"] | LazyTensor | int


def open_file(file: File) -> dict[str, LazyTensor]:
    """The arrays of a file by name. A name is the keys that lead to the array, joined by "/".

    Raises:
        ValueError: (one line) the file is cut off or damaged, or holds anything but maps of arrays.
    """
    scan = _Scan(file)
    tree = scan.map(0)
    if scan.at != file.size:
        raise scan.error(f"{file.size - scan.at:,} bytes follow the end of its tree")
    arrays: dict[str, LazyTensor] = {}
    _collect(file, "", tree, arrays)
    if not arrays:
        raise ValueError(f"{file.path}: no arrays in this file")
    return arrays


def _collect(file: File, name: str, node: Node, arrays: dict[str, LazyTensor]) -> None:
    """Adds the arrays below `node` to `arrays`."""
    if isinstance(node, dict) and _CHUNKED in node:
        node = _unchunked(f"{file.path}: {name!r}", node)
    if isinstance(node, dict):
        for key, below in node.items():
            _collect(file, f"{name}/{key}" if name else key, below, arrays)
    elif len(name) > _MAX_NAME:
        raise ValueError(f"{file.path}: a name of {len(name):,} characters ({name[:40]!r}...); {_MAX_NAME} are allowed")
    elif not isinstance(node, LazyTensor):
        raise ValueError(f"{file.path}: {name!r} is a number, and weights of a model are arrays only")
    elif name in arrays:  # {"a": {"b": x}, "a/b": y}
        raise ValueError(f"{file.path}: the name {name!r} appears twice")
    else:
        arrays[name] = node


def _unchunked(where: str, node: dict[str, Node]) -> LazyTensor:
    """The array that a map describes by its shape and its flattened pieces, both as maps {"0": ..., "1": ...}."""
    sizes, pieces = _counted(where, node, "shape"), _counted(where, node, "chunks")
    shape = tuple(n for n in sizes if type(n) is int)
    parts = [piece for piece in pieces if isinstance(piece, LazyTensor) and len(piece.shape) == 1]
    if len(shape) != len(sizes) or not 0 < len(shape) <= _MAX_RANK:
        raise ValueError(f"{where} is an array in chunks whose shape is not 1 to {_MAX_RANK} whole numbers")
    if len(parts) != len(pieces) or len({part.dtype for part in parts}) != 1:
        raise ValueError(f"{where} is an array in chunks that are not flat arrays of one dtype")
    need, given = math.prod(shape), sum(part.shape[0] for part in parts)
    if need != given or not need:
        raise ValueError(f"{where} has shape {shape} in chunks, which needs {need:,} numbers, but they hold {given:,}")
    return _reshaped(joined(parts, 0), shape)


def _counted(where: str, node: dict[str, Node], key: str) -> list[Node]:
    """The values of a map whose keys are "0", "1", ..., in that order."""
    values = node.get(key)
    if not isinstance(values, dict) or values.keys() != {str(i) for i in range(len(values))}:
        raise ValueError(f"{where} is an array in chunks without a map of {key!r} numbered from 0")
    return [values[str(i)] for i in range(len(values))]


def _reshaped(flat: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """A flat array reshaped to `shape`. Blocks of whole rows are read, and the part is copied out of them."""
    width = math.prod(shape[1:])
    step = max(1, _BLOCK // (width * flat.dtype.itemsize))

    def fill(out: np.ndarray, index: Index) -> None:
        first, last = index[0].start, index[0].stop
        for low in range(first, last, step):
            high = min(low + step, last)
            rows = flat.read((slice(low * width, high * width),)).reshape(-1, *shape[1:])
            np.copyto(out[low - first : high - first], rows[(slice(None), *index[1:])], casting="unsafe")

    return LazyTensor(flat.dtype, shape, fill, flat.kind, flat.nbytes)


class _Scan:
    """A reader that goes through a file from value to value. `at` is the offset of the next byte."""

    def __init__(self, file: File):
        self.at = 0
        self._items = 0
        self._file = file
        self._window = b""
        self._start = 0

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self._file.path}: at byte {self.at:,}: {what}; damaged, or not a flax msgpack file")

    def map(self, depth: int) -> dict[str, Node]:
        """Reads the map that begins at `at`."""
        count = self._length("a map", fixed=(0x80, 0x8F), sized={0xDE: 2, 0xDF: 4})
        self._items += count
        if depth >= _MAX_DEPTH:
            raise self.error(f"more than {_MAX_DEPTH} maps within each other")
        if self._items > _MAX_ITEMS:
            raise self.error(f"{self._items:,} names in all, where {_MAX_ITEMS:,} are allowed")
        found: dict[str, Node] = {}
        for _ in range(count):
            key = self._string()
            if key in found:
                raise self.error(f"the name {key!r} appears twice")
            found[key] = self._value(depth)
        return found

    def _value(self, depth: int) -> Node:
        """Reads a map, an array, or one of the numbers and the `true` that describe an array in chunks."""
        kind = self._peek()
        if 0x80 <= kind <= 0x8F or kind in (0xDE, 0xDF):
            return self.map(depth + 1)
        if kind in _EXTENSIONS or 0xC7 <= kind <= 0xC9:
            return self._array()
        if kind == _TRUE:
            self._take(1)
            return True
        return self._integer("a map, an array or a whole number")

    def _array(self) -> LazyTensor:
        kind = self._uint(1)
        length = _EXTENSIONS.get(kind) or self._uint({0xC7: 1, 0xC8: 2, 0xC9: 4}[kind])
        code = self._uint(1)
        end = self.at + length
        if code != 1:
            raise self.error(f"an extension of type {code}, where only arrays (type 1) belong")
        if self._length("[shape, dtype, bytes]", fixed=(0x90, 0x9F), sized={}) != 3:
            raise self.error("an array that is not [shape, dtype, bytes]")
        rank = self._length("a shape", fixed=(0x90, 0x9F), sized={0xDC: 2})
        if rank > _MAX_RANK:
            raise self.error(f"an array of {rank} dimensions, where {_MAX_RANK} are allowed")
        shape = tuple(self._integer("a dimension") for _ in range(rank))
        name = self._string()
        if name not in _DTYPES:
            raise self.error(f"an array of dtype {name!r}; supported: {', '.join(_DTYPES)}")
        length, dtype = self._length("bytes", fixed=None, sized={0xC4: 1, 0xC5: 2, 0xC6: 4}), _DTYPES[name]
        if math.prod(shape) * dtype.itemsize != length or any(n >> 62 for n in shape):
            raise self.error(f"an array of shape {shape} and dtype {name}, with {length:,} bytes")
        if self.at + length != end:
            raise self.error(f"an array that ends at byte {self.at + length:,}, in a place that ends at {end:,}")
        start, self.at = self.at, end
        return stored(self._file, start, dtype, shape)

    def _string(self) -> str:
        length = self._length("a name", fixed=(0xA0, 0xBF), sized={0xD9: 1})
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self.error("a name that is not UTF-8") from None

    def _integer(self, wanted: str) -> int:
        kind = self._peek()
        if kind <= 0x7F:
            return self._uint(1)
        if not 0xCC <= kind <= 0xCF:
            raise self.error(f"{wanted} expected, got 0x{kind:02x}")
        self._take(1)
        return self._uint(1 << (kind - 0xCC))

    def _length(self, wanted: str, *, fixed: tuple[int, int] | None, sized: dict[int, int]) -> int:
        """Reads a header and returns the count in it, which is in its one byte or in the bytes after that.

        Every counted value takes at least one byte, so a count above the number of bytes left is an error.
        """
        kind = self._peek()
        if fixed is not None and fixed[0] <= kind <= fixed[1]:
            length = self._uint(1) - fixed[0]
        elif kind in sized:
            self._take(1)
            length = self._uint(sized[kind])
        else:
            raise self.error(f"{wanted} expected, got 0x{kind:02x}")
        if length > self._file.size - self.at:
            raise self.error(f"{wanted} of {length:,}, with {self._file.size - self.at:,} bytes left: cut off")
        return length

    def _uint(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _peek(self) -> int:
        byte = self._uint(1)
        self.at -= 1
        return byte

    def _take(self, size: int) -> bytes:
        """Reads the next bytes, at most 255."""
        begin = self.at - self._start
        if begin < 0 or begin + size > len(self._window):
            if self.at + size > self._file.size:
                raise self.error(f"{size} more bytes expected, at the end of the file: cut off")
            self._window = self._file.read(self.at, min(_WINDOW, self._file.size - self.at))
            self._start, begin = self.at, 0
        self.at += size
        return self._window[begin : begin + size]
