"""Every command of `loraga-dist`: its help, its arguments, and what it does with them."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraga_dist.errors import UserError, VerificationError
from loraga_dist.ranks.session import run_alone, run_as_rank
from loraga_dist.ranks.words import require_said, say

if TYPE_CHECKING:
    from loraga_dist.ranks.stop import StopRequest
    from loraga_dist.ranks.world import World

_OVERRIDES = "Any key of the file can be given as --section.key value."


@dataclass(frozen=True)
class Command:
    """One command: its arguments, and what it does with them and the `--section.key value` that follow."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Sequence[str]], int]
    """Returns the exit code; never raises for what a user or a machine did."""
    takes_overrides: bool = False


def _add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file; `loraga-dist config` prints one to fill in")


def _add_init(parser: argparse.ArgumentParser) -> None:
    _add_config_file(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
    # the deepspeed launcher adds it; LOCAL_RANK says the same
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.epilog = _OVERRIDES


def _init(options: argparse.Namespace, overrides: Sequence[str], world: World, stop: StopRequest) -> None:
    from loraga_dist.artifacts.report import versions
    from loraga_dist.config import load_config
    from loraga_dist.publish.text import print_summary
    from loraga_dist.run.pipeline import dry_run, run

    with world.together():
        extra = ["--output.overwrite", "true"] if options.overwrite else []
        config = load_config(options.config, [*overrides, *extra])
    world.require_same(versions(), "install the same on every node")
    world.require_same(config.model_dump(mode="json"), "start all ranks with the same file and options")
    if options.dry_run:
        dry_run(config, world, stop)
        return
    report, verified = run(config, world, stop)
    if world.is_main:
        print_summary(report, config.output.dir, verified)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_config_file(parser)
    parser.add_argument("--ranks", type=_positive(int), default=1, help="processes, one per device (default 1)")
    parser.add_argument("--gib_per_rank", type=_positive(float), help="memory of one device; says what fits")
    parser.add_argument("--device_tflops", type=_positive(float), help="peak of one device; gives a time range")
    parser.add_argument("--link_gbps", type=_positive(float), help="Gbit/s that a rank receives; gives a time")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="what will compute; by default what this machine has, or a GPU where it is described",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = _OVERRIDES


def _path(text: str) -> Path:
    path = Path(text)
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}; write another path") from error
    return path


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = "number above 0"  # argparse names it in its message
    return parse


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    import torch

    from loraga_dist.config import load_config, require_filled_in
    from loraga_dist.forecast.forecaster import Forecaster
    from loraga_dist.forecast.report import PlanReport
    from loraga_dist.forecast.text import print_plan

    config = load_config(options.config, overrides)
    require_filled_in(config, "model")
    is_cpu = not (torch.cuda.is_available() or options.gib_per_rank or options.device_tflops)
    device = options.device or ("cpu" if is_cpu else "cuda")
    report = PlanReport(
        forecaster=Forecaster.of_config(config, options.ranks, torch.device(device)),
        gib_per_rank=options.gib_per_rank,
        device_tflops=options.device_tflops,
        link_gbps=options.link_gbps,
    )
    if options.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print_plan(report)
    require_said()


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=_path)
    parser.add_argument("--base", type=_path, help="directory of the original model, if it is not where it was")


