"""The collectives and kernels of a compiled program, read from its scheduled HLO text. This module does not import jax.

A computation that a loop calls counts as often as the loop runs. An asynchronous collective overlaps if there is
arithmetic between its start and its end. All other collectives are exposed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_HEADER = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|body|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ARITHMETIC = ("fusion", "dot", "convolution", "custom-call", "while")
_INDEX = re.compile(r"index=(\d+)")
_GROUPS = re.compile(
    r"replica_groups=(\{\{[\d,]+\}|\[\d+,\d+\](?:<=\[[\d,]+\](?:T\([\d,]+\))?)?|mesh\[[^\]]*\] \{[^}]*\})"
)
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")  # in a program's first line; each is 1 by default
_KERNELS = {
    "splash attention": r"%splash_[\w.]+ = ",
    "pallas": r'custom_call_target="tpu_custom_call"',
    "ragged attention": r"%ragged_attention[\w.]* = ",
    "few rows": r"%few_rows[\w.]* = ",
    "flash attention": r'name = "flash_\w+"',
    "split decoding": r'name = "split_decode"',
    "cudnn attention": r'custom_call_target="__cudnn\$fmha',
    "cublas": r'custom_call_target="__cublas\$',
    "triton": r'"__triton|__gpu\$xla.gpu.triton',
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program that go over the same links.

    Attributes:
        kind: One of KINDS.
        ports: Devices of one host or slice among those that communicate, if these are in several; else 0.
        count: How often they run in a step.
        overlapped: Bytes that a device sends in a step while it computes.
        exposed: Bytes that a device sends in a step while it waits.
    """

    kind: str
    ports: int
    count: int
    overlapped: float
    exposed: float


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of the text: its name, the type of its result, its opcode, and all that follows.

    `called` names the computations that it calls, and `operands` its operands.
    """

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def called(self) -> list[str]:  # noqa: D102
        branches = _BRANCHES.search(self.rest)
        names = _CALLED.findall(self.rest) + re.findall(r"%([\w.\-]+)", branches[1] if branches else "")
        return names + (re.findall(r"\bto_apply=%([\w.\-]+)", self.rest) if self.opcode == "call" else [])

    @property
    def operands(self) -> list[str]:  # noqa: D102
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


Computations = dict[str, list[Instruction]]


def collectives(text: str, islands: Sequence[int] = ()) -> list[Collective]:
    """The collectives of a compiled program by kind; bytes are those that leave one device, by ring algorithms.

    Args:
        text: The scheduled HLO text.
        islands: Number of the host or slice of each device of the program. By default all are in the same.
    """
    devices = len(islands) or math.prod(map(int, _DEVICES.findall(text.partition("\n")[0])))
    computations, entry = parse(text.replace("replica_groups={}", f"replica_groups=[1,{devices}]<=[{devices}]"))
    found: dict[tuple[int, int], Collective] = {}
    for kind, times, sent, hidden, rest in _walk(computations, entry, 1, False):
        key = (KINDS.index(kind), _ports(kind, rest, islands))
        known = found.get(key, Collective(kind, key[1], 0, 0.0, 0.0))
        overlapped, exposed = (known.overlapped + times * sent * hidden, known.exposed + times * sent * (not hidden))
        found[key] = Collective(kind, key[1], known.count + times, overlapped, exposed)
    return [found[key] for key in sorted(found)]


def kernels(text: str) -> dict[str, int]:
    """The number of calls of hand-written kernels in the program's text by name: Pallas, cuDNN, cuBLAS, Triton."""
    counts = {name: len(re.findall(mark, text)) for name, mark in _KERNELS.items()}
    return {name: count for name, count in counts.items() if count}


def operations(text: str) -> float:
    """Operations of all matrix products that one device computes in a step, those of hand-written kernels excepted."""
    computations, entry = parse(text)
    return sum(_operations(computations, entry, 1))


def _operations(computations: Computations, name: str, times: int) -> Iterator[float]:
    """Yields the operations of each product under a computation that runs so many times."""
    instructions = computations.get(name, [])
    types = {instruction.name: instruction.type for instruction in instructions}
    for instruction in instructions:
        if instruction.opcode in ("dot", "convolution") or "__cublas$" in instruction.rest:
            yield 2.0 * times * math.prod(_shape(instruction.type)) * _contracted(instruction, types)
        runs = times * trips(computations, instructions, instruction) if instruction.opcode == "while" else times
        for called in instruction.called:
            yield from _operations(computations, called, runs)


