"""Matrix products with weights, and embedding look-ups.

Weights are stored output-major, (out, in), as in Hugging Face's and Meta's files. Products accumulate in float32 for
operands of any dtype, and the result has the dtype of the activations. A weight is an array, a QTensor, or a LoraTensor
around either.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from llama_jax import parallel
from llama_jax.ops import cpu, fp8, gpu, quant
from llama_jax.ops.lora import LoraTensor
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.quant import QTensor
from llama_jax.ops.remat import product
from llama_jax.ops.swiglu import swiglu

Weight = jax.Array | QTensor | LoraTensor
Axes = tuple[str | None, ...] | None

# On a CPU, XLA runs a bfloat16 product of fewer than 8 rows as a scalar loop, so rows are padded to 8
# (docs/measurements/cpu-products.md#one-row-in-bfloat16).
_CPU_BF16_ROWS = 8
_BF16_NAN = 0x7FC0
# Rows of a quantized weight that a CPU dequantizes at a time, for fewer than 8 rows of activations and for more. They
# stay in the processor's cache, and the product runs at the speed of float32 weights rather than at a tenth of it
# (docs/measurements/quantized-decoding.md).
_CPU_BLOCK_ROWS = (64, 256)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (contract, ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _rows_times(x: jax.Array, w: jax.Array) -> jax.Array:
    return _dot(x, w, ((x.ndim - 1,), (1,)))


def _rows_times_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    padded = jnp.pad(flat, ((0, _CPU_BF16_ROWS - flat.shape[0]), (0, 0)))
    return _rows_times(padded, w)[: flat.shape[0]].reshape(*x.shape[:-1], w.shape[0])


_observers: list[Callable[[jax.Array, Weight], None]] = []


@contextlib.contextmanager
def observed(observe: Callable[[jax.Array, Weight], None]) -> Iterator[None]:
    """A context in which `observe` is called with the inputs and the weight of every product outside of jit."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


def _tell(x: jax.Array, w: Weight) -> None:
    for observe in _observers:
        observe(x, w)


def linear(x: jax.Array, w: Weight, axes: tuple[str | None, ...] | None = None) -> jax.Array:
    """The product x w^T: (..., out) in the dtype of x, accumulated in float32.

    The weight is cast to the dtype of x for the product. Its gradient has the weight's own dtype, so that float32
    master weights get float32 gradients from bfloat16 products.

    Args:
        x: activations (..., in).
        w: weight (out, in).
        axes: logical axes of w. A sharded weight is all-gathered by these in the dtype of x, or packed if it is
            quantized, and its gradient is reduce-scattered. XLA by itself may gather float32 or dequantized weights,
            and all-reduce gradients.
    """
    _tell(x, w)
    if isinstance(w, LoraTensor):
        base = linear(x, w.base, axes)
        with fp8.products(False):
            return _by_rows(w, base + linear(w.scaled(linear(w.dropped(x), w.a)), w.b))
    if isinstance(w, QTensor):
        return _quantized_linear(x, w, axes)
    return fp8.linear(x, w, axes) if fp8.takes(w) else _linear(x, w, axes)


Norm = tuple[jax.Array, float]  # scale (D,) and eps of an RMSNorm


def linears(
    x: jax.Array,
    weights: Sequence[tuple[Weight, Axes]],
    *,
    norm: Norm | None = None,
    up: jax.Array | None = None,
    plus: jax.Array | None = None,
) -> list[jax.Array]:
    """`linear` of several weights of the same inputs, such as q, k and v, and of what is computed around it.

    The products run in one kernel where there is one, which prepares the inputs once. XLA's products have the name that
    remat="dots" keeps.

    Args:
        x: activations (..., in).
        weights: each weight (out, in) and its logical axes.
        norm: normalizes x first.
        up: (..., in); the inputs are silu(x) * up (SwiGLU). It excludes `norm`.
        plus: (..., out), added to the product of a single weight (a residual).
    """
    plain = [w for w, _ in weights if not isinstance(w, LoraTensor)]
    kinds = {w.bits if isinstance(w, QTensor) else str(w.dtype) for w in plain}
    scale, eps = norm or (None, 0.0)
    inputs, every = _Inputs(x, scale, up, plus), tuple(axes for _, axes in weights)
    alike = len(plain) == len(weights) and len(kinds) == 1 and not _observers and not fp8.active()
    if alike and _kernels(x, plain) is not None:
        return _native_of_several(inputs, plain, eps, every)
    return _several(inputs, [w for w, _ in weights], eps, every)


