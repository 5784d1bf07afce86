"""Regenerate tokenizers.json: the ids that transformers and llama.cpp give with tokenizers that llama_jax.text wrote.

    pip install transformers jinja2 gguf llama-cpp-python    # in addition to this project's own requirements
    python tests/golden/make_tokenizers.py

The vocabulary is the small one of text.json. The golden file holds hashes of what was given to the other programs, so
that a test notices when it is out of date.
"""

import base64
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import gguf
from llama_cpp import Llama
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
from llama_jax.text import Tokenizer, chat_template, llama3_template  # noqa: E402
from llama_jax.text.chat_format import Llama3Format  # noqa: E402
from llama_jax.text.formats import gguf as gguf_vocabulary  # noqa: E402
from llama_jax.text.formats import huggingface as huggingface_vocabulary  # noqa: E402
from llama_jax.text.patterns import SPLIT_PATTERN  # noqa: E402


def user(content: object) -> dict:
    """Return a user message."""
    return {"role": "user", "content": content}


def call(name: str, arguments: dict, **rest: object) -> dict:
    """Return an assistant message with one call."""
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}], **rest}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <in> a 'city', \"now\" — or later",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Zürich", "Łódź"], "more": [[], {}, [1, {"a": None}]]},
                "days": {"type": "integer", "minimum": 0.5, "strict": True, "empty": {}, "none": []},
            },
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": 'Zürich <b>\'s & "so"', "days": 3, "x": [1, "b", None], "y": {"z": True}}
DIALOGS = {
    "plain": {"messages": [user("Hi there")]},
    "closed": {"messages": [user("Hi"), {"role": "assistant", "content": "Hello."}], "add_generation_prompt": False},
    "system": {"messages": [{"role": "system", "content": " Be brief.\n"}, user("2+2?")]},
    "turns": {"messages": [user("2+2?"), {"role": "assistant", "content": "4"}, user(" And\n\n in Greek? ")]},
    "empty": {"messages": [{"role": "system", "content": ""}, user(""), {"role": "assistant", "content": ""}]},
    "parts": {"messages": [user([{"type": "text", "text": "one tw"}, {"type": "text", "text": "o three"}])]},
    "stop": {"messages": [user("?"), {"role": "assistant", "content": "a call", "stop": "eom"}]},
    "tools": {"messages": [user("Weather?")], "tools": [WEATHER, WEATHER["function"] | {"name": "other"}]},
    "tools_system": {"messages": [{"role": "system", "content": "Be brief."}, user("Weather?")], "tools": [WEATHER]},
    "tools_environment": {
        "messages": [{"role": "system", "content": "Environment: python\n"}, user("Weather?"), call("f", {})],
        "tools": [WEATHER],
    },
    "environment": {
        "messages": [{"role": "system", "content": "Environment: ipython\nTools: x"}, user("?"), call("f", {"a": 1})]
    },
    "json_call": {
        "messages": [user("?"), call("get_weather", ARGUMENTS), {"role": "tool", "content": '{"t": 21}'}],
    },
    "json_call_tools": {
        "messages": [user("?"), call("get_weather", ARGUMENTS, content="So:"), {"role": "ipython", "content": "rain"}],
        "tools": [WEATHER],
    },
    "two_calls": {
        "messages": [
            user("both"),
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}] * 2},
        ]
    },
    "systems": {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            user("?"),
            {"role": "system", "content": "Be long."},
            call("f", ""),
        ]
    },
    "search": {"messages": [user("?"), call("brave_search", {"query": 'the "best" é'}), user("and?")]},
    "code": {"messages": [user("?"), call("code_interpreter", {"code": "print(1)\nprint(2)"}, content="")]},
}


def main() -> None:
    """Write tokenizers.json next to this file."""
    text = json.loads((HERE / "text.json").read_text(encoding="utf-8"))
    ours = Tokenizer.from_ranks({base64.b64decode(t): i for i, t in enumerate(text["small_tokens"])})
    strings = {n: s["text"] for n, s in text["strings"].items() if n != "lone_surrogates"}

    def digest(ids: list[int]) -> list:
        return [len(ids), hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        huggingface_vocabulary.write(ours.vocabulary, folder, model_max_length=4096)
        chat_template.write(Llama3Format(ours).template, folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        ours.save(folder / "small.model")
        converted = TikTokenConverter(vocab_file=str(folder / "small.model"), pattern=SPLIT_PATTERN).converted()
        merges = json.loads(converted.to_str())["model"]["merges"]
        fields = gguf_vocabulary.fields(ours.vocabulary)
        cpp = llama_cpp(fields, folder / "small.gguf")
        golden = {
            "transformers": {
                "bos_eos_pad": [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id],
                "size": len(theirs),
                "model_max_length": theirs.model_max_length,
                "with_bos": theirs("with begin").input_ids,
                "strings": {n: digest(theirs(s, add_special_tokens=False).input_ids) for n, s in special_free(strings)},
                "merges": hashlib.sha256(json.dumps(merges).encode()).hexdigest(),
            },
            "template": hashlib.sha256(llama3_template.CHAT_TEMPLATE.encode()).hexdigest(),
            "dialogs": {
                name: case
                | {"text": theirs.apply_chat_template(tokenize=False, **{"add_generation_prompt": True} | rename(case))}
                for name, case in DIALOGS.items()
            },
            "fields": hashlib.sha256(json.dumps(fields).encode()).hexdigest(),
            "llama_cpp": {
                "with_bos": cpp.tokenize(b"with begin", add_bos=True, special=False),
                "strings": {n: digest(cpp.tokenize(s.encode(), add_bos=False)) for n, s in special_free(strings)},
            },
        }
    (HERE / "tokenizers.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def rename(case: dict) -> dict:
    """Return the arguments of `apply_chat_template`."""
    return {"conversation" if key == "messages" else key: value for key, value in case.items()}


def special_free(strings: dict[str, str]) -> list[tuple[str, str]]:
    """Return the strings that are not empty and have no name of a control token."""
    return [(name, text) for name, text in strings.items() if "<|" not in text and text]


def llama_cpp(fields: dict, path: Path) -> Llama:
    """Return a llama.cpp with the vocabulary alone, without a model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(fields["model"])
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["token_types"])
    writer.add_token_merges(fields["merges"])
    writer.add_bos_token_id(fields["bos"])
    writer.add_eos_token_id(fields["eos"])
    writer.add_add_bos_token(fields["add_bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Llama(str(path), vocab_only=True, verbose=False)


if __name__ == "__main__":
    main()
