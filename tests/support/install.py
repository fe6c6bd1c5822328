"""Copies of the package to run from."""

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path

import dsv4_jax
from dsv4_jax import library


@contextlib.contextmanager
def read_only_copy(folder: Path) -> Generator[Path]:
    """The package in ``folder``, where nothing can be written, and nothing must have been."""
    source = Path(library._ffi.__file__)  # beside the package, or elsewhere in an editable install
    shutil.copytree(
        Path(dsv4_jax.__file__).parent,
        folder / "dsv4_jax",
        ignore=shutil.ignore_patterns("__pycache__", "*.so"),
    )
    shutil.copy(source, folder / "dsv4_jax" / source.name)
    inside = sorted(folder.rglob("*"))
    for path in (*inside, folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    assert sorted(folder.rglob("*")) == inside
    for path in (folder, *inside):
        path.chmod(0o755)
