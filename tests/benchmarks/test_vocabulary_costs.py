"""The benchmark of vocabularies, on a few hundred ratings."""

from __future__ import annotations

from pathlib import Path

from programs import run


def test_a_day_is_retrained(ratings: Path) -> None:
    flags = ("--task", "ratings in time", "--data", ratings)
    lines = [line.split(" | ") for line in run("benchmarks.vocabulary", *flags).out.splitlines()]
    arms, losses = [line[:3] for line in lines[1:9]], [line[4] for line in lines[1:9]]
    assert arms[0] == ["| FrequencySGD", "all", "rates"]
    assert arms[7] == ["| row-wise Adagrad", "half", "nothing"]
    # Before the first step, only weights count; no table of so few ratings is large.
    assert losses[0] == losses[1] == losses[2] != losses[3]
    kept = lines[11:]
    assert kept[0][0] == "| 100.0%" and len(kept) == 7
    assert kept[0][1].strip(" |") == kept[0][3].strip(" |")  # all rows, whatever the order
