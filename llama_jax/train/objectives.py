"""What a step minimises, as sums over a batch: the cross-entropy of targets, or how preference pairs are told apart.

Sums, not means: whoever adds up several parts of a batch divides once, by the count of all of them.

Letters: B rows, T tokens, P pairs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax import model
from llama_jax.ops.loss import cross_entropy
from llama_jax.run_config import RunConfig
from llama_jax.run_keys import DpoConfig

Batch = dict[str, jax.Array]  # tokens, targets, positions, segments: (B, T) int32; weights: (B, T) float32
Sums = dict[str, jax.Array]  # float32 scalars; "count" is what the others are divided by


def objective(
    run: RunConfig, policy: model.Params, reference: model.Params | None, batch: Batch, *, dtype: jnp.dtype
) -> tuple[jax.Array, Sums]:
    """The sum that a run minimises over a batch, and what is reported of it, among which the loss without z-term.

    Args:
        run: the run.
        policy: the params that are trained.
        reference: for DPO the params that they are held against; no gradient reaches them.
        batch: packed rows; for DPO segments 2k - 1 and 2k are the chosen and the rejected answer of one pair.
        dtype: of the computation.
    """
    if run.train.objective == "dpo":
        return dpo_sums(run, policy, reference, batch, dtype=dtype)
    return sft_sums(run, policy, batch, dtype=dtype)


def sft_sums(run: RunConfig, policy: model.Params, batch: Batch, *, dtype: jnp.dtype) -> tuple[jax.Array, Sums]:
    """The weighted cross-entropy of all targets; counted in targets."""
    nll_BT, lse_BT = _token_losses(run, policy, batch, dtype)
    nll = jnp.sum(batch["weights"] * nll_BT)
    z_term = run.train.z_loss * jnp.sum(batch["weights"] * jnp.square(lse_BT))
    return nll + z_term, {"count": jnp.sum(batch["weights"]), "loss": nll}


def dpo_sums(
    run: RunConfig, policy: model.Params, reference: model.Params, batch: Batch, *, dtype: jnp.dtype
) -> tuple[jax.Array, Sums]:
    """The loss of `dpo_losses` over all pairs, with what TRL reports of them; counted in pairs."""
    ours_BP2 = -answer_sums(_token_losses(run, policy, batch, dtype)[0], batch)
    with jax.named_scope("reference"):
        frozen = jax.lax.stop_gradient(reference)
        theirs_BP2 = -jax.lax.stop_gradient(answer_sums(_token_losses(run, frozen, batch, dtype)[0], batch))
    counts_BP2 = answer_sums(jnp.ones_like(batch["weights"]), batch)
    real_BP = jnp.all(counts_BP2 > 0, axis=-1)
    losses_BP = dpo_losses(run.dpo, ours_BP2, theirs_BP2, counts_BP2)
    rewards_BP2 = run.dpo.beta * (ours_BP2 - theirs_BP2)
    margins_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]

    def total(values_BP: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(real_BP, values_BP, 0.0))

    loss = total(losses_BP)
    return loss, {
        "count": jnp.sum(real_BP).astype(jnp.float32),
        "loss": loss,
        "accuracy": total((margins_BP > 0).astype(jnp.float32)),
        "margin": total(margins_BP),
        "reward_chosen": total(rewards_BP2[..., 0]),
        "reward_rejected": total(rewards_BP2[..., 1]),
    }


def dpo_losses(config: DpoConfig, ours_BP2: jax.Array, theirs_BP2: jax.Array, counts_BP2: jax.Array) -> jax.Array:
    """The loss of each pair, (B, P) float32.

    With h = (ours - theirs of the chosen) - (ours - theirs of the rejected), `sigmoid` is
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing (arXiv:2305.18290, equation 7, and
    Mitchell's note on conservative DPO); `ipo` is (h' - 1 / (2 beta))^2 (arXiv:2310.12036, equation 17), where h' is
    made of means over an answer's tokens rather than sums, as TRL has it.

    Args:
        config: beta, loss, label_smoothing.
        ours_BP2: log-probabilities of the chosen and the rejected answer under the policy, summed over their tokens.
        theirs_BP2: the same under the reference.
        counts_BP2: tokens of each answer.
    """
    gains_BP2 = ours_BP2 - theirs_BP2
    if config.loss == "ipo":
        gains_BP2 = gains_BP2 / jnp.maximum(counts_BP2, 1.0)
    h_BP = gains_BP2[..., 0] - gains_BP2[..., 1]
    if config.loss == "ipo":
        return jnp.square(h_BP - 1 / (2 * config.beta))
    wrong = config.label_smoothing
    return -(1 - wrong) * jax.nn.log_sigmoid(config.beta * h_BP) - wrong * jax.nn.log_sigmoid(-config.beta * h_BP)


def answer_sums(values_BT: jax.Array, batch: Batch) -> jax.Array:
    """values (B, T), weighted, summed over each answer: (B, P, 2), chosen and rejected. Pairs that are not there are 0.

    P is T / 4: a document has two tokens at least.
    """
    B, T = values_BT.shape
    pairs = max(1, T // 4)
    rows = jnp.arange(B)[:, None]
    place_BT = jnp.where(batch["segments"] > 0, batch["segments"] - 1, 2 * pairs)  # of padding: nowhere
    sums = jnp.zeros((B, 2 * pairs), jnp.float32).at[rows, place_BT].add(batch["weights"] * values_BT, mode="drop")
    return sums.reshape(B, pairs, 2)


def _token_losses(run: RunConfig, params: model.Params, batch: Batch, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """-log p of each target and the log-normaliser of its logits, (B, T) float32."""
    config = dataclasses.replace(run.model, tied_embeddings="unembed" not in params)  # LoRA may untie the policy's
    hidden_BTD, _ = model.forward(
        config, params, batch["tokens"], batch["positions"], batch["segments"], dtype=dtype, remat=run.train.remat
    )
    with jax.named_scope("loss"):
        table_VD = model.unembedding(config, params)
        return cross_entropy(hidden_BTD, table_VD, batch["targets"], vocab_chunk=run.train.vocab_chunk)
