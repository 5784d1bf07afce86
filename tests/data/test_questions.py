"""Claims about the chat set of the standard library's documentation, and about the recipe that trains on it."""

import builtins
import inspect
import os
import pydoc
import re
import shutil
import subprocess
import sys

import jax
import pytest

from helpers.paths import ROOT
from helpers.tokenizers import byte_tokenizer
from llama_jax import config as configs
from llama_jax import parallel
from llama_jax.data import corpus, questions
from llama_jax.data.encoding import encode
from llama_jax.data.sources import documents_from
from llama_jax.infer.llama import Llama
from llama_jax.params import init_params
from llama_jax.run_config import RunConfig, default_dict
from llama_jax.train.samples import TrainingSampler

TRAIN, VALIDATION = (questions.dialogs(part) for part in questions.PARTS)


def pairs(dialogs):
    """(question, answer) of every turn."""
    turns = [m["content"] for dialog in dialogs for m in dialog.messages]
    return list(zip(turns[::2], turns[1::2], strict=True))


@pytest.mark.parametrize(
    ("docstring", "said"),
    [
        ("Return the sine of x (measured in radians).", "`m.f` returns the sine of x (measured in radians)."),
        ("Greatest Common Divisor.", "`m.f` returns the greatest common divisor."),
        ("Number of ways to choose k items", "`m.f` returns the number of ways to choose k items."),
        ("Context manager that does nothing at all.", "`m.f` is a context manager that does nothing at all."),
        ("An iterator over lines of a file.", "`m.f` is an iterator over lines of a file."),
        ("Whether this path is a file.", "`m.f` tells whether this path is a file."),
        ("Same as the other function.", "`m.f` is the same as the other function."),
        ("Copies data and metadata of a file.", "`m.f` copies data and metadata of a file."),
        ("Recursively delete a directory tree.", "`m.f` recursively deletes a directory tree."),
        ("Push item on the heap, then pop and return it.", "`m.f` pushes item on the heap, then pops and returns it."),
        ("Set and return the exit status.", "`m.f` sets and returns the exit status."),
        ("Given a list of paths, returns the longest.", "`m.f` returns the longest, given a list of paths."),
        ("This class implements semaphore objects.", "`m.f` implements semaphore objects."),
        ("f(x) -> int\nf(x, y) -> int\n\nTry the ``x`` of :func:`~m.g`.  And more.", "`m.f` tries the x of m.g."),
        ("D.f(k[,d]) -> v, remove specified key.  Never fails.", "`m.f` removes specified key."),
        ("D.f() -> a shallow copy of the dictionary", "`m.f` returns a shallow copy of the dictionary."),
        ("f(seconds)\n\nDelay execution for a number\nof seconds.", "`m.f` delays execution for a number of seconds."),
        ("The result is a named tuple of fields.", ""),  # about something else
        ("If the file exists, it is replaced.", ""),
        ("Return " + "very " * 60 + "much.", ""),
        ("f(x)", ""),
        ("", ""),
    ],
)
def test_an_answer_is_the_first_sentence_with_the_name_as_its_subject(docstring, said):
    assert questions.answer("m.f", docstring, is_class=False) == said


def test_names_that_people_ask_for_are_known():
    known = {fact.name for fact in questions.facts()}
    assert 600 < len(known) < 900
    for name in (
        "len print range sorted max zip open isinstance math.gcd math.sqrt random.choice os.path.join os.listdir "
        "str.split str.join list.append dict.get set.add json.loads re.sub itertools.islice functools.lru_cache "
        "collections.Counter pathlib.Path.exists datetime.datetime.now shutil.copyfile time.sleep subprocess.run"
    ).split():
        assert name in known, name


def test_every_fact_is_said_by_the_documentation_of_its_name():
    """The documentation that pydoc finds under the name has the words, endings of verbs aside."""
    for fact in questions.facts():
        # pydoc would take the folder tests/eval for the builtin `eval`.
        documented = getattr(builtins, fact.name, None) or pydoc.locate(fact.name)
        doc = set(re.findall(r"\w+", inspect.getdoc(documented).lower()))
        said = re.findall(r"\w+", fact.sentence.removeprefix(f"`{fact.name}` ").lower())
        own = {"a", "an", "is", "the", "returns", "tells"}
        found = [w in doc or w in own or any(w[:-n] in doc for n in (1, 2)) or w[:-3] + "y" in doc for w in said]
        assert all(found), (fact.sentence, [w for w, ok in zip(said, found, strict=True) if not ok])


