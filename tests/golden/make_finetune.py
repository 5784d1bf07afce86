"""Regenerate finetune.npz and peft_trained/: losses, gradients and steps of LoRA, QLoRA and DPO from peft and TRL.

    pip install torch transformers peft trl numpy ml_dtypes     # the reference environment; jax is not needed
    PYTHONPATH=.:tests python tests/golden/make_finetune.py

The file there is of torch 2.13.0 (CPU), transformers 5.24.0, peft 0.21.2 and TRL 1.16.0, all of it in float32. The base
is that of make_peft.py; adapters, tokens and the moved weights are drawn by name with numpy alone, so that a test draws
the same ones: see `adapter`, `sft_batch`, `preferences`, `moved` and `rounded`. Keys of the file, where MODULE is
model.layers.0.self_attn.q_proj and the like, X is lora_A or lora_B, and gradients are as `thin` leaves them:

    lora/SETTING/...        SFT of `plain` and `rslora`, both matrices drawn; the base as it is
    qlora/KIND/...          SFT of `plain` over a base whose linears are rounded to KIND: q8_0 or q4_0
        loss                  the mean over all counted tokens of the batch, ()
        grad_norm             of all lora matrices together, ()
        grad/MODULE.X         of every one; of those in ONE_OF_EACH under qlora
    adamw/...               five steps of `plain` on the one batch, A drawn and B zero at first; see `ADAMW`
        loss                  before each step and after the last, (6,)
        grad_norm             before clipping, (5,)
        final/MODULE.X        whole, of the modules in FOLLOWED
    dpo/batch/...           the four pairs as TRL's collator lays them out, the chosen in the first half
        input_ids, attention_mask, completion_mask     (8, T)
    dpo/POLICY/...          POLICY is lora (`plain`, and the base as reference) or full (all weights moved)
        logps, ref_logps      of each completion under the policy and the reference, (8,)
        CASE/loss             CASE is one of DPO_CASES
        CASE/METRIC           TRL's rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins
        CASE/grad_norm        of all that is trained, ()
        CASE/grad/NAME        MODULE.X of lora for FOLLOWED, and the weights in FULL_GRADS of full
    trained/loss, logits    of peft_trained/ (q and v, rank 2, three steps at TRAINED_LR as above): losses before each
                            step, (3,), and the logits of make_peft.TOKENS after it, every VOCAB_STRIDE-th
    versions                json

What TRL does here, as read in its source and checked below with numpy: log-probabilities are summed over the
completion, which includes the end-of-text token, and no token after it; the losses of pairs are averaged over pairs.
`ipo` divides each log-ratio by its completion's length first, so that beta is per token, while the rewards are beta
times the summed log-ratio for every loss. TRL 1.16 reads no label smoothing under `sigmoid` (0.24 did); its `aot` loss
has the smoothed formula with the pairs sorted, so that one pair at a time it is conservative DPO, and the mean of that
over pairs is what is kept as `smoothed`.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from golden.make_model import VOCAB_STRIDE, _transformers_config, random_weights
from golden.make_peft import CONFIG, LINEAR, TOKENS
from llama_jax.weights import name_table
from llama_jax.weights.formats import gguf_blocks

HERE = Path(__file__).parent
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR},
    "rslora": {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
    "trained": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
}
KINDS = ("q8_0", "q4_0")
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0  # of the global norm
TRAINED_LR = 1e-2
FOLLOWED = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj")
ONE_OF_EACH = (*FOLLOWED, *(f"model.layers.0.{m}" for m in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")))
ONE_OF_EACH += ("model.layers.1.mlp.gate_proj",)
DPO_CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": ["sigmoid"], "beta": 0.1, "label_smoothing": 0.0},
    "smoothed": {"loss_type": ["aot"], "beta": 0.1, "label_smoothing": 0.2},
    "ipo": {"loss_type": ["ipo"], "beta": 0.3, "label_smoothing": 0.0},
}
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
FULL_GRADS = (
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)
EOS = 0
_WHOLE, _STRIDE = 384, 31  # LoRA matrices are stored whole; of larger gradients, every _STRIDE-th element


def thin(array: np.ndarray) -> np.ndarray:
    """The stored part of a gradient, as (n,): all of a small one, else every 31st element in row-major order."""
    return array if array.size <= _WHOLE else array.reshape(-1)[::_STRIDE]


def adapter(setting: str, *, fresh: bool = False) -> dict[str, np.ndarray]:
    """Float32 lora matrices by MODULE.X, X being lora_A (r, in) or lora_B (out, r), which is zero in a `fresh` one."""
    rank, found = SETTINGS[setting]["r"], {}
    for weight in name_table.weights(CONFIG, "huggingface"):
        module = weight.name.removesuffix(".weight")
        if module.split(".")[-1] not in SETTINGS[setting]["target_modules"]:
            continue
        for part, shape in (("lora_A", (rank, weight.shape[1])), ("lora_B", (weight.shape[0], rank))):
            draw = np.random.RandomState(zlib.crc32(f"{setting} {module}.{part}".encode()))
            noise = 0.5 * draw.standard_normal(shape) / shape[-1] ** 0.5
            found[f"{module}.{part}"] = (0 * noise if fresh and part == "lora_B" else noise).astype(np.float32)
    return found


def rounded(kind: str) -> dict[str, np.ndarray]:
    """The base's weights, with the matrices of its layers rounded to q8_0 or q4_0."""
    found = random_weights(CONFIG)
    for name, weight in found.items():
        if name.split(".")[-2] in LINEAR:
            found[name] = gguf_blocks.dequantize(kind.upper(), gguf_blocks.quantize(kind.upper(), weight))
    return found


