"""Preferences of `rgtg_fast.evaluation`: position bias, functions, and a local endpoint."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

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
    found = compare(first, [("p", "aaa", "b"), ("p", "c", "dd")])
    assert [row["win"] for row in found] == [0.5, 0.5]
    assert all(row["swapped"] for row in found)


def test_a_real_preference_wins_in_both_positions():
    found = compare(longer, [("p", "aaa", "b"), ("p", "c", "dd")])
    assert [(row["win"], row["swapped"]) for row in found] == [(1.0, False), (0.0, False)]


def test_equal_answers_are_a_tie_and_nobody_is_asked():
    assert compare(wrong, [("p", "x", "x")]) == [{"win": 0.5, "unread": 0, "swapped": False}]


def test_a_function_is_named_when_its_preference_is_out_of_range():
    prefer = make_prefer(WinJudge(function="test_evaluation_wins:wrong"))
    with pytest.raises(ValueError, match=r"test_evaluation_wins:wrong gave 7.0.*\[0, 1\]"):
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


@contextlib.contextmanager
def endpoint(answer):
    """A server for /v1/chat/completions; `answer(body, headers)` gives (status, text)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body, dict(self.headers)))
            status, text = answer(body, len(seen))
            self.send_response(status)
            self.end_headers()
            reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def polite(body, count):
    a, _, b = body["messages"][0]["content"].partition("|")
    return 200, "A" if "thank" in a else "B" if "thank" in b else "C"


def test_an_endpoint_is_asked_in_both_orders_with_template_and_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", "k1")
    with endpoint(polite) as (url, seen):
        judge = WinJudge(url=url, model="m", template="{prompt}: {a}|{b}", key_env="MY_KEY")
        messages = [{"role": "user", "content": "hi"}]
        found = compare(make_prefer(judge), [(messages, "thanks {b}", "no")], workers=2)
    assert found[0]["win"] == 1.0
    texts = sorted(body["messages"][0]["content"] for _, body, _ in seen)
    assert texts == ["user: hi: no|thanks {b}", "user: hi: thanks {b}|no"]
    path, body, headers = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer k1"
    assert body["model"] == "m" and body["temperature"] == 0


def test_a_busy_endpoint_is_asked_again(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with endpoint(lambda body, count: (503, "") if count == 1 else (200, "B")) as (url, seen):
        assert make_prefer(WinJudge(url=url, model="m"))("p", "x", "y") == 0.0
    assert len(seen) == 2


def test_a_refusing_endpoint_is_named_with_what_it_said():
    with endpoint(lambda body, count: (401, "bad key")) as (url, seen):
        with pytest.raises(ValueError, match=r"/v1/chat/completions failed \(HTTP 401.*bad key"):
            make_prefer(WinJudge(url=url, model="m"))("p", "x", "y")
        assert len(seen) == 1


def test_an_unreadable_verdict_is_a_tie_and_counted():
    with endpoint(lambda body, count: (200, "cannot say")) as (url, _):
        found = compare(make_prefer(WinJudge(url=url, model="m")), [("p", "x", "y")])
    assert found == [{"win": 0.5, "unread": 2, "swapped": False}]
