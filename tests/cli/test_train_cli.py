"""train.py from outside: one line on standard error that says how to fix the mistake, exit status 2, no traceback."""

import json
import os
import subprocess
import sys
import time

import pytest

from helpers.paths import ROOT
from helpers.runs import parse, write_config
from llama_jax import parallel
from llama_jax.cli import exits
from llama_jax.cli import train as train_command
from llama_jax.errors import ConfigError
from llama_jax.run_config import RunConfig, describe
from llama_jax.train import setup
from llama_jax.train.run import train


def test_flags_change_keys(tmp_path):
    config = write_config(tmp_path)
    run, resume = parse(
        f"--config={config}",
        "--config.optimizer.learning-rate=1e-4",
        "--data.shuffle=False",
        "--config.data.train=a.txt,b.txt",
        "--config.log.sample_prompts=('One, two', 'Three')",
        "--config.model.num_layers",
        "7",
        "--config.model.rope_scaling.factor=4",
        "--no-resume",
    )
    assert (run.optimizer.learning_rate, run.data.shuffle, run.model.num_layers) == (1e-4, False, 7)
    assert run.data.train == ("a.txt", "b.txt") and run.log.sample_prompts == ("One, two", "Three")
    assert run.model.rope_scaling.factor == 4 and not resume
    assert parse("--config", config) == (parse(f"--config={config}")[0], True)


def test_of_a_key_that_is_given_twice_the_last_counts(tmp_path):
    config = write_config(tmp_path)
    run, _ = parse(
        f"--config={config}",
        "--config.data.train=a.txt",
        "--config.train.steps=5",
        "--config.data.train=b.txt",
        "--config.train.steps=6",
    )
    assert run.data.train == ("b.txt",) and run.train.steps == 6


def test_keys_have_short_names_and_those_of_other_trainers(tmp_path):
    config = f"--config={write_config(tmp_path)}"
    short = (
        "--learning_rate 1e-4 --weight-decay=0.1 --epochs=2 --output x --rank 4 --batch_size 8 --init_from y".split()
    )
    theirs = "--lr 1e-4 --wd 0.1 --num_train_epochs 2 --output_dir x --lora_r=4 --training.global_batch_size 8".split()
    theirs += ["--model-name-or-path", "y"]
    keys = ("optimizer.learning_rate=1e-4", "optimizer.weight_decay=0.1", "train.epochs=2", "output=x", "lora.rank=4")
    expected = parse(config, *(f"--config.{key}" for key in (*keys, "data.batch_size=8", "init_from=y")))
    assert parse(config, *short) == parse(config, *theirs) == expected


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_printed_without_a_config(flag, capsys):
    with pytest.raises(SystemExit) as left:
        parse(flag)
    assert left.value.code == 0 and "--config.KEY VALUE" in capsys.readouterr().out


