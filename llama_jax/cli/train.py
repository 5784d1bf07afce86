"""`train`: a training run from its config file. It imports jax only after its arguments are checked."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax import progress
from llama_jax.cli import exits, freed_memory, plan, recipes, supervise
from llama_jax.cli.exits import CommandError
from llama_jax.cli.parser import program
from llama_jax.cli.run_flags import parse_run_flags
from llama_jax.errors import TRY_AGAIN, ConfigError, brief
from llama_jax.run_config import RunConfig
from llama_jax.train.stop import StopSignal

if TYPE_CHECKING:
    from llama_jax.train.run import Result


def main(argv: Sequence[str]) -> int:
    """Train as the arguments say, and print the command that samples from the model.

    Returns:
        0, or the status of the signal that stopped the run (130 for Ctrl-C). A stopped run can be resumed.
    """
    with StopSignal(owns_process=True) as stop:
        supervised = supervise.is_child()
        run, options = parse_run_flags(argv, command="train")
        if options.plan:
            return plan.of_training(run, options.plan)
        _check_base(run)
        _check_torchrun(run)
        if run.distributed.coordinator and not supervised:
            return supervise.run(stop)

        from llama_jax.parallel import processes

        with exits.unfailing_streams(), processes.connected(run.distributed):
            return _train(run, argv, options.resume, stop)


def _train(run: RunConfig, argv: Sequence[str], resume: bool, stop: StopSignal) -> int:
    import jax

    from llama_jax import compilation_cache
    from llama_jax.parallel import processes
    from llama_jax.train.run import TrainingError, train

    compilation_cache.enable()
    try:
        with open(os.devnull, "w") as nowhere:
            with contextlib.nullcontext() if progress.enabled else contextlib.redirect_stdout(nowhere):
                result = train(run, resume=resume, stop=stop, on_metrics=lambda step, metrics: freed_memory.keep())
    except TrainingError as error:
        raise CommandError(error) from error
    except Exception as error:
        if jax.process_count() > 1 and processes.is_loss(error):
            raise CommandError(supervise.LOST, TRY_AGAIN) from error
        raise
    if jax.process_index() == 0:
        print(_outcome(run, result) if result.finished else _next_command(argv))
    if result.finished and stop.number is None:
        return 0
    return 128 + (stop.number or signal.SIGTERM)  # or another process had the signal


def _check_base(run: RunConfig) -> None:
    """Raises ConfigError if init_from is the run of a recipe that was not trained yet; the error names the recipe."""
    base = Path(run.init_from)
    if base.parent == Path("runs") and not base.exists() and base.name in recipes.names():
        raise ConfigError(
            f"init_from={run.init_from!r} does not exist: train it first with {program('train')} --config {base.name}"
        )


def _check_torchrun(run: RunConfig) -> None:
    """Raises ConfigError under torchrun, whose processes would each be a run of their own in one folder."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and processes != "1" and not run.distributed.coordinator:
        count = processes if processes.isdecimal() else brief(processes)
        raise ConfigError(
            f"torchrun has started {count} processes. One process uses all devices of its host: start it without "
            "torchrun, on several hosts once on each with distributed.coordinator=HOST:PORT, num_processes, process_id"
        )


def _outcome(run: RunConfig, result: Result) -> str:
    """The lines printed after a run: paths of its picture and adapter, and the command that samples from the model."""
    lines = [f"loss: {result.folder / 'loss.png'}"]
    if run.lora.rank:
        lines.append(f"adapter: {result.folder / 'adapter'}")
    flags = result.command()[2:]  # after python infer.py
    return "\n".join([*lines, "Sample from it with:", f"  {program('infer')} {shlex.join(flags)}"])


def _next_command(argv: Sequence[str]) -> str:
    """The command that continues a run."""
    flags = [arg for arg in argv if arg not in ("--noresume", "--no-resume", "--no_resume", "--resume=false")]
    return f"The same command continues from there:\n  {program('train')} {shlex.join(flags)}"
