"""What a call speculates with (speculation.py), and why not where it does not."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from ..models.language_model import LanguageModel
from ..scorers.joint import JointScorer
from ..scorers.tree import SiblingScorer, TreeScorer
from .call import Call
from .drafters import Drafter, SuffixDrafter
from .fitted import FittedHead
from .logits import CachedLogits, JointLogits
from .pace import PRIOR_WEIGHT, Costs, Rate, Retry, Survival
from .plan import ROW_BY_ROW, SCORES_ALONE

LONGEST = 8  # tokens of a round, at most, where their number is chosen here
# Candidates of all rows and tokens of such a round: what reading the weights pays for on a CPU.
CANDIDATES = 96
# Bytes of the language model's weights: with fewer, its forwards are no longer than the host's own
# work for a round.
SMALL = 64 << 20
# Stopping criteria that look at each row by itself.
OF_EACH_ROW = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria, StopStringCriteria)


@dataclass
class Speculation:
    """What a call drafts with, and what it came to.

    `most` tokens are taken in a round, always (`fixed`) or where they pay.
    """

    most: int
    fixed: bool
    costs: Costs
    survival: Survival
    fitted: FittedHead
    vocab_size: int
    drafter: Drafter | None = None
    # How often guesses were what the language model chose.
    guessed: Rate = field(default_factory=lambda: [PRIOR_WEIGHT * 0.7, PRIOR_WEIGHT])
    guessing: Retry = field(default_factory=Retry)
    drafting: Retry = field(default_factory=Retry)
    lm_forwards: int = 0
    reward_forwards: int = 0
    tokens: int = 0
    drafted: int = 0
    kept: int = 0

    def right(self) -> float:
        """The probability that a guess is what the language model chooses."""
        return self.guessed[0] / self.guessed[1]

    def guesses(self, most: int) -> int:
        """How many tokens the drafter is to guess, at most `most`."""
        if self.fixed or most <= 0:
            return most
        count, _ = self.costs.best(most, self.right())
        return max(count, 1) if self.guessing(count > 0) else 0

    def goes_on(
        self, drafted: int, forwards: int, nodes: int, then: int, yields: float, more: float
    ) -> bool:
        """Whether to draft a position after `drafted`, `forwards` of which took one of the language
        model; the rest as for `Costs.one_more_pays`."""
        if not more:
            return False
        most = 0 if self.drafter is None else self.most - drafted - 1
        _, each = self.costs.best(most, self.right())
        pays = self.costs.one_more_pays(forwards, nodes, then, yields, more, each)
        return self.drafting(pays) if drafted == 1 else pays

    def report(self) -> dict[str, Any]:
        """Forwards of both models, tokens of all rows, and the share of drafts that were kept, of
        those that the reward model looked at (None without any)."""
        return {
            "reward_forwards": self.reward_forwards,
            "lm_forwards": self.lm_forwards,
            "tokens": self.tokens,
            "acceptance": self.kept / self.drafted if self.drafted else None,
        }


_learnt: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def learnt_of(
    reward_model: Any, model: Any, kind: tuple, shape: tuple
) -> tuple[Costs, Survival, FittedHead]:
    """What calls with these two models have found so far, kept as long as both of them are: of a
    `kind` of call, what is foreseen of rewards (at most `fitted.LARGEST` bytes), and of a `shape`
    of it the pace."""
    of_both = _learnt.setdefault(reward_model, weakref.WeakKeyDictionary())
    known = of_both.setdefault(model, {})
    head = known.setdefault(kind, FittedHead())
    return *known.setdefault((kind, shape), (Costs(), Survival())), head


def choose_speculation(
    asked: int | str | bool, call: Call, drafter: Drafter | None
) -> Speculation | None:
    """What a call speculates with; None where it is not asked for, or not possible (with a warning
    that says why, where a number of tokens or a drafter was given)."""
    fixed = not isinstance(asked, str)
    if isinstance(call.scorer, SiblingScorer):
        call.scorer.ahead = 1  # it may be the user's, and have served another call
    if asked is False or asked == 1:
        return None
    reason = _why_not(call)
    if reason is not None:
        if fixed or drafter is not None:
            warnings.warn(f"no speculation: {reason}", stacklevel=4)
        return None
    if not fixed and (why := _why_not_by_itself(call, drafter)) is not None:
        if drafter is not None:
            warnings.warn(f"no speculation: {why}; pass speculate=4 to have it", stacklevel=4)
        return None
    batch, k = len(call.policy.seeds), call.policy.k
    most = int(asked) if fixed else min(LONGEST, CANDIDATES // (batch * k))
    call.scorer.ahead = most  # type: ignore[attr-defined]
    # What reaches behind a row's end must not make a cache grow, whose tensors a graph knows.
    if isinstance(call.source, CachedLogits):
        call.source.forward.capacity += most
    else:  # the language model goes ahead in the scorer's cache
        call.graph = None
    longest = call.reward_prompt[0].shape[1] + call.plan.steps + most
    call.scorer.capacity = max(call.scorer.capacity, longest)  # type: ignore[attr-defined]
    rm = call.scorer.rm  # type: ignore[attr-defined]
    view = call.source.view  # type: ignore[attr-defined]
    on = view.device, view.dtype, rm.dtype, torch.get_num_threads()
    kind = type(call.scorer), view.vocab_size, on
    if drafter is None and not fixed and view.dtype is torch.float32:
        # (In bf16 a forward of several tokens rounds otherwise than one of each.)
        drafter = SuffixDrafter()
    learnt = learnt_of(rm.model, view.model, kind, (batch, k))
    return Speculation(most, fixed, *learnt, view.vocab_size, drafter)


def _why_not(call: Call) -> str | None:
    """What in a call takes one token at a time."""
    if not isinstance(call.source, (CachedLogits, JointLogits)):
        return "the language model does not run on a cache of its own"
    if type(call.scorer) not in (TreeScorer, JointScorer) or not call.scorer.fused:  # type: ignore[attr-defined]
        kind = getattr(call.scorer, "method", type(call.scorer).__name__)
        return f"rewards by {kind!r} are of one position at a time"
    if call.policy.schedule is not None or call.policy.kl_budget is not None:
        return "beta_schedule= and kl_budget= set beta at one step at a time"
    if call.policy.over != "lm" or call.policy.top_p is not None:
        return "k=None, candidates='sum' and guided_top_p= take in the rewards of a step as a whole"
    if call.record.wants_logits:
        return "output_scores and output_logits are wanted of every step"
    if call.streamer is not None and len(call.policy.seeds) > 1:
        return "a streamer takes a token of every row at a time"
    if call.plan.synced_gpus:
        return "synced_gpus=True counts the other ranks' steps"
    batch = len(call.policy.seeds)
    criteria = [type(c) for c in call.criteria]
    if call.plan.foreign and batch > 1 and not set(criteria) <= set(OF_EACH_ROW):
        return f"the stopping criterion {call.plan.foreign} may count the rows"
    for processor in call.processors:
        if type(processor) not in (*ROW_BY_ROW, *SCORES_ALONE):
            return f"the logits processor {type(processor).__name__} may look at the step"
    return None


def _why_not_by_itself(call: Call, drafter: Drafter | None) -> str | None:
    """Why speculation is left out where nobody asks for a number of tokens."""
    if call.graph is not None or call.policy.seeds.device.type != "cpu":
        return "it is not captured in a CUDA graph, and that pays more"
    if len(call.policy.seeds) * call.policy.k > CANDIDATES // 2:
        return "so many candidates take their time in arithmetic, which rounds do not save"
    if call.policy.prune and call.policy.reward_range is not None:
        return "reward_range leaves few candidates to score"
    if drafter is None and isinstance(call.scorer, JointScorer):
        return "a token costs the language model's own forward alone, which only guesses save"
    if drafter is None and _weight_bytes(call.source.view) < SMALL:  # type: ignore[attr-defined]
        return "the language model is so small that its forwards are not what takes the time"
    if call.scorer.compiled is not None:  # type: ignore[attr-defined]
        return "compile=True compiles forwards of one position"
    return None


def _weight_bytes(view: LanguageModel) -> int:
    """Of all the language model's weights."""
    return sum(p.nbytes for p in view.model.parameters())
