"""The command line: ``python -m torchrec_freq COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from torchrec_freq.commands import count, doctor, plan, report

COMMANDS: Final = {"count": count, "doctor": doctor, "plan": plan, "report": report}
"""Modules with a ``HELP`` line, ``add_arguments(parser)``, and ``run(arguments)``, which may return
an exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        Exit status: 0, or the command's; 2 where the arguments or their files are wrong, with a
        line on stderr.
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
    except (ValueError, OSError) as error:
        print(f"{parsed.prog}: error: {error}", file=sys.stderr)
        return 2
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
