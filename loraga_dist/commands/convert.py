"""A trained adapter as a plain LoRA on the original base, or merged into it: offline, one matrix at a time."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loraga_dist.artifacts.adapter import AdapterFile, adapter_entries, write_adapter
from loraga_dist.artifacts.names import CONVERSION
from loraga_dist.artifacts.reading import OriginalBase
from loraga_dist.artifacts.report import versions
from loraga_dist.artifacts.residual import digest_base, write_model
from loraga_dist.artifacts.tensors import num_bytes_of
from loraga_dist.commands.trained import Update, open_update
from loraga_dist.errors import RunError, UserError
from loraga_dist.files.checksums import is_as_written, sha256_of
from loraga_dist.files.disk import UNFINISHED_MARK, read_json, write_json
from loraga_dist.files.parallel import over_cores
from loraga_dist.files.safetensors_io import TensorSlot
from loraga_dist.files.staging import Destination, files_in, free_place, whole_directory
from loraga_dist.files.stored_tensors import entries_of
from loraga_dist.linalg import product_svd
from loraga_dist.model.base import find_base_model, model_files, quantization_of
from loraga_dist.model.targets import Target, meta_copy, require_targets, tied_parameters
from loraga_dist.ranks.progress import phase
from loraga_dist.schemes import LoraFactors

_MAX_RELATIVE_ERROR = 1e-6
"""Of a stored update, beside what truncation drops; two roundings to float32 cost about a tenth of it."""

VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""

VLLM_SAVED_MODULES = {"classifier", "score"}
"""The only modules_to_save that vLLM reads: heads of classifiers."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` made."""

    init: str
    trained: str
    base: str
    """The original base, as the adapter names it."""
    revision: str | None
    task_type: str | None
    trust_remote_code: bool
    num_targets: int
    r: int | None = None
    """Of the adapter; None if only a merged model was written."""
    kept_energy: dict[str, float] = field(default_factory=dict)
    """Share of every target's ||update||_F^2 that the adapter holds."""
    total_kept_energy: float = 1.0
    """The same over all targets together."""
    has_stacks: bool = False
    """The adapter has experts in PEFT's layout, all those of a parameter in one tensor."""
    saved_parameters: list[str]
    """Parameters that were trained whole and went along."""
    warnings: list[str]


