"""Plans without a compiler: devices, the text of a compiled program, the closed memory model, and the command."""

import collections
import dataclasses
import itertools
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.paths import ROOT
from helpers.program import program
from helpers.runs import run_dict
from llama_jax import parallel
from llama_jax.config import size
from llama_jax.errors import ConfigError
from llama_jax.parallel import flags, mesh
from llama_jax.plan import hlo, memory, planner, projection, search, traffic
from llama_jax.plan.devices import CHIPS, parse
from llama_jax.plan.facts import bytes_needed
from llama_jax.run_config import RunConfig

RECIPE = "configs/llama31_8b.py"


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(planner, "environment_of", lambda devices: None)


def run_8b(model="llama3.1-8b", *, rows=16, length=8192, **changes):
    base = {"train__compute_dtype": "bfloat16", "data__batch_size": rows, "data__sequence_length": length}
    run = RunConfig.from_dict(run_dict(model=model, **base, **changes))
    return dataclasses.replace(run, model=size(model))


# Devices


@pytest.mark.parametrize(
    ("text", "shape", "count"),
    [
        ("v5p:4x4x4", (4, 4, 4), 64),
        ("v5p-128", (4, 4, 4), 64),
        ("v5p:16x20x28", (16, 20, 28), 8960),
        ("v5e:16", (4, 4), 16),
        ("v5litepod-8", (2, 4), 8),
        ("v6e-256", (16, 16), 256),
        ("tpu7x:2x2x1", (2, 2, 1), 8),  # two devices a chip
        ("h100:4", (1, 4), 4),
        ("H200:64", (8, 8), 64),
        ("h100:16384", (2048, 8), 16384),
        ("h100", (1, 1), 1),
        ("v5e", (1, 1), 1),
        ("tpu7x", (1, 1, 1), 2),
        ("2 x v5p:4x4x4", (4, 4, 4), 128),
        ("2xv5e-16", (4, 4), 32),
    ],
)
def test_devices_are_named_by_shape_by_count_or_as_the_cloud_names_them(text, shape, count):
    devices = parse(text)
    assert (devices.shape, devices.count) == (shape, count)
    assert parse(devices.name) == devices


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5q:8", "did you mean 'v5"),
        ("v5e:4x4x4", "has a grid of 2 axes"),
        ("v5e:12", "must be a power of two"),
        ("v5e:512", "at most 256: use --slices"),
        ("v5p-7", "N must be even"),
        ("h100:12", "hosts of 8"),
        ("h100-8", "a shape that cannot be read"),
        ("v5e:0", "at least 1"),
        ("v5e:", "a shape that cannot be read"),
        ("8xh100", "only TPUs have them"),
        ("0xv5e:4", "at least 1"),
        ("v5e:" + "9" * 5000, "a shape that cannot be read"),
        ("", "is not known"),
        ("gb200:8", "is not known"),
    ],
)
def test_devices_that_do_not_exist_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse(text)
    with pytest.raises(ConfigError, match="only TPUs have them"):
        parse("h100:8", slices=2)


# The text of a program

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %ag-start = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%nothing
  %ag-done = f32[32]{0} all-gather-done(%ag-start)
  %rs = f32[8]{0} reduce-scatter(%ag-done), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%sum
  %kernel = (f32[8]{0}) custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"xprof_metadata":"{
}}, metadata={op_name="x"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %rs)
}

