"""The public interface of sampling: a `Llama` continues texts, answers dialogs and gives logits and hidden states.

    import llama_jax
    llama = llama_jax.load("runs/quickstart")
    print(llama.generate("Once upon a time").text)

Letters: B batch, T length, D embedding, V vocab.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.errors import Answering, ConfigError, brief, checked_keywords, nearest, no_attribute
from llama_jax.infer import inputs, peer_names
from llama_jax.infer.engine import Engine, placed
from llama_jax.infer.grammar import call_schema
from llama_jax.infer.options import GenerateOptions, SamplingOptions, as_counts, as_overrides, check_keywords
from llama_jax.infer.program import Program
from llama_jax.infer.result import Result
from llama_jax.infer.sampler import Sampler, Stream
from llama_jax.params import Params, check_params, unstack
from llama_jax.sampling_params import SamplingParams
from llama_jax.text.chat_format import AUTO, ChatFormat, choose
from llama_jax.text.chat_template import DEFAULT, ChatTemplate
from llama_jax.weights import adapters, export
from llama_jax.weights.formats import peft
from llama_jax.weights.model_files import Metadata

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
# Several prompts. A single str would match Sequence[str] too, and the overloads of `generate` would be ambiguous.
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | list[str | list[int]]
Place = str | os.PathLike[str]
Dialog = Sequence[Mapping[str, Any]]

_log = logging.getLogger(__name__)
_NEW, _NEW_ANSWER = 128, 512  # default limits of new tokens, of a text and of an answer in a dialog
_OF_CALL = ("seed", "n", "best_of", "overrides", "batch_size", "progress", "parse_special")
POOLS = (None, "mean", "last")


class Llama(metaclass=Answering):
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
        sampler: the queue of requests and the compiled programs behind it.
    """

    _peers = peer_names.LLAMA
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise no_attribute(self, name, peer_names.LLAMA)

    def __call__(self, *args: object, **options: object) -> NoReturn:
        """Raises a TypeError that names `generate`: other libraries call a model."""
        raise TypeError("a Llama is not a function: generate(text), chat(messages) and logits([ids]) are its methods")

    @checked_keywords
    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | Mapping[str, int] | None = None,
        stop_tokens: Sequence[int] | None = None,
        *,
        dtype: str | jnp.dtype | None = None,
        sampling: SamplingParams | None = None,
        chat_template: str | ChatTemplate | None = None,
        chat_format: str = AUTO,
        kv: str = "compute",
        draft: tuple[ModelConfig, Params] | None = None,
    ):
        """A model from weights in memory.

        Args:
            config: shape of the model.
            params: weights, stacked or unrolled, on any devices.
            tokenizer: tokenizer of the same vocabulary.
            mesh: mesh that the weights are placed on, or sizes by axis; None is the first device.
            stop_tokens: ids that end a generation; those of the tokenizer by default.
            dtype: dtype of weights, activations and KV cache; the embedding's by default. Quantized weights are kept.
            sampling: default sampling settings; SamplingParams() if None.
            chat_template: the model's own chat template (Jinja), if it has one.
            chat_format: "auto" (the model's template, else "llama3"), "llama3" (Meta's format), or a template's path.
            kv: type of the KV cache: "compute" (that of the activations) or "int8".
            draft: config and weights of a draft model of the same vocabulary, for speculate="draft".

        Raises:
            ConfigError: weights, tokenizer, mesh, dtype, draft or kv do not match the config or are not known.
        """
        check_params(config, params)
        mesh = inputs.as_mesh(mesh)
        tokenizer = None if tokenizer is None else inputs.as_tokenizer(tokenizer).for_model(config.vocab_size)
        if stop_tokens is None:
            stop_tokens = () if tokenizer is None else tokenizer.stop_tokens
        self.stop_tokens = inputs.as_stops(stop_tokens, config.vocab_size)
        dtype = params["embed"].dtype if dtype is None else inputs.as_dtype(dtype)
        self.config = config
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.sampling = SamplingParams() if sampling is None else inputs.as_defaults(sampling)
        self.chat_format = None if tokenizer is None else choose(tokenizer, chat_template, chat_format)
        bos = None if tokenizer is None else tokenizer.bos_id
        if isinstance(chat_template, str):
            chat_template = ChatTemplate({DEFAULT: chat_template})
        template = self.chat_format.template if self.chat_format else chat_template
        self.metadata = Metadata(tokenizer, bos, tuple(stop_tokens), sampling, template)
        draft = None if draft is None else inputs.as_draft(draft)
        program = Program.make(config, mesh=mesh, dtype=dtype, kv=kv, draft=draft[0] if draft else None)
        self.params = placed(config, unstack(params), mesh=mesh, dtype=dtype)
        self.adapters: dict[str, adapters.AdapterWeights] = {}
        self._base: Llama | None = None  # for a view that `use` returned: the model without an adapter
        with inputs.naming("the draft model"):
            guesser = None if draft is None else placed(draft[0], unstack(draft[1]), mesh=mesh, dtype=dtype)
        self._set_engine(Engine(program, self.params, draft=guesser))

    def _set_engine(self, engine: Engine) -> None:
        self.sampler = Sampler(engine, self.tokenizer, self.sampling, self.stop_tokens)

    @property
    def engine(self) -> Engine:
        """The weights and the compiled programs."""
        return self.sampler.engine

    @checked_keywords
    def add_adapter(self, name: str, folder: Place) -> None:
        """Reads a LoRA adapter from its folder or hub id, so that `use` can select it by name. Raises as `load`."""
        inputs.as_folders({name: folder})
        self._add(name, peft.open_adapter(folder, (self._base or self).config))

    @checked_keywords
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
        engine = base.engine.of(adapters.with_adapter(view.config, base.params, adapter), view.config)
        view.params = engine.params
        view._set_engine(engine)
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
            params = placed(self.config, unstack(params), mesh=self.mesh, dtype=self.engine.dtype)

        def replace() -> None:
            self.params = self.engine.params = {} if params is None else params

        self.sampler.scheduler.forget(replace)

    def clear(self) -> None:
        """Frees the KV cache, which otherwise stays for the next call. Generations that are running fail."""
        self.sampler.scheduler.forget()

    def __repr__(self) -> str:
        """One line with the number of parameters, the dtype and the mesh."""
        where = "one device" if self.mesh is None else f"mesh {dict(self.mesh.shape)}"
        return f"Llama({self.config.num_params:,} parameters, {self.engine.dtype}, {where})"

    @checked_keywords
    def logits(self, tokens: Sequence[Sequence[int]] | np.ndarray | jax.Array) -> jax.Array:
        """Logits (B, T, V) in float32 of token ids (B, T). Each row starts at position 0.

        Lengths are padded to powers of two, so that texts of many lengths share a few compiled programs.
        """
        try:
            tokens_BT = np.asarray(tokens)
        except ValueError:  # rows of different lengths
            tokens_BT = np.zeros(0)
        if tokens_BT.ndim != 2 or not tokens_BT.size or tokens_BT.dtype.kind not in "iu":
            raise ConfigError(
                "logits takes token ids of shape (B, T), rows of whole numbers of one length, such as "
                f"[tokenizer.encode(text, bos=True)]; got {brief(tokens)}"
            )
        B, T = tokens_BT.shape
        self._check_length(T)
        self.sampler.check_ids(tokens_BT.ravel(), "tokens")
        padded_BT = np.zeros((B, min(max(16, 1 << (T - 1).bit_length()), self.config.max_seq_len)), np.int32)
        padded_BT[:, :T] = tokens_BT
        return self.engine.logits(padded_BT)[:, :T]

    @checked_keywords
    def hidden(
        self,
        texts: Prompt | Prompts,
        *,
        pool: str | None = "mean",
        batch_size: int = 8,
        parse_special: bool | None = None,
    ) -> Any:
        """Hidden states after the final norm, as features of texts.

        Args:
            texts: as the prompts of `generate`.
            pool: "mean" over the tokens of a text, "last" for its last token, or None for every token.
            batch_size: texts that run together.
            parse_special: as in `generate`.

        Returns:
            A float32 array (D,) for a single text, or (T, D) with pool=None; a list of them for a list.

        Raises:
            ConfigError: an unknown `pool`, or a text that is empty or longer than the model's max_seq_len.
        """
        if pool not in POOLS:
            raise ConfigError(f"pool must be one of {POOLS}, got {brief(pool)}")
        single, listed = inputs.as_list(texts)
        names = ["the text"] if single else [f"text {i}" for i in range(len(listed))]
        ids = inputs.encoded(self.tokenizer, listed, names, parse_special)
        for text, name in zip(ids, names, strict=True):
            if not text:
                raise ConfigError(f"{name} is empty: give it at least one token id, such as begin_of_text")
            self._check_length(len(text))
            self.sampler.check_ids(np.asarray(text), name)
        states = self.sampler.embed(ids, pool, inputs.as_whole(batch_size, "batch_size"))
        return states[0] if single else states

    def _check_length(self, length: int) -> None:
        if length > self.config.max_seq_len:
            raise ConfigError(f"{length:,} tokens are more than the model's max_seq_len={self.config.max_seq_len:,}")

    @overload
    def generate(self, prompts: Prompt, **options: Unpack[GenerateOptions]) -> Result: ...

    @overload
    def generate(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> list[Result]: ...

    @checked_keywords
    def generate(
        self,
        prompts: Prompt | Prompts,
        *,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        best_of: int | None = None,
        overrides: Sequence[Mapping[str, Any]] | None = None,
        batch_size: int = 8,
        progress: bool | None = None,
        parse_special: bool | None = None,
        **options: Any,
    ) -> Any:
        """Generates a continuation of each prompt.

        Args:
            prompts: a text, a flat list of token ids, or a list of either. begin_of_text is put in front of texts;
                lists of ids are used unchanged.
            seed: seed of the sampling noise. Prompt i draws from seed + i, or from item i of a list. The same seed
                gives the same text, independently of the other prompts. Samples of one prompt count on from its seed,
                and the prompts then take steps of best_of.
            n: number of results for each prompt. With more than one, each prompt gives a list.
            best_of: number of samples of each prompt, whose n of the highest mean log-probability are returned.
            overrides: for each prompt a dict of options that differ from those of the call; "seed" is allowed too.
            batch_size: most rows that run together, rounded up to a power of two. A row that ends is used for the next
                prompt at once. More rows are faster and take more memory.
            progress: True shows a progress bar on standard error. The default shows it for many prompts.
            parse_special: True encodes names of control tokens, such as <|eot_id|>, as these tokens, for texts that
                were rendered with a chat template. False encodes them as plain text; so does None, with a warning.
            **options: options of each continuation: max_new_tokens (128 by default), stop, stop_tokens, ignore_eos,
                top_logprobs, prompt_logprobs, json_schema, regex, choices, grammar and speculate (see
                `options.Options`), and the settings of `SamplingParams`, whose defaults are those of the model.

        Returns:
            A Result for a single prompt, or a list of Results in the order of `prompts`. If some prompts of several
            fail on the way, the others go on: a failed one has finish_reason "error" and the reason as `error`.

        Raises:
            ConfigError: an argument is not allowed. The message says what is allowed.
        """
        check_keywords("generate", options, _OF_CALL)
        single, listed = inputs.as_list(prompts)
        count, samples = as_counts(n, best_of)
        batch_size = inputs.as_whole(batch_size, "batch_size")
        names = ["the prompt"] if single else [f"prompt {i}" for i in range(len(listed))]
        different, seeds = as_overrides(overrides, inputs.as_seeds(seed, len(listed), step=samples))
        ids = inputs.encoded(self.tokenizer, listed, names, parse_special)
        own, requests = [], []
        for prompt, name, differ, first in zip(ids, names, different, seeds, strict=True):
            with inputs.naming(name if differ else ""):
                own.append(self.sampler.options({**options, **differ}, _NEW))
                requests += [self.sampler.request(prompt, name, own[-1], first + j) for j in range(samples)]
        results = self.sampler.run(requests, batch_size, progress)
        for i, result in enumerate(results):
            if result.error:
                _log.warning("warning: %s failed: %s", names[i // samples], result.error)
        grouped = []
        for i, option in enumerate(own):
            about: dict[str, Any] = {"index": i}
            if option.prompt_logprobs is not None:
                about |= self.sampler.prompt_logprobs(ids[i], option.prompt_logprobs)
            group = [dataclasses.replace(result, **about) for result in results[i * samples : (i + 1) * samples]]
            ranked = sorted(group, key=lambda result: (bool(result.error), -result.mean_logprob))
            best = ranked[:count] if samples > count else group
            grouped.append(best if count > 1 else best[0])
        return grouped[0] if single else grouped

    @checked_keywords
    def stream(
        self, prompt: Prompt, *, seed: int = 0, parse_special: bool | None = None, **options: Unpack[SamplingOptions]
    ) -> Stream:
        """Yields the continuation of one prompt as it is generated, in pieces of text that never split a character.

        `result` of the iterator is the Result so far, with the generated ids.

        Without a tokenizer, the pieces are token ids. The arguments are those of `generate`, apart from n and best_of.
        They are checked when `stream` is called, before the first piece is requested. Text that may become a stop
        string is held back until it is decided.
        """
        check_keywords("stream", options, ("seed", "parse_special"))
        single, (prompt, *_) = inputs.as_list(prompt)
        if not single:
            raise ConfigError("stream takes one prompt: a text or a flat list of ids; use generate for several")
        if options.get("prompt_logprobs") is not None:
            raise ConfigError("stream gives text as it comes: prompt_logprobs is an argument of generate")
        (seed,) = inputs.as_seeds(seed, 1)
        (ids,) = inputs.encoded(self.tokenizer, [prompt], ["the prompt"], parse_special)
        option = self.sampler.options(options, _NEW)
        return self.sampler.stream(self.sampler.request(ids, "the prompt", option, seed))

    @overload
    def chat(
        self, messages: Dialog, *, tools: Sequence[Any] | None = None, tool_choice: str | None = None, **options: Any
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Mapping[str, Any]]],
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: str | None = None,
        **options: Any,
    ) -> list[Result]: ...

    @checked_keywords
    def chat(
        self,
        messages: Any,
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: str | None = None,
        **options: Any,
    ) -> Any:
        """Generates the assistant's next message in a dialog of {"role": ..., "content": ...} (see `chat_format`).

        `tools` are functions in OpenAI's schema. With tool_choice="required" the answer is a call of one of them whose
        arguments follow its schema, and with a name a call of that one. Other arguments are those of `generate`, with
        512 new tokens by default. `message` of the result has the parsed tool calls. It can be appended to the dialog
        unchanged, and is then encoded as the generated ids. A list of dialogs gives a list of results. A dialog that
        continues one of the last call reuses that call's cache.
        """
        several = isinstance(messages, Sequence) and not isinstance(messages, str) and bool(messages)
        single = not several or isinstance(messages[0], Mapping)
        dialogs = [messages] if single else list(messages)
        ids = [self.encode_dialog(dialog, tools) for dialog in dialogs]
        if tool_choice is not None:
            options["json_schema"] = call_schema(tools, tool_choice)
        results = self.generate(ids, **self._of_chat(options))
        found = [
            [self._with_message(r) for r in item] if isinstance(item, list) else self._with_message(item)
            for item in results
        ]
        return found[0] if single else found

    @checked_keywords
    def stream_chat(self, messages: Dialog, *, tools: Sequence[Any] | None = None, **options: Any) -> Stream:
        """Yields the answer of `chat` in pieces of text. Other arguments are those of `stream`.

        After the last piece, `answer(stream.result)` is the message for the dialog.
        """
        return self.stream(self.encode_dialog(messages, tools), **self._of_chat(options))

    def _of_chat(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `generate` with the defaults of `chat` filled in."""
        own = {name: value for name, value in options.items() if value is not None}
        if own.get("ignore_eos") is not True:
            own.setdefault("stop_tokens", self.chat_stop_tokens)
        own.setdefault("max_new_tokens", _NEW_ANSWER)
        return own

    def answer(self, result: Result) -> dict[str, Any]:
        """The message of an answer's tokens, as `chat` gives it: with the ids, from which its text is encoded again."""
        return self._chat_format().parse(self.sampler.known(result.tokens))

    def _with_message(self, result: Result) -> Result:
        return result if result.error else dataclasses.replace(result, message=self.answer(result))

    @checked_keywords
    def save(
        self,
        path: str | os.PathLike[str],
        format: str | None = None,
        *,
        dtype: str | jnp.dtype | None = None,
        shard_bytes: int = export.SHARD_BYTES,
    ) -> Path:
        """Saves the model in another program's format: weights, config, tokenizer and settings. An adapter is merged.

        Args:
            path: the folder to create, or for "gguf" the file.
            format: "hf" (transformers), "meta" (Meta's own code) or "gguf" (llama.cpp). None is "gguf" for a path that
                ends in .gguf, and otherwise "hf".
            dtype: dtype of the weights in the file: "float32", "float16" or "bfloat16", for "hf" also "int8" and
                "int4", and for "gguf" "q8_0" and "q4_0". The default is the dtype of this model's weights.
            shard_bytes: largest size in bytes of one file of format "hf".

        Returns:
            The folder or file that was written.

        Raises:
            ConfigError: an unknown format or dtype, a path that already has a model, or a model that the format cannot
                represent.
        """
        path = inputs.as_path(path)
        shard_bytes = inputs.as_whole(shard_bytes, "shard_bytes")
        format = format or ("gguf" if path.suffix == ".gguf" else "hf")
        leaves = export.leaves_of(self.config, self.params)
        return export.save(
            path, self.config, leaves, self.metadata, format=format, dtype=dtype, shard_bytes=shard_bytes
        )

    @checked_keywords
    def encode_dialog(self, messages: Dialog, tools: Sequence[Any] | None = None) -> list[int]:
        """The prompt ids of `chat`: the dialog and the header of an answer. ConfigError if it cannot be encoded."""
        return self._chat_format().encode(messages, tools=tools)

    def _chat_format(self) -> ChatFormat:
        if self.chat_format is None:
            raise ConfigError("chat needs a tokenizer: put tokenizer.model or tokenizer.json in the model's folder")
        return self.chat_format

    @property
    def chat_stop_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer: `stop_tokens`, and those of the chat format."""
        own = self.chat_format.stop_tokens if self.chat_format else ()
        return tuple(dict.fromkeys([*self.stop_tokens, *own]))
