"""Losses, gradients and steps of LoRA, QLoRA and DPO are peft's and TRL's (tests/golden/make_finetune.py)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from golden.make_finetune import (
    ADAMW,
    CONFIG,
    DPO_CASES,
    FULL_GRADS,
    METRICS,
    ONE_OF_EACH,
    SETTINGS,
    TOKENS,
    TRAINED_LR,
    VOCAB_STRIDE,
    adapter,
    moved,
    preferences,
    rounded,
    sft_batch,
    thin,
)
from golden.make_model import random_weights
from helpers import sound
from helpers.numbers import gap
from helpers.paths import GOLDEN_FOLDER
from helpers.runs import make_run
from llama_jax import parallel
from llama_jax.ops import quant
from llama_jax.params import stack
from llama_jax.run_config import RunConfig
from llama_jax.train import setup, trainable
from llama_jax.train.objectives import dpo_sums, sft_sums
from llama_jax.train.program import Program
from llama_jax.weights import name_table

GOLDEN = np.load(GOLDEN_FOLDER / "finetune.npz")
TOLERANCE = 1e-5  # of losses, relative; measured 1e-6
SLOPES = 2e-5  # of gradients, relative to the largest of a matrix
WEIGHTS = {weight.name: weight for weight in name_table.weights(CONFIG, "huggingface")}
OURS = {"lora_A": "a", "lora_B": "b"}


def stacked(weights: dict[str, np.ndarray]):
    params = name_table.build(CONFIG, ((WEIGHTS[name].path, jnp.asarray(a)) for name, a in weights.items()))
    return stack(params)


@functools.cache
def base():
    return stacked(random_weights(CONFIG))


def lora_run(setting: str, **changes) -> RunConfig:
    spec = SETTINGS[setting]
    given = {
        "init_from": "the base",
        "lora__rank": spec["r"],
        "lora__alpha": float(spec["lora_alpha"]),
        "lora__rslora": spec.get("use_rslora", False),
        "lora__targets": tuple(name.removesuffix("_proj") for name in spec["target_modules"]),
        "train__remat": "full",
        "train__vocab_chunk": 100,
    }
    return dataclasses.replace(make_run(**(given | changes)), model=CONFIG)


def updates_of(values: dict[str, np.ndarray]) -> dict:
    """peft's matrices as what a run trains."""
    layers: dict = {}
    for name, array in sorted(values.items()):
        module, _, part = name.rpartition(".")
        _, layer, block, member = WEIGHTS[module + ".weight"].path
        layers.setdefault(block, {}).setdefault(member, {}).setdefault(OURS[part], {})[layer] = array
    arrays = lambda by_layer: jnp.stack([by_layer[i] for i in range(CONFIG.num_layers)])  # noqa: E731
    return {"layers": jax.tree.map(arrays, layers, is_leaf=lambda x: 0 in x)}


def ours_of(tree, name: str) -> np.ndarray:
    """The part of our tree that golden files call `name`."""
    module, _, part = name.rpartition(".")
    path = WEIGHTS[name if part == "weight" else module + ".weight"].path
    if path[0] != "layers":
        return np.asarray(name_table.get(tree, path))
    leaf = name_table.get(tree["layers"], path[2:])
    return np.asarray((leaf if part == "weight" else leaf[OURS[part]])[path[1]])


def packed(documents: list[tuple[list[int], list[bool]]], length: int, rows: int) -> dict[str, np.ndarray]:
    """Documents (ids, which of them are targets) laid into rows by turns, as the loader would."""
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "positions", "segments")}
    batch["weights"] = np.zeros((rows, length), np.float32)
    ends, counts = [0] * rows, [0] * rows
    for i, (ids, targets) in enumerate(documents):
        row = i * rows // len(documents)
        here = slice(ends[row], ends[row] + len(ids))
        before = slice(here.start, here.stop - 1)
        counts[row] += 1
        batch["tokens"][row, here], batch["targets"][row, before] = ids, ids[1:]
        batch["positions"][row, here], batch["segments"][row, here] = range(len(ids)), counts[row]
        batch["weights"][row, before] = targets[1:]
        ends[row] = here.stop
    assert max(ends) <= length
    return batch


def sft_documents():
    batch = sft_batch()
    for ids, mask, labels in zip(*(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        length = int(mask.sum())
        yield ids[:length].tolist(), (labels[:length] >= 0).tolist()


def same_gradients(prefix: str, grads, least: int) -> None:
    names = [key.removeprefix(f"{prefix}/grad/") for key in GOLDEN.files if key.startswith(f"{prefix}/grad/")]
    assert len(names) >= least
    for name in names:
        assert gap(thin(ours_of(grads, name)), GOLDEN[f"{prefix}/grad/{name}"]) < SLOPES, name
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in jax.tree.leaves(grads)))
    assert gap(norm, GOLDEN[f"{prefix}/grad_norm"]) < SLOPES


def loss_and_gradients(run, sums, trained, frozen, batch):
    """The mean loss of a batch and its gradients, as the step has them."""

    @jax.jit
    def both(trained, frozen, batch):
        loss = lambda trained: sums(run, trainable.policy(run, trained, frozen), frozen, batch)  # noqa: E731
        (total, found), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        return jax.tree.map(lambda a: a / found["count"], (total, found, grads))

    return both(trained, frozen, batch)


def sft(run, policy, frozen, batch):
    return sft_sums(run, policy, batch, dtype=jnp.float32)


def dpo(run, policy, frozen, batch):
    return dpo_sums(run, policy, frozen, batch, dtype=jnp.float32)


