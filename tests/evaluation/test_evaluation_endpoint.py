"""A judge's endpoint that is slow, broken or hostile: bounded in time and memory, secrets kept."""

import contextlib
import json
import threading
import time
import tracemalloc

import pytest

from rgtg_fast.evaluation import WinJudge
from rgtg_fast.evaluation.wins import compare, make_prefer
from rgtg_fast.scorers import http as module

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
VERDICT = json.dumps({"choices": [{"message": {"content": "A"}}]}).encode()


def ask(url, **options):
    judge = WinJudge(**{"url": url, "model": "m", "retries": 2} | options)
    return make_prefer(judge)("p", "x", "y")


@contextlib.contextmanager
def failing(message, server):
    """The url of a server, asking which fails with that message, and what was asked."""
    with server as found, pytest.raises(ValueError, match=message):
        yield found


def drip(data, pause=0.02):
    """Sends one byte at a time, until nobody listens."""

    def reply(sock, request):
        for byte in data:
            sock.sendall(bytes([byte]))
            time.sleep(pause)

    return reply


def forever():
    while True:
        yield ord(" ")


@pytest.mark.parametrize(
    "start",
    [b"HTTP/1.1 200 OK\r\nX-Long: ", HEAD + b"\r\n", HEAD + b"Content-Length: 999999\r\n\r\n"],
    ids=["header", "body", "body of known length"],
)
def test_bytes_that_drip_do_not_outlast_the_timeout(socket_endpoint, start):
    def reply(sock, request):
        sock.sendall(start)
        drip(forever())(sock, request)

    with (
        socket_endpoint(reply) as (url, asked),
        pytest.raises(ValueError, match=r"no whole reply within 0.3 s.*What was judged is kept"),
    ):
        ask(url, timeout=0.3)
    assert len(asked) == 2


def test_a_whole_verdict_that_came_too_late_is_none(socket_endpoint):
    """A body without a length is whole when the connection ends, and ours ends at the timeout."""

    def reply(sock, request):
        sock.sendall(HEAD + b"\r\n" + VERDICT)
        drip(forever())(sock, request)

    with socket_endpoint(reply) as (url, _), pytest.raises(ValueError, match="no whole reply"):
        ask(url, timeout=0.3)


def test_a_silent_endpoint_ends_with_an_error(socket_endpoint):
    release = threading.Event()
    with (
        socket_endpoint(lambda sock, request: release.wait(30)) as (url, _),
        pytest.raises(ValueError, match=r"no whole reply within 0.1 s"),
    ):
        ask(url, timeout=0.1)
        release.set()


def test_a_slow_verdict_within_the_timeout_counts(socket_endpoint):
    data = HEAD + b"Content-Length: %d\r\n\r\n" % len(VERDICT) + VERDICT
    with socket_endpoint(drip(data, 0.001)) as (url, _):
        assert ask(url, timeout=30.0) == 1.0


@pytest.mark.parametrize("length", [b"Content-Length: 600000000\r\n\r\n", b"\r\n"])
def test_a_huge_reply_is_not_taken_into_memory(socket_endpoint, length):
    def reply(sock, request):
        sock.sendall(HEAD + length)
        for _ in range(600):
            sock.sendall(b" " * 1_000_000)

    tracemalloc.start()
    try:
        with failing("its reply is larger than 8 MB", socket_endpoint(reply)) as (url, asked):
            ask(url)
        assert tracemalloc.get_traced_memory()[1] < 4 * module.LARGEST_REPLY
    finally:
        tracemalloc.stop()
    assert len(asked) == 1  # another try would bring it again


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "RemoteDisconnected"),
        (b"nonsense\r\n\r\n", "BadStatusLine"),
        (HEAD + b"X: " + b"x" * 70_000 + b"\r\n\r\n", "LineTooLong"),
        (HEAD + b"X: y\r\n" * 200 + b"\r\n", "got more than 100 headers"),
        (HEAD + b"Content-Length: 5\r\n\r\n\xff\xfe\xfd\xfc\xfb", "its reply is no JSON"),
        (HEAD + b"\r\n<html>", "its reply is no JSON: b'<html>'"),
        (HEAD + b"\r\n" + b"[" * 100_000, "its reply is no JSON"),
        (HEAD + b"\r\n[]", r"has no choices\[0\].message.content"),
        (HEAD + b'\r\n{"choices": []}', r"has no choices\[0\].message.content"),
        (HEAD + b'\r\n{"choices": [{"message": {"content": {}}}]}', "its message is dict"),
        (HEAD + b"Content-Length: 200\r\n\r\n" + VERDICT, "breaks off 156 bytes before"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", "IncompleteRead"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "IncompleteRead|ValueError"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 900\r\n\r\nsorry", "HTTP 500: sorry"),
        (b"HTTP/1.1 500 Oh\r\n\r\n\x1b[2Jgone", r"HTTP 500: \?\[2Jgone"),
        (b"HTTP/1.1 503 \xff\r\n\r\n\xff\xfe", "HTTP 503"),
    ],
)
def test_a_broken_reply_is_asked_for_again_and_then_named(socket_endpoint, data, message):
    server = socket_endpoint(lambda sock, request: sock.sendall(data))
    with failing(f"failed .*{message}.*the same command goes on", server) as (url, asked):
        ask(url)
    assert len(asked) == 2


def test_redirections_in_a_circle_end_at_the_first(socket_endpoint):
    data = b"HTTP/1.1 307 Go\r\nLocation: /v1/chat/completions\r\nContent-Length: 0\r\n\r\n"
    server = socket_endpoint(lambda sock, request: sock.sendall(data))
    with failing("HTTP 307: a redirection, which is not followed", server) as (url, asked):
        ask(url)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "key", ["sec\nret", "secret\n", "secret\r", "sec ret", "secr\u00e9t", "\x00sec"]
)
def test_a_key_that_no_header_takes_is_an_error_that_does_not_show_it(monkeypatch, key):
    monkeypatch.setattr("os.environ", {"MY_KEY": key})
    with pytest.raises(ValueError, match="the key in MY_KEY holds a line break") as error:
        make_prefer(WinJudge(url="http://127.0.0.1:9/v1", model="m", key_env="MY_KEY"))
    assert "sec" not in str(error.value) and key not in str(error.value)


def test_a_key_that_the_endpoint_repeats_is_not_shown(monkeypatch, endpoint):
    monkeypatch.setenv("MY_KEY", "s3cret")
    server = endpoint(lambda body, count: (401, b"no such key: s3cret"))
    with server as (url, _), pytest.raises(ValueError, match=r"no such key: \*\*\*") as error:
        ask(url, key_env="MY_KEY")
    assert "s3cret" not in str(error.value)


def test_an_error_does_not_wait_for_the_replies_of_other_threads(socket_endpoint):
    waits, release = threading.Event(), threading.Event()

    def reply(sock, request):
        if b"the second" in request:
            waits.set()
            release.wait(30)
        else:
            waits.wait(30)
            sock.sendall(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")

    with socket_endpoint(reply) as (url, asked):
        prefer = make_prefer(WinJudge(url=url, model="m", timeout=25.0))
        before = set(threading.enumerate())
        pairs = [("the first", "x", "y"), ("the second", "x", "y")]
        with pytest.raises(ValueError, match="HTTP 401"):
            list(compare(prefer, pairs, workers=2))
        threads = [t for t in set(threading.enumerate()) - before if "ThreadPool" in t.name]
        assert any(thread.is_alive() for thread in threads)
        prefer.close()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads) and len(asked) == 2
        release.set()
