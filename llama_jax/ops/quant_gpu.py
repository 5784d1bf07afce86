"""Products of few rows with quantized weights on NVIDIA GPUs, in Pallas for Triton.

A decode step multiplies one or few rows and is as fast as its weights are read. XLA would write the dequantized weight
to memory and read it again, which is slower than a bfloat16 weight (docs/measurements/gpu-compiler.md). This kernel
reads the packed weight once and dequantizes blocks of it in registers.

Letters: R rows, n columns of a group in a plane (32 for 8 bits, 16 for 4 bits), P parts of the inputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax import parallel
from llama_jax.ops import quant
from llama_jax.ops.quant import GROUP, QTensor

MAX_ROWS = 64  # for more, dequantizing once costs less than dequantizing for every block of rows
_ROWS = 16  # smallest block of a product in Triton
_OUT = 32  # outputs of a program
_GROUPS = 4  # groups that are dequantized at once
_PROGRAMS = 264  # programs to aim for: two for each of the 132 processors of an H100


def takes(x: jax.Array, w: QTensor) -> bool:
    """True if the kernel multiplies x (..., in) and w (out, in) on the devices of the active layout."""
    layout = parallel.active()
    one = layout is None or layout.mesh.size == 1
    rows = x.size // x.shape[-1] if x.size else 0
    whole = len(w.shape) == 2 and w.shape[0] % _OUT == 0 and w.shape[1] % (_GROUPS * GROUP) == 0
    fits = 0 < rows <= MAX_ROWS and x.dtype in (jnp.bfloat16, jnp.float16)
    return one and whole and fits and parallel.compute_capability() >= 80


def product(x: jax.Array, w: QTensor) -> jax.Array:
    """The product x w^T in float32: (..., out). Blocks of w are dequantized to the dtype of x.

    Args:
        x: activations (..., in).
        w: weight (out, in).
    """
    out, width = w.shape
    flat = x.reshape(-1, width)
    count = flat.shape[0]
    rows = max(_ROWS, pl.next_power_of_2(count))
    planes = [jnp.pad(part, [(0, rows - count), (0, 0)]) for part in quant.inputs_of_planes(w, flat)]
    columns = planes[0].shape[1]  # of a plane; also bytes of a row of packed values
    blocks = width // (_GROUPS * GROUP)
    parts = min(blocks, pl.cdiv(_PROGRAMS, out // _OUT))
    partial_PRO = pl.pallas_call(
        functools.partial(_kernel, bits=w.bits, blocks=blocks, parts=parts),
        grid=(out // _OUT, parts),
        in_specs=[
            *(pl.BlockSpec((rows, columns), lambda o, p: (0, 0)) for _ in planes),
            pl.BlockSpec((_OUT, columns), lambda o, p: (o, 0)),
            pl.BlockSpec((_OUT, width // GROUP), lambda o, p: (o, 0)),
        ],
        out_specs=pl.BlockSpec((None, rows, _OUT), lambda o, p: (p, 0, o)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, out), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=parallel.device_platform() == "cpu",
        name="quantized_product",
    )(*planes, w.values, w.scales)
    return jnp.sum(partial_PRO, axis=0)[:count].reshape(*x.shape[:-1], out)


def _kernel(*refs: Any, bits: int, blocks: int, parts: int) -> None:
    """The products of all rows with one block of outputs, over one part of the inputs."""
    *x_refs, values_ref, scales_ref, out_ref = refs
    n = GROUP if bits == 8 else GROUP // 2
    each = -(-blocks // parts)
    low = pl.program_id(1) * each
    high = jnp.minimum(low + each, blocks)

    def body(block: jax.Array, total: jax.Array) -> jax.Array:
        columns = pl.ds(block * (_GROUPS * n), _GROUPS * n)
        values = values_ref[:, columns]
        scales = scales_ref[:, pl.ds(block * _GROUPS, _GROUPS)].astype(jnp.float32)
        wide = jnp.broadcast_to(scales[:, :, None], (_OUT, _GROUPS, n)).reshape(_OUT, _GROUPS * n)
        if bits == 8:
            planes = [values.astype(jnp.float32)]
        else:
            packed = values.astype(jnp.int32)
            planes = [((packed & 15) - 8).astype(jnp.float32), ((packed >> 4) - 8).astype(jnp.float32)]
        for x_ref, plane in zip(x_refs, planes, strict=True):
            x = x_ref[:, columns]
            total += plgpu.dot(x, (plane * wide).astype(x.dtype).T)
        return total

    out_ref[...] = lax.fori_loop(low, high, body, jnp.zeros(out_ref.shape, jnp.float32))
