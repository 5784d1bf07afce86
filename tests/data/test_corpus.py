"""Claims about the quickstart corpus."""

import os
import re
import subprocess
import sys
import sysconfig

import pytest

from helpers.paths import ROOT
from llama_jax.data import corpus
from llama_jax.data.corpus import Document


@pytest.fixture(scope="module")
def docs() -> list[Document]:
    return corpus.documents()


def test_corpus_holds_two_megabytes_in_many_documents(docs):
    assert sum(len(doc.text) for doc in docs) >= 2_000_000
    assert len(docs) >= 800
    assert len({doc.name for doc in docs}) == len(docs)
    assert min(len(doc.text) for doc in docs) >= 40


def test_corpus_has_no_doctests_grammar_tables_or_licences(docs):
    text = "\n".join(doc.text for doc in docs)
    assert text.isascii()
    for mark in (">>>", "::=", "http://", "https://", "``", ":func:", ":class:", "(Pdb)", "->"):
        assert mark not in text, mark
    assert not re.search(r"(?m)^\.\. |^[-=*+|_ ]{3,}$", text)
    assert not re.search(r"(?i)copyright|all rights reserved", text)


def test_corpus_reads_as_sentences(docs):
    lines = [line for doc in docs for line in doc.text.splitlines() if line]
    assert all(re.search(r"[.!?:][\"')]*$", line) for line in lines)
    letters = sum(c.isalpha() or c == " " for line in lines for c in line)
    assert letters > 0.92 * sum(map(len, lines))


def test_no_paragraph_occurs_twice(docs):
    paragraphs = [p for doc in docs for p in doc.text.split("\n\n") if not p.startswith("- ")]
    assert len(paragraphs) == len(set(paragraphs))


def test_prose_unwraps_paragraphs_and_drops_code():
    text = """frob(x, y) -> int

    Return the sum of the two arguments, which must both be
    numbers of the same kind [1]_.  See :func:`~math.fsum` and ``sum`` for more.
    For example::

        total = frob(1, 2)
        print(total)

    >>> frob(1, 2)
    3

    - the first item of a list that is kept
      over two lines
    - the second item of the list

    ==========  =======
    a table     dropped
    ==========  =======
    """
    assert corpus.prose(text, set()) == [
        "Return the sum of the two arguments, which must both be numbers of the same kind. "
        "See math.fsum and sum for more.",
        "- the first item of a list that is kept over two lines.\n- the second item of the list.",
    ]


def test_prose_drops_what_was_seen_and_the_line_that_announced_it():
    seen: set[str] = set()
    assert corpus.prose("The steps below are run in this order.", seen)
    text = "This is what happens to a class when it is made.  These are the steps:\n\n"
    text += "The steps below are run in this order."
    assert corpus.prose(text, seen) == ["This is what happens to a class when it is made."]


def test_fingerprint_is_the_same_in_another_process_with_another_hash_seed(docs):
    command = "from llama_jax.data import corpus; print(corpus.fingerprint(corpus.documents()))"
    out = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == corpus.fingerprint(docs)


def test_fingerprint_sees_names_texts_and_order():
    a, b = Document("a", "one"), Document("b", "two")
    prints = {corpus.fingerprint(x) for x in ([a, b], [b, a], [a], [Document("ab", "ne"), b], [])}
    assert len(prints) == 5


def test_split_is_disjoint_complete_and_keyed_by_name(docs):
    train, validation = corpus.split(docs)
    assert {d.name for d in train}.isdisjoint(d.name for d in validation)
    assert sorted(d.name for d in train + validation) == sorted(d.name for d in docs)
    assert 0.02 < len(validation) / len(docs) < 0.08
    held = {d.name for d in validation}
    fewer = [Document(d.name, "changed") for d in docs[::3]]
    assert {d.name for d in corpus.split(fewer)[1]} == {d.name for d in fewer} & held
    assert corpus.split(docs, validation_fraction=0) == (docs, [])
    with pytest.raises(ValueError, match=r"validation_fraction.*2"):
        corpus.split(docs, validation_fraction=2)


def test_missing_library_sources_are_named_with_the_mend(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"holds 0 \.py.*your own text files"):
        list(corpus._groups())
