"""What a plan costs: bytes per rank and phase, disk, traffic and flops, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loraga_dist.engines import ENGINES, Matrix
from loraga_dist.forecast.activations import Activations
from loraga_dist.model.plan import Plan
from loraga_dist.model.shape import ModelShape
from loraga_dist.model.targets import Target
from loraga_dist.schemes import SCALES
from loraga_dist.sharding.slices import BLOCK_ELEMENTS

RUNTIME_BYTES = 40 * 2**20
"""What DeepSpeed and gloo take on a rank beside tensors, on CPUs; measured on a model of 2 MiB."""

ALONE_BYTES = 30 * 2**20
"""What a single process on CPUs takes beside tensors, measured on a model of 3 MiB: code run for the first time,
and what torch keeps."""

_WRITE_BYTES = 64 * 2**20
"""Chunks of the residual base on their way from file to file."""

MAPPED_WEIGHTS = "mapped weights"

Parts = dict[str, int]
"""Bytes by what they hold."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a plan is to run."""

    world_size: int
    sharded: bool
    on_host: bool
    """The ranks compute on CPUs: what else lies on the host is in the same memory."""
    weights_on_host: bool
    """ZeRO-3 keeps the shards there (offload_param)."""
    weights_mapped: bool
    """A single process maps them from the checkpoint's files, until they are changed."""
    state_on_host: bool
    """Engine state lives there, beside a device that computes (gradient.state_device)."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes one rank holds, by phase and by what they hold, above its level after imports."""

    device: dict[str, Parts]
    """By phase: load, calibrate (where gradients are taken), factorize, place, compare logits, write."""
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
    *,
    num_tokens: int,
    scale: str,
) -> RankMemory:
    """The peak of every phase on one rank. Where activations are None they count as nothing.

    num_tokens: of the largest microbatch. scale: a key of SCALES.
    """
    W = setting.world_size
    gathered = shape.largest_module_numel * shape.num_bytes_each if setting.sharded else 0
    backward = gathered if activations is None else activations.backward_bytes
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

    calibrate: list[tuple[Parts, Parts]] = []
    factorize: list[tuple[Parts, Parts]] = []
    triplets_before = 0
    for group in plan.groups:
        pairs = [(ENGINES[matrix.engine], matrix) for matrix in group]
        owned = [(engine, matrix) for engine, matrix in pairs if matrix.owner == rank]
        held = sum(engine.held_bytes(matrix, shape.dtype, owned=matrix.owner == rank) for engine, matrix in pairs)
        cold = sum(engine.cold_bytes(matrix, shape.dtype, num_tokens) for engine, matrix in pairs)
        refresh = max((engine.refresh_bytes(matrix) for engine, matrix in owned), default=0)
        factorization = max((engine.factorization_bytes(matrix) for engine, matrix in owned), default=0)
        # on the host, one target's state at a time visits the device
        visiting = max(engine.held_bytes(matrix, shape.dtype, owned=True) for engine, matrix in pairs)
        moments = [
            (calibrate, held, "microbatch", backward),
            (calibrate, held, "workspace", refresh),
            (calibrate, cold, "workspace", gathered),
            (factorize, held, "workspace", factorization),
        ]
        for phase, state, kind, num_bytes in moments:
            on_host = {"owned triplets": triplets_before}
            if setting.state_on_host:
                phase.append(({"engine state": visiting, kind: num_bytes}, on_host | {"engine state": state}))
            else:
                phase.append(({"engine state": state, kind: num_bytes}, on_host))
        triplets_before += sum(matrix.triplet_bytes for _, matrix in owned)

    if not plan.groups:
        factorize.append(({}, owned_factors | logits))
    for target in owned_targets:
        workspace = weight_workspace_bytes(plan, scale, target)
        if workspace is not None:
            whole = shape.num_bytes_each * target.M * target.N if setting.sharded else 0
            factorize.append(({"gathered": whole, "workspace": workspace}, found_host | owned_factors | logits))

    largest_target = max(target.adapter_bytes for target in plan.targets)
    largest_block = min(BLOCK_ELEMENTS, max(target.M * target.N for target in plan.targets))
    placing = found_host | owned_factors | all_factors | logits
    comparing = found_host | all_factors | {"logits": logits["logits"] + probe}
    phases: dict[str, tuple[Parts, Parts]] = {
        "load": ({"gathered": gathered}, {}),
        **({"calibrate": max(calibrate, key=lambda parts: _total(parts[0]))} if calibrate else {}),
        "factorize": max(factorize, key=lambda parts: _total(parts[0])),
        "place": ({"adapter": adapter, "workspace": largest_target + 12 * largest_block}, placing),
        "compare logits": ({"adapter": adapter, "microbatch": max(forward, 2 * probe)}, comparing),
        "write": ({"adapter": adapter}, found_host | all_factors | {"workspace": _WRITE_BYTES}),
    }
    device: dict[str, Parts] = {}
    host: dict[str, Parts] = {}
    for phase, (on_device, on_host) in phases.items():
        where = host if setting.weights_on_host and not setting.on_host else device
        device[phase], host[phase] = {}, {}
        where[phase] |= _weights(plan, shape, setting, phase)
        if setting.on_host:
            device[phase]["runtime"] = RUNTIME_BYTES if setting.sharded else ALONE_BYTES
        device[phase] |= {part: num_bytes for part, num_bytes in on_device.items() if num_bytes}
        rest = device if setting.on_host else host
        rest[phase] |= {part: num_bytes for part, num_bytes in on_host.items() if num_bytes}
    return RankMemory(device=device, host={} if setting.on_host else host, activations_known=activations is not None)


