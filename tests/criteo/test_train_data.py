"""The training program's data: bad files and rows, the scan, batches."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from criteo_runs import ROWS, SAMPLES, arguments, run, write
from numpy.typing import NDArray
from ranks import on_ranks
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES

from examples.criteo import __main__ as program
from examples.criteo import scan as scan_module
from examples.criteo.batches import Batches
from examples.criteo.days import Days, find_days
from examples.criteo.scan import scan
from examples.criteo.settings import parse


def cut(path: Path, bytes_: int) -> None:
    path.write_bytes(path.read_bytes()[:bytes_])


def removed(path: Path) -> str:
    path.unlink()
    return path.name


def change(path: Path, rows: list[int], column: int, value: float) -> Path:
    values = np.load(path)
    values[rows, column] = value
    np.save(path, values)
    return path


def saved(name: str, *shape: int, dtype: str) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / name, np.zeros(shape, dtype))


# What is done to a folder, and what the error says.
HEADERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "day_1_labels.npy").unlink(), r"No such file.*day_1_labels\.npy"),
    "no folder": (shutil.rmtree, "no such folder"),
    "one day": (
        lambda f: [removed(path) for path in f.glob("day_[12]_*")],
        r"holds 1 days.*at least two",
    ),
    "odd name": (saved("day_x_dense.npy", 3, dtype="f4"), r"day_x_\*.*named day_0"),
    "header cut": (lambda f: cut(f / "day_0_dense.npy", 40), r"day_0_dense\.npy is not an npy"),
    "empty file": (lambda f: cut(f / "day_0_dense.npy", 0), r"day_0_dense\.npy is not an npy"),
    "cut": (
        lambda f: cut(f / "day_2_sparse.npy", 10_000),
        r"day_2_sparse\.npy is not an npy file, or truncated",
    ),
    "too long": (
        lambda f: (f / "day_0_labels.npy").open("ab").write(b"1234"),
        r"day_0_labels\.npy is too long: 98 rows take less",
    ),
    "dtype": (
        saved("day_0_dense.npy", SAMPLES, 13, dtype="f8"),
        r"day_0_dense\.npy holds float64; expected float32",
    ),
    "byte order": (
        saved("day_0_dense.npy", SAMPLES, 13, dtype=">f4"),
        r"day_0_dense\.npy holds >f4; expected float32",
    ),
    "columns": (
        saved("day_0_sparse.npy", SAMPLES, 25, dtype="i4"),
        r"day_0_sparse\.npy has the shape \[98, 25\]; expected \[samples, 26\]",
    ),
    "dimensions": (
        saved("day_0_labels.npy", SAMPLES, dtype="i4"),
        r"day_0_labels\.npy has the shape \[98\]",
    ),
    "rows": (
        saved("day_1_dense.npy", 97, 13, dtype="f4"),
        r"files of a day differ.*day_1_dense\.npy 97, day_1_sparse\.npy 98",
    ),
}
ROWS_OF_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "id": (  # on both ranks
        lambda f: [
            change(f / "day_0_sparse.npy", [5, 90], 2, 12),
            change(f / "day_2_sparse.npy", [0], 2, 7),
        ],
        r"day_0_sparse\.npy, row 5: id 12 of cat_2, whose table has 7 rows; 2 bad rows in it\n"
        r"  day_2_sparse\.npy, row 0: id 7",
    ),
    "negative id": (
        lambda f: change(f / "day_2_sparse.npy", [97], 25, -1),
        r"day_2_sparse\.npy, row 97: id -1 of cat_25 is negative; 1 bad",
    ),
    "label": (
        lambda f: change(f / "day_1_labels.npy", [0], 0, 2),
        r"day_1_labels\.npy, row 0: label 2 is neither 0 nor 1",
    ),
    "nan": (
        lambda f: change(f / "day_0_dense.npy", [3], 12, math.nan),
        r"day_0_dense\.npy, row 3: nan in column 12",
    ),
}


@on_ranks(2)
def test_bad_files_stop_all_ranks(tmp_path: Path) -> None:
    """Every rank raises the same error, and goes on to the next one: none hangs."""
    for name, (spoil, message) in {**HEADERS, **ROWS_OF_FILES}.items():
        folder = tmp_path / name
        if dist.get_rank() == 0:
            spoil(write(folder))
        dist.barrier()
        settings = parse(arguments(folder, tmp_path / "out"))
        with pytest.raises(ValueError, match=message) as error:
            program.prepare(settings)
        said: list[Any] = [None, None]
        dist.all_gather_object(said, str(error.value))
        assert said[0] == said[1], name
        # Without the scan the headers are checked all the same.
        unscanned = replace(settings, data=replace(settings.data, scan=False))
        if name in HEADERS:
            with pytest.raises(ValueError, match=message):
                program.prepare(unscanned)
        else:
            program.prepare(unscanned)


@on_ranks(2)
def test_one_rank_alone_cannot_read(tmp_path: Path) -> None:
    if dist.get_rank() == 0:
        write(tmp_path / "data")
    dist.barrier()
    settings = parse(arguments(tmp_path / "data", tmp_path / "out"))

    def fail(*_: object) -> None:
        raise OSError("stale file handle")

    for module, name, message, broken in (
        (scan_module, "_scan_part", "on rank 1: stale file handle", fail),
        (program, "find_days", "Rank 1 sees other files", lambda f: find_days(f)[1:]),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr(module, name, broken)
            with pytest.raises(ValueError, match=message):
                program.prepare(settings)
    # Rank 0 alone writes.
    nowhere = replace(settings, out=tmp_path / "data" / "day_0_dense.npy" / "out")
    with pytest.raises(ValueError, match="on rank 0: .*Not a directory"):
        program.prepare(nowhere)


@on_ranks(2)
def test_scan_is_done_once(tmp_path: Path, reference: Path) -> None:
    folder, cache = tmp_path / "data", tmp_path / "scan.json"
    if dist.get_rank() == 0:
        shutil.copytree(reference / "data", folder)
    dist.barrier()
    reads: list[object] = []
    pieces = Days.pieces

    def counted(*args: Any) -> Any:
        reads.append(args)
        return pieces(*args)

    def scanned(rows: list[int] | None = ROWS, on_0: Callable[[], object] = int) -> bool:
        if dist.get_rank() == 0:
            on_0()
        dist.barrier()
        reads.clear()
        assert scan(Days(find_days(folder)), rows, cache) == [rows - 1 for rows in ROWS]
        dist.barrier()
        return bool(reads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Days, "pieces", counted)
        patch.setattr(scan_module, "CHUNK", 7)
        assert scanned()
        assert not scanned()
        assert scanned(rows=None)  # other bounds
        assert scanned(None, lambda: os.utime(folder / "day_1_dense.npy", (0, 0)))
        assert scanned(None, lambda: cache.write_text("{"))


def whole(folder: Path, days: range) -> dict[str, NDArray[Any]]:
    return {
        kind: np.concatenate([np.load(folder / f"day_{day}_{kind}.npy") for day in days])
        for kind in ("dense", "sparse", "labels")
    }


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_batches(ranks: int, wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares of the ranks, joined, are the rows of the files in order."""
    folder = write(tmp_path / "data", samples=8)
    if wide:
        path = folder / "day_1_sparse.npy"
        np.save(path, np.load(path).astype(np.int64) + 2**40)
    expected = whole(folder, range(3))
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)

    def read(part: range, batch_size: int, **options: Any) -> list[list[Any]]:
        by_rank = []
        for rank in range(ranks):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            rows = ROWS if wide else None
            days = Days(find_days(folder))
            batches = Batches(days, part, rows=rows, batch_size=batch_size, **options)
            by_rank.append([batches[step] for step in range(2 * batches.steps)])
        return [list(shares) for shares in zip(*by_rank, strict=True)]

    def rows_of(shares: list[Any]) -> list[int]:
        """The rows of the files that the shares have, all columns compared."""
        dense = torch.cat([share.dense_features for share in shares]).numpy()
        rows = [int(np.flatnonzero((expected["dense"] == d).all(axis=1))[0]) for d in dense]
        labels = torch.cat([share.labels for share in shares]).numpy()
        assert np.array_equal(labels, expected["labels"][rows, 0])
        for number, name in enumerate(DEFAULT_CAT_NAMES):
            ids = torch.cat([share.sparse_features[name].values() for share in shares])
            assert ids.dtype == torch.int32
            wanted = expected["sparse"][rows, number]
            assert np.array_equal(ids.numpy(), wanted % ROWS[number] if wide else wanted)
        return rows

    # In order. One sample is over: with several ranks it is part of the batch before.
    batches = read(range(2, 24), 7)
    bounds = [2, 9, 16, 23, 24] if ranks == 1 else [2, 9, 16, 24]
    expected_rows = [list(range(*pair)) for pair in itertools.pairwise(bounds)]
    assert [rows_of(shares) for shares in batches] == 2 * expected_rows
    sizes = [[len(share.labels) for share in shares] for shares in batches]
    assert sizes[0] == [len(part) for part in np.array_split(range(7), ranks)]
    # Whole batches only, in another order each pass, the same for any number of ranks.
    passes = [rows_of(shares) for shares in read(range(24), 5, whole=True, order_seed=1)]
    blocks = [list(range(start, start + 5)) for start in range(0, 20, 5)]
    orders = [[blocks.index(rows) for rows in part] for part in (passes[:4], passes[4:])]
    assert orders == [
        np.random.default_rng([1, epoch]).permutation(4).tolist() for epoch in range(2)
    ]


@on_ranks(2)
def test_synthetic_data(tmp_path: Path) -> None:
    """Made once, by one rank; the planted signal is found."""
    more = ["--data.synthetic", "1500", "--data.rows", "null", "--data.max_rows", "500"]
    more += ["--batch_size", "64", "--evaluation.batch_size", "500", "--evaluation.every", "null"]
    more += ["--epochs", "1", "--checkpoint.minutes", "9", "--optimizer.lr", "0.1"]
    summary = run(tmp_path / "data", tmp_path / "out", *more)
    assert summary["steps"] == 3 * 1500 // 64
    assert summary["test"]["auc"] > 0.55
    assert max(summary["settings"]["rows"]) == 500  # of up to 10,000: ids are taken modulo
    with pytest.raises(ValueError, match="other data than data.synthetic=200"):
        run(tmp_path / "data", tmp_path / "out", "--data.synthetic", "200")
