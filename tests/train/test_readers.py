"""Models are read from a run while it saves and deletes checkpoints."""

import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.checkpoints import abstract, save
from helpers.runs import text_run
from llama_jax import checkpoint
from llama_jax.checkpoint import Checkpoints, Deleted
from llama_jax.params import abstract_params
from llama_jax.train.run import train
from llama_jax.weights.open import open_source


def test_a_reader_beside_a_run_that_deletes_checkpoints_gets_one_whole_step(tmp_path, capsys):
    """Every weight of step n is n, and a step is kept only until the next one."""
    run = text_run(tmp_path, train__steps=2)
    train(run)
    folder, shapes, stopped = tmp_path / "run", abstract_params(run.model, stacked=True), threading.Event()
    capsys.readouterr()

    def write():
        checkpoints = Checkpoints(folder, keep=1)
        step = 3
        while not stopped.is_set():
            params = jax.tree.map(lambda a, step=step: jnp.full(a.shape, step, jnp.float32), shapes)
            checkpoints.save(step, params=params, rest={"n": jnp.int32(step)}, meta={})
            step += 1
        checkpoints.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while (folder / "checkpoints" / "2").exists():  # that of training
            time.sleep(0.01)
        for i in range(8):
            source = open_source(folder)
            identity = source.identity() if i % 2 else None
            leaves = jax.tree.leaves(source.load(None, None, None))
            assert len({float(v) for leaf in leaves for v in (leaf.min(), leaf.max())}) == 1
            assert identity is None or len(identity) == 64
    finally:
        stopped.set()
        writer.join()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("instant", ["before its files are validated", "while its arrays are read"])
def test_a_step_that_is_deleted_meanwhile_is_not_called_damaged(tmp_path, monkeypatch, capsys, instant):
    save(tmp_path, 2, 4)
    checkpoints = Checkpoints(tmp_path, create=False)
    gone = tmp_path / "checkpoints" / "4"
    if instant.startswith("before"):
        check = checkpoint.manifest.check

        def vanish(folder, **keywords):
            if gone.exists():
                gone.rename(gone.with_name("deleting-4"))
            check(folder, **keywords)

        monkeypatch.setattr(checkpoint.manifest, "check", vanish)
        assert checkpoints.latest() == 2
    else:
        assert checkpoints.latest() == 4
        restore = checkpoints._orbax.restore

        def vanish(*given, **keywords):
            value = restore(*given, **keywords)
            gone.rename(gone.with_name("deleting-4"))
            return value

        monkeypatch.setattr(checkpoints._orbax, "restore", vanish)
        with pytest.raises(Deleted, match="has no checkpoint of step 4: the steps in it are 2$"):
            checkpoints.restore(4, **abstract(4))
    assert capsys.readouterr().err == ""
    assert np.all(checkpoints.steps() == [2])


def test_failed_reads_that_orbax_leaves_behind_print_nothing(tmp_path, monkeypatch):
    """When a step is deleted while its arrays are read, Python prints the errors of coroutines that it collects."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(unraisable.object.__name__))
    checkpoint._silence_libraries.cache_clear()
    save(tmp_path, 2)
    Checkpoints(tmp_path, create=False).restore(2, **abstract(2))
    checkpoint._silence_libraries.cache_clear()
    for name, file in (("theirs", "site-packages/orbax/reads.py"), ("ours", "llama_jax/other.py")):
        found = {}
        exec(compile(f"async def {name}(): pass", file, "exec"), found)
        coroutine = found[name]()
        sys.unraisablehook(SimpleNamespace(exc_type=Exception, exc_value=Exception("x"), object=coroutine))
        coroutine.close()
    assert printed == ["ours"]
