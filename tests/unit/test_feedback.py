"""Preference and policy data against TRL's DPOTrainer and GRPOTrainer: tokens, advantages, gradients at the start."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import byte_tokenizer, config_tree, save_model
from datasets import Dataset
from families import alone, targets_of
from outputs import causal_lm, make_output, read_report, relative
from pieces import exact_gradients
from torch import Tensor
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from loraga_dist.config import CalibrationConfig, GradientConfig
from loraga_dist.data.losses import IGNORED
from loraga_dist.data.microbatches import Microbatch, Sample, SampleSharder, microbatches_from_batches
from loraga_dist.data.samples import fingerprints, load_samples
from loraga_dist.errors import UserError
from loraga_dist.gradients import head

MAX_LENGTH = 40
BY_BLOCKS, BY_MODEL = (GradientConfig(order=order, checkpointing="none") for order in ("block", "model"))
# the generation prompt ends in what one completion begins with, and another does not
CHAT = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:<{% endif %}"
)
PAIRS = [
    {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "five, or so they say"},
    {"prompt": "the sky is", "chosen": " blue, as everyone can see who looks", "rejected": " red</s>"},
    {"prompt": "long " * 12, "chosen": "cut off", "rejected": "cut off, too"},
    {"prompt": "", "chosen": "from nothing", "rejected": "no"},
    {"prompt": "cut in the middle of what was ", "chosen": "chosen among many", "rejected": "not"},
]
CHAT_PAIRS = [
    {
        "prompt": [{"role": "user", "content": "q" * length}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for length, chosen in ((3, "<yes"), (12, "yes, and more of it than is kept"), (1, "<"))
]
WITHOUT_PROMPT = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHAT_PAIRS
]
SAMPLED = [
    {"prompt": prompt, "completion": completion, "reward": reward}
    for prompt, completions in {
        "2 + 2 = ": [("4", 1.0), ("four, of course", 0.75), ("5", -0.5)],
        "the sky is": [(" blue", 3.0), (" red, or green", 1.0), (" up there", 1.5)],
    }.items()
    for completion, reward in completions
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"))


def tokenizer_of(llama: Path, template: str | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = template
    return tokenizer


def save_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples_of(tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **options: Any) -> list[Sample]:
    """In the order of the rows."""
    task_type = options.pop("task_type", "CAUSAL_LM")
    data = str(save_rows(tmp_path / "rows.jsonl", rows))
    config = CalibrationConfig(data_files=data, **({"max_length": MAX_LENGTH} | options))
    found = load_samples(config, tokenizer or byte_tokenizer(), task_type=task_type, max_positions=None)
    return sorted(found, key=lambda sample: sample.row)


def microbatches_of(samples: list[Sample], size: int, rank: int = 0, world_size: int = 1) -> list[Microbatch]:
    sharder = SampleSharder(
        samples=samples, rank=rank, world_size=world_size, per_device_batch_size=size, pad_token_id=256
    )
    return sharder.microbatches(0, len(samples), 0)


def dpo_trainer(tmp_path: Path, llama: Path, rows: list[dict[str, Any]], tokenizer: Any) -> DPOTrainer:
    args = DPOConfig(
        output_dir=str(tmp_path / "dpo"),
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=MAX_LENGTH,
        gradient_checkpointing=False,
    )
    data = Dataset.from_list(rows)
    return DPOTrainer(causal_lm(llama), causal_lm(llama), args, train_dataset=data, processing_class=tokenizer)


def ours(llama: Path, microbatches: list[Microbatch], config: GradientConfig) -> dict[str, Tensor]:
    model = causal_lm(llama)
    found = exact_gradients(model, alone(), targets_of(model, "all-linear"), microbatches, config)
    return {name: G_MN.clone() for name, G_MN in found}


def assert_same(found: dict[str, Tensor], model: torch.nn.Module) -> None:
    assert len(found) == 21
    for name, G_MN in found.items():
        expected = model.get_submodule(name).weight.grad
        assert isinstance(expected, Tensor) and relative(G_MN, expected) < 1e-5, name


@pytest.mark.parametrize(
    ("rows", "template"), [(PAIRS, None), (CHAT_PAIRS, CHAT), (WITHOUT_PROMPT, CHAT)], ids=["text", "chat", "implicit"]
)
def test_pairs_are_those_of_dpo_trainer(
    tmp_path: Path, llama: Path, rows: list[dict[str, Any]], template: str | None
) -> None:
    tokenizer = tokenizer_of(llama, template)
    trainer = dpo_trainer(tmp_path, llama, rows, tokenizer)
    expected = trainer.data_collator(list(trainer.train_dataset))
    samples = samples_of(tmp_path, rows, tokenizer)
    assert len(samples) == len(rows) - (rows is PAIRS), "the prompt that leaves no room is left out"
    (microbatch,) = microbatches_of(samples, len(samples))
    chosen_first = [*range(0, 2 * len(samples), 2), *range(1, 2 * len(samples), 2)]
    assert torch.equal(microbatch.inputs["input_ids"][chosen_first], expected["input_ids"])
    assert torch.equal(microbatch.inputs["attention_mask"][chosen_first], expected["attention_mask"])
    labels = expected["input_ids"].masked_fill(expected["completion_mask"] == 0, IGNORED)
    assert torch.equal(microbatch.inputs["labels"][chosen_first], labels)
    assert microbatch.num_supervised_tokens == int(expected["completion_mask"][:, 1:].sum())
    assert microbatch.num_terms == len(samples)


@pytest.mark.parametrize(("rows", "template"), [(PAIRS, None), (CHAT_PAIRS, CHAT)], ids=["text", "chat"])
@pytest.mark.parametrize("config", [BY_MODEL, BY_BLOCKS], ids=["model", "block"])
def test_gradient_is_that_of_dpo_trainers_own_loss(
    tmp_path: Path, llama: Path, rows: list[dict[str, Any]], template: str | None, config: GradientConfig
) -> None:
    tokenizer = tokenizer_of(llama, template)
    trainer = dpo_trainer(tmp_path, llama, rows, tokenizer)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    found = ours(llama, microbatches_of(samples_of(tmp_path, rows, tokenizer), 2), config)
    assert_same(found, trainer.model)


def grpo_trainer(tmp_path: Path, llama: Path, samples: list[Sample]) -> tuple[GRPOTrainer, dict[str, Any]]:
    """TRL's, of which these completions, not its own, are the rollouts; what it would take a step on."""

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        lengths = [next(i for i, label in enumerate(s.inputs["labels"]) if label != IGNORED) for s in samples]
        ids = [sample.inputs["input_ids"] for sample in samples]
        return {
            "prompt_ids": [each[:length] for each, length in zip(ids, lengths, strict=True)],
            "completion_ids": [each[length:] for each, length in zip(ids, lengths, strict=True)],
            "logprobs": None,
        }

    def rewards(completions: list[str], **_: Any) -> list[float]:
        assert completions == [row["completion"] for row in SAMPLED]
        return [row["reward"] for row in SAMPLED]

    args = GRPOConfig(
        output_dir=str(tmp_path / "grpo"),
        report_to=[],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=len(SAMPLED),
        num_generations=3,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        causal_lm(llama),
        rewards,
        args,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in SAMPLED]),
        processing_class=tokenizer_of(llama),
        rollout_func=rollouts,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer._generate_and_score_completions([{"prompt": row["prompt"]} for row in SAMPLED])


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("given", ["reward", "advantage"])
def test_gradient_is_that_of_grpo_trainers_own_loss(tmp_path: Path, llama: Path, given: str) -> None:
    samples = samples_of(tmp_path, SAMPLED)
    trainer, batch = grpo_trainer(tmp_path, llama, samples)
    if given == "advantage":
        rows = [
            {"prompt": row["prompt"], "completion": row["completion"], "advantage": advantage}
            for row, advantage in zip(SAMPLED, batch["advantages"].tolist(), strict=True)
        ]
        samples = samples_of(tmp_path, rows)
    weights = torch.tensor([sample.weight for sample in samples])
    assert torch.allclose(weights, batch["advantages"], rtol=1e-5) and weights.all()
    trainer.compute_loss(trainer.model, batch).backward()
    for config in (BY_MODEL, BY_BLOCKS):
        assert_same(ours(llama, microbatches_of(samples, 4), config), trainer.model)


