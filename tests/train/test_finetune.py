"""Runs of LoRA, QLoRA and DPO: the trained, frozen and saved weights, and equal results on every mesh."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from helpers import sound
from helpers.files import write
from helpers.numbers import gap
from helpers.processes import kill_and_compare
from helpers.runs import batches, make_run, metrics_of
from helpers.tokenizers import byte_tokenizer
from llama_jax import manifest, parallel
from llama_jax.config import SIZES
from llama_jax.errors import ConfigError
from llama_jax.ops import quant
from llama_jax.ops.lora import LoraTensor
from llama_jax.params import init_params
from llama_jax.run_config import RunConfig
from llama_jax.run_keys import LoraConfig
from llama_jax.train import run as loop
from llama_jax.train import setup, trainable
from llama_jax.train.program import Program
from llama_jax.weights import lora_params
from llama_jax.weights.open import open_source

# Widths of a multiple of 32, so that it can be quantized; every one is split evenly by meshes of eight.
MODEL = dataclasses.replace(
    SIZES["tiny"], num_layers=2, embed_dim=64, num_heads=8, num_kv_heads=4, head_dim=8, ffn_dim=96, vocab_size=512
)
WIDTHS = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "vocab_size")
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Hugging Face folder with a tokenizer of one id a byte."""
    folder = tmp_path_factory.mktemp("base")
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(7))
    sound.save_params(folder, MODEL, params)
    byte_tokenizer().save(folder / "tokenizer.model")
    return folder


def lora_run(base, **changes) -> RunConfig:
    given = {"init_from": str(base), "lora__rank": 4, "lora__alpha": 8.0}
    run = make_run(**(given | changes))
    return dataclasses.replace(run, model=MODEL)


def steps(program: Program, count: int):
    state, frozen = setup.first_state(program), setup.frozen(program).params
    metrics = []
    for batch in batches(count):
        state, numbers = program.train_step(state, frozen, jax.device_put(batch, program.batch_sharding))
        metrics.append(jax.device_get(numbers))
    return state, frozen, metrics


def on_mesh(run, sizes=None) -> Program:
    sizes = sizes or {}
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return Program.make(run, parallel.make_mesh(sizes, devices))


def losses(metrics) -> np.ndarray:
    return np.array([m["loss"] for m in metrics])


# ---- LoRA ------------------------------------------------------------------------------------------------------


def test_a_step_with_lora_has_the_gradients_of_the_merged_model(base):
    """By the chain rule: of W + s b a the gradient to b is s g a^T and to a is s b^T g, with g that of W itself."""
    run = lora_run(base, lora__targets=("q", "down"), lora__rslora=True)
    program, batch = on_mesh(run), batches(1)[0]
    frozen = setup.frozen(program).params
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), program.state.params)
    from llama_jax.train.objectives import sft_sums

    def loss(trained):
        return sft_sums(run, trainable.policy(run, trained, frozen), batch, dtype=jnp.float32)[0]

    def merged_loss(params):
        return sft_sums(run, params, batch, dtype=jnp.float32)[0]

    is_lora = lambda x: isinstance(x, LoraTensor)  # noqa: E731
    merged = jax.tree.map(
        lambda x: x.merged(jnp.float32) if is_lora(x) else x, trainable.policy(run, trained, frozen), is_leaf=is_lora
    )
    value, slopes = jax.jit(jax.value_and_grad(loss))(trained)
    other, dense = jax.jit(jax.value_and_grad(merged_loss))(merged)
    assert gap(value, other) < ROUNDING
    s = 8.0 / 4**0.5
    for block, name in (("attention", "q"), ("ffn", "down")):
        ab, g = trained["layers"][block][name], dense["layers"][block][name]
        ours = slopes["layers"][block][name]
        assert gap(ours["b"], s * g @ ab["a"].swapaxes(1, 2)) < 1e-4
        assert gap(ours["a"], s * ab["b"].swapaxes(1, 2) @ g) < 1e-4


