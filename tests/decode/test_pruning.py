"""Exact pruning: candidates that cannot win go unscored, and the tokens are the same."""

import warnings

import pytest
import tiny
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rgtg_fast
from rgtg_fast import ops
from rgtg_fast.models.selection import Selection
from rgtg_fast.ops import reference

INF, NAN = float("inf"), float("nan")
WAYS = ("fused", "masked")
over = pytest.mark.parametrize


def keep(logprobs, ids, beta, temperature, seed, position, do_sample, low, high, op=None):
    op = op or torch.ops.rgtg_fast.ratio_keep
    return op(logprobs, ids, beta, temperature, seed, position, do_sample, low, high)


def policy(rows, seed=0, **given):
    """Per-row beta, temperature, seeds and positions [B]."""
    g = torch.Generator().manual_seed(seed)
    return {
        "beta": torch.randn(rows, generator=g) * 2,
        "temperature": torch.rand(rows, generator=g) * 2 + 0.1,
        "seed": ops.split_seed(seed, rows),
        "position": torch.arange(rows),
    } | given


@st.composite
def steps(draw):
    rows, k = draw(st.integers(1, 6)), draw(st.integers(1, 64))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.3, 3.0, 1e4]))
    logprobs = torch.log_softmax(torch.randn(rows, k, generator=g) * spread, dim=1)
    if draw(st.booleans()):
        logprobs = logprobs.round()  # ties
    if draw(st.booleans()):
        logprobs[:, k // 2 + 1 :] = -INF
    low = draw(st.sampled_from([-3.0, 0.0, 1e-3, -1e30]))
    high = low + draw(st.sampled_from([1e-3, 1.0, 7.3]))
    ids = torch.randint(0, 200_000, (rows, k), generator=g)
    arguments = {"logprobs": logprobs, "ids": ids, **policy(rows, seed=rows * k)}
    if draw(st.booleans()):
        arguments["beta"][0] = 0.0
    return arguments, draw(st.booleans()), low, high, g


@settings(max_examples=150, deadline=None, derandomize=True)
@given(step=steps())
def test_a_pruned_candidate_wins_for_no_rewards_in_the_range(step):
    arguments, do_sample, low, high, g = step
    kept = keep(**arguments, do_sample=do_sample, low=low, high=high)
    ends = torch.tensor([low, high])
    for trial in range(12):
        share = torch.rand(kept.shape, generator=g)
        rewards = (ends[0] + share * (ends[1] - ends[0])).clamp(low, high)
        if trial < 6:
            rewards = ends[(share > 0.5).long()]
        if trial == 0:  # all that were pruned at their best, all others at their worst
            helps = (arguments["beta"] > 0)[:, None] != kept
            rewards = ends[helps.long()]
        slot, _ = ops.ratio_sample(rewards=rewards, **arguments, do_sample=do_sample)
        won = slot >= 0
        assert kept.gather(1, slot.clamp(min=0)[:, None])[won].all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(step=steps())
def test_what_is_kept_is_the_same_on_both_backends(step):
    arguments, do_sample, low, high, _ = step
    rest = {**arguments, "do_sample": do_sample, "low": low, "high": high}
    assert torch.equal(keep(**rest), keep(**rest, op=reference.ratio_keep))


@over("op", [torch.ops.rgtg_fast.ratio_keep, reference.ratio_keep])
@over("beta", [2.0, -2.0])
def test_greedy_keeps_what_lies_within_beta_times_the_range(op, beta):
    logprobs = torch.tensor([[-0.1, -2.0, -2.2, -9.0]])
    settings = policy(1, beta=torch.tensor([beta]), temperature=torch.tensor([0.7]))
    ids = torch.arange(4)[None]
    kept = keep(logprobs, ids, **settings, do_sample=False, low=0.0, high=1.0, op=op)
    assert kept.tolist() == [[True, True, False, False]]


@over("op", [torch.ops.rgtg_fast.ratio_keep, reference.ratio_keep])
@over("bad", [NAN, INF])
def test_a_row_without_a_valid_choice_is_kept_whole_and_alone(op, bad):
    logprobs = torch.tensor([[-0.1, -50.0, bad], [-0.1, -50.0, -50.0], [-INF, -INF, -INF]])
    ids = torch.arange(3).expand(3, 3).contiguous()
    kept = keep(logprobs, ids, **policy(3), do_sample=True, low=0.0, high=0.1, op=op)
    assert kept.tolist() == [[True] * 3, [True, False, False], [True] * 3]


def test_ratio_keep_passes_opcheck():
    logprobs = torch.log_softmax(torch.randn(2, 5), dim=1)
    arguments = (logprobs, torch.arange(10).view(2, 5), *policy(2).values(), True, -1.0, 1.0)
    torch.library.opcheck(torch.ops.rgtg_fast.ratio_keep.default, arguments)


@over("packs", [True, False])
@over("counts", [(2, 2), (1, 3), (0, 2), (4, 0)])
def test_selection_takes_and_puts_back(packs, counts):
    order = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)).argsort(1)
    kept = order < torch.tensor(counts)[:, None]
    chosen = Selection(kept, packs)
    ids = torch.arange(8).view(2, 4) + 10
    tokens = chosen.take(ids)
    assert chosen.packed == (packs and len(set(counts)) > 1)
    assert tokens.shape == ((1, sum(counts)) if chosen.packed else (2, max(counts)))
    want = ids.float().masked_fill(~kept, NAN)
    torch.testing.assert_close(chosen.put_back(tokens.float()), want, equal_nan=True)


