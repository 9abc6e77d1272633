"""What `all-linear` gives no adapter, and how to add it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from loraga_dist.model.names import pattern_of
from loraga_dist.model.stacks import NOT_IN_INTERFACE, TO_ADD_EXPERTS, ends_of, find_stacks, untappable
from loraga_dist.model.towers import tower_of


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One kind of matrices that `all-linear` gives no adapter."""

    kind: str
    names: tuple[str, ...]
    """As what adds them takes them."""
    how: str
    """To add them, or why they cannot be added."""

    @property
    def text(self) -> str:
        """One line: which, and what to write."""
        return f"all-linear leaves {self.kind} without adapters: {self.how}"


def experts_left_out(model: nn.Module) -> list[LeftOut]:
    """All experts of a model, which are parameters."""
    found = []
    if ends := ends_of(find_stacks(model)):
        how = f"{TO_ADD_EXPERTS.format(', '.join(ends))} adds them"
        found.append(LeftOut(kind="experts", names=ends, how=how))
    if ends := ends_of(untappable(model)):
        how = f"they cannot be added, {NOT_IN_INTERFACE}"
        found.append(LeftOut(kind=f"experts of {', '.join(ends)}", names=ends, how=how))
    return found


def routers_left_out(names: Sequence[str]) -> list[LeftOut]:
    """names: of routers' modules."""
    ends = ends_of(f"{name}.weight" for name in names)
    how = f"{TO_ADD_EXPERTS.format(', '.join(ends))} adds them"
    return [LeftOut(kind="routers", names=ends, how=how)] if ends else []


def rows_left_out(names: Sequence[str]) -> list[LeftOut]:
    """names: of modules whose matrix is a single row or column."""
    ends = ends_of(names)
    how = "an adapter would be larger than they are"
    return [LeftOut(kind=f"single rows ({', '.join(ends)})", names=ends, how=how)] if ends else []


def towers_left_out(names: Sequence[str], chosen: Collection[str], text: str) -> list[LeftOut]:
    """Modules of towers. names: of their matrices. chosen: of the matrices of the language model `text`."""
    if not names:
        return []
    towers = tuple(dict.fromkeys(str(tower_of(name, text)) for name in names))
    how = (
        "text gives them no gradient; where data has images, or the scheme takes no gradient, "
        f"lora.target_modules: {pattern_of([*chosen, *names], any_layer=True)} adds them"
    )
    return [LeftOut(kind=" and ".join(towers), names=towers, how=how)]
