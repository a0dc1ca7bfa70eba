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
| `genarm_prefix` | causal LM | that reward, at every prefix | `AutoregressiveScorer(rm)` |
| `seq2seq` | causal LM | rewriting drafts (arXiv 2409.00162) | `RewriteScorer(rm)` |
| `copg` | causal LM | itself, by scores of answers (arXiv 2406.19185) | none: it answers alone |
| `distill` | causal LM | itself, from a guided policy (`guided_rows`) | none: it answers alone |
| `sequencematch` | causal LM | itself, and to undo a token (arXiv 2306.05426) | `backtracking` |
| `rad` | classifier | squared error to a label in [0, 1] (arXiv 2310.09520) | the model itself |
| `soft_q` | causal LM | soft values of labels (arXiv 2106.07704) | `VocabRewardScorer(rm)` |

With `frozen: true` (or `pair_features` and `fit_head` of `rgtg_fast.training.head_only`) only a
head on a frozen language model is fitted: hidden states once, then a convex problem, for
`RewardHead(lm, weight)`. The guides are in `rgtg_fast.scorers`.

One run a folder: where `output_dir` holds one already, `resume: true` goes on from its last
checkpoint, `overwrite: true` removes what it wrote and starts over; neither is an error that says
so. `rgtg_fast.training.experimental` has methods that the study found not to pay, and
`rgtg_fast.on_policy` trains in rounds on the answers of the guided policy.

EOS: an answer ends with EOS where it truly ends and nowhere else, so the model learns what ending
there is worth; answers cut at `max_length` get none (`eos: keep` adds none at all). Over-long rows
are counted and said; empty answers, equal pairs, and rows that are in train and eval are errors
that say how many and what to do. `hold_out` keeps the pairs of a prompt together.
"""

from .collate import LabelledCollator, PairCollator
from .config import PrefixRewardConfig
from .data import DataReport, LabelledDataset, PreferenceDataset
from .distill import GuidedAnswers, guided_rows
from .head_only import HeadFit, PairFeatures, fit_head, pair_features
from .sequencematch import AnswerRows, add_backspace
from .trainer import PrefixRewardTrainer

__all__ = [
    "AnswerRows",
    "DataReport",
    "GuidedAnswers",
    "HeadFit",
    "LabelledCollator",
    "LabelledDataset",
    "PairCollator",
    "PairFeatures",
    "PreferenceDataset",
    "PrefixRewardConfig",
    "PrefixRewardTrainer",
    "add_backspace",
    "fit_head",
    "guided_rows",
    "pair_features",
]
