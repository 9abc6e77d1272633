"""The templates of page, README and model card, filled in."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from loraga_dist.errors import printable

DASH = "–"
"""Where there is no value."""

_MARKDOWN = re.compile(r"[\\`*\[\]<&|]")
"""What begins markup in running text, or ends a table's cell."""


def render(template: str, **values: Any) -> str:
    """The text of a template in `templates/`. What a terminal would obey is shown in all that is filled in, unless it
    is marked `safe`. HTML is escaped by itself; Markdown says where, by these filters:

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
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": _number,
        "prose": _prose,
        "code": _code,
        "python": python_literal,
        "shell": _shell,
    }
    return environment


def _number(value: float | None, spec: str) -> str:
    return DASH if value is None else format(value, spec)


def _shown(value: object) -> object:
    # what is `safe` is Markup
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _prose(value: object) -> str:
    return _MARKDOWN.sub(r"\\\g<0>", str(value))


def _code(value: object) -> str:
    text = str(value)
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def python_literal(value: str) -> str:
    """A string in Python's own words, printable and in one line."""
    letters = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in letters)


def _shell(value: object) -> str:
    text = str(value)
    if text.isprintable():
        return shlex.quote(text)
    # byte for byte, as bash and zsh read it
    return "$'" + re.sub(rb"[^\w/.:+-]", lambda found: b"\\x%02x" % found[0][0], os.fsencode(text)).decode() + "'"