def test_lora_begins_as_the_base_and_trains_only_its_updates(base):
    run = lora_run(base, lora__targets=("v", "up", "down"), optimizer__learning_rate=0.05)
    state, _, metrics = steps(on_mesh(run), 8)
    plain = dataclasses.replace(run, lora=LoraConfig())
    _, _, full = steps(on_mesh(plain), 1)
    assert gap(metrics[0]["loss"], full[0]["loss"]) < ROUNDING
    assert losses(metrics)[-1] < losses(metrics)[0] - 0.2
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.params)}
    assert names == {
        f"['layers']['{block}']['{p}']" for block in ("attention']['v", "ffn']['up", "ffn']['down") for p in "ab"
    }
    assert set(state.opt_state[1].mu["layers"]["ffn"]) == {"up", "down"}


@pytest.mark.parametrize("kind", [pytest.param("auto", marks=pytest.mark.slow), "int4"])
def test_lora_and_qlora_train_to_the_same_numbers_on_every_mesh(base, kind):
    run = lora_run(base, lora__base=kind, train__remat="full")
    _, frozen, one = steps(on_mesh(run), 4)
    assert isinstance(frozen["layers"]["ffn"]["up"], quant.QTensor) == (kind != "auto")
    for sizes in ({"fsdp": 2, "tensor": 4}, {"data": 2, "context": 2, "tensor": 2}):
        accumulated = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulate=2))
        _, _, many = steps(on_mesh(accumulated if "fsdp" in sizes else run, sizes), 4)
        assert gap(losses(many), losses(one)) < ROUNDING, sizes


@pytest.mark.parametrize("kind", ["auto", "int4"])
def test_a_base_in_the_hosts_memory_gives_the_same_numbers_and_stays_there(base, kind):
    sizes = {"fsdp": 2, "tensor": 2}
    _, _, one = steps(on_mesh(lora_run(base, lora__base=kind, train__remat="full"), sizes), 3)
    program = on_mesh(lora_run(base, lora__base=kind, lora__offload=True, train__remat="full"), sizes)
    _, frozen, many = steps(program, 3)
    np.testing.assert_array_equal(losses(many), losses(one))
    for part, memory in (("layers", "pinned_host"), ("embed", "device")):
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(frozen[part])} == {memory}
    for leaf, expected in zip(jax.tree.leaves(frozen), jax.tree.leaves(program.frozen), strict=True):
        assert leaf.sharding == expected.sharding.with_memory_kind(leaf.sharding.memory_kind)


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_qlora_is_lora_beside_the_rounded_base(base, bits, tmp_path):
    """QLoRA equals LoRA on a folder with the dequantized values of the rounded base."""
    run = lora_run(base, lora__base=f"int{bits}")
    program = on_mesh(run)
    _, frozen, metrics = steps(program, 3)
    is_q = lambda x: isinstance(x, quant.QTensor)  # noqa: E731
    dense = jax.tree.map(lambda x: quant.dequantize(x, jnp.float32) if is_q(x) else x, frozen, is_leaf=is_q)
    assert sum(map(is_q, jax.tree.leaves(frozen, is_leaf=is_q))) == 7
    sound.save_params(tmp_path / "rounded", MODEL, dense)
    _, _, plain = steps(on_mesh(dataclasses.replace(lora_run(tmp_path / "rounded"))), 3)
    assert gap(losses(metrics), losses(plain)) < ROUNDING
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen["layers"]) if leaf.ndim == 3)
    assert held == sum(a.size for a in jax.tree.leaves(dense["layers"]) if a.ndim == 3) * (bits + 0.5) / 8


