"""One clone for all tests here: pretraining its quickstart model takes longer than everything else."""

from __future__ import annotations

import pytest
from clones import Clone, make_clone
from launching import succeed


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return make_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="session")
def quickstarted(clone: Clone) -> Clone:
    """The clone after its first `make quickstart`."""
    succeed(clone.once("make quickstart"))
    return clone
