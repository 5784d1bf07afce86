"""Checkpoints on Orbax: weights, the rest of the state, and what is not arrays, saved together or not at all.

A step's folder is written under a temporary name and renamed when all of it is on disk, so that a process that is
killed at any instant leaves only whole checkpoints behind.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from llama_jax import model, parallel
from llama_jax.config import ConfigError, ModelConfig
from llama_jax.weights import transform
from llama_jax.weights.source import Source, tokenizer_in

_FOLDER = "checkpoints"
CONFIG_FILE = "config.json"


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        run_folder: where `checkpoints/` is or will be.
        keep: newest steps to keep; None keeps all.
        create: make the folder where it is not there; False to read only.
    """

    def __init__(self, run_folder: str | Path, *, keep: int | None = None, create: bool = True):
        folder = Path(run_folder).resolve() / _FOLDER
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=create,
            enable_async_checkpointing=True,
            # Made in the background, a folder that cannot be made is an error only after minutes of waiting for it.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name in ("params", "rest"):
            handlers.add(name, ocp.args.StandardSave, ocp.StandardCheckpointHandler())
            handlers.add(name, ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
        handlers.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        handlers.add("meta", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
        self._manager = ocp.CheckpointManager(folder, options=options, handler_registry=handlers)

    def latest(self) -> int | None:
        """The newest whole step, or None. Call it before the first save: one in flight counts as whole to Orbax."""
        return self._manager.latest_step()

    def save(self, step: int, *, params: model.Params, rest: Any, meta: dict[str, Any]) -> None:
        """Start saving a step. Returns once the arrays are copied; the writing goes on in the background.

        Args:
            step: the name of the checkpoint.
            params: weights, stacked.
            rest: any pytree of arrays that goes with them.
            meta: JSON-able: the data position, the config.

        Raises:
            Exception: an earlier save failed in the background, or this step is not newer than what is there.
        """
        self._manager.check_for_errors()
        started = self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                rest=ocp.args.StandardSave(rest),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        if not started:  # Orbax leaves out, in silence, what its policy does not want
            raise RuntimeError(f"step {step} was not saved: {self._manager.directory} has step {self.latest()}")

    def restore(self, step: int, *, params: model.Params, rest: Any) -> tuple[model.Params, Any, dict[str, Any]]:
        """A step's (params, rest, meta), with the shapes, types and shardings of the abstract trees given."""
        restored = self._restored(
            step,
            params=ocp.args.StandardRestore(params),
            rest=ocp.args.StandardRestore(rest),
            meta=ocp.args.JsonRestore(),
        )
        return restored["params"], restored["rest"], restored["meta"]

    def restore_params(self, step: int, params: model.Params) -> model.Params:
        """Only the weights of a step."""
        return self._restored(step, params=ocp.args.StandardRestore(params))["params"]

    def meta(self, step: int) -> dict[str, Any]:
        """Only what is not arrays."""
        return self._restored(step, meta=ocp.args.JsonRestore())["meta"]

    def _restored(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever Orbax and TensorStore raise for a damaged or missing file
            folder = self._manager.directory / str(step)
            older = [s for s in self._manager.all_steps() if s < step]
            mend = f"if it is damaged, move it away to go on from step {max(older)}" if older else "it is the only one"
            first = (str(error).splitlines() or [""])[0][:200]
            raise ConfigError(
                f"checkpoint {folder} cannot be read: {mend} ({type(error).__name__}: {first})"
            ) from error

    def wait(self) -> None:
        """Return when the last save is on disk, or raise what it failed with."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Wait, and let go of the background threads."""
        self.wait()
        self._manager.close()


def read_run_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a run folder."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): is {folder} a folder that train.py made?") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ConfigError(f"{path} has no model in it: is {folder} a folder that train.py made?")
    return values


def open_run(folder: str | Path) -> Source:
    """A run folder as a model: its newest weights, on any mesh, whatever mesh they were trained on."""
    folder = Path(folder)
    values = read_run_config(folder)
    config = ModelConfig.from_dict(values["model"])

    def load(layout: parallel.Layout | None, dtype: jnp.dtype | None, quantised: bool) -> model.Params:
        layout = layout or parallel.Layout(parallel.single_device_mesh(), "infer")
        # Orbax casts while it reads, so that float32 master weights never exist beside what is asked for.
        shapes = model.abstract_params(config, stacked=True, dtype=dtype or jnp.float32)
        places = parallel.shardings(layout, model.logical_axes(config, stacked=True), shapes)
        checkpoints = Checkpoints(folder, create=False)
        step = checkpoints.latest()
        if step is None:
            raise ConfigError(f"{folder} has no whole checkpoint yet: let train.py reach one (checkpoint.every)")
        params = checkpoints.restore_params(step, parallel.abstract(shapes, places))
        checkpoints.close()
        return transform.unstack(params)

    return Source(
        path=folder,
        kind="run folder",
        config=config,
        bos_token=None,
        stop_tokens=(),
        sampling=None,
        chat_template=None,
        dtype=np.dtype(np.float32),
        leaves=None,
        load=load,
        read_tokenizer=functools.partial(tokenizer_in, folder),
        fingerprint=values.get("tokenizer_fingerprint"),
    )
