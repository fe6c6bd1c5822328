"""Every registered op on small shapes, for compute-sanitizer; `.ci/gpu --sanitize` runs it.

    compute-sanitizer --tool racecheck --kernel-name kns=dsv4 python -m tests.bench.sanitize

Needs ``XLA_FLAGS=--xla_gpu_enable_command_buffer=`` and ``XLA_PYTHON_CLIENT_ALLOCATOR=platform``:
plain launches, and allocations of their own that memcheck can see the ends of. With ``--fault`` an
op is handed an address that nobody allocated: what the checker must find, or it looks elsewhere.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.rmsnorm_nvfp4 import rmsnorm_nvfp4
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.bench.timing import random_bytes

__all__ = ["CASES", "fault", "run", "view_of_address"]

NOWHERE = 0x10000
"""No GPU allocation begins this low; aligned as XLA wants its buffers."""


def _rmsnorm_nvfp4() -> Iterator[Any]:
    """Half a warp, several warps with a tail, most threads; more tokens than thread blocks."""
    rng = np.random.default_rng(0)
    for t, d in ((3, 16), (2, 528), (3, 7168), (2, 16384), (1200, 2064)):
        x = jnp.asarray(rng.standard_normal((t, d)), jnp.bfloat16)
        weight = jnp.asarray(rng.standard_normal(d), jnp.bfloat16)
        yield rmsnorm_nvfp4(x, weight, 1e-6)
        yield rmsnorm_nvfp4(x, weight, 1e-6, jnp.float32(0.01))


def _cache_write() -> Iterator[Any]:
    """Units of 1, 4 and 16 bytes, packed codes, slots outside the cache, several arrays."""
    b, t, s = 3, 5, 4
    slots = jnp.asarray([[-1, 0, 3, 4, 1], [2**31 - 1, 2, -(2**31), 0, 9], [3, 2, 1, 0, -1]])
    forms = {"nope": (448, E4M3), "scale": (7, UE8M0), "rope": (64, jnp.bfloat16)}
    forms |= {"codes": (14, E2M1), "state": (33, jnp.float32)}
    cache = {name: random_bytes(0, (b, s, d), dtype) for name, (d, dtype) in forms.items()}
    rows = {name: random_bytes(1, (b, t, d), dtype) for name, (d, dtype) in forms.items()}
    yield cache_write(cache, rows, slots)
    yield jax.jit(lambda c, r, j: cache_write(c, r, j), donate_argnums=0)(cache, rows, slots)


CASES: dict[str, Callable[[], Iterator[Any]]] = {
    "dsv4.cache_write": _cache_write,
    "dsv4.rmsnorm_nvfp4": _rmsnorm_nvfp4,
}
"""One function per target of the library; a target without one is an error."""


class _Dtype(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _Dtype),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        # The rest of DLManagedTensor.
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class _Exporter:
    """What `jax.dlpack.from_dlpack` asks of an array, for FP32 at any address."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.dims = (ctypes.c_int64 * len(shape))(*shape)
        self.device = (2, 0) if jax.default_backend() == "gpu" else (1, 0)  # kDLCUDA, kDLCPU
        # Called at the end of the view, maybe of the process: C code without an effect.
        deleter = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p)
        self.tensor = _Tensor(
            address, *self.device, len(shape), _Dtype(2, 32, 1), self.dims, None, 0, None, deleter
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


_alive: list[_Exporter] = []  # a view has no owner that could free it


def view_of_address(address: int, shape: tuple[int, ...]) -> jax.Array:
    """FP32 at any address of the default device, allocated or not."""
    _alive.append(_Exporter(address, shape))
    return jax.dlpack.from_dlpack(_alive[-1])


def fault() -> None:
    """Rows to write, read from nowhere; ends the process."""
    cache, slots = jnp.zeros((1, 4, 64)), jnp.zeros((1, 1), jnp.int32)
    jax.block_until_ready(cache_write(cache, jnp.zeros((1, 1, 64)), slots))  # a sound one first
    try:
        jax.block_until_ready(cache_write(cache, view_of_address(NOWHERE, (1, 1, 64)), slots))
        print("no error")
    except jax.errors.JaxRuntimeError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)  # nothing on this device can be torn down any more


def run() -> dict[str, int]:
    """Calls every op; how many launches each made."""
    missing = sorted(set(library.targets()) ^ set(CASES))
    if missing:
        raise SystemExit(f"tests/bench/sanitize.py: cases and targets differ in {missing}")
    done: dict[str, int] = {}
    for target, calls in CASES.items():
        results = [jax.block_until_ready(result) for result in calls()]
        done[target] = len(results)
        captured, eager = library.launch_counts()[target]
        if jax.default_backend() == "gpu" and (captured or eager < len(results)):
            raise SystemExit(f"{target}: {eager} launches of {len(results)}, {captured} captured")
    return done


if __name__ == "__main__":
    if sys.argv[1:] == ["--fault"]:
        fault()
    else:
        for name, count in run().items():
            print(f"{name}: {count} calls on {jax.default_backend()}")
