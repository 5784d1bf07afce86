"""A checkpoint is used only if it is as it was written, and none that is good is lost to one that is not."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.checkpoints import abstract, holds, names, save, tree
from helpers.paths import ROOT
from helpers.processes import Process, say_last
from helpers.runs import text_run
from llama_jax import manifest
from llama_jax.checkpoint import Checkpoints, SaveError
from llama_jax.errors import ConfigError
from llama_jax.train import run as loop
from llama_jax.train.metrics import read_metrics
from llama_jax.weights.open import open_source


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 2, 4)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A run folder with steps 2 and 4, to be damaged."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def files_of(run: Path, step: int) -> list[Path]:
    return sorted(path for path in (run / "checkpoints" / str(step)).rglob("*") if path.is_file())


def passed_over(run: Path, capsys, step: int = 4) -> str:
    """That the damaged step is not used, and the words that say so in one line."""
    assert Checkpoints(run, create=False).latest() == 2
    with pytest.raises(ConfigError, match=f"checkpoints/{step} is damaged"):
        Checkpoints(run, create=False).restore(step, **abstract(step))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"checkpoints/{step} is damaged: " in lines[0] and "trying step 2" in lines[0]
    return lines[0]


# Damage


def test_one_bit_flipped_in_any_of_a_hundred_places_is_found(run, capsys):
    rng = random.Random(0)
    files = files_of(run, 4)
    assert {"_METADATA", "_sharding", "manifest.ocdbt", "metadata", manifest.FILE} <= {path.name for path in files}
    for i in range(100):
        path = files[i % len(files)]
        sound = path.read_bytes()
        place = rng.randrange(len(sound))
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << rng.randrange(8)]) + sound[place + 1 :])
        passed_over(run, capsys)
        path.write_bytes(sound)
    assert holds(run, 4) and holds(run, 2)


def test_every_bit_of_a_manifest_counts(run, capsys):
    """One that changes a size, a name, the step or the loss and leaves JSON behind, too."""
    path = run / "checkpoints" / "4" / manifest.FILE
    text = path.read_text()
    for old, new in (('"step": 4', '"step": 5'), ('"loss": null', '"loss": 1.0'), ("params/d/", "params/e/")):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert manifest.FILE in passed_over(run, capsys)
    for damaged in ("", "{}", "[]", "null", text[:-9], '{"sha256": null}'):
        path.write_text(damaged)
        assert manifest.FILE in passed_over(run, capsys)


def test_files_that_are_cut_short_empty_longer_or_gone_are_found(run, capsys):
    for path in files_of(run, 4):
        sound, name = path.read_bytes(), path.relative_to(run / "checkpoints" / "4").as_posix()
        for damaged in (sound[:-2], b"", sound + b"\0", None):  # the last of a manifest is an end of line
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert name in passed_over(run, capsys)
        path.write_bytes(sound)
    for part in ("params", "rest", "meta", "params/d"):
        (run / "checkpoints" / "4" / part).rename(run / "aside")
        assert "is missing" in passed_over(run, capsys)
        (run / "aside").rename(run / "checkpoints" / "4" / part)
    assert holds(run, 4)


def test_a_file_that_is_none_of_its_own_is_named(run, capsys):
    """Orbax reads all files of some folders. Hidden files, which file systems may leave there, do not count."""
    for name in ("extra", "params/extra", "params/array_metadatas/process_7"):
        path = run / "checkpoints" / "4" / name
        path.write_bytes(b"\xff" * 100)
        assert f"{name} is not in the manifest: delete it" in passed_over(run, capsys)
        path.unlink()
    (run / "checkpoints" / "4" / "rest" / ".nfs0001").write_bytes(b"")
    assert Checkpoints(run).latest() == 4 and holds(run, 4)


def test_a_step_under_the_name_of_another_is_found(run, capsys):
    (run / "checkpoints" / "4").rename(run / "checkpoints" / "6")
    assert "belongs to step 4" in passed_over(run, capsys, step=6)


def test_no_sound_step_is_one_error_with_its_mend(run, capsys):
    for step in (2, 4):
        (run / "checkpoints" / str(step) / "meta" / "metadata").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        Checkpoints(run).latest()
    assert "checkpoints/2 is damaged: meta/metadata has 2 bytes, not" in str(caught.value)
    assert "restore one from a backup, or set another output" in str(caught.value) and "\n" not in str(caught.value)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_only_what_will_be_read_is_hashed(run, capsys):
    path = max(files_of(run, 4), key=lambda path: ("rest/d/" in str(path), path.stat().st_size))
    path.write_bytes(bytes(path.stat().st_size))
    assert Checkpoints(run).latest("params") == 4
    assert Checkpoints(run).latest() == 2


def test_steps_from_before_there_were_manifests_are_used_with_a_warning(run, capsys):
    for step in (2, 4):
        (run / "checkpoints" / str(step) / manifest.FILE).unlink()
    assert Checkpoints(run).latest() == 4 and holds(run, 4)
    assert capsys.readouterr().err.count("no checkpoint in") == 1
    save(run, 6, keep=1)
    assert names(run) == {"2", "4", "6"}  # nothing is deleted that was not proven
    assert Checkpoints(run).latest() == 6


def test_a_damaged_step_is_moved_aside_and_saved_again(run, capsys):
    for aside in ("damaged-4", "damaged-4-2"):
        (run / "checkpoints" / "4" / "meta" / "metadata").write_text("{}")
        checkpoints = Checkpoints(run, keep=2)
        assert checkpoints.latest() == 2
        checkpoints.go_on_from(2)
        assert f"checkpoints/4 to {aside}\n" in capsys.readouterr().err and "4" not in names(run)
        checkpoints.save(4, **tree(4))
        checkpoints.close()
        assert holds(run, 4) and holds(run, 2)
    assert names(run) == {"2", "4", "damaged-4", "damaged-4-2"}


def test_a_run_goes_on_from_the_last_sound_step_to_the_same_numbers(tmp_path, capsys):
    settings = {"checkpoint__every": 2, "train__steps": 6}
    (tmp_path / "a").mkdir()
    whole = text_run(tmp_path / "a", **settings)
    loop.train(whole)
    broken = {"output": str(tmp_path / "b"), "data__train": whole.data.train, **settings}
    loop.train(text_run(tmp_path, **broken))
    folder = tmp_path / "b"
    (folder / "checkpoints" / "6" / "rest" / "manifest.ocdbt").write_bytes(b"")
    capsys.readouterr()
    assert loop.train(text_run(tmp_path, **broken)).step == 6
    out = capsys.readouterr()
    assert "checkpoints/6 is damaged: rest/manifest.ocdbt has 0 bytes" in out.err and "from step 4" in out.out
    assert names(folder) == {"4", "6", "damaged-6"} and Checkpoints(folder).latest() == 6
    a, b = (read_metrics(Path(run) / "metrics.jsonl") for run in (whole.output, folder))
    assert [line["loss"] for line in a] == [line["loss"] for line in b]


# What is kept


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.0, 6: 4.0, 7: None, 8: 5.0}
    save(tmp_path / "a", *losses, losses=losses, keep=2)
    assert names(tmp_path / "a") == {"7", "8"}
    save(tmp_path / "b", *losses, losses=losses, keep=2, keep_best=3)
    assert names(tmp_path / "b") == {"2", "3", "5", "7", "8"}
    save(tmp_path / "b", 9, losses={9: 0.5}, keep=1, keep_best=2)  # the losses are those in the manifests
    assert names(tmp_path / "b") == {"5", "9"} and holds(tmp_path / "b", 5)


def test_the_validation_loss_of_a_run_decides_what_is_best(tmp_path, capsys):
    run = text_run(
        tmp_path,
        data__validation=(str(tmp_path / "text.txt"),),
        checkpoint__every=2,
        checkpoint__keep=1,
        checkpoint__keep_best=2,
        log__eval_every=2,
    )
    loop.train(run)
    folder = tmp_path / "run"
    losses = {
        line["step"]: line["validation_loss"] for line in read_metrics(folder / "metrics.jsonl") if len(line) == 2
    }
    assert set(losses) == {0, 2, 4, 6, 8} and losses.pop(0) > losses[8]  # step 0 has a loss and no checkpoint
    assert names(folder) == {"8", *map(str, sorted(losses, key=losses.get)[:2])}
    content = json.loads((folder / "checkpoints" / "8" / manifest.FILE).read_text())
    assert content["loss"] == losses[8]
    best = min(losses, key=losses.get)
    assert Checkpoints(folder).best() == best
    told = f"lowest validation loss: step {best}; as a model it is {folder / 'checkpoints' / str(best)}\n"
    assert (told in capsys.readouterr().out) == (best != 8)
    kept = {step: open_source(folder / "checkpoints" / step) for step in names(folder)}
    assert kept["8"].identity() == open_source(folder).identity()
    assert len({source.identity() for source in kept.values()}) == len(kept)
    newest, *those = (
        np.asarray(source.load(None, None, None)["embed"]) for source in (open_source(folder), *kept.values())
    )
    assert [np.array_equal(newest, table) for table in those] == [step == "8" for step in kept]


def test_a_damaged_step_does_not_count_as_kept_and_is_not_deleted(run):
    (run / "checkpoints" / "4" / "meta" / "metadata").write_text("{}")
    save(run, 6, keep=2)
    assert names(run) == {"2", "4", "6"} and holds(run, 2)
    save(run, 8, keep=2)
    assert names(run) == {"4", "6", "8"}


# Killed, and full

DIE = """
"Saves step 6 into the run folder argv[1], and kills itself at the point of the commit that argv[2] names."
import os, shutil, signal, sys
sys.path.insert(0, "tests")
import conftest
from helpers.checkpoints import save
from llama_jax import checkpoint, manifest

