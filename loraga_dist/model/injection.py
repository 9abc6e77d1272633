"""PEFT's layers in a copy of the model that holds no memory, and what PEFT would refuse, or lose, later on."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from torch import nn

from loraga_dist.config import LoraSection
from loraga_dist.errors import UserError, blame
from loraga_dist.model.names import is_named, must_be_excluded
from loraga_dist.model.targets import lost_by_loading, peft_lora_config

SELECTION_SECONDS = 120
"""PEFT takes a few for the largest models; some regular expressions never end."""
_INNER = r"(\.base_layer)+$"
"""Of a layer in another one's: parameters of the same module."""


def injected_by_peft(meta_model: nn.Module, lora: LoraSection, target_modules: str | list[str]) -> nn.Module:
    """The model with PEFT's layers in it. target_modules: what the section's stand for."""
    from peft import get_peft_model

    config: Any = getattr(meta_model, "config", None)
    if config is not None:
        # by its name PEFT would take names of modules for those of experts that an earlier transformers had
        meta_model.config = copy.copy(config)
        meta_model.config.model_type = ""
    instead = "write names of nn.Linear modules, or all-linear"
    with (
        blame("lora.target_modules", lora.target_modules, "PEFT refuses it", instead, limit_seconds=SELECTION_SECONDS),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        peft_config = peft_lora_config(lora.model_copy(update={"target_modules": target_modules}))
        _require_adapted_once(meta_model, lora, peft_config)
        try:
            peft_model: Any = get_peft_model(meta_model, peft_config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
        except TypeError as error:
            if both := _adapted_and_saved(meta_model, lora):
                raise must_be_excluded(
                    _as_asked(both, meta_model), "trained whole by PEFT, for the ends of their names", lora
                ) from error
            raise
    model = peft_model.base_model.model
    if refused := [name for name in _adapted(model) if _is_refused(name.rpartition(".")[2], config, peft_model)]:
        raise must_be_excluded(_as_asked(refused, model), "refused by PEFT in such a model", lora)
    if config is not None:
        meta_model.config = config
        if lost := lost_by_loading(peft_model):
            if len(lost) == len(_adapted(model)):
                problem = "PEFT finds no target of this model again when it loads an adapter; write another model"
                raise UserError("lora.target_modules", lora.target_modules, problem)
            raise must_be_excluded(_as_asked(lost, model), "not found again by PEFT when it loads their adapter", lora)
    return model


def _require_adapted_once(model: nn.Module, lora: LoraSection, peft_config: Any) -> None:
    """Raise UserError for a parameter that the user names of a module that is a target itself."""
    from peft.tuners.tuners_utils import check_target_module_exists

    for name, _ in model.named_parameters(remove_duplicate=False):
        if is_named(name, lora) and check_target_module_exists(peft_config, name.rpartition(".")[0]):
            problem = "is of a module that lora.target_modules takes, too; leave it out of one of the two"
            raise UserError("lora.target_parameters", name, problem)


def _adapted(model: nn.Module) -> list[str]:
    """Modules with one of PEFT's layers in their place."""
    from peft.tuners.lora.layer import LoraLayer

    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _as_asked(names: Iterable[str], model: nn.Module) -> list[str]:
    """By what name each of these layers is asked for: its module's, or its parameter's."""
    from peft.tuners.lora.layer import ParamWrapper

    layers = {name: model.get_submodule(name) for name in names}
    return [
        f"{re.sub(_INNER, '', name)}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name
        for name, layer in layers.items()
    ]


def _adapted_and_saved(model: nn.Module, lora: LoraSection) -> list[str]:
    """Those that are to be trained whole as well; of classifiers, heads are."""
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    ends = (*(lora.modules_to_save or ()), *(SEQ_CLS_HEAD_NAMES if lora.task_type == "SEQ_CLS" else ()))
    return [name for name in _adapted(model) if re.sub(_INNER, "", name).endswith(ends)]


def _is_refused(end: str, config: Any, peft_model: Any) -> bool:
    """Whether PEFT refuses to adapt a module of this name, knowing what model it is in."""
    try:
        peft_model.base_model._check_target_module_compatiblity(
            peft_model.active_peft_config, SimpleNamespace(config=config), end
        )
    except ValueError:
        return True
    return False


def names_taken_for_experts(model: nn.Module) -> set[str]:
    """Modules that PEFT, given their names, takes for experts of an earlier transformers."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(target_modules=sorted(names))
    with warnings.catch_warnings(action="ignore"):
        convert_peft_config_for_transformers(config, model, None)
    return names - set(config.target_modules or ())
