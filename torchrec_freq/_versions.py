"""Our version, the versions of torch, TorchRec and FBGEMM that fit each other, and their check.

Binary packages that do not fit fail on import with a missing symbol or a missing driver library.
`check` finds that out beforehand and says what to install. Only the standard library is used, so
that it runs where the others are absent or broken, and setup can run this file as a script:

    python -I torchrec_freq/_versions.py pins [TORCH]   pip constraints of one supported row
    python -I torchrec_freq/_versions.py build          FBGEMM build that suits this machine
    python -I torchrec_freq/_versions.py check          what is installed, or what to repair
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__version__ = "0.3.0"


class StackError(ImportError):
    """torch, TorchRec and FBGEMM are missing, do not fit each other, or cannot be loaded here."""


class Stack(NamedTuple):
    """Releases that were built for each other; every patch release of each is accepted."""

    torch: str
    torchrec: str
    fbgemm: str


# The first row is the default.
SUPPORTED = (
    Stack(torch="2.13.0", torchrec="1.8.0", fbgemm="1.8.0"),
    Stack(torch="2.14.0", torchrec="1.9.0", fbgemm="1.9.0"),
)

# What TorchRec and FBGEMM require besides torch and each other, for installs with --no-deps.
_OTHER_REQUIREMENTS = "numpy tensordict torchmetrics==1.0.3 tqdm pyre-extensions"

# The library of the NVIDIA driver that FBGEMM's CUDA build is linked against.
_DRIVER_LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Found:
    """What is installed: version strings, None where a package is missing.

    `fbgemm_build` is "cpu", "cuda" or "rocm", empty where unknown; `driver` says whether the
    NVIDIA driver's library can be loaded.
    """

    torch: str | None
    torchrec: str | None
    fbgemm: str | None
    fbgemm_build: str
    driver: bool

    def __str__(self) -> str:
        """One line for messages, such as `torch 2.13.0, TorchRec missing, FBGEMM 1.8.0 (cpu)`."""
        build = f" ({self.fbgemm_build} build)" if self.fbgemm and self.fbgemm_build else ""
        return (
            f"torch {self.torch or 'missing'}, TorchRec {self.torchrec or 'missing'}, "
            f"FBGEMM {self.fbgemm or 'missing'}{build}"
        )


def minor_version(version: str | None) -> str | None:
    """`major.minor` of a release, local, development or source build; None if it has none."""
    # A nightly named by its date, such as 2026.7.1, yields 2026.7, which no row of ours has.
    match = re.match(r"\d+\.\d+", version or "")
    return match.group() if match else None


def fitting(stack: Stack, found: Found) -> list[bool]:
    """Whether torch, TorchRec and FBGEMM, in this order, are those of `stack`."""
    versions = (found.torch, found.torchrec, found.fbgemm)
    pairs = zip(stack, versions, strict=True)
    return [minor_version(wanted) == minor_version(there) for wanted, there in pairs]


def nearest(found: Found) -> Stack:
    """The supported row that needs the fewest changes; on a tie the one that keeps torch."""
    return max(SUPPORTED, key=lambda stack: (sum(fitting(stack, found)), fitting(stack, found)))


def problems(found: Found) -> list[str]:
    """What is wrong with the installed versions, as clauses; empty if they can work together."""
    names = {"torch": found.torch, "TorchRec": found.torchrec, "FBGEMM": found.fbgemm}
    wrong = [f"{name} is not installed" for name, version in names.items() if version is None]
    if not wrong and not all(fitting(nearest(found), found)):
        wrong.append("these versions of torch, TorchRec and FBGEMM do not fit each other")
    if found.fbgemm_build == "cuda" and not found.driver:
        wrong.append(
            "the CUDA build of FBGEMM cannot be loaded without the NVIDIA driver "
            f"({_DRIVER_LIBRARY} not found)"
        )
    return wrong


def repair(found: Found, python: str = "python", *, broken: bool = False) -> list[str]:
    """Shell commands that install the nearest supported row.

    Args:
        found: what is installed now.
        python: the interpreter to install for.
        broken: the versions are right and yet cannot be loaded, so replace the files too.
    """
    stack = nearest(found)
    pip = f"{shlex.quote(python)} -m pip"
    torch, torchrec = f"torch~={stack.torch}", f"torchrec~={stack.torchrec}"
    fbgemm_fits = fitting(stack, found)[2] and (found.driver or found.fbgemm_build != "cuda")
    commands = []
    if broken or not fbgemm_fits:
        # Both builds own the same folder: pip must remove both before one of them is whole again.
        others = " torchrec torch" if broken else ""
        commands = [f"{pip} uninstall -y fbgemm-gpu fbgemm-gpu-cpu{others}"]
    if found.driver:
        return [*commands, f"{pip} install {torch} {torchrec} fbgemm-gpu~={stack.fbgemm}"]
    # TorchRec's metadata requires the CUDA build, whatever the machine: hence --no-deps.
    return [
        *commands,
        f"{pip} install {torch} {_OTHER_REQUIREMENTS}",
        f"{pip} install --no-deps {torchrec} fbgemm-gpu-cpu~={stack.fbgemm}",
    ]


def message(
    found: Found, wrong: Sequence[str], python: str = "python", *, broken: bool = False
) -> str:
    """The text of a refusal: what is wrong, the versions found and needed, the repair."""
    needed = "\n      or: ".join(
        f"torch {minor_version(stack.torch)}.x, TorchRec {minor_version(stack.torchrec)}.x, "
        f"FBGEMM {minor_version(stack.fbgemm)}.x"
        for stack in SUPPORTED
    )
    commands = "\n          ".join(repair(found, python, broken=broken))
    return (
        f"torchrec_freq cannot be used: {'; '.join(wrong)}.\n"
        f"  found:  {found}\n"
        f"  needed: {needed}\n"
        f"  repair: {commands}\n"
        "      or, in a clone of the repository: make -B setup"
    )


def has_nvidia_driver() -> bool:
    """Whether the NVIDIA driver's management library can be loaded."""
    try:
        ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError:
        return False
    return True


