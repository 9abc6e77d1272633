"""Another rank, split, scale or scheme from the factors of a finished output: no gradient is taken, no model loaded."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from loraga_dist.artifacts.adapter import AdapterFile
from loraga_dist.artifacts.factors import read_triplets
from loraga_dist.artifacts.layout import Layout, strangers
from loraga_dist.artifacts.names import (
    FACTORS,
    FACTORS_INDEX,
    FACTORS_STEM,
    LORAGA_INIT,
    REPORT,
    RESIDUAL_BASE,
    RESOLVED_CONFIG,
)
from loraga_dist.artifacts.reading import OriginalBase, named_base
from loraga_dist.artifacts.report import IdentityCheck, Rebuilt, Report, SpentBudget, TargetReport, versions
from loraga_dist.artifacts.residual import digest_base, start_magnitudes, write_model
from loraga_dist.artifacts.tensors import weight_chunks
from loraga_dist.artifacts.warnings import find_warnings
from loraga_dist.config import InitConfig, OutputConfig, load_config
from loraga_dist.errors import RunError, UserError
from loraga_dist.files.checksums import fingerprint
from loraga_dist.files.disk import naming_write_errors
from loraga_dist.files.safetensors_io import TensorSlot, scan_checkpoint
from loraga_dist.files.staging import free_place, whole_directory
from loraga_dist.files.stored_tensors import Slot
from loraga_dist.linalg import numerical_rank
from loraga_dist.model.base import DTYPES, factor_dtype
from loraga_dist.model.factors import make_factors, needs_weight, product_norm
from loraga_dist.model.plan import BEYOND
from loraga_dist.model.rank_budget import spend
from loraga_dist.model.targets import Target
from loraga_dist.ranks.progress import phase
from loraga_dist.ranks.world import World
from loraga_dist.request.request import understand
from loraga_dist.run.writing import Fingerprints, finish_directory, write_adapters
from loraga_dist.schemes import SCHEMES, LoraFactors, Scheme

_CHANGEABLE = {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_dropout"}
"""Keys of the section `lora` that the gradients do not depend on; all of `init` and `output` are such too."""


_OF_INIT_ALONE = {"report_to": "none", "push_to_hub": "null", "push_residual_base": "false"}
"""Keys of the section `output` that only `init` acts on, each with the value that turns it off."""


@dataclass(frozen=True, kw_only=True)
class _NewStart:
    """A new start from old factors: makes A0, B0 of one target at a time and notes what the report says of it."""

    config: InitConfig
    old: Report
    """Of the output that the factors come from."""
    targets: dict[str, Target]
    slots: dict[str, TensorSlot]
    """Of `factors/`."""
    index: Mapping[str, Slot]
    """Of the base's checkpoint."""
    reports: dict[str, TargetReport] = field(default_factory=dict)

    @property
    def compute_dtype(self) -> torch.dtype:
        assert self.old.identity_check is not None, "a run compares logits"
        return DTYPES[self.old.identity_check.dtype]

    def factors(self, target: Target) -> LoraFactors:
        name, scheme = target.name, SCHEMES[self.config.init.scheme]
        svd = read_triplets(name, self.slots)
        W = self._weight(target).to(self.compute_dtype) if needs_weight(self.config.init) else None
        dtype = factor_dtype(self.compute_dtype, self.index[target.weight_key], self.config.output.residual_dtype)
        made = make_factors(target, self.config.init, dtype, svd=svd, weight=W)
        before = self.old.targets[name]
        assert before.singular_values is not None and before.captured_energy is not None, "of a gradient"
        singular_values = svd.S_K[: scheme.num_triplets(target.r)].tolist()
        more_energy = _energy(singular_values) / (_energy(before.singular_values) or 1.0)  # of no gradient none
        found = {
            **TargetReport.of(target).model_dump(exclude_unset=True),
            "singular_values": singular_values,
            "numerical_rank": numerical_rank(svd.S_K, target.M, target.N),
            "captured_energy": min(1.0, before.captured_energy * more_energy),
            "offset_ratio": target.scaling * product_norm(made) / max(self._norm(target), 1e-30),
        }
        self.reports[name] = TargetReport(**before.model_dump() | found)
        return made

    def _weight(self, target: Target) -> Tensor:
        """As the model holds it."""
        stored = torch.cat([rows for _, rows in weight_chunks(target, self.index)])
        return stored if target.stored_transposed == target.transposed else stored.t()

    def _norm(self, target: Target) -> float:
        """||W||_F."""
        chunks = weight_chunks(target, self.index)
        return math.fsum(rows.double().square().sum().item() for _, rows in chunks) ** 0.5

    def magnitudes(self, target: Target, A_RN: Tensor, B_MR: Tensor) -> Tensor:
        changes_base = SCHEMES[self.config.init.scheme].changes_base
        return start_magnitudes(self.index, target, None if changes_base else (A_RN, B_MR))

    def report(self, source: Path, fingerprints: Fingerprints, seconds: float) -> Report:
        """The old report with what is new, once all factors have been made. seconds: that it all took."""
        old, targets = self.old, list(self.targets.values())
        assert old.identity_check is not None, "a run compares logits"
        warnings = find_warnings(
            self.config.init,
            self.reports,
            stopped_by=old.stopped_by,
            refine_passes=old.refine_passes,
            left_out=old.left_out,
            cautions=old.cautions,
        )
        return old.model_copy(
            update={
                "config": self.config,
                "residual_fingerprint": fingerprints.residual,
                "adapter_fingerprint": fingerprints.adapter,
                "factors_fingerprint": fingerprints.factors,
                "model_files": dict(fingerprints.model_files),
                "versions": versions(),
                "targets": self.reports,
                "rank_budget": SpentBudget.of(self.config.init, targets),
                "step": old.step
                if (self.config.init, self.config.lora) == (old.config.init, old.config.lora)
                else None,
                # no model was loaded to compare logits
                "identity_check": IdentityCheck(
                    max_abs_logit_diff=None, max_abs_logit=None, dtype=old.identity_check.dtype
                ),
                "warnings": warnings + _beyond_convergence(self.reports, SCHEMES[self.config.init.scheme]),
                "rebuilt": Rebuilt(source=str(source.resolve()), seconds=seconds),
            }
        )


