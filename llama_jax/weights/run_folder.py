"""The folder of a training run as a model: its newest weights, or for LoRA its newest updates beside their base."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import model, parallel
from llama_jax.checkpoint import Checkpoints
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.files import read_json
from llama_jax.ops.lora import LoraWeights
from llama_jax.params import unstack
from llama_jax.run_keys import LoraConfig
from llama_jax.weights import adapters, lora_params
from llama_jax.weights.load import quantize_layers
from llama_jax.weights.source import Source, open_source, tokenizer_in

CONFIG_FILE = "config.json"


def read_run_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a run folder."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}: is {folder} a folder that train.py made?") from None
    if not isinstance(values.get("model"), dict):
        raise ConfigError(f"{path} has no model in it: is {folder} a folder that train.py made?")
    return values


def open_run(folder: str | Path, *, step: int | None = None) -> Source:
    """A run folder as a model: its weights, on any mesh, whatever mesh they were trained on.

    `step` is that of a checkpoint, and None of the newest.
    """
    folder = Path(folder)
    values = read_run_config(folder)
    config = ModelConfig.from_dict(values["model"])
    settings = _lora(values)
    if settings is None:
        load, kind = functools.partial(_load_params, folder, step, config), "run folder"
    else:
        load = functools.partial(_load_lora, folder, step, config, settings, values)
        kind = f"run folder, LoRA of {values['init_from']}"
    return Source(
        path=folder,
        kind=kind,
        config=config if settings is None else lora_params.adapted_config(config, settings),
        bos_token=None,
        stop_tokens=(),
        sampling=None,
        chat_template=None,
        dtype=np.dtype(np.float32),
        leaves=None,
        load=load,
        read_tokenizer=functools.partial(tokenizer_in, folder),
        fingerprint=values.get("tokenizer_fingerprint"),
        run_identity=functools.partial(_identity, folder, step, values.get("frozen")),
        adapted=settings is not None,
    )


def _lora(values: dict[str, Any]) -> LoraConfig | None:
    """The LoRA settings of a run's config, None where all weights were trained."""
    section = values.get("lora") or {}
    if not section.get("rank"):
        return None
    return LoraConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in section.items()})


def _load_params(
    folder: Path,
    step: int | None,
    config: ModelConfig,
    layout: parallel.Layout | None,
    dtype: jnp.dtype | None,
    quantize: str | None,
) -> model.Params:
    layout = layout or _one_device()
    # Orbax casts while it reads, so that float32 master weights never exist beside what is asked for.
    shapes = model.abstract_params(config, stacked=True, dtype=dtype or jnp.float32)
    params = _restored(folder, step, shapes, model.logical_axes(config, stacked=True), layout)
    return quantize_layers(config, unstack(params), quantize, layout)


def _load_lora(
    folder: Path,
    step: int | None,
    config: ModelConfig,
    settings: LoraConfig,
    values: dict[str, Any],
    layout: parallel.Layout | None,
    dtype: jnp.dtype | None,
    quantize: str | None,
) -> model.Params:
    layout, dtype = layout or _one_device(), jnp.dtype(dtype or jnp.float32)
    try:
        base = open_source(values["init_from"])
    except (ConfigError, ValueError, OSError) as error:
        raise ConfigError(
            f"{folder} holds LoRA updates of {values['init_from']!r}, which cannot be opened ({error}): run this from "
            f"where it can be, or give the base as the model and {folder}/adapter as its adapter"
        ) from None
    if values.get("frozen") != base.identity():
        raise ConfigError(
            f"{values['init_from']!r} is not the model that {folder} was trained beside, and its updates mean nothing "
            "beside another: put back the one that it was"
        )
    shapes = jax.eval_shape(lambda: lora_params.initial(config, settings, jax.random.key(0)))
    trained = _restored(folder, step, shapes, lora_params.axes(config, settings), layout)
    lora = lora_params.lora_by_path(settings, trained)
    lora = {path: LoraWeights(w.a.astype(dtype), w.b.astype(dtype), w.scale) for path, w in lora.items()}
    params = base.load_merged(layout, dtype, quantize)
    rows = lora_params.token_rows(settings, trained, params)
    adapted = lora_params.adapted_config(config, settings)
    return adapters.with_adapter(params, adapters.AdapterWeights(adapted, lora, rows=rows))


def _restored(folder: Path, step: int | None, shapes: Any, axes: Any, layout: parallel.Layout) -> Any:
    """What a checkpoint has as its weights: that of `step`, or the newest sound one."""
    checkpoints = Checkpoints(folder, create=False)
    step = _step(folder, step, checkpoints)
    found = checkpoints.restore_params(step, parallel.abstract(shapes, parallel.shardings(layout, axes, shapes)))
    checkpoints.close()
    return found


def _step(folder: Path, step: int | None, checkpoints: Checkpoints) -> int:
    if step is not None:
        return step
    step = checkpoints.latest("params")
    if step is None:
        raise ConfigError(f"{folder} has no whole checkpoint yet: let train.py reach one (checkpoint.every)")
    return step


def _identity(folder: Path, step: int | None, base: str | None) -> str:
    checkpoints = Checkpoints(folder, create=False)
    digests = checkpoints.digests(_step(folder, step, checkpoints))
    checkpoints.close()
    return hashlib.sha256(repr((base, sorted(digests.items()))).encode()).hexdigest()


def _one_device() -> parallel.Layout:
    return parallel.Layout(parallel.single_device_mesh(), "infer")
