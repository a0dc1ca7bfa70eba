"""`rgtg_fast.inspect`: what the reward did to a text, in a terminal and as a page."""

import html
import json
import math
import re

import pytest
import tiny
import torch
from rich.console import Console

import rgtg_fast
from rgtg_fast.output import RewardGuidedOutput

TOKENIZER = tiny.tokenizer()


def guided(batch=2, **options):
    """An output with candidates, of rows that end at different steps."""
    usual = {"k": 5, "beta": 2.0, "do_sample": True, "seed": 3, "max_new_tokens": 12}
    usual |= {"return_dict_in_generate": True, "output_candidates": True, "top_k": 0}
    return rgtg_fast.generate(
        tiny.llama_lm(),
        **tiny.prompts(*range(4, 4 + batch), seed=2),
        reward_model=tiny.llama_rm(),
        pad_token_id=tiny.PAD,
        **usual | options,
    )


def made(ids, prompt=(), **columns):
    """An output of one row with these tokens; each column is 0 where it is not given."""
    count = len(ids)
    zeros = torch.zeros(1, count)
    usual = {"rewards": zeros, "kl": zeros, "candidates_scored": torch.ones(1, count).long()}
    return RewardGuidedOutput(sequences=torch.tensor([[*prompt, *ids]]), **usual | columns)


def page_of(seen, tmp_path):
    return seen.to_html(tmp_path / "page.html").read_text()


def data_of(page):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(found)


def test_texts_have_the_tokens_rewards_and_candidates_of_the_output():
    end = int(guided().sequences[0, -4])
    out = guided(eos_token_id=end)  # of the first row, not of the second
    seen = rgtg_fast.inspect(out, TOKENIZER, beta=2.0)
    assert len(seen.texts) == 2
    lengths = [int((out.candidates_scored[row] > 0).sum()) for row in range(2)]
    assert lengths == [9, 12]
    for row, (text, count) in enumerate(zip(seen.texts, lengths, strict=True)):
        (answer,) = text.values()
        prompt = out.sequences.shape[1] - out.rewards.shape[1]
        ids = out.sequences[row, prompt : prompt + count].tolist()
        assert [token.id for token in answer.tokens] == ids
        assert "".join(token.text for token in answer.tokens) == TOKENIZER.decode(ids)
        whole = TOKENIZER.decode(out.sequences[row, :prompt], skip_special_tokens=True)
        assert answer.prompt == whole
        for step, token in enumerate(answer.tokens):
            assert token.reward == float(out.rewards[row, step])
            rewards, logprobs = out.candidate_rewards[row, step], out.candidate_logprobs[row, step]
            mean = float((logprobs.softmax(0) * rewards).sum())
            assert token.gain == pytest.approx(token.reward - mean, abs=1e-5)
            # The policy that candidates are shown with is the one whose KL the output has.
            kl = math.fsum(c.q * (math.log(c.q) - c.logprob) for c in token.candidates if c.q)
            assert kl == pytest.approx(float(out.kl[row, step]), abs=1e-4)
            assert sum(c.id == token.id for c in token.candidates) == 1
        assert answer.kl == pytest.approx(float(out.kl[row].nansum()), abs=1e-4)
        assert answer.reward == float(out.rewards[row, count - 1])


def test_a_greedy_policy_is_certain_and_without_beta_none_is_known():
    out = guided(do_sample=False, temperature=None, top_k=None)
    (row, _) = rgtg_fast.inspect(out, TOKENIZER, beta=2.0, do_sample=False).texts
    for token in row["answer"].tokens:
        assert {c.id: c.q for c in token.candidates}[token.id] == 1.0
    (row, _) = rgtg_fast.inspect(out, TOKENIZER).texts
    assert all(math.isnan(c.q) for token in row["answer"].tokens for c in token.candidates)


def test_candidates_without_a_reward_have_no_share():
    out = guided(prune=True, reward_range=(-8.0, 8.0), beta=0.01)
    seen = rgtg_fast.inspect(out, TOKENIZER, beta=0.01)
    tokens = [token for text in seen.texts for token in text["answer"].tokens]
    unknown = [c for token in tokens for c in token.candidates if math.isnan(c.reward)]
    assert unknown and all(c.q == 0 for c in unknown)
    assert all(math.isfinite(token.gain) for token in tokens)


@pytest.mark.parametrize("text", ["héllo 你好 🙂 ok", "🙂🙂", "a\n\tb  c", "<eos>"])
def test_tokens_within_a_character_lose_none(text):
    ids = TOKENIZER(text)["input_ids"]
    (row,) = rgtg_fast.inspect(made(ids), TOKENIZER).texts
    assert "".join(token.text for token in row["answer"].tokens) == TOKENIZER.decode(ids)


def test_names_stand_side_by_side_and_each_has_its_beta(tmp_path):
    outs = {"base": guided(beta=0.0), "a < b": guided(beta=4.0)}
    seen = rgtg_fast.inspect(outs, TOKENIZER, beta={"base": 0.0, "a < b": 4.0})
    assert [list(row) for row in seen.texts] == [list(outs)] * 2
    for row in range(2):
        token = seen.texts[row]["base"].tokens[0]
        shares = torch.tensor([c.logprob for c in token.candidates]).softmax(0)
        assert [c.q for c in token.candidates] == pytest.approx(shares.tolist(), abs=1e-5)
    assert "a &lt; b" in page_of(seen, tmp_path)