def convert(
    init: Path,
    trained: Path,
    *,
    to: Path | None = None,
    merge: Path | None = None,
    rank: int | None = None,
    per_expert: bool = False,
    base: Path | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Conversion:
    """Write an adapter trained from `init` for the original base: `to` as a plain LoRA, `merge` as a merged model.

    Per target the update s_t B_t A_t - s_0 B_0 A_0 (s_t B_t A_t on an unchanged base) is factorized anew in float64
    before any cast, because storing [A_t; A_0] in 16 bits would lose much of a small difference of large terms. The
    adapter has one rank, no patterns and scaling 1 (`lora_alpha` = r): all that every server reads. Smaller updates are
    padded with zeros.

    rank: of the adapter, the best approximation of that rank; by default the 2r (r on an unchanged base) that hold the
    whole update. `merge` always takes the whole update. per_expert: experts' matrices by their names
    in the checkpoint, for servers; PEFT loads the other layout. base: the original model, if it is not where the report
    says.
    Each output appears whole or not at all. The parameters are the command's options. Raises UserError for input that
    does not fit together, RunError when writing fails.
    """
    if to is None and merge is None:
        raise UserError("--to", None, "is missing; write a directory for the adapter, or --merge for a merged model")
    if rank is not None and rank < 1:
        raise UserError("--rank", rank, "must be 1 or more")
    update = open_update(init, trained)
    if to is not None and update.report.is_dora:
        problem = "cannot hold a trained DoRA: its magnitudes change weights by more than any low rank"
        raise UserError("--to", str(to), f"{problem}; write --merge DIR instead, for a merged model")
    parts = {name: _parts(target, per_expert=per_expert) for name, target in update.targets.items()}
    keys = [part.weight_key for each in parts.values() for part in each]
    if per_expert and len(keys) > len(set(keys)):
        problem = "but the checkpoint has all experts of a layer in one tensor; leave it out"
        raise UserError("--per_expert", True, f"names experts as the checkpoint does, {problem}")
    original = OriginalBase.open(update.report, base) if merge is not None or base is not None else None
    inputs = [init.parent, trained, *([original.directory] if original else [])]
    free = functools.partial(free_place, strangers=_strangers, overwrite=overwrite, inputs=inputs)
    merging = None if merge is None or original is None else _Merging(free(merge, "--merge"), original)
    adapter = None if to is None else free(to, "--to")
    if merging is not None:
        merging.require_possible(update, beside=adapter)
    elif original is not None:  # else it is held against the report as it is merged
        with phase("base", original.num_bytes, "B", shown=show_progress) as progress:
            original.require_same(update.report, digest_base(original.index, original.index, progress.advance))

    model = update.report.config.model
    found = Conversion(
        init=str(init),
        trained=str(trained),
        base=model.name_or_path if base is None or original is None else str(original.directory),
        revision=model.revision if base is None else None,
        task_type=update.task_type,
        trust_remote_code=model.trust_remote_code,
        num_targets=len(update.targets),
        has_stacks=not per_expert and any(target.stack for target in update.targets.values()),
        saved_parameters=list(update.saved),
        warnings=update.warnings,
    )
    if merging is not None:
        with whole_directory(merging.destination, merging.original.num_bytes) as directory:
            _write_merged(directory, update, merging.original, show_progress)
            _write_record(directory, found)
    if adapter is not None:
        r = rank or update.full_rank
        parts = {name: [_with_rank(part, r) for part in each] for name, each in parts.items()}
        written = [part for each in parts.values() for part in each]
        num_bytes = num_bytes_of(adapter_entries(written, use_dora=False, saved=entries_of(update.saved)).values())
        with whole_directory(adapter, num_bytes) as directory:
            found = _write_adapter(directory, update, found, parts, r, show_progress)
            _write_record(directory, found)
    return found


def how_to_serve(adapter: Path, found: Conversion) -> list[str]:
    """What to type for vLLM and SGLang, or why they do not take the adapter that was made; one line each."""
    r = found.r
    assert r is not None, "a merged model needs no words"
    saved_modules = {name.split(".")[-2] for name in found.saved_parameters}
    fitting = [rank for rank in VLLM_LORA_RANKS if rank >= r]
    if found.task_type == "SEQ_2_SEQ_LM":  # which neither has
        return []
    if saved_modules - VLLM_SAVED_MODULES:
        return ["vLLM and SGLang take no modules_to_save; use --merge"]
    if not fitting:
        return [f"vLLM takes adapters of rank {VLLM_LORA_RANKS[-1]} at most; use --rank or --merge"]
    base, named = shlex.quote(found.base), shlex.quote(f"tuned={adapter}")
    if found.revision is not None:
        base += f" --revision {shlex.quote(found.revision)}"
    if found.trust_remote_code:
        base += " --trust-remote-code"
    lines = [f"vllm serve {base} --enable-lora --max-lora-rank {fitting[0]} --lora-modules {named}"]
    if found.has_stacks:
        lines.append("where the checkpoint has its experts one by one, vLLM and SGLang want --per_expert")
    elif not saved_modules:
        server = "python -m sglang.launch_server"
        lines.append(f"{server} --model-path {base} --enable-lora --max-lora-rank {r} --lora-paths {named}")
    return lines


@dataclass(frozen=True)
class _Merging:
    """Where a merged model goes, and what it is merged into."""

    destination: Destination
    original: OriginalBase

    def require_possible(self, update: Update, *, beside: Destination | None) -> None:
        """Raise UserError for a base that this update cannot be added to, or a place that is also another output's."""
        path, base_dir = self.destination.path, self.original.directory
        model_files(base_dir)  # refuses what cannot be copied
        if (quantization := quantization_of(base_dir)) is not None:
            problem = f"adds to the base's weights, which are quantized ({quantization.get('quant_method')})"
            raise UserError("--merge", str(path), f"{problem}; write --to, and serve that adapter on the base")
        if beside is not None and (beside.path.is_relative_to(path) or path.is_relative_to(beside.path)):
            problem = f"and --to ({beside.path}) share a place; write two apart from each other"
            raise UserError("--merge", str(path), problem)
        if update.saved:
            _require_no_tied_copy(base_dir, update)


def refactorize(A_KN: Tensor, B_MK: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """A_RN, B_MR (fp32) whose product is the best rank-r approximation of B A, and all singular values S_J (fp64).

    The singular values are shared out evenly; what the product's rank is short of r is zeros.
    """
    U_MJ, S_J, Vh_JN = product_svd(B_MK, A_KN)
    kept = min(r, len(S_J))
    root_J = S_J[:kept].sqrt()
    A_RN, B_MR = torch.zeros(r, A_KN.shape[1]), torch.zeros(B_MK.shape[0], r)
    A_RN[:kept] = root_J[:, None] * Vh_JN[:kept]
    B_MR[:, :kept] = U_MJ[:, :kept] * root_J
    return A_RN, B_MR, S_J


def _parts(target: Target, *, per_expert: bool) -> list[Target]:
    """What is written of a target, one below the other; apart, an expert's is what the checkpoint has of it."""
    if not per_expert:
        return [target]
    target = dataclasses.replace(target, by_parameter=False)  # for PEFT, which does not read it
    if target.stack is None:
        return [dataclasses.replace(target, name=target.weight_key.removesuffix(".weight"))]
    return [
        dataclasses.replace(
            target, name=rows.key.removesuffix(".weight"), M=rows.count, weight_key=rows.key, stack=None
        )
        for rows in target.stored_rows
    ]


def _write_adapter(
    directory: Path,
    update: Update,
    found: Conversion,
    parts: dict[str, list[Target]],
    r: int,
    show_progress: bool,
) -> Conversion:
    """parts: of every target, with the rank of the adapter."""
    from peft import LoraConfig

    kept, total, made = {}, {}, dict[str, LoraFactors]()
    whole = {part.name: name for name, each in parts.items() for part in each}
    with phase("convert", 2 * len(parts), "targets", shown=show_progress) as progress:

        def factors(part: Target) -> LoraFactors:
            if part.name not in made:
                name = whole[part.name]
                A_RN, B_MR, S_J = refactorize(*update.factors(update.targets[name]), r)
                total[name] = S_J.square().sum().item()
                kept[name] = S_J[:r].square().sum().item()
                progress.advance()
                pieces = B_MR.split([each.M for each in parts[name]])
                made.update(
                    {
                        each.name: LoraFactors(A_RN=A_RN, B_MR=B_PR)
                        for each, B_PR in zip(parts[name], pieces, strict=True)
                    }
                )
            return made.pop(part.name)

        config = LoraConfig(
            task_type=update.task_type,  # type: ignore[arg-type]
            base_model_name_or_path=found.base,
            revision=found.revision,
            r=r,
            lora_alpha=r,
            modules_to_save=update.modules_to_save,
        )
        write_adapter(
            directory, config, [part for each in parts.values() for part in each], factors, saved=update.saved
        )
        stored = AdapterFile(directory)
        for name, each in parts.items():
            _check_stored(update, [stored.factors(part) for part in each], name, total[name], kept[name])
            progress.advance()
    return dataclasses.replace(
        found,
        r=r,
        kept_energy={name: kept[name] / total[name] if total[name] else 1.0 for name in kept},
        total_kept_energy=sum(kept.values()) / (sum(total.values()) or 1.0),
    )


def _with_rank(target: Target, r: int, scaling: float = 1.0) -> Target:
    return dataclasses.replace(target, r=r, lora_alpha=r, scaling=scaling)


def _check_stored(update: Update, parts: list[LoraFactors], name: str, energy: float, kept_energy: float) -> None:
    """Raise RunError unless the stored factors are as far from the update as truncation makes them."""
    A_RN, B_MR = torch.cat([part.A_RN for part in parts]), torch.block_diag(*(part.B_MR for part in parts))
    A_KN, B_MK = update.factors(update.targets[name])
    _, S_J, _ = product_svd(torch.cat([B_MK, -B_MR.double()], dim=1), torch.cat([A_KN, A_RN.double()]))
    error = (S_J.norm().item() - max(0.0, energy - kept_energy) ** 0.5) / (energy or 1.0) ** 0.5
    if not error <= _MAX_RELATIVE_ERROR:
        raise RunError(f"convert: {name} was stored with a relative error of {error:.1e}; is the disk sound?")


def _write_merged(directory: Path, update: Update, original: OriginalBase, show_progress: bool) -> None:
    base_dir, index = original.directory, original.index
    # what is subtracted is s B A
    targets = [_with_rank(target, update.rank_of(name), scaling=-1.0) for name, target in update.targets.items()]
    require_targets(index, targets)
    replaced = {_base_key(name, slot, index, update): slot for name, slot in update.saved.items()}
    with phase("merge", original.num_bytes, "B", shown=show_progress) as progress:
        digests = write_model(
            base_dir,
            index,
            targets,
            update.factors,
            directory,
            replaced=replaced,
            on_progress=progress.advance,
            magnitudes=update.trained.magnitude if update.report.is_dora else None,
        )
    base_digests = {key: base for key, (base, _) in digests.items()} | digest_base(index, replaced)
    original.require_same(update.report, base_digests)


def _require_no_tied_copy(base_dir: Path, update: Update) -> None:
    """Raise UserError if a parameter was trained that the model uses twice: training moved one of the two copies."""
    config = update.report.config
    here = {"name_or_path": str(base_dir), "revision": None, "dtype": "auto", "attn_implementation": None}
    base = find_base_model(config.model.model_copy(update=here), config.lora.task_type, torch.device("cpu"))
    tied = tied_parameters(meta_copy(base.model_class, base.config))
    for name in update.saved:
        if name in tied:
            problem = f"was trained alone, and the base ties it to {tied[name]}"
            raise UserError("--merge", name, f"{problem}; merge with PEFT's merge_and_unload instead")


def _base_key(name: str, slot: TensorSlot, index: dict[str, TensorSlot], update: Update) -> str:
    """The checkpoint key of a parameter that was trained whole."""
    key = update.report.saved_parameters.get(name, name)
    shape = index[key].shape if key in index else None
    if shape != slot.shape:
        problem = f"was trained with shape {slot.shape} and the base's checkpoint has {shape}"
        raise UserError("--merge", name, f"{problem}; merge with PEFT's merge_and_unload instead")
    return key


def _write_record(directory: Path, found: Conversion) -> None:
    """What the directory was made from; also by what a later `overwrite` knows it."""
    names = files_in(directory)
    files = {
        name: {"sha256": sha256, "mtime_ns": (directory / name).stat().st_mtime_ns}
        for name, sha256 in zip(names, over_cores(lambda name: sha256_of(directory / name), names), strict=True)
    }
    write_json(directory / CONVERSION, {**dataclasses.asdict(found), "versions": versions(), "files": files})


def _strangers(directory: Path) -> list[str] | None:
    """What is not of the conversion there, or no longer as it was written, None where there is none.

    An earlier version's record tells names alone, or nothing.
    """
    if not (directory / CONVERSION).is_file():
        return None
    found = files_in(directory)
    try:
        written = read_json(directory / CONVERSION).get("files", found)
        digests = written if isinstance(written, dict) else {}
        changed = {name for name in found if name in digests and not is_as_written(directory / name, **digests[name])}
        return [name for name in found if name in changed or name not in {CONVERSION, UNFINISHED_MARK, *written}]
    except (RunError, AttributeError, TypeError):  # another's file of that name
        return None
