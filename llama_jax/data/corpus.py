"""The quickstart corpus: the English prose that every Python installation already carries.

Nothing is downloaded and no text is kept in this repository. The words come from the language reference
(`pydoc_data.topics`), from the docstrings and comments of the standard library's sources (parsed, never
imported), and from the docstrings of a few modules written in C. Cleaning keeps sentences and drops the rest:
code, doctests, tables, grammar, markup, licences and repeats. The text therefore depends on the Python
version (and a little on the platform), and so does `fingerprint`.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import re
import sysconfig
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Document:
    """One text, under a name that stays the same from run to run."""

    name: str
    text: str


class NamedText(Protocol):
    """Anything with a name and a text, such as a Document or a dialog."""

    @property
    def name(self) -> str:
        """Name of the text, which is unique within its corpus."""
        ...

    @property
    def text(self) -> str:
        """Text to train on."""
        ...


# A piece is a name and the raw texts found under it, in order; a group is the pieces of one file or topic.
_Piece = tuple[str, list[str]]
_Docstrings = tuple[str, list[str | None]]

_SKIP = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ _vendor _bundled"  # not the library itself
    " lib2to3 encodings pydoc_data turtledemo".split()  # fixtures, tables, the topics again, drawings
)
_COMPILED = (
    "builtins _asyncio _bisect _codecs _collections _contextvars _csv _ctypes _datetime _decimal "
    "_elementtree _functools _hashlib _heapq _io _json _locale _lzma _operator _pickle _queue _random "
    "_signal _socket _sqlite3 _sre _ssl _statistics _string _struct _thread _tracemalloc _warnings "
    "_weakref array atexit binascii cmath errno faulthandler fcntl gc grp itertools marshal math mmap "
    "posix pwd pyexpat resource select sys syslog termios time unicodedata xxsubtype zlib"
).split()
# Functions that a notebook's kernel replaces.
_REPLACED = frozenset({"builtins.input", "faulthandler.enable", "faulthandler.register"})

_MIN_PIECE = 500  # characters: a shorter class or section stays with the text before it
_MIN_DOCUMENT = 40
_MIN_SOURCES = 100  # a standard library with fewer source files than this has been stripped


@functools.cache
def _build() -> tuple[Document, ...]:
    seen: set[str] = set()
    return tuple(document for group in _groups() for document in _gather(group, seen))


def documents() -> list[Document]:
    """Every document of the corpus, in a fixed order (built once a process, in a few seconds).

    Raises FileNotFoundError where this Python carries no library sources or no language reference.
    """
    return list(_build())


def split(docs: Sequence[Document], *, validation_fraction: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Divide documents into (train, validation) by a hash of each name, so a document never changes sides."""
    if not 0 <= validation_fraction <= 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction!r}")
    sides: tuple[list[Document], list[Document]] = ([], [])
    for doc in docs:
        draw = int.from_bytes(hashlib.sha256(doc.name.encode()).digest()[:8], "big") / 2**64
        sides[draw < validation_fraction].append(doc)
    return sides


