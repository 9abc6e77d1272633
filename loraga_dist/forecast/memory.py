"""What a plan holds: bytes per rank and phase, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraga_dist.forecast.activations import Activations
from loraga_dist.forecast.calibration import Course, Parts, Setting, moments
from loraga_dist.model.plan import Plan
from loraga_dist.model.shape import ModelShape
from loraga_dist.model.targets import Target, layers_of
from loraga_dist.schemes import SCALES
from loraga_dist.sharding.slices import BLOCK_ELEMENTS

RUNTIME_BYTES = 40 * 2**20
"""What DeepSpeed and gloo take on a rank beside tensors, on CPUs; measured on a model of 2 MiB."""

ALONE_BYTES = 30 * 2**20
"""What a single process on CPUs takes beside tensors, measured on a model of 3 MiB: code run for the first time,
and what torch keeps."""

KERNELS_BYTES = 256 * 2**20
"""What oneDNN takes on CPUs for products of experts in 16 bits: code for each number of rows, 0.7 MiB, up to a number
of its own. Measured on a model of 1.6 GiB."""

_WRITE_BYTES = 64 * 2**20
"""Chunks of the residual base on their way from file to file."""

MAPPED_WEIGHTS = "mapped weights"


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes one rank holds, by phase and by what they hold, above its level after imports."""

    device: dict[str, Parts]
    """By phase: load; where gradients are taken calibrate, or in block order forward, loss and backward; factorize,
    place, compare (logits), write."""
    host: dict[str, Parts]
    """Empty where the ranks compute on CPUs; there all is in `device`."""
    activations_known: bool

    @property
    def peak_phase(self) -> str:
        return max(self.device, key=lambda phase: _total(self.device[phase]))

    @property
    def peak_bytes(self) -> int:
        return _total(self.device[self.peak_phase])

    @property
    def required_bytes(self) -> int:
        """The peak without mapped weights, which the kernel can take back and read again."""
        return max(_total(parts) - parts.get(MAPPED_WEIGHTS, 0) for parts in self.device.values())

    @property
    def host_peak_bytes(self) -> int:
        return max(map(_total, self.host.values()), default=0)


def weight_workspace_bytes(plan: Plan, scale: str, target: Target) -> int | None:
    """What the factorization of a target's weight takes beside the weight; None where no weight is factorized."""
    if plan.scheme.source == "weight":
        return plan.scheme.workspace_bytes(target.M, target.N, target.r)
    if plan.scheme.source == "gradient" and SCALES[scale].needs_weight:
        return SCALES[scale].workspace_bytes(target.M, target.N, target.r)
    return None


def rank_memory(
    rank: int,
    plan: Plan,
    shape: ModelShape,
    activations: Activations | None,
    setting: Setting,
    course: Course,
    *,
    scale: str,
) -> RankMemory:
    """The peak of every phase on one rank. Where activations are None they count as nothing.

    scale: a key of SCALES.
    """
    W = setting.world_size
    gathered = shape.largest_module_numel * shape.num_bytes_each if setting.gathers else 0
    forward = gathered if activations is None else activations.forward_bytes
    probe = 0 if activations is None else activations.probe_bytes
    factors = sum(target.adapter_bytes for target in plan.targets)
    adapter = factors if not setting.sharded else math.ceil(factors / 4 * shape.num_bytes_each / W)
    owned_targets = plan.owned(rank)
    found_host = {}
    if plan.groups:
        found_host["owned triplets"] = sum(plan.matrices[target.name].triplet_bytes for target in owned_targets)
    owned_factors = {"owned A and B": sum(target.adapter_bytes for target in owned_targets)}
    all_factors = {"all A and B": factors} if rank == 0 else {}
    # the model's, and those of other roundings
    logits = {"logits": 2 * probe if plan.scheme.changes_base and shape.dtype != torch.float32 else probe}

    calibration = moments(rank, plan, shape, activations, setting, course)
    factorize = calibration.pop("factorize", [])
    if not plan.groups:
        factorize.append(({}, owned_factors | logits))
    for target in owned_targets:
        workspace = weight_workspace_bytes(plan, scale, target)
        if workspace is not None:
            whole = shape.num_bytes_each * target.M * target.N if setting.gathers else 0
            factorize.append(({"gathered": whole, "workspace": workspace}, found_host | owned_factors | logits))

    # of a stack's layer, the experts' A and B are put together
    largest_layer = max(
        min(2, len(members)) * sum(target.adapter_bytes for target in members)
        for members in layers_of(plan.targets).values()
    )
    largest_block = min(BLOCK_ELEMENTS, max(target.M * target.N for target in plan.targets))
    placing = found_host | owned_factors | all_factors | logits
    comparing = found_host | all_factors | {"logits": logits["logits"] + probe}
    phases: dict[str, tuple[Parts, Parts]] = {
        "load": ({"gathered": gathered}, {}),
        **{phase: _highest(those, setting) for phase, those in calibration.items()},
        "factorize": _highest(factorize, setting),
        "place": ({"adapter": adapter, "workspace": largest_layer + 12 * largest_block}, placing),
        "compare": ({"adapter": adapter, "microbatch": max(forward, 2 * probe)}, comparing),
        "write": ({"adapter": adapter}, found_host | all_factors | {"workspace": _WRITE_BYTES + largest_layer}),
    }
    device: dict[str, Parts] = {}
    host: dict[str, Parts] = {}
    for phase, (on_device, on_host) in phases.items():
        where = host if (setting.weights_on_host or setting.from_disk) and not setting.on_host else device
        device[phase], host[phase] = {}, {}
        where[phase] |= _weights(plan, shape, setting, phase)
        if setting.on_host:
            kernels = KERNELS_BYTES if shape.has_experts and shape.num_bytes_each == 2 else 0
            device[phase]["runtime"] = kernels + (RUNTIME_BYTES if setting.sharded else ALONE_BYTES)
        device[phase] |= {part: num_bytes for part, num_bytes in on_device.items() if num_bytes}
        rest = device if setting.on_host else host
        rest[phase] |= {part: num_bytes for part, num_bytes in on_host.items() if num_bytes}
    return RankMemory(device=device, host={} if setting.on_host else host, activations_known=activations is not None)


def _highest(found: Sequence[tuple[Parts, Parts]], setting: Setting) -> tuple[Parts, Parts]:
    """What is held when most is; beside a device that computes, the host's moment may be another one."""
    if setting.on_host:
        return max(found, key=lambda moment: _total(moment[0]) + _total(moment[1]))
    on_device, on_host = zip(*found, strict=True)
    return max(on_device, key=_total), max(on_host, key=_total)


def _weights(plan: Plan, shape: ModelShape, setting: Setting, phase: str) -> Parts:
    if setting.from_disk:
        buffered = shape.outside_numel + 2 * shape.largest_block_numel  # one held, and one read ahead
        return {"weights": shape.num_bytes_each * buffered}
    weights = shape.partition_bytes(setting.world_size)
    if not setting.weights_mapped:
        return {"weights": weights}
    changed = 0
    if phase in ("place", "compare", "write"):
        changed = shape.num_bytes_each * sum(target.M * target.N for target in plan.targets)
    return {"weights": changed, MAPPED_WEIGHTS: weights - changed}


def _total(parts: Parts) -> int:
    return sum(parts.values())
