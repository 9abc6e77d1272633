"""Outputs put together by hand, for all that read or check one."""

from __future__ import annotations

from pathlib import Path

import pytest
from handmade import save_llama, write_output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), shard_size="20KB")


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    write_output(llama, directory, max_shard_bytes=20_000)
    return directory
