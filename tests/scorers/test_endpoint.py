"""A reward server that is slow, broken or hostile: bounded in time, size and requests."""

import contextlib
import json
import threading
import time

import pytest
import tiny
import torch
from local_http import Quiet, served

import rgtg_fast
from rgtg_fast import RewardEndpoint
from rgtg_fast.scorers import endpoint as module

TEXTS = [f"text {i}" for i in range(10)]


def lengths(texts):
    return [len(text) / 8 for text in texts]


@contextlib.contextmanager
def server(answer):
    """A server; `answer(body, count)` gives JSON, bytes, or (status, headers); what was asked."""
    asked = []

    class Handler(Quiet):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((body, dict(self.headers)))
            given = answer(body, len(asked))
            status, headers = given if isinstance(given, tuple) else (200, {})
            content = given if isinstance(given, bytes) else json.dumps(given).encode()
            with contextlib.suppress(OSError):  # a client that has given up
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

    with served(Handler) as address:
        yield f"{address}/score", asked


def good(body, count):
    return {"rewards": lengths(body["query"])}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.001)


def test_a_server_guides_as_the_function_that_it_has():
    lm, tokenizer = tiny.llama_lm(), tiny.tokenizer()
    options = {"k": 5, "max_new_tokens": 5, "return_dict_in_generate": True, "tokenizer": tokenizer}
    with server(good) as (url, asked):
        got, want = (
            rgtg_fast.generate(lm, **tiny.prompts(3, 6), reward_model=rm, **options)
            for rm in (url, lengths)
        )
    assert torch.equal(got.sequences, want.sequences) and torch.equal(got.rewards, want.rewards)
    assert len(asked) == got.rewards.shape[1]  # one request a step
    prompt = tokenizer.decode(tiny.prompts(3, 6)["input_ids"][1])
    assert any(text.startswith(prompt) for text in asked[0][0]["query"])


@pytest.mark.parametrize(
    "reply",
    [lambda s: {"rewards": s}, lambda s: {"scores": s}, lambda s: s, lambda s: [[x] for x in s]],
)
def test_the_formats_that_servers_have(reply):
    with server(lambda body, n: reply(lengths(body["query"]))) as (url, _):
        assert RewardEndpoint(url)(TEXTS) == lengths(TEXTS)


def test_another_format_is_told_by_two_functions():
    def answer(body, count):
        return {"data": [{"score": len(text)} for text in body["input"]]}

    with server(answer) as (url, _):
        asks = RewardEndpoint(
            url,
            body=lambda texts: {"input": texts},
            scores=lambda reply: [one["score"] for one in reply["data"]],
        )
        assert asks(TEXTS) == [len(text) for text in TEXTS]


@pytest.mark.parametrize(
    "reply, message",
    [
        ({"rewards": [1.0]}, "it gave 1 scores for 10 texts"),
        ([1.0] * 11, "it gave 11 scores for 10 texts"),
        ({"rewards": ["high"] * 10}, r"a score is str\); it must be"),
        ({"rewards": [None] * 10}, "a score is NoneType"),
        ({"rewards": None}, "has no list of scores"),
        ({"error": "overloaded"}, "has no list of scores .KeyError: 'rewards'"),
        ("well done", "has no list of scores .TypeError: a JSON str"),
        ([10**400] * 10, "has no list of scores .OverflowError"),
        (b"<html>", "its reply is no JSON: .*<html>"),
        (b" " * (9 << 20), "its reply is larger than 8 MB"),
        (
            (302, {"Location": "http://127.0.0.1:1/"}),
            "HTTP 302: a redirection, which is not followed",
        ),
        ((400, {}), "HTTP 400"),
    ],
)
def test_replies_without_scores_are_errors(reply, message):
    with server(lambda body, n: reply) as (url, asked):
        with pytest.raises(ValueError, match=rf"reward_model {url} gave no scores.*{message}"):
            RewardEndpoint(url)(TEXTS)
        assert len(asked) == (4 if reply == b"<html>" else 1)


def test_nan_from_a_server_names_row_and_step():
    with (
        server(lambda body, n: {"rewards": [float("nan")] * len(body["query"])}) as (url, _),
        pytest.raises(ValueError, match="row 0, step 0: the reward model gave"),
    ):
        options = {"reward_model": url, "tokenizer": tiny.tokenizer(), "max_new_tokens": 2}
        rgtg_fast.generate(tiny.llama_lm(), **tiny.prompts(3), **options)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_a_server_that_has_no_time_is_asked_again(status):
    def answer(body, count):
        return good(body, count) if count > 2 else (status, {})

    with server(answer) as (url, asked):
        assert RewardEndpoint(url)(TEXTS) == lengths(TEXTS)
        assert len(asked) == 3
        asked.clear()
        with pytest.raises(ValueError, match=f"within 60 s and 1 retries .HTTP {status}"):
            RewardEndpoint(url, retries=1)(TEXTS)
        assert len(asked) == 2


