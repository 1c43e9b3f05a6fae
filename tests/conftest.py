"""Shared fixtures. Tests are offline, and check every shape annotation of the package."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from jaxtyping import install_import_hook

install_import_hook(
    ["dsteer.geometry", "dsteer.activations", "dsteer.steering", "dsteer.behaviour"],
    "beartype.beartype",
)

LONG = ("test_end_to_end.py", "test_spread.py")
"""Files that take minutes: they start first, so that no process waits for them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real samples beside a development checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real samples in ../shared/data, which this checkout lacks")
    return SHARED_DATA