def test_dropout_is_of_the_step_and_of_nothing_else(base):
    run = lora_run(base, lora__dropout=0.5)
    nothing = dataclasses.replace(run, lora=dataclasses.replace(run.lora, dropout=0.0))
    program = on_mesh(run)
    first, again, without = (steps(p, 3)[2] for p in (program, program, on_mesh(nothing)))
    np.testing.assert_array_equal(losses(first), losses(again))
    _, _, many = steps(on_mesh(run, {"fsdp": 4, "tensor": 2}), 3)
    assert gap(losses(many), losses(first)) < ROUNDING
    assert losses(first)[0] == losses(without)[0]  # b is still zero
    assert abs(losses(first)[2] - losses(without)[2]) > 1e-5
    keep = LoraTensor(jnp.zeros((8, 4000)), jnp.ones((1, 4000)), jnp.ones((8, 1)), jnp.ones(()))
    key = jax.random.key_data(jax.random.key(0))
    from llama_jax.ops.lora import Dropout

    dropped = dataclasses.replace(keep, dropout=Dropout(key, 0.25)).dropped(jnp.ones((50, 4000)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)} and abs(float(dropped.mean()) - 1) < 0.01


def test_rates_of_a_group_and_averages_are_of_what_is_trained(base):
    run = lora_run(base, optimizer__rates=("lora_a=0",), optimizer__ema_decay=0.5)
    program = on_mesh(run)
    begun = jax.tree.map(np.asarray, setup.first_state(program).params)
    state, _, metrics = steps(program, 3)
    for block in state.params["layers"].values():
        for name, pair in block.items():
            old = begun["layers"]["attention" if name in "qkvo" else "ffn"][name]
            np.testing.assert_array_equal(pair["a"], old["a"])
            assert np.abs(np.asarray(pair["b"])).max() > 0
    # Averages by hand, from runs of one and two steps.
    expected = begun
    for count in (1, 2, 3):
        weights = jax.tree.map(np.asarray, steps(program, count)[0].params)
        decay = min(0.5, count / (9 + count))
        expected = jax.tree.map(lambda e, w, d=decay: e + (1 - d) * (w - e), expected, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, expected)
    assert state.best is state.ema and "grad_norm/lora_b" in metrics[0]


# ---- runs ------------------------------------------------------------------------------------------------------


def text_of(tmp_path) -> str:
    return write(tmp_path / "d.jsonl", [{"instruction": f"Say {i}", "output": f"y{i % 7}!"} for i in range(60)])


def file_run(tmp_path, base, name: str, **changes) -> RunConfig:
    given = {
        "output": str(tmp_path / name),
        "data__train": (text_of(tmp_path),),
        "data__cache_dir": str(tmp_path / "cache"),
        "data__sequence_length": 64,
        "log__to": (),
        "optimizer__schedule": "constant",
        "train__steps": 6,
    }
    return lora_run(base, **(given | changes))


def test_a_lora_run_resumes_to_the_bit_moves_to_another_mesh_and_speaks(tmp_path, base, capsys):
    settings = {"lora__dropout": 0.1, "lora__base": "int8", "optimizer__ema_decay": 0.9}
    loop.train(file_run(tmp_path, base, "whole", **settings))
    inner = {"q": 64, "k": 64, "v": 64, "o": 64, "gate": 64, "up": 64, "down": 96}
    outer = {"q": 64, "k": 32, "v": 32, "o": 64, "gate": 96, "up": 96, "down": 64}
    thin = 2 * 4 * sum(inner[name] + outer[name] for name in inner)
    assert f"LoRA: {thin:,} weights are trained" in capsys.readouterr().out
    loop.train(file_run(tmp_path, base, "parts", **settings, train__steps=3))
    loop.train(file_run(tmp_path, base, "parts", **settings))
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    assert [line["step"] for line in whole] == list(range(1, 7)) and whole == parts
    moved = settings | {"mesh__fsdp": 2, "mesh__tensor": 4, "lora__offload": True, "optimizer__offload": True}
    moved["train__remat"] = "full"
    loop.train(file_run(tmp_path, base, "moved", **settings, train__steps=3))
    loop.train(file_run(tmp_path, base, "moved", **moved))
    np.testing.assert_allclose(
        [line["loss"] for line in metrics_of(tmp_path / "moved")], [line["loss"] for line in whole], rtol=ROUNDING
    )

    tokens = [[256, 5, 6, 7, 8, 9, 10]]
    run_folder, adapter = tmp_path / "whole", tmp_path / "whole" / "adapter"
    from_run = llama_jax.load(run_folder, dtype="float32")
    beside = llama_jax.load(base, dtype="float32", adapters=adapter)
    assert gap(from_run.logits(tokens), beside.logits(tokens)) < ROUNDING
    assert gap(from_run.logits(tokens), llama_jax.load(base, dtype="float32").logits(tokens)) > 1e-4
    from_run.save(tmp_path / "merged", "hf")
    assert gap(llama_jax.load(tmp_path / "merged").logits(tokens), from_run.logits(tokens)) < ROUNDING
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8, 0.1)
    assert open_source(run_folder).description == f"run folder, LoRA of {base}"


