"""Reward-guided greedy decoding as the published implementations do it: baselines to time against.

All pick argmax over the k most likely tokens of log pi(v) + beta r(x, y, v), and all keep the
LM's KV cache; they differ in what a reward costs. Prompts are unpadded ids [B, P]; nothing stops
early. Each gives ids [B, T] and the seconds until the first token and after it.
"""

import time

import torch
from transformers import LogitsProcessor

from rgtg_fast.models.foreign import CACHE, cache_of


def now(device):
    """Seconds on the clock, after the device has finished."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def decode(lm, rewarder, input_ids, k, beta, new):
    """The loop the baselines share; `rewarder(text [B, n], candidates [B, k]) -> rewards [B, k]`.

    `rewarder.chosen(slots [B])` tells it which candidate was taken.
    """
    start = now(lm.device)
    text, fed, cache, first = input_ids, input_ids, None, None
    for _ in range(new):
        out = lm(input_ids=fed, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        cache = cache_of(out)
        logprobs, candidates = out.logits[:, -1].float().log_softmax(-1).topk(k)
        slot = (logprobs + beta * rewarder(text, candidates)).argmax(-1)
        rewarder.chosen(slot)
        fed = candidates.gather(1, slot[:, None])
        text = torch.cat([text, fed], dim=1)
        if first is None:
            first = now(lm.device)
    end = now(lm.device)
    return text[:, input_ids.shape[1] :], first - start, end - first


class KFoldCache:
    """ARGS: the k candidates of a row are k batch rows, each with its own copy of the prefix cache.

    After a step the winner's cache is copied over those of the other k - 1.
    """

    def __init__(self, rm):
        self.base, self.head = rm.base_model, rm.score
        self.cache = None

    def __call__(self, text, candidates):
        rows, k = candidates.shape
        if self.cache is None:
            fed = torch.cat(
                [text.repeat_interleave(k, dim=0), candidates.reshape(rows * k, 1)], dim=1
            )
        else:
            fed = candidates.reshape(rows * k, 1)
        out = self.base(input_ids=fed, use_cache=True, **{CACHE: self.cache})
        self.cache = cache_of(out)
        return self.head(out.last_hidden_state[:, -1]).float().view(rows, k)

    def chosen(self, slot):
        k = self.cache.layers[0].keys.shape[0] // slot.shape[0]
        winner = torch.arange(slot.shape[0], device=slot.device) * k + slot
        self.cache.reorder_cache(winner.repeat_interleave(k))


class ReEncode:
    """PARGS: k full forwards of the whole text, one after another, and no cache."""

    def __init__(self, rm):
        self.base, self.head = rm.base_model, rm.score

    def __call__(self, text, candidates):
        rewards = []
        for candidate in candidates.unbind(1):
            ids = torch.cat([text, candidate[:, None]], dim=1)
            hidden = self.base(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
            rewards.append(self.head(hidden).float().squeeze(-1))
        return torch.stack(rewards, dim=1)

    def chosen(self, slot):
        pass


class RewardAugmentedProcessor(LogitsProcessor):
    """RAD: a logits processor with a reward model's cache of its own, for `lm.generate` (greedy).

    The k best logits get beta times the reward of their token, all others -inf. As in RAD's own
    processor each row's prompt is encoded k times, the candidates are k batch rows, and the cache
    of the row that was taken replaces the other k - 1. Left out, so this is the faster: its round
    trip of every candidate through text and tokenizer, the clamp of rewards to [0, 1], and loops
    over rows on the host. `first` is the time at which the first token's rewards were there.
    """

    def __init__(self, rm, k, beta):
        self.rewarder, self.k, self.beta = KFoldCache(rm), k, beta
        self.ids = self.first = None

    def __call__(self, input_ids, scores):
        if self.ids is not None:
            self.rewarder.chosen((self.ids == input_ids[:, -1:]).int().argmax(-1))
        best, self.ids = scores.topk(self.k)
        rewards = self.rewarder(input_ids, self.ids)
        if self.first is None:
            self.first = now(scores.device)
        guided = (best + self.beta * rewards).to(scores.dtype)
        return torch.full_like(scores, -torch.inf).scatter(1, self.ids, guided)
