"""The demo's checkpoints: killed runs end as uninterrupted ones, and only whole ones count."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import shutil
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import Pair, TableSpec
from points import Point
from programs import Program
from ranks import on_ranks
from ratings import RATINGS, write_recbole
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchrec.distributed.sharding_plan import table_wise
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.common import checkpoint
from benchmarks.common.checkpoint import MANIFEST, Checkpoints, NoCheckpoint, NotSaved
from examples import demo
from torchrec_freq import FrequencySGD

BATCH = 8
EPOCHS = 3
STEPS = EPOCHS * (RATINGS * 8 // 10 // BATCH)
EVERY = 7  # not where the curve has its points
# Where a run of two ranks ends, by the call in it: at a step, at or in the second of its saves.
LIVES = [
    Point(KeyedOptimizerWrapper, "step", call=3 * EVERY + 7),
    Point(FileSystemWriter, "write_data", call=2, after=True, rank=1),
    Point(Checkpoints, "save", call=2, after=True),
    Point(FileSystemWriter, "finish", call=2, after=True),
    Point(Checkpoints, "save", call=2, rank=1),
]


def live(number: int) -> None:
    if os.environ["RANK"] == str(LIVES[number].rank):
        LIVES[number].arm()


def start(folder: Path, *flags: str, ranks: int = 2, **options: Any) -> Program:
    """Starts the demo on the ratings in `folder`, where it also writes."""
    command = ["--data", folder / "data", "--out", folder, "--batch-size", BATCH]
    return Program("examples.demo", [*command, "--epochs", EPOCHS, *flags], ranks=ranks, **options)


def run(folder: Path, *flags: str, ranks: int = 2) -> dict[str, Any]:
    """The results of a run to the end, without the timings."""
    running = start(folder, *flags, ranks=ranks)
    assert running.wait() == [0] * ranks, running.printed
    (folder / "log.txt").write_text(running.printed)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    for arm in results["arms"].values():
        del arm["seconds_per_step"]
    return results


def saving(folder: Path, every: int) -> list[str]:
    return ["--checkpoint-dir", str(folder / "checkpoints"), "--checkpoint-every", str(every)]


def steps_saved(folder: Path) -> list[int]:
    paths = (folder / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in paths)


def content(folder: Path, step: int = STEPS) -> dict[str, bytes]:
    """All tensors of a checkpoint, whole ones, bit by bit."""
    file = folder / "checkpoint.pt"
    dcp_to_torch_save(folder / "checkpoints" / f"step-{step:08}", file)
    tensors: dict[str, bytes] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                add(f"{path}/{key}", entry)
        else:
            assert isinstance(value, torch.Tensor), path
            tensors[path] = value.detach().numpy().tobytes()

    add("", torch.load(file))
    return tensors


def counters(tensors: dict[str, bytes]) -> dict[str, bytes]:
    return {path: value for path, value in tensors.items() if path.endswith(".row_counter")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run, with a checkpoint in its middle and one at its end."""
    folder = make_folder(tmp_path_factory.mktemp("reference"))
    results = run(folder, *saving(folder, STEPS // 2))
    assert steps_saved(folder) == [STEPS // 2, STEPS]
    (folder / "expected.json").write_text(json.dumps(results))
    return folder


def expected(reference: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((reference / "expected.json").read_text())
    return results


def make_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    write_recbole(folder / "data")
    return folder


def resumable(reference: Path, folder: Path) -> Path:
    """A folder with the data and the first checkpoint of the reference."""
    name = f"step-{STEPS // 2:08}"
    shutil.copytree(reference / "checkpoints" / name, folder / "checkpoints" / name)
    return make_folder(folder)


def test_saving_changes_nothing(reference: Path, tmp_path: Path) -> None:
    results = run(make_folder(tmp_path))
    assert results == expected(reference)
    assert set(results["lookups"].values()) == {STEPS * BATCH, 2 * STEPS * BATCH}
    assert not (tmp_path / "checkpoints").exists()


def test_killed_and_resumed(reference: Path, tmp_path: Path) -> None:
    """Killed between, at and in saves, then resumed: the same bit by bit."""
    folder = make_folder(tmp_path)
    flags = saving(folder, EVERY)
    saved: list[int] = []
    for number, point in enumerate(LIVES):
        running = start(folder, *flags, before=functools.partial(live, number))
        assert running.wait_for_a_death()[point.rank] == -signal.SIGKILL, running.printed
        assert ("Resumed from" in running.printed) == (number > 0)
        saved.append(steps_saved(folder)[-1])
    assert saved == [EVERY * n for n in (1, 2, 4, 5, 6)]
    last = saved[-1]
    assert last < STEPS - EVERY

    results = run(folder, *flags)
    assert f"step-{last:08}, after {last} steps." in (folder / "log.txt").read_text()
    assert results == expected(reference)
    got, wanted = content(folder), content(reference)
    assert got.keys() == wanted.keys()
    assert [path for path in wanted if got[path] != wanted[path]] == []
    assert len(counters(wanted)) == len(results["tables"])
    assert steps_saved(folder) == [STEPS - STEPS % EVERY, STEPS]
    assert not list((folder / "checkpoints").glob("writing-*"))

    # The end is a checkpoint, too: nothing is left to train.
    assert run(folder, *flags) == results


def test_resumed_on_another_number_of_ranks(reference: Path, tmp_path: Path) -> None:
    folder = resumable(reference, tmp_path)
    results = run(folder, *saving(folder, STEPS), ranks=1)
    assert f"after {STEPS // 2} steps." in (folder / "log.txt").read_text()
    assert results["lookups"] == expected(reference)["lookups"]
    for name, arm in expected(reference)["arms"].items():
        for got, wanted in zip(results["arms"][name]["curve"], arm["curve"], strict=True):
            assert got["step"] == wanted["step"]
            assert got["valid"] == pytest.approx(wanted["valid"], abs=1e-5)
            assert got["test"] == pytest.approx(wanted["test"], abs=1e-5)
    assert counters(content(folder)) == counters(content(reference))


def test_other_settings_are_refused(reference: Path, tmp_path: Path) -> None:
    folder = resumable(reference, tmp_path)
    flags = saving(folder, STEPS)
    running = start(folder, *flags, "--batch-size", "16", "--seed", "1")
    assert running.wait() == [1, 1]
    assert running.printed.count("batch size was 8, is 16; seed was 0, is 1.") == 2

    running = start(folder, *flags, "--epochs", "1", ranks=1)
    assert running.wait() == [1]
    assert f"{STEPS // 2} steps old, more than --epochs 1" in running.printed
    assert steps_saved(folder) == [STEPS // 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "3"], "need --checkpoint-dir"),
        (["--checkpoint-dir", "c", "--keep", "0"], "--keep must be at least 1, not 0"),
        (["--checkpoint-dir", "c", "--checkpoint-every", "0"], "must be at least 1, not 0"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--batch-size", "-256"], "--batch-size must be at least 1, not -256"),
        (["--limit", "0"], "--limit must be at least 1, not 0"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--seed", str(2**64)], "--seed must be from 0"),
        (["--lr", "nan"], "--lr must be a finite number above 0"),
        (["--out", "/dev/null"], "give a folder: '/dev/null'"),
        (["--checkpoint-dir", "/dev/null"], "give a folder: '/dev/null'"),
    ],
)
def test_flags_are_refused(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", *flags])
    with pytest.raises(SystemExit):
        demo.parse_args()
    assert message in capsys.readouterr().err


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
    checkpoints.load(latest, state)
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
    "data changed": lambda folder: change(folder / "__0_0.distcp", 0.5),
    "metadata changed": lambda folder: change(folder / ".metadata", 0.3),
    "metadata zeroed": lambda folder: zero(folder / ".metadata"),
    "manifest empty": lambda folder: (folder / MANIFEST).write_text("{}"),
    "manifest null": lambda folder: (folder / MANIFEST).write_text("null"),
    "manifest deep": lambda folder: (folder / MANIFEST).write_text("[" * 99999),
    "manifest with a key": lambda folder: add_key(folder / MANIFEST),
    "manifest changed": lambda folder: change(folder / MANIFEST, 0.9),
    "manifest of a step": lambda folder: (
        shutil.copy(folder.with_name("step-00000001") / MANIFEST, folder) and None
    ),
    "data cut": lambda folder: cut(folder / "__0_0.distcp"),
    "data missing": lambda folder: (folder / "__0_0.distcp").unlink(),
    "metadata cut": lambda folder: cut(folder / ".metadata"),
    "manifest cut": lambda folder: cut(folder / MANIFEST),
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
def test_checksums_are_of_the_blocks(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "BLOCK_BYTES", 1000)
        checkpoints = Checkpoints(tmp_path, settings={})
        checkpoints.save(1, {"a": torch.arange(5000)})
        found = checkpoints.latest()
        assert found is not None
        for name, file in found.files.items():
            raw = (found.path / name).read_bytes()
            blocks = [raw[i : i + 1000] for i in range(0, len(raw), 1000)]
            assert file == {"bytes": len(raw), "crc32": [zlib.crc32(block) for block in blocks]}
        assert found.files.keys() | {MANIFEST} == {path.name for path in found.path.iterdir()}
        dist.barrier()
        if dist.get_rank() == 0:
            change(found.path / "__0_0.distcp", 0.95)  # in the part that rank 1 looks at
        dist.barrier()
        with pytest.raises(NoCheckpoint, match=r"None .* is whole: .*__0_0.distcp is damaged in"):
            checkpoints.latest()


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


@pytest.mark.parametrize("numbers", [3, 1_000_000])
@on_ranks(2)
def test_a_full_disk(numbers: int, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1])
    state = {f"{i}": torch.full((numbers,), 2.0) for i in range(4)}
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            file = io.FileIO
            patch.setattr(io, "FileIO", lambda path, mode: file("/dev/full", mode))
        with pytest.raises(NotSaved) as caught:
            checkpoints.save(2, state)
    assert caught.value.errno == errno.ENOSPC
    message = str(caught.value)
    assert "step-00000002 is not saved: on rank 1: " in message
    assert "No space left on device: " in message and "__1_0.distcp" in message
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
    # With the examples' helper.
    pair, checkpoints = two_tables(optimizer), Checkpoints(folder, settings={})
    found = checkpoints.latest()
    assert found is not None
    checkpoints.load(found, state_of(pair))
    loaded = [numbers_of(pair)]
    checkpoints.save(2, state_of(pair))  # by ranks without a table, too
    # As docs/checkpoints.md says, from what these ranks have saved.
    pair = two_tables(optimizer)
    state: dict[str, Any] = {
        "model": pair.model.state_dict(),
        "optimizer": pair.model.fused_optimizer.state_dict(),
    }
    planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
    dcp.load(state, checkpoint_id=folder / "step-00000002", planner=planner)
    pair.model.load_state_dict(state["model"])
    pair.model.fused_optimizer.load_state_dict(state["optimizer"])
    loaded.append(numbers_of(pair))
    for numbers in loaded:
        assert numbers == {key: saved_numbers[key] for key in numbers}
        assert bool(numbers) == (dist.get_rank() in (0, 3))
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
