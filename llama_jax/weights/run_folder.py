"""The folder of a training run as a model: its newest weights, or for LoRA its newest updates on top of their base."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import manifest, parallel
from llama_jax.checkpoint import Checkpoints, Deleted
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError
from llama_jax.files import expanded, read_json
from llama_jax.ops.lora import LoraWeights
from llama_jax.params import Params, abstract_params, logical_axes, unstack
from llama_jax.run_keys import LoraConfig
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights import adapters, export, load, lora_params, name_table
from llama_jax.weights.formats import huggingface
from llama_jax.weights.locate import is_path
from llama_jax.weights.model_files import Metadata, tokenizer_in
from llama_jax.weights.source import Source, checked_tokenizer

CONFIG_FILE = "config.json"
_REMEDY = "restore it from a backup, or repeat the command that trained the run, which writes it again"


def read_run_config(folder: str | Path) -> dict[str, Any]:
    """The contents of a run folder's config.json, validated against the hash in it.

    The files of tokenizer, chat template and sampling defaults are validated against the hashes in it, too.

    Runs of earlier versions have no hashes.

    Raises:
        ConfigError: config.json is missing or not that of a run, or one of these files was changed after it was
            written.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}: is {folder} a folder that train.py made?") from None
    if not isinstance(values.get("model"), dict):
        raise ConfigError(f"{path} has no model in it: is {folder} a folder that train.py made?")
    if manifest.SEAL in values and not manifest.is_sealed(values):
        raise ConfigError(f"{path} was changed after it was written: {_REMEDY}")
    for damaged in manifest.changed(Path(folder), values.get("files") or {}):
        raise ConfigError(f"{damaged} was changed after it was written or is missing: {_REMEDY}")
    return values


