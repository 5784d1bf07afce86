"""Mistakes in Python calls: the error is one line with the argument and what is allowed."""

import jax
import pytest

import llama_jax
from helpers.tokenizers import byte_tokenizer
from llama_jax import config as configs
from llama_jax.errors import ConfigError
from llama_jax.infer.llama import Llama
from llama_jax.params import init_params
from llama_jax.text.chat_template import read_folder
from llama_jax.train.run import train


@pytest.fixture(scope="module")
def llama():
    config = configs.size("tiny")
    return Llama(config, init_params(config, jax.random.key(0)), byte_tokenizer(), stop_tokens=())


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (None, {}, "the model must be the name of a folder, a file or a hub id, got None"),
        ("", {}, "the model must be the name of a folder, a file or a hub id, got ''"),
        (3.5, {}, "got 3.5"),
        ("x", {"adapters": ["x"]}, "adapters must be one folder or hub id, or several by name"),
        ("x", {"adapters": {"a": None}}, "got {'a': None}"),
        ("x", {"adapters": ""}, "got {'': ''}"),
        ("x", {"quantize": 8}, "quantize must be one of none, int8, int4"),
        ("x", {"dtype": [1]}, "dtype must be one of"),
    ],
)
def test_load_says_what_its_arguments_may_be(source, options, words):
    with pytest.raises(ConfigError) as caught:
        llama_jax.load(source, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_mesh_is_sizes_by_axis():
    from llama_jax.infer.inputs import as_mesh

    for mesh in ("tensor=2", ["tensor"], 2):
        with pytest.raises(ConfigError, match='mesh must be a jax Mesh or sizes by axis such as {"tensor": 2}, got'):
            as_mesh(mesh)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda llama: llama_jax.load("x", quantise="int8"),
            "load() has no argument 'quantise'; did you mean 'quantize'?",
        ),
        (lambda llama: llama.generate("x", tempreture=1), "generate() has no argument 'tempreture'; did you mean"),
        (lambda llama: llama.stream("x", n=2), "stream() has no argument 'n'"),
        (lambda llama: llama.save("x", "hf", shard=3), "save() has no argument 'shard'"),
        (lambda llama: llama.generate("x", num_return_sequences=2), "did you mean 'n'? allowed: "),
        (lambda llama: llama_jax.load("x", adapter="y"), "did you mean 'adapters'? allowed: source, dtype"),
    ],
)
def test_an_unknown_argument_is_named_with_the_nearest(llama, call, words):
    with pytest.raises(TypeError) as caught:
        call(llama)
    assert words in str(caught.value) and "allowed: " in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda llama: llama_jax.load("x", device_map="auto"),
            "load() has no argument 'device_map': mesh={\"tensor\": N}",
        ),
        (lambda llama: llama_jax.load("x", load_in_4bit=True), 'write quantize="int4"'),
        (lambda llama: llama_jax.load("x", revision="main"), "write owner/name@REVISION"),
        (lambda llama: llama.generate(input_ids=[[1]], attention_mask=[[1]]), "the first argument is the prompt"),
        (lambda llama: llama.generate("x", max_length=9), "write max_new_tokens, which does not count the prompt"),
        (lambda llama: llama.generate("x", do_sample=True), "temperature=0 is greedy"),
        (
            lambda llama: llama_jax.Llama(model_path="x.gguf", n_ctx=9),
            "the model is the first argument of llama_jax.load",
        ),
        (lambda llama: llama("x"), "a Llama is not a function: generate(text)"),
        (lambda llama: llama.generate("x", streamer=1), "stream(prompt) and stream_chat(messages) yield the text"),
        (
            lambda llama: llama.generate("x", tokenizer=1),
            "'tokenizer': the tokenizer is that of the model: leave it out",
        ),
        (lambda llama: llama.save("x", token="hf_x"), "set the environment variable HF_TOKEN"),
        (lambda llama: llama_jax.load(model="x"), "'model': the model is the first argument of llama_jax.load"),
        (lambda llama: train({}, tokenizer=1), "'tokenizer': the tokenizer is that of the run's init_from"),
        (lambda llama: train({}, max_seq_length=1), "write the key data.sequence_length into the run"),
        (lambda llama: train({}, load_in_4bit=1), "did you mean the run's key 'lora.base'?"),
        (lambda llama: train({}, bf16=1), "did you mean 'train.compute_dtype'?"),
        (lambda llama: byte_tokenizer().encode("x", max_length=1), "encode gives all ids of a text"),
    ],
)
def test_an_argument_of_another_library_is_answered(llama, call, words):
    with pytest.raises(TypeError) as caught:
        call(llama)
    assert words in str(caught.value) and "allowed: " not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda llama: llama.generate(),
            "generate(): missing a required argument: 'prompts'; its arguments are prompts",
        ),
        (
            lambda llama: llama.save("x", "hf", 5),
            "save(): too many positional arguments; its arguments are path, format",
        ),
        (lambda llama: llama.tokenizer.encode(), "encode(): missing a required argument: 'text'"),
        (lambda llama: configs.ModelConfig(), "ModelConfig(): missing a required argument: 'vocab_size'"),
    ],
)
def test_a_wrong_call_names_the_arguments(llama, call, words):
    with pytest.raises(TypeError) as caught:
        call(llama)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llama: llama.generate(None), "prompts must be a text"),
        (lambda llama: llama.generate(["x", None]), "prompt 1 must be a text or a flat list of token ids"),
        (lambda llama: llama.generate([10**400]), "the prompt holds id 1000"),
        (lambda llama: llama.generate("x", max_new_tokens=10**400), "max_new_tokens must be a whole number below 2 to"),
        (lambda llama: llama.generate("x", temperature=10**400), "temperature must be"),
        (lambda llama: llama.generate("x", stop_tokens="eot"), "stop_tokens must be a list of token ids, got 'eot'"),
        (lambda llama: llama.generate("x", n=1 << 40), "n and best_of must be at most 10,000, got 10995"),
        (lambda llama: llama.generate("x", ignore_eos="false"), "ignore_eos must be true or false, got 'false'"),
        (lambda llama: llama.generate("x", parse_special="no"), "parse_special must be True, False or None, got 'no'"),
        (lambda llama: llama.generate("x", speculate=[]), "speculate must be one of lookup, draft, got []"),
        (lambda llama: llama.generate("x", logit_bias={"9" * 5000: 1}), "which is not a token id"),
        (lambda llama: llama.generate("x", banned_tokens=range(512)), "leave no token that could be sampled"),
        (
            lambda llama: llama.generate("x", stop_tokens=[5], allowed_tokens=[5], min_tokens=1),
            "leave no token that could be sampled",
        ),
        (
            lambda llama: llama.generate(["x", "y"], overrides=[{}, {"top_p": 2}]),
            "prompt 1: top_p must be from 0.000001 to 1",
        ),
        (
            lambda llama: llama.generate(["x"], overrides=[{"regex": "("}]),
            "prompt 0: constrained decoding needs a stop",
        ),
        (lambda llama: llama.generate(["x"], overrides=[{"seed": "a"}]), "seed must be a whole number"),
        (
            lambda llama: Llama(llama.config, llama.params, sampling={"temperature": 0}),
            "sampling must be a SamplingParams",
        ),
        (lambda llama: Llama(llama.config, llama.params, mesh="tensor=2"), "mesh must be a jax Mesh or sizes by axis"),
        (lambda llama: Llama(llama.config, llama.params, "tokenizer.model"), "tokenizer must be a llama_jax.Tokenizer"),
        (
            lambda llama: Llama(llama.config, llama.params, draft="smollm2"),
            "draft must be a ModelConfig and its weights",
        ),
        (lambda llama: Llama(llama.config, llama.params, kv="fp4" * 999), "kv must be one of compute, int8, got"),
        (lambda llama: llama.generate("x", top_k=10**5000), "top_k must be a whole number from 0"),
        (lambda llama: llama.use(["a"]), "no adapter ['a']; adapters: none"),
        (lambda llama: llama.add_adapter("a", None), "adapters must be one folder"),
        (lambda llama: llama.save(None, "hf"), "path must be the name of a folder"),
        (lambda llama: llama.save("x", "hf", shard_bytes="1"), "shard_bytes must be a whole number"),
        (lambda llama: llama.set_params(3), "params must be the weights of a model"),
        (lambda llama: llama.set_params({"embeds": 3}), "missing weight ['embed']: the weights are not those"),
    ],
)
def test_a_method_says_what_its_arguments_may_be(llama, call, words):
    with pytest.raises(ConfigError) as caught:
        call(llama)
    assert words in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("messages", ["hi", {"role": "user", "content": "x"}, None, 5])