def test_answers_of_many_prompts(tmp_path):
    prompts = [[5, 6, 7], [9, 10]]
    options = {"reward_model": tiny.llama_rm(), "k": 5, "max_new_tokens": 6, "seed": 1}
    answers = list(rgtg_fast.generate_many(tiny.llama_lm(), prompts, **options))
    seen = rgtg_fast.inspect(answers, TOKENIZER)
    for row, answer in zip(seen.texts, answers, strict=True):
        tokens = row["answer"].tokens
        assert [t.reward for t in tokens] == answer.rewards
        assert tokens[1].gain == answer.rewards[1] - answer.rewards[0]
        assert not tokens[0].candidates
    with pytest.raises(ValueError, match="output_candidates=True"):
        seen.candidates(0)
    assert data_of(page_of(seen, tmp_path))[0][0][0][3:] == [-1, []]


def test_the_page_has_everything_in_it_and_no_markup_of_a_text(tmp_path):
    ids = TOKENIZER("</script><b>&amp;")["input_ids"]
    candidates = torch.tensor([[[i, 5] for i in ids]])
    scores = torch.zeros(1, len(ids), 2)
    columns = {"candidate_ids": candidates, "candidate_logprobs": scores.log_softmax(-1)}
    out = made(ids, ids, **columns, candidate_rewards=scores)
    page = page_of(rgtg_fast.inspect(out, TOKENIZER, beta=1.0), tmp_path)
    assert not re.search(r"https?:|src=|@import|url\(", page)
    assert page.count("</script>") == 2 and "<b>" not in page
    visible = re.search(r'<div class="text".*?</article>', page, re.DOTALL).group()
    assert html.unescape(re.sub(r"<[^>]*>", "", visible)) == "</script><b>&amp;"
    assert "".join(step[4][step[3]][0] for step in data_of(page)[0][0]) == "</script><b>&amp;"


def test_numbers_that_json_does_not_have(tmp_path):
    nan = torch.tensor([[math.nan, -math.inf]])
    out = made([5, 6], rewards=nan, kl=nan.clone())
    page = page_of(rgtg_fast.inspect(out, TOKENIZER), tmp_path)
    assert [step[:3] for step in data_of(page)[0][0]] == [[None] * 3] * 2


def test_colours_follow_the_gain_and_lines_the_kl(tmp_path):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.1]])  # gains +1, -1, 0, +0.1
    kl = torch.tensor([[3.0, 0.6, 0.2, 0.0]])
    page = page_of(
        rgtg_fast.inspect(made([5, 6, 7, 8], rewards=rewards, kl=kl), TOKENIZER), tmp_path
    )
    classes = re.findall(r"<i(?: class=\"([^\"]*)\")?>", page)
    assert classes == ["g4 k3", "g-4 k2", "k1", ""]


def test_four_thousand_tokens_with_ten_candidates_are_under_two_megabytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    steps, vocab = 4000, tiny.vocab_size()
    ids = torch.randint(3, vocab, (1, steps), generator=generator)
    candidates = torch.randint(3, vocab, (1, steps, 10), generator=generator)
    values = torch.randn(1, steps, 10, generator=generator)
    columns = {"candidate_ids": candidates, "candidate_logprobs": -values.abs()}
    columns |= {"rewards": values[..., 0], "kl": values[..., 1].abs()}
    out = made(ids[0].tolist(), candidate_rewards=values, **columns)
    page = rgtg_fast.inspect(out, TOKENIZER, beta=1.0).to_html(tmp_path / "page.html")
    assert page.stat().st_size < 2e6
    assert page.read_text().count("<i") == steps


def test_a_terminal_shows_texts_and_the_candidates_of_a_step():
    out = guided(batch=1)
    seen = rgtg_fast.inspect({"PARGS": out}, TOKENIZER, beta=2.0)
    console = Console(width=2000, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    seen.show(console)
    console.print(seen.candidates(3))
    said = console.export_text()
    answer = seen.texts[0]["PARGS"]
    for text in (answer.prompt, "".join(token.text for token in answer.tokens)):
        assert all(word in said for word in re.split(r"[\s\x00-\x1f]+", text))
    marked = next(line for line in said.splitlines() if "▶" in line)
    (taken,) = (c for c in answer.tokens[3].candidates if c.id == answer.tokens[3].id)
    assert repr(taken.text) in marked and f"{taken.reward:+.3f}" in marked


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rgtg_fast.inspect(torch.ones(1, 3), TOKENIZER), "return_dict_in_generate=True"),
        (lambda: rgtg_fast.inspect("text", TOKENIZER), "str is no output"),
        (lambda: rgtg_fast.inspect({}, TOKENIZER), "there is no text"),
        (lambda: rgtg_fast.inspect([], TOKENIZER), "there is no text"),
        (
            lambda: rgtg_fast.inspect({"a": made([5]), "b": [made([5])] * 2}, TOKENIZER),
            r"numbers of prompts differ \(a 1, b 2\)",
        ),
        (lambda: rgtg_fast.inspect(made([5]), "gpt2"), "tokenizer='gpt2' has no decode"),
        (lambda: rgtg_fast.inspect(made([5]), TOKENIZER, temperature=0), "temperature=0; pass"),
        (lambda: rgtg_fast.inspect(rgtg_fast.Answer(3, error="bad"), TOKENIZER), "prompt 3 has no"),
        (lambda: rgtg_fast.inspect(made([5]), TOKENIZER).candidates(1), "the answer has 1 tokens"),
        (lambda: rgtg_fast.inspect(made([5]), TOKENIZER).candidates(0, 1), "prompt=1; there are 1"),
        (
            lambda: rgtg_fast.inspect(made([5]), TOKENIZER).candidates(0, name="x"),
            "name='x'; pass one of answer",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_or_device_changes_nothing(dtype):
    out = guided()
    want = rgtg_fast.inspect(out, TOKENIZER, beta=2.0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            found = rgtg_fast.inspect(out, TOKENIZER, beta=2.0)
    finally:
        torch.set_default_dtype(before)
    assert str(found) == str(want)
