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
# Several prompts. A single str would match Sequence[str] too, and the overloads of `generate` would be ambiguous.
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | list[str | list[int]]
Place = str | os.PathLike[str]

_log = logging.getLogger(__name__)
_STREAM_STEPS = 8  # most steps in a dispatch of a stream: text appears often, and the host's overhead is small
_QUIET_GROUPS = 3


class Llama:
    """A model ready to be sampled.

    Attributes:
        config: shape of the model.
        params: weights, unrolled, in the compute dtype, on the mesh.
        tokenizer: the tokenizer, or None. Without one, prompts and results are ids.
        mesh: mesh of the weights, or None for one device.
        stop_tokens: default ids that end a generation.
        sampling: default sampling settings.
        chat_format: chat format that encodes dialogs and parses answers; None without a tokenizer.
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
            stop_tokens: ids that end a generation; those of the tokenizer by default.
            dtype: dtype of weights, activations and KV cache; the embedding's by default. Quantized weights are kept.
            sampling: default sampling settings; SamplingParams() if None.
            chat_template: the model's own chat template (Jinja), if it has one.
            chat_format: "auto" (the model's template, else "llama3"), "llama3" (Meta's format), or a template's path.

        Raises:
            ConfigError: weights, tokenizer, mesh or dtype do not match the config.
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
        self._base: Llama | None = None  # for a view that `use` returned: the model without an adapter
        self.engine = engine.Engine(config, self.params, mesh=mesh, dtype=dtype)

    def add_adapter(self, name: str, folder: Place) -> None:
        """Reads a LoRA adapter from its folder or hub id, so that `use` can select it by name. Raises as `load`."""
        inputs.as_folders({name: folder})
        self._add(name, peft.open_adapter(folder, (self._base or self).config))

    def use(self, name: str | None) -> Llama:
        """A view of this model with one of `adapters` applied, or with none.

        The view shares weights and compiled programs with this model, which does not change. Several views can be
        sampled in turn. Adapters with the same targets and ranks share compiled programs too. A name that is not among
        `adapters` raises a ConfigError.
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
        """Replaces the weights by others of the same shapes and keeps the compiled programs. None frees the weights."""
        if params is not None:
            if not isinstance(params, Mapping):
                raise ConfigError(f"params must be the weights of a model, a dict of arrays, got {brief(params)}")
            check_params(self.config, params)
            params = engine.placed(self.config, unstack(params), mesh=self.mesh, dtype=self.engine.dtype)
        self.params = self.engine.params = params

    def __repr__(self) -> str:
        """One line with the number of parameters, the dtype and the mesh."""
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
        """Generates a continuation of each prompt.

        Args:
            prompts: a text, a flat list of token ids, or a list of either. begin_of_text is put in front of texts;
                lists of ids are used unchanged.
            max_new_tokens: most new tokens for each prompt; with the prompt they must fit config.max_seq_len.
            temperature: divisor of the logits; 0 is greedy. This and the next four default to `self.sampling`.
            top_k: number of likeliest tokens to keep; 0 is off.
            top_p: probability mass of the likeliest tokens to keep; 1 is off.
            min_p: smallest probability to keep, relative to the likeliest token; 0 is off.
            repetition_penalty: factor above 1 against tokens that are in the prompt or the text so far; 1 is off.
            seed: seed of the sampling noise. Prompt i uses seed + i, or item i of a list. The same seed gives the same
                text, independently of the other prompts.
            stop_tokens: ids that end a text, instead of those of the model; () for none.
            batch_size: number of prompts in a batch, the longest first. Larger batches are faster and take more memory.
            progress: True shows a progress bar on standard error. The default shows it for more than three batches.
            parse_special: True encodes names of control tokens, such as <|eot_id|>, as these tokens, for texts that
                were rendered with a chat template. False encodes them as plain text; so does None, with a warning.

        Returns:
            A Result for a single prompt, or a list of Results in the order of `prompts`.

        Raises:
            ConfigError: an argument is not allowed. The message says what is allowed.
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
        """Yields the continuation of one prompt as it is generated, in pieces of text that never split a character.

        Without a tokenizer, the pieces are token ids. The arguments are those of `generate`. They are checked when
        `stream` is called, before the first piece is requested.
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
        """Generates the assistant's next message in a dialog of {"role": ..., "content": ...} (see `chat_format`).

        `tools` are functions in OpenAI's schema; other arguments are those of `generate`. `message` of the result has
        the parsed tool calls. It can be appended to the dialog unchanged, and is then encoded as the generated ids.
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
        """Yields the answer of `chat` in pieces of text. Other arguments are those of `stream`."""
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
        """Saves the model in another program's format: weights, config, tokenizer and settings. An adapter is merged.

        Args:
            path: the folder to create, or for "gguf" the file.
            format: "hf" (transformers), "meta" (Meta's own code) or "gguf" (llama.cpp).
            dtype: dtype of the weights in the file: "float32", "float16", "bfloat16", and for "gguf" also "q8_0" and
                "q4_0". The default is the dtype of this model's weights.
            shard_bytes: largest size in bytes of one file of format "hf".

        Returns:
            The folder or file that was written.

        Raises:
            ConfigError: an unknown format or dtype, a path that already has a model, or a model that the format cannot
                represent.
        """
        path = inputs.as_path(path)
        shard_bytes = inputs.as_whole(shard_bytes, "shard_bytes")
        leaves = export.leaves_of(self.config, self.params)
        return export.save(
            path, self.config, leaves, self.metadata, format=format, dtype=dtype, shard_bytes=shard_bytes
        )

    def encode_dialog(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """The prompt ids of `chat`: the dialog and the header of an answer. ConfigError if it cannot be encoded."""
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
        """The ids that the tokenizer can decode. A model's vocabulary may be padded beyond that of its tokenizer."""
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
            remedy = f"max_new_tokens of at most {limit - len(ids):,}" if len(ids) < limit else "a shorter prompt"
            raise ConfigError(
                f"{name} has {len(ids):,} tokens and max_new_tokens is {new:,}, which together exceed the model's "
                f"max_seq_len={limit:,}. Use {remedy}"
            )
        return engine.Request(tokens=ids, max_new_tokens=new, sampling=sampling, seed=seed)

    def _check_ids(self, ids: np.ndarray, name: str) -> None:
        bad = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if bad.size:
            last = self.config.vocab_size - 1
            raise ConfigError(f"{name} holds id {brief(int(bad[0]))}, but the ids of the vocabulary are 0 to {last}")

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
    """Loads a model of any supported file format, ready for sampling.

    Args:
        source: a run folder of train.py, a Hugging Face folder or hub id (owner/name), the folder of Meta's download, a
            .gguf file, an old Flax folder, or the name of a model in a Python package (smollm2).
        dtype: dtype of weights, activations and KV cache: "float32" or "bfloat16". The default is the checkpoint's
            dtype, with bfloat16 for float16. On a CPU without bfloat16 instructions the default is float32, which takes
            twice the memory of a bfloat16 file: 4 bytes a parameter, 32 GB for 8B. Tensors of a GGUF file in Q8_0 and
            Q4_0 stay quantized and are multiplied in this dtype; its default for a quantized file is float32 on a CPU
            and bfloat16 on other devices.
        quantize: quantization of the weights. None keeps them as they are stored. "none" dequantizes them to `dtype`,
            which takes more memory. "int8" and "int4" quantize the matrices of all layers in groups of 32
            (ops/quant.py) while they are read. These matrices then take 0.53 and 0.28 of their memory in bfloat16.
        mesh: mesh of the weights: None for the first device, a Mesh, or axis sizes such as {"data": 2, "tensor": 4},
            which use the first devices. An axis of size -1 uses all remaining devices.
        adapters: one LoRA adapter (peft) as a folder or hub id, which is applied at once; or a dict of several by name,
            which `use` selects from.
        chat_format: "auto", "llama3" or the path of a Jinja template; see `Llama`.

    Raises:
        ConfigError: `source` is not a model (the message lists what is), or a setting is not possible.
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
    layout = engine.layout(found.config, mesh)  # before the weights are read, so that a bad mesh raises at once
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
        _log.warning("warning: %s: continuing without a tokenizer, with token ids only", error)
        return None
