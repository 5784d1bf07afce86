"""Reader and writer of the pickles in PyTorch's files, which are never run as programs.

A pickle is a program, and Python's unpickler imports and calls any function that it names. The interpreter here knows
only the instructions that build plain data, and the few names that a dict of tensors needs (torch/_utils.py and
torch/serialization.py of PyTorch define them). These names become records of this module. Anything else is an error
that names it.
"""

from __future__ import annotations

import dataclasses
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import TypeVar

import ml_dtypes
import numpy as np

from llama_jax.errors import brief

# The classes whose names give the dtype of a storage.
STORAGES: dict[str, np.dtype] = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_CLASSES = {dtype: name for name, dtype in STORAGES.items()}
_DICT, _TENSOR, _PARAMETER = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
_KNOWN = {_DICT, _TENSOR, _PARAMETER, *(f"torch.{name}" for name in STORAGES)}


MAX_BYTES = 400_000  # about 3,000 tensors; a byte of it may cost 80 of memory, and a microsecond
_MAX_MEMO = 1 << 16  # objects; torch.save keeps ten for each tensor
_MAX_RANK = 32

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
    """An allowed name, instead of the object that Python would import."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A storage: `length` elements of `dtype` in the member data/`key` of the archive."""

    key: str
    dtype: np.dtype
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor: the offset of its first element in a storage, its shape, and its strides, all in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load(program: bytes) -> dict[str, Tensor]:
    """The tensors by name that a pickle of at most MAX_BYTES describes. Raises ValueError for any other pickle."""
    found = _Machine(program).run()
    if not isinstance(found, dict):
        raise ValueError(f"it holds {_kind(found)}, not a dict of tensors")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{brief(name)} is {_kind(tensor)}; only a flat dict of tensors is read")
    return found


def dump(tensors: Mapping[str, Tensor]) -> bytes:
    """The pickle of a dict of tensors, as torch.save writes it."""
    memo: dict[bytes, bytes] = {}

    def once(code: bytes) -> bytes:
        """Pickle code that makes an object and stores it in the memo; later calls return code that fetches it."""
        if code in memo:
            return b"h" + memo[code]
        memo[code] = bytes([len(memo)])
        return code + b"q" + memo[code]

    def text(value: str) -> bytes:
        data = value.encode()
        return b"X" + len(data).to_bytes(4, "little") + data

    def number(value: int) -> bytes:
        if value < 1 << 31:
            return b"J" + value.to_bytes(4, "little")
        return b"\x8a\x08" + value.to_bytes(8, "little")

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    def name(dotted: str) -> bytes:
        module, _, attribute = dotted.rpartition(".")
        return once(f"c{module}\n{attribute}\n".encode())

    parts = [b"\x80\x02", name(_DICT), b")R("]
    for key, tensor in tensors.items():
        storage = tensor.storage
        parts += [text(key), name(_TENSOR), b"("]
        parts += [b"(", once(text("storage")), name(f"torch.{_CLASSES[storage.dtype]}"), text(storage.key)]
        parts += [once(text("cpu")), number(storage.length), b"tQ"]
        parts += [number(tensor.offset), numbers(tensor.shape), numbers(tensor.strides)]
        parts += [b"\x89", name(_DICT), b")RtR"]  # requires_grad is false, and there are no hooks
    return b"".join([*parts, b"u."])


