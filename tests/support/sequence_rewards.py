"""Every kind of reward that whole texts are judged by, and what it is of ids, without a cache."""

import torch
import zoo
from oracle import public

import rgtg_fast


class Letters:
    """A tokenizer of ids as letters."""

    def __call__(self, text):
        return {"input_ids": [ord(c) - 0x100 for c in text]}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(0x100 + int(i)) for i in ids)


def of_text(text):
    return sum(ord(c) * 0.7**i for i, c in enumerate(reversed(text))) / 300


def logprobs(lm, ids):
    """log π of each token behind the first, [n - 1]."""
    return lm(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def head():
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0)) / 32**0.5
    return rgtg_fast.RewardHead(zoo.lm("llama"), weight)


def kinds():
    """Each reward as it is given, and its reward of ids [1, n] whose answer begins at `first`."""
    pair, genarm, farma = (zoo.lm("gpt2"), zoo.lm("llama")), zoo.lm("mistral"), zoo.lm("gpt2")
    own, bloom, bert = head(), zoo.rm("bloom"), zoo.rm("bert")
    fused = public(zoo.rm("llama"))

    def of_head(ids, first):
        return zoo.lm("llama").base_model(ids).last_hidden_state[0, -1] @ own.linear_head()[0]

    def of_pair(ids, first):
        one, two = (logprobs(lm, ids)[first - 1 :].sum() for lm in pair)
        return one - two

    def of_sum(ids, first):
        return 0.5 * fused(ids) + 2 * of_text(Letters().decode(ids[0], True)) - 1

    summed = 0.5 * rgtg_fast.Reward(zoo.rm("llama")) + 2 * rgtg_fast.Reward(texts_of) - 1
    return {
        "expand": (bloom, lambda ids, first: public(bloom)(ids)),
        "reencode": (bert, lambda ids, first: public(bert)(ids)),
        "text": (texts_of, lambda ids, first: of_text(Letters().decode(ids[0], True))),
        "head": (own, of_head),
        "pair": (pair, of_pair),
        "genarm": (
            rgtg_fast.Reward(genarm, reward_kind="genarm"),
            lambda ids, first: logprobs(genarm, ids)[first - 1 :].sum(),
        ),
        "farma": (
            rgtg_fast.Reward(farma, reward_kind="farma"),
            lambda ids, first: farma(ids[:, :-1]).logits[0, -1, ids[0, -1]],
        ),
        "sum": (summed, of_sum),
    }


def texts_of(texts):
    return [of_text(text) for text in texts]
