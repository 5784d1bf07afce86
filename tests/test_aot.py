"""The 8B programs compile for a TPU that is not here, and fit it by the compiler's own account.

libtpu compiles without a chip: `pip install libtpu==0.0.42.1` anywhere, and name its libtpu.so in TPU_LIBRARY_PATH
(kept out of requirements: an environment that has it looks for a TPU at every start).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_GIB = 1 << 30
_PROGRAM = Path(__file__).parent / "aot_compile.py"


def _library() -> str | None:
    path = os.environ.get("TPU_LIBRARY_PATH", "")
    if Path(path).is_file():
        return path
    spec = importlib.util.find_spec("libtpu")
    return None if spec is None else str(Path(spec.origin).parent / "libtpu.so")


def _compiled(what: str) -> dict:
    library = _library()
    if library is None:
        pytest.skip("libtpu is not installed: pip install libtpu==0.0.42.1, or set TPU_LIBRARY_PATH to a libtpu.so")
    environment = os.environ | {
        "PYTHONPATH": str(_PROGRAM.parents[1]),
        "TPU_LIBRARY_PATH": library,
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, _PROGRAM, what], env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_8b_training_step_compiles_for_eight_v6e_chips_and_fits():
    found = _compiled("train")
    assert found["devices"] == 8
    # At least the float32 weights and moments and gradients of an eighth of the model. HBM has 31.25 GiB; 19.2 it was.
    assert 8_030_261_248 * 12 / 8 < found["peak_bytes"] < 20 * _GIB, found
    assert found["kernels"] == 3  # splash forward, again where the layer is recomputed, and backward


@pytest.mark.slow
def test_the_8b_training_step_on_rows_of_128k_tokens_compiles_for_32_v5p_chips_and_fits():
    found = _compiled("train_long")
    assert found["devices"] == 32
    # The hidden states that 32 layers keep of a row are 32 GiB, the same on all 8 chips of a tensor axis.
    assert 8_030_261_248 * 12 / 32 < found["peak_bytes"] < 60 * _GIB, found
    assert found["kernels"] == 4  # at this length the backward pass is two


@pytest.mark.slow
def test_the_8b_decode_step_compiles_for_eight_v5e_chips_and_fits():
    found = _compiled("decode")
    assert found["devices"] == 8
    # At least the bfloat16 weights of an eighth of the model and its cache, and within 15.75 GiB of HBM.
    assert 8_030_261_248 * 2 / 8 + found["cache_bytes"] / 8 < found["peak_bytes"] < 15.75 * _GIB, found
    assert found["aliased_bytes"] >= found["cache_bytes"] / 8, "the donated cache is not updated in place"