%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %limit = s32[] constant(10)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %tuple = (s32[], f32[8]{0}) tuple(%zero, %a)
  %while = (s32[], f32[8]{0}) while(%tuple), condition=%condition, body=%body
  %out = f32[8]{0} get-tuple-element(%while), index=1
  %s = (bf16[4]{0}, bf16[4]{0}) collective-permute-start(%out), source_target_pairs={{0,1},{1,0}}
  %d = bf16[4]{0} collective-permute-done(%s)
  ROOT %ar = f32[8]{0} all-reduce(%out), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%sum
}
"""


FUSED = """\
%start (x: f32[8]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  ROOT %ag.1 = f32[32]{0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%async_collective_fusion.1 (x.1: f32[8]) -> f32[32] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %ag.2 = f32[32]{0} all-gather(%x.1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  %async-collective-start = f32[32]{0} fusion(%a), kind=kCustom, calls=%start
  ROOT %fusion.1 = f32[32]{0} fusion(%a), kind=kCustom, calls=%async_collective_fusion.1
}
"""


def test_a_collective_in_several_fusions_is_one_and_overlaps_if_something_is_fused_with_it():
    (gather,) = hlo.collectives(FUSED)
    assert (gather.count, gather.overlapped, gather.exposed) == (1, 96, 0)
    (gather,) = hlo.collectives(FUSED.replace("calls=%async_collective_fusion.1", "calls=%nothing"))
    assert (gather.overlapped, gather.exposed) == (0, 96)


SCATTERED = """\
%all-reduce-scatter.3 (x: f32[32]) -> f32[8] {
  %x = f32[32]{0} parameter(0)
  %i = s32[] constant(0)
  %all-reduce.1 = f32[32]{0} all-reduce(%x), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[8]{0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={8}
}

ENTRY %main (a: f32[32]) -> f32[8] {
  %a = f32[32]{0} parameter(0)
  ROOT %fusion.2 = f32[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_a_tpus_fusion_of_an_all_reduce_and_a_slice_is_a_reduce_scatter():
    (scatter,) = hlo.collectives(SCATTERED)
    assert (scatter.kind, scatter.count, scatter.exposed) == ("reduce-scatter", 1, 32 * 4 * 3 / 4)
    (reduce,) = hlo.collectives(SCATTERED.replace("%all-reduce-scatter.3", "%fused_computation"))
    assert (reduce.kind, reduce.exposed) == ("all-reduce", 2 * 32 * 4 * 3 / 4)


@pytest.mark.parametrize(
    ("type_", "size"),
    [("f8e4m3fn[2,3]", 6), ("bf16[2]", 4), ("pred[3]", 3), ("s4[4]", 2), ("(f32[2]{0}, s8[3])", 11), ("token[]", 0)],
)
def test_types_have_their_bytes(type_, size):
    assert hlo.bytes_of(type_) == size


DECODE = """
HloModule decode

%update (a: s8[4,1024], b: s8[1,1024], i: s32[]) -> s8[4,1024] {
  %a = s8[4,1024]{1,0} parameter(0)
  %b = s8[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = s8[4,1024]{1,0} dynamic-update-slice(%a, %b, %i, %i)
}

%look_up (table: f32[900,128], i: s32[]) -> f32[1,128] {
  %table = f32[900,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %row = f32[1,128]{1,0} dynamic-slice(%table, %i, %i), dynamic_slice_sizes={1,128}
}

%body (state: (s8[4,1024], f32[900,128], bf16[256,128], s32[])) -> (s8[4,1024], f32[900,128], bf16[256,128], s32[]) {
  %state = (s8[4,1024], f32[900,128], bf16[256,128], s32[]) parameter(0)
  %cache = s8[4,1024]{1,0} get-tuple-element(%state), index=0
  %table = f32[900,128]{1,0} get-tuple-element(%state), index=1
  %weight = bf16[256,128]{1,0} get-tuple-element(%state), index=2
  %i = s32[]{:S(2)} get-tuple-element(%state), index=3
  %row = f32[1,128]{1,0:S(1)} fusion(%table, %i), kind=kLoop, calls=%look_up
  %copy-start = (bf16[256,128]{1,0:S(1)}, bf16[256,128]{1,0}, u32[]{:S(2)}) copy-start(%weight)
  %copy-done = bf16[256,128]{1,0:S(1)} copy-done(%copy-start)
  %out = s8[1,1024]{1,0:S(1)} custom-call(%row, %copy-done, %cache), custom_call_target="tpu_custom_call"
  %new = s8[4,1024]{1,0} fusion(%cache, %out, %i), kind=kLoop, calls=%update
  ROOT %next = (s8[4,1024], f32[900,128], bf16[256,128], s32[]) tuple(%new, %table, %weight, %i)
}

ENTRY %main (state: (s8[4,1024], f32[900,128], bf16[256,128], s32[])) -> (s8[4,1024]) {
  %state = (s8[4,1024], f32[900,128], bf16[256,128], s32[]) parameter(0)
  ROOT %loop = (s8[4,1024], f32[900,128], bf16[256,128], s32[]) while(%state), condition=%condition, body=%body
}
"""


def test_the_bytes_of_a_step_are_those_of_main_memory():
    row, weight, cache, slot = 4 * 128, 2 * 256 * 128, 4 * 1024, 2 * 1024
    scalar = 4 * 2  # the index, which the two fusions read
    assert traffic.bytes_of_step(DECODE) == row + weight + cache + slot + scalar
    inner = DECODE.replace("while(", "call(").replace("condition=%condition, body=%body", "to_apply=%body")
    assert traffic.bytes_of_step(inner) == 0  # a step is a turn of a loop
    called = DECODE.replace("%body (state", "%own (state").replace(
        "ENTRY",
        """%small (state: s32[]) -> s32[] {
  ROOT %state = s32[] parameter(0)
}

%body (state: (s8[4,1024], f32[900,128], bf16[256,128], s32[])) -> (s8[4,1024]) {
  %state = (s8[4,1024], f32[900,128], bf16[256,128], s32[]) parameter(0)
  ROOT %x = (s8[4,1024], s32[]) conditional(%i, %state, %state), branch_computations={%small, %own}
}

ENTRY""",
    )
    assert traffic.bytes_of_step(called) == 0  # the smallest branch
    both = called.replace("branch_computations={%small, %own}", "branch_computations={%own, %own}")
    assert traffic.bytes_of_step(both) == traffic.bytes_of_step(DECODE)


def test_collectives_are_counted_with_their_loops_and_overlap_where_something_is_computed_meanwhile():
    found = {one.kind: one for one in hlo.collectives(PROGRAM)}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.count, gather.overlapped, gather.exposed) == (10, 10 * 32 * 4 * 3 / 4, 0)
    assert {one.ports for one in found.values()} == {0}
    assert (scatter.count, scatter.overlapped, scatter.exposed) == (10, 0, 10 * 8 * 4 * 3)
    assert (found["collective-permute"].count, found["collective-permute"].exposed) == (1, 8)
    assert found["all-reduce"].exposed == 2 * 32 * 3 / 4
    assert hlo.kernels(PROGRAM) == {"pallas": 1}


@pytest.mark.parametrize(
    ("groups", "ports"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 0),  # four devices a host
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 1),
        ("replica_groups={{0,1,4,5},{2,3,6,7}}", 2),
        ("replica_groups=[2,4]<=[8]", 0),
        ("replica_groups=[1,8]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 1),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", 2),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}", 0),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", 1),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x','z'}", 2),
        ("replica_groups={}", 4),  # all devices
    ],
)
def test_a_collective_uses_the_ports_of_a_hosts_devices_in_its_group(groups, ports):
    text = PROGRAM.replace("replica_groups=mesh['x'=2,'y'=4] {'y'}", groups)
    found = {one.kind: one for one in hlo.collectives(text, islands=[0] * 4 + [1] * 4)}
    assert found["all-reduce"].ports == ports
    assert found["collective-permute"].ports == 0
    crossing = PROGRAM.replace("source_target_pairs={{0,1},{1,0}}", "source_target_pairs={{3,4},{4,3}}")
    assert {one.kind: one.ports for one in hlo.collectives(crossing, [0] * 4 + [1] * 4)}["collective-permute"] == 1