@pytest.mark.slow
@pytest.mark.parametrize("kills", [pytest.param(3, id="killed"), pytest.param(20, id="broken_off")])
def test_a_lora_run_on_dialogs_goes_on_to_the_bit(tmp_path, base, compiled, kills):
    kill_and_compare(
        tmp_path,
        compiled,
        devices=2,
        kills=kills,
        data=text_of(tmp_path),
        arguments=[
            f"--config.init_from={base}",
            "--config.lora.rank=4",
            "--config.lora.dropout=0.1",
            "--config.lora.base=int8",
            "--config.optimizer.ema_decay=0.9",
            "--config.data.sequence_length=64",
            *(f"--config.model.{name}={getattr(MODEL, name)}" for name in WIDTHS),
        ],
    )


def test_a_lora_run_is_a_model_to_train_on_and_takes_no_second_adapter(tmp_path, base):
    """Merged, as the base of QLoRA, of full training and as the reference of DPO."""
    loop.train(file_run(tmp_path, base, "first", train__steps=2, optimizer__learning_rate=0.05))
    first = llama_jax.load(tmp_path / "first", dtype="float32")
    merged = llama_jax.load(first.save(tmp_path / "merged", "hf", dtype="float32"), dtype="float32")
    for settings in ({"lora__rank": 0}, {"lora__base": "int4"}):
        found = [
            steps(on_mesh(lora_run(folder, **settings), {"tensor": 2}), 2)[2]
            for folder in (tmp_path / "first", tmp_path / "merged")
        ]
        assert gap(*map(losses, found)) < ROUNDING
    second = file_run(tmp_path, tmp_path / "first", "second", train__steps=2, optimizer__learning_rate=0.05)
    loop.train(second)
    on_top = llama_jax.load(tmp_path / "second", dtype="float32")
    beside = llama_jax.load(tmp_path / "merged", dtype="float32", adapters=tmp_path / "second" / "adapter")
    tokens = [[256, 5, 6, 7]]
    assert gap(on_top.logits(tokens), beside.logits(tokens)) < ROUNDING
    assert gap(on_top.logits(tokens), merged.logits(tokens)) > 1e-3
    with pytest.raises(ConfigError, match="would replace the LoRA updates that this model's run trained"):
        llama_jax.load(tmp_path / "first", adapters=tmp_path / "first" / "adapter")
    assert gap(first.logits(tokens), merged.logits(tokens)) < ROUNDING
    assert gap(first.use(None).logits(tokens), llama_jax.load(base, dtype="float32").logits(tokens)) < ROUNDING
    assert open_source(tmp_path / "first").identity() != open_source(tmp_path / "merged").identity()


