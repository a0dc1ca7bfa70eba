"""Contrastive twist learning: rewards of prefixes that make them as likely as under the target."""

from __future__ import annotations

from torch import Tensor


def contrastive_twist_loss(
    twists: Tensor, mask: Tensor, rewards: Tensor, *, beta: float = 1.0
) -> Tensor:
    """Loss of log-twists of prefixes on K samples of the base policy for each of N prompts.

    The twist ψ of a prefix is to make π(y[1:t]) ψ(y[1:t]) proportional to the marginals of the
    target σ(y) ∝ π(y) exp(beta R(y)) at every length t. The gradient of contrastive twist learning
    (arXiv 2404.17546) is, with `twists` = log ψ::

        -E_σ[∇ log ψ(y[1:t])] + E_{πψ}[∇ log ψ(y[1:t])]

    Both expectations are taken over the K samples by self-normalised importance weights,
    softmax(beta R) and softmax(log ψ(y[1:t])) over K, so that the loss is the cross-entropy between
    the two: mean over prompts and over t = 1 .. the longest sample's length, a shorter one being
    held at its end. The optimal log ψ is beta times the soft value, up to a number for each length.
    With K = 2, beta = 1 and preferences drawn from softmax(R) in the place of R this is
    `prefix_bt_loss`: Bradley-Terry at every prefix is contrastive twist learning from labels.

    Args:
        twists: [N, K, T] log ψ after each token, right-padded, of any float dtype.
        mask: [N, K, T], 1 = real token, ones from position 0 on.
        rewards: [N, K] of the whole samples.

    Returns a scalar. Raises `ValueError` for shapes that do not fit, and for an empty sample.
    """
    if twists.dim() != 3 or mask.shape != twists.shape or rewards.shape != twists.shape[:2]:
        raise ValueError(
            f"twists has shape {list(twists.shape)}, mask {list(mask.shape)} and rewards "
            f"{list(rewards.shape)}; pass [N, K, T], [N, K, T] and [N, K]"
        )
    lengths = mask.long().sum(-1)
    if not bool((lengths > 0).all()):
        raise ValueError("mask has a sample without tokens; leave it out")
    at = lengths.new_tensor(range(twists.shape[-1]))
    held = twists.gather(-1, at.expand(twists.shape).minimum(lengths[..., None] - 1))
    target = (beta * rewards.to(twists.dtype)).softmax(1)[..., None]
    each = held.logsumexp(1) - (target * held).sum(1)  # [N, T]
    counted = (at < lengths.amax(1, keepdim=True)).to(each.dtype)
    return ((each * counted).sum(-1) / counted.sum(-1)).mean()
