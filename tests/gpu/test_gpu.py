"""The engines on a CUDA device, against float64 sums; memory; and no waiting for the device while data goes by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import llama_config
from families import TARGETS, padded_microbatches, targets_of, tiny
from outputs import relative
from pieces import exact_gradients
from subspace import efficiency
from torch import Tensor
from transformers import LlamaForCausalLM

import loraga_dist
from loraga_dist.config import GradientConfig, LoraSection, MethodConfig
from loraga_dist.data.losses import causal_lm
from loraga_dist.data.microbatches import BatchSharder, Microbatch
from loraga_dist.engines import ENGINES, GradientEngine, GradientSVD, Matrix, StateHome
from loraga_dist.gradients.calibrate import calibrate
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.kept import Keeping, KeptInputs
from loraga_dist.model.blocks import choose_order, find_blocks
from loraga_dist.model.plan import make_plan
from loraga_dist.model.selection import select_targets
from loraga_dist.model.targets import meta_copy
from loraga_dist.ranks.memory import PeakMemory
from loraga_dist.ranks.progress import Clock
from loraga_dist.ranks.world import World
from loraga_dist.request.request import Request
from loraga_dist.schemes import SCHEMES
from loraga_dist.sharding.single import SingleProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)
M, N, R, TOKENS, MICROBATCHES = 768, 640, 4, 256, 16
LEAST, CAPTURED_OFF = 0.9999, 2 * 0.0204
"""docs/BENCHMARKS.md, quickstart model, all tokens, r = 4: means over targets; one may be off by twice that."""


def data(index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(index)
    dy_TM = torch.randn(TOKENS, M, generator=draw) * torch.arange(1, M + 1) ** -0.5
    x_TN = dy_TM[:, :N] + 0.5 * torch.randn(TOKENS, N, generator=draw) * torch.arange(1, N + 1) ** -0.5
    return x_TN.to(DEVICE, dtype), dy_TM.to(DEVICE, dtype)


def truth(dtype: torch.dtype) -> Tensor:
    return torch.stack([product(index, dtype) for index in range(MICROBATCHES)]).sum(dim=0) / TOKENS


def product(index: int, dtype: torch.dtype) -> Tensor:
    x_TN, dy_TM = data(index, dtype)
    return dy_TM.double().T @ x_TN.double()


def new_engine(kind: str, dtype: torch.dtype, *, on_host: bool, names: tuple[str, ...] = ("target",)) -> GradientEngine:
    width = ENGINES[kind].width(2 * R, M, N, None)
    matrices = [Matrix(name=name, M=M, N=N, num_triplets=2 * R, width=width, owner=0, engine=kind) for name in names]
    return ENGINES[kind](matrices, home=StateHome(DEVICE, on_host=on_host), seed=0, dtype=dtype)


def factorize(kind: str, dtype: torch.dtype, *, on_host: bool) -> GradientSVD:
    engine, world = new_engine(kind, dtype, on_host=on_host), World(0, 1, 0, DEVICE)
    for index in range(MICROBATCHES):
        engine.begin_microbatch(index)
        engine.observe("target", *data(index, dtype))
        engine.end_microbatch(world)
    return dict(engine.factorize(world, TOKENS))["target"]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sketch_finds_the_gradient(dtype: torch.dtype, on_host: bool) -> None:
    result, G_MN = factorize("sketch", dtype, on_host=on_host), truth(dtype)
    assert efficiency(G_MN, result.svd.U_MK[:, R : 2 * R], result.svd.Vh_KN[:R].T) >= LEAST
    S = torch.linalg.svdvals(G_MN)
    assert torch.allclose(result.svd.S_K[: 2 * R].double(), S[: 2 * R], rtol=0.01)
    captured = (S[: 2 * R].square().sum() / S.square().sum()).item()
    assert result.captured_energy == pytest.approx(captured, abs=CAPTURED_OFF)


@pytest.mark.parametrize("on_host", [False, True])
def test_exact_is_the_svd(on_host: bool) -> None:
    result, G_MN = factorize("exact", torch.float32, on_host=on_host), truth(torch.float32)
    U, S, Vh = torch.linalg.svd(G_MN, full_matrices=False)
    assert torch.allclose(result.svd.S_K[: 2 * R].double(), S[: 2 * R], rtol=1e-5)
    best = U[:, : 2 * R] * S[: 2 * R] @ Vh[: 2 * R]
    svd = result.svd.leading(2 * R)
    assert (svd.U_MK * svd.S_K @ svd.Vh_KN - best).norm() < 1e-4 * best.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_sums_16_bits_in_float32(dtype: torch.dtype) -> None:
    result, G_MN = factorize("exact", dtype, on_host=False), truth(dtype)
    S = torch.linalg.svdvals(G_MN)
    assert torch.allclose(result.svd.S_K[: 2 * R].double(), S[: 2 * R], rtol=1e-5)
    halves = [sum(product(index, dtype) for index in range(half, MICROBATCHES, 2)) for half in (0, 1)]
    cosine = (halves[0] * halves[1]).sum() / (halves[0].norm() * halves[1].norm())
    assert result.split_half_cosine == pytest.approx(cosine.item(), abs=0.05)


@pytest.mark.parametrize("kind", ENGINES)
def test_state_on_the_host_gives_the_same_factors(kind: str) -> None:
    here, there = (factorize(kind, torch.bfloat16, on_host=on_host).svd for on_host in (False, True))
    for name in ("U_MK", "S_K", "Vh_KN"):
        assert torch.allclose(getattr(here, name), getattr(there, name), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("on_host", [False, True])
def test_observe_does_not_wait_for_the_device(on_host: bool) -> None:
    engine, world = new_engine("sketch", torch.bfloat16, on_host=on_host), World(0, 1, 0, DEVICE)
    for index in range(4):
        x_TN, dy_TM = data(index, torch.bfloat16)
        engine.begin_microbatch(index)
        with waiting_is_an_error():
            engine.observe("target", x_TN, dy_TM)
        engine.end_microbatch(world)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("kind", ENGINES)
def test_saved_state_goes_on_where_it_was(kind: str, on_host: bool) -> None:
    world = World(0, 1, 0, DEVICE)
    straight = factorize(kind, torch.bfloat16, on_host=on_host)
    engine = new_engine(kind, torch.bfloat16, on_host=on_host)
    for index in range(MICROBATCHES):
        if index == 3:
            engine.split_half_cosines(world)
            saved = engine.save_state(world)
            engine = new_engine(kind, torch.bfloat16, on_host=on_host)
            engine.load_state(saved.content, saved.tensors, world)
        engine.begin_microbatch(index)
        engine.observe("target", *data(index, torch.bfloat16))
        engine.end_microbatch(world)
    resumed = dict(engine.factorize(world, TOKENS))["target"]
    assert torch.allclose(resumed.svd.S_K, straight.svd.S_K, rtol=1e-4, atol=1e-5 * straight.svd.S_K[0].item())
    assert resumed.split_half_cosine == pytest.approx(straight.split_half_cosine, abs=1e-5)


def test_state_takes_what_the_plan_says_or_none_of_the_device() -> None:
    names = tuple(f"target{i}" for i in range(32))
    sketch = ENGINES["sketch"]
    width = sketch.width(2 * R, M, N, None)
    matrix = Matrix(name="any", M=M, N=N, num_triplets=2 * R, width=width, owner=0, engine="sketch")
    planned = len(names) * sketch.state_bytes(matrix)
    x_TN, dy_TM = data(0, torch.bfloat16)
    world = World(0, 1, 0, DEVICE)
    peaks = []
    for on_host in (False, True):
        torch.cuda.synchronize()
        with PeakMemory(DEVICE) as memory:
            engine = new_engine("sketch", torch.bfloat16, on_host=on_host, names=names)
            for index in range(4):
                engine.begin_microbatch(index)
                for name in names:
                    engine.observe(name, x_TN, dy_TM)
                engine.end_microbatch(world)
            peaks.append(memory.peak_bytes)
        del engine
    temporaries = 32 * 2**20
    assert peaks[0] <= planned + temporaries
    assert peaks[1] <= planned / len(names) + temporaries


def test_auto_takes_the_host_only_where_state_does_not_fit() -> None:
    assert not StateHome.choose("auto", DEVICE, 2**20).on_host
    assert StateHome.choose("auto", DEVICE, 2**50).on_host
    assert StateHome.choose("host", DEVICE, 0).on_host


@pytest.mark.parametrize("state_device", ["device", "host"])
@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize("order", ["model", "block"])
@pytest.mark.parametrize("kind", ENGINES)
def test_calibrate_against_autograd(kind: str, order: Any, checkpointing: str, state_device: str) -> None:
    config = llama_config(hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=4)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(DEVICE).requires_grad_(False).eval()
    ids = torch.randint(0, 256, (6, 1, 96))
    microbatches = [Microbatch({"input_ids": x, "labels": x.clone()}, 95, i, ()) for i, x in enumerate(ids)]
    scheme = SCHEMES["lora_ga"]
    targets = select_targets(meta_copy(LlamaForCausalLM, config), LoraSection(r=R), scheme.num_triplets).targets
    gradient = GradientConfig(
        engine=kind,  # type: ignore[arg-type]
        checkpointing=checkpointing,  # type: ignore[arg-type]
        state_device=state_device,  # type: ignore[arg-type]
        refine_passes=1,
        order=order,
    )
    names = [target.name for target in targets]
    chosen = choose_order(order, "Llama", find_blocks(model), names, in_pieces=False)
    method = MethodConfig(lora=LoraSection(r=R), gradient=gradient)
    request = Request(
        config=method,
        plan=make_plan(targets, method, 1, chosen),
        data=BatchSharder(microbatches),
        factor_dtypes={},
    )
    sharding = SingleProcess(World(0, 1, 0, DEVICE))
    found = calibrate(model, request, sharding=sharding, clock=Clock(), keeping=Keeping(chunk_microbatches=4))
    # a random model's gradients have flat spectra, the hardest for a sketch
    least = {"exact": 0.9999, "sketch": 0.99}[kind]
    reference = model.double()
    weights = {target.name: reference.get_submodule(target.name).weight.requires_grad_() for target in targets}
    for microbatch in microbatches:
        causal_lm(forward(reference, microbatch, DEVICE).float(), microbatch.inputs["labels"]).backward()
    for name, weight in weights.items():
        svd = found.owned[name]
        assert efficiency(weight.grad.cpu(), svd.U_MK[:, R : 2 * R], svd.Vh_KN[:R].T) >= least, name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "mixtral"])
def test_block_order_is_model_order(kind: str, attention: str) -> None:
    """What waits between blocks is on the host meanwhile, and comes back as it was."""
    model = tiny(kind, attention).to(DEVICE)
    targets, microbatches = targets_of(model, TARGETS.get(kind, "all-linear")), padded_microbatches()
    sharding = SingleProcess(World(0, 1, 0, DEVICE))
    by_blocks, by_model = (
        {name: G_MN.clone() for name, G_MN in exact_gradients(model, sharding, targets, microbatches, config)}
        for config in (GradientConfig(order=order, checkpointing="none") for order in ("block", "model"))
    )
    assert by_blocks.keys() == by_model.keys()
    for name, G_MN in by_model.items():
        assert relative(by_blocks[name], G_MN) < 1e-6, name


@pytest.mark.parametrize("in_file", [False, True])
def test_kept_inputs_come_back(in_file: bool, tmp_path: Path) -> None:
    hidden = [torch.randn(2, 64 + at, 32, device=DEVICE, dtype=torch.bfloat16) for at in range(8)]
    with KeptInputs(tmp_path if in_file else None, DEVICE) as kept:
        for at, tensor in enumerate(hidden):
            kept.put(0, at, tensor)
        assert all(torch.equal(kept.get(0, at), tensor) for at, tensor in enumerate(hidden))


@pytest.mark.skipif(not hasattr(torch.accelerator, "empty_host_cache"), reason="this torch keeps it")
def test_a_start_leaves_no_pinned_memory() -> None:
    before = torch.cuda.host_memory_stats().get("num_host_alloc", 0)
    config = {"lora": {"r": 2}, "gradient": {"order": "block", "state_device": "host"}}
    loraga_dist.initialize(tiny("llama").to(DEVICE), [each.inputs for each in padded_microbatches()], config)
    after = torch.cuda.host_memory_stats()
    assert after["num_host_alloc"] > before, "else there is nothing to give back"
    assert after["allocated_bytes.current"] == after["active_bytes.current"]
