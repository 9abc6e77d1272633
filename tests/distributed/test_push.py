"""Several ranks push once, and end alike whatever the hub says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from builders import config_tree, save_data, save_model
from hub_server import REPO, TOKEN, served
from outputs import write_config
from ranks import finish_on_ranks

from loraga_dist.cli import init_main
from loraga_dist.ranks.words import leave_process


def init_with_hub(url: str, arguments: Sequence[str]) -> None:
    """On every rank: `init` against another hub than the one this interpreter was started for."""
    import huggingface_hub

    huggingface_hub.constants.ENDPOINT = url
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    leave_process(init_main(arguments))


@pytest.mark.parametrize(("says", "code"), [("yes", 0), ("no storage", 3), ("read only", 2)])
def test_rank_0_pushes_and_all_end_alike(says: str, code: int, tmp_path: Path) -> None:
    base, data = save_model(tmp_path / "base"), save_data(tmp_path / "data.jsonl")
    config = write_config(config_tree(base, data, tmp_path / "out", output={"push_to_hub": REPO}))
    with served() as hub:
        hub.refuses_commits = says == "no storage"
        hub.user["auth"]["accessToken"]["role"] = "read" if says == "read only" else "write"
        done = finish_on_ranks(init_with_hub, 2, hub.url, ["--config", str(config)], env={"HF_TOKEN": TOKEN})
    assert [rank.code for rank in done] == [code, code], done
    assert len(hub.created) == (says != "read only")
    assert ("loraga_init/adapter_model.safetensors" in hub.files) == (says == "yes")
    assert (tmp_path / "out").exists() == (says != "read only")
    assert all(TOKEN not in rank.stdout + rank.stderr for rank in done)
