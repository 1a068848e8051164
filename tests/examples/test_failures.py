"""Damage and death: what a reader says of damaged files, and what a run that was killed has lost.

What is accepted of a damaged file: an error of ours, or what was written.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import Pair, TableSpec, full_weights
from plans import make_plan
from points import Point
from ranks import run_on_ranks
from torch.distributed.checkpoint import FileSystemWriter

from benchmarks.common import checkpoint
from benchmarks.common import ranks as group
from benchmarks.common.checkpoint import Checkpoints, NoCheckpoint, load
from torchrec_freq import load_counts, output, row_counts, save_counts
from torchrec_freq.counts.stored import open_stored

SEED = 17
CASES = 2000  # of each kind


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """A copy that a disk, a network or an attacker has changed."""
    data = bytearray(raw)
    # Headers are short, and what matters most.
    end = len(data) if chance.random() < 0.5 else min(len(data), 400)
    start = chance.randrange(end)
    stop = min(len(data), start + chance.choice([1, 1, 1, 4, 64, 4096]))
    how = chance.choice(["flip", "flip", "set", "zero", "cut", "remove", "repeat", "insert"])
    if how == "flip":
        for position in range(start, stop):
            data[position] ^= 1 << chance.randrange(8)
    elif how == "set":
        data[start:stop] = chance.randbytes(stop - start)
    elif how == "zero":
        data[start:stop] = bytes(stop - start)
    elif how == "cut":
        del data[start:]
    elif how == "remove":
        del data[start:stop]
    elif how == "repeat":
        data[start:start] = data[start:stop]
    else:
        data[start:start] = chance.randbytes(stop - start)
    return bytes(data)


def test_damaged_files_of_counts(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    path = tmp_path / "counts.safetensors"
    counts = {name: torch.randint(0, 1000, (rows,)) for name, rows in (("user", 70), ("日本", 3))}
    squares = {"user": 1 / 3}
    save_counts(path, counts, squares)
    raw = path.read_bytes()
    refused = 0
    for case in range(CASES):
        path.write_bytes(damaged(raw, chance))
        try:
            loaded, known = load_counts(path)
        except ValueError as error:
            assert str(path) in str(error), case
            refused += 1
        else:
            assert loaded.keys() == counts.keys() and known == squares, case
            assert all(torch.equal(loaded[name], counts[name]) for name in counts), case
    assert refused > 0.9 * CASES


@pytest.fixture
def alone() -> Iterator[None]:
    """This process is the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def some_state(fill: float) -> dict[str, Any]:
    """As models and optimizers have it: tensors, nested, and numbers, which DCP pickles."""
    return {
        "model": {"a.weight": torch.full((30, 8), fill), "b": torch.full((), fill)},
        "optimizer": {
            "state": {"a": {"a.row_counter": torch.full((30,), int(fill), dtype=torch.int32)}},
            "param_groups": [{"lr": fill, "betas": [fill, 0.5]}],
        },
    }


