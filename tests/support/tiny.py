"""Tiny models, a tiny tokenizer and prompts for the tests of `rgtg_fast.generate`.

Weights are random but wide (`initializer_range`), so greedy answers vary from token to token and
rewards differ by about one between candidates: a wrong choice shows.
"""

import functools

import torch
import zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = 0, 1, 2
CORPUS = (
    "hello world, how may I help you today?",
    "thank you for the answer. please wait while we check the order.",
    "the parcel will arrive tomorrow; sorry for the delay!",
)


@functools.cache
def tokenizer():
    """Byte-level BPE with a few merges: every text has ids, every id has text."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
    )


def vocab_size():
    return len(tokenizer())


def _config(family, changes):
    """The zoo's, for the tokenizer, with weights wide enough to tell answers apart."""
    own = {"vocab_size": vocab_size(), "initializer_range": 0.5}
    own |= {"bos_token_id": BOS, "eos_token_id": EOS}
    return zoo.config_of(family, **own | changes)


def _gpt2_config(changes):
    # Few positions, for prompts that are too long; dropout as GPT-2 has it, for training.
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    return _config("gpt2", {"n_positions": 64} | dropout | changes)


def llama_lm(seed=1, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(_config("llama", changes)).eval()


def gpt2_lm(seed=2, **changes):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(_gpt2_config(changes)).eval()


def llama_rm(seed=3, **changes):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_config("llama", {"num_labels": 1} | changes)).eval()


def gpt2_rm(seed=4, **changes):
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(_gpt2_config({"num_labels": 1} | changes)).eval()


def prompts(*lengths, seed=0):
    """Left-padded random prompts of these lengths: `input_ids` and `attention_mask` [B, L]."""
    gen = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(EOS + 1, vocab_size(), (len(lengths), width), generator=gen)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = PAD
        mask[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def full_reward(rm, ids):
    """r(ids) of each row of `ids` [N, n] by a plain forward without cache or padding -> [N]."""
    base = getattr(rm, rm.base_model_prefix)
    hidden = base(ids, use_cache=False).last_hidden_state
    return rm.score(hidden[:, -1]).squeeze(-1).float()


class CountingScorer:
    """A reward model made by hand: r = weights[candidate], whatever the prefix."""

    def __init__(self, weights):
        self.weights = weights
        self.prefills, self.steps, self.committed = 0, 0, []

    def prefill(self, input_ids, attention_mask=None):
        self.prefills += 1

    def score(self, ids):
        self.steps += 1
        return self.weights[ids]

    def commit(self, slot):
        self.committed.append(slot.clone())
