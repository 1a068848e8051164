"""The table scale by hand, on one process; the plan tests compare it on several."""

from __future__ import annotations

import math

import torch

from torchrec_freq.scale import TableScales

TABLE = torch.tensor([0])


def step(scales: TableScales, lookups: tuple[float, int], outputs: tuple[float, int]) -> float:
    """Sums of squares and numbers of elements of one step; returns its ``1 / s_t``."""
    scales.add_outputs(TABLE, torch.tensor([outputs[0]]), torch.tensor([outputs[1]]))
    inverse = float(scales.inverse()[0])
    scales.add_lookups(TABLE, torch.tensor([lookups[0]]), torch.tensor([lookups[1]]))
    scales.end_step()
    return inverse


def test_scale_by_hand() -> None:
    scales = TableScales(1)
    assert scales.inverse().tolist() == [0.0], "no gradient yet"
    # What the lookups make of the output's gradient is not known yet: its mean square is 16 / 4.
    assert step(scales, (8.0, 8), (16.0, 4)) == 0.5
    # Lookups so far: 8 / 8; outputs before and with this step: 16 / 4, 72 / 8.
    assert math.isclose(step(scales, (1.0, 1), (56.0, 4)), (1.0 / 4 * 9) ** -0.5, rel_tol=1e-6)
    assert scales.totals.tolist() == [[9.0, 9.0, 72.0, 8.0]]


def test_scale_answers_an_outburst_at_once() -> None:
    scales = TableScales(1)
    for _ in range(3):
        step(scales, (4.0, 4), (4.0, 4))
    calm = step(scales, (4.0, 4), (4.0, 4))
    outburst = step(scales, (4e4, 4), (4e4, 4))
    assert math.isclose(calm / outburst, math.sqrt((4 + 1e4) / 5), rel_tol=1e-6)


def test_table_without_gradient_does_not_move() -> None:
    scales = TableScales(2)
    step(scales, (4.0, 4), (4.0, 4))
    assert scales.inverse().tolist() == [1.0, 0.0]


def test_lookups_without_gradient_are_waited_for() -> None:
    scales = TableScales(1)
    step(scales, (0.0, 8), (16.0, 4))  # as where all weights of the lookups are 0
    assert step(scales, (2.0, 8), (16.0, 4)) == 0.0
    assert math.isclose(step(scales, (2.0, 8), (16.0, 4)), (2 / 16 / 4 * 4) ** -0.5, rel_tol=1e-6)
