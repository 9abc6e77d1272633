"""What benchmarks/convergence.py trains on: two kinds of text, whole or a few windows of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from convergence_methods import Batch, R, full_gradients
from rate_search import Journal
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraga_dist.errors import RunError, UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but the method that decides what a run gives; a results file belongs to one of these."""

    tasks: tuple[str, ...] = ("help", "headers")
    seeds: tuple[int, ...] = (0, 1, 2)
    """Learning rates are chosen on the first."""
    steps: int = 50
    batch_size: int = 4
    sequence_length: int = 128
    check_every_steps: int = 10
    heldout_windows: int = 32
    calibration_batches: int = 32
    """What LoRA-GA, LoRA-One and PEFT's lora_ga see of the training text beforehand."""
    gradient_batches: int = 64
    """Evenly over the training text: the full gradient that first updates are compared with."""
    common_lr: float = 0.001
    r: int = R
    more_steps: int = 60
    """As many as take what a calibration and its factorizations take: 6.1 to 6.7 s of a core on an AMD EPYC for RRR,
    where a step takes 0.11 s."""
    lengths: tuple[int, ...] = (20, 300)
    """Other numbers of steps, of the fair comparison."""
    longest: int = 1000
    """The same, on the last task alone."""
    few_shot_windows: int = 32
    """Of training text, and as many for validation."""
    few_shot_steps: int = 100
    few_shot_more_steps: int = 18
    """The same of a calibration on these windows, 2.1 s."""


QUICK = Settings(
    tasks=("help",), seeds=(0, 1), steps=6, batch_size=2, sequence_length=64, check_every_steps=3, heldout_windows=8,
    calibration_batches=4, gradient_batches=4, common_lr=0.008, more_steps=3, lengths=(3,), longest=9,
    few_shot_windows=8, few_shot_steps=9, few_shot_more_steps=3,
)  # fmt: skip


class Bench:
    """One text and the pretrained model."""

    validation_loss: Callable[[nn.Module], float] | None = None

    def __init__(self, model: str, settings: Settings, text: str) -> None:
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        training, heldout = [], []
        for index, document in enumerate(TEXTS[text]()):
            (heldout if index % 8 == 0 else training).append(document + tokenizer.eos_token)
        self.training_ids, self.heldout_ids = (
            torch.tensor(tokenizer("".join(documents)).input_ids) for documents in (training, heldout)
        )

    def training_batches(self, count: int, seed: int) -> Iterator[Batch]:
        """Random windows, int64 [batch, sequence]; all tokens are supervised."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            last = len(self.training_ids) - self.settings.sequence_length
            starts_B = torch.randint(last + 1, (self.settings.batch_size,), generator=generator)
            yield self._windows(self.training_ids, starts_B)

    def calibration_batches(self, seed: int) -> list[Batch]:
        return list(self.training_batches(self.settings.calibration_batches, seed))

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return model(**batch).loss

    @functools.cached_property
    def gradients(self) -> dict[str, Tensor]:
        starts = self._spread(self.training_ids, self.settings.gradient_batches * self.settings.batch_size)
        batches = [self._windows(self.training_ids, starts_B) for starts_B in starts.split(self.settings.batch_size)]
        return full_gradients(self.model, batches)

    def heldout_loss(self, model: nn.Module) -> float:
        """Mean nats per token over evenly spaced windows of the held-out documents."""
        starts = self._spread(self.heldout_ids, self.settings.heldout_windows)
        return self._mean_loss(model, self.heldout_ids, starts)

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module, ids: Tensor, starts: Tensor) -> float:
        losses = []
        for starts_B in starts.split(16):
            ids_BS = self._windows(ids, starts_B)["input_ids"]
            # not the model's own loss: AdaLoRA adds its regularization to it
            logits_BSV = model(input_ids=ids_BS).logits
            losses.append(F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten()) * len(ids_BS))
        return (torch.stack(losses).sum() / len(starts)).item()

    def _spread(self, ids: Tensor, count: int) -> Tensor:
        return torch.linspace(0, len(ids) - self.settings.sequence_length, count).long()

    def _windows(self, ids: Tensor, starts_B: Tensor) -> Batch:
        ids_BS = ids[starts_B[:, None] + torch.arange(self.settings.sequence_length)]
        return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": ids_BS}


class FewShot(Bench):
    """The same with a few windows of the training text, and as many of what lies between them for validation."""

    def __init__(self, model: str, settings: Settings, text: str) -> None:
        super().__init__(model, settings, text)
        starts = self._spread(self.training_ids, 2 * settings.few_shot_windows)
        self.training_starts, self.validation_starts = starts[::2], starts[1::2]
        assert len(self.training_ids) >= 2 * settings.few_shot_windows * settings.sequence_length, "windows overlap"

    def training_batches(self, count: int, seed: int) -> Iterator[Batch]:
        """Each window once an epoch, in a random order."""
        generator = torch.Generator().manual_seed(seed)
        batches: list[Tensor] = []
        for _ in range(count):
            if not batches:
                order = torch.randperm(len(self.training_starts), generator=generator)
                batches = list(self.training_starts[order].split(self.settings.batch_size))
            yield self._windows(self.training_ids, batches.pop())

    def calibration_batches(self, seed: int) -> list[Batch]:
        return list(self.training_batches(len(self.training_starts) // self.settings.batch_size, seed))

    def validation_loss(self, model: nn.Module) -> float:
        return self._mean_loss(model, self.training_ids, self.validation_starts)


@functools.cache
def bench_of(model: str, settings: Settings, text: str, few_shot: bool) -> Bench:
    return (FewShot if few_shot else Bench)(model, settings, text)


def require_same_model(model: str, settings: Settings, text: str, journal: Journal) -> None:
    """Note the model's loss before training in the results, or raise UserError where they are of another model.

    The quickstart model is another on a processor that multiplies bfloat16 than on one that does not.
    """
    bench = Bench(model, settings, text)
    loss = bench.heldout_loss(bench.model)
    known = [entry["loss"] for entry in journal.read() if entry["kind"] == "model" and entry["text"] == text]
    if not known:
        journal.add({"kind": "model", "text": text, "loss": round(loss, 5)})
    elif abs(known[0] - loss) > 1e-4:
        problem = f"has a loss of {loss:.5f} on {text}, the model of {journal.path}, {known[0]:.5f}"
        raise UserError("--model", model, f"{problem}; name that one, or a new results file")


def _help_topics() -> Sequence[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _headers() -> Sequence[str]:
    root = Path(torch.__file__).parent / "include" / "c10"
    paths = sorted(root.rglob("*.h"))
    if not paths:
        raise RunError(f"{root} has no C++ headers; this torch was installed without them")
    return [path.read_text(encoding="utf-8") for path in paths]


TEXTS: dict[str, Callable[[], Sequence[str]]] = {"help": _help_topics, "headers": _headers}