def test_selection_spreads_heads_and_packs_them_again():
    kept = torch.tensor([[True, False, True], [False, True, False]])
    chosen = Selection(kept, packs=True)
    states = torch.randn(1, 2, 3, 4)  # [1, H, N, D]
    wide = chosen.spread(states)
    assert wide.shape == (2, 2, 2, 4)
    assert torch.equal(wide[1, :, 0], states[0, :, 2]) and not wide[1, :, 1].any()
    assert torch.equal(chosen.pack(wide.transpose(1, 2)), states.transpose(1, 2))
    assert chosen.places_of(torch.tensor([2, 1])).tolist() == [1, 0]


def use(monkeypatch, way):
    """Siblings attend by plug-in where the model allows it, or by masks."""
    if way == "masked":
        for module in ("models.attention", "scorers.probe", "models.siblings"):
            monkeypatch.setattr(f"rgtg_fast.{module}.attention_kernel", lambda *_: None)


def guided(lm, rm, prune, **options):
    """The output of a short run with rewards in [-1, 1], all recorded."""
    settings = {
        **zoo.left_pad(zoo.prompts()),
        "max_new_tokens": 10,
        "k": 6,
        "beta": 1.5,
        "do_sample": True,
        "seed": 5,
        "reward_range": (-1.0, 1.0),
        "return_dict_in_generate": True,
        "output_candidates": True,
    } | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rgtg_fast.generate(lm, reward_model=rm, prune=prune, **settings)


def assert_same(lm, rm, **options):
    """Same tokens and rewards with pruning; returns the pruned run."""
    plain, pruned = guided(lm, rm, False, **options), guided(lm, rm, True, **options)
    assert pruned.sequences.tolist() == plain.sequences.tolist()
    close = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True}
    torch.testing.assert_close(pruned.rewards, plain.rewards, **close)
    scored = ~pruned.candidate_rewards.isnan()
    want = plain.candidate_rewards.masked_fill(~scored, NAN)
    torch.testing.assert_close(pruned.candidate_rewards, want, **close)
    running = ~plain.rewards.isnan()
    assert torch.equal(scored.sum(-1)[running], pruned.candidates_scored[running])
    k = plain.candidate_ids.shape[-1]
    assert torch.equal(plain.candidates_scored, running * k)
    assert pruned.candidates_scored.sum() < plain.candidates_scored.sum()
    return pruned