def _contracted(product: Instruction, types: dict[str, str]) -> int:
    """The number of products that are summed for each element of a result."""
    left, right = (_shape(types.get(name, "")) for name in product.operands[:2])
    axes = re.search(r"lhs_contracting_dim(?:s=\{|ensions\":\[)([\d,\"]*)", product.rest)  # of a dot, or of cuBLAS
    if axes:
        return math.prod(left[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    labels = re.search(r"dim_labels=\w+_(\w+)->", product.rest)
    # A TPU writes the batch axes of a product as axes of a dilated window: one of its places is not zero.
    batched = "lhs_dilate" in product.rest
    sizes = zip(labels[1] if labels else "", right, strict=False)
    return math.prod(size for label, size in sizes if label == "i" or (label.isdigit() and not batched))


def _shape(type_: str) -> list[int]:
    """The sizes of the first array of a type."""
    match = re.search(r"\[([\d,]*)\]", type_)
    return [int(n) for n in match[1].split(",") if n] if match else []


def parse(text: str) -> tuple[Computations, str]:
    """The instructions of each computation in their scheduled order, and the name of the entry."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}":  # a kernel's configuration has lines that begin with braces
            current = None
        elif current is not None:
            match = _INSTRUCTION.match(line)
            if match:
                current.append(Instruction(*match.groups()))
    return computations, entry


def _walk(
    computations: Computations, name: str, times: int, hidden: bool
) -> Iterator[tuple[str, int, float, bool, str]]:
    """Yields (kind, runs in a step, bytes sent in one run, overlapped, attributes) of each collective of a computation
    and of those that it calls.
    """
    instructions = computations.get(name, [])
    ends = {op: i for i, done in enumerate(instructions) if _is_done(done) for op in done.operands[:1]}
    chains = _chains(computations, instructions)
    for i, instruction in enumerate(instructions):
        opcode = instruction.opcode
        done = ends.get(instruction.name)
        inside = hidden
        if done is not None:
            inside = hidden or any(op.opcode in _ARITHMETIC for op in instructions[i + 1 : done])
        kind = opcode.removesuffix("-start")
        if kind in KINDS and not opcode.endswith("-done"):
            final = instructions[done] if done is not None and opcode.endswith("-start") else instruction
            yield kind, times, _sent(kind, final.type, instruction.rest), inside, instruction.rest
        if opcode == "fusion":  # its collectives are those of _chains
            continue
        runs = times * trips(computations, instructions, instruction) if opcode == "while" else times
        for called in instruction.called:
            yield from _walk(computations, called, runs, inside)
    for kind, collective, fused in chains.values():
        sent = _sent(kind, collective.type, collective.rest, scattered=collective.opcode == kind)
        yield kind, times, sent, hidden or fused, collective.rest


def _chains(computations: Computations, instructions: list[Instruction]) -> dict[str, tuple[str, Instruction, bool]]:
    """The collectives that a TPU computes within fusions, by channel: kind, instruction, and whether arithmetic is
    fused with it.

    Such a collective is in several fusions: one starts it, some compute and move it forward, and one ends it. A
    reduce-scatter is written as an all-reduce and a slice of it in one fusion.
    """
    chains: dict[str, tuple[str, Instruction, bool]] = {}
    for instruction in instructions:
        for called in instruction.called if instruction.opcode == "fusion" else ():
            for op in computations.get(called, []):
                channel = re.search(r"channel_id=(\d+)", op.rest)
                if op.opcode in KINDS and channel:
                    kind = "reduce-scatter" if called.startswith("all-reduce-scatter") else op.opcode
                    known = chains.get(channel[1], (kind, op, False))
                    chains[channel[1]] = (known[0], known[1], known[2] or called.startswith("async_collective_fusion"))
    return chains


def _is_done(instruction: Instruction) -> bool:
    return instruction.opcode.endswith("-done") or "async-collective-done" in instruction.name.replace("_", "-")


def _sent(kind: str, type_: str, rest: str, *, scattered: bool = True) -> float:
    """Bytes that one device sends, from the type of the result.

    `scattered` is False if the type of a reduce-scatter is that of its input.
    """
    size = bytes_of(type_)
    n = len(_group(rest))
    if kind == "collective-permute":
        return size
    if kind == "all-reduce":
        return 2 * size * (n - 1) / n
    return size * (n - 1) / (1 if kind == "reduce-scatter" and scattered else n)


def bytes_of(type_: str) -> float:
    """Bytes of an array type, or of all arrays of a tuple type."""
    total = 0.0
    for dtype, shape in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type_):
        bits = re.match(r"[a-z]+(\d+)", dtype)  # of f8e4m3fn, 8
        width = _WIDTHS.get(dtype) or (int(bits[1]) / 8 if bits else 0)
        total += width * math.prod(int(n) for n in shape.split(",") if n)
    return total


def _ports(kind: str, rest: str, islands: Sequence[int]) -> int:
    """Devices of one island that communicate with each other and with other islands; 0 if none leaves its island."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest)
        ends = [int(n) for n in re.findall(r"\d+", pairs[1])] if pairs and islands else []
        return int(any(islands[a] != islands[b] for a, b in zip(ends[::2], ends[1::2], strict=True)))
    members = [islands[device] for device in _group(rest)] if islands else []
    return members.count(members[0]) if len(set(members)) > 1 else 0


def _group(rest: str) -> tuple[int, ...]:
    """The first group of devices of a collective."""
    match = _GROUPS.search(rest)
    return (0, 1) if match is None else _first_group(match[1])


@functools.lru_cache(maxsize=1024)
def _first_group(groups: str) -> tuple[int, ...]:
    """The first group of a list of groups, which XLA writes in full, as a reshaped range, or as axes of a mesh."""
    if groups.startswith("{{"):
        return tuple(int(n) for n in groups[2:-1].split(","))
    if groups.startswith("["):
        shape, *rest = ([int(n) for n in part.split(",")] for part in re.findall(r"[\[(]([\d,]+)[\])]", groups))
        dims, order = (rest[0] if rest else shape), (rest[1] if len(rest) > 1 else None)
        return tuple(np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)[0].tolist())
    sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", groups)}
    axes = re.findall(r"'(\w+)'", groups.rpartition("{")[2])
    devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    return tuple(devices[tuple(slice(None) if axis in axes else 0 for axis in sizes)].flatten().tolist())


def trips(computations: Computations, instructions: list[Instruction], loop: Instruction) -> int:
    """The number of times that a loop runs: its annotation, or its condition's limit over the stride of its counter.

    It is 1 if neither can be read.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition, body = (_by_name(computations, loop, key) for key in ("condition", "body"))
    counters = [
        int(index) for op in condition.values() for index in _INDEX.findall(op.rest) if op.opcode == "get-tuple-element"
    ]
    limits = [value for op in condition.values() if (value := _constant(op)) is not None]
    if not limits and loop.operands:  # the limit of a loop that XLA widened enters with its tuple
        outer = {op.name: op for op in instructions}
        entering = outer[loop.operands[0]].operands if loop.operands[0] in outer else []
        values = [_value(outer, entering[i]) for i in counters if i < len(entering)]
        limits = [value for value in values if value is not None]
    if not limits or not counters:
        return 1
    return max(1, max(limits) // _stride(body, counters[0]))


def _by_name(computations: Computations, loop: Instruction, key: str) -> dict[str, Instruction]:
    """The instructions of a loop's condition or body by name."""
    match = re.search(rf"{key}=%([\w.\-]+)", loop.rest)
    return {op.name: op for op in computations.get(match[1] if match else "", [])}


def _stride(body: dict[str, Instruction], counter: int) -> int:
    """The constant that a loop's body adds to element `counter` of its tuple; 1 if that cannot be read."""
    root = next((op for op in reversed(body.values()) if op.opcode == "tuple"), None)
    name = root.operands[counter] if root is not None and counter < len(root.operands) else ""
    stride = 0
    while name in body and body[name].opcode in ("add", "copy"):
        values = [_value(body, operand) for operand in body[name].operands]
        stride += sum(value for value in values if value is not None)
        name = next((o for o, value in zip(body[name].operands, values, strict=True) if value is None), "")
    return max(1, stride)


def _value(outer: dict[str, Instruction], name: str) -> int | None:
    """The value of an instruction that is a constant or a copy of one; None for any other."""
    while name in outer:
        op = outer[name]
        if op.opcode == "constant":
            return _constant(op)
        if op.opcode not in ("copy", "bitcast", "copy-done", "copy-start") or not op.operands:
            return None
        name = op.operands[0]
    return None


def _constant(op: Instruction) -> int | None:
    match = re.match(r"(\d+)\)", op.rest) if op.opcode == "constant" and re.match(r"[su]\d+\[\]", op.type) else None
    return int(match[1]) if match else None
