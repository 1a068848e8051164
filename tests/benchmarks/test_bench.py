"""The benchmark on tables of a few rows: what it counts is right, and its report shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from benchmarks.bench import (
    BASE,
    REFERENCE,
    SWEEPS,
    Result,
    Shape,
    bench_sharded,
    bench_tbe,
    load,
    profile_table,
    profile_tbe,
    save,
    table,
)
from benchmarks.common.training import OPTIMIZERS

CPU = torch.device("cpu")
SHAPE = Shape(tables=2, rows=64, dim=8, batch=16, ids=3)


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return {result.optimizer: result for result in bench_tbe(SHAPE, CPU, turns=5)}


def test_bare_tables(results: dict[str, Result]) -> None:
    states = {name: result.state_bytes for name, result in results.items()}
    # FBGEMM's counter mode keeps a momentum, a counter and the step of the last update.
    assert states == {
        BASE: 0,
        "FrequencySGD": 4,
        "COUNTER_SGD": 12,
        "RowWiseAdagrad": 4,
        "Adagrad": 4 * SHAPE.dim,
    }
    assert results[BASE].ratio == [1, 1, 1]
    for result in results.values():
        low, middle, high = result.ratio
        assert 0 < low <= middle <= high and result.ms > 0
        # At least the output and its gradient's update are allocated in a step.
        assert result.peak_bytes >= SHAPE.batch * SHAPE.tables * SHAPE.dim * 4
    assert (
        results["FrequencySGD"].operators > results[BASE].operators == results["Adagrad"].operators
    )


def test_report(results: dict[str, Result], tmp_path: Path) -> None:
    save(list(results.values()), tmp_path / "tbe.json")
    loaded = load(tmp_path)
    assert loaded == list(results.values())
    text = table(loaded)
    assert f"| tbe, 1 | {SHAPE} | {results[BASE].ms:.3g} |" in text
    low, middle, high = results["Adagrad"].ratio
    assert f"{middle:.2f} ({low:.2f} to {high:.2f})" in text
    with pytest.raises(SystemExit, match="make bench"):
        load(tmp_path / "none")


def test_profile_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    profiles: list[torch.profiler.profile] = []
    profile = torch.profiler.profile

    def recorded() -> torch.profiler.profile:
        profiles.append(profile())
        return profiles[-1]

    monkeypatch.setattr(torch.profiler, "profile", recorded)
    *_, total = rows = [
        [float(cell) for cell in line.split("|")[2:8]]
        for line in profile_table(profile_tbe(SHAPE, CPU, steps=2)).splitlines()
        if line.startswith("|") and line[2] != "-" and "SGD |" not in line
    ]
    assert len(rows) == 14
    for column in range(6):
        assert sum(row[column] for row in rows[:-1]) == pytest.approx(total[column], abs=0.1)
    # Of two for each optimizer the first is to warm up.
    for column, recorded_profile in enumerate(profiles[1::2]):
        spent = sum(event.self_cpu_time_total for event in recorded_profile.key_averages())
        assert total[column] == pytest.approx(spent / 2e3, abs=0.01)


def test_profile_names_what_counts() -> None:
    profile = profile_table(profile_tbe(SHAPE, CPU, steps=2), lines=1000)
    (count,) = (line for line in profile.splitlines() if "aten::scatter_add_" in line)
    assert count.split("|")[2].strip() == "0.000"
    assert "fbgemm::split_embedding_backward_codegen_rowwise_adagrad_cpu" in profile


def test_sweeps_vary_one_number() -> None:
    assert len(set(REFERENCE)) == 3
    base = vars(SWEEPS[0])
    changed = [{k: v for k, v in vars(shape).items() if v != base[k]} for shape in SWEEPS[1:]]
    assert all(len(fields) == 1 for fields in changed)
    assert {field for fields in changed for field in fields} >= {"rows", "dim", "batch", "ids"}
    assert len(set(SWEEPS)) == len(SWEEPS)


@on_ranks(2)
def test_sharded() -> None:
    found = bench_sharded(SHAPE, CPU, turns=3)
    assert [(r.workload, r.optimizer) for r in found] == [
        (workload, optimizer) for workload in ("collection", "DLRM") for optimizer in OPTIMIZERS
    ]
    for result in found:
        assert result.ranks == 2
        assert (result.optimizer != "FrequencySGD") or result.state_bytes == 4
        assert (result.optimizer != BASE) or result.ratio == [1, 1, 1]
