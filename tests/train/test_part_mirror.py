"""Runs of several processes whose output is in a store. They share the store and no disk."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from helpers.processes import Processes
from helpers.runs import metrics_of, text_run
from llama_jax import load, manifest, stored_run
from llama_jax.errors import ConfigError
from llama_jax.parallel import processes
from llama_jax.run_keys import CheckpointConfig
from llama_jax.storage import Store, work_folder
from llama_jax.train import mirror
from llama_jax.train.mirror import _chunks
from llama_jax.train.run import train

ROUNDING = 2e-5
SETTINGS = [
    "--config.train.steps=4",
    "--config.optimizer.schedule=constant",
    "--config.checkpoint.every=2",
    "--config.log.eval_every=0",
]


def disks(tmp_path, name):
    """The caches of two processes that have a disk of their own each."""
    return [tmp_path / f"{name}{index}" for index in range(2)]


def local_files(disk, url, index):
    """The files of the newest step on the disk of a process, by name, and the bytes in them."""
    folder = disk / "runs" / work_folder(url, index).name / stored_run.CHECKPOINTS
    step = max(folder.iterdir(), key=lambda path: int(path.name))
    return {name: size for name, (size, _) in manifest.read_exact(step, step=int(step.name)).files.items()}


@pytest.fixture
def url(tmp_path):
    """A store that several processes of this machine share: fsspec's view of a folder."""
    return f"local://{tmp_path}/bucket/run"


@pytest.mark.slow
def test_each_process_writes_its_part_to_the_store_and_one_process_continues(tmp_path, url, monkeypatch):
    Processes(tmp_path, disks(tmp_path, "a"), 2, f"--config.output={url}", *SETTINGS).wait()
    there = Store(url).files()
    assert stored_run.steps(there) == {2, 4} and not any(name.startswith("parts/") for name in there)
    whole = stored_run.read_manifest(url, 4).files
    assert whole.keys() == {n.removeprefix("checkpoints/4/") for n in there if "/4/" in n} - {manifest.FILE}
    own = [local_files(disk, url, index) for index, disk in enumerate(disks(tmp_path, "a"))]
    shards = [{name for name in files if name.startswith("params/") and name[-1].isdecimal()} for files in own]
    assert shards[0] and shards[1] and not shards[0] & shards[1]
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "one"))
    run = text_run(
        tmp_path,
        output=url,
        data__train=(str(tmp_path / "text.txt"),),
        data__validation=(str(tmp_path / "text.txt"),),
        optimizer__schedule="constant",
        optimizer__learning_rate=3e-4,
        train__remat="full",
        train__vocab_chunk=8192,
        log__eval_every=0,
        train__steps=6,
    )
    result = train(run)
    assert list(result.losses) == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(load(url, dtype="float32").logits([[1, 2]])).all()


@pytest.mark.slow
def test_other_hosts_continue_a_run_in_a_store_and_read_only_their_part(tmp_path, url):
    (tmp_path / "whole").mkdir()
    Processes(tmp_path / "whole", tmp_path / "w", 2, *SETTINGS, "--config.train.steps=8").wait()
    data = [f"--config.data.train={tmp_path}/whole/text.txt", f"--config.data.validation={tmp_path}/whole/text.txt"]
    arguments = [f"--config.output={url}", *SETTINGS, *data]
    Processes(tmp_path, disks(tmp_path, "a"), 2, *arguments).wait()
    second = disks(tmp_path, "b")
    Processes(tmp_path, second, 2, *arguments, "--config.train.steps=8").wait()
    folder = second[0] / "runs" / work_folder(url, 0).name
    losses = [[line["loss"] for line in metrics_of(run)] for run in (tmp_path / "whole" / "run", folder)]
    assert len(losses[0]) == 8 and losses[1] == losses[0]
    # Hosts that continue with another mesh, and stop at once since no step is left.
    third = disks(tmp_path, "c")
    mesh = ["--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.train.steps=8"]
    Processes(tmp_path, third, 2, *arguments, *mesh).wait()
    whole = sum(size for size, _ in stored_run.read_manifest(url, 8).files.values())
    for index, disk in enumerate(third):
        assert sum(local_files(disk, url, index).values()) < 0.75 * whole


def write_step(folder, step, files):
    """A committed step of a run folder, with these files."""
    for name, text in files.items():
        path = folder / stored_run.CHECKPOINTS / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    manifest.write(folder / stored_run.CHECKPOINTS / str(step), step=step, loss=None)


FILES = {"params/w/.zarray": '{"chunks": [2]}', "params/w/0": "ab", "params/w/1": "cd", "meta/metadata": "{}"}


