"""Attention: a call, and an ordered list of backends that give reasons. The first that does not refuse a call runs it.

    out_BTNH = attention(Call(q_BTNH, k, v, positions_BT, segments_BT, window))

Training rows, prefill, decode steps and the planner go through `choose`; only the kernels for whole layers of ops/gpu
and ops/cpu do not. To add a backend is to add one file and one line of BACKENDS
(docs/architecture/add-an-attention-backend.md).
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import parallel
from llama_jax.cache import kv_heads
from llama_jax.ops.attention.call import Call, Target, active_target

__all__ = ["BACKENDS", "Backend", "Call", "Target", "active_target", "attention", "choose"]

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


def _repeated(k_BKSH: Any, repeats: int) -> jax.Array:
    return parallel.constrain(jnp.repeat(k_BKSH, repeats, axis=1), "batch", "kv_heads", "length", None)


@functools.cache
def _log_once(level: int, text: str) -> None:
    _log.log(level, text)
