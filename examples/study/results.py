"""The results file: one JSON line a run."""

import json
from pathlib import Path
from typing import Any

from examples.study.config import Run

Result = dict[str, Any]


class Results:
    """What is known so far. A run that has its line is not run again.

    Args:
        path: the file; made with the first result. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results: dict[str, Result] = {}
        if path.exists():
            *whole, rest = path.read_text().split("\n")
            for line in whole:
                result = json.loads(line)
                self._results[_key({name: result[name] for name in KEY})] = result
            if rest:
                path.write_text("".join(line + "\n" for line in whole))

    def get(self, run: Run) -> Result | None:
        return self._results.get(_key(run.key()))

    def add(self, run: Run, result: Result, *, write: bool = True) -> None:
        """Args: write: False on all ranks but one."""
        self._results[_key(run.key())] = result
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(result) + "\n")


KEY = ("data", "model", "arm", "lr", "batch_size", "epochs", "seed")


def _key(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)
