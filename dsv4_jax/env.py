"""Environment variables of the package, read here and nowhere else, and what `dsv4 env` prints.

``DSV4_SYNC=1``: wait for the GPU after every op of ours and name the op in the error, should there
be one. Read once, at import; XLA then calls the ops one by one instead of from a captured graph.

``XDG_CACHE_HOME``: where the ``dsv4`` command keeps compiled programs (default ``~/.cache``) unless
``JAX_COMPILATION_CACHE_DIR`` names a place; ``JAX_ENABLE_COMPILATION_CACHE=0`` keeps none.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

__all__ = ["check_writable", "compilation_cache", "devices", "report", "sync"]

_VARIABLES = ("DSV4_SYNC",)
# Not ours, but they decide what runs where.
_RELATED = (
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_COMPILATION_CACHE",
    "XDG_CACHE_HOME",
    "XLA_FLAGS",
    "CUDA_VISIBLE_DEVICES",
)
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax-cuda13-plugin", "jax-cuda13-pjrt")


def sync() -> bool:
    """Whether every op is followed by a synchronisation.

    Raises:
        ValueError: ``DSV4_SYNC`` is neither 0 nor 1.
    """
    value = os.environ.get("DSV4_SYNC", "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"DSV4_SYNC must be 0 or 1, got {value!r}")
    return value == "1"


def devices() -> list[Any]:
    """The devices that JAX computes on.

    Raises:
        RuntimeError: there are none; says why.
    """
    try:
        return jax.devices()
    except (AssertionError, AttributeError) as error:
        # What JAX 0.10 to 0.12 raises where JAX_PLATFORMS=cuda and there is no NVIDIA GPU.
        raise RuntimeError(
            "JAX_PLATFORMS asks for CUDA alone and no NVIDIA GPU is visible; JAX_PLATFORMS=cpu "
            "runs on the CPU"
        ) from error


def compilation_cache() -> str | None:
    """Where the ``dsv4`` command keeps compiled programs; ``None``: nowhere.

    Our own directory is named after everything that a program may depend on and that JAX does not
    put into its key: this package, the contract with its library, the instructions of the CPU.
    """
    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen is not None:
        return chosen or None
    from dsv4_jax.library import ABI
    from dsv4_jax.version import __version__

    # As the XDG specification has it, a relative path counts as none.
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return str(home / "dsv4_jax" / f"{__version__}-abi{ABI}-{_cpu()}")


def _cpu() -> str:
    """A name for the instruction set: home directories are shared between machines."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:  # not Linux
        found = None
    what = platform.machine() + (found[0] if found else "")
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def check_writable(directory: str) -> None:
    """Makes the directory (for its owner alone: JAX runs what it reads there) and tries it.

    Raises:
        OSError: nothing can be written there.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def report() -> dict[str, str]:
    """Versions, devices, what the compiled library holds and the variables, for a bug report."""
    from dsv4_jax import library  # which itself reads `sync`

    info = library.build_info()
    lines = {
        "dsv4_jax": str(info["version"]),
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
    }
    for package in _PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[package] = "not installed"
    lines["library"] = (
        f"{info['compiler']}, FFI {'.'.join(map(str, info['ffi_api']))} of jaxlib "
        f"{info['jaxlib']}, abi {info['abi']}"
    )
    lines["library archs"] = str(info["cuda_archs"]) or "CPU only"
    lines["CUDA runtime"] = _cuda_version(info["cuda_runtime"])
    lines["CUDA driver"] = _driver(library.cuda_driver(), info["cuda_runtime"])
    lines["devices"] = _devices()
    lines["compilation cache"] = compilation_cache() or "off"
    for name in (*_VARIABLES, *_RELATED):
        lines[name] = os.environ.get(name, "not set")
    return lines


def _cuda_version(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}" if version else "none"


def _driver(driver: int, runtime: int) -> str:
    """What the driver supports; kernels of a newer major version do not load."""
    text = _cuda_version(driver)
    if driver and driver // 1000 < runtime // 1000:
        text += f", too old for CUDA {_cuda_version(runtime)}: update the NVIDIA driver"
    return text


def _devices() -> str:
    try:
        found = devices()
    except RuntimeError as error:  # JAX_PLATFORMS names a platform that is not there
        return f"none: {error}"
    names: list[str] = []
    for device in found:
        capability = getattr(device, "compute_capability", None)
        arch = f" (sm_{capability.replace('.', '')})" if capability else ""
        names.append(f"{device.platform}:{device.id} {device.device_kind}{arch}")
    return ", ".join(names)
