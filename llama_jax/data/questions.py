"""The quickstart chat set: "What does `math.gcd` do?", answered from the docstrings of the standard library.

The facts are first sentences of the documentation of well-known functions, classes and methods, each asked for in many
phrasings, alone and within a dialog. Validation asks for the same facts in phrasings that training does not
have: it measures whether a question is understood, not knowledge of facts that were never learned. The set depends on
the version of Python. Tried and left out: the answer "I do not know that name." to names that do not exist. A model of
2.4 million weights recognized half of them, and gave that answer for known names in new phrasings.
"""

import builtins
import functools
import importlib
import inspect
import random
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llama_jax.data.corpus import is_replaced
from llama_jax.data.records import Dialog

PARTS = ("stdlib:chat-train", "stdlib:chat-validation")

# Names that the model learns: public functions and classes of these modules, methods of these classes, and a few.
_MODULES = (
    "builtins math statistics random os.path shutil glob fnmatch tempfile itertools functools collections heapq "
    "bisect copy re json csv string textwrap time datetime calendar base64 gzip struct urllib.parse subprocess "
    "threading queue contextlib secrets html shlex"
).split()
_CLASSES = (
    "str list dict set int float tuple pathlib.Path datetime.datetime collections.Counter collections.deque "
    "queue.Queue threading.Thread subprocess.Popen"
).split()
_CHOSEN = (
    "os.access os.chdir os.chmod os.cpu_count os.getcwd os.getenv os.getlogin os.getpid os.kill os.link os.listdir "
    "os.mkdir os.open os.pipe os.remove os.rename os.replace os.rmdir os.scandir os.stat os.symlink os.system "
    "os.unlink os.urandom os.utime os.walk sys.exit sys.getrefcount sys.getsizeof sys.intern sys.setrecursionlimit "
    "operator.attrgetter operator.itemgetter pathlib.Path ast.literal_eval ast.parse inspect.getdoc "
    "inspect.getsource inspect.signature difflib.get_close_matches pprint.pprint uuid.uuid1 uuid.uuid4"
).split()

# Many, so that the answer comes to hang on the name alone: trained on a dozen, the model was right 99 times of 100 in
# those, and 25 times in "What is the purpose of math.gcd?", which was new.
_ASKED = (
    "What does {} do?",
    "what does {} do",
    "What does {} do in Python?",
    "What does the function {} do?",
    "What is {}?",
    "What is {} for?",
    "What is {} used for?",
    "what is {} good for?",
    "What happens when I call {}?",
    "What do I get from {}?",
    "What can I do with {}?",
    "What will {} do for me?",
    "What did {} do?",
    "Explain {}.",
    "Explain {} to me.",
    "Please explain {}.",
    "Please explain what {} is for.",
    "Can you explain {}?",
    "Can you explain what {} does?",
    "Can you tell me about {}?",
    "Would you describe {}?",
    "Could you describe {}?",
    "Could you help me with {}?",
    "Describe {}.",
    "Describe what {} does.",
    "Tell me about {}.",
    "Tell me what {} is.",
    "tell me about {} please",
    "Say what {} does.",
    "Show me what {} does.",
    "Do you know {}?",
    "Do you know what {} is for?",
    "How would you describe {}?",
    "When do I need {}?",
    "Why would I use {}?",
    "I found {} in a program. What is that?",
    "I see {} here. What does it do?",
    "I do not understand {}.",
    "I want to know about {}.",
    "Help me with {}.",
    "{}?",
    "{}",
    "{}: what is it?",
    "Is {} useful?",
)
_ASKED_NEXT = ("And {}?", "What about {}?", "and what does {} do?")  # once a dialog is under way
_HELD_OUT = ("What is the purpose of {}?", "Could you tell me what {} does?")
_WRITTEN = ("`{}`", "{}", "{}()")
_NONSENSE = 0.35  # of all questions are random words around a name, so that new words do not hide it
_TIMES = 16  # that each fact is asked for
_TURNS = (1, 1, 2, 3)  # questions in a dialog, by turns

_LENGTH = (24, 190)  # characters of an answer


@dataclass(frozen=True)
class Fact:
    """A name as people write it, and a sentence about its purpose that begins with the name."""

    name: str
    sentence: str


def dialogs(part: str) -> list[Dialog]:
    """The dialogs of one of PARTS, in a fixed order (built once a process, in about a second)."""
    return list((_train if part == PARTS[0] else _validation)())


@functools.cache
def facts() -> tuple[Fact, ...]:
    """All facts of the quickstart chat set, one for each name, in the order of the modules."""
    found: dict[str, Fact] = {}
    for name, thing in _things(_MODULES, _CLASSES, _CHOSEN):
        sentence = answer(name, inspect.getdoc(thing) or "", is_class=isinstance(thing, type))
        if sentence and name not in found:
            found[name] = Fact(name, sentence)
    return tuple(found.values())


# ---- facts -------------------------------------------------------------------------------------------------


