"""What a step moves between devices, seen without any: torch's fake tensors have one, and no data.

A value that the host asks for raises there (fake tensors have none), and so does an operator on
tensors of two devices; copies show as operators whose result is elsewhere than their argument.
"""

import pytest
import torch
import transformers as tf
import zoo
from graph_emulated import tensors
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from rgtg_fast import ops
from rgtg_fast.decode import graphs
from rgtg_fast.decode.call import Call
from rgtg_fast.decode.logits import CachedLogits
from rgtg_fast.decode.loop import decode
from rgtg_fast.decode.plan import SCORES_ALONE, Plan
from rgtg_fast.decode.ratio_policy import RatioPolicy
from rgtg_fast.decode.record import Record
from rgtg_fast.models import attention, siblings
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.reward_model import RewardModel
from rgtg_fast.ops import reference
from rgtg_fast.scorers import causal, tree

GPU, OTHER = "cpu:1", "cpu:2"  # devices to fake tensors, and any torch knows what to do on them
B, P, K, STEPS = 3, 6, 4, 5
PROCESSORS = (
    tf.TopKLogitsWarper(7),
    tf.TopPLogitsWarper(0.9),
    tf.MinPLogitsWarper(0.1),
    tf.TypicalLogitsWarper(0.9),
    tf.EpsilonLogitsWarper(0.01),
    tf.InfNanRemoveLogitsProcessor(),
    tf.LogitNormalization(),
    tf.SuppressTokensLogitsProcessor([0, 5]),
)


class Copies(TorchDispatchMode):
    """Notes (from, to, shape, dtype) of each copy between devices, in `seen`; in `mixed` other
    operators that take a tensor of the host among the device's (and not one number for
    arithmetic, which goes with the launch)."""

    def __init__(self):
        super().__init__()
        self.seen, self.mixed = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = tensors((args, kwargs))
        arithmetic = func not in (torch.ops.aten.where.self, torch.ops.aten.index.Tensor)
        devices = {str(t.device) for t in given if t.dim() > 0 or not arithmetic}
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            source, into = given[-1], tensors(out)[0]
            if source.device != into.device:
                between = str(source.device), str(into.device)
                self.seen.append((*between, tuple(into.shape), into.dtype))
        elif len(devices) > 1:
            self.mixed.append(str(func))
        return out


class Reached(BaseException):
    """The capture is done: what follows needs values."""


class Watched:
    """A graph whose capture only watches."""

    def __init__(self, device):
        self.copies = Copies()

    def warm_up(self, step):
        step()

    def rehearse(self, step):
        step()
        return []

    def capture(self, step):
        with self.copies:
            step()
        raise Reached


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(attention, "has_holes", lambda mask: False)
    for module in (causal, tree):
        monkeypatch.setattr(module, "without_copies", lambda *given: (*given, None))
    for module in (siblings, tree):
        monkeypatch.setattr(module, "attention_kernel", lambda *_: reference.candidate_attention)
    monkeypatch.setattr(ops, "kernel", lambda op, *_: getattr(reference, op))
    monkeypatch.setattr(graphs, "WORTH", 1)
    with FakeTensorMode(), torch.no_grad():
        yield


def model(cls, family, device, **changes):
    config = zoo.config_of(family, **changes)
    with torch.device(device):
        return cls.from_config(config, dtype=torch.bfloat16).eval()


def run(lm_device, rm_device, steps=STEPS, family="llama", processors=(), graph=None):
    """Decodes with fake models until it needs a value."""
    language = model(tf.AutoModelForCausalLM, family, lm_device)
    reward = model(tf.AutoModelForSequenceClassification, family, rm_device, num_labels=1)
    ids = torch.zeros((B, P), dtype=torch.int64, device=lm_device)
    mask = torch.ones_like(ids)
    for processor in processors:
        if hasattr(processor, "suppress_tokens"):  # a list does not reach a fake device
            processor.suppress_tokens = torch.full((2,), zoo.PAD, device=lm_device)
    eos = torch.full((2,), zoo.EOS, device=lm_device)
    ones = torch.ones((B,), device=lm_device)
    capacity = P + steps
    options = {"eos_ids": eos, "eos_reward": "previous", "capacity": capacity}
    pad = torch.zeros((), dtype=torch.int64, device=lm_device)
    call = Call(
        source=CachedLogits(LanguageModel(language), mask, capacity, "auto", DynamicCache()),
        scorer=tree.TreeScorer(RewardModel(reward), K, fused=True, **options),
        reward_prompt=(ids, mask),
        policy=RatioPolicy(K, ones, ones, ones.long(), True, None, "auto"),
        plan=Plan(steps, eos, sync_every=100, pad=pad, reads_ids=False),
        record=Record(GenerationConfig(return_dict_in_generate=True), True),
        processors=LogitsProcessorList(processors),
        criteria=StoppingCriteriaList(),
        graph=graph,
    )
    decode(call, ids)


def watch_capture(**options):
    graph = Watched(None)
    with pytest.raises(Reached):
        run(GPU, GPU, graph=graph, **options)
    return graph.copies


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_a_captured_step_stays_on_the_device(fake, family):
    copies = watch_capture(family=family)
    assert copies.seen == [] and copies.mixed == []


def test_graph_safe_processors_stay_on_the_device(fake):
    copies = watch_capture(processors=PROCESSORS)
    assert copies.seen == [] and copies.mixed == []


def traffic(steps):
    """Copies between the devices, eagerly, with prefill, first step and `steps` in all."""
    with Copies() as copies, pytest.raises(DataDependentOutputException):
        run(GPU, OTHER, steps=steps)
    return [copy for copy in copies.seen if "cpu" not in copy[:2]]


def test_two_devices_exchange_ids_rewards_and_slots_alone(fake):
    """Candidates there, rewards back, slots there: nothing else, however long the text."""
    step = traffic(STEPS + 1)[len(traffic(STEPS)) :]
    assert step == [
        (GPU, OTHER, (B, K), torch.int64),
        (OTHER, GPU, (B, K), torch.float32),
        (GPU, OTHER, (B,), torch.int64),
    ]


def test_every_graph_safe_processor_is_watched_here():
    assert {type(p) for p in PROCESSORS} == set(SCORES_ALONE)
