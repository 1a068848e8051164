"""resize: tables against plain indexing, plans, optimizers, memory, kills, and what is refused."""

from __future__ import annotations

import errno
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import (
    LR,
    TABLES,
    full_weights,
    make_collection,
    restore,
    sample_loss,
    shard,
    state_of,
    to_kjt,
)
from models import make_batch as random_batch
from plans import make_plan
from points import Point
from ranks import context, run_on_ranks
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_freq import FrequencySGD, read_table_states, save_counts
from torchrec_freq.__main__ import main
from torchrec_freq.cli import resize_tables

# Of DCP, which saves here without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROWS = {"item": 20, "user": 10}
COLUMNS = 4


def weight_key(table: str) -> str:
    return f"sparse.ebc.embedding_bags.{table}.weight"


def table_state(table: str, rows: int, is_ours: bool = True) -> dict[str, dict[str, Any]]:
    """What a checkpoint holds of a table: all values are different."""
    name, stem = weight_key(table), f"{weight_key(table)}.{table}"
    generator = torch.Generator().manual_seed(rows)
    optimizer: dict[str, Any] = {f"{stem}.momentum1": torch.rand(rows, generator=generator)}
    if is_ours:
        optimizer |= {
            f"{stem}.row_counter": torch.randperm(rows, generator=generator).int() // 2,
            f"{stem}.table_totals": torch.tensor([3.0, 7, rows, 5], dtype=torch.float64),
            f"{stem}.row_counter_age": torch.tensor([rows]),
        }
    return {"model": {name: torch.rand(rows, COLUMNS, generator=generator)}, "opt": optimizer}


def whole_state(is_ours: bool = True) -> dict[str, Any]:
    parts = [table_state(table, rows, is_ours) for table, rows in ROWS.items()]
    return {
        "model": {**parts[0]["model"], **parts[1]["model"], "over.weight": torch.rand(3, 2)},
        "opt": {**parts[0]["opt"], **parts[1]["opt"]},
        "step": 7,
    }


def save(folder: Path, state: Mapping[str, Any]) -> Path:
    dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    return folder


def load(folder: Path) -> dict[str, Any]:
    """All that torch itself reads."""
    dcp_to_torch_save(folder, folder / "whole.pt")
    found: dict[str, Any] = torch.load(folder / "whole.pt", weights_only=True)
    return found


def run(*arguments: object) -> int:
    try:
        return main(["resize", *map(str, arguments)])
    except SystemExit as exit:  # argparse
        assert isinstance(exit.code, int)
        return exit.code


def check_table(
    new: Mapping[str, Any], old: Mapping[str, Any], rows: list[int], names: str
) -> None:
    """A table of ``new`` has these rows of ``old``, -1 for new ones; ``names`` is "old new"."""
    before, after = names.split()
    taken, known = torch.tensor(rows).clamp(min=0), torch.tensor(rows) >= 0
    weights = new["model"][weight_key(after)]
    assert torch.equal(weights[known], old["model"][weight_key(before)][taken][known])
    assert weights[~known].abs().max() <= len(rows) ** -0.5 if (~known).any() else True
    assert weights[~known].unique().numel() == weights[~known].numel()
    stem, old_stem = f"{weight_key(after)}.{after}", f"{weight_key(before)}.{before}"
    for state in ("momentum1", "row_counter", "table_totals", "row_counter_age"):
        if f"{old_stem}.{state}" in old["opt"]:
            expected = old["opt"][f"{old_stem}.{state}"]
            if state in ("momentum1", "row_counter"):
                expected = expected[taken] * known
            assert torch.equal(new["opt"][f"{stem}.{state}"], expected), state


def by_count(counts: Tensor, number: int) -> list[int]:
    order = sorted(range(len(counts)), key=lambda row: (-int(counts[row]), row))
    return sorted(order[:number])


