"""What the embedded models and those of the study are made of: word tokenizers, small Llamas, and
preference pairs with an exact gold reward. All training is that of `transformers.Trainer` and
`rgtg_fast.training`."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from rgtg_fast.training import PrefixRewardConfig, PrefixRewardTrainer

# What every model here is trained with; batch size, epochs and learning rate are its own.
SCHEDULE = {
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 100,
    "disable_tqdm": True,
    "use_cpu": True,
}


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the words of `texts`, with distinct pad, eos and unknown tokens."""
    vocab = sorted({word for text in texts for word in text.split()})
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *vocab])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf_tokenizer(core)


def hf_tokenizer(core: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that pads on the left, of one that knows <pad>, <eos> and <unk>."""
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def small_lm(tokenizer: Any, width: int, inner: int, layers: int, longest: int) -> LlamaForCausalLM:
    """An untrained Llama of 4 heads for texts of up to `longest` tokens."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


def reward_model_on(lm: LlamaForCausalLM) -> LlamaForSequenceClassification:
    """A one-label classifier on a copy of the LM's body, its head starting at zero."""
    config = LlamaConfig.from_dict(lm.config.to_dict())
    config.num_labels = 1
    rm = LlamaForSequenceClassification(config)
    rm.model.load_state_dict(lm.model.state_dict())
    torch.nn.init.zeros_(rm.score.weight)
    return rm


def train_lm(
    lm: LlamaForCausalLM,
    tokenizer: Any,
    prompts: list[str],
    sample_reply: Callable[[str, random.Random], str],
    epochs: int,
    rng: random.Random,
) -> None:
    """Next-token loss on the reply (EOS included) to each of `prompts`, in batches of 64."""
    replies = [sample_reply(prompt, rng) for prompt in prompts]
    starts, ends = tokenizer(prompts)["input_ids"], tokenizer(replies)["input_ids"]
    eos = tokenizer.eos_token_id
    rows = [
        {"input_ids": [*a, *b, eos], "labels": [-100] * len(a) + [*b, eos]}
        for a, b in zip(starts, ends, strict=True)
    ]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": tokenizer.pad_token_id, "labels": -100}
        return {  # padded on the right, where a causal model needs no mask
            name: torch.tensor([row[name] + [pad] * (width - len(row[name])) for row in batch])
            for name, pad in fill.items()
        }

    args = TrainingArguments(
        tempfile.mkdtemp(prefix="lm_"),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=4e-3,
        warmup_steps=40,
        seed=rng.randrange(2**31),
        **SCHEDULE,
    )
    Trainer(lm, args, data_collator=collate, train_dataset=rows).train()
    lm.config.use_cache = True  # Trainer has set it to False; generation needs it
    lm.eval()


def make_pairs(
    tokenizer: Any,
    prompts: Iterable[str],
    sample_reply: Callable[[str, random.Random], str],
    gold: Callable[[str, str, bool], float],
    rng: random.Random,
    *,
    noisy: bool,
) -> Iterable[dict[str, list[int]]]:
    """Endless for endless `prompts`: pairs of grammar replies as token ids, EOS included. The
    winner is drawn by Bradley-Terry from the gold rewards (`noisy`), or is the better one (ties
    are left out, as are equal and empty replies)."""
    for prompt in prompts:
        texts = [sample_reply(prompt, rng) for _ in range(2)]
        rewards = [gold(prompt, text, True) for text in texts]
        if texts[0] == texts[1] or not all(texts) or (not noisy and rewards[0] == rewards[1]):
            continue
        second = 1 / (1 + math.exp(rewards[0] - rewards[1]))
        won = int(rng.random() < second) if noisy else int(rewards[1] > rewards[0])
        prompt_ids, *ids = tokenizer([prompt, *texts])["input_ids"]
        ids = [[*answer, tokenizer.eos_token_id] for answer in ids]
        yield {"prompt_ids": prompt_ids, "chosen_ids": ids[won], "rejected_ids": ids[1 - won]}


def reward_trainer(model: Any, tokenizer: Any, data: Any, **options: Any) -> PrefixRewardTrainer:
    """A trainer of `model` on `data` with the schedule that all reward models here share;
    `options` are fields of `PrefixRewardConfig`, or `eval_dataset`."""
    held_out = options.pop("eval_dataset", None)
    settings = SCHEDULE | {"warmup_steps": 10, "per_device_eval_batch_size": 128} | options
    return PrefixRewardTrainer(
        model,
        PrefixRewardConfig(tempfile.mkdtemp(prefix="rm_"), **settings),
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
