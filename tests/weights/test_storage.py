"""Data and models behind addresses, on a store in memory: they are those of the same files on this machine."""

import collections
import dataclasses
import importlib.util
import shutil

import fsspec
import jax
import numpy as np
import pytest

from helpers import sound
from helpers.errors import refusal
from helpers.runs import text_run
from helpers.tokenizers import byte_tokenizer
from llama_jax import hub, storage, stored_run
from llama_jax.config import SIZES
from llama_jax.data import prepare
from llama_jax.data.sources import documents_from, fingerprint_of
from llama_jax.errors import ConfigError
from llama_jax.params import init_params
from llama_jax.train.run import train
from llama_jax.weights.formats import peft
from llama_jax.weights.hub_models import is_hub_id
from llama_jax.weights.locate import locate
from llama_jax.weights.open import open_source

pytestmark = pytest.mark.usefixtures("one_device")
SMALL = dataclasses.replace(SIZES["tiny"], num_layers=1, ffn_dim=64, max_seq_len=256)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The address of an empty folder of the store in memory; its downloads go to tmp_path/cache."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    yield "memory://bucket"
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)


def put(url, **files):
    """Write files, each NAME__SUFFIX=text, below an address."""
    fs, path = fsspec.core.url_to_fs(url)
    for name, text in files.items():
        fs.pipe_file(f"{path}/{name.replace('__', '.')}", text.encode())


def texts(*patterns):
    return [document.text for document in documents_from(patterns)]


# ---- data ------------------------------------------------------------------------------------------------------


def test_data_are_read_from_a_file_a_folder_and_a_pattern(bucket, tmp_path):
    put(bucket, a__txt="first", b__jsonl='{"text": "second"}\n{"text": "third"}\n', c__csv="no,data", d__json="[]")
    put(f"{bucket}/deep", e__md="fourth")
    assert texts(f"{bucket}/a.txt") == ["first"]
    assert texts(bucket) == ["first", "second", "third", "fourth"]  # as of a folder of this machine
    assert texts(f"{bucket}/*.jsonl", f"{bucket}/deep") == ["second", "third", "fourth"]
    assert texts(f"{bucket}/**/*.md") == ["fourth"]
    (tmp_path / "a.txt").write_text("here")
    assert texts(f"file://{tmp_path}/a.txt") == ["here"]


def test_a_file_that_has_changed_is_downloaded_again_and_one_that_has_not_is_kept(bucket, tmp_path, monkeypatch):
    put(bucket, a__txt="first")
    before = fingerprint_of([bucket])
    assert texts(bucket) == ["first"] and fingerprint_of([bucket]) == before
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(type(fs), "get_file", lambda *args, **keywords: pytest.fail("downloaded again"))
    assert texts(bucket) == ["first"]
    monkeypatch.undo()
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    put(bucket, a__txt="other")
    assert texts(bucket) == ["other"] and fingerprint_of([bucket]) != before


def test_a_run_trains_on_stored_data_as_on_files(bucket, tmp_path):
    run = text_run(tmp_path, output=str(tmp_path / "files"), train__steps=2)
    put(bucket, text__txt=(tmp_path / "text.txt").read_text())
    stored = text_run(tmp_path, train__steps=2, data__train=(f"{bucket}/text.txt",))
    assert train(stored).losses == train(run).losses


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://bucket/none", "memory://bucket/none has no files: check the spelling"),
        ("memory://bucket/*.txt", "has no files"),
        ("gss://bucket/x", "no store is named 'gss'; did you mean 'gs'?"),
        ("memory://bucket/only", "holds no file ending in .txt, .md"),
        ("memory://bucket/only/a.csv", ".csv are not supported; write records as lines of a .jsonl file"),
    ],
)
def test_an_address_without_data_is_one_line(bucket, url, words):
    put(f"{bucket}/only", a__csv="x")
    with pytest.raises((ConfigError, ValueError, FileNotFoundError)) as caught:
        texts(url)
    assert words in refusal(caught)


@pytest.mark.parametrize(("scheme", "packages"), [("gs", "gcsfs"), ("https", "aiohttp requests")])
def test_a_package_that_is_missing_is_named(tmp_path, scheme, packages):
    if importlib.util.find_spec(packages.split()[0]) is not None:
        pytest.skip(f"{packages} is installed")
    with pytest.raises(ConfigError) as caught:
        train(text_run(tmp_path, data__train=(f"{scheme}://bucket/x",)))
    words = (
        f"data.train: {scheme}://bucket/x: {scheme}:// needs a package that is not installed: pip install {packages}"
    )
    assert words in refusal(caught)


def test_names_that_leave_the_folder_are_refused(bucket):
    fsspec.filesystem("memory").pipe_file("/bucket/a/../../x.txt", b"x")
    with pytest.raises(ConfigError, match=r"has a file with \.\. in its name"):
        texts("memory://bucket/a")
    fsspec.filesystem("memory").rm_file("/bucket/a/../../x.txt")


# ---- room ------------------------------------------------------------------------------------------------------

Usage = collections.namedtuple("Usage", "total used free")