def moved() -> dict[str, np.ndarray]:
    """The base's weights, each moved by noise of 0.15 of its own size."""
    found = random_weights(CONFIG)
    for name, weight in found.items():
        noise = np.random.RandomState(zlib.crc32(f"moved {name}".encode())).standard_normal(weight.shape)
        found[name] = (weight + 0.15 * np.std(weight) * noise).astype(np.float32)
    return found


def sft_batch() -> dict[str, np.ndarray]:
    """Three documents padded on the right, as transformers takes them: labels are the tokens themselves, or -100.

    Returns:
        input_ids, attention_mask and labels, each int64 (3, 20). Prompts have no label, nor has the padding, nor a
        second turn's question in the last document.
    """
    draw = np.random.RandomState(11)
    lengths, prompts = (13, 7, 20), (5, 2, 6)
    ids = draw.randint(1, CONFIG.vocab_size, (3, max(lengths)))
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, -100)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids[row, length:] = EOS
        mask[row, :length] = 1
        labels[row, prompt:length] = ids[row, prompt:length]
    labels[2, 10:14] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def preferences() -> list[dict[str, list[int]]]:
    """Four pairs as token ids: prompt, chosen and rejected, the answers ending with EOS, as TRL makes them end."""
    draw = np.random.RandomState(12)
    lengths = ((6, 5, 3), (3, 2, 6), (8, 9, 4), (1, 4, 8))
    found = []
    for sizes in lengths:
        prompt, chosen, rejected = (draw.randint(1, CONFIG.vocab_size, n).tolist() for n in sizes)
        found.append({"prompt": prompt, "chosen": [*chosen, EOS], "rejected": [*rejected, EOS]})
    return found


def _model(weights: dict[str, np.ndarray]) -> Any:
    """transformers' model of CONFIG with these weights, in training mode; it has no dropout."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(_transformers_config(CONFIG)).train()
    model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, strict=True)
    return model


def _name(parameter: str) -> str:
    """MODULE.X of a lora matrix; of another weight, its name in the base."""
    for word in ("base_model.model.", "default.", "base_layer."):
        parameter = parameter.replace(word, "")
    return parameter.removesuffix(".weight") if "lora_" in parameter else parameter


def _draw(model: Any, setting: str, *, fresh: bool = False) -> Any:
    """A peft model's lora matrices, filled with those of `adapter`."""
    import torch

    values = adapter(setting, fresh=fresh)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.from_numpy(values.pop(_name(name))))
    assert not values, f"peft has none of {list(values)}"
    return model


def _lora_config(setting: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **SETTINGS[setting])


