"""What tests of evaluation share: a chat endpoint, and one that has its socket to itself."""

import contextlib
import json
import socket
import threading

import pytest
from local_http import Quiet, served


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("rgtg_fast.evaluation.wins.FIRST_PAUSE", 0.0)


@contextlib.contextmanager
def _endpoint(answer):
    """A server for /v1/chat/completions; `answer(body, count)` gives (status, text), text None for
    a reply that breaks off, bytes for one that is sent as it is."""
    seen = []

    class Handler(Quiet):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body, dict(self.headers)))
            status, text = answer(body, len(seen))
            with contextlib.suppress(OSError):  # a client that has given up
                self.reply(status, text)

        def do_GET(self):  # what a redirection becomes
            seen.append((self.path, None, dict(self.headers)))
            self.send_error(405)

        def reply(self, status, text):
            reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            content = text if isinstance(text, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", text)
            self.send_header("Content-Length", str(len(content) + (text is None)))
            self.end_headers()
            self.wfile.write(content)

    with served(Handler) as address:
        yield f"{address}/v1", seen


@pytest.fixture
def endpoint():
    return _endpoint


@contextlib.contextmanager
def _socket_endpoint(reply):
    """A server that reads each request and leaves its socket to `reply(sock, request)`."""
    asked = []

    def serve(sock):
        with sock, contextlib.suppress(OSError):
            request = b""
            while not request.endswith(b"}"):  # of the JSON that ends it
                request += sock.recv(1 << 16)
            asked.append(request)
            reply(sock, request)

    def accept(server):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept, args=(server,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/v1", asked
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def socket_endpoint():
    return _socket_endpoint