def test_keys_are_listed_with_their_values(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        parse(f"--config={write_config(tmp_path)}", "--keys", "--config.train.z_loss=1e-4")
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert "train.z_loss = 0.0001" in out and "model.rope_scaling.factor = 8.0" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.optimizer.lerning_rate=1"], "unknown key 'optimizer.lerning_rate': did you mean 'optimizer.lear"),
        (["--config.optimizer.lrr=1"], "unknown key 'optimizer.lrr': "),
        (["--activation_checkpoint.mode=full"], "did you mean 'train.remat'?"),
        (["--float8.enable=1"], "did you mean 'train.products'?"),
        (["--fault_tolerance.enable=1"], "no known name is near."),
        (["--config.train.batch_size=1"], "did you mean 'data.batch_size'?"),
        (["--config.train=1"], "train is a section: set one of train.objective, train.steps"),
        (["--config.train.steps"], "--config.train.steps=VALUE"),
        (["--config.train.steps="], "train.steps"),
        (["--config.train.steps=many"], "train.steps must be a whole number, got 'many'"),
        (["--config.train.steps=1.5"], "train.steps must be a whole number, got '1.5'"),
        (["--config.data.shuffle=perhaps"], "data.shuffle must be True or False, got 'perhaps'"),
        (["--config.data.weights=3,x"], "data.weights must be a number, got 'x'"),
        (["--config.lora.targets=q"], "lora.targets needs lora.rank, which is 0"),
        (["--config.lora.targets=q_prj"], "did you mean 'q_proj'?"),
        (["--config.optimizer.rates=embed:0.1"], "did you mean 'embed=0.1'?"),
        (["--config.train.steps=-1"], "train.steps must be at least 0, got -1"),
        (["--config.optimizer.learning_rate=nan"], "optimizer.learning_rate must be a finite number"),
        (["--config.optimizer.learning_rate=fast"], "optimizer.learning_rate must be a number, got 'fast'"),
        (["--config.data.shuffle=perhaps"], "data.shuffle"),
        (["--config.optimizer.schedule=triangle"], "optimizer.schedule must be one of"),
        (["--config.model.num_kv_heads=3"], "model.num_kv_heads=3 must divide num_heads=8: one of [1, 2, 4, 8]"),
        (["--config.data.sequence_length=999999"], "is more than model.max_seq_len"),
        (["--every=5"], "unknown key 'every'"),  # two sections have it
        (["--validation.steps=5"], "unknown key 'validation.steps'"),  # not those of training
        (["--per_device_train_batch_size", "8"], "did you mean 'data.batch_size'?"),
        (["--training.compile"], "unknown key 'training.compile': every step is compiled: leave it out"),
        (["--config.warmup_ratio=0.1"], "did you mean 'optimizer.warmup_steps'? It counts steps"),
        (["--config=run.txt"], "'run.txt' must end in .py, .toml, .json, .yaml or .yml"),
        (["--config=debugmodel"], "--config quickstart --config.model=tiny trains a small model"),
        (["-m", "x"], "-m is not a flag of"),
        (["--model", "x/y"], "--init_from MODEL names a model to start from"),
        (["--resum"], "resum"),
        (["more"], "unexpected argument 'more': keys are set with --config.KEY=VALUE"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, monkeypatch, arguments, words):
    (tmp_path / "run.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parse(f"--config={write_config(tmp_path)}", *arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


TOML = """
output = "runs/a"
[model]
name = "tiny"
num_layers = 2
[data]
train = "a.txt"
[optimizer]
lr = 1
weight-decay = 0
warmup_steps = 2
[training]
steps = 5
seq_len = 64
[parallelism]
tensor_parallel_degree = 2
[lora]
target_modules = ["q_proj"]
"""
YAML = """
output: runs/a
model: {name: tiny, num_layers: 2}
data: {train: [a.txt], sequence_length: 64}
optimizer: {learning_rate: 1e0, weight_decay: 0, warmup_steps: 2}
train: {steps: 5}
mesh: {tp: 2}
lora: {targets: [q]}
"""


def test_a_config_may_be_toml_yaml_or_the_json_of_a_run(tmp_path):
    start = ["--init_from", "m", "--lora.r", "4"]
    for name, text in (("a.toml", TOML), ("a.yaml", YAML)):
        (tmp_path / name).write_text(text)
    run, _ = parse(f"--config={tmp_path / 'a.toml'}", *start)
    assert run == parse(f"--config={tmp_path / 'a.yaml'}", *start)[0]
    expected = RunConfig.from_dict(
        {
            "output": "runs/a", "init_from": "m", "model": {"name": "tiny", "num_layers": 2},
            "data": {"train": ["a.txt"], "sequence_length": 64}, "train": {"steps": 5}, "mesh": {"tensor": 2},
            "optimizer": {"learning_rate": 1.0, "weight_decay": 0.0, "warmup_steps": 2},
            "lora": {"rank": 4, "targets": ["q"]},
        }
    )  # fmt: skip
    assert run == expected
    (tmp_path / "config.json").write_text(json.dumps(run.to_dict() | {"files": {"a": "b"}, "sha256": "c"}))
    assert parse(f"--config={tmp_path / 'config.json'}")[0] == run
    assert parse(f"--config={tmp_path / 'config.json'}", "--epochs=2")[0].train.steps == 0


def test_every_wrong_key_of_a_config_file_is_named(tmp_path):
    (tmp_path / "a.toml").write_text("[training]\nlocal_batch_size = 3\nfoo = 1\n")
    (tmp_path / "b.toml").write_text("[training\n")
    (tmp_path / "c.yml").write_text("- 1\n")
    with pytest.raises(
        ConfigError, match=r"local_batch_size': did you mean 'data.batch_size'.*; unknown key 'training.foo'"
    ):
        parse(f"--config={tmp_path / 'a.toml'}")
    with pytest.raises(ConfigError, match="b.toml is not TOML: "):
        parse(f"--config={tmp_path / 'b.toml'}")
    with pytest.raises(ConfigError, match="must hold keys and values by section"):
        parse(f"--config={tmp_path / 'c.yml'}")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "optimizer: {learning_rate: 0.1}\nlr: 0.5\n", "'optimizer.learning_rate' and 'lr' are both"),
        ("a.yaml", "max_steps: 100\nnum_train_epochs: 3\n", "train.steps=100 and train.epochs=3 are both set"),
        ("a.yaml", "num_train_epochs: 3\nmax_steps: 100\n", "train.steps=100 and train.epochs=3 are both set"),
        ("a.toml", "max_steps = 100\n[train]\nepochs = 2\n", "train.steps=100 and train.epochs=2 are both set"),
        ("a.yaml", "lr: 0.5\nlr: 0.1\n", "the name 'lr' appears twice"),
        ("a.json", '{"lr": 0.5, "lr": 0.1}', "the name 'lr' appears twice"),
        ("a.yaml", "num_layers: 3\nmodel: {name: tiny, num_layers: 2}\n", "model.num_layers is set in the section mo"),
        ("a.yaml", "train: &t {x: *t}\n", "more than 20 levels"),
        ("a.yaml", "lr: &t [*t]\n", "more than 20 levels"),
        ("a.yaml", "log: {on: 3}\n", "the name True must be a text: put it in quotes"),
        ("a.yaml", "null: 3\n", "the name None must be a text"),
        ("a.toml", ".".join("a" * 120_000) + " = 1\n", "a.toml is not TOML: it is nested too deeply"),
        ("a.toml", "x = {" + " . ".join(["'a='"] * 9999) + " = 1}\n", "a.toml is not TOML: it is nested too deeply"),
        (
            "a.yaml",
            "a: &a0 [1]\n" + "".join(f"b{i}: &a{i + 1} {[*'x' * 10]}\n".replace("'x'", f"*a{i}") for i in range(9)),
            "values",
        ),
        (
            "a.yaml",
            f"a: &a {dict.fromkeys(range(500), 1)}\n" + "".join(f"b{i}: {{<<: *a}}\n" for i in range(300)),
            "its merged mappings have more than 131,072 values",
        ),
        ("a.yaml", "".join(f"wrong{i}: 1\n" for i in range(30)), "wrong19': no known name is near; and more"),
        ("a.yaml", "files: [a.txt]\nfrozen: true\n", "unknown key 'files'"),
        (
            "a.yaml",
            "model: {hf_assets_path: a}\n",
            "unknown key model.hf_assets_path: the tokenizer is that of init_from",
        ),
        ("a.yaml", "hf_assets_path: a\n", "unknown key 'hf_assets_path': the tokenizer is that of init_from"),
    ],
    ids=lambda value: value[:40].strip(),
)
def test_a_config_file_says_each_key_once_and_within_bounds(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse(f"--config={tmp_path / name}", "--init_from", "m", "--train_file", "a.txt", "--output", "o")
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 3000


def test_targets_may_be_one_text(tmp_path):
    text = "output: o\ntrain_file: a\ninit_from: m\nlora: {r: 4, target_modules: 'q_proj, v_proj'}\n"
    (tmp_path / "a.yaml").write_text(text)
    assert parse(f"--config={tmp_path / 'a.yaml'}")[0].lora.targets == ("q", "v")


def test_names_of_yaml_may_repeat_a_section(tmp_path):
    text = "output: o\ntrain_file: &x a.txt\nvalidation_file: *x\nmodel: tiny\nmesh: &m {tp: 2}\nreport_to: none\n"
    (tmp_path / "a.yaml").write_text(text)
    run, _ = parse(f"--config={tmp_path / 'a.yaml'}")
    assert (run.data.validation, run.mesh.tensor, run.log.to) == (("a.txt",), 2, ())


@pytest.mark.parametrize("value", ["tensorboard,wandb", ["tensorboard", "wandb"], ["tensorboard, wandb"]])
def test_trackers_may_be_one_text(tmp_path, value):
    (tmp_path / "a.json").write_text(
        json.dumps({"output": "o", "train_file": "a", "model": "tiny", "log": {"to": value}})
    )
    assert parse(f"--config={tmp_path / 'a.json'}")[0].log.to == ("tensorboard", "wandb")
    assert parse(f"--config={tmp_path / 'a.json'}", "--report_to", "none")[0].log.to == ()


def test_the_processes_of_torchrun_are_not_runs_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun has started 2 processes. One process uses all devices of its host"):
        train_command.main([f"--config={write_config(tmp_path)}"])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def get_config(:\n", "SyntaxError"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import no_such_module\n", "no_such_module"),
        ("def get_config():\n    return None\n", "get_config() must return an ml_collections.ConfigDict"),
        ("def get_config():\n    return {'output': 'x'}\n", "get_config() must return an ml_collections.ConfigDict"),
    ],
)
def test_a_broken_config_file_is_named_with_what_is_wrong(tmp_path, source, words):
    path = tmp_path / "broken.py"
    path.write_text(source)
    done, _ = program(f"--config={path}")
    line = done.stderr.splitlines()[-1]  # absl may warn of its own before
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert line.startswith("error: ") and words in line and "broken.py" in line


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("config.optimizer.lerning_rate = 1.0", "unknown key 'optimizer.lerning_rate'"),
        ("config.train.steps = '5'", "TypeError"),  # ml_collections guards the type; its words name the field
        ("config.optimizer.learning_rate = float('inf')", "optimizer.learning_rate must be a finite number"),
        ("config.mesh.tensor = 0", "mesh.tensor=0"),
    ],
)
def test_a_wrong_key_in_a_config_file_is_named(tmp_path, extra, words):
    with pytest.raises(ConfigError) as caught:
        parse(f"--config={write_config(tmp_path, extra)}")
    assert words in str(caught.value) and extra.split(" =")[0].split(".")[-1] in str(caught.value)