class _Machine:
    """An interpreter of the pickles that torch.save makes. Python's pickletools.py describes each instruction.

    It has a stack, marks in the stack, and a memo of objects for later use. Objects are shared and never copied or
    traversed, so that time and memory are proportional to the length of the program.
    """

    def __init__(self, program: bytes):
        self.program = program
        self.at = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """Runs the program and returns its object. Raises ValueError for an instruction that is not allowed."""
        while (code := self.take(1)) != b".":
            step = _STEPS.get(code)
            if step is None:
                known = {op.code: op for op in pickletools.opcodes}.get(code.decode("latin-1"))
                raise ValueError(
                    f"the pickle uses the instruction {known.name if known else code!r}, which a dict of tensors does "
                    "not need and which may run code; it is not read"
                )
            step(self)
        if len(self.stack) != 1 or self.marks or self.at != len(self.program):
            raise ValueError("the pickle is damaged: objects are left on the stack at its end")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        """Takes the next bytes of the program."""
        if count > len(self.program) - self.at:
            raise ValueError("the pickle is damaged: it ends too early")
        self.at += count
        return self.program[self.at - count : self.at]

    def number(self, width: int, *, signed: bool = False) -> int:
        """Takes the next `width` bytes as a whole number."""
        return int.from_bytes(self.take(width), "little", signed=signed)

    def text(self, length: int) -> str:
        """Takes the next bytes as text."""
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("the pickle is damaged: it has text that is not UTF-8") from None

    def line(self) -> str:
        """Takes the bytes up to the next line feed, as text."""
        end = self.program.find(b"\n", self.at)
        line = self.take((len(self.program) if end < 0 else end) - self.at + 1)
        return line[:-1].decode("utf-8", "backslashreplace")

    def push(self, value: object) -> None:
        """Pushes an object onto the stack."""
        self.stack.append(value)

    def pop(self, count: int = 1) -> tuple[object, ...]:
        """Pops the top objects off the stack. Those below the last mark stay."""
        first = len(self.stack) - count
        if first < (self.marks[-1] if self.marks else 0):
            raise ValueError("the pickle is damaged: it takes from an empty stack")
        values = tuple(self.stack[first:])
        del self.stack[first:]
        return values

    def marked(self) -> tuple[object, ...]:
        """Pops all objects above the last mark, and the mark."""
        if not self.marks:
            raise ValueError("the pickle is damaged: a mark is missing")
        values = self.pop(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return values

    def top(self, kind: type[_T]) -> _T:
        """Returns the top object, which must be of this type, and leaves it on the stack."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0) or not isinstance(self.stack[-1], kind):
            raise ValueError(f"the pickle is damaged: a {kind.__name__} is missing")
        return self.stack[-1]

    def put(self, index: int) -> None:
        """Stores the top object in the memo."""
        if len(self.memo) >= _MAX_MEMO:
            raise ValueError(f"the pickle keeps more than the {_MAX_MEMO:,} objects that are allowed")
        self.memo[index] = self.top(object)

    def get(self, index: int) -> None:
        """Pushes an object of the memo onto the stack."""
        if index not in self.memo:
            raise ValueError("the pickle is damaged: it uses an object that it did not keep")
        self.push(self.memo[index])

    def extend(self, values: tuple[object, ...]) -> None:
        """Appends to the list on top of the stack."""
        self.top(list).extend(values)

    def fill(self, values: tuple[object, ...]) -> None:
        """Adds keys and values, which alternate, to the dict on top of the stack."""
        target = self.top(dict)
        if len(values) % 2:
            raise ValueError("the pickle is damaged: a key has no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError(f"the pickle has a key of type {type(key).__name__}; only text is read")
            if key in target:
                raise ValueError(f"the pickle has the key {brief(key)} twice")
            target[key] = value

    def name(self, module: object, attribute: object) -> None:
        """Pushes a name onto the stack if it is one that tensors need."""
        text = f"{module}.{attribute}" if isinstance(module, str) and isinstance(attribute, str) else "?"
        if text not in _KNOWN:
            raise ValueError(
                f"the pickle names {brief(text)}, which may run code; only a dict of plain tensors is read "
                "(torch.save of a state_dict)"
            )
        self.push(_Name(text))

    def call(self) -> None:
        """Calls an allowed function: pushes the record that represents its result."""
        function, arguments = self.pop(2)
        what = function.text if isinstance(function, _Name) else None
        if what == _DICT and arguments == ():
            self.push({})
        elif what == _TENSOR and isinstance(arguments, tuple) and _is_tensor(arguments):
            self.push(Tensor(*arguments[:4]))
        elif what == _PARAMETER and isinstance(arguments, tuple) and arguments and isinstance(arguments[0], Tensor):
            self.push(arguments[0])
        else:
            raise ValueError(f"the pickle calls {what or 'what is not a function'} with arguments that are not read")

    def build(self) -> None:
        """Sets the state of an object. A state_dict has the versions of its modules there, which are ignored."""
        (state,) = self.pop()
        known = isinstance(state, dict) and list(state) == ["_metadata"]
        if not known or not isinstance(self.top(object), dict):
            raise ValueError("the pickle sets attributes of an object, which may run code; it is not read")

    def storage(self) -> None:
        """Pushes the storage that a persistent id names: ("storage", class, key, device, length)."""
        (given,) = self.pop()
        if not isinstance(given, tuple) or len(given) != 5 or not isinstance(given[1], _Name):
            raise ValueError("the pickle names a storage in a way that is not known")
        word, kind, key, _, length = given
        dtype = STORAGES.get(kind.text.removeprefix("torch."))
        if word != "storage" or dtype is None or not isinstance(key, str) or type(length) is not int or length < 0:
            raise ValueError("the pickle names a storage in a way that is not known")
        self.push(Storage(key, dtype, length))

    def long(self) -> None:
        """The instruction LONG1: pushes a whole number of any length, here of at most 64 bits."""
        length = self.number(1)
        if length > 8:
            raise ValueError(f"the pickle has a number of {length} bytes; 8 are allowed")
        self.push(self.number(length, signed=True))

    def frame(self) -> None:
        """The instruction FRAME: skips its argument, a number of bytes to read ahead, since all bytes are in memory."""
        self.take(8)

    def protocol(self) -> None:
        """Checks the version of the pickle protocol."""
        version = self.number(1)
        if version > 5:
            raise ValueError(f"the pickle has protocol {version}; 2 to 5 are read")


def _kind(value: object) -> str:
    return f"a {type(value).__name__.strip('_').lower()}" if value is not None else "None"


def _is_tensor(arguments: object) -> bool:
    """True if these are the arguments of PyTorch's function that rebuilds a tensor.

    They are a storage, an offset, a shape, strides, requires_grad, hooks and sometimes flags such as "negated". No flag
    may be set.
    """
    if not isinstance(arguments, tuple) or len(arguments) not in (6, 7) or any(arguments[6:]):
        return False
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        return False
    counts = len(shape) == len(strides) <= _MAX_RANK and all(type(n) is int for n in (offset, *shape, *strides))
    return counts and min(offset, *shape, 0) == 0


# The action of each instruction. The comments have the names of pickletools.
_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)),  # BININT1
    b"M": lambda m: m.push(m.number(2)),  # BININT2
    b"J": lambda m: m.push(m.number(4, signed=True)),  # BININT
    b"\x8a": _Machine.long,
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),  # BINFLOAT
    b"\x8c": lambda m: m.push(m.text(m.number(1))),  # SHORT_BINUNICODE
    b"X": lambda m: m.push(m.text(m.number(4))),  # BINUNICODE
    b"\x8d": lambda m: m.push(m.text(m.number(8))),  # BINUNICODE8
    b"(": lambda m: m.marks.append(len(m.stack)),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.push(m.pop(1)),  # TUPLE1
    b"\x86": lambda m: m.push(m.pop(2)),
    b"\x87": lambda m: m.push(m.pop(3)),
    b"t": lambda m: m.push(m.marked()),  # TUPLE
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.extend(m.pop()),  # APPEND
    b"e": lambda m: m.extend(m.marked()),  # APPENDS
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.fill(m.pop(2)),  # SETITEM
    b"u": lambda m: m.fill(m.marked()),  # SETITEMS
    b"q": lambda m: m.put(m.number(1)),  # BINPUT
    b"r": lambda m: m.put(m.number(4)),  # LONG_BINPUT
    b"\x94": lambda m: m.put(len(m.memo)),  # MEMOIZE
    b"h": lambda m: m.get(m.number(1)),  # BINGET
    b"j": lambda m: m.get(m.number(4)),  # LONG_BINGET
    b"c": lambda m: m.name(m.line(), m.line()),  # GLOBAL
    b"\x93": lambda m: m.name(*m.pop(2)),  # STACK_GLOBAL
    b"R": _Machine.call,  # REDUCE
    b"b": _Machine.build,
    b"Q": _Machine.storage,  # BINPERSID
}
