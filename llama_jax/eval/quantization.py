"""The cost of quantization: a model's size, and how far its predictions are from those of the model before rounding.

For every token of the texts, both models predict the next one. The divergence at a token is KL(p || q) in nats, with p
of the reference and q of the quantized model (Kullback and Leibler, 1951). It is 0 if rounding changed nothing. Its
99th percentile shows large errors at few tokens, which the mean hides.

Letters: B batch, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import model, parallel
from llama_jax.cache import init_cache
from llama_jax.choices import QUANTIZATIONS
from llama_jax.errors import ConfigError
from llama_jax.eval import scoring
from llama_jax.eval.calibration import quantized
from llama_jax.eval.sliding_window import Sample, counted_ids
from llama_jax.infer.llama import Llama
from llama_jax.infer.load import load
from llama_jax.infer.program import Program
from llama_jax.params import Params
from llama_jax.progress import progress_bar
from llama_jax.text.tokenizer import require_tokenizer

_CONTEXT = 512
_LOGITS = 1 << 26  # most float32 logits of one model in memory at a time (256 MiB)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The distance of a quantized model's predictions from those of its reference.

    Attributes:
        name: the quantization, or the file of the quantized model.
        nbytes: bytes of its weights in memory. Quantized types that the model cannot compute with are dequantized
            there.
        file_nbytes: bytes of its file, for one that is a single file; else None.
        reference_nbytes: bytes of the reference's weights in memory.
        mean: mean KL divergence of a token, in nats.
        percentile_99: 99th percentile of it, in nats.
        agreement: share of tokens where both models have the same likeliest token.
        perplexity: perplexity of the quantized model on the texts.
        reference_perplexity: perplexity of the reference.
        tokens: number of predicted tokens.
    """

    name: str
    nbytes: int
    file_nbytes: int | None
    reference_nbytes: int
    mean: float
    percentile_99: float
    agreement: float
    perplexity: float
    reference_perplexity: float
    tokens: int

    @property
    def perplexity_change(self) -> float:
        """The relative change of the perplexity: 0.01 is one percent more."""
        return self.perplexity / self.reference_perplexity - 1


