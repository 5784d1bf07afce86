"""The notebooks run from top to bottom in a new kernel, and their stored outputs are ready for publication."""

import os
import re
import subprocess
import sys

import matplotlib
import nbclient
import nbformat
import pytest

from helpers.paths import ROOT
from llama_jax.data.sources import fingerprint_of

sys.path.insert(0, str(ROOT / "notebooks"))
import execute

NAMES = execute.names()
PATHS = re.compile(r"/tmp/|/home/(?!runner)|/root/|/Users/|/private/|site-packages|[A-Z]:\\\\")
MOST_BYTES = 300_000  # largest notebook file; GitHub shows larger ones slowly or not at all


def cells(name, kind):
    return [cell for cell in nbformat.read(execute.path_of(name), as_version=4).cells if cell.cell_type == kind]


def shown(cell):
    """All text in the stored outputs of a cell."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (str(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/"))


def missing_pictures(code):
    """The sources of cells that draw but have no picture. If a library changes the backend, drawing fails silently."""
    draws = [cell for cell in code if "plt.subplots" in cell.source or "Image(" in cell.source]
    assert draws
    return [c.source for c in draws if not any("image/png" in output.get("data", {}) for output in c.outputs)]


def test_every_notebook_is_listed():
    assert sorted(NAMES) == sorted(path.stem for path in execute.FOLDER.glob("*.ipynb"))


def test_the_quickstarts_texts_are_in_a_kernel_what_they_are_outside(tmp_path):
    source = "import llama_jax.data.sources as s; print(s.fingerprint_of(['stdlib:train', 'stdlib:chat-train']))"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert notebook.cells[0].outputs[-1].text.strip() == fingerprint_of(["stdlib:train", "stdlib:chat-train"])


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow) if "multihost" in name or "lora" in name else name


@pytest.mark.parametrize("name", map(slow, NAMES))
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path):
    environment = {
        "LLAMA_JAX_QUICK": "1",
        "JAX_PLATFORMS": "cpu",
        "HOME": str(tmp_path),  # ~/.cache
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # otherwise matplotlib rebuilds its list of fonts
    }
    notebook = execute.execute(name, tmp_path, environment=environment, timeout=300)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "with small settings" in "".join(shown(code[0]))
    assert not missing_pictures(code)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_has_no_placeholder(name):
    notebook = nbformat.read(execute.path_of(name), as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].source.startswith("# ")
    assert not re.search(r"OWNER/llama_jax|your-name", execute.path_of(name).read_text())


def test_all_first_cells_are_the_same_and_name_the_repository():
    (setup,) = {cells(name, "code")[0].source for name in NAMES}
    assert f'REPOSITORY = "{execute.REPOSITORY}"' in setup
    for name in NAMES:  # the address is nowhere else
        for cell in nbformat.read(execute.path_of(name), as_version=4).cells[1:]:
            assert not re.findall(r"github\.com/[^/]+/llama_jax", cell.source)


def test_the_first_cell_does_nothing_where_llama_jax_imports(monkeypatch, capsys):
    def forbidden(*_, **__):
        raise AssertionError("it installs")

    monkeypatch.setattr("subprocess.run", forbidden)
    monkeypatch.delenv("LLAMA_JAX_QUICK", raising=False)
    path, names = list(sys.path), {}
    exec(cells(NAMES[0], "code")[0].source, names)
    assert sys.path == path and names["ROOT"] == ROOT and names["QUICK"] is False
    assert capsys.readouterr().out.startswith("llama_jax ")


def test_the_first_cell_fetches_the_project_and_the_right_jax_where_it_is_not_there(tmp_path):
    """The setup cell's commands, recorded instead of run: with a GPU, without one, and after a restart."""
    place = tmp_path / "work"
    place.mkdir()
    setup, address = cells(NAMES[0], "code")[0].source, "https://example.org/llama_jax"
    (place / "setup.py").write_text(setup.replace('REPOSITORY = ""', f'REPOSITORY = "{address}"'))
    driver = f"""
import pathlib, shutil, subprocess, sys
sys.path[:] = ["", *(p for p in sys.path if pathlib.Path(p).resolve() != pathlib.Path({str(ROOT)!r}))]
gpu = sys.argv[1] == "gpu"
shutil.which = lambda name: "/bin/" + name if gpu else None
def run(command, check):
    print(*command)
    if command[0] == "git":
        package = pathlib.Path(command[-1]) / "llama_jax"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("__version__ = '9'")
subprocess.run = run
exec(pathlib.Path("setup.py").read_text())
"""

    def go(kind):
        command = [sys.executable, "-I", "-c", driver, kind]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    (jax,) = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("jax>"))
    clone, install, said = go("gpu")
    assert clone == f"git clone --quiet --depth=1 {address} {place / 'llama_jax'}"
    assert install.endswith(f" -r {place / 'llama_jax' / 'requirements.txt'} {jax.replace('jax', 'jax[cuda12]', 1)}")
    assert said == "llama_jax 9"
    assert go("gpu") == ["llama_jax 9"]  # after a restart, the clone exists already


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_one_whole_run_without_errors_and_machine_paths(name):
    assert os.path.getsize(execute.path_of(name)) < MOST_BYTES
    code = cells(name, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not [output for output in cell.outputs if output.output_type == "error"]
        for text in (cell.source, *shown(cell)):
            assert not PATHS.search(text), PATHS.search(text)
    assert "small settings" not in "".join(shown(code[0]))
    assert not missing_pictures(code)
    for cell in cells(name, "markdown"):
        for link in re.findall(r"\]\(([^)#]+)\)", cell.source):
            assert link.startswith("https://") or (execute.FOLDER / link).exists(), link
