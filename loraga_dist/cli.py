"""`loraga-dist init | plan | verify | convert ...`: arguments in, the exit code out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from loraga_dist.commands.table import COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done and verified, 2 wrong input, 3 failed, 143 stopped by a scheduler)."""
    parser = argparse.ArgumentParser(prog="loraga-dist", description="LoRA-GA starts for models of any size.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.help, allow_abbrev=False))
    options, overrides = parser.parse_known_args(arguments)
    command = COMMANDS[options.command]
    if overrides and not command.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    return command.run(options, overrides)


def init_main(arguments: Sequence[str] | None = None) -> int:
    """`launch/init.py`: the init command without its name, as launchers start it."""
    parser = argparse.ArgumentParser(description="Write a LoRA-GA start for a model.", allow_abbrev=False)
    init = COMMANDS["init"]
    init.add_arguments(parser)
    return init.run(*parser.parse_known_args(arguments))
