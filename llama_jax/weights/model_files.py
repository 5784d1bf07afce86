"""The records that each format's reader returns: a model's config, its metadata and its lazy tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.sampling_params import SamplingParams
from llama_jax.text import vocabulary_files
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.tensor import LazyTensor


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The facts about a model that are neither its shape nor its weights. They are read and saved together with the
    model.

    Attributes:
        tokenizer: the model's tokenizer, for saving. It is None until `Source.tokenizer` has read it.
        bos_token: id that begins a text, or None.
        stop_tokens: ids that end a generation.
        sampling: suggested sampling settings, or None.
        chat_template: the model's own chat templates with their tokens, or None.
        tokenizer_files: files from which transformers reads the tokenizer. They are copied into a Hugging Face folder.
        token_ids: bos_token_id, eos_token_id and pad_token_id as config.json has them. A saved config.json repeats
            them; if there are none, it has `bos_token` and `stop_tokens`.
        generation: contents of generation_config.json, which are saved again unchanged. None writes `bos_token`,
            `stop_tokens` and `sampling`.
    """

    tokenizer: Tokenizer | None = None
    bos_token: int | None = None
    stop_tokens: tuple[int, ...] = ()
    sampling: SamplingParams | None = None
    chat_template: ChatTemplate | None = None
    tokenizer_files: tuple[Path, ...] = ()
    token_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation: Mapping[str, Any] | None = None

    def with_tokenizer(self, tokenizer: Tokenizer | None) -> Metadata:
        """The metadata to save with a model: this record, completed from the model's tokenizer.

        `llama_jax.load(...).save` and the command `convert` both use it, so that they write the same files.
        """
        if tokenizer is None:
            return self
        return dataclasses.replace(
            self,
            tokenizer=tokenizer,
            bos_token=tokenizer.bos_id if self.bos_token is None else self.bos_token,
            stop_tokens=tuple(dict.fromkeys([*self.stop_tokens, *tokenizer.stop_tokens])),
        )

    def within(self, vocab_size: int) -> Metadata:
        """The same metadata without stop tokens that are not in a vocabulary of this size."""
        known = tuple(token for token in self.stop_tokens if token < vocab_size)
        return self if known == self.stop_tokens else dataclasses.replace(self, stop_tokens=known)


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model as its files describe it. Every format has a function that returns one of these.

    Attributes:
        path: the folder or file.
        description: name of the format, for people.
        names: the format's column in the table of names, one of name_table.FORMATS.
        config: the model's shape as the files describe it.
        tensors: the tensors by the format's names.
        metadata: token ids, sampling settings, chat template and tokenizer files.
        read_tokenizer: reads the tokenizer; returns None if there is none. Raises ConfigError for an unsupported
            tokenizer and ValueError for a damaged one.
    """

    path: Path
    description: str
    names: str
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    metadata: Metadata
    read_tokenizer: Callable[[], Tokenizer | None]


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """Reads the tokenizer of a folder; None if there is none. Errors are those of `Tokenizer`."""
    path = vocabulary_files.find(folder)
    return None if path is None else Tokenizer(path)
