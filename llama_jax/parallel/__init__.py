"""The device mesh, and the rules that shard logical axes over it (floor 1)."""

from llama_jax.parallel.flags import compiler_options
from llama_jax.parallel.gradients import ring_gradient, ring_takes
from llama_jax.parallel.mesh import AXES, make_mesh, resolve, single_device_mesh
from llama_jax.parallel.pipeline import pipeline
from llama_jax.parallel.platform import compute_dtype, has_bfloat16, named_dtype
from llama_jax.parallel.rules import (
    RULES,
    Layout,
    abstract,
    active,
    all_gathered,
    axis_size,
    compute_capability,
    constrain,
    constrain_first,
    device,
    device_platform,
    length_order,
    on_each_part,
    reordered,
    replicated,
    shardings,
    spread,
    stages,
    use,
    use_balanced,
)

__all__ = [
    "AXES",
    "RULES",
    "Layout",
    "abstract",
    "active",
    "all_gathered",
    "axis_size",
    "compiler_options",
    "compute_capability",
    "compute_dtype",
    "constrain",
    "constrain_first",
    "device",
    "device_platform",
    "has_bfloat16",
    "length_order",
    "make_mesh",
    "named_dtype",
    "on_each_part",
    "pipeline",
    "reordered",
    "replicated",
    "resolve",
    "ring_gradient",
    "ring_takes",
    "shardings",
    "single_device_mesh",
    "spread",
    "stages",
    "use",
    "use_balanced",
]
