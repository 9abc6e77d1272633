"""One rank of test_push: `init` against another hub than the one this interpreter was started for.

usage: push_worker.py HUB_URL ARGUMENTS...
"""

from __future__ import annotations

import sys

import huggingface_hub

from loraga_dist.cli import init_main
from loraga_dist.ranks.session import leave_process

if __name__ == "__main__":
    huggingface_hub.constants.ENDPOINT = sys.argv[1]
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    leave_process(init_main(sys.argv[2:]))
