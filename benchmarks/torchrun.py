"""One of these scripts again, as several ranks on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_as_ranks(script: str | Path, num_ranks: int, *arguments: str) -> Any:
    """Start `script` under torchrun and return what its rank 0 wrote to the file after `--json`."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "written.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
        subprocess.run([*torchrun, str(script), *arguments, "--json", str(path)], check=True)
        return json.loads(path.read_text())