def test_a_collective_without_groups_is_one_of_all_devices():
    """XLA leaves out the groups of a sum over a mesh of one axis; the bytes are those of the ring algorithm."""
    from jax.sharding import PartitionSpec as P

    mesh = jax.sharding.Mesh(jax.devices()[:4], ("x",))
    total = jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())
    text = jax.jit(total).lower(jax.ShapeDtypeStruct((4, 32), "float32")).compile().as_text()
    text = re.sub(r"replica_groups=\S+\]|replica_groups=\{\{[\d,]+\}\}", "replica_groups={}", text)
    (found,) = hlo.collectives(text)
    assert "replica_groups={}" in text and found.kind == "all-reduce"
    assert found.exposed + found.overlapped == 2 * 32 * 4 * 3 / 4
    (found,) = hlo.collectives(text, [0, 0, 1, 1])
    assert found.ports == 2


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.25G of 15.75G hbm.", 18.25),
        (
            "RESOURCE_EXHAUSTED: memory required for HLO temporaries (264.92G) exceeds available HBM (95.74G).",
            264.92,
        ),
        ("INTERNAL: no such thing", None),
    ],
)
def test_the_bytes_that_do_not_fit_are_read_from_the_compilers_message(message, gib):
    found = bytes_needed(message)
    assert found == gib if gib is None else found == pytest.approx(gib * 2**30)


