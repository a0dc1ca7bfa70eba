"""reward_head: the same as ``python -m rgtg_fast bench reward_head``."""

import sys

from rgtg_fast.cli import main

if __name__ == "__main__":
    main(["bench", "reward_head", *sys.argv[1:]])
