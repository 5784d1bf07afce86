"""Answers to the requests of EleutherAI's lm_eval. It does not import lm_eval; `harness` has the class that does.

Texts become ids, windows and stops as in lm_eval's own HFLM (lm_eval/models/huggingface.py, 0.4.13), so that scores can
be compared with those published with it. Three of its conventions differ from the rest of this package:
- The name of a control token in a text is that token. lm_eval passes dialogs as one string, in which only names
  distinguish the format from the messages.
- A rolling log-likelihood also counts the token that begins a text, given itself, which adds a constant to each
  document. `sliding_window.perplexity` does not count it.
- A text that is too long loses its beginning, begin-of-text included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.errors import ConfigError, nearest
from llama_jax.eval import scoring
from llama_jax.eval.sliding_window import begin_id, windows
from llama_jax.infer import inputs
from llama_jax.infer.batches import shows_bar
from llama_jax.infer.request import Request
from llama_jax.progress import progress_bar
from llama_jax.sampling_params import SamplingParams
from llama_jax.text import control_tokens
from llama_jax.text.tokenizer import require_tokenizer

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama

MAX_GEN_TOKS = 256  # default of tasks, as in HFLM
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
_CUTS = ("top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = ("until", "do_sample", "temperature", *_LIMITS, *_CUTS)


def encode(llama: Llama, text: str, *, begin: bool | None = None) -> list[int]:
    """The ids of a text, in which names of control tokens become these tokens.

    Args:
        llama: a model with a tokenizer.
        text: any text.
        begin: True puts the begin-of-text token first. None does so if the text does not begin with it.
    """
    tokenizer = require_tokenizer(llama.tokenizer, "lm_eval")
    if begin is None:
        return control_tokens.encode_text(tokenizer, text, parse_special=True)
    return tokenizer.encode(text, bos=begin, special_tokens=True)


def decode(llama: Llama, ids: Sequence[int]) -> str:
    """The text of ids, without control tokens and without ids that only pad the embedding."""
    tokenizer = require_tokenizer(llama.tokenizer, "lm_eval")
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size], skip_special=True)


def rolling(
    llama: Llama, texts: Sequence[str], *, max_length: int | None, batch_size: int, progress: bool | None = None
) -> list[float]:
    """The log-likelihood of each text, read in windows of max_length that share one token; 0 for an empty text."""
    max_length = scoring.check_length(llama, max_length)
    requests, owners = [], []
    for owner, text in enumerate(texts):
        for window in windows([prefix_id(llama), *encode(llama, text)], context=max_length, stride=max_length):
            requests.append(window)
            owners.append(owner)
    totals = [0.0] * len(texts)
    for i, found in scoring.score(
        llama, requests, max_length=max_length, batch_size=batch_size, progress=progress, title="windows"
    ):
        totals[owners[i]] += float(found.logprobs.sum(dtype="float64"))
    return totals


def prefix_id(llama: Llama) -> int:
    """The id that precedes a text without a context. ConfigError if the tokenizer has none."""
    begin = begin_id(llama)
    if begin is None:
        raise ConfigError(
            "a text without a context needs a begin-of-text or end-of-text token, and this tokenizer has neither: use "
            "a model whose tokenizer has one, or tasks that give a context"
        )
    return begin


def generate_until(
    llama: Llama,
    asks: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    max_length: int | None,
    batch_size: int,
    seed: int = 0,
    progress: bool | None = None,
) -> Iterator[tuple[int, str]]:
    """Continue each (context, settings), and yield (index, text up to the first of its stop strings) as each ends.

    Args:
        llama: a model with a tokenizer. Its stop tokens end a text too.
        asks: settings are those of the harness' tasks: `until` (a string or a list), `max_gen_toks` or its other names,
            `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`. Decoding is greedy by default;
            other settings that are absent are the model's own.
        max_length: tokens of context and text together; a longer context loses its beginning.
        batch_size: rows that run together.
        seed: row i draws from seed + i.
        progress: True shows a bar on standard error. The default shows it for more than a few batches.

    Raises:
        ConfigError: a setting is unknown or out of range. It is raised before the model runs.
    """
    max_length = scoring.check_length(llama, max_length)
    batch_size = inputs.as_whole(batch_size, "batch_size")
    ready = [_ask(llama, context, given, seed + i, max_length) for i, (context, given) in enumerate(asks)]
    shown = shows_bar(len(ready), batch_size, progress)
    with progress_bar(len(ready), "texts", unit="row", shown=shown, delay=0) as bar:
        for i, result in llama.sampler.results(ready, batch_size):
            yield i, _cut(decode(llama, result.tokens), ready[i].stops)
            bar.update(1)


def _ask(llama: Llama, context: str, given: Mapping[str, Any], seed: int, max_length: int) -> Request:
    unknown = [name for name in given if name not in _KNOWN]
    if unknown:
        raise ConfigError(
            f"unknown setting of generation {unknown[0]!r}{nearest(unknown[0], _KNOWN) or '.'} "
            f"Allowed: {', '.join(_KNOWN)}"
        )
    limits = [given[name] for name in _LIMITS if given.get(name) is not None]
    new = inputs.as_whole(limits[0] if limits else MAX_GEN_TOKS, "max_gen_toks")
    if new >= max_length:
        raise ConfigError(f"max_gen_toks={new:,} leaves no room for a context in {max_length:,} tokens: use fewer")
    until = given.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in until):
        raise ConfigError(f"until must be a string or a list of strings, got {given['until']!r}")
    tokens = encode(llama, context) or [prefix_id(llama)]
    tokenizer = require_tokenizer(llama.tokenizer, "lm_eval")
    end = tokenizer.eos_id
    if end is not None:  # spelled out in plain characters it ends a text as well
        until = (*until, tokenizer.decode([end]))
    stops = llama.stop_tokens
    return Request(
        tokens=tokens[new - max_length :],
        max_new_tokens=new,
        sampling=_sampling(llama, given),
        seed=seed,
        stop_tokens=stops if end is None or end in stops else (*stops, end),
        stops=tuple(dict.fromkeys(stop for stop in until if stop)),
    )


def _sampling(llama: Llama, given: Mapping[str, Any]) -> SamplingParams:
    """The sampling settings of a task. do_sample=False is greedy; without do_sample a temperature above 0 samples."""
    temperature = given.get("temperature")
    if given.get("do_sample") is False or (temperature is None and not given.get("do_sample")):
        temperature = 0.0
    cuts = {name: given[name] for name in _CUTS if given.get(name) is not None}
    return inputs.as_sampling({"temperature": 1.0 if temperature is None else temperature, **cuts}, llama.sampling)


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.partition(stop)[0]
    return text
