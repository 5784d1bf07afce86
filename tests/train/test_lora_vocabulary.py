"""LoRA on the embedding and the unembedding, and rows of trained tokens: peft's gradients, and whole runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from golden import make_peft as golden
from golden.make_model import random_weights
from helpers.conversion import convert
from helpers.files import write
from helpers.folders import make_folder
from helpers.numbers import gap
from helpers.paths import GOLDEN_FOLDER
from helpers.runs import make_run, metrics_of
from helpers.tokenizers import byte_tokenizer
from llama_jax.errors import ConfigError
from llama_jax.params import stack
from llama_jax.run_config import RunConfig
from llama_jax.run_keys import LORA_TARGETS
from llama_jax.train import folder as run_folder
from llama_jax.train import run as training
from llama_jax.train import trainable
from llama_jax.train.objectives import sft_sums
from llama_jax.weights import lora_params, name_table
from llama_jax.weights.formats import peft
from llama_jax.weights.open import open_source

GOLD = np.load(GOLDEN_FOLDER / "peft.npz")
MODULES = {w.name.removesuffix(".weight"): w.path for w in name_table.weights(golden.SMALL, "huggingface")}
NAMES = {module.rpartition(".")[2]: path[-1] for module, path in MODULES.items()}
MODEL = dataclasses.replace(golden.CONFIG, max_seq_len=2048)
TIED = dataclasses.replace(MODEL, tied_embeddings=True)
TOLERANCE = 1e-5  # of losses, relative
SLOPES = 2e-5  # of gradients, relative to the largest of a matrix
ROUNDING = 3e-5


def small_run(case) -> RunConfig:
    settings = {"r": 2, "lora_alpha": 4, **golden.MORE[case][0]}
    ids = settings.get("trainable_token_indices", ())
    run = make_run(
        init_from="the base",
        lora__rank=settings["r"],
        lora__alpha=float(settings["lora_alpha"]),
        lora__rslora=settings.get("use_rslora", False),
        lora__targets=tuple(settings["target_modules"]),
        lora__trained_tokens=tuple(ids["embed_tokens"] if isinstance(ids, dict) else ids),
        train__vocab_chunk=20,
    )
    return dataclasses.replace(run, model=golden.small_config(case))


def trained_of(run, case, base):
    """The trained arrays of a peft adapter in the form of a run: stacked pairs, and rows minus those of the base."""
    adapter = peft.open_adapter(GOLDEN_FOLDER / "peft" / case, run.model)
    pairs = {path: {"a": lazy.a.read(), "b": lazy.b.read()} for path, lazy in adapter.lora.items()}
    tree: dict = {path[0]: pair for path, pair in pairs.items() if path[0] != "layers"}
    layers = [pairs[path] for path in sorted(path for path in pairs if path[0] == "layers")]
    if layers:
        block, name = next(path[2:] for path in pairs if path[0] == "layers")
        tree["layers"] = {block: {name: jax.tree.map(lambda *parts: jnp.stack(parts), *layers)}}
    rows = {p[0]: lazy.rows.read() - np.asarray(base[p[0]])[list(lazy.ids)] for p, lazy in adapter.rows.items()}
    return tree | ({"tokens": rows} if rows else {})


def ours(grads, name):
    """The part of our tree that the golden file calls by peft's name."""
    module, _, part = name.partition(".lora_")
    if not part:
        return grads["tokens"][MODULES[name.partition(".token_adapter")[0]][0]]
    path = MODULES.get(module, ("unembed",))
    leaf = name_table.get(grads, (path[0], *path[2:]))
    embedding = part.startswith("embedding")
    array = leaf["ab"[(part[-1] == "B") != embedding]]
    array = array[path[1]] if path[0] == "layers" else array
    return array.T if embedding else array