def _things(
    modules: Sequence[str], classes: Sequence[str] = (), chosen: Sequence[str] = ()
) -> Iterator[tuple[str, Callable]]:
    """Yields (name, object) for public functions, classes and methods, without exceptions.

    Args:
        modules: modules whose public functions and classes are taken.
        classes: dotted names of classes whose public methods are taken.
        chosen: dotted names of single objects, which are skipped where the system lacks them.
    """
    for module in modules:
        owner = importlib.import_module(module)
        own = [(key, thing) for key, thing in _public(owner) if not is_replaced(module, key)]
        if owner is builtins:  # to which notebooks and the interpreter's prompt add theirs, all written in Python
            own = [(key, thing) for key, thing in own if isinstance(thing, type | types.BuiltinFunctionType)]
        prefix = "" if owner is builtins else f"{module}."
        yield from ((prefix + key, thing) for key, thing in own)
    for name in classes:
        module, _, key = name.rpartition(".")
        owner = getattr(importlib.import_module(module or "builtins"), key)
        # Some versions keep part of a class in a base of the same package that has no public name (pathlib in 3.13).
        home, package = importlib.import_module(module or "builtins"), owner.__module__.partition(".")[0]
        hidden = [b for b in owner.__mro__[1:] if b.__module__.partition(".")[0] == package]
        hidden = [b for b in hidden if getattr(home, b.__name__, None) is not b]
        keys = {key for part in (owner, *hidden) for key, _ in _public(part)}
        yield from ((f"{name}.{key}", getattr(owner, key)) for key in sorted(keys))
    for name in chosen:
        module, _, key = name.rpartition(".")
        if (thing := getattr(importlib.import_module(module), key, None)) is not None:  # not every system has all
            yield name, thing


def _public(owner: object) -> list[tuple[str, Callable]]:
    keys = sorted(getattr(owner, "__all__", None) or vars(owner))
    found = [(key, getattr(owner, key, None)) for key in keys if not key.startswith("_")]
    return [(k, v) for k, v in found if callable(v) and not (isinstance(v, type) and issubclass(v, BaseException))]


# Imperatives that open a docstring. Other words open a sentence of another kind.
_VERBS = frozenset(
    "accept acquire add adjust allow append apply approximate arrange batch block build calculate call cancel change "
    "check choose clear close collapse combine compare compile compress compute concatenate configure construct "
    "convert copy count create decode decompress decorate deduce define delay delete describe deserialize determine "
    "disable display divide do drop duplicate emulate enable encode end ensure escape estimate evaluate execute "
    "exit expand extend extract fill find flush force format generate get give group handle implement indicate "
    "initialize insert interact interpolate invert iterate join keep kill limit link list load look make mark match "
    "merge modify move normalize open pack pad parse partition perform pop pretty-print print provide push put read "
    "receive register release remove rename repeat replace report represent reset resolve restore retrieve return "
    "reverse rotate round run scan schedule search seed send serialize set shuffle sniff sort spawn split start "
    "stop store strip substitute swap switch tell terminate test touch transform translate truncate try unescape "
    "unlink unpack unregister unserialize update use wait wrap write yield".split()
)
# How other sentences go on from the name of a function.
_OTHERWISE = {
    "whether": "tells whether",
    "true": "returns true",
    "same": "is the same",
    "like": "is like",
    "equivalent": "is equivalent",
}
_SECOND_VERB = re.compile(
    r"(\band|\bbut|\bor|\bthen|\balso|,) (add|close|compute|keep|pop|read|replace|return|write|yield) "
    r"(?=(?:a|all|an|and|counts|it|its|None|plus|the|to)\b|' ')"
)
_FINITE = re.compile(r"\b(?:are|can|has|is|may|must)\b")  # then the sentence is about something else
_VALUES = frozenset("complementary difference error gamma greatest least natural number slope sum".split())
_NO_NOUN = frozenset(
    "all also as at by don't for from given if in it is on one see these this to when with without you".split()
)


def answer(name: str, docstring: str, *, is_class: bool) -> str:
    """The first short sentence of a docstring that can have the name as its subject, or "" where there is none.

    "Return the sine of x." becomes "`math.sin` returns the sine of x.", "Greatest Common Divisor." "`math.gcd` returns
    the greatest common divisor.", and "Context manager to ..." "... is a context manager to ...".
    """
    for sentence in _sentences(docstring):
        predicate = _predicate(sentence, name.rpartition(".")[2], is_class)
        said = f"`{name}` {predicate}"
        short = _LENGTH[0] <= len(said) <= _LENGTH[1]
        whole = said.count("(") <= said.count(")") and said.isascii()  # else a full stop within brackets ended it
        if predicate and short and whole and not re.search(r">>>|->|::|<\w|__|:\.$|def | = ", said):
            return said
    return ""


_SIGNATURE = re.compile(r"[\w.]+ ?\([^)]*\)+(?: *-+>? +(?P<text>.*)|$)")


