"""What a finished run says in words: the output directory's README.md, and the closing table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from loraga_dist.artifacts.names import FACTORS, LORAGA_INIT, LORAGA_OFFSET, README, RESIDUAL_BASE
from loraga_dist.publish.card import AUTO_CLASSES
from loraga_dist.schemes import SCHEMES, Scheme

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
loraga-dist rebuild {directory} --to DIR --lora.r R
```

"""


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
