"""Validation of a file's tensors against the model's config: names, shapes and dtypes, before anything is read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from llama_jax.config import ModelConfig
from llama_jax.errors import brief, nearest
from llama_jax.weights import name_table
from llama_jax.weights.tensor import FLOATS, LazyTensor, equal

_log = logging.getLogger(__name__)


def match_tensors(
    tensors: Mapping[str, LazyTensor], config: ModelConfig, *, format: str, source: str
) -> tuple[ModelConfig, name_table.Leaves]:
    """Matches a file's tensors to their paths in params.

    Args:
        tensors: the tensors by the format's names.
        config: the model's shape as its config file describes it.
        format: one of name_table.FORMATS.
        source: the name of the file or folder in error messages.

    Returns:
        The config, and the tensors by their paths in unrolled params. The config differs from the argument only if
        it ties the embeddings while the file has an unembedding with other values: then it is untied, as
        in transformers 5, and a warning says so.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or dtype than the config requires.
    """
    if config.num_layers > len(tensors):  # before a list of a million layers is made
        raise ValueError(f"{source}: its config has {config.num_layers:,} layers, but it has {len(tensors):,} tensors")
    embed, unembed = name_table.tied_names(format)
    if config.tied_embeddings and embed not in tensors and unembed in tensors:  # some writers keep this name only
        tensors = {**tensors, embed: tensors[unembed]}
    config = _untied_if_different(tensors, config, format, source)
    weights = name_table.weights(config, format)
    _check_names(tensors, config, format, source)
    for weight in weights:
        tensor = tensors[weight.name]
        if tensor.shape != weight.stored_shape:
            raise ValueError(
                f"{source}: {weight.name} has shape {tensor.shape}, but the config needs {weight.stored_shape}"
            )
        if tensor.dtype not in FLOATS:
            allowed = ", ".join(map(str, FLOATS))
            raise ValueError(f"{source}: {weight.name} is {tensor.dtype}; weights must be {allowed}")
    return config, {weight.path: weight.from_disk(tensors[weight.name]) for weight in weights}


def _untied_if_different(
    tensors: Mapping[str, LazyTensor], config: ModelConfig, format: str, source: str
) -> ModelConfig:
    """The config, untied if the file's unembedding is of the right shape and differs from its embedding."""
    embed, unembed = name_table.tied_names(format)
    if not config.tied_embeddings or embed not in tensors or unembed not in tensors:
        return config
    if equal(tensors[embed], tensors[unembed]):
        return config
    _log.warning(
        "warning: %s: %s differs from %s although the config ties them: the model uses both, as two matrices",
        source,
        unembed,
        embed,
    )
    return dataclasses.replace(config, tied_embeddings=False)


def _check_names(tensors: Mapping[str, LazyTensor], config: ModelConfig, format: str, source: str) -> None:
    """Raises ValueError if a tensor is missing, or if one belongs neither to the model nor to the known buffers."""
    known = {weight.name for weight in name_table.weights(config, format)}
    missing = [weight.name for weight in name_table.weights(config, format) if weight.name not in tensors]
    extra = [name for name in tensors if name not in known and not name.endswith(name_table.BUFFERS)]
    embed, unembed = name_table.tied_names(format)
    if config.tied_embeddings and unembed in extra and embed in tensors:  # a second copy of the embedding
        extra.remove(unembed)
    if missing:
        near = nearest(missing[0], extra)
        tie = " (is the model tied? its config says tie_word_embeddings=false)" if missing == [unembed] else ""
        raise ValueError(f"{source}: missing {len(missing)} tensors, the first {missing[0]!r}{tie}{near}")
    if extra:
        near = nearest(extra[0], sorted(known))
        raise ValueError(
            f"{source}: {len(extra)} tensors do not belong to this config, the first {brief(extra[0])}{near}"
        )
