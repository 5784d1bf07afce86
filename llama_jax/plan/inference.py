"""Plans of inference: what prefill and decoding need on devices that need not be here.

    plan = inference.make(Serving(config.size("llama3.1-8b"), rows=8, capacity=8192), devices.parse("v5e:8"))

As with training, the compiler's numbers are those of the very `infer.Program` that would run, and the closed model adds
up the shards of its abstract weights and state where no compiler is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import parallel
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.infer.program import Program, layout_of
from llama_jax.ops import few_rows_gpu, few_rows_tpu, quant
from llama_jax.plan import memory, planner, projection, report
from llama_jax.plan.devices import GIB, Devices
from llama_jax.plan.facts import facts_of
from llama_jax.weights.quantize import BITS, check

CHUNK = 512  # tokens of the longest prefill chunk


@dataclasses.dataclass(frozen=True)
class Serving:
    """A model and the batch that it decodes.

    Attributes:
        model: shape of the model.
        rows: rows of the batch.
        capacity: positions that each row can hold.
        dtype: dtype of weights and activations.
        kv: type of the KV cache, one of choices.KV_TYPES.
        quantize: quantization of the matrices, "int8" or "int4", or "none".
    """

    model: ModelConfig
    rows: int = 8
    capacity: int = 8192
    dtype: str = "bfloat16"
    kv: str = "compute"
    quantize: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Serving:
        """The record of a dict that `to_dict` made."""
        return cls(**{**values, "model": ModelConfig.from_dict(values["model"])})


def make(
    serving: Serving, devices: Devices, sizes: Mapping[str, int] | None = None, *, compiling: bool = True
) -> dict[str, Any]:
    """A plan as a JSON-able dict.

    Args:
        serving: the model and its batch.
        devices: the devices.
        sizes: devices along each mesh axis. By default the heads are split over as many of them as they allow.
        compiling: False uses the closed model even where a compiler is installed.

    Raises:
        ConfigError: the mesh does not fit the devices or the model's heads, or the capacity is larger than the model's.
    """
    config = serving.model
    if not 1 <= serving.capacity <= config.max_seq_len:
        raise ConfigError(f"a row of {serving.capacity:,} positions: the model has {config.max_seq_len:,}")
    check(config, serving.quantize)
    full = parallel.resolve(sizes or _mesh_for(config, devices.count), devices.count)
    program = _program(serving, parallel.abstract_mesh(full))
    params = _params(serving, program)
    weights = memory.shard_bytes(params)
    looked_up = 0 if config.tied_embeddings else memory.shard_bytes(params["embed"])  # a step reads some of its rows
    state = program.abstract_state(rows=serving.rows, capacity=serving.capacity)
    cache = memory.shard_bytes(state.cache)
    closed = weights + memory.shard_bytes(state) + _scratch(serving, program, devices)
    environment = planner.environment_of(devices)
    facts: dict[str, Any] | None = None
    if environment is not None and compiling:
        facts = planner.ask({"serving": serving.to_dict()}, devices, full, environment)
    peak = closed if facts is None else max(one["peak_bytes"] or closed for one in facts["programs"].values())
    bandwidth, tokens = devices.chip.bandwidth, serving.rows * CHUNK
    operations = tokens * config.flops_per_token(CHUNK // 2, training=False)
    return {
        "model": {"parameters": config.num_params, "layers": config.num_layers, "embed_dim": config.embed_dim},
        "device": devices.name,
        "chips": devices.chips,
        "mesh": full,
        "rows": serving.rows,
        "capacity": serving.capacity,
        "dtype": serving.dtype,
        "kv": serving.kv,
        "quantize": serving.quantize,
        "fits": peak <= devices.chip.hbm and (facts is None or all(one["fits"] for one in facts["programs"].values())),
        "by": "closed model" if facts is None else "compiler",
        "limit_bytes": devices.chip.hbm,
        "peak_bytes": peak,
        "closed_peak_bytes": closed,
        "parts": {"weights": weights, "cache": cache, "scratch": max(0, peak - weights - cache)},
        "cache_bytes_a_token": cache * devices.count // (serving.rows * serving.capacity),
        # A step reads the weights and, at worst, the whole cache.
        "step_bytes": [weights - looked_up, weights - looked_up + cache],
        "decode_ms": [1e3 * (weights - looked_up + one) / bandwidth for one in (0, cache)],
        "prefill_tokens_per_second": devices.count * projection.EFFICIENCY * devices.chip.flops * tokens / operations,
        "assumed_efficiency": projection.EFFICIENCY,
        "programs": {} if facts is None else facts["programs"],
        "compile_seconds": None if facts is None else facts["seconds"],
        "proof": planner.proof_of(devices) if environment is None else "",
    }


def _mesh_for(config: ModelConfig, count: int) -> dict[str, int]:
    """A mesh that splits the heads over as many devices as they allow, and rows over the others."""
    most = max(n for n in range(1, count + 1) if count % n == 0 and _fits(config, n))
    heads, batch = (parallel.RULES["infer"][axis][0] for axis in ("heads", "batch"))
    return {heads: most, batch: count // most}


def _fits(config: ModelConfig, tensor: int) -> bool:
    heads = config.num_kv_heads
    return heads % tensor == 0 or (tensor % heads == 0 and config.num_heads % tensor == 0)


def _program(serving: Serving, mesh: Any) -> Program:
    return Program(serving.model, layout_of(serving.model, mesh), jnp.dtype(serving.dtype), serving.kv)


def _params(serving: Serving, program: Program) -> Any:
    """The abstract weights, quantized as the loader would."""
    shapes = program.abstract_params()
    bits = BITS.get(serving.quantize)
    if bits is None:
        return shapes
    layout, config = program.layout, serving.model
    assert layout is not None
    from llama_jax.params import logical_axes

    def rounded(path: Any, a: jax.ShapeDtypeStruct) -> Any:
        if a.ndim != 2 or a.shape[-1] % quant.GROUP:
            return a
        own = 8 if config.tied_embeddings and path[0].key == "embed" else bits
        return jax.eval_shape(lambda w: quant.quantize(w, own), jax.ShapeDtypeStruct(a.shape, a.dtype))

    shapes = jax.tree_util.tree_map_with_path(rounded, shapes)
    return parallel.abstract(shapes, parallel.shardings(layout, logical_axes(config, stacked=False), shapes))


def _chunk(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract chunk of one row of a prompt."""
    assert program.layout is not None
    shapes = {name: jax.ShapeDtypeStruct((1,), jnp.int32) for name in ("rows_R", "starts_R", "counts_R")}
    shapes["tokens_RT"] = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32)
    return parallel.abstract(shapes, {name: parallel.replicated(program.layout.mesh) for name in shapes})


