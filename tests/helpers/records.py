"""A helper of the tests: records of dialogs and pairs, and the ids that they become."""

import json
import random
from pathlib import Path

from helpers.files import write
from llama_jax.data.store import TokenStore, build_store

ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def store_of(tmp_path: Path, lines: list, tokenizer, **options) -> TokenStore:
    """A store of these JSON lines, built in tmp_path."""
    return build_store([write(tmp_path / "data.jsonl", lines)], tokenizer, cache_dir=tmp_path / "cache", **options)


def documents_in(store: TokenStore) -> list[tuple[list[int], list[bool]]]:
    """Ids and targets of each document of a store."""
    ends = store.offsets.tolist()
    return [(store.tokens[a:b].tolist(), store.targets(a, b).tolist()) for a, b in zip(ends, ends[1:], strict=False)]


def control(tokenizer, name: str) -> list[int]:
    return [tokenizer.special_tokens[f"<|{name}|>"]]


def header(tokenizer, role: str) -> list[int]:
    return [
        *control(tokenizer, "start_header_id"),
        *tokenizer.encode(role),
        *control(tokenizer, "end_header_id"),
        *tokenizer.encode("\n\n"),
    ]


def expected(tokenizer, messages: list[dict], tools: list | None, first: int = 0) -> tuple[list[int], list[bool]]:
    """Ids and mask of a dialog, written turn by turn from Meta's description of the prompt format.

    This is the oracle for `data.records.encode`: it shares no code with the package but the tokenizer's plain `encode`
    and its table of control tokens. The mask is True where the loss counts: the words of the assistant, its calls of
    tools and the token that ends its turn, in messages from `first` on.

    Returns:
        The ids, and a mask of the same length.
    """
    ids, mask = control(tokenizer, "begin_of_text"), [False]

    def say(new: list[int], spoken: bool) -> None:
        ids.extend(new)
        mask.extend([spoken] * len(new))

    learned = [message["role"] == "assistant" and i >= first for i, message in enumerate(messages)]
    messages = list(messages)
    builtin = [tool for tool in tools or () if isinstance(tool, str)]
    functions = [tool for tool in tools or () if not isinstance(tool, str)]
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    learned = learned[len(learned) - len(messages) :]
    if tools:
        searches = [name for name in builtin if name != "code_interpreter"]
        head = "Environment: ipython" + (f"\nTools: {', '.join(searches)}\n" if searches else "\n\n" if system else "")
        system = head + (system or "")
    if system is not None:
        turn = [*header(tokenizer, "system"), *tokenizer.encode(system), *control(tokenizer, "eot_id")]
        say(turn, False)
    if functions:
        told = (
            "Answer the user's question by making use of the following functions if needed.\n"
            "If none of the function can be used, please say so.\nHere is a list of functions in JSON format:\n"
        )
        for function in functions:
            told += (
                json.dumps(function, indent=4, ensure_ascii=False).replace(
                    '[\n                "n"\n            ]', '["n"]'
                )
                + "\n"
            )
        told += "\nReturn function calls in JSON format."
        say([*header(tokenizer, "user"), *tokenizer.encode(told), *control(tokenizer, "eot_id")], False)
    for message, spoken in zip(messages, learned, strict=True):
        role = {"tool": "ipython"}.get(message["role"], message["role"])
        say(header(tokenizer, role), False)
        say(tokenizer.encode(message["content"] or ""), spoken)
        end = "eot_id"
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            end = "eom_id" if tools or name in SEARCHES else "eot_id"
            if end == "eom_id":
                say(control(tokenizer, "python_tag"), spoken)
            if name in SEARCHES:
                text = f'{name}.call(query="{arguments["query"]}")'
            else:
                text = f'{{"type": "function", "name": "{name}", "parameters": {json.dumps(arguments)}}}'
            say(tokenizer.encode(text), spoken)
        say(control(tokenizer, end), spoken)
    return ids, mask


SEARCHES = ("brave_search", "wolfram_alpha")


FUNCTION = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds é",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    },
}


WORDS = ["Hello", " world", "\n\n", "é", "日本", "🦙", " ", "<|eot_id|>", "{", '"', "\\", "12", "assistant", "\t"]


def words(rng: random.Random, least: int = 0) -> str:
    return "x" * least + "".join(rng.choices(WORDS, k=rng.randint(0, 12)))


def random_dialog(rng: random.Random) -> dict:
    """A record of OpenAI's kind: several turns, in every third dialog with tools and calls of them."""
    messages = [{"role": "system", "content": words(rng)}] if rng.random() < 0.5 else []
    tools = rng.choice(
        [["brave_search", "wolfram_alpha"], ["code_interpreter"], [FUNCTION], ["brave_search", FUNCTION]]
    )
    tools = tools if rng.random() < 0.4 else None
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": words(rng)})
        if rng.random() < 0.4:
            name, key = rng.choice([("brave_search", "query"), ("wolfram_alpha", "query"), ("add", "n")])
            value = "one fish" if key == "query" else rng.randint(0, 99)
            function = {"name": name, "arguments": json.dumps({key: value})}
            call = {"id": "c1", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": rng.choice([None, "Let me see."]), "tool_calls": [call]})
            messages.append({"role": "tool", "content": words(rng), "tool_call_id": "c1"})
        messages.append({"role": "assistant", "content": words(rng, 1)})
    return {"messages": messages} | ({"tools": tools} if tools else {})


def random_pair(rng: random.Random) -> dict:
    """A preference pair in any of the shapes that are published: texts, answers to a prompt, whole dialogs."""
    if rng.random() < 0.2:
        return {"prompt": words(rng), "chosen": words(rng, 1), "rejected": words(rng, 2)}
    dialogs = random_dialog(rng)
    asked = list(dialogs.pop("messages"))
    while asked[-1]["role"] != "user":  # the last answer may have been several messages
        asked.pop()
    better, worse = [random_dialog(rng)["messages"][-1:] for _ in range(2)]
    worse[0]["content"] += "!"
    if rng.random() < 0.3:  # answers of several turns
        better += random_dialog(rng)["messages"][1:] if rng.random() < 0.5 else [ASK, ANSWER]
        better = [message for message in better if message["role"] != "system"]
    if rng.random() < 0.5:
        return {"chosen": asked + better, "rejected": asked + worse, **dialogs}
    if len(better) == 1 and rng.random() < 0.5:
        return {"prompt": asked, "chosen": better[0], "rejected": worse[0], **dialogs}
    if asked[0]["role"] == "system" and asked[0]["content"] and rng.random() < 0.5:
        dialogs["system"] = asked.pop(0)["content"]
    return {"prompt": asked, "chosen": better, "rejected": worse, **dialogs}
