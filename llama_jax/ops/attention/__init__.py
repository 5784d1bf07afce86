"""Attention: a call, and an ordered list of backends that give reasons. The first that does not refuse a call runs it.

    out_BTNH = attention(Call(q_BTNH, k, v, positions_BT, segments_BT, window))
    out_BTNH, cache = over_cache(q_BTNH, k_BTKH, v_BTKH, rotations, positions_BT, window, cache)

Training rows, prefill, decode steps and the planner go through `choose`. To add a backend is to add one file and one
line of BACKENDS (docs/architecture/add-an-attention-backend.md).
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import parallel
from llama_jax.cache import Leaf, QCache, Window, kv_heads, write
from llama_jax.ops import gpu, rope
from llama_jax.ops.attention.call import Call, Target, active_target

__all__ = ["BACKENDS", "Backend", "Call", "Target", "active_target", "attention", "choose", "over_cache"]

_log = logging.getLogger(__name__)


class Backend(NamedTuple):
    """One way to compute attention. Its module is imported at the first call: importing Pallas takes 0.2 s.

    Attributes:
        name: the name in logs and plans.
        platform: the platform that it runs on; "" for all.
        module: the module of this package with its functions `refuses(call, target)` and `attend(call)`.
    """

    name: str
    platform: str
    module: str

    def refuses(self, call: Call, target: Target) -> str:
        """The reason why the backend cannot run a call on a target, in words; "" if it can."""
        return self._functions().refuses(call, target)

    def attend(self, call: Call) -> jax.Array:
        """The result of a call, (B, T, N, H) in the dtype of q. The softmax is computed in float32."""
        return self._functions().attend(call)

    def _functions(self) -> Any:
        return importlib.import_module(f"{__name__}.{self.module}")


# Best first. The last refuses nothing.
BACKENDS = (
    Backend("native", "cpu", "native"),
    Backend("splash", "tpu", "splash"),
    Backend("ragged", "tpu", "ragged"),
    Backend("cudnn", "cuda", "cudnn"),
    Backend("split", "cuda", "split"),
    Backend("flash", "cuda", "flash"),
    Backend("xla", "", "xla"),
)


def choose(call: Call, target: Target) -> tuple[Backend, dict[str, str]]:
    """Chooses the backend that runs a call on a target. Returns it, and the reason why each better one does not."""
    reasons: dict[str, str] = {}
    for backend in BACKENDS:
        if backend.platform in ("", target.platform):
            reason = backend.refuses(call, target)
            if not reason:
                return backend, reasons
            reasons[backend.name] = reason
    raise AssertionError("the last backend refuses nothing")


def attention(call: Call) -> jax.Array:
    """Attention by the first backend that takes the call on the devices of the active layout.

    The choice is logged once per run: as a warning where an accelerator runs plain XLA, else as information.

    Args:
        call: the queries, keys and values with what masks them.

    Returns:
        (B, T, N, H) in the dtype of q. Padding (segment 0) has results that nothing should read.
    """
    repeats = kv_heads(call.k.shape[1], parallel.axis_size("heads")) // call.k.shape[1]
    if call.window is None and repeats > 1:
        call = call._replace(k=_repeated(call.k, repeats), v=_repeated(call.v, repeats))
    target = active_target()
    backend, reasons = choose(call, target)
    plain = backend.platform == "" and target.platform != "cpu"
    text = f"attention of {call.kind} on {target.platform}: {backend.name}"
    because = "".join(f"; not {name}, because {reason}" for name, reason in reasons.items())
    _log_once(logging.WARNING if plain else logging.INFO, text + because)
    return backend.attend(call)


def over_cache(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    rotations: tuple[jax.Array, jax.Array],
    positions_BT: jax.Array,
    window: Window,
    cache: tuple[Leaf, Leaf],
) -> tuple[jax.Array, tuple[Leaf, Leaf]]:
    """Rotates queries and new keys, stores the new keys and values in a cache, and attends to it.

    Args:
        q_BTNH: queries before their rotation.
        k_BTKH: new keys before their rotation.
        v_BTKH: new values.
        rotations: cosines and sines of `rope.rotations`.
        positions_BT: position of each query.
        window: the part of the cache that is written and read.
        cache: keys and values of one layer.

    Returns:
        The attention (B, T, N, H) in the dtype of q, and the cache with the new keys and values.
    """
    if _in_one_launch(q_BTNH, k_BTKH, cache[0]):
        with jax.named_scope("attend"):
            return gpu.decode.attend(q_BTNH, k_BTKH, v_BTKH, rotations, positions_BT, window, cache)
    with jax.named_scope("rope"):
        q_BTNH, k_BTKH = rope.rotate(q_BTNH, *rotations), rope.rotate(k_BTKH, *rotations)
    with jax.named_scope("cache"):
        cache = (write(cache[0], k_BTKH, window), write(cache[1], v_BTKH, window))
    with jax.named_scope("attend"):
        return attention(Call(q_BTNH, *cache, positions_BT, None, window)), cache


def _in_one_launch(q_BTNH: jax.Array, k_BTKH: jax.Array, leaf: Leaf) -> bool:
    if parallel.device_platform() != "cuda" or gpu.decode.refuses(q_BTNH, k_BTKH, leaf):
        return False
    kind = gpu.decode.kind("int8" if isinstance(leaf, QCache) else "compute")
    taken = gpu.faster(kind)
    if taken:
        _log_once(logging.INFO, "attention of decoding on cuda: one launch")
    return taken


def _repeated(k_BKSH: Any, repeats: int) -> jax.Array:
    return parallel.constrain(jnp.repeat(k_BKSH, repeats, axis=1), "batch", "kv_heads", "length", None)


@functools.cache
def _log_once(level: int, text: str) -> None:
    _log.log(level, text)
