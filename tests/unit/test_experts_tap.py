"""What the tap shows of every expert is its gradient by plain autograd, and the model is left as it was."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import MOE, make_model
from experts import CPU, WAYS, Gradients, experts_of, lowest_linear, reference, routers_of, shown, worst
from families import padded_microbatches, tiny
from handmade import set_own_forward
from outputs import relative
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM

from loraga_dist.data.losses import causal_lm
from loraga_dist.forecast.ledger import microbatch_of, without_memory
from loraga_dist.gradients.experts import experts_tapped
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.taps import tapped
from loraga_dist.model.products import find_routers
from loraga_dist.model.stacks import Stack, find_stacks, split_name, untappable


def frozen(kind: str) -> Any:
    return make_model(kind).requires_grad_(False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MOE)
def test_every_expert_of_every_family(kind: str, way: str) -> None:
    model, microbatches = frozen(kind), padded_microbatches()
    names = [*experts_of(model), lowest_linear(model)]
    found, expected = shown(model, names, microbatches, way), reference(model, names, microbatches)
    assert len(found) > len(names) / 2
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MOE)
def test_routers_of_every_family_with_experts_and_alone(kind: str, way: str) -> None:
    model, microbatches = frozen(kind), padded_microbatches()
    if kind == "phimoe":  # else each expert chosen has weight 1, whatever the router says
        for layer in model.model.layers:
            layer.mlp.router.router_jitter_noise = 0.5
    routers = routers_of(model)
    assert routers == find_routers(model)
    expected = reference(model, [*routers, *experts_of(model)], microbatches)
    assert all(expected[name].any() for name in routers)
    for names in (routers, list(expected)):
        found = shown(model, names, microbatches, way)
        assert found.keys() >= set(routers)
        assert worst(found, {name: expected[name] for name in names}) < 1e-5


def test_a_router_multiplies_in_float32_where_the_model_does() -> None:
    """DeepSeek-V3's casts a weight and inputs of bfloat16; the gradient is that of the cast."""
    model, microbatches = frozen("deepseek_v3").bfloat16(), padded_microbatches()
    (router,) = routers_of(model)
    dtypes: set[torch.dtype] = set()

    class Noting(Gradients):
        def take(self, name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
            dtypes.update((x_TN.dtype, dy_TM.dtype))
            super().take(name, x_TN, dy_TM)

    found = Noting()
    with tapped(model, [router], found.take, checkpointing="none"):
        for microbatch in microbatches:
            causal_lm(forward(model, microbatch, CPU), microbatch.inputs["labels"]).backward()
    assert dtypes == {torch.float32}
    assert relative(found[router], reference(model, [router], microbatches)[router].float()) < 0.02


def test_routers_are_left_as_they_were_where_a_forward_fails() -> None:
    model, linear = frozen("mixtral"), nn.functional.linear
    before = [[*vars(module)] for module in model.modules()]

    def refuse(name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
        raise KeyError

    with tapped(model, routers_of(model), refuse, checkpointing="non_reentrant"), pytest.raises(KeyError):
        model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    with tapped(model, routers_of(model), refuse, checkpointing="none"), pytest.raises(RuntimeError):
        model.model.layers[0].mlp.gate(torch.zeros(2, 3))
    assert nn.functional.linear is linear and [[*vars(module)] for module in model.modules()] == before


def test_block_order_gives_what_model_order_gives_bit_by_bit() -> None:
    model, microbatches = frozen("olmoe"), padded_microbatches()
    names = [*experts_of(model), lowest_linear(model)]
    by_model, by_blocks = (shown(model, names, microbatches, way) for way in ("none", "block"))
    assert by_model.keys() == by_blocks.keys()
    assert all(torch.equal(by_blocks[name], G_MN) for name, G_MN in by_model.items())


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_without_tokens_is_not_shown(way: str) -> None:
    model, (microbatch, *_) = frozen("mixtral"), padded_microbatches(count=1)
    for layer in model.model.layers:
        layer.mlp.gate = Never(layer.mlp.gate, expert=3)
    names = experts_of(model)
    found, expected = shown(model, names, [microbatch], way), reference(model, names, [microbatch])
    assert not any(name.endswith(".3") for name in found)
    assert any(name.endswith(".4") for name in found)
    assert worst(found, expected) < 1e-5


class Never(nn.Module):
    """A router whose choice of one expert becomes that of the next."""

    def __init__(self, router: nn.Module, *, expert: int) -> None:
        super().__init__()
        self.router, self.expert = router, expert

    def forward(self, hidden_states: Tensor) -> Any:
        logits, weights, chosen = self.router(hidden_states)
        return logits, weights, torch.where(chosen == self.expert, self.expert + 1, chosen)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("attribute", ["gate_up_proj", "down_proj"])
def test_only_the_named_experts_are_shown_once_each(kind: str, attribute: str) -> None:
    model, microbatches = frozen(kind), padded_microbatches(count=1)
    stack = next(stack for name, stack in find_stacks(model).items() if name.endswith(attribute))
    names = [stack.names[0], stack.names[2]]
    found = shown(model, names, microbatches, "none")
    assert sorted(found.calls) == sorted(found) and found
    assert worst(found, reference(model, names, microbatches)) < 1e-5


def test_without_a_tap_there_is_no_graph() -> None:
    model, (microbatch, *_) = frozen("mixtral"), padded_microbatches(count=1)
    with experts_tapped(model):
        assert not forward(model, microbatch, CPU).requires_grad


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
def test_the_graph_keeps_no_weight_of_experts(kind: str) -> None:
    """As ZeRO-3 does it: what a parameter held is freed after forward, and there again before backward."""
    model, microbatches = frozen(kind), padded_microbatches(count=1)
    names, found = experts_of(model), Gradients()
    weights = [model.get_parameter(name) for name in find_stacks(model)]
    expected = reference(model, names, microbatches)
    with tapped(model, names, found.take, checkpointing="none"):
        loss = causal_lm(forward(model, microbatches[0], CPU), microbatches[0].inputs["labels"])
        held = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
        copies = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.data = torch.empty(0)
        assert all(storage.expired() for storage in held)
        for weight, values in zip(weights, copies, strict=True):
            weight.data = values
        loss.backward()
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
def test_bfloat16_multiplies_as_the_model_does(kind: str) -> None:
    model, microbatches = frozen(kind), padded_microbatches(count=1)
    names, half = experts_of(model), copy.deepcopy(model).bfloat16()
    with experts_tapped(half):
        ours = forward(half, microbatches[0], CPU)
    stock, exact = (forward(each, microbatches[0], CPU) for each in (half, model))
    assert ours.dtype == torch.bfloat16
    assert relative(ours.float(), exact) < 1.5 * relative(stock.float(), exact)
    # routed as in bfloat16, which chooses other experts for some tokens than float32 does
    expected = reference(half, names, microbatches)
    found = shown(half, names, microbatches, "none")
    large = [name for name, G_MN in expected.items() if G_MN.norm() > 0.1 * max(map(Tensor.norm, expected.values()))]
    assert large and all(relative(found[name].float(), expected[name].float()) < 0.05 for name in large)


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize("kind", ["mixtral", "llama4"])
def test_the_models_own_experts_are_back_on_any_exit(kind: str, checkpointing: Any) -> None:
    model, names = frozen(kind).train(), experts_of(frozen(kind))
    calls = set_own_forward(model.model.layers[1])
    before = [(*vars(module), module.training) for module in model.modules()]
    implementation = model.config._experts_implementation
    for fails in (False, True):
        try:
            with tapped(model, names, Gradients().take, checkpointing=checkpointing), experts_tapped(model):
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert [(*vars(module), module.training) for module in model.modules()] == before
        assert model.config._experts_implementation == implementation
    model(input_ids=torch.arange(8)[None], use_cache=False)
    assert calls


def test_a_name_of_nothing_is_refused_and_nothing_stays() -> None:
    model = frozen("mixtral")
    for name in ("model.layers.0.mlp.experts.up_proj.0", "model.layers.0.mlp.experts", "model.layers.9.mlp"):
        with pytest.raises(AssertionError), experts_tapped(model, [name], Gradients().take):
            pass
    assert model.config._experts_implementation != "loraga_dist"


@pytest.mark.parametrize(
    ("family", "class_name", "config"),
    [
        ("nemotron_h", "NemotronHExperts", {"n_routed_experts": 4, "mlp_hidden_act": "relu2", "moe_latent_size": None}),
        ("muse_spark", "MuseSparkExperts", {"num_local_experts": 4, "moe_hidden_size": 8, "post_norm_eps": 1e-5}),
        ("aria", "AriaExperts", {"moe_num_experts": 4}),
        (
            "openai_privacy_filter",
            "OpenAIPrivacyFilterExperts",
            {"num_local_experts": 4, "swiglu_alpha": 1.7, "swiglu_limit": 7.0},
        ),
    ],
)
def test_experts_without_a_gate_with_a_norm_or_stored_otherwise(
    family: str, class_name: str, config: dict[str, Any]
) -> None:
    """Alone, against their own eager code, routed at random; some choose none, where it knows that."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    values = {"hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 12, "hidden_act": "silu"} | config
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"experts": getattr(module, class_name)(SimpleNamespace(**values, _experts_implementation="eager"))}
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x, weights = torch.randn(20, 8, requires_grad=True), torch.rand(20, 2, requires_grad=True)
    chosen = torch.randint(0, 5 if family in ("muse_spark", "aria") else 4, (20, 2))
    tangent = torch.randn(20, 8)
    names, found = experts_of(model), Gradients()

    def gradients() -> tuple[Tensor, ...]:
        y = model["experts"](x, chosen, weights)
        return y.detach(), *torch.autograd.grad((y * tangent).sum(), (x, weights), retain_graph=True)

    expected = gradients()
    (model["experts"](x, chosen, weights) * tangent).sum().backward()
    with experts_tapped(model, names, found.take):
        for ours, its in zip(gradients(), expected, strict=True):
            assert relative(ours, its) < 1e-5
    for name, G_MN in found.items():
        parameter, expert = split_name(name) or ("", 0)
        gradient: Any = model.get_parameter(parameter).grad
        expected_MN = gradient[expert].T if find_stacks(model)[parameter].transposed else gradient[expert]
        assert relative(G_MN, expected_MN) < 1e-5
    assert len(found) == 8


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
def test_a_forecast_runs_experts_without_values(kind: str) -> None:
    """One of each stack is shown: what it takes, all take one by one."""
    config, found = frozen(kind).config, []
    with without_memory():
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
        names = experts_of(model)
        with tapped(model, names, lambda name, x_TN, dy_TM: found.append(name), checkpointing="none"):
            forward(model, microbatch_of({"input_ids": (2, 16), "labels": (2, 16)}), CPU).sum().backward()
    assert sorted(found) == sorted(name for name in names if name.endswith(".0"))


class TestStacks:
    def test_shapes_are_those_of_matrices(self) -> None:
        H, expert = 32, 24
        for kind, values in MOE.items():
            count = next(value for name, value in values.items() if "_experts" in name and "per_tok" not in name)
            for stack in find_stacks(make_model(kind)).values():
                M, N = (2 * expert, H) if "gate_up" in stack.parameter_name else (H, expert)
                if kind == "llama4":
                    M, N = N, M
                expected = Stack(
                    parameter_name=stack.parameter_name,
                    E=count, M=M, N=N, num_chosen=1 if kind == "llama4" else 2,
                    transposed=kind == "gpt_oss", swapped=kind == "llama4",
                )  # fmt: skip
                assert stack == expected, kind

    def test_a_model_on_the_meta_device_has_the_same(self) -> None:
        model: Any = make_model("deepseek_v3")
        with torch.device("meta"):
            on_meta = type(model)(model.config)
        assert find_stacks(on_meta) == find_stacks(model) and find_stacks(model)

    def test_names(self) -> None:
        assert split_name("a.experts.down_proj.12") == ("a.experts.down_proj", 12)
        assert split_name("a.q_proj") is split_name("3") is None

    @pytest.mark.parametrize(
        ("kind", "class_name", "config"),
        [
            ("jetmoe", "JetMoeParallelExperts", {}),
            ("longcat_flash", "LongcatFlashExperts", {}),
            ("dbrx", "DbrxExpertGLU", {"attn_config": {"rope_theta": 1e4}}),
        ],
    )
    def test_families_of_other_kinds_are_named(self, kind: str, class_name: str, config: dict[str, Any]) -> None:
        shape = {"num_hidden_layers": 2, "num_layers": 2, "n_layers": 2}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **config))
        assert not find_stacks(model)
        assert {type(model.get_submodule(name)).__name__ for name in untappable(model)} == {class_name}

    def test_experts_of_other_processes_are_named(self) -> None:
        model = frozen("mixtral")
        model.model.layers[1].mlp.experts._is_expert_parallel = True
        assert untappable(model) == ["model.layers.1.mlp.experts"]
        assert len(find_stacks(model)) == 2

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba", "zamba2", "gemma3n", "bert", *MOE])
    def test_nothing_else_looks_like_experts(self, kind: str) -> None:
        model = make_model(kind) if kind in MOE else tiny(kind)
        assert untappable(model) == []
        assert bool(find_stacks(model)) == (kind in MOE)
