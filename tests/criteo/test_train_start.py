"""Training that starts from another run's checkpoint: what is taken over, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import full_weights
from ranks import on_ranks
from torch import Tensor
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES
from training import BATCH, GIVEN, ROWS, STEPS, arguments, built, run, write

from examples.criteo.settings import parse
from examples.criteo.start import start
from torchrec_freq import adagrad_sums, row_counts, save_counts
from torchrec_freq.__main__ import main as command_line
from torchrec_freq.counts.stored_sums import open_sums

ADAGRAD = ("--optimizer.name", "RowWiseAdagrad")


def last(out: Path, step: int = STEPS) -> Path:
    return out / "checkpoints" / f"step-{step:08}"


def started(folder: Path, out: Path, *more: str) -> Any:
    """What a run trains, after its start."""
    settings = parse(arguments(folder, out, *more))
    training = built(folder, out, *more)
    start(settings, training)
    return training


def tables(training: Any) -> dict[str, Tensor]:
    return full_weights(training.model, only="embedding_bags")


def dense(training: Any) -> list[Tensor]:
    """Weights of the dense layers, and Adam's state of them."""
    parameters = dict(training.dense_optimizer.params)
    state = [training.dense_optimizer.state[p] for p in parameters.values()]
    return [*parameters.values(), *(value for s in state for value in s.values())]


def stored(path: Path) -> dict[str, Tensor]:
    return {table.name: table.read() for table in open_sums(path)}


@on_ranks(2)
def test_there_and_back(tmp_path: Path) -> None:
    if dist.get_rank() == 0:
        write(tmp_path / "data")
    dist.barrier()
    data, old, new = tmp_path / "data", tmp_path / "old", tmp_path / "new"
    run(data, old, *ADAGRAD, "--planner.sharding", "[column_wise,row_wise]")
    sums = stored(last(old))

    # With its weights, the dense layers' Adam, and its rates.
    took = ("--init_from", str(last(old)))
    training = started(data, new, *took)
    found = adagrad_sums(training.model)
    assert list(found) == DEFAULT_CAT_NAMES
    for name, counts in row_counts(training.model).items():
        unit = float(sums[name].double().sum()) / (STEPS * BATCH)  # an id a sample
        assert counts.sum() == pytest.approx(STEPS * BATCH, abs=len(counts))
        torch.testing.assert_close(found[name], sums[name], rtol=1e-5, atol=unit * 0.5001)
    same = built(data, new, *ADAGRAD)
    start(parse(arguments(data, new, *ADAGRAD, *took)), same)
    for name, weight in tables(training).items():
        assert torch.equal(weight, tables(same)[name])
    for ours, theirs in zip(dense(training), dense(same), strict=True):
        assert torch.equal(ours, theirs) and ours.count_nonzero()

    # From a file, or from zero.
    if dist.get_rank() == 0:
        command = ["from-adagrad", str(last(old)), "-o", str(tmp_path / "counts")]
        assert command_line([*command, "--lookups", str(STEPS * BATCH)]) == 0
    dist.barrier()
    from_file = started(data, new, *took, "--init_counts", str(tmp_path / "counts"))
    by_file, by_sums = row_counts(from_file.model), row_counts(training.model)
    assert all(torch.equal(by_file[name], by_sums[name]) for name in by_sums)
    torch.testing.assert_close(adagrad_sums(from_file.model), found)
    zero = started(data, new, *took, "--init_counts", "zero")
    assert not any(counts.any() for counts in row_counts(zero.model).values())
    assert all(torch.equal(tables(zero)[name], w) for name, w in tables(training).items())
    counted = started(data, new, "--init_counts", str(tmp_path / "counts"))  # new weights
    assert torch.equal(row_counts(counted.model)["cat_3"], by_sums["cat_3"])
    assert not torch.equal(tables(counted)["cat_3"], tables(training)["cat_3"])

    # The run has checkpoints of its own from then on, and Adagrad can go on from them.
    assert run(data, new, *took, "--max_steps", "6")["steps"] == 6
    assert run(data, new, *took)["steps"] == STEPS
    back = started(data, tmp_path / "back", *ADAGRAD, "--init_from", str(last(new)))
    assert run(data, tmp_path / "back", *ADAGRAD, "--init_from", str(last(new)), "--max_steps", "1")
    taken = started(data, tmp_path / "again", "--init_from", str(last(new)))
    for name, sums_R in adagrad_sums(taken.model).items():
        states = back.model.fused_optimizer.state_dict()["state"].items()
        for shard in [
            shard
            for key, state in states
            if key.endswith(f".{name}.weight")
            for shard in state[f"{name}.momentum1"].local_shards()
        ]:
            first = shard.metadata.shard_offsets[0] % len(sums_R)
            wanted = sums_R[first : first + len(shard.tensor)]
            torch.testing.assert_close(shard.tensor, wanted, rtol=1e-5, atol=0)


@on_ranks(1)
def test_other_models_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    run(data, tmp_path / "old", *ADAGRAD, "--max_steps", "2")
    run(data, tmp_path / "sgd", "--optimizer.name", "SGD", "--max_steps", "2")
    old, sgd = last(tmp_path / "old", 2), last(tmp_path / "sgd", 2)
    save_counts(tmp_path / "counts", {"cat_0": torch.ones(3)})
    for more, message in [
        (("--init_from", str(old), "--model.dim", "16"), r"not of this model.*\[8\].*\[16\]"),
        (("--init_from", str(sgd)), f"{sgd} is a checkpoint without row-wise Adagrad's sums"),
        (("--init_from", str(tmp_path)), "is not a whole checkpoint"),
        (("--init_counts", str(tmp_path / "counts")), "counts of other tables"),
        (("--init_counts", str(tmp_path / "none")), "none.*: no such file of counts"),
    ]:
        with pytest.raises(ValueError, match=message):
            started(data, tmp_path / "new", *more)
    settings = parse(arguments(data, tmp_path / "new", "--init_from", str(old)))
    training = built(data, tmp_path / "new")
    training.tables[-1].num_embeddings += 1
    before = tables(training)
    with pytest.raises(
        ValueError, match=rf"other tables.*: {ROWS[-1]}}}; here.*: {ROWS[-1] + 1}}}"
    ):
        start(settings, training)
    assert all(torch.equal(tables(training)[name], w) for name, w in before.items())
    started(data, tmp_path / "new", "--init_from", str(sgd), "--init_counts", "zero")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*ADAGRAD, "--init_counts", "c"], "init_counts=c.*RowWiseAdagrad"),
        (["--optimizer.name", "SGD", "--init_from", "x"], "init_counts=sums: SGD.*zero"),
    ],
)
def test_refused_settings(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([*GIVEN, *flags])
