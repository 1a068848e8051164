"""The plan command: what fits, against bytes counted by hand, and what it refuses."""

from __future__ import annotations

import pytest

from torchrec_freq.__main__ import main

GB = 1 << 30
TABLES = ["user=1000000x64", "item=3000000x64x10", "shop=10x16x0.5"]


def plan(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, list[str]]:
    """The cells behind each optimizer's name."""
    assert main(["plan", *TABLES, "--batch-size", "512", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line[1:] for line in cells if len(line) == 5 and set(line[0]) - set("-")}


def test_memory_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """On one GPU: the whole tables, with the state of each optimizer, and little for a batch."""
    rows = 4_000_010
    weights = (rows - 10) * 64 * 4 + 10 * 16 * 4
    found = plan(capsys, "--ranks", "1", "--hbm-gb", "40")
    state = {
        "FrequencySGD": 8 * rows,
        "SGD": 0,
        "RowWiseAdagrad": 4 * rows,
        "Adagrad": weights,
        "Adam": 2 * weights,
    }
    assert found.pop("optimizer")[0] == "fits"
    assert set(found) == set(state)
    for name, (fits, hbm, ddr, step) in found.items():
        assert fits == "in HBM" and float(ddr) == 0 and float(step) > 0
        assert float(hbm) == pytest.approx((weights + state[name]) / GB, rel=0.05), name


def test_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    # Of 4 x 0.34 GB, 1.16 are for tables: the weights are 0.95 GB, our sums and counters 0.03.
    small = plan(capsys, "--ranks", "4", "--hbm-gb", "0.34")
    fits = {name: small[name][0] for name in ("FrequencySGD", "RowWiseAdagrad", "Adagrad", "Adam")}
    assert fits == {
        "FrequencySGD": "in HBM",
        "RowWiseAdagrad": "in HBM",
        "Adagrad": "with a cache",
        "Adam": "with a cache",
    }
    half = plan(capsys, "--ranks", "4", "--hbm-gb", "0.2", "--dtype", "fp16", "--optimizer", "SGD")
    assert half["SGD"][0] == "in HBM"
    none = plan(capsys, "--ranks", "4", "--hbm-gb", "0.002", "--optimizer", "SGD")
    assert none["SGD"] == ["no", "", "", ""]


def test_torchrecs_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", *TABLES, "--ranks", "16", "--optimizer", "FrequencySGD"]
    assert main([*command, "--report"]) == 0
    printed = capsys.readouterr().out
    assert "3 tables, 4,000,010 rows, 16 GPUs" in printed
    assert "Planner Statistics" in printed and "Compute Kernels Optimizer State" in printed
    assert main(command) == 0
    assert "Planner Statistics" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a=0x64"], "must be above 0"),
        (["a=10x18"], "columns a multiple of 4"),
        (["a=10x16x0"], "must be above 0"),
        (["a=10"], "is not NAME=ROWSxCOLUMNS"),
        (["a=-1x16"], "is not NAME=ROWSxCOLUMNS"),
        (["a=9999999999999x16"], "is not NAME=ROWSxCOLUMNS"),
        (["a.b=10x16"], "is not NAME=ROWSxCOLUMNS"),
        (["training=10x16"], "cannot have a table of this name"),
        (["a=10x16", "a=9x16"], "needs a name of its own"),
        (["a=10x16", "--ranks", "12"], "--ranks 12 is no multiple of --ranks-per-host 8"),
        (["a=10x16", "--ranks", "5000"], "is not a whole number from 1 to 4096"),
        (["a=10x16", "--hbm-gb", "inf"], "is not a number above 0"),
        (["a=10x16", "--reserved", "1"], "is not a number above 0 and below 1"),
        (["a=10x16", "--timeout", "0"], "is not a whole number"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    try:
        status: object = main(["plan", *arguments])
    except SystemExit as exit:  # argparse
        status = exit.code
    assert status == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("python -m torchrec_freq plan: error: ") and message in line
