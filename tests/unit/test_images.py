"""Calibration with images: what TRL's collator makes of them, and the gradient of the model's own loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from builders import byte_tokenizer, llama_config
from outputs import make_output, read_adapter, read_report
from PIL import Image
from transformers import AutoProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import loraga_dist
from loraga_dist.config import CalibrationConfig
from loraga_dist.data.microbatches import Microbatch, SampleSharder
from loraga_dist.data.samples import fingerprints, load_samples
from loraga_dist.errors import UserError
from loraga_dist.model.blocks import Order
from loraga_dist.request.refusals import require_alike

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ eos_token }}{% endfor %}"
)
SIZE = 16
QUESTIONS = ["What is it?", "And this one here?", "Which colour has it?", "Is it so?", "Where?", "How many are there?"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llava with its processor."""
    path = tmp_path_factory.mktemp("llava")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=llama_config(vocab_size=259, num_hidden_layers=2), image_token_index=258,
        vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).eval().save_pretrained(path)
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**sizes), tokenizer=tokenizer, patch_size=8,
        vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about images in files, named by their paths; one is about none."""
    path = tmp_path_factory.mktemp("images")
    rows, draw = [], np.random.default_rng(0)
    for number, question in enumerate(QUESTIONS):
        file = path / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)).save(file)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {number}."}]
        rows.append({"images": [str(file)] if number else [], "messages": messages})
    (path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"images": row["images"], "prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows
    ]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def samples_of(model_dir: Path, file: Path, **changes: Any) -> list[Any]:
    processor = AutoProcessor.from_pretrained(model_dir)
    config = CalibrationConfig(data_files=str(file), **({"max_samples": 6, "max_length": 64} | changes))
    return load_samples(
        config, processor.tokenizer, task_type="CAUSAL_LM", max_positions=128, load_processor=lambda: processor
    )


def microbatches(samples: list[Any], size: int) -> list[Microbatch]:
    sharder = SampleSharder(samples=samples, rank=0, world_size=1, per_device_batch_size=size, pad_token_id=256)
    return sharder.microbatches(0, len(samples), 0)


def trl_batch(model_dir: Path, file: Path, rows: list[int], **options: Any) -> dict[str, torch.Tensor]:
    """What SFTTrainer's collator makes of these rows."""
    content = [json.loads(line) for line in file.read_text().splitlines()]
    examples = [content[row] | {"images": [Image.open(path) for path in content[row]["images"]]} for row in rows]
    collator = DataCollatorForVisionLanguageModeling(AutoProcessor.from_pretrained(model_dir), max_length=64, **options)
    return dict(collator(examples))


@pytest.mark.parametrize(
    ("name", "options"),
    [("chat.jsonl", {}), ("pairs.jsonl", {"completion_only_loss": True})],
)
def test_microbatches_are_those_of_trl(model_dir: Path, data: Path, name: str, options: dict[str, Any]) -> None:
    samples = samples_of(model_dir, data / name)
    for size in (1, 3):
        for microbatch in microbatches(samples, size):
            expected = trl_batch(model_dir, data / name, list(microbatch.sample_ids), **options)
            found = microbatch.inputs | dict(microbatch.images() if microbatch.images else {})
            assert found.keys() == expected.keys()
            width = expected["attention_mask"].sum(1).max()  # TRL pads to the longest prompt and completion
            for key, tensor in found.items():
                other = expected[key][:, :width] if expected[key].shape == expected["labels"].shape else expected[key]
                kept = expected["attention_mask"][:, :width] if key == "input_ids" else torch.ones_like(other)
                assert torch.equal(tensor * kept, other * kept), key


def test_the_fingerprint_knows_the_images(model_dir: Path, data: Path, tmp_path: Path) -> None:
    first = fingerprints(samples_of(model_dir, data / "chat.jsonl"))
    assert first == fingerprints(samples_of(model_dir, data / "chat.jsonl"))
    other = tmp_path / "chat.jsonl"
    other.write_text((data / "chat.jsonl").read_text().replace("3.png", "4.png"))
    assert first[-1] != fingerprints(samples_of(model_dir, other))[-1]


def test_images_of_a_saved_data_set_are_read(model_dir: Path, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "chat.jsonl").read_text().splitlines()]
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        messages=datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    processor = AutoProcessor.from_pretrained(model_dir)
    config = CalibrationConfig(dataset_name=str(tmp_path / "saved"), max_samples=6, max_length=64)
    saved = load_samples(
        config, processor.tokenizer, task_type="CAUSAL_LM", max_positions=128, load_processor=lambda: processor
    )
    assert fingerprints(saved) == fingerprints(samples_of(model_dir, data / "chat.jsonl"))


