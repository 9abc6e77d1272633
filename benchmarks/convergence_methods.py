"""The methods that benchmarks/convergence.py compares: how each turns the pretrained model into what it trains.

All adapters: every Linear layer but the head, r = 8 unless asked for another, lora_alpha = 16, no dropout, float32.
Settings beyond these are those that the method's authors or PEFT give, so that the scaling s differs: the learning rate
is tuned for each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import EvaConfig, LoraGAConfig, LoraLayer, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import loraga_dist
from loraga_dist.schemes import KAIMING_ROW_NORM

R = 8
LORA_ALPHA = 16
STABLE_GAMMA = 16
LORA_PLUS_RATIO = 16
"""The learning rate of B over that of A, as in the paper's experiments (arXiv 2402.12354)."""

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a start may depend on. The random number generator of torch is seeded with `seed`, too."""

    batches: Sequence[Batch]
    """Calibration batches, for the methods that look at gradients."""
    seed: int
    steps: int
    """Of the training to come: AdaLoRA's schedule."""
    r: int = R


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the tables. `start` may change the model that it is given."""

    label: str
    scaling: str
    start: Callable[[Any, Inputs], nn.Module]
    optimizer: Callable[[Any, float], Optimizer]
    after_step: Callable[[Any, int], None] | None = None
    """Between an optimizer step and the end of its gradients."""
    longer: str | None = None
    """The row that this one trains as, for as many more steps as a calibration's compute buys."""


def full(model: Any, inputs: Inputs) -> nn.Module:
    return model.requires_grad_(True)


def lora(**settings: Any) -> Callable[[Any, Inputs], nn.Module]:
    """A start by PEFT alone."""

    def start(model: Any, inputs: Inputs) -> nn.Module:
        return get_peft_model(model, _lora_config(inputs.r, **settings))

    return start


def _lora_config(r: int, **settings: Any) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


def _adalora(model: Any, inputs: Inputs) -> nn.Module:
    config = AdaLoraConfig(
        init_r=12,
        target_r=inputs.r,
        lora_alpha=LORA_ALPHA,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        tinit=inputs.steps // 10,
        tfinal=3 * inputs.steps // 10,
        total_step=inputs.steps,
    )
    return get_peft_model(model, config)


def _allocate_ranks(model: Any, step: int) -> None:
    model.base_model.update_and_allocate(step)


def target_weights(model: Any) -> dict[str, nn.Parameter]:
    """Of every Linear layer but the head, by module name."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def ours(
    scheme: str,
    engine: str,
    stable_gamma: float | None = None,
    whitening: str | None = None,
    *,
    with_budget: bool = False,
) -> Callable[[Any, Inputs], nn.Module]:
    """A start by `loraga_dist.initialize`. stable_gamma, whitening: of `init`, None for the default.

    with_budget: as many adapter parameters as at one rank for all, spent by what calibration finds.
    """
    init = {"scheme": scheme, "stable_gamma": stable_gamma} | ({"whitening": whitening} if whitening else {})

    def start(model: Any, inputs: Inputs) -> nn.Module:
        sizes = [sum(weight.shape) for weight in target_weights(model).values()]
        budget = {"rank_budget": inputs.r * sum(sizes)} if with_budget else {}
        config = {
            "lora": {"r": inputs.r, "lora_alpha": LORA_ALPHA, "use_rslora": True},
            "init": init | budget | {"seed": inputs.seed},
            "gradient": {"engine": engine, "checkpointing": "none"},
        }
        return loraga_dist.initialize(model, inputs.batches, config).model

    return start


def _peft_lora_ga(model: Any, inputs: Inputs) -> nn.Module:
    config = _lora_config(
        inputs.r, use_rslora=True, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(stable_gamma=STABLE_GAMMA)
    )

    def step() -> None:
        for batch in inputs.batches:
            model(**batch).loss.backward()

    # unlike get_peft_model it does not know the shorthand all-linear
    config.target_modules = set(target_weights(model))
    preprocess_loraga(model, config, step)
    return get_peft_model(model, config)


@torch.no_grad()
def _random_directions(model: Any, inputs: Inputs) -> nn.Module:
    """LoRA-GA's scale, and its offset of the base, with directions that know nothing of the gradient."""
    peft_model = get_peft_model(model, _lora_config(inputs.r, use_rslora=True))
    for layer in lora_layers(peft_model):
        weight = layer.get_base_layer().weight
        M, N = weight.shape
        factor = M**0.25 / math.sqrt(STABLE_GAMMA)
        A_RN, B_MR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        A_RN.copy_(factor * torch.linalg.qr(torch.randn(N, inputs.r)).Q.T)
        B_MR.copy_(factor * torch.linalg.qr(torch.randn(M, inputs.r)).Q)
        weight.sub_(layer.get_delta_weight("default"))
    return peft_model


