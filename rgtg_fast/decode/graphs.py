"""The guided step as a CUDA graph: captured once for a number of rows, then replayed.

A step is a hundred times the launches that its bytes of weights are worth; a replay is one. What it
takes: every tensor of the step stays where it is (`StaticRows`, `Columns`, and the caches, which
are updated in place), and nothing in it waits for the device or hangs on the host's counters.

The first steps of the answer run eagerly, on the capture's stream: they warm up what allocates or
compiles on first use, and count as steps. A capture itself computes nothing; of what it leaves on
the host only the caches' lengths matter, and those are put back. So where a step cannot be captured
the eager steps go on as if nothing had been tried. When rows leave the batch (at halves, so at most
log2(B) times) tensors have moved, and the next steps warm up and capture again.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..scorers.base import Scorer
from .loop import ChoiceCheck, Guidance, Rows, process_logits, score
from .plan import Plan, eos_ids, foreign_criterion, last_step
from .policies import Policy
from .record import Record

WARM_UP = 2  # eager steps before a capture
WORTH = 16  # steps still to come that a capture must serve

# Processors that make of scores what they make of them whatever the step, without the host.
# (Not EtaLogitsWarper: torch.distributions checks its arguments on the host.)
GRAPH_SAFE = (
    tf.TopKLogitsWarper,
    tf.TopPLogitsWarper,
    tf.MinPLogitsWarper,
    tf.TypicalLogitsWarper,
    tf.EpsilonLogitsWarper,
    tf.InfNanRemoveLogitsProcessor,
    tf.LogitNormalization,
    tf.SuppressTokensLogitsProcessor,
)


class Graph(Protocol):
    """What records the launches of a step; `TorchGraph`, and in the tests its emulation on CPU."""

    def __init__(self, device: torch.device) -> None: ...

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run a step as it is, where the capture will run."""

    def capture(self, step: Callable[[], None]) -> None:
        """Record a step without computing it; a failure leaves the device as it was."""

    def replay(self) -> None:
        """Compute the recorded step."""


class TorchGraph:
    """A `torch.cuda.CUDAGraph`; captures after the first share its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], None]) -> None:
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            step()
        outside.wait_stream(self.stream)

    def capture(self, step: Callable[[], None]) -> None:
        graph, failure = torch.cuda.CUDAGraph(), None
        # Other threads (a data loader's) may go on allocating.
        mode: dict[str, Any] = {"stream": self.stream, "capture_error_mode": "thread_local"}
        recording = torch.cuda.graph(graph, pool=self.pool, **mode)
        try:
            # The stream's own context gives it back where the end of a failed capture raises.
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream), recording:
                try:
                    step()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:  # the end of a failed capture raises too, and says nothing
            raise failure or error from None
        self.graph = graph  # the one before goes only now: a pool needs a user

    def replay(self) -> None:
        assert self.graph is not None
        with torch.cuda.device(self.device):
            self.graph.replay()


GRAPHS: dict[str, type[Graph]] = {"cuda": TorchGraph}


class StaticRows(Rows):
    """Rows in a buffer of full length [B, P + T]; a step writes its column in place."""

    def __init__(self, input_ids: Tensor, pad: Tensor | None, steps: int, eos: Tensor) -> None:
        super().__init__(input_ids, pad)
        room = self.origin.new_zeros((self.batch, steps))
        if pad is not None:
            room.copy_(pad)
        self.input_ids = torch.cat([input_ids, room], dim=1)
        self.prompt, self.eos = input_ids.shape[1], eos
        self.step = torch.zeros((1,), dtype=torch.int64, device=input_ids.device)

    def last(self) -> Tensor:
        """The newest tokens [B, 1]."""
        return self.input_ids.index_select(1, self.step + (self.prompt - 1))

    def append(self, ids: Tensor, slot: Tensor) -> Tensor:
        tokens = ids.gather(1, slot[:, None])
        if self.pad is not None:
            tokens = torch.where(self.unfinished[:, None], tokens, self.pad)
        self.steps += self.unfinished.any()
        self.input_ids.index_copy_(1, self.step + self.prompt, tokens)
        self.position += 1
        self.step += 1
        self.unfinished &= ~(tokens == self.eos).any(1)
        return tokens


class Columns:
    """The record's columns in buffers [B, T, ...], made by the first step, which is eager."""

    def __init__(self, record: Record, steps: int) -> None:
        self.record, self.steps = record, steps
        self.buffers: dict[str, Tensor] = {}

    def write(self, step: Tensor, *values: Tensor) -> None:
        if not self.record.on:
            return
        for name, value in self.record.of_step(*values).items():
            if name not in self.buffers:
                shape = (value.shape[0], self.steps, *value.shape[1:])
                self.buffers[name] = value.new_zeros(shape)
            self.buffers[name].index_copy_(1, step, value[:, None])

    def close(self) -> None:
        self.record.columns = {name: list(b.unbind(1)) for name, b in self.buffers.items()}


