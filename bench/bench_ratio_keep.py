"""ratio_keep: the same as ``python -m rgtg_fast bench ratio_keep``."""

import sys

from rgtg_fast.cli import main

if __name__ == "__main__":
    main(["bench", "ratio_keep", *sys.argv[1:]])
