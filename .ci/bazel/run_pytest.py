"""Runs pytest for Bazel over the files it names, against the library it built."""

import os
import sys
from pathlib import Path

import pytest

RUNFILES = Path(os.environ["TEST_SRCDIR"], os.environ["TEST_WORKSPACE"])


def pytest_sessionstart() -> None:
    """Refuses a library from elsewhere: one in the source tree, or an installed one."""
    from dsv4_jax import _ffi

    library = Path(_ffi.__file__)
    here = library.parent.resolve() == (RUNFILES / "dsv4_jax").resolve()
    if not here or "bazel-out" not in library.resolve().parts:
        raise pytest.UsageError(f"dsv4_jax._ffi is {library}, not the library that Bazel built")
    print(f"{library.resolve()}: {_ffi.build_info()}")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.dont_write_bytecode = True
    # `pip install -e .` puts a finder in front of sys.path.
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
    arguments = [
        f"--rootdir={RUNFILES}",
        f"--basetemp={os.environ['TEST_TMPDIR']}/pytest",
        f"--junitxml={os.environ['XML_OUTPUT_FILE']}",
        "-pno:cacheprovider",
        "-mnot bench and not slow",
        *sys.argv[1:],
    ]
    raise SystemExit(pytest.main(arguments, plugins=[sys.modules[__name__]]))