@pytest.mark.parametrize("case", golden.TRAINED)
def test_losses_and_gradients_are_pefts(case):
    run = small_run(case)
    leaves = ((w.path, w.name) for w in name_table.weights(run.model, "huggingface"))
    weights = random_weights(run.model)
    base = stack(name_table.build(run.model, ((path, jnp.asarray(weights[name])) for path, name in leaves)))
    B, T = golden.SMALL_TOKENS.shape
    batch = {
        "tokens": golden.SMALL_TOKENS,
        "targets": np.roll(golden.SMALL_TOKENS, -1, axis=1),
        "positions": np.broadcast_to(np.arange(T), (B, T)),
        "segments": np.ones((B, T), np.int32),
        "weights": (np.broadcast_to(np.arange(T), (B, T)) < T - 1).astype(np.float32),
    }

    @jax.jit
    def mean(trained):
        total, sums = sft_sums(run, trainable.policy(run, trained, base), batch, dtype=jnp.float32)
        return total / sums["count"]

    trained = trained_of(run, case, base)
    shapes = jax.eval_shape(lambda: lora_params.initial(run.model, run.lora, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, shapes)
    loss, grads = jax.value_and_grad(mean)(trained)
    assert gap(loss, GOLD[f"{case}/loss"]) < TOLERANCE
    names = [key.partition("/grad/")[2] for key in GOLD.files if key.startswith(f"{case}/grad/")]
    assert sum(GOLD[f"{case}/grad/{name}"].size for name in names) == sum(g.size for g in jax.tree.leaves(grads))
    for name in names:
        assert gap(ours(grads, name), GOLD[f"{case}/grad/{name}"]) < SLOPES, name


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Hugging Face folders with a tokenizer of one id a byte, by whether the embeddings are tied."""
    folders = {}
    for model in (MODEL, TIED):
        folder = make_folder(tmp_path_factory.mktemp("base"), model, random_weights(model))
        byte_tokenizer().save(folder / "tokenizer.model")
        folders[model.tied_embeddings] = folder
    return folders


def file_run(tmp_path, base, model, name, **changes) -> RunConfig:
    given = {
        "init_from": str(base),
        "output": str(tmp_path / name),
        "data__train": (write(tmp_path / "d.jsonl", [{"text": f"Say y{i % 7}! " * 9} for i in range(60)]),),
        "data__cache_dir": str(tmp_path / "cache"),
        "log__to": (),
        "optimizer__learning_rate": 3e-2,
        "optimizer__schedule": "constant",
        "train__steps": 4,
        "lora__rank": 4,
    }
    return dataclasses.replace(make_run(**(given | changes)), model=model)


@pytest.mark.parametrize(
    "model, settings",
    [
        pytest.param(
            MODEL,
            {"lora__targets": ("q_proj", "embed_tokens", "lm_head"), "lora__dropout": 0.1},
            marks=pytest.mark.slow,
        ),
        (MODEL, {"lora__targets": ("v",), "lora__trained_tokens": (0, 83, 97)}),
        (TIED, {"lora__targets": ("embed",), "lora__base": "int8"}),
        pytest.param(TIED, {"lora__targets": ("q",), "lora__trained_tokens": (83,)}, marks=pytest.mark.slow),
    ],
    ids=["pairs", "rows", "tied-pair", "tied-rows"],
)
def test_a_run_learns_goes_on_elsewhere_and_is_its_adapter_and_its_merged_model(
    tmp_path, bases, model, settings, monkeypatch
):
    base, opened = bases[model.tied_embeddings], []
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open_source", lambda name: opened.append(name) or open_source(name))
        training.train(file_run(tmp_path, base, model, "run", checkpoint__every=2, **settings))
    assert opened == [str(base)]  # once, and not at every checkpoint: it may be in a store
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    training.train(file_run(tmp_path, base, model, "parts", train__steps=2, **settings))
    training.train(file_run(tmp_path, base, model, "parts", mesh__fsdp=2, mesh__tensor=4, **settings))
    np.testing.assert_allclose(
        [line["loss"] for line in metrics_of(tmp_path / "parts")], [line["loss"] for line in lines], rtol=2e-5
    )
    quantize = settings.get("lora__base")
    tokens = [[256, 83, 6, 97, 8, 83, 10]]
    from_run = llama_jax.load(tmp_path / "run", dtype="float32", quantize=quantize)
    logits = np.asarray(from_run.logits(tokens))
    beside = llama_jax.load(base, dtype="float32", quantize=quantize, adapters=tmp_path / "run" / "adapter")
    assert gap(beside.logits(tokens), logits) < ROUNDING
    assert gap(beside.use(None).logits(tokens), logits) > 1e-3
    whole = np.asarray(llama_jax.load(tmp_path / "run", dtype="float32").logits(tokens))
    merged = convert(tmp_path / "run", tmp_path / "merged", "hf")
    assert gap(llama_jax.load(merged, dtype="float32").logits(tokens), whole) < ROUNDING
    other = convert(base, tmp_path / "other", "hf", "--adapter", str(tmp_path / "run" / "adapter"))
    a, b = (open_source(folder) for folder in (merged, other))
    assert a.config == b.config and a.config.tied_embeddings == (
        model is TIED and "embed" not in settings["lora__targets"]
    )
    for path, entry in a.leaves.items():
        assert entry.dtype == b.leaves[path].dtype and gap(entry.read(), b.leaves[path].read()) < 1e-6
    config = json.loads((tmp_path / "run" / "adapter" / peft.CONFIG).read_text())
    assert config["target_modules"] == sorted(k for k, v in NAMES.items() if v in targets_of(settings))


def targets_of(settings):
    return make_run(init_from="b", lora__rank=1, **{"lora__targets": settings["lora__targets"]}).lora.targets


def test_pefts_names_of_targets_are_ours():
    lora = lambda *targets: make_run(init_from="b", lora__rank=1, lora__targets=targets).lora.targets  # noqa: E731
    assert lora("all-linear") == LORA_TARGETS and lora("all-linear", "lm_head") == (*LORA_TARGETS, "unembed")
    assert lora("q_proj", "down", "embed_tokens") == ("q", "down", "embed")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"lora__targets": ("q", "q_proj")}, "names a matrix twice"),
        ({"lora__targets": ("score",)}, "lora.targets must be one of 'q'"),
        ({"lora__trained_tokens": (3, 3)}, "lora.trained_tokens names id 3 twice: name each id once"),
        ({"lora__trained_tokens": (-1,)}, "lora.trained_tokens must be at least 0"),
        ({"lora__trained_tokens": (1 << 20,)}, "lora.trained_tokens has id 1048576, but the model has"),
        ({"lora__trained_tokens": (3,), "lora__targets": ("embed",)}, "train the same matrices: leave one of them out"),
        ({"lora__trained_tokens": (3,), "lora__rank": 0}, "lora.trained_tokens needs lora.rank"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        make_run(**({"init_from": "base", "lora__rank": 2} | settings))
