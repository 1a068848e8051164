"""The sdist, and the wheel built from it: everything is in them, the version has one source, the
requirements are those that the version check accepts, and the wheel works where the repository is
not."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import torchrec_freq
from torchrec_freq._versions import SUPPORTED, __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def build(folder: Path, version: str | None = None) -> tuple[tarfile.TarFile, zipfile.ZipFile]:
    """The sdist of a copy of the repository without git, and the wheel made from that sdist alone.

    Args:
        folder: where to.
        version: another one than the repository's.
    """
    source = folder / "source"
    lines = (ROOT / ".gitignore").read_text().splitlines()
    ignored = [Path(line).name for line in lines if line and line[0] != "#"]
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", *ignored))
    if version is not None:
        path = source / "torchrec_freq" / "_versions.py"
        path.write_text(path.read_text().replace(__version__, version))
    command = "-m build --no-isolation --outdir . source"
    result = subprocess.run(
        [sys.executable, *command.split()], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    shutil.rmtree(source)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return tarfile.open(sdist), zipfile.ZipFile(wheel)


def metadata(wheel: zipfile.ZipFile) -> Message:
    """The METADATA file of a wheel."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[tarfile.TarFile, zipfile.ZipFile]:
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def sdist(built: tuple[tarfile.TarFile, zipfile.ZipFile]) -> tarfile.TarFile:
    return built[0]


@pytest.fixture(scope="module")
def wheel(built: tuple[tarfile.TarFile, zipfile.ZipFile]) -> zipfile.ZipFile:
    return built[1]


def package_files() -> set[str]:
    """Modules, their data, and the typing marker."""
    package = ROOT / "torchrec_freq"
    files = [file for kind in ("*.py", "*.toml", "*.html") for file in package.rglob(kind)]
    return {str(path.relative_to(ROOT)) for path in (*files, package / "py.typed")}


def test_sdist_contains_the_package_and_its_papers_and_no_more(sdist: tarfile.TarFile) -> None:
    names = {str(Path(*Path(m.name).parts[1:])) for m in sdist.getmembers() if m.isfile()}
    generated = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    papers = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"}
    assert names - generated == package_files() | papers | {"MANIFEST.in", "pyproject.toml"}


def test_wheel_contains_the_package_and_no_more(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == package_files()


def test_wheel_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    assert metadata(wheel)["License-Expression"] == "BSD-3-Clause"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_version_has_one_source(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    assert metadata(wheel)["Version"] == torchrec_freq.__version__ == __version__
    assert metadata(build(tmp_path, "9.8.7")[1])["Version"] == "9.8.7"


def test_requirements_are_the_range_of_supported_versions(wheel: zipfile.ZipFile) -> None:
    requirements = [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist", [])]
    needed = {r.name: r.specifier for r in requirements if r.marker is None}
    assert set(needed) == {"numpy", "safetensors", "torch", "torchrec", "tqdm"}
    for stack in SUPPORTED:
        assert stack.torch in needed["torch"]
        assert stack.torchrec in needed["torchrec"]
    for outside in ("2.12.1", "2.15.0"):
        assert outside not in needed["torch"]
    for outside in ("1.7.0", "1.10.0"):
        assert outside not in needed["torchrec"]


def test_extras_are_those_of_pyproject(wheel: zipfile.ZipFile) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, set[str]] = {
        extra: set() for extra in metadata(wheel).get_all("Provides-Extra", [])
    }
    for text in metadata(wheel).get_all("Requires-Dist", []):
        requirement = Requirement(text)
        for extra, needs in found.items():
            marker = requirement.marker
            if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                needs.add(requirement.name)
    assert found == {
        extra: {r.name for r in map(Requirement, texts) if not r.marker or r.marker.evaluate()}
        for extra, texts in declared["optional-dependencies"].items()
    }


def test_changelog_and_citation_name_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d.*)\] - \d{4}-\d{2}-\d{2}$", changes, re.MULTILINE)
    assert released[0] == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == __version__
    assert f"[{citation['version']}] - {citation['date-released']}" in changes


def test_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    (paper,) = citation["references"]
    for work in (citation, paper):
        assert work["type"] in {"software", "conference-paper"}
        assert isinstance(work["title"], str) and work["authors"]
        for author in work["authors"]:
            assert author.keys() <= {"name"} or author.keys() <= {"family-names", "given-names"}
    assert citation["message"] and citation["license"] == "BSD-3-Clause"
    assert paper["year"] == 2022 and paper["url"] in (ROOT / "README.md").read_text()


TRAINS_ONE_STEP = """
import sys, torch, torch.distributed as dist
import torchrec_freq
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
table = EmbeddingBagConfig(name="t", num_embeddings=5, embedding_dim=8, feature_names=["f"])
tables = EmbeddingBagCollection(tables=[table])
apply(torchrec_freq.FrequencySGD, tables.parameters(), {"lr": 0.05})
model = DistributedModelParallel(tables)
ids = KeyedJaggedTensor(["f"], torch.tensor([3, 1, 3]), lengths=torch.tensor([2, 1]))
before = next(iter(model.parameters())).detach().clone()
model(ids).values().sum().backward()
changed = (next(iter(model.parameters())) != before).any(dim=1)
print(torchrec_freq.__file__, torchrec_freq.__version__, changed.int().tolist(),
      torchrec_freq.row_counts(model)["t"].tolist(), sep="\\n")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_installed_wheel_works_outside_the_repository(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*arguments: str) -> list[str]:
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    run("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(folder),
        str(wheel.filename))  # fmt: skip
    assert (folder / "torchrec_freq" / "py.typed").exists()
    file, version, changed, counts = run("-c", TRAINS_ONE_STEP, str(tmp_path / "store"))
    assert Path(file).parent == folder / "torchrec_freq"
    assert version == __version__
    assert (changed, counts) == ("[0, 1, 0, 1, 0]", "[0, 1, 0, 2, 0]")
    table = run("-m", "torchrec_freq", "plan", "t=100x16", "--optimizer", "FrequencySGD")
    assert table[-1].startswith("| FrequencySGD | in HBM |")
