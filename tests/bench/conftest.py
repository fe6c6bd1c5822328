"""Order of the benchmarks: ours first, then what XLA makes of the same."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Baselines last; the time of a run is limited, and these may be left out."""
    items.sort(key=lambda item: item.name.startswith("test_baseline"))
