"""The block formats of ggml's quantized tensors: exact dequantization, and quantization to two of them.

A row is cut into blocks of 32 or 256 numbers, each with its own scale. The layouts are those of ggml-common.h in ggml
(github.com/ggml-org/ggml). Products and sums are rounded to float32 in the order of its `dequantize_row_*`, so that the
values equal those of llama.cpp bit for bit. Imports no jax.

In the descriptions of layouts, [n] means n bytes, and d, m and dmin are float16, little-endian. "bits b of runs of r"
describes how bytes store several numbers q of b bits. Each run of r bytes has first the lowest b bits of all its bytes,
then the next b bits of all its bytes, and so on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Numbers in a block, and the bytes that it takes.
BLOCKS: dict[str, tuple[int, int]] = {
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}


def dequantize(kind: str, raw: np.ndarray) -> np.ndarray:
    """Dequantizes whole blocks.

    Args:
        kind: one of BLOCKS.
        raw: uint8 (rows, bytes), a whole number of blocks in each row.

    Returns:
        float32 (rows, numbers).

    Raises:
        FloatingPointError: a scale is not finite.
    """
    numbers, size = BLOCKS[kind]
    rows, width = raw.shape
    return _DEQUANTIZERS[kind](raw.reshape(-1, size)).reshape(rows, width // size * numbers)


def quantize(kind: str, values: np.ndarray) -> np.ndarray:
    """Quantizes values to blocks, rounded like ggml's `quantize_row_*_ref`.

    Args:
        kind: "Q8_0" or "Q4_0".
        values: float32 (rows, numbers), a multiple of 32 in each row.

    Returns:
        uint8 (rows, bytes).

    Raises:
        FloatingPointError: a number that is not finite, or too large for the float16 of a scale.
    """
    numbers, size = BLOCKS[kind]
    rows, width = values.shape
    return _QUANTIZERS[kind](values.reshape(-1, numbers)).reshape(rows, width // numbers * size)


def half(raw: np.ndarray) -> np.ndarray:
    """Scales (n, k) in float16 from their bytes (n, 2 k). Raises FloatingPointError if one is not finite."""
    scales = np.ascontiguousarray(raw).view(np.float16)
    if not np.isfinite(scales).all():
        raise FloatingPointError("a scale is not finite")
    return scales


def _float(raw: np.ndarray) -> np.ndarray:
    return half(raw).astype(np.float32)


def _unpack(packed: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Unpacks bytes (n, bytes) into numbers (n, bytes * 8 / bits): "bits b of runs of r" above."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = packed.reshape(len(packed), -1, 1, run) >> shifts
    fields &= np.uint8((1 << bits) - 1)
    return fields.reshape(len(packed), -1)


def _affine(q: np.ndarray, scales: np.ndarray, minima: np.ndarray | None = None) -> np.ndarray:
    """Numbers q (n, 256), each group of 256 / k times its scale (n, k) minus its minimum (n, k)."""
    out = q.reshape(*scales.shape, -1) * scales[:, :, None]
    if minima is not None:
        out -= minima[:, :, None]
    return out.reshape(q.shape)


def _q8_0(b: np.ndarray) -> np.ndarray:
    """Q8_0 blocks: d, int8 q [32]. A value is d q."""
    return b[:, 2:].view(np.int8).astype(np.float32) * _float(b[:, :2])


def _q4_0(b: np.ndarray) -> np.ndarray:
    """Q4_0 blocks: d, then q in [16] as bits 4 of runs of 16. A value is d (q - 8)."""
    q = _unpack(b[:, 2:], 16, 4).view(np.int8) - np.int8(8)
    return q.astype(np.float32) * _float(b[:, :2])


def _q4_1(b: np.ndarray) -> np.ndarray:
    """Q4_1 blocks: d, m, then q in [16] as bits 4 of runs of 16. A value is d q + m."""
    return _unpack(b[:, 4:], 16, 4).astype(np.float32) * _float(b[:, :2]) + _float(b[:, 2:4])


def _q5(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Unpacks q of 5 bits: the highest bit of number i is bit i of [4], the others are bits 4 of runs of 16 in [16]."""
    return _unpack(low, 16, 4) | np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(b: np.ndarray) -> np.ndarray:
    """Q5_0 blocks: d, then q in [4] and [16] (see `_q5`). A value is d (q - 16)."""
    q = _q5(b[:, 2:6], b[:, 6:]).view(np.int8) - np.int8(16)
    return q.astype(np.float32) * _float(b[:, :2])


def _q5_1(b: np.ndarray) -> np.ndarray:
    """Q5_1 blocks: d, m, then q in [4] and [16] (see `_q5`). A value is d q + m."""
    return _q5(b[:, 4:8], b[:, 8:]).astype(np.float32) * _float(b[:, :2]) + _float(b[:, 2:4])


def _q2_k(b: np.ndarray) -> np.ndarray:
    """Q2_K blocks: [16] with a scale s (low 4 bits) and a minimum m (high 4) each, q in [64], d, dmin.

    q is bits 2 of runs of 32. A value is (d s) q - (dmin m), where 16 values share s and m.
    """
    x, d, dmin = b[:, :16], _float(b[:, 80:82]), _float(b[:, 82:84])
    scales, minima = d * (x & 15).astype(np.float32), dmin * (x >> 4).astype(np.float32)
    return _affine(_unpack(b[:, 16:80], 32, 2), scales, minima)


