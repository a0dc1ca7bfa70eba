"""Reward models for partial sequences, trained at the cost of a full-sequence reward model.

Guided decoding asks a reward model about *unfinished* answers, so it must be trained on them
(arXiv 2406.07780). The published way writes one row per prefix; a causal reward model gives the
rewards of all prefixes of an answer in one forward, and that is what `PrefixRewardTrainer` uses::

    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from rgtg_fast.training import PrefixRewardConfig, PrefixRewardTrainer

    trainer = PrefixRewardTrainer(
        AutoModelForSequenceClassification.from_pretrained("gpt2", num_labels=1),
        PrefixRewardConfig("rm", learning_rate=5e-5, per_device_train_batch_size=16),
        train_dataset="pairs.jsonl",         # {"prompt": .., "chosen": .., "rejected": ..} a line
        eval_dataset="held_out.jsonl",
        processing_class=AutoTokenizer.from_pretrained("gpt2"),
    )
    trainer.train()
    print(trainer.evaluate())                # accuracy on whole answers, and by prefix length

It is a `transformers.Trainer`: accelerate, PEFT (`peft_config=LoraConfig(task_type="SEQ_CLS",
...)`), bf16, gradient checkpointing and `resume_from_checkpoint=True` work as they do there. From
the command line, with metrics.json, a plot and a model card beside the model::

    python -m rgtg_fast train --config cfg.yaml learning_rate=1e-4

    # cfg.yaml: these keys, and every field of PrefixRewardConfig and TrainingArguments
    model: gpt2
    train: pairs.jsonl        # or tldr, hh, a folder of datasets.save_to_disk, owner/name
    eval: held_out.jsonl      # or hold_out: 200
    output_dir: rm
    loss_type: prefix
    lora: {r: 16, target_modules: all-linear}

| `loss_type` | model | what is learned | guide |
| --- | --- | --- | --- |
| `prefix` | classifier | Bradley-Terry at every prefix | the model itself |
| `full` | classifier | Bradley-Terry at the last token (as in ARGS) | the model itself |
| `farma` | causal LM | R(v) = output row v (arXiv 2502.04517) | `VocabRewardScorer(rm)` |
| `genarm` | causal LM | reward = Σ log-probs (arXiv 2410.08193) | `AutoregressiveScorer(rm)` |
| `rad` | classifier | squared error to a label in [0, 1] (arXiv 2310.09520) | the model itself |

With `frozen: true` (or `pair_features` and `fit_head` of `rgtg_fast.training.head_only`) only a
head on a frozen language model is fitted: hidden states once, then a convex problem, for
`RewardHead(lm, weight)`. The guides are in `rgtg_fast.scorers`.

Four smaller methods, each in a module of its own, fit into this:

- `attention_labels` (arXiv 2402.00782): labels for every prefix out of a full-sequence model, whose
  last layer's attention shares out its reward; `rad` trains on them. As a guide:
  `rgtg_fast.scorers.AttentionCreditScorer`.
- `PessimisticHead` (arXiv 2301.11270): θ·φ - c‖φ‖_{Σ⁻¹} from `pair_features`, for
  `RewardHead(lm, head)`.
- `d_optimal`: the pairs most worth a label, by greedy log det Σ;
  `python -m rgtg_fast select-pairs --config select.yaml` (keys: `SelectSettings`).
- `reward_consistency` (arXiv 2410.12735): how far two reward models agree on rankings, C, for
  `PrefixRewardConfig(consistency=C)`.

EOS: an answer ends with EOS where it truly ends and nowhere else, so the model learns what ending
there is worth; answers cut at `max_length` get none (`eos: keep` adds none at all). Over-long rows
are counted and said; empty answers, equal pairs, and rows that are in train and eval are errors
that say how many and what to do. `hold_out` keeps the pairs of a prompt together.
"""

from .attention_credit import attention_labels, dense_rewards
from .collate import LabelledCollator, PairCollator
from .config import PrefixRewardConfig
from .consistency import consistency_rate, kendall_tau, reward_consistency
from .data import DataReport, LabelledDataset, PreferenceDataset
from .design import Selection, d_optimal
from .head_only import HeadFit, PairFeatures, fit_head, pair_features
from .pessimistic import PessimisticHead
from .trainer import PrefixRewardTrainer

__all__ = [
    "DataReport",
    "HeadFit",
    "LabelledCollator",
    "LabelledDataset",
    "PairCollator",
    "PairFeatures",
    "PessimisticHead",
    "PreferenceDataset",
    "PrefixRewardConfig",
    "PrefixRewardTrainer",
    "Selection",
    "attention_labels",
    "consistency_rate",
    "d_optimal",
    "dense_rewards",
    "fit_head",
    "kendall_tau",
    "pair_features",
    "reward_consistency",
]
