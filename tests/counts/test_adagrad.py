"""Row-wise Adagrad's sums as counts and back: rates, training, checkpoints, what is refused."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import (
    LR,
    full_weights,
    make_batch,
    make_collection,
    sample_loss,
    shard,
    state_of,
    to_kjt,
)
from plans import WIDE_TABLES as TABLES
from plans import make_plan
from ranks import on_ranks, run_on_ranks
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec_freq.counts.adagrad import counts_of_sums

import torchrec_freq
from torchrec_freq import COUNT_CEILING, FrequencySGD, adagrad_sums, load_adagrad_sums
from torchrec_freq import __main__ as command_line
from torchrec_freq.counts.row_state import RowShard, RowState
from torchrec_freq.sharded.install import frequency_modules

# (ranks, hosts) -> plans
LAYOUTS: dict[tuple[int, int], list[str]] = {
    (1, 1): ["table_wise", "column_wise", "data_parallel"],
    (2, 1): ["table_wise", "row_wise", "column_wise", "unequal columns", "data_parallel"],
    (4, 2): ["row_wise", "table_row_wise", "table_column_wise", "grid_shard", "four columns"],
}


def build(
    optimizer: Any, kind: str, weights: Mapping[str, Tensor] | None = None, **options: Any
) -> Any:
    torch.manual_seed(0)
    collection = make_collection(TABLES)
    apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": LR, **options})
    own = {t.name: collection.embedding_bags[t.name].weight.detach().clone() for t in TABLES}
    plan = make_plan(kind, TABLES, dist.get_world_size())
    return shard(collection, plan, EmbeddingBagCollectionSharder(), weights or own)


def train(model: Any, steps: int, seed: int = 0) -> list[float]:
    """The losses of the steps, each over the ranks' own batches."""
    rng, ranks, rank = random.Random(seed), dist.get_world_size(), dist.get_rank()
    losses = []
    for _ in range(steps):
        batch = to_kjt(
            make_batch(rng, TABLES, 8), slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        )
        loss = sample_loss(model(batch).to_dict()).mean()
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses


def momenta(model: Any) -> dict[str, Tensor]:
    """Row-wise Adagrad's sums [column shards, rows] of whole tables, on every rank."""
    found = {}
    for spec in TABLES:
        key = f"embedding_bags.{spec.name}.weight"
        state = model.fused_optimizer.state_dict()["state"].get(key)
        size = torch.tensor(0)
        if state is not None:
            size += state[f"{spec.name}.momentum1"].metadata().size[0]
        dist.all_reduce(size, dist.ReduceOp.MAX)
        whole = torch.zeros(int(size))
        for part in state[f"{spec.name}.momentum1"].local_shards() if state else []:
            first = part.metadata.shard_offsets[0]
            whole[first : first + len(part.tensor)] = part.tensor
        dist.all_reduce(whole)
        found[spec.name] = whole.view(-1, spec.rows)
    return found


def random_sums(decades: float = 3.5) -> dict[str, Tensor]:
    """Over some decades, as those of skewed tables; a row of each was never seen."""
    generator = torch.Generator().manual_seed(1)
    sums = {t.name: 10 ** (-decades * torch.rand(t.rows, generator=generator)) for t in TABLES}
    for sums_R in sums.values():
        sums_R[3] = 0
    return sums


def totals(model: Any) -> dict[str, tuple[float, float, float]]:
    ((_, handle),) = frequency_modules(model)
    return {t.name: tuple(handle.read(t.name).totals[1:].tolist()) for t in TABLES}


def check_rates(kinds: list[str]) -> None:
    for kind in kinds:
        check_rates_of(build(FrequencySGD, kind))


