"""The training program's settings: what is taken, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from criteo_runs import GIVEN, REPOSITORY, ROWS

from examples.criteo.settings import parse
from torchrec_freq.config import FIELDS

REFUSED = [
    ("", "No data: give data.folder, or data.synthetic"),
    ("--data.synthetic 99", "data.synthetic must be from 100 .*; got 99"),
    ("--data.rows [1,2]", "data.rows must be 26 numbers, one a table; got 2"),
    (f"--data.rows {str([0] * 26).replace(' ', '')}", "data.rows must be from 1 .*; got 0"),
    ("--data.scan false", "give data.rows"),
    ("--model.dim 6", "model.dim must be a multiple of 4"),
    ("--model.top [8,0]", "model.top must be from 1 .*; got 0"),
    ("--model.dim null", "model.dim"),
    ("--model.bottom [8,null]", "model.bottom"),
    ("--optimizer.name Adam", "optimizer.name"),
    ("--optimizer.lr .inf", "optimizer.lr must be .*; got inf"),
    ("--optimizer.lr .nan", "optimizer.lr must be .*; got nan"),
    ("--optimizer.frequency.half_life 0", "Invalid half_life value: 0"),
    ("--optimizer.name SGD --optimizer.frequency.admit 2", "frequency is for FrequencySGD"),
    (
        "--optimizer.frequency.count frozen --optimizer.frequency.normalize null",
        "needs the file planner.counts",
    ),
    ("--planner.sharding [rows]", '"planner.sharding".*table_wise'),
    ("--planner.kernels []", "planner.kernels must not be empty"),
    (
        "--planner.sharding [data_parallel] --optimizer.name SGD",
        "does not train data_parallel tables with SGD",
    ),
    ("--evaluation.samples 9", "give evaluation.every"),
    ("--checkpoint.minutes -1", "checkpoint.minutes must be from 0 .*; got -1"),
    ("--checkpoint.not_saved maybe", "checkpoint.not_saved"),
    ("--batch_size many", "batch_size"),
    (f"--seed {2**64}", r"seed must be from 0 to 2\^62"),
    ("--learning_rate 1", "unrecognized arguments: --learning_rate"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_refused_settings(flags: str, message: str) -> None:
    given = [] if flags == "" or "synthetic" in flags else GIVEN
    with pytest.raises(ValueError) as error:
        parse([*given, *flags.split()])
    assert re.search(message, str(error.value), re.DOTALL)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("data: null", "data must be a section of settings; got None"),
        ("data: {synthetic: 500}\nmodel: []", "model must be a section of settings; got []"),
        (
            "data: {synthetic: 500}\noptimizer: {frequency: null}",
            "optimizer.frequency must be a section of settings; got None",
        ),
        ("data: {synthetic: 500, foldr: x}", "foldr"),
        ("data: {synthetic: 500}\nepochs: null", '"epochs"'),
        ("data: &a [*a]", "refers to itself"),
        ("", "config"),
        ("data: [", "config"),
        ("\udcff", "utf-8"),
    ],
)
def test_refused_yaml(tmp_path: Path, yaml: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml, errors="surrogateescape")
    with pytest.raises(ValueError) as error:
        parse(["--config", str(file)])
    assert message in str(error.value)


def test_flags_override_yaml(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("batch_size: 64\ndata: {synthetic: 500}\noptimizer: {lr: 1, warmup: 3}\n")
    settings = parse(["--config", str(file), "--optimizer.lr", "0.2", "--seed", "4"])
    assert (settings.batch_size, settings.seed, settings.log_every) == (64, 4, 50)
    assert (settings.optimizer.lr, settings.optimizer.warmup) == (0.2, 3)
    assert settings.data.path == Path(".data/criteo-synthetic-500")
    with pytest.raises(ValueError, match="none.yaml"):
        parse(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("name", ["smoke", "criteo"])
def test_shipped_settings(name: str) -> None:
    file = REPOSITORY / "examples" / "criteo" / f"{name}.yaml"
    settings = parse(["--config", str(file), *GIVEN])
    settings.for_ranks(2)
    settings.for_ranks(8)


def test_batch_of_all_ranks() -> None:
    with pytest.raises(ValueError, match="batch_size 64 is not a multiple of the 3 ranks. Try 63"):
        parse([*GIVEN, "--batch_size", "64"]).for_ranks(3)
    with pytest.raises(ValueError, match=r"evaluation\.batch_size 3 is less than the 4 ranks"):
        parse([*GIVEN, "--evaluation.batch_size", "3"]).for_ranks(4)


def test_what_a_resumed_run_must_have_in_common() -> None:
    lasting = parse([*GIVEN, "--data.rows", str(ROWS)]).lasting()
    assert {f"optimizer.frequency.{name}" for name in FIELDS} < lasting.keys()
    assert {"optimizer.lr", "model.dim", "data.shuffle", "batch_size", "seed"} < lasting.keys()
    assert not any(name.startswith(("planner", "evaluation", "checkpoint")) for name in lasting)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name in FIELDS:
        assert f"--optimizer.frequency.{name} " in printed
    assert "samples a step, all ranks" in printed
