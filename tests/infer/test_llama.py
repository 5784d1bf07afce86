"""The public face: what it takes, what it gives, and what it says no to."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from helpers import sound
from helpers.tokenizers import byte_tokenizer
from llama_jax import config as configs
from llama_jax import model, parallel
from llama_jax.checkpoint import Checkpoints
from llama_jax.errors import ConfigError
from llama_jax.infer.llama import Llama
from llama_jax.infer.request import Piece
from llama_jax.infer.result import Result
from llama_jax.params import init_params, stack, unstack
from llama_jax.text import Tokenizer, chat_template, encode_dialog
from llama_jax.weights.formats import peft
from llama_jax.weights.open import open_source

CONFIG = configs.size("tiny")


@functools.cache
def tokenizer():
    return byte_tokenizer()


@functools.cache
def params():
    stacked = init_params(CONFIG, jax.random.key(0))
    return unstack(jax.tree.map(lambda a: a * 6 if a.ndim > 2 else a, stacked))


@functools.cache
def llama():
    return Llama(CONFIG, params(), tokenizer())


@functools.cache
def bare():
    return Llama(CONFIG, params())


def parrot(text):
    """A model that generates `text` byte by byte for any prompt: after position p comes the text's byte p."""
    ids = [*text.encode(), tokenizer().eot_id]

    class Parrot:
        """Stands in for the engine."""

        rows = capacity = 0
        at = 0

        def __init__(self, real):
            self._real = real

        def __getattr__(self, name):
            return getattr(self._real, name)

        def resize(self, keep, *, rows, capacity):
            self.rows, self.capacity = rows, capacity

        def insert(self, requests):
            self.at, self.most = 0, requests[0].max_new_tokens

        def prefill(self, fills):
            pass

        def decode(self, alive, *, limit, **options):
            end = min(self.at + limit, len(ids), self.most)
            piece, self.at = ids[self.at : end], end
            done = end == min(len(ids), self.most)
            return [Piece(tokens=piece, logprobs=[0.0] * len(piece), top=[], done=done, steps=len(piece))]

    it = Llama(CONFIG, params(), tokenizer())
    it._set_engine(Parrot(it.engine))
    return it


def test_one_prompt_gives_one_result_and_a_list_gives_a_list_in_its_order():
    one = llama().generate("ab", max_new_tokens=5, temperature=0)
    assert isinstance(one, Result) and len(one.tokens) == len(one.logprobs) == 5
    ids = tokenizer().encode("ab", bos=True)
    assert llama().generate(ids, max_new_tokens=5, temperature=0).tokens == one.tokens
    assert llama().generate(np.array(ids), max_new_tokens=5, temperature=0).tokens == one.tokens
    prompts = ["a", "a long prompt first in its group", "ab", ids, "abc"]
    several = llama().generate(prompts, max_new_tokens=5, temperature=0, batch_size=2, progress=False)
    assert [r.tokens for r in several[2:4]] == [one.tokens] * 2
    for prompt, result in zip(prompts, several, strict=True):
        assert llama().generate(prompt, max_new_tokens=5, temperature=0).tokens == result.tokens


def test_logits_are_those_of_the_forward_pass_at_every_length():
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 33))
    whole = llama().logits(ids)
    assert whole.shape == (2, 33, CONFIG.vocab_size) and whole.dtype == jnp.float32
    hidden, _ = model.forward(CONFIG, params(), jnp.asarray(ids), jnp.broadcast_to(jnp.arange(33), (2, 33)), None)
    np.testing.assert_allclose(whole, model.unembed(CONFIG, params(), hidden), atol=1e-4)
    np.testing.assert_allclose(llama().logits(ids[:, :7].tolist()), whole[:, :7], atol=1e-4)


def test_stacked_and_unrolled_weights_make_the_same_text():
    stacked = Llama(CONFIG, stack(params()))
    assert stacked.generate([1, 2, 3], max_new_tokens=8, temperature=0) == bare().generate(
        [1, 2, 3], max_new_tokens=8, temperature=0
    )


