"""The pre-pass: counts by brute force, blocks, formats, bounded memory, and what is refused."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from programs import Program
from programs import run as run_program
from safetensors.numpy import load_file
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES

from torchrec_freq import COUNT_CEILING
from torchrec_freq.__main__ import main
from torchrec_freq.counts import data_files
from torchrec_freq.counts import ids as ids_module
from torchrec_freq.counts.files import load_counts
from torchrec_freq.counts.ids import count_ids

ROWS = 50


def brute_force(ids: Iterable[int], rows: int) -> list[int]:
    counter = Counter(ids)
    assert all(0 <= i < rows for i in counter)
    return [counter[i] for i in range(rows)]


def criteo(samples: int, seed: int = 0, rows: int = ROWS) -> np.ndarray:
    """[samples, 26] skewed ids, other ones in each column."""
    rng = np.random.default_rng(seed)
    return (rng.zipf(1.3, (samples, 26)) * np.arange(1, 27) % rows).astype(np.int32)


# The library function.


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64", ">i4"])
def test_counts_by_brute_force(dtype: str) -> None:
    rng = np.random.default_rng(0)
    batches = [{"a": rng.integers(0, 100, (7, 3)).astype(dtype)} for _ in range(4)]
    batches[1] = {"b": np.array([[2, 2], [0, 2]], dtype)}
    counts = count_ids(batches, {"a": 100, "b": 3, "c": 2})
    expected = [int(i) for batch in batches if "a" in batch for i in batch["a"].flat]
    assert counts["a"].tolist() == brute_force(expected, 100)
    assert counts["b"].tolist() == [1, 0, 3]
    assert counts["c"].tolist() == [0, 0]
    assert {c.dtype for c in counts.values()} == {torch.int32}


def test_tensors_strides_empty_batches() -> None:
    ids = torch.arange(12).reshape(3, 4)
    batches = [{"a": ids.T}, {"a": ids[:, 1]}, {}, {"a": ids[:0]}, {"a": torch.tensor(5)}]
    expected = [*range(12), 1, 5, 9, 5]
    assert count_ids(batches, {"a": 12})["a"].tolist() == brute_force(expected, 12)
    assert count_ids([], {"a": 2})["a"].tolist() == [0, 0]


def test_a_batch_larger_than_what_is_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids_module, "_CHUNK_IDS", 10)
    ids = np.random.default_rng(0).integers(0, 9, 1003)
    expected = np.bincount(ids, minlength=9).tolist()
    assert count_ids([{"a": ids}], {"a": 9})["a"].tolist() == expected


def test_counts_saturate() -> None:
    tally = ids_module.Tally({"a": 3}, modulo=False)
    tally._counts["a"].fill_(COUNT_CEILING - 5)
    for size in (3, 10, 1000):
        tally.add("a", np.ones(size, np.int32), "here")
        tally.add("a", np.full(1, 2), "here")
    assert tally.counts()["a"].tolist() == [COUNT_CEILING - 5, COUNT_CEILING, COUNT_CEILING - 2]


def test_counts_saturate_before_int32_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids_module, "_CHUNK_IDS", 1 << 20)
    tally = ids_module.Tally({"a": 1}, modulo=False)
    tally._counts["a"].fill_(COUNT_CEILING)
    tally._added = COUNT_CEILING - (1 << 20)  # as after as many ids of other rows
    tally._counts["a"] += tally._added
    tally.add("a", np.zeros(1 << 20, np.int32), "here")
    assert tally.counts()["a"].tolist() == [COUNT_CEILING]


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "uint64"])
def test_ids_out_of_range(dtype: str) -> None:
    large = 2**31 - 1
    ids = np.array([3, large, 0], dtype)
    with pytest.raises(ValueError, match=rf"batch 1: id {large} .*'a' has 10 rows.*0 to 9"):
        count_ids([{"a": ids[:1]}, {"a": ids}], {"a": 10})
    counts = count_ids([{"a": ids}], {"a": 10}, modulo=True)["a"]
    assert counts.tolist() == brute_force([3, large % 10, 0], 10)
    # The first id too many.
    with pytest.raises(ValueError, match="id 3 is out of range"):
        count_ids([{"a": ids[:1]}], {"a": 3})


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_ids_beyond_int64(value: int) -> None:
    ids = np.array([value], dtype=np.uint64)
    with pytest.raises(ValueError, match=f"id {value} is out of range"):
        count_ids([{"a": ids}], {"a": 7})
    counts = count_ids([{"a": ids}], {"a": 7}, modulo=True)["a"]
    assert counts.tolist() == brute_force([value % 7], 7)


def test_negative_ids() -> None:
    ids = np.array([-1, 2, -(2**31)], np.int32)
    with pytest.raises(ValueError, match="id -2147483648 is out of range"):
        count_ids([{"a": ids}], {"a": 10})
    # As TorchRec's reader: Criteo's hashes above 2^31 are negative in int32.
    counts = count_ids([{"a": ids}], {"a": 10}, modulo=True)["a"]
    assert counts.tolist() == brute_force((ids % 10).tolist(), 10)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="batch 0: no table 'b'; tables: a"):
        count_ids([{"b": np.zeros(1, int)}], {"a": 1})
    for ids in (torch.zeros(1), np.array([True]), np.array(["1"])):
        with pytest.raises(ValueError, match="whole numbers"):
            count_ids([{"a": ids}], {"a": 1})
    for rows in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="'a': rows"):
            count_ids([], {"a": rows})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="'a': no memory.*bytes"):
        count_ids([], {"a": 2**50})


# Criteo npy.


def run(*arguments: object) -> int:
    try:
        return main(["count", *map(str, arguments)])
    except SystemExit as exit:  # argparse
        assert isinstance(exit.code, int)
        return exit.code


def check_criteo(path: Path, data: np.ndarray, rows: int = ROWS) -> None:
    arrays = load_file(path)
    assert set(arrays) == {f"t_{name}" for name in DEFAULT_CAT_NAMES}
    for index, name in enumerate(DEFAULT_CAT_NAMES):
        expected = np.bincount(data[:, index], minlength=rows)
        assert np.array_equal(arrays[f"t_{name}"], expected), name


@pytest.mark.parametrize("block", [1, 26 * 7, 26 * 100, 1 << 20])
@pytest.mark.parametrize("order", ["C", "F"])
def test_blocks_need_not_divide_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, order: str
) -> None:
    monkeypatch.setattr(data_files, "BLOCK_IDS", block)
    data = criteo(301)
    np.save(tmp_path / "day_0_sparse.npy", np.asarray(data, order=order))  # type: ignore[call-overload]
    output = tmp_path / "counts.safetensors"
    assert run(tmp_path / "day_0_sparse.npy", "--rows", ROWS, "-o", output) == 0
    check_criteo(output, data)


def test_a_folder_of_days(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    days = [criteo(n, seed) for seed, n in enumerate([100, 0, 57])]
    for day, data in enumerate(days):
        np.save(tmp_path / f"day_{day}_sparse.npy", data)
        np.save(tmp_path / f"day_{day}_dense.npy", np.zeros((len(data), 13), np.float32))
        np.save(tmp_path / f"day_{day}_labels.npy", np.zeros((len(data), 1), np.int32))
    np.save(tmp_path / "_unfinished_sparse.npy", days[0])
    output = tmp_path / "counts.safetensors"
    assert run(tmp_path, "--rows", ROWS, "-o", output) == 0
    check_criteo(output, np.concatenate(days))
    assert "26 tables, 157 samples, 4,082 ids" in capsys.readouterr().out


def test_a_folder_of_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, elsewhere = tmp_path / "data [1]", tmp_path / "elsewhere"
    for folder in (data, elsewhere):
        folder.mkdir()
    np.save(data / "day_0_sparse.npy", criteo(3))
    np.save(elsewhere / "day_1_sparse.npy", criteo(5))
    (data / "more").symlink_to(elsewhere)
    output = tmp_path / "counts.safetensors"
    assert run(data, "--rows", ROWS, "-o", output) == 0
    assert "8 samples" in capsys.readouterr().out
    (data / "itself").symlink_to(data)
    assert run(data, "--rows", ROWS, "-o", output) == 2
    assert "named twice" in capsys.readouterr().err


def test_columns_tables_and_rows(tmp_path: Path) -> None:
    data = criteo(200)
    np.save(tmp_path / "x.npy", data)
    output = tmp_path / "counts.safetensors"
    # Two columns share a table.
    choice = ["--columns", "cat_3,cat_0,cat_25", "--table-names", "big,shared,shared"]
    assert run(tmp_path / "x.npy", "-o", output, "--rows", "90,60", *choice) == 0
    arrays = load_file(output)
    assert set(arrays) == {"big", "shared"}
    assert arrays["big"].tolist() == np.bincount(data[:, 3], minlength=90).tolist()
    both = data[:, [0, 25]].reshape(-1)
    assert arrays["shared"].tolist() == np.bincount(both, minlength=60).tolist()
    # One table for all, by a pattern.
    assert run(tmp_path / "x.npy", "-o", output, "--rows", 50, "--table-names", "all") == 0
    assert load_file(output)["all"].tolist() == np.bincount(data.reshape(-1), minlength=50).tolist()


def test_modulo_wraps_as_the_reader_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.random.default_rng(0).integers(-(2**31), 2**31, (120, 26), dtype=np.int32)
    data[5, 7] = 2**31 - 1
    np.save(tmp_path / "x.npy", data)
    output = tmp_path / "counts.safetensors"
    rows = list(range(11, 37))
    hashes = ",".join(map(str, rows))
    assert run(tmp_path / "x.npy", "-o", output, "--rows", hashes, "--modulo") == 0
    wrapped = data.copy()
    wrapped %= np.array(rows).reshape((1, 26))  # TorchRec's line
    arrays = load_file(output)
    for index, name in enumerate(DEFAULT_CAT_NAMES):
        assert arrays[f"t_{name}"].tolist() == brute_force(wrapped[:, index].tolist(), rows[index])
    output.unlink()
    assert run(tmp_path / "x.npy", "-o", output, "--rows", hashes) == 2
    assert "x.npy, samples 0 to 119, column 'cat_0': id -" in capsys.readouterr().err
    assert not output.exists()


def test_memory_of_the_reader(tmp_path: Path) -> None:
    # 104 MB of data; the tables are 10 kB.
    np.save(tmp_path / "x.npy", np.zeros((1_000_000, 26), np.int32))
    output = tmp_path / "counts.safetensors"
    tracemalloc.start()
    assert run(tmp_path / "x.npy", "-o", output, "--rows", 100) == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * data_files.BLOCK_IDS
    assert load_counts(output).counts["t_cat_9"].tolist() == [1_000_000] + [0] * 99


# Parquet.


def write_parquet(path: Path, samples: int, seed: int = 0, row_group: int = 40) -> pa.Table:
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, ROWS, rng.integers(0, 5)).tolist() for _ in range(samples)]
    pairs = rng.integers(0, ROWS, (samples, 2)).tolist()
    if samples:
        lists[0] = pairs[0] = None  # missing bags
    table = pa.table(
        {
            "label": rng.random(samples),
            "user": pa.array(rng.integers(0, ROWS, samples), pa.int64()),
            "user_age": pa.array(rng.integers(0, 9, samples), pa.uint8()),
            "tags": pa.array(lists, pa.list_(pa.int32())),
            "more": pa.array(lists, pa.large_list(pa.int64())),
            "pair": pa.array(pairs, pa.list_(pa.int16(), 2)),
            "text": ["x"] * samples,
            "a.b": pa.array(rng.integers(0, ROWS, samples), pa.uint32()),
        }
    )
    pq.write_table(table, path, row_group_size=row_group)
    return table


def flatten(values: Iterable[int | list[int] | None]) -> list[int]:
    flat = []
    for value in values:
        flat += [] if value is None else value if isinstance(value, list) else [value]
    return flat


@pytest.mark.parametrize("block", [1, 64, 1 << 20])
def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(data_files, "BLOCK_IDS", block)
    (tmp_path / "part=1").mkdir()
    (tmp_path / "_temporary").mkdir()
    tables = [
        write_parquet(tmp_path / "0.parquet", 101, 0),
        write_parquet(tmp_path / "1.parquet", 0, 1),
        write_parquet(tmp_path / "part=1" / "2.parquet", 37, 2),
    ]
    write_parquet(tmp_path / "_temporary" / "3.parquet", 37, 3)
    columns = ["tags", "user", "more", "pair", "a.b", "user_age"]
    output = tmp_path / "counts.safetensors"
    assert run(tmp_path, "-o", output, "--rows", ROWS, "--columns", ",".join(columns)) == 0
    arrays = load_file(output)
    assert set(arrays) == set(columns)
    for column in columns:
        ids = flatten(value for table in tables for value in table[column].to_pylist())
        assert arrays[column].tolist() == brute_force(ids, ROWS), column


@pytest.mark.parametrize("name", ["a", "a.b"])
def test_parquet_memory(tmp_path: Path, name: str) -> None:
    # One row group of 40 MB in one column, and lists of 100 ids: 40 MB in the other.
    ids = np.random.default_rng(0).integers(0, 1000, 5_000_000)
    lists = pa.ListArray.from_arrays(np.arange(0, 5_000_001, 100), ids)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({name: ids}), path, row_group_size=len(ids), use_dictionary=False)
    path_of_lists = tmp_path / "lists.parquet"
    pq.write_table(pa.table({name: lists}), path_of_lists, use_dictionary=False)
    for data in (path, path_of_lists):
        (file,) = [data_files.open_file(data)]
        base, most, total = pa.total_allocated_bytes(), 0, np.zeros(1000, int)
        for _, block in file.blocks([name]):
            total += np.bincount(block[name], minlength=1000)
            most = max(most, pa.total_allocated_bytes() - base)
        assert np.array_equal(total, np.bincount(ids, minlength=1000))
        assert most < 64 * data_files.BLOCK_IDS // 2, most


# What is refused.


def truncated(path: Path, keep: float) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])


def test_damaged_npy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "0.npy", tmp_path / "counts.safetensors"
    np.save(path, criteo(10))
    raw = path.read_bytes()
    path.write_bytes(raw * 2)
    assert run(path, "-o", output, "--rows", ROWS) == 2
    assert f"{path}: too long: 10 samples take less" in capsys.readouterr().err
    for position in range(8, raw.index(b"\n")):  # of the header, which NumPy has Python parse
        for value in (0, ord("6"), ord("("), ord("'")):
            path.write_bytes(raw[:position] + bytes([value]) + raw[position + 1 :])
            status = run(path, "-o", output, "--rows", ROWS)
            error = capsys.readouterr().err
            assert status == 2 and str(path) in error or (status, error) == (0, "")


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
@pytest.mark.parametrize("keep", [0, 0.0005, 0.002, 0.01, 0.5, 0.9, 0.9999])
def test_truncated_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, keep: float
) -> None:
    good, bad = tmp_path / f"0.{suffix}", tmp_path / f"1.{suffix}"
    for path in (good, bad):
        if suffix == "npy":
            np.save(path, criteo(500))
        else:
            write_parquet(path, 5000)
    columns = [] if suffix == "npy" else ["--columns", "user"]
    truncated(bad, keep)
    output = tmp_path / "counts.safetensors"
    assert run(good, bad, "-o", output, "--rows", ROWS, *columns) == 2
    error = capsys.readouterr().err
    assert str(bad) in error and "truncated" in error, error
    assert not output.exists()


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, p, output = tmp_path / "x.npy", tmp_path / "p.parquet", tmp_path / "counts.safetensors"
    np.save(x, criteo(20))
    write_parquet(p, 20)
    arrays = {
        "labels": np.zeros((5, 1), np.int32),
        "dense": np.zeros((5, 26), np.float32),
        "flat": np.zeros(26, np.int32),
        "none": np.zeros((0, 26), np.int32),
        "objects": np.array([[None] * 26]),
        "negative": np.full((5, 26), -3),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    nulls = tmp_path / "nulls.parquet"
    holes = pa.array([[1], [2, None]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"a": pa.array([1, None], pa.int32()), "b": holes}), nulls)
    pipe = tmp_path / "pipe.npy"
    os.mkfifo(pipe)
    twice, vast = tmp_path / "twice.parquet", tmp_path / "vast.npy"
    whole, part = pa.array([1, 2]), pa.array([0.5, 1.5])
    pq.write_table(pa.table([whole, whole, whole, part], names=["a", "a", "b", "b"]), twice)
    vast.write_bytes(x.read_bytes().replace(b"(20, 26), }", b"(%d, 26), }" % 10**30))
    np.savez(tmp_path / "zip.npy.npz", criteo(3))
    (tmp_path / "zip.npy.npz").rename(tmp_path / "zip.npy")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.csv").write_text("1,2,3")
    (tmp_path / "text.parquet").write_text("1,2,3" * 100)
    (tmp_path / "text.npy").write_text("1,2,3" * 100)

    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "missing.npy"], "missing.npy: no such file"),
        ([tmp_path / "empty"], "empty: no .* file in this folder"),
        ([tmp_path / "text.csv"], "text.csv: neither .npy nor .parquet"),
        ([tmp_path / "text.npy"], "text.npy: .*not an npy file"),
        ([tmp_path / "zip.npy"], "zip.npy: .*not an npy file"),
        ([tmp_path / "objects.npy"], "objects.npy: .*npy file"),
        ([tmp_path / "text.parquet", "--columns", "a"], "text.parquet: .*not a Parquet file"),
        ([x, tmp_path / "labels.npy"], r"labels.npy: .*\[samples, 26\]; got int32 .*\[5, 1\]"),
        ([tmp_path / "dense.npy"], "dense.npy: .*float32"),
        ([tmp_path / "flat.npy"], r"flat.npy: .*\[26\]"),
        ([tmp_path / "none.npy"], "none.npy: no samples"),
        ([tmp_path / "negative.npy"], "negative.npy, samples 0 to 4, column 'cat_0': id -3"),
        ([x, p], "different formats"),
        ([x, tmp_path / "." / "x.npy"], "x.npy: named twice"),
        ([x, "--columns", "cat_26"], "no column 'cat_26'.*cat_25"),
        ([x, "--columns", "cat_2,cat_2"], "'cat_2' is named twice"),
        ([x, "--table-names", "a,b"], "--table-names: 2 for 26 columns"),
        ([p], "p.parquet: say which columns .*user, user_age, tags, more, pair, a.b"),
        ([p, "--columns", "text"], "p.parquet: no column 'text' of whole numbers"),
        ([p, "--columns", "label"], "p.parquet: no column 'label'"),
        ([nulls, "--columns", "a"], "nulls.parquet: column 'a' has missing ids"),
        ([nulls, "--columns", "b"], "nulls.parquet: column 'b' has missing ids"),
        ([x, "--rows", "3,4"], "--rows: 2 for 26 tables"),
        ([x, "--rows", "0"], "'0' is not a whole number >= 1"),
        ([x, "--rows", "ten"], "'ten' is not a whole number"),
        ([x, "--columns", "cat_1,"], "empty name"),
        ([x, "--rows", "4"], r"x.npy, samples 0 to 19, column 'cat_\d+': id \d+ .*has 4 rows"),
        ([x, "--rows", 2**70], f"'t_cat_0': no memory for the counts of {2**70} rows"),
        ([x, "--rows", "9" * 5000], "is not a whole number"),
        ([twice, "--columns", "a"], "twice.parquet: several columns are named 'a'"),
        ([twice, "--columns", "b"], "twice.parquet: several columns are named 'b'"),
        ([pipe], "pipe.npy: a pipe or device; give a file"),
        ([vast], "vast.npy: .*not an npy file"),
        ([x, "-o", tmp_path / "no" / "counts"], "No such folder"),
        ([x, "-o", tmp_path], "Is a folder"),
        ([x, "-o", x], "part of the data"),
    ]
    before = x.read_bytes()
    for arguments, message in cases:
        assert run("--rows", ROWS, "-o", output, *arguments) == 2, arguments
        captured = capsys.readouterr()
        assert re.search(message, captured.err), (arguments, captured.err)
        assert "Traceback" not in captured.err
        assert not captured.out
        assert not output.exists()
    assert x.read_bytes() == before


def test_without_pyarrow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "x.parquet", 5)
    np.save(tmp_path / "x.npy", criteo(5))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    output = tmp_path / "counts.safetensors"
    assert run(tmp_path / "x.parquet", "--rows", 9, "--columns", "user", "-o", output) == 2
    assert "torchrec-freq[parquet]" in capsys.readouterr().err
    assert run(tmp_path / "x.npy", "--rows", ROWS, "-o", output) == 0


# The command itself.


def test_the_command(tmp_path: Path) -> None:
    data = criteo(1000)
    np.save(tmp_path / "day_0_sparse.npy", data)
    output = tmp_path / "counts.safetensors"
    done = run_program("torchrec_freq", "count", tmp_path, "-o", output, "--rows", ROWS)
    assert done.err == ""  # no bar without a terminal
    assert done.out == f"{output}: 26 tables, 1,000 samples, 26,000 ids\n"
    check_criteo(output, data)
    before = output.read_bytes()
    failed = Program("torchrec_freq", ["count", tmp_path, "-o", output, "--rows", 3])
    assert failed.wait() == [2]
    assert failed.err.startswith("python -m torchrec_freq count: error: ")
    assert "Traceback" not in failed.err
    assert output.read_bytes() == before


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    np.save(tmp_path / "day_0_sparse.npy", criteo(1000))
    output = tmp_path / "counts.safetensors"
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    try:
        command = [sys.executable, "-m", "torchrec_freq", "count", str(tmp_path)]
        command += ["-o", str(output), "--rows", str(ROWS)]
        subprocess.run(command, stderr=side, check=True, timeout=120)
        bar = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(side)
    assert "1.00k/1.00k" in bar and "samples" in bar, bar