@over("way", [way if way == "fused" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
@over("family", [f for f in zoo.RMS if f not in zoo.NO_TREE])
def test_same_tokens_in_every_family(family, way, monkeypatch):
    use(monkeypatch, way)
    assert_same(zoo.lm("llama"), zoo.rm(family), max_new_tokens=6, reward_method="tree")


@over("family", ["bert", "llama", "mamba"])
def test_same_tokens_when_encoding_again(family):
    assert_same(zoo.lm("llama"), zoo.rm(family), reward_method="reencode", max_new_tokens=5)


MODES = {
    "greedy": {"do_sample": False, "beta": 0.5},
    "negative beta": {"beta": -2.0},
    "beta 0": {"beta": 0.0},
    "per row": {"beta": torch.tensor([0.2, -1.0, 4.0]), "temperature": torch.tensor([1.0, 2, 0.5])},
    "several answers": {"num_return_sequences": 2},
    "one row": zoo.left_pad(zoo.prompts()[:1]),
    "wide range": {"reward_range": (-6.0, 3.5), "beta": 0.4},
    "long": {"max_new_tokens": 40},
}


@over("way", WAYS)
@over("mode", MODES)
def test_same_tokens_in_every_mode(mode, way, monkeypatch):
    use(monkeypatch, way)
    assert_same(zoo.lm("gpt2"), zoo.rm("llama"), **MODES[mode])


ENDS = {"eos_token_id": list(range(3, 20)), "pad_token_id": zoo.PAD, "max_new_tokens": 20}


@over("way", WAYS)
@over("eos_reward", ["hidden", "previous"])
def test_same_tokens_where_rows_end(way, eos_reward, monkeypatch):
    use(monkeypatch, way)
    out = assert_same(zoo.lm("llama"), zoo.rm("llama"), **ENDS, eos_reward=eos_reward)
    ended = out.rewards.isnan()
    assert ended.any() and not out.candidates_scored[ended].any()
    assert out.candidate_rewards[ended].isnan().all()


@over("way", WAYS)
@over("sync_every", [1, 16])
def test_same_tokens_with_compaction_and_rare_looks(way, sync_every, monkeypatch):
    use(monkeypatch, way)
    prompts = zoo.left_pad(zoo.prompts() * 3)
    plain = {"return_dict_in_generate": False, "output_candidates": False}
    for options in ({"compact": False, "sync_every": 1}, {"sync_every": sync_every}):
        runs = [
            guided(zoo.lm("llama"), zoo.rm("llama"), p, **prompts, **ENDS, **plain, **options)
            for p in (False, True)
        ]
        assert runs[0].tolist() == runs[1].tolist()


def test_same_tokens_where_the_vocabulary_is_padded():
    """An id that the reward model does not know counts neither as winner nor as a bound."""
    tok = tiny.tokenizer()
    lm, rm = tiny.llama_lm(vocab_size=tiny.vocab_size() + 60), tiny.llama_rm()
    options = {**tiny.prompts(5, 9), "tokenizer": tok, "reward_tokenizer": tok, "k": 10}
    out = assert_same(lm, rm, **options)
    unknown = out.candidate_ids >= tiny.vocab_size()
    assert unknown.any() and out.candidate_rewards[unknown].isnan().all()


def test_same_tokens_where_texts_are_encoded_again():
    vocab = {c: i for i, c in enumerate(["?", "<pad>", *"abcdefghijklmnopqrstuvwxyz .,;!"])}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    other = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", unk_token="?")
    lm, rm = tiny.llama_lm(), tiny.llama_rm(vocab_size=len(vocab), pad_token_id=1)
    tokenizers = {"tokenizer": tiny.tokenizer(), "reward_tokenizer": other}
    assert_same(lm, rm, **tiny.prompts(5, 9), **tokenizers)


def test_a_sharp_policy_needs_few_rewards():
    out = guided(zoo.lm("llama"), zoo.rm("llama"), True, reward_range=(0.0, 0.5), beta=1.0)
    assert 1 <= out.candidates_scored.float().mean() < 2.5


def test_the_model_sees_only_what_is_kept(monkeypatch):
    """Packed: one row of all kept candidates, the tokens that are counted."""
    use(monkeypatch, "fused")
    seen = []
    rm = zoo.build_rm("llama")
    hook = rm.model.layers[0].mlp.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    guided(zoo.lm("gpt2"), rm, False)
    probes = len(seen) - 11  # and a prompt and ten steps
    assert probes > 0
    seen.clear()
    out = guided(zoo.lm("gpt2"), rm, True)
    hook.remove()
    counts = out.candidates_scored
    assert [shape[0] * shape[1] for shape in seen[1:]] == counts.sum(0).tolist()
    assert (counts.amax(0) > counts.amin(0)).any()


@over("method", ["tree", "expand", "reencode"])
def test_rewards_are_clamped(method):
    """What is chosen and reported is what an oracle makes of the clamped rewards."""
    lm, rm, low, high = zoo.lm("llama"), zoo.rm("llama"), -0.3, 0.4
    free = guided(lm, rm, None, reward_range=None, reward_method=method)
    out = guided(lm, rm, False, reward_range=(low, high), reward_method=method)
    first = free.candidate_rewards[:, 0]
    assert first.min() < low and first.max() > high
    want = first.clamp(low, high)
    torch.testing.assert_close(out.candidate_rewards[:, 0], want)
    arguments = (out.candidate_logprobs[:, 0], want, out.candidate_ids[:, 0])
    slot, _ = ops.ratio_sample(*arguments, 1.5, 1.0, ops.split_seed(5, 3), 0, True)
    chosen = out.candidate_ids[:, 0].gather(1, slot[:, None])
    assert torch.equal(out.sequences[:, 14:15], chosen)
    torch.testing.assert_close(out.rewards[:, 0], want.gather(1, slot[:, None])[:, 0])


def test_a_users_rewards_are_clamped_and_all_asked_for():
    scorer = tiny.CountingScorer(torch.linspace(-5, 5, zoo.VOCAB))
    out = guided(zoo.lm("llama"), scorer, None)
    assert out.candidate_rewards.min() == -1 and out.candidate_rewards.max() == 1
    assert (out.candidates_scored == 6).all() and not out.kl.isnan().any()


def test_kl_is_not_known_where_a_reward_is_not():
    out = guided(zoo.lm("llama"), zoo.rm("llama"), True, beta=4.0)
    some = out.candidates_scored < 6
    assert some.any() and not some.all()
    assert torch.equal(out.kl.isnan(), some)


def test_kl_of_a_greedy_answer_is_known_whatever_was_scored():
    models, greedy = (zoo.lm("llama"), zoo.rm("llama")), {"do_sample": False, "beta": 0.1}
    out = guided(*models, True, **greedy)
    assert (out.candidates_scored < 6).any() and not out.kl.isnan().any()
    whole = guided(*models, False, **greedy)
    assert torch.equal(out.sequences, whole.sequences)
    torch.testing.assert_close(out.kl, whole.kl)


@over(
    ("options", "pruned"),
    [
        ({"output_candidates": False}, True),
        ({"output_candidates": True}, False),
        ({"output_candidates": False, "reward_method": "expand"}, False),
        ({"output_candidates": False, "reward_range": None}, False),
    ],
)
def test_pruned_by_default_where_it_is_possible_and_harmless(options, pruned):
    out = guided(zoo.lm("llama"), zoo.rm("llama"), None, **options)
    assert (out.candidates_scored < 6).any() == pruned


@over("bad", [(1.0, 0.0), (0.0, 0.0), (0.0, INF), (0.0, NAN), (0.0, 1e39), (1.0,), 3.0, "ab"])
def test_a_reward_range_that_is_none_is_an_error(bad):
    with pytest.raises(ValueError, match=r"reward_range=.*two finite numbers"):
        guided(zoo.lm("llama"), zoo.rm("llama"), None, reward_range=bad)


def test_pruning_without_a_range_is_an_error():
    with pytest.raises(ValueError, match=r"pass reward_range=\(lo, hi\)"):
        guided(zoo.lm("llama"), zoo.rm("llama"), True, reward_range=None)


def test_pruning_must_be_yes_no_or_none():
    with pytest.raises(ValueError, match="prune='yes'"):
        guided(zoo.lm("llama"), zoo.rm("llama"), "yes")


@over("scorer", ["user", "expand"])
def test_pruning_a_scorer_that_scores_all_is_an_error(scorer):
    rm = tiny.CountingScorer(torch.ones(zoo.VOCAB)) if scorer == "user" else zoo.rm("llama")
    options = {} if scorer == "user" else {"reward_method": "expand"}
    with pytest.raises(ValueError, match="scores all candidates or none; leave prune out"):
        guided(zoo.lm("llama"), rm, True, **options)


def test_a_nan_reward_of_a_scored_candidate_is_an_error():
    rm = zoo.build_rm("llama")
    with torch.no_grad():
        rm.score.weight.fill_(NAN)
    with pytest.raises(ValueError, match="row 0, step 0: the reward model gave"):
        guided(zoo.lm("llama"), rm, True)
