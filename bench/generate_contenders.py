"""The contenders of the generation benchmark: who they are, and one run of each."""

import importlib.util
import inspect
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from floors import adapter_bytes, weight_bytes
from generate_models import adapter_on_base, head_on_base
from generate_probes import peak_memory
from published import KFoldCache, ReEncode, RewardAugmentedProcessor, decode, now

import rgtg_fast
from rgtg_fast.decode import ahead
from rgtg_fast.ops.reference import gumbel_noise

SEED = 0  # of the draws
# A choice between scores closer than this is a near tie, which rounding may decide either way.
NEAR_TIE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.02}
SLOW = ("reencode", "re-encode one by one")
K_FOLD = ("k-fold cache", "rad")
MODES = ("auto", "tree", "expand", "reencode")
# `speculate=` of these; the others take one token at a time.
ROUNDS = {"rounds": "auto", "rounds of 4": 4}
LABELS = {
    "plain": "plain HF generate",
    "static": "plain HF, static + compiled",
    "auto": "guided, auto",
    "rounds": "guided, in rounds that pay",
    "rounds of 4": "guided, in rounds of 4",
    "tree": "guided, tree",
    "expand": "guided, expand",
    "reencode": "guided, reencode (k at once)",
    "pruned": "guided, pruned",
    "head": "guided, head on base",
    "adapter": "guided, adapter on base",
    "k-fold cache": "k-fold batch cache (ARGS)",
    "rad": "LogitsProcessor (RAD)",
    "re-encode one by one": "naive re-encode (PARGS)",
}


def why_not(name, device, top_p=None):
    """Why contender `name` cannot run here; None where it can. With `top_p` tokens are drawn."""
    if top_p is not None and name in (*SLOW, *K_FOLD):
        return "it is run greedily, and --top-p draws tokens"
    if name == "static" and torch.device(device).type != "cuda":
        return "a static cache is compiled on CUDA only"
    if name == "pruned" and "reward_range" not in inspect.signature(rgtg_fast.generate).parameters:
        return "this rgtg_fast.generate has no reward_range="
    wanted = {"head": "RewardHead", "adapter": "RewardAdapter"}.get(name)
    if wanted and not hasattr(rgtg_fast, wanted):
        return f"this rgtg_fast has no {wanted}"
    if name == "adapter" and importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    return None


class Disagreement(Exception):
    """A contender's tokens are not the guided ones: it gets no time."""


@dataclass
class Models:
    """LM, reward model, and for each reward on the LM itself (fast object, separate model)."""

    lm: Any
    rm: Any
    on_base: dict[str, tuple] = field(default_factory=dict)

    def add_on_base(self, names):
        makers = {"head": head_on_base, "adapter": adapter_on_base}
        self.on_base = {name: makers[name](self.lm) for name in makers if name in names}

    def separate(self, name):
        """The separate reward model whose greedy answer contender `name` has to give."""
        return self.on_base[name][1] if name in self.on_base else self.rm

    def step_bytes(self, name):
        """Bytes of the weights that one decode step of contender `name` has to read."""
        if name in ("plain", "static"):
            return weight_bytes(self.lm)
        if name == "head":
            return weight_bytes(self.lm, self.separate(name).score)
        if name == "adapter":
            return weight_bytes(self.lm) + adapter_bytes(self.separate(name))
        return weight_bytes(self.lm, self.rm)


@dataclass
class Answer:
    """Tokens [B, T], by how much each won [B, T], lowest and highest candidate reward, and KL of
    the guided policy from π per token, in nats (greedy: −log π of the tokens)."""

    tokens: torch.Tensor
    margins: torch.Tensor
    rewards: tuple[float, float]
    kl: float


