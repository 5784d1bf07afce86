"""The training objectives as sums over a batch: the cross-entropy of targets, and DPO's loss on preference pairs.

They are sums and not means, so that the sums of several parts of a batch are divided once, by the count of all parts.

Letters: B rows, T tokens, P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from llama_jax import model, parallel
from llama_jax.ops.loss import cross_entropy
from llama_jax.params import Params
from llama_jax.run_config import RunConfig
from llama_jax.run_keys import DpoConfig

Batch = dict[str, jax.Array]  # tokens, targets, positions, segments: (B, T) int32; weights: (B, T) float32
Sums = dict[str, jax.Array]  # float32 scalars; "count" is the divisor of the others


class Objective(Protocol):
    """A loss as a sum over a batch. `objective` computes the loss that train.objective names, and `train(...,
    loss=...)` takes others.

    It is traced by jax, and called for each part of an accumulated batch.
    """

    def __call__(
        self, run: RunConfig, policy: Params, reference: Params | None, batch: Batch, *, dtype: jnp.dtype
    ) -> tuple[jax.Array, Sums]:
        """The sum to minimize, a float32 scalar, and the sums to report.

        Args:
            run: The run.
            policy: The params that are trained, stacked; with LoRA they have its matrices in them.
            reference: The frozen params of DPO or LoRA, or None.
            batch: Packed rows.
            dtype: Compute dtype.

        Returns:
            The sum and a dict of float32 scalars. The dict has `loss`, which is printed, and `count`. The sum and all
            the others are divided by the count of the whole batch, for example its number of target tokens.
        """
        ...


def own_name(loss: Objective) -> str | None:
    """The name of a caller's own loss function, which a resumed run must have too; None for `objective`."""
    if loss is objective:
        return None
    return f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"


def objective(
    run: RunConfig, policy: Params, reference: Params | None, batch: Batch, *, dtype: jnp.dtype
) -> tuple[jax.Array, Sums]:
    """The sum that a run minimizes over a batch, and the reported sums, among them the loss without its z-term.

    Args:
        run: The run.
        policy: The params that are trained.
        reference: The reference params of DPO, which get no gradient; None for other objectives.
        batch: Packed rows. For DPO, segments 2k - 1 and 2k are the chosen and the rejected answer of one pair.
        dtype: Compute dtype.
    """
    if run.train.objective == "dpo":
        assert reference is not None  # it is the model of init_from, which DPO needs (run_checks)
        return dpo_sums(run, policy, reference, batch, dtype=dtype)
    return sft_sums(run, policy, batch, dtype=dtype)


def sft_sums(run: RunConfig, policy: Params, batch: Batch, *, dtype: jnp.dtype) -> tuple[jax.Array, Sums]:
    """The weighted cross-entropy of all targets. The reported count is the number of targets."""
    nll_BT, lse_BT = token_losses(run, policy, batch, dtype)
    nll = jnp.sum(batch["weights"] * nll_BT)
    z_term = run.train.z_loss * jnp.sum(batch["weights"] * jnp.square(lse_BT))
    return nll + z_term, {"count": jnp.sum(batch["weights"]), "loss": nll}


def dpo_sums(
    run: RunConfig, policy: Params, reference: Params, batch: Batch, *, dtype: jnp.dtype
) -> tuple[jax.Array, Sums]:
    """The loss of `dpo_losses` over all pairs, with the metrics that TRL reports. The count is that of pairs."""
    policy_BP2 = -answer_sums(token_losses(run, policy, batch, dtype)[0], batch)
    with jax.named_scope("reference"):
        frozen = jax.lax.stop_gradient(reference)
        reference_BP2 = -jax.lax.stop_gradient(answer_sums(token_losses(run, frozen, batch, dtype)[0], batch))
    counts_BP2 = answer_sums(jnp.ones_like(batch["weights"]), batch)
    real_BP = jnp.all(counts_BP2 > 0, axis=-1)
    losses_BP = dpo_losses(run.dpo, policy_BP2, reference_BP2, counts_BP2)
    rewards_BP2 = run.dpo.beta * (policy_BP2 - reference_BP2)
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


def dpo_losses(config: DpoConfig, policy_BP2: jax.Array, reference_BP2: jax.Array, counts_BP2: jax.Array) -> jax.Array:
    """The loss of each pair, (B, P) float32.

    With h = (policy - reference of the chosen) - (policy - reference of the rejected), `sigmoid` is
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing (arXiv:2305.18290, equation 7, and
    Mitchell's note on conservative DPO); `ipo` is (h' - 1 / (2 beta))^2 (arXiv:2310.12036, equation 17), where h' is
    computed from means over an answer's tokens instead of sums, as in TRL.

    Args:
        config: The keys beta, loss and label_smoothing.
        policy_BP2: Log-probabilities of the chosen and the rejected answer under the policy, summed over their tokens.
        reference_BP2: The same under the reference.
        counts_BP2: Number of tokens of each answer.
    """
    gains_BP2 = policy_BP2 - reference_BP2
    if config.loss == "ipo":
        gains_BP2 = gains_BP2 / jnp.maximum(counts_BP2, 1.0)
    h_BP = gains_BP2[..., 0] - gains_BP2[..., 1]
    if config.loss == "ipo":
        return jnp.square(h_BP - 1 / (2 * config.beta))
    wrong = config.label_smoothing
    return -(1 - wrong) * jax.nn.log_sigmoid(config.beta * h_BP) - wrong * jax.nn.log_sigmoid(-config.beta * h_BP)


def answer_sums(values_BT: jax.Array, batch: Batch) -> jax.Array:
    """The weighted sums of values (B, T) over each answer: (B, P, 2), chosen and rejected. Absent pairs have 0.

    P is T / 4, since a document has at least two tokens.
    """
    B, T = values_BT.shape
    pairs = max(1, T // 4)
    rows = jnp.arange(B)[:, None]
    place_BT = jnp.where(batch["segments"] > 0, batch["segments"] - 1, 2 * pairs)  # padding: dropped
    sums = jnp.zeros((B, 2 * pairs), jnp.float32).at[rows, place_BT].add(batch["weights"] * values_BT, mode="drop")
    return sums.reshape(B, pairs, 2)


def token_losses(run: RunConfig, params: Params, batch: Batch, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The negative log-likelihood of each target, and the log-normalizer of its logits, both float32 (B, T)."""
    config = dataclasses.replace(run.shape, tied_embeddings="unembed" not in params)  # LoRA may untie the policy's
    order = parallel.length_order(run.data.sequence_length)  # of the row's parts on the devices that share it
    tokens, positions, segments, targets = (
        parallel.reordered(batch[name], order) for name in ("tokens", "positions", "segments", "targets")
    )
    with parallel.use_balanced(order):
        hidden_BTD, _ = model.forward(config, params, tokens, positions, segments, dtype=dtype, remat=run.train.remat)
    with jax.named_scope("loss"):
        table_VD = model.unembedding(config, params)
        losses = cross_entropy(hidden_BTD, table_VD, targets, vocab_chunk=run.train.vocab_chunk)
        nll_BT, lse_BT = (parallel.reordered(a, order, back=True) for a in losses)
        return nll_BT, lse_BT
