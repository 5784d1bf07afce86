"""JSON schemas of the public test suite under constrained decoding: python benchmarks/schemas.py FOLDER

FOLDER is a checkout of github.com/json-schema-org/JSON-Schema-Test-Suite. For each draft this prints how many schemas
llguidance compiles, as they are and rewritten (infer/schema.py), and how many of the suite's valid and invalid
instances the compiled grammars accept as the text of `json.dumps`. A grammar must accept no invalid instance. Valid
ones may be refused: their keys may be in another order than the schema's.
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


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


def main() -> None:
    from llguidance import LLMatcher, LLTokenizer

    from llama_jax.infer.schema import rewritten

    tokenizer = LLTokenizer(Bytes(), n_vocab=257, eos_token=[256])

    def compiled(schema: Any) -> tuple[Any, str]:
        try:
            matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
        except ValueError as error:
            return None, str(error)
        return (None, matcher.get_error()) if matcher.is_error() else (matcher, "")

    def accepts(matcher: Any, value: Any) -> bool:
        text = list(json.dumps(value, ensure_ascii=False).encode())
        matcher = matcher.deep_copy()
        return matcher.try_consume_tokens(text) == len(text) and matcher.is_accepting()

    for draft in ("draft2020-12", "draft7"):
        groups = [
            g for p in sorted((Path(sys.argv[1]) / "tests" / draft).glob("*.json")) for g in json.loads(p.read_text())
        ]
        for way in ("as they are", "rewritten"):
            counts: collections.Counter[str] = collections.Counter()
            reasons: collections.Counter[str] = collections.Counter()
            for group in groups:
                matcher, reason = compiled(rewritten(group["schema"]) if way == "rewritten" else group["schema"])
                if matcher is None:
                    reasons[reason.split("\n")[0].split("'http")[0][:60]] += 1
                    continue
                counts["compiled"] += 1
                for test in group["tests"]:
                    name = "valid" if test["valid"] else "invalid"
                    counts[name] += 1
                    counts[f"{name} accepted"] += accepts(matcher, test["data"])
            print(json.dumps({"draft": draft, "way": way, "schemas": len(groups), **counts}))
        print(json.dumps({"refused": dict(reasons.most_common(12))}))


if __name__ == "__main__":
    main()
