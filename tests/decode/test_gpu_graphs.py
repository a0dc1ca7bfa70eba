"""Guided steps by real CUDA graphs: the tokens and columns of the loop that launches each step."""

import copy
import itertools
import re
import threading
import warnings

import pytest
import torch
import zoo
from graph_cases import BATCH, LMS, PROCESSORS, RMS, WIDTH, OddNorm

import rgtg_fast
from rgtg_fast.decode import graphs
from rgtg_fast.scorers import AutoregressiveScorer, VocabRewardScorer

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
STEPS, K = 24, 4


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """All graphs made so far in this test, each with the batch sizes captured and its replays."""
    graphs_made = []

    class Counted(graphs.GRAPHS[DEVICE]):
        def __init__(self, device):
            super().__init__(device)
            self.count, self.played = 0, 0
            graphs_made.append(self)

        def capture(self, step):
            super().capture(step)
            self.count += 1

        def replay(self):
            super().replay()
            self.played += 1

    monkeypatch.setitem(graphs.GRAPHS, DEVICE, Counted)
    monkeypatch.setattr(graphs, "WORTH", 1)
    torch.use_deterministic_algorithms(False)  # as it is for users; other kernels run with it
    rgtg_fast.free_graphs()
    yield graphs_made
    rgtg_fast.free_graphs()
    torch.use_deterministic_algorithms(True, warn_only=True)


def moved(model, dtype=torch.float32):
    return copy.deepcopy(model).to(DEVICE, dtype)


def guided(lm, rm, **options):
    batch = {name: tensor.to(DEVICE) for name, tensor in BATCH.items()}
    common = {"k": K, "max_new_tokens": STEPS, "seed": 5, "top_k": 0, "sync_every": 5}
    common |= {"return_dict_in_generate": True, "output_candidates": True}
    return rgtg_fast.generate(lm, reward_model=rm, **(batch | common | options))


def assert_same_with_graph(made, lm, rm, **options):
    want = guided(lm, rm, cuda_graph=False, **options)
    assert not made
    got = guided(lm, rm, cuda_graph=True, **options)
    (graph,) = made
    assert graph.count == 1 and graph.played > 0
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.candidate_ids, want.candidate_ids)
    for name in ("rewards", "kl", "candidate_logprobs", "candidate_rewards"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5, equal_nan=True)


DENSE = [(name, "llama") for name in LMS if name != "mixtral"]
DENSE += [("llama", name) for name in RMS if name != "mixtral"]


@pytest.mark.parametrize(("lm", "rm"), DENSE)
def test_every_fused_model(made, lm, rm):
    lm, rm = moved(zoo.lm(lm)), moved(zoo.rm(rm))
    free = guided(lm, rm, cuda_graph=False, do_sample=True)
    eos = int(free.sequences[0, WIDTH + 8])
    options = {"do_sample": True, "eos_token_id": eos, "eos_reward": "previous"}
    assert_same_with_graph(made, lm, rm, **options)


@pytest.mark.parametrize("kind", [AutoregressiveScorer, VocabRewardScorer])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_rewards_of_every_next_token(made, kind, family):
    scorer = kind(moved(zoo.build_lm(family, seed=3)))
    assert_same_with_graph(made, moved(zoo.lm("llama")), scorer, do_sample=True)


