"""A run that is stopped in any way and resumed does every step once, with bitwise equal results."""

import dataclasses
import fcntl
import json
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import sound
from helpers.processes import Process, kill_and_compare, say_last, slowdown_of
from helpers.runs import metrics_of, text_run
from llama_jax import parallel
from llama_jax.checkpoint import Checkpoints, SaveError
from llama_jax.errors import ConfigError
from llama_jax.params import init_params, is_stacked
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import run as loop
from llama_jax.train import setup
from llama_jax.train.metrics import MetricLog, read_metrics
from llama_jax.train.program import Program


def test_a_run_killed_at_any_instant_goes_on_to_the_bit(tmp_path, compiled):
    last = kill_and_compare(tmp_path, compiled, devices=1, kills=4)
    assert "finished at step 40 of 40" in last.log.read_text() or "is already done" in last.log.read_text()


@pytest.mark.slow
def test_a_sharded_run_killed_at_any_instant_goes_on_to_the_bit(tmp_path, compiled):
    kill_and_compare(
        tmp_path, compiled, devices=4, kills=8, arguments=["--config.mesh.tensor=2", "--config.train.accumulate=2"]
    )


def test_a_finished_run_says_so_goes_on_with_more_steps_and_refuses_other_settings(tmp_path, compiled):
    def go(*arguments):
        program = Process(tmp_path, compiled, "--config.train.steps=4", *arguments)
        return program.wait(), program.log.read_text()

    assert go()[0] == 0
    code, text = go()
    assert code == 0 and "step 4 of 4 is already done; raise train.steps to continue" in text
    code, text = go("--config.train.steps=6")
    assert code == 0 and "from step 4" in text and "finished at step 6 of 6" in text
    code, text = go("--config.data.seed=1", "--config.model.ffn_dim=64")
    assert code == 2 and "Traceback" not in text
    assert "data.seed was 0, is now 1" in text and "model.ffn_dim was 96, is now 64" in text
    code, text = go("--config.train.steps=6", "--config.optimizer.learning_rate=1e-4")
    assert code == 0 and "optimizer.learning_rate was 0.0003, is now 0.0001" in text
    code, text = go("--config.train.steps=8", "--noresume")
    assert code == 2 and "has a checkpoint of step 6" in text
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


ENDLESS = ["--config.train.steps=1000000", "--config.checkpoint.every=1000000", "--config.log.eval_every=0"]


def test_sigterm_and_ctrl_c_leave_in_time_with_the_last_step_saved(tmp_path, compiled):
    done = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        start = time.monotonic()
        program = Process(tmp_path, compiled, *ENDLESS)
        program.until(lambda program=program, done=done: program.lines() >= done + 20)
        slowdown, begin = slowdown_of(program.process.pid, start), time.monotonic()
        program.process.send_signal(number)
        assert program.wait() == 128 + number, say_last(program.log)
        assert time.monotonic() - begin < 10 * slowdown
        steps = [line["step"] for line in metrics_of(program.run) if "loss" in line]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > done
        done = len(steps)
        text = program.log.read_text()
        assert f"stopped at step {done} of 1000000" in text
        assert "The same command continues from there" in text and "--config.train.steps=1000000" in text
        assert Checkpoints(program.run).latest() == done
    assert "resuming" in text


def test_sigterm_during_compilation_leaves_in_time(tmp_path):
    start = time.monotonic()
    program = Process(tmp_path, "off", *ENDLESS)
    program.until(lambda: "model: " in program.log.read_text())
    slowdown, begin = slowdown_of(program.process.pid, start), time.monotonic()
    program.process.terminate()
    assert program.wait() == 143
    assert time.monotonic() - begin < 10 * slowdown
    assert "stopped" in program.log.read_text()


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": s, "loss": 1.0 / s}) + "\n" for s in range(1, 6))
    for end in ('{"step": 6, "lo', '{"step": 6, "loss": 0.1', '{"step": 6, "loss": 0.1}', "{", "\0\0\0"):
        path.write_text(whole + end)
        log = MetricLog(tmp_path, from_step=4)
        log.write(5, {"loss": float("nan")})
        log.close()
        assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]
        assert read_metrics(path)[-1] == {"step": 5, "loss": None}


def test_resuming_on_another_mesh_goes_on_with_the_same_metrics_of(tmp_path):
    """Saved on fsdp x tensor, resumed on data x fsdp: equal to rounding, where one mesh throughout is exact."""
    settings = {"optimizer__schedule": "constant", "mesh__tensor": 4, "data__validation": ()}
    (tmp_path / "a").mkdir()
    whole = text_run(tmp_path / "a", **settings)
    loop.train(whole)
    other = {"output": str(tmp_path / "b"), "data__train": whole.data.train, **settings}
    loop.train(text_run(tmp_path, **(other | {"train__steps": 4})))
    moved = text_run(tmp_path, **(other | {"mesh__tensor": 1, "mesh__data": 2}))
    assert loop.train(moved).finished
    a, b = metrics_of(Path(whole.output)), metrics_of(tmp_path / "b")
    assert [line["step"] for line in b] == [line["step"] for line in a] == list(range(1, 9))
    assert a[:4] == b[:4]
    np.testing.assert_allclose([line["loss"] for line in a], [line["loss"] for line in b], rtol=2e-5)


def test_changed_text_is_not_resumed(tmp_path):
    run = text_run(tmp_path, train__steps=2)
    loop.train(run)
    (tmp_path / "text.txt").write_text("Something else altogether. " * 60)
    with pytest.raises(
        ValueError, match="cannot resume the data: the text, tokenizer, weights or loss of data.train are not"
    ):
        loop.train(dataclasses.replace(run, train=dataclasses.replace(run.train, steps=4)))


