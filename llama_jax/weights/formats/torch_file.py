"""PyTorch's files (.pth, .bin), read and written without PyTorch and without running the program in them.

Such a file is an uncompressed zip archive. <top>/data.pkl is a pickle that describes a dict of tensors. <top>/data/0,
1, ... are the storages that hold their numbers (torch/serialization.py and torch/_utils.py of PyTorch). torch_pickle.py
reads the pickle.

Counts, sizes and offsets are checked against the size of the file before anything is read or allocated. Every error is
one line that names the file.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np

from llama_jax.errors import brief
from llama_jax.files import whole_file
from llama_jax.weights.formats import torch_pickle
from llama_jax.weights.formats.torch_pickle import Storage, Tensor
from llama_jax.weights.tensor import File, LazyTensor, stored

_MAX_MEMBERS = 10_000
_MAX_DIRECTORY = 4_000_000
_ALIGNMENT = 64  # bytes; torch.save aligns the numbers in a file to this

# Records of a zip archive (APPNOTE.TXT of PKWARE, 4.3): of a member, of the directory, and of the directory's offset.
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_OTHER_KINDS = (
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "in the format of torch before 1.6; load it in a newer torch, and save it again"),
    (b"\x80", "a bare pickle, which would have to be run; save a dict of tensors with torch.save"),
    (b"GGUF", "a GGUF file; name it *.gguf"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file with `git lfs pull`"),
)


class _CentralHeader(NamedTuple):
    """A record of the zip directory without its name: the fields of _CENTRAL in their order."""

    signature: bytes
    made_by: int
    needed: int
    flags: int
    method: int
    time: int
    date: int
    crc: int
    packed_size: int
    size: int
    name_length: int
    extra_length: int
    comment_length: int
    disk: int
    internal: int
    external: int
    offset: int


class _Member(NamedTuple):
    """A member of the archive: its first byte in the file, its size in bytes and the CRC-32 of its content."""

    start: int
    size: int
    crc: int


def open_file(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of one file by name. Only headers are read. Names of one tensor (tied weights) share a LazyTensor.

    Raises:
        ValueError: (one line) the file is damaged, of another format, or describes anything but a dict of tensors.
    """
    file = File(path)
    try:
        return _tensors(file)
    except ValueError as error:
        remedy = "; take another copy of the file" if "damaged" in str(error) else ""
        raise ValueError(f"{file.path}: {error}{remedy}") from None


