"""Vocabulary files: finding the one of a model's folder, reading any of them, and writing the one of a run."""

import os
from pathlib import Path

from llama_jax.files import write_whole
from llama_jax.text.byte_pairs import BytePairs, ranks_file
from llama_jax.text.formats import huggingface, meta
from llama_jax.text.vocabulary import Vocabulary

_FILES = ("tokenizer.model", "tokenizer.json")


def find(folder: str | os.PathLike[str]) -> Path | None:
    """The vocabulary file of a model's folder, or None.

    Meta's `tokenizer.model` comes first (the folder's own, else the one in `original/`), then `tokenizer.json`. A
    `tokenizer.model` in another format, such as Llama 2's, comes last.
    """
    folder = Path(folder)
    candidates = [folder / "tokenizer.model", folder / "original" / "tokenizer.model", folder / "tokenizer.json"]
    files = [path for path in candidates if path.is_file()]
    preferred = [path for path in files if path.suffix == ".json" or meta.looks_like_ranks(path)]
    return next(iter([*preferred, *files]), None)


def read(path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary in a file: a `tokenizer.json` (by its suffix), or a `tokenizer.model` in Meta's format.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: a tokenizer whose ids cannot be reproduced; the message names the part that is the reason.
        ValueError: a damaged file.
    """
    path = Path(path)
    return huggingface.read(path) if path.suffix == ".json" else meta.read(path)


def write(vocabulary: Vocabulary, folder: str | os.PathLike[str]) -> Path:
    """Writes the file of `folder` from which `find` and `read` give this vocabulary again, and returns its path.

    It is a `tokenizer.model` in Meta's format if that can hold the vocabulary, else a `tokenizer.json` with
    the files that accompany it. A file of the other kind is removed, so that `find` finds this one.
    """
    folder = Path(folder)
    if isinstance(vocabulary, BytePairs) and vocabulary.is_metas:
        written, other = _FILES
        write_whole(folder / written, ranks_file(vocabulary.tokens))
    else:
        other, written = _FILES
        huggingface.write(vocabulary, folder)
    (folder / other).unlink(missing_ok=True)
    return folder / written
