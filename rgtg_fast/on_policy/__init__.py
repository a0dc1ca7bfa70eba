"""On-policy refinement: a reward model retrained on the prefixes that the policy it guides meets.

A reward model is trained on answers that somebody wrote or a language model gave by itself. Guided
decoding takes the language model elsewhere, where the reward model was never asked. "Fine-Tuning
Language Models with Reward Learning on Policy" (RLP, arXiv 2403.19279) retrains the reward model on
samples of the latest policy, beside the human preferences, and then optimises the policy for it
again. Here the policy is the guided one, which needs no optimisation: each round

1. draws several answers to each prompt from the language model, guided by the latest reward model;
2. has pairs of them labelled: by a judge (a function of texts, a server, or a full-sequence reward
   model), or by hand;
3. trains a reward model on the pairs of all rounds so far and the pairs given, from the same start.

RLP labels without a judge (RLP-SPG: the preferred answer is of the largest cluster of answers that
mean the same) or regularises by two views of the samples (RLP-UML); neither is in here.

From the command line, with a config of `rgtg-fast train` that has a mapping more::

    rgtg-fast train --config cfg.yaml

    # cfg.yaml
    model: gpt2                   # what the reward model begins as in every round
    train: pairs.jsonl            # trained on first, and mixed in later; may be left out
    output_dir: refined
    loss_type: prefix
    on_policy:
      lm: gpt2                    # the language model that is guided
      prompts: prompts.jsonl      # {"prompt": text or messages} a line
      judge: gold_rm              # a classifier, module:function, http://.., or hand
      rounds: 2
      samples: 4                  # answers to each prompt
      beta: 2.0                   # as every option of rgtg_fast.generate_many

`OnPolicy` documents all keys; `rgtg-fast train --config cfg.yaml --on-policy rounds=3 beta=1`
sets some. `output_dir` gets a folder round-1, round-2, .. for each round (round-0: trained on the
given pairs alone) with answers, scores, pairs and the model with its card, and metrics.json.

The same command goes on after a kill: what was written is kept, and the models are, bit for bit,
those of a run that nothing stopped. More `rounds` may be asked for later.
"""

from .run import train_on_policy
from .settings import OnPolicy

__all__ = ["OnPolicy", "train_on_policy"]