def die(*given, **named):
    os.kill(os.getpid(), signal.SIGKILL)

owner, name = {
    "before the manifest": (manifest, "write"),
    "before the commit": (checkpoint.os, "rename"),
    "before the pruning": (checkpoint.Checkpoints, "_prune"),
    "in the middle of pruning": (checkpoint.shutil, "rmtree"),
}[sys.argv[2]]
rename = os.rename
if sys.argv[2] == "before the commit":  # Orbax renames as well
    setattr(owner, name, lambda a, b: die() if str(b).endswith("/6") else rename(a, b))
else:
    setattr(owner, name, die)
save(sys.argv[1], 6, keep=1)
"""


@pytest.mark.parametrize(
    "place, left",
    [
        ("before the manifest", {"2", "4", "saving-6"}),
        ("before the commit", {"2", "4", "saving-6"}),
        ("before the pruning", {"2", "4", "6"}),
        ("in the middle of pruning", {"6", "deleting-2", "deleting-4"}),
    ],
)
def test_a_kill_at_any_point_of_a_commit_loses_nothing(run, place, left):
    killed = subprocess.run([sys.executable, "-c", DIE, run, place], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL and names(run) == left
    checkpoints = Checkpoints(run, keep=1)
    newest = 6 if "6" in left else 4
    assert checkpoints.latest() == newest and holds(run, newest)
    checkpoints.go_on_from(newest)
    checkpoints.save(newest + 2, **tree(newest + 2))
    checkpoints.close()
    assert names(run) == {str(newest + 2)} and holds(run, newest + 2)


FULL = """
"Saves step 6 under each limit of a file's size in argv[2:]: each save fails and leaves 2 and 4; the last one succeeds."
import resource, sys
sys.path.insert(0, "tests")
import conftest
from pathlib import Path
from helpers.checkpoints import holds, names, tree
from llama_jax.checkpoint import Checkpoints, SaveError

