"""Preferences of `rgtg_fast.evaluation`: position bias, functions, and a local endpoint."""

import pytest

from rgtg_fast.evaluation import WinJudge
from rgtg_fast.evaluation.wins import compare, make_prefer, verdict


def first(prompt, a, b):
    return 1.0


def longer(prompt, a, b):
    return 0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b)))


def wrong(prompt, a, b):
    return 7


def test_a_liking_for_the_first_position_wins_nothing():
    found = list(compare(first, [("p", "aaa", "b"), ("p", "c", "dd")]))
    assert [row["win"] for row in found] == [0.5, 0.5]
    assert all(row["swapped"] for row in found)


def test_a_real_preference_wins_in_both_positions():
    found = compare(longer, [("p", "aaa", "b"), ("p", "c", "dd")])
    assert [(row["win"], row["swapped"]) for row in found] == [(1.0, False), (0.0, False)]


def test_equal_answers_are_a_tie_and_nobody_is_asked():
    found = list(compare(wrong, [("p", "x", "x")]))
    assert found == [{"win": 0.5, "unread": 0, "swapped": False}]


def test_a_function_is_named_when_its_preference_is_out_of_range():
    prefer = make_prefer(WinJudge(function="test_evaluation_wins:wrong"))
    with pytest.raises(ValueError, match=r"test_evaluation_wins:wrong gave 7;.*\[0, 1\]"):
        prefer("p", "a", "b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 1.0),
        (" b.\n", 0.0),
        ("**C**", 0.5),
        ("Both are fine: Tie", None),
        ("Answer A helps, answer B does not.\nVerdict: A", 1.0),
        ("I prefer B", 0.0),
        ("A or B, hard to say", None),
        ("", None),
    ],
)
def test_verdicts_are_read_from_what_models_say(text, value):
    assert verdict(text) == value


def polite(body, count):
    a, _, b = body["messages"][0]["content"].partition("|")
    return 200, "A" if "thank" in a else "B" if "thank" in b else "C"


def test_an_endpoint_is_asked_in_both_orders_with_template_and_key(monkeypatch, endpoint):
    monkeypatch.setenv("MY_KEY", "k1")
    with endpoint(polite) as (url, seen):
        judge = WinJudge(url=url, model="m", template="{prompt}: {a}|{b}", key_env="MY_KEY")
        messages = [{"role": "user", "content": "hi"}]
        (found,) = compare(make_prefer(judge), [(messages, "thanks {b}", "no")], workers=2)
    assert found["win"] == 1.0
    texts = sorted(body["messages"][0]["content"] for _, body, _ in seen)
    assert texts == ["user: hi: no|thanks {b}", "user: hi: thanks {b}|no"]
    path, body, headers = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer k1"
    assert body["model"] == "m" and body["temperature"] == 0


def test_a_busy_endpoint_is_asked_again(endpoint):
    with endpoint(lambda body, count: (503, "") if count == 1 else (200, "B")) as (url, seen):
        assert make_prefer(WinJudge(url=url, model="m"))("p", "x", "y") == 0.0
    assert len(seen) == 2


def test_an_answer_cut_short_or_of_another_shape_is_asked_for_again(endpoint):
    replies = [b"{", b'{"choices": [{"message": {"content": ["A"]}}]}', b'{"error": 1}']

    def reply(body, count):
        return 200, replies[count - 1] if count <= 3 else "A"

    with endpoint(reply) as (url, seen):
        assert make_prefer(WinJudge(url=url, model="m"))("p", "x", "y") == 1.0
    assert len(seen) == 4


def test_a_connection_lost_in_mid_answer_is_tried_again(endpoint):
    with endpoint(lambda body, count: (200, None if count == 1 else "B")) as (url, seen):
        assert make_prefer(WinJudge(url=url, model="m"))("p", "x", "y") == 0.0
    assert len(seen) == 2


def test_the_verdict_of_a_redirection_is_not_asked_for_nor_believed(monkeypatch, endpoint):
    monkeypatch.setenv("MY_KEY", "k1")
    with (
        endpoint(lambda body, count: (200, "A")) as (other, seen),
        endpoint(lambda body, count: (302, other + "/x")) as (url, first),
        pytest.raises(ValueError, match=r"HTTP 302: a redirection, which is not followed"),
    ):
        make_prefer(WinJudge(url=url, model="m", key_env="MY_KEY"))("p", "x", "y")
    assert len(first) == 1 and "Authorization" in first[0][2]
    assert seen == []


@pytest.mark.parametrize("workers", [1, 2])
def test_verdicts_come_one_by_one_until_the_judge_fails(workers):
    def until_third(prompt, a, b):
        if prompt == 2:
            raise ValueError("no more")
        return 1.0

    found = compare(until_third, [(i, "x", "y") for i in range(4)], workers)
    assert [next(found)["win"], next(found)["win"]] == [0.5, 0.5]
    with pytest.raises(ValueError, match="no more"):
        next(found)


def test_a_refusing_endpoint_is_named_with_what_it_said(endpoint):
    with endpoint(lambda body, count: (401, "bad key")) as (url, seen):
        with pytest.raises(ValueError, match=r"/v1/chat/completions failed \(HTTP 401.*bad key"):
            make_prefer(WinJudge(url=url, model="m"))("p", "x", "y")
        assert len(seen) == 1


def test_an_unreadable_verdict_is_a_tie_and_counted(endpoint):
    with endpoint(lambda body, count: (200, "cannot say")) as (url, _):
        found = list(compare(make_prefer(WinJudge(url=url, model="m")), [("p", "x", "y")]))
    assert found == [{"win": 0.5, "unread": 2, "swapped": False}]
