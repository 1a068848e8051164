"""The benchmark on tables of a few rows: what it counts is right, and its report shows it."""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from programs import run
from ranks import on_ranks

from benchmarks.bench import __main__ as bench
from benchmarks.bench.measure import TURN, measure
from benchmarks.bench.workloads import BASE, OURS, Shape, bare_tables, draw_ids, sharded
from torchrec_freq import row_counts

CPU = torch.device("cpu")
SHAPE = Shape(tables=2, rows=64, dim=8, batch=16, ids=3)


def test_turns_are_means_over_eight_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = 0.0, []

    def step(name: str, ms: float, sampled: float) -> Any:
        def run(number: int) -> None:
            nonlocal now
            order.append(name)
            now += (sampled if number % TURN == 3 else ms) / 1e3

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    steps = {"a": step("a", 1, 1), "b": step("b", 2, 10)}
    found = measure(steps, CPU, lookups=1, turns=5, warm_up=4)
    assert found["a"].ms == pytest.approx([1] * 5)
    assert found["b"].ms == pytest.approx([3] * 5)
    timed = order[: 2 * (4 + 5 * TURN)]
    pairs = {tuple(timed[i : i + 2]) for i in range(0, len(timed), 2)}
    assert pairs == {("a", "b"), ("b", "a")}, "they alternate, and not always the same goes first"


def test_operators_and_bytes() -> None:
    table, rows = torch.arange(1000), torch.tensor([5, 7, 7])

    def step(number: int) -> None:
        found = table.index_select(0, rows).view(3)  # 3 of the table, 3 rows, 3 written
        if number == 2:
            found.neg()

    (found,) = measure({"a": step}, CPU, lookups=3, turns=1, warm_up=0).values()
    assert found.operators == (1, 2)
    assert found.bytes_moved == 3 * 3 * 8


def test_peak_is_without_garbage_of_earlier_steps() -> None:
    def leave(_: int) -> None:
        garbage: list[Any] = [torch.empty(13)]
        garbage.append(garbage)

    def step(_: int) -> None:
        gc.collect()
        torch.empty(256)

    gc.disable()  # or it is collected before the step, by chance
    try:
        found = measure({"a": leave, "b": step}, CPU, lookups=1, turns=1, warm_up=0)
    finally:
        gc.enable()
    assert found["b"].bytes_peak == 1024


def test_ids_are_zipf() -> None:
    shape = Shape(tables=1, rows=1000, dim=8, batch=100_000, ids=2)
    ids, offsets = draw_ids(shape, shape.batch, seed=0)
    assert torch.equal(offsets, torch.arange(100_001) * 2)
    counts = ids.bincount(minlength=1000).sort(descending=True).values.double()
    expected = torch.arange(1, 1001).double() ** -1.05
    share = (counts / counts.sum()).cumsum(0)
    wanted = (expected / expected.sum()).cumsum(0)
    assert (share - wanted).abs().max() < 0.01
    assert int(ids.mode().values) != 0, "frequent rows lie anywhere"


@on_ranks(2)
def test_sharded() -> None:
    for dlrm in (False, True):
        makers = sharded(SHAPE, CPU, dlrm=dlrm)
        steps = {name: make() for name, make in makers.items()}
        found = measure(steps, CPU, SHAPE.lookups // 2, turns=1, warm_up=0)
        assert list(found) == [BASE, OURS, "SGD"]
        assert found[OURS].operators[0] > found[BASE].operators[0] >= found["SGD"].operators[0]


@on_ranks(1)
def test_what_is_timed_trains_on_the_ids() -> None:
    assert dist.get_world_size() == 1
    make = sharded(SHAPE, CPU, dlrm=False)[OURS]
    step: Any = make()
    step(0)
    (model,) = (c.cell_contents for c in step.__closure__ if hasattr(c.cell_contents, "plan"))
    ids, _ = draw_ids(SHAPE, SHAPE.batch, seed=0)
    for name, of_table in zip(("t0", "t1"), ids.view(2, -1), strict=True):
        wanted = of_table.bincount(minlength=SHAPE.rows)
        assert torch.equal(row_counts(model)[name].long(), wanted)


@on_ranks(1)
def test_an_optimizer_that_fails_does_not_take_the_others_along(tmp_path: Path) -> None:
    def fail() -> Any:
        raise KeyError("no such kernel")

    makers = bare_tables(SHAPE, CPU)
    steps = bench.working("case", {**makers, "COUNTER_SGD": fail}, tmp_path)
    assert steps.keys() == makers.keys() - {"COUNTER_SGD"}
    (record,) = (tmp_path / "records.jsonl").read_text().splitlines()
    assert json.loads(record) == {
        "left out": "case, COUNTER_SGD",
        "why": "KeyError: 'no such kernel'",
    }
    with pytest.raises(KeyError):
        bench.working("case", {**makers, OURS: fail}, tmp_path)


def test_jobs_end_with_their_time_and_say_what_was_wrong() -> None:
    def error(code: str, seconds: float = 60) -> Any:
        return bench.Job("job", "timeit", ("-n", 1, "-r", 1, code)).run(seconds, {})["error"]

    assert error("1") is None
    assert error("1 / 0") == "ended with 1: ZeroDivisionError: division by zero"
    start = time.monotonic()
    assert error("import time; time.sleep(100)", seconds=2) == "ended: its time was over"
    assert time.monotonic() - start < 30


def test_without_a_gpu_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "--gpu", "--out", str(tmp_path / "out")])
    assert bench.main() == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Needs a GPU") and torch.__version__ in line
    assert not (tmp_path / "out").exists()


def test_report_has_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    run("benchmarks.bench", "--work", "tables", "--rehearse", "--out", tmp_path)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    cases = [f"bare tables, 1 | {shape}" for shape in bench.TINY]
    assert records[0] == {"planned": cases}
    assert {(r["case"], r["optimizer"]) for r in records[1:]} == {
        (case, name) for case in cases for name in (BASE, OURS, "SGD", "COUNTER_SGD")
    }
    failed = {"said": ["1 failed"], "error": "ended with 1: 1 failed", "seconds": 1}
    kept = [r for r in records if r.get("case") != cases[1]]
    page = bench.markdown({"machine": {}, "records": kept, "jobs": {"tests": failed}})
    (ours,) = (r for r in kept if r.get("case") == cases[0] and r["optimizer"] == OURS)
    (base,) = (r for r in kept if r.get("case") == cases[0] and r["optimizer"] == BASE)
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {cases[0]} |"))
    assert f"| {base['ms']:.3g} | {ours['ratio'][1]:.2f} (" in row
    assert f"| {ours['operators'][0] - base['operators'][0]}, " in row
    peak = (ours["bytes_peak"] - base["bytes_peak"]) / ours["lookups"]
    assert row.endswith(f"| {peak:.0f} |")
    assert f"- {cases[1]}: not reached" in page and "- tests: ended with 1: 1 failed" in page


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """All parts, as on a GPU."""
    run("benchmarks.bench", "--gpu", "--rehearse", "--ranks", 2, "--out", tmp_path, timeout=280)
    page = (tmp_path / "report.md").read_text()
    assert "## Left out" not in page
    for title in ("bare tables, 1", "collection, 2", "DLRM, 1", "## tests", "## profile"):
        assert title in page
