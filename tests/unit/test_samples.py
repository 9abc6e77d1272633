"""Calibration batches against TRL's SFTTrainer, and what users get to read when their data is wrong."""

from __future__ import annotations

import json
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.chat_template_utils import qwen2_5_chat_template
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from loraga_dist.config import CalibrationConfig
from loraga_dist.data import samples
from loraga_dist.data.formats import CHARACTERS_PER_TOKEN, MARGIN, clock_at
from loraga_dist.data.losses import IGNORED
from loraga_dist.data.microbatches import Microbatch, Sample, SampleSharder, microbatches_from_batches
from loraga_dist.data.samples import LEAST_TRIED, fingerprints, load_samples, padding_token_id
from loraga_dist.errors import UserError

SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXTS = [{"text": "one fish"}, {"text": "two fish, red fish"}, {"text": "blue fish</s>"}, {"text": "b" * 60}]
COMPLETIONS = [
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"prompt": "the sky is", "completion": " blue"},
    {"prompt": "long " * 12, "completion": "cut off"},
    {"prompt": "", "completion": "from nothing</s>"},
]
CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {
        "messages": [
            {"role": "system", "content": "be terse"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
    },
]
CHAT_COMPLETIONS = [
    {"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:], "tag": "ignored"} for chat in CHATS
]
SHAREGPT = [
    {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in chat["messages"]]} for chat in CHATS
]


@pytest.fixture(autouse=True)
def private_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_tokenizer(
    *, chat_template: str | None = None, add_bos: bool = False, **kwargs: Any
) -> PreTrainedTokenizerFast:
    """One token a byte: no merges, nothing trained."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    if add_bos:
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    kwargs = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"} | kwargs
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs)
    tokenizer.chat_template = chat_template
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids)
    assert isinstance(text, str)
    return text


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def samples_of(
    tmp_path: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast | None = None, **kwargs: Any
) -> list[Sample]:
    """The rows' samples, in the order of the rows."""
    task = {name: kwargs.pop(name) for name in ("task_type", "max_positions") if name in kwargs}
    config = CalibrationConfig(data_files=write_rows(tmp_path / "rows.jsonl", rows), **kwargs)
    task = {"task_type": "CAUSAL_LM", "max_positions": None} | task
    samples = load_samples(config, tokenizer or make_tokenizer(), **task)
    return sorted(samples, key=lambda sample: sample.row)


def sft_trainer(
    tmp_path: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **kwargs: Any
) -> SFTTrainer:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    data = datasets.load_dataset("json", data_files=write_rows(tmp_path / "sft.jsonl", rows), split="train")
    args = SFTConfig(output_dir=str(tmp_path / "sft"), report_to=[], use_cpu=True, bf16=False, **kwargs)
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("rows", "template", "options"),
    [
        pytest.param(TEXTS, None, {}, id="text"),
        pytest.param([{"body": row["text"]} for row in TEXTS], None, {"dataset_text_field": "body"}, id="text-field"),
        pytest.param(COMPLETIONS, None, {}, id="completion"),
        pytest.param(COMPLETIONS, None, {"completion_only_loss": False}, id="completion-full-loss"),
        pytest.param(CHATS, CHATML, {}, id="messages"),
        pytest.param(CHATS, MARKED_CHATML, {"assistant_only_loss": True}, id="messages-assistant"),
        pytest.param(CHATS, qwen2_5_chat_template, {"assistant_only_loss": True}, id="messages-assistant-patched"),
        pytest.param(CHAT_COMPLETIONS, CHATML, {}, id="chat-completion"),
        pytest.param(CHAT_COMPLETIONS, MARKED_CHATML, {"assistant_only_loss": True}, id="chat-completion-assistant"),
        pytest.param(
            CHAT_COMPLETIONS,
            MARKED_CHATML,
            {"assistant_only_loss": True, "completion_only_loss": False},
            id="chat-completion-assistant-in-prompt",
        ),
        pytest.param(SHAREGPT, CHATML, {}, id="sharegpt"),
    ],
)
@pytest.mark.parametrize("add_bos", [False, True])
def test_batches_are_those_of_trl(
    tmp_path: Path, rows: list[dict[str, Any]], template: str | None, options: dict[str, Any], add_bos: bool
) -> None:
    tokenizer = make_tokenizer(chat_template=template, add_bos=add_bos)
    # long enough to keep some of every conversation, short enough to cut texts and prompts
    options = {"max_length": 150 if template else 40} | options
    trainer = sft_trainer(tmp_path, rows, tokenizer, **options)
    samples = samples_of(tmp_path, rows, tokenizer, **options)
    assert isinstance(trainer.train_dataset, datasets.Dataset)
    prepared = trainer.train_dataset.to_list()
    assert [(sample.inputs["input_ids"], sample.inputs["labels"]) for sample in samples] == [
        (example["input_ids"], example["labels"]) for example in prepared
    ]

    expected = trainer.data_collator(prepared)
    (microbatch,) = microbatches_of(
        samples,
        rank=0,
        world_size=1,
        per_device_batch_size=len(samples),
        pad_token_id=padding_token_id(tokenizer),
    )
    assert microbatch.inputs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(microbatch.inputs[name], tensor), name
    assert microbatch.num_supervised_tokens == int((expected["labels"][:, 1:] != IGNORED).sum())


