"""Merge lists and merge orders: the conditions under which `tokenizers`' rule for BPE and tiktoken's give the same ids.

`tokenizers` and llama.cpp join the two neighbours whose pair comes first in a list of pairs (merges). tiktoken joins
the two neighbours whose joint bytes come first in a list of tokens.

The two rules agree for the following reason. A merge depends only on the pieces that it joins. Within a stretch whose
borders no merge has crossed, the merges are therefore those that the stretch would have alone. Two neighbours are such
a stretch. If two neighbours form a token t, they are always the same two: the last two pieces of t alone before t is
complete. If this pair is among the merges, both rules join it. If the tokens are ordered by these pairs, both rules
choose the same pair at each step. They differ only if t alone ends in exactly two pieces that no merge joins: tiktoken
would join them.
"""

from collections.abc import Mapping, Sequence

from llama_jax.errors import ConfigError, brief

Merge = tuple[str, str]

_MAX_WORK = 25_000_000  # the sum of squared lengths; 7.4 million in Llama 3


def in_merge_order(
    ids: Mapping[str, int], merges: Sequence[Merge], *, whole_words: bool
) -> tuple[list[str], list[str]]:
    """The order of tokens in which tiktoken's rule gives the ids that the merges give, on every text.

    Args:
        ids: ids of the tokens that text may become, by the token's spelling in files (one character a byte).
        merges: pairs of tokens, the first merge first.
        whole_words: True if a word that is a token is encoded as it, even without merges that form it
            (`ignore_merges`). tiktoken always does so.

    Returns:
        The tokens in that order, which is the order of ids if possible; and the tokens that are not in it, because no
        text is encoded to them (only without `whole_words`).

    Raises:
        ValueError: a merge has a part that is not a token, or is listed twice.
        ConfigError: no order gives the same ids.
    """
    if sum(len(token) ** 2 for token in ids) > _MAX_WORK:
        raise ConfigError(f"the tokens are too long to check their merges (the longest has {max(map(len, ids))} bytes)")
    index = {pair: i for i, pair in enumerate(merges)}
    wholes = [left + right for left, right in merges]
    if len(index) != len(merges):
        pair = next(pair for i, pair in enumerate(merges) if index[pair] != i)
        raise ValueError(f"merge {brief(pair)} is listed twice")
    if not {left for left, _ in merges} | {right for _, right in merges} | set(wholes) <= ids.keys():
        pair = next(p for p in merges if not {p[0], p[1], p[0] + p[1]} <= ids.keys())
        raise ValueError(f"merge {brief(pair)} has a part or a result that is not a plain token of the vocabulary")
    if whole_words and _are_every_split(wholes, ids):
        return sorted(ids, key=ids.__getitem__), []
    places = {}
    for token in ids:
        left, last = _merged(token, index)
        if left == 1:
            places[token] = last
        elif left == 2 and whole_words:
            raise ConfigError(
                f"token {brief(token)} may be a whole word, but no merge forms it from its last two pieces, so that no "
                "order of tokens gives the same ids"
            )
    kept = sorted((t for t in ids if whole_words or t in places), key=ids.__getitem__)
    order = [place for t in kept if (place := places.get(t, -1)) >= 0]
    if order != sorted(order):  # tokens that no merge makes may have any place
        kept.sort(key=lambda token: places.get(token, len(merges)))
    return kept, [t for t in ids if not whole_words and t not in places]


def every_split(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The merges that are equivalent to an order of tokens: all pairs of tokens that form a token, in its order."""
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += sorted((p for p in pairs if p[0] in rank and p[1] in rank), key=lambda p: (rank[p[0]], rank[p[1]]))
    return merges


def _are_every_split(wholes: Sequence[str], ids: Mapping[str, int]) -> bool:
    """True if the merges, which make the tokens `wholes`, are those of `every_split` in the order of ids.

    They are then equivalent to tiktoken's rule. The check takes 0.3 s for Llama 3; encoding each token takes 1 s.
    """
    made = [ids[token] for token in wholes]
    if made != sorted(made):
        return False
    return len(wholes) == sum(token[:i] in ids and token[i:] in ids for token in ids for i in range(1, len(token)))


def _merged(token: str, index: Mapping[Merge, int]) -> tuple[int, int]:
    """The number of pieces of a token after all merges, and the position of the last merge (-1 for none)."""
    parts, last = list(token), -1
    while len(parts) > 1:
        pairs = [(index[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in index]
        if not pairs:
            break
        last, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return len(parts), last
