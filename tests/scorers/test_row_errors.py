"""Rows by hand: what is not a row, a token or a candidate is an error before anything changes."""

import numpy as np
import pytest
import torch
import zoo

import rgtg_fast
from rgtg_fast.scorers import AutoregressiveScorer, VocabRewardScorer, make_scorer

PROMPTS = [torch.tensor(row) for row in ([5, 6, 7], [8, 9], [10, 11, 12, 13])]
IDS = torch.tensor([[5, 6, 7, 8]] * 3)
MADE = {
    "tree": lambda: make_scorer(zoo.rm("gpt2"), k=4),
    "expand": lambda: make_scorer(zoo.rm("gpt2"), k=4, method="expand"),
    "reencode": lambda: make_scorer(zoo.rm("gpt2"), k=4, method="reencode"),
    "next token": lambda: AutoregressiveScorer(zoo.lm("gpt2")),
}


@pytest.fixture(params=MADE)
def scorer(request):
    made = MADE[request.param]()
    assert made.join(PROMPTS) == [0, 1, 2]
    return made


def assert_as_new(scorer):
    """It still has the rows that it began with."""
    got = scorer.score(IDS)
    scorer.finish()
    scorer.join(PROMPTS)
    torch.testing.assert_close(got, scorer.score(IDS))


NO_HANDLES = {
    "unknown": ([99], r"\[99\] are none of the 3 rows"),
    "twice": ([0, 0], "name a row twice"),
    "a bool": ([True], "handles holds True"),
    "a float": ([0.0], "handles holds 0.0"),
    "one number": (1, "handles=1"),
    "floats": (torch.tensor([1.0]), "int64"),
    "a matrix": (torch.tensor([[1]]), r"shape \[1, 1\]"),
    "no numbers": (torch.tensor([1], device="meta"), "meta"),
}


@pytest.mark.parametrize("what", NO_HANDLES)
def test_handles_that_name_no_row(scorer, what):
    handles, message = NO_HANDLES[what]
    uses = [
        lambda: scorer.score(IDS[:1], handles=handles),
        lambda: scorer.leave(handles),
        lambda: scorer.extend(handles, [torch.tensor([5])]),
        lambda: scorer.crop(handles, [1]),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use()
    assert_as_new(scorer)


@pytest.mark.parametrize(
    "handles", [torch.tensor([1]), np.array([1]), (1,), iter([1])], ids=lambda x: type(x).__name__
)
def test_handles_of_any_kind_of_list_name_their_rows(handles):
    scorer = MADE["tree"]()
    scorer.join(PROMPTS)
    scorer.leave(handles)
    assert scorer.handles == [0, 2]


NO_TOKENS = {
    "none": (None, "prompts=None"),
    "lists": ([[5, 6]], r"prompts\[0\] must be an int64 tensor"),
    "floats": ([torch.tensor([5.7])], "float32"),
    "bools": ([torch.tensor([True])], "bool"),
    "no numbers": ([torch.tensor([5], device="meta")], "meta"),
    "beyond the vocabulary": ([torch.tensor([5]), torch.tensor([zoo.VOCAB])], r"prompts\[1\].* 72"),
    "negative": ([torch.tensor([5, -1])], "id -1"),
    "a matrix": ([torch.tensor([[5]])], r"\[1, 1\]"),
}


@pytest.mark.parametrize("what", NO_TOKENS)
def test_tokens_that_are_none(scorer, what):
    prompts, message = NO_TOKENS[what]
    with pytest.raises(ValueError, match=message):
        scorer.join(prompts)
    handles = [1] if prompts is None else list(range(len(prompts)))
    with pytest.raises(ValueError, match=message.replace("prompts", "ids")):
        scorer.extend(handles, prompts)
    assert scorer.handles == [0, 1, 2]
    assert_as_new(scorer)


LENGTHS = {
    "0": [0],
    "negative": [-1],
    "more than there are": [3],
    "a fraction": [1.5],
    "a bool": [True],
    "floats": torch.tensor([1.0]),
    "for two": [1, 1],
    "one number": 1,
}


@pytest.mark.parametrize("what", LENGTHS)
def test_lengths_that_a_row_cannot_be_cropped_to(scorer, what):
    with pytest.raises(ValueError, match="lengths"):
        scorer.crop([1], LENGTHS[what])
    assert_as_new(scorer)


def test_lengths_of_any_integers_crop(scorer):
    scorer.crop([2], torch.tensor([2], dtype=torch.int32))
    scorer.crop([0], np.array([2]))
    got = scorer.score(IDS)
    scorer.finish()
    scorer.join([prompt[:2] for prompt in PROMPTS])
    torch.testing.assert_close(got, scorer.score(IDS))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[0], "shape"),
        (IDS[:2], "for 3 rows"),
        (IDS[:, :0], "shape"),
        (IDS.float(), "float32"),
        (IDS.tolist(), "list"),
        (IDS.to("meta"), "meta"),
    ],
    ids=["one row", "two rows", "none", "floats", "lists", "no numbers"],
)
def test_candidates_that_are_none(scorer, ids, message):
    with pytest.raises(ValueError, match=message):
        scorer.score(ids)
    assert_as_new(scorer)