class _Inputs(NamedTuple):
    """The arrays of `linears` besides the weights; `scale` is that of the norm."""

    x: jax.Array
    scale: jax.Array | None
    up: jax.Array | None
    plus: jax.Array | None


def _several(inputs: _Inputs, weights: Sequence[Weight], eps: float, axes: tuple[Axes, ...]) -> list[jax.Array]:
    x, scale, up, plus = inputs
    if scale is not None:
        x = rms_norm(x, scale, eps=eps)
    if up is not None:
        x = swiglu(x, up)
    products = [product(linear(x, w, its)) for w, its in zip(weights, axes, strict=True)]
    return products if plus is None else [plus + products[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _native_of_several(
    inputs: _Inputs, weights: Sequence[jax.Array | QTensor], eps: float, axes: tuple[Axes, ...]
) -> list[jax.Array]:
    x, scale, *others = inputs
    norm = None if scale is None else (scale, eps)
    up, plus = (None if a is None else a.reshape(-1, a.shape[-1]) for a in others)
    flat = x.reshape(-1, x.shape[-1])
    products = _kernels(x, weights).linears(flat, weights, dtype=x.dtype, norm=norm, up=up, plus=plus)
    return [a.reshape(*x.shape[:-1], -1) for a in products]


def _native_of_several_forward(
    inputs: _Inputs, weights: Sequence[jax.Array | QTensor], eps: float, axes: tuple[Axes, ...]
) -> tuple[list[jax.Array], Callable[..., Any]]:  # kernels have no gradient
    return jax.vjp(functools.partial(_several, eps=eps, axes=axes), inputs, weights)


_native_of_several.defvjp(_native_of_several_forward, lambda eps, axes, pullback, g: pullback(g))


def linear_f32(x: jax.Array, w: Weight) -> jax.Array:
    """The product x w^T in float32, as logits need it. It has no gradient for quantized weights."""
    _tell(x, w)
    if isinstance(w, LoraTensor):
        return _by_rows(w, linear_f32(x, w.base) + linear_f32(w.scaled(linear(x, w.a)), w.b))
    return _native_f32(x, w) if _kernels(x, [w]) else _xla_f32(x, w)


def _xla_f32(x: jax.Array, w: jax.Array | QTensor) -> jax.Array:
    return _quantized(x, w, ("vocab", "embed")) if isinstance(w, QTensor) else _product(x, w.astype(x.dtype))


def _kernels(x: jax.Array, weights: Sequence[jax.Array | QTensor]) -> Any:
    """The module whose `linears` multiplies x (..., in) faster than XLA on the active devices, or None."""
    platform = parallel.device_platform()
    if platform == "cuda":
        if gpu.takes(x, weights):
            return gpu
        from llama_jax.ops import few_rows_gpu  # importing Pallas takes 0.2 s

        return few_rows_gpu if few_rows_gpu.takes(x, weights) else None
    return cpu if all(_on_cpu(x, w) for w in weights) else None


def _on_cpu(x: jax.Array, w: jax.Array | QTensor) -> bool:
    """True if a kernel for CPUs multiplies x (..., in) with w."""
    rows = x.size // x.shape[-1] if x.size else 0
    return cpu.takes_weight(x.dtype, w) and cpu.multiplies(rows)


def _native(x: jax.Array, w: jax.Array | QTensor, dtype: jnp.dtype) -> jax.Array:
    (out,) = _kernels(x, [w]).linears(x.reshape(-1, x.shape[-1]), [w], dtype=dtype)
    return out.reshape(*x.shape[:-1], w.shape[0])


@jax.custom_jvp
def _native_f32(x: jax.Array, w: jax.Array | QTensor) -> jax.Array:
    return _native(x, w, jnp.float32)


@_native_f32.defjvp
def _native_f32_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(_xla_f32, primals, tangents)  # kernels have no gradient


def _by_rows(w: LoraTensor, product: jax.Array) -> jax.Array:
    """Multiplies a product (..., out) by DoRA's row factors of w, if w has them. The result has the product's dtype."""
    return product if w.factor is None else (product * w.factor[:, 0]).astype(product.dtype)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    rows = x.size // x.shape[-1]
    if x.dtype == jnp.bfloat16 and rows < _CPU_BF16_ROWS:
        return lax.platform_dependent(x, w, cpu=_rows_times_cpu, default=_rows_times)
    return _rows_times(x, w)


def _quantized(x: jax.Array, w: QTensor, axes: Axes) -> jax.Array:
    layout = parallel.active()
    if parallel.device_platform() == "tpu" and (layout is None or layout.rules == "infer"):
        from llama_jax.ops import few_rows_tpu  # importing Pallas takes 0.2 s

        return few_rows_tpu.product(x, w, axes) if few_rows_tpu.takes(x, w, axes) else _quantized_tpu(x, w, axes)
    w = _all_gathered(w, axes)
    if layout is not None and layout.mesh.size > 1:  # a loop over rows would need them on one device
        return _dequantized_product(x, w)
    return lax.platform_dependent(x, w, cpu=_dequantized_by_blocks, default=_dequantized_product)


def _quantized_tpu(x: jax.Array, w: QTensor, axes: Axes) -> jax.Array:
    """The product of inference on TPUs, with a weight that is dequantized when its inputs are there.

    Without the barrier, XLA prepares weights before the loop of decode steps, which takes the memory of a second model.
    Without the layouts, it transposes and stores float32 scales as large as the weight rather than packed values
    (docs/measurements/tpu-compiler.md#quantized-decoding).
    """
    x, w = lax.optimization_barrier((x, w))
    w = _all_gathered(w, axes)
    return _dequantized_product(x, w, lambda numbers_OGn: _in_order(numbers_OGn, (1, 2, 0), axes and (*axes, None)))


def _dequantized_product(
    x: jax.Array, w: QTensor, pinned: Callable[[jax.Array], jax.Array] = lambda numbers_OGn: numbers_OGn
) -> jax.Array:
    products = (
        _product(part, pinned(quant.scaled(pinned(plane), w.scales, x.dtype)).reshape(w.shape[0], -1))
        for part, plane in zip(quant.inputs_of_planes(w, x), quant.planes(w), strict=True)
    )
    return functools.reduce(operator.add, products)


def _dequantized_by_blocks(x: jax.Array, w: QTensor) -> jax.Array:
    out = w.shape[0]
    rows = x.size // x.shape[-1]
    block = _CPU_BLOCK_ROWS[rows >= _CPU_BF16_ROWS]
    if out % block:
        return _dequantized_product(x, w)
    blocks = jax.tree.map(lambda a: a.reshape(out // block, block, -1), w)
    products = lax.map(lambda part: _dequantized_product(x.reshape(rows, -1), part), blocks)
    return products.swapaxes(0, 1).reshape(*x.shape[:-1], out)


def _all_gathered(w: QTensor, axes: Axes) -> QTensor:
    """All-gathers the packed weight over the axes of `embed`, and forces a row-major memory layout.

    Without the constraint, XLA on a TPU transposes the stacked weights of all layers before a scan, since dequantizing
    is faster that way. That takes the memory of a second model (tests/project/test_aot.py).
    """

    kept = axes and tuple(None if axis == "embed" else axis for axis in axes)
    return jax.tree.map(lambda a: _in_order(a, tuple(range(a.ndim)), kept), w)


def _in_order(a: jax.Array, order: tuple[int, ...], axes: Axes) -> jax.Array:
    """The array, with its dimensions in memory in this order, the last without a stride."""

    def pinned(a: jax.Array) -> jax.Array:
        return with_layout_constraint(a, Layout(order))

    return pinned(a) if axes is None else parallel.on_each_part(pinned, (a, axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantized_linear(x: jax.Array, w: QTensor, axes: tuple[str | None, ...] | None) -> jax.Array:
    return _native(x, w, x.dtype) if _kernels(x, [w]) else _quantized_forward(x, w, axes)[0]


def _quantized_forward(x: jax.Array, w: QTensor, axes: tuple[str | None, ...] | None) -> tuple[jax.Array, QTensor]:
    # The residual is the packed, sharded weight. Gathered and dequantized it would be many times as large.
    return _native(x, w, x.dtype) if _on_cpu(x, w) else _quantized(x, w, axes).astype(x.dtype), w


def _quantized_backward(axes: tuple[str | None, ...] | None, w: QTensor, g: jax.Array) -> tuple[jax.Array, None]:
    whole = quant.dequantize(_all_gathered(w, axes), g.dtype)
    return _input_gradient(g, whole), None


_quantized_linear.defvjp(_quantized_forward, _quantized_backward)


def _gathered(w: jax.Array, axes: tuple[str | None, ...] | None, dtype: jnp.dtype) -> jax.Array:
    """The weight in `dtype`, all-gathered over the mesh axes of `embed`."""
    w = w.astype(dtype)
    if axes is None:
        return w
    w = parallel.constrain(w, *axes)  # without it, the cast may be partitioned as its result, and float32 gathered
    return parallel.constrain(w, *(None if axis == "embed" else axis for axis in axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, w: jax.Array, axes: tuple[str | None, ...] | None) -> jax.Array:
    return _native(x, w, x.dtype) if _kernels(x, [w]) else _forward(x, w, axes)[0]


def _forward(x: jax.Array, w: jax.Array, axes: Axes) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    whole = _gathered(w, axes, x.dtype)
    return _native(x, whole, x.dtype) if _on_cpu(x, whole) else _product(x, whole).astype(x.dtype), (x, w)


def _backward(axes: Axes, residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    g = g.astype(x.dtype)
    leading = tuple(range(x.ndim - 1))
    whole = _gathered(w, axes, x.dtype)
    dx = _input_gradient(g, whole)
    if axes is not None and parallel.ring_takes(g, x, axes):
        return dx, parallel.ring_gradient(g, x, axes).astype(w.dtype)
    if _on_cpu(x, whole):
        dw = cpu.product(g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]), jnp.float32, transposed=True)
    # XLA on a CPU transposes the first operand of this product in memory, so the narrower goes first. In bfloat16
    # it has no product with a transposed first operand for some of these shapes.
    elif x.dtype == jnp.float32 and x.shape[-1] <= g.shape[-1]:
        dw = _dot(x, g, (leading, leading)).T
    else:
        dw = _dot(g, x, (leading, leading))
    dw = dw if axes is None else parallel.constrain(dw, *axes)
    return dx, dw.astype(w.dtype)


def _input_gradient(g: jax.Array, w: jax.Array) -> jax.Array:
    """g w: (..., in) in the dtype of g (..., out), for a weight (out, in) in that dtype."""
    if _on_cpu(g, w):
        return cpu.product(g.reshape(-1, g.shape[-1]), w, g.dtype).reshape(*g.shape[:-1], w.shape[1])
    return _dot(g, w, ((g.ndim - 1,), (0,))).astype(g.dtype)


_linear.defvjp(_forward, _backward)


def embed(table: Weight, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table (V, D) for ids (...), as (..., D) in `dtype`. Ids outside 0..V-1 give NaN.

    The gradient of the table is summed in float32 and rounded once to `dtype`. For a LoraTensor the rows of base +
    scale * b a are computed without dropout, as in peft.
    """
    if isinstance(table, LoraTensor):
        rows = embed(table.base, ids, dtype) + linear(table.scaled(embed(table.b, ids, dtype)), table.a.T)
        return rows if table.factor is None else (rows * table.factor[0]).astype(dtype)
    if isinstance(table, QTensor):
        return quant.take(table, ids, dtype)
    # Each device looks up its columns for the rows of all devices that share the table, and an all-to-all exchanges
    # columns for rows. Gathering the table instead would take its memory twice, for itself and for its gradient.
    table = parallel.constrain(table.astype(dtype), "vocab", "embed")
    return _whole(_columns(_bf16_rows(table, ids) if table.dtype == jnp.bfloat16 else _rows_of(table, ids)))


def _columns(x: jax.Array) -> jax.Array:
    """Constrains rows of the table (B, T, D) to be sharded by columns, as the table is."""
    return parallel.constrain(x, "gathered_batch", None, "embed") if x.ndim == 3 else x


def _whole(x: jax.Array) -> jax.Array:
    """Constrains rows of the table (B, T, D) to be sharded by rows alone.

    Where the batch is sharded over data and fsdp, XLA replicates all rows (256 GiB for 405B on 4,096 v5p chips) if in
    one step rows take the place of columns and columns are sharded over tensor.
    """
    return parallel.constrain(x, "batch", "length", None) if x.ndim == 3 else x


def _rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


def _rows_of_cpu(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The look-up of bfloat16 rows as 16-bit integers, since XLA on a CPU would first copy the table to float32."""
    bits = lax.bitcast_convert_type(table, jnp.uint16)
    rows = jnp.take(bits, ids, axis=0, mode="fill", fill_value=_BF16_NAN)
    return lax.bitcast_convert_type(rows, jnp.bfloat16)


@jax.custom_vjp
def _bf16_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    if cpu.ready():  # XLA would copy the table, as integers, in every program
        return cpu.rows(table, ids)
    return lax.platform_dependent(table, ids, cpu=_rows_of_cpu, default=_rows_of)


def _bf16_rows_forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _bf16_rows(table, ids), (table, ids)


def _bf16_rows_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    table, ids = residuals
    sums = jnp.zeros(table.shape, jnp.float32).at[ids].add(_columns(_whole(g)).astype(jnp.float32), mode="drop")
    return parallel.constrain(sums, "vocab", "embed").astype(table.dtype), None


_bf16_rows.defvjp(_bf16_rows_forward, _bf16_rows_backward)
