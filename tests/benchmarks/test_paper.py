"""What is known without a GPU or many ranks: groups simulated in one process, clusters on paper."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from benchmarks import groups, launches, scale
from benchmarks.study.config import FREQUENCY, ROWWISE, Run
from benchmarks.study.data import load
from benchmarks.study.train import build, train
from torchrec_freq.planner.search import HBM_KERNELS, Search, plan
from torchrec_freq.planner.spec import read_spec
from torchrec_freq.sharded.install import frequency_modules


@on_ranks(1)
def test_one_group_is_the_study(ratings: Path) -> None:
    for arm in (FREQUENCY, ROWWISE):
        run = Run("ml-100k", "FM", arm, 0.1, 32, 1, 0)
        wanted = train(run, ratings)["measures"]["epoch 1"]
        found = groups.auc(load(run.data, ratings), run, 1)
        assert found["test"] == pytest.approx(wanted["auc"], abs=1e-6)
        assert found["valid"] == pytest.approx(wanted["by"], abs=1e-6)
        assert groups.auc(load(run.data, ratings), run, 2) != found


@on_ranks(1)
def test_groups_are_averaged(ratings: Path) -> None:
    for arm in (FREQUENCY, ROWWISE):
        run = Run("ml-100k", "FM", arm, 0.1, 32, 1, 0)
        data = load(run.data, ratings)
        models = []
        for seed in (0, 1):
            training = build(run, data)
            for batch in data.train(32, seed):
                training.step(batch)
            models.append(training.model)
        tables = [
            torch.stack(t).mean(0) for t in zip(*map(groups.local_tables, models), strict=True)
        ]
        sums = [torch.stack(t).mean(0) for t in zip(*map(groups.momenta, models), strict=True)]
        assert bool(sums) == (arm == ROWWISE)
        counts = [
            [tables.read(name).counts for name in tables.tables]
            for model in models
            for _, tables in frequency_modules(model)
        ]
        both = [a + b for a, b in zip(*counts, strict=True)] if counts else []
        groups.sync(models)
        for group, model in enumerate(models):
            for found, wanted in zip(groups.local_tables(model), tables, strict=True):
                assert torch.equal(found, wanted)
            for found, wanted in zip(groups.momenta(model), sums, strict=True):
                assert torch.equal(found, wanted)
            for _, handle in frequency_modules(model):
                for name, sum_R in zip(handle.tables, both, strict=True):
                    rounded = sum_R.double() / 2 + (0.5 if group == 0 else 0)
                    assert torch.equal(handle.read(name).counts, rounded.floor().long())


def test_clusters_on_paper(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_spec(Path("dlrm-dcnv2"), ranks=16)
    search = Search(spec, "FrequencySGD", None, 30)
    assert search.run(spec.constraints(HBM_KERNELS))
    a_lookup, a_bag = launches.bytes_each()
    # All ranks together: each lookup once for each shard of its columns, each bag once a shard.
    moved = 0.0
    for option in search.options:
        pooling = sum(option.input_lengths)
        shards = len(option.shards)
        columns = option.tensor.shape[1]
        if option.sharding_type == "data_parallel":
            continue
        if option.sharding_type in ("row_wise", "table_row_wise"):
            lookups, bags = spec.batch_size * 16, spec.batch_size * 16 * shards
        else:  # table- or column-wise
            columns //= shards
            lookups = bags = spec.batch_size * 16 * shards
        moved += lookups * pooling * a_lookup + bags * (a_bag + 4 * (columns - launches.DIM))
    assert sum(scale.added_bytes(search.options, spec)) == pytest.approx(moved)

    monkeypatch.setattr(sys, "argv", ["scale", "--ranks", "8", "--global-batch", "65536"])
    scale.main()
    *_, line = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    small = read_spec(Path("dlrm-dcnv2"), ranks=8)
    results = [plan(small, optimizer) for optimizer in ("FrequencySGD", "RowWiseAdagrad")]
    assert cells[:3] == ["8", *(f"{result.hbm_gb:.2f}" for result in results)]
    assert cells[3] == f"{results[0].step_ms:.1f}" and cells[6] == str(26 * 4 * 8)
