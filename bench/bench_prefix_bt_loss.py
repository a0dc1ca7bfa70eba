"""prefix_bt_loss: the same as ``python -m rgtg_fast bench prefix_bt_loss``."""

import sys

from rgtg_fast.cli import main

if __name__ == "__main__":
    main(["bench", "prefix_bt_loss", *sys.argv[1:]])
