"""A KV cache of scattered pages: another kind of `llama_jax.cache`, which a test puts in its place.

    python -m helpers.pages      runs requests with it, and compares them with the full forward pass

A pool of pages a layer, and a table of the pages of each row. Only what a dense cache does too is there: the pages of a
row are its own, and are scattered over the pool so that no slot of a row is where a dense cache has it.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PAGE = 32
Leaf = jax.Array


class QCache:
    """A kind of leaf that this cache does not have."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A pool (pages, K, PAGE, H) for each layer, and the pages (rows, pages of a row) of each row."""

    k: tuple[Leaf, ...]
    v: tuple[Leaf, ...]
    table: jax.Array

    @property
    def rows(self):
        return self.table.shape[0]

    @property
    def capacity(self):
        return self.table.shape[1] * PAGE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """The page and the slot of each new token, and the pages that are read."""

    positions_BT: jax.Array
    pages_BT: jax.Array
    read_BP: jax.Array

    @property
    def key_positions_BS(self):
        B, P = self.read_BP.shape
        return jnp.broadcast_to(jnp.arange(P * PAGE), (B, P * PAGE))


def init_cache(config, *, batch, capacity, dtype, kv="compute"):
    pages = batch * capacity // PAGE
    pool = jnp.zeros((pages, config.num_kv_heads, PAGE, config.head_dim), dtype)
    table = jnp.asarray(np.random.default_rng(0).permutation(pages).reshape(batch, -1), jnp.int32)
    layers = range(config.num_layers)
    return KVCache(tuple(pool for _ in layers), tuple(pool for _ in layers), table)


def constrained(tree: Any):
    return tree


def shardings(layout, shapes):
    raise NotImplementedError("one device")


def kv_heads(heads, parts):
    return heads


def dtype_in_place(leaf):
    return None


def window(cache, positions_BT, live_BT, *, bound=None):
    pages_BT = jnp.take_along_axis(cache.table, positions_BT // PAGE, axis=1, mode="clip")
    live_BT = jnp.ones_like(positions_BT, bool) if live_BT is None else live_BT
    live_BT &= positions_BT < cache.capacity
    bound = cache.capacity if bound is None else min(bound, cache.capacity)
    pages_BT = jnp.where(live_BT, pages_BT, cache.k[0].shape[0])  # beyond the pool: dropped
    return Window(positions_BT, pages_BT, cache.table[:, : -(-bound // PAGE)])


def write(leaf, new_BTKH, at):
    return leaf.at[at.pages_BT, :, at.positions_BT % PAGE].set(new_BTKH.astype(leaf.dtype), mode="drop")


def read(leaf, at, dtype):
    pages_BPKSH = leaf[at.read_BP]
    B, P, K, _, H = pages_BPKSH.shape
    return pages_BPKSH.swapaxes(1, 2).reshape(B, K, P * PAGE, H).astype(dtype)


def take_rows(cache, rows_R, *, bound):
    """A cache of its own: the pages of these rows, one row after the other."""
    table_RP = jnp.take(cache.table, rows_R, axis=0, mode="clip")[:, : -(-bound // PAGE)]
    k, v = jax.tree.map(lambda pool: pool[table_RP.reshape(-1)], (cache.k, cache.v))
    return KVCache(k, v, jnp.arange(table_RP.size, dtype=jnp.int32).reshape(table_RP.shape))


def put_rows(cache, part, rows_R):
    count = min(part.table.shape[1], cache.table.shape[1])
    into_RP = jnp.take(cache.table, rows_R, axis=0, mode="clip")[:, :count]
    into_RP = jnp.where((rows_R < cache.rows)[:, None], into_RP, cache.k[0].shape[0])
    from_RP = part.table[:, :count]

    def put(pool, own):
        return pool.at[into_RP.reshape(-1)].set(own[from_RP.reshape(-1)], mode="drop")

    return dataclasses.replace(
        cache,
        k=tuple(map(put, cache.k, part.k)),
        v=tuple(map(put, cache.v, part.v)),
    )


def resized(array, rows_R, *, capacity):
    """The pool only grows. In the table, new rows and longer ones get pages that no kept row has."""
    rows, wanted = rows_R.shape[0], rows_R.shape[0] * capacity // PAGE
    if array.ndim == 4:
        return jnp.pad(array, [(0, max(0, wanted - array.shape[0])), (0, 0), (0, 0), (0, 0)])
    width = min(array.shape[1], capacity // PAGE)
    kept_RP = jnp.take(array, rows_R, axis=0, mode="clip")[:, :width]
    kept_RP = jnp.where((rows_R < array.shape[0])[:, None], kept_RP, -1)
    table_RP = jnp.pad(kept_RP, [(0, 0), (0, capacity // PAGE - width)], constant_values=-1)
    pages = max(wanted, array.size)  # the pool has at least as many as the table before
    taken = jnp.zeros(pages + 1, bool).at[jnp.where(table_RP < 0, pages, table_RP)].set(True)[:-1]
    free = jnp.argsort(taken)  # free pages first
    place_RP = jnp.cumsum((table_RP < 0).reshape(-1)).reshape(rows, -1) - 1
    return jnp.where(table_RP < 0, free[place_RP], table_RP).astype(jnp.int32)


def main():
    sys.modules["llama_jax.cache"] = sys.modules[__name__]  # before any other module of the package
    from helpers.inference import check_greedy, engine, new_program, prompt, request, run
    from llama_jax.infer.scheduler import Scheduler

    assert sys.modules["llama_jax.model"].KVCache is KVCache
    scheduler = Scheduler(engine(new_program()), rows=4)
    few_shot = prompt(70)
    first = [request(n) for n in (3, 40, 100, 9, 65)]
    alike = [dataclasses.replace(request(7, which=i), tokens=few_shot + prompt(7, i)) for i in range(3)]
    for requests in (first, alike, [request(150)]):  # the last needs more capacity
        rows, last = run(requests, on=scheduler)
        check_greedy(requests, rows)
        print([event.reused for event in last])
    print("equal")


if __name__ == "__main__":
    main()
