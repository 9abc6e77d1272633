"""Make, once, what configs/quickstart.yaml points at: a small pretrained byte-level model and a calibration set.

`--model moe` makes the mixture of experts of configs/quickstart-moe.yaml instead of a Llama. Nothing is downloaded. The
model learns the source of this Python's standard library; the calibration passages are the English help topics that
ship with it, another distribution than the one the model has learned.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# threads that spin while they wait are ten times slower as soon as anything else runs on the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from loraga_dist.engines.product import multiplies_bfloat16
from loraga_dist.errors import LoragaError, RunError, UserError
from loraga_dist.files.checksums import is_as_written, sha256_of
from loraga_dist.files.disk import read_json
from loraga_dist.files.staging import files_in

END_OF_TEXT_ID, PAD_ID = 256, 257
VOCABULARY_SIZE = 258
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "turtledemo"}
    | {"ensurepip", "encodings", "__pycache__"}
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is built; a change of any field, or of `version`, rebuilds."""

    version: int = 1
    hidden_size: int = 256
    intermediate_size: int = 688
    num_layers: int = 4
    num_heads: int = 4
    sequence_length: int = 256
    batch_size: int = 8
    decay_end_step: int = 180
    max_steps: int = 300
    muon_lr: float = 0.03
    adamw_lr: float = 0.01
    warmup_steps: int = 10
    check_every_steps: int = 20
    heldout_windows: int = 64
    target_loss: float = 1.6
    time_limit_seconds: float = 1800.0
    seed: int = 0


@dataclass(frozen=True)
class MoeRecipe(Recipe):
    """Of a Qwen3-MoE; `intermediate_size` is that of one expert."""

    hidden_size: int = 128
    intermediate_size: int = 96
    num_layers: int = 2
    num_experts: int = 8
    experts_per_token: int = 2
    decay_end_step: int = 120
    heldout_windows: int = 32
    target_loss: float = 2.4
    balance: float = 0.02
    """Weight of the loss that keeps experts equally busy; else some see next to nothing of the calibration data."""


RECIPES = {"dense": Recipe(), "moe": MoeRecipe()}
DIRECTORIES = {"dense": Path("build/quickstart"), "moe": Path("build/quickstart-moe")}


