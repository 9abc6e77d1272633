"""DeepSpeed ZeRO-3 without an optimizer: every parameter in flat shards, one module gathered at a time.

The only importer of deepspeed. What the calls below avoid: `engine.backward` needs an optimizer, `engine(...)` blocks a
direct `loss.backward()`, and an undestroyed engine breaks the next `deepspeed.initialize` on the same model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

from loraga_dist.errors import UserError
from loraga_dist.files.stored_tensors import StoredTensor
from loraga_dist.model.base import BaseModel
from loraga_dist.model.blocks import expert_lists
from loraga_dist.model.conversion import stored_as
from loraga_dist.model.targets import Target
from loraga_dist.ranks.world import World
from loraga_dist.sharding.base import (
    Sharding,
    model_on_meta,
    pretrained,
    read_buffers,
    wanted_dtypes,
    without_values,
)
from loraga_dist.sharding.gloo import all_gather_in_place
from loraga_dist.sharding.settings import calibration_settings, import_deepspeed, read_deepspeed_config
from loraga_dist.sharding.slices import flat_range, part_of

_HOOK_STATE = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")
"""What `destroy` leaves on modules. The next engine would take these functions for its own, and they fetch parameters
through the dead one: wrong only in some checkpointing modes, and silent until then."""


def is_partitioned(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def refuse_unsupported_shards(model: nn.Module, caller: str) -> None:
    """Raise UserError for parameters whose shards `caller` cannot read and write in place."""
    parameter: Any  # DeepSpeed adds attributes
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "ds_id"):
            problem = "is not partitioned although others are; load the model under zero.Init"
        elif hasattr(parameter, "_z3_optimizer"):
            problem = f"already belongs to an optimizer; call {caller} before deepspeed.initialize"
        elif getattr(getattr(parameter.ds_tensor, "final_location", None), "name", None) == "nvme":
            problem = "is offloaded to NVMe; set zero_optimization.offload_param.device to cpu or none"
        elif getattr(parameter, "ds_secondary_tensor", None) is not None:
            problem = "has a secondary (hpZ) partition; set zero_optimization.zero_hpz_partition_size to 1"
        elif not parameter.ds_tensor.is_floating_point():
            problem = f"has quantized shards ({parameter.ds_tensor.dtype}); load it in bfloat16"
        else:
            continue
        raise UserError("model", name, problem)


class Zero3(Sharding):
    is_sharded = True

    def __init__(self, world: World, deepspeed: str | dict[str, Any] | None) -> None:
        super().__init__(world)
        self._user_settings = read_deepspeed_config(deepspeed)
        self._engine: Any = None
        self._leaves: list[nn.Module] = []
        """Which DeepSpeed gathers whole."""
        _start_deepspeed(world.device)

    def load(self, base: BaseModel, stored: Mapping[str, StoredTensor] | None) -> nn.Module:
        """Every rank reads its own byte ranges where tensors can be taken as they are; else through transformers."""
        model = self._load_pretrained(base) if stored is None else self._load_slices(base, stored)
        return model.requires_grad_(False).eval()

    def _load_slices(self, base: BaseModel, stored: Mapping[str, StoredTensor]) -> nn.Module:
        with self.new_parameters(base.dtype):
            model = without_values(base)
        # zero.Init rounds all that is made to the model's dtype, also rotary frequencies, which are float32 elsewhere
        for name, module in model_on_meta(base).named_modules():
            for key, buffer in module._buffers.items():
                buffers = model.get_submodule(name)._buffers
                buffers[key] = None if buffer is None else buffer.to(self.world.device)
        with self.world.together():
            self._read_slices(model, base, stored)
        return model

    @torch.no_grad()
    def _read_slices(self, model: nn.Module, base: BaseModel, stored: Mapping[str, StoredTensor]) -> None:
        parameter: Any
        for name, parameter in model.named_parameters():
            shard, start = self.own_slice(parameter)
            stored_as(name, parameter.ds_shape, stored).read_into(start, shard)
        read_buffers(model, stored, wanted_dtypes(model, base.dtype))

    def _load_pretrained(self, base: BaseModel) -> nn.Module:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        # from_pretrained partitions as long as this object lives
        switch = HfDeepSpeedConfig(calibration_settings(self._user_settings, base.dtype))
        try:
            return pretrained(base)
        finally:
            unset_hf_deepspeed_config()
            del switch

    def attach(self, model: nn.Module) -> nn.Module:
        import deepspeed

        assert self._engine is None, "detach first"
        dtype = next(model.parameters()).dtype
        callers = {model.get_submodule(name) for name in expert_lists(model).values()}
        self._leaves = [module for module in callers if not deepspeed.utils.z3_leaf_module(module)]
        for module in self._leaves:
            deepspeed.utils.set_z3_leaf_module(module, True)
        self._engine, *_ = deepspeed.initialize(model=model, config=calibration_settings(self._user_settings, dtype))
        _gather_under_gloo_by(all_gather_in_place)
        return self._engine.module

    def release(self) -> None:
        # what a forward without backward, or a backward that stopped early, left gathered
        self._engine.optimizer.release_backward_leftovers()

    def detach(self) -> None:
        if self._engine is None:
            return
        _gather_under_gloo_by(dist.all_gather_into_tensor)
        model = self._engine.module
        self._engine.destroy()
        self._engine = None
        for module in model.modules():
            for name in _HOOK_STATE:
                module.__dict__.pop(name, None)
        parameter: Any
        for module in self._leaves:
            del module._z3_leaf
            for parameter in module.parameters():
                del parameter.ds_z3_leaf_module
        self._leaves = []

    @contextmanager
    def hold(self, parameters: Iterable[Parameter], then: Iterable[Parameter] = ()) -> Iterator[None]:
        import deepspeed

        with ExitStack() as held:
            try:
                _gather_under_gloo_by(all_gather_in_place)
                held.enter_context(deepspeed.zero.GatheredParameters(list(parameters)))
            finally:
                _gather_under_gloo_by(dist.all_gather_into_tensor)
            yield

    def weight_on(self, parameter: Parameter, target: Target, owner: int) -> torch.Tensor | None:
        sharded: Any = parameter
        own, first = part_of(*self.own_slice(parameter), target)
        own = own.detach().to(self.world.device)
        if self.world.rank != owner:
            _exchange([dist.P2POp(dist.isend, own, owner)] if own.numel() else [])
            return None
        whole = own.new_empty(target.M * target.N)
        receiving = []
        for rank in range(self.world.size):
            start, end = flat_range(sharded.ds_numel, sharded.ds_tensor.numel(), rank)
            # of this rank's shard, in the matrix
            begin, past = (min(max(0, at - target.first_element), whole.numel()) for at in (start, end))
            if rank == owner:
                whole[first : first + own.numel()] = own
            elif begin < past:
                receiving.append(dist.P2POp(dist.irecv, whole[begin:past], rank))
        _exchange(receiving)
        return whole.view(target.parameter_shape)

    def own_slice(self, parameter: Parameter) -> tuple[torch.Tensor, int]:
        sharded: Any = parameter
        # a gathered copy would hide an edited shard
        assert sharded.ds_status.name == "NOT_AVAILABLE", f"parameter {sharded.ds_id} is still gathered"
        shard = sharded.ds_tensor.view(-1)
        start, end = flat_range(sharded.ds_numel, shard.numel(), dist.get_rank(sharded.ds_process_group))
        return shard[: end - start], start

    @contextmanager
    def new_parameters(self, dtype: torch.dtype) -> Iterator[None]:
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=calibration_settings(self._user_settings, dtype)):
            yield


def _exchange(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _gather_under_gloo_by(all_gather: Callable[..., Any]) -> None:
    from deepspeed.comm import comm

    if dist.get_backend() == "gloo":
        comm.cdb.all_gather_function = all_gather  # type: ignore[attr-defined]


def name_local_rank(device: torch.device) -> None:
    """Have LOCAL_RANK name the device: DeepSpeed takes it for a GPU's number, where each rank may see its own alone."""
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)
        if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # it wants the two to agree
            os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device.index)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")


def _start_deepspeed(device: torch.device) -> None:
    """Give DeepSpeed the process group that exists, or one of its own for a single process."""
    name_local_rank(device)
    import_deepspeed()
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # its shared-memory all-reduce is compiled at the first start, needs g++, and a killed build blocks all later runs;
    # nothing here profits from it
    __compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_initialized():
        # a group of one, without an address or port that could be taken
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