def test_a_start_without_a_checkpoint_makes_its_tokenizer_anew(tmp_path):
    """Files that an earlier start with other settings left in the folder are not used."""
    run = text_run(tmp_path, model__vocab_size=540)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.model").write_text("left over")
    tokenizer = setup.tokenizer(run, tmp_path / "run", resuming=False, say=lambda *_: None)
    assert tokenizer.vocab_size == 540
    with pytest.raises(ConfigError, match="set model.vocab_size=540"):
        # Fewer rows than plain text needs; reserved tokens alone would need none.
        narrow = text_run(tmp_path, model__vocab_size=270)
        setup.tokenizer(narrow, tmp_path / "run", resuming=True, say=lambda *_: None)


# Asynchronous saving


@pytest.mark.parametrize("devices", [1, 8])
def test_a_checkpoint_holds_the_values_of_its_own_step_while_steps_go_on(tmp_path, devices):
    """On a CPU the copy to the host may be a view of the very buffer that the next step is given to write to."""
    mesh = parallel.make_mesh({"fsdp": devices}, jax.devices()[:devices])
    layout = parallel.Layout(mesh, "train")
    place = layout.sharding(("embed", None), (1024, 1024))
    step = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    state = {f"w{i}": jax.device_put(jnp.zeros((1024, 1024)), place) for i in range(4)}
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    checkpoints = Checkpoints(tmp_path)
    for number in range(1, 31):
        state = step(state)
        if number in (5, 10, 15):
            checkpoints.save(number, params=state, rest={"n": jnp.full((), number)}, meta={"n": number})
    checkpoints.wait()
    for number in (5, 10, 15):
        rest = {"n": jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated(mesh))}
        params, rest, meta = checkpoints.restore(number, params=abstract, rest=rest)
        assert {float(x) for a in params.values() for x in (a.min(), a.max())} == {float(number)}
        assert rest["n"] == number and meta == {"n": number}
    checkpoints.close()


def test_a_save_that_fails_in_the_background_is_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    params = {f"w{i}": jnp.ones((1024, 1024)) for i in range(8)}
    checkpoints.save(1, params=params, rest={"n": jnp.ones(())}, meta={})
    folder = tmp_path / "checkpoints"
    (folder / "1").write_text("in the way of the commit")
    with pytest.raises(SaveError, match="of step 1 could not be saved"):
        checkpoints.wait()


def test_a_run_whose_folder_goes_away_ends_with_an_error(tmp_path):
    def sampler(run, params, tokenizer, mesh):
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        (tmp_path / "run" / "checkpoints").write_text("in the way")
        return ["text"]

    run = text_run(tmp_path, log__sample_every=3, checkpoint__every=3)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        loop.train(run, sampler=sampler)


def test_a_second_run_in_the_same_folder_is_refused_and_a_later_one_is_not(tmp_path):
    run = text_run(tmp_path, train__steps=2)
    folder = Path(run.output)
    folder.mkdir()
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process trains in .*: wait for it, stop it, or set another"):
            loop.train(run)
    assert loop.train(run).finished


def test_a_step_that_is_already_there_is_not_skipped_in_silence(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    given = {"params": {"w": jnp.ones(4)}, "rest": {"n": jnp.ones(())}, "meta": {}}
    checkpoints.save(2, **given)
    with pytest.raises(SaveError, match="step 1 was not saved: .* has step 2"):
        checkpoints.save(1, **given)
    checkpoints.close()


# init_from


def test_init_from_starts_from_the_weights_of_a_model_or_a_run(tmp_path):
    run = text_run(tmp_path, train__steps=2)
    result = loop.train(run)
    mesh = parallel.make_mesh({"fsdp": 2, "tensor": 4})
    theirs = jax.jit(lambda: init_params(run.model, jax.random.key(5)))()
    folder = tmp_path / "model"
    sound.save_params(folder, run.model, theirs)
    tokenizer = Tokenizer(result.folder / "tokenizer.model")
    tokenizer.save(folder / "tokenizer.model")
    checkpoints = Checkpoints(result.folder)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), theirs)
    trained = checkpoints.restore_params(2, abstract)
    for source, expected in ((folder, theirs), (result.folder, trained)):
        ours = dataclasses.replace(run, init_from=str(source))
        program = Program.make(ours, mesh)
        state = setup.first_state(program)
        for a, b, place in zip(*map(jax.tree.leaves, (state.params, expected, program.state.params)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.sharding.is_equivalent_to(place.sharding, a.ndim) and a.dtype == jnp.float32
        found = setup.tokenizer(ours, tmp_path, resuming=False, say=lambda *_: None)
        assert found.fingerprint == tokenizer.fingerprint
    assert state.step == 0 and is_stacked(state.params)


def test_init_from_refuses_another_model_by_its_keys(tmp_path):
    run = text_run(tmp_path)
    other = dataclasses.replace(run.model, ffn_dim=64, rope_theta=1e4)
    sound.save_params(tmp_path / "model", other, init_params(other, jax.random.key(0)))
    mesh = parallel.make_mesh({}, jax.devices()[:1])
    with pytest.raises(ConfigError, match="model.ffn_dim=64 there, 96 here; model.rope_theta=10000.0 there, 500000"):
        setup.first_state(Program.make(dataclasses.replace(run, init_from=str(tmp_path / "model")), mesh))
