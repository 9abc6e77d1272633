"""What a run says of itself: loraga_report.json, the output directory's README.md, and the closing table."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from loraga_dist.artifacts.names import FACTORS, LORAGA_INIT, LORAGA_OFFSET, README, RESIDUAL_BASE
from loraga_dist.config import SchemeConfig
from loraga_dist.publish.card import AUTO_CLASSES
from loraga_dist.schemes import SCHEMES, Scheme

SCHEMA_VERSION = 1
LOW_SPLIT_HALF_COSINE = 0.5
"""Below it two halves of the data disagree on the gradient more than they agree."""

LOW_WINDOW_CAPTURE = 0.7
"""Below it a window of the data held much energy outside the sketch's bases."""

LARGE_OFFSET_RATIO = 1
"""Above it the start changes a weight by more than its own size."""

_MORE_DATA = {
    "max_samples": "raise calibration.max_samples, or write auto",
    "sample_limit": "raise calibration.sample_limit",
    "target_cosine": "raise calibration.target_cosine",
    "data": "all of the data was used; add more",
}
"""How to get more calibration data, by what ended it this time."""
_MOST_NAMED = 3

_PACKAGES = ("loraga_dist", "torch", "transformers", "peft", "deepspeed", "safetensors")


_LEARNING_RATE = {
    "lora_ga": "LoRA-GA wants learning rates near those of full fine-tuning, which are lower than plain LoRA's.\n"
}
_AFTER_ON_RESIDUAL = f"""A trained adapter belongs on `{RESIDUAL_BASE}/` too. As a plain LoRA on the original base, for
any server or trainer:"""
_AFTER_ON_BASE = """A trained adapter is a LoRA on the original base as it is. With one rank, no patterns and no rsLoRA,
as servers want it:"""
_AFTER_DORA = "A trained DoRA is no plain LoRA on the original base. As a merged model, for any server:"
_OTHER_SETTINGS = """## Other settings

Another rank, scale, split or scheme from `factors/`, without the gradients:

```
loraga-dist refactor {directory} --to DIR --lora.r R
```

"""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


_SMALLER_OFFSET = {
    "stable": "lower lora.lora_alpha or raise init.stable_gamma",
    "peft": "lower lora.lora_alpha or raise init.stable_gamma",
    "unit": "lower lora.lora_alpha",
    "gd": "raise lora.lora_alpha",
    "weight_svd": "write init.scale stable",
}
"""By scale: gd divides by the square of s, weight_svd by s."""


def find_warnings(
    init: SchemeConfig,
    targets: Mapping[str, Mapping[str, Any]],
    *,
    stopped_by: str | None,
    refine_passes: int | None,
) -> list[str]:
    """What a user should look at before training: one line each, with the worst targets, and what to do.

    stopped_by, refine_passes: None where no gradient was taken.
    """
    scheme = SCHEMES[init.scheme]
    values = {
        field: {name: target[field] for name, target in targets.items() if target[field] is not None}
        for field in ("offset_ratio", "split_half_cosine", "window_capture", "numerical_rank")
    }
    large = {name: ratio for name, ratio in values["offset_ratio"].items() if ratio > LARGE_OFFSET_RATIO}
    noisy = {name: cosine for name, cosine in values["split_half_cosine"].items() if cosine < LOW_SPLIT_HALF_COSINE}
    drifted = {name: capture for name, capture in values["window_capture"].items() if capture < LOW_WINDOW_CAPTURE}
    deficient = {
        name: rank for name, rank in values["numerical_rank"].items() if rank < len(targets[name]["singular_values"])
    }
    lines = []
    if large:
        smaller = _SMALLER_OFFSET[init.scale] if scheme.source == "gradient" else _SMALLER_OFFSET["unit"]
        rounding = "; output.residual_dtype float32 keeps the rounding small" if scheme.changes_base else ""
        lines.append(
            f"offset_ratio above {LARGE_OFFSET_RATIO} (s*B0*A0 outweighs W) in {_worst(large, targets, highest=True)}: "
            f"{smaller}{rounding}"
        )
    if stopped_by is None:
        return lines
    if init.rank_budget is not None:
        left = init.rank_budget - sum(target["r"] * sum(target["shape"]) for target in targets.values())
        if left >= min(sum(target["shape"]) for target in targets.values()):
            lines.append(
                f"init.rank_budget {init.rank_budget}: {left} parameters were not spent, every target has the largest "
                "rank or all directions its gradient has; raise lora.r (and lora.lora_alpha with it) to allow larger "
                "ranks"
            )
    if noisy:
        lines.append(
            f"split_half_cosine below {LOW_SPLIT_HALF_COSINE} in {_worst(noisy, targets)}: two halves of the data "
            f"disagree on the gradient; {_MORE_DATA[stopped_by]}"
        )
    if drifted and not refine_passes:  # a refine pass sees all data with the final bases
        lines.append(
            f"window_capture below {LOW_WINDOW_CAPTURE} in {_worst(drifted, targets)}: the gradient changed while the "
            "data went by; set gradient.refine_passes 1, or mix the data better: raise "
            "calibration.per_device_batch_size"
        )
    if deficient:
        lines.append(
            f"the gradient has fewer directions than {scheme.title} takes in {_worst(deficient, targets)}: "
            f"{scheme.missing_directions}; lower lora.r, or use more data ({_MORE_DATA[stopped_by]})"
        )
    return lines