@torch.no_grad()
def _orthonormal(model: Any, inputs: Inputs) -> nn.Module:
    """What RRR starts with, B = 0 and orthogonal rows of A of the same norm, but of random directions."""
    peft_model = get_peft_model(model, _lora_config(inputs.r, use_rslora=True))
    for layer in lora_layers(peft_model):
        A_RN = layer.lora_A["default"].weight
        A_RN.copy_(KAIMING_ROW_NORM * torch.linalg.qr(torch.randn(A_RN.T.shape)).Q.T)
    return peft_model


def _eva(model: Any, inputs: Inputs) -> nn.Module:
    # rho 1: every layer keeps the rank that it has in the other rows
    config = _lora_config(inputs.r, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    peft_model = get_peft_model(model, config)
    initialize_lora_eva_weights(peft_model, inputs.batches, show_progress_bar=False)
    return peft_model


def lora_layers(model: nn.Module) -> Iterable[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def adamw(model: nn.Module, lr: float) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def lora_plus(model: PeftModel, lr: float) -> Optimizer:
    return create_loraplus_optimizer(model, AdamW, lr=lr, loraplus_lr_ratio=LORA_PLUS_RATIO)


PLAIN, RANK_STABLE = "α/r", "α/√r"

METHODS: dict[str, Method] = {
    "full": Method(label="full fine-tuning", scaling="", start=full, optimizer=adamw),
    "lora": Method(label="LoRA", scaling=PLAIN, start=lora(), optimizer=adamw),
    "rslora": Method(label="rsLoRA", scaling=RANK_STABLE, start=lora(use_rslora=True), optimizer=adamw),
    "dora": Method(label="DoRA", scaling=PLAIN, start=lora(use_dora=True), optimizer=adamw),
    "lora_plus": Method(label="LoRA+", scaling=PLAIN, start=lora(), optimizer=lora_plus),
    "adalora": Method(
        label="AdaLoRA", scaling="α/12", start=_adalora, optimizer=adamw, after_step=_allocate_ranks
    ),
    "pissa": Method(label="PiSSA", scaling=PLAIN, start=lora(init_lora_weights="pissa"), optimizer=adamw),
    "lora_one": Method(
        label="LoRA-One", scaling=RANK_STABLE, start=ours("lora_one", "exact"), optimizer=adamw
    ),
    "lora_ga_exact": Method(
        label="LoRA-GA, exact", scaling=RANK_STABLE, start=ours("lora_ga", "exact"), optimizer=adamw
    ),
    "lora_ga_gamma_64": Method(
        label="LoRA-GA, exact, γ = 64", scaling=RANK_STABLE, start=ours("lora_ga", "exact", 64.0), optimizer=adamw
    ),
    "lora_ga_sketch": Method(
        label="LoRA-GA, sketch", scaling=RANK_STABLE, start=ours("lora_ga", "sketch"), optimizer=adamw
    ),
    "peft_lora_ga": Method(
        label="PEFT's `lora_ga`", scaling=RANK_STABLE, start=_peft_lora_ga, optimizer=adamw
    ),
    "random": Method(
        label="random directions", scaling=RANK_STABLE, start=_random_directions, optimizer=adamw
    ),
    "eva": Method(label="EVA", scaling=PLAIN, start=_eva, optimizer=adamw),
    "orthonormal": Method(
        label="random orthonormal A", scaling=RANK_STABLE, start=_orthonormal, optimizer=adamw
    ),
    "rrr": Method(label="RRR", scaling=RANK_STABLE, start=ours("rrr", "exact"), optimizer=adamw),
    "rrr_diagonal": Method(
        label="RRR, whitened by the diagonal", scaling=RANK_STABLE, start=ours("rrr", "exact", whitening="diagonal"),
        optimizer=adamw,
    ),
    "rrr_none": Method(
        label="RRR, not whitened", scaling=RANK_STABLE, start=ours("rrr", "exact", whitening="none"), optimizer=adamw
    ),
    "rrr_budget": Method(
        label="RRR, ranks by `rank_budget`", scaling=RANK_STABLE, start=ours("rrr", "exact", with_budget=True),
        optimizer=adamw,
    ),
    "rrr_plus": Method(label="RRR with LoRA+", scaling=RANK_STABLE, start=ours("rrr", "exact"), optimizer=lora_plus),
    "rrr_step": Method(
        label="RRR with a step", scaling=RANK_STABLE, start=ours("rrr_step", "exact"), optimizer=adamw
    ),
}  # fmt: skip


RowT = TypeVar("RowT", bound=Method)


def longer_rows(rows: Mapping[str, RowT]) -> dict[str, RowT]:
    """Those of `rows` without a start to pay for, with its compute as more steps."""
    return {
        f"{name}_longer": replace(rows[name], label=f"{rows[name].label}, more steps", longer=name)
        for name in ("lora", "rslora", "lora_plus")
    }


LONGER = longer_rows(METHODS)
ROWS = METHODS | LONGER
"""By the name in the results."""
STARTS = ("rrr", "rrr_plus", "rrr_step")
"""Of METHODS, those whose worth is asked for at several lengths, against the rows of LONGER and what they train as."""
FAIR = (*(name for row in LONGER.values() if (name := row.longer)), *STARTS, *LONGER)


def full_gradients(model: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The mean loss's gradient by every Linear weight but the head's, by module name."""
    model = copy.deepcopy(model).requires_grad_(False)
    targets = target_weights(model)
    for weight in targets.values():
        weight.requires_grad_(True)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    return {name: weight.grad for name, weight in targets.items()}


def alignment(started: nn.Module, pretrained: nn.Module, gradients: dict[str, Tensor]) -> dict[str, float]:
    """How well the first step that `started` can take agrees with full fine-tuning's, and how far it starts off.

    `cosine`: between -G and the change of the effective weight by one plain SGD step on all of a layer's trainable
    parameters, to first order in the learning rate; G is the gradient at the pretrained weights. `start_cosine`: the
    same of what the start itself changed, by `start_change` of the weight's norm; both 0 where it changed nothing.
    All are averages over targets.
    """
    cosines, start_cosines, changes = [], [], []
    prefix = "base_model.model." if isinstance(started, PeftModel) else ""
    for name, G_MN in gradients.items():
        G = G_MN.double()
        layer = copy.deepcopy(started.get_submodule(prefix + name)).double()
        W0 = pretrained.get_submodule(name).weight.detach().double()
        change = _effective_weight(layer).detach() - W0
        changes.append((change.norm() / W0.norm()).item())
        start_cosines.append(_cosine(change, -G))
        cosines.append(_cosine(_first_update(layer, G), -G))
    moved = max(changes) > 1e-5
    return {
        "cosine": sum(cosines) / len(cosines),
        "start_change": sum(changes) / len(changes) if moved else 0.0,
        "start_cosine": sum(start_cosines) / len(start_cosines) if moved else 0.0,
    }


def best_cosine(gradients: dict[str, Tensor], rank: int) -> float:
    """What the best update of a rank could reach: by Eckart-Young, the energy of the truncated SVD decides."""
    shares = []
    for G_MN in gradients.values():
        energy = torch.linalg.svdvals(G_MN.double()).square()
        shares.append((energy[:rank].sum() / energy.sum()).sqrt().item())
    return sum(shares) / len(shares)


def _effective_weight(layer: nn.Module) -> Tensor:
    """W_MN of a layer without bias, whatever it is made of."""
    parameter = next(layer.parameters())
    return layer(torch.eye(layer.in_features, dtype=parameter.dtype)).T  # type: ignore[arg-type]


def _first_update(layer: nn.Module, G_MN: Tensor) -> Tensor:
    """The derivative of the effective weight along the layer's own descent direction, by a central difference.

    For A and B that is exact; what is of higher order (DoRA's norms, AdaLoRA's triples) is negligible at this length.
    """
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    loss = (_effective_weight(layer) * G_MN).sum()
    slopes = [slope if slope is not None else 0 * p for slope, p in zip(
        torch.autograd.grad(loss, parameters, allow_unused=True), parameters, strict=True
    )]  # fmt: skip
    length = sum(p.square().sum() for p in parameters).sqrt() / sum(s.square().sum() for s in slopes).sqrt()
    ends = []
    with torch.no_grad():
        for direction in (-1, 1):
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.add_(slope, alpha=direction * 1e-5 * length.item())
            ends.append(_effective_weight(layer).clone())
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.sub_(slope, alpha=direction * 1e-5 * length.item())
    after, before = ends
    return after - before


def _cosine(X_MN: Tensor, Y_MN: Tensor) -> float:
    return ((X_MN * Y_MN).sum() / (X_MN.norm() * Y_MN.norm()).clamp_min(1e-300)).item()
