"""The pictures of a switch: that they are drawn, and that a switch by the sums leaves no bump."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot

from benchmarks import switch
from benchmarks.switch import draw


def test_pictures_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(switch, "AFTER", 50)
    options = ["--steps", "60", "--held-out", "1000", "--seeds", "1"]
    monkeypatch.setattr("sys.argv", ["switch", "-o", str(tmp_path), *options])
    switch.main()
    printed = capfd.readouterr().out
    for name in ("switch-in", "switch-back"):
        raw = (tmp_path / f"{name}.png").read_bytes()
        assert raw.startswith(b"\x89PNG") and len(raw) < 100_000
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+)", printed, re.MULTILINE)
    losses = {name: (float(at), float(later)) for name, at, later in rows}
    into = [losses[name] for name in losses if name.startswith("FrequencySGD, counts from")]
    assert len(losses) == 7 and len(into) == 2
    # All go on from the same weights.
    assert {at for at, _ in into} == {losses["row-wise Adagrad goes on"][0]}
    assert "FrequencySGD from its first step on, 1 seeds" in printed


def test_a_picture_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    curves = {"a < b": [(0.0, 0.5), (10.0, 0.4)], "c": [(5.0, 0.45), (10.0, 0.41)]}
    draw(tmp_path / "x.png", "A & B", curves, mark=5)
    (panel,) = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    for name, points in curves.items():
        assert lines[name] == [list(point) for point in points]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(curves)
    assert (panel.get_title(), panel.get_xlabel()) == ("A & B", "step")
    assert "loss" in panel.get_ylabel()
    close(figures[0])
