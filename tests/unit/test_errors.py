"""What is said of a mistake must not steer the terminal that shows it."""

from __future__ import annotations

import unicodedata

import pytest

from loraga_dist.errors import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("über ∂W, 日本: 'a b'", "über ∂W, 日本: 'a b'"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("two\nlines\tand\x9bmore\x7f", r"two\x0alines\x09and\x9bmore\x7f"),
        ("evil\u202egnp.exe\u2069", r"evil\u202egnp.exe\u2069"),
        ("a\u2028b", r"a\u2028b"),
        ("name\udcff", r"name\udcff"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_control_character_is_left() -> None:
    shown = printable("".join(map(chr, range(0x110000))))
    assert not [char for char in shown if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")]
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not [char for char in shown if unicodedata.bidirectional(char) in bidi]
