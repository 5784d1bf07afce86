"""Vocabulary files: finds the one in a model's folder, and reads and writes files of all formats."""

import os
from pathlib import Path

from llama_jax import gguf_header
from llama_jax.errors import ConfigError, brief
from llama_jax.files import expanded, write_whole
from llama_jax.text.byte_pairs import BytePairs, ranks_file
from llama_jax.text.formats import gguf, huggingface, meta, sentencepiece
from llama_jax.text.library_vocabulary import LibraryVocabulary
from llama_jax.text.piece_vocabulary import PieceVocabulary
from llama_jax.text.vocabulary import Vocabulary

_MODEL, _JSON = "tokenizer.model", "tokenizer.json"
LOOKED_FOR = "tokenizer.model, tokenizer.json, or one .gguf file"


def find(folder: str | os.PathLike[str]) -> Path | None:
    """The vocabulary file of a model's folder, or None.

    Meta's `tokenizer.model` comes first (the folder's own, else the one in `original/`), then `tokenizer.json`, then a
    `tokenizer.model` in another format, such as Llama 2's.
    """
    folder = Path(folder)
    candidates = [folder / _MODEL, folder / "original" / _MODEL, folder / _JSON]
    files = [path for path in candidates if path.is_file()]
    preferred = [path for path in files if path.suffix == ".json" or meta.looks_like_ranks(path)]
    return next(iter([*preferred, *files]), None)


def read(path: str | os.PathLike[str]) -> Vocabulary:
    """Reads the vocabulary of a file, whose format is recognized by its contents, or of a model's folder.

    Files are Meta's `tokenizer.model`, SentencePiece's `tokenizer.model`, a `tokenizer.json`, and a GGUF file.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the argument is not a path, or the tokenizer is not supported. The message has the reason.
        ValueError: the file is damaged.
    """
    if not isinstance(path, str | os.PathLike) or not str(path).strip():
        raise ConfigError(f"the path of a tokenizer must be a file or a folder ({LOOKED_FOR}), got {brief(path)}")
    path = expanded(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a vocabulary file or a folder with {LOOKED_FOR}")
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(gguf_header.MAGIC):
        fields = gguf.fields_of(gguf_header.read_metadata(path), str(path))
        if fields is None:
            raise ConfigError(f"{path}: this GGUF file holds no tokenizer")
        return gguf.vocabulary(fields, str(path))
    if path.suffix == ".json" or start.lstrip().startswith(b"{"):
        return huggingface.read(path)
    return sentencepiece.read(path) if sentencepiece.looks_like_pieces(start) else meta.read(path)


def _in_folder(folder: Path) -> Path:
    """The vocabulary file of a folder: the one that `find` returns, or else its only .gguf file."""
    found = find(folder)
    ggufs = sorted(folder.glob("*.gguf"))
    if found is None and len(ggufs) == 1:
        return ggufs[0]
    if found is None:
        more = f"; it has {len(ggufs)} .gguf files: name one" if ggufs else ""
        raise FileNotFoundError(f"{folder}: has no vocabulary file ({LOOKED_FOR}){more}")
    return found


def write(vocabulary: Vocabulary, folder: str | os.PathLike[str], *, model_max_length: int | None = None) -> Path:
    """Writes the vocabulary to a file in `folder`, so that `find` and `read` return it again. Returns the file's path.

    The file is a `tokenizer.model` for Meta's format and for SentencePiece, and otherwise a `tokenizer.json`. The last
    two come with a `tokenizer_config.json`. A file of the other name is removed, so that `find` returns this one.

    Args:
        vocabulary: vocabulary to write.
        folder: existing folder.
        model_max_length: number of positions of the model, if known.
    """
    folder = Path(folder)
    written, other = _MODEL, _JSON
    if isinstance(vocabulary, BytePairs) and vocabulary.is_metas:
        write_whole(folder / written, ranks_file(vocabulary.tokens))
    else:
        if not isinstance(vocabulary, PieceVocabulary):
            written, other = _JSON, _MODEL
        write_for_transformers(vocabulary, folder, model_max_length=model_max_length)
    (folder / other).unlink(missing_ok=True)
    return folder / written


def write_for_transformers(
    vocabulary: Vocabulary, folder: str | os.PathLike[str], *, model_max_length: int | None = None
) -> None:
    """Writes a SentencePiece `tokenizer.model` or a `tokenizer.json`, with a `tokenizer_config.json`.

    Args:
        vocabulary: vocabulary to write.
        folder: existing folder.
        model_max_length: number of positions of the model, if known.
    """
    if isinstance(vocabulary, PieceVocabulary):
        sentencepiece.write(vocabulary, folder, model_max_length=model_max_length)
    else:
        assert isinstance(vocabulary, BytePairs | LibraryVocabulary)
        huggingface.write(vocabulary, folder, model_max_length=model_max_length)
