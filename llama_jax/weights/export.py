"""Export of a model in the file formats of Hugging Face, Meta and llama.cpp."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llama_jax.config import ModelConfig
from llama_jax.errors import DTYPE_ALIASES, ConfigError, brief, checked_keywords, nearest
from llama_jax.files import expanded
from llama_jax.ops import quant
from llama_jax.ops.lora import LoraTensor, LoraWeights
from llama_jax.ops.quant import QTensor
from llama_jax.params import Params, check_params, is_stacked
from llama_jax.progress import progress_bar
from llama_jax.storage import size_text
from llama_jax.text import chat_format, chat_template, vocabulary_files
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.formats import gguf as gguf_vocabulary
from llama_jax.text.formats import meta as meta_vocabulary
from llama_jax.weights import name_table, quantize
from llama_jax.weights.adapters import LazyLora, merge_lora
from llama_jax.weights.formats import gguf, huggingface, meta
from llama_jax.weights.model_files import Metadata
from llama_jax.weights.tensor import Index, LazyTensor, QuantizedParts, of_array, row_blocks

# The dtypes of each format, with the bytes that a weight takes in each dtype.
_FLOATS = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
FORMATS = {
    "hf": {**_FLOATS, "int8": 34 / 32, "int4": 18 / 32},
    "meta": _FLOATS,
    "gguf": {**_FLOATS, "q8_0": 34 / 32, "q4_0": 18 / 32},
}
_NAMES = {"int8": "int8", "int4": "int4", "q8_0": "int8", "q4_0": "int4"}  # quantizations by the dtypes that write them
_COLUMNS = {"hf": "huggingface", "meta": "meta", "gguf": "gguf"}  # columns of name_table's table
SHARD_BYTES = 5_000_000_000
_WEIGHTS = (".safetensors", ".pth", ".gguf", ".bin", ".msgpack")
_SPARE = 64 << 20  # bytes of disk beyond the weights, for a tokenizer and headers

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Export:
    """Everything that a writer of one format needs besides the path.

    Attributes:
        config: shape of the model.
        leaves: tensors by path. They have the dtype to write, except for GGUF, whose writer casts them.
        metadata: tokenizer, token ids, sampling settings and chat template.
        dtype: dtype of most of the weights, one of FORMATS[format].
        shard_bytes: largest size in bytes of one file (Hugging Face's format only).
        progress: takes the number of bytes that were written since the last call.
    """

    config: ModelConfig
    leaves: name_table.Leaves
    metadata: Metadata
    dtype: str
    shard_bytes: int
    progress: Callable[[int], None]


@checked_keywords
def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    leaves: name_table.Leaves,
    metadata: Metadata,
    *,
    format: str,
    dtype: str | np.dtype | type | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Saves a model. Only one block of one tensor is in memory at a time. Every process of a run must call it.

    Args:
        path: a new folder, or a .gguf file (in a folder its name is model.gguf). A folder with weights is refused.
        config: the model's shape.
        leaves: the tensors by path, from `leaves_of` or `Source.merged_leaves`.
        metadata: tokenizer, token ids, sampling settings and chat template.
        format: one of FORMATS.
        dtype: a name that `written_dtype` knows. The default is `default_dtype`, except for tensors that would lose
            precision.
        shard_bytes: largest size in bytes of one file of format "hf".

    Returns:
        The folder or file that was written.

    Raises:
        ConfigError: an unknown format or dtype, a model that the format cannot represent, a path that already has
            weights, or a disk that is too small.
    """
    dtype = written_dtype(format, dtype)
    if format == "meta":
        meta.export_params(config)  # raises in every process if the format cannot represent the model
    main = dtype or default_dtype(leaves, format)
    leaves = _prepared(config, leaves, format, dtype, main)
    path = _free(expanded(path), format)
    if jax.process_index() > 0:  # the first process writes; the others take part in its all-gathers, in the same order
        for weight in name_table.weights(config, _COLUMNS[format]):
            for _ in leaves[weight.path].blocks():
                pass
        return path
    total = int(sum(math.prod(entry.shape) for entry in leaves.values()) * FORMATS[format][main])
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    if total + _SPARE > (free := shutil.disk_usage(existing).free):
        needed, left = size_text(total + _SPARE), size_text(free)
        raise ConfigError(f"{path} needs up to {needed}, but the disk has {left} free: make room, or give another path")
    (path.parent if path.suffix == ".gguf" else path).mkdir(parents=True, exist_ok=True)
    with progress_bar(total, f"writing {path.name}") as bar:
        try:
            _WRITERS[format](path, _Export(config, leaves, metadata, main, shard_bytes, bar.update))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}; the files written so far are incomplete") from error
    return path