def rebuild(
    source: Path,
    to: Path,
    overrides: Sequence[str] = (),
    *,
    base: Path | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> tuple[Report, str]:
    """Write the output directory `to` from `factors/` of the output directory `source`, under other settings.

    overrides: `--section.key value` over the source's configuration; keys that the gradients depend on are refused.
    base: the original model, if it is not where the report says. With no overrides the adapters are the source's, bit
    by bit. Returns the report and what was verified. Raises UserError for settings that the factors do not allow, and
    RunError when writing or the verification fails.
    """
    started = time.monotonic()
    try:
        old = Report.read(source)
        if old.scheme.source != "gradient":
            problem = f"was made by {old.config.init.scheme} and holds no gradients; run loraga-dist init"
            raise UserError("directory", str(source), problem)
        slots = scan_checkpoint(source / FACTORS, FACTORS_STEM)
        factors_fingerprint = fingerprint(digest_base(slots, slots))
    except RunError as error:
        raise UserError("directory", str(source), f"{error}; write the directory of a finished run") from error
    if old.factors_fingerprint not in (None, factors_fingerprint) or not _are_of(slots, old):
        problem = f"its {FACTORS}/ is not of the run that its {REPORT} tells of; copy the output directory again"
        raise UserError("directory", str(source), problem)
    config = _new_config(source, to, overrides, base)
    if SCHEMES[config.init.scheme].source != "gradient":
        problem = f"does not start from the gradients that {source} holds; run loraga-dist init with it"
        raise UserError("init.scheme", config.init.scheme, problem)
    # no model runs: what the source's run had of kernels, devices and files of settings need not be here
    of_its_run = {"attn_implementation": None, "dtype": "auto"}
    model = config.model.model_copy(update=of_its_run)
    anywhere = config.model_copy(update={"model": model, "deepspeed": None})
    request = understand(anywhere, World.alone(), reads_data=False)
    base_dir, index = request.base.directory, request.base.index
    destination = free_place(to, "--to", strangers=strangers, overwrite=overwrite, inputs=[source, base_dir])
    if request.plan.owners.keys() != old.targets.keys():
        raise UserError("directory", str(source), "holds gradients of other targets than this transformers finds")
    model = request.config.model.model_copy(update={key: getattr(config.model, key) for key in of_its_run})
    config, targets = request.config.model_copy(update={"model": model, "deepspeed": config.deepspeed}), request.targets
    lora = config.lora
    if config.init.rank_budget is not None:
        singular_values = {target.name: slots[f"{target.name}.S"].read().tolist() for target in targets}
        targets, lora = spend(targets, singular_values, lora, config.init)
    held = {target.name: slots[f"{target.name}.S"].shape[0] for target in targets}
    _require_triplets(config, targets, held)

    new_start = _NewStart(
        config=config,
        old=old,
        targets={target.name: target for target in targets},
        slots=slots,
        index=request.base.weights,
    )
    layout = replace(Layout.of(request, targets), config=config, num_triplets=held)
    num_bytes = layout.num_bytes
    with whole_directory(destination, sum(num_bytes.values())) as directory:
        with naming_write_errors(directory):
            for name in layout.directories:
                (directory / name).mkdir()
        adapter_fingerprint = write_adapters(
            directory, layout, lora, new_start.factors, index, new_start.magnitudes if lora.use_dora else None
        )
        _copy_factors(source / FACTORS, directory / FACTORS, slots)
        residual_fingerprint = None
        if RESIDUAL_BASE in layout.directories:
            with phase("write", num_bytes[RESIDUAL_BASE], "B", shown=show_progress) as progress:
                digests = write_model(
                    base_dir,
                    index,
                    targets,
                    AdapterFile(directory / LORAGA_INIT).factors,
                    directory / RESIDUAL_BASE,
                    config.output.residual_dtype,
                    on_progress=progress.advance,
                )
            original = OriginalBase(directory=base_dir, index=index)
            original.require_same(old, {key: read for key, (read, _) in digests.items()})
            residual_fingerprint = fingerprint({key: found for key, (_, found) in digests.items()})
        fingerprints = Fingerprints(
            base=old.base_fingerprint,
            residual=residual_fingerprint,
            adapter=adapter_fingerprint,
            factors=factors_fingerprint,
            model_files=layout.digest_model_files(base_dir),
        )
        new = new_start.report(source, fingerprints, time.monotonic() - started)
        verified = finish_directory(directory, new, World.alone())
    return new, verified


def _new_config(source: Path, to: Path, overrides: Sequence[str], base: Path | None) -> InitConfig:
    old = load_config(source / RESOLVED_CONFIG)
    # the source's own push and trackers were its run's
    of_init = [word for key, value in _OF_INIT_ALONE.items() for word in (f"--output.{key}", value)]
    words = [*of_init, *overrides, "--output.dir", str(to.expanduser().resolve())]
    new = load_config(source / RESOLVED_CONFIG, ["--init.stable_gamma", "null", *words])
    if new.init.scheme == old.init.scheme:  # another has a gamma of its own
        new = load_config(source / RESOLVED_CONFIG, words)
    if any(word.split("=")[0] == "--output.dir" for word in overrides):
        raise UserError("output.dir", new.output.dir, "is what --to names; leave it out")
    changed = {
        f"{section}.{key}": value
        for section in ("model", "calibration", "gradient", "lora")
        for key, value in getattr(new, section)
        if value != getattr(getattr(old, section), key) and not (section == "lora" and key in _CHANGEABLE)
    }
    for key in _OF_INIT_ALONE:
        if getattr(new.output, key) != OutputConfig.model_fields[key].default:
            problem = "is for loraga-dist init alone; upload the directory with `hf upload`, or leave this out"
            raise UserError(f"output.{key}", getattr(new.output, key), problem)
    whitens, whitened = (SCHEMES[config.init.scheme].whitens for config in (new, old))
    if whitens != whitened:
        changed["init.scheme"] = new.init.scheme
    changed |= {
        f"init.{key}": getattr(new.init, key)
        for key in ("whitening", "damping")
        if getattr(new.init, key) != getattr(old.init, key)
    }
    if new.deepspeed != old.deepspeed:
        changed["deepspeed"] = new.deepspeed
    if new.init.searches_step:
        raise UserError("init.step", None, "its length is searched with the model; write a number, 0.004 for one")
    if changed:
        key, value = next(iter(changed.items()))
        raise UserError(key, value, f"is settled by the gradients of {source}; run loraga-dist init with it")
    if base is not None:
        model = new.model.model_copy(update={"name_or_path": str(named_base(base)), "revision": None})
        new = new.model_copy(update={"model": model})
    return new


def _are_of(slots: Mapping[str, TensorSlot], report: Report) -> bool:
    """Tell whether the report names these singular values: of every version's reports."""
    said = {name: target.singular_values or [] for name, target in report.targets.items()}
    return all(
        f"{name}.S" in slots and slots[f"{name}.S"].read()[: len(values)].tolist() == values
        for name, values in said.items()
    )


def _copy_factors(source: Path, destination: Path, slots: Mapping[str, TensorSlot]) -> None:
    with naming_write_errors(destination):
        for path in (source / FACTORS_INDEX, *{slot.path for slot in slots.values()}):
            shutil.copyfile(path, destination / path.name)


def _require_triplets(config: InitConfig, targets: Sequence[Target], held: Mapping[str, int]) -> None:
    num_triplets = SCHEMES[config.init.scheme].num_triplets
    largest = {name: max(r for r in range(K + 1) if num_triplets(r) <= K) for name, K in held.items()}
    for target in targets:
        if target.r > largest[target.name]:
            by_default = target.r == config.lora.r
            fitting = min(largest.values()) if by_default else largest[target.name]
            raise UserError(
                "lora.r" if by_default else "lora.rank_pattern",
                target.r,
                f"needs {num_triplets(target.r)} singular directions and factors/ holds {held[target.name]} of "
                f"{target.name}; write {fitting} or less, or run loraga-dist init",
            )


def _beyond_convergence(reports: Mapping[str, TargetReport], scheme: Scheme) -> list[str]:
    """A warning where more triplets are used than calibration was asked for; the rest of `factors/` is a by-product, or
    what a regression has beside them."""
    beyond = [
        name
        for name, found in reports.items()
        if (converged := found.num_converged or 0) < min(found.shape)
        and len(found.singular_values or ()) > converged - (BEYOND if scheme.whitens else 0)
    ]
    if not beyond:
        return []
    return [
        f"more singular directions than calibration was asked for in {len(beyond)} targets ({beyond[0]}, ...): the "
        "last of them are less accurate; run loraga-dist init with this lora.r where that matters"
    ]


def _energy(singular_values: Sequence[float]) -> float:
    return math.fsum(value**2 for value in singular_values)
