"""Reader and writer of SentencePiece's `tokenizer.model` (Llama 2, TinyLlama, Mistral) and the settings next to it."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.files import read_small, write_whole
from llama_jax.text import piece_vocabulary
from llama_jax.text.formats import tokenizer_config
from llama_jax.text.formats.tokenizer_config import AddedToken, TokenizerConfig, looks_like_control
from llama_jax.text.piece_vocabulary import CONTROL, NORMAL, USER_DEFINED, PieceVocabulary
from llama_jax.text.vocabulary import MOST_BYTES, errors_of

_PLAIN = (NORMAL, USER_DEFINED)


def looks_like_pieces(data: bytes) -> bool:
    """True if a file that begins with `data` may be a SentencePiece model: its first field is a piece."""
    if len(data) < 4 or data[0] != 0x0A:
        return False
    return data[1] > 0x7F or (data[2] == 0x0A and data[3] + 2 <= data[1])


def read(path: Path) -> PieceVocabulary:
    """The vocabulary of a SentencePiece model, with the tokens that the files next to it add.

    A text begins with bos unless `tokenizer_config.json` says otherwise, as in Meta's and transformers' code.

    Raises:
        ConfigError: the model is not supported.
        ValueError: the file is damaged.
    """
    contents = read_small(path, max_bytes=MOST_BYTES)
    config = tokenizer_config.read(path.parent)
    with errors_of(str(path)):
        return _with_config(contents, config)


def _with_config(contents: bytes, config: TokenizerConfig) -> PieceVocabulary:
    made = piece_vocabulary.piece_vocabulary(contents)
    pieces = made.model.pieces
    specials, found = dict(made.specials), {}
    hidden: dict[int, piece_vocabulary.Piece] = {}  # pieces that are control tokens, and may not come from text
    for i, token in _added(pieces, config).items():
        own = pieces[i] if i < len(pieces) else None
        if token.special:
            specials = {other: j for other, j in specials.items() if j != i} | {token.content: i}
            if own is not None and own.type in _PLAIN:
                hidden[i] = own._replace(type=CONTROL)
        elif own is None or own.text != token.content:
            found[token.content] = i
    if hidden:
        listed = tuple(hidden.get(i, piece) for i, piece in enumerate(pieces))
        contents = piece_vocabulary.model_contents(dataclasses.replace(made.model, pieces=listed))
    ids = {piece.text: i for i, piece in enumerate(pieces)} | specials | found
    bos = made.bos_id if config.bos is None else ids[config.bos]
    return piece_vocabulary.piece_vocabulary(
        contents,
        specials=specials,
        found=found,
        bos_id=None if config.add_bos is False else bos,
        declared_eos=made.declared_eos if config.eos is None else ids[config.eos],
        declared_pad=made.declared_pad if config.pad is None else ids.get(config.pad),
        space_after_special=config.legacy,
    )


def _added(pieces: Sequence[piece_vocabulary.Piece], config: TokenizerConfig) -> dict[int, AddedToken]:
    """The added tokens by id. A token that is named without an id has that of its piece, or the next free id."""
    roles = {token.content for token in config.roles}
    added = {i: token._replace(special=token.special or token.content in roles) for i, token in config.added.items()}
    names = {token.content for token in added.values()}
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    for token in (*config.roles, *config.more):
        i = ids.get(token.content, max([len(pieces) - 1, *added]) + 1)
        plain = i < len(pieces) and (pieces[i].type not in _PLAIN or not looks_like_control(token.content))
        if token.content not in names and not plain:
            added[i] = token
            names.add(token.content)
    return added


def write(
    vocabulary: PieceVocabulary,
    folder: str | os.PathLike[str],
    *,
    model_max_length: int | None = None,
) -> None:
    """Writes `tokenizer.model` and `tokenizer_config.json` into a folder; `read` and transformers read them.

    Args:
        vocabulary: vocabulary to write.
        folder: existing folder.
        model_max_length: number of positions of the model, if known.
    """
    folder = Path(folder)
    special = set(vocabulary.specials.values())
    added = {i: name for name, i in (*vocabulary.specials.items(), *vocabulary.found.items())}
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": vocabulary.space_after_special,
        "add_bos_token": vocabulary.bos_id is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(i): {
                "content": name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": i in special,
            }
            for i, name in sorted(added.items())
        },
    }
    for kind, i in (("bos", vocabulary.bos_id), ("eos", vocabulary.eos_id), ("pad", vocabulary.pad_id)):
        if i is not None:
            config[f"{kind}_token"] = vocabulary.by_id[i].decode()
    config |= {"model_max_length": model_max_length} if model_max_length else {}
    write_whole(folder / "tokenizer.model", vocabulary.contents)
    write_whole(folder / tokenizer_config.NAME, (json.dumps(config, ensure_ascii=False, indent=1) + "\n").encode())
