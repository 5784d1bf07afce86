"""The floors of docs/architecture/index.md#floors: imports go down only, and files stay small enough to read."""

import ast
import graphlib
import importlib.util
import shlex
from pathlib import Path

import ml_collections
import pytest

from helpers.paths import ROOT, dotted
from llama_jax.cli.run_flags import parse_run
from llama_jax.run_config import RunConfig

PACKAGE = ROOT / "llama_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "configs").glob("*.py"))]

# The floors of docs/architecture/index.md#floors. The first entry that matches a module's dotted name applies.
FLOORS = {
    "llama_jax.choices": 0,
    "llama_jax.errors": 0,
    "llama_jax.files": 0,
    "llama_jax.gguf_header": 0,
    "llama_jax.phases": 0,
    "llama_jax.manifest": 0,
    "llama_jax.progress": 0,
    "llama_jax.storage": 0,
    "llama_jax.stored_run": 0,
    "llama_jax.peer_keys": 0,
    "llama_jax.peer_arguments": 0,
    "llama_jax.remote_files": 0,
    "llama_jax.sampling_params": 0,
    "llama_jax.config": 0,
    "llama_jax.run_keys": 0,
    "llama_jax.run_checks": 0,
    "llama_jax.run_shape": 0,
    "llama_jax.run_config": 0,
    "llama_jax.parallel": 1,
    "llama_jax.compilation_cache": 1,
    "llama_jax.ops": 2,
    "llama_jax.cache": 2,
    "llama_jax.params": 3,
    "llama_jax.model": 3,
    "llama_jax.weights": 4,
    "llama_jax.checkpoint": 4,
    "llama_jax.hub": 4,
    "llama_jax.text": 4,
    "llama_jax.data": 4,
    "llama_jax.train": 5,
    "llama_jax.infer": 5,
    "llama_jax.plan": 5,
    "llama_jax.eval": 5,
    "llama_jax.serve": 5,
    "llama_jax.cli": 6,
    "llama_jax.__main__": 6,
}
# On floor 5: the packages that each package may import.
NEIGHBOURS = {"train": {"infer"}, "eval": {"infer"}, "serve": {"infer"}, "plan": {"train", "infer"}}
# On floor 4: packages that may import only some of the others.
SEES = {"text": set(), "data": {"text", "hub"}}
MESH_AXES = {"data", "fsdp", "stage", "context", "tensor"}


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, also inside functions. `from a import b` gives both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(name: str) -> int | None:
    near = [known for known in FLOORS if name == known or name.startswith(known + ".")]
    return FLOORS[near[0]] if near else None


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_every_module_is_on_a_floor():
    assert [dotted(p) for p in MODULES if floor(dotted(p)) is None] == ["llama_jax"]  # the public interface


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down_only(path):
    here = floor(dotted(path))
    if here is None:
        return
    for name in imports(path):
        there = floor(name)
        assert there is None or there <= here, f"{dotted(path)} (floor {here}) imports {name} (floor {there})"


@pytest.mark.parametrize("path", [p for p in MODULES if floor(dotted(p)) == 5], ids=dotted)
def test_neighbours_on_the_fifth_floor_do_not_import_each_other(path):
    mine = dotted(path).split(".")[1]
    seen = {name.split(".")[1] for name in imports(path) if floor(name) == 5} - {mine}
    assert seen <= NEIGHBOURS.get(mine, set())


@pytest.mark.parametrize("package", SEES)
def test_text_sees_nothing_beside_it_and_data_only_text_and_the_hub(package):
    for path in MODULES:
        if within(dotted(path), f"llama_jax.{package}"):
            seen = {name.split(".")[1] for name in imports(path) if floor(name) == 4} - {package}
            assert seen <= SEES[package], dotted(path)


@pytest.mark.parametrize("package", SEES)
def test_text_and_data_have_no_import_cycle(package):
    """Imports inside functions and for types count too. A package's __init__ is exempt: it imports from all."""
    modules = {dotted(p): p for p in MODULES if within(dotted(p), f"llama_jax.{package}") and p.name != "__init__.py"}
    graph = {name: imports(path) & modules.keys() for name, path in modules.items()}
    assert len(graph) > 8
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_text_and_floor_zero_import_no_jax():
    for path in MODULES:
        if within(dotted(path), "llama_jax.text") or floor(dotted(path)) == 0:
            assert not [n for n in imports(path) if within(n, "jax")], dotted(path)


def test_only_the_model_imports_flax():
    assert [dotted(p) for p in [*MODULES, *SCRIPTS] if any(within(n, "flax") for n in imports(p))] == [
        "llama_jax.model"
    ]


def test_only_cli_scripts_and_configs_import_ml_collections():
    seen = {dotted(p) for p in MODULES if any(within(n, "ml_collections") for n in imports(p))}
    assert seen == {"llama_jax.cli.run_flags"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_files_can_be_read_in_one_sitting(path):
    limit = 400 if dotted(path) == "llama_jax.model" else 500
    assert len(path.read_text().splitlines()) < limit


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """Lines of a function without its docstring, comments and empty lines."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = range(first.lineno, first.end_lineno + 1) if documented else ()
    lines = (source[n - 1].strip() for n in range(function.lineno, function.end_lineno + 1) if n not in docstring)
    return sum(bool(line) and not line.startswith("#") for line in lines)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_functions_fit_on_a_screen(path):
    text = path.read_text()
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [f.name for f in functions if code_lines(f, text.splitlines()) >= 50] == []


def test_entry_points_are_short():
    for path in ROOT.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path.name


def mesh_axis_literals(path: Path) -> list[str]:
    """The string literals that name a mesh axis. `data` does not count, since it is an ordinary word too."""
    tree = ast.parse(path.read_text())
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    axes = {s for s in strings if s in MESH_AXES}
    return sorted(axes - {"data"})


def test_mesh_axes_are_named_only_in_parallel_and_the_config():
    free = ("llama_jax.parallel", "llama_jax.run_keys", "llama_jax.run_checks", "llama_jax.run_config", "llama_jax.cli")
    for path in MODULES:
        if not any(within(dotted(path), name) for name in free):
            assert mesh_axis_literals(path) == [], dotted(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_recipe_is_a_run_and_opens_with_its_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert isinstance(config, ml_collections.ConfigDict)
    run = RunConfig.from_dict(config.to_dict())
    assert run.output == f"runs/{path.stem}"

    lines = [line.strip() for line in module.__doc__.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("python train.py")]
    runs = {argv[2]: parse_run(argv[1:])[0] for argv in commands}  # every flag is a key, every value allowed
    assert runs[f"configs/{path.name}"].output == run.output
