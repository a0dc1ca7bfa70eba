"""What a call does before its loop is bounded: nothing is probed, unwrapped or built twice."""

import sys
from collections import Counter
from pathlib import Path

import rgtg_fast
from rgtg_fast.demo.run import load_assets

PACKAGE = str(Path(rgtg_fast.__file__).parent)
MOST = 180  # 40 of them choose kinds of reward, candidates, warpers, compiled forwards, speculation


def functions_called_before_the_loop(call):
    """(file, function) of each call of the package until the loop begins."""
    seen = []

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            seen.append((code.co_filename.removeprefix(PACKAGE), code.co_name))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    loops = ("/decode/loop.py", "decode"), ("/decode/speculation.py", "speculate")
    loop = next(i for i, name in enumerate(seen) if name in loops)
    return [name for name in seen[:loop] if not name[1].startswith("<")]


def test_a_call_on_the_embedded_models_resolves_in_few_steps():
    assets = load_assets()
    inputs = assets.tokenizer(assets.prompts["test"][:2], return_tensors="pt", padding=True)
    rm = assets.reward_models["rm_partial"]

    def call():
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "seed": 1, "beta": 2.0}
        rgtg_fast.generate(assets.lm, **inputs, reward_model=rm, **options)

    call()  # the probes' verdicts are kept
    seen = functions_called_before_the_loop(call)
    assert len(seen) < MOST, Counter(seen).most_common(12)
    assert seen.count(("/generate.py", "generate")) == 1
