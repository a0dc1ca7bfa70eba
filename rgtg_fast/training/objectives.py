"""The reward models of the literature, each as `batch -> loss, rewards of every prefix`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import prefix_bt_loss
from .forward import TrainedParts
from .sequencematch import grown, match_loss
from .trees import batch_trees

Batch = dict[str, Tensor]


class Scored(NamedTuple):
    """`loss` scalar; `rewards` [N, 2, T] (pairs) or [N, T] (labelled texts), column i for the
    prefix of i + 1 answer tokens, meaningful up to the answer's length, without gradient."""

    loss: Tensor
    rewards: Tensor | None


def answer_columns(x: Tensor, start: Tensor, width: int, shift: int = 0) -> Tensor:
    """Columns start + shift ... of x [N, .., L] or [N, .., L, H] for `width` answer tokens."""
    at = start[:, None] + shift + torch.arange(width, device=x.device)
    sides = x.dim() - 2 - (x.dim() == 4)
    at = at.view(at.shape[0], *[1] * sides, width).clamp(0, x.shape[1 + sides] - 1)
    if x.dim() == 4:
        at = at[..., None].expand(*x.shape[:2], -1, x.shape[-1])
        return x.gather(2, at)
    return x.gather(-1, at.expand(*x.shape[:-1], -1))


def _pair_hidden(parts: TrainedParts, batch: Batch) -> Tensor:
    """Hidden states [N, 2, L, H] of both answers of N pairs, from one forward of 2N rows."""
    ids = batch["input_ids"]
    hidden = parts.hidden(ids.flatten(0, 1), batch["attention_mask"].flatten(0, 1))
    return hidden.view(*ids.shape, hidden.shape[-1])


def _lengths(batch: Batch) -> Tensor:
    return batch["answer_mask"].sum(-1)


def _width(batch: Batch) -> int:
    return batch["answer_mask"].shape[-1]


def _margin(batch: Batch, args: Any) -> Tensor | float | None:
    return batch.get("margin", args.margin)


def _last_loss(rewards: Tensor, batch: Batch, args: Any) -> Tensor:
    """Bradley-Terry on rewards [N, 2] of whole answers."""
    one = torch.ones_like(rewards[:, :1], dtype=torch.bool)
    return prefix_bt_loss(
        rewards[:, :1],
        rewards[:, 1:],
        one,
        one,
        margin=_margin(batch, args),
        label_smoothing=args.label_smoothing,
        centering=args.centering,
    )


def _prefix_loss(rewards: Tensor, batch: Batch, args: Any) -> Tensor:
    """Bradley-Terry on rewards [N, 2, T] of every prefix."""
    mask = batch["answer_mask"]
    return prefix_bt_loss(
        rewards[:, 0],
        rewards[:, 1],
        mask[:, 0],
        mask[:, 1],
        first=args.first,
        weights=args.weights,
        margin=_margin(batch, args),
        label_smoothing=args.label_smoothing,
        centering=args.centering,
        extension=args.extension,
    )


def _at_end(rewards: Tensor, batch: Batch) -> Tensor:
    """Rewards [N, 2] of the whole answers out of rewards [N, 2, T] of their prefixes."""
    return rewards.gather(-1, _lengths(batch)[..., None] - 1)[..., 0]


def prefix(parts: TrainedParts, batch: Batch, args: Any, step: int | None) -> Scored:
    """Bradley-Terry at every prefix (arXiv 2406.07780), or, with `loss_type="full"`, at the end."""
    rewards = parts.scalar(_pair_hidden(parts, batch))  # [N, 2, L]
    rewards = answer_columns(rewards, batch["start"], _width(batch))
    if args.loss_type == "full":
        return Scored(_last_loss(_at_end(rewards, batch), batch, args), rewards.detach())
    return Scored(_prefix_loss(rewards, batch, args), rewards.detach())