@pytest.mark.parametrize("setting", ["plain", "rslora"])
def test_losses_and_gradients_of_lora_are_pefts(setting):
    run, batch = lora_run(setting), packed(list(sft_documents()), 24, rows=2)
    loss, _, grads = loss_and_gradients(run, sft, updates_of(adapter(setting)), base(), batch)
    assert gap(loss, GOLDEN[f"lora/{setting}/loss"]) < TOLERANCE
    same_gradients(f"lora/{setting}", grads, least=12)


@pytest.mark.parametrize("kind, bits", [("q8_0", 8), ("q4_0", 4)])
def test_losses_and_gradients_of_qlora_are_pefts_beside_the_rounded_base(kind, bits):
    run, batch = lora_run("plain", lora__base=f"int{bits}"), packed(list(sft_documents()), 24, rows=2)
    held = dict(base())
    held["layers"] = jax.tree.map(lambda a: quant.quantize(a, bits) if a.ndim == 3 else a, held["layers"])
    expected = stacked(rounded(kind))["layers"]["ffn"]["up"]
    assert gap(quant.dequantize(held["layers"]["ffn"]["up"], jnp.float32), expected) == 0
    loss, _, grads = loss_and_gradients(run, sft, updates_of(adapter("plain")), held, batch)
    assert gap(loss, GOLDEN[f"qlora/{kind}/loss"]) < TOLERANCE
    same_gradients(f"qlora/{kind}", grads, least=2 * len(ONE_OF_EACH))


@pytest.mark.parametrize("setting, rate, prefix", [("plain", ADAMW["lr"], "adamw"), ("trained", TRAINED_LR, "trained")])
def test_steps_of_lora_are_those_of_torch(tmp_path, setting, rate, prefix):
    sound.save_params(tmp_path / "base", CONFIG, base())
    run = lora_run(
        setting,
        init_from=str(tmp_path / "base"),
        optimizer__learning_rate=rate,
        optimizer__weight_decay=ADAMW["weight_decay"],
        optimizer__schedule="constant",
        optimizer__warmup_steps=0,
        data__batch_size=2,
        data__sequence_length=24,
    )
    program = Program.make(run, parallel.make_mesh({}, jax.devices()[:1]))
    frozen = setup.frozen(program).params
    state = dataclasses.replace(setup.first_state(program), params=updates_of(adapter(setting, fresh=True)))
    batch, losses, norms = packed(list(sft_documents()), 24, rows=2), [], []
    expected = GOLDEN[f"{prefix}/loss"]
    for _ in expected:
        kept = jax.tree.map(np.asarray, state.params)
        state, metrics = program.train_step(state, frozen, jax.device_put(batch, program.batch_sharding))
        losses.append(metrics["loss"]), norms.append(metrics["grad_norm"])
    assert gap(losses, expected) < TOLERANCE
    if prefix == "adamw":
        assert gap(norms[:5], GOLDEN["adamw/grad_norm"]) < SLOPES
    finals = [key for key in GOLDEN.files if key.startswith(f"{prefix}/final/")]
    assert len(finals) == (6 if prefix == "adamw" else 0)
    for key in finals:
        # Adam divides by roots of second moments: a gradient near zero makes rounding a part of a step (1e-3).
        assert np.abs(ours_of(kept, key.removeprefix("adamw/final/")) - GOLDEN[key]).max() < 2e-5


@pytest.mark.parametrize("case", DPO_CASES)
@pytest.mark.parametrize("policy", ["lora", "full"])
def test_losses_rewards_and_gradients_of_dpo_are_trls(policy, case):
    spec = DPO_CASES[case]
    settings = {
        "train__objective": "dpo",
        "init_from": "the base",
        "dpo__beta": spec["beta"],
        "dpo__label_smoothing": spec["label_smoothing"],
        "dpo__loss": "ipo" if case == "ipo" else "sigmoid",
    }
    if policy == "lora":
        run, trained = lora_run("plain", **settings), updates_of(adapter("plain"))
    else:
        run = dataclasses.replace(make_run(**settings, train__vocab_chunk=100), model=CONFIG)
        trained = stacked(moved())
    documents = []
    for pair in preferences():
        for answer in ("chosen", "rejected"):
            ids = pair["prompt"] + pair[answer]
            documents.append((ids, [False] * len(pair["prompt"]) + [True] * len(pair[answer])))
    batch = packed(documents, 56, rows=2)
    loss, found, grads = loss_and_gradients(run, dpo, trained, base(), batch)
    assert gap(loss, GOLDEN[f"dpo/{policy}/{case}/loss"]) < TOLERANCE
    names = ("reward_chosen", "reward_rejected", "accuracy", "margin")
    for ours, theirs in zip(names, METRICS, strict=True):
        # Differences of sums of some forty log-probabilities: 3e-6 of them is 1e-4 of what is left.
        np.testing.assert_allclose(found[ours], GOLDEN[f"dpo/{policy}/{case}/{theirs}"], rtol=1e-4, atol=1e-6)
    same_gradients(f"dpo/{policy}/{case}", grads, least=6 if policy == "lora" else len(FULL_GRADS))


def test_an_adapter_that_peft_trained_speaks_as_it_does(tmp_path):
    sound.save_params(tmp_path / "base", CONFIG, base())
    llama = llama_jax.load(tmp_path / "base", dtype="float32", adapters=GOLDEN_FOLDER / "peft_trained")
    logits = np.asarray(llama.logits(TOKENS))[..., ::VOCAB_STRIDE]
    assert gap(logits, GOLDEN["trained/logits"]) < TOLERANCE
    assert (
        TRAINED_LR > 0 and np.abs(logits - np.asarray(llama.use(None).logits(TOKENS))[..., ::VOCAB_STRIDE]).max() > 0.01
    )
