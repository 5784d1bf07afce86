"""Claims about the styles that dialogs are published in: what each becomes, and which messages are learned.

The styles are those of OpenAI, Anthropic, ShareGPT, LLaMA-Factory, ms-swift, TRL, axolotl, verl and torchtune. What is
expected is the ids and the mask of the same dialog in OpenAI's style, from the oracle of the format's description.
"""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.records import ANSWER, ASK, FUNCTION, documents_in, expected, store_of
from llama_jax.data.encoding import encode
from llama_jax.data.packing import pack
from llama_jax.data.records import Completion, Dialog, Pair, parse
from llama_jax.data.store import build_store
from llama_jax.errors import ConfigError
from llama_jax.text.chat_format import choose
from llama_jax.text.record_encoder import RecordEncoder

SYSTEM = {"role": "system", "content": "Be brief."}
LATER = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Nothing."}]


def ids_of(record, tokenizer):
    return encode(parse(record, "r"), tokenizer, max_length=None)


# ---- shapes --------------------------------------------------------------------------------------------------

ROUND = [ASK, ANSWER, *LATER]
SHAPES = {
    "TRL": {"prompt": [ASK, ANSWER, LATER[0]], "completion": [LATER[1]]},
    "TRL, one message": {"prompt": [ASK, ANSWER, LATER[0]], "completion": LATER[1]},
    "TRL, text": {"prompt": [ASK, ANSWER, LATER[0]], "completion": "Nothing."},
    "messages": {"messages": ROUND},
    "messages as JSON": {"messages": json.dumps(ROUND)},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "Because."},
            {"from": "human", "value": "And then?"},
            {"from": "gpt", "value": "Nothing."},
        ]
    },
    "ShareGPT of other names": {
        "conversation": [
            {"from": "user", "value": "Why?", "weight": None},
            {"from": "chatgpt", "value": "Because."},
            {"from": "user", "value": "And then?"},
            {"from": "bard", "value": "Nothing.", "text": None, "markdown": ""},
        ]
    },
    "roles in conversations": {"conversations": ROUND},
    "Pygmalion": {"conversations": [{"role": m["role"], "value": m["content"]} for m in ROUND]},
    "ms-swift": {
        "conversation": [{"human": "Why?", "assistant": "Because."}, {"human": "And then?", "assistant": "Nothing."}]
    },
    "Alpaca": {"history": [["Why?", "Because."]], "instruction": "And then?", "input": "", "output": "Nothing."},
    "ms-swift, query": {"history": [["Why?", "Because."]], "query": "And then?", "response": "Nothing."},
    "Dolly": {"history": [["Why?", "Because."]], "instruction": "And then?", "context": "", "response": "Nothing."},
    "question": {"history": [["Why?", "Because."]], "question": "And then?", "answer": "Nothing.", "id": 7},
    "roles in capitals": {"messages": [{**m, "role": m["role"].capitalize()} for m in ROUND]},
    "Anthropic": {
        "messages": [
            {"role": m["role"], "content": [{"type": "text", "text": m["content"], "cache_control": {"type": "x"}}]}
            for m in ROUND
        ]
    },
    "OpenAI's answers": {
        "messages": [
            {**m, "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
            for m in ROUND
        ]
    },
    "a refusal": {"messages": [*ROUND[:3], {"role": "assistant", "content": None, "refusal": "Nothing."}]},
    "names": {"messages": [{**m, "name": "x"} for m in ROUND]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_dialog_and_only_a_prompt_is_not_learned(tokenizer, shape):
    first = 3 if shape.startswith("TRL") else 0
    assert ids_of(SHAPES[shape], tokenizer) == expected(tokenizer, ROUND, None, first)


@pytest.mark.parametrize("shape", [s for s in SHAPES if "text" not in s])
def test_a_system_message_may_stand_in_a_key_of_its_own(tokenizer, shape):
    first = 4 if shape.startswith("TRL") else 0
    for system in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        ids, mask = ids_of({**SHAPES[shape], "system": system}, tokenizer)
        assert (ids, mask) == expected(tokenizer, [SYSTEM, *ROUND], None, first)


def test_system_messages_are_kept_where_they_stand(tokenizer):
    messages = [{"role": "developer", "content": "A"}, {"role": "system", "content": ""}, ASK, ANSWER, SYSTEM, *LATER]
    plain = [{**m, "role": {"developer": "system"}.get(m["role"], m["role"])} for m in messages]
    assert ids_of({"messages": messages}, tokenizer) == expected(tokenizer, plain, None)
    same = {"system": "Be brief.", "messages": [SYSTEM, ASK, ANSWER]}
    assert ids_of(same, tokenizer) == expected(tokenizer, [SYSTEM, ASK, ANSWER], None)


# ---- calls ---------------------------------------------------------------------------------------------------

CALLED = [
    ASK,
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"n": 1}'}}],
    },
    {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ANSWER,
]
SCHEMA = FUNCTION["function"]
SILENT = [ASK, {**CALLED[1], "content": None}, *CALLED[2:]]
WITHOUT = [
    ASK,
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]},
    *CALLED[2:],
]


