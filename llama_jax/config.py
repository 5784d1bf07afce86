"""The shape of a Llama: one frozen record, the published sizes, and every number that follows from them.

Floor 0: this module does not import jax. Parameter, FLOP and byte counts are derived, never stored.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llama_jax.errors import Answering, ConfigError, brief, checked_fields, nearest, no_attribute

_LONGEST_NAME, _MOST_NAMES = 100, 1500
_MOST_LAYERS = 4096
_LARGEST = 2**31 - 1  # of any whole number


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's rescaling of the rotary frequencies (Meta's `apply_scaling`; `rope_type: llama3` elsewhere).

    Wavelengths above `original_max_seq_len / low_freq_factor` positions are stretched `factor` times, wavelengths below
    `original_max_seq_len / high_freq_factor` stay as they are, and wavelengths between them are interpolated.

    Attributes:
        factor: Factor by which long wavelengths are stretched, at least 1.
        low_freq_factor: Divisor of original_max_seq_len that gives the wavelength above which all are stretched.
        high_freq_factor: Divisor of original_max_seq_len that gives the wavelength below which none is; above
            low_freq_factor.
        original_max_seq_len: Longest sequence in positions that the model was trained on before the rescaling.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
        if self.factor < 1:
            raise ConfigError(f"rope_scaling.factor must be at least 1, got {self.factor}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope_scaling.high_freq_factor ({self.high_freq_factor}) must be greater than "
                f"low_freq_factor ({self.low_freq_factor})"
            )


# The names of transformers.
_PEERS = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
    "tie_word_embeddings": "tied_embeddings",
    "num_parameters": "num_params",
    "from_pretrained": "llama_jax.load(name).config",
}


@checked_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(metaclass=Answering):
    """The shape of a Llama decoder. Every field changes the output, or raises when it is exceeded.

    Attributes:
        vocab_size: Rows of the embedding and of the unembedding (V).
        embed_dim: Width of the residual stream (D).
        num_layers: Number of decoder blocks (L).
        num_heads: Number of query heads (N).
        num_kv_heads: Number of key and value heads (K); each serves N / K query heads. It must divide num_heads.
        head_dim: Width of one head (H), an even number. It need not be embed_dim / num_heads.
        ffn_dim: Width of the SwiGLU feed-forward (F).
        norm_eps: Number added to the mean square in RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Llama 3.1's rescaling of the rotary frequencies, or None (Llama 3).
        max_seq_len: Longest sequence in positions; a longer one raises an error.
        tied_embeddings: Use the embedding as the unembedding.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_seq_len: int
    tied_embeddings: bool

    _peers = _PEERS
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise no_attribute(self, name, _PEERS)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise ConfigError(f"model.{field.name} must be a whole number of at least 1, got {brief(value)}")
            most = _MOST_LAYERS if field.name == "num_layers" else _LARGEST
            if field.type == "int" and value > most:
                raise ConfigError(f"model.{field.name} must be at most {most:,}, got {brief(value)}")
        _check_positive(self, "norm_eps", "rope_theta")
        if not isinstance(self.tied_embeddings, bool):
            raise ConfigError(f"model.tied_embeddings must be True or False, got {brief(self.tied_embeddings)}")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ConfigError(f"model.rope_scaling must be a RopeScaling or None, got {brief(self.rope_scaling)}")
        if self.num_heads % self.num_kv_heads:
            legal = [k for k in range(1, min(self.num_heads, 1024) + 1) if self.num_heads % k == 0]
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}: one of {legal}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim must be even (RoPE rotates pairs), got {self.head_dim}")

    @property
    def matmul_params(self) -> int:
        """Weights that multiply every token: all matrices but the embedding look-up."""
        attention = self.embed_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        ffn = 3 * self.embed_dim * self.ffn_dim
        return self.num_layers * (attention + ffn) + self.vocab_size * self.embed_dim

    @property
    def num_params(self) -> int:
        """All weights; a tied unembedding is counted once."""
        norms = (2 * self.num_layers + 1) * self.embed_dim
        untied = 0 if self.tied_embeddings else self.vocab_size * self.embed_dim
        return self.matmul_params + norms + untied

    def flops_per_token(self, context: int, *, training: bool) -> int:
        """Multiply-adds counted as two, for one token that attends to `context` positions.

        The convention of PaLM (arXiv:2204.02311, appendix B): two per weight, plus 4 N H `context` per layer for the
        scores and the mixing of values, without a discount for the causal mask; training costs three times a forward
        pass, and recomputation is not counted.
        """
        forward = 2 * self.matmul_params + 4 * self.num_layers * self.num_heads * self.head_dim * context
        return forward * (3 if training else 1)

    def cache_bytes_per_token(self, bytes_per_number: int) -> int:
        """Bytes that one position of one sequence takes in the KV cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_number

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The config of a dict that names every field; an unknown or missing one raises ConfigError."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a model's shape must be a dict of its fields, got {brief(values)}")
        values = dict(values)
        if isinstance(values.get("rope_scaling"), dict):
            _check_names(RopeScaling, values["rope_scaling"], "model.rope_scaling")
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        _check_names(cls, values, "model")
        return cls(**values)


def _check_names(cls: type, values: dict[str, Any], where: str) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            shown = name if name.isidentifier() and len(name) <= _LONGEST_NAME else brief(name)
            raise ConfigError(f"unknown key {where}.{shown}{nearest(name, known) or '.'} Allowed: {', '.join(known)}")
    missing = [name for name in known if name not in values]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")


def _check_positive(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:  # NaN fails both; a whole number may be beyond any float
            raise ConfigError(f"{type(record).__name__}.{name} must be a finite number above 0, got {brief(value)}")


_SCALING_31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
_SCALING_32 = dataclasses.replace(_SCALING_31, factor=32.0)

_LLAMA3_8B = ModelConfig(
    vocab_size=128_256,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_dim=14_336,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=None,
    max_seq_len=8192,
    tied_embeddings=False,
)
_LLAMA3_70B = dataclasses.replace(_LLAMA3_8B, embed_dim=8192, num_layers=80, num_heads=64, ffn_dim=28_672)


def _long(config: ModelConfig, scaling: RopeScaling = _SCALING_31, **changes: Any) -> ModelConfig:
    """The 3.1 generation of `config`: 128K positions and rescaled frequencies."""
    return dataclasses.replace(config, rope_scaling=scaling, max_seq_len=131_072, **changes)


# The published sizes (Meta's params.json and the model cards), and three small ones of our own.
SIZES: dict[str, ModelConfig] = {
    "llama3-8b": _LLAMA3_8B,
    "llama3-70b": _LLAMA3_70B,
    "llama3.1-8b": _long(_LLAMA3_8B),
    "llama3.1-70b": _long(_LLAMA3_70B),
    "llama3.1-405b": _long(_LLAMA3_8B, embed_dim=16_384, num_layers=126, num_heads=128, ffn_dim=53_248),
    "llama3.2-1b": _long(
        _LLAMA3_8B,
        _SCALING_32,
        embed_dim=2048,
        num_layers=16,
        head_dim=64,
        ffn_dim=8192,
        tied_embeddings=True,
    ),
    "llama3.2-3b": _long(
        _LLAMA3_8B,
        _SCALING_32,
        embed_dim=3072,
        num_layers=28,
        num_heads=24,
        ffn_dim=8192,
        tied_embeddings=True,
    ),
    "llama3.3-70b": _long(_LLAMA3_70B),
    # For tests: every dimension differs from every other, so that a swapped axis cannot pass.
    "tiny": _long(
        _LLAMA3_8B,
        vocab_size=512,
        embed_dim=48,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=16,
        ffn_dim=96,
    ),
    # What configs/quickstart.py trains on a laptop.
    "quickstart": _long(
        _LLAMA3_8B,
        vocab_size=4096,
        embed_dim=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        ffn_dim=512,
        tied_embeddings=True,
    ),
    # The shape for benchmarks against other libraries.
    "160m": _long(
        _LLAMA3_8B,
        vocab_size=32_000,
        embed_dim=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        ffn_dim=2048,
    ),
}


def size(name: str) -> ModelConfig:
    """The config of a published size by its name, e.g. `llama3.1-8b`; an unknown name raises ConfigError."""
    if name not in SIZES:
        raise ConfigError(f"unknown model size {name!r}{nearest(name, list(SIZES)) or '.'} Allowed: {', '.join(SIZES)}")
    return SIZES[name]
