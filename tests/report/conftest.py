"""Made-up runs, written once a session: tests that change one make a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from fabricate import STAGES, fabricate

from dsteer.report.figures import draw


@pytest.fixture(scope="session")
def drawn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, the first undefined, with figures. Not to be changed."""
    run = fabricate(tmp_path_factory.mktemp("drawn") / "run", undefined={0})
    for stage in STAGES:
        draw(stage, run / stage)
    return run
