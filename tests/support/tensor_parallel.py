"""``torchrun tests/support/tensor_parallel.py FOLDER``: a guided answer of models whose layers are
split over the processes by transformers; each process writes how it went to FOLDER/<rank>.json (on
one standard output the lines of two processes run into each other)."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rgtg_fast
from rgtg_fast.demo.run import ASSETS

PROMPT = "customer : my kettle leaks and it is one month old . agent :"


def answer(**split):
    """Tokens of the answer, and the class of a layer's weights."""
    lm = AutoModelForCausalLM.from_pretrained(ASSETS / "lm", **split).eval()
    guide = ASSETS / "rm_partial"
    rm = AutoModelForSequenceClassification.from_pretrained(guide, **split).eval()
    inputs = AutoTokenizer.from_pretrained(ASSETS / "lm")(PROMPT, return_tensors="pt")
    options = {"beta": 2.0, "do_sample": True, "seed": 3, "max_new_tokens": 20}
    out = rgtg_fast.generate(lm, **inputs, reward_model=rm, **options)
    weight = lm.model.layers[0].self_attn.q_proj.weight
    return out[0, inputs["input_ids"].shape[1] :].tolist(), type(weight).__name__


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    tokens, weights = answer(tp_plan="auto")
    report = Path(sys.argv[1]) / f"{os.environ['RANK']}.json"
    report.write_text(json.dumps({"tokens": tokens, "weights": weights}))
    torch.distributed.destroy_process_group()
