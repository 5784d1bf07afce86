"""Claims about the chat format of a run: it is the one of init_from or of data.chat_format, and the folder keeps it."""

import json

import pytest

from helpers import sound
from helpers.files import write
from helpers.runs import text_run
from llama_jax.data import prepare
from llama_jax.errors import ConfigError
from llama_jax.text import chat_template
from llama_jax.text.chat_format import choose
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.record_encoder import RecordEncoder
from llama_jax.train import setup
from llama_jax.weights import export
from llama_jax.weights.model_files import Metadata

SOURCE = (
    "{{ strftime_now('%Y') }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '\n' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)
TEMPLATE = ChatTemplate({"default": SOURCE}, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
DIALOG = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with a chat template of its own."""
    folder = tmp_path_factory.mktemp("models") / "base"
    leaves = sound.random_leaves(sound.CONFIG)
    export.save(folder, sound.CONFIG, leaves, Metadata(sound.tokenizer(), chat_template=TEMPLATE), format="hf")
    return folder


def run_of(tmp_path, base, **changes):
    path = write(tmp_path / "d.jsonl", [{"messages": DIALOG}] * 8)
    return text_run(tmp_path, init_from=str(base), data__train=(path,), data__sequence_length=64, **changes)


def test_a_run_takes_the_template_of_its_base_and_keeps_it(tmp_path, base):
    run, tokenizer, folder = run_of(tmp_path, base), sound.tokenizer(), tmp_path / "run"
    folder.mkdir()
    chat = setup.chat_format(run, folder, tokenizer, resuming=False)
    assert chat.template.sources == TEMPLATE.sources and chat.template.tokens["eos_token"] == "<|eot_id|>"
    assert chat_template.read_folder(folder) == chat.template
    ids = chat.encode(DIALOG, add_generation_prompt=False)
    assert tokenizer.decode(ids).startswith("2024<|start_header_id|>user\nHi<|eot_id|>")  # the day of data.chat_date
    again = setup.chat_format(run, folder, tokenizer, resuming=True)
    assert again.fingerprint == chat.fingerprint and again.encode(DIALOG) == chat.encode(DIALOG)
    rows, _ = prepare.rows(run, RecordEncoder(tokenizer, chat), lambda *_: None)
    store = rows.parts[0].store
    assert store.tokens[: len(ids)].tolist() == ids
    learned = store.tokens[: len(ids)][store.targets(0, len(ids))].tolist()
    assert tokenizer.decode(learned) == "Yo<|eot_id|>"


def test_a_run_can_take_another_format(tmp_path, base):
    tokenizer, folder = sound.tokenizer(), tmp_path / "run"
    folder.mkdir()
    reference = setup.chat_format(run_of(tmp_path, base, data__chat_format="llama3"), folder, tokenizer, resuming=False)
    assert reference.name == "llama3"
    kept = choose(tokenizer, chat_template.read_folder(folder))
    assert kept.name == "llama3"  # and not the template of the base
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    run = run_of(tmp_path, base, data__chat_format=str(tmp_path / "mine.jinja"))
    chat = setup.chat_format(run, folder, tokenizer, resuming=False)
    assert tokenizer.decode(chat.encode(DIALOG)) == "HiYo"
    (tmp_path / "mine.jinja").unlink()
    assert setup.chat_format(run, folder, tokenizer, resuming=True).encode(DIALOG) == chat.encode(DIALOG)
    with pytest.raises(ConfigError, match="data.chat_format: chat format .*' must be auto, llama3 or the file"):
        setup.chat_format(run, folder, tokenizer, resuming=False)
    with pytest.raises(ConfigError, match="data.chat_date='today' must be a day such as 2024-07-26"):
        run_of(tmp_path, base, data__chat_date="today")


def test_a_damaged_template_costs_the_template_and_not_the_model(tmp_path, base, caplog):
    from llama_jax.weights.open import open_source

    config = json.loads((base / "tokenizer_config.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": 3}))
    assert open_source(copy).metadata.chat_template is None
    assert "the chat template cannot be used" in caplog.text
