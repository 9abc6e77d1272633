"""How much of a model's weights get an adapter, and which do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from loraga_dist.model.blocks import numel_of, shape_of
from loraga_dist.model.stacks import find_stacks
from loraga_dist.model.targets import Target, kind_of
from loraga_dist.model.towers import text_model, tower_of


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What of a model's parameters its targets are."""

    num_parameters: int
    num_covered: int
    num_trained_whole: int
    """Copied into the adapter by `modules_to_save`."""
    left_out: dict[str, int]
    """Parameters of matrices without adapter by kind, the most first; biases, norms and the like are not among them."""

    @property
    def text(self) -> str:
        """One line."""
        share = 100 * self.num_covered / self.num_parameters
        parts = [f"{_count(self.num_covered)} of {_count(self.num_parameters)} parameters ({share:.1f} %)"]
        if self.num_trained_whole:
            parts.append(f"trained whole: {_count(self.num_trained_whole)}")
        if self.left_out:
            kinds = ", ".join(f"{kind} {_count(numel)}" for kind, numel in self.left_out.items())
            parts.append(f"without adapter: {kinds}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Weights:
    """The parameters of a model, as they are before PEFT puts its layers around them."""

    numels: dict[str, int]
    """By name; tied ones by their first."""
    kinds: dict[str, str]
    """Of those that are matrices or hold some."""

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """Of shapes alone: the model may be on the meta device, or its parameters in ZeRO-3's shards."""
        parameters = dict(model.named_parameters())
        stacks, heads, text = find_stacks(model), _output_heads(model), text_model(model)
        kinds = {}
        for module_name, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                name = f"{module_name}.{own}" if module_name else own
                if name not in parameters or len(shape_of(parameter)) < 2:
                    continue
                if module_name in heads:
                    kinds[name] = "output head"
                elif tower := tower_of(name, text):
                    kinds[name] = tower.rpartition(".")[2]
                elif name in stacks:
                    kinds[name] = "experts"
                elif isinstance(module, nn.Embedding):
                    kinds[name] = "embeddings"
                else:
                    kinds[name] = kind_of(module_name) if own == "weight" else own
        return cls({name: numel_of(parameter) for name, parameter in parameters.items()}, kinds)

    def covered_by(self, targets: Iterable[Target], saved: Collection[str]) -> Coverage:
        """What these targets are of them; saved: names of parameters that train whole."""
        covered = Counter[str]()
        for target in targets:
            covered[target.parameter_name] += target.M * target.N
        saved = self.numels.keys() & saved
        left_out = Counter[str]()
        for name, kind in self.kinds.items():
            if name not in saved:
                left_out[kind] += self.numels[name] - covered[name]
        return Coverage(
            num_parameters=sum(self.numels.values()),
            num_covered=covered.total(),
            num_trained_whole=sum(self.numels[name] for name in saved),
            left_out={kind: numel for kind, numel in left_out.most_common() if numel},
        )


def _output_heads(model: nn.Module) -> set[str]:
    """Names of the module that makes logits."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return {name for name, module in model.named_modules() if module is head}


def _count(numel: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if numel >= size:
            return f"{numel / size:.3g} {unit}"
    return str(numel)
