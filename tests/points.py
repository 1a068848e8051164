"""Named points of a program at which a process kills itself."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """A call of a function.

    Attributes:
        owner, name: the function is an attribute of something.
        call: which one, from 1.
        after: not before it, but when it has done its work.
        rank: whose call.
    """

    owner: Any
    name: str
    call: int = 1
    after: bool = False
    rank: int = 0

    def arm(self) -> None:
        """From here on this process dies at the point."""
        function, calls = getattr(self.owner, self.name), []

        def deadly(*arguments: Any, **options: Any) -> Any:
            calls.append(self)
            hit = len(calls) == self.call
            if hit and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if hit:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(self.owner, self.name, deadly)
