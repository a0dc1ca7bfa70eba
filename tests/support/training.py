"""Small preference data and trainers for the tests of `rgtg_fast.training`."""

import json
import random

import torch
import transformers
from tiny import EOS, gpt2_lm, gpt2_rm, tokenizer, vocab_size

from rgtg_fast.cli import main
from rgtg_fast.training import PrefixRewardConfig, PrefixRewardTrainer
from rgtg_fast.training.objectives import OBJECTIVES

GOOD, BAD = ("thank you", "the parcel will arrive", "sorry", "please wait"), ("no", "hello")


def id_pairs(n, seed=0, longest=7):
    """Pairs as random token ids with EOS, of unequal lengths."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(EOS + 1, vocab_size()) for _ in range(rng.randint(low, high))]

    return [
        {
            "prompt_ids": ids(2, 5),
            "chosen_ids": [*ids(1, longest), EOS],
            "rejected_ids": [*ids(1, longest), EOS],
        }
        for _ in range(n)
    ]


def text_pairs(n, seed=0):
    """Pairs a model can learn: the chosen answer begins politely."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"order {rng.randrange(10**6)}:",
            "chosen": f" {rng.choice(GOOD)} {rng.randrange(100)}",
            "rejected": f" {rng.choice(BAD)} {rng.randrange(100)}",
        }
        for _ in range(n)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(folder, *overrides, model="rm", evaluate=True):
    """Writes a config file for the models and pairs in `folder`; the arguments of its command."""
    lines = [
        f"model: {folder / model}",
        f"train: {folder / 'train.jsonl'}",
        *([f"eval: {folder / 'eval.jsonl'}"] if evaluate else []),
        f"output_dir: {folder / 'out'}",
        "max_steps: 20",
        "learning_rate: 2e-3",
        "per_device_train_batch_size: 8",
        "use_cpu: true",
        "disable_tqdm: true",
    ]
    (folder / "cfg.yaml").write_text("\n".join(lines) + "\n")
    return ["train", "--config", str(folder / "cfg.yaml"), *overrides]


def train(folder, *overrides, **keys):
    """Trains by the command line; the figures, and the folder that it wrote."""
    main(command(folder, *overrides, **keys))
    return json.loads((folder / "out" / "metrics.json").read_text()), folder / "out"


def normal(*shape, seed=0):
    """Standard normal numbers, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def config(tmp_path, **changes):
    return PrefixRewardConfig(
        **{
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
        }
        | changes
    )


def trainer(tmp_path, model=None, train=None, evaluate=None, peft_config=None, tok=None, **changes):
    args = config(tmp_path, **changes)
    if model is None:
        vocab = OBJECTIVES[args.loss_type].head == "vocab"
        model = (gpt2_lm if vocab else gpt2_rm)(initializer_range=0.1)
    transformers.utils.logging.set_verbosity_error()
    return PrefixRewardTrainer(
        model,
        args,
        train_dataset=text_pairs(16) if train is None else train,
        eval_dataset=evaluate,
        processing_class=tokenizer() if tok is None else tok,
        peft_config=peft_config,
    )


def step(trained, rows, at=0):
    """Loss and gradients of one training batch of `rows`."""
    model = trained.model.train()
    model.zero_grad()
    batch = trained.data_collator(rows)
    loss = trained.score(model, batch, at).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)