def _package_folder(module: str) -> Path | None:
    # A top-level name is located without being imported. No origin means a folder without
    # __init__.py: what pip leaves behind when it uninstalls one of two packages that share it.
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def metadata_version(*distributions: str) -> str | None:
    """Of the first of these that is installed; None where none is."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _version_of(module: str) -> str | None:
    """Version of the package that `import module` would load, without importing it."""
    folder = _package_folder(module)
    if folder is None:
        return None
    # The package's own file comes first: metadata may belong to another copy on the path.
    version_file = folder / "version.py"
    text = version_file.read_text() if version_file.is_file() else ""
    match = re.search(r"^__version__\b[^=\n]*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
    return match[1] if match else metadata_version(module) or "of unknown version"


def _fbgemm() -> tuple[str | None, str]:
    """Version and build of the FBGEMM that `import fbgemm_gpu` would load.

    fbgemm-gpu and fbgemm-gpu-cpu share one folder and the metadata of both may be present, so the
    file that came with the libraries decides (fbgemm_gpu/__init__.py reads the same one).
    """
    folder = _package_folder("fbgemm_gpu")
    if folder is None:
        return None, ""
    try:
        target = json.loads((folder / "docs" / "target.default.json.py").read_text())
        return str(target["version"]), str(target["variant"])
    except (OSError, ValueError, KeyError):  # releases before 1.3 have no such file
        return metadata_version("fbgemm-gpu-cpu", "fbgemm-gpu") or "of unknown version", ""


def find() -> Found:
    """Look at what is installed; imports none of it."""
    return Found(_version_of("torch"), _version_of("torchrec"), *_fbgemm(), has_nvidia_driver())


def check() -> Found:
    """Make sure that torch, FBGEMM and TorchRec are there, fit each other, and can be loaded.

    Returns:
        What was found.

    Raises:
        StackError: with the versions found, the versions needed, and the commands that repair it.
    """
    found = find()
    if wrong := problems(found):
        raise StackError(message(found, wrong, sys.executable))
    for module in ("torch", "fbgemm_gpu", "torchrec"):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken binary package may raise anything
            root: BaseException = error
            while root.__cause__ is not None:  # torch hides the missing symbol behind its own error
                root = root.__cause__
            reason = next(iter(str(root).strip().splitlines()), "no reason given")
            wrong = [f"`import {module}` fails with {type(root).__name__}: {reason}"]
            # A module that is not there is only missing from the environment: nothing is broken.
            broken = not isinstance(root, ModuleNotFoundError)
            raise StackError(message(found, wrong, sys.executable, broken=broken)) from None
    return found


def pins(torch: str | None = None) -> str:
    """Constraints, one a line, that hold pip to the supported row of this torch (or the default).

    Raises:
        ValueError: no supported row has this version of torch.
    """
    rows = {minor_version(stack.torch): stack for stack in SUPPORTED}
    stack = rows.get(minor_version(torch)) if torch else SUPPORTED[0]
    if stack is None:
        raise ValueError(f"torch {torch} is not supported. Use one of {', '.join(map(str, rows))}.")
    return f"torch=={stack.torch}\ntorchrec=={stack.torchrec}\nfbgemm-gpu=={stack.fbgemm}"


def main(arguments: Sequence[str]) -> str:
    """Run one of the commands in the module's docstring; returns what to print."""
    match list(arguments):
        case ["pins", *torch] if len(torch) <= 1:
            return pins(*torch)
        case ["build"]:
            return "cuda" if has_nvidia_driver() else "cpu"
        case ["check"]:
            return str(check())
    raise ValueError(f"unknown arguments {list(arguments)}. Use: pins [TORCH], build or check.")


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except (ValueError, StackError) as refusal:
        sys.exit(str(refusal))