def test_the_pause_that_a_server_asks_for_is_kept():
    def answer(body, count):
        return good(body, count) if count == 2 else (429, {"Retry-After": "1"})

    with server(answer) as (url, asked):
        begun = time.monotonic()
        assert RewardEndpoint(url)(TEXTS) == lengths(TEXTS)
        assert time.monotonic() - begun >= 1
        with pytest.raises(
            ValueError, match=r"gave no scores within 0.5 s and 3 retries .HTTP 429"
        ):
            RewardEndpoint(url, deadline=0.5)(TEXTS)
        assert time.monotonic() - begun < 3 and len(asked) == 3


@pytest.mark.parametrize("batch_size", [10, 2])
def test_a_server_that_never_answers_ends_with_the_deadline(batch_size):
    release = threading.Event()

    def answer(body, count):
        release.wait(20)
        return good(body, count)

    with server(answer) as (url, _):
        begun = time.monotonic()
        with pytest.raises(ValueError, match=r"gave no scores within 0.3 s"):
            RewardEndpoint(url, deadline=0.3, batch_size=batch_size)(TEXTS)
        release.set()
        assert time.monotonic() - begun < 5


def test_no_server_at_all_is_an_error_that_says_what_to_check():
    with server(good) as (url, _):
        pass
    with pytest.raises(ValueError, match=r"Connection refused.*check the server, or pass"):
        RewardEndpoint(url, retries=1)(TEXTS)


def test_many_texts_are_batches_of_which_few_are_on_their_way():
    inside, most = [0], [0]
    looking = threading.Lock()

    def answer(body, count):
        with looking:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        with looking:
            inside[0] -= 1
        return good(body, count)

    texts = [f"text {i}" for i in range(33)]
    with server(answer) as (url, asked):
        assert RewardEndpoint(url, batch_size=4, concurrency=3)(texts) == lengths(texts)
    assert len(asked) == 9 and max(len(body["query"]) for body, _ in asked) == 4
    assert 1 < most[0] <= 3


def test_long_texts_are_fewer_to_a_request(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_BODY", 200)
    texts = ["a" * (10 * i) for i in range(1, 12)]
    with server(good) as (url, asked):
        assert RewardEndpoint(url)(texts) == lengths(texts)
        assert len(asked) > 4
        with pytest.raises(ValueError, match="of 216 bytes, and 200 are the most; pass"):
            RewardEndpoint(url)(["a" * 201])


def test_one_batch_that_fails_ends_the_others():
    release = threading.Event()

    def answer(body, count):
        if "text 0" in body["query"]:
            return 400, {}
        release.wait(20)
        return good(body, count)

    with server(answer) as (url, _):
        begun = time.monotonic()
        with pytest.raises(ValueError, match="HTTP 400"):
            RewardEndpoint(url, batch_size=2)(TEXTS)
        assert time.monotonic() - begun < 5
        release.set()
    assert not [t for t in threading.enumerate() if t.name.startswith("rgtg_fast-reward")]


def test_an_interrupt_ends_all_requests(monkeypatch):
    release = threading.Event()

    def answer(body, count):
        release.wait(20)
        return good(body, count)

    def interrupted(futures, return_when):
        time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "wait", interrupted)
    with server(answer) as (url, _):
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            RewardEndpoint(url, batch_size=2)(TEXTS)
        assert time.monotonic() - begun < 5
        release.set()
    assert not [t for t in threading.enumerate() if t.name.startswith("rgtg_fast-reward")]


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", "hush-hush")

    def answer(body, count):
        return b"hush-hush is wrong" if count > 1 else good(body, count)

    with server(answer) as (url, asked):
        asks = RewardEndpoint(url, key_env="MY_KEY", retries=0)
        assert asks(TEXTS) == lengths(TEXTS)
        assert asked[0][1]["Authorization"] == "Bearer hush-hush"
        with pytest.raises(ValueError, match="is wrong") as said:
            asks(TEXTS)
        assert "hush" not in str(said.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"url": "localhost:8000"}, "reward_model='localhost:8000'; pass the http:// or https://"),
        ({"batch_size": 0}, "batch_size=0; pass an int >= 1"),
        ({"concurrency": True}, "concurrency=True; pass an int >= 1"),
        ({"retries": -1}, "retries=-1; pass an int >= 0"),
        ({"deadline": 0}, "deadline=0; pass seconds > 0"),
        ({"deadline": float("inf")}, "deadline=inf; pass seconds > 0"),
        ({"key_env": "NO_SUCH_KEY"}, "key_env='NO_SUCH_KEY' is no environment variable"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RewardEndpoint(**({"url": "http://127.0.0.1"} | options))
