"""ratio_step: the same as ``python -m rgtg_fast bench ratio_step``."""

import sys

from rgtg_fast.cli import main

if __name__ == "__main__":
    main(["bench", "ratio_step", *sys.argv[1:]])
