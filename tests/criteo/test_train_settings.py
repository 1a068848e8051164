"""The training program's settings: what is taken, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from training import GIVEN, REPOSITORY, ROWS

from examples.criteo.settings import parse

REFUSED = [
    ([], "No data: give data.folder, or data.synthetic"),
    (["--data.synthetic", "99"], '"data.synthetic".*v>=100'),
    ([*GIVEN, "--data.rows", "[1, 2]"], "data.rows must be 26 numbers, one a table; got 2"),
    ([*GIVEN, "--data.rows", str([0] * 26)], '"data.rows".* 0 .* v>=1'),
    ([*GIVEN, "--data.max_rows", "0"], '"data.max_rows".*v>=1'),
    ([*GIVEN, "--data.threads", "0"], '"data.threads".*v>=1'),
    ([*GIVEN, "--data.scan", "false"], "give data.rows"),
    (
        [*GIVEN, "--data.rows", str(ROWS), "--data.scan", "false", "--data.bad_rows", "skip"],
        "data.bad_rows=skip needs data.scan",
    ),
    ([*GIVEN, "--data.bad_rows", "fix"], "data.bad_rows"),
    ([*GIVEN, "--model.dim", "6"], "model.dim must be a multiple of 4"),
    ([*GIVEN, "--model.top", "[8, 0]"], '"model.top".* 0 .*v>=1'),
    ([*GIVEN, "--model.dcn_rank", "4"], "are for model.kind=DLRM_DCN"),
    ([*GIVEN, "--model.kind", "DLRM_DCN"], "needs model.dcn_layers and model.dcn_rank"),
    ([*GIVEN, "--optimizer.name", "Adam"], "optimizer.name"),
    ([*GIVEN, "--optimizer.lr", ".inf"], '"optimizer.lr".*inf'),
    ([*GIVEN, "--optimizer.warmup", "-1"], '"optimizer.warmup".* -1 .*v>=0'),
    ([*GIVEN, "--optimizer.frequency.half_life", "0"], "Invalid half_life value: 0"),
    (
        [*GIVEN, "--optimizer.name", "SGD", "--optimizer.frequency.own_weight", "2"],
        "optimizer.frequency is for FrequencySGD",
    ),
    ([*GIVEN, "--optimizer.frequency.count", "frozen"], "needs the file planner.counts"),
    ([*GIVEN, "--planner.sharding", "[rows]"], '"planner.sharding".*table_wise'),
    ([*GIVEN, "--planner.kernels", "[]"], "planner.kernels must not be empty"),
    ([*GIVEN, "--planner.hbm_gb", "0"], '"planner.hbm_gb".*v>0'),
    (
        [*GIVEN, "--planner.sharding", "[data_parallel]", "--optimizer.name", "SGD"],
        "does not train data_parallel tables with SGD",
    ),
    ([*GIVEN, "--evaluation.thresholds", "1"], '"evaluation.thresholds".*v>=2'),
    ([*GIVEN, "--evaluation.samples", "9"], "give evaluation.every"),
    ([*GIVEN, "--checkpoint.minutes", "-1"], '"checkpoint.minutes".* -1 .*v>=0'),
    ([*GIVEN, "--checkpoint.keep", "0"], '"checkpoint.keep".*v>=1'),
    ([*GIVEN, "--batch_size", "0"], '"batch_size".* 0 .*v>=1'),
    ([*GIVEN, "--batch_size", "many"], "batch_size"),
    ([*GIVEN, "--model.dim", "null"], "model.dim"),
    ([*GIVEN, "--model.bottom", "[8, null]"], "model.bottom"),
    ([*GIVEN, "--seed", str(2**64)], '"seed".*v<='),
    ([*GIVEN, "--batch_size", str(10**400)], '"batch_size".*v<='),
    ([*GIVEN, "--checkpoint.not_saved", "maybe"], "checkpoint.not_saved"),
    ([*GIVEN, "--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_refused_settings(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(flags)
    assert re.search(message, str(error.value), re.DOTALL)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("data: null", "data must be a section of settings; got None"),
        ("data: 3", "data must be a section of settings; got 3"),
        ("data: {synthetic: 500}\nmodel: []", "model must be a section of settings; got []"),
        (
            "data: {synthetic: 500}\noptimizer: {frequency: null}",
            "optimizer.frequency must be a section of settings; got None",
        ),
        ("data: {synthetic: 500}\nepochs: null", '"epochs"'),
        ("data: {synthetic: 500}\nmodel: {dim: null}", '"model.dim"'),
        ("data: {synthetic: 500}\nepochs: [1]", "epochs"),
        ("data: &a [*a]", "refers to itself"),
        ("null", "null"),
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


def test_yaml_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("batch_size: 64\ndata: {synthetic: 500}\noptimizer: {lr: 1, warmup: 3}\n")
    settings = parse(["--config", str(file), "--optimizer.lr", "0.2", "--seed", "4"])
    assert (settings.batch_size, settings.seed, settings.log_every) == (64, 4, 50)
    assert (settings.optimizer.lr, settings.optimizer.warmup) == (0.2, 3)
    assert settings.data.path == Path(".data/criteo-synthetic-500")
    file.write_text("data: {synthetic: 500, foldr: x}\n")
    with pytest.raises(ValueError, match="foldr"):
        parse(["--config", str(file)])
    with pytest.raises(ValueError, match="none.yaml"):
        parse(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("name", ["smoke", "criteo"])
def test_shipped_settings(name: str) -> None:
    file = REPOSITORY / "examples" / "criteo" / f"{name}.yaml"
    settings = parse(["--config", str(file), *GIVEN])
    settings.for_ranks(2)
    settings.for_ranks(8)


def test_batch_of_all_ranks() -> None:
    settings = parse([*GIVEN, "--batch_size", "64"])
    settings.for_ranks(4)
    with pytest.raises(ValueError, match="batch_size 64 is not a multiple of the 3 ranks. Try 63"):
        settings.for_ranks(3)
    settings = parse([*GIVEN, "--evaluation.batch_size", "3"])
    with pytest.raises(ValueError, match=r"evaluation\.batch_size 3 is less than the 4 ranks"):
        settings.for_ranks(4)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    printed = capsys.readouterr().out
    for flag in ("--data.folder", "--optimizer.lr", "--checkpoint.minutes"):
        assert flag in printed
    assert "samples a step, all ranks" in " ".join(printed.split())