def written_dtype(format: str, dtype: str | np.dtype | type | None) -> str | None:
    """The name that a format has for a dtype: int8 in "hf" is q8_0 in "gguf". None stays None.

    A dtype is a name, or a dtype of numpy or jax.

    Raises:
        ConfigError: the format or the dtype is not in FORMATS.
    """
    if format not in FORMATS:
        if format in ("peft", "lora", "adapter"):
            raise ConfigError("adapters are saved by training, in the folder adapter/ of the run; save merges them")
        raise ConfigError(
            f"unknown format {format!r}{nearest(format, list(FORMATS)) or '.'} Allowed: {', '.join(FORMATS)}"
        )
    if dtype is None:
        return None
    try:
        dtype = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except (TypeError, ValueError):
        dtype = str(dtype)  # such as torch.bfloat16, which DTYPE_ALIASES has
    name = DTYPE_ALIASES.get(dtype.lower(), dtype.lower())
    equal = {other for other, quantization in _NAMES.items() if quantization == _NAMES.get(name)}
    found = next((other for other in FORMATS[format] if other == name or other in equal), None)
    if found is None:
        near = nearest(dtype, list(FORMATS[format]))
        allowed = ", ".join(FORMATS[format])
        raise ConfigError(f"format {format!r} is not written in {brief(dtype)}{near}; allowed: {allowed}")
    return found


def _prepared(
    config: ModelConfig,
    leaves: name_table.Leaves,
    format: str,
    dtype: str | None,
    main: str,
) -> name_table.Leaves:
    """The tensors in the form that a format's writer expects: cast, or with the quantized parts to write."""
    if main in _NAMES:
        name = _NAMES[main]
        if format == "hf":
            quantize.check(config, name)
        if format == "hf" and dtype is None:
            return leaves  # exactly what the model has: quantized parts, and other tensors in their own dtype
        bits = quantize.bits_of(config, name)
        return {key: quantize.rounded(leaf, bits[key]) if key in bits else leaf for key, leaf in leaves.items()}
    if format == "gguf":  # gguf.save_file casts by itself
        return leaves
    return {
        key: leaf if dtype is None and _loses(leaf, np.dtype(main)) else leaf.cast(np.dtype(main), _name(key))
        for key, leaf in leaves.items()
    }


def default_dtype(leaves: name_table.Leaves, format: str) -> str:
    """The default dtype to write: that of most of the weights, or their quantized type if the format supports it."""
    sizes: collections.Counter[str] = collections.Counter()
    for entry in leaves.values():
        integers = {} if entry.quantized is None else {f"int{entry.quantized.bits}", f"q{entry.quantized.bits}_0"}
        kind = next((name for name in FORMATS.get(format, ()) if name in integers), entry.dtype.name)
        sizes[kind] += math.prod(entry.shape)
    return sizes.most_common(1)[0][0]


def _loses(leaf: LazyTensor, dtype: np.dtype) -> bool:
    """True if a cast to `dtype` would change a tensor. Matrices are not read, and count as changed."""
    if leaf.dtype == dtype:
        return False
    if len(leaf.shape) > 1:
        return True
    own = leaf.read()
    with np.errstate(over="ignore"):
        return not np.array_equal(own, own.astype(dtype).astype(own.dtype))


def _name(path: name_table.Path) -> str:
    return ".".join(map(str, path))


def leaves_of(config: ModelConfig, params: Params) -> name_table.Leaves:
    """Lazy tensors by path for params in device memory, with LoRA merged into its weights.

    The params may be stacked or unrolled, and sharded over the devices of all processes. One tensor at a time is copied
    to the host, when it is read.
    """
    return {path: _entry(leaf) for path, leaf in _stored(config, params).items()}


def lora_of(config: ModelConfig, params: Params) -> dict[name_table.Path, LazyLora]:
    """The LoRA matrix pairs of params in device memory, as lazy tensors by path.

    Raises:
        ConfigError: a weight has DoRA. Its leaf keeps only factors, from which the magnitudes are not recovered.
    """
    found = {path: leaf for path, leaf in _stored(config, params).items() if isinstance(leaf, _Adapted)}
    if any(leaf.factor is not None for leaf in found.values()):
        raise ConfigError(
            "an applied DoRA adapter cannot be saved as an adapter: copy the folder that it was read from"
        )
    return {path: leaf.lora for path, leaf in found.items()}


