"""The demo: its data, its flags, and a whole run on a few hundred ratings."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run
from ratings import ITEMS, RATINGS, USERS, items, ratings, write_recbole

from benchmarks.common import movielens
from benchmarks.common.movielens import GENRES, LIKED, read
from examples import demo

BATCH = 32
STEPS = RATINGS * 8 // 10 // BATCH


def test_reads_what_was_written(tmp_path: Path) -> None:
    write_recbole(tmp_path)
    data = read(tmp_path)
    assert torch.equal(data.labels, torch.tensor([float(int(r[2]) >= LIKED) for r in ratings]))
    assert data.tables["user"] == USERS and data.tables["item"] == ITEMS
    assert len(data.train) == RATINGS * 8 // 10
    split = torch.cat([data.train, data.valid, data.test])
    assert torch.equal(split.sort().values, torch.arange(RATINGS))
    assert data.dense[data.train].mean(0).abs().max() < 0.1
    assert data.dense.isfinite().all()

    rows = torch.tensor([5, 3])
    batch = data.batch(rows)
    assert torch.equal(batch.labels, data.labels[rows])
    jagged = batch.sparse_features.to_dict()
    bags = {feature: values.to_dense() for feature, values in jagged.items()}
    assert bags.keys() == data.tables.keys()
    for bag, (user, item, _, _) in enumerate([ratings[5], ratings[3]]):
        assert bags["user"][bag].tolist() == [int(user) - 1]
        assert bags["item"][bag].tolist() == [int(item) - 1]
        genres = {GENRES[genre] for genre in bags["genres"][bag].tolist()}
        assert genres == set(items[int(item) - 1][3])


def test_limit_takes_the_first_ratings(tmp_path: Path) -> None:
    write_recbole(tmp_path)
    whole, part = read(tmp_path), read(tmp_path, limit=150)
    assert torch.equal(part.labels, whole.labels[:150])
    assert part.tables == whole.tables
    with pytest.raises(ValueError, match="20 ratings are too few"):
        read(tmp_path, limit=20)


@pytest.mark.parametrize("file", movielens.WHEEL_FILES)
def test_damaged_files(file: str, tmp_path: Path) -> None:
    write_recbole(tmp_path)
    path = tmp_path / file
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:3])
    with pytest.raises(ValueError, match=rf"{file}, line {len(lines)}.*cut short"):
        read(tmp_path)
    path.write_bytes(b"".join(lines[:10]))
    with pytest.raises(ValueError, match=r"ratings are too few|lacks id"):
        read(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=file):
        read(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "--epochs must be at least 1, not 0"),
        ("--batch-size -256", "--batch-size must be at least 1, not -256"),
        ("--seed -1", "--seed must be from 0"),
        ("--lr nan", "--lr must be a finite number above 0"),
        ("--out /dev/null", "give a folder: '/dev/null'"),
    ],
)
def test_flags_are_refused(
    flags: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", *flags.split()])
    with pytest.raises(SystemExit):
        demo.parse_args()
    assert message in capsys.readouterr().err


def test_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_recbole(source)

    def download(command: list[str]) -> subprocess.CompletedProcess[str]:
        wheel = Path(command[command.index("--dest") + 1]) / "recbole-1.2.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for file in source.iterdir():
                archive.write(file, movielens.WHEEL_FOLDER + file.name)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    movielens.fetch(tmp_path / ".data" / "ml-100k")
    assert read(tmp_path / ".data" / "ml-100k").tables == read(source).tables
    assert [path.name for path in (tmp_path / ".data").iterdir()] == ["ml-100k"]


def run_demo(out: Path, *, ranks: int) -> tuple[dict[str, Any], str]:
    """The demo's results and what it printed."""
    data = out.parent / f"{out.name}-data"
    data.mkdir()
    write_recbole(data)
    flags = ["--data", data, "--epochs", "1", "--batch-size", BATCH, "--out", out]
    done = run("examples.demo", *flags, ranks=ranks)
    return json.loads((out / "results.json").read_text()), done.printed


def test_demo(tmp_path: Path) -> None:
    results, printed = run_demo(tmp_path / "two", ranks=2)
    arms = results["arms"]
    assert list(arms) == ["FrequencySGD", "SGD", "RowWiseAdagrad"]
    assert [arm["optimizer_bytes_per_row"] for arm in arms.values()] == [8, 0, 4]
    assert results["ranks"] == 2

    curves = [arm["curve"] for arm in arms.values()]
    for curve in curves:
        assert curve[-1]["epoch"] == 1 and curve[-1]["step"] == STEPS
        for point, split in itertools.product(curve, ("valid", "test")):
            assert all(math.isfinite(value) for value in point[split].values())
    assert curves[0][0] == curves[1][0] == curves[2][0], "the arms start from different weights"
    ends = {json.dumps(curve[-1]) for curve in curves}
    assert len(ends) == 3, "two arms trained with the same optimizer"

    genres = {"genres": 2 * STEPS * BATCH}
    assert results["lookups"] == dict.fromkeys(results["tables"], STEPS * BATCH) | genres

    png = (tmp_path / "two" / "learning_curves.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert "| RowWiseAdagrad | 0.03 | 1" in printed
    assert "samples/s, FrequencySGD=" in printed

    # The number of ranks changes the plan, and nothing else.
    alone, _ = run_demo(tmp_path / "one", ranks=1)
    for name, arm in arms.items():
        for point, expected in zip(arm["curve"], alone["arms"][name]["curve"], strict=True):
            assert point["test"] == pytest.approx(expected["test"], abs=1e-4)
