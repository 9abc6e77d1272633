"""A start made in memory, put on disk before training, so that `convert` can take it out again afterwards."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loraga_dist.artifacts.adapter import AdapterFile, write_adapter
from loraga_dist.artifacts.layout import Layout
from loraga_dist.artifacts.names import LORAGA_INIT, REPORT, RESIDUAL_BASE
from loraga_dist.artifacts.reading import adapter_fingerprint
from loraga_dist.artifacts.report import SCHEMA_VERSION, Report, versions
from loraga_dist.artifacts.residual import digest_base
from loraga_dist.config import InitConfig, ModelConfig, OutputConfig
from loraga_dist.errors import UserError
from loraga_dist.files.checksums import shared_fingerprint, write_checksums
from loraga_dist.files.parallel import shares
from loraga_dist.files.quantized import dequantized
from loraga_dist.files.safetensors_io import TensorSlot
from loraga_dist.files.staging import StagedDirectory, free_place
from loraga_dist.files.stored_tensors import Slot, StoredTensor, entries_of
from loraga_dist.model.base import quantization_of, read_checkpoint_index, resolve_model_dir
from loraga_dist.model.conversion import stored_model
from loraga_dist.model.factors import split
from loraga_dist.model.selection import with_places
from loraga_dist.model.targets import Target, layers_of, meta_copy, require_saved, require_targets, saved_parameters
from loraga_dist.ranks.world import World
from loraga_dist.schemes import SCHEMES, LoraFactors, Scheme
from loraga_dist.sharding.base import Sharding
from loraga_dist.sharding.open import sharding_of
from loraga_dist.sharding.slices import part_of, square_norm, subtract_lowrank_
from loraga_dist.start.in_place import Start
from loraga_dist.start.place import adapted_parameter


def save_start(start: Start, directory: str | Path, *, base: str | Path | None = None) -> Path:
    """Write `loraga_init` and a report of a start that `initialize` made: what `convert` and `materialize-base` need.

    Call it on every rank after `initialize` and before training. Adapter parameters are gathered one at a time, to be
    held against what was put there. The model's weights are not gathered: each rank holds its own slices against the
    checkpoint, and takes its share of the checkpoint's digest.

    base: directory or hub id of the original model; by default the one the model was loaded from.
    Returns the directory, which appears whole or not at all. Raises UserError where it exists, where the model does not
    come from `base`, or has been trained already; RunError when writing fails.
    """
    world = World.current()
    model: Any = start.model
    scheme = SCHEMES[start.init.scheme]
    with world.together():
        # nothing is replaced: an adapter that was trained from an earlier start could not be converted without it
        destination = free_place(Path(directory), "directory")
        if model.peft_config["default"].use_dora:
            raise UserError("lora.use_dora", True, "its magnitudes are not saved; make the start with loraga-dist init")
        sharding = sharding_of(model, world, None, "loraga_dist.save_start")
        name = str(base) if base is not None else model.config.name_or_path
        revision = None if base is not None else getattr(model.config, "_commit_hash", None)
        base_dir = resolve_model_dir(name, revision)
        index = read_checkpoint_index(base_dir)
        weights = _weights(index, base_dir, scheme, next(model.parameters()).dtype)
        original = model.get_base_model()
        stored = stored_model(meta_copy(type(original), original.config), weights)
        targets = [with_places(target, stored) for target in start.targets]
        require_targets(weights, targets)
        saved = {name: stored.key_of(name) for name in saved_parameters(model.base_model.model)}
        require_saved(weights, saved)

    for layer, members in layers_of(targets).items():
        for target, made in zip(members, _gather_factors(model, layer, len(members), sharding), strict=True):
            offset = made if scheme.changes_base else None
            _require_start(model, target, offset, stored.tensor_of(target.parameter_name), name, sharding)
            with world.together():
                put = start.factors[target.name] if world.is_main else made
                if not (torch.equal(made.A_RN, put.A_RN) and torch.equal(made.B_MR, put.B_MR)):
                    raise UserError("start", target.name, "has been trained already; call save_start before training")
    share = shares(index, lambda key: index[key].num_bytes, world.size)[world.rank]
    with world.together():
        digests = digest_base(index, share)

    # the model's own, so that what a trainer saves of it names the base that it belongs on
    config = model.peft_config["default"]
    if scheme.changes_base:
        config.base_model_name_or_path, config.revision = f"{destination.path}/{RESIDUAL_BASE}", None
    else:
        config.base_model_name_or_path, config.revision = name, revision
    report = Report(
        schema_version=SCHEMA_VERSION,
        config=_known_config(start, name, base_dir, destination.path),
        base_fingerprint=shared_fingerprint(digests, world),
        residual_fingerprint=None,
        base_quantization=(quantization_of(base_dir) or {}).get("quant_method"),
        versions=versions(),
        targets={
            target.name: start.reports[target.name].model_copy(
                update={"weight_key": target.weight_key, "stack": target.stack}
            )
            for target in targets
        },
        saved_parameters=saved,
        coverage=start.coverage,
        step=start.step,
        identity_check=start.identity_check,
    )
    staged = StagedDirectory(destination, world)
    staged.create(Layout.of_report(report, entries_of(index)).num_bytes[LORAGA_INIT])
    try:
        with world.together():
            if world.is_main:
                (staged.path / LORAGA_INIT).mkdir()
                write_adapter(
                    staged.path / LORAGA_INIT,
                    copy.copy(config),
                    targets,
                    lambda target: start.factors[target.name],
                    saved={parameter: index[key] for parameter, key in saved.items()},
                )
                made = adapter_fingerprint(AdapterFile(staged.path / LORAGA_INIT))
                report.model_copy(update={"adapter_fingerprint": made}).write(staged.path / REPORT)
                write_checksums(staged.path, World.alone())
                staged.commit()
    except BaseException:
        if world.is_main:
            staged.discard()
        raise
    staged.drop_lock()
    return destination.path


def _weights(index: Mapping[str, TensorSlot], base_dir: Path, scheme: Scheme, dtype: torch.dtype) -> Mapping[str, Slot]:
    """The base's, of a quantized checkpoint what transformers dequantizes. Raises UserError for a start that would
    change those."""
    quantization = quantization_of(base_dir)
    if quantization is not None and scheme.changes_base:
        held = f"those of {base_dir} are quantized ({quantization.get('quant_method')})"
        instead = "make it with init.scheme: rrr, or of a base in floating point"
        raise UserError("start", scheme.title, f"changes the base's weights, and {held}; {instead}")
    return dequantized(index, quantization, dtype)


def _gather_factors(model: Any, layer_name: str, size: int, sharding: Sharding) -> list[LoraFactors]:
    """A_RN and B_MR of the targets of one of PEFT's layers as the model holds them, float32 on the host."""
    layer = model.base_model.model.get_submodule(layer_name)
    whole = []
    for holder in (layer.lora_A, layer.lora_B):
        weight = holder["default"].weight
        with sharding.hold([weight]):
            whole.append(weight.detach().to("cpu", torch.float32, copy=True))
    return split(LoraFactors(A_RN=whole[0], B_MR=whole[1]), size)