@pytest.mark.parametrize("part_bytes", [1, 100, 1 << 25])
@pytest.mark.parametrize("is_ours", [True, False])
def test_tables_by_indexing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int, is_ours: bool
) -> None:
    monkeypatch.setattr(resize_tables, "PART_BYTES", part_bytes)
    old, source = whole_state(is_ours), tmp_path / "old"
    save(source, old)
    grown = tmp_path / "grown"
    assert run(source, "-o", grown, "--rows", "item=30", "--rename", "user=member") == 0
    new = load(grown)
    check_table(new, old, [*range(20), *[-1] * 10], "item item")
    check_table(new, old, list(range(10)), "user member")
    # All else is as it was.
    assert torch.equal(new["model"]["over.weight"], old["model"]["over.weight"])
    assert new["step"] == 7 and set(new["model"]) == {
        *map(weight_key, ("item", "member")),
        "over.weight",
    }
    # A mapping in any order, with new ids; and what the command wrote of it.
    mapping = torch.full((20,), -1)
    mapping[torch.tensor([3, 17, 4, 0])] = torch.tensor([0, 1, 2, 4])
    np.save(tmp_path / "m.npy", mapping.numpy())
    moved = tmp_path / "moved"
    flags = ("--map", f"item={tmp_path}/m.npy", "--rows", "item=6", "--rows", "user=4")
    assert run(source, "-o", moved, *flags) == 0
    check_table(load(moved), old, [3, 17, 4, -1, 0, -1], "item item")
    check_table(load(moved), old, [0, 1, 2, 3], "user user")
    assert np.array_equal(np.load(moved / "item.mapping.npy"), mapping)
    assert np.load(moved / "user.mapping.npy").tolist() == [0, 1, 2, 3, *[-1] * 6]


def test_rows_by_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, source = whole_state(), save(tmp_path / "old", whole_state())
    counts = {t: old["opt"][f"{weight_key(t)}.{t}.row_counter"] for t in ROWS}
    flags = ("--keep", "item=6", "--rows", "item=8", "--least-count", "user=3")
    assert run(source, "-o", tmp_path / "kept", *flags) == 0
    new, kept = load(tmp_path / "kept"), by_count(counts["item"], 6)
    check_table(new, old, [*kept, -1, -1], "item item")
    least = (counts["user"] >= 3).nonzero().flatten().tolist()
    check_table(new, old, least, "user user")
    mapping = np.load(tmp_path / "kept" / "item.mapping.npy")
    assert [mapping[row] for row in kept] == list(range(6)) and (mapping >= 0).sum() == 6
    share = counts["item"][kept].sum() / counts["item"].sum()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("item"))
    assert line.split() == ["item", "8", "6", "14", "2", f"{share:.2%}", f"{8 * 24}"]

    # 24 bytes a row: 16 of weights, 8 of state; the most frequent of both tables.
    assert run(source, "-o", tmp_path / "budget", "--budget", f"{14 * 24 + 23}B") == 0
    new = load(tmp_path / "budget")
    best = sorted(
        ((t, row) for t in ROWS for row in range(ROWS[t])),
        key=lambda entry: (-int(counts[entry[0]][entry[1]]), list(ROWS).index(entry[0]), entry[1]),
    )[:14]
    for table in ROWS:
        check_table(new, old, sorted(r for t, r in best if t == table), f"{table} {table}")

    # Row-wise Adagrad has no counts: a file has.
    stock = save(tmp_path / "stock", whole_state(is_ours=False))
    assert run(stock, "-o", tmp_path / "no", "--keep", "item=6") == 2
    assert "no counts of table 'item'" in capsys.readouterr().err
    save_counts(tmp_path / "counts", counts)
    by_file = ("--keep", "item=6", "--counts", tmp_path / "counts")
    assert run(stock, "-o", tmp_path / "by file", *by_file) == 0
    check_table(load(tmp_path / "by file"), whole_state(is_ours=False), kept, "item item")


