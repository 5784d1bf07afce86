"""Train a Llama: python train.py --config configs/NAME.py [--config.KEY=VALUE ...]."""

import shlex
import sys
from pathlib import Path

from llama_jax import cli
from llama_jax.errors import ConfigError


def main() -> int:
    """Parse, train, and say how to sample from what came of it."""
    run, resume = cli.parse_run(sys.argv)  # before jax is imported: a typo is answered at once
    base = Path(run.init_from)
    recipe = Path("configs", f"{base.name}.py")  # runs/NAME is what configs/NAME.py makes
    if base.parent == Path("runs") and not base.exists() and recipe.exists():
        cli.fail(f"init_from={run.init_from!r} is not there yet: train it first with python train.py --config {recipe}")

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
        result = train(run, sampler=make_sampler(), resume=resume)
    except TrainingError as error:
        cli.fail(error)
    if jax.process_index() == 0:
        if result.finished:
            adapter = f"adapter: {result.folder / 'adapter'}\n" if run.lora.rank else ""
            print(f"loss: {result.folder / 'loss.png'}\n{adapter}Sample from it with:")
            flag = "--ask" if run.log.sample_as == "chat" else "--prompt"
            prompt = (*run.log.sample_prompts, "The")[0]
            print(f"  {shlex.join(['python', 'infer.py', '--model', str(result.folder), flag, prompt])}")
        else:
            again = ["python", *(a for a in sys.argv if a != "--noresume")]
            print(f"The same command goes on from there:\n  {shlex.join(again)}")
    return 0 if result.finished else 143


def make_sampler():
    """A function of a run's weights as they are to what follows each of log.sample_prompts, compiled once."""
    llama = None

    def sample(run, params, tokenizer, mesh):
        from llama_jax import parallel
        from llama_jax.infer.llama import Llama

        nonlocal llama
        if llama is None:
            dtype = parallel.compute_dtype(run.train.compute_dtype)
            llama = Llama(run.model, params, tokenizer, mesh=mesh, dtype=dtype)
        else:
            llama.set_params(params)
        prompts, length = list(run.log.sample_prompts), run.log.sample_tokens
        if run.log.sample_as == "chat":
            asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = [tokenizer.encode_dialog(messages, add_generation_prompt=True) for messages in asked]
        results = llama.generate(prompts, max_new_tokens=length, temperature=0.7, top_p=0.9, seed=run.seed)
        llama.set_params(None)  # no second copy of the weights while training goes on
        return [result.text for result in results]

    return sample


if __name__ == "__main__":
    cli.reported(main, ConfigError, ValueError, OSError)
