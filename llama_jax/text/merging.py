"""Merge lists and merge orders: when `tokenizers`' rule for BPE and tiktoken's give the same ids, and how.

`tokenizers` and llama.cpp join the two neighbours whose pair comes first in a list of pairs (merges). tiktoken joins
the two whose joint bytes come first in a list of tokens. Both rules see only what is at hand, so that inside a stretch
whose borders no merge has crossed, the merges are those that the stretch would have by itself. Two neighbours are such
a stretch. Hence two pieces that stand side by side and are a token t together are always the same two: the ones that
t by itself is in before it is whole. If that pair is in the merges, both rules join it; and if the tokens stand in the
order of these pairs, both choose the same one at each step. Only where t by itself stays in exactly two pieces, which
no merge joins, would tiktoken join more.
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
        ids: the tokens that text may become, as files spell them (a character a byte), to their ids.
        merges: pairs, the first one first.
        whole_words: a word that is a token is that token, whatever the merges (`ignore_merges`; tiktoken always).

    Returns:
        The tokens in that order (in order of their ids where that serves too), and, without `whole_words`, those that
        are left out since no text becomes them.

    Raises:
        ValueError: a merge names no token, or comes twice.
        ConfigError: no order gives the same ids.
    """
    if sum(len(token) ** 2 for token in ids) > _MAX_WORK:
        raise ConfigError(f"its tokens are too long to check their merges (the longest has {max(map(len, ids))} bytes)")
    index = {pair: i for i, pair in enumerate(merges)}
    wholes = [left + right for left, right in merges]
    if len(index) != len(merges):
        pair = next(pair for i, pair in enumerate(merges) if index[pair] != i)
        raise ValueError(f"merge {brief(pair)} is listed twice")
    if not {left for left, _ in merges} | {right for _, right in merges} | set(wholes) <= ids.keys():
        pair = next(p for p in merges if not {p[0], p[1], p[0] + p[1]} <= ids.keys())
        raise ValueError(f"merge {brief(pair)} joins or makes what is no plain token of the vocabulary")
    if whole_words and _are_every_split(wholes, ids):
        return sorted(ids, key=ids.__getitem__), []
    places = {}
    for token in ids:
        left, last = _merged(token, index)
        if left == 1:
            places[token] = last
        elif left == 2 and whole_words:
            raise ConfigError(
                f"no merge makes the token {brief(token)} of the two pieces that it comes to, though it may be a word; "
                "this cannot be had with merges in order of tokens"
            )
    kept = sorted((t for t in ids if whole_words or t in places), key=ids.__getitem__)
    order = [place for t in kept if (place := places.get(t, -1)) >= 0]
    if order != sorted(order):  # tokens that are never merged may stand anywhere
        kept.sort(key=lambda token: places.get(token, len(merges)))
    return kept, [t for t in ids if not whole_words and t not in places]


def every_split(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The merges that are the same rule as an order of tokens: all pairs of tokens that make a token, in its order."""
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += sorted((p for p in pairs if p[0] in rank and p[1] in rank), key=lambda p: (rank[p[0]], rank[p[1]]))
    return merges


def _are_every_split(wholes: Sequence[str], ids: Mapping[str, int]) -> bool:
    """Whether the merges, which make `wholes`, are those of `every_split` for tokens in the order of their ids.

    Then they are tiktoken's rule as they stand. Trying each token finds the same: 1 s instead of 0.3 for Llama 3.
    """
    made = [ids[token] for token in wholes]
    if made != sorted(made):
        return False
    return len(wholes) == sum(token[:i] in ids and token[i:] in ids for token in ids for i in range(1, len(token)))


def _merged(token: str, index: Mapping[Merge, int]) -> tuple[int, int]:
    """How many pieces the merges leave of a token by itself, and the place of the last merge (-1 without one)."""
    parts, last = list(token), -1
    while len(parts) > 1:
        pairs = [(index[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in index]
        if not pairs:
            break
        last, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return len(parts), last
