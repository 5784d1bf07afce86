"""The CUDA kernels, emulated on a CPU, against XLA; and where they are used."""

import dataclasses
import functools
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
from llama_jax.ops import gpu, lora, quant, rope
from llama_jax.ops.gpu import build, check, layers, products, verdict
from llama_jax.ops.norm import rms_norm

EPS = 1e-5
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to emulate the kernels with")
ROUNDING = {jnp.bfloat16: 2**-7, jnp.float16: 2**-10}  # the last place of the largest result


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weights(bits, *shapes):
    """Quantized weights, and the same in float32."""
    ours = [quant.quantize(draw(i, *shape), bits) for i, shape in enumerate(shapes)]
    return ours, [quant.dequantize(w, jnp.float32) for w in ours]


@pytest.mark.parametrize(
    ("bits", "dtype", "rows", "width", "outputs", "tiling", "eager"),
    [
        (8, jnp.bfloat16, 7, 320, (40, 8), (3, 2, 4, 1), True),
        (8, jnp.float16, 2, 576, (48,), (8, 1, 3, 1), False),
        (4, jnp.bfloat16, 3, 576, (33, 16), (2, 1, 4, 1), True),
        (4, jnp.float16, 8, 1024, (72,), (2, 2, 3, 2), False),
        (4, jnp.bfloat16, 8, 1536, (40, 8, 16), (8, 2, 3, 3), False),
    ],
    ids=str,
)
def test_products_are_those_of_float32(bits, dtype, rows, width, outputs, tiling, eager, monkeypatch):
    monkeypatch.setattr(build, "call", emulated(eager))
    monkeypatch.setattr(products, "tiling", lambda *_: products.Tiling(*tiling))
    monkeypatch.setattr(build, "chip", lambda: build.Chip(2, 0))  # few processors, so that a block has several tiles
    x = draw(9, rows, width, dtype=dtype)
    ours, exact = weights(bits, *((out, width) for out in outputs))
    for product, w in zip(gpu.linears(x, ours, dtype=jnp.float32), exact, strict=True):
        assert gap(product, np.asarray(x, np.float32) @ np.asarray(w).T) < 2e-6


@pytest.mark.parametrize(("bits", "rows", "parts"), [(8, 8, 2), (4, 2, 1)], ids=str)
def test_norm_swiglu_and_residual_are_those_of_xla(bits, rows, parts, monkeypatch):
    dtype, width = jnp.bfloat16, 512
    monkeypatch.setattr(build, "call", emulated())
    monkeypatch.setattr(products, "tiling", lambda *_: products.Tiling(2, 1, 4, parts))
    x, up, scale = (draw(i, rows, width, dtype=dtype) for i in (1, 2, 3))
    plus, scale = draw(4, rows, 24, dtype=dtype), scale[0]
    (w,), (exact,) = weights(bits, (24, width))
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
    for bits, rows, width in itertools.product((8, 4), (2, 5, 8), (576, 4096, 14336, 53248)):
        chosen = products.tiling(bits, rows, width, chip)
        assert products.shared_bytes(bits, rows, width, chosen) + 1024 <= chip.shared
    for bits, name in itertools.product((16, 8, 4), ("llama3.1-8b", "llama3.1-70b", "llama3.2-1b")):
        found = layers.tiling(SIZES[name], bits, 8192, chip, 500)
        if found is None:
            assert shared == 100 and name == "llama3.1-70b"
        else:
            assert found.stages > 2 and layers.shared_bytes(bits, found, 500) + 1024 <= chip.shared


