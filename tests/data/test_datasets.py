"""Datasets by hub id, against a small hub of our own: which files are meant, their fingerprints, what is refused."""

import json

import pytest
from huggingface_hub.utils import parse_hf_uri

from helpers.hub import COMMON, DATASETS, TOKEN, Hub, download, fetched
from helpers.runs import text_run
from llama_jax.data import hub_datasets
from llama_jax.data.sources import documents_from
from llama_jax.errors import ConfigError
from llama_jax.hub import Repo
from llama_jax.train import setup

LINES = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(5))
SHARDS = ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl")
DATASETS |= {
    "org/plain": COMMON
    | {"train.jsonl": LINES, "validation.jsonl": LINES[:18], "test.jsonl": LINES[:36], "card/a.jpg": "x"},
    "org/shards": COMMON | {**dict.fromkeys(SHARDS, LINES), "data/test-00000-of-00001.jsonl": LINES},
    "org/parquet": COMMON | {"data/train.parquet": "x"},
    "org/list": COMMON | {"alpaca.json": json.dumps([{"instruction": "Why?", "output": "So."}] * 3, indent=1)},
    "meta/private": COMMON | {"train.jsonl": LINES},
    "meta/gated": COMMON | {"train.jsonl": LINES},
}
FIND = """
"Prints the files and the fingerprint of each dataset in argv, or the error that refuses it, as lines of JSON."
import json, sys
from llama_jax.config import ConfigError
from llama_jax.data import sources
for text in sys.argv[1:]:
    split, _, name = text.rpartition(" ")
    try:
        split = split or "train"
        found = sources.hub_files([name], split=split), sources.fingerprint_of([name], split=split)
        print(json.dumps(found))
    except ConfigError as error:
        print(json.dumps("refused: " + str(error)))
"""


def find(home, endpoint, *names, **environment):
    """The files and the fingerprint of each name; a split and a space may come before it."""
    return download(home, endpoint, *names, script=FIND, **environment)


def commit(text: str) -> str:
    return text.partition("@")[2].partition("/")[0]


def test_only_what_is_meant_is_fetched_and_the_cache_then_serves_without_a_network(tmp_path, endpoint):
    names = (
        "hf://datasets/org/plain",
        "validation hf://datasets/org/plain@v1",
        "hf://datasets/org/shards/data/train-*",
    )
    first = find(tmp_path, endpoint, *names)
    assert fetched("datasets/org/plain") == {".gitattributes", "train.jsonl", "validation.jsonl"}
    assert fetched("datasets/org/shards") == {".gitattributes", *SHARDS}
    plain = commit(first[0][0][0])
    assert len(plain) == 40
    assert [files for files, _ in first[:2]] == [
        [f"hf://datasets/org/plain@{plain}/train.jsonl"],
        [f"hf://datasets/org/plain@{plain}/validation.jsonl"],
    ]
    assert [text.partition("/data/")[2] for text in first[2][0]] == [name.partition("/")[2] for name in SHARDS]
    assert find(tmp_path, endpoint, *names) == first
    assert not fetched()
    assert find(tmp_path, "http://127.0.0.1:9", *names, HF_HUB_OFFLINE="1") == first
    assert find(tmp_path, "http://127.0.0.1:9", *names) == first


def test_a_fingerprint_is_the_commits_and_the_same_on_another_machine(tmp_path, endpoint, monkeypatch):
    names = ("hf://datasets/org/plain", "hf://datasets/org/plain/train.jsonl", "hf://datasets/org/plain/*.jsonl")
    one, another = (find(tmp_path / machine, endpoint, *names) for machine in "ab")
    assert one == another
    (files, whole), (same, exact), (_, more) = one
    assert same == files and exact == whole != more
    monkeypatch.setattr(Hub, "head", "moved")
    ((moved, later),) = find(tmp_path / "a", endpoint, names[0])
    assert commit(moved[0]) != commit(files[0]) and later != whole
    monkeypatch.setattr(Hub, "head", "")
    pinned = f"hf://datasets/org/plain@{commit(files[0])}"
    assert find(tmp_path / "a", endpoint, pinned) == [[files, whole]]


