"""The public interface of sampling: `load` a model, then `generate`, `stream`, `chat` and `logits`.

    import llama_jax
    llama = llama_jax.load("runs/quickstart")
    print(llama.generate("Once upon a time").text)

Letters: B batch, T length, V vocab.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, brief, checked_keywords, nearest
from llama_jax.files import expanded
from llama_jax.infer import engine, inputs
from llama_jax.infer.batches import longest_first
from llama_jax.infer.result import Result
from llama_jax.params import Params, check_params, unstack
from llama_jax.progress import counted
from llama_jax.sampling_params import SamplingParams
from llama_jax.text.chat_format import AUTO, choose
from llama_jax.text.chat_template import ChatTemplate, read_folder
from llama_jax.weights import adapters, export
from llama_jax.weights.formats import peft
from llama_jax.weights.load import QUANTIZE
from llama_jax.weights.model_files import Metadata
from llama_jax.weights.open import open_source
from llama_jax.weights.source import Source, UnknownTokenizer

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
# Several prompts. Sequence[str] would take a single str too, so that the result's type could not be known.
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | list[str | list[int]]
Place = str | os.PathLike[str]

_log = logging.getLogger(__name__)
_STREAM_STEPS = 8  # in a dispatch, once a stream is under way: text comes often, and the host costs little
_QUIET_GROUPS = 3


class Llama:
    """A model ready to be sampled.

    Attributes:
        config: shape of the model.
        params: weights, unrolled, in the compute dtype, on the mesh.
        tokenizer: the tokenizer, or None. Without one, prompts and results are ids.
        mesh: mesh of the weights, or None for one device.
        stop_tokens: default of the ids that end a generation.
        sampling: default of the sampling settings.
        chat_format: how dialogs become ids, and answers messages; None without a tokenizer.
        metadata: token ids, sampling settings, chat template and tokenizer files that `save` writes.
        adapters: LoRA updates by the name of their adapter; see `use`.
        engine: the compiled programs.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
        stop_tokens: Sequence[int] | None = None,
        *,
        dtype: str | jnp.dtype | None = None,
        sampling: SamplingParams | None = None,
        chat_template: str | ChatTemplate | None = None,
        chat_format: str = AUTO,
    ):
        """A model from weights in memory.

        Args:
            config: shape of the model.
            params: weights, stacked or unrolled, on any devices.
            tokenizer: tokenizer of the same vocabulary.
            mesh: mesh that the weights are placed on; None is the first device.
            stop_tokens: the tokenizer's by default.
            dtype: dtype of weights, activations and KV cache; the embedding's by default. Quantized weights are kept.
            sampling: SamplingParams() by default.
            chat_template: the model's own (Jinja), if it has one.
            chat_format: "auto" talks to the model through its own chat template, or in Meta's reference format if it
                has none; "llama3" is the reference format; anything else is the file of a Jinja template.

        Raises:
            ConfigError: weights, tokenizer, mesh or dtype that do not fit the config.
        """
        check_params(config, params)
        tokenizer = None if tokenizer is None else tokenizer.for_model(config.vocab_size)
        if stop_tokens is None:
            stop_tokens = () if tokenizer is None else tokenizer.stop_tokens
        dtype = params["embed"].dtype if dtype is None else inputs.as_dtype(dtype)
        self.config = config
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.sampling = sampling or SamplingParams()
        self.chat_format = None if tokenizer is None else choose(tokenizer, chat_template, chat_format)
        bos = None if tokenizer is None else tokenizer.bos_id
        template = self.chat_format.template if self.chat_format else chat_template
        self.metadata = Metadata(tokenizer, bos, tuple(stop_tokens), sampling, template)
        self.stop_tokens = inputs.as_stops(stop_tokens, config.vocab_size)
        self.params = engine.placed(config, unstack(params), mesh=mesh, dtype=dtype)
        self.adapters: dict[str, adapters.AdapterWeights] = {}
        self._base: Llama | None = None  # the model without an adapter, of a view that `use` gives
        self.engine = engine.Engine(config, self.params, mesh=mesh, dtype=dtype)

    def add_adapter(self, name: str, folder: Place) -> None:
        """Read a LoRA adapter, by its folder or hub id, for `use` by this name. Raises what `load` raises."""
        inputs.as_folders({name: folder})
        self._add(name, peft.open_adapter(folder, (self._base or self).config))

    def use(self, name: str | None) -> Llama:
        """The same model under one of `adapters`, or under none.

        It shares the weights and the compiled programs with this one, which does not change, so that several can be
        sampled in turn. Adapters of the same targets and ranks share compiled programs too.
        """
        known = list(self.adapters)
        if name is not None and name not in known:
            near = nearest(str(name), known) or ";"
            raise ConfigError(f"no adapter {brief(name)}{near} adapters: {', '.join(known) or 'none'}")
        base, adapter = self._base or self, None if name is None else self.adapters[name]
        view = copy.copy(base)
        view._base, view.config = base, base.config if adapter is None else adapter.config
        view.engine = base.engine.of(adapters.with_adapter(view.config, base.params, adapter), view.config)
        view.params = view.engine.params
        return view

    def _add(self, name: str, opened: adapters.Adapter) -> None:
        if not self.adapters and adapters.has_lora(self.params):
            raise ConfigError(
                f"adapter {name!r} would replace the LoRA updates that this model's run trained: give the "
                "base as the model, and the run's adapter/ among its adapters"
            )
        self.adapters[name] = adapters.read_adapter(opened, layout=self.engine.layout, dtype=self.engine.dtype)

    def set_params(self, params: Params | None) -> None:
        """Replace the weights by others of the same shape, keeping compiled programs. None frees the weights."""
        if params is not None:
            if not isinstance(params, Mapping):
                raise ConfigError(f"params must be the weights of a model, a dict of arrays, got {brief(params)}")
            check_params(self.config, params)
            params = engine.placed(self.config, unstack(params), mesh=self.mesh, dtype=self.engine.dtype)
        self.params = self.engine.params = params

    def __repr__(self) -> str:
        """Parameters, dtype and mesh on one line."""
        where = "one device" if self.mesh is None else f"mesh {dict(self.mesh.shape)}"
        return f"Llama({self.config.num_params:,} parameters, {self.engine.dtype}, {where})"

    def logits(self, tokens: Sequence[Sequence[int]] | np.ndarray | jax.Array) -> jax.Array:
        """Logits (B, T, V) in float32 of token ids (B, T). Each row starts at position 0.

        Lengths are padded to powers of two, so that texts of many lengths share a few programs.
        """
        try:
            tokens_BT = np.asarray(tokens)
        except ValueError:  # rows of different lengths
            tokens_BT = np.zeros(0)
        if tokens_BT.ndim != 2 or not tokens_BT.size or tokens_BT.dtype.kind not in "iu":
            raise ConfigError("logits takes token ids of shape (B, T): rows of whole numbers of one length")
        B, T = tokens_BT.shape
        if T > self.config.max_seq_len:
            raise ConfigError(f"{T:,} tokens are more than the model's max_seq_len={self.config.max_seq_len:,}")
        self._check_ids(tokens_BT.ravel(), "tokens")
        padded_BT = np.zeros((B, min(max(16, 1 << (T - 1).bit_length()), self.config.max_seq_len)), np.int32)
        padded_BT[:, :T] = tokens_BT
        return self.engine.logits(padded_BT)[:, :T]

    @overload
    def generate(self, prompts: Prompt, **settings: Unpack[inputs.GenerateSettings]) -> Result: ...

    @overload
    def generate(self, prompts: Prompts, **settings: Unpack[inputs.GenerateSettings]) -> list[Result]: ...

    @checked_keywords
    def generate(
        self,
        prompts: Prompt | Prompts,
        *,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] = 0,
        stop_tokens: Sequence[int] | None = None,
        batch_size: int = 8,
        progress: bool | None = None,
        parse_special: bool | None = None,
    ) -> Result | list[Result]:
        """Continue one prompt (a Result) or each of a list of prompts (a list of Results, in its order).

        Args:
            prompts: a text, a flat list of token ids, or a list of either. Texts get begin_of_text in front; lists of
                ids are taken as they are.
            max_new_tokens: most new tokens a prompt; prompt and new tokens together fit config.max_seq_len.
            temperature: 0 takes the likeliest token each time (greedy). This and the next four: see SamplingParams; by
                default they are those of `self.sampling`.
            top_k: keep the k likeliest tokens; 0 is off.
            top_p: keep the likeliest tokens up to this mass; 1 is off.
            min_p: keep tokens at least this times as likely as the likeliest; 0 is off.
            repetition_penalty: above 1 makes tokens already in prompt or text less likely; 1 is off.
            seed: prompt i draws from seed + i, or from item i of a list. The same seed gives the same text, whatever
                the other prompts are.
            stop_tokens: ids that end a text, instead of the model's own; () for none.
            batch_size: prompts that run together, longest first. More is faster and takes more memory.
            progress: a bar on standard error; by default where there are more than a few groups.
            parse_special: True reads names of control tokens in texts, such as <|eot_id|>, as these tokens: for a
                text that was rendered with a chat template. By default they are plain text, with a warning.

        Raises:
            ConfigError: an argument that cannot work; says what is allowed.
        """
        settings = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        sampling = inputs.as_sampling(settings, self.sampling)
        single, listed = inputs.as_list(prompts)
        batch_size = inputs.as_whole(batch_size, "batch_size")
        stops = self._stops(stop_tokens)
        seeds = inputs.as_seeds(seed, len(listed))
        names = [f"prompt {i}" for i in range(len(listed))]
        listed = inputs.encoded(self.tokenizer, listed, names, parse_special)
        requests = [
            self._request(*prompt, max_new_tokens, sampling, own)
            for *prompt, own in zip(listed, names, seeds, strict=True)
        ]
        groups = longest_first([len(request.tokens) for request in requests], batch_size)
        results: dict[int, Result] = {}
        shown = len(groups) > _QUIET_GROUPS if progress is None else progress
        for group in counted(groups, "generating", unit="prompt", shown=shown):
            rows = batch_size if len(groups) > 1 else 1
            batch = [requests[i] for i in group]
            tokens: list[list[int]] = [[] for _ in group]
            logprobs: list[list[float]] = [[] for _ in group]
            for piece in self.engine.run(batch, stop_tokens=stops, rows=rows):
                for row in range(len(group)):
                    tokens[row] += piece.tokens[row]
                    logprobs[row] += piece.logprobs[row]
            for row, i in enumerate(group):
                results[i] = self._result(tokens[row], logprobs[row], stops)
        return results[0] if single else [results[i] for i in range(len(listed))]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        parse_special: bool | None = None,
        **sampling: Any,
    ) -> Iterator[str] | Iterator[int]:
        """Yield the tokens of `generate` as they are generated, in pieces of text that never break a character.

        Without a tokenizer the pieces are ids. Arguments are those of `generate`, for one prompt; they are checked
        at the call, before the first piece is asked for.
        """
        single, (prompt, *_) = inputs.as_list(prompt)
        if not single:
            raise ConfigError("stream takes one prompt: a text or a flat list of ids; use generate for several")
        stops = self._stops(stop_tokens)
        (seed,) = inputs.as_seeds(seed, 1)
        params = inputs.as_sampling(sampling, self.sampling)
        (ids,) = inputs.encoded(self.tokenizer, [prompt], ["the prompt"], parse_special)
        return self._pieces(self._request(ids, "the prompt", max_new_tokens, params, seed), stops)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        max_new_tokens: int = 512,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        **sampling: Any,
    ) -> Result:
        """The assistant's next message in a dialog of {"role": ..., "content": ...}, written in `chat_format`.

        Other arguments are those of `generate`. `message` of the result can be added to the dialog as it is; tool calls
        in it are parsed, and the ids of the dialog stay the same.
        """
        ids = self.encode_dialog(messages, tools)
        stops = self.chat_stop_tokens if stop_tokens is None else stop_tokens
        params = dataclasses.asdict(inputs.as_sampling(sampling, self.sampling))
        result = self.generate(ids, max_new_tokens=max_new_tokens, seed=seed, stop_tokens=stops, **params)
        return dataclasses.replace(result, message=self.chat_format.parse(self._known(result.tokens)))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        max_new_tokens: int = 512,
        stop_tokens: Sequence[int] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the answer of `chat` in pieces of text. Other arguments are those of `stream`."""
        ids = self.encode_dialog(messages, tools)
        stops = self.chat_stop_tokens if stop_tokens is None else stop_tokens
        return self.stream(ids, max_new_tokens=max_new_tokens, stop_tokens=stops, **options)

    @checked_keywords
    def save(
        self,
        path: str | os.PathLike[str],
        format: str,
        *,
        dtype: str | None = None,
        shard_bytes: int = export.SHARD_BYTES,
    ) -> Path:
        """Write the model in another program's files: weights, config, tokenizer and settings. An adapter is merged.

        Args:
            path: the folder to create; for "gguf" the file.
            format: "hf" (transformers), "meta" (Meta's own code) or "gguf" (llama.cpp).
            dtype: "float32", "float16", "bfloat16", and for "gguf" also "q8_0" and "q4_0"; the weights' own by
                default.
            shard_bytes: most bytes of a file of format "hf".

        Returns:
            The folder or file.

        Raises:
            ConfigError: an unknown format or dtype, a path that has a model already, or a model that the format cannot
                hold.
        """
        path = inputs.as_path(path)
        shard_bytes = inputs.as_whole(shard_bytes, "shard_bytes")
        leaves = export.leaves_of(self.config, self.params)
        return export.save(
            path, self.config, leaves, self.metadata, format=format, dtype=dtype, shard_bytes=shard_bytes
        )

    def encode_dialog(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """The ids that `chat` continues: the dialog and the open header of an answer. ConfigError where it cannot."""
        if self.tokenizer is None:
            raise ConfigError("chat needs a tokenizer: put tokenizer.model or tokenizer.json in the model's folder")
        return self.chat_format.encode(messages, tools=tools)

    @property
    def chat_stop_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer: `stop_tokens`, and those of the chat format."""
        own = self.chat_format.stop_tokens if self.chat_format else ()
        return tuple(dict.fromkeys([*self.stop_tokens, *own]))

    def _pieces(self, request: engine.Request, stops: Sequence[int]) -> Iterator[Any]:
        slices = self.engine.run([request], stop_tokens=stops, first=1, most=_STREAM_STEPS)
        if self.tokenizer is None:
            for piece in slices:
                yield from piece.tokens[0]
            return
        from llama_jax.text.tokenizer import StreamDecoder

        decoder = StreamDecoder(self.tokenizer, continues=True)
        for piece in slices:
            text = decoder.push(self._known(piece.tokens[0]))
            if text:
                yield text
        text = decoder.flush()
        if text:
            yield text

    def _result(self, tokens: list[int], logprobs: list[float], stops: Sequence[int]) -> Result:
        text = ""
        if self.tokenizer is not None:
            text = self.tokenizer.decode(self._known(tokens), skip_special=True, continues=True)
        return Result(text, tokens, logprobs, "stop" if tokens[-1] in stops else "length")

    def _known(self, tokens: list[int]) -> list[int]:
        """The ids that the tokenizer has. A model may have more rows than its tokenizer, for padding."""
        return [i for i in tokens if i < self.tokenizer.vocab_size]

    def _request(
        self, ids: list[int], name: str, max_new_tokens: int, sampling: SamplingParams, seed: int
    ) -> engine.Request:
        if not ids:
            raise ConfigError(f"{name} is empty: give it at least one token id, such as begin_of_text")
        self._check_ids(np.array(ids), name)
        new = inputs.as_whole(max_new_tokens, "max_new_tokens")
        limit = self.config.max_seq_len
        if len(ids) + new > limit:
            mend = f"max_new_tokens of at most {limit - len(ids):,}" if len(ids) < limit else "a shorter prompt"
            raise ConfigError(
                f"{name} has {len(ids):,} tokens and max_new_tokens is {new:,}: together more than the model's "
                f"max_seq_len={limit:,}. Use {mend}"
            )
        return engine.Request(tokens=ids, max_new_tokens=new, sampling=sampling, seed=seed)

    def _check_ids(self, ids: np.ndarray, name: str) -> None:
        bad = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if bad.size:
            last = self.config.vocab_size - 1
            raise ConfigError(f"{name} holds id {brief(int(bad[0]))}, which is not in the vocabulary: 0 to {last}")

    def _stops(self, stop_tokens: Sequence[int] | None) -> tuple[int, ...]:
        return self.stop_tokens if stop_tokens is None else inputs.as_stops(stop_tokens, self.config.vocab_size)


@checked_keywords
def load(
    source: str | os.PathLike[str],
    *,
    dtype: str | jnp.dtype | None = None,
    quantize: str | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    adapters: Place | Mapping[str, Place] | None = None,
    chat_format: str = AUTO,
) -> Llama:
    """A model ready to be sampled, from whatever shape its files have.

    Args:
        source: a run folder of train.py, a Hugging Face folder or hub id (owner/name), Meta's download, a .gguf file,
            an old Flax folder, or the name of a model in a Python package (smollm2).
        dtype: "float32" or "bfloat16", for weights, activations and KV cache. By default the checkpoint's own, with
            bfloat16 for float16. On a CPU without bfloat16 instructions the default is float32, which
            takes twice the memory of a bfloat16 file: 4 bytes a parameter, 32 GB for 8B.
            Tensors of a GGUF file in Q8_0 and Q4_0 stay quantized and are multiplied in this dtype, which for a
            quantized file is float32 on a CPU and bfloat16 elsewhere.
        quantize: None keeps weights as they are stored; "none" turns quantized ones into arrays of `dtype`, which
            takes more memory; "int8" and "int4" round the matrices of all layers to groups of 32 (ops/quant.py) while
            they are read, which takes 0.53 and 0.28 of what they take in bfloat16.
        mesh: mesh of the weights: None for the first device, a Mesh, or axis sizes such as {"data": 2, "tensor": 4},
            which take the first devices. One axis may be -1: it takes the remaining devices.
        adapters: a LoRA adapter (peft), by its folder or hub id, which is then in use; or several by name, for
            `use` to choose from.
        chat_format: "auto", "llama3" or the file of a Jinja template; see `Llama`.

    Raises:
        ConfigError: not a model, or settings that cannot work; names the files that make a model.
        ValueError: a damaged file.
    """
    inputs.as_path(source, "the model")
    folders = inputs.as_folders(adapters)
    if quantize is not None and quantize not in QUANTIZE:
        near = nearest(str(quantize), QUANTIZE)
        raise ConfigError(f"quantize must be one of {', '.join(QUANTIZE)}, or be left out; got {quantize!r}{near}")
    wanted = None if dtype is None else inputs.as_dtype(dtype)
    found = open_source(source)
    wanted = wanted or inputs.default_dtype(found.dtype, quantized=found.quantized)
    mesh = inputs.as_mesh(mesh)
    layout = engine.layout(found.config, mesh)  # before the weights, so that a bad mesh raises at once
    opened = {name: peft.open_adapter(folder, found.config) for name, folder in folders.items()}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # Meta's vocabulary takes as long as a small model
        opening = pool.submit(_tokenizer, found)
        params = found.load(layout, wanted, quantize)
        tokenizer = opening.result()
    metadata = found.metadata.with_tokenizer(tokenizer)
    if isinstance(adapters, (str, os.PathLike)) and (own := read_folder(expanded(adapters))):
        metadata = dataclasses.replace(metadata, chat_template=own)  # the adapter was trained with it
    llama = Llama(
        found.config,
        params,
        tokenizer,
        mesh,
        metadata.stop_tokens,
        dtype=wanted,
        sampling=metadata.sampling,
        chat_template=metadata.chat_template,
        chat_format=chat_format,
    )
    if chat_format == AUTO:
        llama.metadata = metadata
    else:
        llama.metadata = dataclasses.replace(metadata, chat_template=llama.metadata.chat_template)
    for name, adapter in opened.items():
        llama._add(name, adapter)
    return llama.use(*opened) if isinstance(adapters, (str, os.PathLike)) else llama


def _tokenizer(source: Source) -> Tokenizer | None:
    try:
        return source.tokenizer()
    except UnknownTokenizer as error:
        _log.warning("warning: %s: going on with token ids alone", error)
        return None
