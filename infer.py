"""Sample text from a Llama: python infer.py --model PATH --prompt TEXT (see --help)."""

import signal
import sys

# Signals wait until `leave` has handlers for them.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

from llama_jax.cli import exits, infer  # noqa: E402

if __name__ == "__main__":
    exits.leave(infer.main, sys.argv[1:])
