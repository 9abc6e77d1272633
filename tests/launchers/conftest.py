"""One clone for all tests here: pretraining its quickstart model takes longer than everything else. And one cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from builders import config_tree, save_data, save_model
from clones import Clone, make_clone
from cluster import Cluster, running
from cluster import missing as cluster_missing
from launching import succeed
from outputs import make_output
from starts import TinyRun


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return make_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="session")
def quickstarted(clone: Clone) -> Clone:
    """The clone after its first `make quickstart`."""
    succeed(clone.once("make quickstart"))
    return clone


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    root = tmp_path_factory.mktemp("tiny")
    base, data = save_model(root / "model"), save_data(root / "data.jsonl")
    out = make_output(config_tree(base, data, root / "reference", output={"residual_base": "none"}))
    return TinyRun(out.with_suffix(".yaml"), out)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := cluster_missing():
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