def save_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, LazyTensor],
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a file that torch.load reads, also with weights_only and mmap. A block of rows at a time is in memory.

    The file appears under its name when it is complete. A LazyTensor with two names is written once, as torch.save does
    with tied weights.

    Args:
        path: the file; one of this name is replaced.
        tensors: tensors by name.
        progress: called with the number of bytes that were written since the last call.

    Raises:
        ValueError: a dtype is not supported by the format, or there are more tensors than a file may have.
    """
    allowed = torch_pickle.STORAGES.values()
    storages: dict[int, tuple[Storage, LazyTensor]] = {}  # by identity
    described: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            raise ValueError(
                f"{path}: tensor {name!r} has dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}"
            )
        storage = Storage(str(len(storages)), tensor.dtype, math.prod(tensor.shape))
        storage, _ = storages.setdefault(id(tensor), (storage, tensor))
        described[name] = Tensor(storage, 0, tensor.shape, _dense(tensor.shape))
    pickle = torch_pickle.dump(described)
    if len(pickle) > torch_pickle.MAX_BYTES:
        raise ValueError(f"{path}: {len(tensors):,} tensors are more than one file of this kind may have")
    with whole_file(Path(path)) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n")):
            with _new_member(archive, file, name) as member:
                member.write(content)
        for storage, tensor in storages.values():
            with _new_member(archive, file, f"data/{storage.key}") as member:
                for block in tensor.blocks():
                    member.write(block.reshape(-1).view(np.uint8).data)
                    progress(block.nbytes)


def _new_member(archive: zipfile.ZipFile, file: BinaryIO, name: str) -> IO[bytes]:
    """Opens a new member of a zip archive for writing, with its contents aligned as torch aligns them."""
    info = zipfile.ZipInfo(f"archive/{name}")
    start = file.tell() + _LOCAL.size + len(info.filename) + 20 + 4  # 20: its sizes in 64 bits; 4: a header of padding
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    return archive.open(info, "w", force_zip64=True)


def _tensors(file: File) -> dict[str, LazyTensor]:
    members = _members(file)
    tops = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(tops) != 1:
        raise ValueError(f"the zip archive has {len(tops)} files <folder>/data.pkl, and a torch file has exactly one")
    top = tops[0]
    for name in members:  # names are only looked up, and never become paths
        if not name.startswith(top + "/"):
            raise ValueError(f"the member {brief(name)} is outside of its folder {brief(top)}: not a torch file")
    order = members.get(f"{top}/byteorder")
    if order is not None and (order.size != 6 or file.read(order.start, 6) != b"little"):
        raise ValueError("numbers in it are not little-endian; only those are read")
    pickle = members[f"{top}/data.pkl"]
    if pickle.size > torch_pickle.MAX_BYTES:
        raise ValueError(f"data.pkl has {pickle.size:,} bytes; {torch_pickle.MAX_BYTES:,} are allowed")
    program = file.read(pickle.start, pickle.size)
    if zlib.crc32(program) != pickle.crc:
        raise ValueError("data.pkl is damaged (its checksum differs): download the file again")
    entries: dict[str, LazyTensor] = {}
    same: dict[tuple[int, np.dtype, tuple[int, ...]], LazyTensor] = {}
    dtypes: dict[str, np.dtype] = {}
    for name, tensor in torch_pickle.load(program).items():
        start = _place(members.get(f"{top}/data/{tensor.storage.key}"), tensor, f"tensor {brief(name)}")
        dtype, shape = tensor.storage.dtype, tensor.shape
        if dtypes.setdefault(tensor.storage.key, dtype) != dtype:
            raise ValueError(
                f"tensor {brief(name)} reads a storage as {dtype} that another reads as {dtypes[tensor.storage.key]}"
            )
        entries[name] = same.setdefault((start, dtype, shape), stored(file, start, dtype, shape))
    sizes = [entry.nbytes for entry in entries.values()]
    if sum(sizes) > file.size + max(sizes, default=0):  # only an embedding may be shared
        raise ValueError(
            f"the tensors have {sum(sizes):,} bytes together, but the file has {file.size:,}: they share storage"
        )
    return entries


def _place(member: _Member | None, tensor: Tensor, where: str) -> int:
    """The first byte of a tensor, which must be within its storage and in C order."""
    storage, shape, width = tensor.storage, tensor.shape, tensor.storage.dtype.itemsize
    if member is None:
        raise ValueError(f"{where} is in storage {brief(storage.key)}, which is not in the file")
    if member.size != storage.length * width:
        raise ValueError(
            f"{where}: storage {brief(storage.key)} should have {storage.length * width:,} bytes "
            f"({storage.length:,} of {storage.dtype}), but has {member.size:,}"
        )
    if math.prod(n for n in shape if n) * width > 1 << 62:
        raise ValueError(f"{where} has shape {brief(shape)}, which is larger than any memory")
    dense = zip(shape, tensor.strides, _dense(shape), strict=True)
    if 0 not in shape and any(n > 1 and given != wanted for n, given, wanted in dense):
        raise ValueError(
            f"{where} is not contiguous (shape {brief(shape)}, strides {brief(tensor.strides)}): save its .contiguous()"
        )
    if tensor.offset + math.prod(shape) > storage.length:
        raise ValueError(
            f"{where} of shape {brief(shape)} from element {tensor.offset:,} on exceeds its storage of "
            f"{storage.length:,}"
        )
    return member.start + tensor.offset * width


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor in C order."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


# The archive.


def _members(file: File) -> dict[str, _Member]:
    """The members of the archive by name. Their bytes are before the directory and do not overlap."""
    count, start, end = _directory(file)
    members: dict[str, _Member] = {}
    spans: list[tuple[int, int]] = [(start, end)]
    for record in _records(file.read(start, end - start), count):
        if record.name in members:
            raise ValueError(f"{record.where} appears twice")
        begin = _first_byte(file, record, start)
        spans.append((record.offset, begin + record.size))
        members[record.name] = _Member(begin, record.size, record.crc)
    spans.sort()
    if any(begin < before for (_, before), (begin, _) in zip(spans, spans[1:], strict=False)):
        raise ValueError("members of its zip archive overlap: not a file of torch.save")
    return members


class _Record(NamedTuple):
    """A record of the zip directory, which describes one member.

    Attributes:
        raw_name: its name as bytes.
        size: bytes of its content.
        crc: CRC-32 of its content.
        offset: first byte of its local header in the file.
    """

    raw_name: bytes
    size: int
    crc: int
    offset: int

    @property
    def name(self) -> str:
        """Name of the member as text."""
        return self.raw_name.decode("utf-8", "backslashreplace")

    @property
    def where(self) -> str:
        """Name of the member in error messages."""
        return f"the member {brief(self.name)}"


def _records(directory: bytes, count: int) -> Iterator[_Record]:
    """The `count` records that make up a directory. Raises ValueError for one of a compressed or encrypted member."""
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory) or directory[at : at + 4] != b"PK\1\2":
            raise ValueError("the zip directory is damaged: download the file again")
        header = _CentralHeader(*_CENTRAL.unpack_from(directory, at))
        name_end = at + _CENTRAL.size + header.name_length
        record = _Record(directory[at + _CENTRAL.size : name_end], header.size, header.crc, header.offset)
        extra = directory[name_end : name_end + header.extra_length]
        size, packed, offset = _wide((header.size, header.packed_size, header.offset), extra, record.where)
        if header.flags & 1 or header.method != zipfile.ZIP_STORED or packed != size:
            raise ValueError(f"{record.where} is compressed or encrypted; torch.save does neither: save it again")
        yield record._replace(size=size, offset=offset)
        at = name_end + header.extra_length + header.comment_length
    if at != len(directory):
        raise ValueError("the zip directory is damaged: download the file again")


def _first_byte(file: File, record: _Record, end: int) -> int:
    """The first byte of a member's content, which must end before byte `end`, where the directory begins."""
    header_end = record.offset + _LOCAL.size + len(record.raw_name)
    if header_end > end:
        raise ValueError(f"{record.where} begins after the end of the data: download the file again")
    header = file.read(record.offset, header_end - record.offset)
    signature, *_, name_length, extra_length = _LOCAL.unpack_from(header)
    if signature != b"PK\3\4" or name_length != len(record.raw_name) or header[_LOCAL.size :] != record.raw_name:
        raise ValueError(f"{record.where} is not where the zip directory says")
    begin = header_end + extra_length
    if begin + record.size > end:
        raise ValueError(
            f"{record.where} of {record.size:,} bytes ends after the end of the data: download the file again"
        )
    return begin


