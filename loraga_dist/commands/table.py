"""The commands that work on files alone: convert, materialize-base, rebuild."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""

VLLM_SAVED_MODULES = {"classifier", "score"}
"""The only modules_to_save that vLLM reads: heads of classifiers."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its arguments, and what it does with them and the `--section.key value` that follow."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Sequence[str]], None]
    """Raises LoragaError."""
    takes_overrides: bool = False


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--init", type=Path, required=True, help="loraga_init in its output directory")
    parser.add_argument("--trained", type=Path, required=True, help="the adapter as the trainer saved it")
    parser.add_argument("--to", type=Path, help="where the adapter for the original base goes")
    parser.add_argument("--rank", type=int, help="truncate to this rank; by default all that the update has")
    parser.add_argument("--merge", type=Path, help="where a merged model goes")
    parser.add_argument("--base", type=Path, help="directory of the original model, if it is not where it was")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results of convert")


def _convert(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from loraga_dist.commands.convert import convert

    found = convert(
        options.init,
        options.trained,
        to=options.to,
        merge=options.merge,
        rank=options.rank,
        base=options.base,
        overwrite=options.overwrite,
        show_progress=sys.stderr.isatty(),
    )
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if found.r is not None:
        worst = min(found.kept_energy, key=found.kept_energy.__getitem__)
        print(
            f"{options.to}: LoRA of rank {found.r} on {found.base}, {found.num_targets} targets; "
            f"kept energy {found.total_kept_energy:.6f}, least {found.kept_energy[worst]:.6f} in {worst}"
        )
        for line in how_to_serve(options.to, found.base, found.r, found.saved_parameters):
            print(f"serve: {line}")
    if options.merge is not None:
        print(f"{options.merge}: {found.base} with the update of {found.num_targets} targets merged in")


def how_to_serve(adapter: Path, base: str, r: int, saved_parameters: Sequence[str]) -> list[str]:
    """What to type for vLLM and SGLang, or why they do not take it; one line each. r: of the adapter."""
    saved_modules = {name.split(".")[-2] for name in saved_parameters}
    fitting = [rank for rank in VLLM_LORA_RANKS if rank >= r]
    if saved_modules - VLLM_SAVED_MODULES:
        return ["vLLM and SGLang take no modules_to_save; use --merge"]
    if not fitting:
        return [f"vLLM takes adapters of rank {VLLM_LORA_RANKS[-1]} at most; use --rank or --merge"]
    lines = [f"vllm serve {base} --enable-lora --max-lora-rank {fitting[0]} --lora-modules tuned={adapter}"]
    if not saved_modules:
        server = "python -m sglang.launch_server"
        lines.append(f"{server} --model-path {base} --enable-lora --max-lora-rank {r} --lora-paths tuned={adapter}")
    return lines


def _add_materialize_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="an output directory without residual_base")
    parser.add_argument("--to", type=Path, help="by default residual_base/ in that directory")
    parser.add_argument("--base", type=Path, help="directory of the original model, if it is not where it was")


def _materialize_base(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from loraga_dist.commands.materialize import materialize_base

    path = materialize_base(options.directory, to=options.to, base=options.base, show_progress=sys.stderr.isatty())
    print(f"{path}: the base that loraga_init is trained on, verified")


def _add_rebuild(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="an output directory with its factors/")
    parser.add_argument("--to", type=Path, required=True, help="the new output directory")
    parser.add_argument("--base", type=Path, help="directory of the original model, if it is not where it was")
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
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{options.to}: from the factors of {options.directory}; verified: {verified}")


OFFLINE_COMMANDS = {
    "convert": Command(
        help="a trained adapter as a plain LoRA on the original base, or merged into it",
        add_arguments=_add_convert,
        run=_convert,
    ),
    "materialize-base": Command(
        help="write residual_base/ of an output made without it",
        add_arguments=_add_materialize_base,
        run=_materialize_base,
    ),
    "rebuild": Command(
        help="another rank, split or scale from the factors of an output",
        add_arguments=_add_rebuild,
        run=_rebuild,
        takes_overrides=True,
    ),
}