def with_call(message: dict, result: dict | None = None) -> list[dict]:
    return [ASK, message, result or CALLED[2], ANSWER]


CALLS = {
    "OpenAI": (CALLED, CALLED),
    "arguments as an object": (
        with_call({**CALLED[1], "tool_calls": [{"function": {"name": "add", "arguments": {"n": 1}}}]}),
        CALLED,
    ),
    "no content": (with_call({"role": "assistant", "tool_calls": CALLED[1]["tool_calls"]}), SILENT),
    "null content": (SILENT, SILENT),
    "calls as JSON": (with_call({**SILENT[1], "tool_calls": json.dumps(CALLED[1]["tool_calls"])}), SILENT),
    "no arguments": (
        with_call(
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": ""}}]}
        ),
        WITHOUT,
    ),
    "function_call": (
        with_call({**SILENT[1], "tool_calls": [], "function_call": CALLED[1]["tool_calls"][0]["function"]}),
        SILENT,
    ),
    "role function": (with_call(CALLED[1], {"role": "function", "name": "add", "content": "3"}), CALLED),
    "LLaMA-Factory": (
        [
            {"from": "human", "value": "Why?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"n": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Because."},
        ],
        SILENT,
    ),
    "ms-swift": (
        [
            ASK,
            {"role": "tool_call", "content": '[{"name": "add", "arguments": "{\\"n\\": 1}"}]'},
            {"role": "tool_response", "content": "3"},
            ANSWER,
        ],
        SILENT,
    ),
    "Anthropic": (
        [
            ASK,
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "c1", "name": "add", "input": {"n": 1}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "3"}]},
            ANSWER,
        ],
        CALLED,
    ),
}


@pytest.mark.parametrize("style", CALLS)
def test_calls_of_every_style_are_the_same_turns(tokenizer, style):
    given, wanted = CALLS[style]
    for tools in (None, [FUNCTION]):
        assert ids_of({"messages": given, "tools": tools}, tokenizer) == expected(tokenizer, wanted, tools)


def test_a_users_words_after_a_result_are_a_turn_of_their_own(tokenizer):
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "3"}], "is_error": False}
    user = {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]}
    wanted = [*CALLED[:3], {"role": "user", "content": "Well?"}, ANSWER]
    assert ids_of({"messages": [*CALLED[:2], user, ANSWER]}, tokenizer) == expected(tokenizer, wanted, None)


def test_calls_that_follow_one_another_are_one_turn(tokenizer):
    turns = [{"role": "tool_call", "content": json.dumps({"name": "add", "arguments": {"n": n}})} for n in (1, 2)]
    calls = [{"function": {"name": "add", "arguments": json.dumps({"n": n})}} for n in (1, 2)]
    wanted = [ASK, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert ids_of({"messages": [ASK, *turns]}, tokenizer) == expected(tokenizer, wanted, None)


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [FUNCTION]},
        {"tools": json.dumps([FUNCTION])},
        {"tools": [SCHEMA]},
        {"functions": [SCHEMA]},
        {"functions": json.dumps([SCHEMA])},
        {"tools": [{"name": "add", "description": "Adds é", "input_schema": SCHEMA["parameters"]}]},
        {"tools": [{"type": "function", "function": {**SCHEMA, "parameters": json.dumps(SCHEMA["parameters"])}}]},
    ],
    ids=range(7),
)
def test_tools_of_every_style_are_the_same_tools(tokenizer, tools):
    assert ids_of({"messages": CALLED, **tools}, tokenizer) == expected(tokenizer, CALLED, [FUNCTION])


# ---- what is learned ------------------------------------------------------------------------------------------

MARKS = [
    *(("weight", no, 1) for no in (0, 0.0, False)),
    *(
        (key, no, yes)
        for key in ("train", "training", "trainable", "loss", "loss_mask")
        for no, yes in ((False, True), (0, 1))
    ),
    ("masked", True, False),
    ("masked", 1, 0),
]


