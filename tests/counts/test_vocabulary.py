"""Other vocabularies: rows taken, tables resized and merged, rows to keep by brute force."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from torchrec_freq import TableState
from torchrec_freq.vocabulary import keep_budget, keep_counted, keep_rows, rows_of


def state(rows: int, shards: int = 1, seed: int = 0) -> TableState:
    torch.manual_seed(seed)
    totals = torch.tensor([3.0, 7, 11 + seed, 5 + seed], dtype=torch.float64)
    counts = torch.randint(0, 9, (rows,), dtype=torch.int32)
    widths = tuple(range(1, shards + 1)) if shards > 1 else ()
    return TableState(counts, torch.rand(rows, shards), totals, 3 + seed, widths)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_row_keeps_what_it_has_learned(shards: int) -> None:
    rng = random.Random(0)
    for rows in (1, 5, 30):
        old = state(rows, shards)
        taken = [rng.choice([-1, row]) for row in rng.sample(range(rows), rows)] + [-1] * 3
        new = old.take(torch.tensor(taken))
        for place, row in enumerate(taken):
            expected = ([0.0] * shards, 0) if row < 0 else (old.sums[row].tolist(), old.counts[row])
            assert (new.sums[place].tolist(), new.counts[place]) == expected
        # What an occurrence is worth does not depend on who is kept.
        assert torch.equal(new.totals, old.totals)
        assert (new.age, new.widths, new.counts.dtype) == (old.age, old.widths, torch.int32)


def test_tables_grow_and_shrink() -> None:
    old = state(5)
    assert old.resize(8).counts.tolist() == [*old.counts.tolist(), 0, 0, 0]
    assert old.resize(2).sums.tolist() == old.sums[:2].tolist()
    with pytest.raises(ValueError, match="at least 1 row; got 0"):
        old.resize(0)


def test_tables_are_merged() -> None:
    one, two = state(3, 2), state(4, 2, seed=1)
    both = TableState.merge([one, two])
    assert both.counts.tolist() == [*one.counts.tolist(), *two.counts.tolist()]
    assert both.sums.tolist() == [*one.sums.tolist(), *two.sums.tolist()]
    # The squares and occurrences add up, in the same steps.
    assert both.totals.tolist() == [3, 14, 23, 6]
    assert (both.age, both.widths) == (4, (1, 2))
    # Tables that are split in other ways: the mean over the columns.
    both = TableState.merge([one, state(4)])
    assert both.widths == () and both.sums.shape == (7, 1)
    expected = (one.sums[:, 0] + 2 * one.sums[:, 1]) / 3
    torch.testing.assert_close(both.sums[:3, 0], expected)
    with pytest.raises(ValueError, match="No table"):
        TableState.merge([])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 9], r"rows\[1\] is 9, out of range: must be 0 to 4"),
        ([-2], r"rows\[0\] is -2"),
        ([3, -1, 0, 3], r"rows\[0\] and rows\[3\] are both 3"),
        ([0.0], "whole numbers.*float32"),
        ([[0]], r"\[1, 1\]"),
        ([True], "bool"),
    ],
)
def test_wrong_rows_are_refused(rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        state(5).take(torch.tensor(rows))
    with pytest.raises(ValueError, match=message):
        rows_of(torch.tensor(rows), 5)


def test_mappings_go_both_ways() -> None:
    mapping = torch.tensor([2, -1, 0, 1])
    assert rows_of(mapping).tolist() == [2, 3, 0]
    assert rows_of(mapping, 5).tolist() == [2, 3, 0, -1, -1]
    with pytest.raises(ValueError, match=r"rows\[0\] is 2, out of range: must be 0 to 1"):
        rows_of(mapping, 2)
    kept = keep_rows({"a": torch.tensor([5, 0, 2, 9])}, {"a": 3})["a"]
    assert torch.equal(rows_of(kept.mapping()), kept.rows)


def test_rows_with_the_largest_counts_are_kept() -> None:
    rng = random.Random(1)
    for _ in range(200):
        counts = [rng.choice([0, 1, 1, 2, 50]) for _ in range(rng.randint(1, 12))]
        number, least = rng.randint(1, len(counts)), rng.randint(0, max(counts))
        given = {"a": torch.tensor(counts)}
        kept = keep_rows(given, {"a": number})["a"]
        best = sorted(range(len(counts)), key=lambda row: (-counts[row], row))[:number]
        assert kept.rows.tolist() == sorted(best)
        total = sum(counts)
        assert kept.coverage == (sum(counts[r] for r in best) / total if total else 1)
        counted = keep_counted(given, {"a": least})["a"]
        assert counted.rows.tolist() == [r for r, count in enumerate(counts) if count >= least]


def greedy(
    counts: dict[str, list[int]], row_bytes: dict[str, int], budget: int, admit: int
) -> dict[str, list[int]]:
    """Row by row: each table's best, then the best of all until one does not fit."""
    order = [
        (count < admit, -count / row_bytes[table], number, row)
        for number, (table, values) in enumerate(counts.items())
        for row, count in enumerate(values)
    ]
    names = list(counts)
    kept: dict[str, list[int]] = {table: [] for table in counts}
    for first in range(len(names)):
        best = min(entry for entry in order if entry[2] == first)
        order.remove(best)
        kept[names[first]].append(best[3])
    left = budget - sum(row_bytes.values())
    for *_, number, row in sorted(order):
        left -= row_bytes[names[number]]
        if left < 0:
            break
        kept[names[number]].append(row)
    return {table: sorted(rows) for table, rows in kept.items()}