def test_updates_are_refused_beside_another_base(tmp_path, base):
    other = tmp_path / "base"
    other.mkdir()
    for path in base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    run = file_run(tmp_path, other, "run", train__steps=2)
    loop.train(run)
    (tmp_path / "run" / "adapter" / "README.md").write_text("mine")
    adapter = (tmp_path / "run" / "adapter" / "adapter_config.json").read_bytes()
    assert (
        loop.train(dataclasses.replace(run, init_from="nowhere/at-all")).step == 2
    )  # done already: nothing is written
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").read_bytes() == adapter
    moved = dataclasses.replace(run, init_from=str(base), train=dataclasses.replace(run.train, steps=3))
    assert loop.train(moved).step == 3  # the same model elsewhere is the same model
    assert (tmp_path / "run" / "adapter" / "README.md").read_text() == "mine"
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(8))
    for path in (*other.glob("*.safetensors"), other / "config.json"):
        path.unlink()
    sound.save_params(other, MODEL, params)
    changed = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=5))
    with pytest.raises(ConfigError, match="is not the model that .* was begun with"):
        loop.train(changed)
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    values = {name: value for name, value in values.items() if name != manifest.SEAL}
    moved = json.dumps(manifest.sealed(values | {"init_from": str(other)}))
    (tmp_path / "run" / "config.json").write_text(moved)
    with pytest.raises(ConfigError, match="is not the model that .* was trained on"):
        llama_jax.load(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(values | {"init_from": str(tmp_path / "gone")}))
    with pytest.raises(ConfigError, match="which cannot be opened"):
        llama_jax.load(tmp_path / "run")


