"""README and docs/: every block is run or checked, links lead somewhere, Sphinx does not warn.

A block of a page is run as printed, in the page's order: Python blocks in one namespace, on one
rank; commands in a folder with a few small files. A block whose first line is ``# NAME.py`` (or
another suffix) is a file, for the commands after it. What a page takes for given lies between
``<!-- python`` and ``-->``. ``<!-- FIGURES: what -->`` marks a place whose figures are to come.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import doctest
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from programs import run
from ranks import on_ranks
from torch.distributed.run import parse_args as parse_torchrun

from benchmarks.study.__main__ import parse as parse_study
from examples.criteo.settings import parse as parse_settings
from torchrec_freq import FrequencyConfig, _versions, planner
from torchrec_freq import __main__ as command_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES_WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "torchrec_freq").rglob("*.py"))
    if ">>> " in path.read_text()
]
MADE_BY_SPHINX = {
    "{eval-rst}",
    "{include} ../CONTRIBUTING.md",
    "{literalinclude} ../examples/start.py",
    "{toctree}",
}


@dataclass(frozen=True)
class Block:
    """A fenced block, or one that readers do not see; ``line`` is that of its fence."""

    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """Name of the file that the block is."""
        match = re.match(r"# ([\w.-]+\.(?:py|toml|yaml))\n", self.text)
        return match and match[1]

    @property
    def commands(self) -> list[str]:
        """Commands of a shell block, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        commands = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines]
        return [command for command in commands if command]


def tokens(page: Path) -> Iterator[Token]:
    """All tokens of a page, also those within a line."""
    for token in MarkdownIt().parse(page.read_text()):
        yield token
        yield from token.children or ()


def blocks(page: Path) -> Iterator[Block]:
    for token in tokens(page):
        line = (token.map or [0])[0] + 1
        if token.type in ("fence", "code_block"):
            yield Block(line, token.info.strip(), token.content)
        elif token.type == "html_block":
            if re.fullmatch(r"(<!-- FIGURES: .* -->\s*)+", token.content):
                continue
            hidden = re.fullmatch(r"<!-- (\w+)\n(.*)-->\s*", token.content, re.DOTALL)
            assert hidden, f"{page}:{line}: neither Markdown nor a hidden block"
            yield Block(line, hidden[1], hidden[2])


def require(path: Path) -> None:
    assert path.exists(), path


def help_of(program: str) -> str:
    """What a module of the repository prints for --help."""
    shown = io.StringIO()
    arguments = mock.patch("sys.argv", [program, "--help"])
    with arguments, contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        runpy.run_module(program, run_name="__main__")
    return shown.getvalue()


def program(command: str) -> None:
    """The program has the arguments."""
    name, *arguments = command.removeprefix("python -m ").split()
    shown = help_of(name)
    values = {i + 1 for i, word in enumerate(arguments) if word.startswith("-")}
    words = [word for i, word in enumerate(arguments) if word.startswith("-") or i not in values]
    assert [word for word in words if not re.search(rf"{word}\b", shown)] == []


