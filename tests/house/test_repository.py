"""The house: workflows call targets that exist, hooks the same tools, no import runs upward or in a
circle, and what is public says what it takes."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
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
            target = re.fullmatch(r"make ([a-z-]+)", command)
            assert target and target[1] in TARGETS, command


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


def test_a_gpu_result_is_asked_for_whole() -> None:
    fields = load(ROOT / ".github/ISSUE_TEMPLATE/gpu.yml")["body"]
    required = [
        f["attributes"]["label"] for f in fields if f.get("validations", {}).get("required")
    ]
    assert [re.findall(r"Markdown|JSON|`make gpu`", label) for label in required] == [
        ["Markdown", "`make gpu`"],
        ["JSON", "`make gpu`"],
    ]


def test_a_change_is_asked_for_its_proof() -> None:
    lines = (ROOT / ".github/pull_request_template.md").read_text().splitlines()
    assert len(lines) == 3 and "test that fails" in lines[1]
    assert "`make study`" in lines[2] and "`make bench`" in lines[2]


def test_architecture_names_every_room_and_files_that_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert set(re.findall(r"^\| `(\w+)/`", page, re.MULTILINE)) == {path.name for path in rooms}
    named = re.findall(r"\w+\.py", page + (ROOT / "docs/dataflow.svg").read_text())
    assert set(named) <= {path.name for path in PACKAGE.rglob("*.py")}


# From the bottom: a room imports from itself and those below, and from nothing above.
ROOMS = (
    ("_versions", "output"),
    ("config", "rule"),
    ("counts",),
    ("engine",),
    ("optimizer",),
    ("sharded",),
    ("model_state", "vocabulary"),
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


def names_imported(path: Path) -> set[str]:
    """All that a file imports, also within functions, by its full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: name the whole module"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, named without it."""
    found = set()
    for name in names_imported(path):
        root, _, inner = name.partition(".")
        if root == PACKAGE.name:
            parts = inner.split(".")
            while parts and not any(
                (PACKAGE / "/".join(parts)).with_suffix(s).exists() for s in ("", ".py")
            ):
                parts.pop()  # a name within a module
            found.add(".".join(parts))
    return found


def modules() -> dict[str, set[str]]:
    """Each module of the package, named without it, and those that it imports."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").rstrip(".")] = imports_of(path)
    assert len(found) > 20
    return found


def test_no_import_runs_upward() -> None:
    for module, imported in modules().items():
        for other in imported:
            assert floor(other) <= floor(module), f"{module} imports {other}"


@pytest.mark.parametrize("library, below", [("torchrec", "sharded"), ("fbgemm_gpu", "engine")])
def test_rooms_below_know_nothing_of(library: str, below: str) -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0].removesuffix("__init__")
        if floor(room) < floor(below):
            assert library not in {name.split(".")[0] for name in names_imported(path)}, path


def test_no_imports_run_in_a_circle() -> None:
    graphlib.TopologicalSorter(modules()).prepare()  # raises CycleError, which names them


def public() -> Iterator[tuple[str, Any]]:
    """Functions and classes that users call, and the methods of the classes."""
    for module in ("", ".planner", ".rule", ".analysis.traffic"):
        found = importlib.import_module(PACKAGE.name + module)
        names = getattr(found, "__all__", None) or [
            name
            for name, value in vars(found).items()
            if name[0] != "_" and getattr(value, "__module__", None) == found.__name__
        ]
        for name in names:
            value = getattr(found, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield name, value
            if inspect.isclass(value):
                for method in vars(value):
                    if method[0] != "_" and callable(getattr(value, method)):
                        yield f"{name}.{method}", getattr(value, method)


PUBLIC = dict(public())


def entries(doc: str) -> dict[str, str]:
    """What the sections Args and Attributes say of each name."""
    found: dict[str, str] = {}
    for section in re.findall(
        r"^(?:Args|Attributes):\n((?:(?: {4}.*)?(?:\n|$))+)", doc, re.MULTILINE
    ):
        for names, text in re.findall(
            r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", section, re.MULTILINE
        ):
            found |= dict.fromkeys(names.split(", "), text)
    return found


def undocumented(value: Callable[..., Any]) -> list[str]:
    """Parameters of which a docstring does not say enough.

    A tensor needs its shape in brackets, in its entry under Args or Attributes or in the summary; a
    number that entry, with its unit or range.
    """
    doc = inspect.getdoc(value) or ""
    summary, said = doc.partition("\n\n")[0], entries(doc)
    missing = [] if summary else ["docstring"]
    for name, parameter in inspect.signature(value).parameters.items():
        kind = re.sub(r"Callable\[.*\]", "", str(parameter.annotation))
        if re.search(r"Tensor|NDArray", kind) and "[" not in said.get(name, summary):
            missing.append(f"shape of {name}")
        elif re.search(r"\b(int|float)\b", kind) and name not in said:
            missing.append(name)
    return missing


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_name_shapes_and_units(name: str) -> None:
    assert undocumented(PUBLIC[name]) == []


def test_a_docstring_that_says_too_little_is_found() -> None:
    def scaled(x: torch.Tensor, factor: float, steps: int | None = None) -> torch.Tensor:
        """Many times ``x``.

        Args:
            steps: how often, at least 1.
        """
        raise NotImplementedError

    assert undocumented(scaled) == ["shape of x", "factor"]
    assert undocumented(lambda: None) == ["docstring"]


def test_no_test_module_imports_another() -> None:
    """What several need is in a module of its own, beside the folders of tests."""
    tests = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(tests) == sum(1 for _ in (ROOT / "tests").rglob("test_*.py")), "a name used twice"
    for path in tests.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not tests.keys() & set(names), f"{path} imports {names}"