def _q3_k(b: np.ndarray) -> np.ndarray:
    """Q3_K blocks: [32] high bits, [64] low bits of q, [12] scales s, d. A value is (d (s - 32)) q.

    The low bits are bits 2 of runs of 32. The high bits are bits 1 of runs of 32, and 4 is subtracted from q if one is
    clear. 16 values share a scale.

    The 16 scales have 6 bits: the low 4 are bits 4 of runs of 8 in [8], the high 2 are bits 2 of runs of 4 in [4].
    """
    clear = _unpack(b[:, :32], 32, 1) ^ np.uint8(1)
    q = _unpack(b[:, 32:96], 32, 2).view(np.int8) - (clear << np.uint8(2)).view(np.int8)
    scales = _unpack(b[:, 96:104], 8, 4) | _unpack(b[:, 104:108], 4, 2) << np.uint8(4)
    scales = (scales.view(np.int8) - np.int8(32)).astype(np.float32)
    return _affine(q, _float(b[:, 108:110]) * scales)


def _q4_k(b: np.ndarray) -> np.ndarray:
    """Q4_K blocks: d, dmin, [12] with scales s and minima m (see `_scales_4`), and q in [128] as bits 4 of runs of 32.

    A value is (d s) q - (dmin m), where 32 values share s and m.
    """
    return _affine(_unpack(b[:, 16:], 32, 4), *_scales_4(b))


def _q5_k(b: np.ndarray) -> np.ndarray:
    """Q5_K blocks: as Q4_K, with the highest bit of each q in [32], bits 1 of runs of 32, before [128]."""
    q = _unpack(b[:, 48:], 32, 4) | _unpack(b[:, 16:48], 32, 1) << np.uint8(4)
    return _affine(q, *_scales_4(b))


def _q6_k(b: np.ndarray) -> np.ndarray:
    """Q6_K blocks: [128] low bits, [64] high bits of q, int8 scales s [16], d. A value is (d s) (q - 32).

    The low bits are bits 4 of runs of 64, and the high bits are bits 2 of runs of 32. 16 values share a scale.
    """
    q = _unpack(b[:, :128], 64, 4) | _unpack(b[:, 128:192], 32, 2) << np.uint8(4)
    scales = b[:, 192:208].view(np.int8).astype(np.float32)
    return _affine(q.view(np.int8) - np.int8(32), _float(b[:, 208:210]) * scales)


def _scales_4(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scales d s and the minima dmin m, each (n, 8), from the first 16 bytes of Q4_K or Q5_K blocks.

    Of the twelve bytes x, scales 0 to 3 are the low 6 bits of x[0:4], and minima 0 to 3 those of x[4:8]. Scales and
    minima 4 to 7 have their low 4 bits in the low and the high half of x[8:12], and their high 2 at the top of x[0:4]
    and of x[4:8].
    """
    x = b[:, 4:16].reshape(-1, 3, 4)
    low = x[:, :2] & 63
    high = np.stack([x[:, 2] & 15, x[:, 2] >> 4], axis=1) | x[:, :2] >> 6 << 4
    both = np.concatenate([low, high], axis=2).astype(np.float32)
    return _float(b[:, :2]) * both[:, 0], _float(b[:, 2:4]) * both[:, 1]


def _scale_of(largest: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The scale of each block as float16 bytes (n, 2), and its reciprocal for the numbers (n, 1)."""
    d = largest / np.float32(steps)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scales = half(d.astype(np.float16).view(np.uint8))
        inverse = np.float32(1) / d
    # A block of zeros, or one so small that it is zeros with its scale in float16.
    inverse[~np.isfinite(inverse)] = 0
    return scales.view(np.uint8), inverse


def _to_q8_0(x: np.ndarray) -> np.ndarray:
    """Quantizes blocks to Q8_0: d = max |x| / 127; q = x (1 / d), rounded half away from zero."""
    scales, inverse = _scale_of(np.abs(x).max(axis=1, keepdims=True), 127)
    scaled = x * inverse
    size = np.abs(scaled)
    whole = np.floor(size)
    whole += size - whole >= 0.5
    q = np.copysign(whole, scaled).astype(np.int8)
    return np.concatenate([scales, q.view(np.uint8)], axis=1)


def _to_q4_0(x: np.ndarray) -> np.ndarray:
    """Quantizes blocks to Q4_0: d = x* / -8, where x* is the first x of the largest magnitude.

    q is the integer part of x (1 / d) + 8.5, at most 15.
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    scales, inverse = _scale_of(largest, -8)
    q = np.minimum((x * inverse + np.float32(8.5)).astype(np.uint8), 15)
    return np.concatenate([scales, q[:, :16] | q[:, 16:] << 4], axis=1)


_DEQUANTIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
_QUANTIZERS = {"Q8_0": _to_q8_0, "Q4_0": _to_q4_0}