def _require_start(
    model: Any,
    target: Target,
    offset: LoraFactors | None,
    stored: StoredTensor,
    base: str,
    sharding: Sharding,
) -> None:
    """Raise UserError on all ranks unless W_res + s*B*A is the checkpoint's W to rounding; a collective.

    Each rank looks at its own slice. Anything else would be taken out of the trained adapter as if it were the start.
    offset: A and B as they are; None for a scheme that leaves the base as it is, where W itself is held against it.
    """
    world = sharding.world
    parameter = adapted_parameter(model.base_model.model.get_submodule(target.layer))
    shard, first = part_of(*sharding.own_slice(parameter), target)
    with world.together():
        original = torch.empty(shard.numel())
        stored.read_into(target.first_element + first, original)
        restored = shard.detach().to("cpu", torch.float32, copy=True)
        size = square_norm(original) + square_norm(restored)
        if offset is not None:
            subtract_lowrank_(restored, first, target, *offset, -target.scaling)
        squares = torch.stack([square_norm(restored - original), size])
    error_square, size_square = world.sum_(squares.to(world.device)).tolist()
    # W as loaded and W_res are each rounded once, and two float32 sums over r may differ
    tolerance = torch.finfo(shard.dtype).eps + target.r * torch.finfo(torch.float32).eps
    if not error_square <= tolerance**2 * size_square:
        error = UserError(
            "start",
            target.name,
            f"W_res + s*B*A is not the weight of {base}; call save_start before training, and give the model that "
            "`initialize` was called on as base",
        )
        error.on_all_ranks = True
        raise error


def _known_config(start: Start, name: str, base_dir: Path, destination: Path) -> InitConfig:
    """What a start in memory knows of the configuration that would have made its output."""
    is_local = Path(name).expanduser().is_dir()
    dtype: Any = str(next(start.model.parameters()).dtype).removeprefix("torch.")
    model = {"name_or_path": str(base_dir.resolve() if is_local else name)}
    if not is_local:
        model["revision"] = base_dir.name
    peft_model: Any = start.model
    model_class = type(peft_model.get_base_model())
    if model_class.__module__.startswith("transformers."):
        model["class"] = model_class.__name__
    known: dict[str, Any] = {"scheme": start.init.scheme}  # what another version may have other defaults for
    if "stable_gamma" in SCHEMES[start.init.scheme].init_keys:
        known["stable_gamma"] = start.init.gamma
    return InitConfig(
        model=ModelConfig.model_validate(model),
        lora=start.lora,
        init=start.init.model_copy(update=known),
        output=OutputConfig(dir=str(destination), residual_base="none", residual_dtype=dtype),
    )