@pytest.mark.parametrize("rows", [PAIRS, SAMPLED], ids=["pairs", "sampled"])
@pytest.mark.parametrize("config", [BY_MODEL, BY_BLOCKS], ids=["model", "block"])
def test_logits_by_parts_and_ranks_change_nothing(
    tmp_path: Path,
    llama: Path,
    rows: list[dict[str, Any]],
    config: GradientConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = samples_of(tmp_path, rows)
    whole = ours(llama, microbatches_of(samples, len(samples)), config)
    of_ranks = [each for rank in range(3) for each in microbatches_of(samples, 1, rank, 3)]
    assert sum(each.num_terms for each in of_ranks) == microbatches_of(samples, len(samples))[0].num_terms
    of_ranks = microbatches_from_batches(of_ranks, "CAUSAL_LM")  # which numbers them anew
    assert any(not each.sample_ids for each in of_ranks) == (rows is PAIRS)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 258 * 2 * 7)
    in_parts = ours(llama, of_ranks, config)
    assert all(relative(in_parts[name], G_MN) < 1e-5 for name, G_MN in whole.items())


def test_without_a_difference_there_is_nothing_to_learn(tmp_path: Path) -> None:
    equal = [{"prompt": "p", "completion": c, "reward": 0.1} for c in "abc"]
    alone = [{"prompt": "q", "completion": "d", "reward": 7}]
    found = samples_of(tmp_path, [*equal, *alone, *SAMPLED], max_samples=6)
    assert [sample.row for sample in found] == [4, 5, 6, 7, 8, 9]
    with pytest.raises(UserError, match="no advantage other than 0"):
        samples_of(tmp_path, [*equal, *alone])
    with pytest.raises(UserError, match="no advantage other than 0"):
        samples_of(tmp_path, [{"prompt": "p", "completion": "c", "advantage": 0}])


