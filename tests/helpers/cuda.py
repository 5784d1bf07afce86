"""The CUDA kernels on a CPU: their source is compiled as C++ with tests/ops/emulated.h, whose threads are fibers."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np

from llama_jax.ops.gpu import build

EMULATED = Path(__file__).parents[1] / "ops" / "emulated.h"
_MAIN = """
struct Any {{ const void* p; template <class T> operator T*() const {{ return (T*)p; }} }};
static Any given[{count}];
extern "C" void run(const void** pointers, int x, int y, int z) {{
  for (int i = 0; i < {count}; i++) given[i] = {{pointers[i]}};
  launch(x, y, z, {threads}, {shared}, [] {{ {name}({arguments}); }});
}}
"""


def emulated(eager=False):
    """A stand-in for `build.call` whose kernels run on this CPU. With `eager`, copies take place when they start."""

    def call(name, constants, operands, results, *, grid, threads, shared, in_place=None):
        count = len(operands) + len(results)
        run = _compiled(name, tuple(constants.items()), count, threads, shared, eager)

        def callback(*arrays):
            outs = [np.full(r.shape, 0xFF, np.uint8).astype(r.dtype) for r in results]
            for operand, result in (in_place or {}).items():
                outs[result][...] = arrays[operand]
            kept = [np.ascontiguousarray(a) for a in arrays] + outs
            pointers = (ctypes.c_void_p * count)(*[a.ctypes.data for a in kept])
            run(pointers, *(list(grid) + [1, 1])[:3])
            return outs

        return list(jax.pure_callback(callback, results, *operands))

    return call


@functools.cache
def _compiled(name, constants, count, threads, shared, eager):
    arguments = ", ".join(f"given[{i}]" for i in range(count))
    includes = [EMULATED, build.HERE / "numbers.cuh", build.HERE / "units.cuh", build.HERE / f"{name}.cu"]
    source = "".join(f'#include "{path}"\n' for path in includes)
    source += _MAIN.format(count=count, threads=threads, shared=shared, name=name, arguments=arguments)
    defines = [f"-D{key}={value}" for key, value in constants] + (["-DEAGER"] if eager else [])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cc")
        path.write_text(source)
        library = path.with_suffix(".so")
        command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", *defines, "-o", str(library), str(path)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library)).run
