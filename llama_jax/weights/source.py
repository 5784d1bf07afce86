"""Whatever a model may be named by, opened the same way: its config at once, its weights when asked for."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llama_jax import parallel
from llama_jax.config import ModelConfig
from llama_jax.errors import ConfigError, nearest
from llama_jax.params import Params
from llama_jax.sampling_params import SamplingParams
from llama_jax.text import tokenizer as text
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights import hub_models, load, name_table
from llama_jax.weights.formats import flax, gguf, gguf_file, huggingface, meta, peft, safetensors

LOOKED_FOR = (
    "a run folder (config.json and checkpoints/) or one of its checkpoints, a Hugging Face folder (config.json and "
    "*.safetensors), Meta's download (params.json and consolidated.*.pth), a .gguf file, an old Flax folder "
    "(config.json and flax_model.msgpack), or a hub id (owner/name)"
)

Load = Callable[[parallel.Layout | None, jnp.dtype | None, str | None], Params]


_log = logging.getLogger(__name__)


class UnknownTokenizer(ConfigError):
    """A tokenizer of a kind that is not understood. The model itself can be used with token ids."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        path: the folder or file.
        kind: what it is, in words.
        config: its shape.
        bos_token: the id that begins a text by its own account, or None.
        stop_tokens: ids that end a text by its own account, beside the tokenizer's.
        sampling: how it would be sampled by its own account, or None.
        chat_template: how dialogs are written by its own account (Jinja), or None.
        dtype: of most of its numbers; float32 for quantized ones, which are exact in it.
        leaves: its tensors by path, none of them read; None for a run, whose arrays Orbax reads.
        load: (layout, dtype, quantize) to weights in the unrolled layout. No layout is the first device, no dtype is
            the stored one; for quantize see load.load_leaves.
        read_tokenizer: its tokenizer, or None if it has none.
        fingerprint: of the tokenizer that it was trained with, where that is known.
        tokenizer_files: what transformers would read of its tokenizer, where they are of that kind.
        run_identity: of a run, which has no leaves: its `identity`.
        adapted: its weights come with LoRA updates beside them, as LoraTensors.
    """

    path: Path
    kind: str
    config: ModelConfig
    bos_token: int | None
    stop_tokens: tuple[int, ...]
    sampling: SamplingParams | None
    chat_template: str | None
    dtype: np.dtype
    leaves: name_table.Leaves | None
    load: Load
    read_tokenizer: Callable[[], Tokenizer | None]
    fingerprint: str | None = None
    tokenizer_files: tuple[Path, ...] = ()
    run_identity: Callable[[], str] | None = None
    adapted: bool = False

    def load_merged(self, layout: parallel.Layout | None, dtype: jnp.dtype | None, quantize: str | None) -> Params:
        """As `load`, with the updates of a LoRA run merged into its base: what another update can go on top of."""
        if not self.adapted:
            return self.load(layout, dtype, quantize)
        params = load.merged(self.load(layout, dtype, "none"))
        return load.quantize_layers(self.config, params, quantize, layout)

    def identity(self) -> str:
        """A hash (hex) of which model it is, whatever format, dtype or number of files it is stored in.

        Of the config and the first row of every tensor in float32: training moves every tensor, and reading all
        of a large model would take minutes. Of a run, of the manifest of its newest step.
        """
        if self.leaves is None:
            return self.run_identity()
        digest = hashlib.sha256(repr(sorted(self.config.to_dict().items())).encode())
        for path, entry in sorted(self.leaves.items(), key=lambda item: repr(item[0])):
            row = entry.read((slice(0, 1),), np.float32)
            digest.update(repr((path, entry.shape)).encode() + np.ascontiguousarray(row).tobytes())
        return digest.hexdigest()

    @property
    def quantized(self) -> bool:
        """Whether some of its tensors are stored in groups of a few bits."""
        return self.leaves is not None and any(entry.kind.startswith("Q") for entry in self.leaves.values())

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, or None if it has none.

        Raises:
            UnknownTokenizer: it has one of a kind that is not understood; the model can be used with ids.
            ConfigError: it is not the one that the model was trained with. A tokenizer.model that lost its last lines
                still parses, and would move every special token.
            ValueError: a damaged file.
        """
        try:
            found = self.read_tokenizer()
        except ConfigError as error:
            raise UnknownTokenizer(str(error)) from None
        if found is None:
            return None
        other = self.fingerprint not in (None, found.fingerprint) or found.vocab_size > self.config.vocab_size
        ranks = found.path is not None and found.path.suffix == ".model"
        short = ranks and found.vocab_size < self.config.vocab_size and self.bos_token not in (None, found.bos_id)
        if other or short:
            raise ConfigError(
                f"{found.path or self.path} is not the tokenizer of this model: it has {found.vocab_size:,} ids, of "
                f"which {found.bos_id} begins a text. Was the file cut short, or taken from another model? Copy it anew"
            )
        return found


