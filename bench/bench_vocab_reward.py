"""vocab_reward: the same as ``python -m rgtg_fast bench vocab_reward``."""

import sys

from rgtg_fast.cli import main

if __name__ == "__main__":
    main(["bench", "vocab_reward", *sys.argv[1:]])
