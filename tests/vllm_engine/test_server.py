"""`rgtg-fast serve` and the `openai` client give the tokens of `rgtg_fast.generate`."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from vllm_requests import BETA, MAX_LEN, K, twelve


def free_port():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


@pytest.fixture(scope="module")
def client(folders, tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "rgtg_fast", "serve", folders["lm"][0]]
    command += ["--reward-model", folders["rm"][0], "--k", str(K), "--beta", str(BETA)]
    command += ["--kv-gib", "0.25", "--vllm", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", str(MAX_LEN), "--max-num-seqs", "16", "--enforce-eager"]
    command += ["--served-model-name", "guided", "--host", "127.0.0.1"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None:
                    pytest.fail(log.read_text()[-3000:])
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-3000:])
        url = f"http://127.0.0.1:{port}/v1"
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


def asked(request, stream=False):
    extra = {f"rgtg_{name}": value for name, value in request.own.items()}
    body = {"vllm_xargs": extra if request.guided else {"rgtg": 0}, "return_token_ids": True}
    return {
        "model": "guided",
        "prompt": request.prompt,
        "max_tokens": request.steps,
        "temperature": 0.0 if request.seed is None else 1.0,
        "seed": request.seed,
        "stream": stream,
        "extra_body": body,
    }


def answer(client, request, stream):
    made = client.completions.create(**asked(request, stream))
    if not stream:
        return list(made.choices[0].token_ids)
    return [token for part in made for c in part.choices for token in c.token_ids]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("guided", [True, False], ids=["all guided", "half unguided"])
def test_concurrent_requests_get_the_tokens_of_generate(client, wanted, guided, stream):
    requests = twelve(guided)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda request: answer(client, request, stream), requests))
    assert found == wanted(guided)


@pytest.mark.parametrize(
    "xargs",
    [
        {"rgtg_k": 65},
        {"rgtg_k": "many"},
        {"rgtg_beta": "big"},
        {"rgtg_beta": [1, 2]},
        {"rgtg_bta": 1.0},
        {"rgtg_seed": 1e300},
    ],
)
def test_a_hostile_body_is_answered_400_and_the_server_goes_on(client, wanted, xargs):
    request = twelve()[0]
    body = asked(request)
    body["extra_body"]["vllm_xargs"] = xargs
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**body)
    assert answer(client, request, False) == wanted()[0]


def test_a_client_that_hangs_up_leaves_the_others_as_they_are(client, wanted):
    requests = twelve()

    def hang_up(request):
        stream = client.completions.create(**asked(request, stream=True))
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(12) as pool:
        gone = [pool.submit(hang_up, request) for request in requests[::2]]
        rest = [pool.submit(answer, client, request, False) for request in requests[1::2]]
        assert [each.result() for each in rest] == wanted()[1::2]
        for each in gone:
            each.result()