def open_source(source: str | os.PathLike[str]) -> Source:
    """The model that a path or a hub id names. Reads headers only; a hub id is downloaded first.

    Raises:
        ConfigError: none of what can be opened; says what was looked for, and what there is instead.
        ValueError: a damaged file.
    """
    path = Path(source).expanduser()
    if hub_models.is_hub_id(str(source)):
        path = hub_models.download(str(source))
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        siblings = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        raise ConfigError(f"model {str(source)!r} does not exist{nearest(path.name, siblings)}; give {LOOKED_FOR}")
    if peft.is_adapter(path):
        raise ConfigError(
            f"{path} is an adapter of {peft.base_of(path)}, not a model: give that as the model, this as its "
            f"adapter (infer.py --model MODEL --adapter {path})"
        )
    own = (path / "config.json").is_file()
    step = int(path.name) if path.parent.name == "checkpoints" and path.name.isdecimal() and not own else None
    run = path if step is None else path.parents[1]
    if (run / "config.json").is_file() and (run / "checkpoints").is_dir():
        from llama_jax.weights.run_folder import open_run  # orbax takes half a second to import

        return open_run(run, step=step)
    if own:
        if any(path.glob("*.safetensors")) or (path / safetensors.INDEX).is_file():
            return _open_huggingface(path, "Hugging Face folder", safetensors.open_folder, "huggingface")
        if any(path.glob("flax_model*.msgpack*")):
            return _open_huggingface(path, "old Flax folder", flax.open_folder, "flax")
    if (path / "params.json").is_file():
        return _open_meta(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len({re.sub(r"-[0-9]{5}-of-[0-9]{5}$", "", file.stem) for file in ggufs}) == 1:  # one file, or the parts of one
        return _open_gguf(ggufs[0])
    raise ConfigError(f"model {str(source)!r} is none of these: {LOOKED_FOR}{_instead(path, ggufs)}")


def _open_file(path: Path) -> Source:
    with open(path, "rb") as file:
        is_gguf = file.read(4) == b"GGUF"  # whatever it is called
    if is_gguf or path.suffix == ".gguf":
        return _open_gguf(path)
    raise ConfigError(f"model {str(path)!r} is a file; of files only .gguf is a whole model. Name its folder instead")


def _instead(path: Path, ggufs: list[Path]) -> str:
    """What a folder that is no model has, which may be what was meant."""
    if ggufs:
        return f"; it has {len(ggufs)} GGUF files: name one, such as {ggufs[0]}"
    if (path / "original" / "params.json").is_file():
        return f"; there is Meta's download in {path / 'original'}"
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".h5", ".pth", ".pt", ".msgpack"))
    if others:
        return f"; it has {', '.join(others[:3])}, without the config that goes with it or in a format that is not read"
    there = sorted(p.name for p in path.glob("*/") if any((p / n).is_file() for n in ("config.json", "params.json")))
    return f"; below it there is {', '.join(there[:5])}" if there else ""


def _open_huggingface(path: Path, kind: str, open_folder: Callable, format: str) -> Source:
    config = huggingface.read_config(path)
    entries = open_folder(path)
    if format == "flax":  # whose model took its own unembedding, whatever the config said of ties
        config = dataclasses.replace(config, tied_embeddings=name_table.tied_names(format)[1] not in entries)
    leaves = load.check_entries(entries, config, format=format, source=str(path))
    return _source(
        path,
        kind,
        config,
        leaves,
        bos_token=huggingface.bos_token(path),
        stop_tokens=huggingface.stop_tokens(path),
        sampling=huggingface.sampling_defaults(path),
        chat_template=huggingface.chat_template(path),
        tokenizer_files=huggingface.tokenizer_files(path),
        read_tokenizer=functools.partial(tokenizer_in, path),
    )


def _open_meta(path: Path) -> Source:
    config, entries = meta.open_folder(path)
    return _source(
        path,
        "Meta's download",
        config,
        load.check_entries(entries, config, format="meta", source=str(path)),
        read_tokenizer=functools.partial(tokenizer_in, path),
    )


def _open_gguf(path: Path) -> Source:
    file = gguf_file.open_file(path)
    config = gguf.read_config(file)
    fields = gguf.vocabulary(file)
    return _source(
        path,
        f"GGUF version {file.version}",
        config,
        load.check_entries(file.entries, config, format="gguf", source=str(path)),
        bos_token=gguf.bos_token(file),
        stop_tokens=gguf.stop_tokens(file),
        chat_template=None if fields is None else fields["chat_template"],
        read_tokenizer=lambda: None if fields is None else text.from_gguf(fields),
    )


def _source(
    path: Path,
    kind: str,
    config: ModelConfig,
    leaves: name_table.Leaves,
    *,
    read_tokenizer: Callable[[], Tokenizer | None],
    bos_token: int | None = None,
    stop_tokens: tuple[int, ...] = (),
    sampling: SamplingParams | None = None,
    chat_template: str | None = None,
    tokenizer_files: tuple[Path, ...] = (),
) -> Source:
    known = tuple(token for token in stop_tokens if token < config.vocab_size)
    if known != stop_tokens:
        _log.warning("warning: %s: of its stop tokens %s only %s are in its vocabulary", path, stop_tokens, known)
    return Source(
        path=path,
        kind=kind,
        config=config,
        bos_token=bos_token,
        stop_tokens=known,
        sampling=sampling,
        chat_template=chat_template,
        dtype=load.main_dtype(leaves),
        leaves=leaves,
        load=lambda layout, dtype, quantize: load.load_leaves(
            leaves, config, layout=layout, dtype=dtype, quantize=quantize
        ),
        read_tokenizer=read_tokenizer,
        tokenizer_files=tokenizer_files,
    )


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, or None if there is none."""
    path = text.find(folder)
    return None if path is None else text.open(path)
