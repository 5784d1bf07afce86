"""peft's adapters: logits and merged weights equal peft's, and invalid adapters raise an error of one line."""

import json
import random
import shutil
import time

import ml_dtypes
import numpy as np
import pytest
import tokenizers

import llama_jax
from golden import make_peft as golden
from golden.make_model import VOCAB_STRIDE, random_weights
from helpers.conversion import convert, tensors
from helpers.errors import refusal
from helpers.folders import encode, make_folder
from helpers.fuzz import mutated, mutated_text
from helpers.numbers import gap
from helpers.paths import GOLDEN_FOLDER
from llama_jax.cli import exits, infer
from llama_jax.errors import ConfigError
from llama_jax.ops.lora import LoraTensor
from llama_jax.weights import adapters
from llama_jax.weights.formats import peft, safetensors
from llama_jax.weights.model_files import Metadata
from llama_jax.weights.open import open_source
from llama_jax.weights.tensor import of_array

FOLDERS = {case: GOLDEN_FOLDER / "peft" / case for case in golden.CASES}
GOLD = np.load(GOLDEN_FOLDER / "peft.npz")
CONFIG = golden.CONFIG
MATCH = 1e-5  # relative to the largest


def off(llama, case):
    return gap(np.asarray(llama.logits(golden.TOKENS))[..., ::VOCAB_STRIDE], GOLD[f"{case}/logits"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("base"), CONFIG, random_weights(CONFIG))


@pytest.fixture(scope="module")
def llama(base):
    return llama_jax.load(base, dtype="float32", adapters=FOLDERS)


@pytest.fixture
def copy(tmp_path):
    """A copy of an adapter with some keys of its config set; ... leaves one out."""

    def copy(case="all_linear", **changes):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(GOLDEN_FOLDER / "peft" / case, folder)
        config = {**json.loads((folder / peft.CONFIG).read_text()), **changes}
        (folder / peft.CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return folder

    return copy


def read(folder):
    """Numbers of an adapter by our path: a, b, scale."""
    opened = peft.open_adapter(folder, CONFIG)
    for _, tensor in opened.tensors():
        tensor.read()
    return {path: [entry.read() for entry in lazy[:3]] for path, lazy in opened.lora.items()}


@pytest.mark.parametrize("case", golden.CASES)
def test_logits_are_pefts(llama, case):
    assert off(llama, "base") < MATCH < 0.1 < off(llama, case)
    assert off(llama.use(case), case) < MATCH


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bases of golden.MORE as folders, by whether the embeddings are tied."""
    folders = {}
    for tied in (False, True):
        config = golden.dataclasses.replace(golden.SMALL, tied_embeddings=tied)
        folders[tied] = make_folder(tmp_path_factory.mktemp("small"), config, random_weights(config))
    return folders


@pytest.mark.parametrize("case", golden.MORE)
def test_logits_are_pefts_for_whole_matrices_new_tokens_dora_and_patterns(small, tmp_path, case):
    folder, base = GOLDEN_FOLDER / "peft" / case, small[golden.small_config(case).tied_embeddings]
    adapted = llama_jax.load(base, dtype="float32", adapters=folder)
    logits = np.asarray(adapted.logits(golden.SMALL_TOKENS))
    kept = np.asarray(logits)[..., :: golden.SMALL_STRIDE]
    assert kept.shape == GOLD[f"{case}/logits"].shape and gap(kept, GOLD[f"{case}/logits"]) < MATCH
    plain = np.asarray(adapted.use(None).logits(golden.SMALL_TOKENS))
    assert gap(logits[..., : plain.shape[-1]], plain) > 0.1
    merged = convert(base, tmp_path / "merged", "hf", "--adapter", str(folder))
    assert gap(llama_jax.load(merged, dtype="float32").logits(golden.SMALL_TOKENS), logits) < MATCH
    saved = adapted.save(tmp_path / "saved", "hf")
    assert gap(llama_jax.load(saved, dtype="float32").logits(golden.SMALL_TOKENS), logits) < MATCH


def test_a_merged_model_has_the_tokenizer_that_knows_the_new_tokens(small, copy, tmp_path, caplog):
    made = tokenizers.Tokenizer(tokenizers.models.BPE({chr(33 + i): i for i in range(64)}, []))
    made.add_special_tokens([f"<new{i}>" for i in range(6)])
    adapter = copy("resized")
    made.save(str(adapter / "tokenizer.json"))
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}<new3>")
    llama = llama_jax.load(convert(small[False], tmp_path / "merged", "hf", "--adapter", str(adapter)))
    assert llama.tokenizer.vocab_size == llama.config.vocab_size == 70
    assert llama.encode_dialog([{"role": "user", "content": "!"}]) == [0, 67]
    (adapter / "tokenizer.json").write_text("{")
    out = convert(small[False], tmp_path / "without", "hf", "--adapter", str(adapter))
    assert not (out / "tokenizer.json").exists() and "the tokenizer of the adapter cannot be used" in caplog.text
    same = peft.open_adapter(copy("tokens"), golden.SMALL)  # no new rows: the tokenizer is the base's
    assert peft.adapted_metadata(Metadata(), same, golden.SMALL) == Metadata()


@pytest.mark.parametrize("case", golden.CASES)
def test_merged_weights_are_pefts_and_the_others_are_the_bases(base, tmp_path, case):
    names = {w.name: w.path for w in adapters.name_table.weights(CONFIG, "huggingface")}
    merged = tensors(convert(base, tmp_path / "out", "hf", "--adapter", str(FOLDERS[case])))
    for name in golden.MERGED:
        assert gap(merged[names[name]][:: golden.ROWS], GOLD[f"{case}/{name}"]) < 1e-6
    touched = peft.open_adapter(FOLDERS[case], CONFIG).lora
    for name, weight in random_weights(CONFIG).items():
        assert np.array_equal(merged[names[name]], weight) == (names[name] not in touched)


def test_every_format_is_a_base_and_takes_the_merged_weights(base, llama, tmp_path):
    folder, whole = str(FOLDERS["all_linear"]), tensors(llama.use("all_linear").save(tmp_path / "whole", "hf"))
    for format, name in (("meta", "m"), ("gguf", "m.gguf")):
        plain = convert(base, tmp_path / name, format)
        assert off(llama_jax.load(plain, dtype="float32", adapters=folder), "all_linear") < MATCH
        merged = tensors(convert(base, tmp_path / f"merged-{name}", format, "--adapter", folder))
        for path, array in whole.items():
            np.testing.assert_allclose(merged[path], array, atol=1e-6)


def test_merging_reads_any_part_in_any_dtype(base):
    source = open_source(base)
    merged = adapters.merge_adapter(source.leaves, peft.open_adapter(FOLDERS["all_linear"], CONFIG))
    entry = merged["layers", 1, "ffn", "up"]
    part = (slice(7, 30), slice(5, 9))
    np.testing.assert_allclose(entry.read(part), entry.read()[part], atol=1e-6)
    assert entry.read(part, np.dtype(ml_dtypes.bfloat16)).dtype == "bfloat16"
    np.testing.assert_array_equal(np.concatenate(list(entry.blocks())), entry.read())


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_a_quantized_base_stays_quantized_under_an_adapter(base, tmp_path, dtype):
    file, folder = convert(base, tmp_path / "a.gguf", "gguf", "--dtype", dtype), FOLDERS["all_linear"]
    held = llama_jax.load(file, dtype="float32", adapters=folder)
    leaf = held.params["layers"][0]["attention"]["q"]
    assert isinstance(leaf, LoraTensor) and leaf.base.bits == int(dtype[1])
    dense = llama_jax.load(file, dtype="float32", quantize="none", adapters={"it": folder})
    with_it = np.asarray(dense.use("it").logits(golden.TOKENS))
    assert gap(held.logits(golden.TOKENS), with_it) < MATCH < 0.1 < gap(dense.logits(golden.TOKENS), with_it)
    merged = convert(file, tmp_path / "merged", "hf", "--adapter", str(folder))
    assert gap(llama_jax.load(merged, dtype="float32").logits(golden.TOKENS), with_it) < MATCH
    saved = llama_jax.load(held.save(tmp_path / "b", "hf"), dtype="float32")
    assert gap(saved.logits(golden.TOKENS), with_it) < MATCH


def test_adapters_on_a_mesh_give_the_same_logits(base):
    many = llama_jax.load(base, dtype="float32", mesh={"data": 2, "tensor": 4}, adapters=FOLDERS["rslora"])
    assert off(many, "rslora") < MATCH
    leaf = many.params["layers"][0]["ffn"]["up"]
    assert leaf.b.addressable_shards[0].data.shape == (CONFIG.ffn_dim // 4, 3)


def test_adapters_of_one_kind_share_weights_and_programs_and_can_be_sampled_in_turn(base, copy):
    other = copy("all_linear", lora_alpha=-3)
    both = llama_jax.load(base, dtype="float32", adapters={"first": FOLDERS["all_linear"], "other": other})
    options = {"max_new_tokens": 6, "temperature": 0.0}
    first, prompt = both.use("first"), golden.TOKENS[0].tolist()
    alone = [first.generate(prompt, **options).tokens]
    compiled = both.engine.compilations
    second = first.use("other")
    alone.append(second.generate(prompt, **options).tokens)
    assert alone[0] != alone[1] and both.engine.compilations == compiled
    in_turn = list(zip(first.stream(prompt, **options), second.stream(prompt, **options), strict=True))
    assert [list(tokens) for tokens in zip(*in_turn, strict=True)] == alone
    q = lambda llama: llama.params["layers"][0]["attention"]["q"]  # noqa: E731
    assert q(first).base is q(second).base is q(both) is q(second.use(None))
    with pytest.raises(ConfigError, match="no adapter 'frist'; did you mean 'first'"):
        both.use("frist")


@pytest.mark.parametrize("case", golden.CASES)
def test_what_is_saved_is_read_back_as_it_was(llama, tmp_path, case):
    folder = peft.save_adapter(tmp_path / "new", CONFIG, llama.use(case).params, base_model="owner/name")
    again, before = read(folder), read(FOLDERS[case])
    assert list(again) == list(before)
    for path, parts in before.items():
        for mine, theirs in zip(again[path][:2], parts[:2], strict=True):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_allclose(again[path][2], parts[2], rtol=1e-6)
    config = json.loads((folder / peft.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["peft_type"]) == ("owner/name", "LORA")
    if case == "all_linear":
        assert (config["r"], config["lora_alpha"], config["alpha_pattern"], config["rank_pattern"]) == (2, 6, {}, {})
        assert config["target_modules"] == sorted(golden.LINEAR)
    if case == "some":
        assert config["target_modules"] == ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    with pytest.raises(ConfigError, match="already"):
        peft.save_adapter(folder, CONFIG, llama.use(case).params)


def test_modules_to_save_may_name_what_holds_the_saved_modules(tmp_path):
    """peft saves every weight inside a module that modules_to_save names, such as `mlp`."""
    folder = tmp_path / "adapter"
    shutil.copytree(GOLDEN_FOLDER / "peft" / "modules_twice", folder)
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(config | {"modules_to_save": [*config["modules_to_save"], "mlp"]}))
    with pytest.raises(ConfigError, match="names 'mlp', whose weight is missing"):
        peft.open_adapter(folder, golden.SMALL)
    up = np.ones((golden.SMALL.ffn_dim, golden.SMALL.embed_dim), np.float32)
    parts = dict(safetensors.open_file(folder / peft.WEIGHTS))
    parts["base_model.model.model.layers.0.mlp.up_proj.weight"] = of_array(lambda: up, up.dtype, up.shape)
    safetensors.save_file(folder / "new", parts, {"format": "pt"})
    (folder / "new").rename(folder / peft.WEIGHTS)
    (whole,) = (t for path, t in peft.open_adapter(folder, golden.SMALL).whole.items() if "up" in path)
    assert (whole.read() == up).all()


def test_weights_without_lora_are_no_adapter_to_save(llama, tmp_path):
    with pytest.raises(ConfigError, match="the params have no LoRA weights"):
        peft.save_adapter(tmp_path / "new", CONFIG, llama.params)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"peft_type": "ADALORA"}, "peft_type='ADALORA' is not supported; only LORA"),
        ({"peft_type": ...}, "lacks peft_type"),
        ({"use_dora": True}, "missing 14 tensors, the first '.*q_proj.lora_magnitude_vector'"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save of adapter_config.json names 'lm_head', whose weight is missing",
        ),
        ({"modules_to_save": ["score"]}, "modules_to_save of adapter_config.json names 'score'"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        (
            {"trainable_token_indices": [1]},
            "trainable_token_indices .* names 'model.embed_tokens', whose rows are missing",
        ),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices must be lists of different token ids"),
        ({"trainable_token_indices": {"lm_head": [-1]}}, r"different token ids, got \[-1\] for 'lm_head'"),
        (
            {"target_modules": golden.LINEAR, "layers_to_transform": [0, 1], "layers_pattern": "h"},
            "does not name its module",
        ),
        ({"use_rsLora": True}, "'use_rsLora'=True is an unknown key; did you mean 'use_rslora'"),
        ({"use_rslora": 1}, "use_rslora must be true or false"),
        ({"init_lora_weights": "pissa_niter_4"}, "moves part of the base into the adapter; .*path_initial_model"),
        ({"init_lora_weights": "OLoRA"}, "moves part of the base into the adapter; .*path_initial_model"),
        ({"init_lora_weights": "loftq"}, "moves part of the base into the adapter; .*merge_and_unload"),
        ({"r": 0}, "r must be a whole number above 0, got 0"),
        ({"r": ...}, "r must be a whole number above 0, got None"),
        ({"r": 2.0}, "r must be a whole number"),
        ({"r": 3}, r"q_proj.lora_A.weight has shape \(2, 64\), but adapter_config.json and the model need \(3, 64\)"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"lora_alpha": 1 << 2000}, "lora_alpha must be a finite number"),
        ({"lora_alpha": True}, "lora_alpha must be a finite number"),
        ({"rank_pattern": {"(q|k)_proj": 3}}, r"q_proj.lora_A.weight has shape .* need \(3, 64\)"),
        ({"rank_pattern": {"(?<=q)_proj": 3}}, "rank_pattern: the expression .* looks behind"),
        ({"alpha_pattern": {r"(q)\1_proj": 3}}, "alpha_pattern: the expression .* has a backreference"),
        ({"alpha_pattern": {"(?i)Q_PROJ": 3}}, "alpha_pattern: .* is not a regular expression: 'global flags"),
        ({"alpha_pattern": {"[q_proj": 3}}, "alpha_pattern: .* is not a regular expression"),
        ({"alpha_pattern": {"[a]" * 1000: 3}}, "longer than 2,000 characters"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\] must be a whole number"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
        ({"target_modules": [1]}, "target_modules must be a list of names"),
        ({"target_modules": ["embed_tokens", *golden.LINEAR]}, "missing 2 tensors, the first '.*lora_embedding_B'"),
        ({"target_modules": "(a+)+$"}, "q_proj.lora_A.weight, but target_modules .* does not name its module"),
        ({"target_modules": ["q_proj"]}, "k_proj.lora_A.weight, but target_modules .* does not name its module"),
        ({"target_modules": [*golden.LINEAR, "lm_head"]}, "missing 2 tensors, the first 'base_model.model.lm_head"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be whole numbers"),
        ({"target_modules": golden.LINEAR, "layers_to_transform": 1}, "layers.0.* does not name its module"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_would_change_the_numbers_is_refused_by_name(copy, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        peft.open_adapter(copy(**changes), CONFIG)
    assert "adapter_" in refusal(error)


def test_an_adapter_of_another_method_is_refused_by_its_method(copy):
    folder = copy(peft_type="IA3", feedforward_modules=["down_proj"])
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(config, sort_keys=True))  # as peft writes it
    with pytest.raises(ConfigError, match="peft_type='IA3' is not supported; only LORA is"):
        peft.open_adapter(folder, CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"((.*)*)*_proj|(a+)+$", "exclude_modules": "(.*a|.*b)*$"},  # which Python takes ages for
        {"target_modules": None, "bias": "all", "fan_in_fan_out": True},
        {"alpha_pattern": {"(([a-z_]+)+)+x": 3, "(.|.)+(.|.)+!": 4}, "rank_pattern": {"embed.*": 7}},
        {"exclude_modules": "lm_head", "target_modules": golden.LINEAR},
        {"target_modules": "all-linear", "layers_to_transform": [0, 1], "layers_pattern": ["layers"]},
        {"lora_dropout": 0.5, "init_lora_weights": "gaussian", "loftq_config": {"bits": 4}, "new_key": None},
        {"use_rslora": None, "rank_pattern": None, "alpha_pattern": None, "bias": None},
        {"target_modules": [*golden.LINEAR, *(f"x{i}" for i in range(100_000))]},
        {"alpha_pattern": {f"x{i}": 3 for i in range(100_000)}},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_what_does_not_change_the_numbers_is_read(copy, changes):
    start = time.perf_counter()
    found = read(copy(**changes))
    assert time.perf_counter() - start < 60  # an expression that was run would take for ever
    for path, parts in read(FOLDERS["all_linear"]).items():
        for mine, theirs in zip(found[path], parts, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda t: t.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"),
            "missing 1 tensors, the first .*B",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.lora_A.weight": np.zeros(2)}),
            "norm.* does not belong to a module",
        ),
        (lambda t: t.update({"x\ny" * 200: np.zeros(2)}), "does not belong to a module of this model"),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros(2)}),
            "embed_tokens.lora_embedding_A, but target_modules .* does not name its module",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.base_layer.weight": np.zeros((2, 2))}),
            "embed_tokens has 512 rows and lm_head has 2: save it from peft with save_embedding_layers=True",
        ),
        (lambda t: t.update({"base_model.model.lm_head.weight": np.float32(0)}), r"lm_head.weight has shape \(\)"),
        (
            lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": np.zeros(64)}),
            "lora_B.bias' is a bias, which a Llama does not have",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.ones(64)}),
            "lora_magnitude_vector belongs to DoRA, but use_dora",
        ),
        (
            lambda t: t.update({k: v.astype(np.float64) for k, v in t.items()}),
            "is float64; adapters must be bfloat16, float16, float32",
        ),
        (lambda t: t.update({k: v.T.copy() for k, v in t.items()}), "has shape"),
        (lambda t: t.clear(), "missing 28 tensors"),
    ],
    ids=["missing", "norm", "unknown", "embed", "base", "scalar", "bias", "dora", "float64", "transposed", "empty"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(copy, change, words):
    folder = copy()
    held = {name: entry.read() for name, entry in peft.safetensors.open_file(folder / peft.WEIGHTS).items()}
    change(held)
    (folder / peft.WEIGHTS).write_bytes(encode(held))
    with pytest.raises(ValueError, match=words) as error:
        peft.open_adapter(folder, CONFIG)
    assert str(folder / peft.WEIGHTS) in refusal(error)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    for change in ({"embed_dim": 96}, {"num_layers": 1}, {"num_heads": 16}):
        with pytest.raises(ValueError, match="has shape|does not belong to a module") as error:
            peft.open_adapter(FOLDERS["rslora"], golden.dataclasses.replace(CONFIG, **change))
        refusal(error)


def test_an_adapter_given_as_the_model_names_its_base(copy, capsys):
    folder = copy(base_model_name_or_path="meta-llama/Llama-3.1-8B")
    with pytest.raises(ConfigError, match="is an adapter of meta-llama/Llama-3.1-8B, not a model") as error:
        llama_jax.load(folder)
    assert f"--model MODEL --adapter {folder}" in refusal(error)
    with pytest.raises(ConfigError, match="is an adapter of another model"):
        open_source(copy(base_model_name_or_path="two\nlines"))


def test_a_folder_without_an_adapter_says_what_is_wanted(base, tmp_path):
    for folder, fault in ((base, "has no adapter_config.json"), (tmp_path / "absent", "does not exist")):
        with pytest.raises(ConfigError, match=f"{fault}: give a folder that peft saved") as error:
            llama_jax.load(base, adapters=folder)
        refusal(error)


def test_the_commands_take_an_adapter(base, llama, capsys):
    prompt = str(FOLDERS["rslora"])
    (base / "prompts.jsonl").write_text(json.dumps(golden.TOKENS[0].tolist()))
    flags = ["--prompt_file", str(base / "prompts.jsonl"), "--temperature", "0", "--max_new_tokens", "5", "--json"]
    argv = ["--model", str(base), "--dtype", "float32", *flags]
    said = []
    for more in ([], ["--adapter", prompt]):
        assert exits.run(infer.main, [*argv, *more]) == 0
        said.append(json.loads(capsys.readouterr().out)["tokens"])
    options = {"max_new_tokens": 5, "temperature": 0.0}
    views = (llama, llama.use("rslora"))
    assert said == [view.generate(golden.TOKENS[0].tolist(), **options).tokens for view in views]
    assert exits.run(infer.main, [*argv, "--adapter", str(base)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_mutated_adapters_open_or_are_refused_in_one_line(copy):
    folder = copy("patterns")
    files = [folder / peft.CONFIG, folder / peft.WEIGHTS]
    sound = {path: path.read_bytes() for path in files}
    opened = 0
    for number in range(400):
        rng = random.Random(f"peft {number}")
        path = rng.choice(files)
        path.write_bytes((mutated_text if path.suffix == ".json" else mutated)(sound[path], rng))
        start = time.perf_counter()
        try:
            read(folder)
            opened += 1
        except ValueError as error:
            assert "\n" not in str(error) and 10 < len(str(error)) < 1000, error
        assert time.perf_counter() - start < 1, number
        path.write_bytes(sound[path])
    assert 0 < opened < 350