def _verify(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from loraga_dist.artifacts.names import REPORT
    from loraga_dist.artifacts.reading import named_base
    from loraga_dist.artifacts.verify import bytes_to_verify, verify
    from loraga_dist.ranks.progress import phase

    directory, base = options.directory, options.base
    if not directory.is_dir():
        raise UserError("directory", str(directory), "is not there; write an output directory")
    if not (directory / REPORT).exists():
        raise UserError("directory", str(directory), f"has no {REPORT}; write the directory of a finished run")
    if base is not None:
        named_base(base)
    with phase("verify", bytes_to_verify(directory), "B", shown=sys.stderr.isatty()) as progress:
        result = verify(directory, base=base, on_progress=progress.advance)
    if not result.ok:
        first, *others = result.problems
        error = VerificationError(first)
        for problem in others:
            error.add_note(problem)
        raise error
    for note in result.notes:
        say(f"note: {note}")
    units = result.max_rounding_units
    checked = "" if units is None else f", off by {units:.2f} of one rounding"
    say(f"{directory}: verified, {result.num_targets} targets{checked}", sys.stdout)
    require_said()


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--init", type=_path, required=True, help="loraga_init in its output directory")
    parser.add_argument("--trained", type=_path, required=True, help="the adapter as the trainer saved it")
    parser.add_argument("--to", type=_path, help="where the adapter for the original base goes")
    parser.add_argument("--rank", type=int, help="truncate to this rank; by default all that the update has")
    parser.add_argument(
        "--per_expert", action="store_true", help="experts by their names in the checkpoint: for servers, not for PEFT"
    )
    parser.add_argument("--merge", type=_path, help="where a merged model goes")
    parser.add_argument("--base", type=_path, help="directory of the original model, if it is not where it was")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results of convert")


def _convert(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from loraga_dist.commands.convert import convert, how_to_serve

    found = convert(
        options.init,
        options.trained,
        to=options.to,
        merge=options.merge,
        rank=options.rank,
        per_expert=options.per_expert,
        base=options.base,
        overwrite=options.overwrite,
        show_progress=sys.stderr.isatty(),
    )
    for warning in found.warnings:
        say(f"warning: {warning}")
    if found.r is not None:
        worst = min(found.kept_energy, key=found.kept_energy.__getitem__)
        say(
            f"{options.to}: LoRA of rank {found.r} on {found.base}, {found.num_targets} targets; "
            f"kept energy {found.total_kept_energy:.6f}, least {found.kept_energy[worst]:.6f} in {worst}",
            sys.stdout,
        )
        for line in how_to_serve(options.to, found):
            say(f"serve: {line}", sys.stdout)
    if options.merge is not None:
        say(f"{options.merge}: {found.base} with the update of {found.num_targets} targets merged in", sys.stdout)


def _add_materialize_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=_path, help="an output directory without residual_base")
    parser.add_argument("--to", type=_path, help="by default residual_base/ in that directory")
    parser.add_argument("--base", type=_path, help="directory of the original model, if it is not where it was")


def _materialize_base(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from loraga_dist.commands.materialize import materialize_base

    path = materialize_base(options.directory, to=options.to, base=options.base, show_progress=sys.stderr.isatty())
    say(f"{path}: the base that loraga_init is trained on, verified", sys.stdout)


def _add_rebuild(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=_path, help="an output directory with its factors/")
    parser.add_argument("--to", type=_path, required=True, help="the new output directory")
    parser.add_argument("--base", type=_path, help="directory of the original model, if it is not where it was")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    parser.epilog = "Keys of lora, init and output can be given as --section.key value."


def _rebuild(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from loraga_dist.commands.rebuild import rebuild

    report, verified = rebuild(
        options.directory,
        options.to,
        overrides,
        base=options.base,
        overwrite=options.overwrite,
        show_progress=sys.stderr.isatty(),
    )
    for warning in report.warnings:
        say(f"warning: {warning}")
    say(f"{options.to}: from the factors of {options.directory}; verified: {verified}", sys.stdout)


def _add_clean(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=_path, help="the output directory that a run was to write")
    parser.add_argument("--yes", action="store_true", help="remove it; without, it is only shown")


def _clean(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from loraga_dist.commands.clean import clean

    was_there = options.directory.exists()
    found = clean(options.directory, remove=options.yes)
    for path, num_bytes in found:
        say(f"{path}: {num_bytes / 2**20:.1f} MiB", sys.stdout)
    if not found:
        say(f"{options.directory}: nothing is left beside it", sys.stdout)
    elif not options.yes:
        print("add --yes to remove all of it; a run that was interrupted would start over")
    elif options.directory.exists() and not was_there:
        say(f"removed; {options.directory} is put back, which a run was about to replace", sys.stdout)
    else:
        print("removed")
    require_said()


def _on_ranks(
    work: Callable[[argparse.Namespace, Sequence[str], World, StopRequest], None],
) -> Callable[[argparse.Namespace, Sequence[str]], int]:
    return lambda options, overrides: run_as_rank(lambda world, stop: work(options, overrides, world, stop))


def _alone(
    work: Callable[[argparse.Namespace, Sequence[str]], None],
) -> Callable[[argparse.Namespace, Sequence[str]], int]:
    return lambda options, overrides: run_alone(lambda: work(options, overrides))


def _config(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from loraga_dist.commands.recipe import recipe

    print(recipe(), end="")
    require_said()


COMMANDS = {
    "config": Command("print a configuration to copy, with every key's default", lambda parser: None, _alone(_config)),
    "init": Command("write a LoRA-GA start for a model", _add_init, _on_ranks(_init), takes_overrides=True),
    "plan": Command("say what init would take, and whether it fits", _add_plan, _alone(_plan), takes_overrides=True),
    "verify": Command("check an output directory from its files alone", _add_verify, _alone(_verify)),
    "convert": Command(
        "a trained adapter as a plain LoRA on the original base, or merged into it", _add_convert, _alone(_convert)
    ),
    "materialize-base": Command(
        "write residual_base/ of an output made without it", _add_materialize_base, _alone(_materialize_base)
    ),
    "rebuild": Command(
        "another rank, split or scale from the factors of an output",
        _add_rebuild,
        _alone(_rebuild),
        takes_overrides=True,
    ),
    "clean": Command("remove what a run that died has left beside its output", _add_clean, _alone(_clean)),
}
