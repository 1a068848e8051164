"""The version check: what it accepts, and what each refusal says."""

import subprocess
import sys
from pathlib import Path

import pytest

from torchrec_freq import _versions
from torchrec_freq._versions import SUPPORTED, Stack, StackError

CPU = SUPPORTED[0]._replace(fbgemm_build="cpu")


def check(monkeypatch: pytest.MonkeyPatch, found: Stack) -> str:
    """What the check says of an installation, in which everything can be imported."""
    monkeypatch.setattr(_versions, "find", lambda: found)
    try:
        return str(_versions.check())
    except StackError as refusal:
        return str(refusal)


@pytest.mark.parametrize(
    "versions",
    [
        ("2.13.0", "1.8.0", "1.8.0"),
        ("2.13.1+cu128", "1.8.0", "1.8.1"),
        ("2.14.0.dev20260701+cu128", "1.9.2", "1.9.0"),
        ("2.14.0a0+git1234abc", "1.9.0", "1.9.0"),
    ],
)
@pytest.mark.parametrize(("build", "driver"), [("cpu", False), ("cpu", True), ("cuda", True)])
def test_accepts(
    monkeypatch: pytest.MonkeyPatch, versions: tuple[str, str, str], build: str, driver: bool
) -> None:
    said = check(monkeypatch, Stack(*versions, build, driver))
    assert (
        said == f"torch {versions[0]}, TorchRec {versions[1]}, FBGEMM {versions[2]} ({build} build)"
    )


@pytest.mark.parametrize(
    "versions",
    [
        ("2.14.0", "1.8.0", "1.8.0"),
        ("2.15.0", "1.9.0", "1.9.0"),
        ("2.13.0", "2026.7.1", "1.8.0"),
        ("2.14.0", "1.9.0", "1.8.0"),
        ("2.13.0", "1.8.0", "INTERNAL"),
        ("2.13.0", "missing", "1.8.0"),
    ],
)
def test_refuses(monkeypatch: pytest.MonkeyPatch, versions: tuple[str, str, str]) -> None:
    said = check(monkeypatch, Stack(*versions, "cpu"))
    stack = SUPPORTED[1] if versions[0].startswith("2.14") else SUPPORTED[0]
    assert said.splitlines() == [
        "torchrec_freq cannot be used: torch, TorchRec and FBGEMM are not all there, or do not fit "
        "each other.",
        f"  found:  torch {versions[0]}, TorchRec {versions[1]}, FBGEMM {versions[2]} (cpu build)",
        "  needed: torch 2.13.0, TorchRec 1.8.0, FBGEMM 1.8.0 or torch 2.14.0, TorchRec 1.9.0, "
        "FBGEMM 1.9.0",
        f"  repair: {sys.executable} -m pip uninstall -y torchrec fbgemm-gpu fbgemm-gpu-cpu torch",
        f"          {sys.executable} -m pip install torch~={stack.torch} numpy tensordict "
        "torchmetrics==1.0.3 tqdm pyre-extensions",
        f"          {sys.executable} -m pip install --no-deps torchrec~={stack.torchrec} "
        f"fbgemm-gpu-cpu~={stack.fbgemm}",
        "      or, in a clone of the repository: make -B setup",
    ]


def test_the_cuda_build_needs_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    said = check(monkeypatch, CPU._replace(fbgemm_build="cuda"))
    assert "FBGEMM's CUDA build needs the NVIDIA driver (libnvidia-ml.so.1)" in said
    monkeypatch.setattr(sys, "executable", "/my env/python")
    _, install = CPU._replace(driver=True).repair()
    assert install == (
        "'/my env/python' -m pip install torch~=2.13.0 torchrec~=1.8.0 fbgemm-gpu~=1.8.0"
    )


def test_pins() -> None:
    expected = "torch==2.13.0\ntorchrec==1.8.0\nfbgemm-gpu==1.8.0"
    assert _versions.pins() == _versions.pins("2.13") == _versions.pins("2.13.1") == expected
    assert _versions.pins("2.14").startswith("torch==2.14.0\n")

    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", _versions.__file__, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert script("pins").stdout == f"{expected}\n"
    assert script("build").stdout in ("cpu\n", "cuda\n")
    assert script("check").stdout == f"{_versions.check()}\n"
    refused = script("pins", "2.12")
    assert refused.returncode == 1
    assert refused.stderr == "torch 2.12 is not supported. Use one of 2.13, 2.14.\n"


MODULE = ["-m", "torchrec_freq", "doctor"]


@pytest.mark.parametrize(
    ("program", "fails", "reported"),
    [
        (
            MODULE,
            "raise OSError('no x.so') from OSError('no symbol y\\nmore')",
            "OSError: no symbol y",
        ),
        (MODULE, "import no_such", "ModuleNotFoundError: No module named 'no_such'"),
        (["-c", "import torchrec_freq"], "raise AttributeError('no z')", "AttributeError: no z"),
    ],
)
def test_a_broken_package_gives_the_message(
    tmp_path: Path, program: list[str], fails: str, reported: str
) -> None:
    """On import an error that names the cause; from ``python -m`` without a trace."""
    (tmp_path / "torchrec").mkdir()
    (tmp_path / "torchrec" / "__init__.py").write_text(fails)
    result = subprocess.run(
        [sys.executable, *program],
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    said = result.stderr
    assert f"torchrec_freq cannot be used: `import torchrec` fails with {reported}.\n" in said
    assert f"repair: {sys.executable} -m pip" in said
    assert ("Traceback" in said) == (program != MODULE)


def test_one_of_two_builds_uninstalled_is_missing(tmp_path: Path) -> None:
    # pip leaves the folder that both builds share, with what it did not install, without __init__.
    (tmp_path / "fbgemm_gpu" / "docs").mkdir(parents=True)
    program = (
        f"import runpy, sys; sys.path.append({str(tmp_path)!r})\n"
        f"print(runpy.run_path({_versions.__file__!r})['find']())\n"
    )
    # -S leaves the real packages out.
    command = [sys.executable, "-I", "-S", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("torch missing, TorchRec missing, FBGEMM missing"), result