def test_a_download_that_does_not_fit_is_refused_before_it_begins(bucket, tmp_path, monkeypatch):
    put(bucket, a__txt="x" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**30, 2**30, 300))
    with pytest.raises(ConfigError) as caught:
        texts(bucket)
    assert "the download needs 1 kB, but" in refusal(caught) and "has 300 B free: make room" in refusal(caught)
    assert not list((tmp_path / "cache").rglob("*.txt"))


def test_the_size_of_a_large_download_and_the_free_space_are_said(tmp_path, capsys):
    storage.check_room("gs://b/model", 10**9, tmp_path, count=3)
    line = capsys.readouterr().err
    assert line.startswith("downloading 3 files of gs://b/model: 1 GB to ") and line.rstrip().endswith(" GB free")
    storage.check_room("gs://b/model", 1000, tmp_path, count=1)
    assert capsys.readouterr().err == ""


# ---- models ----------------------------------------------------------------------------------------------------


def upload(folder, url):
    fs, path = fsspec.core.url_to_fs(url)
    fs.put(str(folder), path, recursive=True)


def leaves(source):
    return {name: np.asarray(leaf.read()) for name, leaf in source.leaves.items()}


def test_a_stored_model_is_that_of_the_same_folder(bucket, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    sound.save_params(folder, SMALL, jax.jit(init_params, static_argnums=0)(SMALL, jax.random.key(7)))
    byte_tokenizer().save(folder / "tokenizer.model")
    (folder / "notes.bin").write_bytes(b"x" * 100)
    upload(folder, f"{bucket}/model")
    path = locate(f"{bucket}/model")
    names = {file.name for file in path.iterdir()}
    assert names == {file.name for file in folder.iterdir()} - {"notes.bin"}
    here, there = open_source(folder), open_source(f"{bucket}/model")
    assert there.config == here.config and there.identity() == here.identity()


def test_a_run_starts_from_a_stored_run_and_only_its_newest_checkpoint_is_downloaded(bucket, tmp_path):
    first = text_run(tmp_path, train__steps=4, checkpoint__every=2)
    train(first)
    upload(tmp_path / "run", f"{bucket}/run")
    path = locate(f"{bucket}/run")
    assert [step.name for step in (path / "checkpoints").iterdir()] == ["4"]
    settings = {"train__steps": 2, "optimizer__warmup_steps": 0}
    by_url = text_run(tmp_path, output=str(tmp_path / "by_url"), init_from=f"{bucket}/run", **settings)
    by_path = text_run(tmp_path, output=str(tmp_path / "by_path"), init_from=str(tmp_path / "run"), **settings)
    assert train(by_url).losses == train(by_path).losses


def test_a_step_that_the_run_deletes_during_its_download_is_not_called_damaged(bucket, tmp_path, monkeypatch):
    """A reader beside a run in the store takes the newest step that is there then."""
    train(text_run(tmp_path, train__steps=2, checkpoint__every=1, checkpoint__keep=2))
    upload(tmp_path / "run", f"{bucket}/run")
    fetch, fs = stored_run.fetch_step, fsspec.filesystem("memory")
    asked = []

    def beside_a_run(url, step, *of, **how):
        asked.append(step)
        if step == 2:
            fs.rm("/bucket/run/checkpoints/2", recursive=True)
        fetch(url, step, *of, **how)

    monkeypatch.setattr(stored_run, "fetch_step", beside_a_run)
    path = locate(f"{bucket}/run")
    assert asked == [2, 1] and [step.name for step in (path / "checkpoints").iterdir()] == ["1"]


def test_a_stored_adapter_and_a_stored_tokenizer_are_those_of_the_same_files(bucket, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    upload(tmp_path / "adapter", f"{bucket}/adapter")
    with pytest.raises(ConfigError, match="IA3"):  # as far as the settings, which the folder's own reader refuses
        peft.open_adapter(f"{bucket}/adapter", SMALL)
    byte_tokenizer().save(tmp_path / "tokenizer.model")
    upload(tmp_path / "tokenizer.model", f"{bucket}/tokenizer.model")
    run = text_run(tmp_path, data__tokenizer=f"{bucket}/tokenizer.model")
    assert prepare.choose_tokenizer(run, None, print).fingerprint == byte_tokenizer().fingerprint


def test_an_address_without_a_model_names_what_is_wanted(bucket):
    put(f"{bucket}/none", a__txt="x")
    with pytest.raises(ConfigError) as caught:
        open_source(f"{bucket}/none")
    assert "memory://bucket/none has no supported weights: they are" in refusal(caught)


def test_the_room_of_a_download_from_the_hub_is_checked(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.hf_api import RepoFile

    files = [RepoFile(path=name, size=10**12, oid="0") for name in ("a", "b")]
    monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", lambda *args, **keywords: files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = hub.Repo("model", "me/big", "me/big", None, "owner/name")
    with pytest.raises(ConfigError, match=r"me/big: the download needs 2 TB, but .* free: make room"):
        hub.fetch(repo, ["a", "b"], commit="0" * 40)


def test_a_path_of_a_file_that_does_not_exist_is_no_hub_id():
    assert not is_hub_id("models/x.gguf") and not is_hub_id("models/x.safetensors")
    assert is_hub_id("owner/name") and is_hub_id("owner/name/x.gguf")