class Bench:
    """One prompt and k: each contender runs once, its tokens are checked, it gives seconds."""

    def __init__(self, models, prompt, k, new, slow_new, beta=1.0, top_p=None):
        self.way = {"do_sample": False}
        if top_p is not None:  # and Hugging Face's own top_k, 50 by default
            self.way = {"do_sample": True, "top_p": top_p}
        self.models, self.prompt, self.k, self.new, self.beta = models, prompt, k, new, beta
        # A token by re-encoding costs prompt * k * batch: the more that is, the fewer are timed.
        fewer = min(slow_new, slow_new * 1280 // (prompt.numel() * k))
        self.slow_new = min(new, max(2, fewer)) if slow_new else new
        self.near_ties = 0
        self.answers = {}
        if prompt.device.type == "cuda":
            # Without these the static cache would have the length of the longest prompt so far, and
            # torch.compile would use dynamic shapes from the second point on.
            models.lm._previous_max_cache_length = -1
            torch.compiler.reset()

    def guided(self, prompt, new, name, **options):
        fast = self.models.on_base.get(name)
        if name in MODES:
            options["reward_method"] = name
        if name in ROUNDS:
            ahead._learnt.clear()  # of the same text, which it would otherwise know
        if name == "pruned":
            low, high = self.answer("auto").rewards
            options["reward_range"] = (low - 0.01, high + 0.01)  # the tightest that clamps nothing
        return rgtg_fast.generate(
            self.models.lm,
            prompt,
            attention_mask=torch.ones_like(prompt),
            reward_model=fast[0] if fast else self.models.rm,
            k=self.k,
            beta=self.beta,
            max_new_tokens=new,
            seed=SEED,
            speculate=ROUNDS.get(name, False),
            **self.way,
            **options,
        )

    def plain(self, new, **options):
        return self.models.lm.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            **self.way,
            max_new_tokens=new,
            min_new_tokens=new,
            **options,
        )

    def answer(self, name):
        """The answer that contender `name` must give: the first guided one for its reward model."""
        reward = name if name in self.models.on_base else "separate"
        if reward not in self.answers:
            out = rgtg_fast.generate(
                self.models.lm,
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                reward_model=self.models.separate(name),
                k=self.k,
                beta=self.beta,
                max_new_tokens=self.new,
                seed=SEED,
                speculate=False,
                **self.way,
                return_dict_in_generate=True,
                output_candidates=True,
            )
            rewards = out.candidate_rewards
            values = out.candidate_logprobs + self.beta * rewards
            if self.way["do_sample"]:  # the noise that the draw takes
                seeds = rgtg_fast.ops.split_seed(SEED, len(rewards))[:, None, None]
                steps = torch.arange(rewards.shape[1])[:, None]
                noise = gumbel_noise(seeds, steps, out.candidate_ids.cpu())
                values = values + noise.to(values.device)
            best = values.topk(min(2, self.k)).values
            margins = best[..., 0] - best[..., -1] if self.k > 1 else best[..., 0] + torch.inf
            self.answers[reward] = Answer(
                out.sequences[:, self.prompt.shape[1] :],
                margins,
                (rewards.min().item(), rewards.max().item()),
                out.kl.nanmean().item(),
            )
        return self.answers[reward]

    def check(self, name, tokens, first=0):
        """Raise where a contender's tokens differ from that answer, near ties aside."""
        answer = self.answer(name)
        wanted = answer.tokens[:, first : first + tokens.shape[1]]
        for row in range(len(wanted)):
            differs = (tokens[row] != wanted[row]).nonzero()
            if len(differs) == 0:
                continue
            step = int(differs[0])
            margin = float(answer.margins[row, first + step])
            if margin > NEAR_TIE[self.models.lm.dtype]:
                raise Disagreement(
                    f"{name} disagrees with guided decoding in row {row} at token {first + step}: "
                    f"{int(tokens[row, step])} against {int(wanted[row, step])}, which won by "
                    f"{margin:.4f}; no timings of different answers are printed"
                )
            self.near_ties += 1

    def too_dear(self, name, budget, free_bytes):
        """Why contender `name` would cost too much here; None where it would not.

        Its encoding of prompts is predicted from one timed forward of the reward model's base.
        """
        if name not in (*SLOW, *K_FOLD, "expand"):
            return None
        if name != "expand":
            encoded = self.k * (1 if name in K_FOLD else self.slow_new + 1)
            seconds = encoded * self.prompt_seconds()
            if seconds > budget:
                return f"one run would take some {seconds:.0f} s (--budget {budget:.0f})"
        if name not in SLOW:
            config = self.models.rm.config
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            width = config.hidden_size // config.num_attention_heads * heads
            tokens = (self.prompt.shape[1] + self.new) * len(self.prompt) * self.k
            size = tokens * 2 * width * config.num_hidden_layers * self.models.rm.dtype.itemsize
            if 2 * size > free_bytes:  # selecting rows holds a second copy
                return f"its {self.k} caches per row take {size / 1e9:.1f} GB"
        return None

    @torch.inference_mode()
    def prompt_seconds(self):
        """Seconds of one forward of the reward model's base on the prompts, the second of two."""
        if not hasattr(self, "_prompt_seconds"):
            for _ in range(2):
                start = now(self.prompt.device)
                self.models.rm.base_model(input_ids=self.prompt, use_cache=True)
                self._prompt_seconds = now(self.prompt.device) - start
        return self._prompt_seconds

    def run(self, name):
        """Run contender `name` -> seconds of a call, of its first token, and of CPU.

        The time after the first token is that of decoding alone. Where a contender does not show
        when its first token was there, a second call of one token tells.
        """
        cpu = time.process_time()
        call, first = self.slow(name) if name in SLOW else self.fast(name)
        cpu = time.process_time() - cpu
        if first is None:
            start = now(self.prompt.device)
            self.call(name, 1)
            first = now(self.prompt.device) - start
        return {"call": call, "first": first, "cpu": cpu}

    def run_for_memory(self, name):
        """As `run`, with the peak memory; giving memory back before it may cost a little time."""
        with peak_memory(self.prompt.device) as memory:
            run = self.run(name)
        return run | memory

    def candidates_scored(self, name):
        """Mean number of candidates that contender `name` has scored, of one more run."""
        out = self.guided(self.prompt, self.new, name, return_dict_in_generate=True)
        return out.candidates_scored.float().mean().item()

    def call(self, name, new):
        if name == "plain":
            return self.plain(new)
        if name == "static":
            return self.plain(new, cache_implementation="static")
        return self.guided(self.prompt, new, name)

    def fast(self, name):
        device, length = self.prompt.device, self.prompt.shape[1]
        start, first = now(device), None
        if name == "k-fold cache":
            rewarder = KFoldCache(self.models.rm)
            tokens, first, _ = decode(
                self.models.lm, rewarder, self.prompt, self.k, self.beta, self.new
            )
        elif name == "rad":
            processor = RewardAugmentedProcessor(self.models.rm, self.k, self.beta)
            tokens = self.plain(self.new, logits_processor=[processor])[:, length:]
            first = processor.first - start
        else:
            tokens = self.call(name, self.new)[:, length:]
        spent = now(device) - start
        if name not in ("plain", "static"):
            self.check(name, tokens)
        return spent, first

    def slow(self, name):
        """As `fast`, from `slow_new` tokens in the middle of the answer: at its mean length."""
        new = self.slow_new
        start_at = (self.new - new) // 2
        prompt = torch.cat([self.prompt, self.answer(name).tokens[:, :start_at]], dim=1)
        if name == "reencode":
            times = []
            for length in (1, new):
                start = now(prompt.device)
                tokens = self.guided(prompt, length, name)[:, prompt.shape[1] :]
                times.append(now(prompt.device) - start)
            first, steps = times[0], times[1] - times[0]
        else:
            tokens, first, steps = decode(
                self.models.lm, ReEncode(self.models.rm), prompt, self.k, self.beta, new
            )
        self.check(name, tokens, start_at)
        per_token = steps / (new - 1) if new > 1 else first
        return first + per_token * (self.new - 1), first