# Optimizer; ranks and plan of the run that saves, and of the one that loads.
MOVES = [
    (FrequencySGD, 4, "four columns", 2, "row_wise"),
    (FrequencySGD, 2, "column_wise", 2, "column_wise"),
    (RowWiseAdagrad, 2, "column_wise", 2, "column_wise"),
    (RowWiseAdagrad, 2, "row_wise", 1, "table_wise"),
]
# New rows: the old ones, or -1.
TAKEN = {"a": [11, 3, -1, 0], "b": list(range(7)), "c": [*range(30), -1, -1, -1]}


def build(optimizer: Any, plan: str, rows: Mapping[str, int]) -> Any:
    tables = [type(t)(t.name, rows.get(t.name, t.rows), t.columns, t.features) for t in TABLES]
    torch.manual_seed(0)
    collection = make_collection(tables)
    apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": LR})
    weights = {t.name: collection.embedding_bags[t.name].weight.detach().clone() for t in tables}
    plans = make_plan(plan, tables, dist.get_world_size())
    return shard(collection, plans, EmbeddingBagCollectionSharder(), weights)


def train(model: Any, steps: int, rows: Mapping[str, list[int]] | None = None) -> list[float]:
    """Losses of steps; with ``rows``, on the ids that the old rows have got."""
    rng, rank, ranks = random.Random(0), dist.get_rank(), dist.get_world_size()
    losses = []
    for _ in range(steps):
        batch = random_batch(rng, TABLES, 8)
        for feature in batch:
            table = next(t.name for t in TABLES if feature.name in t.features)
            for bag in feature.bags:
                bag[:] = [row for row in bag if row in TAKEN[table]]
                if rows:
                    bag[:] = [rows[table].index(row) for row in bag]
        kjt = to_kjt(batch, slice(rank * 8 // ranks, (rank + 1) * 8 // ranks))
        loss = sample_loss(model(kjt).to_dict()).mean()
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses


def save_trained(folder: Path, optimizer: Any, plan: str) -> None:
    model = build(optimizer, plan, {})
    train(model, 10)
    dcp.save(state_of(model), checkpoint_id=folder / "old")
    torch.save((full_weights(model), train(model, 20)), folder / f"expected.{dist.get_rank()}")


def load_resized(folder: Path, optimizer: Any, plan: str, tolerance: float) -> None:
    model = build(optimizer, plan, {table: len(rows) for table, rows in TAKEN.items()})
    restore(model, folder / "new")
    weights, losses = torch.load(folder / "expected.0")
    for table, found in full_weights(model).items():
        for new, old in enumerate(TAKEN[table]):
            assert old < 0 or torch.equal(found[new], weights[table][old])
    # The rows that are looked up go on as if nothing had happened.
    found_losses = train(model, 20, TAKEN)
    assert max(abs(a - b) for a, b in zip(found_losses, losses, strict=True)) < tolerance


@pytest.mark.parametrize("move", MOVES, ids=lambda move: f"{move[0].__name__}-{move[2]}-{move[4]}")
def test_training_goes_on_under_another_plan(tmp_path: Path, move: Any) -> None:
    optimizer, ranks, plan, new_ranks, new_plan = move
    options = {"folder": tmp_path, "optimizer": optimizer}
    run_on_ranks(ranks, save_trained, {**options, "plan": plan})
    flags = []
    for table, rows in TAKEN.items():
        mapping = np.full({"a": 12, "b": 7, "c": 30}[table], -1)
        for new, old in enumerate(rows):
            if old >= 0:
                mapping[old] = new
        np.save(tmp_path / f"{table}.npy", mapping)
        flags += ["--map", f"{table}={tmp_path}/{table}.npy", "--rows", f"{table}={len(rows)}"]
    assert run(tmp_path / "old", "-o", tmp_path / "new", *flags) == 0
    # A plan that does not split columns has one rate a row where there were several.
    options["tolerance"] = 1e-6 if plan == new_plan or "column" not in plan else 1e-2
    run_on_ranks(new_ranks, load_resized, {**options, "plan": new_plan})
    found = read_table_states(tmp_path / "new")
    for name, state in read_table_states(tmp_path / "old").items():
        expected = state.take(torch.tensor(TAKEN[name]))
        torch.testing.assert_close(vars(found[name]), vars(expected), rtol=0, atol=0)


MEMORY = """
import resource, sys
from torchrec_freq.__main__ import main
status = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_a_table_of_ten_gigabytes(tmp_path: Path) -> None:
    rows, columns = 2_500_000, 1024
    counts = torch.zeros(rows, dtype=torch.int32)
    kept = torch.arange(17, rows, 1000)
    counts[kept] = torch.arange(1, len(kept) + 1, dtype=torch.int32)
    name, stem = weight_key("item"), f"{weight_key('item')}.item"
    totals = torch.tensor([3.0, 1, 1, 1], dtype=torch.float64)
    state = {"row_counter": counts, "momentum1": torch.ones(rows), "table_totals": totals}
    save(tmp_path / "old", {f"{stem}.{state}": value for state, value in state.items()})
    # The weights as torch writes them, but that their bytes are a hole in the file.
    file = tmp_path / "old" / "weights.distcp"
    with file.open("wb") as stream, torch.serialization.skip_data():
        torch.save(torch.empty(rows, columns), stream)
    assert file.stat().st_size > 10e9 and file.stat().st_blocks * 512 < 1e6

    def add(metadata: Any) -> None:
        index, info = next(iter(metadata.storage_data.items()))
        whole = torch.Size([rows, columns])
        chunk = type(metadata.state_dict_metadata[index.fqn].chunks[0])(torch.Size([0, 0]), whole)
        stored = metadata.state_dict_metadata[f"{stem}.momentum1"]
        metadata.state_dict_metadata[name] = type(stored)(stored.properties, whole, [chunk])
        place = type(info)("weights.distcp", 0, file.stat().st_size)
        metadata.storage_data[type(index)(name, chunk.offsets)] = place

    change_metadata(tmp_path / "old", add)
    flags = ["--keep", f"item={len(kept)}"]
    command = ["resize", tmp_path / "old", "-o", tmp_path / "new", *flags]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) * 1024 < 1e9
    new = read_table_states(tmp_path / "new")["item"]
    assert torch.equal(new.counts, counts[kept])


def change_metadata(folder: Path, change: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


# Where resize kills itself, and whether the new checkpoint is there then.
POINTS = [
    (Point(torch, "save"), False),
    (Point(torch, "save", call=3, after=True), False),
    (Point(np, "save"), False),
    (Point(pickle, "dumps", after=True), False),
    (Point(os, "fsync", call=3), False),
    (Point(os, "rename"), False),
    (Point(os, "rename", after=True), True),
]
SHRINK = ("--keep", "item=6")


def resize_and_die(folder: Path, number: int) -> None:
    POINTS[number][0].arm()
    run(folder / "old", "-o", folder / "new", *SHRINK)


@pytest.mark.parametrize("number", range(len(POINTS)))
def test_a_killed_command_leaves_no_half_output(tmp_path: Path, number: int) -> None:
    save(tmp_path / "old", whole_state())
    process: Any = context.Process(target=resize_and_die, args=(tmp_path, number))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "new").exists() == POINTS[number][1]
    if not POINTS[number][1]:  # and what is left does not keep the next one from its work
        assert run(tmp_path / "old", "-o", tmp_path / "new", *SHRINK) == 0
    assert len(read_table_states(tmp_path / "new")["item"].counts) == 6


def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path / "old", whole_state())
    lost = [-1] * 18
    mappings: dict[str, Any] = {"twice": [0, 0, *lost], "far": [0, 20, *lost], "wide": [[0]]}
    for name, values in {**mappings, "floats": [0.5] * 20, "good": [0, 1, *lost]}.items():
        np.save(tmp_path / f"{name}.npy", np.array(values))
    (tmp_path / "text.npy").write_text("1,2,3")
    save_counts(tmp_path / "short", {"item": torch.ones(3)})
    collision = "x._managed_collision_modules.item.ids"
    ids = save(tmp_path / "collision", {**whole_state(), collision: torch.ones(2)})
    state = whole_state()
    state["opt"][f"{weight_key('item')}.item.odd"] = torch.ones(5)
    odd = save(tmp_path / "odd", state)
    damaged = tmp_path / "damaged"
    shutil.copytree(old, damaged)
    data = damaged / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-3000])
    cases: list[tuple[list[object], str]] = [
        (["--rows", "things=5"], "--rows: .*old has no table 'things'; tables: item, user"),
        (["--rows", "item=0"], "'0' is not a whole number >= 1"),
        (["--rows", "item"], "'item' is not of the form TABLE=VALUE"),
        (["--rows", "item=1", "--rows", "item=2"], "--rows: table 'item' is named twice"),
        ([], "Nothing to change"),
        (["--keep", "item=21"], "'item': cannot keep 21 rows of 20"),
        (["--keep", "item=5", "--rows", "item=4"], "'item' keeps 5 rows; 4 are too few"),
        (["--keep", "item=5", "--least-count", "item=2"], "--keep and --least-count each choose"),
        (["--least-count", "item=99"], "'item': no row has a count of 99"),
        (["--budget", "20"], "'20' is not a size"),
        (["--budget", "47B"], "budget of 47 bytes has no room"),
        (["--budget", "1GB", "--rows", "item=3"], "--budget chooses .*leave out --rows"),
        (["--rename", "item=user"], "already has a table of that name"),
        (["--rename", "item=a.b"], "'a.b' cannot be a table's name"),
        (["--map", f"item={tmp_path}/none.npy"], "none.npy"),
        (["--map", f"item={tmp_path}/text.npy"], "text.npy: no mapping of table 'item'"),
        (["--map", f"item={tmp_path}/twice.npy"], r"rows\[0\] and rows\[1\] are both 0"),
        (["--map", f"item={tmp_path}/far.npy", "--rows", "item=20"], r"rows\[1\] is 20, out of"),
        (["--map", f"item={tmp_path}/floats.npy"], "whole numbers"),
        (["--map", f"item={tmp_path}/wide.npy"], r"each of 20 rows; got \[1, 1\]"),
        (["--map", f"user={tmp_path}/good.npy"], r"each of 10 rows; got \[20\]"),
        (
            ["--keep", "item=2", "--counts", tmp_path / "short"],
            "3 counts of table 'item', which has 20",
        ),
        (["--keep", "item=2", "--counts", tmp_path / "none"], "none: no such file"),
        ([tmp_path / "none", *SHRINK], "not a whole checkpoint"),
        ([damaged, *SHRINK], "distcp is truncated"),
        ([ids, *SHRINK], "ids gives ids their rows"),
        ([odd, *SHRINK], r"odd is \[5\], neither"),
        ([*SHRINK, "-o", old], "Exists already; name a new folder"),
        ([*SHRINK, "-o", tmp_path / "no" / "new"], "No such folder"),
    ]
    before = sorted(os.listdir(tmp_path))
    for arguments, message in cases:
        source = [] if arguments and isinstance(arguments[0], Path) else [old]
        output = [] if "-o" in arguments else ["-o", tmp_path / "new"]
        assert run(*source, *arguments, *output) == 2, arguments
        captured = capsys.readouterr()
        assert re.search(message, captured.err), (arguments, captured.err)
        assert captured.out == ""
        assert captured.err.count("\n") == 1 or "usage" in captured.err
        assert sorted(os.listdir(tmp_path)) == before, arguments

    # A full disk, known before or found out on the way.
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        assert run(old, "-o", tmp_path / "new", *SHRINK) == 2
        assert "the disk has 0 left" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        full = OSError(errno.ENOSPC, "No space left on device")
        patched.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(full))
        assert run(old, "-o", tmp_path / "new", *SHRINK) == 2
        assert f"No space left on device: '{tmp_path}/new'" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before
