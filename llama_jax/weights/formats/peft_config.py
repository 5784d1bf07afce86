"""Checks peft's adapter_config.json, and resolves its settings for each module.

The keys are those of peft's LoraConfig (github.com/huggingface/peft, src/peft/tuners/lora/config.py). A key that would
change the result and is not supported is an error that names it. Keys about training or about where the adapter was
made are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.errors import ConfigError, brief, nearest
from llama_jax.weights.formats.name_patterns import full_matches

# Keys that would change the result, and the one value (besides null, false and empty ones) that is supported.
_ONLY: dict[str, Any] = {
    "peft_type": "LORA",
    **dict.fromkeys(
        (
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "layer_replication",
            "lora_bias",
            "monteclora_config",
            "target_parameters",
            "use_bdlora",
            "use_qalora",
        )
    ),
}
# Keys about training, about other modules than Llama's, or about the place where the adapter was made. peft sets
# fan_in_fan_out to false for linear layers itself; `bias` names biases of the base, and a Llama has none.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
}
_READ = {
    "alpha_pattern",
    "ensure_weight_tying",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
_FLAGS = ("ensure_weight_tying", "use_dora", "use_rslora")
# Initializations that leave the base as it was.
_PLAIN_STARTS = (None, True, False, "true", "gaussian", "eva", "orthogonal", "mica")
_MAX_NUMBER = 1 << 31  # the limit of ranks, alphas and token ids
_LITERAL = re.compile(r"\^?[A-Za-z0-9_.]+\$?")


class ModuleSettings(NamedTuple):
    """The rank and the scale of LoRA on one module."""

    rank: int
    scale: float


class PeftSettings(NamedTuple):
    """An adapter_config.json, resolved for the modules of one model.

    Attributes:
        lora: rank and scale by module, which apply if the module has LoRA.
        targets: the modules that have LoRA according to the config; None if it does not name them.
        dora: True if the adapter has DoRA's magnitudes.
        ensure_tied: True if peft keeps the embedding and the unembedding of a tied model equal.
        whole: the names in modules_to_save.
        token_ids: the trained token ids, by the name of the module as the config gives it.
    """

    lora: Mapping[str, ModuleSettings]
    targets: set[str] | None
    dora: bool
    ensure_tied: bool
    whole: list[str]
    token_ids: Mapping[str, tuple[int, ...]]


def resolve(raw: dict[str, Any], modules: Sequence[str], embed: str, unembed: str, where: str) -> PeftSettings:
    """The settings of an adapter_config.json for the linear layers and the embedding of a model.

    Args:
        raw: the file's object.
        modules: full names of the modules that can be under LoRA.
        embed: the embedding's name among them.
        unembed: the unembedding's name among them.
        where: the path that errors begin with.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or a setting is not supported.
    """
    _check(raw, where)
    ranks = _numbers(raw, "rank_pattern", "r", modules, where)
    alphas = _numbers(raw, "alpha_pattern", "lora_alpha", modules, where)
    root = 0.5 if raw.get("use_rslora") else 1.0
    whole = _strings(raw.get("modules_to_save") or [], f"{where}: modules_to_save")
    return PeftSettings(
        lora={module: ModuleSettings(int(ranks[module]), alphas[module] / ranks[module] ** root) for module in modules},
        targets=_targets(raw, where, modules, (embed, unembed), whole),
        dora=bool(raw.get("use_dora")),
        ensure_tied=bool(raw.get("ensure_weight_tying")),
        whole=whole,
        token_ids=_token_ids(raw.get("trainable_token_indices"), embed, f"{where}: trainable_token_indices"),
    )


def ends(module: str) -> list[str]:
    """The names by which a config may refer to a module: a.b.c, b.c and c."""
    words = module.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


def _check(raw: dict[str, Any], where: str) -> None:
    known = sorted({*_ONLY, *_IGNORED, *_READ})
    for key, value in sorted(raw.items(), key=lambda item: item[0] != "peft_type"):  # which explains the other keys
        off = value is None or value is False or value in ("", [], {})
        only = _ONLY.get(key)
        if key in _ONLY and not off and value not in (only, [only]):
            raise ConfigError(f"{where}: {key}={brief(value)} is not supported; only {only or 'null'} is")
        if key not in known and not off:
            raise ConfigError(f"{where}: {brief(key)}={brief(value)} is an unknown key{nearest(key[:80], known)}")
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"{where} lacks peft_type; only LORA is supported")
    for key in _FLAGS:
        if not isinstance(raw.get(key), (bool, type(None))):
            raise ConfigError(f"{where}: {key} must be true or false, got {brief(raw[key])}")
    _check_start(raw.get("init_lora_weights"), where)
    _check_rank(raw.get("r"), f"{where}: r")
    _check_alpha(raw.get("lora_alpha"), f"{where}: lora_alpha")


def _check_start(value: Any, where: str) -> None:
    """Raises ConfigError for initializations that change the base, since the adapter then fits only an unsaved base."""
    value = value.lower() if isinstance(value, str) else value
    if any(value is plain or (isinstance(value, str) and value == plain) for plain in _PLAIN_STARTS):
        return
    if value == "loftq":
        remedy = "merge it into its base with peft (merge_and_unload), save that model, and open it instead"
    else:
        remedy = "save it from peft with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
    raise ConfigError(f"{where}: init_lora_weights={brief(value)} moves part of the base into the adapter; {remedy}")


def _check_rank(value: Any, what: str) -> None:
    if type(value) is not int or not 0 < value < _MAX_NUMBER:
        raise ConfigError(f"{what} must be a whole number above 0, got {brief(value)}")


def _check_alpha(value: Any, what: str) -> None:
    if type(value) not in (int, float) or not abs(value) < _MAX_NUMBER:  # false for NaN
        raise ConfigError(f"{what} must be a finite number, got {brief(value)}")


def _strings(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{what} must be a list of names of modules, got {brief(value)}")
    return value


def _token_ids(value: Any, embed: str, what: str) -> dict[str, tuple[int, ...]]:
    """Trained token ids by name of module; a list is for the embedding."""
    lists = value if isinstance(value, dict) else {embed: value} if value else {}
    for name, ids in lists.items():
        wrong = not isinstance(ids, list) or not ids or any(type(i) is not int or not 0 <= i < _MAX_NUMBER for i in ids)
        if wrong or len(set(ids)) < len(ids):
            raise ConfigError(f"{what} must be lists of different token ids, got {brief(ids)} for {brief(name)}")
    return {name: tuple(ids) for name, ids in lists.items()}


def _targets(
    raw: dict[str, Any], where: str, modules: Sequence[str], vocabulary: tuple[str, str], whole: Sequence[str]
) -> set[str] | None:
    """The modules under LoRA by the rules of peft's `check_target_module_exists`; None where the config has none."""
    given, excluded = raw.get("target_modules"), raw.get("exclude_modules") or []
    if given is None:
        return None
    if isinstance(given, str) and given.lower() == "all-linear":
        found = set(modules) - set(vocabulary)
    elif isinstance(given, str):
        found = full_matches([given], modules, f"{where}: target_modules")[given]
    else:
        names = set(_strings(given, f"{where}: target_modules"))
        named = {module for module in modules if not names.isdisjoint(ends(module))}
        found = (named & names) | (named & _in_layers(raw, where, modules))
    if isinstance(excluded, str):
        return found - full_matches([excluded], modules, f"{where}: exclude_modules")[excluded]
    without = set(_strings(excluded, f"{where}: exclude_modules"))
    inside = [f".{name}." for name in whole]
    return {m for m in found if without.isdisjoint(ends(m)) and not any(name in f".{m}." for name in inside)}


