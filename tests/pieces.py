"""Parts of a run put together by hand, on a rank or alone: the one place that knows how the package's own parts fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraga_dist.config import CalibrationConfig, GradientConfig, LoraSection, MethodConfig, ModelConfig
from loraga_dist.data.losses import Loss, causal_lm
from loraga_dist.data.microbatches import Microbatch, SampleSharder
from loraga_dist.data.samples import load_samples
from loraga_dist.engines import ExactEngine, StateHome
from loraga_dist.gradients.block_order import BlockOrder, OnWay
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.kept import Keeping
from loraga_dist.gradients.route import ModelOrder, Route
from loraga_dist.model.base import BaseModel, find_base_model
from loraga_dist.model.blocks import Blocks, choose_order, find_blocks
from loraga_dist.model.plan import make_plan
from loraga_dist.model.selection import select_targets
from loraga_dist.model.targets import Target, meta_copy
from loraga_dist.ranks.world import World
from loraga_dist.sharding.base import Sharding
from loraga_dist.sharding.open import open_sharding

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All of a llama's layers that a start has by default."""


@dataclass(frozen=True)
class Loaded:
    """A pretrained causal language model as one rank holds it."""

    base: BaseModel
    sharding: Sharding
    model: nn.Module
    meta_model: nn.Module = field(repr=False)

    def targets(self, target_modules: list[str]) -> list[Target]:
        return select_targets(self.meta_model, LoraSection(r=2, target_modules=target_modules), lambda r: 2 * r).targets


def load(model_dir: Path, world: World) -> Loaded:
    """Partitioned by ZeRO-3 if there are several ranks."""
    base = find_base_model(ModelConfig(name_or_path=str(model_dir)), "CAUSAL_LM", world.device)
    sharding = open_sharding(world, None)
    meta_model = meta_copy(base.model_class, base.config)
    model = sharding.load(base, base.stored(meta_model).as_it_is)
    return Loaded(base, sharding, model, meta_model)


def microbatches_of(model_dir: Path, data: Path, rank: int = 0, world_size: int = 1) -> list[Microbatch]:
    samples = load_samples(
        CalibrationConfig(data_files=str(data), max_length=64, per_device_batch_size=2),
        AutoTokenizer.from_pretrained(model_dir),
        task_type="CAUSAL_LM",
        max_positions=None,
    )
    data = SampleSharder(samples=samples, rank=rank, world_size=world_size, per_device_batch_size=2, pad_token_id=256)
    return data.microbatches(0, len(samples), 0)


def exact_gradients(
    model: nn.Module,
    sharding: Sharding,
    targets: list[Target],
    microbatches: list[Microbatch],
    config: GradientConfig,
    loss: Loss = causal_lm,
) -> Iterator[tuple[str, Tensor]]:
    """Mean gradients of the targets that this rank owns, by the exact engine. A collective."""
    world, names = sharding.world, [target.name for target in targets]
    order = choose_order(config.order, type(model).__name__, find_blocks(model), names, in_pieces=world.size > 1)
    plan = make_plan(targets, MethodConfig(gradient=config), world.size, order)
    route: Route = ModelOrder(model, loss, sharding=sharding, checkpointing=config.checkpointing)
    if order.blocks is not None:
        route = block_order(model, order.blocks, names, sharding, loss)
    with route.opened():
        for matrices in plan.groups:
            engine = ExactEngine(matrices, home=StateHome(world.device), seed=0, dtype=torch.float32)
            with route.showing(microbatches, [matrix.name for matrix in matrices], engine.observe) as take:
                for microbatch in microbatches:
                    engine.begin_microbatch(microbatch.index)
                    take(microbatch)
            terms = torch.tensor(sum(microbatch.num_terms for microbatch in microbatches))
            num_terms = int(world.sum_(terms.to(world.device)))
            engine.collect(world)
            yield from ((matrix.name, G_MN) for matrix, G_MN in engine.mean_gradients(num_terms))


def block_order(
    model: nn.Module, blocks: Blocks, names: list[str], sharding: Sharding, loss: Loss = causal_lm
) -> BlockOrder:
    """The route through blocks, all microbatches at a time."""
    on_way = OnWay(pause=lambda: None, advance=lambda: None)
    return BlockOrder(model, blocks, loss, targets=names, sharding=sharding, keeping=Keeping(), on_way=on_way)


def autograd_gradients(model_dir: Path, microbatches: list[Microbatch]) -> dict[str, Tensor]:
    """d(mean loss over all supervised tokens)/dW by autograd, on one unsharded float32 model, by its modules' names."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    num_tokens = sum(microbatch.num_supervised_tokens for microbatch in microbatches)
    for microbatch in microbatches:
        loss = causal_lm(forward(model, microbatch, torch.device("cpu")), microbatch.inputs["labels"])
        (loss / num_tokens).backward()
    return {name.removesuffix(".weight"): p.grad for name, p in model.named_parameters() if p.grad is not None}
