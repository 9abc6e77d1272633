"""Types of values that keys of the configuration have: what pydantic checks, in words of ours."""

from __future__ import annotations

import dataclasses
import json
import os.path
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclasses.dataclass(frozen=True)
class NameIn:
    """Annotates a string: a name in the table, which is read when a value is checked, or one of a few words."""

    table: Mapping[str, Any]
    words: tuple[str, ...] = ()

    @property
    def choices(self) -> list[str]:
        return [*self.words, *self.table]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if value not in self.choices:
            *others, last = map(repr, self.choices)
            raise ValueError(f"Input should be {', '.join(others)} or {last}")
        return value


def _expression(pattern: str) -> str:
    try:
        re.compile(rf"(.*\.)?({pattern})$")  # as PEFT puts it into its own
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression ({error}); write a target's name or the end of one") from error
    return pattern


def _expand_user(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("starts with the home of a user who is not known here; write the whole path, or ./~")
    return expanded


def _json_object(value: Any) -> Any:
    if isinstance(value, dict):
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"must be what JSON can hold ({error})") from error
    return value


NamePattern = Annotated[str, AfterValidator(_expression)]
PathOrId = Annotated[str, AfterValidator(_expand_user)]
LARGEST_COUNT = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Rank = Annotated[int, Field(ge=1, le=2**20)]
"""Above every side of a matrix; how large it may be is said when the matrices are known."""
Alpha = Annotated[int | float, Field(gt=0, le=1e9)]
"""What float32 still multiplies with weights."""
Amount = Annotated[float, Field(gt=0, le=1e9)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_json_object)]
"""What JSON can hold."""