def _in_layers(raw: dict[str, Any], where: str, modules: Sequence[str]) -> set[str]:
    """The modules in the layers of layers_to_transform; all modules without that key."""
    layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern") or []
    if layers is None or layers == []:
        return set(modules)
    numbers = layers if isinstance(layers, list) else [layers]
    if not all(type(number) is int for number in numbers):
        raise ConfigError(f"{where}: layers_to_transform must be whole numbers, got {brief(layers)}")
    wanted = set(map(str, numbers))
    split = {module: re.fullmatch(r"(.+?)\.(\d+)\..+", module) for module in modules}
    block_of = {module: parts[1] for module, parts in split.items() if parts and parts[2] in wanted}
    found = set(block_of)
    if not patterns:
        return found
    patterns = [patterns] if isinstance(patterns, str) else _strings(patterns, f"{where}: layers_pattern")
    blocks = {end for module in found for end in ends(block_of[module])}
    matched = set().union(*full_matches(patterns, blocks, f"{where}: layers_pattern").values())
    return {module for module in found if not matched.isdisjoint(ends(block_of[module]))}


def _numbers(
    raw: dict[str, Any], pattern_key: str, default_key: str, modules: Sequence[str], where: str
) -> dict[str, int | float]:
    """Resolves rank_pattern or alpha_pattern: for each module the number of the first matching key, or the default.

    A key matches as in peft's `get_pattern_key`, re.match(rf"(.*\\.)?({key})$", module).
    """
    given = raw.get(pattern_key) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: {pattern_key} must be an object, got {brief(given)}")
    for key, value in given.items():
        (_check_rank if pattern_key == "rank_pattern" else _check_alpha)(value, f"{where}: {pattern_key}[{brief(key)}]")
    order = {key: i for i, key in enumerate(given)}
    first: dict[str, int] = {}
    for key, matched in _matches(given, modules, f"{where}: {pattern_key}").items():
        for module in matched:
            first[module] = min(first.get(module, order[key]), order[key])
    values = list(given.values())
    return {module: values[first[module]] if module in first else raw[default_key] for module in modules}


def _matches(keys: Collection[str], modules: Sequence[str], source: str) -> dict[str, set[str]]:
    """The modules that each key matches. Plain names are looked up; only other keys run as regular expressions."""
    by_end: dict[str, set[str]] = {}
    for module in modules:
        for end in ends(module):
            by_end.setdefault(end, set()).add(module)
        by_end["^" + module] = {module}
    found: dict[str, set[str]] = {}
    expressions = []
    for key in keys:
        name = key.replace("\\.", ".")
        if _LITERAL.fullmatch(name) and (name.removesuffix("$") in by_end or "." not in name):
            found[key] = by_end.get(name.removesuffix("$"), set())
        else:
            expressions.append(key)
    run = full_matches([rf"(.*\.)?({key})" for key in expressions], modules, source)
    return found | {key: run[rf"(.*\.)?({key})"] for key in expressions}
