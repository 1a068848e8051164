"""The doctor: what it says of a machine that works, and of ones that are broken on purpose."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import Program

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str, before: str = "") -> tuple[int, str]:
    """Exit status and output of the doctor, where ``before`` has broken something."""
    broken = functools.partial(exec, before, {})
    program = Program("torchrec_freq", ["doctor", *arguments], before=broken)
    (status,) = program.wait()
    return status, program.out + (program.err if status else "")


@pytest.fixture(scope="module")
def here() -> list[dict[str, Any]]:
    status, output = doctor("--json")
    assert status == 0, output
    findings: list[dict[str, Any]] = json.loads(output)
    return findings


def test_training_works_here(here: list[dict[str, Any]]) -> None:
    assert {finding["state"] for finding in here} <= {"ok", "note"}
    (tested,) = (finding["text"] for finding in here if finding["name"] == "self-test")
    for sharding in ("table-wise", "row-wise", "column-wise", "table-row-wise", "grid"):
        assert f" {sharding}" in tested
    assert "data-parallel" in tested


def test_what_is_missing_comes_with_a_command(here: list[dict[str, Any]]) -> None:
    for finding in here:
        assert finding["fix"] if finding["state"] == "note" else not finding["fix"]


@pytest.mark.parametrize(
    ("before", "text"),
    [
        (
            "from torchrec_freq.engine import loans\n"
            "rule = loans.lent_squares\n"
            "loans.lent_squares = lambda *inputs: rule(*inputs) * 1.001",
            "table-wise: weights differ by up to",
        ),
        (
            "from torchrec_freq.engine import loans\n"
            "loans.counted = lambda mode, before, now: before",
            "row-wise: the counts are wrong",
        ),
        (
            "from torchrec_freq.engine.tbe import FrequencyTBE\n"
            "def fail(*inputs, **options): raise RuntimeError('no such kernel')\n"
            "FrequencyTBE.forward = fail",
            "table-wise: RuntimeError: no such kernel",
        ),
        (
            "import torch.distributed as dist\n"
            "dist.is_gloo_available = dist.is_nccl_available = lambda: False",
            "training needs",
        ),
        (
            "import torch.distributed as dist\n"
            "def fail(*inputs, **options): raise RuntimeError('unhandled system error')\n"
            "dist.all_reduce = fail",
            "does not start: unhandled system error",
        ),
    ],
    ids=["rule", "counts", "kernel", "no backend", "communication"],
)
def test_what_is_broken_is_found(before: str, text: str) -> None:
    status, output = doctor(before=before)
    assert status == 1
    line = next(line for line in output.splitlines() if text in line)
    assert line.startswith("FAIL")
    after = output[output.index(line) :].splitlines()
    assert "pip" in after[1], "the command that fixes it"
    assert "Training would fail" in output


def test_versions_that_do_not_fit_are_refused_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "torchrec").mkdir()
    (tmp_path / "torchrec" / "__init__.py").touch()
    (tmp_path / "torchrec" / "version.py").write_text('__version__ = "1.5.0"\n')
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-m", "torchrec_freq", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "TorchRec 1.5.0" in result.stderr
    assert "pip install" in result.stderr
    assert "Traceback" not in result.stderr
