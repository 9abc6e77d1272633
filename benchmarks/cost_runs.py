"""The ways to a LoRA-GA start that the cost benchmarks compare, each over the same batches of one random Llama."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loraga_dist.config import GradientConfig, LoraSection, MethodConfig, SchemeConfig, StateDevice
from loraga_dist.data.losses import causal_lm
from loraga_dist.data.microbatches import BatchSharder, Microbatch
from loraga_dist.engines import Amount, ExactEngine, SketchEngine
from loraga_dist.gradients.calibrate import calibrate
from loraga_dist.gradients.forward import forward
from loraga_dist.model.blocks import choose_order, find_blocks
from loraga_dist.model.coverage import Weights
from loraga_dist.model.plan import Plan, make_plan
from loraga_dist.model.selection import select_targets
from loraga_dist.model.targets import meta_copy
from loraga_dist.ranks.memory import PeakMemory
from loraga_dist.ranks.progress import Clock
from loraga_dist.ranks.world import World
from loraga_dist.request.request import Request
from loraga_dist.schemes import SCHEMES
from loraga_dist.sharding.base import Sharding
from loraga_dist.sharding.single import SingleProcess
from loraga_dist.start.place import add_adapter, place_factors
from loraga_dist.start.rounds import make_owned_factors


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama and its calibration data. The vocabulary is small, so that head and loss hide nothing."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    microbatches: int
    tokens: int
    """Per microbatch, in one sequence."""
    r: int = 8
    vocabulary: int = 2048


@dataclass
class Outcome:
    """One run of one way."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all threads: what other work on the machine does not change much."""
    peak_bytes: int = 0
    directions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By target: U_MR and V_NR, spanning what B0 and A0 span."""
    details: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Bench:
    """One model, its batches, and the ways over them, on the sharding's device.

    Under ZeRO-3 ranks share the microbatches out; `peft` is for a single process.
    """

    def __init__(self, shape: Shape, sharding: Sharding, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.sharding, self.world, self.dtype = shape, sharding, sharding.world, dtype
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=max(shape.tokens, 128),
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        with self.world.device, sharding.new_parameters(dtype):
            self.model: Any = LlamaForCausalLM._from_config(config, dtype=dtype).requires_grad_(False).eval()
        # token frequencies fall as in text, so that gradients have a leading part and a long tail
        frequencies = torch.arange(1, shape.vocabulary + 1) ** -1.0
        mine = range(self.world.rank, shape.microbatches, self.world.size)
        self.microbatches = [self._microbatch(index, frequencies) for index in mine]
        self.amount = Amount(shape.microbatches * (shape.tokens - 1), shape.microbatches, dtype)
        self.lora = LoraSection(r=shape.r)
        scheme = SCHEMES["lora_ga"]
        self.targets = select_targets(meta_copy(LlamaForCausalLM, config), self.lora, scheme.num_triplets).targets

    def _microbatch(self, index: int, frequencies: Tensor) -> Microbatch:
        draw = torch.Generator().manual_seed(index)
        ids = torch.multinomial(frequencies, self.shape.tokens, replacement=True, generator=draw)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        return Microbatch(inputs, self.shape.tokens - 1, index, ())

    def plan(self, config: MethodConfig) -> Plan:
        names = [target.name for target in self.targets]
        in_pieces = self.sharding.is_sharded
        order = choose_order(config.gradient.order, "Llama", find_blocks(self.model), names, in_pieces=in_pieces)
        return make_plan(self.targets, config, self.world.size, order, self.amount)

    def floor(self) -> Outcome:
        """Forward, and backward down to the outputs of the lowest targets: what no way can leave out."""

        def start_graph(module: Any, args: Any, output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()

        model = self.sharding.attach(self.model)
        modules = dict(model.named_modules())
        handles = [modules[target.name].register_forward_hook(start_graph) for target in self.targets]
        try:
            with self._measured() as outcome:
                self._backwards(model)
        finally:
            for handle in handles:
                handle.remove()
            self.sharding.detach()
        return outcome

    def warm_up(self) -> None:
        """Libraries choose and cache their kernels at the first call of a shape."""
        everything, self.microbatches = self.microbatches, self.microbatches[:2]
        self.floor()
        self.sketch()
        self.microbatches = everything

    def sketch(self, *, place: bool = False, state_device: StateDevice = "auto") -> Outcome:
        """Ours: `calibrate`, with the sketch engine; `details` says where its time went."""
        with clocked(SketchEngine, "observe", "end_microbatch") as seconds:
            outcome = self._calibrate("sketch", place=place, state_device=state_device)
        outcome.details |= {f"seconds_{name}": value for name, value in seconds.items()}
        return outcome

    def rrr(self) -> Outcome:
        """Ours, with the sketch engine, for reduced-rank regression: what the inputs' moments and it cost beside."""
        outcome = self._calibrate("sketch", scheme="rrr")
        outcome.directions = {}  # of another quantity than the gradient
        return outcome

    def auto(self) -> Outcome:
        """Ours as a user gets it: every target with the engine that `auto` takes for this much data."""
        return self._calibrate("auto")

    def exact(self) -> Outcome:
        """Ours with the exact engine; keeps the gradients, as the truth the others are measured against."""
        kept: dict[str, Tensor] = {}
        original = ExactEngine.mean_gradients

        def keeping(engine: ExactEngine, num_tokens: int) -> Iterator[Any]:
            for matrix, G_MN in original(engine, num_tokens):
                kept[matrix.name] = G_MN
                yield matrix, G_MN

        ExactEngine.mean_gradients = keeping
        try:
            outcome = self._calibrate("exact")
        finally:
            ExactEngine.mean_gradients = original
        outcome.gradients = kept
        return outcome

    def peft(self) -> Outcome:
        """Stock PEFT: `preprocess_loraga`, then `get_peft_model`; on a copy, as it changes the weights."""
        from peft import LoraConfig, LoraGAConfig, get_peft_model
        from peft.tuners.lora import preprocess_loraga

        model: Any = copy.deepcopy(self.model)
        config = LoraConfig(
            r=self.shape.r,
            lora_alpha=2 * self.shape.r,
            target_modules=[target.name for target in self.targets],
            init_lora_weights="lora_ga",
            lora_ga_config=LoraGAConfig(),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(0)
        with self._measured() as outcome:
            started = time.perf_counter()
            preprocess_loraga(model, config, lambda: self._backwards(model))
            self._wait()
            outcome.details["seconds_preprocess"] = time.perf_counter() - started
            peft_model = get_peft_model(model, config)
        for target in self.targets:
            layer = peft_model.base_model.model.get_submodule(target.name)
            outcome.directions[target.name] = (
                layer.lora_B["default"].weight.detach().float(),
                layer.lora_A["default"].weight.detach().float().T,
            )
        return outcome

    def _calibrate(
        self,
        engine: Literal["auto", "sketch", "exact"],
        *,
        place: bool = False,
        state_device: StateDevice = "auto",
        scheme: str = "lora_ga",
    ) -> Outcome:
        gradient = GradientConfig(
            engine=engine, checkpointing="none", state_budget_gib=1024.0, state_device=state_device
        )
        config = MethodConfig(lora=self.lora, gradient=gradient, init=SchemeConfig(scheme=scheme))
        plan, sharding = self.plan(config), self.sharding
        request = Request(
            config=config,
            plan=plan,
            data=BatchSharder(self.microbatches),
            factor_dtypes={target.name: self.dtype for target in plan.targets},
            amount=self.amount,
            coverage=Weights.of(self.model).covered_by(plan.targets, ()),
        )
        clock = Clock()
        with self._measured() as outcome:
            found = calibrate(self.model, request, sharding=sharding, clock=clock)
        r = self.shape.r
        for name, svd in found.owned.items():
            outcome.directions[name] = (svd.U_MK[:, r : 2 * r], svd.Vh_KN[:r].T)
        outcome.details |= {
            "seconds_factorize": clock.seconds["factorize"],
            "engines": sorted({matrix.engine for matrix in plan.matrices.values()}),
            "state_bytes": found.state_bytes_per_rank,
            "reported_captured_energy": {name: facts.captured_energy for name, facts in found.facts.items()},
        }
        if place:
            model = copy.deepcopy(self.model)
            started = time.perf_counter()
            peft_model = add_adapter(model, self.lora, plan.targets, sharding)
            owned = make_owned_factors(model, request, plan, found.owned, sharding=sharding)
            place_factors(peft_model, plan, owned, sharding=sharding)
            self._wait()
            outcome.details["seconds_place"] = time.perf_counter() - started
        return outcome

    def _backwards(self, model: Any) -> None:
        for microbatch in self.microbatches:
            causal_lm(forward(model, microbatch, self.world.device), microbatch.inputs["labels"]).backward()
            self.sharding.release()

    @contextmanager
    def _measured(self) -> Iterator[Outcome]:
        gc.collect()
        self._wait()
        outcome = Outcome()
        cpu_started = time.process_time()
        if self.world.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with PeakMemory(self.world.device) as memory:
                begin.record()
                yield outcome
                end.record()
                end.synchronize()
            outcome.seconds = begin.elapsed_time(end) / 1000
        else:
            with PeakMemory(self.world.device) as memory:
                started = time.perf_counter()
                yield outcome
                outcome.seconds = time.perf_counter() - started
        outcome.cpu_seconds = time.process_time() - cpu_started
        outcome.peak_bytes = memory.peak_bytes

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def one_process(device: torch.device) -> SingleProcess:
    return SingleProcess(World(0, 1, 0, device))


@contextmanager
def clocked(owner: type, *methods: str) -> Iterator[dict[str, float]]:
    """Seconds spent in methods of a class while the context lasts. Host time: it says little on a GPU."""
    seconds = dict.fromkeys(methods, 0.0)
    originals = {name: getattr(owner, name) for name in methods}

    def wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - started

        return timed

    for name, method in originals.items():
        setattr(owner, name, wrap(name, method))
    try:
        yield seconds
    finally:
        for name, method in originals.items():
            setattr(owner, name, method)


def step_energy(G_MN: Tensor, U_MR: Tensor, V_NR: Tensor) -> float:
    """Share of ||G||_F^2 in LoRA's first step from B0 with the columns of U and A0 with the rows of V^T.

    With projectors P_U, P_V and X = P_U G + G P_V: 1 - ||G - X||^2 / ||G||^2. At most the energy of 2r directions.
    """
    U_MR, V_NR = (torch.linalg.qr(X.to(G_MN.device).float()).Q for X in (U_MR, V_NR))
    UtG_RN = U_MR.T @ G_MN
    parts = [(UtG_RN, 1), (G_MN @ V_NR, 1), (UtG_RN @ V_NR, -2)]
    held = sum(sign * torch.linalg.vector_norm(part, dtype=torch.float64).square() for part, sign in parts)
    return float(held / torch.linalg.vector_norm(G_MN, dtype=torch.float64).square())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
