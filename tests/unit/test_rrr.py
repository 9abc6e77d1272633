"""Reduced-rank regression: A0 is what float64 finds from all of the model's own gradients and inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import make_model
from families import TARGETS, padded_microbatches, task_of, tiny
from outputs import angle_between_rows, relative
from torch import Tensor, nn

import loraga_dist
from loraga_dist.data.losses import IGNORED, LOSSES
from loraga_dist.data.microbatches import Microbatch, counted_rows
from loraga_dist.engines.product import add_square_, mirror_lower_
from loraga_dist.errors import UserError
from loraga_dist.gradients import head
from loraga_dist.gradients.forward import forward
from loraga_dist.linalg import DampedMoment, regression, truncated_svd
from loraga_dist.start.in_place import Start

R, DAMPING = 2, 0.3
FAMILIES = ["llama", "gpt2", "gemma3", "mixtral", "bert"]


def moments(
    model: nn.Module, names: Sequence[str], microbatches: Sequence[Microbatch]
) -> dict[str, tuple[Tensor, Tensor]]:
    """sum dy x^T, and the damped mean of x x^T over tokens that are no padding, by autograd and hooks; float64."""
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
    found = {}
    for name in names:
        C_NN = C[name].detach() / num_rows[name]
        found[name] = G[name].detach(), C_NN + DAMPING * C_NN.diagonal().mean() * torch.eye(len(C_NN)).double()
    return found


def truth(model: nn.Module, names: Sequence[str], microbatches: Sequence[Microbatch]) -> dict[str, Tensor]:
    """V_r^T L^-1."""
    rows = {}
    for name, (G_MN, C_NN) in moments(model, names, microbatches).items():
        L_NN = torch.linalg.cholesky(C_NN)
        Vh_KN = torch.linalg.svd(torch.linalg.solve_triangular(L_NN, G_MN.T, upper=False).T)[2]
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


def mean_loss(model: nn.Module, microbatches: Sequence[Microbatch]) -> float:
    loss, num_tokens = 0.0, 0
    with torch.no_grad():
        for microbatch in microbatches:
            logits = forward(model, microbatch, torch.device("cpu"))
            loss += float(LOSSES["CAUSAL_LM"](logits, microbatch.inputs["labels"]))
            num_tokens += microbatch.num_supervised_tokens
    return loss / num_tokens


def test_a_step_is_as_long_as_lowers_the_loss_most_on_what_the_gradient_has_not_seen() -> None:
    model, microbatches = tiny("llama"), padded_microbatches(count=8, longest=30)
    made = start(model, microbatches, init={"scheme": "rrr_step", "whitening": "exact"})
    assert made.step is not None and made.gradients is not None
    assert made.gradients.data.num_samples == 6 and made.step.num_sequences == 2
    apart = microbatches[-2:]
    assert made.step.mean_loss_before == pytest.approx(mean_loss(tiny("llama"), apart), rel=1e-5)
    assert made.step.mean_loss_after == pytest.approx(mean_loss(made.model.eval(), apart), rel=1e-5)
    assert made.step.mean_loss_after < made.step.mean_loss_before
    for name, factors in made.factors.items():
        norm = factors.B_MR.norm() / factors.B_MR.shape[0] ** 0.5
        assert float(norm) == pytest.approx(made.step.length, rel=1e-5), name
    longer, shorter = (
        start(tiny("llama"), microbatches[:6], init=init | {"step": made.step.length * factor})
        for factor in (2, 0.5)
        for init in [{"scheme": "rrr_step", "whitening": "exact"}]
    )
    assert min(mean_loss(other.model.eval(), apart) for other in (longer, shorter)) > made.step.mean_loss_after
    rows = start(tiny("llama"), microbatches[:6])
    for name, factors in rows.factors.items():
        assert torch.equal(factors.A_RN, made.factors[name].A_RN)


def test_a_step_is_along_the_best_predictor() -> None:
    """B A is -U_r S_r V_r^T L^-1, scaled."""
    microbatches = padded_microbatches(count=6)
    made = start(tiny("llama"), microbatches, init={"scheme": "rrr_step", "whitening": "exact", "step": 0.01})
    assert made.step is None
    for name, (G_MN, C_NN) in moments(tiny("llama"), list(made.factors), microbatches).items():
        L_NN = torch.linalg.cholesky(C_NN)
        U, S, Vh = torch.linalg.svd(torch.linalg.solve_triangular(L_NN, G_MN.T, upper=False).T, full_matrices=False)
        best_MN = U[:, :R] * S[:R] @ torch.linalg.solve_triangular(L_NN.T, Vh[:R].T, upper=True).T
        found_MN = (made.factors[name].B_MR @ made.factors[name].A_RN).double()
        assert relative(found_MN / found_MN.norm(), -best_MN / best_MN.norm()) < 1e-4, name


def test_no_step_is_taken_that_does_not_lower_the_loss() -> None:
    """The sample kept apart contradicts the others: it is to be as the model has it, and they the very opposite."""
    first = padded_microbatches(count=1, longest=30)[0]
    with torch.no_grad():
        logits = forward(tiny("llama"), first, torch.device("cpu"))
    is_padding = first.inputs["attention_mask"] == 0
    most, least = (
        found.roll(1, dims=1).masked_fill(is_padding, IGNORED) for found in (logits.argmax(-1), logits.argmin(-1))
    )
    microbatches = [
        replace(first, index=index, inputs=first.inputs | {"labels": labels})
        for index, labels in enumerate([least, least, least, most])
    ]
    made = start(tiny("llama"), microbatches, init={"scheme": "rrr_step"})
    assert made.step is not None and made.step.length == 0
    assert made.step.mean_loss_after == made.step.mean_loss_before
    assert all(not factors.B_MR.any() for factors in made.factors.values())


def test_one_sample_is_not_enough_for_a_step() -> None:
    with pytest.raises(
        UserError, match=r"dataloader: 1: the data is one sample, .*; write init.step, or init.scheme rrr"
    ):
        start(tiny("llama"), padded_microbatches(count=1), init={"scheme": "rrr_step"})


def test_dora_has_a_step_that_is_given() -> None:
    lora = {"r": R, "use_dora": True}
    with pytest.raises(UserError, match=r"lora.use_dora: True: .*; write false, or init.step"):
        start(tiny("llama"), padded_microbatches(count=4), lora=lora, init={"scheme": "rrr_step"})
    init = {"scheme": "rrr_step", "step": 0.01}
    made = start(tiny("llama"), padded_microbatches(count=4), lora=lora, init=init)
    plain = start(tiny("llama"), padded_microbatches(count=4), lora={"r": R}, init=init)
    inputs = padded_microbatches(count=1)[0]
    logits, expected = (
        forward(each.model.eval().base_model.model, inputs, torch.device("cpu")) for each in (made, plain)
    )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_counts_is_no_change_of_the_microbatch() -> None:
    microbatch = padded_microbatches(count=1, longest=40)[0]
    inputs = microbatch.inputs | {"attention_mask": microbatch.inputs["attention_mask"].bool()}
    before = inputs["attention_mask"].clone()
    (rows,) = counted_rows(replace(microbatch, inputs=inputs), 0.5).values()
    assert torch.equal(inputs["attention_mask"], before)
    assert 0.3 < len(rows) / int(before.sum()) < 0.7
    assert before.flatten()[rows].all()
    blocks = inputs | {"attention_mask": before[:, None, None, :].expand(-1, 1, 40, -1)}
    (rows,) = counted_rows(replace(microbatch, inputs=blocks), 1.0).values()
    assert len(rows) == before.numel()
    labels = torch.full((2, 9), 3)
    labels[1, 5:] = IGNORED
    rows_of = counted_rows(replace(microbatch, inputs=inputs | {"labels": labels}), 1.0)
    assert {count: len(rows) for count, rows in rows_of.items()} == {18: 14, 80: int(before.sum())}


def test_too_little_damping_is_named() -> None:
    svd = truncated_svd(torch.randn(8, 64), rank=4, oversampling=4, generator=torch.Generator().manual_seed(0))
    moment = torch.eye(64)
    moment[0, 1] = moment[1, 0] = 1 + 1e-4
    with pytest.raises(ValueError, match=r"raise init.damping"):
        regression(svd, DampedMoment(moment, 1e-6))


@pytest.mark.parametrize(("tokens", "damping"), [(100, 0.01), (4000, 0.01), (100, 1e-4)])
def test_a_factor_of_float32_solves_as_one_of_float64(tokens: int, damping: float) -> None:
    """With a few directions of the inputs a million times as large as most."""
    generator = torch.Generator().manual_seed(0)
    x_TN = torch.randn(tokens, 1100, generator=generator) * torch.logspace(0, -3, 1100)
    x_TN[:, :3] *= 1000
    sums_NN = torch.zeros(1100, 1100)
    add_square_(sums_NN, x_TN)
    mirror_lower_(sums_NN)
    torch.testing.assert_close(sums_NN, x_TN.T @ x_TN, rtol=1e-5, atol=1e-3)
    moment_NN = sums_NN / tokens
    C_NN = moment_NN.double() + damping * moment_NN.diagonal().double().mean() * torch.eye(1100).double()
    V_NK = torch.randn(1100, 5, generator=generator, dtype=torch.float64)
    found_NK, expected_NK = DampedMoment(moment_NN, damping).solve(V_NK), torch.linalg.solve(C_NN, V_NK)
    assert relative(found_NK, expected_NK) < 1e-8


def test_a_head_that_takes_long_sequences_in_parts_counts_the_tokens_with_a_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long the parts are, and however much padding there is."""
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :20] = IGNORED
    found = []
    for num_padding, tokens_at_once in ((0, 16), (0, 7), (40, 16)):
        monkeypatch.setattr(head, "LOGITS_AT_ONCE", 258 * 2 * tokens_at_once)
        padded = nn.functional.pad
        batch = {
            "input_ids": padded(ids, (0, num_padding)),
            "labels": padded(labels, (0, num_padding), value=IGNORED),
            "attention_mask": padded(torch.ones_like(ids), (0, num_padding)),
        }
        config = {"lora": {"r": 2, "target_modules": ["lm_head"]}, "init": {"scheme": "rrr"}}
        gradients = loraga_dist.initialize(make_model("llama"), [batch] * 2, config).gradients
        assert gradients is not None
        found.append(gradients.facts["lm_head"])
    for other in found[1:]:
        assert other.input_rank == pytest.approx(found[0].input_rank, rel=1e-4)
        assert other.singular_values == pytest.approx(found[0].singular_values, rel=1e-4)
