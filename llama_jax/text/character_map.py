"""Checks of compiled character maps, which have the character replacements of SentencePiece's normalizers."""

import numpy as np

from llama_jax.errors import ConfigError

_MAX_REPLACEMENT = 256  # bytes; NFKC's longest replacement has 33


def check(data: bytes) -> None:
    """Raises ConfigError for a compiled character map with very long replacements or an index outside the map.

    The map is the length of a trie in 4 bytes, the trie, and replacements that end with a zero byte each. The trie is a
    double array of darts-clone (github.com/s-yata/darts-clone): a unit of 32 bits either holds the place of a
    replacement, or leads to the units at its own index xor its offset xor a byte. The library follows these indices
    without checking them.
    """
    if not data:
        return
    length = int.from_bytes(data[:4], "little")
    replacements = data[4 + length :]
    if not 0 < length <= len(data) - 4 or length % 1024 or not replacements.endswith(b"\0"):
        raise ConfigError("the character map of the normalizer is damaged")
    units = np.frombuffer(data, "<u4", length // 4, offset=4).astype(np.int64)
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    is_place = units >> 31 == 1
    furthest = (np.arange(len(units)) ^ offsets) | 0xFF
    if (furthest[~is_place] >= len(units)).any() or ((units[is_place] & 0x7FFFFFFF) >= len(replacements)).any():
        raise ConfigError("the character map of the normalizer is damaged")
    longest = max(map(len, replacements.split(b"\0")))
    if longest > _MAX_REPLACEMENT:
        raise ConfigError(f"the normalizer replaces a character by {longest:,} bytes; {_MAX_REPLACEMENT} is the limit")