def test_a_text_ends_with_the_stop_token_that_is_not_in_its_text():
    free = bare().generate([5, 6], max_new_tokens=30, temperature=0.9, seed=3)
    assert free.finish_reason == "length" and len(free.tokens) == 30 and free.text == ""
    stop = free.tokens[7]
    cut = bare().generate([5, 6], max_new_tokens=30, temperature=0.9, seed=3, stop_tokens=[stop])
    assert cut.finish_reason == "stop"
    assert cut.tokens == free.tokens[: free.tokens.index(stop) + 1]
    said = parrot("hello").generate("x")
    assert (said.text, said.finish_reason, said.tokens[-1]) == ("hello", "stop", tokenizer().eot_id)


def test_seeds_count_up_from_one_or_are_given_each():
    same = ["once"] * 3
    a = llama().generate(same, max_new_tokens=8, temperature=1.5, top_p=1.0, seed=10)
    assert len({tuple(r.tokens) for r in a}) == 3
    b = llama().generate(same, max_new_tokens=8, temperature=1.5, top_p=1.0, seed=[12, 11, 10])
    assert [r.tokens for r in b] == [r.tokens for r in a[::-1]]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_stream_joins_to_what_generate_makes(temperature):
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 4}
    result = llama().generate("tell me", **options)
    assert "".join(llama().stream("tell me", **options)) == result.text
    assert list(bare().stream([1, 2], **options)) == bare().generate([1, 2], **options).tokens


def test_a_stream_never_breaks_a_character_and_hides_control_tokens():
    text = "naïve 漢字 🦙🏽 e\u0301 end"
    pieces = list(parrot(text).stream("x", max_new_tokens=100))
    assert "".join(pieces) == text and len(pieces) > 3
    assert all("\ufffd" not in piece for piece in pieces)
    cut = list(parrot("🦙🦙").stream("x", max_new_tokens=6))
    assert "".join(cut) == "🦙\ufffd"  # an unfinished character at the limit is shown as one


def test_chat_asks_in_the_dialog_format_and_streams_the_same():
    messages = [{"role": "user", "content": "hi"}]
    ids = encode_dialog(tokenizer(), messages)[0]
    expected = llama().generate(ids, max_new_tokens=12, temperature=0)
    answer = llama().chat(messages, max_new_tokens=12, temperature=0)
    assert dataclasses.replace(answer, message=None) == expected
    assert answer.message["tokens"] == answer.tokens and answer.message["content"] == answer.text
    again = llama().encode_dialog([*messages, answer.message, messages[0]])
    assert again[: len(ids) + len(answer.tokens)] == ids + answer.tokens
    assert "".join(llama().stream_chat(messages, max_new_tokens=12, temperature=0)) == expected.text


def test_ids_beyond_the_tokenizer_are_left_out_of_the_text():
    wide = dataclasses.replace(CONFIG, vocab_size=600)
    weights = unstack(init_params(wide, jax.random.key(1)))
    result = Llama(wide, weights, tokenizer()).generate("a", max_new_tokens=20, temperature=5.0, top_p=1.0)
    assert max(result.tokens) >= 512
    assert result.text == tokenizer().decode([i for i in result.tokens if i < 512], skip_special=True)