def test_a_store_of_the_hub_has_one_key_wherever_it_is_built(tmp_path, endpoint):
    script = """
import json, sys
from llama_jax.data.store import build_store
from llama_jax.text import Tokenizer
from llama_jax.text.chat_format import Llama3Format
from llama_jax.text.record_encoder import RecordEncoder
tokenizer = Tokenizer.from_ranks({bytes([i]): i for i in range(256)})
encoder = RecordEncoder(tokenizer, Llama3Format(tokenizer))
for name in sys.argv[2:]:
    store = build_store([name], encoder, cache_dir=sys.argv[1])
    print(json.dumps([store.path.name, store.num_documents, store.fingerprint]))
print(json.dumps(""))  # for the folder
"""
    names = ("hf://datasets/org/plain", "hf://datasets/org/list")
    one, other = (
        download(tmp_path / machine, endpoint, str(tmp_path / f"cache {machine}"), *names, script=script)
        for machine in "ab"
    )
    assert one == other and [found[1] for found in one[:2]] == [5, 3]


def test_whatever_the_hub_refuses_is_one_line_with_its_mend(tmp_path, endpoint):
    absent, gated, revision, file, pattern, held, model, path = find(
        tmp_path,
        endpoint,
        "hf://datasets/org/absent",
        "hf://datasets/meta/gated",
        "hf://datasets/org/plain@v2",
        "hf://datasets/org/plain/trian.jsonl",
        "hf://datasets/org/shards/data/valid*",
        "validation hf://datasets/org/list",
        "hf://org/plain",
        "hf://datasets/org",
    )
    assert f"hf://datasets/org/absent: no dataset {endpoint}/datasets/org/absent: check the spelling" in absent
    assert "no such path here" not in absent and "HF_TOKEN" in absent
    assert f"gated: open {endpoint}/datasets/meta/gated, accept the licence" in gated
    assert "no branch, tag or commit 'v2'" in revision and "hf://datasets/OWNER/NAME[@REVISION]" in revision
    assert "matches no data file; did you mean 'train.jsonl'?; it has " in file and "a.jpg" not in file
    assert (
        "matches no data file" in pattern
        and "it has USE_POLICY.md, data/test-00000-of-00001.jsonl, data/train" in pattern
    )
    assert "no path of a file has a word for validation; add the path of a file, such as alpaca.json" in held
    for said in (model, path):
        assert "names no dataset of the Hugging Face hub: write hf://datasets/OWNER/NAME[@REVISION]" in said
    opened = find(tmp_path, endpoint, "hf://datasets/meta/private", "hf://datasets/meta/gated", HF_TOKEN=TOKEN)
    assert all(files[0].endswith("/train.jsonl") for files, _ in opened)
    (offline,) = find(tmp_path / "new", endpoint, "hf://datasets/org/plain", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE=1 forbids the network: unset it" in offline
    (lacking,) = find(tmp_path, endpoint, "hf://datasets/org/plain/test.jsonl", HF_HUB_OFFLINE="1")
    assert lacking.startswith("refused: hf://datasets/org/") and "HF_HUB_OFFLINE=1" in lacking


def test_parquet_without_pyarrow_is_refused_before_it_is_downloaded(tmp_path, endpoint):
    script = FIND.replace("import json, sys", "import json, sys; sys.modules['pyarrow'] = None")
    (said,) = download(tmp_path, endpoint, "hf://datasets/org/parquet", script=script)
    assert "data/train.parquet: reading Parquet needs pyarrow, which is not installed: pip install pyarrow" in said
    assert fetched() == {".gitattributes"}


# ---- which files ---------------------------------------------------------------------------------------------

MANY = ("data/train_prefs-0.parquet", "data/train_sft-0.parquet", "data/test_prefs-0.parquet", "data/train.jsonl")
CHOICES = [
    (MANY, None, "train", MANY[:2]),  # of one format only
    (MANY, None, "validation", MANY[2:3]),
    (MANY, "data/train_prefs-*.parquet", "train", MANY[:1]),
    (MANY, "data/*", "train", MANY),
    (MANY, "data", "validation", MANY),
    (MANY, "**", "train", MANY),
    (MANY, "**/train*.jsonl", "train", MANY[3:]),
    (MANY, "*.jsonl", "train", None),  # which is in a folder
    (MANY, "data/train.jsonl", "train", MANY[3:]),
    (("en/train/0.parquet", "en/test/0.parquet", "train.md"), None, "train", ("en/train/0.parquet",)),
    (
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        "default/train",
        "train",
        ("default/train/0000.parquet",),
    ),
    (("a.jsonl.gz", "README.md", "notes.md"), None, "train", ("a.jsonl.gz",)),
    (("a.json", "dataset_infos.json", "README.md"), None, "train", ("a.json",)),
    (("README.md", "books/b.txt", "books/c.txt.gz", "LICENSE.txt"), None, "train", ("books/b.txt", "books/c.txt.gz")),
    (
        ("restraint.jsonl", "contest.jsonl"),
        None,
        "train",
        ("restraint.jsonl", "contest.jsonl"),
    ),  # no words of their own
    (("a.jsonl", "test.jsonl", "dev.jsonl"), None, "train", ("a.jsonl",)),
    (("a.jsonl", "test.jsonl", "dev.jsonl"), None, "validation", ("dev.jsonl",)),
    (("a.jsonl", "my-eval.jsonl"), None, "validation", ("my-eval.jsonl",)),
    (("test.jsonl",), None, "train", None),
    (("README.md", "pictures.zip", "a.csv"), None, "train", None),
    ((), None, "train", None),
    (("a.csv", "train.jsonl"), "a.csv", "train", ("a.csv",)),
]


@pytest.mark.parametrize(("files", "pattern", "split", "wanted"), CHOICES)
def test_files_are_chosen_by_pattern_or_by_what_their_paths_say(files, pattern, split, wanted):
    repo = Repo("dataset", "hf://datasets/a/b", "a/b", None, hub_datasets.FORMS)
    if wanted is None:
        with pytest.raises(ConfigError, match="^hf://datasets/a/b:? (no|matches no) ") as caught:
            hub_datasets._choose(repo, files, pattern=pattern, split=split)
        assert "\n" not in str(caught.value)
    else:
        assert hub_datasets._choose(repo, files, pattern=pattern, split=split) == list(wanted)


NAMES = [
    ("hf://datasets/a/b", ("a/b", None, None)),
    ("hf://datasets/a/b/", ("a/b", None, None)),
    ("hf://datasets/trl-lib/ultrafeedback_binarized@v1.0", ("trl-lib/ultrafeedback_binarized", "v1.0", None)),
    ("hf://datasets/a/b@main/data/train-*.parquet", ("a/b", "main", "data/train-*.parquet")),
    ("hf://datasets/a/b/x@y/z", ("a/b", None, "x@y/z")),
    ("hf://datasets/a/b@refs/convert/parquet/default/train/0000.parquet",
     ("a/b", "refs/convert/parquet", "default/train/0000.parquet")),
    ("hf://datasets/a/b@refs/pr/12", ("a/b", "refs/pr/12", None)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), NAMES)
def test_a_name_is_read_as_the_hubs_own_library_reads_it(text, parts):
    assert hub_datasets._ID.fullmatch(text).groups() == parts
    theirs = parse_hf_uri(text)
    assert (theirs.id, theirs.revision, theirs.path_in_repo or None) == parts


@pytest.mark.parametrize(
    "text", ["hf://", "hf://a/b", "hf://datasets/a", "hf://datasets/a/b/../c", "hf://datasets/a b/c"]
)
def test_what_names_no_dataset_never_reaches_the_hub(text, monkeypatch):
    monkeypatch.setattr(hub_datasets, "fetch", lambda *given, **named: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match="names no dataset of the Hugging Face hub"):
        documents_from([text])


def test_a_branch_that_moves_while_a_process_runs_moves_nothing_in_it(tmp_path, monkeypatch):
    asked = []

    def fetch(repo, files, *, commit=None):
        asked.append(commit)
        folder = tmp_path / (commit or f"commit{len(asked)}")
        folder.mkdir(exist_ok=True)
        (folder / "train.jsonl").write_text(LINES)
        return folder

    monkeypatch.setattr(hub_datasets, "fetch", fetch)
    monkeypatch.setattr(hub_datasets, "listing", lambda repo, folder: ["train.jsonl"])
    name = "hf://datasets/org/moving"
    for _ in range(3):
        assert len(list(documents_from([name]))) == 5
    assert asked == [None, "commit1"]
    hub_datasets.find.cache_clear()


def test_an_id_without_the_scheme_is_asked_after_and_a_key_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="of the Hugging Face hub is named hf://datasets/trl-lib/tldr"):
        documents_from(["trl-lib/tldr"])
    (tmp_path / "here").mkdir()
    for path in ("here/tldr", "data/tldr.jsonl"):
        with pytest.raises(FileNotFoundError) as caught:
            documents_from([path])
        assert "hf://" not in str(caught.value)
    for key in ("train", "validation"):
        with pytest.raises(ConfigError, match=f"^data.{key}: 'hf://trl-lib/tldr' names no dataset"):
            setup.check_paths(text_run(tmp_path, **{f"data__{key}": ("hf://trl-lib/tldr",)}))
