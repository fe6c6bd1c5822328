"""Settings of every test run: CPU unless told otherwise, fixed seeds, no compilation cache."""

import os
import signal

# Before the first import of JAX. `JAX_PLATFORMS=cuda pytest -m gpu` runs the GPU tests.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A cache from another build of the package could hide a changed contract.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
# Nor is one made: `dsv4 generate` would put it into the home directory.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import pytest
from hypothesis import settings

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Derandomised: hypothesis takes its seed from the test itself. Compilation has no fair deadline.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_report_header() -> str:
    """What a failure needs to be repeated."""
    return (
        f"jax {jax.__version__} on {os.environ['JAX_PLATFORMS']}; seeds: literals in the tests, "
        f"hypothesis derandomised (HYPOTHESIS_PROFILE=default for random ones)"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips GPU tests where there is none."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU and JAX_PLATFORMS=cuda")
