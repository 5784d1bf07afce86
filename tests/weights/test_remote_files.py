"""Models whose weights are read in place: the same arrays, in ranges of bytes, and nothing of them on this disk."""

import dataclasses
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from helpers import hub, sound
from helpers.errors import refusal
from helpers.paths import ROOT
from helpers.processes import free_port
from llama_jax import parallel, remote_files
from llama_jax.errors import ConfigError
from llama_jax.weights import export, load
from llama_jax.weights.model_files import Metadata
from llama_jax.weights.open import open_source

FORMATS = {"hf": "hf", "meta": "meta", "gguf": "gguf/m.gguf"}


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A store with one model in three formats."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bucket" / "gguf").mkdir(parents=True)
    leaves = sound.random_leaves(sound.CONFIG)
    for format, name in FORMATS.items():
        path = tmp_path / "bucket" / name
        export.save(path, sound.CONFIG, leaves, Metadata(), format=format, dtype="float32")
    return tmp_path / "bucket"


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_read_in_place_are_those_of_the_files(tmp_path, bucket, format):
    layout = parallel.Layout(parallel.make_mesh({"fsdp": 4, "tensor": 2}), "train")
    whole = open_source(bucket / FORMATS[format])
    with remote_files.reading_in_parts(True):
        source = open_source(f"local://{bucket}/{FORMATS[format]}")
        for quantize in ("none", "int8"):
            params = source.load(layout, None, quantize)
            same(params, whole.load(layout, None, quantize))
            shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
            assert shardings == jax.tree.map(lambda leaf: leaf.sharding, whole.load(layout, None, quantize))
        assert source.identity() == whole.identity()
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000  # config and tokenizer
    assert any(path.stat().st_size == 0 for path in files)


def test_a_stand_in_is_no_model_for_another_process(tmp_path, bucket, monkeypatch):
    with remote_files.reading_in_parts(True):
        source = open_source(f"local://{bucket}/hf")
    monkeypatch.setattr("llama_jax.files._registered", {})
    with pytest.raises(ValueError, match="0 bytes is too short for a safetensors file"):
        open_source(source.path)


def test_a_store_that_fails_is_asked_again_and_then_named(tmp_path, bucket, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    plain, failures = LocalFileSystem.cat_file, [OSError("reset"), OSError("reset")]

    def fail_first(self, *args, **keywords):
        if failures:
            raise failures.pop()
        return plain(self, *args, **keywords)

    monkeypatch.setattr(remote_files, "_BLOCK", 1 << 10)
    monkeypatch.setattr(remote_files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(LocalFileSystem, "cat_file", fail_first)
    with remote_files.reading_in_parts(True):
        source = open_source(f"local://{bucket}/hf")
        assert not failures
        failures.extend([OSError("the bucket is closed")] * 100)
        with pytest.raises(ConfigError) as caught:
            source.load(None, None, "none")
    assert "model.safetensors) cannot be read (OSError: 'the bucket is closed')" in refusal(caught)


def test_a_file_that_changes_while_it_is_read_is_named(bucket):
    with remote_files.reading_in_parts(True):
        source = open_source(f"local://{bucket}/hf")
        weights = bucket / "hf" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[::-1])
        weights.chmod(0o644)
        os.utime(weights, (1, 1))
        with pytest.raises(ConfigError, match="model.safetensors changed while it was being read: start again"):
            source.load(None, None, "none")


def test_few_tensors_wait_in_memory_to_be_spread(bucket, monkeypatch):
    placed, spread, most = [], [], []
    plain = load.place, load._spread

    def count_spread(*arguments):
        time.sleep(0 if spread else 0.3)  # reading goes on meanwhile
        most.append(len(placed) - len(spread))
        spread.append(arguments)
        return plain[1](*arguments)

    monkeypatch.setattr(load, "place", lambda *args, **named: placed.append(args) or plain[0](*args, **named))
    monkeypatch.setattr(load, "_spread", count_spread)
    with remote_files.reading_in_parts(True):
        source = open_source(f"local://{bucket}/hf")
        source.load(parallel.Layout(parallel.make_mesh({"fsdp": 8}), "train"), None, "none")
    assert len(spread) == len(source.leaves) and max(most) <= 1 + load._AT_ONCE < len(spread)


LOGITS = """
import json, sys
from pathlib import Path
from llama_jax import remote_files
from llama_jax.weights.open import open_source
with remote_files.reading_in_parts(True):
    source = open_source(sys.argv[1])
    total = sum(float(entry.read(dtype="float32").sum()) for entry in source.leaves.values())
weights = [path.stat().st_size for path in Path(source.path).glob("*.safetensors")]
print(json.dumps([total, weights, str(source.path)]))
"""


def test_weights_on_the_hub_are_read_in_place(tmp_path, bucket):
    folder = bucket / "hf"
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.REPOS["me/in_place"] = hub.COMMON | contents
    try:
        with hub.serving() as endpoint:
            (found,) = hub.download(
                tmp_path / "home", endpoint, "me/in_place", script=LOGITS, LLAMA_JAX_CACHE=str(tmp_path / "cache")
            )
    finally:
        del hub.REPOS["me/in_place"]
    total = sum(float(entry.read(dtype="float32").sum()) for entry in open_source(folder).leaves.values())
    assert found[:2] == [total, [0]]
    assert not list((tmp_path / "home").rglob("*.safetensors"))


LOAD = """
"One of two processes that read a model in place; prints the bytes that it read."
import sys
import jax
address, index, source = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
from llama_jax import parallel, remote_files
from llama_jax.weights.open import open_source

fetch, read = remote_files._Ranges._fetch, []
remote_files._Ranges._fetch = lambda self, start, stop: (read.append(stop - start), fetch(self, start, stop))[1]
remote_files._BLOCK = 1 << 12
with remote_files.reading_in_parts(True):
    params = open_source(source).load(parallel.Layout(parallel.make_mesh({"fsdp": 8}), "train"), None, "none")
print(sum(read), float(sum(abs(leaf).sum() for leaf in jax.tree.leaves(params))), flush=True)
"""


@pytest.mark.slow
def test_each_of_two_processes_reads_its_part_of_the_bytes(tmp_path):
    config = dataclasses.replace(sound.CONFIG, embed_dim=512, head_dim=128)
    bucket = tmp_path / "bucket"
    export.save(bucket / "hf", config, sound.random_leaves(config), Metadata(), format="hf", dtype="float32")
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, address, str(index), f"local://{bucket}/hf"],
            env=environment | {"LLAMA_JAX_CACHE": str(tmp_path / f"cache{index}")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].split()[-2:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    size = (bucket / "hf" / "model.safetensors").stat().st_size
    for count, _ in printed:
        assert int(count) < 0.6 * size  # half, the header, and the ends of blocks
    assert printed[0][1] == printed[1][1]
