"""candidate_attention: the same as ``python -m rgtg_fast bench candidate_attention``."""

import sys

from rgtg_fast.cli import main

if __name__ == "__main__":
    main(["bench", "candidate_attention", *sys.argv[1:]])
