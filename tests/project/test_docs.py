"""The documents: generated pages are current, links and anchors exist, commands parse, and the writing rules hold."""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from helpers.paths import ROOT, dotted

DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.rglob("*.md"))
SOURCES = [
    *sorted(ROOT.glob("*.py")),
    *sorted((ROOT / "llama_jax").rglob("*.py")),
    *sorted((ROOT / "configs").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A page without its fenced blocks, in which # and [ ] are code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# ---- generated pages ----------------------------------------------------------------------------------------


def test_generated_references_are_current():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [name_of(path) for path, text in generate.pages().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python docs/generate.py"


def test_the_reference_of_keys_has_every_key_with_its_meaning():
    from llama_jax.run_config import known_keys

    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.*?) \|$", (DOCS / "reference" / "config.md").read_text(), re.MULTILINE)
    meanings = dict(rows)
    missing = [key for key in known_keys() if not key.startswith("model.rope_scaling.") and not meanings.get(key)]
    assert missing == []


def test_the_row_that_the_data_page_shows_is_the_row_that_packing_makes(tmp_path):
    from llama_jax.data.packing import pack
    from llama_jax.data.store import build_store
    from llama_jax.text.tokenizer import Tokenizer

    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
    tokenizer = Tokenizer.from_ranks(ranks)
    lines = ['{"prompt": "ab", "completion": "c"}', '{"prompt": "d", "completion": "e"}']
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    store = build_store([str(tmp_path / "two.jsonl")], tokenizer, cache_dir=tmp_path, max_length=12)
    row = pack(store, sequence_length=12, loss_on="assistant")[0]

    ids = {"begin": tokenizer.bos_id, "end": tokenizer.eos_id} | {c: tokenizer.encode(c)[0] for c in ("ab", *"cde")}
    text = (DOCS / "architecture" / "data.md").read_text(encoding="utf-8")
    for name, array in row.items():
        cells = re.search(rf"^\| {name} \|(.*)\|$", text, re.MULTILINE)[1].split("|")
        assert [ids[c.strip()] if c.strip() in ids else int(c) for c in cells] == array.tolist(), name


# ---- links, anchors, names ---------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings. A heading with different anchors on GitHub and in mkdocs is an error."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()).strip()
        github, mkdocs = plain.replace(" ", "-"), re.sub(r"[\s-]+", "-", plain)
        assert github == mkdocs, f"{name_of(path)}: {title!r} has two anchors, {github} and {mkdocs}: reword it"
        found.add(github)
    return found


def test_every_link_of_a_page_leads_to_a_file_and_to_an_anchor_in_it():
    wrong = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([\w-]+))?\)", prose(page)):
            if ":" in target:
                continue
            path = (page.parent / target).resolve() if target else page
            if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
                wrong.append(f"{name_of(page)}: {target}#{anchor}")
    assert wrong == []


def test_no_page_has_an_address_to_fill_in():
    assert [page.name for page in PAGES if re.search(r"//\w+\.\w+/(OWNER|your-name)", page.read_text())] == []


def test_every_page_that_is_cited_in_code_or_text_exists_with_its_anchor():
    wrong = []
    for path in [*SOURCES, *PAGES]:
        if path.resolve() == Path(__file__).resolve():
            continue
        for cited, anchor in re.findall(r"\bdocs/([\w/-]+\.md)(?:#([\w-]+))?", path.read_text(encoding="utf-8")):
            page = DOCS / cited
            if cited in ("PAGE.md", "gguf.md"):  # an example, and a page of ggml's repository
                continue
            if not page.is_file() or (anchor and anchor not in anchors(page)):
                wrong.append(f"{name_of(path)}: docs/{cited}#{anchor}")
    assert wrong == []


def test_every_file_that_a_page_names_exists():
    names = r"`((?:llama_jax|configs|benchmarks|tests|docs|notebooks)/[\w/.-]*)`|`((?:train|infer)\.py|\.ci/run)`"
    wrong = []
    for page in PAGES:
        for match in re.finditer(names, prose(page)):
            name = match[1] or match[2]
            if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists():
                wrong.append(f"{name_of(page)}: {name}")
    assert wrong == []


