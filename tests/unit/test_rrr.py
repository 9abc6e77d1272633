"""Reduced-rank regression: A0 is what float64 finds from all of the model's own gradients and inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import TARGETS, padded_microbatches, task_of, tiny
from outputs import angle_between_rows
from torch import Tensor, nn

import loraga_dist
from loraga_dist.data.losses import LOSSES
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients.forward import forward
from loraga_dist.start.in_place import Start

R, DAMPING = 2, 0.3
FAMILIES = ["llama", "gpt2", "gemma3", "mixtral", "bert"]


def truth(model: nn.Module, names: Sequence[str], microbatches: Sequence[Microbatch]) -> dict[str, Tensor]:
    """V_r^T L^-1 by plain autograd and hooks, float64; of tokens that are no padding."""
    layers = {name: model.get_submodule(name) for name in names}
    G, C = ({name: torch.zeros(()).double() for name in names} for _ in range(2))
    at_hand: dict[str, Any] = {}

    def hook(layer: Any, args: Any, output: Tensor, name: str) -> None:
        at_hand[name] = args[0], output
        output.retain_grad()

    handles = [
        layer.register_forward_hook(lambda *its, name=name: hook(*its, name=name)) for name, layer in layers.items()
    ]
    model.requires_grad_(True)
    num_rows = dict.fromkeys(names, 0)
    for microbatch in microbatches:
        loss = LOSSES[task_of(model)](forward(model, microbatch, torch.device("cpu")), microbatch.inputs["labels"])
        loss.backward()
        mask = microbatch.inputs["attention_mask"].bool()
        for name, (x, output) in at_hand.items():
            G[name] = G[name] + output.grad.double().flatten(0, -2).T @ x.double().flatten(0, -2)
            x_TN = (x[mask] if x.shape[:-1] == mask.shape else x).double()
            C[name] = C[name] + x_TN.T @ x_TN
            num_rows[name] += len(x_TN)
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    rows = {}
    for name in names:
        C_NN = C[name].detach() / num_rows[name]
        C_NN = C_NN + DAMPING * C_NN.diagonal().mean() * torch.eye(len(C_NN)).double()
        L_NN = torch.linalg.cholesky(C_NN)
        Vh_KN = torch.linalg.svd(torch.linalg.solve_triangular(L_NN, G[name].detach().T, upper=False).T)[2]
        rows[name] = torch.linalg.solve_triangular(L_NN.T, Vh_KN[:R].T, upper=True).T
    return rows


def start(model: nn.Module, microbatches: Sequence[Microbatch], **sections: dict[str, Any]) -> Start:
    targets = TARGETS.get(model.config.model_type, "all-linear")
    config: dict[str, Any] = {
        "lora": {"r": R, "target_modules": targets, "task_type": task_of(model)},
        "init": {"scheme": "rrr", "whitening": "exact", "damping": DAMPING},
        "gradient": {"engine": "exact"},
    }
    batches = [microbatch.inputs for microbatch in microbatches]
    return loraga_dist.initialize(model, batches, config | sections)


@pytest.mark.parametrize("order", ["block", "model"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_rows_are_those_of_float64(kind: str, order: str) -> None:
    model, microbatches = tiny(kind), padded_microbatches(task_of(tiny(kind)), count=6)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    made = start(model, microbatches, gradient={"engine": "exact", "order": order})
    assert made.gradients is not None and made.gradients.order.name == order
    reference = tiny(kind)
    rows = truth(reference, list(made.factors), microbatches)
    for name, factors in made.factors.items():
        assert not factors.B_MR.any()
        torch.testing.assert_close(factors.A_RN @ factors.A_RN.T, torch.eye(R) / 3, rtol=0, atol=1e-6)
        assert angle_between_rows(factors.A_RN, rows[name]) < 1e-5, name
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, before[name])
