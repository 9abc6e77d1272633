"""Settings every test shares. Environment first: libraries read it when they are imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = "1"  # ranks share few cores

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))

import pytest


@pytest.fixture(scope="session", autouse=True)
def private_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or leaves anything in the user's caches."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch_extensions"))


@pytest.fixture(scope="module", autouse=True)
def matplotlib_for_those_who_ask(request: pytest.FixtureRequest) -> Iterator[None]:
    """It is optional, and drawing takes longer than a small run: only modules marked `plots` have it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("plots") is None:
            patch.setitem(sys.modules, "matplotlib", None)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=10, help="how many kills tests/faults makes, in fives")
    parser.addoption("--fuzz", type=int, default=200, help="how many wrong inputs tests/fuzz tries")
    parser.addoption("--fuzz_case", help="one of them again, as KIND:SEED")
