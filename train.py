"""Train a Llama: python train.py --config configs/NAME.py [--config.KEY=VALUE ...] (see --help and --keys)."""

import sys

from llama_jax.cli import exits, train

if __name__ == "__main__":
    exits.leave(train.main, sys.argv[1:])