def test_more_candidates_than_a_tree_has_room_for():
    """They were written over the beginning of the prefix."""
    scorer = MADE["tree"]()
    scorer.join(PROMPTS)
    with pytest.raises(ValueError, match=r"5 candidates .* k=4"):
        scorer.score(IDS[:, [0, 1, 2, 3, 3]])
    assert_as_new(scorer)
    inputs = zoo.left_pad(zoo.prompts()) | {"max_new_tokens": 2, "pad_token_id": zoo.PAD}
    with pytest.raises(ValueError, match=r"k=6 .* k=4"):
        rgtg_fast.generate(zoo.lm("llama"), **inputs, reward_model=scorer, k=6)


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        (torch.tensor([0, 4]), r"slot=\[0, 4\] for 4 candidates"),
        (torch.tensor([0, -1]), "nothing to choose"),
        (torch.tensor([0.0, 0.0]), "float32"),
        (torch.tensor([0]), r"shape \[1\], and 2 rows"),
        (torch.tensor([[0], [0]]), r"shape \[2, 1\]"),
        ([0, 0], "list"),
    ],
    ids=["too large", "negative", "floats", "one", "a matrix", "a list"],
)
def test_slots_that_are_no_candidates(scorer, slot, message):
    scorer.score(IDS)
    with pytest.raises(ValueError, match=message):
        scorer.commit(slot, [0, 2])
    assert_as_new(scorer)


def test_a_candidate_is_committed_once(scorer):
    scorer.score(IDS)
    scorer.commit(torch.tensor([1]), [1])
    for slot, handles in ((torch.tensor([1]), [1]), (torch.tensor([0, 0, 0]), None)):
        with pytest.raises(ValueError, match=r"last scored, and unchanged since: \[0, 2\]"):
            scorer.commit(slot, handles)
    scorer.commit(torch.tensor([0, 0]), [0, 2])
    with pytest.raises(ValueError, match=r"unchanged since: \[\]"):
        scorer.commit(torch.tensor([0, 0, 0]))
    got = scorer.score(IDS)
    scorer.finish()
    tokens = ([5], [6], [5])
    scorer.join([torch.cat([p, torch.tensor(t)]) for p, t in zip(PROMPTS, tokens, strict=True)])
    torch.testing.assert_close(got, scorer.score(IDS))


def test_no_rows_have_no_rewards(scorer):
    assert scorer.score(IDS[:0], handles=[]).shape == (0, 4)
    scorer.commit(torch.zeros(0, dtype=torch.int64), [])
    assert_as_new(scorer)
    scorer.leave(list(scorer.handles))
    assert scorer.score(IDS[:0]).shape == (0, 4)
    scorer.join(PROMPTS)
    assert_as_new(scorer)


def test_rows_are_wanted_before_candidates():
    for make in MADE.values():
        with pytest.raises(ValueError, match="prefill or join before"):
            make().score(IDS)


@pytest.mark.parametrize("make", [AutoregressiveScorer, VocabRewardScorer])
def test_a_recurrent_model_whose_tokens_may_not_come_one_by_one_is_refused(make):
    """Its rewards were wrong from the second token on, without a word."""
    ids = zoo.left_pad(zoo.prompts())
    for _ in range(2):  # the verdict is kept
        with pytest.raises(ValueError, match=r"Mamba.* cannot reward next tokens; pass a transfor"):
            rgtg_fast.generate(
                zoo.lm("llama"), **ids, reward_model=make(zoo.lm("mamba")), max_new_tokens=2
            )
