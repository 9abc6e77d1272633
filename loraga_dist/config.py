"""What a user may say: one pydantic tree, read from YAML and dotted command-line overrides.

Every default of the project lives here. Unknown keys are errors that name the nearest. Strings go to docs/CONFIG.md.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from loraga_dist.engines import ENGINES
from loraga_dist.errors import UserError
from loraga_dist.schemes import DIRECTIONS, SCALES, SCHEMES
from loraga_dist.value_types import (
    LARGEST_COUNT,
    Alpha,
    Amount,
    Count,
    JsonObject,
    NameIn,
    NamePattern,
    PathOrId,
    Rank,
    Seed,
)
from loraga_dist.yaml_tree import read_tree, require_plain

SchemeName = Annotated[str, NameIn(SCHEMES)]
TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Checkpointing = Literal["auto", "none", "non_reentrant"]
OrderName = Literal["auto", "block", "model"]
StateDevice = Literal["auto", "device", "host"]
Tracker = Literal["tensorboard", "wandb"]
Whitening = Literal["exact", "sampled", "diagonal", "none"]


FILL_IN = "FILL_IN"
"""Where a recipe has a value that only its user knows."""

ConfigT = TypeVar("ConfigT", bound="MethodConfig")


class Section(BaseModel):
    """Base of all sections: typed strictly, closed, immutable."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
    )


