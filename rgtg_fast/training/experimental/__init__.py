"""Methods on the reward side that are right by their formulas and did not pay in the study.

What was found (figures: bench/quality/README.md, "What the smaller methods change"; gold reward at
the method's own best β, ± 95 %):

- `attention_labels` (ABC, arXiv 2402.00782; `loss_type="rad"` trains on them): a better judge of
  prefixes than the full-sequence model they come from, and 0.55 ± 0.12 gold below training on
  prefixes (PARGS). As a guide without training: `rgtg_fast.scorers.AttentionCreditScorer`.
- `PessimisticHead` (arXiv 2301.11270; θ·φ - c‖φ‖_{Σ⁻¹} from `pair_features`, for
  `RewardHead(lm, head)`): no gain when mild, 0.8 to 1.1 gold lost at large β when strong.
- `reward_consistency` (CREAM, arXiv 2410.12735; how far two reward models agree on rankings, C, for
  `PrefixRewardConfig(consistency=C)`): changed neither accuracy nor gold.
- `d_optimal` (which pairs to label, by greedy log det Σ; `python -m rgtg_fast select-pairs`): no
  better than random pairs, once worse.
- `rollout_targets` (values of prefixes from continuations by the language model, their mean or
  log-mean-exp, for `loss_type="rad"`) and `loss_type="soft_q"`, which needs none: below training on
  the pairs' own prefixes at equal compute (one pilot seed; "What a better reward would take").
- `contrastive_twist_loss` (twisted SMC's rewards of prefixes, arXiv 2404.17546, from K samples of
  the language model): Bradley-Terry at every prefix is its case of two samples and drawn labels.
"""

from .attention_credit import attention_labels, dense_rewards
from .consistency import consistency_rate, kendall_tau, reward_consistency
from .design import ChosenPairs, d_optimal
from .pessimistic import PessimisticHead
from .rollouts import rollout_targets, rollout_values
from .twist import contrastive_twist_loss

__all__ = [
    "ChosenPairs",
    "PessimisticHead",
    "attention_labels",
    "consistency_rate",
    "contrastive_twist_loss",
    "d_optimal",
    "dense_rewards",
    "kendall_tau",
    "reward_consistency",
    "rollout_targets",
    "rollout_values",
]
