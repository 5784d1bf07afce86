"""Sample text from a Llama: python infer.py --model PATH --prompt TEXT (see --help)."""

import sys

from llama_jax.infer import cli

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