def test_a_step_is_in_the_store_once_every_process_has_copied_its_part(tmp_path, url, monkeypatch):
    """Two processes stand one after the other in this one."""
    barriers = []
    monkeypatch.setattr(processes, "barrier", barriers.append)
    monkeypatch.setattr(mirror.jax, "process_count", lambda: 2)
    folders = [tmp_path / "0", tmp_path / "1"]
    mirrors = []
    for index, folder in enumerate(folders):
        folder.mkdir()
        monkeypatch.setattr(mirror.jax, "process_index", lambda index=index: index)
        mirrors.append(mirror.PartMirror(url, folder, CheckpointConfig(keep=1)))
        mirrors[index].fetch()
    write_step(folders[0], 2, {name: text for name, text in FILES.items() if name != "params/w/1"})
    write_step(folders[1], 2, {"params/w/1": "cd", "meta/metadata": "another process's"})
    monkeypatch.setattr(mirror.jax, "process_index", lambda: 0)
    with pytest.raises(ConfigError, match="step 2 is not complete in .*, since 1 of 2 processes have not copied"):
        mirrors[0]._push()
    assert not stored_run.steps(Store(url).files())
    monkeypatch.setattr(mirror.jax, "process_index", lambda: 1)
    mirrors[1]._push()
    monkeypatch.setattr(mirror.jax, "process_index", lambda: 0)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "read", lambda folder: (_ for _ in ()).throw(manifest.DamagedError("a bit flipped")))
        with pytest.raises(ConfigError, match="step 2 cannot be copied to .* .a bit flipped"):
            mirrors[0]._push()
    mirrors[0]._push()
    there = Store(url).files()
    assert {name.removeprefix("checkpoints/2/") for name in there if "/2/" in name} == {*FILES, manifest.FILE}
    assert Store(url).read("checkpoints/2/meta/metadata") == b"{}" and not any("parts" in name for name in there)
    assert len(barriers) == 2 + 2 * 4  # both barriers of each copy, two of which failed
    # Another machine, on which this process needs the second half of the array.
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    other = mirror.PartMirror(url, fresh, CheckpointConfig(keep=1))
    other.fetch()
    assert {path.name for path in fresh.rglob("*") if path.is_file()} >= {".zarray", "metadata", manifest.FILE}
    assert not (fresh / "checkpoints/2/params/w/1").exists()
    monkeypatch.setattr(mirror, "_chunks", lambda chunk, leaf: {"1"})
    other.fetch_arrays(2, {"params": {"w": jax.ShapeDtypeStruct((4,), np.float32)}})
    names = manifest.read_exact(fresh / "checkpoints" / "2", step=2).files
    assert names.keys() == FILES.keys() - {"params/w/0"}


def test_every_process_has_all_chat_templates_and_a_folder_that_no_single_process_uses(tmp_path, url, monkeypatch):
    monkeypatch.setattr(processes, "barrier", lambda name: None)
    monkeypatch.setattr(mirror.jax, "process_index", lambda: 1)
    template = "additional_chat_templates/tool_use.jinja"
    Store(url).write("run_id", b"a")
    for name in (template, "chat_template.jinja", "adapter/adapter_model.safetensors"):
        Store(url).write(name, b"text")
    for name, text in FILES.items():
        Store(url).write(f"checkpoints/2/{name}", text.encode())
    write_step(tmp_path / "whole", 2, FILES)
    Store(url).put(tmp_path / "whole/checkpoints/2" / manifest.FILE, f"checkpoints/2/{manifest.FILE}")
    folder = tmp_path / "1"
    (folder / "additional_chat_templates").mkdir(parents=True)
    mirror.PartMirror(url, folder, CheckpointConfig()).fetch()
    assert (folder / template).read_text() == "text" and not (folder / "adapter").exists()
    assert len({work_folder(url), work_folder(url, 0), work_folder(url, 1)}) == 3


def test_a_disk_that_fails_during_a_fetch_is_named(tmp_path, url, monkeypatch):
    write_step(tmp_path / "whole", 2, FILES)
    Store(url).put(tmp_path / "whole/checkpoints/2" / manifest.FILE, f"checkpoints/2/{manifest.FILE}")

    def fail(folder, sizes):
        raise OSError(5, "Input/output error", "params/w/0")

    monkeypatch.setattr(manifest, "_digests", fail)
    with pytest.raises(ConfigError, match="checkpoints/2: params/w/0 cannot be read: Input/output error"):
        stored_run.fetch_step(url, 2, Store(url).files(), tmp_path / "whole")


def test_the_manifest_of_an_adapter_is_copied_last_and_not_if_it_was_replaced_meanwhile(tmp_path, url, monkeypatch):
    folder, order, plain = tmp_path / "run", [], Store.write
    (folder / "adapter").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "tokenizer.json", manifest.FILE):
        (folder / "adapter" / name).write_text("of step 2")

    def write(self, name, data):
        order.append(name)
        plain(self, name, data)
        if len(order) == 1:
            (folder / "adapter" / manifest.FILE).write_text("of step 4")

    monkeypatch.setattr(Store, "write", write)
    copy = mirror.Mirror(url, folder, CheckpointConfig())
    copy._push_small_files()
    assert order == ["adapter/adapter_model.safetensors", "adapter/tokenizer.json"]
    copy._push_small_files()
    assert order[2:] == [f"adapter/{manifest.FILE}"]


def test_the_chunks_of_a_process_are_those_that_its_devices_need():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharded = NamedSharding(mesh, PartitionSpec("a", "b"))
    leaf = jax.ShapeDtypeStruct((8, 6), np.float32, sharding=sharded)
    assert _chunks([2, 3], leaf) == {f"{row}.{column}" for row in range(4) for column in range(2)}
    assert _chunks([3, 6], leaf) == {"0.0", "1.0", "2.0"}  # chunks of another mesh
    scalar = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    assert _chunks([], scalar) == {"0"}
