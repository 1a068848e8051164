"""Checkpoints of a run: only whole ones count, the last few are kept, other ranks load them."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Pair, TableSpec
from ranks import on_ranks
from torch.distributed.checkpoint.filesystem import FileSystem
from torchrec.distributed.sharding_plan import table_wise
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.common import checkpoint
from benchmarks.common.checkpoint import MANIFEST, Checkpoints, NoCheckpoint, NotSaved, load
from torchrec_freq import FrequencySGD


def saved(folder: Path, steps: list[int], keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, settings={"lr": 0.1}, keep=keep)
    for step in steps:
        checkpoints.save(step, {"weights": torch.full((3,), step)}, {"at": step})
    return checkpoints


@on_ranks(2)
def test_keeps_the_last_ones(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2, 10, 11], keep=3)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000002", "step-00000010", "step-00000011"}
    latest = checkpoints.latest()
    assert latest is not None and (latest.step, latest.progress) == (11, {"at": 11})
    state = {"weights": torch.zeros(3, dtype=torch.int64)}
    load(latest.path, state)
    assert state["weights"].tolist() == [11] * 3


@pytest.mark.filterwarnings("ignore:.*is not a whole checkpoint, passed over")
@on_ranks(2)
def test_what_is_known_to_be_damaged_is_not_counted(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2], keep=2)
    if dist.get_rank() == 0:
        change(tmp_path / "step-00000002" / "__0_0.distcp", 0.5)
    dist.barrier()
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 1
    checkpoints.save(3, {"weights": torch.full((3,), 3)})
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000003"}
    dist.barrier()
    checkpoints.save(2, {"weights": torch.full((3,), 2)})  # a new one, in its place
    checkpoints.save(4, {"weights": torch.full((3,), 4)})
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003", "step-00000004"}


@pytest.mark.filterwarnings("ignore:.*cannot be deleted")
@on_ranks(2)
def test_what_cannot_be_deleted_stops_nothing(tmp_path: Path) -> None:
    rmtree = shutil.rmtree

    def busy(path: Path, **options: Any) -> None:
        if Path(path).name == "deleting-step-00000001":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        saved(tmp_path, [1, 2, 3, 4], keep=1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"deleting-step-00000001", "step-00000004"}


@on_ranks(1)
def test_nothing_to_keep(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "new", settings={}).latest() is None
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, settings={}, keep=0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change(path: Path, where: float, bits: int = 1) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(where * len(raw))] ^= bits
    path.write_bytes(raw)


def zero(path: Path) -> None:
    """As a disk that has lost a page."""
    raw = path.read_bytes()
    path.write_bytes(raw[:512] + bytes(256) + raw[768:])


def add_key(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "new": 1}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "data zeroed": lambda folder: zero(folder / "__0_0.distcp"),
    "data cut": lambda folder: cut(folder / "__0_0.distcp"),
    "data missing": lambda folder: (folder / "__0_0.distcp").unlink(),
    "metadata changed": lambda folder: change(folder / ".metadata", 0.3),
    "manifest null": lambda folder: (folder / MANIFEST).write_text("null"),
    "manifest deep": lambda folder: (folder / MANIFEST).write_text("[" * 99999),
    "manifest with a key": lambda folder: add_key(folder / MANIFEST),
    "manifest of a step": lambda folder: shutil.copy(
        folder.with_name("step-00000001") / MANIFEST, folder
    ),
    "manifest missing": lambda folder: (folder / MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@on_ranks(2)
def test_damaged_ones_are_not_taken(damage: str, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    if dist.get_rank() == 0:
        DAMAGES[damage](tmp_path / "step-00000002")
        shutil.copytree(tmp_path / "step-00000001", tmp_path / "writing-step-00000003")
        with pytest.warns(UserWarning, match="step-00000002 is not a whole checkpoint, passed"):
            latest = checkpoints.latest()
    else:
        latest = checkpoints.latest()
    assert latest is not None and latest.step == 1
    # The next save of that step takes its place, and clears what a killed writer has left.
    saved(tmp_path, [2])
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 2
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}


@on_ranks(2)
def test_checksums_are_of_the_files(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "BLOCK_BYTES", 1000)
        checkpoints = Checkpoints(tmp_path, settings={})
        checkpoints.save(1, {"a": torch.arange(5000), "b": torch.arange(9)})
        found = checkpoints.latest()
    assert found is not None
    assert found.files.keys() | {MANIFEST} == {path.name for path in found.path.iterdir()}
    for name, sums in found.files.items():
        raw = (found.path / name).read_bytes()
        assert sums == [len(raw), zlib.crc32(raw)]


@on_ranks(2)
def test_no_whole_one_is_not_taken_for_none(tmp_path: Path) -> None:
    """A run that began anew would delete what could be repaired."""
    checkpoints = saved(tmp_path, [1, 2])
    dist.barrier()
    if dist.get_rank() == 0:
        cut(tmp_path / "step-00000001" / MANIFEST)
        change(tmp_path / "step-00000002" / "__0_0.distcp", 0.5)
    dist.barrier()
    with pytest.raises(NoCheckpoint, match="None of the checkpoints .*00000001: .*00000002: "):
        checkpoints.latest()


@on_ranks(2)
def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    names = ["writing-x", "step-x", "writing-step-1", "step-00000001.old"]
    if dist.get_rank() == 0:
        for name in names:
            (tmp_path / name).write_text("mine")
        (tmp_path / "writing-step-00000001").write_text("in the way")
        (tmp_path / "deleting-step-00000001").mkdir()
    dist.barrier()
    checkpoints = Checkpoints(tmp_path, settings={"lr": 0.1})
    assert checkpoints.latest() is None
    saved(tmp_path, [1, 2, 3])
    assert {p.name for p in tmp_path.iterdir()} == {*names, "step-00000002", "step-00000003"}


@on_ranks(2)
def test_a_full_disk(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1])
    state = {f"{i}": torch.full((1_000_000,), 2.0) for i in range(4)}

    @contextlib.contextmanager
    def full(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with open("/dev/full", mode) as stream:
            yield stream

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(FileSystem, "create_stream", full)
        with pytest.raises(NotSaved, match="step-00000002 is not saved: .*rank 1: .*No space left"):
            checkpoints.save(2, state)
    dist.barrier()  # rank 0 cleans up
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001"}
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 1
    checkpoints.save(2, state)
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 2


@on_ranks(2)
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Rank 0 alone finds out, and the other one does not wait for it."""
    (tmp_path / f"file-{dist.get_rank()}").touch()
    folder = tmp_path / "file-0" / "checkpoints"
    with pytest.raises(NotSaved, match="step-00000001 is not saved: on rank 0: .*Not a directory"):
        Checkpoints(folder, settings={}).save(1, {"a": torch.ones(1)})


