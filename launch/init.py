"""Start `loraga-dist init` under a launcher: deepspeed, torchrun, or plain python."""

from loraga_dist.cli import init_main
from loraga_dist.ranks.words import leave_process

if __name__ == "__main__":
    leave_process(init_main())
