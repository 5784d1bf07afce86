"""The start of the program `llama-jax COMMAND ...`, which is also `python -m llama_jax COMMAND ...`."""

import signal
import sys


def entry() -> None:
    """Run the program with the arguments of this process, and exit."""
    # Signals wait until `leave` has handlers for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    from llama_jax.cli import freed_memory

    if sys.argv[1:2] == ["train"]:
        freed_memory.at_start()

    from llama_jax.cli import commands, exits

    exits.leave(commands.main, sys.argv[1:])


if __name__ == "__main__":
    entry()
