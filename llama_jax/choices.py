"""Names that users choose from, for the functions that take them and for command lines, which start without jax.

Floor 0: this module imports nothing.
"""

QUANTIZE = ("none", "int8", "int4")  # weights, as a model is loaded
KV_TYPES = ("compute", "int8")  # keys and values in a cache
QUANTIZATIONS = ("int8", "int4", "kv_int8")  # measured by `eval quantization`
