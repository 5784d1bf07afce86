"""Claims about names of control tokens in whole texts: prompts, and records of training data."""

import pytest

from helpers.tokenizers import byte_tokenizer
from llama_jax.errors import ConfigError
from llama_jax.infer import inputs
from llama_jax.text import control_tokens, encode_dialog
from llama_jax.text.chat_format import Llama3Format, TemplateFormat
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.record_encoder import NameInText, RecordEncoder
from llama_jax.text.tokenizer import Tokenizer

DIALOG = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One id per byte, so that ids can be read."""
    return byte_tokenizer()


@pytest.fixture(scope="module")
def rendered(tokenizer) -> tuple[str, list[int]]:
    """A dialog as text, and its ids."""
    ids = encode_dialog(tokenizer, DIALOG, add_generation_prompt=False)[0]
    return tokenizer.decode(ids), ids


def test_a_rendered_dialog_becomes_its_ids_where_that_is_asked_for(tokenizer, rendered, caplog):
    text, ids = rendered
    assert inputs.encoded(tokenizer, [text, [1, 2]], ["a", "b"], True) == [ids, [1, 2]]
    assert not caplog.records
    plain = [tokenizer.bos_id, *text.encode()]
    assert inputs.encoded(tokenizer, [text], ["a"], False) == [plain] and not caplog.records
    assert inputs.encoded(tokenizer, ["no names", text, text], list("abc"), None)[1:] == [plain, plain]
    (record,) = caplog.records
    assert "b holds '<|begin_of_text|>'" in record.message and "--parse_special" in record.message


def test_neither_the_beginning_nor_the_end_is_doubled(tokenizer, rendered):
    text, ids = rendered
    both = control_tokens.encode_text(tokenizer, text, parse_special=True, bos=True, eos=True)
    assert both == ids and ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eot_id
    bare = control_tokens.encode_text(tokenizer, "a", parse_special=True, bos=True, eos=True)
    assert bare == [tokenizer.bos_id, ord("a"), tokenizer.eos_id]


def test_a_record_with_a_name_is_refused_until_the_user_says_what_it_is(tokenizer, rendered):
    text, ids = rendered
    encoders = {value: RecordEncoder(tokenizer, Llama3Format(tokenizer), value) for value in ("stop", "yes", "no")}
    with pytest.raises(NameInText, match="holds '<|begin_of_text|>', .*data.parse_special=yes .*data.parse_special=no"):
        encoders["stop"].encode(text, bos=True, eos=True)
    assert isinstance(NameInText(""), ConfigError)
    assert encoders["yes"].encode(text, bos=True, eos=True) == ids
    assert encoders["no"].encode(text) == list(text.encode())
    sound = [encoder.encode("sound", bos=True, eos=True) for encoder in encoders.values()]
    assert sound == [[tokenizer.bos_id, *b"sound", tokenizer.eos_id]] * 3
    assert [e.encode_dialog(DIALOG)[0] for e in encoders.values()] == [ids] * 3


def test_the_fingerprint_changes_with_everything_that_ids_depend_on(tokenizer):
    def fingerprint(source: str | None, parse: str = "stop", **options) -> str:
        chat = Llama3Format(tokenizer)
        if source is not None:
            chat = TemplateFormat(tokenizer, ChatTemplate({"default": source}), **options)
        return RecordEncoder(tokenizer, chat, parse).fingerprint

    assert fingerprint(None) == tokenizer.fingerprint  # what was tokenized before stays valid
    day, other = (2024, 7, 26), (2024, 7, 27)
    dated = [fingerprint("{{ strftime_now('%d') }}", date=date) for date in (day, other)]
    all_of_them = [fingerprint(None), fingerprint(None, "yes"), fingerprint(None, "no"), fingerprint("a"), *dated]
    assert len(set(all_of_them)) == len(all_of_them)
    assert fingerprint("a", date=day) == fingerprint("a", date=other)  # it reads no date


def test_a_name_that_is_plain_text_is_marked_for_people(tokenizer):
    ids = [*tokenizer.encode("a<|eot_id|>b"), tokenizer.eot_id]
    assert control_tokens.shown(tokenizer, ids) == "a<|eot_id|>\u27e8as text\u27e9b<|eot_id|>"
