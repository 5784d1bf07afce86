"""The bytes that one turn of a compiled decode loop moves to and from a TPU's main memory, from its HLO text.

A decode step is as fast as its bytes are read, so a step that reads more than weights and cache loses as much time.
Arrays in the chip's own memory, which XLA marks S(1), cost nothing here; a copy to it is counted as what it reads. A
kernel is counted as all of its operands. An update in place and a look-up are counted as the values that they touch.
"""

from __future__ import annotations

import re

from llama_jax.plan.hlo import Computations, Instruction, bytes_of, parse, trips

_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "while", "conditional", "call")
_LOOKUPS = ("gather", "dynamic-slice")
_UPDATES = ("scatter", "dynamic-update-slice")
_ARRAY = re.compile(r"[a-z]+\d*\w*\[[\d,]*\](?:\{[^}]*\})?")


def bytes_of_step(text: str) -> float:
    """Bytes read and written in one turn of the entry's largest loop; 0 for a program without a loop."""
    computations, entry = parse(text)
    loops = [op for op in computations.get(entry, []) if op.opcode == "while"]
    return max((_bytes_of(computations, body) for op in loops for body in op.called), default=0.0)


def _bytes_of(computations: Computations, name: str) -> float:
    """Bytes that the instructions of a computation move. Of the branches of a condition, the smallest is counted: a
    greedy step draws no token.
    """
    instructions = computations.get(name, [])
    types = {op.name: op.type for op in instructions}
    total = 0.0
    for op in instructions:
        if op.opcode in ("while", "call"):
            runs = trips(computations, instructions, op) if op.opcode == "while" else 1
            total += runs * sum(_bytes_of(computations, called) for called in op.called)
        elif op.opcode == "conditional":
            total += min((_bytes_of(computations, called) for called in op.called), default=0.0)
        elif op.opcode.endswith("-start"):
            # The first two types are those of source and destination, of which one may be a slice.
            ends = _ARRAY.findall(op.type)[:2]
            total += min(map(bytes_of, ends)) * sum(_in_main_memory(end) > 0 for end in ends)
        elif op.opcode not in _FREE and not op.opcode.endswith("-done"):
            fused = [one for called in op.called for one in computations.get(called, [])] or [op]
            total += _of_instruction(op, [types.get(operand, "") for operand in op.operands], fused)
    return total


def _of_instruction(op: Instruction, operands: list[str], fused: list[Instruction]) -> float:
    """Bytes of one instruction, or of one fusion of the instructions `fused`."""
    inside = {one.name: one for one in fused}
    updated = [shape for one in fused if one.opcode in _UPDATES for shape in _shapes(one.type)]
    parameters = {int(one.rest.split(")")[0]): one.name for one in fused if one.opcode == "parameter"}
    total = sum(_in_main_memory(one) for one in _ARRAY.findall(op.type) if _shapes(one)[0] not in updated)
    for i, type_ in enumerate(operands):
        name = parameters.get(i, op.operands[i])
        users = [one for one in fused if name in one.operands]
        if _shapes(type_)[:1] and _shapes(type_)[0] in updated:
            continue
        looked_up = bool(users) and all(one.opcode in _LOOKUPS and one.operands[0] == name for one in users)
        total += sum(bytes_of(one.type) for one in users) if looked_up else _in_main_memory(type_)
    for one in fused:
        if one.opcode in _UPDATES:  # the values are read and written
            values = one.operands[2 if one.opcode == "scatter" else 1 :][:1]
            total += 2 * sum(bytes_of(inside[value].type) for value in values if value in inside)
    return total


def _shapes(type_: str) -> list[str]:
    """The dtypes and shapes of a type, without memory layouts."""
    return [one.split("{")[0] for one in _ARRAY.findall(type_)]


def _in_main_memory(type_: str) -> float:
    """Bytes of the arrays of a type that are in main memory."""
    return sum(bytes_of(one.split("{")[0]) for one in _ARRAY.findall(type_) if "S(1)" not in one)