def _scratch(serving: Serving, program: Program, devices: Devices) -> int:
    """Bytes besides weights and state: scores and the widest activations of a prefill chunk, or logits of a step.

    Where no kernel reads a packed unembedding, a step transposes it as int8 and dequantizes it: up to 3 bytes for each
    value. On TPUs, XLA lays out matrices whose rows do not fill lanes the other way, and copies them for the kernel.
    """
    assert program.layout is not None
    rows, tpu = serving.rows, devices.chip.platform == "tpu"
    kernel = serving.dtype == "bfloat16" and (
        rows <= few_rows_tpu.MAX_ROWS if tpu else devices.count == 1 and rows <= few_rows_gpu.MAX_ROWS
    )
    m, tensor = serving.model, program.layout.parts("heads")
    width = jnp.dtype(serving.dtype).itemsize
    scores = 2 * 4 * m.num_heads // tensor * CHUNK * serving.capacity
    activations = CHUNK * (3 * m.ffn_dim // tensor * width + 4 * m.embed_dim * 4)
    logits = 2 * 4 * serving.rows * m.vocab_size
    whole = 0 if kernel or serving.quantize == "none" else 3 * m.vocab_size * m.embed_dim
    narrow = m.ffn_dim // tensor * BITS.get(serving.quantize, 0) // 8  # bytes of a row of the down projection
    copies = m.num_layers * m.embed_dim * narrow * 17 // 16 if tpu and narrow % 128 else 0  # and the scales
    return max(min(scores, 1 << 28) + activations, whole // program.layout.parts("vocab")) + logits + copies


def compiled(serving: Serving, devices: Devices, mesh: Any) -> dict[str, Any]:
    """Facts about the compiled prefill of a chunk and the decode loop, both at the whole capacity, by program."""
    program = _program(serving, mesh)
    params = _params(serving, program)
    state = program.abstract_state(rows=serving.rows, capacity=serving.capacity)
    whole = parallel.replicated(mesh)
    steer = {
        "alive_B": jax.ShapeDtypeStruct((serving.rows,), jnp.bool_),
        "drafts_B": jax.ShapeDtypeStruct((serving.rows,), jnp.bool_),
        "limit": jax.ShapeDtypeStruct((), jnp.int32),
        "least": jax.ShapeDtypeStruct((), jnp.int32),
    }
    steer = parallel.abstract(steer, {name: whole for name in steer})
    bound = serving.capacity
    lowered = {
        "prefill": program.prefill.lower(params, state, _chunk(program), bound=bound),
        "decode": program.decode.lower(params, state, steer, bound=bound, top=0, guesses=0, drafter=""),
    }
    return {"programs": {name: facts_of(one, devices) for name, one in lowered.items()}}


def table(plan: Mapping[str, Any]) -> str:
    """A plan as lines of text."""
    limit, peak = plan["limit_bytes"], plan["peak_bytes"]
    least, most = plan["decode_ms"]
    lines = [
        report.heading(plan),
        f"  batch        {plan['rows']} rows of {plan['capacity']:,} positions, {plan['dtype']}, cache {plan['kv']}, "
        f"weights {plan['quantize'] if plan['quantize'] != 'none' else plan['dtype']}",
        f"  memory       {'fits' if plan['fits'] else 'does not fit'}: {peak / GIB:.2f} of {limit / GIB:.2f} GiB a "
        f"device, by the {plan['by']}",
        *(f"    {name:<12} {size / GIB:8.2f} GiB" for name, size in plan["parts"].items()),
        f"  cache        {plan['cache_bytes_a_token']:,} bytes a token, on all devices together",
        f"  a step       at least {least:.2f} ms with an empty cache and {most:.2f} ms with a full one, by bandwidth "
        f"of memory: at most {1e3 * plan['rows'] / least:,.0f} and {1e3 * plan['rows'] / most:,.0f} tokens/s",
        f"  prefill      {plan['prefill_tokens_per_second']:,.0f} tokens/s. Not measured: it assumes products at "
        f"{100 * plan['assumed_efficiency']:.0f} % of the peak",
    ]
    moved = plan["programs"].get("decode", {}).get("loop_bytes")
    if moved:
        lines.append(
            f"  moved        {moved / 1e9:.2f} GB in a compiled step with a full cache, "
            f"{moved / plan['step_bytes'][1]:.2f} times the weights and the cache"
        )
    for name, facts in plan["programs"].items():
        kernels = ", ".join(facts.get("kernels", {})) or "none of ours"
        lines.append(f"  {name:<12} {(facts['peak_bytes'] or 0) / GIB:.2f} GiB, kernels: {kernels}")
        for one in facts.get("collectives", []):
            sent = (one["overlapped"] + one["exposed"]) / 1e6
            lines.append(f"    {one['kind']:<19} {one['count']:>6} a call, {sent:,.2f} MB sent by each device")
    if plan["proof"]:
        lines.append(f"  proof        no compiler for this device is installed. For a compiled plan: {plan['proof']}")
    elif plan["compile_seconds"] is not None:
        lines.append(f"  compiled     in {plan['compile_seconds']:.0f} s of one core")
    return "\n".join(lines)
