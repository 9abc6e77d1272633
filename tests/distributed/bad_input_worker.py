"""One rank of test_bad_input: runs of `launch/init.py`, one after the other, each in a process group of its own.

usage: bad_input_worker.py CASES.json

CASES.json lists objects with `name`, `port` and `arguments`. After each run one line of JSON goes to the standard
output, so that a run that ends the process, or hangs, is known by the first name that is not there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from loraga_dist.cli import init_main
from loraga_dist.ranks.session import leave_process


@contextmanager
def redirected(stream: IO[str]) -> Iterator[IO[bytes]]:
    """Send all that reaches a standard stream's file descriptor, libraries' output included, to a file."""
    stream.flush()
    saved = os.dup(stream.fileno())
    with TemporaryFile() as file:
        os.dup2(file.fileno(), stream.fileno())
        try:
            yield file
        finally:
            stream.flush()
            os.dup2(saved, stream.fileno())
            os.close(saved)


def run_captured(arguments: list[str]) -> dict[str, object]:
    started = time.monotonic()
    with redirected(sys.stdout) as out, redirected(sys.stderr) as err:
        code = init_main(arguments)
        seconds = time.monotonic() - started
        sys.stdout.flush()
        sys.stderr.flush()
        texts = [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in (out, err)]
    return {"code": code, "stdout": texts[0], "stderr": texts[1], "seconds": seconds}


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    for case in cases:
        os.environ["MASTER_PORT"] = str(case["port"])
        result = run_captured(case["arguments"])
        print(json.dumps({"name": case["name"], **result}), flush=True)


if __name__ == "__main__":
    main()
    leave_process(0)
