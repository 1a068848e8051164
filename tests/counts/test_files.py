"""Files of counts: what they hold by safetensors' own reader, what is refused, killed writers."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from models import TABLES, Pair
from plans import make_plan
from points import Point
from ranks import context, on_ranks
from safetensors.numpy import load_file, save_file

from torchrec_freq import COUNT_CEILING, load_row_counts, row_counts
from torchrec_freq.counts.files import CountsReader, load_counts, save_counts
from torchrec_freq.output import check_folder, check_output, write_text, writing

COUNTS = {
    "user": torch.tensor([0, 3, COUNT_CEILING, 1]),
    "ebc.item": torch.arange(1000),
    "none": torch.zeros(0, dtype=torch.int64),
}
SQUARES = {"user": 1 / 3, "none": 0.0}
METADATA = {"format": "torchrec_freq.counts", "version": "2", "crc32": '{"a": 0}'}
FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "squares", [{}, SQUARES, {"user": 5e-324, "ebc.item": sys.float_info.max}, {"user": 3}]
)
def test_what_is_saved_is_loaded(tmp_path: Path, squares: dict[str, float]) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(path, COUNTS, squares)
    loaded = load_counts(path)
    assert loaded.squares == squares  # to the last bit
    assert set(loaded.counts) == set(COUNTS)
    for name, counts in COUNTS.items():
        assert loaded.counts[name].dtype == torch.int64
        assert torch.equal(loaded.counts[name], counts)
    assert os.listdir(tmp_path) == [path.name]
    # The counts are a copy: neither a change of the one nor of the other shows in both.
    before = path.read_bytes()
    loaded.counts["user"].add_(1)
    save_counts(path, {"user": torch.ones(4)})
    assert loaded.counts["user"].tolist() == [1, 4, COUNT_CEILING + 1, 2]
    assert path.read_bytes() != before


def test_other_tools_read_it(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(str(path), COUNTS, SQUARES)
    arrays = load_file(path)
    for name, counts in COUNTS.items():
        assert arrays[name].dtype == np.int32
        assert arrays[name].tolist() == counts.tolist()
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    checksums = json.loads(metadata.pop("crc32"))
    assert metadata == {
        "format": "torchrec_freq.counts",
        "version": "2",
        "squares": '{"user": 0.3333333333333333, "none": 0.0}',
    }
    for name, counts in COUNTS.items():
        start = zlib.crc32(json.dumps([name, len(counts), SQUARES.get(name)]).encode())
        assert checksums[name] == zlib.crc32(arrays[name].tobytes(), start)
    # 4 bytes a row, and readable to whom any new file is.
    assert len(raw) == 8 + length + 4 * 1004
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_any_dtype_layout_and_shared_storage(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    whole = torch.arange(12, dtype=torch.int32)
    counts = {
        "first": whole[:6],
        "second": whole[6:],
        "again": whole[:6],
        "strided": whole[::3],
        "float": whole.double(),
        "bytes": whole.to(torch.uint8),
    }
    save_counts(path, counts)
    loaded = load_counts(path).counts
    for name, expected in counts.items():
        assert loaded[name].tolist() == expected.tolist()
    assert whole.tolist() == list(range(12))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(path, {"a": torch.arange(9), "b": torch.arange(3)}, {"b": 2})
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=rf"{path} is truncated or not a safetensors file"):
            load_counts(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_counts(path)
    path.write_bytes(raw)
    assert load_counts(path).squares == {"b": 2}


FOREIGN: dict[str, tuple[np.ndarray, dict[str, str] | None, str]] = {
    "no metadata": (np.zeros(3, np.int32), None, "not one of counts.*None"),
    "a model": (np.zeros(3, np.int32), {"format": "pt"}, "not one of counts.*'pt'"),
    "version": (np.zeros(3, np.int32), METADATA | {"version": "3"}, "version '3'.*upgrade"),
    "float": (np.zeros(3, np.float32), METADATA, r"'a' must be I32 .*F32"),
    "two dimensions": (np.zeros((3, 1), np.int32), METADATA, r"'a'.*\[3, 1\]"),
    "a number": (np.zeros((), np.int32), METADATA, r"'a'.*\[\]"),
    "negative": (np.array([3, -1], np.int32), METADATA, "'a': counts must lie in .* got -1 to 3"),
    "too large": (np.array([2**30 + 1], np.int32), METADATA, f"'a'.*{2**30 + 1}"),
    "no checksums": (np.zeros(3, np.int32), METADATA | {"crc32": "{}"}, "checksums are not"),
    "negative squares": (np.zeros(3, np.int32), METADATA | {"squares": '{"a": -1}'}, "'a': -1"),
    "endless squares": (
        np.zeros(3, np.int32),
        METADATA | {"squares": f'{{"a": 1{"0" * 400}}}'},
        "damaged: its squares",
    ),
    "squares of no table": (np.zeros(3, np.int32), METADATA | {"squares": '{"b": 1}'}, "'b': 1"),
    "squares": (np.zeros(3, np.int32), METADATA | {"squares": "7"}, "squares are no JSON object"),
    "checksums": (
        np.zeros(3, np.int32),
        METADATA | {"crc32": "[" * 9999},
        "crc32 are no JSON object",
    ),
    "a checksum": (np.zeros(3, np.int32), METADATA | {"crc32": '{"a": 5}'}, "damaged.*'a'"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_refused(tmp_path: Path, case: str) -> None:
    array, metadata, message = FOREIGN[case]
    path = tmp_path / "foreign.safetensors"
    save_file({"a": array}, path, metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load_counts(path)
    assert str(path) in str(caught.value)


def test_other_formats_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    torch.save(COUNTS, path)
    with pytest.raises(ValueError, match=str(path)):
        load_counts(path)
    path.write_text('{"a": [1, 2, 3]}' * 10)
    with pytest.raises(ValueError, match=str(path)):
        load_counts(path)
    for missing in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(OSError, match=str(missing)):
            load_counts(missing)


WRONG: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "no table": ({}, {}, "at least one table"),
    "empty name": ({"": torch.ones(2)}, {}, "name ''"),
    "reserved name": ({"__metadata__": torch.ones(2)}, {}, "'__metadata__'"),
    "two dimensions": ({"a": torch.ones(2, 1)}, {}, r"'a'.*\[2, 1\]"),
    "negative": ({"a": torch.tensor([-1])}, {}, "'a'.*-1"),
    "not whole": ({"a": torch.tensor([0.5])}, {}, "'a'.*whole"),
    "NaN": ({"a": torch.tensor([torch.nan])}, {}, "'a'.*NaN"),
    "too large": ({"a": torch.tensor([COUNT_CEILING + 1])}, {}, f"'a'.*{COUNT_CEILING + 1}"),
    "bool": ({"a": torch.ones(2, dtype=torch.bool)}, {}, "'a'.*bool"),
    "negative squares": ({"a": torch.ones(2)}, {"a": -1}, "squares of table 'a': -1"),
    "infinite squares": ({"a": torch.ones(2)}, {"a": float("inf")}, "squares of table 'a': inf"),
    "squares of no number": ({"a": torch.ones(2)}, {"a": "1"}, "squares of table 'a': '1'"),
    "squares of no table": ({"a": torch.ones(2)}, {"b": 1}, "'b' has squares but no counts"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_counts_leave_the_old_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(path, COUNTS)
    before = path.read_bytes()
    counts, squares, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        save_counts(path, counts, squares)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(path, COUNTS)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space.*'{path}'"):
        save_counts(path, {"a": torch.ones(3)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(OSError, match="nowhere"):
        save_counts(tmp_path / "nowhere" / "counts.safetensors", COUNTS)


def test_blocks_are_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(path, {"a": torch.arange(9)})
    blocks = CountsReader(path).blocks("a", 4)
    assert next(blocks)[1].tolist() == [0, 1, 2, 3]
    save_counts(path, {"a": torch.zeros(9)})
    assert [block.tolist() for _, block in blocks] == [[4, 5, 6, 7], [8]]


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    counts = {"a": torch.arange(9), "b": torch.arange(3)}
    save_counts(path, counts, {"b": 2})
    raw = path.read_bytes()
    refused = 0
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            loaded = load_counts(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # in a part that says nothing, as the name of the checksums' key
            assert loaded.squares == {"b": 2}
            assert {name: c.tolist() for name, c in loaded.counts.items()} == {
                name: c.tolist() for name, c in counts.items()
            }
    assert refused > 0.95 * len(raw)


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "counts", tmp_path / "counts.safetensors"
    link.symlink_to(Path("elsewhere", "counts"))
    save_counts(link, {"a": torch.ones(5)}, {"a": 1})  # which leads nowhere yet
    assert link.is_symlink() and load_counts(target).squares == {"a": 1}
    target.chmod(0o640)
    save_counts(link, {"a": torch.ones(5)}, {"a": 2})
    assert link.is_symlink() and load_counts(target).squares == {"a": 2}
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.listdir(target.parent) == ["counts"]


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/null"),
    "a folder": Path.mkdir,
    "a loop": lambda path: path.symlink_to(path),
    "in no folder": lambda path: path.symlink_to(path.parent / "no" / "folder"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("attempt", [check_output, lambda path: save_counts(path, COUNTS)])
def test_what_is_no_file_stays_what_it_is(
    tmp_path: Path, kind: str, attempt: Callable[[Path], None]
) -> None:
    path = tmp_path / "counts.safetensors"
    NO_FILES[kind](path)
    before = path.lstat()
    with pytest.raises(OSError, match=str(path)):
        attempt(path)
    after = path.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    with pytest.raises(OSError, match=str(path)):  # and does not wait for a writer
        load_counts(path)
    assert os.listdir(tmp_path) == [path.name]


def test_outputs_are_checked_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("x" * 255)  # as long as a name can be
    for _ in range(2):
        check_output(path)
        assert not path.exists()
        write_text(path, "whole")
        assert path.read_text() == "whole"
        path.unlink()
    write_text(path, "old")
    check_output(path)
    with pytest.raises(OSError, match="File name too long"):
        check_output(tmp_path / ("x" * 256))
    with pytest.raises(NotADirectoryError, match=str(path)):
        check_folder(path)
    check_folder(tmp_path / "new" / "folder")

    def full(_: int) -> None:
        raise FULL

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for attempt in (check_output, lambda path: write_text(path, "new")):
            with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
                attempt(path)
    with pytest.raises(KeyboardInterrupt), writing(path) as file:
        file.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert set(os.listdir(tmp_path)) == {path.name, "new"}
    assert os.listdir(tmp_path / "new" / "folder") == []


# Where a writer kills itself, and whether the new file is in its place then.
POINTS = [
    (Point(safetensors.torch, "save_file"), False),
    (Point(safetensors.torch, "save_file", after=True), False),
    (Point(os, "fsync"), False),
    (Point(os, "replace"), False),
    (Point(os, "replace", after=True), True),
    (Point(os, "fsync", call=2), True),
]


def write_and_die(path: Path, number: int) -> None:
    POINTS[number][0].arm()
    save_counts(path, {"a": torch.full((50,), 2)}, {"a": 2})


@pytest.mark.parametrize("number", range(len(POINTS)))
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path, number: int) -> None:
    path = tmp_path / "counts.safetensors"
    save_counts(path, {"a": torch.ones(5)}, {"a": 1})
    writer: Any = context.Process(target=write_and_die, args=(path, number))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    loaded, is_new = load_counts(path), POINTS[number][1]
    assert loaded.squares == {"a": 2 if is_new else 1}
    assert loaded.counts["a"].tolist() == ([2] * 50 if is_new else [1] * 5)
    # What is left has another name, and does not keep the next writer from its work.
    assert [file.name for file in tmp_path.glob("*.safetensors")] == [path.name]
    save_counts(path, {"a": torch.full((3,), 9)}, {"a": 9})
    assert load_counts(path).counts["a"].tolist() == [9, 9, 9]


@on_ranks(2)
def test_counts_of_one_model_seed_another(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2))
    for _ in range(3):
        pair.step()
    counts = row_counts(pair.model)
    if dist.get_rank() == 0:
        save_counts(path, counts)
    dist.barrier()
    other = Pair(TABLES, make_plan("row_wise", TABLES, 2))
    load_row_counts(other.model, *load_counts(path))
    found = row_counts(other.model)
    assert all(torch.equal(found[name], counts[name]) for name in counts)
