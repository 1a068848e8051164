"""torchx on this host: the command as a user gives it, and jobs run to their end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
COMPONENT = f"{REPOSITORY / 'launch' / 'components.py'}:dlrm"


def environment(**more: str) -> dict[str, str]:
    """That of this process on CPU, with the scripts of this Python first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return kept | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""} | more


def torchx(
    *arguments: str, home: Path, cwd: Path = REPOSITORY, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command, without what the user's own .torchxconfig says."""
    command = [sys.executable, "-m", "torchx.cli.main", *arguments]
    more["HOME"] = str(home)
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=240
    )


def run_locally(
    cwd: Path, logs: Path, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """`torchx run -s local_cwd launch/components.py:dlrm ARGUMENTS` in ``cwd``, to its end.

    Exits with 0 if the job succeeded. What it prints has the ranks' output; torchx's log files are
    under ``logs``.
    """
    command = ["run", "-s", "local_cwd", "-cfg", f"log_dir={logs}", COMPONENT, *arguments]
    return torchx(*command, home=logs, cwd=cwd, **more)
