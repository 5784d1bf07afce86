"""Train a Llama: python train.py --config configs/NAME.py [--config.KEY=VALUE ...] (see --help and --keys)."""

import signal
import sys

# Signals wait until `leave` has handlers for them.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

from llama_jax.cli import freed_memory  # noqa: E402

if __name__ == "__main__":
    freed_memory.at_start()

    from llama_jax.cli import exits, train

    exits.leave(train.main, sys.argv[1:])