def test_labels_cover_exactly_the_assistant_turns(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=MARKED_CHATML)
    samples = samples_of(tmp_path, CHATS, tokenizer, assistant_only_loss=True)
    spoken = [text_of(tokenizer, [label for label in s.inputs["labels"] if label != IGNORED]) for s in samples]
    assert spoken == ["hello<|im_end|>", "b<|im_end|>d<|im_end|>"]
    assert [s.num_supervised_tokens for s in samples] == [len("hello") + 1, 4]


def test_alpaca_columns_become_prompt_and_completion(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = [{"instruction": "Add.", "input": "2 {+} 2", "output": "4"}, {"instruction": "Sing.", "output": "la"}]
    samples = samples_of(tmp_path, rows, tokenizer)
    texts = [text_of(tokenizer, s.inputs["input_ids"]) for s in samples]
    assert texts[0].endswith("### Instruction:\nAdd.\n\n### Input:\n2 {+} 2\n\n### Response:4</s>")
    assert texts[1].endswith("### Instruction:\nSing.\n\n### Response:la</s>") and "Input" not in texts[1]
    assert [s.num_supervised_tokens for s in samples] == [2, 3]


def test_tools_reach_the_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}" + CHATML)
    tools = [{"name": "clock"}]
    rows = [CHATS[0] | {"tools": tools}, CHATS[1] | {"tools": tools}]
    as_json = [row | {"tools": json.dumps(tools)} for row in rows]
    samples = samples_of(tmp_path, rows, tokenizer)
    assert text_of(tokenizer, samples[0].inputs["input_ids"]).startswith("[clock]<|im_start|>user")
    assert samples == samples_of(tmp_path, as_json, tokenizer)


def test_sequence_to_sequence_truncates_both_sides_and_keeps_the_end_token(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", eos)]
    )
    (sample,) = samples_of(
        tmp_path, [{"prompt": "abcdefgh", "completion": "xyz"}], tokenizer, task_type="SEQ_2_SEQ_LM", max_length=5
    )
    assert text_of(tokenizer, sample.inputs["input_ids"]) == "abcd</s>"
    assert text_of(tokenizer, sample.inputs["labels"]) == "xyz</s>"
    assert sample.num_supervised_tokens == 4


def microbatches_of(samples: list[Sample], **settings: Any) -> list[Microbatch]:
    return SampleSharder(samples=samples, **settings).microbatches(0, len(samples), 0)