def test_a_budget_by_brute_force() -> None:
    rng = random.Random(2)
    for number in range(300):
        sizes = (8, 8, 8) if number % 2 else (rng.randint(1, 20), 12, 7)
        row_bytes = dict(zip("abc", sizes, strict=True))
        counts = {t: [rng.randint(0, 6) for _ in range(rng.randint(1, 5))] for t in row_bytes}
        budget, admit = rng.randint(sum(sizes), 130), rng.choice([1, 3])
        given = {table: torch.tensor(values) for table, values in counts.items()}
        kept = keep_budget(given, row_bytes, budget, admit)
        found = {table: selection.rows.tolist() for table, selection in kept.items()}
        assert found == greedy(counts, row_bytes, budget, admit)
        assert sum(len(rows) * row_bytes[table] for table, rows in found.items()) <= budget
        if number % 2 and number < 60 and admit == 1:  # no choice of rows has more lookups
            rows = [(t, r) for t, values in counts.items() for r in range(len(values))]
            fits = min(budget // 8, len(rows))
            most = max(
                sum(counts[t][r] for t, r in choice)
                for choice in itertools.combinations(rows, fits)
                if {t for t, _ in choice} == set(counts)
            )
            assert sum(counts[t][r] for t, kept_rows in found.items() for r in kept_rows) == most


def test_what_cannot_be_kept_is_refused() -> None:
    counts = {"a": torch.tensor([3, 0, 1])}
    for wrong, message in (
        (lambda: keep_rows(counts, {"a": 4}), "'a': cannot keep 4 rows of 3"),
        (lambda: keep_rows(counts, {"a": 0}), "'a': cannot keep 0"),
        (lambda: keep_rows(counts, {"b": 1}), "No counts of table 'b'; there are those of a"),
        (lambda: keep_rows({"a": torch.tensor([-1])}, {"a": 1}), "'a': counts must lie in"),
        (lambda: keep_counted(counts, {"a": 4}), "'a': no row has a count of 4; the largest is 3"),
        (lambda: keep_budget(counts, {"a": 8}, 7), "7 bytes has no room .*'a': 8"),
        (lambda: keep_budget(counts, {"b": 8}, 80), r"Counts are of \['a'\], .*\['b'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
