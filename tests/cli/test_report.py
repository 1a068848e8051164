"""The report command: figures against brute force, what it reads, what it refuses, its page."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
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

from torchrec_freq import COUNT_CEILING, FrequencyConfig, cli, save_counts
from torchrec_freq.__main__ import main
from torchrec_freq.analysis.report import LOAD_FACTORS
from torchrec_freq.analysis.traffic import TableTraffic
from torchrec_freq.counts.row_state import RowShard, RowState
from torchrec_freq.counts.stored import open_stored
from torchrec_freq.sharded.install import frequency_modules

Json = dict[str, Any]

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


def report_of(path: Path, *options: str) -> dict[str, Json]:
    output = path.parent / "report.json"
    assert main(["report", str(path), "--json", str(output), *options]) == 0
    return {table["name"]: table for table in json.loads(output.read_text())}


def multinomial(rows: int, exponent: float, lookups: int, seed: int = 0) -> Tensor:
    """Counts of lookups drawn from Zipf's law, in random order of the rows."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, rows + 1) ** exponent
    return torch.from_numpy(rng.permutation(rng.multinomial(lookups, p / p.sum())))


def test_figures_by_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 128, 203) * (rng.random(203) < 0.7)
    options = ("--lr", "0.5", "--no-normalize", "--min-count", "10", "--batch-lookups", "77")
    table = report(tmp_path, {"a": torch.from_numpy(counts)}, *options)["a"]
    seen, total = counts[counts > 0], counts.sum()
    assert (table["rows"], table["lookups"]) == (203, total)
    assert table["never_seen"] == (counts == 0).sum()
    hottest = np.append(np.sort(counts)[::-1], 0)
    for share, covered in table["top_shares"].items():
        rows = float(share) * 203
        whole = hottest[: int(rows)].sum() + rows % 1 * hottest[int(rows)]
        assert covered == pytest.approx(whole / total)
    assert list(table["top_shares"]) == ["0.0001", "0.001", "0.01", "0.1"]
    for name, q in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}.items():
        count = np.quantile(seen, q, method="inverted_cdf")
        assert table["counts"][name] == count
        assert table["rates"][name] == pytest.approx(0.5 / max(count, 10) ** 0.5)
    assert table["rate_unit"] == "" and table["scale"] is None
    for ranks, load in table["imbalance"].items():
        block = -(-203 // int(ranks))
        shards = [counts[i * block : (i + 1) * block].sum() for i in range(int(ranks))]
        assert load == pytest.approx(max(shards) / np.mean(shards))
    assert list(table["imbalance"]) == ["2", "4", "8", "16", "32", "64"]
    assert table["batch_lookups"] == 77


@pytest.mark.parametrize("miss_rate", [0.02, 0.1, 0.5])
def test_the_recommended_cache_is_the_smallest(tmp_path: Path, miss_rate: float) -> None:
    counts = multinomial(300, 1.1, 20_000)
    options = ("--batch-lookups", "64", "--miss-rate", str(miss_rate))
    table = report(tmp_path, {"a": counts}, *options)["a"]
    assert table["batch_lookups"] == 64
    histogram = TableTraffic.of(counts).histogram
    for policy in ("lru", "lfu"):
        cache = table["caches"][policy]
        enough = (n for n in range(1, 301) if histogram.miss_rate(n, 64, policy) <= miss_rate)
        assert cache["load_factor"] == next(enough) / 300
        assert [float(x) for x in cache["miss_rates"]] == list(LOAD_FACTORS)
        for load_factor, miss in cache["miss_rates"].items():
            expected = histogram.miss_rate(float(load_factor) * 300, 64, policy)
            assert miss == pytest.approx(expected)


@pytest.mark.parametrize("exponent", [0.3, 0.7, 1.0, 1.3, 2.0])
def test_zipf_exponent_is_found(tmp_path: Path, exponent: float) -> None:
    tables = {
        f"{rows} rows": multinomial(rows, exponent, lookups, seed=rows)
        for rows, lookups in ((2000, 300_000), (200_000, 3_000_000))
    }
    for name, table in report(tmp_path, tables).items():
        assert table["zipf"]["exponent"] == pytest.approx(exponent, abs=0.02), name
        counts = np.sort(tables[name].numpy())[::-1]
        # Which rows are fitted, and that the line is the counts'.
        last = int(table["zipf"]["last_rank"])
        assert last == (counts >= 10).sum()
        middle = int(last**0.5)
        line = table["zipf"]["first"] * middle**-exponent
        assert line == pytest.approx(counts[middle - 1], rel=0.15)


def test_no_line_through_too_little(tmp_path: Path) -> None:
    tables = {
        "equal": torch.full((1000,), 50),
        "few": torch.tensor([1000, 500, 333, 250, 200]),
        "rare": multinomial(1000, 1.0, 300),
    }
    assert all(table["zipf"] is None for table in report(tmp_path, tables).values())


def test_tables_at_the_edge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {
        "one": torch.tensor([5]),
        "one unused": torch.tensor([0]),
        "unused": torch.zeros(1000, dtype=torch.int32),
        "full": torch.full((70_000,), COUNT_CEILING),
        "hot": torch.tensor([0, COUNT_CEILING, 0, 0]),
        "none": torch.zeros(0, dtype=torch.int32),
    }
    tables_of = report(tmp_path, tables, "-o", str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.png"))) == len(tables)
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in tables)
    assert "nan" not in printed and "inf" not in printed
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    one = tables_of["one"]
    assert one["counts"] == {"p50": 5, "p90": 5, "p99": 5, "max": 5}
    assert one["imbalance"]["8"] == 8 and one["caches"]["lru"]["load_factor"] == 1
    for name in ("one unused", "unused", "none"):
        assert tables_of[name]["never_seen"] == tables[name].numel()
        assert tables_of[name]["lookups"] == 0 and not tables_of[name]["caches"]
        assert not tables_of[name]["counts"] and not tables_of[name]["imbalance"]
    full = tables_of["full"]
    assert full["lookups"] == 70_000 * COUNT_CEILING and full["counts"]["p50"] == COUNT_CEILING
    assert full["imbalance"]["2"] == pytest.approx(1) and full["zipf"] is None
    assert tables_of["hot"]["distinct_rows"] == 1
    assert tables_of["hot"]["imbalance"]["4"] == 4


@pytest.mark.parametrize(
    ("squares", "options", "unit"),
    [
        (None, [], "lr / s"),
        (None, ["--lr", "0.1"], "1 / s"),
        (None, ["--own-weight", "2"], "lr / s"),
        (None, ["--no-normalize"], "lr"),
        (0.0, [], "lr / s"),
        (0.02, [], "lr"),
        (0.02, ["--lr", "0.1"], ""),
        (0.02, ["--no-normalize"], "lr"),
    ],
)
def test_rates_are_those_that_are_known(
    tmp_path: Path, squares: float | None, options: list[str], unit: str
) -> None:
    known = None if squares is None else {"a": squares}
    table = report(tmp_path, {"a": torch.tensor([40, 20])}, *options, squares=known)["a"]
    lr = 0.1 if "--lr" in options else 1.0
    own_weight = 2 if "--own-weight" in options else FrequencyConfig().own_weight
    # Of an occurrence, of which each of the two rows is known to have had one.
    s = (squares / 2) ** 0.5 if squares else 1
    past = squares * 40 / 60 if squares else 40
    root = 40**0.5 if "--no-normalize" in options else ((past + own_weight * s**2) / 2) ** 0.5
    assert table["rates"]["max"] == pytest.approx(lr / root, rel=1e-5)
    assert table["rate_unit"] == unit
    assert table["scale"] == (pytest.approx(s) if squares else None)


def train_and_save(kind: str, ranks: int, folder: Path) -> None:
    pair = Pair(TABLES, make_plan(kind, TABLES, ranks), {"half_life": 3})
    for _ in range(4):
        pair.step()
    # As the user likes to call it; a counter may be above the ceiling until it is clamped.
    state = {"train": {"optim": pair.model.fused_optimizer.state_dict()}}
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    ((_, tables),) = frequency_modules(pair.model)
    expected = {}
    for name in tables.tables:
        read = tables.read(name)
        expected[name] = (read.counts.tolist(), read.totals[1:].tolist())
    if dist.get_rank() == 0:
        (folder / "expected.json").write_text(json.dumps(expected))


@pytest.mark.parametrize("kind", ["row_wise", "column_wise on one rank", "mixed"])
def test_checkpoints(tmp_path: Path, kind: str) -> None:
    run_on_ranks(2, train_and_save, {"kind": kind, "ranks": 2, "folder": tmp_path})
    expected = json.loads((tmp_path / "expected.json").read_text())
    assert not dist.is_initialized()
    stored = {table.name: table for table in open_stored(tmp_path / "checkpoint")}
    tables = report_of(tmp_path / "checkpoint")
    assert set(stored) == set(tables) == set(expected) == {t.name for t in TABLES}
    for name, (counts, (squares, total, occurrences)) in expected.items():
        blocks = list(stored[name].blocks())
        assert [first for first, _ in blocks] == sorted({first for first, _ in blocks})
        if kind == "row_wise":
            assert len(blocks) == 2
        assert torch.cat([block for _, block in blocks]).tolist() == counts
        scale = (squares / occurrences) ** 0.5
        assert tables[name]["scale"] == pytest.approx(scale, rel=1e-6)
        assert tables[name]["lookups"] == sum(counts)
        assert tables[name]["rate_unit"] == "lr"
        own = FrequencyConfig().own_weight * scale**2
        rate = ((squares / total * max(counts) + own) / 2) ** -0.5
        assert tables[name]["rates"]["max"] == pytest.approx(rate, rel=1e-5)


def test_several_files_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for lookups, path in enumerate(paths, start=1):
        save_counts(path, {"a": torch.tensor([lookups])})
    out = tmp_path / "report.json"
    assert main(["report", *map(str, paths), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    tables = json.loads(out.read_text())
    assert [(t["source"], t["lookups"]) for t in tables] == [(str(paths[0]), 1), (str(paths[1]), 2)]
    assert f"{paths[0]}: a" in printed and f"{paths[1]}: a" in printed


def test_a_file_is_no_folder_for_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(path, {"a": torch.tensor([1, 2])})
    assert main(["report", str(path), "-o", str(path)]) == 2
    assert f"give a folder: '{path}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ["--miss-rate", "1"],
        ["--miss-rate", "x"],
        ["--ranks", "2,0"],
        ["--ranks", ""],
        ["--ranks", str(10**7)],
        ["--batch-lookups", "-1"],
        ["--batch-lookups", "inf"],
        ["--lr", "0"],
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, option: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path), *option])
    assert caught.value.code == 2


