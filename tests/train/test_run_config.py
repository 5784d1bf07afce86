"""Values that a run's config refuses, and the messages."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from helpers.runs import run_dict
from llama_jax import peer_keys
from llama_jax.config import SIZES
from llama_jax.errors import ConfigError
from llama_jax.run_config import RunConfig, describe, differences, known_keys
from llama_jax.run_keys import TrainConfig

# Every key there is. A new one belongs here, in its section's docstring, and in a test that it does something.
KEYS = """
output seed init_from
data.train data.weights data.validation data.tokenizer data.chat_format data.chat_date data.parse_special
data.loss_on data.sequence_length data.too_long data.max_bad data.batch_size data.shuffle
data.seed data.cache_dir
optimizer.name optimizer.moments optimizer.offload optimizer.rates optimizer.ema_decay
optimizer.learning_rate optimizer.schedule optimizer.warmup_steps optimizer.decay_fraction optimizer.final_fraction
optimizer.b1 optimizer.b2 optimizer.eps optimizer.weight_decay optimizer.clip_norm
train.objective train.steps train.epochs train.patience train.accumulate train.compute_dtype train.products
train.microbatches train.remat train.vocab_chunk train.z_loss train.max_skipped
lora.rank lora.alpha lora.dropout lora.targets lora.trained_tokens lora.rslora lora.base lora.offload
dpo.beta dpo.loss dpo.label_smoothing
mesh.data mesh.fsdp mesh.stage mesh.context mesh.tensor
log.every log.eval_every log.eval_batches log.sample_every log.sample_prompts log.sample_as log.sample_tokens
log.to log.profile
checkpoint.every checkpoint.keep checkpoint.keep_best checkpoint.grace_seconds
distributed.coordinator distributed.num_processes distributed.process_id distributed.download
distributed.timeout_seconds
model.name model.vocab_size model.embed_dim model.num_layers model.num_heads model.num_kv_heads model.head_dim
model.ffn_dim model.norm_eps model.rope_theta model.rope_scaling.factor model.rope_scaling.low_freq_factor
model.rope_scaling.high_freq_factor model.rope_scaling.original_max_seq_len model.max_seq_len model.tied_embeddings
""".split()


def refusal(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(run_dict(**changes))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_keys_are_these_and_fewer_than_a_hundred():
    assert known_keys() == KEYS
    assert len(KEYS) < 100


def test_every_key_is_described_for_a_reader():
    keys = describe()
    assert [key.name for key in keys] == known_keys()
    for key in keys:
        assert key.meaning[:1].isupper() and key.meaning.endswith("."), key
        assert key.meaning.split()[0] not in ("Of", "What", "Which", "Where", "How", "Whether"), key
    schedule, rate, targets = (
        next(key for key in keys if key.name == name)
        for name in ("optimizer.schedule", "optimizer.learning_rate", "lora.targets")
    )
    assert schedule.allowed == "one of 'cosine', 'linear', 'wsd', 'constant'" and schedule.default == "cosine"
    assert (rate.type, rate.default, rate.allowed) == ("a number", 3e-4, "from 0.0 to 10.0")
    assert targets.type == "a tuple of non-empty strings" and targets.allowed.startswith("each item one of 'q', ")


def test_every_key_is_read_by_the_program(request):
    """By reading the sources: a key that no file below the config mentions would be ignored in silence."""
    package = request.config.rootpath / "llama_jax"
    skip = ("run_config.py", "run_keys.py", "config.py")
    sources = [path.read_text() for path in package.rglob("*.py") if path.name not in skip]
    sources.append((request.config.rootpath / "train.py").read_text())
    text = "\n".join(sources)
    keys = [key for key in KEYS if not key.startswith("mesh.")] + ["mesh"]  # the mesh is read whole
    assert [key for key in keys if f".{key.rpartition('.')[2]}" not in text] == []


def test_the_defaults_make_a_run_that_survives_json():
    run = RunConfig.from_dict(run_dict())
    again = RunConfig.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again == run
    assert differences(run.to_dict(), json.loads(json.dumps(run.to_dict()))) == {}


def test_model_may_be_the_name_of_a_size():
    assert RunConfig.from_dict(run_dict(model="llama3.2-1b")).model == SIZES["llama3.2-1b"]


def test_differences_name_dotted_keys_with_both_values():
    a, b = run_dict(), run_dict(optimizer__learning_rate=1e-4, model__num_layers=5)
    assert differences(a, b) == {"model.num_layers": (None, 5), "optimizer.learning_rate": (3e-4, 1e-4)}


@pytest.mark.parametrize(
    ("key", "mend"),
    [
        ("ouput", "did you mean 'output'?"),
        ("optimiser", "did you mean 'optimizer'?"),
        ("learning_rate", "did you mean 'optimizer.learning_rate'?"),
        ("batch_size", "did you mean 'data.batch_size'?"),
        ("optimizer__lr", "did you mean 'optimizer.learning_rate'?"),
        ("optimizer__lerning_rate", "did you mean 'optimizer.learning_rate'?"),
        ("optimizer__steps", "did you mean 'train.steps'?"),
        ("train__batch_size", "did you mean 'data.batch_size'?"),
        ("train__dtype", "did you mean 'train.compute_dtype'?"),
        ("train__grad_accum", "did you mean 'train.accumulate'?"),
        ("data__seq_len", "did you mean 'data.sequence_length'?"),
        ("mesh__model", "Allowed here: mesh.data, mesh.fsdp"),
        ("log__evry", "did you mean 'log.every'?"),
        ("checkpoint__keeps", "did you mean 'checkpoint.keep'?"),
        ("distributed__process", "did you mean 'distributed.process_id'?"),
        ("per_device_train_batch_size", "did you mean 'data.batch_size'?"),  # transformers
        ("tensor_parallel_degree", "did you mean 'mesh.tensor'?"),  # torchtitan
        ("log__tensorboard_dir", "Allowed here: log.every"),
        ("zzz", "no known name is near. Allowed here: checkpoint, data, distributed"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(key, mend):
    message = refusal(**{key: 1})
    assert message.startswith(f"unknown key {key.replace('__', '.')!r}: ")
    assert mend in message


def test_an_unknown_key_is_named_before_anything_else_is_missing():
    """A dict of another trainer's keys names no model."""
    for values, near in (({"learning_rate": 1.0}, "optimizer.learning_rate"), ({"data": {"seq_len": 8}}, "data.seq")):
        with pytest.raises(ConfigError, match=f"unknown key .* did you mean '{near}"):
            RunConfig.from_dict(values)