class RunSource:
    """A run folder as a model, which can be loaded on any mesh. `Source` documents the methods.

    Attributes:
        path: the run folder.
        config: the model's shape.
        lora: LoRA settings of the run, or None if all weights were trained.
    """

    def __init__(self, folder: str | Path, *, step: int | None, open_base: Callable[[str | Path], Source]):
        """Reads the run's config.json.

        Args:
            folder: the run folder.
            step: step of the checkpoint to use; None is the newest that is complete.
            open_base: opens the model that a LoRA run was trained on. It is an argument because weights/open.py imports
                this module.

        Raises:
            ConfigError: the folder is not that of a run.
        """
        self.path = Path(folder)
        self._values = read_run_config(folder)
        self._wanted, self._open_base = step, open_base
        self._step: int | None = None  # the step that is read; chosen when it is first needed
        self._digests: dict[str, str] = {}
        self.lora = _lora(self._values)
        self._base_config = ModelConfig.from_dict(self._values["model"])
        self.config = self._base_config
        if self.lora is not None:
            self.config = lora_params.adapted_config(self._base_config, self.lora)

    @property
    def description(self) -> str:
        """Name of the format, and the base of a LoRA run."""
        return "run folder" if self.lora is None else f"run folder, LoRA of {self._values['init_from']}"

    @functools.cached_property
    def metadata(self) -> Metadata:
        """The metadata of the files in the run folder; for LoRA the base's, with the run's chat template.

        Runs of earlier versions have no chat template, and used Meta's reference format.
        """
        own = huggingface.read_metadata(self.path)
        if self.lora is None:
            return own
        try:
            base = self.base.metadata
        except ConfigError:  # `load` raises it; the run can still be inspected
            return own
        return dataclasses.replace(base, chat_template=own.chat_template)

    @property
    def dtype(self) -> np.dtype:
        """Float32, the dtype of checkpoints; for LoRA the dtype of the base."""
        return np.dtype(np.float32) if self.lora is None else self.base.dtype

    @property
    def quantized(self) -> bool:
        """True for a LoRA run on a quantized base."""
        return self.lora is not None and self.base.quantized

    @functools.cached_property
    def base(self) -> Source:
        """The model that a LoRA run was trained on.

        Raises:
            ConfigError: the base cannot be opened, or its weights are not those that the run was trained on.
        """
        name = self._values["init_from"]
        try:
            base = self._open_base(_name_of_base(self.path, name))
        except (ConfigError, ValueError, OSError) as error:
            raise ConfigError(
                f"{self.path} holds LoRA updates of {name!r}, which cannot be opened ({error}): put it back, or give "
                f"the base as the model and {self.path}/adapter as its adapter"
            ) from None
        if self._values.get("frozen") != base.identity():
            raise ConfigError(
                f"{name!r} is not the model that {self.path} was trained on, and its LoRA updates fit no other "
                "model: restore the model of that name"
            )
        return base

    def load(self, layout: parallel.Layout | None, dtype: jnp.dtype | None, quantize: str | None) -> Params:
        """Reads the weights as unrolled params; see `Source.load`."""
        layout = layout or _one_device()
        if self.lora is not None:
            adapter = self._adapter(self.lora, layout, jnp.dtype(dtype or self.dtype))
            return adapters.with_adapter(self.config, self.base.load_merged(layout, dtype, quantize), adapter)
        # Orbax casts while it reads, so that the float32 master weights are never in memory next to the cast ones.
        shapes = abstract_params(self.config, stacked=True, dtype=dtype or jnp.float32)
        params = self._restore(shapes, logical_axes(self.config, stacked=True), layout)
        return load.quantize_placed(self.config, unstack(params), quantize, layout)

    def load_merged(self, layout: parallel.Layout | None, dtype: jnp.dtype | None, quantize: str | None) -> Params:
        """Reads the weights with LoRA's updates merged into them; see `Source.load_merged`."""
        if self.lora is None:
            return self.load(layout, dtype, quantize)
        params = load.merge_updates(self.load(layout, dtype, "none"))
        return load.quantize_placed(self.config, params, quantize, layout)

    def merged_leaves(self) -> name_table.Leaves:
        """The tensors by path for saving; those of a LoRA run have the dtypes of its base."""
        if self.lora is None:
            return export.leaves_of(self.config, self.load(None, None, "none"))
        trained, leaves = self._trained(self.lora, _one_device()), self.base.merged_leaves()
        lora = export.lazy_lora(lora_params.lora_by_path(self.lora, trained))
        rows = lora_params.token_rows(self.lora, trained, lora_params.base_rows(self.lora, leaves))
        return adapters.merge_adapter(leaves, adapters.Adapter(self.config, lora, rows=rows))

    def identity(self) -> str:
        """A hash of the checkpoint's file digests, and of the identity of LoRA's base."""
        if self._step is None:
            checkpoints = Checkpoints(self.path, create=False)
            self._choose_step(checkpoints)
            checkpoints.close()
        digests = sorted(self._digests.items())
        return hashlib.sha256(repr((self._values.get("frozen"), digests)).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer | None:
        """Reads the tokenizer, which must be the one that the run was trained with; see `Source.tokenizer`."""
        fingerprint = self._values.get("tokenizer_fingerprint")
        read = functools.partial(tokenizer_in, self.path)
        return checked_tokenizer(read, self.path, self.config, fingerprint=fingerprint)

    def _trained(self, settings: LoraConfig, layout: parallel.Layout) -> lora_params.Updates:
        """Reads the trained LoRA arrays in float32."""
        shapes = jax.eval_shape(lambda: lora_params.initial(self._base_config, settings, jax.random.key(0)))
        return self._restore(shapes, lora_params.axes(self._base_config, settings), layout)

    def _adapter(self, settings: LoraConfig, layout: parallel.Layout, dtype: jnp.dtype) -> adapters.AdapterWeights:
        """The trained LoRA arrays and token rows in `dtype`, by path."""
        trained = self._trained(settings, layout)
        lora = lora_params.lora_by_path(settings, trained)
        lora = {path: LoraWeights(w.a.astype(dtype), w.b.astype(dtype), w.scale) for path, w in lora.items()}
        rows = {}
        if settings.trained_tokens:
            lazy_rows = lora_params.token_rows(
                settings, trained, lora_params.base_rows(settings, self.base.merged_leaves())
            )
            rows = {path: (lazy.ids, jnp.asarray(lazy.rows.read(dtype=dtype))) for path, lazy in lazy_rows.items()}
        return adapters.AdapterWeights(self.config, lora, rows=rows)

    def _restore(self, shapes: Any, axes: Any, layout: parallel.Layout) -> Any:
        """Reads the trained weights of the checkpoint, or of the newest one if a run deletes it during the read."""
        checkpoints = Checkpoints(self.path, create=False)
        abstract = parallel.abstract(shapes, parallel.shardings(layout, axes, shapes))
        try:
            while True:
                step = self._choose_step(checkpoints) if self._step is None else self._step
                try:
                    return checkpoints.restore_params(step, abstract)
                except Deleted:
                    if self._wanted is not None:
                        raise
                    self._step = None
        finally:
            checkpoints.close()

    def _choose_step(self, checkpoints: Checkpoints) -> int:
        """Chooses the step to read, and notes its identity. Raises ConfigError if there is no complete checkpoint."""
        while True:
            step = checkpoints.latest("params") if self._wanted is None else self._wanted
            if step is None:
                raise ConfigError(
                    f"{self.path} has no complete checkpoint yet: train until the first one is saved (checkpoint.every)"
                )
            try:
                self._digests = checkpoints.digests(step)
            except Deleted:
                if self._wanted is not None:
                    raise
                continue
            self._step = step
            return step


def _name_of_base(folder: Path, name: str) -> str | Path:
    """The name under which to open a run's `init_from`: unchanged, or as a path below a parent of the run folder.

    A path may not exist here because it is relative to another working folder, or because the run folder and its base
    were moved together. Then the longest end of the path that exists below a parent of the run folder is taken.
    `RunSource.base` compares the identity of that model with the one in the run's config.
    """
    path = expanded(name)
    if path.exists():
        return name
    parts = path.parts[1:] if path.is_absolute() else path.parts
    for start in range(len(parts) if path.is_absolute() else 1):
        for parent in folder.resolve().parents:
            if (candidate := parent.joinpath(*parts[start:])).exists():
                return candidate
    if is_path(name) and not path.is_absolute():
        raise ConfigError(f"no {name!r} in the current folder or in a parent of {folder.resolve()}")
    return name


def _lora(values: Mapping[str, Any]) -> LoraConfig | None:
    """The LoRA settings of a run's config, or None if all weights were trained."""
    section = values.get("lora") or {}
    if not section.get("rank"):
        return None
    settings: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in section.items()}
    return LoraConfig(**settings)


def _one_device() -> parallel.Layout:
    return parallel.Layout(parallel.single_device_mesh(), "infer")