def _with_lora(weights: dict[str, np.ndarray], setting: str, *, fresh: bool = False) -> Any:
    from peft import get_peft_model

    return _draw(get_peft_model(_model(weights), _lora_config(setting)), setting, fresh=fresh).train()


def _gradients(model: Any, only: Sequence[str]) -> dict[str, np.ndarray]:
    """grad_norm of all that is trained, and the gradients of weights whose names begin with one of `only`, thinned."""
    import torch

    grads = {_name(n): p.grad.detach() for n, p in model.named_parameters() if p.requires_grad}
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    kept = {f"grad/{name}": thin(g.numpy()).copy() for name, g in grads.items() if name.startswith(tuple(only))}
    return {"grad_norm": norm.numpy(), **kept}


def _sft_loss(model: Any) -> Any:
    import torch

    return model(**{name: torch.from_numpy(a) for name, a in sft_batch().items()}, use_cache=False).loss


def _sft(weights: dict[str, np.ndarray], setting: str, only: Sequence[str]) -> dict[str, np.ndarray]:
    """transformers' own loss of `sft_batch`, and its gradients."""
    model = _with_lora(weights, setting)
    loss = _sft_loss(model)
    loss.backward()
    return {"loss": loss.detach().numpy(), **_gradients(model, only)}


def _train(model: Any, *, steps: int, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """Steps of AdamW on `sft_batch`: the losses before each and after the last, and the norms before clipping."""
    import torch

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, **{**ADAMW, "lr": lr})
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _sft_loss(model)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights, CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    losses.append(_sft_loss(model).item())
    return np.array(losses, np.float32), np.array(norms, np.float32)


def _adamw() -> dict[str, np.ndarray]:
    model = _with_lora(random_weights(CONFIG), "plain", fresh=True)
    losses, norms = _train(model, steps=5, lr=ADAMW["lr"])
    final = {_name(n): p.detach().numpy() for n, p in model.named_parameters() if "lora_" in n}
    kept = {f"final/{name}": a for name, a in final.items() if name.rpartition(".")[0] in FOLLOWED}
    return {"loss": losses, "grad_norm": norms, **kept}


def _trained() -> dict[str, np.ndarray]:
    """Train and save peft_trained/."""
    import torch

    model = _with_lora(random_weights(CONFIG), "trained", fresh=True)
    losses, _ = _train(model, steps=3, lr=TRAINED_LR)
    folder = HERE / "peft_trained"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(TOKENS)).logits.numpy()
        with model.disable_adapter():
            before = model(torch.from_numpy(TOKENS)).logits.numpy()
    print("trained: losses", losses, "largest change of a logit", np.abs(logits - before).max())
    return {"loss": losses[:3], "logits": logits[..., ::VOCAB_STRIDE]}


def _word_tokenizer() -> Any:
    """A tokenizer whose words are ids, since TRL takes text: "5 17" is [5, 17]."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i) if i != EOS else "</s>": i for i in range(CONFIG.vocab_size)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def _trainer(policy: str, case: dict[str, Any]) -> Any:
    """TRL's trainer of `preferences`, given as text without the end, which it adds."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def words(ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids if i != EOS)

    full = policy == "full"
    with tempfile.TemporaryDirectory() as folder:
        plainly = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
        trainer = DPOTrainer(
            model=_model(moved() if full else random_weights(CONFIG)),
            ref_model=_model(random_weights(CONFIG)) if full else None,
            args=DPOConfig(folder, max_length=None, **plainly, **case),
            train_dataset=Dataset.from_list([{k: words(ids) for k, ids in pair.items()} for pair in preferences()]),
            processing_class=_word_tokenizer(),
            peft_config=None if full else _lora_config("plain"),
        )
    if not full:  # its own would be a new one; the reference is the base with none
        _draw(trainer.model, "plain")
    trainer.model.train()
    return trainer


