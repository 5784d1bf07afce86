"""The device mesh, and the rules that shard logical axes over it (floor 1)."""

from llama_jax.parallel.mesh import AXES, make_mesh, single_device_mesh
from llama_jax.parallel.platform import compute_dtype
from llama_jax.parallel.rules import (
    RULES,
    Layout,
    abstract,
    active,
    axis_size,
    constrain,
    on_each_part,
    replicated,
    shardings,
    spread,
    use,
)

__all__ = [
    "AXES",
    "RULES",
    "Layout",
    "abstract",
    "active",
    "axis_size",
    "compute_dtype",
    "constrain",
    "make_mesh",
    "on_each_part",
    "replicated",
    "shardings",
    "single_device_mesh",
    "spread",
    "use",
]
