"""The built wheel: everything is in it, its version has one source, its requirements are those that
the version check accepts."""

import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import torchrec_freq
from torchrec_freq._versions import SUPPORTED, __version__

ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path, version: str | None = None) -> zipfile.ZipFile:
    """Build the wheel from a copy of the sources, optionally under another version."""
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "torchrec_freq", source / "torchrec_freq", ignore=ignore)
    # Folders that must stay out of the wheel.
    for name in ("tests", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    if version is not None:
        path = source / "torchrec_freq" / "_versions.py"
        path.write_text(path.read_text().replace(__version__, version))
    result = subprocess.run(
        [sys.executable, "-c", "import setuptools.build_meta as b; b.build_wheel('..')"],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def metadata(wheel: zipfile.ZipFile) -> Message:
    """The METADATA file of a wheel."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_wheel_contains_modules_their_data_and_the_typing_marker_and_no_more(
    wheel: zipfile.ZipFile,
) -> None:
    package = ROOT / "torchrec_freq"
    files = [*package.rglob("*.py"), package / "py.typed"]
    files += [*package.rglob("*.toml"), *package.rglob("*.html")]
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == {str(path.relative_to(ROOT)) for path in files}


def test_wheel_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    assert metadata(wheel)["License-Expression"] == "BSD-3-Clause"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_version_has_one_source(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    assert metadata(wheel)["Version"] == torchrec_freq.__version__ == __version__
    assert metadata(build_wheel(tmp_path, "9.8.7"))["Version"] == "9.8.7"


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
