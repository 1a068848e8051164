"""The pictures of a switch: that they are drawn, and that a switch by the sums leaves no bump."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import switch
from benchmarks.curves import draw


def test_pictures_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(switch, "AFTER", 50)
    options = ["--steps", "60", "--held-out", "1000", "--seeds", "1"]
    monkeypatch.setattr("sys.argv", ["switch", "-o", str(tmp_path), *options])
    switch.main()
    printed = capfd.readouterr().out
    for name, curves in (("switch-in", 4), ("switch-back", 3)):
        picture = ElementTree.parse(tmp_path / f"{name}.svg")
        assert len(picture.findall(".//{*}polyline")) == curves
        assert (tmp_path / f"{name}.svg").stat().st_size < 10_000
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+)", printed, re.MULTILINE)
    losses = {name: (float(at), float(later)) for name, at, later in rows}
    into = [losses[name] for name in losses if name.startswith("FrequencySGD, counts from")]
    assert len(losses) == 7 and len(into) == 2
    # All go on from the same weights.
    assert {at for at, _ in into} == {losses["row-wise Adagrad goes on"][0]}
    assert "FrequencySGD from its first step on, 1 seeds" in printed


def test_a_picture_can_be_read(tmp_path: Path) -> None:
    curves = {"a < b": [(0.0, 0.5), (10.0, 0.4)], "c": [(5.0, 0.45), (10.0, 0.41)]}
    draw(tmp_path / "x.svg", "A & B", curves, "step", "loss", mark=5)
    texts = [e.text for e in ElementTree.parse(tmp_path / "x.svg").findall(".//{*}text")]
    assert {"A & B", "a < b", "c", "step", "loss", "0.40", "0.50", "10"} <= set(texts)
