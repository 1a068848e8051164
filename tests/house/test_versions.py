"""The version check: what it accepts, and what each refusal says."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from torchrec_freq import _versions
from torchrec_freq._versions import SUPPORTED, Found

CPU = Found(torch="2.13.0", torchrec="1.8.0", fbgemm="1.8.0", fbgemm_build="cpu", driver=False)
CUDA = replace(CPU, torch="2.13.0+cu128", fbgemm_build="cuda", driver=True)
NEXT = Found(torch="2.14.1", torchrec="1.9.2", fbgemm="1.9.0", fbgemm_build="cpu", driver=False)


@pytest.mark.parametrize(
    ("version", "minor"),
    [
        ("2.13.0", "2.13"),
        ("2.13", "2.13"),
        ("2.13.0+cpu", "2.13"),
        ("2.13.1+cu128", "2.13"),
        ("2.14.0.dev20260701+cu128", "2.14"),
        ("2.14.0a0+git1234abc", "2.14"),
        ("2.14a0", "2.14"),
        ("2026.7.1", "2026.7"),
        ("INTERNAL", None),
        (None, None),
    ],
)
def test_minor_version(version: str | None, minor: str | None) -> None:
    assert _versions.minor_version(version) == minor


@pytest.mark.parametrize(
    "found",
    [
        CPU,
        CUDA,
        NEXT,
        replace(CPU, torch="2.13.0+cpu"),
        replace(CPU, torch="2.13.1+cu128", fbgemm="1.8.1"),
        replace(NEXT, torch="2.14.0.dev20260701+cpu"),
        replace(CPU, driver=True),  # FBGEMM's CPU build works beside a driver
        replace(CPU, fbgemm_build="rocm"),
    ],
)
def test_accepts(found: Found) -> None:
    assert _versions.problems(found) == []


@pytest.mark.parametrize(
    "found",
    [
        replace(CPU, torch="2.14.0"),
        replace(CPU, torch="2.12.1+cpu"),
        replace(CPU, torch="2.1.3"),
        replace(CPU, torch="2.130.0"),
        replace(CPU, torchrec="1.9.0"),
        replace(CPU, torchrec="2026.7.1"),
        replace(CPU, fbgemm="1.9.0"),
        replace(CPU, fbgemm="of unknown version"),
        replace(NEXT, fbgemm="1.8.0"),
        replace(NEXT, torch="2.15.0"),
    ],
)
def test_refuses_versions_that_do_not_fit(found: Found) -> None:
    assert _versions.problems(found) == [
        "these versions of torch, TorchRec and FBGEMM do not fit each other"
    ]


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (replace(CPU, torch=None), "torch"),
        (replace(CPU, torchrec=None), "TorchRec"),
        (replace(CPU, fbgemm=None, fbgemm_build=""), "FBGEMM"),
    ],
)
def test_refuses_what_is_missing(found: Found, name: str) -> None:
    assert _versions.problems(found) == [f"{name} is not installed"]
    assert f"{name} missing" in _versions.message(found, [])


def test_refuses_cuda_build_without_driver() -> None:
    (problem,) = _versions.problems(replace(CUDA, driver=False))
    assert "CUDA build" in problem
    assert "libnvidia-ml.so.1" in problem


def test_driver_is_there_if_its_library_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_versions, "_DRIVER_LIBRARY", "libno-such-driver.so.1")
    assert not _versions.has_nvidia_driver()
    monkeypatch.setattr(_versions, "_DRIVER_LIBRARY", None)  # the running program itself
    assert _versions.has_nvidia_driver()


def test_nearest_row_needs_fewest_changes_and_keeps_torch_on_a_tie() -> None:
    default, following = SUPPORTED
    nothing = Found(torch=None, torchrec=None, fbgemm=None, fbgemm_build="", driver=False)
    assert _versions.nearest(nothing) == default
    assert _versions.nearest(replace(CPU, torch="2.14.0")) == default
    assert _versions.nearest(replace(NEXT, torch="2.13.0")) == following
    assert _versions.nearest(replace(nothing, torch="2.14.0", torchrec="1.8.0")) == following
    assert _versions.nearest(replace(nothing, torch="2.13.0", torchrec="1.9.0")) == default


def test_repair_of_the_cuda_build_without_driver() -> None:
    assert _versions.repair(replace(CUDA, driver=False)) == [
        "python -m pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu",
        "python -m pip install torch~=2.13.0 "
        "numpy tensordict torchmetrics==1.0.3 tqdm pyre-extensions",
        "python -m pip install --no-deps torchrec~=1.8.0 fbgemm-gpu-cpu~=1.8.0",
    ]


def test_repair_with_a_driver_takes_the_cuda_build() -> None:
    assert _versions.repair(replace(CUDA, fbgemm="1.7.0")) == [
        "python -m pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu",
        "python -m pip install torch~=2.13.0 torchrec~=1.8.0 fbgemm-gpu~=1.8.0",
    ]


def test_repair_leaves_a_fitting_fbgemm_alone_unless_it_is_broken() -> None:
    found = replace(NEXT, torchrec="1.8.0")
    assert not any("uninstall" in command for command in _versions.repair(found))
    uninstall = _versions.repair(found, broken=True)[0]
    assert uninstall.endswith("uninstall -y fbgemm-gpu fbgemm-gpu-cpu torchrec torch")


def test_repair_names_the_interpreter_as_a_shell_reads_it() -> None:
    assert _versions.repair(CPU, "/my env/python")[0].startswith("'/my env/python' -m pip ")


def test_message_has_found_needed_and_repair() -> None:
    found = replace(CPU, torch="2.14.0+cu128")
    assert _versions.message(found, _versions.problems(found)).splitlines() == [
        "torchrec_freq cannot be used: "
        "these versions of torch, TorchRec and FBGEMM do not fit each other.",
        "  found:  torch 2.14.0+cu128, TorchRec 1.8.0, FBGEMM 1.8.0 (cpu build)",
        "  needed: torch 2.13.x, TorchRec 1.8.x, FBGEMM 1.8.x",
        "      or: torch 2.14.x, TorchRec 1.9.x, FBGEMM 1.9.x",
        "  repair: python -m pip install torch~=2.13.0 "
        "numpy tensordict torchmetrics==1.0.3 tqdm pyre-extensions",
        "          python -m pip install --no-deps torchrec~=1.8.0 fbgemm-gpu-cpu~=1.8.0",
        "      or, in a clone of the repository: make -B setup",
    ]


def test_pins_of_each_row() -> None:
    assert _versions.pins().splitlines() == [
        "torch==2.13.0",
        "torchrec==1.8.0",
        "fbgemm-gpu==1.8.0",
    ]
    assert _versions.pins("2.13") == _versions.pins("2.13.1") == _versions.pins()
    assert _versions.pins("2.14").splitlines()[0] == "torch==2.14.0"
    with pytest.raises(ValueError, match=r"torch 2\.12 is not supported\. Use one of 2\.13, 2\.14"):
        _versions.pins("2.12")


def test_this_environment_fits() -> None:
    found = _versions.check()
    assert _versions.minor_version(found.torch) in {"2.13", "2.14"}
    assert found.fbgemm_build in {"cpu", "cuda", "rocm"}


def write_packages(folder: Path, *, variant: str = "cpu", fbgemm_init: str = "") -> None:
    """Packages of the default versions that hold nothing but what the check reads."""
    files = {
        "torch/__init__.py": "",
        "torch/version.py": "__version__ = '2.13.0+cpu'\n",
        "torchrec/__init__.py": "",
        "torchrec/version.py": "__version__ = '1.8.0'\n",
        "fbgemm_gpu/__init__.py": fbgemm_init,
        "fbgemm_gpu/docs/target.default.json.py": (
            f'{{"version": "1.8.0", "target": "default", "variant": "{variant}"}}\n'
        ),
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def import_in_subprocess(folder: Path) -> subprocess.CompletedProcess[str]:
    """`import torchrec_freq` where the packages in `folder` come first; prints a refusal."""
    program = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "try:\n"
        "    import torchrec_freq\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)\n"
        "    assert error.__cause__ is None\n"
        "    assert error.__context__ is None or error.__suppress_context__\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("raised", "reported"),
    [
        ("OSError('x.so: undefined symbol: _ZN3c10\\nmore')", "OSError: x.so: undefined symbol"),
        (
            "OSError('Could not load') from OSError('x.so: undefined symbol: y')",
            "OSError: x.so: undefined symbol: y",
        ),
        ("ImportError('cannot import name y')", "ImportError: cannot import name y"),
        ("AttributeError('no operator z')", "AttributeError: no operator z"),
    ],
)
def test_import_of_broken_fbgemm_gives_the_message_and_no_trace(
    tmp_path: Path, raised: str, reported: str
) -> None:
    write_packages(tmp_path, fbgemm_init=f"raise {raised}\n")
    result = import_in_subprocess(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith("StackError torchrec_freq cannot be used: `import fbgemm_gpu`")
    assert reported in result.stdout
    assert "more" not in result.stdout
    assert "found:  torch 2.13.0+cpu, TorchRec 1.8.0, FBGEMM 1.8.0 (cpu build)" in result.stdout
    assert f"repair: {sys.executable} -m pip uninstall -y fbgemm-gpu" in result.stdout


def test_import_with_a_missing_requirement_names_it_and_uninstalls_nothing(tmp_path: Path) -> None:
    write_packages(tmp_path)
    (tmp_path / "torchrec" / "__init__.py").write_text("import no_such_module\n")
    result = import_in_subprocess(tmp_path)
    assert "ModuleNotFoundError: No module named 'no_such_module'" in result.stdout, result.stderr
    assert "pip install" in result.stdout
    assert "uninstall" not in result.stdout


@pytest.mark.skipif(_versions.has_nvidia_driver(), reason="has the NVIDIA driver's library")
def test_import_of_cuda_build_without_driver_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    write_packages(tmp_path, variant="cuda", fbgemm_init="print('loaded')\n")
    result = import_in_subprocess(tmp_path)
    assert "StackError" in result.stdout, result.stderr
    assert "the CUDA build of FBGEMM cannot be loaded without the NVIDIA driver" in result.stdout
    assert "FBGEMM 1.8.0 (cuda build)" in result.stdout
    assert "loaded\n" not in result.stdout


def test_find_after_uninstalling_one_of_two_builds_says_missing(tmp_path: Path) -> None:
    write_packages(tmp_path)
    # pip leaves the folder that both builds share, with what it did not install, without this file.
    (tmp_path / "fbgemm_gpu" / "__init__.py").unlink()
    program = (
        f"import runpy, sys; sys.path.append({str(tmp_path)!r})\n"
        f"print(runpy.run_path({_versions.__file__!r})['find']())\n"
    )
    # -S leaves the real packages out.
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "torch 2.13.0+cpu, TorchRec 1.8.0, FBGEMM missing\n", result.stderr
