"""The profiler of log.profile: a trace of some steps, for xprof, TensorBoard and Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from llama_jax.train.metrics import say


class Profile:
    """Traces the steps of log.profile. Each process writes its own trace.

    Args:
        steps: The first and the last step to trace, or () for none.
        folder: The folder for traces.
    """

    def __init__(self, steps: tuple[int, ...], folder: Path) -> None:
        self._steps, self._folder, self._open = steps, folder, False

    def covers(self, step: int) -> bool:
        """True for a step that is traced: the host waits for it, so that its time is not that of a usual step."""
        return bool(self._steps) and self._steps[0] <= step <= self._steps[1]

    def before(self, step: int, state: Any) -> None:
        """Start the trace if `step` is the first of it. `state` is waited for, so that no earlier step is traced."""
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._open = True

    def after(self, step: int, state: Any) -> None:
        """End the trace if `step` is the last of it. `state` is waited for, so that the step is complete."""
        if self._open and step >= self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """End a trace that is still open, and print where it is."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
            first, last = self._steps
            say(f"profile of steps {first} to {last}: {self._folder} (perfetto_trace.json.gz opens at ui.perfetto.dev)")
