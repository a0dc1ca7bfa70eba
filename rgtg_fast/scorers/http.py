"""One POST to an endpoint that may be slow, broken or hostile: bounded in time and in size."""

from __future__ import annotations

import functools
import http.client
import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

LARGEST_REPLY = 8 << 20  # bytes; a chat completion of 100,000 tokens has less than a tenth of it
_SHOWN = 200  # characters of an error's text


class _Unredirected(urllib.request.HTTPRedirectHandler):
    """Makes a redirection an error: followed, it would send prompts and key to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Refused(ValueError):
    """The endpoint gave no usable reply; `again` says whether another try may bring one, `after`
    how many seconds it asks to wait before."""

    def __init__(self, why: str, again: bool = True, after: float | None = None) -> None:
        super().__init__(why)
        self.again, self.after = again, after


class Endpoint:
    """Posts JSON to `url` and reads JSON, with the secret `key` (None: none) as a bearer token.

    Raises `ValueError` for a key that cannot stand in a header, without showing it.
    """

    def __init__(self, url: str, key: str | None, key_env: str | None) -> None:
        # Not left to http.client, whose error would show the key.
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise ValueError(
                f"the key in {key_env} holds a line break, a space or another character "
                "that no HTTP header takes; export it without"
            )
        self.url, self.key = url, key
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.closed = threading.Event()

    def post(self, body: bytes, timeout: float) -> Any:
        """The JSON that answers the JSON `body`, all of it within `timeout` seconds.

        Redirections are not followed. Raises `Refused` for every other reply.
        """
        request = urllib.request.Request(self.url, body)
        request.add_header("Content-Type", "application/json")
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        with self._deadline(timeout) as (connect, passed):
            try:
                opener = urllib.request.build_opener(_Unredirected, _HTTP(connect), _HTTPS(connect))
                with opener.open(request, timeout=timeout) as answer:
                    data = answer.read(LARGEST_REPLY + 1)
                    missing = answer.length  # read(n) does not raise where a reply breaks off
            except urllib.error.HTTPError as error:
                raise self._refused(error) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if passed.is_set():
                    raise Refused(f"no whole reply within {timeout:g} s") from None
                raise Refused(self._shown(f"{type(error).__name__}: {error}")) from None
        if passed.is_set():  # the deadline cut it off, which may look like an end
            raise Refused(f"no whole reply within {timeout:g} s")
        if len(data) > LARGEST_REPLY:
            raise Refused(f"its reply is larger than {LARGEST_REPLY >> 20} MB", again=False)
        if missing:
            raise Refused(f"its reply breaks off {missing} bytes before its end")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise Refused(f"its reply is no JSON: {self._shown(repr(data[:_SHOWN]))}") from None

    def close(self) -> None:
        """Break off requests of other threads, and refuse new ones."""
        with self._lock:
            self.closed.set()
            for sock in self._open:
                _cut(sock)

    def _refused(self, error: urllib.error.HTTPError) -> Refused:
        text = "a redirection, which is not followed" if error.code // 100 == 3 else ""
        with error, suppress(OSError, http.client.HTTPException):
            text = text or error.read(_SHOWN).decode(errors="replace")
        again = error.code >= 500 or error.code in (408, 409, 425, 429)
        after = error.headers.get("Retry-After", "")
        seconds = float(after) if re.fullmatch(r"\d{1,9}", after) else None
        return Refused(f"HTTP {error.code}: {self._shown(text)}", again, seconds)

    def _shown(self, text: str) -> str:
        """Text of the other side as one line, without the key and control characters."""
        text = text.replace(self.key, "***") if self.key else text
        return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))

    @contextmanager
    def _deadline(self, seconds: float) -> Iterator[tuple[Any, threading.Event]]:
        """A callback for each socket that is opened, and an event. Once time is over the event is
        set and the socket shut down: its own timeout starts anew with every byte received."""
        mine: list[socket.socket] = []
        passed = threading.Event()

        def connect(sock: socket.socket) -> None:
            with self._lock:
                mine.append(sock)
                self._open.add(sock)
                if passed.is_set() or self.closed.is_set():
                    _cut(sock)

        def expire() -> None:
            with self._lock:
                passed.set()
                for sock in mine:
                    _cut(sock)

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield connect, passed
        finally:
            timer.cancel()
            with self._lock:
                self._open.difference_update(mine)


def _cut(sock: socket.socket) -> None:
    with suppress(OSError, ValueError):  # closed already
        sock.shutdown(socket.SHUT_RDWR)


class _Watched:
    """Makes urllib's handlers tell `connect` of each socket that they open."""

    def __init__(self, connect: Callable[[socket.socket], None]) -> None:
        super().__init__()
        self.connect = connect

    def watched(self, kind: Any, host: str, **options: Any) -> http.client.HTTPConnection:
        connection = kind(host, **options)
        plain = connection.connect

        def connected() -> None:
            plain()
            self.connect(connection.sock)

        connection.connect = connected
        return connection


class _HTTP(_Watched, urllib.request.HTTPHandler):
    def http_open(self, request: Any) -> Any:
        return self.do_open(functools.partial(self.watched, http.client.HTTPConnection), request)  # type: ignore[arg-type]


class _HTTPS(_Watched, urllib.request.HTTPSHandler):
    def https_open(self, request: Any) -> Any:
        return self.do_open(functools.partial(self.watched, http.client.HTTPSConnection), request)  # type: ignore[arg-type]