def test_pairs_that_are_the_same_as_far_as_they_are_kept_are_left_out(tmp_path: Path) -> None:
    same = {"prompt": "p", "chosen": "c", "rejected": "c"}
    late = {"prompt": "p", "chosen": "c" * MAX_LENGTH, "rejected": "c" * MAX_LENGTH + "d"}
    assert [sample.row for sample in samples_of(tmp_path, [same, PAIRS[0], late, PAIRS[1]])] == [1, 3]
    assert len(samples_of(tmp_path, [late], max_length=MAX_LENGTH + 2)) == 1
    with pytest.raises(UserError, match="2 samples .* to learn from; .* that chosen and rejected differ before they"):
        samples_of(tmp_path, [same, late])


def test_the_same_tokens_of_another_worth_are_other_data(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c"}
    worths = [samples_of(tmp_path, [row | {"advantage": advantage}]) for advantage in (1, 2)]
    swapped = [{"prompt": "p", "chosen": one, "rejected": other} for one, other in ("ab", "ba")]
    pairs = [samples_of(tmp_path, [each]) for each in swapped]
    assert len({fingerprints(samples)[0] for samples in [*worths, *pairs, samples_of(tmp_path, [row])]}) == 5


PAIR, REWARDED = PAIRS[0], SAMPLED[0]


@pytest.mark.parametrize(
    ("row", "options", "key", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, {}, "calibration.data_files", "has both chosen and rejected"),
        (PAIR | {"completion": "c"}, {}, "calibration.data_files", "and also completion; remove"),
        (PAIR | {"reward": 1}, {}, "calibration.data_files", "and also reward; remove"),
        (REWARDED | {"advantage": 1}, {}, "calibration.data_files", "both advantage and reward"),
        ({"text": "a", "reward": 1}, {}, "calibration.data_files", "needs prompt and completion"),
        (PAIR | {"rejected": 3}, {}, "calibration.data_files", "sample 0 holds 3 in column rejected"),
        (PAIR | {"prompt": None}, {}, "calibration.data_files", "sample 0 holds None in column prompt"),
        ({"chosen": "a", "rejected": ["b"]}, {}, "calibration.data_files", "holds ['b'] in column rejected"),
        ({"chosen": "a", "rejected": ""}, {}, "calibration.data_files", "must not be empty"),
        (CHAT_PAIRS[0], {}, "calibration.data_files", "no chat template"),
        (REWARDED | {"reward": None}, {}, "calibration.data_files", "sample 0 holds None in column reward"),
        (REWARDED | {"reward": True}, {}, "calibration.data_files", "sample 0 holds True in column reward"),
        (REWARDED | {"reward": 1e300}, {}, "calibration.data_files", "sample 0 holds 1e+300 in column reward"),
        ({"prompt": "a", "completion": "b", "advantage": "c"}, {}, "calibration.data_files", "'c' in column advantage"),
        (PAIR, {"assistant_only_loss": True}, "calibration.assistant_only_loss", "supervised data; write false"),
        (REWARDED, {"completion_only_loss": False}, "calibration.completion_only_loss", "write null"),
        (PAIR, {"task_type": "SEQ_CLS"}, "calibration.data_files", "need CAUSAL_LM"),
        (REWARDED, {"task_type": "SEQ_2_SEQ_LM"}, "calibration.data_files", "need CAUSAL_LM"),
        (PAIRS[2], {}, "calibration.data_files", "none of the 1 samples that were read has"),
    ],
)
def test_wrong_feedback_is_named(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], key: str, words: str
) -> None:
    with pytest.raises(UserError) as raised:
        samples_of(tmp_path, [row], **options)
    assert raised.value.key == key
    assert words in str(raised.value)


def test_pairs_that_contradict_each_other_are_warned_of_with_numbers(tmp_path: Path, llama: Path) -> None:
    """The loss in the report is the one whose gradient was taken."""
    generator = torch.Generator().manual_seed(0)
    words = ["".join(chr(97 + int(i)) for i in torch.randint(26, (12,), generator=generator)) for _ in range(32)]
    rows = [{"prompt": "p: ", "chosen": words[i], "rejected": words[i + 1]} for i in range(0, 32, 2)]
    out = make_output(config_tree(llama, save_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out"))
    report = read_report(out)
    samples = samples_of(tmp_path, rows, max_length=64)
    (microbatch,) = microbatches_of(samples, 16)
    assert (report["num_sequences"], report["num_supervised_tokens"]) == (16, microbatch.num_supervised_tokens)
    assert report["loss"] == "dpo"
    with torch.no_grad():
        logits = causal_lm(llama)(microbatch.inputs["input_ids"], microbatch.inputs["attention_mask"]).logits
    labels = microbatch.inputs["labels"][:, 1:]
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    chosen, rejected = (log_p * (labels != IGNORED)).sum(dim=1).view(-1, 2).T
    assert report["mean_loss"] == pytest.approx(0.05 * (rejected - chosen).mean().item(), rel=1e-4)
    (warning,) = [line for line in report["warnings"] if line.startswith("split_half_cosine below 0.5 in ")]
    assert "all of the data was used; add more" in warning
    assert report["split_half_cosine"] < 0.5
