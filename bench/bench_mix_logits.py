"""mix_logits: the same as ``python -m rgtg_fast bench mix_logits``."""

import sys

from rgtg_fast.cli import main

if __name__ == "__main__":
    main(["bench", "mix_logits", *sys.argv[1:]])
