"""JSON schemas of the public test suite under constrained decoding: python benchmarks/schemas.py FOLDER

FOLDER is a checkout of github.com/json-schema-org/JSON-Schema-Test-Suite. For each draft this prints how many schemas
llguidance compiles, as they are and rewritten (infer/schema.py), and how many of the suite's valid and invalid
instances the compiled grammars accept as the text of `json.dumps`. A grammar must accept no invalid instance. Valid
ones may be refused: their keys may be in another order than the schema's.

Then texts are produced from each rewritten schema, with random tokens of those that its masks allow, as a model without
any sense would sample. Each text that ends must be valid for the schema of the suite, by the library jsonschema. The
patterns of the suite are used as regular expressions in the same way.
"""

from __future__ import annotations

import collections
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
DRAFTS = {"draft2020-12": "Draft202012Validator", "draft2019-09": "Draft201909Validator", "draft7": "Draft7Validator"}
TEXTS, LONGEST = 4, 600  # texts of each schema, and most bytes of a text


class Bytes:
    """A tokenizer of bytes, as llguidance reads it."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [*(bytes([i]) for i in range(256)), b"\xff<eos>"]
    special_token_ids = [256]
    is_tokenizer_wrapper = True

    def __call__(self, text: bytes | str) -> list[int]:
        """The bytes of a text."""
        return list(text if isinstance(text, bytes) else text.encode())


def compiled(tokenizer: Any, grammar: str) -> tuple[Any, str]:
    """A matcher, or None and the reason of llguidance."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    return (None, matcher.get_error()) if matcher.is_error() else (matcher, "")


def accepts(matcher: Any, value: Any) -> bool:
    """True if the text of a value is a complete output."""
    text = list(json.dumps(value, ensure_ascii=False).encode())
    matcher = matcher.deep_copy()
    return matcher.try_consume_tokens(text) == len(text) and matcher.is_accepting()


def produced(matcher: Any, seed: int) -> bytes | None:
    """A text of random allowed bytes; None if it did not end in time. Ends and closing brackets are preferred."""
    rng, matcher, text = random.Random(seed), matcher.deep_copy(), bytearray()
    while len(text) < LONGEST:
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(257) if mask[i // 8] >> i % 8 & 1]
        ends = [i for i in allowed if i == 256 or (i < 256 and chr(i) in '"]}')]
        token = rng.choice(ends if ends and rng.random() < 0.4 else allowed)
        if token == 256:
            return bytes(text)
        text.append(token)
        matcher.consume_token(token)
    return None


def patterns(value: Any) -> Iterator[str]:
    """The regular expressions of a schema."""
    if isinstance(value, dict):
        if isinstance(value.get("pattern"), str):
            yield value["pattern"]
        if isinstance(value.get("patternProperties"), dict):
            yield from value["patternProperties"]
        for item in value.values():
            yield from patterns(item)
    elif isinstance(value, list):
        for item in value:
            yield from patterns(item)


def main() -> None:
    import jsonschema
    import regex
    from llguidance import LLMatcher, LLTokenizer

    from llama_jax.infer.schema import rewritten

    tokenizer = LLTokenizer(Bytes(), n_vocab=257, eos_token=[256])
    distinct, expressions, wrong = set(), set(), []
    for draft, validator in DRAFTS.items():
        files = sorted((Path(sys.argv[1]) / "tests" / draft).glob("*.json"))
        groups = [group for path in files for group in json.loads(path.read_text())]
        more = Path(sys.argv[1]) / "tests" / draft / "optional" / "ecmascript-regex.json"
        expressions.update(patterns(json.loads(more.read_text())))
        for way in ("as they are", "rewritten"):
            counts: collections.Counter[str] = collections.Counter()
            reasons: collections.Counter[str] = collections.Counter()
            for group in groups:
                schema = group["schema"]
                expressions.update(patterns(schema))
                try:
                    text = json.dumps(rewritten(schema) if way == "rewritten" else schema)
                    matcher, reason = compiled(tokenizer, LLMatcher.grammar_from_json_schema(text))
                except ValueError as error:
                    matcher, reason = None, str(error)
                if matcher is None:
                    reasons[reason.split("\n")[0].split("'http")[0][:60]] += 1
                    continue
                counts["compiled"] += 1
                for test in group["tests"]:
                    name = "valid" if test["valid"] else "invalid"
                    counts[name] += 1
                    counts[f"{name} accepted"] += accepts(matcher, test["data"])
                if way == "rewritten":
                    check = getattr(jsonschema, validator)(schema)
                    bare = {k: v for k, v in schema.items() if k != "$schema"} if isinstance(schema, dict) else schema
                    distinct.add(json.dumps(bare, sort_keys=True))
                    for seed in range(TEXTS):
                        text = produced(matcher, seed)
                        counts["texts cut" if text is None else "texts"] += 1
                        try:
                            good = text is None or check.is_valid(json.loads(text))
                        except re.error:  # an expression that Python's module does not know
                            counts["texts not judged"] += 1
                            continue
                        if not good:
                            wrong.append((draft, group["description"], text.decode()))
            print(json.dumps({"draft": draft, "way": way, "schemas": len(groups), **counts}))
        print(json.dumps({"refused": dict(reasons.most_common(12))}))
    counts = collections.Counter()
    for expression in sorted(expressions):
        matcher, _ = compiled(tokenizer, LLMatcher.grammar_from_regex(expression))
        counts["compiled"] += matcher is not None
        for seed in range(TEXTS if matcher else 0):
            text = produced(matcher, seed)
            counts["texts cut" if text is None else "texts"] += 1
            if text is not None and not regex.fullmatch(expression, text.decode()):
                wrong.append(("expression", expression, text.decode()))
    print(json.dumps({"expressions": len(expressions), **counts}))
    print(json.dumps({"distinct schemas": len(distinct), "invalid texts": len(wrong), "of": wrong[:20]}))


if __name__ == "__main__":
    main()