def test_classification_batches(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    rows = [{"text": "good", "grade": 1}, {"text": "bad", "grade": 0}]
    samples = samples_of(tmp_path, rows, tokenizer, task_type="SEQ_CLS", label_field="grade")
    mine, dummy = (
        microbatches_of(samples, rank=rank, world_size=2, per_device_batch_size=2, pad_token_id=7)[0]
        for rank in range(2)
    )
    assert mine.inputs["labels"].tolist() == [1, 0] and mine.num_supervised_tokens == 2
    assert mine.inputs["input_ids"][1, -1] == 7
    assert mine.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert not mine.inputs["token_type_ids"].any()
    assert dummy.inputs["labels"].tolist() == [IGNORED] and dummy.num_supervised_tokens == 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_ranks_share_the_samples_and_take_equally_many_steps(world_size: int, batch_size: int) -> None:
    samples = [
        Sample(
            {"input_ids": [i] * (i + 2), "attention_mask": [1] * (i + 2), "labels": [i] * (i + 2)}, i + 1, row=10 + i
        )
        for i in range(7)
    ]
    ranks = [
        microbatches_of(samples, rank=rank, world_size=world_size, per_device_batch_size=batch_size, pad_token_id=99)
        for rank in range(world_size)
    ]
    assert len({len(microbatches) for microbatches in ranks}) == 1
    # read step by step, rank by rank, the samples come back once each and in order
    seen = [row for step in zip(*ranks, strict=True) for microbatch in step for row in microbatch.sample_ids]
    assert seen == [sample.row for sample in samples]
    flat = [microbatch for microbatches in ranks for microbatch in microbatches]
    assert sum(m.num_supervised_tokens for m in flat) == sum(s.num_supervised_tokens for s in samples)
    for microbatch in flat:
        assert int((microbatch.inputs["labels"][:, 1:] != IGNORED).sum()) == microbatch.num_supervised_tokens
        padding = microbatch.inputs["attention_mask"] == 0
        assert (microbatch.inputs["input_ids"][padding] == 99).all()
        if not microbatch.sample_ids:
            assert torch.equal(microbatch.inputs["input_ids"], torch.tensor([samples[0].inputs["input_ids"]]))


def test_seed_shuffles_and_max_samples_cuts(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"row number {i}"} for i in range(20)])

    def rows(**kwargs: Any) -> list[int]:
        config = CalibrationConfig(data_files=[data], **kwargs)
        return [s.row for s in load_samples(config, make_tokenizer(), task_type="CAUSAL_LM", max_positions=None)]

    everything = rows()
    assert sorted(everything) == list(range(20)) != everything
    assert rows(max_samples=5) == everything[:5] == rows(max_samples=5)
    assert rows(seed=1) != everything
    assert rows(max_samples="auto", sample_limit=5) == everything[:5]


def test_samples_without_loss_are_replaced_by_the_next(tmp_path: Path) -> None:
    masked = {"prompt": "p" * 40, "completion": "cut off"}
    rows = [masked if i % 4 else {"prompt": "a", "completion": "b"} for i in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", rows)

    def found(**kwargs: Any) -> list[int]:
        config = CalibrationConfig(data_files=data, max_length=20, **kwargs)
        return [s.row for s in load_samples(config, make_tokenizer(), task_type="CAUSAL_LM", max_positions=None)]

    everything = found()
    assert sorted(everything) == list(range(0, 40, 4))
    assert found(max_samples=6) == everything[:6]


def test_data_is_given_up_after_many_samples_of_no_token(tmp_path: Path) -> None:
    rows = [{"text": ""}] * LEAST_TRIED
    found = samples_of(tmp_path, [*rows[1:], {"text": "hello"}], max_samples=1)
    assert [sample.row for sample in found] == [LEAST_TRIED - 1]
    with pytest.raises(UserError, match=f"none of the {LEAST_TRIED} samples that were read has a token to learn from"):
        samples_of(tmp_path, rows * 2, max_samples=1)
    with pytest.raises(UserError, match=f"none of the {2 * LEAST_TRIED} samples"):
        samples_of(tmp_path, rows * 3, max_samples=2 * LEAST_TRIED)


def test_sources_agree(tmp_path: Path) -> None:
    """json, csv, parquet, text, a saved data set and a slice of it all give the same samples."""
    data = datasets.Dataset.from_list([{"text": "first line"}, {"text": "second"}])
    data.to_json(tmp_path / "rows.json")
    data.to_csv(tmp_path / "rows.csv")
    data.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.txt").write_text("first line\n\nsecond\n")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved_splits")
    (tmp_path / "rows.dat").write_text("first line\nsecond\nthird\n")

    def texts(**kwargs: Any) -> list[Any]:
        config = CalibrationConfig(**kwargs)
        samples = load_samples(config, make_tokenizer(), task_type="CAUSAL_LM", max_positions=None)
        return sorted(sample.inputs["input_ids"] for sample in samples)

    expected = texts(data_files=str(tmp_path / "rows.json"))
    assert len(expected) == 2
    for suffix in ("csv", "parquet", "txt"):
        assert texts(data_files=str(tmp_path / f"rows.{suffix}")) == expected
    for name in ("saved", "saved_splits"):
        assert texts(dataset_name=str(tmp_path / name)) == expected
    assert texts(dataset_name="text", data_files=str(tmp_path / "rows.dat"), split="train[:2]") == expected


