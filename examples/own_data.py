"""A data set of your own: any iterable of records. This one makes dialogs that teach addition, without any file.

python examples/own_data.py
"""

from collections.abc import Iterator
from typing import Any

from llama_jax.train.run import Result, train

RUN = {
    "output": "runs/own_data",
    "model": {"name": "tiny", "num_layers": 1},
    "data": {"sequence_length": 128, "batch_size": 8},
    "optimizer": {"warmup_steps": 5, "learning_rate": 3e-3},
    "train": {"epochs": 4, "compute_dtype": "float32"},
    "log": {"eval_every": 10},
}


class Sums:
    """Questions and answers about the sums a + b with a in `numbers` and b from 0 to 9."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records, in the form of OpenAI's messages. docs/reference/records.md has the other forms."""
        for a, b in ((a, b) for a in self.numbers for b in range(10)):
            question, answer = {"role": "user", "content": f"{a} + {b}?"}, {"role": "assistant", "content": f"{a + b}"}
            yield {"messages": [question, answer]}


def main() -> Result:
    """Train on some numbers, and evaluate on others."""
    return train(RUN, records=Sums(range(20)), validation_records=Sums(range(20, 24)))


if __name__ == "__main__":
    print(main().validation_losses)