def lazy_lora(lora: Mapping[name_table.Path, LoraWeights]) -> dict[name_table.Path, LazyLora]:
    """LoRA arrays in device memory as lazy tensors."""
    return {path: LazyLora(lazy_array(w.a), lazy_array(w.b), lazy_array(w.scale)) for path, w in lora.items()}


def lazy_array(array: jax.Array) -> LazyTensor:
    """An array in device memory, possibly sharded over several processes, as a lazy tensor."""
    return of_array(functools.partial(_on_host, array), np.dtype(array.dtype), array.shape)


@dataclasses.dataclass(frozen=True)
class _Adapted:
    """A LoraTensor of lazy tensors.

    Attributes:
        base: the base weight.
        lora: its matrix pair.
        factor: DoRA's factors, (out, 1) or (1, in), or None.
    """

    base: LazyTensor
    lora: LazyLora
    factor: LazyTensor | None


def _stored(config: ModelConfig, params: Params) -> dict[name_table.Path, LazyTensor | _Adapted]:
    """The unrolled leaves of params by path, with lazy tensors in place of arrays."""
    check_params(config, params)
    stacked = is_stacked(params)
    latest: dict[name_table.Path, tuple[np.ndarray, ...]] = {}

    def leaf(path: name_table.Path) -> jax.Array | QTensor | LoraTensor:
        if stacked and path[0] == "layers":
            return jax.tree.map(lambda array: array[path[1]], name_table.get(params["layers"], path[2:]))
        return name_table.get(params, path)

    def arrays(path: name_table.Path) -> tuple[np.ndarray, ...]:
        if path not in latest:
            latest.clear()
            latest[path] = tuple(map(_on_host, jax.tree.leaves(leaf(path))))
        return latest[path]

    def entries(path: name_table.Path) -> LazyTensor | _Adapted:
        shape = jax.eval_shape(functools.partial(leaf, path))
        lazy = [
            of_array(lambda i=i: arrays(path)[i], np.dtype(a.dtype), a.shape)  # type: ignore[misc]
            for i, a in enumerate(jax.tree.leaves(shape))
        ]
        return _lazy(shape, iter(lazy))

    return {weight.path: entries(weight.path) for weight in name_table.weights(config, "huggingface")}


def _lazy(leaf: jax.Array | QTensor | LoraTensor, arrays: Iterator[LazyTensor]) -> LazyTensor | _Adapted:
    """A leaf with lazy tensors in place of its arrays, which come in the order of `jax.tree.leaves`."""
    if not isinstance(leaf, LoraTensor):
        return _lazy_base(leaf, arrays)
    base, lora = _lazy_base(leaf.base, arrays), LazyLora(next(arrays), next(arrays), next(arrays))
    for _ in jax.tree.leaves(leaf.dropout):
        next(arrays)
    return _Adapted(base, lora, None if leaf.factor is None else next(arrays))


def _lazy_base(leaf: jax.Array | QTensor, arrays: Iterator[LazyTensor]) -> LazyTensor:
    if isinstance(leaf, QTensor):
        return _quantized(QuantizedParts(leaf.bits, next(arrays), next(arrays)))
    return next(arrays)


def _entry(leaf: LazyTensor | _Adapted) -> LazyTensor:
    if isinstance(leaf, _Adapted):
        return _with_factor(merge_lora(leaf.base, leaf.lora), leaf.factor)
    return leaf


def _with_factor(tensor: LazyTensor, factor: LazyTensor | None) -> LazyTensor:
    """A lazy matrix times DoRA's factors, (out, 1) or (1, in)."""
    if factor is None:
        return tensor

    def fill(out: np.ndarray, index: Index) -> None:
        its = tuple(s if n > 1 else slice(0, 1) for s, n in zip(index, factor.shape, strict=True))
        for at, part in row_blocks(index, 4):
            factors = factor.read((part[0] if factor.shape[0] > 1 else its[0], its[1]), np.float32)
            np.copyto(out[at], tensor.read(part, np.float32) * factors, casting="unsafe")

    return dataclasses.replace(tensor, fill=fill)


def _quantized(pieces: QuantizedParts) -> LazyTensor:
    def fill(out: np.ndarray, index: Index) -> None:
        part = QTensor(*(jnp.asarray(array.read(index[:1])) for array in (pieces.values, pieces.scales)))
        np.copyto(out, quant.dequantize(part, jnp.float32)[:, index[1]], casting="unsafe")

    out, groups = pieces.scales.shape
    dtype, nbytes = np.dtype(np.float32), pieces.values.nbytes + pieces.scales.nbytes
    return LazyTensor(dtype, (out, groups * quant.GROUP), fill, f"Q{pieces.bits}_0", nbytes, pieces)


