"""JSON is read to a bound: size, nesting, and characters that can be written again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from loraga_dist.files import disk
from loraga_dist.files.disk import BrokenFileError, parse_json, read_json


def test_what_is_json_comes_back(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, {"b": "\U0001f600 \\ud"}], "c": {}, "d": []}
    for text in (json.dumps(content), json.dumps(content, ensure_ascii=False)):
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        assert read_json(tmp_path / "x.json") == content
    deep = "[" * 99 + "]" * 99
    assert parse_json(deep.encode(), "x") == json.loads(deep)
    assert parse_json(b'{"a": 1, "a": 2}', "x") == {"a": 2}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        ("\xe9".encode("latin-1"), "is not JSON"),
        (b"1" * 5000, "is not JSON"),
        (b'["\\ud83d"]', "half a character"),
        (b"[" * 200 + b"]" * 200, "nested more than 100 deep"),
        (b"[" * 1_000_000, "nested more than 100 deep"),
        (b'{"a":' * 100_000, "nested more than 100 deep"),
    ],
    ids=lambda part: repr(part)[:20],
)
def test_what_is_not_json_is_said_in_a_line(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BrokenFileError, match=f"^x.json .*{problem}") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_a_key_named_twice_is_refused_where_readers_would_differ() -> None:
    with pytest.raises(BrokenFileError, match="names 'a' twice"):
        parse_json(b'{"a": 1, "b": 1, "a": 2}', "x", unique_keys=True)


def test_a_file_that_is_too_large_or_none_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MAX_JSON_BYTES", 10)
    (tmp_path / "x.json").write_text("[1, 2, 3, 4, 5]")
    with pytest.raises(BrokenFileError, match="more than 10 bytes"):
        read_json(tmp_path / "x.json")
    os.mkfifo(tmp_path / "pipe")
    for path, problem in (("pipe", "is no file"), ("gone", "is missing"), ("x" * 300, "cannot be read")):
        with pytest.raises(BrokenFileError, match=problem):
            read_json(tmp_path / path)
