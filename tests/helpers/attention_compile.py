"""Compile attention of Llama 3.1 8B's shape for a chip that is not here; print kernels, memory and bytes read, as JSON.

    JAX_PLATFORMS=cpu PYTHONPATH=.:tests:CUDA_PLUGIN_PATH python -m helpers.attention_compile h100 [CASE ...]

A helper of tests/project/test_aot.py, which runs it in a process of its own. TPUs want the environment of
helpers/aot_compile.py.
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from helpers.aot_compile import tpu_mesh
from llama_jax import cache, parallel
from llama_jax.config import size
from llama_jax.infer.program import Program
from llama_jax.ops import gpu, linear, quant
from llama_jax.ops.attention import Call, attention
from llama_jax.ops.remat import with_remat
from llama_jax.plan.compile import topology
from llama_jax.plan.devices import parse

N, K, H = 32, 8, 128
ROWS, CAPACITY, BOUND = 8, 8192, 4096


def whole_rows(layout, T, documents):
    """The forward and backward pass of one row."""

    def run(q, k, v, d_out, tokens):
        with parallel.use(layout):
            segments = tokens if documents else None
            out, back = jax.vjp(lambda q, k, v: attention(Call(q, k, v, tokens, segments)), q, k, v)
            return out, back(d_out)

    def array(shape, axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes, shape))

    q = array((1, T, N, H), ("batch", "length", "heads", None))
    k = array((1, K, T, H), ("batch", "kv_heads", "length", None))
    return jax.jit(run).lower(q, k, k, q, array((1, T), ("batch", "length"), jnp.int32))


def kept(layout, documents, remat):
    """The gradient of one row of 1,024 whose layer is rematerialized."""

    def run(q, k, v, tokens):
        def layer(q):
            call = Call(2 * q, k, v, tokens, tokens if documents else None)
            return jnp.sin(attention(call)).astype(jnp.float32)

        with parallel.use(layout):
            return jax.grad(lambda q: jnp.sum(with_remat(layer, remat)(q)))(q)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding((None,) * len(shape)))

    k = array(1, K, 1024, H)
    return jax.jit(run).lower(array(1, 1024, N, H), k, k, array(1, 1024, dtype=jnp.int32))


def cached(layout, T, kv):
    """A pass of T tokens a row over a cache whose first half is live."""
    config = dataclasses.replace(size("llama3.1-8b"), num_layers=1)

    def run(q, positions, store):
        with parallel.use(layout):
            at = cache.window(store, positions, None, bound=BOUND)
            return attention(Call(q, store.k[0], store.v[0], positions, None, at))

    def array(shape, axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes, shape))

    with parallel.use(layout):
        store = jax.eval_shape(
            lambda: cache.init_cache(config, batch=ROWS, capacity=CAPACITY, dtype=jnp.bfloat16, kv=kv)
        )
    store = parallel.abstract(store, cache.shardings(layout, store))
    q = array((ROWS, T, N, H), ("batch", "length", "heads", None))
    return jax.jit(run).lower(q, array((ROWS, T), ("batch", "length"), jnp.int32), store)


def product(mesh, bits):
    """One row times a quantized weight of a feed-forward layer."""
    one = parallel.replicated(mesh)
    w = jax.eval_shape(lambda: quant.quantize(jnp.zeros((14336, 4096)), bits))
    w = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), w)

    def run(x, w):
        with parallel.use(parallel.Layout(mesh, "infer")):
            return linear.linear(x, w)

    return jax.jit(run).lower(jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16, sharding=one), w)


def engine(mesh, bits, kv, rows=ROWS):
    """The decode loop of `generate`: one layer and the unembedding."""
    whole = parallel.replicated(mesh)
    program = Program.make(dataclasses.replace(size("llama3.1-8b"), num_layers=1), mesh=mesh, dtype=jnp.bfloat16, kv=kv)

    def packed(path, leaf):
        if "layers" not in str(path) or len(leaf.shape) != 2:
            return leaf
        shapes = jax.eval_shape(lambda: quant.quantize(jnp.zeros(leaf.shape), bits))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), shapes)

    flags, number = (
        jax.ShapeDtypeStruct((rows,), bool, sharding=whole),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )
    steer = {"alive_B": flags, "drafts_B": flags, "limit": number, "least": number}
    params = jax.tree.map_with_path(packed, program.abstract_params())
    state = program.abstract_state(rows=rows, capacity=CAPACITY)
    return program.decode.lower(params, state, steer, bound=BOUND, top=0, guesses=0, drafter="")


def with_cuda_kernels(lowered, *arguments):
    """A program with the kernels of ops/gpu, which otherwise are used on the machine that has checked them only."""
    jax.clear_caches()  # of a layer that was traced with other kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "faster", lambda kind: True)
        return lowered(*arguments)


CASES = {
    "documents": lambda mesh: whole_rows(parallel.Layout(mesh, "train"), 8192, True),
    "one document": lambda mesh: whole_rows(parallel.Layout(mesh, "train"), 8192, False),
    "decode": lambda mesh: cached(parallel.Layout(mesh, "infer"), 1, "compute"),
    "decode int8": lambda mesh: cached(parallel.Layout(mesh, "infer"), 1, "int8"),
    "prefill": lambda mesh: cached(parallel.Layout(mesh, "infer"), 256, "compute"),
    "prefill int8": lambda mesh: cached(parallel.Layout(mesh, "infer"), 256, "int8"),
    "product int8": lambda mesh: product(mesh, 8),
    "product int4": lambda mesh: product(mesh, 4),
    "engine": lambda mesh: engine(mesh, 4, "int8"),
    "engine, CUDA kernels": lambda mesh: with_cuda_kernels(engine, mesh, 4, "int8"),
    "engine, one row": lambda mesh: with_cuda_kernels(engine, mesh, 4, "int8", 1),
    "kept, documents": lambda mesh: kept(parallel.Layout(mesh, "train"), True, "attention"),
    "kept, one document": lambda mesh: kept(parallel.Layout(mesh, "train"), False, "attention"),
    "offloaded, documents": lambda mesh: kept(parallel.Layout(mesh, "train"), True, "offload"),
}

# Recipe, number of H100s, and the peak in GiB that docs/measurements/gpu-compiler.md#recipes states.
RECIPES = [
    ("llama31_8b_lora", 1, 17.9),
    ("llama31_8b_qlora", 1, 10.4),
    ("llama31_8b_sft", 8, 21.7),
    ("llama31_70b_lora", 8, 45.7),
]
QUANTIZED = ("product int8", "product int4", "engine", "engine, CUDA kernels", "engine, one row")


def main():
    chip, names = sys.argv[1], sys.argv[2:]
    mesh = tpu_mesh(chip, {}) if ":" in chip else parallel.make_mesh({}, topology(parse(f"{chip}:1")))
    found = {}
    for name in names or [name for name in CASES if name not in QUANTIZED]:
        with jax.set_mesh(mesh):
            compiled = CASES[name](mesh).compile()
        text = compiled.as_text()
        memory = compiled.memory_analysis()
        found[name] = {
            "kernels": sorted(
                set(re.findall(r'name = "((?:flash|split|quantized|few)_\w+|products|layers)"', text))
                | set(re.findall(r"%(ragged_attention|splash_\w+?)[.\d]* = ", text))
                | set(re.findall(r'custom_call_target="(__cudnn\$fmha\w+)"', text))
            ),
            "launches": text.count('custom_call_target="__gpu$xla.gpu.'),
            "forward_calls": len(
                re.findall(r'name = "flash_forward"|="__cudnn\$fmhaSoftmax"|%splash_mha_fwd[\w.]* = ', text)
            ),
            "host_bytes": memory.host_temp_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "bytes_accessed": (compiled.cost_analysis() or {}).get("bytes accessed"),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
