"""Sample text from a Llama: python infer.py --model PATH --prompt TEXT (see --help)."""

import sys

from llama_jax.cli import exits, infer

if __name__ == "__main__":
    exits.leave(infer.main, sys.argv[1:])
