"""What CMake asks of the Python that builds: jaxlib's headers, nanobind, PyPI's CUDA packages.

Prints one CMake list: jaxlib's version; its include folder; nanobind's CMake folder; this package's
version; folders that may hold ``bin/nvcc``. JAX itself is not imported.
"""

import importlib.metadata
import importlib.util
import re
import site
import sys
from pathlib import Path


def folder(module: str) -> Path:
    """Where a package lives, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"ffi/probe.py: no module named {module} in {sys.executable}")
    return Path(next(iter(spec.submodule_search_locations)))


source = Path(__file__).parent.parent / "dsv4_jax" / "version.py"
version = re.search(r'^__version__ = "(.+)"', source.read_text(encoding="utf-8"), re.MULTILINE)
# pip's isolated build environment hides the environment it installs into; its prefix is still ours.
places = [*sys.path, *site.getsitepackages()]
cuda = [path for place in places if (path := Path(place) / "nvidia" / "cu13").is_dir()]
answers = [
    importlib.metadata.version("jaxlib"),
    folder("jaxlib") / "include",
    folder("nanobind") / "cmake",
    version.group(1) if version else "unknown",
    *dict.fromkeys(cuda),
]
print(";".join(str(answer) for answer in answers))
