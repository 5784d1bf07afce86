"""Llama 3.1's RoPE scaling as the tensor rope_freqs.weight of a GGUF file, written and recovered."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from llama_jax.config import SIZES, RopeScaling
from llama_jax.errors import ConfigError, brief

_EXACT = 1e-5  # relative error to which a scaling must reproduce the factors of a file
WIDEST = 1 << 14  # the widest head for which a scaling is searched


def rope_factors(scaling: RopeScaling, *, theta: float, head_dim: int) -> np.ndarray:
    """The divisors of the head_dim / 2 frequencies, float64: 1 / ((1 - s) / factor + s).

    s is Meta's `smooth`, clipped to 0..1: 0 for long wavelengths, 1 for short ones. llama.cpp's converter writes these.
    """
    smooth = (scaling.original_max_seq_len / _wavelengths(theta, head_dim) - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0, 1)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def rope_scaling_of(factors: np.ndarray, *, theta: float, head_dim: int, context: int) -> RopeScaling | None:
    """The RopeScaling for which `rope_factors` returns these factors; None if all are 1.

    The factors determine only ratios of the settings, and few factors only bounds. Llama's own settings (low 1, high 4,
    original 8,192) are tried first, then powers of two, then settings that reproduce every factor.

    Args:
        factors: divisors of the frequencies, (head_dim / 2,).
        theta: base of the frequencies.
        head_dim: width of a head.
        context: number of positions of the model; an original length that is not longer is tried first.

    Raises:
        ConfigError: the factors belong to another scaling than Llama 3.1's.
    """
    with np.errstate(invalid="ignore"):  # a signaling NaN
        given = np.asarray(factors, np.float64)
    sound = given.shape == (head_dim // 2,) and np.isfinite(given).all() and given.min() >= 1 - _EXACT
    if not sound or (given[1:] < given[:-1] * (1 - _EXACT)).any():
        raise ConfigError(
            f"rope_freqs.weight must be {head_dim // 2} factors of at least 1 in ascending order, got "
            f"{brief(given.tolist())}"
        )
    largest = float(f"{given.max():.6g}")
    if largest < 1 + _EXACT:
        return None

    for known in (SIZES["llama3.1-8b"].rope_scaling, SIZES["llama3.2-1b"].rope_scaling):
        # First, since a short head has no frequency that is divided by the whole factor.
        if known and np.allclose(rope_factors(known, theta=theta, head_dim=head_dim), given, rtol=_EXACT, atol=0):
            return known
    with np.errstate(all="ignore"):  # a candidate that is not a number is skipped
        for low, high, original in _candidates(given, _wavelengths(theta, head_dim), context):
            if not (0 < low < high < math.inf and 1 <= original < 1 << 31):
                continue
            found = RopeScaling(
                factor=largest,
                low_freq_factor=float(low),
                high_freq_factor=float(high),
                original_max_seq_len=int(original),
            )
            if np.allclose(rope_factors(found, theta=theta, head_dim=head_dim), given, rtol=_EXACT, atol=0):
                return found
    raise ConfigError(
        "rope_freqs.weight are not the factors of a Llama 3.1 scaling (rope_type llama3); others are not supported"
    )


def _wavelengths(theta: float, head_dim: int) -> np.ndarray:
    """Wavelength of each rotary pair in positions, before scaling: float64 (head_dim / 2,)."""
    return 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)


def _candidates(given: np.ndarray, wavelengths: np.ndarray, context: int) -> Iterator[tuple[float, float, float]]:
    """Candidates (low, high, original) that may reproduce the factors, the likeliest first."""
    inverse, least = 1 / given, 1 / given.max()
    smooth = (inverse - least) / (1 - least)
    powers = sorted((2**n for n in range(24)), key=lambda n: (n != 8192, n > context, -n))
    before = int((given <= 1 + 10 * _EXACT).sum()) - 1  # the last that is not divided
    after = int((given < given.max() * (1 - 10 * _EXACT)).sum())  # the first that is divided by the whole factor
    inner = range(before + 1, after)
    # With low 1 and high 4, 3 smooth + 1 = original / wavelength.
    yield from ((1.0, 4.0, n) for n in powers)
    if inner:
        middle = inner[len(inner) // 2]
        yield 1.0, 4.0, np.round(wavelengths[middle] * (3 * smooth[middle] + 1))
    if before >= 0:
        yield 1.0, 4.0, np.ceil(4 * wavelengths[before])
    # In general smooth = slope / wavelength - offset: slope = original / (high - low), offset = low / (high - low).
    turns = 1 / wavelengths
    if len(inner) > 1:
        first, last = inner[0], inner[-1]
        slope = (smooth[first] - smooth[last]) / (turns[first] - turns[last])
        offset = slope * turns[first] - smooth[first]
    elif len(inner):  # steep enough to reach 1 before it and 0 after it
        at = inner[0]
        rise = (1 - smooth[at]) / (turns[before] - turns[at]) if before >= 0 else 0
        slope = 1.5 * max(rise, smooth[at] / (turns[at] - turns[after]))
        offset = slope * turns[at] - smooth[at]
    elif before < 0:
        return
    else:
        slope = 2 / (turns[before] - turns[after])
        offset = slope * (turns[before] + turns[after]) / 2 - 0.5
    if not (slope > 0 and offset > 0):
        return
    yield 1.0, round(1 + 1 / offset, 3), np.round(slope / offset)
    yield from ((round(offset * n / slope, 3), round((offset + 1) * n / slope, 3), n) for n in powers)
    yield offset * 8192 / slope, (offset + 1) * 8192 / slope, 8192
