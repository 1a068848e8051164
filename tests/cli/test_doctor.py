"""The doctor: what it says of a machine that works, and of ones that are broken on purpose."""

from __future__ import annotations

import functools

import pytest
from programs import Program


def doctor(before: str = "") -> tuple[int, list[str]]:
    """Exit status and lines of the doctor, where ``before`` has broken something."""
    broken = functools.partial(exec, before, {})
    program = Program("torchrec_freq", ["doctor"], before=broken)
    (status,) = program.wait()
    assert program.err == ""
    return status, program.out.splitlines()


def test_training_works_here() -> None:
    status, lines = doctor()
    assert status == 0 and lines[-1] == "Training works here."
    assert {line[:5] for line in lines[:-1]} <= {"ok   ", "Repai", "  /"}
    shardings = ("table-wise", "row-wise", "column-wise", "table-row-wise", "grid", "data-parallel")
    for sharding in shardings:
        assert f"ok    {sharding}, fused: works" in lines
    assert any("8 bytes a row" in line for line in lines)


@pytest.mark.parametrize(
    ("before", "text"),
    [
        (
            "from torchrec_freq.engine import tbe\n"
            "rule = tbe.prior_change\n"
            "tbe.prior_change = lambda *inputs: rule(*inputs) * 1.001",
            "table-wise, fused: weights differ by up to",
        ),
        (
            "from torchrec_freq.engine.tbe import FrequencyTBE\n"
            "FrequencyTBE._count = lambda self, rows_L: None",
            "row-wise, fused: the counts are wrong",
        ),
        (
            "from torchrec_freq.engine.tbe import FrequencyTBE\n"
            "def fail(*inputs, **options): raise RuntimeError('no such kernel\\nmore')\n"
            "FrequencyTBE.forward = fail",
            "grid, fused: RuntimeError: no such kernel",
        ),
        (
            "import torch.distributed as dist\n"
            "def fail(*inputs, **options): raise RuntimeError('unhandled system error')\n"
            "dist.init_process_group = fail",
            "gloo: RuntimeError: unhandled system error",
        ),
    ],
    ids=["rule", "counts", "kernel", "communication"],
)
def test_what_is_broken_is_found(before: str, text: str) -> None:
    status, lines = doctor(before)
    assert status == 1
    assert any(line.startswith(f"FAIL  {text}") for line in lines), lines
    repair = lines.index("Repair:")
    assert "pip" in lines[repair + 1] and lines[-1] == "Training would fail here."