def fingerprint(docs: Sequence[NamedText]) -> str:
    """SHA-256 (hex) over the names and texts in order: fixed for one build of Python."""
    digest = hashlib.sha256()
    for doc in docs:
        for part in (doc.name.encode(), doc.text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def is_replaced(module: str, name: str) -> bool:
    """True for a function that programs replace. It is left out, or the text would differ in a notebook."""
    return name.endswith("hook") or f"{module}.{name}" in _REPLACED


# Sources of the text.


# Several lines of comment, or one that is a whole sentence.
_COMMENT = re.compile(r"(?m)(?:^[ \t]*#(?![!#]).*\n){2,}|^[ \t]*# [A-Z][a-z]*\b.{30,}\.\n")


def _groups() -> Iterator[list[_Piece]]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = [p for p in sorted(stdlib.rglob("*.py")) if _SKIP.isdisjoint(p.relative_to(stdlib).parts[:-1])]
    if len(sources) < _MIN_SOURCES:
        raise FileNotFoundError(
            f"the quickstart corpus needs the standard library's sources, but {stdlib} holds {len(sources)}"
            " .py files; use a Python that includes its sources (python.org, uv, conda, pyenv or a full"
            " distribution package), or train on your own text files"
        )
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise FileNotFoundError(
            "the quickstart corpus needs pydoc_data.topics, which this Python lacks; install the full"
            " standard library (on Debian: libpython3-stdlib), or train on your own text files"
        ) from error
    yield from (_topic_pieces(name, topics[name]) for name in sorted(topics))
    yield from (_source_pieces(path, path.relative_to(stdlib)) for path in sources)
    yield from (_compiled_pieces(name) for name in _COMPILED)


def _topic_pieces(name: str, text: str) -> list[_Piece]:
    """Cut a topic of the language reference at its underlined headings; a heading opens its section."""
    parts = re.split(r"(?m)^(\S.*)\n[*=~\-]{3,}\n", text.partition("\nRelated help topics:")[0])
    pieces = [(f"topic/{name}", [parts[0]])]
    pieces += [
        (f"topic/{name}/{i}", [f"{parts[i]}.\n\n{parts[i + 1]}"]) for i in range(1, len(parts), 2)
    ]  # the full stop lets the heading read as prose
    return pieces


def _source_pieces(path: Path, relative: Path) -> list[_Piece]:
    """Docstrings and comment blocks of one file: the module and its functions first, then class by class."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    module = "stdlib/" + relative.with_suffix("").as_posix()
    found: list[tuple[int, str, str]] = []  # line, owner, text

    def visit(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{owner}.{child.name}" if isinstance(child, ast.ClassDef) else owner
                if text := ast.get_docstring(child, clean=False):
                    found.append((child.lineno, inner, text))
                if inner != owner:
                    spans.append((child.lineno, child.end_lineno or child.lineno, inner))
                visit(child, inner)
            elif isinstance(child, ast.If | ast.Try | ast.With):
                visit(child, owner)

    spans: list[tuple[int, int, str]] = []
    if text := ast.get_docstring(tree, clean=False):
        found.append((0, module, text))
    visit(tree, module)
    for match in _COMMENT.finditer(source):
        line = source.count("\n", 0, match.start()) + 1
        owner = next((name for first, last, name in reversed(spans) if first <= line <= last), module)
        text = "\n".join(row.strip().lstrip("#").removeprefix(" ") for row in match.group().splitlines())
        found.append((line, owner, text))
    pieces: dict[str, list[str]] = {module: []}
    for _, owner, text in sorted(found, key=lambda item: item[0]):
        pieces.setdefault(owner, []).append(text)
    return list(pieces.items())


def _compiled_pieces(name: str) -> list[_Piece]:
    """Docstrings of a module written in C: itself and its functions, then each of its types."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return []
    pieces: list[_Docstrings] = [(f"compiled/{name}", [module.__doc__])]
    for key, value in sorted(vars(module).items()):
        if getattr(value, "__name__", None) != key or is_replaced(name, key):
            continue  # an alias such as IOError, or not the library's own
        if isinstance(value, types.BuiltinFunctionType):
            pieces[0][1].append(value.__doc__)
        elif isinstance(value, type):
            members = [item for _, item in sorted(vars(value).items())]
            texts = [item.__doc__ for item in members if callable(item) or inspect.isdatadescriptor(item)]
            pieces.append((f"compiled/{name}.{key}", [value.__doc__, *texts]))
    return [(key, [text for text in texts if isinstance(text, str)]) for key, texts in pieces]


def _gather(group: list[_Piece], seen: set[str]) -> Iterator[Document]:
    """Clean a group into documents, without paragraphs that the corpus already has and without very short pieces."""
    name = ""
    kept: list[str] = []
    for piece, texts in group:
        fresh = [paragraph for text in texts for paragraph in prose(text, seen)]
        if kept and sum(map(len, fresh)) >= _MIN_PIECE and sum(map(len, kept)) >= _MIN_PIECE:
            yield Document(name, "\n\n".join(kept))
            name, kept = "", []
        name = name or piece
        kept += fresh
    if len(text := "\n\n".join(kept)) >= _MIN_DOCUMENT:
        yield Document(name, text)


# Cleaning: sentences in, sentences out.

_PUNCTUATION = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "–": "-",
        "—": "-",
        "…": "...",
        "→": "->",
        "\u00a0": " ",
        "\f": "\n",
    }
)
_BULLET = re.compile(r"\s*(?:[-*+o•] +|\(?(?:\d{1,2}|[a-z])[.)] +)(?=\S)")
_DEFINITION = re.compile(r"\s*[\w*.'\"]+(?:, [\w*.'\"]+)*(?: +--? +|: +| *::? *$)(?=\S|$)")
_SIGNATURE = re.compile(
    r"^(?:class |async |static method |def )?[\w.]+ ?\([^()]*(?:\([^()]*\)[^()]*)*\)"
    r"(?: *->? *(?:[\w.]+(?:\[[^\]]*\])?(?: or \w+)?|\([^)]*\)|\[[^\]]*\])(?=[\s.:,]|$))?[.,:]?"
    r"(?: *--? +| *$|(?<=[.:]) +| {2,}(?=[A-Z]))"
)
_MARKUP: list[tuple[re.Pattern[str], Any]] = [  # a pattern, and the text or the function that replaces it
    (re.compile(r":[\w:]+:`~?\.?([^`<]+?)(?: ?<[^>]*>)?`"), r"\1"),  # a role with its target
    (re.compile(r"``([^`]*)``|`([^`'\s][^`']*)[`']_{0,2}"), lambda m: m[1] or m[2]),
    (re.compile(r"(?<![\w*])(\*{1,2})(\w[^*\n]*?)\1(?![\w*])"), r"\2"),
    (re.compile(r"\|(\w+)\|"), r"\1"),
    (re.compile(r" ?\[#?\d*\]_?(?= |$|[.,;:)])"), ""),  # a footnote marker
    (re.compile(r"^:(?:param|arg|keyword|type|raises?) (?:\w+ )?(\w+):"), r"\1:"),
    (re.compile(r"^:(?:return|returns|rtype):"), "Returns"),
    (re.compile(r"^@(?:param|return) ?"), ""),
    (re.compile(r"::$"), ":"),
    (re.compile(r"\s+"), " "),
]
_UNWANTED = re.compile(
    r"https?://|ftp://|www\.|\S@\S+\.\w|copyright|licen[cs]e[ds]?\b|all rights|warrant|hereby|merchantab"
    r"|\bauthors?\b|written by|contributed|\bXXX|TODO|FIXME|pylint|noqa|type: ?ignore|\bsvn|\$Id|>>>"
    r"|::=|->|<-|\(Pdb\)|^\.\. |\.\. \w+::|^Usage:|^Options:",
    re.IGNORECASE,
)
_UNFINISHED = re.compile(r"\b(?:a|and|are|as|by|for|from|in|is|like|of|or|than|that|the|to|via|with)$")
_COMMON = frozenset(
    (
        "a all also an and any are as at be been but by can do does for from get has have if in into is "
        "it its may must no not of on one only or out should so than that the their them then there "
        "these they this to under up used was we when where which will with without would you your"
    ).split()
)


