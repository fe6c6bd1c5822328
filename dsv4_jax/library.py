"""The compiled library: its import guard, its registration with XLA, the one way to call a target.

Importing this module registers the targets ``dsv4.<op>`` for the platforms ``cpu`` and ``CUDA``;
nothing else of it has an effect. A library without CUDA code registers CUDA handlers that say so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxlib.version import __version__ as _jaxlib

from dsv4_jax import env
from dsv4_jax.typing import Array
from dsv4_jax.version import __version__

try:
    # Not `from dsv4_jax import`: where it is missing that suspects a circular import.
    import dsv4_jax._ffi as _ffi
except ImportError as error:
    raise ImportError(
        f"dsv4_jax: the compiled library dsv4_jax._ffi cannot be imported ({error}); build it with "
        f"`pip install .` in the checkout (`pip install -e .` to work on it). The folder "
        f"reference/ works without it"
    ) from error

__all__ = ["build_info", "call", "cuda_driver", "launch_counts", "targets"]

ABI = 4
"""Version of the contract between the op modules and the handlers (``kAbi`` in ffi/common)."""


def build_info() -> dict[str, Any]:
    """What the library was built from and for."""
    return dict(_ffi.build_info())


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check_versions(info: Mapping[str, Any], jaxlib_version: str) -> None:
    """The guard in front of the registration.

    Raises:
        ImportError: the library was built for a newer jaxlib, or from another dsv4_jax.
    """
    if _minor(jaxlib_version) < _minor(info["jaxlib"]):
        raise ImportError(
            f"dsv4_jax: the library was built with the FFI headers of jaxlib {info['jaxlib']}, "
            f"and jaxlib {jaxlib_version} is installed; headers must not be newer than the "
            f"runtime: upgrade jaxlib, or rebuild with `pip install .`"
        )
    if (info["version"], info["abi"]) != (__version__, ABI):
        raise ImportError(
            f"dsv4_jax: the library was built from version {info['version']} (abi {info['abi']}), "
            f"the Python code is {__version__} (abi {ABI}); rebuild it with `pip install .`"
        )


def targets() -> list[str]:
    """Names of the FFI targets, the same on every platform."""
    return sorted(_ffi.registrations(False)["cpu"])


def launch_counts() -> dict[str, tuple[int, int]]:
    """CUDA launches per target so far: (while a graph was being captured, straight away)."""
    return dict(_ffi.launch_counts())


def cuda_driver() -> int:
    """CUDA version the driver supports, as 13000 for 13.0; 0 without a driver."""
    return int(_ffi.cuda_driver())


def call(
    op: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Array,
    aliases: Mapping[int, int] | None = None,
    vmap: Literal["broadcast_all", "sequential"] = "sequential",
    **attributes: np.generic | np.ndarray | str,
) -> list[Array]:
    """Calls ``dsv4.<op>``; ``aliases`` maps operands to the results that share their buffer.

    ``vmap``: whether the handler takes further leading axes or is called once per element.
    Attributes must be numpy scalars or arrays, or text: a handler decodes them by exact type.
    """
    target = jax.ffi.ffi_call(
        f"dsv4.{op}",
        list(results),
        input_output_aliases=dict(aliases or {}),
        vmap_method=vmap,
    )
    return list(target(*operands, abi=np.int32(ABI), **attributes))


check_versions(build_info(), _jaxlib)
_ffi.set_sync(env.sync())
for _platform, _handlers in _ffi.registrations(env.sync()).items():
    for _target, _handler in _handlers.items():
        jax.ffi.register_ffi_target(_target, _handler, platform=_platform)