@pytest.mark.parametrize(("key", "no", "yes"), MARKS, ids=range(len(MARKS)))
def test_a_message_that_is_marked_is_not_learned(tokenizer, key, no, yes):
    unmarked, wanted = expected(tokenizer, ROUND, None), expected(tokenizer, ROUND, None, 2)
    assert unmarked != wanted
    first = {"messages": [{**ASK, key: no}, {**ANSWER, key: no}, LATER[0], {**LATER[1], key: yes}]}
    assert ids_of(first, tokenizer) == wanted
    shared = [{"from": m["role"], "value": m["content"], **{k: m[k] for k in m if k == key}} for m in first["messages"]]
    assert ids_of({"conversations": shared}, tokenizer) == wanted
    for absent in (None, yes):
        record = {"messages": [ASK, {**ANSWER, key: absent}, *LATER]}
        assert ids_of(record, tokenizer) == unmarked


def test_marks_that_agree_are_one_and_calls_and_empty_answers_have_them_too(tokenizer):
    record = {"messages": [ASK, {**ANSWER, "weight": 0, "train": False, "masked": True}, *LATER]}
    assert ids_of(record, tokenizer) == expected(tokenizer, ROUND, None, 2)
    empty = [ASK, {**ANSWER, "content": "", "weight": 0}, *LATER]
    assert ids_of({"messages": empty}, tokenizer) == expected(tokenizer, empty, None, 2)
    called = {"messages": [ASK, {**CALLED[1], "loss": False}, *CALLED[2:]]}
    assert ids_of(called, tokenizer) == expected(tokenizer, CALLED, None, 2)


def test_marks_within_the_answers_of_a_pair_count_too(tokenizer):
    better = [{**ANSWER, "weight": 0}, *LATER]
    pair = parse({"prompt": [ASK], "chosen": better, "rejected": [{**ANSWER, "content": "No."}]}, "r", pairs=True)
    assert encode(pair.chosen, tokenizer, max_length=None) == expected(tokenizer, ROUND, None, 2)


def test_counting_every_token_is_refused_where_messages_are_marked(tmp_path, tokenizer):
    store = store_of(tmp_path, [{"messages": [ASK, {**ANSWER, "weight": 0}, *LATER]}], tokenizer)
    assert store.marked
    with pytest.raises(ConfigError, match="would count messages that the data mark as not to be learned"):
        pack(store, sequence_length=200, loss_on="all")
    pack(store, sequence_length=200, loss_on="assistant")
    prompted = build_store([str(tmp_path / "data.jsonl")], tokenizer, cache_dir=tmp_path / "cache")
    assert prompted.path == store.path


def test_marks_are_read_from_tables_whose_rows_all_have_every_key(tmp_path, tokenizer):
    messages = [ASK, {**ANSWER, "weight": 0}, *LATER]
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"messages": messages}] * 3), tmp_path / "t.parquet")
    store = build_store([str(tmp_path / "t.parquet")], tokenizer, cache_dir=tmp_path / "cache")
    assert documents_in(store) == [expected(tokenizer, ROUND, None, 2)] * 3


# ---- pairs ---------------------------------------------------------------------------------------------------


# ---- reasoning -----------------------------------------------------------------------------------------------

SOURCE = (
    "{% for m in messages %}{{ m.role ~ ':' }}{% if m.reasoning_content %}{{ '(' ~ m.reasoning_content ~ ')' }}"
    "{% endif %}{{ m.content ~ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize(
    "answer",
    [
        {**ANSWER, "reasoning_content": "Hm."},  # DeepSeek, Qwen, vLLM
        {**ANSWER, "thinking": "Hm."},  # gpt-oss, TRL
        {**ANSWER, "reasoning": "Hm.", "thinking": None},  # OpenRouter
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Because."}],
        },
    ],
)
def test_reasoning_is_learned_where_the_chat_template_writes_it(tokenizer, answer):
    encoder = RecordEncoder(tokenizer, choose(tokenizer, SOURCE))
    ids, mask = ids_of({"messages": [ASK, answer]}, encoder)[:2]
    assert tokenizer.decode(ids) == "user:Why?<|eot_id|>assistant:(Hm.)Because.<|eot_id|>"
    assert tokenizer.decode([i for i, learn in zip(ids, mask, strict=True) if learn]) == "(Hm.)Because.<|eot_id|>"


@pytest.mark.parametrize("source", [None, SOURCE.replace("reasoning_content", "name")])
def test_reasoning_that_the_chat_format_leaves_out_is_refused_unless_it_is_not_learned(tokenizer, source):
    encoder = RecordEncoder(tokenizer, choose(tokenizer, source))
    with pytest.raises(
        ValueError, match=r"messages\[1\]: 'reasoning_content' is not written by the chat format of the"
    ):
        ids_of({"messages": [ASK, {**ANSWER, "thinking": "Hm."}]}, encoder)
    dialog = [ASK, {**ANSWER, "thinking": "Hm.", "train": False}, *LATER]
    plain = [ASK, {**ANSWER, "train": False}, *LATER]
    assert ids_of({"messages": dialog}, encoder)[0] == ids_of({"messages": plain}, encoder)[0]


