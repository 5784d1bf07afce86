"""Rematerialization: the values of a layer that its backward pass keeps. All others are computed again."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

# Values that a layer keeps: all; the results of matrix products and of attention; those of attention alone, on the
# device or in the host's memory; or only its input.
REMAT = ("none", "dots", "attention", "offload", "full")
PRODUCT = "product"
ATTENTION = "attention"  # attention kernels name their residuals so


def product(x: jax.Array) -> jax.Array:
    """Marks the result of a matrix product, which `dots` keeps. It is the identity."""
    return checkpoint_name(x, PRODUCT)


def with_remat(layer: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wraps the function of a layer so that its backward pass recomputes all values that `remat` does not keep.

    Args:
        layer: the function.
        remat: one of REMAT.
    """
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    if remat == "dots":
        return _keeping(layer, policies.save_only_these_names(PRODUCT, ATTENTION))
    if remat == "attention":
        return _keeping(layer, policies.save_only_these_names(ATTENTION))
    if remat == "offload":
        offload = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[ATTENTION],
            offload_src="device",
            offload_dst="pinned_host",
        )
        return _keeping(layer, offload)
    return jax.checkpoint(layer)


def _keeping(layer: Callable[..., Any], policy: Callable[..., Any]) -> Callable[..., Any]:
    """Rematerializes by a policy that keeps, in addition, the results of cuDNN's attention, which have no names."""

    def kept(primitive: Any, *avals: Any, **parameters: Any) -> Any:
        return primitive.name.startswith("dot_product_attention_fwd") or policy(primitive, *avals, **parameters)

    return jax.checkpoint(layer, policy=kept)