class Runner:
    """Runs a step: eagerly at first, then by replays. `counters` have the host's `length`s."""

    def __init__(self, step: Callable[[], None], graph: Graph, counters: list[Any]) -> None:
        self.step, self.graph, self.counters = step, graph, counters
        self.captured = self.failed = False
        self.warm = 0

    def __call__(self, left: int) -> None:
        """One step, with `left` to come, this one included."""
        if self.captured:
            self._replay()
        elif self.failed or left < WORTH:
            self.step()
        elif self.warm < WARM_UP:
            self.graph.warm_up(self.step)
            self.warm += 1
        else:
            self._capture()
            self(left)

    def moved(self) -> None:
        """The tensors of the step are others now."""
        self.captured, self.warm = False, 0

    def _replay(self) -> None:
        self.graph.replay()
        for counter in self.counters:
            counter.length += 1

    def _capture(self) -> None:
        lengths = [counter.length for counter in self.counters]
        try:
            self.graph.capture(self.step)
            self.captured = True
        except Exception as error:  # whatever a foreign model does that no graph can hold
            self.failed = True
            warnings.warn(
                f"no CUDA graph could be made of the guided step: {_explain(error)}; steps are "
                "launched one by one (pass cuda_graph=False not to try)",
                stacklevel=2,
            )
        for counter, length in zip(self.counters, lengths, strict=True):
            counter.length = length


@torch.no_grad()
def graphed_decode(
    policy: Policy,
    scorer: Scorer,
    input_ids: Tensor,
    guidance: Guidance,
    plan: Plan,
    record: Record,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    graph: Graph,
) -> dict[str, Any] | Tensor:
    """`guided_decode` by replays of a graph, for what `why_not` finds nothing against.

    The same prompts int64 [B, P], scorer (prefilled) and results. Raises `ValueError` at the end
    for a row with no valid choice.
    """
    prompt = input_ids.shape[1]
    steps = last_step(plan.steps, criteria, prompt)
    rows = StaticRows(input_ids, plan.pad, steps, eos_ids(criteria, input_ids.device))
    check, columns = ChoiceCheck(guidance.check_nan, rows), Columns(record, steps)

    def choose(raw: Tensor) -> None:
        _, scores = process_logits(raw, rows.input_ids, processors, False)
        logprobs, ids = guidance.expand(scores)
        rewards = guidance.bounded(score(scorer, ids))
        slot, logq = guidance.select(logprobs, rewards, ids, rows.position)
        slot = check(slot, rows, logprobs, rewards, 0)
        scorer.commit(slot)
        columns.write(rows.step, rows.unfinished, slot, ids, logprobs, rewards, logq)
        rows.append(ids, slot)

    run = Runner(lambda: choose(policy.step(rows.last())), graph, [policy, scorer])
    for step in range(steps):
        if step:
            run(steps - step)
        else:
            choose(policy.prefill(input_ids))
        if (step + 1) % plan.sync_every:
            continue
        running = int(rows.unfinished.sum())
        if running == 0:
            break
        if plan.compact and 2 * running <= len(rows.unfinished):
            kept = rows.compact()
            policy.keep_rows(kept)
            scorer.keep_rows(kept)  # type: ignore[attr-defined]
            guidance = guidance.keep_rows(kept)
            run.moved()
    check.finish()
    columns.close()
    done = int(rows.steps)
    return record.result(rows.sequences(prompt + done), done, policy.finish(done))


