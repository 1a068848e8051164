"""Data of the study's kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from ratings import write_recbole


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    """A data folder with a few hundred ratings, the last of which is the latest."""
    (tmp_path / "ml-100k").mkdir()
    write_recbole(tmp_path / "ml-100k")
    return tmp_path