def test_a_mesh_of_axis_sizes_makes_the_same_tokens():
    mesh = parallel.make_mesh({"tensor": 2}, jax.devices()[:2])
    split = Llama(CONFIG, params(), tokenizer(), mesh=mesh)
    options = {"max_new_tokens": 10, "temperature": 0}
    assert split.generate(["ab", "c"], **options) != []
    for a, b in zip(split.generate(["ab", "c"], **options), llama().generate(["ab", "c"], **options), strict=True):
        assert a.tokens == b.tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([]), "prompts is empty"),
        (lambda m: m.generate([[]]), "prompt 0 is empty"),
        (lambda m: m.generate([[1], [1, 512]]), "prompt 1 holds id 512.*0 to 511"),
        (lambda m: m.generate([-1]), "id -1"),
        (lambda m: m.generate([1.5]), "the prompt must be a text or a flat list"),
        (lambda m: m.generate(7), "prompts must be a text"),
        (lambda m: m.generate("a", max_new_tokens=0), "max_new_tokens must be a whole number of at least 1"),
        (lambda m: m.generate("a", max_new_tokens=131_072), "Use max_new_tokens of at most 131,070"),
        (lambda m: m.generate("a", temperature=float("nan")), "temperature must be"),
        (lambda m: m.generate("a", batch_size=0), "batch_size must be"),
        (lambda m: m.generate("a", seed=1.5), "seed must be"),
        (lambda m: m.generate(["a", "b"], seed=[1]), "1 seeds for 2 prompts"),
        (lambda m: m.generate("a", stop_tokens=[512]), "stop token 512"),
        (lambda m: m.stream(["a", "b"]), "stream takes one prompt"),
        (lambda m: m.generate(["a"], overrides=[{"temprature": 1}]), "unknown option 'temprature'; did you mean"),
        (lambda m: m.generate("a", overrides=[{}, {}]), "overrides must be a list of 1 dicts"),
        (lambda m: m.generate("a", n=3, best_of=2), "best_of=2 is smaller than n=3"),
        (lambda m: m.generate("a", stop=""), "a stop string is empty"),
        (lambda m: m.generate("a", stop=[1]), "stop must be a text or a list of texts"),
        (lambda m: m.generate("a", ignore_eos=True, stop_tokens=[3]), "give ignore_eos or stop_tokens"),
        (lambda m: m.generate("a", stop_tokens=range(65)), "the option stop_tokens names 65 stop tokens"),
        (lambda m: m.generate([{"role": "user", "content": "Hi"}]), "chat.. takes the messages of a dialog"),
        (lambda m: m.generate("a", top_logprobs=-1), "top_logprobs must be a whole number from 0 to 512"),
        (lambda m: m.generate("a", banned_tokens=[512]), "the sampling settings name token 512"),
        (lambda m: m.generate("a", regex="a", choices=["b"]), "give one of .*, got regex and choices"),
        (lambda m: m.generate("a", regex="(("), "regex cannot be used"),
        (lambda m: m.generate("a", json_schema={"type": "foo"}), "json_schema cannot be used"),
        (lambda m: m.generate("a", json_schema="{"), "json_schema is not JSON"),
        (lambda m: m.generate("a", speculate="magic"), "speculate must be one of lookup, draft"),
        (lambda m: m.generate("a", speculate="draft"), "needs a draft model"),
        (lambda m: m.hidden("a", pool="max"), "pool must be one of"),
        (lambda m: m.hidden([[]]), "text 0 is empty"),
        (lambda m: m.chat([]), "messages is empty"),
        (lambda m: m.logits([[1], [1, 2]]), "shape"),
        (lambda m: m.logits([1, 2]), "shape"),
        (lambda m: m.logits([[1, 600]]), "id 600"),
    ],
)
def test_what_cannot_work_is_refused_with_the_mend(call, message):
    with pytest.raises(ValueError, match=message):
        call(llama())


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda m: m.save_pretrained("x"), r"Llama has no attribute 'save_pretrained'; here it is save\(path\)"),
        (lambda m: m.eval(), "Llama has no attribute 'eval'; here it is the only mode: leave it out"),
        (lambda m: type("Own", (Llama,), {}).from_pretrained, r"Own has no .*; here it is llama_jax.load\("),
        (lambda m: m.genrate("x"), "Llama has no attribute 'genrate'; did you mean 'generate'?"),
        (lambda m: Llama.from_pretrained, r"Llama has no attribute 'from_pretrained'; here it is llama_jax.load\("),
        (lambda m: m.config.hidden_size, "ModelConfig has no attribute 'hidden_size'; here it is embed_dim"),
        (lambda m: byte_tokenizer().eos_token_id, "Tokenizer has no attribute 'eos_token_id'; here it is eos_id"),
        (
            lambda m: llama_jax.AutoModelForCausalLM,
            r"no attribute 'AutoModelForCausalLM'; instead, use llama_jax.load\(",
        ),
        (lambda m: llama_jax.SFTTrainer, "instead, use from llama_jax.train.run import train"),
    ],
    ids=["save", "mode", "subclass", "near", "class", "config", "tokenizer", "model", "trainer"],
)
def test_an_attribute_of_another_library_is_answered_with_the_one_here(read, words):
    with pytest.raises(AttributeError, match=words):
        read(llama())


def test_a_prompt_that_fills_the_model_is_refused_with_the_mend():
    short = Llama(dataclasses.replace(CONFIG, max_seq_len=16), params())
    with pytest.raises(ConfigError, match="Use a shorter prompt"):
        short.generate([1] * 16, max_new_tokens=1)
    assert len(short.generate([1] * 15, max_new_tokens=1).tokens) == 1


