"""The matrix of ops and backends: who implements what, and what each op's result must be.

A backend is a name, a device and its ops, which take the arguments of ``torch.ops.rgtg_fast.*``. To
add one, add a row to BACKENDS; to add an op, a function ``check_<op>``.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from op_support import assert_no_worse

from rgtg_fast.ops import reference
from rgtg_fast.ops.reference import OPS

INF, NAN = float("inf"), float("nan")
ROOT = Path(__file__).parents[2]


def written_in(folder, suffix):
    """The ops that have a source file of their own there."""
    return tuple(op for op in OPS if (ROOT / folder / f"{op}{suffix}").exists())


IN_CPP, IN_CUDA = written_in("csrc/cpu", ".cpp"), written_in("csrc/cuda", ".cu")
IN_TRITON = written_in("kernels", ".py")


@dataclass(frozen=True)
class Backend:
    name: str
    device: str
    load: Callable[[], Mapping[str, Callable]]  # imports late: collecting tests must not build
    ops: tuple[str, ...]

    def __call__(self, op, *arguments):
        """The results of ``op``, brought back to the CPU."""
        moved = [carry(a, self.device) for a in arguments]
        got = self.load()[op](*moved)
        got = got if isinstance(got, (tuple, list)) else (got,)
        return tuple(t.cpu() for t in got)


def _reference():
    return OPS


def _compiled():
    return {op: getattr(torch.ops.rgtg_fast, op) for op in IN_CPP}


def _triton():
    importlib.import_module("rgtg_fast.kernels.library")
    return {op: getattr(torch.ops.rgtg_fast_triton, op) for op in IN_TRITON}


def _cuda_emulated():
    return importlib.import_module("cuda_emulated").OPS


BACKENDS = (
    Backend("reference", "cpu", _reference, tuple(OPS)),
    Backend("cpp", "cpu", _compiled, IN_CPP),
    Backend("triton-interpreted", "cpu", _triton, IN_TRITON),
    Backend("cuda-emulated", "cpu", _cuda_emulated, IN_CUDA),
    Backend("reference-gpu", "cuda", _reference, tuple(OPS)),
    Backend("triton-gpu", "cuda", _triton, IN_TRITON),
    Backend("cuda-gpu", "cuda", _compiled, IN_CUDA),
)
# Interpreting, emulating, and compiling anew for every shape take their time.
SLOW = ("triton-interpreted", "cuda-emulated", "triton-gpu")


def backends_of(op, slow=()):
    """Parameters for the tests of ``op``; those on a GPU carry the mark ``gpu``, those named in
    ``slow`` the mark ``slow``."""
    chosen = []
    for backend in BACKENDS:
        if op not in backend.ops:
            continue
        marks = [pytest.mark.gpu] if backend.device == "cuda" else []
        if backend.name in slow:
            marks.append(pytest.mark.slow)
        if backend.name == "triton-interpreted":
            missing = importlib.util.find_spec("triton") is None
            marks.append(pytest.mark.skipif(missing, reason="triton is not installed"))
        chosen.append(pytest.param(backend, id=backend.name, marks=marks))
    return chosen


def crossed(op, values, quick):
    """Parameters for the tests of ``op``: its backends times ``values``. Of these, interpreted
    Triton kernels take those at the places ``quick`` in ``make test``, the others as slow tests."""
    found = []
    for backend in backends_of(op):
        for place, value in enumerate(values):
            value = value if isinstance(value, tuple) else (value,)
            later = backend.id == "triton-interpreted" and place not in quick
            marks = [*backend.marks, *([pytest.mark.slow] if later else [])]
            name = "-".join(str(v).removeprefix("torch.") for v in (*value, backend.id))
            found.append(pytest.param(*backend.values, *value, id=name, marks=marks))
    return found


def carry(value, device):
    """A tensor on ``device`` with the same strides and gaps; other values as they are."""
    if isinstance(value, list):
        return [carry(element, device) for element in value]
    if not isinstance(value, torch.Tensor) or device == "cpu":
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def check_topk_logprobs(backend, logits, k):
    logprobs, ids = backend("topk_logprobs", logits, k)
    order = torch.sort(logits.to(torch.float32), dim=1, descending=True, stable=True)
    want = order.indices[:, :k]
    own = logits if logits.dtype == torch.float64 else logits.float()
    hopeless = torch.isneginf(logits).all(dim=1, keepdim=True)

    def expected(x):
        return torch.where(hopeless, -INF, torch.log_softmax(x, dim=1)).gather(1, want)

    assert logprobs.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(ids, want)
    assert_no_worse(logprobs, expected(own).float(), expected(logits.double()))


def torch_mixture(logits, weights, floor, temperature, dtype):
    """What one writes in torch: scores [B, V], log-probabilities of the first, norm and KL."""
    first = logits[0]
    vocab = first.shape[1]

    def cut(x):
        return torch.nn.functional.pad(x, (0, vocab - x.shape[1]), value=-INF)

    scores, base = torch.zeros(first.shape, dtype=dtype), None
    possible = torch.ones(first.shape).bool()
    for i, x in enumerate(logits):
        own = x.to(torch.promote_types(dtype, x.dtype))
        logprobs = cut(torch.log_softmax(own, dim=1).masked_fill(x == -INF, -INF)).to(dtype)
        used = (weights[:, i : i + 1] != 0).expand(first.shape)
        scores = torch.where(used, scores + weights[:, i : i + 1].to(dtype) * logprobs, scores)
        lacks = cut(x.float()) == -INF
        possible &= ~(used & lacks) if i else ~lacks
        base = logprobs if i == 0 else base
    if floor is not None:
        possible &= ~(first.float() < floor[:, None])
    hopeless = ~possible.any(dim=1)
    spoilt = torch.isnan(scores).all(dim=1)
    scores = torch.where(spoilt[:, None], NAN, torch.where(possible, scores, -INF))
    if temperature is None:
        return scores, base, scores[:, 0][:0], scores[:, 0][:0]
    tempered = scores / temperature[:, None].to(dtype)
    norm = torch.logsumexp(tempered, dim=1)
    logq = torch.where(possible, tempered - norm[:, None], 0.0)
    kl = torch.where(possible, logq.exp() * (logq - base), 0.0).sum(dim=1)
    return scores, base, norm, torch.where(hopeless | spoilt, NAN, kl)


def _mixed_size(logits, weights, temperature):
    """The largest sum of magnitudes in the scores of a mixture: what its terms cancel from."""
    if not len(weights):
        return 1.0
    finite = (x.double()[torch.isfinite(x)].abs() for x in logits)
    largest = max((x.max().item() for x in finite if x.numel()), default=0.0)
    size = (1.0 + weights.abs().sum(dim=1).max().item()) * (largest + 12.0)  # + log V
    return size if temperature is None else size / min(1.0, temperature.min().item())


def check_mix_logits(backend, logits, weights, k, floor=None, temperature=None, *noise):
    """Ids as the reference has them, values no worse than torch's."""
    given = (logits, weights, k, floor, temperature, *noise)
    scores, ids, *others = backend("mix_logits", *given)
    want = reference.mix_logits(*given)
    assert scores.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(ids, want[1])
    exact = torch_mixture(logits, weights, floor, temperature, torch.float64)
    plain = torch_mixture(logits, weights, floor, temperature, torch.float32)
    scale = _mixed_size(logits, weights, temperature)
    for got, own, true in zip(
        (scores, *others),
        (plain[0].gather(1, ids), plain[1].gather(1, ids), *plain[2:]),
        (exact[0].gather(1, ids), exact[1].gather(1, ids), *exact[2:]),
        strict=True,
    ):
        assert got.dtype == torch.float32 and got.shape == true.shape
        if got.numel():
            assert_no_worse(got, own.float(), true, scale)