def prose(text: str, seen: set[str]) -> list[str]:
    """The paragraphs of plain English in a docstring, each unwrapped to one line (in a list: a line an item).

    Paragraphs in `seen` are dropped as repeats, and new ones are added to it.
    """
    paragraphs: list[str] = []
    dangling = False  # the last paragraph ends in a colon

    def trim() -> None:
        head = _without_lead_in(paragraphs.pop())
        if head and _is_new(head, seen):
            paragraphs.append(head)

    for block in re.split(r"\n[ \t]*\n", inspect.cleandoc(text.translate(_PUNCTUATION).expandtabs())):
        items = [_sentence(item) for item in _items(block)]
        paragraph = "\n".join(item for item in items if item)
        if paragraph.endswith(":") and not items[-1]:
            paragraph = _without_lead_in(paragraph)
        if dangling and paragraph[:1].islower() and "\n" not in paragraph:
            paragraph = ""  # the tail of a sentence around an example
        if paragraph and _is_new(paragraph, seen):
            if paragraphs and paragraph.startswith("- ") and paragraphs[-1].startswith("- "):
                paragraphs[-1] += "\n" + paragraph
            else:
                paragraphs.append(paragraph)
            dangling = paragraph.endswith(":")
        elif dangling:
            trim()
            dangling = False
    if dangling:
        trim()
    return paragraphs