@pytest.mark.parametrize("key", ["num_layer", "vocab", "rope_scaling__factr"])
def test_an_unknown_key_of_the_model_is_named_with_the_nearest(key):
    message = refusal(**{f"model__{key}": 1})
    assert f"unknown key model.{key.replace('__', '.')}" in message and "did you mean" in message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer__learning_rate", math.nan, "must be a finite number, got nan"),
        ("optimizer__learning_rate", math.inf, "must be a finite number, got inf"),
        ("optimizer__learning_rate", -1e-3, "must be from 0.0 to 10.0, got -0.001"),
        ("optimizer__learning_rate", 1e6, "must be from 0.0 to 10.0"),
        ("optimizer__learning_rate", "3e-4", "must be a number, got '3e-4'"),
        ("optimizer__learning_rate", True, "must be a number, got True"),
        ("optimizer__learning_rate", None, "must be a number, got None"),
        ("optimizer__warmup_steps", -1, "must be at least 0"),
        ("optimizer__warmup_steps", 10.5, "must be a whole number, got 10.5"),
        ("optimizer__warmup_steps", 2000, "is more than train.steps=1000"),
        ("train__steps", 60, "set optimizer.warmup_steps=6, or train for longer"),
        ("optimizer__b1", 1.0, "must be from 0.0 to 0.999999"),
        ("optimizer__b2", -0.1, "must be from 0.0 to 0.999999"),
        ("optimizer__eps", 0.0, "must be from 1e-30 to 1.0"),
        ("optimizer__weight_decay", math.inf, "must be a finite number"),
        ("optimizer__clip_norm", -1.0, "must be at least 0.0"),
        ("optimizer__decay_fraction", 1.5, "must be from 0.0 to 1.0"),
        ("optimizer__final_fraction", -0.5, "must be from 0.0 to 1.0"),
        ("optimizer__schedule", "cosin", "got 'cosin'; did you mean 'cosine'?"),
        ("train__steps", 0, "train.steps and train.epochs are both 0: set one of them"),
        ("train__steps", -1, "must be at least 0, got -1"),
        ("train__epochs", 2, "train.steps=1000 and train.epochs=2 are both set: set train.steps=0"),
        ("train__patience", 3, "train.patience=3 needs a validation loss: set data.validation"),
        ("train__steps", "100", "must be a whole number, got '100'"),
        ("train__accumulate", 0, "must be at least 1"),
        ("train__accumulate", 3, "must divide data.batch_size=8: one of [1, 2, 4, 8]"),
        ("train__compute_dtype", "fp16", "must be one of 'auto', 'float32', 'bfloat16'"),
        ("train__remat", "all", "must be one of 'none', 'dots', 'attention', 'offload', 'full'"),
        ("train__remat", True, "must be a string, got True"),
        ("train__vocab_chunk", -1, "must be at least 0"),
        ("train__z_loss", math.nan, "must be a finite number"),
        ("train__max_skipped", 0, "must be at least 1"),
        ("data__batch_size", 0, "must be at least 1"),
        ("data__batch_size", 8.0, "must be a whole number, got 8.0"),
        ("data__sequence_length", 1, "must be at least 2"),
        ("data__sequence_length", 131_073, "is more than model.max_seq_len=131072"),
        ("data__train", (), "is empty: name text files"),
        ("data__train", 7, "must be a tuple of non-empty strings, got 7"),
        ("data__train", ("a.txt", ""), "must be a tuple of non-empty strings"),
        ("data__weights", (1.0, 2.0), "must be one number above 0 for each of data.train, which are 1"),
        ("data__weights", (0.0,), "must be one number above 0"),
        ("data__weights", (math.nan,), "must be a finite number, got nan"),
        ("data__weights", ("2",), "must be a number, got '2'"),
        ("data__loss_on", "assistent", "must be one of 'assistant', 'all', got 'assistent'; did you mean 'assistant'?"),
        ("data__seed", -1, "must be from 0 to 2147483647"),
        ("data__shuffle", 1, "must be True or False, got 1"),
        ("seed", 2**31, "must be from 0 to 2147483647"),
        ("output", "", "is empty: name the run folder"),
        ("output", 3, "must be a string, got 3"),
        ("mesh__data", 0, "every axis must be at least 1"),
        ("mesh__tensor", -2, "must be at least -1"),
        ("mesh__tensor", -1, "one of them may be -1"),
        ("log__every", 0, "must be at least 1"),
        ("log__eval_batches", 0, "must be at least 1"),
        ("log__sample_tokens", 0, "must be at least 1"),
        ("checkpoint__every", 0, "must be at least 1"),
        ("checkpoint__keep", 0, "must be at least 1"),
        ("checkpoint__keep_best", -1, "must be at least 0"),
        ("checkpoint__keep_best", 1, "needs a validation loss at every checkpoint: set data.validation"),
        ("distributed__num_processes", 2, "needs distributed.coordinator=HOST:PORT"),
        ("distributed__process_id", 1, "must be below num_processes=1"),
        ("distributed__coordinator", "10.0.0.1", "must be HOST:PORT of process 0"),
        ("distributed__coordinator", "host:99999", "must be HOST:PORT of process 0"),
        ("optimizer", 3, "is a section, and cannot be set to 3"),
        ("model__num_layers", 0, "must be a whole number of at least 1, got 0"),
        ("model__num_heads", 7, "must divide num_heads=7: one of [1, 7]"),
        ("model__head_dim", 15, "must be even"),
        ("model__norm_eps", 0.0, "must be a finite number above 0"),
        ("model__rope_theta", math.nan, "must be a finite number above 0"),
        ("model__rope_scaling", 8.0, "must be a RopeScaling or None"),
        ("model__rope_scaling__factor", 0.5, "must be at least 1"),
        ("model__tied_embeddings", "no", "must be True or False"),
        ("model", "llama3.1-8B-instruct", "is no known size; did you mean 'llama3.1-8b'?"),
        ("model", None, "must be the name of a size or its fields"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(key, value, words):
    message = refusal(**{key: value})
    last = key.rpartition("__")[2]
    assert words in message
    # A number of heads is refused by the key that no longer divides it.
    assert last in message or (key == "model__num_heads" and "num_kv_heads" in message)


def test_a_missing_field_of_the_model_is_named():
    values = run_dict(model=SIZES["tiny"].to_dict())
    del values["model"]["ffn_dim"]
    with pytest.raises(ConfigError, match="model lacks ffn_dim"):
        RunConfig.from_dict(values)


def sizes(**given):
    return {"data": 1, "fsdp": 1, "stage": 1, "context": 1, "tensor": 1} | given


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"tensor": 16}, "mesh.tensor=16 must divide model.num_heads=8, ffn_dim=96 and vocab_size=512"),
        ({"tensor": 3}, "a divisor or a multiple of num_kv_heads=4: one of [1, 2, 4, 8]"),
        ({"stage": 2}, "mesh.stage=2 must divide model.num_layers=3: one of [1, 3]"),
        ({"stage": 3}, "train.microbatches=3 must divide the 8 rows that each part of the mesh has"),
        ({"fsdp": 5}, "mesh.fsdp=5 must divide model.embed_dim=48"),
        ({"context": 5}, "mesh.context=5 must divide data.sequence_length=32"),
        ({"data": 16}, "set data.batch_size to a multiple of 16, or move devices to mesh.tensor"),
        ({"data": 2, "fsdp": 8}, "splits a batch into 16 parts, but data.batch_size / train.accumulate is 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_what_would(mesh, words):
    run = RunConfig.from_dict(run_dict())
    with pytest.raises(ConfigError) as caught:
        run.check_mesh(sizes(**mesh))
    assert words in str(caught.value)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_tensor_sizes_that_a_refusal_names_are_accepted(tensor):
    RunConfig.from_dict(run_dict()).check_mesh(sizes(tensor=tensor))


def test_accumulated_parts_must_fill_the_mesh():
    run = RunConfig.from_dict(run_dict(train__accumulate=4))
    with pytest.raises(ConfigError, match="set data.batch_size to a multiple of 16"):
        run.check_mesh(sizes(data=4))


def test_a_run_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig.from_dict(run_dict()).train.steps = 3


def test_a_run_that_is_no_dict_and_sections_that_are_no_records_are_refused():
    with pytest.raises(ConfigError, match="a run must be a dict of its keys, got 5"):
        RunConfig.from_dict(5)
    with pytest.raises(ConfigError, match="model must be a ModelConfig, got 'tiny': RunConfig.from_dict takes"):
        RunConfig(output="x", model="tiny")
    with pytest.raises(ConfigError, match="data must be DataConfig, got {'train': 'a'}"):
        RunConfig(output="x", model=SIZES["tiny"], data={"train": "a"})
    with pytest.raises(TypeError, match=r"RunConfig\(\) has no argument 'outptu'; did you mean 'output'"):
        RunConfig(outptu="x", model=SIZES["tiny"])
    with pytest.raises(TypeError, match=r"TrainConfig\(\) has no argument 'stepps'; did you mean 'steps'"):
        TrainConfig(stepps=3)


def test_paths_are_strings_of_a_run():
    values = run_dict(output=Path("runs/x"), data__train=[Path("a.txt")])
    assert RunConfig.from_dict(values) == RunConfig.from_dict(run_dict())


def test_the_key_of_earlier_versions_for_tensorboard_is_read():
    values = run_dict()
    del values["log"]["to"]
    for old, new in ((True, ("tensorboard",)), (False, ())):
        assert RunConfig.from_dict(values | {"log": values["log"] | {"tensorboard": old}}).log.to == new


def test_names_of_other_trainers_are_those_of_existing_keys():
    for table in (peer_keys._SAME, peer_keys._SIMILAR):
        assert set(table) <= set(known_keys())
        names = [name for names in table.values() for name in names.split()]
        assert len(names) == len(set(names))
    assert not set(peer_keys.SAME) & set(peer_keys.SIMILAR)