def check_rewards(got, hidden, weight, bias=None):
    """``hidden`` and ``weight`` broadcast to ``[B, k, H]``."""
    wide = torch.float64 in (hidden.dtype, weight.dtype)
    own = torch.float64 if wide else torch.float32
    offset = torch.zeros(1) if bias is None else bias
    exact = (hidden.double() * weight.double()).sum(dim=-1) + offset.double()
    torch_result = (hidden.to(own) * weight.to(own)).sum(dim=-1) + offset.to(own)
    assert got.dtype == torch.float32 and got.shape == exact.shape
    if got.numel():
        sizes = (hidden.double() * weight.double()).abs().sum(dim=-1) + offset.double().abs()
        finite = sizes[torch.isfinite(sizes)]
        scale = finite.max().item() if finite.numel() else 0.0
        assert_no_worse(got, torch_result.float(), exact, scale)


def check_reward_head(backend, hidden, weight, bias=None):
    (got,) = backend("reward_head", hidden, weight, bias)
    check_rewards(got, hidden, weight, bias)


def check_vocab_reward(backend, hidden, weight, ids):
    (got,) = backend("vocab_reward", hidden, weight, ids)
    check_rewards(got, hidden[:, None], weight[ids])


def check_draw(slot, logq, logprobs, rewards, ids, beta, temperature, *rest):
    want, _ = reference.ratio_sample(logprobs, rewards, ids, beta, temperature, *rest)
    assert slot.dtype == torch.int64 and logq.dtype == torch.float32
    assert torch.equal(slot, want)
    tempered = (logprobs + beta[:, None] * rewards) / temperature[:, None]
    undefined = (want < 0)[:, None]

    def expected(x):
        return torch.where(undefined, NAN, torch.log_softmax(x, dim=1))

    assert_no_worse(logq, expected(tempered), expected(tempered.double()))


def check_ratio_sample(backend, *arguments):
    slot, logq = backend("ratio_sample", *arguments)
    check_draw(slot, logq, *arguments)


