"""What a user may write, and what is said of everything else."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

import loraga_dist
from loraga_dist.config import (
    InitConfig,
    MethodConfig,
    ModelConfig,
    SchemeConfig,
    keys_of,
    load_config,
    parse_config,
    require_filled_in,
)
from loraga_dist.engines import ENGINES
from loraga_dist.errors import UserError
from loraga_dist.schemes import DIRECTIONS, SCALES, SCHEMES
from loraga_dist.yaml_tree import dump

LEAST: dict[str, Any] = {"model": {"name_or_path": "model"}, "output": {"dir": "out"}}


def parsed(key: str = "", value: Any = None) -> InitConfig:
    """The least a user must write, and one key more."""
    tree = {name: dict(section) for name, section in LEAST.items()}
    *parents, leaf = key.split(".")
    node: dict[str, Any] = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    if leaf:
        node[leaf] = value
    return parse_config(InitConfig, tree)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lora", 3, "is a section; write its keys, such as lora.r"),
        ("model", "company/base", "is a section; write its keys, such as model.name_or_path"),
        ("lora.r", 0, "input should be greater than or equal to 1"),
        ("lora.r", "8", "input should be a valid integer"),
        ("lora.r", 8.0, "input should be a valid integer"),
        ("lora.r", 2**31, "input should be less than or equal to 1048576"),
        ("lora.lora_alpha", 1e308, "input should be less than or equal to 1000000000"),
        ("init.seed", 2**63, "input should be less than or equal to 9223372036854775807"),
        ("calibration.max_length", 2**31, "input should be less than or equal to 2147483647"),
        ("gradient.state_budget_gib", float("inf"), "input should be a finite number"),
        ("checkpoint_minutes", float("nan"), "input should be a finite number"),
        ("lora.lora_alpha", 0, "input should be greater than 0"),
        ("lora.lora_dropout", 1.0, "input should be less than 1"),
        ("lora.target_modules", 3, "input should be a valid string or input should be a valid list"),
        ("lora.task_type", "LM", "input should be 'CAUSAL_LM', 'SEQ_2_SEQ_LM' or 'SEQ_CLS'"),
        (
            "init.scheme",
            "pizza",
            "input should be 'lora_ga', 'lora_one', 'rrr', 'rrr_step', 'pissa', 'olora' or 'kaiming'",
        ),
        (
            "init.scheme",
            {"lora_ga": 1},
            "input should be 'lora_ga', 'lora_one', 'rrr', 'rrr_step', 'pissa', 'olora' or 'kaiming'",
        ),
        ("init.direction", None, "input should be 'ArB2r', 'A2rBr', 'ArBr' or 'random'"),
        ("init.scale", "big", "input should be 'stable', 'unit', 'gd', 'weight_svd' or 'peft'"),
        ("init.stable_gamma", 0, "input should be greater than 0"),
        ("init.rank_budget", 0, "input should be greater than or equal to 1"),
        ("init.seed", -1, "input should be greater than or equal to 0"),
        ("gradient.engine", "fast", "input should be 'auto', 'sketch' or 'exact'"),
        ("gradient.engine", 3, "input should be 'auto', 'sketch' or 'exact'"),
        ("gradient.max_targets_in_flight", 0, "input should be greater than or equal to 1"),
        ("gradient.state_budget_gib", 0, "input should be greater than 0"),
        ("gradient.state_device", "gpu", "input should be 'auto', 'device' or 'host'"),
        ("gradient.oversampling", 0, "input should be greater than or equal to 1"),
        ("gradient.refine_passes", "often", "input should be a valid integer or input should be 'auto'"),
        ("gradient.refine_passes", -1, "input should be greater than or equal to 0 or input should be 'auto'"),
        ("gradient.checkpointing", "reentrant", "input should be 'auto', 'none' or 'non_reentrant'"),
        ("calibration.max_length", 1, "input should be greater than or equal to 2"),
        ("calibration.max_samples", 0, "input should be greater than or equal to 1 or input should be 'auto'"),
        ("calibration.target_cosine", 1.0, "input should be less than 1"),
        ("calibration.sample_limit", 0, "input should be greater than or equal to 1"),
        ("calibration.per_device_batch_size", 0, "input should be greater than or equal to 1"),
        ("model.dtype", "int8", "input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("output.residual_base", "half", "input should be 'full' or 'none'"),
        (
            "output.report_to",
            "mlflow",
            "input should be 'tensorboard' or 'wandb' or input should be 'none' or input should be a valid list",
        ),
        ("output.push_residual_base", True, "needs push_to_hub, and residual_base full; write false"),
        ("deepspeed", 3, "input should be a valid string or input should be a valid dictionary"),
        ("resume", "maybe", "input should be 'auto' or 'never'"),
        ("checkpoint_minutes", 0, "input should be greater than 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_to_write(key: str, value: Any, says: str) -> None:
    with pytest.raises(UserError) as raised:
        parsed(key, value)
    assert str(raised.value) == f"{key}: {value!r}: {says}"


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("lora.rr", "unknown key; did you mean lora.r?"),
        ("calibration.per_device_batchsize", "unknown key; did you mean calibration.per_device_batch_size?"),
        ("init.engine", "unknown key; did you mean gradient.engine?"),
        ("scheme", "unknown key; did you mean init.scheme?"),
        ("lora.bias", "is a key of PEFT's that is not supported here; remove it"),
        ("model.zzz", f"unknown key; known here: {', '.join(keys_of(ModelConfig))}"),
        ("zzz", f"unknown key; known here: {', '.join(InitConfig.model_fields)}"),
    ],
)
def test_an_unknown_key_is_told_the_nearest(key: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        parsed(key, 1)
    assert str(raised.value) == f"{key}: 1: {says}"


def test_an_unknown_key_explains_more_than_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"^model\.name_or_pat: 'm': unknown key; did you mean model\.name_or_path\?$"):
        parse_config(InitConfig, {"model": {"name_or_pat": "m"}})
    with pytest.raises(UserError, match=r"^output\.dir: None: is missing; it has no default$"):
        parse_config(InitConfig, LEAST | {"output": {}})


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ({"scheme": "lora_sb"}, r"init\.scheme: 'lora_sb': LoRA-SB trains an r x r matrix .*; write lora_one"),
        ({"scheme": "pissa", "scale": "unit"}, r"init\.scale: 'unit': concerns lora_ga alone, not pissa; write stable"),
        ({"scheme": "lora_one", "direction": "ArBr"}, r"init\.direction: 'ArBr': .* not lora_one; write ArB2r"),
        (
            {"scheme": "olora", "stable_gamma": 16},
            r"init\.stable_gamma: 16: concerns lora_ga and lora_one alone, not olora; write null",
        ),
        (
            {"scheme": "kaiming", "rank_budget": 16},
            r"init\.rank_budget: 16: concerns lora_ga and lora_one and rrr and rrr_step alone, not kaiming; write null",
        ),
    ],
)
def test_settings_of_other_schemes_are_refused(init: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_config(MethodConfig, {"init": init})


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_takes_the_keys_that_concern_it(name: str) -> None:
    values = {"direction": "ArBr", "scale": "unit", "stable_gamma": 2.0, "rank_budget": 100}
    values |= {"whitening": "exact", "damping": 1.0, "step": 0.5}
    keys = SCHEMES[name].init_keys
    assert set(keys) <= set(values)
    found = SchemeConfig(scheme=name, **{key: values[key] for key in keys})  # type: ignore[arg-type]
    assert all(getattr(found, key) == values[key] for key in keys)
    # the defaults of the others may be written, as a resolved configuration has them
    assert SchemeConfig.model_validate(found.model_dump()) == found


def test_gamma_is_the_schemes_own_unless_said() -> None:
    def gamma(**init: Any) -> float:
        return parse_config(MethodConfig, {"init": init}).init.gamma

    assert gamma() == gamma(scheme="lora_ga", stable_gamma=None) == 16
    assert gamma(scheme="lora_one") == 128
    assert gamma(scheme="lora_one", stable_gamma=16) == 16
    assert gamma(scheme="pissa", scale="stable", direction="ArB2r") == 1


@pytest.mark.parametrize(
    ("key", "table"),
    [("init.scheme", SCHEMES), ("init.direction", DIRECTIONS), ("init.scale", SCALES), ("gradient.engine", ENGINES)],
)
def test_a_name_is_known_as_soon_as_it_is_in_its_table(
    key: str, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    section, leaf = key.split(".")
    for name in table:
        assert getattr(getattr(parsed(key, name), section), leaf) == name
    with pytest.raises(UserError):
        parsed(key, "mine")
    monkeypatch.setitem(table, "mine", next(iter(table.values())))
    assert getattr(getattr(parsed(key, "mine"), section), leaf) == "mine"


def test_what_is_parsed_is_frozen_and_survives_json() -> None:
    config = parsed("gradient.refine_passes", 2)
    with pytest.raises(ValidationError):
        config.resume = "never"  # type: ignore[misc]
    assert parse_config(InitConfig, config.model_dump(mode="json")) == config


def test_what_follows_from_several_keys() -> None:
    assert not parsed().calibration.names_data
    assert parsed("calibration.dataset_name", "d").calibration.names_data
    assert parsed("calibration.data_files", ["a", "b"]).calibration.names_data
    assert parsed().calibration.most_samples == parsed().calibration.max_samples
    assert parsed("calibration.max_samples", "auto").calibration.most_samples == parsed().calibration.sample_limit
    assert parsed().output.trackers == []
    assert parsed("output.report_to", "wandb").output.trackers == ["wandb"]
    assert parsed("output.report_to", ["wandb", "tensorboard"]).output.trackers == ["wandb", "tensorboard"]


def test_the_home_directory_is_meant_by_a_tilde() -> None:
    assert parsed("output.dir", "~/start").output.dir == str(Path.home() / "start")
    assert parsed("calibration.data_files", ["~/a", "b"]).calibration.data_files == [str(Path.home() / "a"), "b"]


def loaded(directory: Path, *overrides: str, text: str | None = None) -> InitConfig:
    path = directory / "init.yaml"
    path.write_text(yaml.safe_dump(LEAST) if text is None else text)
    return load_config(path, overrides)


def test_overrides_are_yaml_and_make_their_sections(tmp_path: Path) -> None:
    config = loaded(tmp_path, "--lora.r", "4", "--gradient.engine=exact", "--lora.rank_pattern", "{q: 2}")
    assert (config.lora.r, config.gradient.engine, config.lora.rank_pattern) == (4, "exact", {"q": 2})
    assert loaded(tmp_path, "--lora.lora_alpha=3", "--lora.lora_alpha=2.5").lora.lora_alpha == 2.5, (
        "the last one counts"
    )
    assert loaded(tmp_path, "--model.revision", "a: b: c").model.revision == "a: b: c", "what is no YAML is a string"
    empty = "lora:\n" + yaml.safe_dump(LEAST)
    assert loaded(tmp_path, "--lora.r", "4", text=empty).lora.r == 4, "a section may stand there empty"
    assert loaded(tmp_path, text=empty + "init:\ncalibration:\n  # seed: 1\n") == parsed()
    with pytest.raises(UserError, match=r"^model\.name_or_path: None: is missing; it has no default$"):
        loaded(tmp_path, text="model:\n  # name_or_path: model\noutput: {dir: out}\n")


@pytest.mark.parametrize("text", ["1e-2", "1E-2", "+1e-2", "1.e-2", ".1e-1", "0.01e0", "0.01"])
def test_a_number_needs_no_dot(text: str, tmp_path: Path) -> None:
    """As in YAML 1.2, JSON and Python; PyYAML reads YAML 1.1."""
    assert loaded(tmp_path, "--init.scheme", "rrr", "--init.damping", text).init.damping == 0.01
    config = loaded(tmp_path, text=yaml.safe_dump(LEAST) + f"init:\n  scheme: rrr\n  damping: {text}\n")
    assert config.init.damping == 0.01


@pytest.mark.parametrize("text", ["'1e-2'", "1e", "e-2", "1e-2a", "1-e2", "09", "a1e2"])
def test_what_is_no_number_stays_a_string(text: str, tmp_path: Path) -> None:
    assert loaded(tmp_path, "--model.revision", text).model.revision == text.strip("'")


def test_a_tree_that_is_written_is_read_as_it_was(tmp_path: Path) -> None:
    tree = LEAST | {"lora": {"target_modules": ["1e2", "1e-2", "x"], "lora_alpha": 1e-7}}
    assert loaded(tmp_path, text=dump(tree)) == parse_config(InitConfig, tree)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["lora.r"], r"command line: 'lora\.r': is not understood; overrides are written --section\.key value"),
        (["--"], r"command line: '--': is not understood"),
        (["--lora.r"], r"--lora\.r: None: has no value; write --section\.key value"),
        (["--output.dir.name", "x"], r"--output\.dir\.name: 'x': dir is not a section"),
        (["--lora.r", "x"], r"lora\.r: 'x': input should be a valid integer"),
    ],
)
def test_a_wrong_override_is_named(overrides: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        loaded(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: b: c", "is not YAML: "),
        ("a: 2026-13-01", "is not YAML: month must be in 1..12"),
        ("a: " + "9" * 5000, "is not YAML: Exceeds the limit"),
        ("a: " + "[" * 3000, "is not YAML: RecursionError"),
        ("lora:\n  r: 4\n  r: 8\n", "is not YAML: r stands there twice, again in line 3"),
        ("? [a]\n: 1", "is not YAML: "),
        ("- model", "must hold sections such as 'model:' and 'lora:'"),
        ("", "must hold sections such as 'model:' and 'lora:'"),
    ],
)
def test_a_file_that_holds_no_sections_is_named(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^--config: '{tmp_path}/init\.yaml': {says}"):
        loaded(tmp_path, text=text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--config: '.*': cannot be read: No such file or directory; write the path"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"^--config: '.*': is not YAML: "):
        load_config(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('model: {name_or_path: "a\\0b"}\noutput: {dir: out}', r"^model: 'a\\x00b': holds a character that is none"),
        ('output: {dir: "\\ud800"}', r"^output: '\\ud800': holds a character that is none"),
        ("deepspeed: &a [*a]", r"^deepspeed: '<list>': holds more than 100000 values or 100 levels"),
        ("a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
        ), "holds more than 100000 values"),
        ("deepspeed: {a: 2026-01-01}", "must be what JSON can hold"),
        ("model: 2026-01-01", r"^model: datetime\.date\(2026, 1, 1\): is a section; write its keys, such as"),
    ],
)  # fmt: skip
def test_values_that_no_file_or_name_can_hold_are_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        loaded(tmp_path, text=text)


def test_a_wrong_override_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--lora\.r: '\[\[.*RecursionError"):
        loaded(tmp_path, "--lora.r", "[" * 3000)
    with pytest.raises(UserError, match=r"^--lora\.rank_pattern: .*q stands there twice"):
        loaded(tmp_path, "--lora.rank_pattern", "{q: 1, q: 2}")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lora.lora_alpha", 10**400, "input should be less than or equal to 1000000000"),
        ("lora.lora_alpha", float("inf"), "input should be"),
        ("lora.target_modules", "(", r"is no regular expression \(missing \), unterminated subpattern"),
        ("lora.target_modules", "a{99999999999}", "is no regular expression"),
        ("lora.exclude_modules", "*", "is no regular expression"),
        ("lora.layers_pattern", ["h", "["], "is no regular expression"),
        ("calibration.seed", 10**400, "input should be less than or equal to 9223372036854775807"),
        ("output.dir", "~nouser/out", "starts with the home of a user who is not known here"),
    ],
)
def test_what_is_beyond_a_library_is_said(key: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(key)}: .*{says}"):
        parsed(key, value)


def test_lora_keys_are_pefts() -> None:
    from peft import LoraConfig

    section: type[BaseModel] = InitConfig.model_fields["lora"].annotation  # type: ignore[assignment]
    assert set(section.model_fields) <= {field.name for field in dataclasses.fields(LoraConfig)}


def test_the_package_gives_its_names_when_asked_and_torch_not_before() -> None:
    assert all(getattr(loraga_dist, name).__name__ == name for name in loraga_dist.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        loraga_dist.nothing  # noqa: B018
    # the command line tells libraries how to behave before they are imported
    program = "import loraga_dist.cli, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("pattern", "value", "said"),
    [
        ("rank_pattern", 0, "input should be greater than or equal to 1"),
        ("rank_pattern", 2**31, "input should be less than or equal to 1048576"),
        ("alpha_pattern", 0, "input should be greater than 0"),
        ("alpha_pattern", 10**10, "input should be less than or equal to 1000000000"),
    ],
)
def test_ranks_and_alphas_of_patterns_have_the_bounds_of_all(
    tmp_path: Path, pattern: str, value: float, said: str
) -> None:
    with pytest.raises(UserError, match=rf"^lora\.{pattern}: .*: {said}"):
        loaded(tmp_path, f"--lora.{pattern}", f"{{q: {value!r}}}")


def test_what_yaml_merges_is_no_key_twice(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(
        "model: {name_or_path: m}\noutput: {dir: o}\ninit: &A {seed: 1}\n"
        "calibration: &B {<<: *A, seed: 2}\ngradient: {}\n"
    )
    assert load_config(path).calibration.seed == 2


def test_a_recipe_that_is_not_filled_in_names_all_that_is_left(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name_or_path: FILL_IN}\ncalibration: {data_files: FILL_IN}\noutput: {dir: out}\n")
    config = load_config(path)
    with pytest.raises(
        UserError, match="^model.name_or_path: 'FILL_IN': is to be filled in, and calibration.data_files"
    ):
        require_filled_in(config)
    require_filled_in(config, "output")
