"""Names that attack a terminal, Markdown, YAML and HTML, put wherever an output shows a name."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import report_tree, target_tree
from markdown_it import MarkdownIt

from loraga_dist.artifacts.report import Report
from loraga_dist.publish.card import model_card
from loraga_dist.publish.page import write_report_page
from loraga_dist.publish.rendering import render
from loraga_dist.publish.text import print_summary, readme

NASTY = [
    "\x1b[2J\x1b]0;owned\x07",
    "a\rb\nc\n\n```\n# heading\n---\nx: 1",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "| a | b |\\| c",
    "`x` ``y`` ```",
    "\u202egnp.exe\u2066 \x9b31m \u2028 \x00 \x7f",
    "[link](javascript:alert(1)) ![image](x) **bold** &lt; $\\frac{$ {{ 7 * 7 }} {% raw %}",
    "'\"; $(reboot) \\",
]
HIDDEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What no file and no terminal should see; lines end."""
SCHEMES = ["lora_ga", "lora_one", "pissa"]


def report(nasty: str, scheme: str = "lora_ga") -> Report:
    def name(kind: str) -> str:
        return f"{kind}{nasty}{kind}"

    names = [f"layers.{layer}.{name('module')}" for layer in (0, 1)]
    tree = report_tree(
        config={
            "model": {"name_or_path": name("model"), "revision": name("revision")},
            "init": {"scheme": scheme},
            "calibration": {"data_files": [name("data")], "dataset_name": name("dataset")},
            "output": {"dir": f"/runs/{name('out')}", "residual_base": "none", "push_to_hub": name("repo")},
        },
        targets={},
        warnings=[name("warning")],
        versions={name("package"): name("version")},
        engine=name("engine"),
        stopped_by=name("stop"),
        identity_check={"dtype": name("dtype")},
    )
    tree["targets"] = {target: target_tree(weight_key=name("key")) for target in names}
    return Report.parse(json.dumps(tree))


def the_readme(found: Report) -> str:
    return readme(found)


def the_card(found: Report) -> str:
    return model_card(found, str(found.config.output.push_to_hub))


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs] + [
            value or "" for name, value in attrs if name in ("href", "src")
        ]


def html_of(markdown: str) -> Tags:
    """As GitHub and the hub read it."""
    return Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("write", [the_readme, the_card])
@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_markdown_keeps_its_structure(nasty: str, write: Callable[[Report], str], scheme: str) -> None:
    found, harmless = write(report(nasty, scheme)), write(report("/", scheme))
    assert not HIDDEN.search(found)
    if write is the_card:
        (_, front, found), (_, plain, harmless) = (text.split("---\n", 2) for text in (found, harmless))
        assert yaml.safe_load(front) == yaml.safe_load(plain) | {"base_model": f"model{nasty}model"}
    assert html_of(found).names == html_of(harmless).names, "the same elements in the same order"


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_what_is_copied_from_the_readme_is_the_name(nasty: str) -> None:
    found = report(nasty)
    text = readme(found)
    (base,) = [line for line in text.splitlines() if line.startswith("base = ")]
    assert ast.parse(base).body[0].value.args[0].value == f"{found.config.output.dir}/residual_base"  # type: ignore
    blocks = re.findall(r"^```yaml\n(.*?)\n```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    assert all(str(yaml.safe_load(block)).count("residual_base") == 1 for block in blocks)
    if "\x00" not in nasty:  # no command line can have it
        (line,) = [line for line in text.splitlines() if line.startswith("loraga-dist verify")]
        said = subprocess.run(
            ["bash", "-c", line.replace("loraga-dist verify", "printf %s")], capture_output=True, check=True, timeout=10
        )
        assert said.stdout.decode() == found.config.output.dir


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_the_page_keeps_its_structure(nasty: str, scheme: str, tmp_path: Path) -> None:
    pages = []
    for name, part in (("nasty", nasty), ("harmless", "x")):
        (tmp_path / name).mkdir()
        write_report_page(tmp_path / name, report(part, scheme))
        pages.append((tmp_path / name / "report.html").read_text(encoding="utf-8"))
    assert not HIDDEN.search(pages[0])
    found, harmless = map(Tags, pages)
    assert found.names == harmless.names and found.attributes == harmless.attributes


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_a_terminal_obeys_no_name(nasty: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(nasty)
    print_summary(found, str(found.config.output.dir), "verified")
    printed = capsys.readouterr().out
    assert not HIDDEN.search(printed)
    assert "warning: warning" in printed and "files: " in printed


def test_a_template_in_a_name_is_text() -> None:
    values: dict[str, Any] = {"report": report("{{ 7 * 7 }}"), "directory": "{{ 7 * 7 }}", "verified": ""}
    assert "{{ 7 * 7 }}" in render("summary.txt.j2", **values) and "49" not in render("summary.txt.j2", **values)
