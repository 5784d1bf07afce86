"""Whatever a model may be named by, opened the same way: its config at once, its weights when asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from llama_jax import model, parallel
from llama_jax.config import ConfigError, ModelConfig, nearest
from llama_jax.text.tokenizer import Tokenizer

_LOOKED_FOR = "a run folder (config.json and checkpoints/) or a Hugging Face folder (config.json and *.safetensors)"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        config: its shape.
        tokenizer_path: where its tokenizer.model is, or None.
        fingerprint: of the tokenizer that it was trained with, where that is known.
        bos_token: the id that begins a text by its own account, or None.
        stop_tokens: ids that end a text by its own account, beside the tokenizer's.
        load: (layout, dtype) to weights in the unrolled layout; None is the first device, and the stored dtype.
    """

    config: ModelConfig
    tokenizer_path: Path | None
    fingerprint: str | None
    bos_token: int | None
    stop_tokens: tuple[int, ...]
    load: Callable[[parallel.Layout | None, jnp.dtype | None], model.Params]

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, or None if it has none.

        Raises:
            ConfigError: the file is not the one that the model was trained with. One that lost its last lines still
                parses, and would move every special token.
        """
        if self.tokenizer_path is None:
            return None
        found = Tokenizer(self.tokenizer_path)
        other = self.fingerprint not in (None, found.fingerprint) or found.vocab_size > self.config.vocab_size
        short = found.vocab_size < self.config.vocab_size and self.bos_token not in (None, found.bos_id)
        if other or short:
            raise ConfigError(
                f"{self.tokenizer_path} is not the tokenizer of this model: it has {found.vocab_size:,} ids, of which "
                f"{found.bos_id} begins a text. Was the file cut short, or taken from another model? Copy it anew"
            )
        return found


def open_source(source: str | os.PathLike[str]) -> Source:
    """The model that a path names: a run folder of train.py, or a Hugging Face folder.

    Raises:
        ConfigError: neither; says what was looked for, and what there is instead.
    """
    folder = Path(source).expanduser()
    if _is_run(folder):
        from llama_jax import checkpoint  # orbax takes half a second to import

        return checkpoint.open_run(folder)
    from llama_jax.weights import huggingface

    config = huggingface.read_config(folder)
    return Source(
        config=config,
        tokenizer_path=huggingface.tokenizer_path(folder),
        fingerprint=None,
        bos_token=huggingface.bos_token(folder),
        stop_tokens=huggingface.stop_tokens(folder),
        load=lambda layout, dtype: huggingface.load_params(folder, config, layout=layout, dtype=dtype),
    )


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run of train.py (True) or a Hugging Face model (False); anything else raises."""
    if not folder.is_dir():
        siblings = sorted(p.name for p in folder.parent.glob("*") if p.is_dir()) if folder.parent.is_dir() else []
        what = "is a file" if folder.exists() else f"does not exist{nearest(folder.name, siblings)}"
        raise ConfigError(f"model {str(folder)!r} {what}; give {_LOOKED_FOR}")
    if (folder / "config.json").is_file():
        if (folder / "checkpoints").is_dir():
            return True
        if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").is_file():
            return False
    there = sorted(p.name for p in folder.glob("*/") if (p / "config.json").is_file())
    mend = f"; below it there is {', '.join(there[:5])}" if there else ""
    if (folder / "params.json").is_file():
        mend = "; Meta's own format is not read yet: use the Hugging Face folder of the same model"
    raise ConfigError(f"model {str(folder)!r} is neither {_LOOKED_FOR}{mend}")