def ensure_quickstart(directory: Path, recipe: Recipe | None = None) -> Path:
    """Build `model/`, `calibration.jsonl` and `recipe.json` in `directory` unless the same recipe made them already.

    Returns `directory`. The build happens beside it and is renamed into place, so an interrupted run leaves nothing.
    Raises UserError where `directory` holds something else, or a build that was changed, RunError where the model does
    not learn enough.
    """
    recipe = recipe or Recipe()
    made_by = {
        **asdict(recipe),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if _is_made_by(directory, made_by):
        return directory
    if directory.exists() and not _is_ours(directory):
        problem = "holds other files, or changed ones; name a new directory, or empty this one"
        raise UserError("--directory", str(directory), problem)

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        _write_calibration(new / "calibration.jsonl")
        start = time.perf_counter()
        model, heldout_loss = _pretrain(recipe)
        model.save_pretrained(new / "model", max_shard_size="5MB")
        byte_tokenizer().save_pretrained(new / "model")
        made = {
            "recipe": made_by,
            "heldout_loss": heldout_loss,
            "seconds": time.perf_counter() - start,
            "parameters": model.num_parameters(),
            "files": {name: sha256_of(new / name) for name in files_in(new)},
        }
        (new / "recipe.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        if directory.exists():
            os.replace(directory, Path(temporary) / "old")
        os.replace(new, directory)
    return directory


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the UTF-8 bytes, then end-of-text (also bos, as in GPT-2) and padding."""
    vocabulary = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def calibration_passages() -> list[str]:
    """Distinct passages of 200 to 400 characters, whole paragraphs each, of Python's help topics."""
    from pydoc_data.topics import topics

    passages: list[str] = []
    for name in sorted(topics):
        passage = ""
        for paragraph in topics[name].split("\n\n"):
            joined = f"{passage}\n\n{paragraph}".strip("\n")
            if len(joined) <= 400:
                passage = joined
            else:
                passages.append(passage)
                passage = paragraph.strip("\n")
        passages.append(passage)
    return [passage for passage in dict.fromkeys(passages) if 200 <= len(passage) <= 400]


def _write_calibration(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for passage in calibration_passages():
            file.write(json.dumps({"text": passage}, ensure_ascii=False) + "\n")


def _read_recipe(directory: Path) -> dict[str, Any]:
    """What recipe.json says; nothing where it is missing, or none of ours."""
    try:
        made = read_json(directory / "recipe.json")
    except RunError:
        return {}
    of_ours = {"recipe", "heldout_loss", "seconds", "parameters"}
    return made if isinstance(made, dict) and of_ours <= made.keys() else {}


def _is_made_by(directory: Path, made_by: dict[str, object]) -> bool:
    there = (directory / "model").is_dir() and (directory / "calibration.jsonl").is_file()
    return there and _read_recipe(directory).get("recipe") == made_by


def _is_ours(directory: Path) -> bool:
    """Only a build that nobody has changed since, or an empty directory, may be replaced."""
    if not directory.is_dir():
        return False
    at_top = {path.name for path in directory.iterdir()}
    made = _read_recipe(directory)
    if not made or at_top - {"model", "calibration.jsonl", "recipe.json"}:
        return not at_top
    if "files" not in made:  # of an earlier version, which told no digests
        return True
    names = [name for name in files_in(directory) if name != "recipe.json"]
    return all(name in made["files"] and is_as_written(directory / name, made["files"][name]) for name in names)


def _describe(made: dict[str, float]) -> str:
    return (
        f"quickstart model: {made['parameters'] / 1e6:.1f} M parameters, "
        f"held-out loss {made['heldout_loss']:.3f} nats per byte, built in {made['seconds']:.0f} s"
    )


def _standard_library() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out token ids (int16, 1-D): every 20th source file is held out, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)]
    end = torch.tensor([END_OF_TEXT_ID], dtype=torch.int16)
    training, heldout = [end], [end]
    for index, path in enumerate(sorted(paths)):
        if source := bytearray(path.read_bytes()):
            ids = torch.frombuffer(source, dtype=torch.uint8).to(torch.int16)
            (heldout if index % 20 == 0 else training).extend((ids, end))
    training_ids = torch.cat(training)
    if len(training_ids) < 2_000_000:
        raise RunError(f"{root} holds only {len(training_ids)} bytes of .py files to pretrain the quickstart model on")
    return training_ids, torch.cat(heldout)


def _new_model(recipe: Recipe) -> PreTrainedModel:
    torch.manual_seed(recipe.seed)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": PAD_ID,
        "dtype": "float32",
    }
    if isinstance(recipe, MoeRecipe):
        config = Qwen3MoeConfig(
            **common,
            num_key_value_heads=recipe.num_heads,
            moe_intermediate_size=recipe.intermediate_size,
            num_experts=recipe.num_experts,
            num_experts_per_tok=recipe.experts_per_token,
            norm_topk_prob=True,
        )
        model: PreTrainedModel = Qwen3MoeForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    # Blocks that start as the identity, and a loss that starts at log(vocabulary), make early steps count.
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj", "lm_head.weight")):
            torch.nn.init.zeros_(parameter)
        elif name.endswith("embed_tokens.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
    return model


class Muon(torch.optim.Optimizer):
    """Step as torch.optim.Muon does, without weight decay; that one multiplies in bfloat16 on every processor.

    params: matrices. dtype: of the products. Source: https://kellerjordan.github.io/posts/muon/.
    """

    MOMENTUM = 0.95
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, params: list[torch.nn.Parameter], lr: float, dtype: torch.dtype) -> None:
        super().__init__(params, {"lr": lr, "dtype": dtype})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for W_MN in group["params"]:
                state = self.state[W_MN]
                if not state:
                    state["mean"] = torch.zeros_like(W_MN)
                mean_MN = state["mean"]
                mean_MN.lerp_(W_MN.grad, 1 - self.MOMENTUM)
                update_MN = self._orthogonalized(W_MN.grad.lerp(mean_MN, self.MOMENTUM).to(group["dtype"]))
                W_MN.add_(update_MN, alpha=-group["lr"] * max(1, W_MN.shape[0] / W_MN.shape[1]) ** 0.5)

    def _orthogonalized(self, G_MN: torch.Tensor) -> torch.Tensor:
        """All singular values near 1, by five Newton-Schulz iterations."""
        if G_MN.shape[0] > G_MN.shape[1]:
            return self._orthogonalized(G_MN.T).T
        a, b, c = self.COEFFICIENTS
        X_MN = G_MN / G_MN.norm().clamp(min=1e-7)
        for _ in range(5):
            gram_MM = X_MN @ X_MN.T
            X_MN = torch.addmm(X_MN, torch.addmm(gram_MM, gram_MM, gram_MM, beta=b, alpha=c), X_MN, beta=a)
        return X_MN


