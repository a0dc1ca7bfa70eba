"""The loop's shortcuts change no result: own caches, looking seldom, rows that leave."""

import pytest
import tiny
import torch
import zoo
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

import rgtg_fast
from rgtg_fast import guided as guided_module
from rgtg_fast.decode.logits import CachedLogits, HFLogits
from rgtg_fast.models.attention import NAME
from rgtg_fast.ops.dispatch import settle

K, NEW = 4, 14
compiled = pytest.mark.skipif(
    settle("candidate_attention", "auto", "cpu", 1) == "reference",
    reason="the extension is not built",
)


class Ending(LogitsProcessor):
    """Lifts EOS for a row once it holds a token of its own choice: rows end at different steps."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, tiny.EOS] += 3.0 * (input_ids[:, -1] % 5 == 0)
        return scores


@pytest.fixture(scope="module")
def models():
    return tiny.llama_lm(), tiny.gpt2_rm()


@pytest.fixture
def seen(monkeypatch):
    """The sources of logits and the plans that calls were run with."""
    runs = []

    for name in ("decode", "speculate"):
        run = getattr(guided_module, name)

        def spy(call, input_ids, run=run):
            runs.append((call.source, call.plan, call.scorer))
            return run(call, input_ids)

        monkeypatch.setattr(guided_module, name, spy)
    return runs


def guided(models, *lengths, **options):
    lm, rm = models
    options = {
        "k": K,
        "beta": 2.0,
        "max_new_tokens": NEW,
        "sequence_bias": {(tiny.EOS,): 6.0},
        "do_sample": True,
        "seed": torch.arange(len(lengths)) + 3,
        **tiny.prompts(*lengths),
    } | options
    return rgtg_fast.generate(lm, reward_model=rm, **options)


LENGTHS = (5, 9, 3, 7, 1, 6, 8, 2)


def ends(sequences, prompt):
    return [
        row.tolist().index(tiny.EOS) if tiny.EOS in row else NEW for row in sequences[:, prompt:]
    ]


@pytest.mark.parametrize("method", ["tree", "expand", "reencode"])
@pytest.mark.parametrize("own_cache", [True, False])
def test_looking_seldom_and_rows_that_leave_change_nothing(models, method, own_cache):
    options = {"reward_method": method}
    if not own_cache:
        options["cache_implementation"] = "dynamic"
    plain = guided(models, *LENGTHS, sync_every=1, compact=False, **options)
    assert len(set(ends(plain, 9))) > 3, "rows should end at different steps"
    for sync_every in (1, 3, 16):
        for compact in (True, False):
            out = guided(models, *LENGTHS, sync_every=sync_every, compact=compact, **options)
            assert torch.equal(out, plain), (sync_every, compact)


def test_steps_beyond_the_end_are_cut_off(models):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_candidates": True}
    bias = {"sequence_bias": {(tiny.EOS,): 30.0}}
    often = guided(models, 5, 9, **options, **bias)
    seldom = guided(models, 5, 9, sync_every=16, **options, **bias)
    assert often.rewards.shape[1] < NEW
    assert torch.equal(often.sequences, seldom.sequences)
    for name in ("rewards", "kl", "candidate_ids", "candidate_rewards"):
        assert torch.equal(often[name].nan_to_num(), seldom[name].nan_to_num()), name
    assert len(seldom.scores) == often.rewards.shape[1]
    assert seldom.past_key_values.get_seq_length() == often.past_key_values.get_seq_length()


@pytest.mark.parametrize("method", ["tree", "expand", "reencode"])
def test_ended_rows_are_no_longer_scored(models, method, seen, monkeypatch):
    from rgtg_fast.scorers.base import RewardModelScorer

    batches = []
    commit = RewardModelScorer.commit
    counted = lambda self, slot, *rows: (  # noqa: E731
        batches.append(len(slot)) or commit(self, slot, *rows)
    )
    monkeypatch.setattr(RewardModelScorer, "commit", counted)
    out = guided(models, *LENGTHS, reward_method=method, speculate=False)
    last = sorted(ends(out, 9))
    batches = batches[-(min(last[-1] + 1, NEW)) :]
    assert batches[0] == len(LENGTHS) and batches[-1] <= len(LENGTHS) // 2
    for step, batch in enumerate(batches[1:], start=1):
        running = sum(end >= step for end in last)
        assert running <= batch <= max(2 * running - 1, running), (step, batch, last)


def test_per_row_settings_follow_their_rows(models):
    settings = {
        "beta": torch.linspace(-2, 4, len(LENGTHS)),
        "temperature": torch.linspace(0.3, 2, len(LENGTHS)),
    }
    plain = guided(models, *LENGTHS, compact=False, **settings)
    assert torch.equal(guided(models, *LENGTHS, **settings), plain)
    seeds = torch.arange(len(LENGTHS)) + 3
    for row, length in enumerate(LENGTHS[:4]):
        ids = tiny.prompts(*LENGTHS)["input_ids"][row : row + 1, 9 - length :]
        alone = guided(
            models,
            length,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            seed=seeds[row : row + 1],
            **{name: value[row : row + 1] for name, value in settings.items()},
        )
        answer = alone[0, length:]
        assert torch.equal(plain[row, 9 : 9 + len(answer)], answer)


def test_an_error_names_the_row_of_the_call_after_rows_have_left(models):
    class Broken(tiny.CountingScorer):
        def keep_rows(self, rows):
            self.rows = rows if self.rows is None else self.rows[rows]

        def score(self, ids):
            self.steps += 1
            rewards = super().score(ids)
            if self.rows is not None:
                rewards[-1] = torch.nan
                self.broken = int(self.rows[-1])
            return rewards

    scorer = Broken(torch.zeros(tiny.vocab_size()))
    scorer.rows = None
    with pytest.raises(ValueError, match="row ") as raised:
        guided((models[0], scorer), *LENGTHS)
    assert scorer.broken != len(scorer.rows) - 1
    assert f"row {scorer.broken}, step" in str(raised.value)


@compiled
def test_plain_calls_take_the_own_cache_and_a_whole_batch_where_asked(models, seen):
    guided(models, 5, 9)
    source, plan, _ = seen[-1]
    assert isinstance(source, CachedLogits) and plan.compact
    guided(models, 5, 9, return_dict_in_generate=True)
    assert isinstance(seen[-1][0], CachedLogits) and not seen[-1][1].compact


@pytest.mark.parametrize(
    "option",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_hidden_states": True},
    ],
)
def test_hugging_faces_loop_runs_where_it_is_asked_for(models, seen, option):
    want = guided(models, 5, 9)
    out = guided(models, 5, 9, **option)
    assert isinstance(seen[-1][0], HFLogits)
    assert torch.equal(getattr(out, "sequences", out), want)


def test_hooks_on_the_language_model_are_not_passed_by(models, seen):
    lm, _rm = models
    calls = []
    handle = lm.register_forward_hook(lambda *args: calls.append(1))
    try:
        guided(models, 5, 9, max_new_tokens=3)
    finally:
        handle.remove()
    assert isinstance(seen[-1][0], HFLogits) and len(calls) == 3


class Count(StoppingCriteria):
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_criterion_of_the_users_is_asked_at_every_step_with_every_row(models, seen):
    guided(models, 5, 9, sync_every=16, stopping_criteria=[Count()])
    assert seen[-1][1].sync_every == 1 and not seen[-1][1].compact


def test_a_processor_of_the_users_sees_every_row(models, seen):
    guided(models, 5, 9, logits_processor=LogitsProcessorList([Ending()]), sync_every=16)
    assert seen[-1][1].sync_every == 16 and not seen[-1][1].compact


@compiled
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3", "llama4"])
def test_the_cache_given_back_is_hugging_faces(name):
    lm, rm = zoo.lm(name), zoo.rm("llama")
    batch = zoo.left_pad(zoo.prompts())
    options = {**batch, "max_new_tokens": 6, "return_dict_in_generate": True, "k": 3}
    own = rgtg_fast.generate(lm, reward_model=rm, **options)
    theirs = rgtg_fast.generate(lm, reward_model=rm, cache_implementation="dynamic", **options)
    assert torch.equal(own.sequences, theirs.sequences)
    assert own.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    pairs = zip(own.past_key_values.layers, theirs.past_key_values.layers, strict=True)
    for ours, layer in pairs:
        assert type(ours) is type(layer)
        live = batch["attention_mask"][:, -ours.keys.shape[2] :].bool()  # padding may differ
        for a, b in ((ours.keys, layer.keys), (ours.values, layer.values)):
            assert a.shape == b.shape
            tail = slice(live.shape[1], None)
            assert torch.allclose(a[:, :, tail], b[:, :, tail], atol=1e-4)


@compiled
def test_attention_is_the_models_own_again_after_an_error(models, monkeypatch):
    lm, rm = models
    inside = []

    def fail(self, *args, **kwargs):
        inside.append(self.config._attn_implementation)
        if inside[-1] == NAME:
            raise RuntimeError("no more")
        return forward(self, *args, **kwargs)

    guided(models, 5, 9, max_new_tokens=1)  # probed before
    layer = type(rm.transformer.h[1].attn)
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", fail)
    with pytest.raises(RuntimeError, match="no more"):
        guided(models, 5, 9)
    assert NAME in inside
    assert (rm.config._attn_implementation, lm.config._attn_implementation) == ("sdpa", "sdpa")


@compiled
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
def test_masks_with_holes_without_a_mask(name):
    """The cache sorts hidden slots to the front; windows and chunks still count them."""
    from rgtg_fast.scorers import RewardModel, TreeScorer

    ids = torch.randint(3, zoo.VOCAB, (3, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[0, 6:9], mask[1, 12], mask[1, 4] = 0, 0, 0, 0
    rewards = []
    for fused in (True, False):
        scorer = TreeScorer(RewardModel(zoo.rm(name)), 3, fused=fused)
        scorer.prefill(ids, mask)
        steps, rows = [], 3
        for step in range(8):
            ids_here = (torch.arange(9).view(3, 3) * 7 + step * 5) % 60 + 3
            steps.append(scorer.score(ids_here[:rows]))
            scorer.commit(torch.tensor([step % 3, (step + 1) % 3, 0])[:rows])
            if step == 4:
                rows = 2
                scorer.keep_rows(torch.arange(rows))
        rewards.append(torch.cat(steps))
    assert torch.allclose(*rewards, atol=1e-4)