def _directory(file: File) -> tuple[int, int, int]:
    """The number of members, and the first and last byte of the directory that lists them."""
    head = file.read(0, min(file.size, 32))
    if not head.startswith(b"PK\3\4"):
        kinds = [kind for start, kind in _OTHER_KINDS if head.startswith(start)]
        if head[8:9] == b"{":
            kinds.append("a safetensors file; name it *.safetensors")
        raise ValueError(f"this is {kinds[0]}" if kinds else "not a file of torch.save, which begins with PK")
    end = file.size - _END.size
    last = file.read(max(end, 0), min(file.size, _END.size))
    if len(last) < _END.size or not last.startswith(b"PK\5\6"):
        raise ValueError("the zip directory at the end is missing, so the file was cut off: download it again")
    _, _, _, _, count, size, start, _ = _END.unpack(last)
    locator = file.read(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
    if locator.startswith(b"PK\6\7"):
        _, _, place, _ = _LOCATOR.unpack(locator)
        if place + _END_64.size > end - _LOCATOR.size:
            raise ValueError("the zip directory is damaged: download the file again")
        end = place
        signature, *_, count, size, start = _END_64.unpack(file.read(place, _END_64.size))
        if signature != b"PK\6\6":
            raise ValueError("the zip directory is damaged: download the file again")
    if start + size != end:
        raise ValueError("the zip directory is not at the offset that the file's end says: download the file again")
    if count > _MAX_MEMBERS or size > _MAX_DIRECTORY:
        raise ValueError(f"the zip directory lists {count:,} members in {size:,} bytes, more than any torch file")
    return count, start, end


def _wide(values: tuple[int, int, int], extra: bytes, where: str) -> tuple[int, ...]:
    """Sizes and offset of a member. Those beyond 32 bits are in an extra field (APPNOTE.TXT, 4.5.3)."""
    wanted = [i for i, value in enumerate(values) if value == 0xFFFFFFFF]
    out, at = list(values), 0
    while wanted and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1 and length >= 8 * len(wanted) and at + 4 + length <= len(extra):
            for i, value in zip(wanted, struct.unpack_from(f"<{len(wanted)}Q", extra, at + 4), strict=True):
                out[i] = value
            return tuple(out)
        at += 4 + length
    if wanted:
        raise ValueError(f"{where} has no size: its zip directory is damaged")
    return tuple(out)
