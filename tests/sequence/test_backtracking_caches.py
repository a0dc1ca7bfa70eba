"""What the models hold of rows that were taken back: the same as of rows that never had it."""

import backspaces
import pytest
import torch
import zoo
from backspaces import BACK
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import rgtg_fast
from rgtg_fast.models.siblings import SiblingForward
from rgtg_fast.scorers.weighted import leaves_of
from rgtg_fast.sequence.run import Run

PROMPTS = [[5, 6, 7, 8, 11, 9], [9, 12], [40, 41, 43]]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(is scored by|taken for the same with tokens added):UserWarning"
)
REWARDS = {
    "tree": lambda: {"reward_model": zoo.rm("gpt2")},
    "windows": lambda: {"reward_model": zoo.rm("mistral")},
    "masked": lambda: {"reward_model": zoo.rm("gemma2_eager")},
    "previous": lambda: {"reward_model": zoo.rm("llama"), "eos_reward": "previous"},
    "next tokens": lambda: {
        "reward_model": rgtg_fast.Reward(zoo.lm("mistral"), reward_kind="genarm")
    },
    "pair": lambda: {"reward_model": (zoo.lm("gpt2"), zoo.lm("llama"))},
}
OPTIONS = {"backspace_token_id": BACK, "max_new_tokens": 6, "pad_token_id": zoo.PAD, "beta": 0.5}
K = 3


def rows_of(lm, prompts, reward_model, **options):
    """Rows that hold these prompts."""
    given = {"max_new_tokens": 40, "pad_token_id": zoo.PAD, "eos_token_id": zoo.EOS, "seed": 1}
    run = Run(lm, reward_model, None, given | options, backspace=BACK, k=K)
    entries = list(run.entries(prompts))
    run.make_room(max(entries, key=lambda entry: len(entry.ids)))
    run.call.join(entries)
    return run


def held(cache, row):
    """The keys and values of a row, [n, Hkv, T, D] each."""
    parts = []
    for store in cache.stores:
        first = int(cache.offsets[store.device][row]) + cache.width
        parts.append(store[:, :, first : first + int(cache.lengths[store.device][row])])
    return parts


def caches(texts):
    """Each, and how many tokens of row i are in it."""
    yield texts.lm.forward.cache, lambda row: len(texts.rows[row]) - texts.rows[row].unfed
    for leaf in leaves_of(texts.scorer):
        static = getattr(leaf, "static", None)
        if static is None:
            yield leaf.forward.cache, lambda row: len(texts.rows[row])
        else:  # runs its last token where it is asked for the next
            yield static.forward.cache, lambda row, x=leaf: len(texts.rows[row]) - x.waiting[row]


class Rows:
    """The rows, and what may be done to them."""

    def __init__(self, texts):
        self.texts = texts
        # Whether the logits are those of a text that was taken back: the caller's to put back.
        self.stale = [False] * len(texts.rows)

    def add(self, rows, token):
        for row in rows:
            self.texts.add(row, [3 + (token + row) % (zoo.VOCAB - 3)], [0.0])
            self.stale[row] = False

    def advance(self, rows, _):
        self.texts.advance(rows)

    def choose(self, rows, token):
        """A candidate of the reward joins."""
        self.texts.read(rows)
        ids = (torch.arange(K * len(rows)).view(-1, K) + token) % (zoo.VOCAB - 3) + 3
        self.texts.ask(rows, ids)
        slots = torch.arange(len(rows)) % K
        self.texts.commit(rows, slots)
        for row, of_row, slot in zip(rows, ids.tolist(), slots.tolist(), strict=True):
            self.texts.add(row, [of_row[slot]], [0.0])
            self.texts.rows[row].unread = 0
            self.stale[row] = False

    def back(self, rows, token):
        rows = [row for row in rows if self.texts.rows[row].tokens]
        kept = [max(0, len(self.texts.rows[row].tokens) - 1 - token % 4) for row in rows]
        if rows:
            self.texts.take_back(rows, kept)
        for row in rows:
            self.stale[row] = self.texts.rows[row].unfed == 0

    def keep(self, rows, token):
        """Rows leave, come in another order, and are copied."""
        order = [*rows, *rows[: token % 2]][::-1][:4]
        self.texts.select(order)
        self.stale = [self.stale[row] for row in order]

    def apply(self, name, some, token):
        rows = [row for row in range(len(self.stale)) if some >> row & 1] or [0]
        getattr(self, name)(rows, token)