def _weights(plan: Plan, shape: ModelShape, setting: Setting, phase: str) -> Parts:
    weights = shape.partition_bytes(setting.world_size)
    if not setting.weights_mapped:
        return {"weights": weights}
    changed = 0
    if phase in ("place", "compare logits", "write"):
        changed = shape.num_bytes_each * sum(target.M * target.N for target in plan.targets)
    return {"weights": changed, MAPPED_WEIGHTS: weights - changed}


def _total(parts: Parts) -> int:
    return sum(parts.values())


@dataclass(frozen=True, kw_only=True)
class Work:
    """Flops of all ranks together, and bytes that each rank receives, over the whole calibration."""

    flops: dict[str, int]
    traffic_bytes_per_rank: dict[str, int]


def work(
    plan: Plan,
    shape: ModelShape,
    *,
    num_tokens: int,
    microbatches_per_rank: int,
    world_size: int,
    checkpointed: bool,
    refine_passes: int,
) -> Work:
    """Matrix products of the model and of the engines; attention scores are left out.

    Per token: forward 2 flops an entry, backward (towards inputs; weights are frozen) the same, a checkpointed block
    once more. A refine pass is one more of all that where an engine refines.
    """

    def passes_of(matrix: Matrix) -> int:
        return 1 + refine_passes if ENGINES[matrix.engine].refines else 1

    passes = sum(max(map(passes_of, group)) for group in plan.groups)
    recomputed = shape.block_numel if checkpointed else 0
    model_per_token = 2 * (2 * shape.linear_numel + recomputed)
    pairs = [(ENGINES[matrix.engine], matrix) for matrix in plan.matrices.values()]
    engine_per_token = sum(engine.flops_per_token(matrix) * passes_of(matrix) for engine, matrix in pairs)
    collectives = sum(engine.traffic_bytes(matrix, microbatches_per_rank, refine_passes) for engine, matrix in pairs)
    gathers_per_pass = 2 * sum(shape.numels) + recomputed - shape.embedding_numel
    # each of these weights goes to its owner once
    to_owners = sum(t.M * t.N for t in plan.targets) / world_size if plan.scheme.source == "weight" else 0
    away = 1 - 1 / world_size
    return Work(
        flops={"model": passes * num_tokens * model_per_token, "engine": num_tokens * engine_per_token},
        traffic_bytes_per_rank={
            "weights gathered": int(
                away * (passes * microbatches_per_rank * gathers_per_pass + to_owners) * shape.num_bytes_each
            ),
            "gradients and bases": int(away * collectives),
            "A and B": int(away * sum(target.adapter_bytes for target in plan.targets)),
        },
    )