def test_a_model_without_a_tokenizer_takes_ids_only():
    with pytest.raises(ConfigError, match="no tokenizer"):
        bare().generate("text")
    with pytest.raises(ConfigError, match="chat needs a tokenizer"):
        bare().chat([{"role": "user", "content": "hi"}])


def test_a_tokenizer_of_a_larger_vocabulary_is_refused():
    small = dataclasses.replace(CONFIG, vocab_size=200)  # fewer than plain text needs
    weights = unstack(init_params(small, jax.random.key(0)))
    with pytest.raises(ConfigError, match="512 ids but the model only 200"):
        Llama(small, weights, tokenizer())


def write_hugging_face(folder):
    sound.save_params(folder, CONFIG, params())
    tokenizer().save(folder / "tokenizer.model")


def test_load_reads_a_hugging_face_folder(tmp_path):
    write_hugging_face(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    loaded = llama_jax.load(tmp_path)
    options = {"max_new_tokens": 9, "temperature": 0, "stop_tokens": ()}
    assert loaded.generate("ab", **options) == llama().generate("ab", **options)
    assert loaded.stop_tokens == (5, 6, *tokenizer().stop_tokens)
    assert loaded.engine.dtype == jnp.float32
    half = llama_jax.load(tmp_path, dtype="bfloat16", mesh={"data": 2, "tensor": 2})
    assert half.params["embed"].dtype == jnp.bfloat16 and half.mesh.size == 4
    assert len(half.generate("ab", max_new_tokens=4).tokens) <= 4


def test_load_reads_a_run_folder_on_any_mesh(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": CONFIG.to_dict()}))
    tokenizer().save(tmp_path / "tokenizer.model")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, params=stack(params()), rest={"step": jnp.array(3)}, meta={})
    checkpoints.close()
    options = {"max_new_tokens": 9, "temperature": 0}
    expected = llama().generate("ab", **options)
    assert llama_jax.load(tmp_path).generate("ab", **options) == expected
    assert llama_jax.load(tmp_path, mesh={"data": 2, "tensor": 2}).generate("ab", **options).tokens == expected.tokens


def test_a_tokenizer_that_is_not_the_models_costs_the_tokenizer_alone(tmp_path, caplog):
    write_hugging_face(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"bos_token_id": tokenizer().bos_id}))
    path = tmp_path / "tokenizer.model"
    if not path.exists():
        tokenizer().save(path)
    assert llama_jax.load(tmp_path).tokenizer.bos_id == tokenizer().bos_id
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:256]))  # still parses
    if Tokenizer(path).vocab_size < tokenizer().vocab_size:
        assert llama_jax.load(tmp_path).tokenizer is None  # the model opens with ids, and a line says why
        assert re.search("is not the tokenizer of this model.*cut short", caplog.messages[-1])

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    described = {"model": CONFIG.to_dict(), "tokenizer_fingerprint": "0" * 64}
    (tmp_path / "run" / "config.json").write_text(json.dumps(described))
    tokenizer().save(tmp_path / "run" / "tokenizer.model")
    with pytest.raises(ConfigError, match="is not the tokenizer of this model"):
        open_source(tmp_path / "run").tokenizer()


def test_a_run_that_cannot_be_read_says_so_in_a_line(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4):
        checkpoints.save(step, params=stack(params()), rest={"step": jnp.array(step)}, meta={})
    checkpoints.close()
    for text in ("[]", "{", '{"model": "llama3.1-8b"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json (must be|is not valid|has no model)"):
            llama_jax.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": CONFIG.to_dict()}))
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "params")
    assert llama_jax.load(tmp_path, dtype="bfloat16").params["embed"].dtype == jnp.bfloat16
    assert re.search(r"checkpoints/4 is damaged: params/\S+ is missing; trying step 2\n", capsys.readouterr().err)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "params")
    damaged = r"checkpoints/2 is damaged: params/\S+ is missing, and there is no older one"
    with pytest.raises(ConfigError, match=damaged):
        llama_jax.load(tmp_path)


def test_logits_that_are_not_finite_are_an_error():
    broken = {**params(), "norm": {"scale": params()["norm"]["scale"] * jnp.nan}}
    with pytest.raises(ValueError, match="logits are not finite"):
        Llama(CONFIG, broken).generate([1, 2, 3], max_new_tokens=3)


