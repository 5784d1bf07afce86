"""Mutated checkpoints: each must open, or be refused in one line, at once and in bounded memory.

    PYTHONPATH=.:tests python -m helpers.fuzz gguf --count 30000 --seed 1

opens so many mutations of a valid model of one format, and prints the outcomes. tests/weights/test_hostile.py runs it.
"""

import argparse
import collections
import json
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 5  # of one file, before it counts as hanging
SPARE = 64 << 20  # bytes of memory beyond the file's size
# Numbers that lengths, counts and offsets are most often wrong by.
EDGES = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    1 << 20,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The data with one to four changes, mostly in headers."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not out:
            break
        near = rng.choice((64, 1024, len(out)))
        at = (
            rng.randrange(min(near, len(out)))
            if rng.random() < 0.6
            else len(out) - 1 - rng.randrange(min(near, len(out)))
        )
        kind = rng.randrange(8)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + rng.randrange(1, 9)]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 5:
            width = rng.choice((1, 2, 4, 8))
            out[at : at + width] = (rng.choice(EDGES) % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 6:
            end = min(len(out), at + rng.randrange(1, 64))
            out[at:at] = out[at:end]
        else:
            other = rng.randrange(len(out))
            out[at : at + 16] = out[other : other + 16]
    return bytes(out)


def mutated_text(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with one value changed, or with its bytes changed as those of any file."""
    if rng.random() < 0.3:
        return mutated(data, rng)
    values = json.loads(data)
    key = rng.choice(list(values))
    odd = [None, True, -1, 0, 1, 1.5, 1 << 31, 1 << 70, 1e300, float("nan"), "", "x" * 99, [], {}, [[[1]]], {"a": {}}]
    values[key] = rng.choice(odd)
    return json.dumps(values).encode()


def attempt(path: Path) -> str:
    """Open a model and read every tensor of it; "opened", or the line that refuses it."""
    from llama_jax.weights.open import open_source

    try:
        source = open_source(path)
        source.tokenizer()
        for entry in source.leaves.values():
            entry.read()
        return "opened"
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and 10 < len(text) < 1000, text
        return "refused: " + " ".join(word for word in text.split()[1:5] if word.isalpha())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("format", choices=["hf", "meta", "gguf"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from helpers.sound import make_sound

    folder = Path(tempfile.mkdtemp())
    model = make_sound(folder, options.format)
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".pth", ".gguf", ".json"))
    sound = {p: p.read_bytes() for p in files}
    assert attempt(model) == "opened"
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("hangs: " + str(folder)))
    before, outcomes, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, collections.Counter(), 0.0
    for number in range(options.count):
        rng = random.Random(f"{options.format} {options.seed} {number}")
        path = rng.choice([p for p in files if p.suffix != ".json"] * 4 + files)
        change = mutated_text if path.suffix == ".json" else mutated
        path.write_bytes(change(sound[path], rng))
        signal.alarm(SECONDS)
        start = time.perf_counter()
        try:
            outcomes[attempt(model)] += 1
        except BaseException as error:
            print(f"{options.format} --seed {options.seed}, number {number}: {error!r}", file=sys.stderr)
            raise
        slowest = max(slowest, time.perf_counter() - start)
        signal.alarm(0)
        path.write_bytes(sound[path])
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < SPARE + max(map(len, sound.values())), f"number {number}: {grown:,} bytes more memory"
    print(json.dumps({"slowest": round(slowest, 3), "grown": grown, "outcomes": outcomes.most_common()}, indent=1))


if __name__ == "__main__":
    main()
