"""Quantized weights in Hugging Face folders, in the "pack-quantized" layout of the compressed-tensors library.

vLLM reads it, and transformers with that library. A matrix `x.weight` (out, in) is stored as `x.weight_packed`, int32
words with 8 / bits values of a row each, the first in the lowest bits, plus 2^(bits - 1); as `x.weight_scale`, one
scale for each group of a row; and as `x.weight_shape`. config.json names the bits and the group size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.errors import ConfigError, brief
from llama_jax.ops import quant
from llama_jax.weights.tensor import FLOATS, Index, LazyTensor, QuantizedParts, of_array, row_blocks

METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"
_PACKED, _SCALE, _SHAPE = "_packed", "_scale", "_shape"
_EXTRA = ("_zero_point", "_g_idx")


def config_of(bits: Mapping[str, int | None]) -> dict[str, Any]:
    """The quantization_config of matrices with these bits, by the names of their modules ("model.layers.0...q_proj").

    Matrices of None bits are not quantized.
    """
    ignored = sorted(name for name, number in bits.items() if number is None)
    quantized = {name: number for name, number in bits.items() if number is not None}

    def group(number: int, targets: list[str]) -> dict[str, Any]:
        weights = {"num_bits": number, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
        return {"targets": targets, "weights": {**weights, "group_size": quant.GROUP}, "format": _FORMAT}

    main, *others = sorted(set(quantized.values()))
    groups = [group(number, sorted(name for name, n in quantized.items() if n == number)) for number in others]
    groups.append(group(main, ["Linear", "Embedding"]))
    return {
        "quant_method": METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ignored if "lm_head" in quantized else sorted({*ignored, "lm_head"}),
    }


def is_mine(quantization: Any) -> bool:
    """True if a quantization_config is that of the compressed-tensors library."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def check(quantization: Mapping[str, Any]) -> None:
    """Raises ConfigError for a quantization_config whose weights are not symmetric integers in groups or channels."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError("quantization_config has no config_groups")
    for group in groups.values():
        group = group if isinstance(group, dict) else {}
        layout = group.get("format") or quantization.get("format")
        weights = group.get("weights")
        weights = weights if isinstance(weights, dict) else {}
        read = {
            "format": (layout, (_FORMAT,)),
            "num_bits": (weights.get("num_bits"), (4, 8)),
            "type": (weights.get("type", "int"), ("int",)),
            "symmetric": (weights.get("symmetric", True), (True,)),
            "strategy": (weights.get("strategy"), ("group", "channel")),
            "input_activations": (group.get("input_activations"), (None,)),
        }
        for key, (value, allowed) in read.items():
            if value not in allowed:
                raise ConfigError(
                    f"quantization_config has {key}={brief(value)}; supported: "
                    f"{', '.join(map(str, allowed))}. Use the model before quantization"
                )


def unpacked(tensors: Mapping[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """The tensors of a folder, in which one lazy matrix replaces each group of three tensors that store a matrix.

    Raises:
        ValueError: parts are missing or do not fit together.
    """
    bare = {name.removesuffix(_PACKED) for name in tensors if name.endswith(f".weight{_PACKED}")}
    parts = {name + end for name in bare for end in (_PACKED, _SCALE, _SHAPE)}
    out = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name in sorted(bare):
        extra = [name + end for end in _EXTRA if name + end in tensors]
        if extra:
            raise ValueError(f"{source}: {extra[0]} belongs to a kind of quantization that is not supported")
        packed, scale = tensors[name + _PACKED], tensors.get(name + _SCALE)
        out[name] = _matrix(name, packed, scale, tensors.get(name + _SHAPE), source)
    return out


def _matrix(
    name: str, packed: LazyTensor, scale: LazyTensor | None, shape: LazyTensor | None, source: str
) -> LazyTensor:
    """A matrix from its words, its scales and its shape."""

    def fail(why: str) -> ValueError:
        return ValueError(f"{source}: {name}{_PACKED} {why}")

    if scale is None or shape is None:
        raise fail(f"has no {name}{_SCALE if scale is None else _SHAPE}")
    if packed.dtype != np.int32 or len(packed.shape) != 2 or scale.dtype not in FLOATS or len(scale.shape) != 2:
        raise fail(f"and its scales are {packed.dtype} {packed.shape} and {scale.dtype} {scale.shape}, not matrices")
    if shape.shape != (2,) or shape.dtype.kind not in "iu":
        raise fail(f"has a {name}{_SHAPE} that is not two whole numbers")
    out, size = (int(n) for n in shape.read())
    words, groups = packed.shape[1], scale.shape[1]
    bits = next((b for b in (8, 4) if size > 0 and words * 32 == size * b), None)
    if bits is None or packed.shape[0] != out or scale.shape[0] != out or not groups or size % (groups * quant.GROUP):
        raise fail(f"{packed.shape} with scales {scale.shape} is not a matrix {(out, size)} in groups of 32 or more")
    repeat = size // groups // quant.GROUP
    width, dtype = (size // 2, np.dtype(np.uint8)) if bits == 4 else (size, np.dtype(np.int8))
    values = _of(packed, dtype, (out, width), lambda words: from_words(words, bits))
    scales = _of(scale, scale.dtype, (out, size // quant.GROUP), lambda part: np.repeat(part, repeat, axis=1))
    parts = QuantizedParts(bits, values, scales.cast(np.dtype(np.float16), name + _SCALE))

    def fill(target: np.ndarray, index: Index) -> None:
        for at, rows in row_blocks(index, 4):
            factor = scales.read(rows[:1], np.dtype(np.float32))
            ones = jnp.ones(factor.shape, jnp.float16)
            part = quant.QTensor(jnp.asarray(values.read(rows[:1])), ones)
            integers = np.asarray(quant.dequantize(part, jnp.float32))
            numbers = integers.reshape(*factor.shape, -1) * factor[..., None]
            np.copyto(target[at], numbers.reshape(len(factor), -1)[:, index[1]], casting="unsafe")

    return LazyTensor(np.dtype(np.float32), (out, size), fill, f"Q{bits}", packed.nbytes + scale.nbytes, parts)


def _of(
    stored: LazyTensor, dtype: np.dtype, shape: tuple[int, int], convert: Callable[[np.ndarray], np.ndarray]
) -> LazyTensor:
    """A lazy tensor whose rows are the converted rows of `stored`."""

    def fill(target: np.ndarray, index: Index) -> None:
        for at, rows in row_blocks(index, 4):
            np.copyto(target[at], convert(stored.read(rows[:1]))[:, index[1]], casting="unsafe")

    return LazyTensor(np.dtype(dtype), shape, fill, stored.kind, stored.nbytes)


def from_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks int32 words (out, n) to the values of a QTensor: int8, or uint8 with two values in a byte."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return (data ^ 0x80).view(np.int8)  # stored plus 128
    nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1, quant.GROUP)
    half = quant.GROUP // 2
    return (nibbles[..., :half] | nibbles[..., half:] << 4).reshape(len(data), -1)


def to_words(values: np.ndarray) -> np.ndarray:
    """The int32 words (out, n) of the values of a QTensor."""
    if values.dtype == np.int8:
        return (values.view(np.uint8) ^ 0x80).view(np.int32)
    groups = values.reshape(len(values), -1, quant.GROUP // 2)
    natural = np.concatenate([groups & 15, groups >> 4], axis=-1).reshape(len(values), -1, 2)
    return np.ascontiguousarray(natural[..., 0] | natural[..., 1] << 4).view(np.int32)


def packed(tensors: Mapping[str, LazyTensor]) -> Iterable[tuple[str, LazyTensor]]:
    """The names and tensors to store in place of `tensors`: three for each that has quantized parts."""
    for name, tensor in tensors.items():
        if tensor.quantized is None:
            yield name, tensor
            continue
        values, scales = tensor.quantized.values, tensor.quantized.scales
        words = values.shape[1] // 4

        def fill(target: np.ndarray, index: Index, values: LazyTensor = values) -> None:
            for at, rows in row_blocks(index, 4):
                np.copyto(target[at], to_words(values.read(rows[:1]))[:, index[1]])

        yield name + _PACKED, LazyTensor(np.dtype(np.int32), (values.shape[0], words), fill, "I32", values.nbytes)
        yield name + _SCALE, scales
        shape = functools.partial(np.array, tensor.shape, np.int64)
        yield name + _SHAPE, of_array(shape, np.dtype(np.int64), (2,))
