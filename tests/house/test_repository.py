"""The house: workflows call targets that exist, hooks the same tools, no import runs upward."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "torchrec_freq"
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


# From the bottom: a room imports from itself and those below, and from nothing above.
ROOMS = (
    ("_versions", "output"),
    ("config", "rule"),
    ("counts",),
    ("engine",),
    ("optimizer",),
    ("sharded",),
    ("analysis",),
    ("planner",),
    ("",),  # the package itself
    ("cli",),
    ("__main__",),
)


def floor(module: str) -> int:
    """The number of the room of a module, named without the package."""
    (found,) = (index for index, names in enumerate(ROOMS) if module.split(".")[0] in names)
    return found


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchrec_freq"):
            package = (node.module or "").removeprefix("torchrec_freq").removeprefix(".")
            for alias in node.names:
                inner = f"{package}.{alias.name}".removeprefix(".")
                is_module = (PACKAGE / inner.replace(".", "/")).with_suffix(".py").exists()
                found.add(inner if is_module else package)
    return found


def test_no_import_runs_upward() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        module = module.removesuffix("__init__").rstrip(".")
        for other in imports_of(path):
            assert floor(other) <= floor(module), f"{module} imports {other}"


def test_no_test_module_imports_another() -> None:
    """What several need is in a module of its own, beside the folders of tests."""
    tests = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(tests) == sum(1 for _ in (ROOT / "tests").rglob("test_*.py")), "a name used twice"
    for path in tests.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not tests.keys() & set(names), f"{path} imports {names}"