def test_a_path_in_an_unknown_home_is_an_error_that_names_it(tmp_path):
    name = "~nobody_has_this_name/model"
    for call in (
        lambda: llama_jax.load(name),
        lambda: peft.open_adapter(name, CONFIG),
        lambda: chat_template.read_file(name, {}),
    ):
        with pytest.raises(FileNotFoundError, match="its home folder is not known") as error:
            call()
        assert error.value.filename == name


def test_load_names_what_it_looked_for(tmp_path):
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(ConfigError, match="does not exist; did you mean 'quickstart'.*checkpoints/.*safetensors"):
        llama_jax.load(tmp_path / "quickstrat")
    with pytest.raises(ConfigError, match="none of these. Give a run folder"):
        llama_jax.load(tmp_path / "quickstart")
    (tmp_path / "quickstart" / "params.json").write_text("{}")
    with pytest.raises(ConfigError, match="params.json"):
        llama_jax.load(tmp_path / "quickstart")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        llama_jax.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int5"}, "quantize must be one of none, int8, int4, or be left out; got 'int5'"),
        ({"quantize": "int8"}, "int8 needs rows of a multiple of 32 numbers, but the model has embed_dim=48"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"mesh": {"tensors": 2}}, "unknown mesh axis 'tensors'; did you mean 'tensor'"),
        ({"mesh": {"zzz": 2}}, "unknown mesh axis 'zzz'. Allowed: data"),
        ({"mesh": {"tensor": 16}}, "there are 8"),
        ({"kv": "fp4"}, "kv must be one of compute, int8"),
        ({"mesh": {"tensor": "two"}}, "whole number of devices"),
    ],
    ids=str,
)
def test_load_refuses_settings_that_cannot_work(tmp_path, options, message):
    write_hugging_face(tmp_path)
    with pytest.raises(ConfigError, match=message):
        llama_jax.load(tmp_path, **options)


def test_the_compilation_cache_goes_where_it_is_told(tmp_path, monkeypatch):
    from llama_jax import compilation_cache

    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    assert compilation_cache.folder() == tmp_path / "jax"
    monkeypatch.setenv("LLAMA_JAX_CACHE", "off")
    assert compilation_cache.folder() is None
    monkeypatch.delenv("LLAMA_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache.folder() == tmp_path / "llama_jax" / "jax"


# Options of one continuation.

FREE = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, "stop_tokens": ()}


def test_a_stop_string_ends_a_text_also_across_tokens_and_in_a_stream():
    said = parrot("one two STOP three").generate("x", stop=["STOP", "never"], max_new_tokens=60)
    assert (said.text, said.finish_reason, said.stop) == ("one two ", "stop", "STOP")
    assert bytes(said.tokens) == b"one two STOP" and len(said.logprobs) == len(said.tokens)
    pieces = list(parrot("one two STOP three").stream("x", stop="STOP", max_new_tokens=60))
    assert "".join(pieces) == "one two " and not any("S" in piece for piece in pieces)
    whole = "an ST that is no STO, to the end ST"
    assert "".join(parrot(whole).stream("x", stop="STOP", max_new_tokens=60)) == whole
    first = parrot("ab cd ef").generate("x", stop=["ef", "cd ef", "b"])
    assert (first.text, first.stop) == ("a", "b")  # the first in the text counts, not the first in the list


def test_n_results_are_those_of_their_seeds_and_best_of_keeps_the_likeliest():
    each = [llama().generate("once", seed=7 + i, **FREE) for i in range(5)]
    several = llama().generate("once", seed=7, n=5, **FREE)
    assert [r.tokens for r in several] == [r.tokens for r in each] and len({r.text for r in each}) == 5
    best = llama().generate("once", seed=7, n=2, best_of=5, **FREE)
    order = sorted(each, key=lambda r: -sum(r.logprobs) / len(r.logprobs))
    assert [r.tokens for r in best] == [r.tokens for r in order[:2]]
    lists = llama().generate(["once", "twice"], seed=7, n=2, **FREE)
    assert [len(group) for group in lists] == [2, 2] and [r.index for group in lists for r in group] == [0, 0, 1, 1]