def test_openai_names_of_a_pair_are_trls(tokenizer):
    worse = {"role": "assistant", "content": "No."}
    openai = {
        "input": {"messages": [ASK], "tools": [FUNCTION]},
        "preferred_output": [ANSWER],
        "non_preferred_output": [worse],
    }
    trl = {"prompt": [ASK], "tools": [FUNCTION], "chosen": [ANSWER], "rejected": [worse]}
    pair = parse(openai, "r", pairs=True)
    assert isinstance(pair, Pair) and pair == parse(trl, "r", pairs=True)
    texts = parse({"prompt": [ASK], "chosen": "Because.", "rejected": "No."}, "r", pairs=True)
    assert texts == parse({"prompt": [ASK], "chosen": [ANSWER], "rejected": [worse]}, "r", pairs=True)


# ---- long ones -----------------------------------------------------------------------------------------------


def lengths(store) -> list[int]:
    return (store.offsets[1:] - store.offsets[:-1]).tolist()


def test_long_records_are_counted_apart_and_never_stop_a_run(tmp_path, tokenizer):
    long = {"messages": [ASK, {"role": "assistant", "content": "x" * 200}]}
    store = store_of(tmp_path, [{"messages": [ASK, ANSWER]}] * 5 + [long] * 5, tokenizer, max_length=100)
    assert (store.num_records, store.num_bad, store.num_too_long) == (5, 0, 5)
    assert [bad.name.rpartition(":")[2] for bad in store.rejected()] == ["6", "7", "8", "9", "10"]
    assert all(bad.too_long and "228 tokens are more than" in bad.reason for bad in store.rejected())
    with pytest.raises(ValueError, match="all 5 documents are longer than data.sequence_length: raise it, or set"):
        store_of(tmp_path, [long] * 5, tokenizer, max_length=100)


def test_cutting_keeps_the_beginning_and_teaches_no_end(tmp_path, tokenizer):
    long = [ASK, ANSWER, ASK, {"role": "assistant", "content": "x" * 200}]
    lines = [
        {"messages": long},
        {"prompt": "ab", "completion": "c" * 200},
        {"prompt": "a" * 100, "completion": "never reached"},
        {"messages": [ASK, ANSWER]},
        {"text": "x" * 150},
    ]
    store = store_of(tmp_path, lines, tokenizer, max_length=100, too_long="cut")
    ids, mask = expected(tokenizer, long, None)
    dialog, completion, short, text = documents_in(store)
    assert dialog == (ids[:100], mask[:100]) and any(mask[70:100])
    assert tokenizer.decode(dialog[0]).endswith("xxx")
    assert completion == (tokenizer.encode("ab" + "c" * 97, bos=True), [False] * 3 + [True] * 97)
    assert short == expected(tokenizer, [ASK, ANSWER], None)
    assert text == (tokenizer.encode("x" * 150, bos=True, eos=True), [True] * 152)
    assert (store.num_cut, store.num_too_long, store.num_bad) == (2, 1, 0)
    assert "have nothing to learn" in next(store.rejected()).reason


def test_refusing_long_records_names_the_first_and_what_to_set(tmp_path, tokenizer):
    lines = [{"messages": [ASK, ANSWER]}, {"messages": [ASK, {"role": "assistant", "content": "x" * 200}]}]
    with pytest.raises(ValueError, match=r"data\.jsonl:2: 228 tokens are more than data.sequence_length=100, .*'cut'"):
        store_of(tmp_path, lines, tokenizer, max_length=100, too_long="refuse")
    assert store_of(tmp_path, lines, tokenizer, max_length=300, too_long="refuse").num_records == 2
    paths = {
        choice: store_of(tmp_path, lines, tokenizer, max_length=100, too_long=choice).path for choice in ("drop", "cut")
    }
    assert len(set(paths.values())) == 2


def test_pairs_are_never_cut(tmp_path, tokenizer):
    pair = {"prompt": [ASK], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "x" * 200}]}
    short = {"prompt": [ASK], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "x"}]}
    store = store_of(tmp_path, [pair, short], tokenizer, max_length=100, too_long="cut", pairs=True)
    assert (store.num_records, store.num_too_long, store.num_cut) == (1, 1, 0)


def test_a_text_with_a_question_and_an_answer_stays_a_text():
    assert parse({"text": "abc", "question": "a", "answer": "b"}, "r").text == "abc"
    assert isinstance(parse({"text": "abc", "instruction": "a", "output": "b"}, "r"), Dialog)


def test_a_completion_of_texts_stays_one(tokenizer):
    assert parse({"prompt": '[{"a": 1}]', "completion": "[1]"}, "r") == Completion("r", '[{"a": 1}]', "[1]")