_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
run, limits, found = Path(sys.argv[1]), sys.argv[2:], []
for limit in limits:
    checkpoints = Checkpoints(run, keep=1)
    checkpoints.go_on_from(checkpoints.latest())
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), most))
    try:
        checkpoints.save(6, **tree(6))
        checkpoints.wait()
    except SaveError as error:
        found.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert {"2", "4"} <= names(run) and "6" not in names(run) and Checkpoints(run).latest() == 4 and holds(run, 4)
checkpoints = Checkpoints(run, keep=1)
checkpoints.go_on_from(4)
checkpoints.save(6, **tree(6))
checkpoints.close()
assert names(run) == {"6"} and holds(run, 6)
print(*found, sep=chr(10))
"""


def test_no_file_that_cannot_be_written_costs_a_checkpoint(run):
    """Ten sizes that no file can grow beyond stand for ten places where a disk is full: another file fails at each."""
    limits = [0, 64, 80, 100, 150, 300, 500, 1000, 5000, 10_000]
    assert max(path.stat().st_size for path in files_of(run, 4)) > 11_000
    done = subprocess.run(
        [sys.executable, "-c", FULL, run, *map(str, limits)], cwd=ROOT, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    errors = done.stdout.splitlines()
    assert len(errors) == len(limits) == 10
    for line in errors:
        assert line.startswith("the checkpoint of step 6 could not be saved, that of step 4 is intact (")
        assert "File too large" in line and line.endswith("make room, or repair the folder, and start again")


def test_a_failed_save_is_an_error_at_the_next_step(tmp_path, monkeypatch):
    write = manifest.write

    def full(folder, *, step, loss):
        if step == 4:
            raise OSError(28, "No space left on device")
        write(folder, step=step, loss=loss)

    monkeypatch.setattr(manifest, "write", full)
    run = text_run(tmp_path, train__steps=100_000, checkpoint__every=2, checkpoint__keep=1)
    check = Checkpoints.check
    # The step goes on while a save is under way: let that be over before the next one, to know which step it is.
    monkeypatch.setattr(Checkpoints, "check", lambda self: (self._saving and self._saving.exception(), check(self)))
    with pytest.raises(SaveError, match="of step 4 could not be saved, that of step 2 is intact .*No space left"):
        loop.train(run)
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4] and names(tmp_path / "run") == {"2", "saving-4"}


def test_a_program_whose_disk_is_full_says_so_in_a_line_and_goes_on_later(tmp_path, compiled):
    settings = "config.model.num_layers = 1; config.checkpoint.every = 2; config.checkpoint.keep = 1"
    go = lambda steps: Process(tmp_path, compiled, f"--config.train.steps={steps}", settings=settings)  # noqa: E731
    first = go(4)
    assert first.wait() == 0, say_last(first.log)
    folder = first.run / "checkpoints"
    limit = max(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 2
    second = go(20)
    resource.prlimit(second.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert second.wait() == 2
    text = second.log.read_text()
    assert "Traceback" not in text and text.splitlines()[-1].startswith("error: the checkpoint of step 6 could not be")
    assert "4" in names(first.run) and "6" not in names(first.run)
    third = go(8)
    assert third.wait() == 0, say_last(third.log)
    assert "from step 4" in third.log.read_text() and names(first.run) == {"8"}