def _pretrain(recipe: Recipe) -> tuple[PreTrainedModel, float]:
    """Train until the held-out loss is below the target; raises RunError at the step or time limit."""
    torch.set_num_threads(os.cpu_count() or 1)
    training_ids, heldout_ids = _standard_library()
    model = _new_model(recipe)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    hidden_ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in hidden_ids]
    bf16 = multiplies_bfloat16()
    optimizers = [
        Muon(hidden, recipe.muon_lr, torch.bfloat16 if bf16 else torch.float32),
        torch.optim.AdamW(rest, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _lr_factor(step, recipe)) for o in optimizers]
    batches = _batches(training_ids, recipe)
    options = {"output_router_logits": True} if isinstance(recipe, MoeRecipe) else {}
    step, recent_losses = 0, []
    start = time.perf_counter()
    with tqdm(total=recipe.max_steps, desc="pretraining", unit="step", disable=not sys.stderr.isatty()) as bar:
        while True:
            step += 1
            ids_BS = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = model(ids_BS, **options)
            loss = _next_byte_loss(outputs.logits, ids_BS)
            (loss + recipe.balance * outputs.aux_loss if isinstance(recipe, MoeRecipe) else loss).backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            recent_losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{recent_losses[-1]:.2f}", target=recipe.target_loss)

            seconds = time.perf_counter() - start
            last = step == recipe.max_steps or seconds > recipe.time_limit_seconds
            if not last and step % recipe.check_every_steps:
                continue
            training_loss = statistics.fmean(recent_losses)
            recent_losses.clear()
            if bar.disable:
                print(f"pretraining: step {step}, loss {training_loss:.3f}, {seconds:.0f} s", flush=True)
            # A held-out check costs as much as several steps: none while the training loss is far from the target.
            if last or training_loss < recipe.target_loss + 0.2:
                heldout_loss = _heldout_loss(model, heldout_ids, recipe)
                if heldout_loss < recipe.target_loss:
                    return model, heldout_loss
            if last:
                raise RunError(
                    f"pretraining the quickstart model: held-out loss {heldout_loss:.3f} after {step} steps and "
                    f"{seconds:.0f} s, needed below {recipe.target_loss}; nothing was saved"
                )


def _lr_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant for a third of the schedule, then linearly down to a tenth, and on at that."""
    decay = 1.5 * (1 - step / recipe.decay_end_step)
    return min(1.0, (step + 1) / recipe.warmup_steps, max(0.1, decay))


def _batches(ids: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Random windows of the corpus, int64 [batch, sequence], for ever."""
    generator = torch.Generator().manual_seed(recipe.seed)
    offsets_S = torch.arange(recipe.sequence_length)
    while True:
        starts_B1 = torch.randint(len(ids) - recipe.sequence_length, (recipe.batch_size, 1), generator=generator)
        yield ids[starts_B1 + offsets_S].long()


@torch.no_grad()
def _heldout_loss(model: PreTrainedModel, ids: torch.Tensor, recipe: Recipe) -> float:
    """Mean nats per byte over evenly spaced held-out windows, in fp32 as the model is saved."""
    starts_B1 = torch.linspace(0, len(ids) - recipe.sequence_length, recipe.heldout_windows).long()[:, None]
    windows_BS = ids[starts_B1 + torch.arange(recipe.sequence_length)].long()
    losses = [_next_byte_loss(model(chunk_BS).logits, chunk_BS) for chunk_BS in windows_BS.split(16)]
    return torch.stack(losses).mean().item()


def _next_byte_loss(logits_BSV: torch.Tensor, ids_BS: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(RECIPES), default="dense", help="moe: a mixture of experts")
    parser.add_argument("--directory", type=Path, help="by default build/quickstart, or build/quickstart-moe")
    options = parser.parse_args()
    directory: Path = options.directory or DIRECTORIES[options.model]
    try:
        ensure_quickstart(directory, RECIPES[options.model])
    except LoragaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(_describe(json.loads((directory / "recipe.json").read_text(encoding="utf-8"))))
    print(f"  model        {directory / 'model'}\n  calibration  {directory / 'calibration.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
