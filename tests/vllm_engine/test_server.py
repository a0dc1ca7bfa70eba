"""`rgtg-fast serve` and the `openai` client give the tokens of `rgtg_fast.generate`."""

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import tiny
from vllm_requests import Request, twelve, two_hundred
from vllm_server import ANSWERS, Load, drawn


@pytest.fixture
def client(server):
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=ANSWERS) as made:
        yield made


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
    assert found == wanted(twelve, guided)


def test_two_hundred_requests_of_all_kinds_over_http(client, wanted):
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda request: answer(client, request, False), two_hundred()))
    assert found == wanted(two_hundred)


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
    assert answer(client, request, False) == wanted(twelve)[0]


def test_a_client_that_hangs_up_leaves_the_others_as_they_are(client, wanted):
    requests = twelve()

    def hang_up(request):
        stream = client.completions.create(**asked(request, stream=True))
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(12) as pool:
        gone = [pool.submit(hang_up, request) for request in requests[::2]]
        rest = [pool.submit(answer, client, request, False) for request in requests[1::2]]
        assert [each.result() for each in rest] == wanted(twelve)[1::2]
        for each in gone:
            each.result()


def known(ask, models):
    """What `generate` gives to a request that is greedy or has a seed."""
    lm, rm = models
    own = {name.removeprefix("rgtg_"): value for name, value in ask.options}
    seed = ask.seed if ask.sampled else None
    request = Request(1, ask.steps, 0, seed=seed, guided=ask.guided, **own)
    request.prompt = list(ask.prompt)
    return request.want(lm, rm)


def test_many_clients_at_a_time_get_right_answers_and_leave_nothing(server, folders):
    """64 of them, four for each row of the engine; every other request is one of a few whose
    answers are known, and a tenth is hung up on."""
    draw, vocabulary = random.Random(1), tiny.vocab_size()
    pool = [ask for ask in (drawn(draw, vocabulary, 0.75, 24) for _ in range(24)) if ask.repeatable]
    models = [folders[name][1] for name in ("lm", "rm")]
    load = Load(vocabulary, 0.75, ignore_eos=False, longest=24, pool=pool)
    load.known = {ask: known(ask, models) for ask in pool}
    asyncio.run(load.run(server.url, 64, 10.0, seed=2))
    assert not load.errors and not load.wrong
    assert len(load.latencies) + load.hung_up >= 64 and load.hung_up
    # Those who hung up have left no request behind.
    end = time.monotonic() + ANSWERS
    while server.at_work():
        assert time.monotonic() < end
        time.sleep(0.2)
    assert server.healthy()
