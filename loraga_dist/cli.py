"""`loraga-dist plan | init | verify | convert ...`: arguments in, one line per mistake out, and the exit code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from loraga_dist.commands.table import OFFLINE_COMMANDS, Command
from loraga_dist.errors import LoragaError, RunError, UserError

if TYPE_CHECKING:
    from loraga_dist.ranks.watch import Watch
    from loraga_dist.ranks.world import World
    from loraga_dist.run.checkpointer import StopRequest


_OVERRIDES = "Any key of the file can be given as --section.key value."


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done and verified, 2 wrong input, 3 failed)."""
    parser = argparse.ArgumentParser(prog="loraga-dist", description="LoRA-GA starts for models of any size.")
    commands = parser.add_subparsers(dest="command", required=True)
    init = commands.add_parser("init", help="write a LoRA-GA start for a model", allow_abbrev=False)
    add_init_arguments(init)
    plan = commands.add_parser("plan", help="say what init would take, and whether it fits", allow_abbrev=False)
    add_plan_arguments(plan)
    verify = commands.add_parser("verify", help="check an output directory from its files alone", allow_abbrev=False)
    verify.add_argument("directory", type=Path)
    verify.add_argument("--base", type=Path, help="directory of the original model, if it is not where it was")
    for name, command in OFFLINE_COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.help, allow_abbrev=False))
    options, rest = parser.parse_known_args(arguments)
    if options.command == "init":
        return run_init(options, rest)
    if options.command == "plan":
        return run_plan(options, rest)
    offline = OFFLINE_COMMANDS.get(options.command)
    if rest and not (offline and offline.takes_overrides):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if offline:
        return run_offline(offline, options, rest)
    return run_verify(options.directory, options.base)


def init_main(arguments: Sequence[str] | None = None) -> int:
    """`launch/init.py`: the init command without its name, as launchers start it."""
    parser = argparse.ArgumentParser(description="Write a LoRA-GA start for a model.", allow_abbrev=False)
    add_init_arguments(parser)
    options, rest = parser.parse_known_args(arguments)
    return run_init(options, rest)


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it; LOCAL_RANK says the same
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
    parser.epilog = _OVERRIDES


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--ranks", type=_positive(int), default=1, help="processes, one per device (default 1)")
    parser.add_argument("--gib_per_rank", type=_positive(float), help="memory of one device; says what fits")
    parser.add_argument("--device_tflops", type=_positive(float), help="peak of one device; gives a time range")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what will compute (default cuda)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = _OVERRIDES


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = "number above 0"  # argparse names it in its message
    return parse


def run_plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    _prepare_libraries()
    try:
        import torch

        from loraga_dist.config import load_config
        from loraga_dist.forecast.forecaster import Forecaster
        from loraga_dist.forecast.report import plan_report, print_plan

        config = load_config(options.config, overrides)
        forecaster = Forecaster.of_config(config, options.ranks, torch.device(options.device))
        report = plan_report(
            forecaster, options.ranks, gib_per_rank=options.gib_per_rank, device_tflops=options.device_tflops
        )
    except LoragaError as error:
        return _report_failure(error)
    except Exception as error:
        traceback.print_exc()
        return _report_failure(RunError(f"{type(error).__name__}: {error}"))
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_plan(report)
    return 0


def run_init(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    _prepare_libraries()
    from loraga_dist.run.checkpointer import StopRequest

    with StopRequest() as stop:
        return _run_init(options, overrides, stop)


def _run_init(options: argparse.Namespace, overrides: Sequence[str], stop: StopRequest) -> int:
    from loraga_dist.ranks.watch import Watch
    from loraga_dist.ranks.world import World

    try:
        world = World.start()
    except LoragaError as error:
        return _report_failure(error)
    watch = None
    try:
        if world.size > 1:
            watch = Watch(world)
        from loraga_dist.artifacts.report import versions
        from loraga_dist.config import load_config
        from loraga_dist.run.pipeline import dry_run, run

        with world.together():
            extra = ["--output.overwrite", "true"] if options.overwrite else []
            config = load_config(options.config, [*overrides, *extra])
        world.require_same(versions(), "install the same on every node")
        world.require_same(config.model_dump(mode="json"), "start all ranks with the same file and options")
        if options.dry_run:
            dry_run(config, world)
            _leave_together(world, watch)
            return 0
        report, verified = run(config, world, stop)
        if world.is_main:
            from loraga_dist.publish.text import print_summary

            print_summary(report, config.output.dir, verified)
    except LoragaError as error:
        if not error.on_all_ranks and watch is not None:
            # the others may wait for this rank in a collective
            watch.fail(f"failed: {error}", error.exit_code, perhaps_of_another=False)
        if world.is_main:
            _report_failure(error)
        _leave_together(world, watch)
        return error.exit_code
    except KeyboardInterrupt:
        print("loraga-dist: interrupted", file=sys.stderr, flush=True)
        leave_process(130)
    except Exception as error:
        if watch is not None:
            # what a collective says when another rank has gone is a RuntimeError
            of_another = isinstance(error, RuntimeError)
            if not of_another:
                traceback.print_exc()
            watch.fail(f"failed: {type(error).__name__}: {error}", 3, perhaps_of_another=of_another)
        traceback.print_exc()
        return _report_failure(RunError(f"{type(error).__name__}: {error}"))
    _leave_together(world, watch)
    return 0


def run_verify(directory: Path, base: Path | None) -> int:
    from loraga_dist.artifacts.verify import bytes_to_verify, verify
    from loraga_dist.ranks.progress import phase

    if not directory.is_dir():
        return _report_failure(UserError("directory", str(directory), "is not there; write an output directory"))
    if base is not None and not base.is_dir():
        return _report_failure(UserError("--base", str(base), "is not there; write the original model's directory"))
    with phase("verify", bytes_to_verify(directory), "B", shown=sys.stderr.isatty()) as progress:
        result = verify(directory, base=base, on_progress=progress.advance)
    for problem in result.problems:
        print(f"loraga-dist: {problem}", file=sys.stderr)
    if result.ok:
        checked = f", off by {result.max_rounding_units:.2f} of one rounding" if result.residual_checked else ""
        print(f"{directory}: verified, {result.num_targets} targets{checked}")
    return 0 if result.ok else 3


def run_offline(command: Command, options: argparse.Namespace, overrides: Sequence[str]) -> int:
    _prepare_libraries()
    try:
        command.run(options, overrides)
    except LoragaError as error:
        return _report_failure(error)
    except Exception as error:
        traceback.print_exc()
        return _report_failure(RunError(f"{type(error).__name__}: {error}"))
    return 0


def _leave_together(world: World, watch: Watch | None) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # a rank that exits early would have the launcher kill the one that is still printing
    try:
        world.barrier()
    except RuntimeError as error:
        if watch is not None:
            watch.fail(f"failed: {error}", 3, perhaps_of_another=True)
        raise
    if watch is not None:
        watch.stop()
        # rank 0 serves the others' watches; whoever is gone by now had done its work
        with suppress(RuntimeError):
            world.barrier()
    world.stop()


def leave_process(exit_code: int) -> NoReturn:
    """End this process without the interpreter's own teardown.

    DeepSpeed keeps the process group, so gloo's threads are still there when a rank exits, and now and then abort it
    (SIGABRT) after all its work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _report_failure(error: LoragaError) -> int:
    for line in (str(error), *getattr(error, "__notes__", ())):
        print(f"loraga-dist: {line}", file=sys.stderr, flush=True)
    return error.exit_code


def _prepare_libraries() -> None:
    # read when torch is imported: threads that spin while they wait slow down every rank on the same cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
