"""Train a Llama: python train.py --config configs/NAME.py [--config.KEY=VALUE ...]."""

import shlex
import sys

from llama_jax import cli
from llama_jax.config import ConfigError


def main() -> int:
    """Parse, train, and say how to sample from what came of it."""
    run, resume = cli.parse_run(sys.argv)  # before jax is imported: a typo is answered at once

    import jax

    from llama_jax import compilation_cache
    from llama_jax.train.loop import TrainingError, train

    compilation_cache.enable()
    connection = run.distributed
    if connection.coordinator == "auto":
        jax.distributed.initialize()
    elif connection.coordinator:
        jax.distributed.initialize(connection.coordinator, connection.num_processes, connection.process_id)
    try:
        result = train(run, sampler=sampler, resume=resume)
    except TrainingError as error:
        cli.fail(error)
    if jax.process_index() == 0:
        if result.finished:
            print(f"loss: {result.folder / 'loss.png'}\nSample from it with:")
            prompt = shlex.quote(run.log.sample_prompts[0]) if run.log.sample_prompts else '"The"'
            print(f"  python infer.py --model {shlex.quote(str(result.folder))} --prompt {prompt}")
        else:
            again = ["python", *(a for a in sys.argv if a != "--noresume")]
            print(f"The same command goes on from there:\n  {shlex.join(again)}")
    return 0 if result.finished else 143


def sampler(run, params, tokenizer, mesh):
    """A text for each of log.sample_prompts."""
    llama = empty_llama(run, params, tokenizer, mesh)
    llama.set_params(params)
    prompts, length = list(run.log.sample_prompts), run.log.sample_tokens
    results = llama.generate(prompts, max_new_tokens=length, temperature=0.7, top_p=0.9, seed=run.seed)
    llama.set_params(None)  # no second copy of the weights while training goes on
    return [result.text for result in results]


_llamas = {}


def empty_llama(run, params, tokenizer, mesh):
    """The run's one Llama, whose programs are compiled once."""
    from llama_jax import parallel
    from llama_jax.infer.llama import Llama

    if run not in _llamas:
        dtype = parallel.compute_dtype(run.train.compute_dtype)
        _llamas[run] = Llama(run.model, params, tokenizer, mesh=mesh, dtype=dtype)
    return _llamas[run]


if __name__ == "__main__":
    cli.reported(main, ConfigError, ValueError, OSError)