@pytest.fixture
def hopper(monkeypatch):
    """A GPU with few processors and a cache of floats, where that of a CPU holds their bits."""
    monkeypatch.setattr(parallel, "compute_capability", lambda: 90)
    monkeypatch.setattr(build, "chip", lambda: build.Chip(5, 228 * 1024))
    monkeypatch.setattr(caches, "_stored", lambda dtype: jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("bits", "kv", "dtype", "dims", "heads", "slots", "eager"),
    [
        (16, "compute", jnp.bfloat16, (128, 256), (4, 2, 64), (64, 64, 40), True),
        (16, "compute", jnp.float16, (128, 384), (6, 2, 128), (64, 48, 47), False),
        (8, "int8", jnp.bfloat16, (256, 768), (4, 2, 64), (2048, 2048, 2047), False),
        (4, "compute", jnp.bfloat16, (512, 1024), (16, 2, 64), (2048, 2048, 1100), True),
        (4, "int8", jnp.float16, (512, 1536), (8, 1, 128), (256, 256, 200), False),
    ],
    ids=str,
)
def test_layers_of_a_decode_step_are_those_of_xla(bits, kv, dtype, dims, heads, slots, eager, hopper, monkeypatch):
    monkeypatch.setattr(build, "call", emulated(eager))
    monkeypatch.setattr(layers, "_MAX_ARGUMENTS", 60)  # two or three layers in a launch
    (D, F), (N, K, H), (S, bound, position) = dims, heads, slots
    monkeypatch.setattr(check, "_SLOTS", S)
    config = dataclasses.replace(
        SIZES["tiny"], num_layers=3, embed_dim=D, ffn_dim=F, num_heads=N, num_kv_heads=K, head_dim=H, max_seq_len=S
    )
    ours, others, x, held = check._steps(config, bits, kv, dtype, position, bound)
    for result, expected in zip(jax.tree.leaves(ours(x, held)), jax.tree.leaves(others(x, held)), strict=True):
        result, expected = (np.asarray(a, np.float32) for a in (result, expected))
        # Rounding turns an integer of the cache now and then into one of the next two.
        assert gap(result, expected) < (2.5 / 127 if kv == "int8" and result.ndim > 3 else 3 * ROUNDING[dtype])


def test_what_the_kernel_of_layers_does_not_take_is_refused_with_a_reason(hopper):
    config = dataclasses.replace(
        SIZES["tiny"], num_layers=1, embed_dim=512, ffn_dim=512, num_heads=4, num_kv_heads=2, head_dim=128
    )

    def reason(config=config, bits=4, rows=1, dtype=jnp.bfloat16, capacity=64, wrap=lambda layer: layer):
        draw_layer = functools.partial(check._random_layer, config, bits, dtype, 0)
        layer = wrap(draw_layer() if bits == 16 else jax.eval_shape(draw_layer))
        cache = jax.eval_shape(lambda: caches.init_cache(config, batch=rows, capacity=capacity, dtype=dtype))
        x = jax.ShapeDtypeStruct((rows, 1, config.embed_dim), dtype)
        return layers.refuses(config, [layer], x, cache)

    def adapted(layer):
        return layer | {"ffn": layer["ffn"] | {"up": lora.LoraTensor(layer["ffn"]["up"], None, None, 1.0)}}

    assert reason() == "" == reason(bits=8) == reason(bits=16)
    assert "one token of one row" in reason(rows=2)
    assert "not float32" in reason(dtype=jnp.float32, bits=16)
    assert "weights of one kind" in reason(wrap=adapted)
    assert "multiple of 256" in reason(dataclasses.replace(config, ffn_dim=640))
    assert "heads of 64 or 128" in reason(dataclasses.replace(config, head_dim=32, num_heads=16))
    assert "heads of 64 or 128" in reason(dataclasses.replace(config, num_heads=32))
    assert "2 heads with a multiple of 16 slots, not 2 with 40" in reason(capacity=40)
    assert "shared memory" in reason(dataclasses.replace(config, ffn_dim=100 * 1024))


@pytest.fixture
def small_check(hopper, monkeypatch):
    """The check of the kernels with small arrays, on emulated kernels."""
    monkeypatch.setattr(build, "call", emulated())
    sizes = {"_MODEL": "tiny", "_SLOTS": 64, "_REPEATS": 1, "_TURNS": 1, "_ODD": check._ODD[:1]}
    for name, value in sizes.items():
        monkeypatch.setattr(check, name, value)
    tiny = dataclasses.replace(SIZES["tiny"], embed_dim=512, ffn_dim=512, num_heads=8, num_kv_heads=4, head_dim=64)
    monkeypatch.setitem(SIZES, "tiny", tiny)
    monkeypatch.setitem(check._ODD_LAYERS, "int8", (jnp.float16, 256, 256, 4, 2, 64))


