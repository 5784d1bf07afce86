"""The CUDA kernels, emulated on a CPU, against XLA; and where they are used."""

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.cuda import emulated
from helpers.numbers import gap
from llama_jax import cache as caches
from llama_jax import model, parallel, params
from llama_jax.config import SIZES
from llama_jax.ops import attention, gpu, quant, rope
from llama_jax.ops.gpu import build, check, decode, products, verdict
from llama_jax.ops.norm import rms_norm

EPS = 1e-5
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to emulate the kernels with")
ROUNDING = {jnp.bfloat16: 2**-7, jnp.float16: 2**-10}  # the last place of the largest result


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weights(bits, dtype, *shapes):
    """Weights of one kind, and the same in float32."""
    if bits == 16:
        ours = [draw(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
        return ours, [w.astype(jnp.float32) for w in ours]
    ours = [quant.quantize(draw(i, *shape), bits) for i, shape in enumerate(shapes)]
    return ours, [quant.dequantize(w, jnp.float32) for w in ours]


@pytest.mark.parametrize(
    ("bits", "dtype", "rows", "width", "outputs", "tiling", "eager"),
    [
        (16, jnp.bfloat16, 1, 576, (48, 16, 20), (4, 1, 4, 1, 1), False),
        (8, jnp.bfloat16, 11, 320, (40, 8), (3, 2, 4, 1, 1), True),
        (8, jnp.float16, 1, 576, (48,), (8, 1, 3, 1, 2), False),
        (4, jnp.bfloat16, 1, 576, (33, 16), (2, 1, 4, 1, 1), True),
        (4, jnp.float16, 20, 1024, (72,), (2, 2, 3, 2, 1), False),
    ],
    ids=str,
)
def test_products_are_those_of_float32(bits, dtype, rows, width, outputs, tiling, eager, monkeypatch):
    monkeypatch.setattr(build, "call", emulated(eager))
    monkeypatch.setattr(products, "tiling", lambda *_: products.Tiling(*tiling))
    monkeypatch.setattr(build, "chip", lambda: build.Chip(2, 0))  # few processors, so that a block has several tiles
    x = draw(9, rows, width, dtype=dtype)
    ours, exact = weights(bits, dtype, *((out, width) for out in outputs))
    for product, w in zip(gpu.linears(x, ours, dtype=jnp.float32), exact, strict=True):
        assert (
            gap(product, np.asarray(x, np.float32) @ np.asarray(w).T) < 2e-5
        )  # one row of 4 bits subtracts 136 times the inputs at the end


@pytest.mark.parametrize(("bits", "rows", "parts"), [(16, 3, 1), (8, 1, 2), (4, 2, 1)], ids=str)
def test_norm_swiglu_and_residual_are_those_of_xla(bits, rows, parts, monkeypatch):
    dtype, width = jnp.bfloat16, 512
    monkeypatch.setattr(build, "call", emulated())
    monkeypatch.setattr(products, "tiling", lambda *_: products.Tiling(2, 1, 4, parts, 1))
    x, up, scale = (draw(i, rows, width, dtype=dtype) for i in (1, 2, 3))
    plus, scale = draw(4, rows, 24, dtype=dtype), scale[0]
    (w,), (exact,) = weights(bits, dtype, (24, width))
    (after_norm,) = gpu.linears(x, [w], dtype=dtype, norm=(scale, EPS), plus=plus)
    expected = rms_norm(x, scale, eps=EPS).astype(jnp.float32) @ exact.T + plus
    assert gap(after_norm.astype(jnp.float32), expected) < ROUNDING[dtype]
    (after_swiglu,) = gpu.linears(x, [w], dtype=dtype, up=up, plus=plus)
    expected = (jax.nn.silu(x) * up).astype(jnp.float32) @ exact.T + plus
    assert gap(after_swiglu.astype(jnp.float32), expected) < ROUNDING[dtype]


@pytest.mark.parametrize(("capability", "shared"), [(80, 164), (89, 100), (90, 228), (121, 100), (75, 100)])
def test_blocks_fit_in_the_shared_memory_of_a_processor(capability, shared, monkeypatch):
    monkeypatch.setattr(parallel, "compute_capability", lambda: capability)
    chip = build.chip()
    assert chip.shared == 1024 * shared
    for bits, rows, width in itertools.product((16, 8, 4), (1, 2, 5, 8, 9, 33, 64), (576, 4096, 14336, 53248)):
        chosen = products.tiling(bits, rows, width, chip)
        assert chosen.blocks * (products.shared_bytes(bits, rows, width, chosen) + 1024) <= chip.shared


@pytest.mark.parametrize(
    ("kv", "dtype", "rows", "heads", "group", "dim", "bound"),
    [
        ("compute", jnp.bfloat16, 2, 2, 4, 128, 256),
        ("compute", jnp.float16, 1, 3, 1, 32, 64),
        ("int8", jnp.bfloat16, 2, 1, 16, 64, 96),
        ("int8", jnp.float16, 1, 2, 3, 96, 512),
    ],
    ids=str,
)
def test_a_decode_step_rotates_stores_and_attends_as_xla(kv, dtype, rows, heads, group, dim, bound, monkeypatch):
    monkeypatch.setattr(build, "call", emulated(eager=rows == 1))
    # A GPU's cache holds floats where that of a CPU holds their bits.
    monkeypatch.setattr(caches, "_stored", lambda dtype: jnp.dtype(dtype))
    config = dataclasses.replace(
        SIZES["tiny"], num_layers=1, num_heads=heads * group, num_kv_heads=heads, head_dim=dim, max_seq_len=512
    )
    S = 512
    empty = caches.init_cache(config, batch=rows, capacity=S, dtype=dtype, kv=kv)
    every = caches.window(empty, jnp.broadcast_to(jnp.arange(S), (rows, S)), None)
    cache = tuple(
        caches.write(leaf[0], draw(i, rows, S, heads, dim, dtype=dtype), every)
        for i, leaf in enumerate((empty.k, empty.v))
    )
    # The first row has reached its bound; the second is padding, which is not stored.
    positions = jnp.array([[bound - 1], [37]][:rows], jnp.int32)
    window = caches.window(empty, positions, jnp.array([[True], [False]][:rows]), bound=bound)
    q = draw(5, rows, 1, heads * group, dim, dtype=dtype)
    k, v = (draw(i, rows, 1, heads, dim, dtype=dtype) for i in (6, 7))
    arguments = (q, k, v, rope.rotations(config, positions), positions, window, cache)
    assert not gpu.decode.refuses(q, k, cache[0])
    out, new = gpu.decode.attend(*arguments)
    expected, expected_new = attention.over_cache(*arguments)
    assert gap(out[0].astype(jnp.float32), expected[0].astype(jnp.float32)) < ROUNDING[dtype]
    for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(expected_new), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


@pytest.fixture
def small_check(monkeypatch):
    """The check of the kernels with small arrays, on emulated kernels."""
    monkeypatch.setattr(build, "call", emulated())
    monkeypatch.setattr(caches, "_stored", lambda dtype: jnp.dtype(dtype))
    sizes = {"_LAYER": (64, 64, 64), "_HEADS": (2, 1, 32), "_SLOTS": 64, "_REPEATS": 1, "_TURNS": 1}
    for name, value in (sizes | {"_BITS": (4,), "_ROWS": (1,), "_ODD": (), "_ODD_HEADS": ()}).items():
        monkeypatch.setattr(check, name, value)


def test_the_check_compares_and_times_each_kind(small_check, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "KV_TYPES", ("int8",))
    check.run(tmp_path / "record.json")
    found = verdict._read(tmp_path / "record.json")
    assert sorted(found.gains) == ["4 bits, one row", decode.kind("int8")]
    assert all(gain < 1 for gain in found.gains.values())  # emulated, they are slower than XLA
    assert found.failed == {}


def test_a_wrong_kernel_fails_the_check_of_its_kind(small_check, tmp_path, monkeypatch):
    right = products.linears
    monkeypatch.setattr(products, "linears", lambda *a, **k: [p.at[0, 3].add(9) for p in right(*a, **k)])
    monkeypatch.setattr(check, "KV_TYPES", ())
    check.run(tmp_path / "record.json")
    found = verdict._read(tmp_path / "record.json")
    assert found.gains == {}
    assert re.search(r"products of 1 rows with 4 bits: the kernel differs.*remove", found.failed["4 bits, one row"])


def test_a_check_without_memory_leaves_no_record(small_check, tmp_path, monkeypatch):
    def linears(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(products, "linears", linears)
    with pytest.raises(RuntimeError, match="no room"):
        check.run(tmp_path / "record.json")
    assert not (tmp_path / "record.json").exists()


class Gpu:
    device_kind = "NVIDIA H100"
    client = dataclasses.make_dataclass("Client", ["platform_version"])("CUDA 13")


@pytest.fixture
def one_gpu(monkeypatch, tmp_path):
    """A machine with one GPU, whose check is a function of the record and of the environment."""
    monkeypatch.setattr(verdict, "_local_gpus", lambda: [Gpu()])
    monkeypatch.setattr(build, "compiler", lambda: "NVRTC")
    monkeypatch.setattr(build, "version", lambda: "13.0")
    monkeypatch.setattr(parallel, "compute_capability", lambda: 90)
    monkeypatch.setattr(parallel, "device", Gpu)
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    gpu._gains.cache_clear()
    yield monkeypatch
    gpu._gains.cache_clear()


def done(status, text=""):
    """A stand-in for the process of the check, which writes a record and ends with a status."""

    def run(command, **_):
        if text:
            Path(command[-1]).write_text(text)
        return subprocess.CompletedProcess(command, status, "", "warning\nno room on the GPU\n")

    return run


def test_the_check_runs_once_and_its_gains_decide(one_gpu, capsys, caplog):
    gains = {"16 bits, one row": 1.2, "8 bits, one row": 0.9}
    text = json.dumps({"gains": gains, "failed": {"4 bits, one row": "wrong"}})
    one_gpu.setattr(verdict.subprocess, "run", done(0, text))
    x = jax.ShapeDtypeStruct((1, 1, 64), jnp.bfloat16)
    assert gpu.takes(x, [jax.ShapeDtypeStruct((48, 64), jnp.bfloat16)])
    for bits in (8, 4):  # slower, and wrong
        assert not gpu.takes(x, [jax.eval_shape(lambda bits=bits: quant.quantize(jnp.zeros((48, 64)), bits))])
    assert not gpu.takes(jax.ShapeDtypeStruct((9, 64), jnp.bfloat16), [jax.ShapeDtypeStruct((48, 64), jnp.bfloat16)])
    assert "once for this machine" in capsys.readouterr().err
    (warning,) = caplog.messages
    assert "(4 bits, one row): wrong" in warning and "remove" in warning
    gpu._gains.cache_clear()
    one_gpu.setattr(verdict.subprocess, "run", None)  # it is not run again
    assert gpu.faster("16 bits, one row")


def test_a_check_that_hangs_or_dies_is_recorded_and_one_that_has_no_memory_is_not(one_gpu, caplog):
    def hangs(command, **_):
        raise subprocess.TimeoutExpired(command, 240)

    for run, message, again in (
        (done(1), "no room on the GPU", True),
        (done(-11), "signal 11", False),
        (hangs, "did not end in 240 seconds", False),
        (done(0), "left no result", True),
    ):
        one_gpu.setattr(verdict.subprocess, "run", run)
        caplog.clear()
        gpu._gains.cache_clear()
        assert not gpu.faster("16 bits, one row") and not gpu.faster("8 bits, one row")
        assert [message in text for text in caplog.messages] == [True]
        (record,) = verdict.native.folder().glob("*.json") if not again else (None,)
        if record:
            record.unlink()


def test_without_nvrtc_or_a_gpu_or_a_folder_other_kernels_run(one_gpu, caplog):
    nothing = ({}, {})
    assert verdict.gains("another GPU, for which a program is compiled here") == nothing
    one_gpu.setattr(build, "compiler", lambda: None)
    with pytest.raises(verdict.Unavailable, match="pip install nvidia-cuda-nvrtc"):
        verdict.gains(Gpu.device_kind)
    one_gpu.setattr(build, "compiler", lambda: "NVRTC")
    one_gpu.setenv("LLAMA_JAX_CACHE", "/proc/no")
    with pytest.raises(verdict.Unavailable, match="LLAMA_JAX_CACHE may name another folder"):
        verdict.gains(Gpu.device_kind)
    one_gpu.setenv(verdict.ENV, "off")
    assert verdict.gains(Gpu.device_kind) == nothing


def ptxas():
    """The assembler that comes with NVRTC in the packages of CUDA, which judges the PTX; None without it."""
    paths = [Path(path).parents[1] / "bin" / "ptxas" for path in build.candidates() if "/" in path]
    return next((str(path) for path in paths if path.is_file()), shutil.which("ptxas"))


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("dtype", [0, 1], ids=["bfloat16", "float16"])
def test_nvrtc_and_ptxas_compile_the_kernels(capability, dtype, tmp_path):
    if build.compiler() is None or ptxas() is None:
        pytest.skip("NVRTC and ptxas are not installed (pip install nvidia-cuda-nvrtc nvidia-cuda-nvcc)")
    constants = {"HALF": dtype, "ROWS": 3, "PARTS": 2, "WARPS": 4}
    decoding = {"HEADS": 2, "GROUP": 4, "DIM": 128, "SLOTS": 64, "BOUND": 64, "SCALE": "0.1f"}
    multiplying = {"INPUTS": 576, "OUTPUTS_0": 48, "OUTPUTS_1": 0, "OUTPUTS_2": 0, "TILES": 1, "STAGES": 4}
    multiplying |= {"BEFORE": 1, "EPS": "1e-5f", "RESIDUAL": 0, "OUT_FLOAT": 1}
    cases = [("products", constants | multiplying | {"BITS": bits}) for bits in (16, 8, 4)]
    cases += [("decode", constants | decoding | {"KV_BITS": bits}) for bits in (16, 8)]
    for name, given in cases:
        (tmp_path / "kernel.ptx").write_text(build.ptx(name, capability, tuple(given.items())))
        command = [
            ptxas(),
            "-v",
            f"-arch=sm_{capability}",
            str(tmp_path / "kernel.ptx"),
            "-o",
            str(tmp_path / "kernel"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores" in done.stderr


def test_a_decode_step_of_the_model_has_five_launches_a_layer(monkeypatch):
    config = dataclasses.replace(
        SIZES["tiny"], vocab_size=96, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, ffn_dim=128
    )
    weights = params.unstack(params.init_params(config, jax.random.key(0)))
    weights = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights)
    monkeypatch.setattr(caches, "_stored", lambda dtype: jnp.dtype(dtype))
    cache = caches.init_cache(config, batch=1, capacity=32, dtype=jnp.bfloat16)
    cache = jax.tree.map(lambda a: draw(3, *a.shape, dtype=a.dtype), cache)

    def step():
        token, positions = jnp.array([[7]]), jnp.array([[20]])
        hidden, _ = model.forward(config, weights, token, positions, None, cache, dtype=jnp.bfloat16)
        return model.unembed(config, weights, hidden)

    expected = step()
    launches, call = [], emulated()
    monkeypatch.setattr(build, "call", lambda name, *a, **k: [launches.append(name), *call(name, *a, **k)][1:])
    monkeypatch.setattr(gpu, "faster", lambda kind: True)
    monkeypatch.setattr(parallel, "device_platform", lambda: "cuda")
    jax.clear_caches()
    assert gap(step(), expected) < 2**-6
    jax.clear_caches()
    # All layers share one trace.
    assert launches == ["products", "decode", "products", "products", "products", "products"]