def choose_graph(
    asked: bool | None,
    policy: Policy,
    scorer: Scorer,
    guidance: Guidance,
    plan: Plan,
    record: Record,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    streamed: bool,
) -> Graph | None:
    """A graph for this call, or None where it was not `asked` for or is not possible (with a
    warning that says why where `asked` is True)."""
    if asked is False:
        return None
    device = guidance.seeds.device
    reason = (
        _why_not_host(guidance, plan, record, criteria, streamed)
        or next((why for p in processors if (why := _why_not_processor(p, guidance))), None)
        or _why_not_models(policy, scorer, device)
    )
    if reason is None:
        return GRAPHS[device.type](device)
    if asked:
        warnings.warn(f"cuda_graph=True has no effect: {reason}", stacklevel=3)
    return None


def _why_not_host(
    guidance: Guidance, plan: Plan, record: Record, criteria: StoppingCriteriaList, streamed: bool
) -> str | None:
    """What of a step the host has to see."""
    device = guidance.seeds.device.type
    foreign = foreign_criterion(criteria)
    if device not in GRAPHS:
        return f"the prompts are on a {device} device"
    if streamed:
        return "a streamer takes each token as it comes"
    if plan.synced_gpus:
        return "synced_gpus=True counts the other ranks' steps"
    if foreign is not None:
        return f"the stopping criterion {foreign} runs on the host"
    if guidance.check_nan is True:
        return "check_nan=True looks at every step"
    if record.wants_logits:
        return "output_scores and output_logits keep new tensors at every step"
    return None


def _why_not_processor(processor: Any, guidance: Guidance) -> str | None:
    name, device = type(processor).__name__, guidance.seeds.device
    if type(processor) not in GRAPH_SAFE:
        return f"the logits processor {name} may look at the step, or make the host wait"
    ids = getattr(processor, "suppress_tokens", None)
    if ids is not None and (ids.device != device or ids.numel() >= 10):
        # From some ten ids on, by the size of the vocabulary, torch.isin sorts and waits.
        return f"{name} with {ids.numel()} tokens on {ids.device} makes the host wait"
    return None


def _why_not_models(policy: Any, scorer: Any, device: torch.device) -> str | None:
    if not policy.capturable:
        return "the language model runs on Hugging Face's own cache"
    if not getattr(scorer, "capturable", False):
        kind = getattr(scorer, "method", type(scorer).__name__)
        return f"scoring by {kind!r} does not keep its state in place on the device"
    for what, view in (("language", policy.view), ("reward", getattr(scorer, "rm", None))):
        modules = [] if view is None else [view.model, view.head]
        for part in modules:
            why = _why_not_module(part, device) if isinstance(part, nn.Module) else None
            if why is not None:
                return f"the {what} model {why}"
    return None


def _why_not_module(model: nn.Module, device: torch.device) -> str | None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device != device:
            return f"has weights on {tensor.device}, the prompts are on {device}"
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # transformers' own stay for good once hidden states were asked for, and do nothing here.
        if any(not getattr(h, "__module__", "").startswith("transformers.") for h in hooks):
            return f"has hooks (on {name or 'itself'}), which replays would pass by"
        rope = getattr(module, "rope_type", None)
        kinds = rope.values() if isinstance(rope, dict) else (rope,)
        if any(isinstance(kind, str) and kind in ("dynamic", "longrope") for kind in kinds):
            return f"has rotary embeddings ({name}) that the host sets by the length"
    return None


def _explain(error: BaseException) -> str:
    """The error, and the module and line it came from."""
    text = str(error).strip().splitlines()
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if isinstance(owner := frame.f_locals.get("self"), nn.Module):
            file = frame.f_code.co_filename.rsplit("/", 1)[-1]
            where = f" in {type(owner).__name__} ({file}:{line})"
    return f"{type(error).__name__}{where}: {text[0][:200] if text else ''}"