def _sentences(docstring: str) -> Iterator[str]:
    """The first sentence of each of the first paragraphs without markup or line ends, then that of a signature."""
    said = ""
    for paragraph in docstring.split("\n\n")[:4]:
        lines = paragraph.split("\n")
        while lines and (match := _SIGNATURE.match(lines[0].strip())):
            said = said or match["text"] or ""
            del lines[0]
        text = re.sub(r":\w+:`~?|`", "", " ".join(line.strip() for line in lines))
        if text[:1].isupper():
            yield _first_of(text)
    said = _first_of(re.sub(r"^(?:None|\w)[.,] +|^\w+ -- ", "", said))  # "D.pop(k[,d]) -> v, remove specified key ..."
    if " " in said:
        yield said[0].upper() + said[1:] if _does(said.split()[0].lower()) else f"Return {said}"


def _first_of(text: str) -> str:
    sentence = re.split(r"(?<=[.!?])(?:  +| (?=[A-Z]|[\w.]+\())", text)[0]
    return " ".join(sentence.split()).rstrip(".") + "."


def _predicate(sentence: str, name: str, is_class: bool) -> str:
    """Turns a sentence of documentation into a predicate about the name, or "" if its first words do not allow it.

    "Return the sine." becomes "returns the sine.", and "Greatest Common Divisor." becomes "returns the greatest common
    divisor."
    """
    # "This class implements semaphore objects.", "A ChainMap groups multiple dicts ..."
    itself = rf"(?:Th(?:is|e) (?:\w+ )?(?:class|function|method|object|decorator)|(?:An? )?{name}) (?=[a-z]+s )"
    if match := re.match(itself, sentence):
        return sentence[match.end() :]
    if match := re.match(r"((?:Given|With|For) .+?), returns? ", sentence):  # "Given a list, return ..."
        return f"returns {sentence[match.end() : -1]}, {match[1][0].lower()}{match[1][1:]}."
    first, _, rest = sentence.partition(" ")
    word = first.lower()
    if word.endswith("ly"):
        after, _, rest = rest.partition(" ")
        return f"{word} {_does(after)} {rest}" if _does(after) and rest else ""
    if not rest:
        return ""
    if verb := _does(word):
        if match := re.match(r"(and|or) ([a-z]+) ", rest):  # "Set and return the exit status."
            rest = f"{match[1]} {_does(match[2]) or match[2]} {rest[match.end() :]}"
        return f"{verb} {_SECOND_VERB.sub(lambda found: f'{found[1]} {_does(found[2])} ', rest)}"
    if word in _OTHERWISE and not is_class:
        return f"{_OTHERWISE[word]} {rest}"
    if word in _NO_NOUN or not re.fullmatch(r"[A-Z][a-z-]*|\d-tuple", first) or _FINITE.search(rest):
        return ""
    if sentence.istitle():
        rest = rest.lower()
    if word in _VALUES and not is_class:
        return f"returns the {word} {rest}"
    article = "" if word in ("a", "an", "the") else "an " if word[0] in "aeio" else "a "
    return f"is {article}{word} {rest}"


def _does(verb: str) -> str:
    """The third person of a verb in _VERBS ("return" and "returns" give "returns"), or "" for any other word."""
    if verb not in _VERBS:
        stems = (verb[:-1], verb[:-2], verb[:-3] + "y")
        return verb if verb.endswith("s") and _VERBS.intersection(stems) else ""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "o")) else "s")


# ---- dialogs -----------------------------------------------------------------------------------------------


@functools.cache
def _validation() -> tuple[Dialog, ...]:
    # Two phrasings and three ways of writing: six kinds of question, by turns.
    asked = [_HELD_OUT[i % 2].format(_WRITTEN[i % 3].format(fact.name)) for i, fact in enumerate(facts())]
    return tuple(
        _dialog(PARTS[1], i, [(question, fact.sentence)])
        for i, (question, fact) in enumerate(zip(asked, facts(), strict=True))
    )


@functools.cache
def _train() -> tuple[Dialog, ...]:
    draw = random.Random(1)
    said = {word for fact in facts() for word in re.findall(r"\b[a-z]+\b", fact.sentence.split("` ")[1])}
    words = sorted(said - {fact.name for fact in facts()})
    pairs = [(asked, fact) for fact in facts() for asked in draw.sample(_ASKED, _TIMES)]
    draw.shuffle(pairs)
    made: list[Dialog] = []
    while pairs:
        turns: list[tuple[str, str]] = []
        for _ in range(min(_TURNS[len(made) % len(_TURNS)], len(pairs))):
            asked, fact = pairs.pop()
            if turns and draw.random() < 0.5:
                asked = draw.choice(_ASKED_NEXT)
            if draw.random() < _NONSENSE:
                before, after = draw.choices(words, k=draw.randint(1, 6)), draw.choices(words, k=draw.randint(0, 3))
                asked = " ".join([*before, "{}", *after]) + draw.choice(("?", ".", ""))
                asked = asked[0].upper() + asked[1:]
            turns.append((asked.format(draw.choice(_WRITTEN).format(fact.name)), fact.sentence))
        made.append(_dialog(PARTS[0], len(made), turns))
    return tuple(made)


def _dialog(part: str, i: int, turns: list[tuple[str, str]]) -> Dialog:
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return Dialog(f"{part}/{i}", messages, None)
