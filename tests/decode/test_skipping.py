"""Candidates at -inf are not scored, and neither are rows that have ended: the same results."""

import pytest
import tiny
import torch
import zoo
from graph_emulated import install
from lora_checkpoints import make_checkpoint

import rgtg_fast
from rgtg_fast.decode import graphs
from rgtg_fast.models.selection import Selection
from rgtg_fast.models.siblings import SiblingForward
from rgtg_fast.scorers.reencode import ReencodeScorer

INF, K = float("inf"), 6
over = pytest.mark.parametrize


def guided(lm, rm, **options):
    """A short run; top_p leaves some rows one candidate and others several."""
    common = {
        **zoo.left_pad(zoo.prompts()),
        "max_new_tokens": 10,
        "k": K,
        "beta": 1.5,
        "do_sample": True,
        "seed": 5,
        "top_k": 0,
        "top_p": 0.7,
        "return_dict_in_generate": True,
        "speculate": False,
    }
    return rgtg_fast.generate(lm, reward_model=rm, **(common | options))


def peaked(lm, by=4.0):
    with torch.no_grad():
        head = lm.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight * by)
    return lm


def pair(kind, folder):
    """A peaked language model, and a reward model of a kind."""
    _, lm = make_checkpoint(folder, "llama")
    lm = peaked(lm)
    if kind == "adapter":
        return lm, rgtg_fast.RewardAdapter.from_pretrained(lm, folder)
    if kind == "head":
        weight = torch.randn(lm.config.hidden_size, generator=torch.Generator().manual_seed(0))
        return lm, rgtg_fast.RewardHead(lm, weight / 6)
    return lm, zoo.rm("llama" if kind == "tree" else kind)


MODES = {
    "sampled": {},
    "one row": zoo.left_pad(zoo.prompts()[:1]),
    "greedy": {"do_sample": False, "logits_processor": None, "suppress_tokens": [*range(3, 97)]},
    "rows end": {"eos_token_id": list(range(3, 25)), "pad_token_id": zoo.PAD},
    "eos previous": {"eos_token_id": 7, "pad_token_id": zoo.PAD, "eos_reward": "previous"},
    "bounded": {"reward_range": (-0.2, 0.3)},
}


@over("mode", MODES)
@over("kind", ["tree", "head", "adapter", "bert"])
def test_the_same_tokens_and_rewards(kind, mode, tmp_path):
    lm, rm = pair(kind, tmp_path)
    options = MODES[mode]
    every, some = guided(lm, rm, prune=False, **options), guided(lm, rm, **options)
    assert torch.equal(some.sequences, every.sequences)
    close = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True}
    torch.testing.assert_close(some.rewards, every.rewards, **close)
    running = ~every.rewards.isnan()
    assert (every.candidates_scored == K * running).all()
    assert (some.candidates_scored[running] >= 1).all()
    assert some.candidates_scored.sum() < every.candidates_scored.sum()
    if mode != "bounded":  # whatever cannot win has no part in the policy
        torch.testing.assert_close(some.kl, every.kl, **close)


@over("way", ["fused", "masked"])
@over("kind", ["tree", "head", "adapter"])
def test_both_attention_ways(kind, way, tmp_path, monkeypatch):
    if way == "masked":
        for module in ("models.attention", "scorers.probe", "models.siblings"):
            monkeypatch.setattr(f"rgtg_fast.{module}.attention_kernel", lambda *_: None)
    lm, rm = pair(kind, tmp_path)
    every, some = guided(lm, rm, prune=False), guided(lm, rm)
    assert torch.equal(some.sequences, every.sequences)
    assert some.candidates_scored.sum() < every.candidates_scored.sum()


@over("kind", ["tree", "head", "adapter"])
def test_the_models_see_what_may_win(kind, tmp_path, monkeypatch):
    """In one row of tokens; with an adapter, whose rows double, in the width of the fullest row."""
    seen, siblings = [], SiblingForward.siblings

    def counted(self, *arguments, **options):
        hidden = siblings(self, *arguments, **options)
        if self.width == K:
            seen.append(hidden.shape[0] * hidden.shape[1])
        return hidden

    lm, rm = pair(kind, tmp_path)
    guided(lm, rm)  # probed
    monkeypatch.setattr(SiblingForward, "siblings", counted)
    counts = guided(lm, rm).candidates_scored
    assert (counts.amax(0) > counts.amin(0)).any() and (counts < K).any()
    want = 2 * 3 * counts.amax(0) if kind == "adapter" else counts.sum(0)
    assert seen == want.tolist()