def test_each_prompt_may_have_options_of_its_own():
    overrides = [
        {"temperature": 0},
        {"max_new_tokens": 3},
        {"stop_tokens": [5]},
        {"banned_tokens": list(range(128, 512))},
    ]
    together = llama().generate(["a"] * 4, overrides=overrides, seed=[1, 1, 1, 1], **FREE)
    for own, result in zip(overrides, together, strict=True):
        assert llama().generate("a", seed=1, **{**FREE, **own}).tokens == result.tokens
    assert len(together[1].tokens) == 3 and max(together[3].tokens) < 128
    assert together[0].prompt_tokens == tokenizer().encode("a", bos=True)


def test_ignore_eos_and_min_tokens_keep_a_text_going():
    free = bare().generate([5, 6], temperature=0.9, seed=3, max_new_tokens=30, stop_tokens=())
    stop = free.tokens[4]
    it = Llama(CONFIG, params(), stop_tokens=[stop])
    options = {"temperature": 0.9, "seed": 3, "max_new_tokens": 30}
    assert it.generate([5, 6], **options).tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert it.generate([5, 6], ignore_eos=True, **options).tokens == free.tokens
    late = it.generate([5, 6], min_tokens=20, **options)
    assert stop not in late.tokens[:20]


def test_log_probabilities_of_prompt_and_text_are_those_of_the_logits():
    result = llama().generate("a prompt", prompt_logprobs=3, top_logprobs=2, max_new_tokens=5, temperature=0)
    ids = [*result.prompt_tokens, *result.tokens]
    logprobs = np.asarray(jax.nn.log_softmax(llama().logits([ids])[0], axis=-1))
    start = len(result.prompt_tokens)
    expected = logprobs[np.arange(start - 1), ids[1:start]]
    np.testing.assert_allclose(result.prompt_logprobs, expected, atol=1e-4)
    for best, row in zip(result.prompt_top_logprobs, logprobs, strict=False):
        assert [i for i, _ in best] == np.argsort(-row)[:3].tolist()
    assert len(result.prompt_top_logprobs) == start - 1
    for best, row in zip(result.top_logprobs, logprobs[start - 1 :], strict=False):
        np.testing.assert_allclose([p for _, p in best], np.sort(row)[::-1][:2], atol=1e-4)


def test_hidden_states_are_those_under_the_logits():
    texts = ["a", "a longer text", [1, 2, 3]]
    states = llama().hidden(texts, pool=None, batch_size=2)
    for text, states_TD in zip(texts, states, strict=True):
        ids = text if isinstance(text, list) else tokenizer().encode(text, bos=True)
        assert states_TD.shape == (len(ids), CONFIG.embed_dim) and states_TD.dtype == np.float32
        logits = model.unembed(CONFIG, params(), jnp.asarray(states_TD))
        np.testing.assert_allclose(logits, llama().logits([ids])[0], atol=1e-4)
    np.testing.assert_allclose(llama().hidden("a longer text"), states[1].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(llama().hidden(texts, pool="last")[2], states[2][-1], atol=1e-5)


def test_several_dialogs_are_answered_together_as_alone():
    dialogs = [[{"role": "user", "content": text}] for text in ("hi", "a longer question", "?")]
    together = llama().chat(dialogs, max_new_tokens=8, temperature=0)
    assert [r.message["content"] for r in together] == [r.text for r in together]
    for dialog, result in zip(dialogs, together, strict=True):
        assert llama().chat(dialog, max_new_tokens=8, temperature=0).tokens == result.tokens


def test_new_weights_forget_what_the_cache_holds():
    it = Llama(CONFIG, params(), tokenizer())
    first = it.generate("a text of some length", max_new_tokens=5, temperature=0)
    other = unstack(init_params(CONFIG, jax.random.key(5)))
    it.set_params(other)
    fresh = it.generate("a text of some length", max_new_tokens=5, temperature=0)
    assert fresh.cached_tokens == 0 and fresh.tokens != first.tokens
    assert fresh.tokens == Llama(CONFIG, other).generate(fresh.prompt_tokens, max_new_tokens=5, temperature=0).tokens
    again = it.generate("a text of some length", max_new_tokens=5, temperature=0)
    assert again.cached_tokens > 0 and again.tokens == fresh.tokens