@pytest.mark.parametrize("split", ["train", "train[:40%]", "train[-3:]", "train[2:4]+train[7:]", "train+test[:1]"])
def test_slices_of_a_saved_data_set_are_those_of_its_files(tmp_path: Path, split: str) -> None:
    files = {"train": [{"text": f"row {i}"} for i in range(10)], "test": [{"text": f"other {i}"} for i in range(3)]}
    (tmp_path / "files").mkdir()
    for name, rows in files.items():
        write_rows(tmp_path / "files" / f"{name}.jsonl", rows)
    datasets.load_dataset(str(tmp_path / "files")).save_to_disk(tmp_path / "saved")

    def texts(name: str) -> list[list[int]]:
        config = CalibrationConfig(dataset_name=str(tmp_path / name), split=split)
        found = load_samples(config, make_tokenizer(), task_type="CAUSAL_LM", max_positions=None)
        return [sample.inputs["input_ids"] for sample in found]

    assert texts("saved") == texts("files")


def test_a_saved_slice_keeps_its_name(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", TEXTS)
    datasets.load_dataset("json", data_files=data, split="train[:50%]").save_to_disk(tmp_path / "saved")
    config = CalibrationConfig(dataset_name=str(tmp_path / "saved"), split="train[:50%]")
    assert load_samples(config, make_tokenizer(), task_type="CAUSAL_LM", max_positions=None)


def test_fingerprint_follows_content_and_order(tmp_path: Path) -> None:
    samples = samples_of(tmp_path, COMPLETIONS)
    original = fingerprints(samples)
    assert original == fingerprints(samples_of(tmp_path, COMPLETIONS)) and original[0].startswith("sha256:")
    assert fingerprints(samples[:2]) == original[:2] and len(set(original)) == len(samples)
    assert fingerprints(samples[::-1])[-1] != original[-1]
    # the same tokens under another loss mask are other data
    assert fingerprints(samples_of(tmp_path, COMPLETIONS, completion_only_loss=False))[-1] != original[-1]


def test_own_dataloader(tmp_path: Path) -> None:
    samples = samples_of(tmp_path, COMPLETIONS)
    expected = microbatches_of(samples, rank=0, world_size=1, per_device_batch_size=2, pad_token_id=0)
    batches = [dict(microbatch.inputs) | {"ids": ["not", "a tensor"]} for microbatch in expected]
    actual = microbatches_from_batches(batches, "CAUSAL_LM", limit=1)
    assert len(actual) == 1 and actual[0].inputs.keys() == expected[0].inputs.keys()
    assert (actual[0].num_supervised_tokens, actual[0].index) == (expected[0].num_supervised_tokens, 0)
    (shifted,) = microbatches_from_batches(batches[:1], "SEQ_2_SEQ_LM")
    assert shifted.num_supervised_tokens == int((expected[0].inputs["labels"] != IGNORED).sum())
    with pytest.raises(UserError, match="no tensor named labels"):
        microbatches_from_batches([{"input_ids": torch.ones(1, 2)}], "CAUSAL_LM")
    with pytest.raises(UserError, match="no dict of tensors"):
        microbatches_from_batches([torch.ones(1, 2)], "CAUSAL_LM")  # type: ignore[list-item]


def test_tokenizer_without_pad_and_eos_tokens(tmp_path: Path) -> None:
    assert padding_token_id(make_tokenizer()) == SPECIAL_TOKENS.index("<|endoftext|>") + 256
    assert padding_token_id(make_tokenizer(pad_token=None)) == SPECIAL_TOKENS.index("</s>") + 256
    bare = make_tokenizer(pad_token=None, eos_token=None)
    assert padding_token_id(bare) == 0
    (sample,) = samples_of(tmp_path, [{"text": "abc"}], bare)
    assert len(sample.inputs["input_ids"]) == 3


def test_datasets_stays_quiet_and_keeps_its_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = datasets.logging.get_verbosity()
    assert not datasets.are_progress_bars_disabled()
    samples_of(tmp_path, TEXTS)
    (tmp_path / "broken.jsonl").write_text('{"text": oops}\n')
    with pytest.raises(UserError):
        config = CalibrationConfig(data_files=str(tmp_path / "broken.jsonl"))
        load_samples(config, make_tokenizer(), task_type="CAUSAL_LM", max_positions=None)
    assert capfd.readouterr() == ("", "")
    assert datasets.logging.get_verbosity() == verbosity and not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("rows", "options", "key", "words"),
    [
        ([{"body": "a"}], {}, "calibration.dataset_text_field", "columns are body"),
        ([{"prompt": "a", "body": "b"}], {}, "calibration.dataset_text_field", "prompt, body"),
        ([{"text": "abc"}, {"text": 3}], {}, "calibration.data_files", "sample 1 holds 3 in column text"),
        ([{"prompt": "a", "completion": ["b"]}], {}, "calibration.data_files", "sample 0 holds"),
        (CHATS, {}, "calibration.data_files", "no chat template"),
        ([{"text": ""}, {"text": "</s>"}], {}, "calibration.data_files", "none of the 2 samples that were"),
        ([COMPLETIONS[2]], {"max_length": 8}, "calibration.data_files", "calibration.max_length (8)"),
        (TEXTS, {"max_positions": 32}, "calibration.max_length", "sample 3 has 61 tokens but the model has 32"),
        (TEXTS, {"split": "test"}, "calibration.split", "train"),
        (TEXTS, {"assistant_only_loss": True}, "calibration.assistant_only_loss", "plain text"),
        (TEXTS, {"completion_only_loss": True}, "calibration.completion_only_loss", "write null"),
        (TEXTS, {"task_type": "SEQ_CLS"}, "calibration.label_field", "columns are text"),
        (TEXTS, {"task_type": "SEQ_2_SEQ_LM"}, "calibration.data_files", "prompt and completion"),
        ([{"text": "a", "label": "x"}], {"task_type": "SEQ_CLS"}, "calibration.label_field", "'x'"),
        ([{"text": "a", "label": -1}], {"task_type": "SEQ_CLS"}, "calibration.label_field", "class -1"),
        ([], {}, "calibration.data_files", "no rows"),
    ],
)
def test_wrong_data_is_named(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], key: str, words: str
) -> None:
    with pytest.raises(UserError) as raised:
        samples_of(tmp_path, rows, **options)
    assert raised.value.key == key
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("template", "assistant_only", "key", "words"),
    [
        (CHATML, True, "calibration.assistant_only_loss", "{% generation %}"),
        ("{{ raise_exception('roles must alternate') }}", False, "calibration.data_files", "roles must alternate"),
        (MARKED_CHATML.replace("'assistant'", "'bot'"), True, "calibration.data_files", "generation markers"),
        ("{{ messages[0].content + none }}", False, "calibration.data_files", "sample"),
    ],
)
def test_wrong_chat_template_is_named(
    tmp_path: Path, template: str, assistant_only: bool, key: str, words: str
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(UserError) as raised:
        samples_of(tmp_path, CHATS, tokenizer, assistant_only_loss=assistant_only)
    assert raised.value.key == key
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        ({}, "calibration.dataset_name", "no data is named"),
        ({"data_files": "missing.jsonl"}, "calibration.data_files", "missing.jsonl"),
        ({"data_files": "missing*.jsonl"}, "calibration.data_files", "matches no file"),
        ({"data_files": "rows.dat"}, "calibration.data_files", "none of the suffixes"),
        ({"data_files": "broken.jsonl"}, "calibration.data_files", "JSON parse error"),
        ({"data_files": "broken.parquet"}, "calibration.data_files", "Parquet"),
        ({"dataset_name": "saved", "split": "test"}, "calibration.split", "train"),
        ({"dataset_name": "saved", "split": "train["}, "calibration.split", "or [:n] of one"),
        ({"dataset_name": "saved", "split": "train[:0]"}, "calibration.dataset_name", "no rows"),
        ({"dataset_name": "saved", "data_files": "broken.jsonl"}, "calibration.data_files", "save_to_disk"),
        ({"dataset_name": "saved", "dataset_config": "en"}, "calibration.dataset_config", "save_to_disk"),
    ],
)
def test_unreadable_sources_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], key: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": oops}\n')
    Path("broken.parquet").write_text("junk")
    datasets.Dataset.from_list(TEXTS).save_to_disk("saved")
    with pytest.raises(UserError) as raised:
        load_samples(CalibrationConfig(**config), make_tokenizer(), task_type="CAUSAL_LM", max_positions=None)
    assert raised.value.key == key
    assert words in str(raised.value)


FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}" + (
    "{% endfor %}{% endfor %}"
)


def test_a_template_that_never_ends_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ROW_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"sample \d does not go through the chat template: it takes longer than 0.3 s"):
        samples_of(tmp_path, CHATS, make_tokenizer(chat_template=FOR_EVER))
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


LONG = "word " * 200_000
"""A megabyte, of which the tests keep 32 tokens."""


@pytest.mark.parametrize(
    "row",
    [
        {"text": LONG},
        {"prompt": "x" * 20, "completion": LONG},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": LONG}]},
    ],
    ids=["text", "completion", "chat"],
)
def test_the_beginning_of_a_long_text_gives_the_tokens_of_the_whole(tmp_path: Path, row: dict[str, Any]) -> None:
    tokenizer, normalizer = make_tokenizer(chat_template=CHATML), CountingNormalizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Normalizer.custom(normalizer)
    (short,) = samples_of(tmp_path, [row], tokenizer, max_length=32)
    assert normalizer.num_characters < 3 * CHARACTERS_PER_TOKEN * (32 + MARGIN)
    whole = text_of_row(row, tokenizer)
    assert short.inputs["input_ids"] == tokenizer(whole)["input_ids"][:32]


class CountingNormalizer:
    """Changes nothing."""

    num_characters = 0

    def normalize(self, text: Any) -> None:
        self.num_characters += len(str(text))


