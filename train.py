"""Train a Llama: python train.py --config configs/NAME.py [--config.KEY=VALUE ...]."""

import shlex
import sys
from pathlib import Path

from llama_jax import cli
from llama_jax.errors import ConfigError


def main() -> int:
    """Parse the arguments, train, and print the command that samples from the model."""
    run, resume = cli.parse_run(sys.argv)  # before jax is imported: a typo is answered at once
    base = Path(run.init_from)
    recipe = Path("configs", f"{base.name}.py")  # runs/NAME is what configs/NAME.py makes
    if base.parent == Path("runs") and not base.exists() and recipe.exists():
        cli.fail(f"init_from={run.init_from!r} is not there yet: train it first with python train.py --config {recipe}")

    import jax

    from llama_jax import compilation_cache
    from llama_jax.train.run import TrainingError, train

    compilation_cache.enable()
    connection = run.distributed
    if connection.coordinator == "auto":
        jax.distributed.initialize()
    elif connection.coordinator:
        jax.distributed.initialize(connection.coordinator, connection.num_processes, connection.process_id)
    try:
        result = train(run, resume=resume)
    except TrainingError as error:
        cli.fail(error)
    if jax.process_index() == 0:
        if result.finished:
            adapter = f"adapter: {result.folder / 'adapter'}\n" if run.lora.rank else ""
            print(
                f"loss: {result.folder / 'loss.png'}\n{adapter}Sample from it with:\n  {shlex.join(result.command())}"
            )
        else:
            again = ["python", *(a for a in sys.argv if a != "--noresume")]
            print(f"The same command continues from there:\n  {shlex.join(again)}")
    return 0 if result.finished else 143


if __name__ == "__main__":
    cli.reported(main, ConfigError, ValueError, OSError)