def measure(
    source: str,
    texts: Sequence[Sample],
    *,
    quantizations: Sequence[str] = QUANTIZATIONS,
    others: Sequence[str] = (),
    calibration: Sequence[Sample] = (),
    context: int = _CONTEXT,
    opened: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Iterator[Divergence]:
    """Yields the divergence of a model in each quantization, and of other files of the same model, one after another.

    Args:
        source: the model, as `llama_jax.load` takes it. Weights that it stores quantized are dequantized.
        texts: the texts, dialogs and completions that both models predict; see `sliding_window.perplexity`.
        quantizations: values of `quantize` of `llama_jax.load`, and "kv_int8" for a KV cache of 8 bits.
        others: more quantized files or folders of the same model, as `llama_jax.load` takes them.
        calibration: texts by whose activations 4 bits are rounded (`calibration.quantized`), for one more result.
        context: tokens in a window. The windows of a text do not overlap.
        opened: other arguments of `llama_jax.load`, for all models.
        progress: True shows a bar on standard error. The default shows it for many windows.

    Raises:
        ConfigError: there is no token to predict, a model has another vocabulary, or `opened` rounds the reference.
    """
    opened = dict(opened or {})
    if opened.get("kv", "compute") != "compute":
        raise ConfigError(f"kv={opened['kv']!r} would round the reference's cache too: name 'kv_int8' in quantizations")
    reference = load(source, **{**opened, "quantize": "none"})
    require_tokenizer(reference.tokenizer, "measuring quantization")
    context = scoring.check_length(reference, min(context, reference.config.max_seq_len))
    windows = _windows(reference, texts, context)
    candidates = [(name, source, {**opened, "quantize": name}) for name in quantizations]
    candidates += [(str(path), path, {**opened, "quantize": None}) for path in others]
    for name, place, settings in candidates:
        if name == "kv_int8":
            candidate = _like(reference, reference.params, kv="int8")
        else:
            candidate = load(place, **settings)
        if candidate.config.vocab_size != reference.config.vocab_size:
            sizes = candidate.config.vocab_size, reference.config.vocab_size
            raise ConfigError(f"{name} has a vocabulary of {sizes[0]:,} tokens, and the reference one of {sizes[1]:,}")
        file = Path(place)
        size = file.stat().st_size if name not in quantizations and file.is_file() else None
        yield dataclasses.replace(_compared(name, reference, candidate, windows, progress), file_nbytes=size)
        del candidate
        gc.collect()  # compiled functions hold the weights in reference cycles
    if calibration and "int4" in quantizations:
        candidate = _like(reference, quantized(reference, calibration))
        yield _compared("int4, calibrated", reference, candidate, windows, progress)


def _like(reference: Llama, params: Params, **settings: Any) -> Llama:
    """The reference with other weights or settings."""
    mesh, dtype = reference.mesh, reference.engine.dtype
    return Llama(reference.config, params, reference.tokenizer, mesh=mesh, dtype=dtype, **settings)


def _windows(llama: Llama, texts: Sequence[Sample], context: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of `context` + 1 ids, padded with 0, and a mask of the ids that are predicted."""
    rows, masks = [], []
    for sample in texts:
        ids, keep = counted_ids(llama, sample)
        for start in range(0, len(ids) - 1, context):
            part, its = ids[start : start + context + 1], keep[start : start + context + 1].copy()
            its[:1] = False
            if its.any():
                padding = context + 1 - len(part)
                rows.append(np.pad(np.array(part, np.int32), (0, padding)))
                masks.append(np.pad(its, (0, padding)))
    if not rows:
        raise ConfigError("the texts hold no token to predict: give at least one of a few words")
    return np.stack(rows), np.stack(masks)


def _compared(
    name: str, reference: Llama, candidate: Llama, windows: tuple[np.ndarray, np.ndarray], progress: bool | None
) -> Divergence:
    rows, masks = windows
    step = max(1, _LOGITS // (rows.shape[1] * reference.config.vocab_size))
    starts = range(0, len(rows), step)
    shown = len(starts) > 8 if progress is None else progress
    kept: list[list[np.ndarray]] = []
    with progress_bar(len(rows), name, unit="window", shown=shown, delay=0) as bar:
        for start in starts:
            tokens = rows[start : start + step]
            logits = [_logits(llama, tokens[:, :-1]) for llama in (reference, candidate)]
            results = jax.device_get(_at_each_token(*logits, jnp.asarray(tokens[:, 1:])))
            kept.append([result[masks[start : start + step, 1:]] for result in results])
            bar.update(len(tokens))
    divergences, agree, reference_nats, nats = (np.concatenate(a).astype(np.float64) for a in zip(*kept, strict=True))
    if not np.isfinite(nats).all():
        raise ConfigError(f"{name}: the logits are not finite: its weights are damaged, or overflow (try float32)")
    return Divergence(
        name=name,
        nbytes=_nbytes(candidate),
        file_nbytes=None,
        reference_nbytes=_nbytes(reference),
        mean=float(divergences.mean()),
        percentile_99=float(np.quantile(divergences, 0.99)),
        agreement=float(agree.mean()),
        perplexity=math.exp(nats.mean()),
        reference_perplexity=math.exp(reference_nats.mean()),
        tokens=len(nats),
    )


def _logits(llama: Llama, tokens_BT: np.ndarray) -> jax.Array:
    """Logits (B, T, V) in float32. With a KV cache of 8 bits, attention reads the keys and values from it."""
    if llama.engine.program.kv == "compute":
        return llama.logits(tokens_BT)
    return _by_cache(llama.engine.program, llama.params, jnp.asarray(tokens_BT))


@functools.partial(jax.jit, static_argnums=0)
def _by_cache(program: Program, params: Params, tokens_BT: jax.Array) -> jax.Array:
    config, (B, T) = program.config, tokens_BT.shape
    with parallel.use(program.layout):
        cache = init_cache(config, batch=B, capacity=T, dtype=program.dtype, kv=program.kv)
        positions_BT, live_BT = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32)
        hidden, _ = model.forward(config, params, tokens_BT, positions_BT, live_BT, cache, dtype=program.dtype)
        return model.unembed(config, params, hidden)


@jax.jit
def _at_each_token(reference_BTV: jax.Array, logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, ...]:
    """KL divergence, agreement of the likeliest token, and -log p of the target under both models, each (B, T)."""
    p_BTV, q_BTV = jax.nn.log_softmax(reference_BTV), jax.nn.log_softmax(logits_BTV)
    divergence_BT = jnp.sum(jnp.exp(p_BTV) * (p_BTV - q_BTV), axis=-1)
    agree_BT = jnp.argmax(p_BTV, axis=-1) == jnp.argmax(q_BTV, axis=-1)
    nats = [-jnp.take_along_axis(a, targets_BT[..., None], axis=-1)[..., 0] for a in (p_BTV, q_BTV)]
    return divergence_BT, agree_BT, *nats


def _nbytes(llama: Llama) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(llama.params))


def table(results: Sequence[Divergence]) -> str:
    """A table of results, one line each."""
    head = f"{'':<24} {'GB':>7} {'KL mean':>9} {'KL 99 %':>9} {'same top':>9} {'perplexity':>11}"
    first = results[0]
    lines = [head, f"{'reference':<24} {first.reference_nbytes / 1e9:7.3f} {'':>29} {first.reference_perplexity:11.4g}"]
    for r in results:
        lines.append(
            f"{r.name[-24:]:<24} {(r.file_nbytes or r.nbytes) / 1e9:7.3f} {r.mean:9.5f} {r.percentile_99:9.4f} "
            f"{r.agreement:9.2%} {r.perplexity:11.4g} ({r.perplexity_change:+.2%})"
        )
    return "\n".join([*lines, f"{first.tokens:,} tokens"])