def test_products_are_counted_with_their_loops():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.einsum("abi,aoi->abo", x, w), None), x, w)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 64, 32), (5, 2, 32, 32))]
    text = jax.jit(layers).lower(*shapes).compile().as_text()
    assert hlo.operations(text) == 5 * 2 * (2 * 64 * 32 * 32)


@pytest.mark.parametrize(
    ("types", "window", "contracted"),
    [
        (("f32[64,8]", "f32[64,16]", "f32[8,16]"), "dim_labels=bf_oi->bf", 16),
        (("f32[16,8]", "f32[64,16]", "f32[64,8]"), "dim_labels=fb_io->bf", 64),
        (
            ("f32[2,64,8]", "f32[2,64,16]", "f32[2,8,16]"),
            "window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0oi->0bf",
            16,
        ),
        (("f32[64,8]", "f32[2,64,16]", "f32[2,8,16]"), "window={size=2}, dim_labels=0bf_0oi->bf", 32),
    ],
    ids=["weight", "gradient", "batched", "two axes are summed"],
)
def test_products_of_a_tpu_are_counted(types, window, contracted):
    result, left, right = types
    text = f"""\
ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = {left}{{1,0:T(8,128)}} parameter(0)
  %b = {right}{{1,0:T(8,128)}} parameter(1)
  ROOT %c = {result}{{1,0:T(8,128)}} convolution(%a, %b), {window}, metadata={{op_name="x"}}
}}
"""
    elements = np.prod([int(n) for n in result[4:-1].split(",")])
    assert hlo.operations(text) == 2 * elements * contracted


@pytest.mark.parametrize(("stride", "runs"), [(1, 10), (2, 5)])
def test_a_loop_with_a_stride_runs_less_often(stride, runs):
    text = PROGRAM.replace("%one = s32[] constant(1)", f"%one = s32[] constant({stride})")
    assert {one.kind: one.count for one in hlo.collectives(text)}["all-gather"] == runs


# Meshes and options


def test_slices_are_crossed_by_copies_of_the_model_or_stages_only():
    sizes = {"data": 3, "fsdp": 4, "stage": 1, "context": 1, "tensor": 1}
    with pytest.raises(ConfigError, match="set mesh.data to a multiple of 2"):
        mesh._across_slices(sizes, 2, [])


@pytest.mark.parametrize(
    ("grid", "shape"),
    [((4, 10, 14, 1), (35, 2, 1, 1, 8)), ((2, 2, 3, 2), (3, 2, 1, 1, 4)), ((4, 4, 1, 1), (2, 8, 1, 1, 1))],
)
def test_a_grid_of_chips_is_split_into_factors_for_any_mesh(grid, shape):
    Chip = collections.namedtuple("Chip", ("coords", "core_on_chip"))
    chips = [Chip(place[:3], place[3]) for place in itertools.product(*map(range, grid))]
    found = mesh.by_factors(shape, chips)
    assert found.shape == shape and set(found.ravel()) == set(chips)
    rows = found.reshape(-1, shape[-1])  # the last axis is along as few axes of the grid as can be
    moved = {axis for row in rows for axis in range(3) if len({chip.coords[axis] for chip in row}) > 1}
    assert len(moved) <= 2


def test_an_option_that_the_compiler_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(flags, "cpu_features", lambda: frozenset({"avx2"}))
    devices = parallel.make_mesh({"fsdp": 2}, jax.devices()[:2])
    assert parallel.compiler_options(devices) == {}
    known = {"xla_cpu_enable_fast_math": False, "xla_no_such_option": True}
    monkeypatch.setitem(flags.OPTIONS, "cpu", known)
    assert parallel.compiler_options(devices) == {"xla_cpu_enable_fast_math": False}
    assert parallel.compiler_options(parallel.single_device_mesh()) == {}
    monkeypatch.setattr(flags, "cpu_features", lambda: frozenset({"avx512_bf16"}))
    assert parallel.compiler_options(parallel.single_device_mesh()) == {"xla_cpu_prefer_vector_width": 512}


