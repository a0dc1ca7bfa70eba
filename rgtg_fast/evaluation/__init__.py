"""Evaluation of guided decoding: reward by another judge, at what divergence, how good the text.

From the command line::

    python -m rgtg_fast eval --config cfg.yaml limit=50

    # cfg.yaml
    model: gpt2                     # the base policy
    prompts: prompts.jsonl          # {"prompt": text or messages} a line
    judge: gold_rm                  # a classifier that guides nothing, or module:function
    output_dir: eval
    seeds: 3
    max_new_tokens: 64
    runs:
      - {name: base}
      - {name: top-k, top_k: 40}
      - {name: pargs, reward_model: rm_partial, k: 10, beta: [0.5, 1, 2, 4]}
      - {name: best, best_of: [4, 16], select_by: rm_full}
    win_judge: mine:prefer          # (prompt, a, b) -> preference for a in [0, 1]; or
    # win_judge: {url: "http://localhost:8000/v1", model: judge}

Lists of values make a run of each. `Settings`, `Run` and `WinJudge` document all keys.

What is measured, averaged over seeds for each prompt, with intervals over prompts:

- `reward` of the judge; `proxy`, the guide's own.
- `kl`, Σ_t KL(q_t || π_t) of the steps' policies q from the base π, exact over the vocabulary or
  the candidates, and `log_ratio`, the sampled log q(y) - log π(y), whose mean is the same.
- `nll` and `perplexity` of the answers under the base.
- `distinct_n` over all answers, `rep_n` within one, `diversity` = Π_{n=2..4} (1 - rep_n), `length`.
- `win_rate` over the baseline run, each pair judged in both orders.

`difference` holds every measure's paired difference to the baseline. Intervals are the BCa
bootstrap's; those of shares (win rate, finished, distinct-n) are Wilson's, within [0, 1].
"""

from .bootstrap import Bootstrap, Estimate, jackknife, share, wilson
from .run import evaluate
from .settings import Run, Settings, WinJudge, check_settings, read_settings

__all__ = [
    "Bootstrap",
    "Estimate",
    "Run",
    "Settings",
    "WinJudge",
    "check_settings",
    "evaluate",
    "jackknife",
    "read_settings",
    "share",
    "wilson",
]