def _dpo(policy: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The batch, and TRL's losses, metrics and gradients for it under each of DPO_CASES."""
    import torch

    kept: dict[str, np.ndarray] = {}
    for case, settings in DPO_CASES.items():
        trainer = _trainer(policy, settings)
        pairs = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        for pair, ours in zip(pairs, preferences(), strict=True):
            assert all(pair[f"{part}_ids"] == ids for part, ids in ours.items()), (pair, ours)
        batch = trainer.data_collator(pairs)
        if settings["loss_type"] == ["aot"]:  # which sorts what a batch holds
            losses = [trainer.compute_loss(trainer.model, trainer.data_collator([pair])) for pair in pairs]
            loss = torch.stack(losses).mean()
        else:
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        metrics = {name: np.mean(trainer._metrics["train"][name], dtype=np.float32) for name in METRICS}
        grads = _gradients(trainer.model, FULL_GRADS if policy == "full" else FOLLOWED)
        kept |= {f"{case}/{name}": a for name, a in {"loss": loss.detach().numpy(), **metrics, **grads}.items()}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        reference = trainer.model if trainer.ref_model is None else trainer.ref_model
        ref_logps = torch.cat(trainer.compute_ref_log_probs(reference, batch)).numpy()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logps = trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1).numpy()
        np.testing.assert_allclose(_logps(trainer.model, batch), logps, rtol=1e-6)
        np.testing.assert_allclose(_logps(_model(random_weights(CONFIG)), batch), ref_logps, rtol=1e-6)
    kept |= {"logps": logps, "ref_logps": ref_logps}
    _check(policy, kept, batch)
    return {name: a.numpy() for name, a in batch.items()}, kept


def _logps(model: Any, batch: dict[str, Any]) -> np.ndarray:
    """Summed log-probabilities of completions from the logits, in numpy: each token's, given all before it."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().numpy()[:, :-1]
    peak = logits.max(-1, keepdims=True)
    normal = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    each = np.take_along_axis(normal, batch["input_ids"].numpy()[:, 1:, None], axis=-1)[..., 0]
    return (each * batch["completion_mask"].numpy()[:, 1:]).sum(-1).astype(np.float32)


def _check(policy: str, kept: dict[str, np.ndarray], batch: dict[str, Any]) -> None:
    """Checks TRL's losses and metrics against the papers' formulas in the docstring above."""
    ratios = (kept["logps"] - kept["ref_logps"]).astype(np.float64)
    lengths = batch["completion_mask"].numpy().sum(-1)
    margins = ratios[:4] - ratios[4:]
    per_token = (ratios / lengths)[:4] - (ratios / lengths)[4:]

    def minus_log_sigmoid(x: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, -x)

    expected = {
        "sigmoid": minus_log_sigmoid(0.1 * margins),
        "smoothed": 0.8 * minus_log_sigmoid(0.1 * margins) + 0.2 * minus_log_sigmoid(-0.1 * margins),
        "ipo": (per_token - 1 / (2 * 0.3)) ** 2,
    }
    for case, losses in expected.items():
        beta = DPO_CASES[case]["beta"]
        rewards = (beta * ratios[:4].mean(), beta * ratios[4:].mean(), (margins > 0).mean(), beta * margins.mean())
        ours = np.array([losses.mean(), *rewards])
        theirs = np.array([kept[f"{case}/{name}"] for name in ("loss", *METRICS)])
        print(policy, case, "loss, rewards, accuracy, margin", theirs, "losses", losses)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def main() -> None:
    """Write finetune.npz and peft_trained/ next to this file."""
    import torch

    torch.manual_seed(0)
    kept: dict[str, np.ndarray] = {}

    def add(prefix: str, found: dict[str, np.ndarray]) -> None:
        print(prefix, {name: a for name, a in found.items() if a.size < 8})
        kept.update({f"{prefix}/{name}": a for name, a in found.items()})

    for setting in ("plain", "rslora"):
        add(f"lora/{setting}", _sft(random_weights(CONFIG), setting, ("model.",)))
    for kind in KINDS:
        add(f"qlora/{kind}", _sft(rounded(kind), "plain", ONE_OF_EACH))
    add("adamw", _adamw())
    add("trained", _trained())
    for policy in ("lora", "full"):
        batch, found = _dpo(policy)
        add("dpo/batch", batch)
        add(f"dpo/{policy}", found)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    np.savez_compressed(HERE / "finetune.npz", versions=json.dumps(versions), **kept)
    print(f"{(HERE / 'finetune.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