@pytest.mark.filterwarnings("ignore:.*(CUDA graph|cuda_graph):UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_captured_or_not(made, dtype):
    """Whether torch's grouped products make the host wait depends on dtype and device."""
    lm, rm = moved(zoo.lm("mixtral"), dtype), moved(zoo.rm("mixtral"), dtype)
    want = guided(lm, rm, cuda_graph=False, do_sample=True)
    got = guided(lm, rm, cuda_graph=True, do_sample=True)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(made, dtype):
    assert_same_with_graph(made, moved(zoo.lm("llama"), dtype), moved(zoo.rm("mistral"), dtype))


def test_processors_of_scores(made):
    lm, rm = moved(zoo.lm("llama")), moved(zoo.rm("llama"))
    assert_same_with_graph(made, lm, rm, do_sample=True, **PROCESSORS)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_leave_at_halves(made, family):
    batch = zoo.left_pad(zoo.prompts(2, (9, 2, 14, 5, 7, 3, 11, 6)))
    options = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    options |= {"max_new_tokens": 60, "do_sample": True, "return_dict_in_generate": False}
    lm, rm = moved(zoo.lm(family)), moved(zoo.rm(family))
    free = guided(lm, rm, cuda_graph=False, compact=False, **options)
    early, late = free[:, WIDTH : WIDTH + 6], free[:, WIDTH + 6 :]
    options["eos_token_id"] = [t for t in range(zoo.VOCAB) if t not in early and t in late][:8]
    whole = guided(lm, rm, cuda_graph=False, compact=False, **options)
    assert torch.equal(guided(lm, rm, cuda_graph=True, **options), whole)
    assert len(made) > 1 and all(graph.count == 1 for graph in made[:-1]) and made[0].played > 0


def test_nan_is_flagged_with_its_row_and_step(made):
    lm, rm = moved(zoo.lm("llama")), moved(zoo.rm("llama"))
    free = guided(lm, rm, cuda_graph=False)
    with torch.no_grad():
        rm.model.embed_tokens.weight[free.candidate_ids[1, 8, 2]] = torch.nan
    messages = []
    for cuda_graph in (False, True):
        with pytest.raises(ValueError, match=r"row \d, step \d+: a NaN") as caught:
            guided(lm, rm, cuda_graph=cuda_graph)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and made[0].played > 0


def test_what_cannot_be_captured_runs_eagerly_and_spoils_nothing(made):
    lm, rm = moved(zoo.lm("llama")), moved(zoo.rm("llama"))
    want = guided(lm, rm, cuda_graph=False)
    odd = moved(zoo.lm("llama"))
    odd.model.layers[1].input_layernorm = OddNorm(odd.model.layers[1].input_layernorm)
    stream = torch.cuda.current_stream()
    why = rf"no CUDA graph .* in OddNorm \({re.escape(OddNorm.asks_at())}\)"
    with pytest.warns(UserWarning, match=why):
        got = guided(odd, rm)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(got.sequences, want.sequences) and made[0].played == 0
    assert torch.equal(guided(lm, rm, cuda_graph=True).sequences, want.sequences)
    assert made[1].played > 0


@pytest.mark.parametrize("seen", ["in the rehearsal", "at the capture"])
def test_a_failed_capture_leaves_the_process_as_it_was(made, seen):
    """Random numbers, the debug mode, and memory that neither a pool nor a stream keeps."""
    lm, rm = moved(zoo.lm("llama")), moved(zoo.rm("llama"))
    guided(lm, rm, cuda_graph=True)
    assert made[0].played > 0
    limit = 0 if seen == "in the rehearsal" else 1 + graphs.WARM_UP
    norm = lm.model.layers[1].input_layernorm
    lm.model.layers[1].input_layernorm = OddNorm(norm, limit)
    held = []
    for _ in range(4):
        del made[:]
        with pytest.warns(UserWarning, match="no CUDA graph"):
            guided(lm, rm)
        torch.manual_seed(3)
        first = torch.rand(4, device=DEVICE)
        torch.manual_seed(3)
        assert torch.equal(torch.rand(4, device=DEVICE), first)
        assert torch.cuda.get_sync_debug_mode() == 0
        assert not torch.cuda.is_current_stream_capturing()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[-1] <= held[1]
    lm.model.layers[1].input_layernorm = norm
    assert_same_with_graph(made, lm, rm, do_sample=True)


def test_another_threads_waits_are_no_reason(made):
    lm, rm = moved(zoo.lm("llama")), moved(zoo.rm("llama"))
    stop, x = threading.Event(), torch.ones(4, device=DEVICE)

    def wait():
        while not stop.is_set():
            x.sum().item()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            guided(lm, rm, cuda_graph=True)
    finally:
        stop.set()
        thread.join()
    assert made[0].played > 0


def test_streams_are_handed_on(made):
    """For each stream torch up to 2.11 keeps a cuBLAS workspace for ever."""
    lm, rm = moved(zoo.lm("llama")), moved(zoo.rm("llama"))
    streams = set()
    for _ in range(5):
        guided(lm, rm, cuda_graph=True)
        streams.add(made[0].stream.cuda_stream)
        del made[:]
        rgtg_fast.free_graphs()
    assert len(streams) == 1


@pytest.mark.parametrize("kind", ["classifier", "head", "genarm"])
def test_a_second_call_replays_the_graph_of_the_first(made, kind):
    """With other prompts and lengths, and weights that changed in place; replaced, it captures."""
    lm, rm = moved(zoo.lm("llama")), moved(zoo.rm("llama"))
    if kind == "head":
        rm = rgtg_fast.RewardHead(lm, torch.randn(lm.config.hidden_size, device=DEVICE))
    elif kind == "genarm":
        rm = AutoregressiveScorer(moved(zoo.build_lm("gpt2", seed=3)))
    layer, captures = lm.model.layers[0].mlp.up_proj, []
    for turn in range(5):
        if turn == 2:
            with torch.no_grad():
                layer.weight.mul_(1.5)
        if turn == 3:
            layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)
        batch = zoo.left_pad(zoo.prompts(turn, (9, 2 + turn, 14 + 3 * turn)))
        options = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        options |= {"do_sample": True, "seed": turn, "max_new_tokens": 20 + turn}
        want = guided(lm, rm, cuda_graph=False, **options)
        got = guided(lm, rm, cuda_graph=True, **options)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(got.rewards, want.rewards, rtol=1e-5, atol=1e-5)
        captures.append(sum(graph.count for graph in made))
    assert captures == [1, 1, 1, 2, 2]


def test_memory_is_given_back_after_each_call(made):
    lm, rm = moved(zoo.lm("llama")), moved(zoo.rm("llama"))
    held = []
    for _ in range(4):
        guided(lm, rm, cuda_graph=True)
        del made[:]
        rgtg_fast.free_graphs()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert all(b <= a for a, b in itertools.pairwise(held[1:]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_reward_model_on_another_device(made):
    lm, rm = moved(zoo.lm("llama")), moved(zoo.rm("llama"))
    want = guided(lm, rm, cuda_graph=False)
    with pytest.warns(UserWarning, match="no effect: the reward model has weights on cuda:1"):
        got = guided(lm, rm.to("cuda:1"), cuda_graph=True)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rounds_of_speculation(made, family):
    lm, rm = moved(zoo.lm(family)), moved(zoo.rm(family))
    for do_sample in (False, True):
        options = {"do_sample": do_sample, "beta": 0.3, "check_nan": False}
        want = guided(lm, rm, cuda_graph=False, speculate=False, **options)
        got = guided(lm, rm, cuda_graph=True, speculate=4, **options)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(got.rewards, want.rewards, atol=2e-3, rtol=1e-3, equal_nan=True)
    assert sum(graph.count for graph in made) == 4 and all(graph.played for graph in made)