def flat(value: Any) -> Any:
    """Something that can be compared."""
    if isinstance(value, dict):
        return {key: flat(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return list(map(flat, value))
    return value.tolist() if isinstance(value, torch.Tensor) else value


def some_file(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(path for path in folder.iterdir() if path.is_file()))


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:.*is not a whole checkpoint, passed over")
def test_damaged_checkpoints(tmp_path: Path) -> None:
    """The one before is taken, or the very state that was saved."""
    chance = random.Random(SEED)
    checkpoints = Checkpoints(tmp_path, settings={"lr": 0.1})
    for step in (1, 2):
        checkpoints.save(step, some_state(step), {"curve": [step, 0.25]})
    passed_over = 0
    for case in range(CASES):
        path = some_file(tmp_path / "step-00000002", chance)
        raw = path.read_bytes()
        path.write_bytes(damaged(raw, chance))
        found = checkpoints.latest()
        assert found is not None
        passed_over += found.step == 1
        if case % 100 == 0 or found.step == 2:
            state = some_state(0)
            load(found.path, state)
            assert flat(state) == flat(some_state(found.step)), (case, path)
            assert found.progress == {"curve": [found.step, 0.25]}
        path.write_bytes(raw)
    assert passed_over > 0.9 * CASES
    # Damage to both.
    for step in (1, 2):
        path = tmp_path / f"step-0000000{step}" / "__0_0.distcp"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(NoCheckpoint):
        checkpoints.latest()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_damaged_checkpoints_without_checksums(tmp_path: Path) -> None:
    """As DCP saves them and the report reads them: the errors are ours, the counts possible ones.

    Nothing in such a folder shows that a count is another one.
    """
    chance = random.Random(SEED)
    folder = tmp_path / "checkpoint"
    key = "optimizer.state.embeddings.a.weight.a.row_counter"
    counts = torch.randint(0, 1000, (300,), dtype=torch.int32)
    totals = key.replace("row_counter", "table_totals")
    state = {key: counts, totals: torch.tensor([2, 0.5, 9, 9], dtype=torch.float64)}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    refused = 0
    for case in range(CASES):
        path = some_file(folder, chance)
        raw = path.read_bytes()
        path.write_bytes(damaged(raw, chance))
        try:
            for table in open_stored(folder):
                blocks = [counts_R for _, counts_R, _ in table.blocks()]
                read = torch.cat([counts_R for counts_R in blocks if counts_R is not None])
                assert len(read) == table.rows and bool((read >= 0).all()), case
        except ValueError as error:
            assert str(folder) in str(error), case
            refused += 1
        path.write_bytes(raw)
    assert refused > CASES / 3


# Two ranks train, save checkpoints and a file of counts at each step, and die at a point.

TABLES = [TableSpec("a", 12, 16, ["f0"]), TableSpec("b", 7, 16, ["f1", "f2"])]
KEEP = 2


# In the last save of a run.
POINTS = [
    Point(Path, "mkdir", after=True),
    Point(FileSystemWriter, "write_data"),
    Point(FileSystemWriter, "write_data", after=True),
    Point(FileSystemWriter, "write_data", after=True, rank=1),
    Point(FileSystemWriter, "finish"),
    Point(Path, "rename", call=1),  # of DCP's metadata
    Point(FileSystemWriter, "finish", after=True),
    Point(checkpoint, "_sums", rank=1),
    Point(checkpoint, "_write_manifest"),
    Point(output, "sync", call=1),  # of the manifest
    Point(os, "replace", call=1),
    Point(os, "replace", call=1, after=True),
    Point(output, "sync", call=2),  # of what the checkpoint has in it
    Point(Path, "rename", call=2),  # to the name of a checkpoint
    Point(Path, "rename", call=2, after=True),
    Point(checkpoint, "sync", after=True),
    Point(group, "gather", call=3, rank=1),
    Point(Path, "rename", call=3, after=True),  # of one to delete
    Point(os, "unlink", call=2),  # in the middle of that
    Point(shutil, "rmtree", after=True),
    Point(safetensors.torch, "save_file"),
    Point(safetensors.torch, "save_file", after=True),
    Point(output, "sync", call=3),
    Point(os, "replace", call=2),
    Point(os, "replace", call=2, after=True),
    Point(output, "sync", call=4, after=True),
]


def whole_state(pair: Pair) -> dict[str, torch.Tensor]:
    """What must not be lost, the same on every rank."""
    counts = row_counts(pair.model)
    return {**full_weights(pair.model), **{f"{name} counts": counts[name] for name in counts}}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    content = b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(content).hexdigest()


def write(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(f"{line}\n")


def live_and_die(folder: Path, number: int) -> None:
    """Resumes, checks that nothing is lost, trains two steps, and dies in the second one's save."""
    pair = Pair(TABLES, make_plan("row_wise", TABLES, 2))
    state = {"model": pair.model, "optimizer": pair.model.fused_optimizer}
    checkpoints = Checkpoints(folder / "checkpoints", settings={}, keep=KEEP)
    log, counts_file = folder / "log.txt", folder / "counts.safetensors"
    lines = [line.split() for line in log.read_text().splitlines()]
    digests = {int(step): value for what, step, value in lines if what == "saving"}
    saved = max((int(step) for what, step, _ in lines if what == "saved"), default=0)
    possible: set[str] = set()
    for what, _, value in lines:
        if what == "counting":
            possible.add(value)
        elif what == "counted":
            possible = {value}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what has the name of a checkpoint is whole
        found = checkpoints.latest()
    start = 0 if found is None else found.step
    # A checkpoint that was announced is there; one that was not may be.
    assert start in (saved, saved + 1), (start, saved)
    if found is not None:
        load(found.path, state)
        assert digest(whole_state(pair)) == digests[start]
    if possible:  # one was announced, or is there already
        assert digest(load_counts(counts_file).counts) in possible
    for step in (start + 1, start + 2):
        pair.step()
        now = digest(whole_state(pair))
        if dist.get_rank() == 0:
            write(log, f"saving {step} {now}")
        if step == start + 2 and number < len(POINTS):
            point = POINTS[number]
            if point.rank == dist.get_rank():
                point.arm()
        checkpoints.save(step, state)
        if dist.get_rank() == 0:
            write(log, f"saved {step} -")
        counts = row_counts(pair.model)
        if dist.get_rank() == 0:
            write(log, f"counting {step} {digest(counts)}")
            save_counts(counts_file, counts)
            write(log, f"counted {step} {digest(counts)}")
        dist.barrier()
    assert number == len(POINTS), f"{POINTS[number]} was not reached"


def test_killed_at_any_point_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "log.txt").touch()
    for number, point in enumerate(POINTS):
        with pytest.raises(AssertionError, match=f"^rank {point.rank} of 2: killed by SIGKILL"):
            run_on_ranks(2, live_and_die, {"folder": tmp_path, "number": number})
    run_on_ranks(2, live_and_die, {"folder": tmp_path, "number": len(POINTS)})
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert len(left) == KEEP and all(name.startswith("step-") for name in left)