def make_target(command: str) -> None:
    """The target exists, and its program has the flags of ARGS."""
    words = shlex.split(command)
    # Without RANKS make would ask torch for the number of GPUs.
    dry = subprocess.run(
        ["make", "-n", "RANKS=2", *words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert dry.returncode == 0, dry.stderr
    for word in words:
        if word.startswith("ARGS="):
            flags = [flag for flag in shlex.split(word[5:]) if flag.startswith("--")]
            name = re.search(
                rf"-m (examples\.\w+|benchmarks\.\w+).*{re.escape(word[5:])}", dry.stdout
            )
            assert name, dry.stdout
            program(" ".join(["python -m", name[1], *flags]))


def pip_requirements(command: str) -> None:
    """What is installed is what the version check accepts, or this package with extras it has."""
    pins = dict(line.split("==") for line in _versions.pins().splitlines())
    settings, _, requirements = command.partition("pip install ")
    assert settings in ("", f"FBGEMM_VERSION={pins['fbgemm-gpu']} ")
    for requirement in shlex.split(requirements):
        name, _, version = requirement.partition("==")
        if name in pins:
            assert version == pins[name]
        elif extra := re.fullmatch(r"\.\[(\w+)\]", requirement):
            assert extra[1] in PROJECT["optional-dependencies"]
        elif requirement != "dist/*.whl":  # which make wheel makes
            require(ROOT / requirement / ("setup.py" if ".ci" in requirement else "pyproject.toml"))


def settings_of_training(command: str) -> None:
    """The training program takes the settings."""
    _, found, settings = command.partition(" --config ")
    assert found, command
    parse_settings(["--config", *shlex.split(settings)]).for_ranks(16)


def dry_run(command: str) -> None:
    """torchx makes a job of it, whose program takes the settings."""
    assert "criteo" in run_command(command.replace("torchx run ", "torchx run --dryrun "))
    settings_of_training(command)


def sbatch(command: str) -> None:
    """There is such a script, whose program takes the settings."""
    assert " launch/slurm.sbatch " in command
    run_command("bash -n launch/slurm.sbatch")
    settings_of_training(command)


def study_of_a_file(command: str) -> None:
    """The command's arguments are known."""
    parse_study(shlex.split(command)[3:])


NOT_RUN: dict[str, tuple[str, Callable[[str], None]]] = {
    r"make (setup|demo|study|study-full|bench|gpu|test|test-all|test-next|docs|wheel)\b.*": (
        "takes minutes, and a package index or data from the network",
        make_target,
    ),
    r"python -m benchmarks\.study file .*": (
        "takes a file of yours; tests/benchmarks makes some",
        study_of_a_file,
    ),
    r"python -m benchmarks\.bench .*": (
        "takes a minute, or a GPU; tests/benchmarks rehearses it",
        lambda command: program(re.sub(r" (tables|profile|\d+)\b", "", command)),
    ),
    r"python -m benchmarks\.vocabulary.*": (
        "takes minutes, and data from the network; tests/benchmarks runs it on a few ratings",
        program,
    ),
    r"python -m pytest tests/\S+": (
        "runs tests that run anyway",
        lambda command: require(ROOT / command.split()[-1]),
    ),
    r"(\w+=\S+ )?pip install .*": ("takes a package index", pip_requirements),
    r"torchx run -s (slurm|kubernetes) .*": ("takes a cluster", dry_run),
    r"torchrun .*criteo\.yaml.*": ("takes 16 GPUs and the data", settings_of_training),
    r"sbatch .*": ("takes a cluster", sbatch),
    r"docker (build|push) .*": (
        "takes Docker, which few machines have",
        lambda command: require(ROOT / "launch" / "Dockerfile"),
    ),
    r"tensorboard .*": ("runs until it is stopped", lambda command: None),
}
"""Commands that are not run: a pattern, why, and what is checked instead."""


def instead(command: str) -> Callable[[str], None] | None:
    """The check that takes the place of running a command."""
    for pattern, (_, check) in NOT_RUN.items():
        if re.fullmatch(pattern, command):
            return check
    return None


def write_data() -> None:
    """Small files of the kinds that the pages name, in the working folder."""
    random = np.random.default_rng(0)
    for day in range(2):
        np.save(f"day_{day}_sparse.npy", random.integers(0, 1000, (64, 26), dtype=np.int32))
    for name in ("benchmarks", "examples", "launch", ".torchxconfig"):  # of commands from the top
        Path(name).symlink_to(ROOT / name)
    Path("data").mkdir()
    ids = {name: random.integers(0, 10**9, 64).tolist() for name in ("user", "item")}
    tags = {"tags": random.integers(0, 10**9, (64, 3)).tolist()}
    pyarrow.parquet.write_table(pyarrow.table({**ids, **tags}), "data/part-0.parquet")


def given() -> dict[str, Any]:
    """What pages take for given: ``model``, the reader's, not sharded, and ``train(model)``."""
    from torchrec.models.dlrm import DLRM
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    rows = {"user": 200, "item": 1000}
    tables = [
        EmbeddingBagConfig(
            name=name, num_embeddings=size, embedding_dim=8, feature_names=[f"{name}_id"]
        )
        for name, size in rows.items()
    ]
    torch.manual_seed(0)

    def train(model: Any, steps: int = 3) -> None:
        for _ in range(steps):
            ids = [torch.randint(size, (16,)) for size in rows.values()]
            features = KeyedJaggedTensor(
                keys=[f"{name}_id" for name in rows],
                values=torch.cat(ids),
                lengths=torch.ones(32, dtype=torch.int32),
            )
            model(torch.randn(16, 4), features).mean().backward()

    model = DLRM(EmbeddingBagCollection(tables=tables), 4, [8, 8], [8, 1])
    return {"model": model, "train": train}


def run_command(command: str) -> str:
    """What it printed to standard output; programs are forked, not started anew."""
    words = shlex.split(command)
    if not re.search(r"[*|;&$<>]", command):
        if words[:2] == ["python", "-m"]:
            return run(*words[2:]).out
        if words[0] == "torchrun":
            read = parse_torchrun(words[1:])
            ranks = int(read.nproc_per_node)
            return run(read.training_script, *read.training_script_args, ranks=ranks).out
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        # Two ranks need two GPUs, or none.
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr[-5000:]}"
    return done.stdout


def run_page(page: Path) -> None:
    """Runs or checks the blocks of a page in the working folder.

    Raises:
        Exception: of the first block that fails, or that is neither run nor known.
    """
    namespace, printed, files, commands = given(), "", [], []
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.file:
            Path(block.file).write_text(block.text)
            files.append(block.file)
        match block.language:
            case "python" if not block.file:
                output = io.StringIO()
                code = compile("\n" * block.line + block.text, str(page), "exec")
                with contextlib.redirect_stdout(output):
                    exec(code, namespace)
                printed = output.getvalue()
            case "python":
                pass
            case "diff":
                for sign in ("-", "+"):
                    lines = [line[1:] for line in block.text.splitlines() if line[0] in (sign, " ")]
                    code = compile("\n".join(lines), where, "exec")
                exec(code, namespace)
            case "sh":
                printed = ""
                for command in block.commands:
                    if check := instead(command):
                        check(command)
                    else:
                        printed += run_command(command)
                        commands.append(command)
            case "text":
                same = doctest.OutputChecker().check_output(
                    block.text, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
                )
                assert same, f"{where}: the block before it printed\n{printed}"
            case "toml":
                tomllib.loads(block.text)
            case "yaml":
                yaml.safe_load(block.text)
            case other:
                assert other in MADE_BY_SPHINX, f"{where}: nobody knows what {other!r} is"
    for file in files:
        assert any(file in command for command in commands), f"{page}: nothing uses {file}"


# torchx imports torch anew.
SLOW = {"clusters": pytest.mark.slow}


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=SLOW.get(page.stem, ())) for page in PAGES]
)
@on_ranks(1)
def test_blocks_run_as_printed(page: Path, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    write_data()
    run_page(page)


BROKEN = {
    "python": ("```python\nraise KeyError('me')\n```", KeyError, "me"),
    "hidden": ("<!-- python\nraise KeyError('me')\n-->", KeyError, "me"),
    "command": ("```sh\nls fly\n```", AssertionError, "ls fly"),
    "pipe": ("```sh\nfalse | true\n```", AssertionError, "false"),
    "make target": ("```sh\nmake test-last\n```", AssertionError, "No rule to make target"),
    "make flag": ("```sh\nmake demo ARGS='--fly'\n```", AssertionError, "--fly"),
    "version": ("```sh\npip install torch==1.0.0\n```", AssertionError, "1.0.0"),
    "extra": ('```sh\npip install ".[fly]"\n```', AssertionError, "fly"),
    "package": ("```sh\npip install fly\n```", AssertionError, "fly"),
    "output": ("```python\nprint(1)\n```\n```text\n2\n```", AssertionError, "printed\n  1"),
    "toml": ("```toml\na = \n```", ValueError, "Invalid value"),
    "yaml": ("```yaml\na: b: c\n```", yaml.YAMLError, "mapping values"),
    "file": ("```python\n# train.py\n```", AssertionError, "nothing uses train.py"),
    "language": ("```\nmake test\n```", AssertionError, "nobody knows what ''"),
    "indented": ("text\n\n    make test\n", AssertionError, "nobody knows what ''"),
    "html": ("<table>\n", AssertionError, "neither Markdown"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_blocks_fail(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, error, message = BROKEN[case]
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run_page(page)


def test_each_exception_is_in_use() -> None:
    commands = [c for page in PAGES for block in blocks(page) for c in block.commands]
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for command in commands), pattern


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_names_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for token in tokens(page):
        link = token.attrGet("href") or token.attrGet("src")
        if link and not re.match(r"https?://", str(link)):
            path, _, anchor = str(link).partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page}: {link}"
            if anchor:
                assert anchor in anchors(file), f"{page}: {link}"
        if token.type == "code_inline":
            match token.content.split():
                case ["make", _, *_] as words:
                    assert any(word in targets for word in words), f"{page}: {token.content}"
                case ["python", "-m", "torchrec_freq", command, *_]:
                    assert command in command_line.COMMANDS, f"{page}: {token.content}"
                case [name] if re.fullmatch(r"(?!runs/)(\w+/)+[\w.]*", name):
                    folders = (ROOT, ROOT / "torchrec_freq")
                    assert any((f / name).exists() for f in folders), f"{page}: {token.content}"


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and MyST make them."""
    found = list(MarkdownIt().parse(page.read_text()))
    titles = [
        after.content
        for token, after in zip(found, found[1:], strict=False)
        if token.type == "heading_open"
    ]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_for_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_options_and_their_defaults() -> None:
    page = (ROOT / "docs" / "how.md").read_text()
    shown = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page, re.MULTILINE))
    defaults = {f.name: f.default for f in dataclasses.fields(FrequencyConfig)}
    assert {name: ast.literal_eval(value) for name, value in shown.items()} == defaults


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as `make docs` builds them."""
    folder = tmp_path_factory.mktemp("html")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "docs", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_reference_has_every_public_name(html: Path) -> None:
    import torchrec_freq

    page = (html / "api.html").read_text()
    names = [f"torchrec_freq.{name}" for name in torchrec_freq.__all__]
    names += [
        f"torchrec_freq.planner.{name}"
        for name, value in vars(planner).items()
        if getattr(value, "__module__", None) == planner.__name__ and name[0] != "_"
    ]
    assert [name for name in names if f'id="{name}"' not in page] == []


@pytest.mark.parametrize("module", MODULES_WITH_EXAMPLES)
def test_examples_of_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_equations_need_no_network(html: Path) -> None:
    page = (html / "how.html").read_text()
    assert "<math" in page
    scripts = re.findall(r"<script[^>]* src=\"(.*?)\"", page)
    assert scripts and not [source for source in scripts if "://" in source]


def test_every_page_is_in_the_contents(html: Path) -> None:
    index = (html / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in index or page.stem == "index"