def test_a_dialog_is_a_list_of_messages(llama, messages):
    with pytest.raises(ValueError, match=r"messages must be a list of dicts such as .*, got .*\("):
        llama.chat(messages)


def test_a_model_without_a_tokenizer_keeps_its_template_and_says_what_chat_needs(llama, tmp_path):
    template = "{{ messages[0].content }}"
    bare = Llama(llama.config, llama.params, None, stop_tokens=(), chat_template=template)
    bare.save(tmp_path / "out", "hf")
    assert read_folder(tmp_path / "out").sources == {"default": template}
    for call in (lambda: bare.chat([{"role": "user", "content": "x"}]), lambda: bare.answer(bare.generate([[1]])[0])):
        with pytest.raises(ConfigError, match="chat needs a tokenizer"):
            call()


def test_a_model_without_weights_says_so_and_takes_others(llama):
    params = llama.params
    text = llama.generate([1, 2, 3], max_new_tokens=2).tokens
    llama.set_params(None)
    for call in (lambda: llama.generate([1, 2, 3]), lambda: llama.logits([[1, 2]]), lambda: list(llama.stream([1, 2]))):
        with pytest.raises(ConfigError, match=r"no weights since set_params\(None\): give it others"):
            call()
    with pytest.raises(ConfigError, match="missing weight"):
        llama.save("x", "hf")
    llama.set_params(params)
    assert llama.generate([1, 2, 3], max_new_tokens=2).tokens == text