def test_settings_that_cannot_work_are_refused_with_the_mend(base):
    for changes, words in (
        ({"init_from": ""}, "lora.rank needs init_from"),
        ({"lora__targets": ("q_prj",)}, "lora.targets must be one of 'q', .* got 'q_prj'; did you mean 'q_proj'"),
        ({"lora__targets": ()}, "lora.targets is empty"),
        ({"optimizer__rates": ("embed=0.1",)}, "embed is not trained in this run: LoRA trains only lora_a and lora_b"),
        ({"optimizer__rates": ("lora_a:2",)}, "'lora_a:2' must be GROUP=FACTOR"),
        (
            {"optimizer__name": "lion", "optimizer__moments": "int8"},
            "'int8' is not available for optimizer.name='lion'",
        ),
        ({"lora__rank": 0, "lora__base": "int4"}, "lora.base needs lora.rank, which is 0"),
        ({"lora__targets": ("q", "q")}, "names a matrix twice"),
        ({"optimizer__rates": ("lora_a=2", "lora_a=3")}, "has lora_a twice"),
        ({"dpo__beta": 0.5}, "dpo.beta applies to DPO only: set train.objective='dpo'"),
        ({"train__objective": "dpo", "train__z_loss": 0.1}, "train.z_loss does not apply to train.objective='dpo'"),
        (
            {"train__objective": "dpo", "dpo__loss": "ipo", "dpo__label_smoothing": 0.1},
            "label_smoothing does not apply to IPO",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            lora_run(base, **changes)
    narrow = dataclasses.replace(lora_run(base, lora__base="int4"), model=dataclasses.replace(MODEL, ffn_dim=40))
    with pytest.raises(ConfigError, match="int4 needs rows of a multiple of 32 numbers, but the model has ffn_dim=40"):
        on_mesh(narrow)


def test_identity_is_of_the_model_and_not_of_its_format(tmp_path, base):
    whole = open_source(base)
    llama = llama_jax.load(base, dtype="float32")
    others = [open_source(llama.save(tmp_path / kind, kind, dtype="float32")) for kind in ("hf", "gguf")]
    assert {whole.identity()} == {other.identity() for other in others}
    assert lora_params.axes(MODEL, lora_run(base).lora)["layers"]["ffn"]["down"]["a"] == ("layers", None, "ffn")


def test_lora_computes_no_gradient_of_its_base(base):
    """By the shapes of the products in the compiled step: none is that of a whole weight."""
    run = lora_run(base, data__sequence_length=48)  # 48 x 8 tokens, so that no activation has the shape of a weight
    full = dataclasses.replace(run, lora=dataclasses.replace(run.lora, rank=0))
    weights = {leaf.shape[1:] for leaf in jax.tree.leaves(on_mesh(full).state.params["layers"]) if leaf.ndim == 3}
    weights |= {shape[::-1] for shape in weights}

    def products(run) -> set[tuple[int, ...]]:
        program = on_mesh(run)
        text = program.train_step.lower(program.state, program.frozen, program.batch).compile().as_text()
        found = re.findall(r'= \w+\[([\d,]*)\]\S* (?:dot\(|custom-call\(.*"llama_product")', text)
        return {tuple(map(int, shape.split(","))) for shape in found if shape}

    assert weights & products(full) and not weights & products(run)


# ---- DPO -------------------------------------------------------------------------------------------------------


def pairs_of(tmp_path) -> str:
    records = [
        {"prompt": f"Say {i}", "chosen": f" good {'y' * (i % 9)}", "rejected": f" bad {'n' * (i % 5)}"}
        for i in range(60)
    ]
    return write(tmp_path / "pairs.jsonl", records)


def dpo_run(tmp_path, base, name: str, **changes) -> RunConfig:
    data = pairs_of(tmp_path)
    given = {
        "train__objective": "dpo",
        "data__train": (data,),
        "data__validation": (data,),
        "optimizer__learning_rate": 5e-3,
        "log__eval_every": 3,
    }
    return file_run(tmp_path, base, name, **(given | changes))


@pytest.mark.parametrize("rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_dpo_run_begins_at_the_reference_learns_and_resumes_on_another_mesh(tmp_path, base, rank, capsys):
    settings = {"lora__rank": rank}
    loop.train(dpo_run(tmp_path, base, "whole", **settings))
    said = capsys.readouterr().out
    assert "train: 60 pairs" in said and "accuracy " in said and "  margin " in said
    whole = metrics_of(tmp_path / "whole")
    steps = [line for line in whole if "loss" in line]
    # Nothing sets the policy apart from its reference yet: log 2, and no reward.
    assert abs(steps[0]["loss"] - np.log(2)) < 1e-6 and abs(steps[0]["margin"]) < 1e-5
    assert steps[-1]["loss"] < 0.6 and steps[-1]["accuracy"] > 0.9 and steps[-1]["margin"] > 0.1
    assert steps[-1]["margin"] == pytest.approx(steps[-1]["reward_chosen"] - steps[-1]["reward_rejected"], rel=1e-4)
    checked = [line for line in whole if "validation_loss" in line]
    assert [line["step"] for line in checked] == [0, 3, 6] and checked[2]["validation_accuracy"] > 0.9
    loop.train(dpo_run(tmp_path, base, "parts", train__steps=3, **settings))
    moved = settings | {"mesh__fsdp": 2, "mesh__context": 2, "mesh__tensor": 2, "train__accumulate": 1}
    loop.train(dpo_run(tmp_path, base, "parts", **moved))
    parts = [line["loss"] for line in metrics_of(tmp_path / "parts") if "loss" in line]
    np.testing.assert_allclose(parts, [line["loss"] for line in steps], rtol=1e-4)


def test_accumulated_dpo_divides_by_all_pairs_once(tmp_path, base):
    whole, parts = (dpo_run(tmp_path, base, name, train__accumulate=n) for name, n in (("a", 1), ("b", 4)))
    for run in (whole, parts):
        loop.train(dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, fsdp=2, tensor=4)))
    a, b = ([line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line] for name in "ab")
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_data_that_the_objective_cannot_learn_from_is_refused(tmp_path, base):
    with pytest.raises(ConfigError, match="holds preference pairs, which train.objective='sft' does not learn from"):
        loop.train(dpo_run(tmp_path, base, "run", train__objective="sft"))
    with pytest.raises(ConfigError, match="which train.objective='dpo' does not learn from: give records of 'prompt'"):
        loop.train(dpo_run(tmp_path, base, "run", data__train=(text_of(tmp_path),)))
    with pytest.raises(ConfigError, match="train.objective='dpo' needs init_from"):
        dpo_run(tmp_path, base, "run", init_from="", lora__rank=0)
