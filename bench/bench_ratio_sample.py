"""ratio_sample: the same as ``python -m rgtg_fast bench ratio_sample``."""

import sys

from rgtg_fast.cli import main

if __name__ == "__main__":
    main(["bench", "ratio_sample", *sys.argv[1:]])
