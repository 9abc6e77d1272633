"""A script as several ranks on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run_as_ranks(script: str | Path, num_ranks: int, *arguments: str, timeout_seconds: float | None = None) -> None:
    """Run `script` under torchrun; raises SystemExit when a rank fails or the time is up, with no rank left behind."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    launcher = subprocess.Popen([*torchrun, str(script), *arguments], env={**os.environ, "PYTHONPATH": path})
    try:
        exit_code = launcher.wait(timeout_seconds)
    finally:
        launcher.terminate()  # it ends its ranks first
        launcher.wait()
    if exit_code:
        raise SystemExit(f"{num_ranks} ranks of {script} ended with {exit_code}")


def json_of_ranks(script: str | Path, num_ranks: int, *arguments: str) -> Any:
    """Run `script` under torchrun and return what its rank 0 wrote to the file after `--json`."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "written.json"
        run_as_ranks(script, num_ranks, *arguments, "--json", str(written))
        return json.loads(written.read_text())
