"""Models by hub id, against a small hub of our own: what is fetched, what is kept, and what is said when it fails."""

import errno
import json
from pathlib import Path

import huggingface_hub
import pytest

from helpers.hub import COMMON, DOWNLOAD, REPOS, TOKEN, Hub, download, fetched
from llama_jax.errors import ConfigError
from llama_jax.weights import hub_models

CONFIG = json.dumps(
    {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
    }
)


def index(*shards):
    return json.dumps({"weight_map": {f"t{i}": shard for i, shard in enumerate(shards)}})


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TOKENIZER = (
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
BINS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
# A repo like Meta's, which also has other formats.
FULL = COMMON | {
    "config.json": CONFIG,
    "model.safetensors.index.json": index(*SHARDS, SHARDS[0]),
    **dict.fromkeys((*SHARDS, *TOKENIZER), "x"),
    "model-00001-of-00009.safetensors": "of another split",
    "consolidated.safetensors": "the same again",
    "original/consolidated.00.pth": "x",
    "original/params.json": "{}",
    "original/tokenizer.model": "x",
    "pytorch_model.bin": "x",
    "flax_model.msgpack": "x",
    "other.gguf": "x",
}
FULL_WANTED = {
    ".gitattributes",
    "config.json",
    "model.safetensors.index.json",
    *SHARDS,
    *TOKENIZER,
    "original/tokenizer.model",
}
GGUFS = {"m-Q4_0.gguf": "x", "q8/m-Q8_0-00001-of-00002.gguf": "x", "q8/m-Q8_0-00002-of-00002.gguf": "x"}
REPOS |= {
    "meta/full": FULL,
    "meta/gated": FULL,
    "meta/private": FULL,
    "meta/partly": FULL,
    "someone/ggufs": COMMON | GGUFS,
    "someone/one-gguf": COMMON | {"m.gguf": "x"},
    "someone/mistral": COMMON | {"config.json": CONFIG.replace("llama", "mistral"), "model.safetensors": "x"},
    "someone/torch": COMMON
    | {"config.json": CONFIG, "pytorch_model.bin.index.json": index(*BINS), "tokenizer.model": "x"}
    | dict.fromkeys((*BINS, "training_args.bin", "flax_model.msgpack"), "x"),
    "someone/tensorflow": COMMON | {"config.json": CONFIG, "tf_model.h5": "x"},
}
TEXT = {"tokenizer.json": "x", "chat_template.jinja": "x", "additional_chat_templates/tool_use.jinja": "x"}
ADAPTER = {"adapter_config.json": "{}", "adapter_model.safetensors": "x"}
REPOS |= {
    "someone/adapter": COMMON | ADAPTER | TEXT | {"adapter_model.bin": "x"},
    "someone/old-adapter": COMMON | {"adapter_config.json": "{}", "adapter_model.bin": "x"},
}


def test_only_the_needed_files_are_fetched_and_the_cache_then_serves_without_a_network(tmp_path, endpoint):
    names = (
        "meta/full",
        "someone/ggufs/q8/m-Q8_0-00002-of-00002.gguf",
        "someone/one-gguf@v1",
        "someone/ggufs/m-Q4_0.gguf",
        "someone/torch",
    )
    first = download(tmp_path, endpoint, *names)
    assert fetched("meta/full") == FULL_WANTED
    assert fetched("someone/ggufs") == {".gitattributes", *GGUFS}
    assert fetched("someone/one-gguf") == {".gitattributes", "m.gguf"}
    assert fetched("someone/torch") == {
        ".gitattributes", "config.json", "pytorch_model.bin.index.json", "tokenizer.model", *BINS
    }  # fmt: skip
    assert all(Path(path).exists() for path in first)
    assert {p.relative_to(first[0]).as_posix() for p in Path(first[0]).rglob("*") if p.is_file()} == FULL_WANTED
    assert first[1].endswith("q8/m-Q8_0-00001-of-00002.gguf")
    assert first[2].endswith("/m.gguf") and first[3].endswith("/m-Q4_0.gguf")
    assert download(tmp_path, endpoint, *names) == first
    assert not fetched()
    assert download(tmp_path, "http://127.0.0.1:9", *names, HF_HUB_OFFLINE="1") == first
    assert download(tmp_path, "http://127.0.0.1:9", *names) == first  # no network, and nobody said so
    assert not Hub.seen


def test_a_gguf_file_is_named_by_its_type_as_in_llama_cpp(tmp_path, endpoint):
    one, split, none = download(tmp_path, endpoint, "someone/ggufs:q4_0", "someone/ggufs:Q8_0@v1", "someone/ggufs:Q2_K")
    assert one.endswith("/m-Q4_0.gguf") and split.endswith("q8/m-Q8_0-00001-of-00002.gguf")
    assert none.startswith("refused: someone/ggufs has no GGUF files of type Q2_K: name one") and "m-Q4_0.gguf" in none


def test_an_adapter_is_fetched_by_its_id(tmp_path, endpoint):
    wanted = "'adapter_config.json', ('adapter_model.safetensors', 'adapter_model.bin')"
    script = DOWNLOAD.replace("hub_models.download(name)", f"hub_models.download_adapter(name, {wanted})")
    assert script != DOWNLOAD
    one, again, old, model, file = download(
        tmp_path,
        endpoint,
        "someone/adapter",
        "someone/adapter@v1",
        "someone/old-adapter",
        "meta/full",
        "someone/ggufs/m-Q4_0.gguf",
        script=script,
    )
    assert fetched("someone/adapter") == {".gitattributes", *ADAPTER, *TEXT}
    assert all(Path(folder, name).is_file() for folder in (one, again) for name in ADAPTER)
    assert Path(old, "adapter_model.bin").is_file() and not Path(old, "adapter_model.safetensors").exists()
    assert "meta/full is not a LoRA adapter in peft's format: it has no adapter_config.json" in model
    assert "not the id of an adapter: write owner/name" in file
    (whole,) = download(tmp_path, endpoint, "someone/adapter")
    assert "is a LoRA adapter, not a model" in whole and "--adapter someone/adapter" in whole
    (offline,) = download(tmp_path, "http://127.0.0.1:9", "someone/adapter", script=script, HF_HUB_OFFLINE="1")
    assert offline == one


def test_the_token_is_sent_and_opens_what_is_private_or_gated(tmp_path, endpoint):
    said = download(tmp_path, endpoint, "meta/private", "meta/gated", HF_TOKEN=TOKEN)
    assert all(Path(path, "config.json").is_file() for path in said)
    assert {token for _, _, token in Hub.seen} == {TOKEN}


def test_whatever_the_hub_refuses_is_one_line_with_its_mend(tmp_path, endpoint):
    absent, private, gated, revision, torch, several, mistral, unknown = download(
        tmp_path,
        endpoint,
        "meta/absent",
        "meta/private",
        "meta/gated",
        "meta/full@v2",
        "someone/tensorflow",
        "someone/ggufs@v1",
        "someone/mistral",
        "someone/ggufs/m-Q4_1.gguf",
    )
    for said in (absent, private):
        assert "no such path here" in said and "check the spelling" in said and "HF_TOKEN" in said
    assert f"gated: open {endpoint}/meta/gated, accept the licence, then `hf auth login`, or set HF_TOKEN" in gated
    assert "no branch, tag or commit 'v2'" in revision and "owner/name@revision" in revision
    assert "no supported weights" in torch and "it has tf_model.h5" in torch
    assert "someone/ggufs/m-Q4_0.gguf@v1" in several and "q8/m-Q8_0-00001-of-00002.gguf" in several
    assert "00002-of-00002" not in several
    assert "model_type" in mistral and "model.safetensors" not in fetched("someone/mistral")
    assert "did you mean 'm-Q4_0.gguf'" in unknown
    assert all(said.startswith("refused: ") for said in (torch, several, mistral, unknown))


def test_a_token_that_is_refused_or_lacks_the_right_is_named(tmp_path, endpoint):
    (wrong,) = download(tmp_path, endpoint, "meta/full", HF_TOKEN="wrong")
    assert "refuses the token" in wrong and "HF_TOKEN" in wrong
    (other,) = download(tmp_path, endpoint, "meta/gated", HF_TOKEN="hf_another")
    assert "accept the licence" in other


def test_what_the_cache_lacks_is_never_taken_for_whole(tmp_path, endpoint):
    (offline,) = download(tmp_path, endpoint, "meta/full", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE=1 forbids the network: unset it" in offline and str(tmp_path) in offline
    (unreachable,) = download(tmp_path, "http://127.0.0.1:9", "meta/full")
    assert "http://127.0.0.1:9 cannot be reached" in unreachable and "HF_ENDPOINT" in unreachable
    assert "no such path here" in unreachable
    Hub.broken = {SHARDS[1], "tokenizer.json"}
    try:
        (broken,) = download(tmp_path, endpoint, "meta/partly")
    finally:
        Hub.broken = set()
    assert broken.startswith("refused: meta/partly: ") and "403 Forbidden" in broken
    assert SHARDS[0] in fetched()
    (partly,) = download(tmp_path, endpoint, "meta/partly", HF_HUB_OFFLINE="1")
    assert "does not hold all of it" in partly and "HF_HUB_OFFLINE=1" in partly
    for listing in tmp_path.rglob("trees/*.json"):  # as an older huggingface_hub leaves the cache
        listing.unlink()
    (partly,) = download(tmp_path, endpoint, "meta/partly", HF_HUB_OFFLINE="1")
    assert f"{SHARDS[1]} of it" in partly
    (whole,) = download(tmp_path, endpoint, "meta/partly")
    assert SHARDS[1] in fetched() and SHARDS[0] not in fetched()
    assert {p.relative_to(whole).as_posix() for p in Path(whole).rglob("*") if p.is_file()} == FULL_WANTED


@pytest.mark.parametrize(
    "error, words",
    [
        (KeyboardInterrupt(), "interrupted; run it again"),
        (OSError(errno.ENOSPC, "No space left on device"), "set HF_HOME to a larger disk"),
        (RuntimeError("Data processing error: No space left on device\n(os error 28)"), "set HF_HOME to a larger disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "set HF_HOME to a folder that can be written"),
        (RuntimeError("a long\nstory"), r"download failed \(RuntimeError: a long story\); run it again"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_stops_a_download_is_one_line_with_its_mend(monkeypatch, error, words):
    def stopped(*given, **named):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stopped)
    with pytest.raises(ConfigError, match=words) as found:
        hub_models.download("meta/full")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B-Instruct@main",
        "a/b@refs/pr/12",
        "a/b@0e9e39f249a16976918f6564b8830bc894c89659",
        "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF/Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf",
        "a/b/deep/er/model.gguf@v1.0",
        "a/" + "b" * 96,
    ],
)
def test_ids_are_known(text):
    assert hub_models.is_hub_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gpt2",
        "runs",
        "/abs/path",
        "/abs",
        "./a/b",
        "../a/b",
        ".a/b",
        "~/a",
        "~a/b",
        "a/",
        "/a",
        "a//b",
        "a/.b",
        "a/b.",
        "-a/b",
        "a/b-",
        "a--b/c",
        "a/b..c",
        "a/b.git",
        "a/b/c",
        "a/b/c.safetensors",
        "a/b/../c.gguf",
        "a/b@",
        "a/b@../../x",
        "a/b@v1@v2",
        "a/b@/x",
        "a b/c",
        "a/b\n",
        "ä/b",
        "a/" + "b" * 97,
        "https://huggingface.co/a/b",
        "C:\\models\\a",
    ],
)
def test_what_can_only_be_a_path_is_no_id_and_never_reaches_the_hub(text, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *given, **named: pytest.fail("asked the hub"))
    assert not hub_models.is_hub_id(text)
    with pytest.raises(ConfigError, match="not the id of a model"):
        hub_models.download(text)


def test_a_mistyped_path_below_a_folder_that_is_there_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_models.is_hub_id("runs/quikstart")
    (tmp_path / "runs").mkdir()
    assert not hub_models.is_hub_id("runs/quikstart")


LLAMA = ("config.json", "tokenizer.json", "README.md")
CHOICES = {
    "one_file": ((*LLAMA, "model.safetensors", "model.safetensors.index.json", *SHARDS), {"model.safetensors"}, ""),
    "shards": ((*LLAMA, *SHARDS, "model.safetensors.index.json", "flax_model.msgpack"), {*SHARDS}, ""),
    "one_by_another_name": ((*LLAMA, "llama.safetensors", "consolidated.safetensors"), {"llama.safetensors"}, ""),
    "meta_in_original": (
        (
            "original/consolidated.00.pth",
            "original/consolidated.01.pth",
            "original/params.json",
            "m.gguf",
            "config.json",
        ),
        {"original/consolidated.00.pth", "original/consolidated.01.pth", "original/params.json"},
        "original",
    ),
    "meta_at_the_root": (
        ("consolidated.00.pth", "params.json", "tokenizer.model", "checklist.chk"),
        {"consolidated.00.pth", "params.json", "tokenizer.model"},
        "",
    ),
    "flax": ((*LLAMA, "flax_model.msgpack", "tf_model.h5", "m.gguf"), {"flax_model.msgpack"}, ""),
    "flax_shards": (
        (*LLAMA, "flax_model.msgpack.index.json", "flax_model-00001-of-00001.msgpack"),
        {"flax_model-00001-of-00001.msgpack"},
        "",
    ),
    "gguf": (("config.json", "a/m-00001-of-00002.gguf", "a/m-00002-of-00002.gguf"), None, "a/m-00001-of-00002.gguf"),
    "adapters_beside_a_gguf": (("adapter_model.safetensors", "m.gguf"), {"m.gguf"}, "m.gguf"),
}


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A hub with one repo of the files in the argument. Returns the downloaded files."""

    def serve(files, name="a/b"):
        shards = [f for f in files if "-of-" in f and not f.endswith(".gguf")]
        got = set()

        def snapshot_download(repo, repo_type, revision, allow_patterns):
            for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
                text = CONFIG if file == "config.json" else index(*shards) if file.endswith("index.json") else ""
                (tmp_path / file).write_text(text)
                got.add(file)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(hub_models, "listing", lambda repo, folder: sorted(files))
        return hub_models.download(name), got

    return serve


@pytest.mark.parametrize("files, weights, opened", CHOICES.values(), ids=CHOICES)
def test_the_weights_are_taken_in_one_format(local, tmp_path, files, weights, opened):
    path, got = local(files)
    assert path == tmp_path / opened
    small = {"config.json", "tokenizer.json", "model.safetensors.index.json", "flax_model.msgpack.index.json"}
    assert got - small == ({f for f in files if f.endswith(".gguf")} if weights is None else weights)


@pytest.mark.parametrize(
    "files, name, words",
    [
        (("config.json", "adapter_model.bin"), "a/b", "it has adapter_model.bin"),
        (("adapter_model.safetensors",), "a/b", "it has adapter_model.safetensors"),
        (("config.json", "a.safetensors", "b.safetensors"), "a/b", "it has a.safetensors, b.safetensors"),
        (("original/consolidated.00.pth",), "a/b", "params.json"),
        (("README.md",), "a/b", "it has README.md"),
        ((), "a/b", "it has no files"),
        (("m-00001-of-00002.gguf",), "a/b", "it lacks m-00002-of-00002.gguf"),
        (("m-00001-of-00000.gguf",), "a/b", "is incomplete, it lacks"),
        (("m-00001-of-99999.gguf",), "a/b", "and 99978 more"),
        (tuple(f"m-Q{i}.gguf" for i in range(50)), "a/b", "has 50 GGUF models; name one, e.g. a/b/m-Q0.gguf"),
        (("config.json", "model.safetensors"), "a/b/m.gguf", "has no m.gguf; it has no GGUF files"),
    ],
    ids=str,
)
def test_repos_without_one_clear_set_of_weights_say_what_they_have(local, files, name, words):
    with pytest.raises(ConfigError) as error:
        local(files, name)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1500


@pytest.mark.parametrize(
    "places", [None, {}, [], {"t": 1}, {"t": "../x.safetensors"}, {"t": "/x.safetensors"}, {"t": "x.bin"}], ids=str
)
def test_an_index_that_names_anything_but_shards_is_refused(tmp_path, places):
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ConfigError, match="weight_map must name .safetensors files"):
        hub_models.choose(hub_models._parse("a/b"), tmp_path, ["config.json", "model.safetensors.index.json"])
