"""Wrong input out of right input: trees, texts and bytes, changed by dice that a seed throws."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import yaml

DEEP, DIGITS = "@deep@", "@digits@"
"""Stand for what Python's own writers refuse: so many brackets, so many digits."""

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, 1e-320, 1e308, -1e308,
    float("inf"), float("-inf"), float("nan"), "", " ", "0", "null", "x", "x" * 250, "x" * 5000, "\x1b[31mred\x1b[0m",
    "two\nlines", "\u202eright to left", "a\0b", "\ud800", "ä", "~nouser/x", "/dev/null", "/", ".", "..", "../../x",
    "(", "[", "*", "(a|aa)+$", "{{ 1 / 0 }}", "{% for a in range(9) %}", "2024-01-01", "1e5", "auto", "all-linear",
    [], {}, [[]], [None], [1], ["x"], {"a": 1}, {"": ""}, DEEP, DIGITS,
]  # fmt: skip


class Dice(random.Random):
    """What a case throws. changes: else its input stays right."""

    def __init__(self, seed: str, *, changes: bool = True) -> None:
        super().__init__(seed)
        self.changes = changes

    def happens(self, chance: float) -> bool:
        """Whether a change is made that has this chance."""
        return self.random() < chance and self.changes


def odd(dice: Dice) -> Any:
    return dice.choice(ODD)


def change_tree(tree: Any, dice: Dice) -> Any:
    """The same JSON or YAML tree with a value or a key changed, at a random place."""
    if not dice.changes:
        return tree
    places = list(_places(tree))
    if not places or dice.happens(0.02):
        return odd(dice)
    holder, key = dice.choice(places)
    how = dice.randrange(10)
    if how <= 2:
        holder[key] = odd(dice)
    elif how <= 4:
        del holder[key]
    elif how == 5 and isinstance(holder, dict):
        holder[str(odd(dice))] = holder.pop(key)
    elif how <= 8:
        holder[key] = neighbour(holder[key], dice)
    elif isinstance(holder, dict):
        holder[dice.choice(list(holder)) + dice.choice("sx_")] = odd(dice)
    else:
        holder.append(odd(dice))
    return tree


def _places(tree: Any) -> Any:
    """Every holder with every key of it; of long lists the first few."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree[:8]) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from _places(value)


def neighbour(value: Any, dice: Dice) -> Any:
    """Something like it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        as_float = float(value) if abs(value) < 1e300 else value  # 10**400 has none
        return dice.choice([-value, value + 1, value - 1, value * 2, value * 10**6, as_float, str(value)])
    if isinstance(value, str):
        at = dice.randrange(len(value) + 1)
        return value[:at] + dice.choice(["", "\x07", "x", "/", "(", " "]) + value[at + dice.randrange(2) :]
    if isinstance(value, list):
        return dice.choice([value * 2, value[::-1], value[:1], {str(i): part for i, part in enumerate(value)}])
    return 1 if value is None else [value]


def as_json(tree: Any, dice: Dice) -> bytes:
    text = json.dumps(tree, ensure_ascii=dice.random() < 0.8)
    return _with_monsters(text, dice, quote='"')


def as_yaml(tree: Any, dice: Dice) -> bytes:
    return _with_monsters(yaml.safe_dump(tree), dice, quote="'")


def _with_monsters(text: str, dice: Dice, quote: str) -> bytes:
    depth = dice.choice([40, 600, 3000, 50_000])
    brackets = dice.choice(["[" * depth + "]" * depth, "[" * depth, '{"a":' * depth + "1" + "}" * depth])
    for name, monster in ((DEEP, brackets), (DIGITS, "9" * dice.choice([30, 5000]))):
        text = text.replace(f"{quote}{name}{quote}", monster)
    return text.encode(errors="surrogatepass")


def change_bytes(content: bytes, dice: Dice) -> bytes:
    """A few bits flipped, or a piece cut out, doubled, or put in."""
    if not dice.changes:
        return content
    at = dice.randrange(len(content) + 1)
    piece = content[at : at + dice.randrange(1, 40)]
    noise = dice.choice([b"\0", b"\xff\xfe", b"\x1b[2J", b"\r", b"{", b"[" * 99, b'"', dice.randbytes(9)])
    how = dice.randrange(6)
    if how == 0 and content:
        flipped = bytearray(content)
        for _ in range(dice.randrange(1, 4)):
            flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
        return bytes(flipped)
    changes: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[:at] + content[at + len(piece) :],
        lambda: content[:at] + piece + content[at:],
        lambda: content[:at] + noise + content[at:],
        lambda: dice.choice([b"", noise, content * 2]),
    ]
    return changes[how - 1]()


def change_json(content: bytes, dice: Dice) -> bytes:
    """A file of JSON, changed as a tree or as bytes."""
    if not dice.changes:
        return content
    if dice.happens(0.2):
        return change_bytes(content, dice)
    tree = json.loads(content)
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        tree = change_tree(tree, dice)
    return as_json(tree, dice)