TWO_TABLES = [TableSpec("a", 12, 16, ["f0"]), TableSpec("b", 7, 16, ["f1"])]
OPTIMIZERS: dict[str, Any] = {
    "FrequencySGD": FrequencySGD,
    "SGD": torch.optim.SGD,
    "RowWiseAdagrad": RowWiseAdagrad,
}


def two_tables(optimizer: str) -> Pair:
    """Each on a rank of its own, whatever the number of ranks."""
    plan = {"a": table_wise(rank=0), "b": table_wise(rank=dist.get_world_size() - 1)}
    return Pair(TWO_TABLES, plan, optimizer=OPTIMIZERS[optimizer])


def numbers_of(pair: Pair) -> dict[str, Any]:
    """Weights and optimizer state of a rank's shards, as lists."""
    found: dict[str, Any] = {}
    state = pair.model.fused_optimizer.state_dict()["state"]
    tensors = {**pair.model.state_dict(), **{k: v for s in state.values() for k, v in s.items()}}
    for key, value in tensors.items():
        for shard in value.local_shards() if hasattr(value, "local_shards") else []:
            found[key] = shard.tensor.tolist()
    return found


@on_ranks(2)
def save_two_tables(optimizer: str, folder: Path) -> None:
    pair = two_tables(optimizer)
    pair.step()
    Checkpoints(folder, settings={}).save(1, state_of(pair))
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(numbers_of(pair)))


def state_of(pair: Pair) -> dict[str, Any]:
    return {"model": pair.model, "optimizer": pair.model.fused_optimizer}


@on_ranks(4)
def load_two_tables(optimizer: str, folder: Path) -> None:
    saved_numbers: dict[str, Any] = {}
    for rank in range(2):
        saved_numbers |= json.loads((folder / f"{rank}.json").read_text())
    pair, checkpoints = two_tables(optimizer), Checkpoints(folder, settings={})
    found = checkpoints.latest()
    assert found is not None
    load(found.path, state_of(pair))
    numbers = numbers_of(pair)
    assert numbers == {key: saved_numbers[key] for key in numbers}
    assert bool(numbers) == (dist.get_rank() in (0, 3))
    checkpoints.save(2, state_of(pair))  # by ranks without a table, too
    pair.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_more_ranks_than_tables(optimizer: str, tmp_path: Path) -> None:
    save_two_tables(optimizer=optimizer, folder=tmp_path)
    load_two_tables(optimizer=optimizer, folder=tmp_path)


@on_ranks(2)
def test_settings_must_agree(tmp_path: Path) -> None:
    saved(tmp_path, [1])
    other = Checkpoints(tmp_path, settings={"lr": 0.2, "seed": 0})
    with pytest.raises(ValueError, match=r"step-00000001 .*lr was 0\.1, is 0\.2; seed was None"):
        other.latest()
