"""Memory for the weights of a CPU, in huge pages.

A decode step reads every weight once, and in pages of 4 KiB the processor reads memory more slowly
(docs/measurements/cpu-kernels.md#huge-pages-for-weights). NumPy asks Linux for huge pages for arrays from 4 MiB on
(its `numpy/_core/src/multiarray/alloc.c`). Nothing does so for smaller arrays and for results of XLA.
"""

from __future__ import annotations

import math
import threading
from typing import TypeVar

import jax
import numpy as np

from llama_jax.ops.quant import QTensor
from llama_jax.weights.tensor import ALIGNMENT, aligned

LARGE = 4 << 20  # bytes; NumPy asks for huge pages for arrays of this size
_BLOCK = 32 << 20  # bytes that small arrays share

Leaf = TypeVar("Leaf", jax.Array, QTensor, jax.Array | QTensor)


class HugePages:
    """Moves weights of one CPU into blocks of memory in huge pages. A block is freed with the last array in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = np.empty(0, np.uint8)

    def moved(self, leaf: Leaf, *, fresh: bool) -> Leaf:
        """The arrays of a leaf in huge pages: the same ones if they lie in them already, or not in memory of one CPU.

        Args:
            leaf: an array or a quantized one.
            fresh: whether XLA has computed it. Otherwise its arrays are NumPy's, which jax uses without a copy.
        """
        return jax.tree.map(lambda a: self._moved(a) if _on_one_cpu(a) and (fresh or a.nbytes < LARGE) else a, leaf)

    def _moved(self, array: jax.Array) -> jax.Array:
        out = aligned(array.shape, array.dtype) if array.nbytes >= LARGE else self._share(array.shape, array.dtype)
        np.copyto(out, np.asarray(array))
        return jax.device_put(out, array.sharding)

    def _share(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialized array in a block."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            if size > self._rest.size:
                self._rest = aligned((_BLOCK,), np.dtype(np.uint8))
            taken, self._rest = self._rest[:size], self._rest[-(-size // ALIGNMENT) * ALIGNMENT :]
        return taken.view(dtype).reshape(shape)


def _on_one_cpu(array: jax.Array) -> bool:
    return array.is_fully_addressable and [device.platform for device in array.devices()] == ["cpu"]
