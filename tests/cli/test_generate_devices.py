"""`rgtg-fast generate` with models whose layers lie in different places."""

import pytest
from prompt_jobs import LM, PROMPTS, RM

from rgtg_fast.evaluation import models

pytest.importorskip("accelerate")
# Without a second device: what lies on the disk comes for the time of its layer's forward.
SPREAD = "{model.embed_tokens: cpu, model.layers.0: cpu, model.layers.1: disk, model.layers.2: disk"
SPREAD += ", model.norm: cpu, model.rotary_emb: cpu, lm_head: cpu, score: cpu}"


@pytest.fixture
def loaded(monkeypatch):
    """The models that were loaded, by folder."""
    found, real = {}, models.load_model

    def load(task, name, *how):
        found[name] = real(task, name, *how)
        return found[name]

    monkeypatch.setattr(models, "load_model", load)
    return found


@pytest.mark.parametrize("reward_device", [None, "cpu"])
def test_layers_in_several_places_give_the_same_answers(job, loaded, reward_device):
    job.write({"prompt": prompt} for prompt in PROMPTS[:6])
    assert job(do_sample=True) == 0
    want = {name: row["tokens"] for name, row in job.answers().items()}
    other = job.folder / "other.jsonl"
    more = {} if reward_device is None else {"reward_device": reward_device}
    assert job(f"device_map={SPREAD}", do_sample=True, output=other, **more) == 0, job.said
    job.output = other
    assert {name: row["tokens"] for name, row in job.answers().items()} == want
    places = {name: {p.device.type for p in model.parameters()} for name, model in loaded.items()}
    assert places[LM] == {"cpu", "meta"}
    assert places[RM] == ({"cpu", "meta"} if reward_device is None else {"cpu"})


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"device": "cpu"}, ["device_map=auto"], "leave one of them out"),
        ({}, ["device_map=[1]"], "write auto, balanced, sequential or a mapping"),
        ({"device_map": "everywhere"}, [], "cannot be loaded"),
        ({"reward_device": "tpu:0"}, [], "write auto, cpu or cuda"),
        ({"reward_device": "cuda:1"}, [], "cuda"),
    ],
)
def test_places_that_there_are_not(job, options, more, message):
    job.write([{"prompt": PROMPTS[0]}])
    assert job(*more, **options) == 2
    assert message in job.said