def farma(parts: TrainedParts, batch: Batch, args: Any, step: int | None) -> Scored:
    """FaRMA (arXiv 2502.04517): R(y_i | y_<i) is row y_i of a head over the vocabulary.

    Blocks of `alternate` steps take turns: Bradley-Terry on the last token's R, and the mean over
    the chosen answer's proper prefixes of (R(y_i | y_<i) - max_v R(v | y_<=i))², v over the whole
    vocabulary, with the gradient through both terms, as the authors' code has it. Evaluation
    (`step=None`) adds the two.

    The authors' runs start from a language model and its own output head. Bradley-Terry does not
    fix the level of R(EOS): where a token that never follows has a larger R, as after a start from
    zeros, the ends' rewards never reach the prefixes, and the loss is least with all prefixes
    alike. They take an epoch of each loss in turn, first and last of Bradley-Terry, each with a new
    optimiser (here: one for both), on prefixes of 11 tokens and more (`first=11`) of answers
    without EOS (here: with it).
    """
    phase = None if step is None else (step // args.alternate) % 2
    if phase == 1:
        return Scored(_consistency(parts, batch, args.first), None)
    hidden = _pair_hidden(parts, batch)
    width = _width(batch)
    before = answer_columns(hidden, batch["start"], width, shift=-1)
    rewards = parts.token(before, answer_columns(batch["input_ids"], batch["start"], width))
    loss = _last_loss(_at_end(rewards, batch), batch, args)
    if phase is None:
        loss = loss + _consistency(parts, batch, args.first)
    return Scored(loss, rewards.detach())


def _consistency(parts: TrainedParts, batch: Batch, first: int) -> Tensor:
    ids = batch["input_ids"][:, 0]
    hidden = parts.hidden(ids, batch["attention_mask"][:, 0])[:, None]  # [N, 1, L, H]
    lengths, start = _lengths(batch)[:, 0], batch["start"]
    width = int(lengths.max())
    at = torch.arange(width, device=ids.device)
    goes_on = (at < lengths[:, None] - 1) & (at >= first - 1)  # [N, T]
    before = answer_columns(hidden, start, width, shift=-1)[:, 0][goes_on]
    after = answer_columns(hidden, start, width)[:, 0][goes_on]
    if before.shape[0] == 0:
        return hidden.sum() * 0.0
    rewards = parts.token(before, answer_columns(ids, start, width)[goes_on])
    return F.mse_loss(rewards, parts.best_token(after))


def answer_logprobs(parts: TrainedParts, batch: Batch) -> Tensor:
    """log p(y_t | x, y_<t) [N, 2, T] of the answers' tokens under a causal LM, from one forward of
    2N rows; without meaning behind an answer's end."""
    ids, start = batch["input_ids"], batch["start"]
    # This waits for the device, which has no work yet, and saves the logits of the shortest prompt.
    first = max(int(start.min()), 1)
    logprobs = parts.token_logprobs(
        ids.flatten(0, 1), batch["attention_mask"].flatten(0, 1), first
    ).view(*ids.shape[:2], -1)
    return answer_columns(logprobs, start - first, _width(batch))


def genarm(parts: TrainedParts, batch: Batch, args: Any, step: int | None) -> Scored:
    """GenARM (arXiv 2410.08193): r(y) = beta Σ_t log p(y_t | x, y_<t), Bradley-Terry at the end."""
    rewards = args.beta * answer_logprobs(parts, batch).cumsum(-1)
    return Scored(_last_loss(_at_end(rewards, batch), batch, args), rewards.detach())


def genarm_prefix(parts: TrainedParts, batch: Batch, args: Any, step: int | None) -> Scored:
    """The autoregressive reward of `genarm` under the loss of `prefix`: Bradley-Terry at every
    prefix length, and at the end, with weights prefix_share and 1 - prefix_share.

    At one length both prefixes have the same number of log-probs, so what every token has in common
    costs nothing; a shorter answer keeps the sum of its own tokens behind its end. The parts are of
    arXiv 2410.08193 and 2406.07780; no publication of the combination is known.
    """
    rewards = args.beta * answer_logprobs(parts, batch).cumsum(-1)
    share = args.prefix_share
    loss = share * _prefix_loss(rewards, batch, args)
    loss = loss + (1 - share) * _last_loss(_at_end(rewards, batch), batch, args)
    return Scored(loss, rewards.detach())


def seq2seq(parts: TrainedParts, batch: Batch, args: Any, step: int | None) -> Scored:
    """Sequence to sequence (arXiv 2409.00162): of the chosen answer's tokens behind prompt, draft
    and separator, the mean of -log p, the draft being the rejected answer or the chosen one itself.

    The mean is over all tokens of the batch. With `step=None`, a token's reward is its log-prob
    with its own whole answer as the draft, so that a prefix is judged by what comes behind it too.
    (Of these the paper makes signs, for PPO: + up to where the rewriting parts from the draft, and
    - at tokens that are not its most likely ones from there.)
    """
    chosen, rejected = 0, 1
    logprobs, lengths = _rewritten(parts, batch, [chosen, rejected], [chosen, chosen])
    loss = -logprobs.sum() / lengths.sum()
    if step is not None:
        return Scored(loss, None)
    kept, _ = _rewritten(parts, batch, [chosen, rejected], [chosen, rejected])
    return Scored(loss, kept.detach().cumsum(-1))


def _rewritten(
    parts: TrainedParts, batch: Batch, drafts: list[int], targets: list[int]
) -> tuple[Tensor, Tensor]:
    """Log-probs [N, S, T] of the answers on sides `targets` as rewritings of those on `drafts`, 0
    behind an answer's end, and the answers' lengths [N, S]."""
    ids, start = batch["input_ids"], batch["start"][:, None]
    lengths, cut = _lengths(batch)[:, targets], batch["draft_lengths"][:, drafts]
    at = start + cut  # [N, S], the separator's place
    ends = at + 1 + lengths
    places = torch.arange(int(ends.max()), device=ids.device)
    behind = places - at[..., None] - 1  # [N, S, L'], of the rewriting
    of_draft = ids[:, drafts].gather(-1, places.clamp(max=ids.shape[-1] - 1).expand(behind.shape))
    of_target = ids[:, targets].gather(-1, (behind + start[..., None]).clamp(0, ids.shape[-1] - 1))
    rows = of_draft.where(behind < 0, of_target)
    rows = rows.where(behind != -1, batch["separator"][:, None, None])
    mask = (places < ends[..., None]).long()
    first = int(at.min()) + 1
    logprobs = parts.token_logprobs(rows.flatten(0, 1), mask.flatten(0, 1), first)
    within = torch.arange(_width(batch), device=ids.device)
    own = (at + 1 - first)[..., None] + within
    own = own.clamp(max=logprobs.shape[-1] - 1)
    picked = logprobs.view(*rows.shape[:2], -1).gather(-1, own)
    return picked.masked_fill(within >= lengths[..., None], 0.0), lengths


def rad(parts: TrainedParts, batch: Batch, args: Any, step: int | None) -> Scored:
    """RAD (arXiv 2310.09520): squared error of every prefix's reward to the text's label, or to the
    prefix's own target, prefix i weighted by i (`weights="linear"`) or alike, mean over texts."""
    hidden = parts.hidden(batch["input_ids"], batch["attention_mask"])
    rewards = answer_columns(parts.scalar(hidden), batch["start"], _width(batch))  # [N, T]
    at = torch.arange(rewards.shape[-1], device=rewards.device)
    weight = (batch["answer_mask"] * (at >= args.first - 1)).to(rewards.dtype)
    if args.weights == "linear":
        weight = weight * (at + 1)
    target = batch["targets"] if "targets" in batch else batch["target"][:, None]
    error = (rewards - target.to(rewards.dtype)) ** 2
    per_text = (error * weight).sum(-1) / weight.sum(-1).clamp(min=1)
    return Scored(per_text.mean(), rewards.detach())


def copg_loss(log_ratio: Tensor, scores: Tensor, beta: float) -> Tensor:
    """Minus CoPG's objective (arXiv 2406.19185, eqs. 7 to 9 in the mean of eq. 17), which the paper
    maximises, of pairs of answers y, y' to one prompt:

        l(y, y') = (R_{β/2}(y) - R_{β/2}(y')) ln(π(y)/π_ref(y))
                 + (R_{β/2}(y') - R_{β/2}(y)) ln(π(y')/π_ref(y')),
        R_{β/2}(y) = R(y) - β/2 ln(π(y)/π_ref(y)),

    whose maximum over π, whatever the answers were drawn from, is π_ref(y) exp(R(y)/β) / Z.
    `log_ratio` [N, 2] is ln(π/π_ref) of whole answers, `scores` [N, 2] is R; a scalar.
    """
    regularised = scores - beta / 2 * log_ratio
    gap = regularised[:, 0] - regularised[:, 1]
    return -(gap * log_ratio[:, 0] - gap * log_ratio[:, 1]).mean()


def copg(parts: TrainedParts, batch: Batch, args: Any, step: int | None) -> Scored:
    """`copg_loss` of the language model under training, π_ref being what it began as; the rewards
    are β ln(π/π_ref) of the prefixes."""
    log_ratio = answer_logprobs(parts, batch) - batch["reference"]
    log_ratio = log_ratio.masked_fill(batch["answer_mask"] == 0, 0.0)
    loss = copg_loss(log_ratio.sum(-1), batch["scores"], args.beta)
    return Scored(loss, args.beta * log_ratio.detach().cumsum(-1))


def distill(parts: TrainedParts, batch: Batch, args: Any, step: int | None) -> Scored:
    """KL(q || π) of the guided policy q, known over its candidates at every step of its answers,
    from the language model π under training: the sum over an answer's steps, mean over answers."""
    start, logq = batch["start"], batch["candidate_logprobs"]
    first = max(int(start.min()), 1)
    logits = parts.next_logits(batch["input_ids"], batch["attention_mask"], first)[:, None]
    logits = answer_columns(logits, start - first, _width(batch))[:, 0]  # [N, T, V]
    logprobs = logits.gather(-1, batch["candidate_ids"]) - logits.logsumexp(-1, keepdim=True)
    possible = logq > -torch.inf
    # 0 (log 0 - x) would be NaN.
    gap = (logq - logprobs).masked_fill(~possible, 0.0)
    return Scored((logq.exp() * gap).sum((-1, -2)).mean(), None)


def soft_q(parts: TrainedParts, batch: Batch, args: Any, step: int | None) -> Scored:
    """Soft Q-learning of the rewards of whole texts, TD(λ): Q(y_<t, v) is output row v.

    The target of Q(y_<t, y_t) is the label R at the text's end, and before it
    (1 - λ) V(y_<=t) + λ times the next token's target, without gradient, V being `soft_value` of
    Q under the frozen model that training began with. With λ = 0 and value_beta = b its fixed
    point is (1/b) log E[exp(b R) | y_<=t], so that log π + b Q is the optimal policy at b; this is
    the one-step consistency of arXiv 2106.07704 with π as the measure. value_beta = inf is FaRMA's
    target (arXiv 2502.04517) with the end's reward anchored at R; λ = 1 regresses on R itself.
    """
    ids, mask, start = batch["input_ids"], batch["attention_mask"], batch["start"]
    first = max(int(start.min()), 1)
    q = parts.next_logits(ids, mask, first)  # [N, L - first, V]
    values = soft_value(q.detach(), parts.reference_logprobs(ids, mask, first), args.value_beta)
    chosen = q.gather(-1, ids[:, first:, None])[..., 0]
    chosen, values = (answer_columns(x, start - first, _width(batch)) for x in (chosen, values))
    at = torch.arange(chosen.shape[-1], device=ids.device)
    counted = (at >= args.first - 1) & (start[:, None] + at > 0)  # the text's first token has no Q
    weight = (batch["answer_mask"] * counted).to(chosen.dtype)
    error = (chosen - td_targets(values, batch["target"], _lengths(batch), args.td_lambda)) ** 2
    per_text = (error * weight).sum(-1) / weight.sum(-1).clamp(min=1)
    return Scored(per_text.mean(), chosen.detach())


def soft_value(q: Tensor, logprobs: Tensor, beta: float) -> Tensor:
    """V = (1/beta) log Σ_v π(v) exp(beta q_v) [..] of q and log π [.., V]; at beta = 0 the mean of
    q under π, at infinity its largest entry."""
    if beta == 0:
        return (logprobs.exp() * q).sum(-1)
    if beta == float("inf"):
        return q.amax(-1)
    return (logprobs + beta * q).logsumexp(-1) / beta


def td_targets(values: Tensor, reward: Tensor, lengths: Tensor, decay: float) -> Tensor:
    """Targets [N, T] of the tokens of texts of `lengths` [N]: `reward` [N] for the last one, and
    (1 - decay) times the value of the state that it leads to + decay times the next one's target
    for the others. `values` [N, T] are of the states before each token."""
    targets = [reward.to(values.dtype)]
    for at in range(values.shape[1] - 2, -1, -1):
        after = (1 - decay) * values[:, at + 1] + decay * targets[-1]
        targets.append(torch.where(at >= lengths - 1, targets[0], after))
    return torch.stack(targets[::-1], dim=1)


def sequencematch(parts: TrainedParts, batch: Batch, args: Any, step: int | None) -> Scored:
    """SequenceMatch (arXiv 2306.05426) with the χ²-mixture divergence and a backspace: `match_loss`
    of the batch's answers, with slips, mixed with their likelihood."""
    trees, own = grown(batch, args, parts.rm.vocab_size, step)
    nodes = batch_trees(trees + own, parts.rm.device, parts.rm.dtype)
    first = max(int(batch["start"].min()), 1) - 1
    logits = parts.node_logits(nodes.ids, nodes.mask, nodes.positions, first)
    share = args.match_share if step is None or step >= args.match_after else 0.0
    loss = match_loss(logits, trees, own, first, args.gamma, args.alpha, share)
    return Scored(loss / batch["answer_mask"].sum(), None)


class Objective(NamedTuple):
    score: Callable[[TrainedParts, Batch, Any, int | None], Scored]
    head: str
    data: str
    rewrites: bool = False  # rows hold two answers, a draft and what is made of it
    policy: bool = False  # trains the language model itself, which needs no guide then
    reference: bool = False  # needs the model as it was before training


OBJECTIVES = {
    "prefix": Objective(prefix, "scalar", "pairs"),
    "full": Objective(prefix, "scalar", "pairs"),
    "farma": Objective(farma, "vocab", "pairs"),
    "genarm": Objective(genarm, "vocab", "pairs"),
    "genarm_prefix": Objective(genarm_prefix, "vocab", "pairs"),
    "seq2seq": Objective(seq2seq, "vocab", "pairs", rewrites=True),
    "copg": Objective(copg, "vocab", "pairs", policy=True),
    "distill": Objective(distill, "vocab", "guided", policy=True),
    "sequencematch": Objective(sequencematch, "vocab", "answers", policy=True),
    "rad": Objective(rad, "scalar", "labelled"),
    "soft_q": Objective(soft_q, "vocab", "labelled", reference=True),
}
