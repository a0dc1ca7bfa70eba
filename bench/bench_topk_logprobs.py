"""topk_logprobs: the same as ``python -m rgtg_fast bench topk_logprobs``."""

import sys

from rgtg_fast.cli import main

if __name__ == "__main__":
    main(["bench", "topk_logprobs", *sys.argv[1:]])
