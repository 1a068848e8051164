"""The files for those who work on it: workflows call targets that exist, hooks the same tools."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/workflows").iterdir()), ids=lambda p: p.name
)
def test_workflows_call_targets_that_exist(path: Path) -> None:
    workflow = load(path)
    assert {"name", "jobs"} <= set(workflow) and True in workflow  # YAML reads `on` as true
    for job in workflow["jobs"].values():
        assert {"runs-on", "steps", "timeout-minutes"} <= set(job)
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands
        for command in commands:
            (target,) = re.findall(r"make ([a-z-]+)", command)
            assert target in TARGETS


def test_every_supported_python_is_tested() -> None:
    jobs = load(ROOT / ".github/workflows/test.yml")["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    lowest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert lowest and lowest[1] in versions


def test_hooks_run_what_make_lint_runs() -> None:
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    entries = {hook["entry"].removeprefix(".venv/bin/python ") for hook in repository["hooks"]}
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    assert entries == set(re.findall(r"\$\(PY\) (.*)", recipe[1]))


def test_a_bug_report_asks_for_the_doctor() -> None:
    fields = load(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")["body"]
    (doctor,) = [field for field in fields if "doctor" in field["attributes"]["label"]]
    assert doctor["validations"]["required"]
