"""Accuracy of configs/sft_quickstart.py: trains the model and asks it every question of its validation set greedily.

    python train.py --config configs/quickstart.py && python benchmarks/sft_quickstart.py

Flags after `--` are passed to train.py (`-- --config.train.steps=600`). An answer counts as exact if it equals the
reference. It counts as essentially right if it has at least 80 % of the reference's words and the reference has at
least 80 % of its words.

`--prompts FILE` only writes the questions with their answers, as `python -m llama_jax eval compare` reads them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def shared(answer: str, reference: str) -> float:
    """The fraction of the words of the longer text that both texts have. Repeated words count repeatedly."""
    a, b = Counter(answer.split()), Counter(reference.split())
    return (a & b).total() / max(a.total(), b.total(), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder that was trained already")
    parser.add_argument("--prompts", type=Path, help="a .jsonl to write")
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    from llama_jax.data import questions

    dialogs = [dialog.messages for dialog in questions.dialogs(questions.PARTS[1])]
    asked, references = [m[0]["content"] for m in dialogs], [m[1]["content"] for m in dialogs]
    if options.prompts:
        kinds = [answer.split("`")[1].partition(".")[0] for answer in references]  # module, or the builtin's name
        usual = {kind for kind, _ in Counter(kinds).most_common(6)}
        lines = [
            json.dumps({"prompt": q, "reference": a, "category": kind if kind in usual else "others"})
            for q, a, kind in zip(asked, references, kinds, strict=True)
        ]
        options.prompts.write_text("\n".join(lines) + "\n")
        return
    folder = options.model or tempfile.mkdtemp()
    if not options.model:
        start = time.perf_counter()
        command = ["train.py", "--config", "configs/sft_quickstart.py", f"--config.output={folder}", *options.flags]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        print(f"train.py took {time.perf_counter() - start:.0f} s from start to end")

    import llama_jax

    llama = llama_jax.load(folder)
    ids = [llama.encode_dialog(messages[:1]) for messages in dialogs]
    results = llama.generate(ids, max_new_tokens=64, temperature=0, batch_size=32, progress=False)
    answers = [result.text for result in results]
    exact = sum(a == r for a, r in zip(answers, references, strict=True))
    near = sum(shared(a, r) >= 0.8 for a, r in zip(answers, references, strict=True))
    print(f"{len(answers)} questions: exact {exact / len(answers):.1%}, 80 % of words {near / len(answers):.1%}")
    for i in random.Random(0).sample(range(len(answers)), 10):
        mark = "=" if answers[i] == references[i] else "~" if shared(answers[i], references[i]) >= 0.8 else "x"
        print(f"{mark} {asked[i]}\n    {answers[i]}")
        if mark != "=":
            print(f"    ({references[i]})")


if __name__ == "__main__":
    main()
