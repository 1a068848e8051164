"""This package's version, the versions of torch, TorchRec and FBGEMM that fit, and their check.

It needs the standard library only, so it runs where the others are broken, and as a script:

    python -I torchrec_freq/_versions.py pins [TORCH]   pip constraints for a supported torch
    python -I torchrec_freq/_versions.py build          FBGEMM build for this machine: cpu or cuda
    python -I torchrec_freq/_versions.py check          what is installed, or how to repair it
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
from pathlib import Path
from typing import NamedTuple

__version__ = "0.3.0"


class StackError(ImportError):
    """torch, TorchRec and FBGEMM are missing, do not fit each other, or cannot be loaded here."""


class Stack(NamedTuple):
    """Versions, of which every patch release is alike; "missing" for what is not installed.

    `fbgemm_build` is cpu, cuda or rocm, empty where unknown; `driver`: whether NVIDIA's is here.
    """

    torch: str
    torchrec: str
    fbgemm: str
    fbgemm_build: str = ""
    driver: bool = False

    def __str__(self) -> str:
        build = f" ({self.fbgemm_build} build)" if self.fbgemm_build else ""
        return f"torch {self.torch}, TorchRec {self.torchrec}, FBGEMM {self.fbgemm}{build}"

    def needed(self) -> Stack:
        """The supported stack of the installed torch, or the default."""
        torch = minor(self.torch)
        return next((stack for stack in SUPPORTED if minor(stack.torch) == torch), SUPPORTED[0])

    def repair(self) -> list[str]:
        """Shell commands that install what fits, whatever is there now."""
        stack, pip = self.needed(), f"{shlex.quote(sys.executable)} -m pip"
        torch, torchrec = f"torch~={stack.torch}", f"torchrec~={stack.torchrec}"
        # FBGEMM's builds own the same folder: pip must remove both before one is whole again.
        remove = f"{pip} uninstall -y torchrec fbgemm-gpu fbgemm-gpu-cpu torch"
        if self.driver:
            return [remove, f"{pip} install {torch} {torchrec} fbgemm-gpu~={stack.fbgemm}"]
        # TorchRec's metadata requires the CUDA build on every machine: hence --no-deps.
        others = "numpy tensordict torchmetrics==1.0.3 tqdm pyre-extensions"
        cpu = f"{pip} install --no-deps {torchrec} fbgemm-gpu-cpu~={stack.fbgemm}"
        return [remove, f"{pip} install {torch} {others}", cpu]


# Releases that were built for each other. The first is the default.
SUPPORTED = (Stack("2.13.0", "1.8.0", "1.8.0"), Stack("2.14.0", "1.9.0", "1.9.0"))


def minor(version: str) -> str:
    """`major.minor` of a release, local, development or source build."""
    match = re.match(r"\d+\.\d+", version)
    return match.group() if match else version


def has_nvidia_driver() -> bool:
    """Whether the library of the NVIDIA driver can be loaded that FBGEMM's CUDA build needs."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def find() -> Stack:
    """Look at what is installed; imports none of it."""
    torch, torchrec = (
        next((d.version for d in importlib.metadata.distributions(name=name)), "missing")
        for name in ("torch", "torchrec")
    )
    # A folder without __init__.py has no origin: pip leaves it when it uninstalls one of two builds
    # that share it. Metadata of both may be there; the file came with the libraries.
    spec, fbgemm = importlib.util.find_spec("fbgemm_gpu"), {"version": "missing", "variant": ""}
    if spec is not None and spec.origin is not None:
        target = Path(spec.origin).with_name("docs") / "target.default.json.py"
        fbgemm = json.loads(target.read_text()) if target.exists() else fbgemm
    return Stack(torch, torchrec, fbgemm["version"], fbgemm["variant"], has_nvidia_driver())


def check() -> Stack:
    """Make sure that torch, FBGEMM and TorchRec are there, fit each other, and can be loaded.

    Raises:
        StackError: with the versions found, the versions needed, and the commands that repair it.
    """
    found, problem = find(), ""
    if list(map(minor, found[:3])) != list(map(minor, found.needed()[:3])):
        problem = "torch, TorchRec and FBGEMM are not all there, or do not fit each other"
    elif found.fbgemm_build == "cuda" and not found.driver:
        problem = "FBGEMM's CUDA build needs the NVIDIA driver (libnvidia-ml.so.1)"
    for module in () if problem else ("torch", "fbgemm_gpu", "torchrec"):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken binary package may raise anything
            root = error.__cause__ or error  # torch hides the missing symbol behind its own error
            reason = next(iter(str(root).strip().splitlines()), "no reason given")
            problem = f"`import {module}` fails with {type(root).__name__}: {reason}"
            break
    if not problem:
        return found
    needed = " or ".join(map(str, SUPPORTED))
    commands = "\n          ".join(found.repair())
    text = (
        f"torchrec_freq cannot be used: {problem}.\n  found:  {found}\n  needed: {needed}\n"
        f"  repair: {commands}\n      or, in a clone of the repository: make -B setup"
    )
    # With the name, `python -m torchrec_freq` prints the message without a trace.
    raise StackError(text, name="torchrec_freq")


def pins(torch: str = SUPPORTED[0].torch) -> str:
    """Constraints, one a line, that hold pip to the stack of this torch, as `2.13`."""
    for s in SUPPORTED:
        if minor(torch) == minor(s.torch):
            return f"torch=={s.torch}\ntorchrec=={s.torchrec}\nfbgemm-gpu=={s.fbgemm}"
    choices = ", ".join(minor(s.torch) for s in SUPPORTED)
    raise ValueError(f"torch {torch} is not supported. Use one of {choices}.")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    try:
        build = "cuda" if has_nvidia_driver() else "cpu"
        print({"pins": pins, "build": lambda: build, "check": check}[command](*arguments))
    except (ValueError, StackError) as refusal:
        sys.exit(str(refusal))