# The closed model


def test_state_is_exact_and_each_axis_of_the_mesh_splits_it():
    run, dtype = run_8b(), jnp.dtype("bfloat16")
    one = memory.training(run, {}, dtype=dtype, flash=True)
    assert one.weights == 4 * run.model.num_params
    assert one.moments == 2 * one.weights + 8  # two counters
    mixed = {"fsdp": 2, "stage": 2, "tensor": 2}
    for sizes in ({"fsdp": 8}, {"tensor": 8}, {"stage": 8}, {"fsdp": 2, "context": 4}, mixed):
        parts = memory.training(run, sizes, dtype=dtype, flash=True)
        assert parts.weights == pytest.approx(one.weights / 8, rel=0.002), sizes  # norms are copied
    int8 = memory.training(run_8b(optimizer__moments="int8"), {}, dtype=dtype, flash=True)
    assert int8.moments == pytest.approx(one.moments * (1 + 4 / 128) / 4, rel=0.001)
    lora = memory.training(run_8b(init_from="x", lora__rank=16), {}, dtype=dtype, flash=True)
    assert lora.frozen == 2 * run.model.num_params and lora.weights < one.weights / 100


def test_state_in_the_hosts_memory_is_not_on_the_device_but_for_a_layer():
    dtype, sizes = jnp.dtype("bfloat16"), {"fsdp": 8}
    plain, moved = (
        memory.training(run_8b(optimizer__offload=o), sizes, dtype=dtype, flash=True) for o in (False, True)
    )
    layers = run_8b().model.num_layers
    assert moved.host + moved.moments == plain.moments and moved.host > 0.8 * plain.moments
    assert plain.peak - moved.peak == moved.host - 2 * moved.host // layers and moved.moved == 2 * moved.host
    lora = {"init_from": "x", "lora__rank": 16, "lora__base": "int8"}
    plain, moved = (
        memory.training(run_8b(**lora, lora__offload=o), sizes, dtype=dtype, flash=True) for o in (False, True)
    )
    assert moved.host + moved.frozen == plain.frozen and moved.host > 0.7 * plain.frozen


def test_a_search_moves_moments_to_the_host_only_if_nothing_else_fits():
    (best, *_) = search.search(run_8b(), parse("v5e:8"))
    assert best.run.optimizer.offload and "--config.optimizer.offload=True" in best.flags
    assert best.memory.peak < parse("v5e:8").chip.hbm and best.memory.host
    assert not any(one.run.optimizer.offload for one in search.search(run_8b(), parse("v5e:16")))


def test_less_rematerialization_keeps_more_and_longer_rows_need_more():
    kept = [
        memory.training(run_8b(train__remat=remat), {"fsdp": 16}, dtype=jnp.dtype("bfloat16"), flash=True).activations
        for remat in ("full", "attention", "dots", "none")
    ]
    assert kept == sorted(kept) and kept[0] * 1.5 < kept[1]
    assert kept[0] == 32 * 8192 * 4096 * 2  # the input of each layer, of one row


def test_copies_from_the_host_and_hosts_of_gpus_slow_a_projected_step():
    run = run_8b()
    one = projection.project(run, parse("v5e:8"), exposed={}, overlapped={})
    copied = projection.project(run, parse("v5e:8"), exposed={}, overlapped={}, host=30e9)
    assert copied.seconds == pytest.approx(one.seconds + 2)
    many = parse("h100:16")
    for ports, bandwidth in ((0, 450e9), (1, 50e9), (8, 400e9)):
        hidden = projection.project(run, many, exposed={}, overlapped={ports: 1e15})
        assert hidden.seconds == pytest.approx(1e15 / bandwidth)
        waiting = projection.project(run, many, exposed={ports: 1e15}, overlapped={})
        assert waiting.seconds == pytest.approx(1e15 / bandwidth + one.seconds * 197 * 8 / (989 * 16))


