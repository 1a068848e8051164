"""Settings that every test needs before torch starts its threads."""

from __future__ import annotations

import os
import re

import pytest

# Several ranks share the cores, and gloo must not be reachable from outside.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` takes the tests that are skipped without one."""
    for item in items:
        reasons = [str(mark.kwargs.get("reason")) for mark in item.iter_markers("skipif")]
        if any(re.search("needs .*(GPU|CUDA)", reason) for reason in reasons):
            item.add_marker("gpu")
