"""The page of a real run and of reports of other shapes: what it says, that it stands alone, that it fits a phone."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import config_tree, save_data, save_model
from outputs import read_report

from loraga_dist.artifacts.report import Report
from loraga_dist.cli import main
from loraga_dist.errors import RunError, printable
from loraga_dist.files.checksums import check_checksums
from loraga_dist.publish.page import write_report_page
from loraga_dist.publish.plots import _mean_spectrum, _plots
from loraga_dist.ranks.world import World

pytestmark = pytest.mark.plots

PLOTS = {"singular_values", "captured_energy", "split_half_cosine", "offset_ratio", "memory", "seconds"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A window has a least width, a frame has none.
FRAME = """<script>onmessage = event => { document.title = event.data }</script>
<iframe src="measured.html" style="border: 0; height: 900px; width: %dpx"></iframe>"""
MEASURE = "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth].join(' '), '*')</script>"


class Page(HTMLParser):
    """The texts of the table cells, row by row, and of everything; the tags and the addresses they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data


def read(directory: Path) -> tuple[str, Page]:
    text = (directory / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run on a small Llama."""
    root = tmp_path_factory.mktemp("run")
    tree = config_tree(save_model(root / "model"), save_data(root / "data.jsonl"), root / "out")
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    assert main(["init", "--config", str(root / "config.yaml")]) == 0
    return root / "out"


@pytest.fixture
def report(run: Path) -> dict[str, Any]:
    return read_report(run)


def write_page(directory: Path, report: dict[str, Any]) -> None:
    write_report_page(directory, Report.parse(json.dumps(report)))


def with_targets(report: dict[str, Any], names: list[str], **changes: Any) -> dict[str, Any]:
    """The report with its first target under each of the names."""
    first = next(iter(report["targets"].values()))
    return report | {"targets": {name: copy.deepcopy(first) | changes for name in names}}


def test_a_run_writes_the_page_and_its_checksums_cover_it(run: Path) -> None:
    listed = {line.split("  ")[1] for line in (run / "SHA256SUMS").read_text().splitlines()}
    assert {"report.html"} | {f"plots/{name}.png" for name in PLOTS} <= listed
    assert check_checksums(run, World.alone()) == []


def test_the_page_says_what_the_report_says(run: Path, report: dict[str, Any]) -> None:
    _, page = read(run)
    facts = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert facts["base"] == report["config"]["model"]["name_or_path"]
    assert facts["world size"] == "1, CPU"
    assert facts["supervised tokens"].replace(",", "") == str(report["num_supervised_tokens"])
    assert float(facts["mean loss"]) == pytest.approx(report["mean_loss"], abs=1e-4)
    assert f"{report['identity_check']['max_abs_logit_diff']:.2e}" in facts["identity check"]

    head, *rows = [row for row in page.rows if len(row) > 2]
    worst_first = sorted(report["targets"], key=lambda name: report["targets"][name]["captured_energy"])
    assert [row[0] for row in rows] == worst_first
    config = report["config"]
    assert facts["r, alpha"] == f"{config['lora']['r']}, {config['lora']['lora_alpha']}" and facts["gamma"] == "16"
    assert config["calibration"]["data_files"] in facts["data"]
    assert facts["targets"] == f"{len(rows)} ({len(rows)} exact)"
    assert f"torch {report['versions']['torch']}" in facts["versions"]
    for row in rows:
        shown, target = dict(zip(head, row, strict=True)), report["targets"][row[0]]
        assert shown["M × N"] == " × ".join(map(str, target["shape"]))
        assert float(shown["largest singular value"]) == pytest.approx(target["singular_values"][0], rel=1e-2)
        for field in ("captured_energy", "split_half_cosine", "offset_ratio"):
            column = field.replace("split_half", "split-half").replace("_", " ")
            assert float(shown[column]) == pytest.approx(target[field], abs=1e-3), field
        assert shown["window capture"] == "–"


def test_plots_are_in_the_page_and_beside_it(run: Path, report: dict[str, Any]) -> None:
    text, page = read(run)
    assert text.count("<svg") == len(PLOTS) == len(list((run / "plots").iterdir()))
    for name in PLOTS:
        content = (run / "plots" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", content[16:24])
        assert width == 750 and 200 < height < 2000
    numbers = [f"{target['captured_energy']:.2f}" for target in report["targets"].values()]
    assert all(number in page.texts for number in numbers), "the heatmap of a few layers has its numbers in it"


def test_shades_show_differences_of_shares_near_one(report: dict[str, Any]) -> None:
    tree = with_targets(report, [f"layers.{layer}.up" for layer in range(4)])
    for target, energy in zip(tree["targets"].values(), (0.97, 0.99, 0.999, 1.0), strict=True):
        target["captured_energy"] = energy
    (figure,) = [it for name, it, _ in _plots(Report.parse(json.dumps(tree))) if name == "captured_energy"]
    (image,) = figure.axes[0].images
    shades = image.cmap(image.norm(image.get_array()))[0, :, :3] @ (0.3, 0.59, 0.11)
    assert all(right - left > 0.1 for left, right in itertools.pairwise(shades)), "darker is less"


def test_the_page_needs_nothing_from_elsewhere(run: Path) -> None:
    text, page = read(run)
    assert not {"link", "iframe"} & page.tags and text.count("<script") == text.count("<script>\n") == 1
    outside = [address for address in page.addresses if not re.match(r"#|data:", address)]
    assert sorted(outside) == ["README.md", "loraga_report.json"]
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids)), "an id of one plot would be found in another"
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)


def test_text_is_escaped(report: dict[str, Any], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&"
    report = with_targets(report, [f"model.layers.{layer}.{evil}" for layer in (0, 1)])
    report["warnings"] = [evil]
    report["config"]["model"]["name_or_path"] = evil
    report["versions"] = {evil: evil}
    report["engine"] = report["identity_check"]["dtype"] = evil
    write_page(tmp_path, report)
    text, page = read(tmp_path)
    assert text.count("<script") == 1, "the page's own"
    assert evil in page.texts


def test_plots_are_drawn_of_any_name(report: dict[str, Any], tmp_path: Path) -> None:
    nasty = "\x1b[2J\n<script>\u202e$\\frac{$ <a href=x>"
    write_page(tmp_path, with_targets(report, [f"layers.{layer}.{kind}{nasty}" for layer in (0, 1) for kind in "ab"]))
    text, page = read(tmp_path)
    assert text.count("<svg") == len(PLOTS)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert text.count("<script") == 1 and "x" not in page.addresses
    assert sum(printable(nasty) in words for words in page.texts) > 4, "in the table and in plots"


def test_values_that_are_missing_are_dashes(report: dict[str, Any], tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    report = with_targets(report, names, split_half_cosine=None, offset_ratio=None)
    report["targets"][names[0]] |= {"offset_ratio": 1.5, "singular_values": [0.5, 0.1, 0.0, 0.0]}
    report["mean_loss"] = None
    write_page(tmp_path, report)
    _, page = read(tmp_path)
    assert ["mean loss", "–"] in page.rows
    assert [row[6:9] for row in page.rows[-2:]] == [["–", "–", "1.500"], ["–", "–", "–"]]
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == PLOTS - {"split_half_cosine"}


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["lm_head"], {"lm_head"}),
        (
            [
                "encoder.block.0.layer.0.SelfAttention.q",
                "decoder.block.0.layer.0.SelfAttention.q",
                "decoder.block.1.wo",
            ],
            {"encoder.q", "decoder.q", "wo"},
        ),
        ([f"h.{layer}.experts.{expert}.w1" for layer in (0, 1) for expert in range(40)] + ["h.0.gate"], {"w1", "gate"}),
    ],
    ids=["no-layer", "same-last-part", "experts"],
)
def test_kinds_have_the_shortest_names_that_tell_them_apart(
    report: dict[str, Any], tmp_path: Path, names: list[str], kinds: set[str]
) -> None:
    write_page(tmp_path, with_targets(report, names))
    _, page = read(tmp_path)
    assert kinds <= set(page.texts)
    assert sorted(row[0] for row in page.rows[-len(names) :]) == sorted(names)


def test_experts_are_a_row_for_each_stack_and_a_line_for_each_layer(report: dict[str, Any], tmp_path: Path) -> None:
    parameters = [f"layers.{layer}.experts.up_proj" for layer in range(3)]
    tree = with_targets(report, [f"{parameter}.{expert}" for parameter in parameters for expert in range(8)])
    for number, (name, target) in enumerate(tree["targets"].items()):
        parameter, _, expert = name.rpartition(".")
        target["stack"] = {"parameter": parameter, "index": int(expert), "size": 8, "num_chosen": 2, "layer": "l"}
        target["captured_energy"] = 0.9 - number / 100
        target["singular_values"] = [0.0, 0.0] if expert == "3" else [4.0, 2.0 if int(expert) % 2 else 1.0]
    write_page(tmp_path, tree)
    text, page = read(tmp_path)
    rows = [row[0] for row in page.rows[-3:]]
    assert rows == [f"{parameter}.7, the worst of 8" for parameter in reversed(parameters)]
    assert "Of experts there is the worst of each layer" in text
    targets = Report.parse(json.dumps(tree)).targets
    mean = _mean_spectrum([target for name, target in targets.items() if name.startswith(parameters[0])])
    assert mean == pytest.approx([1.0, (4 * 0.25 + 3 * 0.5) / 7])


def test_without_matplotlib_the_page_says_how_to_get_plots(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import then raises ImportError
    write_page(tmp_path, report)
    text, page = read(tmp_path)
    assert "pip install matplotlib" in text and "<svg" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.rows[-1][0] in report["targets"]


def test_the_same_report_gives_the_same_page_whatever_backend_a_notebook_set(run: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from loraga_dist.artifacts.report import Report\n"
        "from loraga_dist.publish.page import write_report_page\n"
        "write_report_page(Path(sys.argv[1]), Report.read(Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(run)]
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run(command, check=True, env=environment, timeout=60, cwd=Path(__file__).parents[2])
    assert (tmp_path / "report.html").read_bytes() == (run / "report.html").read_bytes()


def test_a_place_that_cannot_be_written_fails_the_run(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        write_page(tmp_path / "missing", report)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to render the page with")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_its_window(report: dict[str, Any], tmp_path: Path, width: int) -> None:
    names = [f"model.language_model.layers.{layer}.self_attention.q_proj" for layer in range(30)]
    report = with_targets(report, names)
    report["warnings"] = ["a" * 300]
    report["config"]["model"]["name_or_path"] = "/scratch/" + "directory" * 20
    write_page(tmp_path, report)
    text, _ = read(tmp_path)
    (tmp_path / "measured.html").write_text(text.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME % width)
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1000", "--virtual-time-budget=2000",
        (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    measured = re.search(r"<title>(\d+) (\d+)</title>", found.stdout)
    assert measured, found.stderr
    assert [int(number) for number in measured.groups()] == [width, width]
