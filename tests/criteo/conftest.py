"""The undisturbed run that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from criteo_runs import make_reference, write


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the data and of an undisturbed run on 2 ranks, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("reference")
    write(folder / "data")
    make_reference(folder=folder)
    return folder
