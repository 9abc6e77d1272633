"""Experts that are modules, of which ranks call different ones: none waits for others that never come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from builders import byte_tokenizer, config_tree
from experts import CPU, WAYS, lowest_linear, reference, shown, worst
from families import padded_microbatches, tiny
from outputs import make_outputs, read_products, read_report, relative
from peft import PeftModel
from ranks import run_on_ranks
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients.forward import forward
from loraga_dist.model.blocks import pieces_of
from loraga_dist.ranks.world import World
from loraga_dist.sharding.open import open_sharding
from loraga_dist.sharding.settings import calibration_settings

LAYERS, EXPERTS = 2, 6


class Routed(nn.Module):
    """As remote code has them: each token goes through one module of a list."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).max(-1, keepdim=True)
        y = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            rows = (chosen == number).squeeze(-1)
            y[rows] = weights[rows] * self.experts[number](x[rows])
        return y


def routed_llama() -> Any:
    model: Any = tiny("llama", num_hidden_layers=LAYERS)
    for layer in model.model.layers:
        layer.mlp = Routed(model.config)
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(sum(name.encode())))
    return model.requires_grad_(False).eval()


def targets_in(model: nn.Module) -> list[str]:
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".mlp." in name]
    return [*inside, lowest_linear(model)]


def share(rank: int) -> list[Microbatch]:
    """Of the first rank, three tokens again and again: to fewer experts."""
    mine = padded_microbatches(count=4, longest=20)[rank::2]
    if rank == 0:
        mine = [
            replace(each, inputs=each.inputs | {"input_ids": each.inputs["input_ids"].clamp(max=5)}) for each in mine
        ]
    return [replace(each, index=index) for index, each in enumerate(mine)]


def be_rank() -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]], Tensor]:
    """What taps show on the way that each is, the same of targets that the first rank calls none of, and logits; in
    pieces, as a model without blocks would be."""
    import deepspeed

    world, model = World.start(), routed_llama()
    sharding, names = open_sharding(world, None), targets_in(model)
    deepspeed.zero.Init(module=model, config_dict_or_path=calibration_settings({}, torch.float32))
    found = {way: dict(shown(model, names, share(world.rank), way, sharding)) for way in WAYS}
    (way, *_) = WAYS
    uncalled = world.of_main([name for name in names if name not in found[way]])
    alone = {way: dict(shown(model, uncalled, share(world.rank), way, sharding)) for way in WAYS}
    assert not deepspeed.utils.get_z3_leaf_modules(model), "the user's own engine shall not find ours"
    assert not any(map(deepspeed.utils.z3_leaf_parameter, model.parameters()))
    model.config.is_encoder_decoder = True
    pieces = pieces_of(model)
    model.config.is_encoder_decoder = False
    with torch.no_grad(), sharding.passing(pieces):
        return found, alone, forward(model, share(world.rank)[0], CPU)


def test_ranks_that_call_other_experts_have_the_unsharded_gradients() -> None:
    model = routed_llama()
    names = targets_in(model)
    parts = run_on_ranks(be_rank, 2, timeout_seconds=100)
    expected = reference(model, names, [*share(0), *share(1)])
    for way in WAYS:
        few, many = (found[way] for found, _, _ in parts)
        none, all_of_them = (alone[way] for _, alone, _ in parts)
        assert not none and worst(all_of_them, {name: expected[name] for name in all_of_them}) < 1e-5, way
        assert all_of_them.keys() == many.keys() - few.keys()
        assert few.keys() < many.keys(), "ranks should call other experts"
        assert worst({name: few.get(name, 0) + many[name] for name in many}, expected) < 1e-5, way
        assert (
            worst(shown(model, names, share(1), way), {name: many.get(name, 0 * expected[name]) for name in names})
            < 1e-5
        )
    for rank, (_, _, logits) in enumerate(parts):
        torch.testing.assert_close(logits, forward(model, share(rank)[0], CPU))


def save_switch(directory: Path) -> Path:
    config = SwitchTransformersConfig(
        vocab_size=258, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, num_decoder_layers=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64, tie_word_embeddings=False,
        pad_token_id=256, eos_token_id=257, decoder_start_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_switch_transformers_start_alike_on_ranks(tmp_path: Path) -> None:
    """One rank's text is of other letters than the other's, which go to other experts."""
    model, data = save_switch(tmp_path / "model"), tmp_path / "data.jsonl"
    texts = [("a" if row % 2 else "bcdefghij") * (3 + row) for row in range(8)]
    data.write_text("".join(json.dumps({"prompt": text, "completion": text[:4]}) + "\n" for text in texts))
    original = logits_of(model)
    outputs = []
    for size in (1, 2):
        trees = [
            config_tree(model, data, tmp_path / f"{engine}{size}", kind="t5", r=2, gradient={"engine": engine})
            for engine in ("exact", "sketch")
        ]
        for tree in trees:
            tree["calibration"]["per_device_batch_size"] = 2 // size
        outputs.append(make_outputs(trees, size))
    for unsharded, out in zip(*outputs, strict=True):
        alone, sharded = read_products(unsharded), read_products(out)
        assert alone.keys() == sharded.keys() and sum(".experts." in name for name in alone) > len(alone) / 4
        for name, product in alone.items():
            assert relative(sharded[name], product) < 1e-4 if product.any() else not sharded[name].any(), name
        assert any("got no gradient" in line for line in read_report(out)["warnings"])
        assert (logits_of(out / "residual_base") - original).abs().max() > 1e-2
        with_adapter = logits_of(out / "residual_base", out / "loraga_init")
        torch.testing.assert_close(with_adapter, original, atol=1e-4, rtol=0)


def logits_of(model_dir: Path, adapter: Path | None = None) -> Tensor:
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(model_dir)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids, decoder_input_ids=ids[:, :7]).logits
