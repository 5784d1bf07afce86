"""Opened models: the protocol of all sources, and the source for weight files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, one_line
from llama_jax.parallel import Layout
from llama_jax.params import Params
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights import load, name_table
from llama_jax.weights.model_files import Metadata
from llama_jax.weights.tensor import main_dtype


class UnknownTokenizer(ConfigError):
    """Raised for a tokenizer that cannot be used. The model itself can be used with token ids."""


class Source(Protocol):
    """An opened model. Its config and metadata have been read, its weights have not.

    Attributes:
        path: the folder or file.
        description: name of the format, for people.
        config: the model's shape.
        metadata: token ids, sampling settings, chat template and tokenizer files.
        dtype: dtype of most stored weights. Quantized weights count as float32, which represents them exactly.
        quantized: True if some of the weights are stored in groups of 8 or 4 bits.
    """

    @property
    def path(self) -> Path: ...  # noqa: D102

    @property
    def description(self) -> str: ...  # noqa: D102

    @property
    def config(self) -> ModelConfig: ...  # noqa: D102

    @property
    def metadata(self) -> Metadata: ...  # noqa: D102

    @property
    def dtype(self) -> np.dtype: ...  # noqa: D102

    @property
    def quantized(self) -> bool: ...  # noqa: D102

    def load(self, layout: Layout | None, dtype: jnp.dtype | None, quantize: str | None) -> Params:
        """Reads the weights as unrolled params. The weights of a LoRA run are LoraTensors around those of its base.

        Args:
            layout: placement on the mesh; None is the first device.
            dtype: dtype of the params; None keeps the stored one.
            quantize: one of choices.QUANTIZE, or None to keep quantized weights as they are; see load.load_leaves.
        """

    def load_merged(self, layout: Layout | None, dtype: jnp.dtype | None, quantize: str | None) -> Params:
        """Reads the weights like `load`. LoRA updates are merged, so that further updates can be applied."""

    def merged_leaves(self) -> name_table.Leaves:
        """The lazy tensors by path, for saving. LoRA updates are merged, each when its tensor is read."""

    def identity(self) -> str:
        """A hash (hex) of the model's config and weights that does not depend on format, dtype or number of files."""

    def tokenizer(self) -> Tokenizer | None:
        """Reads the tokenizer; None if the model has none.

        Raises:
            UnknownTokenizer: the tokenizer is damaged, not supported, or not the one that the model was trained with.
                The model can be used with token ids.
        """


@dataclasses.dataclass(frozen=True)
class FileSource:
    """A model in weight files of any format. The protocol `Source` describes its methods.

    Attributes:
        path: the folder or file.
        description: name of the format, for people.
        config: the model's shape.
        metadata: token ids, sampling settings, chat template and tokenizer files.
        leaves: the tensors by their paths in unrolled params, not read yet.
        read_tokenizer: reads the tokenizer, without a check that it fits the model.
    """

    path: Path
    description: str
    config: ModelConfig
    metadata: Metadata
    leaves: name_table.Leaves
    read_tokenizer: Callable[[], Tokenizer | None]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of most stored weights."""
        return main_dtype(self.leaves.values())

    @property
    def quantized(self) -> bool:
        """True if some of the weights are stored in groups of 8 or 4 bits."""
        return any(tensor.kind.startswith("Q") for tensor in self.leaves.values())

    def load(self, layout: Layout | None, dtype: jnp.dtype | None, quantize: str | None) -> Params:
        """Reads the weights as unrolled params; see `Source.load`."""
        return load.load_leaves(self.leaves, self.config, layout=layout, dtype=dtype, quantize=quantize)

    def load_merged(self, layout: Layout | None, dtype: jnp.dtype | None, quantize: str | None) -> Params:
        """Reads the weights like `load`: files hold no LoRA updates."""
        return self.load(layout, dtype, quantize)

    def merged_leaves(self) -> name_table.Leaves:
        """The tensors by path."""
        return self.leaves

    def identity(self) -> str:
        """A hash of the config and of the first row of every tensor in float32.

        The first rows suffice because training changes every tensor, and reading all of a large model would take
        minutes.
        """
        digest = hashlib.sha256(repr(sorted(self.config.to_dict().items())).encode())
        for path, tensor in sorted(self.leaves.items(), key=lambda item: repr(item[0])):
            row = tensor.read((slice(0, 1),), np.float32)
            digest.update(repr((path, tensor.shape)).encode() + np.ascontiguousarray(row).tobytes())
        return digest.hexdigest()

    def tokenizer(self) -> Tokenizer | None:
        """Reads the tokenizer; see `Source.tokenizer`."""
        return checked_tokenizer(self.read_tokenizer, self.path, self.config, bos_token=self.metadata.bos_token)


def checked_tokenizer(
    read: Callable[[], Tokenizer | None],
    path: Path,
    config: ModelConfig,
    *,
    bos_token: int | None = None,
    fingerprint: str | None = None,
) -> Tokenizer | None:
    """Reads a model's tokenizer and checks that it is the one that the model was trained with.

    A tokenizer.model that lost its last lines is still well-formed, but would give every special token another id.

    Args:
        read: function that reads the tokenizer; it returns None if there is none.
        path: the model, for error messages.
        config: the model's shape.
        bos_token: id that begins a text according to the model's files, if they name one.
        fingerprint: fingerprint of the tokenizer that the model was trained with, if it is known.

    Raises:
        UnknownTokenizer: the tokenizer cannot be read, or belongs to another model.
    """
    try:
        tokenizer = read()
        if tokenizer is None:
            return None
        fitting = tokenizer.for_model(config.vocab_size)
    except (ValueError, OSError) as error:
        raise UnknownTokenizer(one_line(error)) from None
    differs = fingerprint not in (None, tokenizer.fingerprint)
    of_meta = tokenizer.path is not None and tokenizer.path.suffix == ".model"
    is_smaller = of_meta and tokenizer.vocab_size < config.vocab_size
    if differs or (is_smaller and bos_token not in (None, tokenizer.bos_id)):
        raise UnknownTokenizer(
            f"{tokenizer.path or path} is not the tokenizer of this model: it has {tokenizer.vocab_size:,} ids, and "
            f"id {tokenizer.bos_id} begins a text. If the file was cut short or is another model's, copy the right one"
        )
    return fitting
