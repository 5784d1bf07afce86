"""Memory for the weights of a CPU, in huge pages.

A decode step reads every weight once, and in pages of 4 KiB the processor reads memory more slowly
(docs/measurements/cpu-kernels.md#huge-pages-for-weights). NumPy asks Linux for huge pages for arrays from 4 MiB on (in
its `numpy/_core/src/multiarray/alloc.c`). Nothing does so for smaller arrays and for results of XLA.
"""

from __future__ import annotations

import math
import threading

import jax
import numpy as np

from llama_jax.ops.quant import QTensor
from llama_jax.weights.tensor import ALIGNMENT, aligned

_LARGE = 4 << 20  # bytes; NumPy asks for huge pages for arrays of this size
_BLOCK = 32 << 20  # bytes that smaller arrays share


class HugePages:
    """Memory for weights. Small arrays share blocks; a block is freed with the last array in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialized array that jax can use on a CPU without a copy. Any thread may ask for one."""
        size = math.prod(shape) * dtype.itemsize
        if size >= _LARGE:
            return aligned(shape, dtype)
        with self._lock:
            if size > self._rest.size:
                self._rest = aligned((_BLOCK,), np.dtype(np.uint8))
            taken, self._rest = self._rest[:size], self._rest[math.ceil(size / ALIGNMENT) * ALIGNMENT :]
        return taken.view(dtype).reshape(shape)

    def copied(self, weight: QTensor) -> QTensor:
        """A copy of what XLA has computed in the memory of one CPU; a weight that is elsewhere is returned as it is."""

        def copy(array: jax.Array) -> jax.Array:
            if not array.is_fully_addressable or [device.platform for device in array.devices()] != ["cpu"]:
                return array
            out = self.empty(array.shape, array.dtype)
            np.copyto(out, np.asarray(array))
            return jax.device_put(out, array.sharding)

        return jax.tree.map(copy, weight)
