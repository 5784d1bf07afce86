"""A training loop of your own: the parts of `train`, without checkpoints and logs. Here it stops at a loss.

python examples/own_loop.py
"""

import dataclasses
from pathlib import Path

from llama_jax import parallel
from llama_jax.infer.llama import Llama
from llama_jax.run_config import RunConfig
from llama_jax.train import setup, trainable
from llama_jax.train.loop import to_devices
from llama_jax.train.program import Program

RUN = {
    "output": "runs/own_loop",
    "model": {"name": "tiny", "num_layers": 1},
    "data": {"train": ["README.md"], "sequence_length": 64, "batch_size": 8},
    "optimizer": {"warmup_steps": 5, "learning_rate": 3e-3},
    "train": {"steps": 200, "compute_dtype": "float32"},
}


def main(until: float = 4.0) -> tuple[list[float], Llama]:
    """Train until the loss is below `until`; returns the losses and the model."""
    run = RunConfig.from_dict(RUN)
    Path(run.output).mkdir(parents=True, exist_ok=True)
    program = Program.make(run, parallel.make_mesh(dataclasses.asdict(run.mesh)))  # shapes and compiled steps
    data = setup.load_data(program, Path(run.output), resuming=False)  # tokenizer, rows and batches
    state, frozen = setup.first_state(program), setup.frozen(program).params  # weights, moments and step; a LoRA base
    losses: list[float] = []
    for batch in to_devices(data.loader, program):
        state, metrics = program.train_step(state, frozen, batch)  # the old state is donated
        losses.append(float(metrics["loss"]))
        if losses[-1] < until or len(losses) == program.steps:
            break
    data.loader.close()
    params = trainable.policy(run, state.best, frozen)
    return losses, Llama(run.model, params, data.tokenizer, mesh=program.layout.mesh)


if __name__ == "__main__":
    losses, llama = main()
    print(f"{len(losses)} steps, loss {losses[-1]:.3f}:", llama.generate("The", max_new_tokens=20).text)