def check_ratio_step(backend, logprobs, hidden, weight, *rest):
    """The rewards by the rule, and the draw bit for bit what the two ops give one by one."""
    *policy, bias = rest
    slot, rewards, logq = backend("ratio_step", logprobs, hidden, weight, *policy, bias)
    check_rewards(rewards, hidden, weight, bias)
    (want_rewards,) = backend("reward_head", hidden, weight, bias)
    want_slot, want_logq = backend("ratio_sample", logprobs, want_rewards, *policy)
    assert torch.equal(rewards.view(torch.int32), want_rewards.view(torch.int32))
    assert torch.equal(slot, want_slot)
    assert torch.equal(logq.view(torch.int32), want_logq.view(torch.int32))
    check_draw(slot, logq, logprobs, rewards, *policy)


def check_ratio_keep(backend, *arguments):
    """Bit for bit: what is dropped here must be dropped everywhere."""
    (got,) = backend("ratio_keep", *arguments)
    assert got.dtype == torch.bool
    assert torch.equal(got, reference.ratio_keep(*arguments))


def torch_attention(
    q, k_prefix, v_prefix, k_self, v_self, start, length, scale, window, softcap, rows=None
):
    """What one writes in torch: concatenate, mask, softmax, all in the dtype of q."""
    k = q.shape[1]
    if rows is not None:
        k_prefix, v_prefix = k_prefix[rows], v_prefix[rows]
    group = q.shape[2] // k_prefix.shape[1]

    def all_keys(prefix, own):  # [B, k, Hq, T + 1, D]
        prefix = prefix[:, None].expand(-1, k, -1, -1, -1)
        return torch.cat([prefix, own[:, :, :, None]], dim=3).repeat_interleave(group, dim=2)

    t = torch.arange(k_prefix.shape[2] + 1)
    live = (t >= start[:, None]) & (t < length[:, None])
    if window is not None:
        live &= t > length[:, None] - window
    live[:, -1] = True
    scores = (q[..., None, :] @ all_keys(k_prefix, k_self).mT)[..., 0, :] * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    share = torch.softmax(scores.masked_fill(~live[:, None, None], -INF), dim=-1)
    values = all_keys(v_prefix, v_self)
    values = values.masked_fill(~live[:, None, None, :, None], 0.0)
    return (share[..., None, :] @ values)[..., 0, :]


def check_candidate_attention(backend, *arguments):
    tensors, rest = arguments[:5], arguments[5:]
    (got,) = backend("candidate_attention", *arguments)
    exact = torch_attention(*(t.double() for t in tensors), *rest)
    assert got.dtype == tensors[0].dtype and got.shape == exact.shape
    if got.numel():
        sizes = torch.cat([tensors[2].double().flatten(), tensors[4].double().flatten()]).abs()
        scale = sizes[torch.isfinite(sizes)].max().item()
        assert_no_worse(got, torch_attention(*tensors, *rest), exact, scale)


def torch_prefix_bt_loss(
    chosen, rejected, len_chosen, len_rejected, weights, margin, smoothing, centering, first
):
    """What one writes in torch, by autograd, and the sum of magnitudes in each gradient."""
    rewards = [r.detach().requires_grad_() for r in (chosen, rejected)]
    at = torch.arange(chosen.shape[1])
    held = [torch.minimum(at, n[:, None] - 1).clamp(min=0) for n in (len_chosen, len_rejected)]
    x, y = (r.gather(1, where) for r, where in zip(rewards, held, strict=True))
    live = (at >= first - 1) & (at < torch.maximum(len_chosen, len_rejected)[:, None])
    share = torch.where(live, weights.to(chosen.dtype), 0.0)
    share = share / share.sum(dim=1, keepdim=True)
    gap = x - y - margin.to(chosen.dtype)[:, None]
    right, wrong = (-torch.nn.functional.logsigmoid(sign * gap) for sign in (1, -1))
    each = (1 - smoothing) * right + smoothing * wrong + centering * (x + y) ** 2
    loss = (share * torch.where(live, each, 0.0)).sum(dim=1)
    grads = torch.autograd.grad(loss.sum(), rewards)
    sizes = (share * (smoothing + gap.neg().sigmoid() + 2 * centering * (x + y).abs())).detach()
    sums = [torch.zeros_like(sizes).scatter_add_(1, where, sizes) for where in held]
    return loss.detach(), *grads, *sums


def check_prefix_bt_loss(backend, chosen, rejected, *rest):
    """Finite rewards and pairs with prefixes."""
    own = torch.promote_types(chosen.dtype, torch.float32)
    loss, *grads = backend("prefix_bt_loss", chosen, rejected, *rest)
    torch_results = torch_prefix_bt_loss(chosen.to(own), rejected.to(own), *rest)
    exact = torch_prefix_bt_loss(chosen.double(), rejected.double(), *rest)
    assert loss.dtype == own and loss.shape == exact[0].shape
    assert_no_worse(loss, torch_results[0], exact[0])
    for i, grad in enumerate(grads, 1):
        assert grad.dtype == own and grad.shape == exact[i].shape
        if grad.numel():
            assert_no_worse(grad, torch_results[i], exact[i], exact[i + 2].max().item())


CHECKS = {op: globals()[f"check_{op}"] for op in OPS}
