"""The command line: ``python -m torchrec_freq COMMAND``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

from torchrec_freq.cli import count, doctor, plan, report, resize
from torchrec_freq.cli.terminal import visible

COMMANDS: Final = {
    "count": count,
    "doctor": doctor,
    "plan": plan,
    "report": report,
    "resize": resize,
}
"""Modules with a ``HELP`` line, ``add_arguments(parser)``, and ``run(arguments)``, which may return
an exit status. It raises a ValueError that names the file or table where arguments or data are
wrong, an OSError where a file cannot be read or written; nothing is written then."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        Exit status: 0, or the command's; 2 where the arguments or their files are wrong, 130 after
        Ctrl-C, both with a line on stderr; 141 where nobody reads the output to its end.
    """
    parser = argparse.ArgumentParser(
        prog="python -m torchrec_freq", description="Tools for FrequencySGD and its row counts."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, prog=command.prog)
    parsed = parser.parse_args(arguments)
    try:
        status: int | None = parsed.run(parsed)
        print(end="", flush=True)  # a full disk shows here, not when Python ends
    except KeyboardInterrupt:
        print(f"{parsed.prog}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        print(f"{parsed.prog}: error: {visible(str(error))}", file=sys.stderr)
        return 2
    return status or 0


def run_program() -> int:
    """The command line as a program of its own."""
    # What a terminal has no letters for is still shown.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    status = main()
    try:
        print(end="", flush=True)
    except OSError:  # main has said so; Python would again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


if __name__ == "__main__":
    sys.exit(run_program())