def keys_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Its fields by the keys that a user writes."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def sections_of(config: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Its sections by name, in its order."""
    kinds = {name: field.annotation for name, field in config.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


class ModelConfig(Section):
    """The base model, as transformers' `from_pretrained` names its arguments."""

    name_or_path: PathOrId
    """A directory, or a hub id, with a checkpoint in safetensors files."""
    revision: str | None = None
    dtype: Dtype = "auto"
    """Compute dtype of calibration; `auto` is the checkpoint's own."""
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    class_name: str | None = Field(default=None, alias="class")
    """A class of transformers by its name, where a checkpoint fits several; null is what its config.json names, or
    else the one for the task."""


class LoraSection(Section):
    """The adapter, in `peft.LoraConfig`'s names. Ranks and alphas may differ by module through the patterns."""

    r: Rank = 8
    lora_alpha: Alpha = 16
    use_rslora: bool = False
    target_modules: NamePattern | list[str] = "all-linear"
    exclude_modules: NamePattern | list[str] | None = None
    target_parameters: list[str] | None = None
    """Parameters by the ends of their names, for instance `mlp.experts.gate_up_proj`: of one that stacks matrices each
    expert gets its own adapter. `all-linear` takes none of them."""
    rank_pattern: dict[NamePattern, Rank] = {}
    alpha_pattern: dict[NamePattern, Alpha] = {}
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Written into the adapter's config for training; calibration never uses it."""
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: NamePattern | list[NamePattern] | None = None
    use_dora: bool = False
    """The adapter's magnitudes are the norms of the original weights, so that it starts where it would without."""
    task_type: TaskType = "CAUSAL_LM"


class SchemeConfig(Section):
    """How A and B start (`schemes.py`)."""

    scheme: SchemeName = "lora_ga"
    """From the gradient: `lora_ga`, and on an unchanged base `lora_one`, `rrr` and `rrr_step`; from the weights:
    `pissa`, `olora`; `kaiming`, from neither, is plain LoRA."""
    direction: Annotated[str, NameIn(DIRECTIONS)] = "ArB2r"
    scale: Annotated[str, NameIn(SCALES)] = "stable"
    stable_gamma: Amount | None = None
    whitening: Whitening = "sampled"
    """What is known of the inputs that a regression is on: their second moment, N x N, from all tokens (`exact`) or
    from some 16,384 of them (`sampled`), its diagonal, or nothing."""
    damping: Annotated[float, Field(ge=1e-6, le=1e6)] = 0.3
    """Added to the diagonal of that second moment, as a share of the diagonal's mean."""
    step: Annotated[float, Field(ge=0, le=1e3)] | None = None
    """Norm of B over sqrt(M); null searches the one that lowers the loss most on 16 samples, or a quarter of the data,
    kept apart from the gradient's."""
    rank_budget: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = None
    """Adapter parameters in all, sum of r (M + N), to spend on the targets whose gradients have most energy in further
    directions; each gets rank 1 at least and twice `lora.r` at most, and the scaling of `lora`."""
    seed: Seed = 0
    """Seeds the randomized SVD, the `random` direction and `kaiming`."""

    @field_validator("scheme", mode="before")
    @classmethod
    def _no_lora_sb(cls, value: Any) -> Any:
        if value == "lora_sb":
            raise ValueError(
                "LoRA-SB trains an r x r matrix between a fixed A and B, for which a PEFT LoRA adapter has no place; "
                "write lora_one, which starts from the same gradient"
            )
        return value

    @field_validator("direction", "scale", "stable_gamma", "whitening", "damping", "step", "rank_budget")
    @classmethod
    def _of_this_scheme(cls, value: Any, info: ValidationInfo) -> Any:
        key = info.field_name or ""
        scheme, default = info.data.get("scheme"), cls.model_fields[key].default
        if scheme is not None and value != default and key not in SCHEMES[scheme].init_keys:
            concerned = " and ".join(name for name, other in SCHEMES.items() if key in other.init_keys)
            raise ValueError(
                f"concerns {concerned} alone, not {scheme}; write {'null' if default is None else default}"
            )
        return value

    def moment_shape(self, N: int) -> tuple[int, ...] | None:
        """Of the second moment of an input of N; None where it is not asked for."""
        if not SCHEMES[self.scheme].whitens or self.whitening == "none":
            return None
        return (N,) if self.whitening == "diagonal" else (N, N)

    @property
    def searches_step(self) -> bool:
        """The length of a first step is searched on data, not given."""
        return SCHEMES[self.scheme].takes_step and self.step is None

    @property
    def gamma(self) -> float:
        """`stable_gamma`, or the scheme's own."""
        return SCHEMES[self.scheme].stable_gamma if self.stable_gamma is None else self.stable_gamma


class GradientConfig(Section):
    """How gradients are gathered, by schemes that take them."""

    engine: Annotated[str, NameIn(ENGINES, words=("auto",))] = "auto"
    """`exact` forms a target's gradient, `sketch` a few percent of its size; `auto` takes for every target the one that
    costs less time, if its state fits the budget."""
    order: OrderName = "auto"
    """`block` holds one block of the model at a time and takes all microbatches through it; `model` takes each
    microbatch through the whole model. `auto` is `block` wherever no process holds the model whole on its device, or
    the activations of model order have no room."""
    chunk_microbatches: Count | Literal["auto"] = "auto"
    """Block order: how many microbatches of a rank go through the blocks together; `auto` is as many as there is room
    for, if possible all. Each chunk gathers the model twice."""
    activations_dir: PathOrId | None = None
    """Block order: a directory for the inputs of blocks, instead of host memory. By default they go to files only
    where memory has no room for them, beside the checkpoint."""
    max_targets_in_flight: Count | None = None
    """Targets accumulated at a time: 1 is one parameter at a time, null as many as the budget holds."""
    state_budget_gib: Amount = 4.0
    """Memory per rank that gradient state may take; what does not fit takes another turn: of its block, or, in model
    order and with several chunks, of the data."""
    state_device: StateDevice = "auto"
    """Where that state lives between two uses; `host` is pinned host memory, at the price of copies in every backward.
    `auto` is the device, unless the state would fill half of what is free there."""
    oversampling: Count | None = None
    """Extra columns beyond those the scheme uses; null is the engine's own rule. What `sketch` gains accuracy from."""
    refine_passes: Annotated[int, Field(ge=0, le=LARGEST_COUNT)] | Literal["auto"] = "auto"
    """More passes of `sketch` over the same data: one makes it practically exact. `auto` takes one where a microbatch
    of all ranks has fewer supervised tokens than the sketch has columns."""
    checkpointing: Checkpointing = "auto"
    """Model order: whether every block is computed again in backward instead of kept: less memory, for a second forward
    pass. `auto` does that only where block order is no way out, and in one process of `init` only where there is no
    room."""


class CalibrationConfig(Section):
    """The calibration data, in TRL's and datasets' names."""

    dataset_name: PathOrId | None = None
    """A hub id, a directory written by `save_to_disk`, or a `datasets` builder (json, csv, parquet, text); by default
    the builder that the suffix of `data_files` names."""
    dataset_config: str | None = None
    data_files: PathOrId | list[PathOrId] | None = None
    split: str = "train"
    dataset_text_field: str = "text"
    label_field: str = "label"
    """SEQ_CLS: the column with the integer class."""
    max_length: int = Field(default=1024, ge=2, le=LARGEST_COUNT)
    """Longer samples are truncated to this many tokens."""
    max_samples: Count | Literal["auto"] = 256
    """`auto` goes on over the shuffled data until two halves of what was seen agree on the gradient."""
    target_cosine: float = Field(default=0.9, gt=0, lt=1)
    """`max_samples: auto` stops where the median target's split-half cosine reaches this; with several sweeps the
    targets of the first one decide."""
    sample_limit: Count = 2048
    """`max_samples: auto` stops here at the latest. The disagreement of halves falls as one over their size, so that
    data whose first 256 samples reach a cosine of 0.53 reaches 0.9 within 2048."""
    per_device_batch_size: Count = 1
    assistant_only_loss: bool = False
    completion_only_loss: bool | None = None
    """null: True for prompt-completion data, as TRL does."""
    seed: Seed = 42
    """Seed of the one shuffle of the data."""

    @property
    def names_data(self) -> bool:
        return bool(self.dataset_name or self.data_files)

    @property
    def most_samples(self) -> int:
        """Samples a run reads at most."""
        return self.sample_limit if self.max_samples == "auto" else self.max_samples


class OutputConfig(Section):
    """Where the files go."""

    dir: PathOrId
    """The output directory; it appears when everything in it has been verified."""
    overwrite: bool = False
    """Replace an earlier output."""
    residual_base: Literal["full", "none"] = "full"
    """`none` leaves the copy of the model out; `loraga-dist materialize-base` makes it later."""
    residual_dtype: Dtype = "auto"
    """dtype of the targets in the residual base; `auto` is each tensor's own in the checkpoint."""
    report_to: Tracker | Literal["none"] | list[Tracker] = "none"
    """Where the report's figures are logged when the run is done."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face hub for adapter, offset, report and model card; made if it is not there."""
    push_residual_base: bool = False
    """Push `residual_base` as well, which is as large as the model."""

    @field_validator("push_residual_base")
    @classmethod
    def _residual_base_exists(cls, value: bool, info: ValidationInfo) -> bool:
        if value and (info.data.get("push_to_hub") is None or info.data.get("residual_base") != "full"):
            raise ValueError("needs push_to_hub, and residual_base full; write false")
        return value

    @property
    def trackers(self) -> list[Tracker]:
        """`report_to` as a list."""
        if self.report_to == "none":
            return []
        return list(self.report_to) if isinstance(self.report_to, list) else [self.report_to]


class MethodConfig(Section):
    """What `loraga_dist.initialize` needs: everything but model, data and output."""

    lora: LoraSection = LoraSection()
    init: SchemeConfig = SchemeConfig()
    gradient: GradientConfig = GradientConfig()
    deepspeed: PathOrId | JsonObject | None = None
    """A DeepSpeed JSON file, or the same inline; ZeRO stage 3 without optimizer is what is taken from it."""


class InitConfig(MethodConfig):
    """The whole configuration of `loraga-dist init`."""

    model: ModelConfig
    calibration: CalibrationConfig = CalibrationConfig()
    """Schemes that take no gradient need no data; the start is then compared with the model on seeded token ids."""
    output: OutputConfig
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the checkpoint that an interrupted run of the same work left beside `output.dir`."""
    checkpoint_minutes: Amount = 30.0
    """A checkpoint is also saved when this much time has gone by since the last."""


def require_filled_in(config: InitConfig, *sections: str) -> None:
    """Raise UserError for the keys of a recipe that are still to be filled in; of these sections, or of all."""
    tree = config.model_dump(include=set(sections) or None)
    keys = [(name, key) for name, section in tree.items() if isinstance(section, dict) for key in section]
    left = [f"{name}.{key}" for name, key in keys if tree[name][key] == FILL_IN]
    if left:
        raise UserError(left[0], FILL_IN, "is to be filled in" + "".join(f", and {key}" for key in left[1:]))


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> InitConfig:
    """Read a YAML file and apply `--section.key value` (or `--section.key=value`) overrides.

    Raises UserError for an unreadable file, an unknown key, or a value of the wrong type or range.
    """
    return parse_config(InitConfig, read_tree(path, overrides))


def parse_config(kind: type[ConfigT], tree: dict[str, Any]) -> ConfigT:
    """Validate a plain dict; the first mistake becomes one UserError line. A section of no keys may be None."""
    for section, value in tree.items():
        require_plain(str(section), value)
    # what YAML makes of a section whose keys are all commented out
    without_keys = {name: {} for name in sections_of(kind) if name in tree and tree[name] is None}
    try:
        return kind.model_validate(tree | without_keys)
    except ValidationError as error:
        raise _user_error(kind, error) from error


def _user_error(kind: type[BaseModel], error: ValidationError) -> UserError:
    # an unknown key explains the other complaints more often than the other way round
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return UserError(".".join(path), first["input"], _unknown_key_hint(kind, path))
    if first["type"] == "missing":
        return UserError(".".join(path), None, "is missing; it has no default")
    if first["type"] == "model_type":
        (section,) = path
        key = next(iter(keys_of(sections_of(kind)[section])))
        return UserError(section, first["input"], f"is a section; write its keys, such as {section}.{key}")
    # a union reports every member, under the field's own path: say what all of them wanted
    depth = 2 if path[0] in sections_of(kind) else 1
    wanted = dict.fromkeys(
        detail["msg"].removeprefix("Value error, ").replace("Input should", "input should")
        for detail in details
        if [str(part) for part in detail["loc"][:depth]] == path[:depth]
    )
    return UserError(".".join(path[:depth]), first["input"], " or ".join(wanted))


def _unknown_key_hint(kind: type[BaseModel], path: list[str]) -> str:
    *parents, leaf = path
    sections = sections_of(kind)
    known = keys_of(sections[parents[0]] if parents else kind)
    if parents == ["lora"]:
        from peft import LoraConfig  # seconds, which only this mistake is worth

        if leaf in {field.name for field in dataclasses.fields(LoraConfig)}:
            return "is a key of PEFT's that is not supported here; remove it"
    near = [".".join([*parents, name]) for name in difflib.get_close_matches(leaf, known, n=1)]
    elsewhere = [f"{name}.{leaf}" for name, section in sections.items() if leaf in keys_of(section)]
    if near or elsewhere:
        return f"unknown key; did you mean {(near or elsewhere)[0]}?"
    return f"unknown key; known here: {', '.join(known)}"