STEP = st.tuples(
    st.sampled_from(["add", "add", "choose", "choose", "advance", "back", "back", "keep"]),
    st.integers(1, 15),
    st.integers(0, 100),
)


@torch.no_grad()
def check_caches(reward, steps):
    lm = backspaces.lm("mistral" if reward == "windows" else "llama")
    run = rows_of(lm, PROMPTS, **REWARDS[reward]())
    fresh = None
    try:
        texts, rows = run.call, Rows(run.call)
        for step in steps:
            rows.apply(*step)
        every = list(range(len(texts.rows)))
        rows.add([row for row in every if rows.stale[row]], 7)
        texts.advance(every)
        texts.read(every)
        fresh = rows_of(lm, [text.ids()[0].tolist() for text in texts.rows], **REWARDS[reward]())
        for (cache, tokens), (other, _) in zip(caches(texts), caches(fresh.call), strict=True):
            for row in every:
                for got, want in zip(held(cache, row), held(other, row), strict=True):
                    assert got.shape[2] == tokens(row)
                    torch.testing.assert_close(got, want[:, :, : got.shape[2]], rtol=0, atol=1e-4)
        for row in every:
            # Without the backspace, which is masked where a text has no answer yet.
            got, want = (x.scores[row][:BACK].log_softmax(-1) for x in (texts, fresh.call))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
        ids = torch.tensor([[3, 17, 60]] * len(every))
        got, want = (x.ask(every, ids) for x in (texts, fresh.call))
        differ = got - want  # of a pair's sum the part of the answer so far
        torch.testing.assert_close(differ, differ[:, :1].expand_as(differ), rtol=0, atol=1e-3)
        if reward != "pair":
            torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
    finally:
        run.finish()
        if fresh is not None:
            fresh.finish()


# Rows of which both models have run all, and of which they are one token or two behind.
BACKWARD = [
    *[("choose", 7, 1), ("advance", 7, 0), ("choose", 7, 5), ("advance", 7, 0)],
    *[("add", 7, 9), ("advance", 1, 0), ("back", 7, 0)],
    *[("add", 7, 20), ("advance", 7, 0), ("back", 3, 1), ("add", 7, 31), ("choose", 5, 2)],
    *[("add", 7, 50), ("add", 7, 51), ("back", 6, 0), ("advance", 7, 0), ("back", 1, 3)],
    *[("choose", 3, 8), ("keep", 6, 1), ("back", 1, 0), ("add", 3, 4)],
]


@pytest.mark.parametrize("reward", REWARDS)
def test_caches_after_un_doings_of_rows_that_lag_are_those_of_fresh_rows(reward):
    check_caches(reward, BACKWARD)


def quick(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("reward", REWARDS)
@quick(4)
@given(steps=st.lists(STEP, min_size=8, max_size=14))
def test_caches_after_any_un_doings_are_those_of_fresh_rows(reward, steps):
    check_caches(reward, steps)


@pytest.mark.slow
@pytest.mark.parametrize("reward", REWARDS)
@quick(60)
@given(steps=st.lists(STEP, min_size=8, max_size=40))
def test_caches_after_any_un_doings_are_those_of_fresh_rows_at_length(reward, steps):
    check_caches(reward, steps)


def test_tokens_are_counted_as_the_models_run_them(monkeypatch):
    """By both models, and by each kind of reward that has a cache."""
    ran = []
    forward, prompts = SiblingForward._forward, SiblingForward._prompts

    def counted(self, ids, *rest):
        ran.append(ids.numel())
        return forward(self, ids, *rest)

    def counted_prompts(self, ids, mask, cache):
        ran.append(int(mask.sum()))
        return prompts(self, ids, mask, cache)

    monkeypatch.setattr(SiblingForward, "_forward", counted)
    monkeypatch.setattr(SiblingForward, "_prompts", counted_prompts)
    farma = rgtg_fast.Reward(zoo.lm("gpt2"), reward_kind="farma")
    undone = 0
    for reward in [*(make() for make in REWARDS.values()), {"reward_model": farma}, {"k": None}]:
        given = {"seed": 0} | OPTIONS | reward
        list(rgtg_fast.backtracking(backspaces.lm(), PROMPTS[1:2], **given))  # probes once
        ran.clear()
        (answer,) = rgtg_fast.backtracking(backspaces.lm(), PROMPTS[1:2], **given)
        assert sum(ran) == answer.cost.lm_tokens + answer.cost.reward_tokens, reward
        undone += answer.undone
    assert undone > 10
