"""Claims about records: the shapes that data comes in, what each becomes, and what happens to bad lines."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from helpers.files import write
from helpers.records import (
    ANSWER,
    ASK,
    FUNCTION,
    documents_in,
    expected,
    random_dialog,
    random_pair,
    store_of,
)
from llama_jax.data.encoding import EncodedSample, encode, try_encode
from llama_jax.data.records import BadLine, Completion, Dialog, parse
from llama_jax.data.sources import documents_from
from llama_jax.data.store import TokenStore, build_store
from llama_jax.errors import ConfigError
from llama_jax.text.chat_format import choose
from llama_jax.text.record_encoder import RecordEncoder

# ---- a construction of its own, from the format's description ------------------------------------------------


@pytest.mark.parametrize("which", ["tokenizer", "merging"])
def test_a_thousand_dialogs_have_the_ids_and_targets_of_an_independent_construction(tmp_path, request, which):
    vocabulary, rng = request.getfixturevalue(which), random.Random(1)
    records = [random_dialog(rng) for _ in range(1000)]
    assert sum("tools" in record for record in records) > 300
    found = documents_in(store_of(tmp_path, records, vocabulary, workers=2))
    for record, document in zip(records, found, strict=True):
        assert document == expected(vocabulary, record["messages"], record.get("tools"))


# ---- shapes --------------------------------------------------------------------------------------------------


def test_every_shape_of_a_dialog_becomes_the_same_ids(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    records = [
        {"messages": [system, ASK, ANSWER]},
        {"messages": [system, ASK, ANSWER], "tools": None, "text": "not read", "id": 7},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns]},
        {"conversations": turns, "system": "Be brief."},
        {
            "system": "Be brief.",
            "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
        },
        {"system": "Be brief.", "instruction": "Why?", "input": "", "output": "Because."},
        {"system": "Be brief.", "instruction": "Why?", "output": "Because.", "text": "not read"},
    ]
    found = [encode(parse(record, "r"), tokenizer, max_length=None) for record in records]
    assert found == [expected(tokenizer, [system, ASK, ANSWER], None)] * len(records)


def test_the_input_of_an_instruction_follows_after_an_empty_line(tokenizer):
    found = encode(parse({"instruction": "Add.", "input": "1 2", "output": "3"}, "r"), tokenizer, max_length=None)
    user = {"role": "user", "content": "Add.\n\n1 2"}
    assert found == expected(tokenizer, [user, {"role": "assistant", "content": "3"}], None)


def test_tools_may_be_a_string_of_json_and_results_come_from_the_tool(tokenizer):
    turns = [("human", "Add."), ("gpt", '{"name": "add"}'), ("tool", "3"), ("gpt", "It is 3.")]
    record = {"conversations": [{"from": a, "value": b} for a, b in turns], "tools": json.dumps([FUNCTION])}
    roles = {"human": "user", "gpt": "assistant", "tool": "tool"}
    messages = [{"role": roles[a], "content": b} for a, b in turns]
    assert encode(parse(record, "r"), tokenizer, max_length=None) == expected(tokenizer, messages, [FUNCTION])


def test_a_completion_is_plain_text_of_which_the_prompt_is_no_target(merging):
    found = encode(parse({"prompt": "The sum of", "completion": " two"}, "r"), merging, max_length=None)
    prompt, completion = merging.encode("The sum of", bos=True), merging.encode(" two", eos=True)
    assert found == (prompt + completion, [False] * len(prompt) + [True] * len(completion))
    assert merging.eot_id not in found[0]


def test_a_text_is_learned_whole_also_beside_dialogs(tmp_path, tokenizer):
    store = store_of(tmp_path, [{"text": "plain"}, {"messages": [ASK, ANSWER]}], tokenizer)
    assert store.masked
    text, dialog = documents_in(store)
    assert text == (tokenizer.encode("plain", bos=True, eos=True), [True] * 7)
    assert dialog == expected(tokenizer, [ASK, ANSWER], None)
    assert store.num_targets == 6 + sum(dialog[1])


def test_targets_of_any_range_are_those_of_the_whole(tmp_path, tokenizer):
    rng = random.Random(0)
    store = store_of(tmp_path, [random_dialog(rng) for _ in range(5)], tokenizer)
    whole = store.targets(0, store.num_tokens)
    for _ in range(200):
        a, b = sorted(rng.choices(range(store.num_tokens + 1), k=2))
        np.testing.assert_array_equal(store.targets(a, b), whole[a:b])


# ---- lists of records ----------------------------------------------------------------------------------------


def test_a_list_of_records_gives_what_lines_of_them_give(tmp_path, tokenizer):
    rng = random.Random(4)
    records = [random_dialog(rng) for _ in range(50)] + [{"text": 3}, {"text": "last"}]
    wanted = store_of(tmp_path, records, tokenizer)
    layouts = {
        "a.json": json.dumps(records),
        "b.json": "\ufeff \n" + json.dumps(records, indent=2, ensure_ascii=False) + "\n",
        "c.json": "\n".join(map(json.dumps, records)),  # lines, as many files of this name are
    }
    for name, text in layouts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = build_store([str(tmp_path / name)], tokenizer, cache_dir=tmp_path / "cache")
        assert documents_in(found) == documents_in(wanted)
        listed = json.loads(found.quarantine.read_text())
        assert (listed["file"], listed["line"]) == (str(tmp_path / name), 51)
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(layouts["a.json"].encode()))
    assert sum(not isinstance(sample, BadLine) for sample in documents_from([str(tmp_path / "d.json.gz")])) == 51


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"text": "a"}, {"text": "b"', "not a whole JSON list: item 2: Expecting"),
        ('[{"text": "a"}', "not a whole JSON list: item 1: no , or ] at line 1 column 15"),
        ('[{"text": "a"} {"text": "b"}]', "item 1: no , or ] at line 1 column 16"),
        ('[{"text": "a"},', "not a whole JSON list: item 2: Expecting value"),
        ('[{"text": "a"}] []', "text follows its end, at line 1 column 17"),
        ("[" * 100_000, "item 1: nested too deeply"),
        ('[{"text": ' + "1" * 5000 + "}]", "item 1: a number in it has thousands of digits"),
        ("[]", "every document found is empty"),
        ('[\n {"text": "a"},\n {"text": oops}]', "item 2: Expecting value at line 3 column 11"),
        ('[{"text": "a"},\n]', "item 2: Expecting value at line 2 column 1"),
    ],
    ids=range(10),
)
def test_a_list_that_is_not_whole_stops_with_the_item(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        list(documents_from([str(tmp_path / "a.json")]))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_folder_is_not_searched_for_lists_which_may_be_settings(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "settings.json").write_text('{"text": "not read"}')
    assert [sample.text for sample in documents_from([str(tmp_path)])] == ["a"]
    assert len(list(documents_from([str(tmp_path / "*")]))) == 2


# ---- bad lines -----------------------------------------------------------------------------------------------


def answered(content) -> dict:
    return {"messages": [ASK, {"role": "assistant", "content": content}]}


BAD = [
    (b'{"text": oops}', "not a line of JSON (Expecting value at column 10)"),
    (
        b'{"messages": [{"role": "user", "content": "hi',
        "not a line of JSON (Unterminated string starting at column 43)",
    ),
    (b'{"text": "' + b"\xff" + b'"}', "not UTF-8 at byte 10 of the line (0xff)"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"text": ' + b"1" * 5000 + b"}", "a number in it has thousands of digits"),
    ([1], "expected a record such as"),
    ({"text": 3}, "'text' must be a string, found int"),
    ({"prompt": "a"}, "'prompt' without 'completion'"),
    (
        {"prompt": "Why?", "completion": [ANSWER]},
        "'completion' holds messages and 'prompt' a string: give both as lists",
    ),
    ({"prompt": [ASK], "completion": 3}, "'completion' must be a list of messages"),
    ({"prompt": [ASK], "completion": " "}, "'completion' is empty: there is nothing to learn"),
    ({"prompt": [ASK], "completion": [ASK]}, "no message is the assistant's: there is nothing to learn"),
    ({"prompt": [ASK, ANSWER], "completion": [ASK]}, "no message of the assistant is to be learned"),
    ({"prompt": [ASK], "completion": [ANSWER], "label": False}, "'label' is false: the answer is marked as one not to"),
    ({"prompt": "a", "completion": "b", "label": False}, "'label' is false: the answer is marked as one not to give"),
    ({"prompt": "a", "completion": " "}, "'completion' is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a preference pair among other records"),
    ({"prompt": "a", "chosen": "b"}, "'chosen' without 'rejected', found ['chosen', 'prompt']"),
    ({"instruction": "a", "output": ""}, "'output' is empty"),
    (
        {"question": "a?", "answer": "B", "choices": ["x", "y"]},
        "'choices' has no meaning in a record of this shape: write",
    ),
    (
        {"messages": [ASK, ANSWER], "chat_template_kwargs": {"thinking": False}},
        "'chat_template_kwargs' has no meaning in",
    ),
    ({"contents": [{"role": "user"}]}, "no key 'text', found ['contents']; put the document under 'text'"),
    ({"messages": "Hi"}, "messages must be a list of dicts"),
    ({"messages": []}, "messages is empty"),
    ({"messages": [ASK]}, "no message is the assistant's"),
    ({"messages": [{"role": "asistant", "content": "Hi"}]}, "did you mean 'assistant'?"),
    (answered(""), "messages[1]: the assistant's answer is empty"),
    (answered([{"type": "text", "text": " \n"}]), "messages[1]: the assistant's answer is empty"),
    (answered(None), "assistant message has no content"),
    (answered("x" * 500), "tokens are more than data.sequence_length=400"),
    ({"prompt": "x" * 500, "completion": "y"}, "503 tokens are more than data.sequence_length=400"),
    ({"messages": [ASK, {**ANSWER, "weight": 0}]}, "no message of the assistant is to be learned"),
    ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "messages[1]: 'weight' must be true, false, 1 or 0, got 0.5"),
    ({"messages": [ASK, {**ANSWER, "train": "no"}]}, "messages[1]: 'train' must be true, false, 1 or 0, got 'no'"),
    (
        {"messages": [ASK, {**ANSWER, "loss_mask": [0]}]},
        "messages[1]: 'loss_mask' must be true, false, 1 or 0, got [0]",
    ),
    (
        {"messages": [ASK, {**ANSWER, "train": True, "weight": 0}]},
        "'weight': 0 and 'train': True contradict each other",
    ),
    ({"messages": [ASK, {**ANSWER, "masked": 1, "loss": 1}]}, "'loss': 1 and 'masked': 1 contradict each other"),
    (
        {"messages": [{**ASK, "train": True}, ANSWER]},
        "messages[0]: 'train': True marks a message of the user to be learned",
    ),
    ({"messages": [{**ASK, "masked": False}, ANSWER]}, "messages[0]: 'masked': False marks a message of the user"),
    ({"messages": [ASK, {**ANSWER, "train_detail": []}]}, "messages[1]: 'train_detail' marks parts of a message"),
    ({"messages": [ASK, {**ANSWER, "loss_scale": 2}]}, "messages[1]: 'loss_scale' marks parts of a message"),
    (
        {"messages": [ASK, {**ANSWER, "wieght": 0}]},
        "messages[1]: the key 'wieght' is not known; did you mean 'weight'?",
    ),
    ({"messages": [ASK, {**ANSWER, "learn": False}]}, "messages[1]: the key 'learn' is not known"),
    ({"messages": [ASK, {**ANSWER, "thinking": ["Hm."]}]}, "messages[1]: 'thinking' must be a string, got ['Hm.']"),
    ({"messages": [{**ASK, "reasoning": "Hm."}, ANSWER]}, "messages[0]: 'reasoning' is allowed on role assistant only"),
    (
        {"messages": [ASK, {**ANSWER, "reasoning_content": "a", "thinking": "b"}]},
        "messages[1]: 'reasoning_content' and 'thinking' say different things: keep one",
    ),
    (
        {"messages": [ASK, {**ANSWER, "reasoning_content": "Hm."}]},
        "messages[1]: 'reasoning_content' is not written by the chat format of the model",
    ),
    ({"messages": [ASK, {**ANSWER, "value": "x"}]}, "messages[1] has both 'content' and 'value': keep one"),
    (
        {"messages": [ASK, ANSWER], "loss_mask": [0, 1]},
        "'loss_mask' has no meaning in a record of this shape: mark the messages",
    ),
    (
        {"messages": [ASK, ANSWER], "images": ["a.png"]},
        "'images' has no meaning in a record of this shape: the model reads text",
    ),
    ({"messages": [ASK, ANSWER], "weight": 0.5}, "'weight' is 0.5, and a record cannot be weighted as a whole"),
    ({"messages": [ASK, ANSWER], "train": False}, "'train' is False, and a record cannot be weighted as a whole"),
    (
        {"prompt": "a", "completion": "b", "masked": True},
        "'masked' is True, and a record cannot be weighted as a whole",
    ),
    (
        {"instruction": "a", "output": "b", "train": False},
        "'train' is False, and a record cannot be weighted as a whole: leave",
    ),
    (
        {"instruction": "a", "output": "b", "weight": 0},
        "'weight' is 0, and a record cannot be weighted as a whole: leave",
    ),
    (
        {"prompt": [ASK], "completion": [ANSWER], "loss_mask": 0},
        "'loss_mask' is 0, and a record cannot be weighted as a whole",
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "trainable": 0},
        "'trainable' is 0, and a record cannot be weighted as a whole",
    ),
    ({"text": "a", "training": False}, "'training' is False, and a record cannot be weighted as a whole"),
    ({"instruction": "a", "output": "b", "label": False}, "'label' is false: the answer is marked"),
    (
        {"messages": [ASK, {**ANSWER, "content": [{"type": "redacted_thinking", "data": "x"}]}]},
        "content[0] must be {'type': 'text'",
    ),
    (answered([{"type": "text", "text": "a", "train": False}]), "content[0]: the key 'train' is not known"),
    (
        {"messages": [ASK, {**ANSWER, "content": [{"type": "tool_result", "content": "x"}]}]},
        "allowed in a message of the user",
    ),
    ({"conversation": [{"human": "a", "assistant": "b", "loss": 0}]}, "conversation[0]: the key 'loss' is not known"),
    ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "conversations[0] must hold JSON such as"),
    (
        {"messages": [{"role": "system", "content": "x"}, ASK, ANSWER], "system": "y"},
        "'system' is given, and the messages begin with another system message",
    ),
    ({"messages": None}, "'messages' is null"),
    ({"prompt": "a", "completion": None}, "'completion' is null"),
    (
        {"prompt": "a", "completion": "b", "system": "c"},
        "'system' has no meaning in a record of this shape: put all into",
    ),
    ({"prompt": "a", "completion": "b", "tools": [{}]}, "'tools' has no meaning in a record of this shape"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history' must be a list of [instruction, output]"),
    (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", "weight": 0}]},
        "no message of the assistant is to be learned",
    ),
    ({"messages": [ASK, ANSWER], "functions": [{}]}, "tools[0] must be {'type': 'function'"),
    ({"messages": [ASK, ANSWER], "functions": [FUNCTION], "tools": [FUNCTION]}, "'tools' and 'functions' say the same"),
    ({"messages": [ASK, ANSWER], "tools": "add"}, "'tools' must be a list"),
    ({"messages": [ASK, ANSWER], "tools": ["ad"]}, "tools[0]: 'ad' (str) is not a built-in tool"),
    ({"conversations": {}}, "conversations must be a list of dicts"),
    ({"conversations": ["x"]}, "conversations[0] must be a dict with 'role' and 'content', got 'x'"),
    ({"conversations": [{"from": "human"}]}, "messages[0]: user message has no content"),
    (
        {"conversations": [{"from": "humn", "value": "x"}]},
        "conversations[0]: role 'humn' is not known; allowed: system",
    ),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_line_goes_to_quarantine_with_file_line_and_reason(tmp_path, tokenizer, line, reason):
    good = {"messages": [ASK, ANSWER]}
    store = store_of(tmp_path, [*[good] * 20, line, b"", good], tokenizer, max_length=400)
    assert (store.num_documents, store.num_bad + store.num_too_long) == (21, 1)
    assert store.num_too_long == ("data.sequence_length" in reason)
    (listed,) = [json.loads(text) for text in store.quarantine.read_text().splitlines()]
    assert (listed["file"], listed["line"]) == (str(tmp_path / "data.jsonl"), 21)
    assert reason in listed["reason"] and listed["reason"].isprintable()


def test_a_dialog_of_which_the_chat_format_counts_nothing_is_refused(tmp_path, tokenizer):
    """A chat template leaves an answer that nothing asks for, the first message, out of the mask."""

    source = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '<|eot_id|>' }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    encoder = RecordEncoder(tokenizer, choose(tokenizer, source))
    store = store_of(tmp_path, [*[{"messages": [ASK, ANSWER]}] * 20, {"messages": [ANSWER, ASK]}], encoder)
    assert (store.num_documents, store.num_bad) == (20, 1)
    assert "there is nothing to learn" in next(store.rejected()).reason


def test_more_than_five_percent_of_bad_lines_stop_with_the_first_of_them(tmp_path, tokenizer):
    lines = [{"messages": [ASK, ANSWER]}] * 19
    assert store_of(tmp_path, [*lines, {}], tokenizer).num_bad == 1
    with pytest.raises(
        ValueError, match=r"^2 of 21 documents cannot be used \(9.5%; data.max_bad=0.05 allows 5%\), the first: "
    ) as caught:
        store_of(tmp_path, [{"txt": "\n\x1b"}, *lines, {}], tokenizer)
    assert f"{tmp_path / 'data.jsonl'}:1: no key 'text', found ['txt']; did you mean 'txt'?" in str(caught.value)
    listed = Path(str(caught.value).rpartition(" listed in ")[2])
    assert [json.loads(line)["line"] for line in listed.read_text().splitlines()] == [1, 21]
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.partial-*"))


def test_no_usable_record_is_refused_with_the_first_of_them_however_many_bad_ones_are_allowed(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"none of the 2 documents can be used, the first: .*:1: 'text' must be a str"):
        store_of(tmp_path, [{"text": 3}, answered("x" * 500)], tokenizer, max_length=400, max_bad=1.0)


def test_a_text_of_any_length_is_sound_and_only_dialogs_depend_on_the_length(tmp_path, tokenizer):
    def stores(name: str, lines: list, lengths: list[int]) -> list[TokenStore]:
        path = write(tmp_path / name, lines)
        return [build_store([path], tokenizer, cache_dir=tmp_path / "cache", max_length=n) for n in lengths]

    texts = stores("text.jsonl", [{"text": "x" * 500}], [100, 200])
    assert texts[0].path == texts[1].path and texts[0].num_tokens == 502 and not texts[0].masked
    found = stores("dialogs.jsonl", [{"messages": [ASK, ANSWER]}] * 20 + [answered("x" * 200)], [100, 300, 100])
    assert [store.num_documents for store in found] == [20, 21, 20]
    assert found[0].path == found[2].path != found[1].path
    found = stores("one.jsonl", [{"text": "x"}] * 20 + [answered("x" * 200)], [100, 300])
    assert [(store.num_documents, store.masked) for store in found] == [(20, False), (21, True)]


def test_a_vocabulary_without_control_tokens_stops_the_run_rather_than_the_line(tmp_path):
    class Plain:
        vocab_size, fingerprint = 256, "plain"

        def encode_dialog(self, messages, **options):
            raise ConfigError("the tokenizer has no <|begin_of_text|>")

    with pytest.raises(ConfigError, match="has no <|begin_of_text|>"):
        store_of(tmp_path, [{"messages": [ASK, ANSWER]}], Plain())


def test_a_damaged_file_of_targets_is_refused_and_rebuilt(tmp_path, tokenizer):
    lines = [{"messages": [ASK, ANSWER]}]
    path = store_of(tmp_path, lines, tokenizer).path
    (path / "targets.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"targets.bin has 0 bytes, meta.json says"):
        TokenStore(path)
    with pytest.warns(UserWarning, match="rebuilding it now"):
        build_store([str(tmp_path / "data.jsonl")], tokenizer, cache_dir=tmp_path / "cache")


def test_a_vocabulary_is_learned_from_all_that_is_said(tmp_path):
    lines = [{"messages": [ASK, ANSWER]}, {"prompt": "one", "completion": " two"}, b"broken", {"text": "three"}]
    found = list(documents_from([write(tmp_path / "data.jsonl", lines)]))
    assert [type(sample) for sample in found][:3] == [Dialog, Completion, BadLine]
    text = "\n".join(sample.text for sample in found if not isinstance(sample, BadLine))
    assert all(word in text for word in ("Why?", "Because.", "one two", "three"))


def test_random_lines_are_read_or_listed_and_never_crash(tmp_path, tokenizer):
    rng = random.Random(5)
    keys = (
        "messages conversations prompt completion instruction output input text system tools functions chosen".split()
    )
    keys += ["rejected", "role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "weight"]
    leaves = [None, True, 0, 1.5, "", "x", "assistant", "user", "human", "gpt", "\ud800\n\x1b", "add", "{}", "[1]"]

    def value(depth: int):
        kind = rng.random()
        if depth == 0 or kind < 0.4:
            return rng.choice(leaves)
        if kind < 0.65:
            return [value(depth - 1) for _ in range(rng.randint(0, 3))]
        return {rng.choice(keys): value(depth - 1) for _ in range(rng.randint(0, 4))}

    lines: list[bytes] = []
    for _ in range(4000):
        kind = rng.random()
        record = random_dialog(rng) if kind < 0.3 else random_pair(rng) if kind < 0.5 else value(4)
        line = bytearray(json.dumps(record).encode())
        for _ in range(rng.choice([0, 0, 1, 3])):
            line[rng.randrange(len(line))] = rng.choice(b'\xff\x00{}[]":,\\a1')
        lines.append(bytes(line).replace(b"\n", b" "))
    path = write(tmp_path / "data.jsonl", lines)
    good, bad = 0, 0
    for sample in documents_from([path]):
        if not isinstance(sample, BadLine):
            sample = try_encode(sample, tokenizer, max_length=None)
        if isinstance(sample, EncodedSample):
            documents = sample.documents
            assert all(targets is None or len(targets) == len(ids) and any(targets) for ids, targets in documents)
            good += 1
            continue
        assert sample.reason.isprintable() and json.loads(sample.to_json())["line"] >= 1
        bad += 1
    assert good > 300 and bad > 1000
    with pytest.raises(ValueError, match="documents cannot be used"):
        build_store([path], tokenizer, cache_dir=tmp_path / "cache")