def test_answers_are_single_short_sentences():
    for fact in questions.facts():
        assert re.fullmatch(rf"`{re.escape(fact.name)}` [a-z].{{5,180}}\.", fact.sentence), fact.sentence
        assert fact.sentence.isascii() and "``" not in fact.sentence and "  " not in fact.sentence


def test_validation_asks_for_each_fact_once_and_never_as_training_does():
    asked_in_training = {question for question, _ in pairs(TRAIN)}
    asked = pairs(VALIDATION)
    assert asked_in_training.isdisjoint(question for question, _ in asked)
    assert [said for _, said in asked] == [fact.sentence for fact in questions.facts()]
    assert all(fact.name in question for fact, (question, _) in zip(questions.facts(), asked, strict=True))


def test_training_tells_every_fact_in_many_ways():
    ways = {}
    for question, said in pairs(TRAIN):
        ways.setdefault(said, set()).add(question)
    for fact in questions.facts():
        assert len(ways[fact.sentence]) >= 10, fact
        assert all(fact.name in question for question in ways[fact.sentence])
    assert ways.keys() == {fact.sentence for fact in questions.facts()}


def test_the_set_is_the_same_in_another_process_with_another_hash_seed():
    code = "from llama_jax.data import sources as s; print(*(s.fingerprint_of([p]) for p in s.questions.PARTS))"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1 and len(set(prints.pop().split())) == 2
    assert corpus.fingerprint(TRAIN) != corpus.fingerprint(TRAIN[1:])


def test_the_loss_counts_the_answers_and_their_ends_alone():
    tokenizer = byte_tokenizer()
    read = list(documents_from(questions.PARTS[:1]))
    assert read == TRAIN
    for dialog in read[:40]:
        ids, targets = encode(dialog, tokenizer, max_length=None)
        learned = [i for i, target in zip(ids, targets, strict=True) if target]
        answers = [tokenizer.encode(said) + [tokenizer.eot_id] for _, said in pairs([dialog])]
        assert learned == [i for answer in answers for i in answer]


def test_a_part_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(FileNotFoundError, match=r"stdlib:chat-train, stdlib:chat-validation"):
        documents_from(["stdlib:chat"])


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_samples_while_training_are_what_infer_says_to_the_same_question(kind):
    config, tokenizer = configs.size("tiny"), byte_tokenizer()
    params = init_params(config, jax.random.key(0))
    values = default_dict("tiny") | {"output": "x", "seed": 3}
    values["data"] |= {"train": ("a.txt",)}
    values["train"] |= {"compute_dtype": "float32"}
    values["log"] |= {"sample_as": kind, "sample_prompts": ("hi", "What?"), "sample_tokens": 8}
    mesh = parallel.make_mesh({"fsdp": 1, "data": -1})
    texts = TrainingSampler()(RunConfig.from_dict(values), params, tokenizer, mesh)
    llama, how = Llama(config, params, tokenizer), {"max_new_tokens": 8, "top_p": 0.9}
    how["temperature"] = 0.7 if kind == "text" else 0
    if kind == "text":
        expected = [llama.generate(p, seed=3 + i, **how).text for i, p in enumerate(("hi", "What?"))]
    else:
        dialogs = [[{"role": "user", "content": p}] for p in ("hi", "What?")]
        expected = [llama.chat(dialog, seed=3 + i, **how).text for i, dialog in enumerate(dialogs)]
    assert texts == expected


def test_a_base_that_was_not_trained_yet_is_named_with_the_command_that_trains_it(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    command = [sys.executable, str(ROOT / "train.py"), "--config", "configs/sft_quickstart.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "init_from='runs/quickstart'" in done.stderr
    assert "python train.py --config quickstart" in done.stderr
    assert not (tmp_path / "runs").exists()