@pytest.mark.parametrize("kind", [products.kind(4), layers.kind(8, "int8")])
def test_the_check_compares_and_times_a_kind(kind, small_check, tmp_path):
    check.run(kind, tmp_path / "result.json")
    assert 0 <= json.loads((tmp_path / "result.json").read_text())["gain"] < 1  # emulated, they are slower than XLA


def test_a_wrong_kernel_fails_the_check_of_its_kind(small_check, tmp_path, monkeypatch):
    right = products.linears
    monkeypatch.setattr(products, "linears", lambda *a, **k: [p.at[0, 3].add(9) for p in right(*a, **k)])
    check.run(products.kind(4), tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    assert re.match("products of 3 rows of 576 inputs: the kernel differs", found["failed"]) and "gain" not in found
    right_layers = layers.decode
    monkeypatch.setattr(layers, "decode", lambda *a: (right_layers(*a)[0], a[-1]))  # nothing is stored
    check.run(layers.kind(8, "int8"), tmp_path / "result.json")
    assert "differs" in json.loads((tmp_path / "result.json").read_text())["failed"]


def test_a_check_without_memory_leaves_no_result(small_check, tmp_path, monkeypatch):
    def linears(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(products, "linears", linears)
    with pytest.raises(RuntimeError, match="no room"):
        check.run(products.kind(4), tmp_path / "result.json")
    assert not (tmp_path / "result.json").exists()


class Gpu:
    device_kind = "NVIDIA H100"
    client = dataclasses.make_dataclass("Client", ["platform_version"])("CUDA 13")


@pytest.fixture
def one_gpu(monkeypatch, tmp_path):
    """A machine with one GPU, whose check is a function of the kind and of the file of the result."""
    monkeypatch.setattr(verdict, "_local_gpus", lambda: [Gpu()])
    monkeypatch.setattr(build, "compiler", lambda: "NVRTC")
    monkeypatch.setattr(build, "version", lambda: "13.0")
    monkeypatch.setattr(parallel, "compute_capability", lambda: 90)
    monkeypatch.setattr(parallel, "device", Gpu)
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    gpu._gain.cache_clear()
    yield monkeypatch
    gpu._gain.cache_clear()


def done(status, results=None):
    """A stand-in for the process of the check, which writes the result of its kind and ends with a status."""

    def run(command, **_):
        *_, kind, path = command
        if results and kind in results:
            Path(path).write_text(json.dumps(results[kind]))
        return subprocess.CompletedProcess(command, status, "", "warning\nno room on the GPU\n")

    return run


def test_the_check_of_a_kind_runs_once_and_its_gain_decides(one_gpu, capsys, caplog):
    eight, four, kind = products.kind(8), products.kind(4), layers.kind(16, "compute")
    one_gpu.setattr(
        verdict.subprocess, "run", done(0, {eight: {"gain": 1.2}, four: {"gain": 0.9}, kind: {"failed": "wrong"}})
    )
    x, weight = jax.ShapeDtypeStruct((1, 3, 64), jnp.bfloat16), jnp.zeros((48, 64))
    assert gpu.takes(x, [jax.eval_shape(lambda: quant.quantize(weight, 8))])
    assert capsys.readouterr().err == f"checking a GPU kernel, once for this machine: {eight}\n"
    assert not gpu.takes(x, [jax.eval_shape(lambda: quant.quantize(weight, 4))])  # slower
    assert not gpu.faster(kind)
    (warning,) = caplog.messages
    assert "on this GPU: wrong" in warning and "remove" in warning
    assert verdict.results() == {eight: {"gain": 1.2}, four: {"gain": 0.9}, kind: {"failed": "wrong"}}
    gpu._gain.cache_clear()
    one_gpu.setattr(verdict.subprocess, "run", None)  # none is run again
    assert gpu.faster(eight) and not gpu.faster(four) and not gpu.faster(kind)
    for rows, bits in ((1, 8), (9, 8), (3, 16)):  # nothing is checked for what the kernel does not take
        w = weight.astype(jnp.bfloat16) if bits == 16 else jax.eval_shape(lambda: quant.quantize(weight, 8))
        assert not gpu.takes(jax.ShapeDtypeStruct((rows, 64), jnp.bfloat16), [w])


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
        gpu._gain.cache_clear()
        assert not gpu.faster("8 rows of 8 bits") and not gpu.faster("8 rows of 8 bits")
        assert [message in text for text in caplog.messages] == [True]
        (record,) = verdict.native.folder().glob("*.json") if not again else (None,)
        if record:
            record.unlink()


def test_a_damaged_record_is_written_again(one_gpu):
    one_gpu.setattr(verdict.subprocess, "run", done(0, {"8 rows of 8 bits": {"gain": 1.2}}))
    assert gpu.faster("8 rows of 8 bits")
    (record,) = verdict.native.folder().glob("*.json")
    for damaged in ("", "[1]", '{"8 rows of 8 bits": 3}', '{"8 rows of 8 bits": {"gain": "high"}}'):
        record.write_text(damaged)
        gpu._gain.cache_clear()
        assert gpu.faster("8 rows of 8 bits")


def test_a_record_that_cannot_be_written_turns_the_kernels_off(one_gpu, caplog):
    one_gpu.setattr(verdict.subprocess, "run", done(0, {"8 rows of 8 bits": {"gain": 1.2}}))

    def full(*_):
        raise OSError(28, "No space left on device")

    one_gpu.setattr(verdict, "write_json", full)
    assert not gpu.faster("8 rows of 8 bits")
    assert "No space left on device" in caplog.text


def test_the_kernel_for_layers_is_not_used_where_processes_share_a_gpu(hopper, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO", logger=gpu.__name__)
    gpu._log_once.cache_clear()
    monkeypatch.setattr(parallel, "device_platform", lambda: "cuda")
    monkeypatch.setattr(gpu, "faster", lambda kind: True)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    config = dataclasses.replace(
        SIZES["tiny"], num_layers=1, embed_dim=512, ffn_dim=512, num_heads=4, num_kv_heads=2, head_dim=128
    )
    layer = [check._random_layer(config, 4, jnp.bfloat16, 0)]
    cache = caches.init_cache(config, batch=1, capacity=64, dtype=jnp.bfloat16)
    x = jnp.zeros((1, 1, 512), jnp.bfloat16)
    assert gpu.takes_layers(config, layer, x, cache)
    (tmp_path / "control").touch()
    assert not gpu.takes_layers(config, layer, x, cache)
    assert "multi-process service" in caplog.text


def test_without_nvrtc_or_a_gpu_or_a_folder_other_kernels_run(one_gpu):
    assert verdict.gain("another GPU, for which a program is compiled here", "a kind") == 0
    one_gpu.setattr(build, "compiler", lambda: None)
    with pytest.raises(verdict.Unavailable, match="pip install nvidia-cuda-nvrtc"):
        verdict.gain(Gpu.device_kind, "a kind")
    one_gpu.setattr(build, "compiler", lambda: "NVRTC")
    one_gpu.setenv("LLAMA_JAX_CACHE", "/proc/no")
    with pytest.raises(verdict.Unavailable, match="LLAMA_JAX_CACHE may name another folder"):
        verdict.gain(Gpu.device_kind, "a kind")
    one_gpu.setenv(verdict.ENV, "off")
    assert verdict.gain(Gpu.device_kind, "a kind") == 0


def ptxas():
    """The assembler that comes with NVRTC in the packages of CUDA, which judges the PTX; None without it."""
    paths = [Path(path).parents[1] / "bin" / "ptxas" for path in build.candidates() if "/" in path]
    return next((str(path) for path in paths if path.is_file()), shutil.which("ptxas"))


KINDS = list(itertools.product((16, 8, 4), ("compute", "int8")))


def constants_of_layers(bits, kv, dtype, monkeypatch):
    """The constants of the kernel for a layer of 8B."""
    config, dtype, found = (
        dataclasses.replace(SIZES["llama3.1-8b"], num_layers=1),
        (jnp.bfloat16, jnp.float16)[dtype],
        [],
    )

    def call(name, constants, operands, results, **_):
        found.append(constants)
        return [jnp.zeros(result.shape, result.dtype) for result in results]

    def step():
        cache, position = caches.init_cache(config, batch=1, capacity=2048, dtype=dtype, kv=kv), jnp.zeros((1, 1), int)
        x, weights = jnp.zeros((1, 1, config.embed_dim), dtype), [check._random_layer(config, bits, dtype, 0)]
        assert not layers.refuses(config, weights, x, cache)
        rotations, window = rope.rotations(config, position), caches.window(cache, position, None)
        return layers.decode(config, weights, x, rotations, window, cache)

    monkeypatch.setattr(build, "call", call)
    monkeypatch.setattr(caches, "_stored", lambda dtype: jnp.dtype(dtype))
    jax.eval_shape(step)
    return found[0]


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("dtype", [0, 1], ids=["bfloat16", "float16"])
def test_nvrtc_and_ptxas_compile_the_kernels(capability, dtype, tmp_path, monkeypatch):
    if build.compiler() is None or ptxas() is None:
        pytest.skip("NVRTC and ptxas are not installed (pip install nvidia-cuda-nvrtc nvidia-cuda-nvcc)")
    multiplying = {"INPUTS": 576, "OUTPUTS_0": 48, "OUTPUTS_1": 0, "OUTPUTS_2": 0, "TILES": 1, "STAGES": 4, "ROWS": 3}
    multiplying |= {"HALF": dtype, "PARTS": 2, "WARPS": 4, "NORM": 1, "EPS": "1e-5f", "RESIDUAL": 0, "OUT_FLOAT": 1}
    cases = [("products", multiplying | {"BITS": bits}) for bits in (8, 4)]
    monkeypatch.setattr(parallel, "compute_capability", lambda: capability)
    cases += [("layers", constants_of_layers(bits, kv, dtype, monkeypatch)) for bits, kv in KINDS]
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
        spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
        assert spilled and int(spilled[1]) <= 256  # in attention, and nowhere else


def test_a_decode_step_of_the_model_has_one_launch_for_all_layers(hopper, monkeypatch):
    config = dataclasses.replace(
        SIZES["tiny"], vocab_size=96, embed_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=256
    )
    weights = params.unstack(params.init_params(config, jax.random.key(0)))
    weights = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights)
    cache = caches.init_cache(config, batch=1, capacity=32, dtype=jnp.bfloat16)
    cache = jax.tree.map(lambda a: draw(3, *a.shape, dtype=a.dtype), cache)

    def step():
        token, positions = jnp.array([[7]]), jnp.array([[20]])
        return model.forward(config, weights, token, positions, None, cache, dtype=jnp.bfloat16)

    expected, expected_cache = step()
    launches, call = [], emulated()
    monkeypatch.setattr(build, "call", lambda name, *a, **k: [launches.append(name), *call(name, *a, **k)][1:])
    monkeypatch.setattr(gpu, "faster", lambda kind: True)
    monkeypatch.setattr(parallel, "device_platform", lambda: "cuda")
    jax.clear_caches()
    hidden, new = step()
    jax.clear_caches()
    assert gap(hidden.astype(jnp.float32), expected.astype(jnp.float32)) < 2**-6
    for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(expected_cache), strict=True):
        assert gap(ours.astype(jnp.float32), theirs.astype(jnp.float32)) < 2**-6
    assert launches == ["layers"]
