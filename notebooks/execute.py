"""Run notebooks from top to bottom in fresh kernels of this Python, and store their outputs, which GitHub then shows.

    python notebooks/execute.py [NAME ...]

It needs `pip install -r requirements-dev.txt`. All notebooks take about a quarter of an hour on two cores. Each runs in
an empty folder, so that it does not depend on other files. tests/project/test_notebooks.py runs them the same way with
LLAMA_JAX_QUICK=1, and stores nothing.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import ipykernel.kernelspec
import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
REPOSITORY = ""  # address of the project, which the first cells of all notebooks name; empty while it has none


def names() -> list[str]:
    """The notebooks, in the order to read them."""
    return ["quickstart", "finetune_lora", "sharding", "tpu_vm_multihost"]


def path_of(name: str) -> Path:
    """The file of a notebook."""
    return FOLDER / f"{name}.ipynb"


def execute(name: str, work: Path, *, environment: Mapping[str, str], timeout: int) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel, and return it with its outputs.

    Args:
        name: name of the notebook.
        work: the folder that it runs in.
        environment: variables of the kernel, in addition to those of this process.
        timeout: seconds for each cell.

    Raises:
        CellExecutionError: a cell failed; the message has the cell and its traceback.
        CellTimeoutError: a cell took too long.
    """
    notebook = nbformat.read(path_of(name), as_version=4)
    kernels = work / ".jupyter"  # a kernel of this Python, whatever kernels the user has
    ipykernel.kernelspec.write_kernel_spec(str(kernels / "kernels" / "python3"))
    inherited = os.environ.get("PYTHONPATH")
    variables = {
        **os.environ,
        "IPYTHONDIR": str(kernels),
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), *([inherited] if inherited else [])]),
        **environment,
    }
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = str(kernels)
    try:
        client = NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(work)}}
        )
        client.execute(env=variables)
    finally:
        if before is None:
            del os.environ["JUPYTER_PATH"]
        else:
            os.environ["JUPYTER_PATH"] = before
    return notebook


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without times and versions, which differ in every run, and with smaller pictures."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        # A text that came in many pieces is one text.
        merged: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            last = merged[-1] if merged else None
            if last is not None and last.output_type == output.output_type == "stream" and last.name == output.name:
                last.text += output.text
            else:
                merged.append(output)
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
        if cell.cell_type == "code":
            cell.outputs = merged
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def _smaller(picture: str) -> str:
    """A PNG in base64 with a palette of 64 colors, which is enough for diagrams and takes about half the bytes."""
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(64).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main(wanted: list[str]) -> None:
    """Run the named notebooks, or all of them, and store their outputs."""
    for name in wanted or names():
        with tempfile.TemporaryDirectory() as work:
            notebook = execute(name, Path(work), environment={}, timeout=3600)
        nbformat.write(tidy(notebook), path_of(name))
        print(f"{path_of(name)}: {path_of(name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
