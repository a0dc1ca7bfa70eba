"""Warpers on the most likely tokens alone: the same candidates as Hugging Face's on whole rows."""

import math

import pytest
import tiny
import torch
import transformers as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rgtg_fast
from rgtg_fast import ops
from rgtg_fast.decode import warpers
from rgtg_fast.decode.warpers import LastTopK, Reach, Warpers, trailing

INF = float("inf")
over = pytest.mark.parametrize
WARPERS = {
    "top_k": tf.TopKLogitsWarper,
    "top_p": tf.TopPLogitsWarper,
    "min_p": tf.MinPLogitsWarper,
    "typical": tf.TypicalLogitsWarper,
    "epsilon": tf.EpsilonLogitsWarper,
    "eta": tf.EtaLogitsWarper,
}
VALUES = {
    "top_k": st.integers(1, 80),
    "top_p": st.sampled_from([0.0, 1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.999, 1.0]),
    "min_p": st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.999, 1.0]),
    "typical": st.sampled_from([0.05, 0.2, 0.5, 0.9, 0.95, 0.9999]),
    "epsilon": st.sampled_from([1e-4, 0.01, 0.1, 0.5, 0.9]),
    "eta": st.sampled_from([1e-4, 0.01, 0.1, 0.5, 0.9]),
}


def topk(scores, k):
    return torch.ops.rgtg_fast.topk_logprobs(scores, k)


def whole_row(processors, scores, k):
    """Hugging Face's way."""
    return topk(processors(None, scores.float()), k)


def assert_same(got, want):
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5, equal_nan=True)