def _on_host(array: jax.Array) -> np.ndarray:
    """An array as a numpy array. The copy is made here, since jax would keep a copy that it makes itself."""
    if not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    if len(array.devices()) == 1 and jax.default_backend() == "cpu":
        return np.asarray(array)  # a view
    out = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            out[shard.index] = np.asarray(jnp.array(shard.data, copy=True))
    return out


def _free(path: Path, format: str) -> Path:
    """The path to write: a new .gguf file, or a folder without weights."""
    if format == "gguf" and path.suffix == ".gguf":
        folder, taken = path.parent, [path] if path.exists() else []
    else:
        if path.suffix == ".gguf" or (path.exists() and not path.is_dir()):
            raise ConfigError(f"{path} is the name of a file: give a folder to write to (or --to gguf)")
        present = path.iterdir() if path.is_dir() else ()
        taken = sorted(p for p in present if p.suffix in _WEIGHTS or p.name in ("config.json", "params.json"))
        folder, path = path, path / "model.gguf" if format == "gguf" else path
    if taken:
        raise ConfigError(f"{folder} already has {taken[0].name}: give another folder, or remove it")
    return path


def _chat_template(metadata: Metadata) -> ChatTemplate | None:
    """The model's own chat template, or else a template of Meta's format if the tokenizer has its control tokens."""
    if metadata.chat_template is None and metadata.tokenizer is not None:
        return chat_format.Llama3Format(metadata.tokenizer).template
    return metadata.chat_template


def _transformers_reads(files: Sequence[Path]) -> bool:
    """True if transformers can read a tokenizer from these files: a tokenizer.json or a SentencePiece model."""
    return any(
        file.name == "tokenizer.json" or (file.suffix == ".model" and not meta_vocabulary.looks_like_ranks(file))
        for file in files
    )


def write_tokenizer(folder: Path, metadata: Metadata, *, model_max_length: int) -> None:
    """Writes the tokenizer and the chat template of a model into a folder, as transformers reads them.

    The model's own tokenizer files are copied if transformers reads them.
    """
    files = metadata.tokenizer_files
    if metadata.tokenizer is not None and not _transformers_reads(files):
        files = ()  # transformers cannot read Meta's file: the tokenizer is written in its format
        vocabulary_files.write_for_transformers(
            metadata.tokenizer.vocabulary, folder, model_max_length=model_max_length
        )
        chat_template.write(_chat_template(metadata), folder)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if metadata.chat_template is not None and metadata.chat_template != chat_template.read_folder(folder):
        chat_template.write(metadata.chat_template, folder)  # tokenizer_files has no templates of a subfolder


def _write_hf(path: Path, export: _Export) -> None:
    write_tokenizer(path, export.metadata, model_max_length=export.config.max_seq_len)
    huggingface.save_folder(
        path,
        export.config,
        export.leaves,
        export.metadata,
        quantized=export.dtype in _NAMES,
        shard_bytes=export.shard_bytes,
        progress=export.progress,
    )


def _write_meta(path: Path, export: _Export) -> None:
    config, tokenizer = export.config, export.metadata.tokenizer
    if tokenizer is not None:
        try:
            tokenizer.save(path / "tokenizer.model")
        except ConfigError:
            _log.warning(
                "warning: written without a tokenizer: Meta's format supports only Llama 3's, not this model's"
            )
    meta.save_folder(path, config, export.leaves, progress=export.progress)
    context = meta.context_of(config)
    if context != config.max_seq_len:
        _log.warning(
            "warning: Meta's params.json does not store the context length: %s positions will be read back as %s",
            config.max_seq_len,
            context,
        )


def _write_gguf(path: Path, export: _Export) -> None:
    config, metadata = export.config, export.metadata
    fields = None
    if metadata.tokenizer is not None:
        try:
            fields = gguf_vocabulary.fields(metadata.tokenizer.vocabulary, rows=config.vocab_size)
        except ConfigError as error:
            _log.warning("warning: written without a tokenizer: %s", error)
    gguf.save_file(
        path,
        config,
        export.leaves,
        dtype=export.dtype,
        vocabulary=fields,
        name=path.stem,
        stop_tokens=metadata.stop_tokens,
        bos_token=metadata.bos_token,
        chat_template=_chat_template(metadata),
        progress=export.progress,
    )


_WRITERS = {"hf": _write_hf, "meta": _write_meta, "gguf": _write_gguf}
