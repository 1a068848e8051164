"""The report command: figures against brute force, what it reads, what it refuses, its page."""

from __future__ import annotations

import base64
import json
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import TABLES, Pair
from plans import make_plan
from ranks import run_on_ranks
from torch import Tensor

from torchrec_freq import COUNT_CEILING, FrequencyConfig, cli, save_counts, table_states
from torchrec_freq.__main__ import main
from torchrec_freq.analysis.report import LOAD_FACTORS
from torchrec_freq.analysis.traffic import TableTraffic

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}

# Of DCP, which saves here without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def report(
    tmp_path: Path,
    counts: dict[str, Tensor],
    *options: str,
    squares: dict[str, float] | None = None,
) -> Any:
    """The JSON of a report on counts, by table."""
    path = tmp_path / "counts.safetensors"
    save_counts(path, counts, squares)
    return report_of(path, *options)


def report_of(path: Path, *options: str) -> dict[str, Any]:
    """All figures of each table."""
    output = path.parent / "report.json"
    assert main(["report", str(path), "--json", str(output), *options]) == 0
    tables = {}
    for table in json.loads(output.read_text()):
        source, name, *parts = table.values()
        assert source == str(path)
        tables[name] = {key: value for part in parts for key, value in part.items()}
    return tables


def multinomial(rows: int, exponent: float, lookups: int, seed: int = 0) -> Tensor:
    """Counts of lookups drawn from Zipf's law, in random order of the rows."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, rows + 1) ** exponent
    return torch.from_numpy(rng.permutation(rng.multinomial(lookups, p / p.sum())))


def test_figures_by_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 128, 203) * (rng.random(203) < 0.7)
    options = ("--lr", "0.5", "--min-count", "10", "--batch-lookups", "77")
    table = report(tmp_path, {"a": torch.from_numpy(counts)}, *options)["a"]
    seen, total = counts[counts > 0], counts.sum()
    assert (table["rows"], table["lookups"]) == (203, total)
    assert table["never seen"] == (counts == 0).sum()
    hottest = np.append(np.sort(counts)[::-1], 0)
    for percent in ("0.01", "0.1", "1", "10"):
        rows = float(percent) / 100 * 203
        whole = hottest[: int(rows)].sum() + rows % 1 * hottest[int(rows)]
        assert table[f"top {percent}%"] == pytest.approx(whole / total)
    for name, q in QUANTILES.items():
        count = np.quantile(seen, q, method="inverted_cdf")
        assert table[f"{name} count"] == count
        assert table[f"{name} rate"] == pytest.approx(0.5 / max(count, 10) ** 0.5)
        assert table[f"{name} spread"] == pytest.approx(1)
    for ranks in (2, 4, 8, 16, 32, 64):
        block = -(-203 // ranks)
        shards = [counts[i * block : (i + 1) * block].sum() for i in range(ranks)]
        assert table[str(ranks)] == pytest.approx(max(shards) / np.mean(shards))


@pytest.mark.parametrize("miss_rate", [0.02, 0.5])
def test_the_recommended_cache_is_the_smallest(tmp_path: Path, miss_rate: float) -> None:
    counts = multinomial(300, 1.1, 20_000)
    options = ("--batch-lookups", "64", "--miss-rate", str(miss_rate))
    table = report(tmp_path, {"a": counts}, *options)["a"]
    histogram = TableTraffic.of(counts).histogram
    enough = (n for n in range(1, 301) if histogram.miss_rate(n, 64) <= miss_rate)
    assert table["load factor"] == next(enough) / 300
    assert table["distinct rows"] == pytest.approx(histogram.expected_distinct(64))
    for part in LOAD_FACTORS:
        assert table[f"miss at {part}"] == pytest.approx(histogram.miss_rate(part * 300, 64))


@pytest.mark.parametrize("exponent", [0.3, 1.0, 2.0])
def test_zipf_exponent_is_found(tmp_path: Path, exponent: float) -> None:
    tables = {
        f"{rows} rows": multinomial(rows, exponent, lookups, seed=rows)
        for rows, lookups in ((2000, 300_000), (200_000, 3_000_000))
    }
    for table in report(tmp_path, tables).values():
        assert table["Zipf"] == pytest.approx(exponent, abs=0.02)
    none = {
        "equal": torch.full((1000,), 50),
        "few": torch.tensor([1000, 500, 333, 250, 200]),
        "rare": multinomial(1000, 1.0, 300),
    }
    assert all(table["Zipf"] is None for table in report(tmp_path, none).values())


def test_tables_at_the_edge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {
        "one": torch.tensor([5]),
        "one unused": torch.tensor([0]),
        "unused": torch.zeros(1000, dtype=torch.int32),
        "full": torch.full((70_000,), COUNT_CEILING),
        "hot": torch.tensor([0, COUNT_CEILING, 0, 0]),
        "none": torch.zeros(0, dtype=torch.int32),
    }
    found = report(tmp_path, tables, "-o", str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.png"))) == len(tables)
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in tables)
    assert "nan" not in printed and "inf" not in printed
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert found["one"]["p50 count"] == found["one"]["max count"] == 5
    assert found["one"]["8"] == 8 and found["one"]["load factor"] == 1
    for name in ("one unused", "unused", "none"):
        table = found[name]
        assert table["never seen"] == tables[name].numel() and table["lookups"] == 0
        assert all(table[key] is None for key in ("max count", "s", "8", "area", "top 1%"))
    assert found["full"]["lookups"] == 70_000 * COUNT_CEILING
    assert found["full"]["p50 count"] == COUNT_CEILING
    assert found["full"]["2"] == pytest.approx(1)
    assert found["hot"]["distinct rows"] == 1 and found["hot"]["4"] == 4


def test_rates_of_counts_alone(tmp_path: Path) -> None:
    counts = {"a": torch.tensor([40, 20])}
    assert report(tmp_path, counts)["a"]["max rate"] is None
    # With squares, every row has its share of them.
    table = report(tmp_path, counts, "--lr", "0.1", "--prior-count", "2", squares={"a": 3.0})["a"]
    b = 2 / 42
    root = ((1 - b) * 3 * 40 / 60 + b * 3 / 60 * 41) ** 0.5
    assert table["max rate"] == pytest.approx(0.1 / root, rel=1e-5)
    assert table["s"] == pytest.approx((3 / 60) ** 0.5)


def train_and_save(kind: str, folder: Path) -> None:
    pair = Pair(TABLES, make_plan(kind, TABLES, 2), {"half_life": 3})
    for _ in range(4):
        pair.step()
    state = {"m": pair.model.state_dict(), "optim": pair.model.fused_optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    states = table_states(pair.model)
    if dist.get_rank() == 0:
        torch.save(states, folder / "states")


@pytest.mark.parametrize("kind", ["row_wise", "column_wise on one rank"])
def test_rates_of_checkpoints(tmp_path: Path, kind: str) -> None:
    run_on_ranks(2, train_and_save, {"kind": kind, "folder": tmp_path})
    states = torch.load(tmp_path / "states", weights_only=False)
    tables = report_of(tmp_path / "checkpoint")
    assert set(tables) == set(states) == {t.name for t in TABLES}
    prior = FrequencyConfig().prior_count
    for name, state in states.items():
        counts, sums = state.counts.double(), state.row_sums().double()
        rho = float(state.totals[1] / state.totals[2])
        b = prior / (counts + prior)
        rates = ((1 - b) * sums + b * rho * (counts + 1)).rsqrt()
        assert tables[name]["s"] == pytest.approx(rho**0.5, rel=1e-6)
        assert tables[name]["lookups"] == counts.sum()
        for quantile, share in QUANTILES.items():
            count = np.quantile(counts[counts > 0], share, method="inverted_cdf")
            logs = rates[counts == count].log()
            assert tables[name][f"{quantile} rate"] == pytest.approx(
                float(logs.mean().exp()), rel=1e-4
            )
            spread = float(logs.std(correction=0).exp())
            assert tables[name][f"{quantile} spread"] == pytest.approx(spread, rel=1e-3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--miss-rate", "1"], "is not a number above 0 and below 1"),
        (["--ranks", "2,0"], "is not a whole number from 1 to"),
        (["--batch-lookups", "inf"], "is not a number above 0"),
        (["--lr", "0"], "is not a number above 0"),
        (["--min-count", "0"], "Invalid min_count value: 0"),
        (["-o", "counts"], "give a folder: 'counts'"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_counts("counts", {"a": torch.ones(3)})
    try:
        status: object = main(["report", "counts", *option])
    except SystemExit as exit:  # argparse
        status = exit.code
    assert status == 2 and message in capsys.readouterr().err


def test_a_missing_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(path, {"a": torch.tensor([1, 2])})
    monkeypatch.delitem(sys.modules, "torchrec_freq.cli.report_page", raising=False)
    monkeypatch.delattr(cli, "report_page", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(path), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "matplotlib" in error and "pip install 'torchrec-freq[report]'" in error
    assert not (tmp_path / "out").exists()
    # The tables alone need it not; those of several files are told apart.
    assert main(["report", str(path), f"{tmp_path}/../{path.parent.name}/{path.name}"]) == 0
    assert f"| {path}: a " in capsys.readouterr().out


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    name, out = 'x<script>alert("$1$")</script>/../y', tmp_path / "out"
    counts = {
        name: multinomial(500, 1.0, 10_000),
        "b": torch.tensor([3]),
        "日本" * 50: torch.ones(2),
    }
    report(tmp_path, counts, "-o", str(out), squares={"b": 1.0})
    html = (out / "report.html").read_text()
    assert "http" not in html and "url(" not in html and "@import" not in html
    assert "<script" not in html and "<link" not in html
    assert f"<td>{escape(name)}</td>" in html
    pngs = [path.read_bytes() for path in sorted(out.glob("*.png"))]
    inlined = [
        base64.b64decode(data) for data in re.findall('src="data:image/png;base64,(.*?)"', html)
    ]
    assert sorted(inlined) == sorted(pngs) and len(pngs) == 3
    assert all(png.startswith(b"\x89PNG\r\n") and b"http" not in png for png in pngs)
    assert (out / "01-b.png").exists() and (out / f"03-{'日本' * 16}日.png").exists()