def text_of_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    if "messages" in row:
        rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert isinstance(rendered, str)
        return rendered
    return row.get("text") or row["prompt"] + row["completion"]


def test_a_text_whose_beginning_makes_too_few_tokens_is_taken_whole(tmp_path: Path) -> None:
    """As where a tokenizer drops what is blank."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    (sample,) = samples_of(tmp_path, [{"text": " " * 200_000 + "at last"}], tokenizer, max_length=32)
    assert text_of(tokenizer, sample.inputs["input_ids"]) == "at last</s>"


@pytest.mark.parametrize(("task_type", "columns"), [("SEQ_2_SEQ_LM", ("prompt", "completion")), ("SEQ_CLS", ("text",))])
def test_truncating_tokenizers_see_the_beginning_alone(
    tmp_path: Path, task_type: str, columns: tuple[str, ...]
) -> None:
    row = dict.fromkeys(columns, LONG) | ({"label": 1} if task_type == "SEQ_CLS" else {})
    tokenizer = make_tokenizer(add_bos=True)
    (sample,) = samples_of(tmp_path, [row], tokenizer, task_type=task_type, max_length=32)
    expected = tokenizer(LONG, truncation=True, max_length=32)["input_ids"]
    assert sample.inputs["input_ids"] == expected
    assert sample.inputs["labels"] == (1 if task_type == "SEQ_CLS" else expected)


def test_templates_print_the_time_they_are_told(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{{ strftime_now('%d.%m.%Y %H:%M:%S.%f') }}")
    path = write_rows(tmp_path / "rows.jsonl", CHATS)
    with clock_at(datetime(2001, 2, 3, 4, 5, 6, 7)):
        found = load_samples(CalibrationConfig(data_files=path), tokenizer, task_type="CAUSAL_LM", max_positions=None)
    assert {text_of(tokenizer, sample.inputs["input_ids"]) for sample in found} == {"03.02.2001 04:05:06.000007"}
    assert tokenizer.apply_chat_template(CHATS[0]["messages"], tokenize=False) != "03.02.2001 04:05:06.000007"
