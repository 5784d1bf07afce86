"""Batching of requests: the requests that share a batch, and rounding of sizes so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

_QUIET_BATCHES = 3


def longest_first(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The indices of requests, grouped into batches of at most `size`, the longest requests first.

    Requests of similar lengths share a batch, which keeps padding small. The batch that takes the most memory runs
    first. Requests of equal length keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


def shows_bar(count: int, size: int, progress: bool | None) -> bool:
    """True if a progress bar is shown for `count` requests in batches of `size`.

    `progress` decides it. None shows a bar for more than three batches.
    """
    return count > _QUIET_BATCHES * size if progress is None else progress


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n`, and at least `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())
