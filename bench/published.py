"""Reward-guided greedy decoding as the published implementations do it: baselines to time against.

Both pick argmax over the k most likely tokens of log pi(v) + beta r(x, y, v), and both keep the
LM's KV cache; they differ in what a reward costs. Prompts are unpadded ids [B, P]; nothing stops
early. Each returns ids [B, T] and the seconds spent on prompt and on steps.
"""

import time

import torch


@torch.inference_mode()
def decode(lm, rewarder, input_ids, k, beta, new):
    """The loop the baselines share; `rewarder(text [B, n], candidates [B, k]) -> rewards [B, k]`.

    `rewarder.chosen(slots [B])` tells it which candidate was taken.
    """
    start = time.perf_counter()
    text, fed, cache, first = input_ids, input_ids, None, None
    for _ in range(new):
        out = lm(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        logprobs, candidates = out.logits[:, -1].float().log_softmax(-1).topk(k)
        if first is None:
            first = time.perf_counter()
        slot = (logprobs + beta * rewarder(text, candidates)).argmax(-1)
        rewarder.chosen(slot)
        fed = candidates.gather(1, slot[:, None])
        text = torch.cat([text, fed], dim=1)
    end = time.perf_counter()
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
        out = self.base(input_ids=fed, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
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