def test_every_test_that_a_page_names_exists():
    tests = {
        node.name
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    wrong = [
        f"{name_of(page)}: {name}"
        for page in PAGES
        for name in re.findall(r"\b(test_\w+)\b(?!\.py)", page.read_text(encoding="utf-8"))
        if name not in tests and name != "test_decode_matches_full_forward"  # an example of how tests are named
    ]
    assert wrong == []


def test_every_page_is_in_the_navigation_of_the_site_once():
    listed = re.findall(r"^\s+- (?:.*: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(pages | {"contributing.md", "changelog.md"})


def test_every_measurement_says_how_it_was_made():
    for page in sorted((DOCS / "measurements").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if page.stem == "index":
            continue
        assert "**Question.**" in text, page.name
        for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
            assert "| Date, commit |" in section, f"{page.name}: {section.splitlines()[0]} has no date and commit"


def test_every_decision_has_its_four_parts():
    for page in sorted((DOCS / "decisions").glob("*.md")):
        if page.stem != "index":
            parts = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert parts == ["Context", "Decision", "Evidence", "What would change our mind"], page.name


# ---- commands ----------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """The command lines of our own programs in a page, from its bash blocks and its inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|llama-jax) [^`]+)`", prose(page))
    lines = [re.sub(r"^(\w+=\S+ )+", "", part.strip()) for line in lines for part in line.split("&&")]
    return [
        line for line in lines if re.match(r"llama-jax |python (-m llama_jax|train\.py|infer\.py|\w+/\w+\.py)", line)
    ]


COMMANDS = [(name_of(page), line) for page in PAGES for line in commands(page)]


class Parsed(Exception):
    """Raised after a command's arguments are parsed, so that the command does not run."""


def parsed(argv: list[str]) -> None:
    """Parses the arguments of our program, beginning with the command's name, without running the command."""
    from llama_jax.cli import commands, convert, infer, parser, run_flags

    parse = parser.Parser.parse

    def stop(self: parser.Parser, arguments: list[str]) -> None:
        raise Parsed(parse(self, arguments))

    if argv[0] == "train":
        run_flags.parse_run(argv[1:])
    elif argv[:2] == ["inspect", "data"]:
        run_flags.parse_run_flags(argv[2:], command="inspect data")
    elif argv[0] in ("infer", "convert"):
        (infer if argv[0] == "infer" else convert).parse(argv[1:])
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(parser.Parser, "parse", stop)
            commands.main(argv)


@pytest.mark.parametrize("page, line", COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_every_command_of_a_page_parses(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = shlex.split(line, comments=True)
    argv = argv[: argv.index(">")] if ">" in argv else argv
    if argv[:3] == ["python", "-m", "llama_jax"]:
        argv = argv[3:]
    elif argv[0] == "python":
        assert (ROOT / argv[1]).is_file()
        if argv[1] not in ("train.py", "infer.py"):
            return
        argv = [argv[1].removesuffix(".py"), *argv[2:]]
    else:
        argv = argv[1:]
    if {"FILE", "COMMAND", "--help"} & set(argv) or not any(re.search(r"[^a-z_]", arg) for arg in argv):
        return  # not a complete command: it names a program, or has placeholders
    parsed(argv)


def test_pages_have_commands_that_are_parsed():
    assert len(COMMANDS) > 40


def test_every_import_in_the_python_of_a_page_works():
    wrong = []
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("llama_jax"):
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        path = f"{node.module}.{alias.name}"
                        if not hasattr(module, alias.name) and importlib.util.find_spec(path) is None:
                            wrong.append(f"{name_of(page)}: {path}")
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "llama_jax"
                ):
                    if not hasattr(importlib.import_module("llama_jax"), node.attr):
                        wrong.append(f"{name_of(page)}: llama_jax.{node.attr}")
    assert wrong == []


def test_the_first_page_leads_to_what_a_newcomer_asks_in_one_click():
    links = set(re.findall(r"\]\(([^)]+)\)", prose(DOCS / "index.md")))
    assert links >= {
        "architecture/add-a-weight-format.md",
        "architecture/add-an-objective.md",
        "architecture/add-an-attention-backend.md",
        "architecture/index.md#a-training-step",
        "architecture/invariants.md",
    }


# ---- the README --------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_its_first_screen_loads_chats_and_trains():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:30])
    assert all(word in first for word in ("llama_jax.load(", ".chat(", "python train.py --config"))


def test_the_two_commands_of_the_readme_are_these():
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert "pip install -r requirements.txt && python train.py --config configs/quickstart.py\n" in blocks
    assert "pip install -r requirements-dev.txt && pytest\n" in blocks


# ---- how we write (CONTRIBUTING.md) ------------------------------------------------------------------------

MODULES = [*sorted((ROOT / "llama_jax").rglob("*.py")), *sorted((ROOT / "configs").glob("*.py"))]
OPENINGS = ("What", "Of", "Where", "Whether", "Which", "How", "Whatever")


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Every docstring of a file with the line where its module, class or function begins."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [(getattr(node, "lineno", 1), doc) for node in nodes if (doc := ast.get_docstring(node))]


def broken_rules(doc: str) -> list[str]:
    """The writing rules that a docstring breaks, among those that can be checked automatically."""
    broken = []
    if re.match(rf"({'|'.join(OPENINGS)})\b", doc):
        broken.append(f"opens with {doc.split()[0]!r}: name the thing first")
    lines = [line.strip() for line in doc.splitlines() if re.match(r"\s+\w+: of ", line)]
    return broken + [f"{line!r}: an attribute line stands alone" for line in lines]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_docstrings_name_their_subject_first(path):
    assert [f"line {line}: {rule}" for line, doc in docstrings(path) for rule in broken_rules(doc)] == []


def test_the_rules_see_what_they_forbid():
    assert broken_rules("What x is.") and broken_rules("How ids are made.") and broken_rules("Of x, the rest.")
    assert broken_rules("A thing.\n\nAttributes:\n    dtype: of activations.")
    assert broken_rules("Whatsoever is not a word of ours.\n\nAttributes:\n    dtype: dtype of activations.") == []
