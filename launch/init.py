"""Start `loraga-dist init` under a launcher: deepspeed, torchrun, or plain python."""

import sys

from loraga_dist.cli import init_main

if __name__ == "__main__":
    sys.exit(init_main())
