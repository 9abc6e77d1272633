"""A copy of the repository in which the documented commands run as a user runs them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from launching import ROOT, WITHOUT_PLOTS, Finished, run


@dataclass(frozen=True)
class Clone:
    """The working tree as a fresh clone would have it, with an environment that is already installed."""

    root: Path
    _finished: dict[str, Finished] = field(default_factory=dict)

    def once(self, line: str) -> Finished:
        """What `shell(line)` gave when a test first asked for it."""
        if line not in self._finished:
            self._finished[line] = self.shell(line)
        return self._finished[line]

    def shell(self, line: str) -> Finished:
        """Run one line of shell in the clone's root, with its environment active; plots are drawn by `make` alone."""
        places = [self.root] if line.startswith("make") else [self.root, WITHOUT_PLOTS]
        return run(
            ["bash", "-c", f"cd {shlex.quote(str(self.root))} && {line}"],
            timeout_seconds=1800,
            env={
                "PATH": f"{self.root / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(map(str, places)),
                # those of a `make test` around this are not meant for the make in here
                "MAKEFLAGS": "",
                "MAKELEVEL": "",
            },
        )


def make_clone(root: Path) -> Clone:
    """Fill the empty directory `root` with what git knows or would add of this repository."""
    listing = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():  # not one that is deleted but still in the index
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)

    # the environment of this interpreter stands in for what `make` installs
    venv = root / ".venv"
    venv.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith("."):
            (venv / entry.name).symlink_to(entry)
    for stamp in (".created", ".installed", ".installed-dev"):
        (venv / stamp).touch()
    return Clone(root)