@pytest.mark.parametrize(
    ("device", "sizes", "ports"),
    [
        ("h100:8", {"fsdp": 8}, {"embed": 0}),
        ("h100:64", {"fsdp": 64}, {"embed": 8}),
        ("h100:64", {"fsdp": 8, "tensor": 8}, {"embed": 1, "heads": 0}),
        ("h100:64", {"data": 4, "fsdp": 4, "tensor": 4}, {"gathered_batch": 1, "embed": 2, "heads": 0}),
        ("h100:16", {"tensor": 16}, {"heads": 8}),
        ("v5e:64", {"data": 4, "fsdp": 16}, {"gathered_batch": 0, "embed": 0}),
        ("2 x v5e:16", {"data": 2, "fsdp": 16}, {"gathered_batch": 1, "embed": 0}),
        ("2 x v5e:16", {"data": 4, "fsdp": 8}, {"gathered_batch": 2, "embed": 0}),
    ],
)
def test_a_mesh_axis_crosses_hosts_or_slices_through_the_ports_of_its_devices(device, sizes, ports):
    found = {axis: projection.ports(parse(device), sizes, axis) for axis in ports}
    assert found == ports


def test_flops_are_those_of_the_formula():
    run = run_8b()
    work = projection.flops(run)
    tokens = 16 * 8192
    assert work.model == pytest.approx(tokens * 51.5e9, rel=0.01)
    assert 1.3 < work.hardware / work.model < 1.34
    assert projection.flops(run_8b(train__remat="none")).hardware == work.model


# Searches


@pytest.mark.parametrize(
    ("model", "device", "length"),
    [("llama3.1-8b", "v5e:16", 8192), ("llama3.1-70b", "v5p:64", 8192), ("llama3.1-8b", "v5p:32", 131072)],
)
def test_a_search_proposes_legal_runs_that_fit_in_seconds(model, device, length):
    started = time.monotonic()
    devices = parse(device)
    found = search.search(run_8b(model, length=length), devices)
    assert time.monotonic() - started < 20
    assert found
    for one in found:
        one.run.check_mesh(one.sizes)
        assert np.prod(list(one.sizes.values())) == devices.count
        assert one.memory.peak < devices.chip.hbm
    assert found[0].projection.tokens_per_second == max(one.projection.tokens_per_second for one in found)


# The command


def test_the_command_says_what_does_not_fit_what_would_and_how_to_prove_it(capsys):
    assert program("plan", "--config", RECIPE, "--device", "v5e:4") == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "closed model" in out and "nothing fits" in out and "libtpu==" in out
    arguments = ("--config.optimizer.moments=int8", "--config.data.batch_size=8", "--config.train.accumulate=1")
    assert program("plan", "--config", RECIPE, "--device", "v5p:8", *arguments, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["by"] == "closed model" and plan["mesh"]["fsdp"] == 8
    assert sum(plan["parts"].values()) == plan["peak_bytes"] == plan["closed_peak_bytes"]
    assert plan["attention"]["kernel"] == "splash"


def test_a_search_prints_flags_that_the_command_takes(capsys):
    assert program("plan", "--config", RECIPE, "--device", "v6e:8", "--search", "--json") == 0
    best = json.loads(capsys.readouterr().out)[0]["flags"].split()
    assert program("plan", "--config", RECIPE, "--device", "v6e:8", *best) == 0
    assert program("train", "--config", RECIPE, "--plan", "v6e:8", *best) == 0
    assert "fits" in capsys.readouterr().out


def test_a_picture_is_drawn_with_every_part(tmp_path):
    path = tmp_path / "plan.svg"
    assert program("plan", "--config", RECIPE, "--device", "v5p:8", "--picture", path) == 0
    assert b"</svg>" in path.read_bytes()


def test_every_kind_has_its_facts():
    for name, chip in CHIPS.items():
        assert 1e14 < chip.flops < 1e16 and 10 << 30 < chip.hbm < 200 << 30, name
        assert (ROOT / "llama_jax" / "plan" / "targets" / f"{name}.txtpb").is_file() == (chip.platform == "cuda")
