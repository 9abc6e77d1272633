"""Several ranks push once, and end alike whatever the hub says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from builders import config_tree, save_data, save_model
from hub_server import REPO, TOKEN, served
from launching import run_ranks

WORKER = str(Path(__file__).with_name("push_worker.py"))


@pytest.mark.parametrize(("says", "code"), [("yes", 0), ("no storage", 3), ("read only", 2)])
def test_rank_0_pushes_and_all_end_alike(says: str, code: int, tmp_path: Path) -> None:
    out = {"dir": str(tmp_path / "out"), "push_to_hub": REPO}
    tree = config_tree(save_model(tmp_path / "base"), save_data(tmp_path / "data.jsonl"), tmp_path / "out", output=out)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with served() as hub:
        hub.refuses_commits = says == "no storage"
        hub.user["auth"]["accessToken"]["role"] = "read" if says == "read only" else "write"
        arguments = [WORKER, hub.url, "--config", str(tmp_path / "config.yaml")]
        done = run_ranks(arguments, 2, env={"HF_TOKEN": TOKEN})
    assert [rank.code for rank in done] == [code, code], done
    assert len(hub.created) == (says != "read only")
    assert ("loraga_init/adapter_model.safetensors" in hub.files) == (says == "yes")
    assert (tmp_path / "out").exists() == (says != "read only")
    assert all(TOKEN not in rank.stdout + rank.stderr for rank in done)