@st.composite
def rows(draw):
    """Scores [B, V]: peaked or flat, with ties, with tokens that are ruled out, with bad rows."""
    batch = draw(st.integers(1, 5))
    vocab = draw(st.sampled_from([1, 2, 7, 40, 64, 65, 100, 700, 9000]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0]))
    scores = torch.randn(batch, vocab, generator=g) * spread
    kind = draw(st.sampled_from(["as it is", "ties", "few levels", "bf16", "fp16", "fp64"]))
    if kind == "ties":
        scores = (scores * 4).round() / 4
    elif kind == "few levels":
        scores = scores.round().clamp(-1, 2)
    elif kind != "as it is":
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
        scores = scores.to(kinds[kind])
    if draw(st.booleans()):
        scores[torch.rand(scores.shape, generator=g) < draw(st.sampled_from([0.1, 0.9]))] = -INF
    if draw(st.booleans()):
        scores[-1, vocab // 2] = draw(st.sampled_from([INF, float("nan"), 40.0]))
    if draw(st.booleans()):
        scores[0] = -INF
    return scores, draw(st.integers(1, min(vocab, 64)))


@st.composite
def chains(draw):
    names = draw(st.lists(st.sampled_from(list(WARPERS)), min_size=1, max_size=4))
    if draw(st.booleans()):
        names = [n for n in WARPERS if n in names]  # in the order of `generate`
    return tf.LogitsProcessorList([WARPERS[n](draw(VALUES[n])) for n in names])


@settings(max_examples=600, deadline=None, derandomize=True)
@given(case=rows(), chain=chains())
def test_candidates_are_those_of_the_whole_row(case, chain):
    scores, k = case
    given = scores.clone()
    before, last = trailing(chain, 100, vocab_size=10**6, look=True)
    assume(last is not None)
    try:
        want = whole_row(chain, scores, k)
    except ValueError:  # eta's, of a row with a NaN or without a token
        with pytest.raises(ValueError, match="distribution Categorical"):
            last(before(None, scores.float()), k, topk)
        return
    assert_same(last(before(None, scores.float()), k, topk), want)
    torch.testing.assert_close(scores, given, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=rows(), beyond=st.integers(0, 63))
def test_top_k_alone_counts_the_ties_out_of_reach(case, beyond):
    scores, k = case
    top_k = min(64, k + beyond)
    chain = tf.LogitsProcessorList([tf.TopKLogitsWarper(top_k)])
    assert_same(LastTopK(top_k)(scores, k, topk), whole_row(chain, scores, k))


def test_ties_out_of_reach_share_the_mass():
    """300 tokens tie with the 50th: all are kept, and each has its part."""
    scores = torch.zeros(1, 400)
    scores[0, :20] = 3.0
    scores[0, 320:] = -1.0
    logprobs, ids = LastTopK(50)(scores, 10, topk)
    want = torch.tensor(3.0 - math.log(20 * math.exp(3) + 300))
    assert ids.tolist() == [list(range(10))]
    torch.testing.assert_close(logprobs, want.expand(1, 10))


def proofs(monkeypatch):
    """Per call: which rows were proved."""
    seen, best = [], Reach.best
    monkeypatch.setattr(
        Reach, "best", lambda self, *a: seen.append(self.proved.tolist()) or best(self, *a)
    )
    return seen


SURE = {
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "epsilon": {"epsilon": 0.02},
    "all": {
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.02,
        "typical": 0.8,
        "epsilon": 1e-3,
        "eta": 0.01,
    },
}


@over("name", SURE)
def test_most_rows_of_a_peaked_model_are_proved(name, monkeypatch):
    """As peaked as a trained model, 0.9 nats; Hugging Face is not asked at all for most."""
    seen = proofs(monkeypatch)
    scores = torch.randn(60, 50_257, generator=torch.Generator().manual_seed(0)) * 10
    chain = tf.LogitsProcessorList([WARPERS[n](v) for n, v in SURE[name].items()])
    assert_same(Warpers(chain)(scores, 10, topk), whole_row(chain, scores, 10))
    (proved,) = seen
    assert sum(proved) >= 50


@over(
    ("what", "chain", "scores"),
    [
        ("not within reach", [tf.TopPLogitsWarper(0.9)], torch.zeros(9000)),
        ("tied at the cut", [tf.TopPLogitsWarper(0.6)], [2.0, 1.0, 1.0, *[-20.0] * 97]),
        ("at the threshold", [tf.TopPLogitsWarper(0.5)], [0.6931472, 0.0, -0.0001, *[-20.0] * 97]),
        ("at the threshold", [tf.MinPLogitsWarper(0.5)], [0.6931472, 0.0, *[-20.0] * 98]),
        # Of p = .5, .3, .2 the second is the most typical, and with the first has .8 of the mass.
        (
            "at the threshold",
            [tf.TopKLogitsWarper(3), tf.TypicalLogitsWarper(0.8)],
            [math.log(0.5), math.log(0.3), math.log(0.2), *[-20.0] * 97],
        ),
        ("beyond reach", [tf.TopKLogitsWarper(70)], torch.arange(100) / 10),
        ("a NaN", [tf.TopPLogitsWarper(0.5)], [float("nan"), 0.0, *[-20.0] * 98]),
        ("no token", [tf.TopPLogitsWarper(0.5)], [-INF] * 100),
    ],
)
def test_a_row_in_doubt_is_done_in_hugging_faces_way(what, chain, scores, monkeypatch):
    seen = proofs(monkeypatch)
    sure = torch.tensor([4.0, 0.0, -15.0, *[-20.0] * 97])
    doubtful = torch.as_tensor(scores)
    if len(doubtful) > 100:
        sure = torch.cat([sure, torch.full((len(doubtful) - 100,), -30.0)])
    if what == "beyond reach":
        sure = doubtful
    both = torch.stack([sure, doubtful])
    chain = tf.LogitsProcessorList(chain)
    assert_same(Warpers(chain)(both, 5, topk), whole_row(chain, both, 5))
    assert seen == [[what != "beyond reach", False]]


def test_a_row_does_not_depend_on_the_rows_around_it():
    g = torch.Generator().manual_seed(3)
    scores = torch.randn(12, 9000, generator=g) * torch.linspace(0, 6, 12)[:, None]
    chain = Warpers(tf.LogitsProcessorList([tf.TopPLogitsWarper(0.9)]))
    logprobs, ids = chain(scores, 6, topk)
    for row in range(12):
        alone = chain(scores[row : row + 1], 6, topk)
        assert torch.equal(alone[0][0], logprobs[row]) and torch.equal(alone[1][0], ids[row])


TOP_K, TOP_P = tf.TopKLogitsWarper(50), tf.TopPLogitsWarper(0.9)
TYPICAL, PENALTY = tf.TypicalLogitsWarper(0.9), tf.RepetitionPenaltyLogitsProcessor(1.2)
FIVE = tf.TopKLogitsWarper(5)


class Mine(tf.TopPLogitsWarper):
    pass


@over(
    ("given", "look", "vocab", "moved", "kind"),
    [
        ([], True, 50_000, 0, None),
        ([TOP_K], True, 50_000, 1, LastTopK),
        ([TOP_K], False, 100, 1, LastTopK),
        ([tf.TopKLogitsWarper(64)], True, 50_000, 1, LastTopK),
        ([tf.TopKLogitsWarper(65)], True, 50_000, 0, None),
        ([FIVE], True, 50_000, 1, Warpers),
        ([FIVE], False, 50_000, 0, None),
        ([PENALTY, TOP_K], False, 50_000, 1, LastTopK),
        ([TOP_K, PENALTY], True, 50_000, 0, None),
        ([TOP_K, TOP_P], True, 50_000, 2, Warpers),
        ([TOP_K, TOP_P], False, 50_000, 0, None),
        ([TOP_K, TOP_P], True, 1000, 0, None),
        ([TOP_P, TOP_K], True, 1000, 1, LastTopK),
        ([TYPICAL], True, 50_000, 0, None),
        ([TYPICAL, TOP_P], True, 50_000, 1, Warpers),
        ([PENALTY, TOP_K, TYPICAL], True, 50_000, 2, Warpers),
        ([Mine(0.9)], True, 50_000, 0, None),
        ([tf.TopPLogitsWarper(0.9, min_tokens_to_keep=2)], True, 50_000, 0, None),
        ([tf.TopPLogitsWarper(0.9, filter_value=-1e4)], True, 50_000, 0, None),
        ([TOP_P, tf.LogitNormalization()], True, 50_000, 0, None),
    ],
)
def test_which_warpers_need_no_whole_row(given, look, vocab, moved, kind):
    whole, last = trailing(tf.LogitsProcessorList(given), 10, vocab, look)
    assert isinstance(whole, tf.LogitsProcessorList)
    assert list(whole) == given[: len(given) - moved]
    assert last is None if kind is None else type(last) is kind


def run(lm, **options):
    common = {"k": 6, "beta": 1.5, "max_new_tokens": 8, "seed": 3, "output_candidates": True}
    common |= {"return_dict_in_generate": True, "do_sample": True, **tiny.prompts(5, 9, 3)}
    common |= {"speculate": False}
    return rgtg_fast.generate(lm, reward_model=tiny.llama_rm(), **(common | options))


@over(
    "options",
    [
        {},  # Hugging Face's own default: top_k=50
        {"top_k": 0, "top_p": 0.5},
        {"top_p": 0.6, "min_p": 0.01, "repetition_penalty": 1.3},
        {"top_k": 4, "typical_p": 0.9, "eta_cutoff": 0.01},
        {"top_p": 0.5, "temperature": 0.7, "num_return_sequences": 3},
    ],
    ids=lambda o: "-".join(o) or "default",
)
def test_outputs_are_those_of_whole_rows(options, monkeypatch):
    lm = tiny.llama_lm()
    with torch.no_grad():
        lm.lm_head.weight *= 30  # peaked
    used = []
    for kind in (LastTopK, Warpers):
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda *a, c=call: used.append(1) or c(*a))
    monkeypatch.setattr(warpers, "LARGE", 0)
    got = run(lm, **options)
    assert len(used) == 8
    monkeypatch.setattr("rgtg_fast.guided.trailing", lambda processors, *_: (processors, None))
    want = run(lm, **options)
    assert len(used) == 8 and (want.candidate_logprobs == -INF).any() == bool(options)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.candidate_ids, want.candidate_ids)
    close = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
    for name in ("candidate_logprobs", "candidate_rewards", "rewards", "kl"):
        torch.testing.assert_close(got[name], want[name], **close)


def test_scores_that_are_asked_for_are_warped_in_whole_rows(monkeypatch):
    monkeypatch.setattr(warpers, "LARGE", 0)
    out = run(tiny.llama_lm(), output_scores=True, top_p=0.5)
    assert (out.scores[0] == -INF).any()


def test_ops_are_asked_once(monkeypatch):
    """Hugging Face's default top_k=50 costs no second top-k, and no copy of the logits in fp32."""
    seen = []
    kernel = ops.kernel

    def counting(op, *a):
        found = kernel(op, *a)
        if op != "topk_logprobs":
            return found
        return lambda scores, k: seen.append((scores.dtype, k)) or found(scores, k)

    monkeypatch.setattr(ops, "kernel", counting)
    monkeypatch.setattr(torch, "topk", lambda *a: pytest.fail("a second top-k"))
    lm = tiny.llama_lm().bfloat16()
    run(lm)
    assert set(seen) == {(torch.bfloat16, 50)} and len(seen) == 8
