"""The templates of page, README and model card, filled in."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2

DASH = "–"
"""Where there is no value."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def render(template: str, **values: Any) -> str:
    """The text of a template in `templates/`. HTML is escaped by itself; Markdown says where, by these filters:

    `prose` for a value in running text, a heading or a table, `code` for one in a code span, `python` for a string
    literal of Python, `shell` for one word of a command line. `number` formats one that may be missing.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "prose": _prose, "code": _code, "python": _python, "shell": _shell}
    return environment


def _number(value: float | None, spec: str) -> str:
    return DASH if value is None else format(value, spec)


def _on_one_line(value: object) -> str:
    return _CONTROL.sub(" ", str(value))


def _prose(value: object) -> str:
    # a pipe would end a table's cell, and < begin a tag
    return re.sub(r"([|<])", r"\\\1", _on_one_line(value))


def _code(value: object) -> str:
    text = _on_one_line(value)
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _python(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shell(value: object) -> str:
    return shlex.quote(_on_one_line(value))