def test_kl_is_that_of_the_whole_policy():
    out = guided(peaked(zoo.build_lm("llama")), zoo.rm("llama"))
    assert (out.candidates_scored == 1).any() and not out.kl.isnan().any()


@over(
    ("options", "skips"),
    [
        ({}, True),
        ({"prune": False}, False),
        ({"output_candidates": True}, False),
        ({"reward_method": "expand"}, False),
        ({"top_p": 1.0}, False),
    ],
)
def test_skipped_by_default_where_it_is_possible_and_harmless(options, skips):
    out = guided(peaked(zoo.build_lm("llama")), zoo.rm("llama"), **options)
    assert (out.candidates_scored < K).any() == skips


def test_a_users_scorer_is_asked_for_all():
    scorer = tiny.CountingScorer(torch.linspace(-1, 1, zoo.VOCAB))
    out = guided(peaked(zoo.build_lm("llama")), scorer)
    assert (out.candidates_scored == K).all()


def test_a_users_scorer_that_can_skip_is_told():
    class Skipping(tiny.CountingScorer):
        can_skip = True

        def score(self, ids, keep=None):
            asked.append(None if keep is None else int(keep.sum()))
            return super().score(ids)

    asked = []
    scorer = Skipping(torch.linspace(-1, 1, zoo.VOCAB))
    out = guided(peaked(zoo.build_lm("llama")), scorer)
    counts = out.candidates_scored.sum(0).tolist()
    assert [3 * K if n is None else n for n in asked] == counts and min(counts) < 3 * K