@pytest.mark.parametrize("order", ["block", "model"])
def test_the_gradient_is_that_of_the_models_own_loss(model_dir: Path, data: Path, tmp_path: Path, order: str) -> None:
    tree = {
        "model": {"name_or_path": str(model_dir)},
        "lora": {"r": 2, "lora_alpha": 4, "target_modules": r".*language_model.*\.(q_proj|down_proj)"},
        "init": {"scheme": "lora_ga"},
        "gradient": {"engine": "exact", "order": order},
        "calibration": {
            "data_files": str(data / "chat.jsonl"), "max_samples": 6, "max_length": 64, "per_device_batch_size": 2,
        },
        "output": {"dir": str(tmp_path / "out")},
    }  # fmt: skip
    report = read_report(make_output(tree))
    assert report["order"] == order

    model = LlavaForConditionalGeneration.from_pretrained(model_dir).eval()
    total, num_tokens = 0.0, 0
    for microbatch in microbatches(samples_of(model_dir, data / "chat.jsonl"), 2):
        inputs = microbatch.inputs | dict(microbatch.images() if microbatch.images else {})
        total = total + model(**inputs).loss * microbatch.num_supervised_tokens
        num_tokens += microbatch.num_supervised_tokens
    (total / num_tokens).backward()  # type: ignore[union-attr]
    for name, target in report["targets"].items():
        gradient = model.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        expected = torch.linalg.svdvals(gradient.double())[:4]
        assert torch.allclose(torch.tensor(target["singular_values"][:4]).double(), expected, rtol=1e-4), name


def test_in_memory_batches_of_trl_give_the_start_of_the_files(model_dir: Path, data: Path, tmp_path: Path) -> None:
    lora = {"r": 2, "lora_alpha": 4, "target_modules": r".*language_model.*\.q_proj"}
    tree = {
        "model": {"name_or_path": str(model_dir)},
        "lora": lora,
        "gradient": {"engine": "exact"},
        "calibration": {"data_files": str(data / "chat.jsonl"), "max_samples": 6, "max_length": 64},
        "output": {"dir": str(tmp_path / "out")},
    }
    adapter = read_adapter(make_output(tree))
    model = LlavaForConditionalGeneration.from_pretrained(model_dir)
    batches = [trl_batch(model_dir, data / "chat.jsonl", [row]) for row in range(6)]
    start = loraga_dist.initialize(model, batches, {"lora": lora, "gradient": {"engine": "exact"}})
    for name, factors in start.factors.items():
        made, read = (
            factors.B_MR @ factors.A_RN,
            (adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]),
        )
        assert torch.allclose(made, read, atol=1e-4 * float(read.abs().max())), name


def test_what_cannot_serve_is_refused(model_dir: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cuts into the tokens of its images"):
        samples_of(model_dir, data / "chat.jsonl", max_length=8)
    rows = [json.loads(line) for line in (data / "chat.jsonl").read_text().splitlines()]
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(rows[1] | {"images": [str(tmp_path / "absent.png")]}) + "\n")
    with pytest.raises(UserError, match=r"sample 0 .*absent\.png"):
        samples_of(model_dir, broken)
    broken.write_text(json.dumps(rows[1] | {"images": [7]}) + "\n")
    with pytest.raises(UserError, match="column images holds no images"):
        samples_of(model_dir, broken)
    broken.write_text(json.dumps(rows[1] | {"reward": 1.0}) + "\n")
    with pytest.raises(UserError, match="has images and reward"):
        samples_of(model_dir, broken)


def test_ranks_that_would_gather_a_tower_alone_are_refused(model_dir: Path, data: Path) -> None:
    samples = samples_of(model_dir, data / "chat.jsonl")
    in_model_order, key = Order(blocks=None, why="it is wanted"), "calibration.data_files"
    sharder = SampleSharder(samples=samples, rank=0, world_size=2, per_device_batch_size=1, pad_token_id=256)
    with pytest.raises(UserError, match=f"^{key}: 6: some samples have images and some have none"):
        require_alike(sharder, in_model_order, key, 2)
    require_alike(sharder, in_model_order, key, 1)
    require_alike(
        replace(sharder, samples=[sample for sample in samples if sample.images is not None]), in_model_order, key, 2
    )
