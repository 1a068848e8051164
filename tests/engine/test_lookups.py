"""The lookups of each feature, and sums over them."""

from __future__ import annotations

import pytest
import torch

from torchrec_freq.engine.lookups import Features

ROWS = [10, 5, 7]
LENGTHS: dict[str, list[list[int]]] = {
    "one feature": [[3, 0, 4]],
    "equal": [[2, 3], [4, 1], [0, 5], [5, 0]],
    "unequal": [[2, 3], [0, 0], [1, 0], [9, 4]],
    "empty": [[0, 0], [0, 0], [0, 0]],
    "no bags": [[], [], []],
    "variable": [[2], [3, 0, 1], [], [1, 1]],
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("case", LENGTHS)
def test_rows_and_sums_are_those_of_a_loop(case: str, dtype: torch.dtype) -> None:
    lengths = LENGTHS[case]
    tables = [0, 2, 2, 1][: len(lengths)]
    flat = torch.tensor(sum(lengths, []), dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), flat.cumsum(0)]).to(dtype)
    bags = torch.tensor([0, *map(len, lengths)]).cumsum(0) if case == "variable" else None
    ids = torch.arange(int(offsets[-1])) % 5
    each = [sum(of) for of in lengths]
    first_rows = [sum(ROWS[:table]) for table in tables]
    lookups = Features(ROWS, tables, None).look_up(ids.to(dtype), offsets, bags)
    wanted = [part + row for part, row in zip(ids.split(each), first_rows, strict=True)]
    assert lookups.rows_L.dtype == torch.int64
    assert lookups.rows_L.tolist() == torch.cat(wanted).tolist()
    assert lookups.lengths().tolist() == each
    values = torch.rand(len(ids)) * 1e6
    sums = lookups.sum(values)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [float(part.double().sum()) for part in values.split(each)]
    of_features = torch.arange(len(each)).float()
    spread = lookups.by_feature(torch.zeros(len(ids))) + lookups.spread(of_features)
    repeated = of_features.repeat_interleave(torch.tensor(each))
    assert spread.flatten().tolist() == repeated.tolist()


@pytest.mark.parametrize("lengths", [[1 << 24], [1 << 24, 3]])
def test_more_lookups_than_float32_can_count(lengths: list[int]) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.zeros(int(offsets[-1]), dtype=torch.int64)
    lookups = Features([1], [0] * len(lengths), None).look_up(ids, offsets)
    sums = lookups.sum(torch.full((len(ids),), 0.1)).tolist()
    assert sums == pytest.approx([0.1 * length for length in lengths], rel=1e-6)