def print_summary(report: Mapping[str, Any], directory: str, verified: str) -> None:
    """The closing table: per kind of module, seconds per phase, memory per rank, files, what to do next."""
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 110)
    title = SCHEMES[report["config"]["init"]["scheme"]].title
    table = Table(title=f"{title} start of {report['config']['model']['name_or_path']}")
    for column in ("module", "targets", "M x N", "r", "captured energy", "split-half cosine", "offset ratio"):
        table.add_column(column, justify="left" if column == "module" else "right")
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for name, target in report["targets"].items():
        kinds.setdefault((name.rpartition(".")[2], *target["shape"]), []).append(target)
    for (kind, M, N), members in kinds.items():
        ranks = sorted({member["r"] for member in members})
        table.add_row(
            kind,
            str(len(members)),
            f"{M} x {N}",
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
            _spread([member["captured_energy"] for member in members]),
            _spread([member["split_half_cosine"] for member in members]),
            _spread([member["offset_ratio"] for member in members]),
        )
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    seconds, check, has_gradient = report["seconds"], report["identity_check"], report["stopped_by"] is not None
    peaks = [f"{peak / 2**20:.0f}" for peak in report["peak_bytes_per_rank"]]
    planned = [f"{plan / 2**20:.0f}" for plan in report["planned_peak_bytes_per_rank"]]
    for label, value in (
        (
            "data",
            f"{report['num_sequences']} sequences, {report['num_supervised_tokens']} supervised tokens, "
            f"mean loss {report['mean_loss']:.4f}"
            if has_gradient
            else f"none: {title} takes no gradient",
        ),
        *([("stopped by", _stop(report))] if has_gradient else []),
        *([("rank budget", _budget(report))] if report["rank_budget"] else []),
        ("seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())),
        ("peak MiB per rank", f"{' '.join(peaks)}  (planned: {' '.join(planned)})"),
        (
            "identity",
            f"logits differ by {check['max_abs_logit_diff']:.2e} at most, largest {check['max_abs_logit']:.2e} "
            f"({check['dtype']})"
            + (
                "" if SCHEMES[report["config"]["init"]["scheme"]].starts_at_model else f"; {title} starts off the model"
            ),
        ),
        ("verified", verified),
        ("files", directory),
        ("train from here", f"{directory}/{README}"),
        ("check again", f"loraga-dist verify {directory}"),
    ):
        console.print(f"{label + ':':<18} {value}", soft_wrap=True)


def readme(report: Mapping[str, Any]) -> str:
    """README.md of the output directory: what is here and how to train, merge and serve from it."""
    config = report["config"]
    directory, base = config["output"]["dir"], config["model"]["name_or_path"]
    auto = AUTO_CLASSES[config["lora"]["task_type"]]
    scheme = SCHEMES[config["init"]["scheme"]]
    start_base = f"{directory}/{RESIDUAL_BASE}" if scheme.changes_base else base
    revision = config["model"]["revision"]
    at_revision = f', revision="{revision}"' if revision and not scheme.changes_base else ""
    ratios = [target["offset_ratio"] for target in report["targets"].values()]
    if scheme.changes_base and config["output"]["residual_base"] == "none":
        residual_note = (
            f"`output.residual_base` was `none`; this makes `{RESIDUAL_BASE}/`:\n\n"
            f"```\nloraga-dist materialize-base {directory}\n```\n\n"
        )
    else:
        residual_note = ""
    return f"""# {scheme.title} start of {base}

{len(report["targets"])} weight matrices; offset ratio ||s B0 A0|| / ||W|| {min(ratios):.3g} to {max(ratios):.3g}.
{_ranks(report)}
| | |
|---|---|
{_contents(scheme, config["lora"]["use_dora"])}
{_belongs(scheme, report)}

{residual_note}## Train

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{start_base}"{at_revision}, dtype="auto")
model = PeftModel.from_pretrained(base, "{directory}/{LORAGA_INIT}", is_trainable=True)
```

TRL: `SFTTrainer(model=model, peft_config=None, ...)`. Other trainers take these lines in their configuration.

{_trainer_configs(start_base, f"{directory}/{LORAGA_INIT}")}
{_LEARNING_RATE.get(config["init"]["scheme"], "")}LoRA+ gives B a larger learning rate than A:
`loraplus_lr_ratio` in Axolotl and LLaMA-Factory, `lorap_lr_ratio` in ms-swift, elsewhere
`peft.optimizers.create_loraplus_optimizer`. Rank, alpha and dropout come from the adapter, whatever a trainer's own
keys say.

## After training

{_after(scheme, config)}
{_OTHER_SETTINGS.format(directory=directory) if scheme.source == "gradient" else ""}## Check

```
loraga-dist verify {directory}
```
"""


def _contents(scheme: Scheme, use_dora: bool) -> str:
    """Rows of the README's table."""
    only = f", **for `{RESIDUAL_BASE}/` only**" if scheme.changes_base else ", for the original base"
    kind = "A0, B0, magnitudes: a PEFT DoRA adapter" if use_dora else "A0, B0: a plain PEFT LoRA adapter"
    rows = [f"| `{LORAGA_INIT}/` | {kind}{only} |"]
    if scheme.changes_base:
        rows += [
            f"| `{RESIDUAL_BASE}/` | the base with W - s B0 A0, an ordinary model directory |",
            f"| `{LORAGA_OFFSET}/` | A0, -B0: merged into the original base it gives `{RESIDUAL_BASE}/` |",
        ]
    if scheme.source == "gradient":
        rows.append(f"| `{FACTORS}/` | leading singular triplets of every gradient |")
    return "\n".join(rows) + "\n"


def _after(scheme: Scheme, config: Mapping[str, Any]) -> str:
    """What to do with a trained adapter."""
    init, is_dora = f"{config['output']['dir']}/{LORAGA_INIT}", config["lora"]["use_dora"]
    text = _AFTER_ON_RESIDUAL if scheme.changes_base else _AFTER_ON_BASE
    output = "--merge MERGED" if is_dora else "--to CONVERTED"
    more = "" if is_dora else " `--rank` truncates it; `--merge DIR` writes a merged model."
    return f"""{_AFTER_DORA if is_dora else text}

```
loraga-dist convert --init {init} --trained TRAINED {output}
```

TRAINED is where the trainer saved it.{more}
"""


def _ranks(report: Mapping[str, Any]) -> str:
    """What `init.rank_budget` came to."""
    if not report.get("rank_budget"):
        return ""
    ranks = [target["r"] for target in report["targets"].values()]
    return f"Ranks {min(ranks)} to {max(ranks)}; {_budget(report)}.\n"


def _belongs(scheme: Scheme, report: Mapping[str, Any]) -> str:
    """What the adapter does to which base."""
    if scheme.changes_base:
        return f"On the original base the adapter is wrong by the s B0 A0 that only `{RESIDUAL_BASE}/` makes up for."
    if scheme.starts_at_model:
        return "The base stays as it is; B0 is zero, so that the adapter changes nothing before it is trained."
    line = f"The base stays as it is, and {scheme.title} starts off it by s B0 A0."
    check = report["identity_check"]
    if check["max_abs_logit_diff"] is not None:  # refactor compares none
        line += f" Logits differ by {check['max_abs_logit_diff']:.3g}, the largest being {check['max_abs_logit']:.3g}."
    return line


def _trainer_configs(base: str, adapter: str) -> str:
    """What to write into the configuration files of trainers, each under its name."""
    configs = {
        "Axolotl": {"base_model": base, "adapter": "lora", "lora_model_dir": adapter},
        "LLaMA-Factory": {
            "model_name_or_path": base,
            "adapter_name_or_path": adapter,
            "finetuning_type": "lora",
        },
        "ms-swift": {"model": base, "adapters": [adapter], "tuner_type": "lora"},
    }
    return "\n".join(
        f"{trainer}:\n\n```yaml\n{yaml.safe_dump(config, sort_keys=False)}```\n" for trainer, config in configs.items()
    )


def finite(value: Any) -> Any:
    """The same structure with NaN and infinities as None, which JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _worst(found: Mapping[str, float], targets: Mapping[str, Any], *, highest: bool = False) -> str:
    """How many of the targets, and the first few from the worst on with their figures."""
    names = sorted(found, key=found.__getitem__, reverse=highest)
    shown = ", ".join(f"{name} {found[name]:.3g}" for name in names[:_MOST_NAMED])
    return f"{len(names)} of {len(targets)} targets ({shown}{', ...' if len(names) > _MOST_NAMED else ''})"


def _budget(report: Mapping[str, Any]) -> str:
    """What was spent of `init.rank_budget`."""
    return f"{report['rank_budget']['spent']} of {report['rank_budget']['parameters']} parameters spent"


def _stop(report: Mapping[str, Any]) -> str:
    """What ended the calibration data, and how well its halves agree."""
    calibration, cosine = report["config"]["calibration"], report["split_half_cosine"]
    wanted = f" of {calibration['target_cosine']}" if calibration["max_samples"] == "auto" else ""
    reached = "unknown" if cosine is None else f"{cosine:.3f}{wanted}"
    return f"{report['stopped_by']}; split-half cosine of the median target {reached}"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} .. {high:.3f}"