def test_no_config_says_how_to_give_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="no config: give a recipe or a file, e.g. llama-jax train --config quickst"):
        parse()
    with pytest.raises(ConfigError, match="neither a file nor a recipe; did you mean 'quickstart'"):
        parse("--config=configs/quickstrat.py")
    with pytest.raises(ConfigError, match="--config: expected one argument"):
        parse("--config")
    with pytest.raises(ConfigError, match="--config: '' is neither a file nor a recipe"):
        parse("--config=")


@pytest.mark.parametrize(
    "name", ["quickstart", "quickstart.py", "configs/quickstart.py", str(ROOT / "configs/quickstart.py")]
)
def test_a_recipe_is_found_by_name_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert parse("--config", name)[0].output == "runs/quickstart"


def test_keys_are_described_without_a_config(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--keys")
    out = capsys.readouterr().out
    assert left.value.code == 0
    for key in describe():
        assert f"\n{key.name}" in f"\n{out}"
        assert " ".join(key.meaning.split()) in " ".join(out.split())
    assert "a whole number; at least 1; default 8." in out


def paths_refused(tmp_path, **changes):
    extra = "; ".join(f"config.{key.replace('__', '.')} = {value!r}" for key, value in changes.items())
    run, _ = parse(f"--config={write_config(tmp_path, extra)}")
    with pytest.raises(ConfigError) as caught:
        setup.check_paths(run)
    return str(caught.value)


def test_paths_that_cannot_work_are_refused_by_key(tmp_path):
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    assert "output=" in paths_refused(tmp_path, output=str(blocked))
    assert "output=" in paths_refused(tmp_path, output=str(blocked / "below"))
    assert "data.cache_dir=" in paths_refused(tmp_path, data__cache_dir=str(blocked))
    assert paths_refused(tmp_path, data__train=(str(tmp_path / "no*.txt"),)).startswith("data.train: ")
    assert paths_refused(tmp_path, data__validation=(str(tmp_path / "none"),)).startswith("data.validation: ")
    assert "data.tokenizer=" in paths_refused(tmp_path, data__tokenizer=str(tmp_path / "none.model"))
    assert "init_from=" in paths_refused(tmp_path, init_from=str(tmp_path / "none"))


def test_an_unwritable_output_is_refused(tmp_path, monkeypatch):
    # By patching: permission bits do not bind the superuser, as whom containers often run.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "not writable" in paths_refused(tmp_path)


def test_a_damaged_tokenizer_is_refused_by_its_path(tmp_path):
    bad = tmp_path / "bad.model"
    bad.write_text("this is no vocabulary\n")
    run, _ = parse(f"--config={write_config(tmp_path)}", f"--config.data.tokenizer={bad}")
    with pytest.raises(ValueError, match="bad.model"):
        train(run)


def test_meshes_must_use_the_devices():
    with pytest.raises(ConfigError, match="mesh data=3 has 3 devices, but there are 8: set one axis to -1"):
        parallel.make_mesh({"data": 3})
    with pytest.raises(ConfigError, match=r"the fixed axes must multiply to one of \[1, 2, 4, 8\]"):
        parallel.make_mesh({"data": 3, "fsdp": -1})
    with pytest.raises(ConfigError, match="one of them may be -1"):
        parallel.make_mesh({"data": -1, "fsdp": -1})


def program(*arguments, devices=1):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return done, time.monotonic() - begin


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.optimizer.lerning_rate=1"], "did you mean 'optimizer.learning_rate'?"),
        (["--config.data.train=missing.txt"], "data.train: "),
        (["--config.mesh.stage=8", "--config.mesh.fsdp=1"], "must divide model.num_layers=3: one of [1, 3]"),
    ],
)
def test_the_program_leaves_with_one_line_and_status_2(tmp_path, arguments, words):
    done, seconds = program(f"--config={write_config(tmp_path)}", *arguments, devices=8)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr
    assert seconds < 20  # 2 to 4 alone on two cores; this bound is for a busy machine


def test_errors_of_many_lines_are_told_in_one(capsys):
    def main(argv):
        raise ConfigError("first\nsecond")

    assert exits.run(main, []) == 2 and capsys.readouterr().err == "error: first second\n"