def test_wrong_rule_and_output_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(path, {"a": torch.ones(3)})
    assert main(["report", str(path), "--min-count", "0"]) == 2
    assert "Invalid min_count value: 0" in capsys.readouterr().err
    assert main(["report", str(path), "-o", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("module", ["matplotlib.figure", "jinja2"])
def test_a_missing_extra_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(path, {"a": torch.tensor([1, 2])})
    monkeypatch.delitem(sys.modules, "torchrec_freq.cli.report_page", raising=False)
    monkeypatch.delattr(cli, "report_page", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["report", str(path), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert module in error and "pip install 'torchrec-freq[report]'" in error
    assert not (tmp_path / "out").exists()
    assert main(["report", str(path)]) == 0  # the tables alone need neither


class Page(HTMLParser):
    """What a browser would fetch, and what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["td"]:
            self.cells.append(data)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    name = 'x<script>alert("$1$")</script>/../y'
    out = tmp_path / "out"
    counts = {name: multinomial(500, 1.0, 10_000), "b": torch.tensor([3])}
    report(tmp_path, counts, "-o", str(out))
    html = (out / "report.html").read_text()
    assert "http" not in html and "url(" not in html and "@import" not in html
    page = Page()
    page.feed(html)
    assert "script" not in page.tags and "link" not in page.tags
    assert name in page.cells  # escaped, not dropped
    pngs = [path.read_bytes() for path in sorted(out.glob("*.png"))]
    assert len(pngs) == len(page.fetched) == 2
    inlined = [base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in page.fetched]
    assert sorted(inlined) == sorted(pngs)
    assert all(png.startswith(b"\x89PNG\r\n") and b"http" not in png for png in pngs)
    assert {path.suffix for path in out.iterdir()} == {".html", ".png"}


KEY = "optimizer.state.embedding_bags.a.weight.a.row_counter"
MEMORY = """
import resource, sys
from torchrec_freq.__main__ import main
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, large = sys.argv[1:]
assert main(["report", small]) == 0
before = peak()
assert main(["report", large]) == 0
print("grown", peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("stored", ["file", "checkpoint"])
def test_memory_does_not_follow_the_rows(tmp_path: Path, stored: str) -> None:
    """A table of several blocks needs less than its counts, whether they are a copy or mapped."""
    block, blocks = 1 << 22, 8
    counts = torch.arange(blocks * block, dtype=torch.int32) % 1000
    paths = [tmp_path / "small", tmp_path / "large"]
    for path, n in zip(paths, (1, blocks), strict=True):
        if stored == "file":
            save_counts(path, {"a": counts[: n * block]})
        else:
            shards = [RowShard(i * block, True, counts[i * block :][:block]) for i in range(n)]
            dcp.save({KEY: RowState(n * block, shards)}, checkpoint_id=path, no_dist=True)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split("grown")[1])
    assert grown < counts.numel() * 4 / 3