def _is_new(paragraph: str, seen: set[str]) -> bool:
    """True if a paragraph is not in `seen`, apart from punctuation and spacing. It is added to `seen`."""
    key = re.sub(r"\W+", " ", paragraph).strip().lower()
    new = key not in seen
    seen.add(key)
    return new


def _without_lead_in(paragraph: str) -> str:
    """Drop a last sentence that introduces something no longer there ("For example:")."""
    head, stop, _ = paragraph.rpartition(". ")
    return head + "." if stop and len(head) > _MIN_DOCUMENT else ""


def _items(block: str) -> Iterator[str]:
    """Splits a block: a paragraph is one item; a list gives an item for each bullet, definition or outdent."""
    lines = [line for line in block.split("\n") if line.strip()]
    doctest = next((i for i, line in enumerate(lines) if line.lstrip().startswith((">>>", "..."))), len(lines))
    item: list[str] = []
    first = previous = 0
    new: object
    for line in lines[:doctest]:
        if re.fullmatch(r"\s*\W{3,}", line):  # a ruler
            continue
        indent = len(line) - len(line.lstrip())
        new = indent <= first < previous or _BULLET.match(line)
        if item and _DEFINITION.match(line):
            new = new or _DEFINITION.match(item[0]) or item[-1].rstrip().endswith((".", ":"))
        if item and new:
            yield "\n".join(item)
            item = []
        if not item:
            first = indent
        item.append(line)
        previous = indent
    if item:
        yield "\n".join(item)


def _sentence(item: str) -> str:
    """One item as a clean line, or "" where it is not English prose."""
    lines = item.split("\n")
    while lines and (signature := _SIGNATURE.match(lines[0].strip())):
        lines[0] = lines[0].strip()[signature.end() :]
        if lines[0]:
            break
        del lines[0]
    if len(lines) > 2 and sum(map(len, lines[:-1])) < 38 * (len(lines) - 1):
        return ""  # short lines: a table, a diagram, a listing
    if any(re.search(r"\S {3,}\S", line.strip()) for line in lines):
        return ""  # columns
    bullet = _BULLET.match("\n".join(lines))
    text = " ".join(line.strip() for line in lines)
    text = text[len(bullet[0].strip()) :].strip() if bullet else text
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    text = text.strip(" -")
    words = re.findall(r"[A-Za-z][a-z']*(?:-[a-z]+)*(?![\w(=\[])", text)
    common = sum(word.lower() in _COMMON for word in words)
    code = sum(text.count(mark) for mark in "=<>{}[]\\|/#$%^&*+~`@")
    if (
        len(words) < 4
        or common < max(1, len(words) // 8)
        or code > 0.04 * len(text) + 1
        or not text.isascii()
        or not re.match(r"[A-Za-z\"'(]", text)
        or _UNWANTED.search(text)
        or sum(map(len, words)) < 0.6 * len(text)
    ):
        return ""
    if not re.search(r"[.!?:][\"')]*$", text):
        text = text.rstrip(",;") + (":" if _UNFINISHED.search(text) else ".")
    if not bullet and re.match(r"[a-z]+,? [a-z(]", text):  # a word, not an identifier
        text = text[0].upper() + text[1:]
    return f"- {text}" if bullet else text
