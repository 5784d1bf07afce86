"""The processes of one run on several hosts: their connection, barriers, and the detection of a lost process.

jax is imported inside functions, since `train.py` checks its arguments before it imports jax.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from llama_jax.errors import TRY_AGAIN
from llama_jax.run_keys import DistributedConfig

# A process that is silent for this long is lost: its host has crashed, or the network. jax sends two in this time, so
# that a machine that is busy at the start may delay one by half of it.
_HEARTBEAT_S = 16
_MEETING_S = 24 * 3600  # processes may compile for hours, and a lost one ends the others anyway
_meetings = itertools.count()
# Words in the errors of collectives whose other side is gone.
_LOSS = ("Gloo", "NCCL", "CoordinationService", "coordination service", "UNAVAILABLE", "Connection reset", "peer")


@contextlib.contextmanager
def connected(connection: DistributedConfig) -> Iterator[None]:
    """A context in which this process is connected to the other processes of its run, if there are others.

    A process that waits longer than `connection.timeout_seconds` for the others exits with status 75 and one line.
    """
    if not connection.coordinator:
        yield
        return
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which StopSignal has
    here = threading.Event()
    threading.Thread(target=_exit_when_late, args=(here, connection), name="connect", daemon=True).start()
    named: dict[str, Any] = {}
    if connection.coordinator != "auto":
        named = {
            "coordinator_address": connection.coordinator,
            "num_processes": connection.num_processes,
            "process_id": connection.process_id,
        }
    timeout = int(connection.timeout_seconds) + 60  # of the runtime, which aborts
    jax.distributed.initialize(**named, initialization_timeout=timeout, heartbeat_timeout_seconds=_HEARTBEAT_S)
    here.set()
    jax.devices()
    _write_caches()
    yield
    with contextlib.suppress(RuntimeError):  # another process has ended before
        jax.distributed.shutdown()


def barrier(name: str) -> None:
    """Returns when every process has called it with the same name. Any thread may call it, once for each name."""
    import jax
    from orbax.checkpoint import multihost

    if jax.process_count() > 1:
        multihost.get_barrier_sync_fn()(key=f"llama_jax {name}", timeout_ms=1000 * _MEETING_S)


def meet(place: str) -> None:
    """A barrier of the main threads, which all come to the same places in the same order.

    Call it before a collective that some processes may reach much later than others, since collectives time out.
    """
    barrier(f"{place} {next(_meetings)}")


def number() -> int | None:
    """The number of this process, or None if it is the only one."""
    import jax

    return jax.process_index() if jax.process_count() > 1 else None


def agreed(decision: int) -> int:
    """The decision of process 0, in every process. All must call it."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return decision
    meet("decision")
    return int(multihost_utils.broadcast_one_to_all(np.int32(decision)))


def compiled_together(function: Any, name: str) -> Callable[..., Any]:
    """A jitted function that is compiled by every process before any of them runs it.

    Otherwise a process that has it in its compilation cache would time out in a collective while another still
    compiles. The shapes of its arguments must not change.
    """
    import jax

    if jax.process_count() == 1:
        return function
    compiled: Any = None

    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = function.lower(*arguments).compile()
            meet(name)
        return compiled(*arguments)

    return call


def is_loss(error: Exception) -> bool:
    """True if an error of jax, or one that follows from it, reports that another process was lost."""
    import jax

    kinds = (ValueError, RuntimeError, jax.errors.JaxRuntimeError)
    return any(
        type(each) in kinds and any(word in str(each) for word in _LOSS) for each in (error, error.__cause__) if each
    )


def _exit_when_late(here: threading.Event, connection: DistributedConfig) -> None:
    if here.wait(connection.timeout_seconds):
        return
    others = f"all {connection.num_processes} processes" if connection.coordinator != "auto" else "all processes"
    line = (
        f"error: not {others} of the run have connected to distributed.coordinator={connection.coordinator!r} within "
        f"{connection.timeout_seconds:g} s: start them together, or raise distributed.timeout_seconds\n"
    )
    sys.stdout.flush()
    os.write(2, line.encode())
    os._exit(TRY_AGAIN)


def _write_caches() -> None:
    """Lets every process write to its compilation cache. By default only process 0 does, whose disk others may lack."""
    from jax._src import compiler

    class Distributed:
        """A stand-in for jax's module `distributed`, in which this process is number 0, which writes the cache."""

        class global_state:  # noqa: N801
            process_id = 0
            client = None

    with contextlib.suppress(AttributeError):
        setattr(compiler, "distributed", Distributed)  # noqa: B010  (it stands for a module)