def check_rates_of(model: Any) -> None:
    sums = random_sums()
    load_adagrad_sums(model, sums)
    found = adagrad_sums(model)
    assert list(found) == list(sums)
    for name, counts_R in torchrec_freq.row_counts(model).items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], sums[name], rtol=1e-5, atol=0)
        assert counts_R.max() == COUNT_CEILING // 2
        squares, count, occurrences = totals(model)[name]
        assert count == counts_R.sum()
        # What is seen once must not look like an outlier: each row is known to have occurred.
        assert occurrences == len(counts_R) - 1
        assert squares == pytest.approx(2 * float(sums[name].double().sum()), rel=1e-6)
    # As many as there were: whole numbers, so a row of few occurrences is rounded.
    lookups = {"a": 5000.0, "b": 120, "c": 1e15}
    load_adagrad_sums(model, sums, lookups)
    found = adagrad_sums(model)
    for name, counts_R in torchrec_freq.row_counts(model).items():
        squares, count, occurrences = totals(model)[name]
        assert occurrences == lookups[name]
        unit = squares / (2 * count)
        torch.testing.assert_close(found[name], sums[name], rtol=1e-6, atol=unit * 0.5)
        if name != "c":
            assert count == pytest.approx(lookups[name], abs=len(counts_R))
    # The counters have an end, whatever the lookups.
    assert torchrec_freq.row_counts(model)["c"].max() == COUNT_CEILING // 2
    # A table that is left out stays as it was; one that has learned nothing begins anew.
    before = torchrec_freq.row_counts(model)
    load_adagrad_sums(model, {"b": torch.zeros(7, dtype=torch.float64)})
    after = torchrec_freq.row_counts(model)
    assert torch.equal(after["a"], before["a"]) and not after["b"].any()
    assert totals(model)["b"] == (0, 0, 0)
    train(model, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_keeps_its_rate(layout: tuple[int, int]) -> None:
    ranks, hosts = layout
    run_on_ranks(ranks, check_rates, {"kinds": LAYOUTS[layout]}, hosts=hosts)


def table_sums(model: Any) -> dict[str, Tensor]:
    """The mean over column shards, by their numbers of columns."""
    columns = {name: torch.tensor(model.column_shards.get(name, [1.0])) for name in "abc"}
    return {
        name: (sums * (columns[name] / columns[name].sum()).unsqueeze(1)).sum(dim=0)
        for name, sums in momenta(model).items()
    }


def check_continued(kind: str) -> None:
    """Twenty steps of a model that row-wise Adagrad has trained, and twenty after the way back."""
    old = "table_wise" if kind == "data_parallel" else kind  # TorchRec trains no such table
    adagrad = build(RowWiseAdagrad, old)
    # Column shards had rates of their own, here far from each other, and now have one.
    scale = 2 if kind == "column_wise" else 1
    train(adagrad, 2000 * scale)
    weights, sums = full_weights(adagrad), table_sums(adagrad)
    wanted, later = train(adagrad, 20, seed=1), train(adagrad, 20, seed=2)
    for lookups in (None, {"a": 32e3 * scale, "b": 64e3 * scale, "c": 32e3 * scale}):
        frequency = build(FrequencySGD, kind, weights)
        load_adagrad_sums(frequency, sums, lookups)
        torch.testing.assert_close(train(frequency, 20, seed=1), wanted, rtol=0, atol=1e-4)
        back = build(RowWiseAdagrad, old, full_weights(frequency))
        torchrec_freq.load_momentum(back, adagrad_sums(frequency))
        torch.testing.assert_close(train(back, 20, seed=2), later, rtol=0, atol=1e-4)
    # It is the sums that do it.
    zero = train(build(FrequencySGD, kind, weights), 20, seed=1)
    assert max(abs(a - b) for a, b in zip(zero, wanted, strict=True)) > 1e-2


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("table_wise", 1),
        ("row_wise", 2),
        pytest.param("column_wise", 2, marks=pytest.mark.slow),
        pytest.param("data_parallel", 2, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_and_back(kind: str, ranks: int) -> None:
    run_on_ranks(ranks, check_continued, {"kind": kind})


def check_there_and_back(kinds: list[str]) -> None:
    sums = random_sums()
    for kind in kinds:
        adagrad = build(RowWiseAdagrad, kind)
        torchrec_freq.load_momentum(adagrad, sums)
        for name, found in momenta(adagrad).items():
            torch.testing.assert_close(found, sums[name].expand_as(found), rtol=0, atol=0)
        frequency = build(FrequencySGD, kind)
        load_adagrad_sums(frequency, table_sums(adagrad))
        torchrec_freq.load_momentum(adagrad, adagrad_sums(frequency))
        for name, found in momenta(adagrad).items():
            torch.testing.assert_close(found, sums[name].expand_as(found), rtol=1e-5, atol=0)
        train(adagrad, 2)


def fused(kinds: list[str]) -> list[str]:
    """Plans under which TorchRec trains with row-wise Adagrad."""
    return [kind for kind in kinds if kind != "data_parallel"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout: tuple[int, int]) -> None:
    ranks, hosts = layout
    run_on_ranks(ranks, check_there_and_back, {"kinds": fused(LAYOUTS[layout])}, hosts=hosts)


@on_ranks(1)
def test_large_counts_do_not_hold_the_squares_back() -> None:
    """What an occurrence adds is limited by the past's, which large counts must not divide."""
    adagrad = build(RowWiseAdagrad, "table_wise")
    train(adagrad, 20)
    sums, weights = table_sums(adagrad), full_weights(adagrad)
    added = []
    for known in ("lookups", "sums", "counts"):
        model = build(FrequencySGD, "table_wise", weights)
        if known == "counts":
            found = {name: counts_of_sums(sums_R, None) for name, sums_R in sums.items()}
            counts = {name: counts_R for name, (counts_R, _) in found.items()}
            squares = {name: value for name, (_, value) in found.items()}
            torchrec_freq.load_row_counts(model, counts, squares)
        else:
            lookups = {"a": 320, "b": 640, "c": 320} if known == "lookups" else None
            load_adagrad_sums(model, sums, lookups)
        before = totals(model)
        train(model, 10, seed=1)
        added.append({name: totals(model)[name][0] - before[name][0] for name in sums})
    for others in added[1:]:
        for name, squares_added in others.items():
            assert squares_added == pytest.approx(added[0][name], rel=0.2)


@on_ranks(2)
def test_states_that_are_dtensors() -> None:
    collection, sums = make_collection(TABLES), random_sums()
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": LR})
    plan = make_plan("column_wise", TABLES, 2)
    model = shard(collection, plan, EmbeddingBagCollectionSharder(), {}, dtensor=True)
    torchrec_freq.load_momentum(model, sums)
    for name, sums_R in sums.items():
        state = model.fused_optimizer.state_dict()["state"][f"embedding_bags.{name}.weight"]
        (part_R,) = state[f"{name}.momentum1"].to_local().local_shards()
        assert torch.equal(part_R, sums_R)


WRONG: dict[str, tuple[dict[str, Tensor], dict[str, float] | None, str]] = {
    "unknown table": ({"z": torch.zeros(3)}, None, "'z'.*a, b, c"),
    "too short": ({"a": torch.ones(3)}, None, r"'a' has 12 rows.*\[3\]"),
    "column shards": ({"a": torch.ones(24)}, None, r"'a' has 12 rows.*\[24\]"),
    "two dimensions": ({"a": torch.ones(12, 16)}, None, r"'a'.*\[12, 16\]"),
    "negative": ({"a": torch.arange(12.0) - 3}, None, "'a'.*-3.0 in row 0"),
    "NaN": ({"a": torch.tensor([1.0] * 7 + [torch.nan] * 5)}, None, "'a'.*nan in row 7"),
    "infinite": ({"a": torch.full((12,), torch.inf)}, None, "'a'.*inf in row 0"),
    "bool": ({"a": torch.ones(12, dtype=torch.bool)}, None, "'a'.*bool"),
    "lookups of no table": ({}, {"z": 1}, "'z'"),
    "lookups without sums": ({}, {"a": 1}, "'a' has lookups but no sums"),
    "no lookups": ({}, {"b": 0}, "'b'.*0"),
    "infinite lookups": ({}, {"b": torch.inf}, "'b'.*inf"),
}


@on_ranks(2)
def test_wrong_sums_change_nothing() -> None:
    frequency, adagrad = build(FrequencySGD, "mixed"), build(RowWiseAdagrad, "row_wise")
    good = random_sums()
    load_adagrad_sums(frequency, good)
    torchrec_freq.load_momentum(adagrad, good)
    before = torchrec_freq.row_counts(frequency), totals(frequency), momenta(adagrad)
    for case, (wrong, lookups, message) in WRONG.items():
        with pytest.raises(ValueError, match=message):
            load_adagrad_sums(frequency, {"b": torch.ones(7), **wrong}, lookups)
        if wrong:
            with pytest.raises(ValueError, match=message):
                torchrec_freq.load_momentum(adagrad, {"b": torch.ones(7), **wrong})
        after = torchrec_freq.row_counts(frequency), totals(frequency), momenta(adagrad)
        torch.testing.assert_close(after, before, rtol=0, atol=0, msg=case)


@on_ranks(1)
def test_other_models_are_refused() -> None:
    good = random_sums()
    paper = build(FrequencySGD, "table_wise", normalize=None)
    with pytest.raises(ValueError, match="'a' trains with normalize=None"):
        load_adagrad_sums(paper, good)
    with pytest.raises(ValueError, match="'a' trains with normalize=None"):
        adagrad_sums(paper)
    others = [build(o, "table_wise") for o in (FrequencySGD, torch.optim.SGD, torch.optim.Adagrad)]
    for model in (*others, build(RowWiseAdagrad, "data_parallel")):
        with pytest.raises(ValueError, match="'a' does not train with row-wise Adagrad"):
            torchrec_freq.load_momentum(model, good)
    with pytest.raises(ValueError, match="No table of this model trains with FrequencySGD"):
        load_adagrad_sums(build(RowWiseAdagrad, "table_wise"), good)
    with pytest.raises(ValueError, match="Linear has no fused_optimizer"):
        torchrec_freq.load_momentum(torch.nn.Linear(2, 2), good)


def save_checkpoints(kinds: list[str], folder: Path) -> None:
    for kind in kinds:
        model = build(RowWiseAdagrad, kind)
        train(model, 5)
        dcp.save(state_of(model), checkpoint_id=folder / kind)
        found = table_sums(model)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{kind}.sums")


def convert(checkpoint: Path, output: Path, *options: str) -> int:
    return command_line.main(["from-adagrad", str(checkpoint), "-o", str(output), *options])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_reads_every_plan(layout: tuple[int, int], tmp_path: Path) -> None:
    ranks, hosts = layout
    kinds = fused(LAYOUTS[layout])
    run_on_ranks(ranks, save_checkpoints, {"kinds": kinds, "folder": tmp_path}, hosts=hosts)
    for kind in kinds:
        output = tmp_path / "counts.safetensors"
        assert convert(tmp_path / kind, output) == 0
        file = torchrec_freq.load_counts(output)
        wanted = torch.load(tmp_path / f"{kind}.sums")
        assert file.counts.keys() == file.squares.keys() == wanted.keys()
        for name, counts_R in file.counts.items():
            sums = counts_R * file.squares[name] / (2 * counts_R.sum())
            torch.testing.assert_close(sums.float(), wanted[name], rtol=1e-5, atol=1e-9)
    # A file loads what the function would.
    run_on_ranks(2, load_file, {"folder": tmp_path, "kind": kinds[-1]})


def load_file(folder: Path, kind: str) -> None:
    loaded, given = build(FrequencySGD, "mixed"), build(FrequencySGD, "mixed")
    torchrec_freq.load_row_counts(loaded, *torchrec_freq.load_counts(folder / "counts.safetensors"))
    load_adagrad_sums(given, torch.load(folder / f"{kind}.sums"))
    assert {n: t[1:] for n, t in totals(loaded).items()} == {
        n: t[1:] for n, t in totals(given).items()
    }
    torch.testing.assert_close(adagrad_sums(loaded), adagrad_sums(given), rtol=1e-6, atol=1e-9)


def check_scale(folder: Path) -> None:
    model = build(FrequencySGD, "table_wise")
    torchrec_freq.load_row_counts(model, *torchrec_freq.load_counts(folder / "counts.safetensors"))
    numbers = torchrec_freq.TrainingMonitor(model, write=print).read()
    reports = json.loads((folder / "report.json").read_text())
    assert {table["name"] for table in reports} == set("abc")
    for table in reports:
        assert table["scale"] == pytest.approx(numbers[f"{table['name']}/scale"], rel=1e-9)


def test_a_report_has_the_scale_of_the_model_that_loads_the_file(tmp_path: Path) -> None:
    run_on_ranks(1, save_checkpoints, {"kinds": ["table_wise"], "folder": tmp_path})
    output, figures = tmp_path / "counts.safetensors", tmp_path / "report.json"
    assert convert(tmp_path / "table_wise", output) == 0
    assert command_line.main(["report", str(output), "--json", str(figures)]) == 0
    run_on_ranks(1, check_scale, {"folder": tmp_path})


def save(folder: Path, **state: Any) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def key(kind: str, table: str = "a", path: str = "ebc") -> str:
    weight = f"{path}.embedding_bags.{table}.weight"
    return f"model.{weight}" if kind == "weight" else f"optimizer.state.{weight}.{table}.{kind}"


UNSUITABLE: dict[str, tuple[dict[str, Any], str]] = {
    "no sums": ({key("weight"): torch.zeros(3, 4)}, "without row-wise Adagrad's sums.*momentum1"),
    "no weights": ({key("momentum1"): torch.ones(3)}, "sums of table 'a' but not its weights"),
    "other weights": (
        {key("weight"): torch.zeros(4, 4), key("momentum1"): torch.ones(3)},
        "has 3 sums, but table 'a' has 4 rows in 1 column shards",
    ),
    "Adagrad": (
        {key("weight"): torch.zeros(3, 4), key("momentum1"): torch.ones(3, 4)},
        r"table 'a' is not a row-wise Adagrad's.*\[3, 4\]",
    ),
    "whole numbers": (
        {key("weight"): torch.zeros(3, 4), key("momentum1"): torch.ones(3, dtype=torch.int32)},
        "table 'a' is not a row-wise Adagrad's",
    ),
    "negative": (
        {key("weight"): torch.zeros(3, 4), key("momentum1"): torch.tensor([1.0, -2, 3])},
        "'a': sums must be finite.* -2.0 in row 1",
    ),
    "NaN": (
        {key("weight"): torch.zeros(3, 4), key("momentum1"): torch.tensor([1.0, 2, torch.nan])},
        "'a': sums must be finite.* nan in row 2",
    ),
}


def test_rows_of_too_little_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sums = torch.tensor([96.0, 3.0, 0.6, 0.4, 0.0])  # of 100 lookups: a count each, rounded
    state = {key("weight"): torch.zeros(5, 4), key("momentum1"): sums}
    folder, output = save(tmp_path / "old", **state), tmp_path / "counts.safetensors"
    assert convert(folder, output, "--lookups", "100") == 0
    assert torchrec_freq.load_counts(output).counts["a"].tolist() == [96, 3, 1, 0, 0]
    assert "\n1 rows had too little for a count of 1" in capsys.readouterr().out
    assert convert(folder, output) == 0  # nothing is lost beside the largest counts there are
    assert "too little" not in capsys.readouterr().out


@pytest.mark.parametrize("case", UNSUITABLE)
def test_unsuitable_checkpoints_are_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, message = UNSUITABLE[case]
    good = {key("weight", "0"): torch.zeros(2, 4), key("momentum1", "0"): torch.ones(2)}
    folder = save(tmp_path / "old", **(state if case == "no sums" else {**good, **state}))
    output = tmp_path / "counts.safetensors"
    output.write_text("as it was")
    assert convert(folder, output) == 2
    printed = capsys.readouterr().err
    assert re.search(f"error: {re.escape(str(folder))}.*{message}", printed), printed
    assert output.read_text() == "as it was"


def test_wrong_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = {key("weight", t): torch.zeros(2, 4) for t in "ab"}
    folder = save(tmp_path / "old", **two, **{key("momentum1", t): torch.ones(2) for t in "ab"})
    out = tmp_path / "out"
    for checkpoint, output, lookups, message in [
        (tmp_path, out, "1", "is not a whole checkpoint.*old"),
        (folder, tmp_path / "no" / "out", "1", "No such folder"),
        (folder, out, "1,2,3", r"--lookups: 3 for 2 tables \(a, b\)"),
    ]:
        assert convert(checkpoint, output, "--lookups", lookups) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not output.exists()
    assert convert(folder, out, "--lookups", "10,20") == 0
    file = torchrec_freq.load_counts(out)
    assert {name: counts.tolist() for name, counts in file.counts.items()} == {
        "a": [5, 5],
        "b": [10, 10],
    }
    assert file.squares == {"a": 4, "b": 4}
    assert "no sums" not in capsys.readouterr().out
    folder = save(tmp_path / "more", **two, **{key("momentum1", "a"): torch.ones(2)})
    assert convert(folder, out) == 0
    assert "has no sums of them: b" in capsys.readouterr().out
    assert list(torchrec_freq.load_counts(out).counts) == ["a"]


def test_tables_of_one_name_in_two_modules(tmp_path: Path) -> None:
    state = {}
    for path, rows in (("users", 2), ("items", 3)):
        state[key("weight", path=path)] = torch.zeros(rows, 4)
        state[key("momentum1", path=path)] = torch.ones(rows)
    assert convert(save(tmp_path / "old", **state), tmp_path / "out") == 0
    counts = torchrec_freq.load_counts(tmp_path / "out").counts
    assert {name: len(counts_R) for name, counts_R in counts.items()} == {
        "users.a": 2,
        "items.a": 3,
    }


MEASURED = """
import resource, sys
from torchrec_freq.__main__ import main
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
assert main(sys.argv[1:]) == 0
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_memory_does_not_follow_the_checkpoint(tmp_path: Path) -> None:
    """Three tables of 1,000,000 rows and 32 columns, the sums in shards of 125,000 rows."""
    rows, part_R = 1_000_000, torch.ones(125_000)
    state: dict[str, Any] = {}
    for table in "abc":
        state[key("weight", table)] = torch.zeros(rows, 32)
        shards = [RowShard(first, True, part_R) for first in range(0, rows, len(part_R))]
        state[key("momentum1", table)] = RowState(rows, shards)
    folder = save(tmp_path / "old", **state)
    limit = 3 * 4 * rows + 4 * rows + (24 << 20)  # counts of all, sums of one, and blocks
    assert sum(path.stat().st_size for path in folder.iterdir()) > 9 * limit
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "from-adagrad", folder, "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < limit