def test_a_captured_step_scores_all(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(graphs, "WORTH", 1)
    lm = peaked(zoo.build_lm("llama"))
    out = guided(lm, zoo.rm("llama"), check_nan=False, top_k=5, top_p=1.0)
    assert (out.candidates_scored == K).all()


@pytest.fixture
def texts(monkeypatch):
    """How many texts each scoring encoded."""
    seen, kept = [], ReencodeScorer._score_kept

    def counted(self, ids, keep, *rest):
        seen.append(int(keep.sum()))
        return kept(self, ids, keep, *rest)

    monkeypatch.setattr(ReencodeScorer, "_score_kept", counted)
    return seen


@over("recorded", [True, False])
def test_without_a_cache_a_row_with_one_candidate_needs_no_reward(recorded, texts):
    lm, rm = peaked(zoo.build_lm("llama")), zoo.rm("bert")
    out = guided(lm, rm, prune=False)
    counts = guided(lm, rm).candidates_scored
    assert (counts == 1).any() and (counts > 1).any()
    texts.clear()
    tokens = guided(lm, rm, return_dict_in_generate=recorded)
    tokens = tokens.sequences if recorded else tokens
    assert torch.equal(tokens, out.sequences)
    needed = counts if recorded else counts * (counts > 1)
    assert texts == needed.sum(0).tolist()


def test_k_1_needs_no_rewards(texts):
    lm, rm = zoo.lm("llama"), zoo.rm("bert")
    options = {"k": 1, "top_p": 1.0}
    want = guided(lm, rm, **options).sequences
    texts.clear()
    assert torch.equal(guided(lm, rm, return_dict_in_generate=False, **options), want)
    assert not any(texts)


def test_eos_previous_needs_the_reward_of_each_prefix(texts):
    lm, rm = peaked(zoo.build_lm("llama")), zoo.rm("bert")
    options = {"eos_token_id": 7, "pad_token_id": zoo.PAD, "eos_reward": "previous"}
    options["return_dict_in_generate"] = False
    guided(lm, rm, **options)
    assert min(texts) > 0


def test_no_token_left_is_named():
    with pytest.raises(ValueError, match="row 0, step 0: no candidate has a finite score"):
        guided(zoo.lm("llama"), zoo.rm("llama"), suppress_tokens=list(range(zoo.VOCAB)))


def test_a_nan_reward_of_a_scored_candidate_is_an_error():
    rm = zoo.build_rm("llama")
    with torch.no_grad():
        rm.score.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the reward model gave \[nan"):
        guided(peaked(zoo.build_lm("llama")), rm)


def test_a_nan_logit_is_an_error():
    lm = zoo.build_lm("llama")
    with torch.no_grad():
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight * float("nan"))
    with pytest.raises(ValueError, match="contain NaN"):
        guided(lm, zoo.rm("llama"), top_p=1.0)


@over("packs", [True, False])
def test_states_of_the_winner_are_found(packs):
    kept = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    chosen = Selection(kept, packs)
    states = torch.randn(3, 3, 4)  # [B, k, H]
    tokens = chosen.take(states[..., 0])
    held = torch.stack([chosen.take(states[..., i]) for i in range(4)], dim=-1)
    assert held.shape[:2] == tokens.shape
    got = chosen.states_of(torch.tensor([2, 0, 1]), held)
    assert torch.equal(got[[0, 2]], torch.stack([states[0, 2], states[2, 1]]))


ONE = zoo.left_pad(zoo.prompts()[:1])


@pytest.fixture
def forwards(monkeypatch):
    """Tokens of a row in each forward of a tree scorer: candidates, and winners read later."""
    seen = {"siblings": [], "extend": []}

    def count(name):
        own = getattr(SiblingForward, name)

        def counted(self, ids, *rest, **options):
            if self.width == K:
                seen[name].append(ids.shape[1])
            return own(self, ids, *rest, **options)

        monkeypatch.setattr(SiblingForward, name, counted)

    for name in seen:
        count(name)
    return seen


@over("family", [f for f in zoo.RMS if f not in zoo.NO_TREE])
def test_candidates_without_rivals_are_read_when_a_reward_is_asked_for(family, forwards):
    lm, rm = peaked(zoo.build_lm("llama"), 3.0), zoo.rm(family)
    options = {**ONE, "max_new_tokens": 30, "reward_method": "tree"}
    recorded = guided(lm, rm, **options)
    counts = recorded.candidates_scored[0]
    forwards["siblings"].clear()
    forwards["extend"].clear()
    got = guided(lm, rm, return_dict_in_generate=False, **options)
    assert torch.equal(got, recorded.sequences)
    rivals = (counts > 1).nonzero()[:, 0].tolist()
    assert 3 < len(rivals) < 25 and len(forwards["siblings"]) == len(rivals)
    gaps = [b - a - 1 for a, b in zip([-1, *rivals[:-1]], rivals, strict=True)]
    assert sum(forwards["extend"]) == sum(gaps) and max(gaps) > 1
    assert len(forwards["extend"]) == sum(gap > 0 for gap in gaps)


@over("way", ["fused", "masked"])
def test_rows_end_and_leave_with_candidates_unread(way, forwards, monkeypatch):
    if way == "masked":
        for module in ("models.attention", "scorers.probe", "models.siblings"):
            monkeypatch.setattr(f"rgtg_fast.{module}.attention_kernel", lambda *_: None)
    lm, rm = peaked(zoo.build_lm("llama"), 9.0), zoo.rm("llama")
    options = {**zoo.left_pad(zoo.prompts() * 2), **MODES["rows end"], "max_new_tokens": 20}
    options["return_dict_in_generate"] = False
    want = guided(lm, rm, prune=False, **options)
    forwards["extend"].clear()
    assert torch.equal(guided(lm, rm, **options), want)
    assert forwards["extend"]
    eos = options | {"eos_reward": "previous"}
    assert torch.equal(guided(lm, rm, **eos), guided(lm, rm, prune=False, **eos))


@over("kind", ["llama", "bert"])
def test_a_lone_candidate_that_is_no_token_of_the_reward_models_is_not_taken(kind):
    lm = peaked(zoo.build_lm("llama", vocab_size=zoo.VOCAB + 8))
    options = {**ONE, "suppress_tokens": list(range(zoo.VOCAB)), "top_p": 1e-6, "k": 3}
    tok = {"tokenizer": tiny.tokenizer(), "reward_tokenizer": tiny.tokenizer()}
    for recorded in (True, False):
        with pytest.raises(ValueError, match="no candidate has a finite score"):
            guided(lm, zoo.rm(kind), return_dict_in_generate=recorded, **options, **tok)
