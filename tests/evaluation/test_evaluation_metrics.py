"""Figures of `rgtg_fast.evaluation` against values worked out by hand or by scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from rgtg_fast.evaluation import Bootstrap, jackknife, share, wilson
from rgtg_fast.evaluation.metrics import distinct, distinct_without, diversity, repetition
from rgtg_fast.evaluation.settings import check_settings
from rgtg_fast.evaluation.summary import RunRows, summarise

ABAB = [1, 2, 1, 2]  # bigrams 12, 21, 12; trigrams 121, 212


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repetition(ABAB, 2) == pytest.approx(1 / 3)
    assert repetition(ABAB, 3) == 0
    assert repetition([7, 7, 7, 7, 7], 4) == pytest.approx(1 / 2)


def test_an_answer_too_short_for_an_ngram_repeats_nothing():
    assert repetition([5], 2) == 0 and diversity([]) == 1


def test_diversity_multiplies_what_is_new():
    assert diversity(ABAB) == pytest.approx(2 / 3)
    assert diversity([3] * 5) == pytest.approx(1 / 4 * 1 / 3 * 1 / 2)


def test_distinct_counts_over_all_answers():
    assert distinct([ABAB, [2, 1, 3]], 1) == pytest.approx(3 / 7)
    assert distinct([ABAB, [2, 1, 3]], 2) == pytest.approx(3 / 5)  # 12, 21, 13
    assert distinct([[1], []], 2) == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_without_an_answer_is_distinct_of_the_others(n):
    rng = np.random.default_rng(n)
    answers = [rng.integers(5, size=size).tolist() for size in (6, 1, 4, 9, 0, 3)]
    direct = [distinct(answers[:i] + answers[i + 1 :], n) for i in range(len(answers))]
    np.testing.assert_allclose(distinct_without(answers, n), direct)


def test_intervals_are_those_of_scipy():
    values = np.random.default_rng(1).exponential(size=40)
    got = Bootstrap(40, resamples=20_000).interval(values)
    other = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=2)
    assert got.mean == pytest.approx(values.mean())
    assert got.low == pytest.approx(other.confidence_interval.low, abs=0.02)
    assert got.high == pytest.approx(other.confidence_interval.high, abs=0.02)
    assert got.se == pytest.approx(other.standard_error, rel=0.03)


def test_resamples_equal_to_the_mean_lean_to_neither_side():
    got = Bootstrap(20).interval(np.array([0.0, 1.0] * 10))
    assert got.low + got.high == pytest.approx(1, abs=1e-6)


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap(40, resamples=400, confidence=0.9)
    estimates = [bootstrap.interval(rng.normal(size=40)) for _ in range(400)]
    covered = np.mean([e.low <= 0 <= e.high for e in estimates])
    assert 0.85 < covered < 0.94  # 0.9, less what 40 prompts and 400 resamples take; se 0.015


def test_a_difference_is_paired_by_prompt():
    rng = np.random.default_rng(3)
    hard = rng.normal(scale=10, size=60)  # some prompts are worth less to every run
    bootstrap = Bootstrap(60)
    difference = bootstrap.interval(hard + 0.5 + 0.1 * rng.normal(size=60) - hard)
    alone = bootstrap.interval(hard)
    assert 0.4 < difference.low < difference.high < 0.6
    assert difference.se < alone.se / 50


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=12)
    assert Bootstrap(12).interval(values) == Bootstrap(12).interval(values)
    assert Bootstrap(12).interval(values) != Bootstrap(12, seed=1).interval(values)


def test_large_sets_are_resampled_in_parts_to_the_same_end(monkeypatch):
    values = np.random.default_rng(0).exponential(size=50)
    whole = Bootstrap(50, resamples=500).interval(values)
    monkeypatch.setattr("rgtg_fast.evaluation.bootstrap._CHUNK", 50 * 64)
    parts = Bootstrap(50, resamples=500).interval(values)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_equal_values_have_no_spread_and_one_value_no_interval():
    equal = Bootstrap(9).interval(np.full(9, 0.1))
    assert (equal.low, equal.high, equal.se) == (equal.mean, equal.mean, 0)
    one = Bootstrap(1).interval(np.array([2.0]))
    assert one.mean == 2 and math.isnan(one.low)


def test_unknown_values_are_left_out():
    got = Bootstrap(4).interval(np.array([1.0, math.nan, 3.0, math.nan]))
    assert (got.mean, got.n) == (2.0, 2) and got.low >= 1
    assert Bootstrap(2).interval(np.full(2, math.nan)).n == 0


def test_the_jackknife_of_a_mean_has_its_standard_error():
    values = np.random.default_rng(4).normal(size=30)
    got = jackknife(values.mean(), (values.sum() - values) / 29)
    assert got.se == pytest.approx(values.std(ddof=1) / math.sqrt(30))
    assert got.high - got.mean == pytest.approx(1.959964 * got.se)


def _row(i, reward, logp=-4.0, ids=(5, 6, 7), end=1):
    shared = {"kl": 0.0, "log_ratio": 0.0, "proxy": None, "logp": logp}
    return {"i": i, "text": "", "ids": list(ids), "end": end, "reward": reward, **shared}


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return check_settings(
        {
            "model": str(tmp_path),
            "prompts": "p.jsonl",
            "judge": "math:fsum",
            "output_dir": "o",
            "runs": [{"name": "a"}, {"name": "b", "top_k": 3}],
            "seeds": 2,
        }
    )


def test_a_summary_averages_seeds_per_prompt_and_compares_with_the_baseline(settings):
    runs = {
        "a": RunRows({0: [_row(0, 1.0), _row(1, 2.0)], 1: [_row(0, 3.0), _row(1, 4.0)]}),
        "b": RunRows({0: [_row(0, 4.0), _row(1, 5.0)], 1: [_row(0, 6.0), _row(1, 7.0)]}),
    }
    found = summarise(settings, runs)
    assert found["a"]["metrics"]["reward"]["mean"] == 2.5
    assert found["a"]["seed_means"]["1"]["reward"] == 3.5
    difference = found["b"]["difference"]["reward"]
    assert (difference["mean"], difference["low"], difference["high"]) == (3, 3, 3)
    assert found["a"]["difference"] == {}
    assert found["a"]["metrics"]["proxy"]["mean"] is None  # JSON has no NaN


def test_perplexity_is_per_token_with_eos(settings):
    cut = _row(1, 0.0, logp=-6.0, end=None)
    found = summarise(
        settings, {"a": RunRows({0: [_row(0, 0.0), cut]}), "b": RunRows({0: [cut, cut]})}
    )
    assert found["a"]["metrics"]["nll"]["mean"] == pytest.approx((4 / 4 + 6 / 3) / 2)
    assert found["b"]["metrics"]["perplexity"]["mean"] == pytest.approx(math.exp(2))
    assert found["a"]["metrics"]["finished"]["mean"] == 0.5


def test_every_measure_of_diversity_is_of_the_answers_ids(settings):
    loop, other = [7, 7, 7, 7, 7, 8], [1, 2, 3, 4, 5, 6]
    runs = {
        "a": RunRows({0: [_row(0, 0.0, ids=loop), _row(1, 0.0, ids=other)]}),
        "b": RunRows(
            {
                0: [_row(0, 0.0, ids=other), _row(1, 0.0, ids=other)],
                1: [_row(0, 0.0, ids=other), _row(1, 0.0, ids=loop)],
            }
        ),
    }
    found = summarise(settings, runs)
    measured = {name: value["mean"] for name, value in found["a"]["metrics"].items()}
    for n, seen in ((2, 3 / 5), (3, 2 / 4), (4, 1 / 3)):  # of `loop`, before
        assert measured[f"rep_{n}"] == pytest.approx(seen / 2)
    assert measured["diversity"] == pytest.approx((1 + 2 / 5 * 2 / 4 * 2 / 3) / 2)
    assert measured["distinct_2"] == pytest.approx(7 / 10)
    b = found["b"]
    assert b["metrics"]["distinct_2"]["mean"] == pytest.approx((5 / 10 + 7 / 10) / 2)
    assert b["difference"]["distinct_2"]["mean"] == pytest.approx(-0.1)
    # Left out: the first or the second prompt, of the run less of the baseline.
    left = np.array([(1 + 2 / 5) / 2 - 1, 1 - 2 / 5])
    assert b["difference"]["distinct_2"]["se"] == pytest.approx(left.std())


def test_the_error_of_perplexity_is_that_of_its_logarithm_times_it(settings):
    rows = [_row(i, 0.0, logp=-4.0 - 0.1 * i) for i in range(6)]
    found = summarise(settings, {"a": RunRows({0: rows}), "b": RunRows({0: rows})})
    nll, perplexity = (found["a"]["metrics"][m] for m in ("nll", "perplexity"))
    assert perplexity["mean"] == pytest.approx(math.exp(nll["mean"]))
    assert perplexity["low"] == pytest.approx(math.exp(nll["low"]))
    assert perplexity["se"] == pytest.approx(perplexity["mean"] * nll["se"])


def test_win_rates_say_how_they_came_about(settings):
    wins = [
        {"win": 1.0, "unread": 0, "swapped": False},
        {"win": 0.5, "unread": 0, "swapped": True},
        {"win": 0.5, "unread": 2, "swapped": False},
        {"win": 0.0, "unread": 0, "swapped": False},
    ]
    run = RunRows({0: [_row(i, 0.0) for i in range(4)]}, {0: wins})
    found = summarise(settings, {"a": RunRows(run.by_seed), "b": run})["b"]
    assert found["win_rate"]["mean"] == 0.5
    assert found["win_details"] == {"ties": 0.25, "swapped": 0.25, "unread": 2}


@pytest.mark.parametrize(("wins", "n"), [(0, 8), (8, 8), (1, 20), (13, 40), (500, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_of_a_share_is_wilsons(wins, n, confidence):
    got = share(np.array([1.0] * wins + [0.0] * (n - wins)), confidence)
    want = stats.binomtest(wins, n).proportion_ci(confidence, method="wilson")
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-12)
    assert got.mean == wins / n and got.n == n and 0 <= got.low <= got.high <= 1


def test_values_that_spread_less_than_a_coins_have_a_narrower_interval():
    halves = share(np.array([0.5, 0.75] * 20))
    coin = share(np.array([1.0] * 25 + [0.0] * 15))
    assert halves.mean == coin.mean
    assert halves.high - halves.low < (coin.high - coin.low) / 3


def test_the_interval_of_a_share_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for p in (0.02, 0.5, 0.97):
        draws = rng.random((2000, 50)) < p
        found = [share(row.astype(float)) for row in draws]
        covered = np.mean([one.low <= p <= one.high for one in found])
        assert 0.91 < covered < 0.99


def test_a_share_of_a_single_prompt_has_no_interval():
    assert np.isnan(share(np.array([1.0])).low) and np.isnan(wilson(0.5, np.nan, 1).high)


@pytest.mark.parametrize("ids", [[[1, 2, 3]] * 4, [[1, 2], [3, 4], [5, 6], [7, 7]]])
def test_intervals_of_shares_stay_between_0_and_1(settings, ids):
    rows = [_row(i, 0.0, ids=own) for i, own in enumerate(ids)]
    found = summarise(settings, {"a": RunRows({0: rows}), "b": RunRows({0: rows})})["a"]
    for name in ("distinct_1", "distinct_2", "distinct_3", "finished", "diversity"):
        value = found["metrics"][name]
        assert 0 <= value["low"] <= value["mean"] <= value["high"] <= 1
    assert found["metrics"]["finished"]["low"] < 1  # four of four are no certainty
