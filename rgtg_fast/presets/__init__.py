"""Published decoders, each as the keyword arguments of `rgtg_fast.generate`.

    from rgtg_fast import presets

    out = rgtg_fast.generate(lm, **inputs, **presets.pargs(rm, beta=2.0), max_new_tokens=64)

The same dict goes into `generate_many`, and, but for `do_sample`, `top_k` and `logits_processor`,
which are Hugging Face's, into `RewardGuided`. Another value for one of its entries:
`presets.pargs(rm) | {"top_p": 0.9}`.
"""

from .mixtures import (
    aad,
    contrastive,
    dexperts,
    dpo_implicit,
    farma,
    genarm,
    nash_md,
    pad,
    proxy_tuning,
)
from .ratio import args, args_stochastic, cd_fudge, cd_q, ilql, pargs, pargs_greedy, rad

__all__ = [
    "aad",
    "args",
    "args_stochastic",
    "cd_fudge",
    "cd_q",
    "contrastive",
    "dexperts",
    "dpo_implicit",
    "farma",
    "genarm",
    "ilql",
    "nash_md",
    "pad",
    "pargs",
    "pargs_greedy",
    "proxy_tuning",
    "rad",
]
