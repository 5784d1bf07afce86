"""Regenerate harness.json: answers of EleutherAI's own HFLM (lm_eval with transformers and torch) for a small Llama.

    pip install torch transformers lm_eval -r requirements-dev.txt     # the reference environment
    PYTHONPATH=.:tests python tests/golden/make_harness.py

The harness' own tests of a model (its tests/models/test_huggingface.py) ask EleutherAI/pythia-70m for log-likelihoods
of multiple choices, rolling ones, texts up to their stops, and ids. The same kinds of requests are put here to a Llama
whose weights make_model.py draws by name. Its vocabulary is learned from TEXT and kept in the file, so that tests train
none. HFLM alone makes every number of the file.

HFLM's cache of logits is off: in lm_eval 0.4.13 it answers a shorter one of two requests that are read alike, such as
("The river", " rises") next to ("", "The river rises"), from the first place of the longer one instead of the last.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import llama_jax
from golden.make_model import random_weights
from helpers.folders import make_folder
from llama_jax.config import SIZES
from llama_jax.text.bpe_training import train_bpe
from llama_jax.text.tokenizer import Tokenizer

GOLD = Path(__file__).parent / "harness.json"
VOCAB = 600
CONFIG = dataclasses.replace(SIZES["tiny"], vocab_size=VOCAB, max_seq_len=64, rope_scaling=None)
TEXT = (
    "The river rises in the northern hills and runs for three hundred miles before it meets the sea. Its water is cold "
    "in every season, and the towns along the banks were built where the ferries could land. Question: which of these "
    "is the longest river in the country? Answer: the one that rises in the north. When the bridge was finished in the "
    "spring, the ferries stopped running, and the old men on the quay said that nothing would be the same again."
)
QUESTION = "Question: which of these is the longest river?\nAnswer:"
LONG = " ".join([TEXT] * 2)
# The choices of a question, an empty context, white space at the end of one, names of control tokens, text beyond
# ASCII, and contexts longer than the model, once by a little and once by far.
PAIRS = [
    *((QUESTION, f" {choice}") for choice in ("the north", "the sea", "A", "B", "C", "D")),
    ("", "The river rises"),
    ("", " "),
    ("The river ", "rises"),
    ("The river \n ", "  rises"),
    ("<|begin_of_text|>The river", " rises<|eot_id|>"),
    ("Où est l'été ? 日本", " ça va, ü"),
    (TEXT[:150], " and the towns along the banks were built"),
    (LONG, " the sea. " + TEXT[:60]),
    ("x", "y"),
]
ROLLING = ["The river", TEXT, LONG, "é", "日本 is not in the hills. " * 9, ""]
CONTEXTS = ["The river rises", QUESTION, "", LONG, "Its water is cold", "日本", "The sea", "The"]
DIALOG = [
    {"role": "system", "content": "Be short. "},
    {"role": "user", "content": "Which river?\n"},
    {"role": "assistant", "content": "The one "},
]


def make_model(folder: Path, ranks: dict[bytes, int]) -> Path:
    """The model as a Hugging Face folder that transformers loads. Of control tokens it only says the one that ends.

    HFLM would stop at a stop string within the name of another (the d of reserved_special_token_0), which is not text.
    """
    weights = random_weights(CONFIG)
    end = Tokenizer.from_ranks(ranks).eos_id
    weights["lm_head.weight"][[i for i in range(len(ranks), VOCAB) if i != end]] = 0
    plain = make_folder(folder / "plain", CONFIG, weights)
    Tokenizer.from_ranks(ranks).save_to(plain)
    return llama_jax.load(plain, dtype="float32").save(folder / "hf", "hf")


def instances(kind: str, requests: list[tuple]) -> list[Any]:
    """lm_eval's own form of requests."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, copy.deepcopy(args), i) for i, args in enumerate(requests)]


def _inside(text: str) -> str:
    """Two characters from the middle of a generated text, as a stop string; "." if the text is too short."""
    return text[len(text) // 2 :][:2] or "."


def main() -> None:
    """Write harness.json next to this file."""
    from lm_eval.models.huggingface import HFLM

    ranks = train_bpe([TEXT], vocab_size=VOCAB)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(Path(scratch), ranks)
        lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, logits_cache=False)
        scores = lm.loglikelihood(instances("loglikelihood", PAIRS))
        rolling = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in ROLLING]))
        settings: list[dict[str, Any]] = [{"until": [], "max_gen_toks": 24} for _ in CONTEXTS]
        free = lm.generate_until(instances("generate_until", list(zip(CONTEXTS, settings, strict=True))))
        asks = list(zip(CONTEXTS, settings, strict=True))
        for context, text in zip(CONTEXTS, free, strict=True):
            asks.append((context, {"until": [_inside(text), "\n\n"], "max_gen_toks": 24}))
            asks.append((context, {"until": _inside(text)[0], "max_new_tokens": 24, "do_sample": False}))
        texts = lm.generate_until(instances("generate_until", asks))
        greedy = []  # token by token: what is_greedy says of a text, and of one that differs in its last token
        for context in CONTEXTS[:2]:
            ids = lm.tok_encode(context)
            out = lm._model_generate(_tensor(ids), max_length=len(ids) + 9, stop=[])[0, len(ids) :].tolist()
            for tail in (out, [*out[:-1], (out[-1] + 1) % VOCAB]):
                (answer,) = lm._loglikelihood_tokens([(None, ids, tail)], disable_tqdm=True)
                greedy.append([ids, tail, *answer])
        gold = {
            "ranks": [token.hex() for token in ranks],
            "loglikelihood": [[*pair, *score] for pair, score in zip(PAIRS, scores, strict=True)],
            "pairs": [[list(ids) for ids in _encoded(lm, *pair)] for pair in PAIRS],
            "greedy": greedy,
            "rolling": [list(item) for item in zip(ROLLING, rolling, strict=True)],
            "generate_until": [[*ask, text] for ask, text in zip(asks, texts, strict=True)],
            "encode": [[text, lm.tok_encode(text)] for text in [*ROLLING, *(c for p in PAIRS for c in p)]],
            "chat": [lm.apply_chat_template(DIALOG, flag) for flag in (True, False)],
        }
    GOLD.write_text(json.dumps(gold, indent=0, ensure_ascii=False) + "\n")
    print(f"{GOLD.stat().st_size:,} bytes")
    print(scores, rolling, texts, [g[2:] for g in greedy], sep="\n")


def _encoded(lm: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if context:
        return lm._encode_pair(context, continuation)
    return [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)


def _tensor(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])


if __name__ == "__main__":
    main()
