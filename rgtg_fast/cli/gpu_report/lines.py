"""Every figure that is wanted of a GPU: what, how much, and where it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .results import (
    Got,
    Results,
    failed_tests,
    host_microseconds,
    least_over_torch,
    microseconds,
    most_over_empty_launch,
    most_over_other,
    of_contender,
    of_two,
    share_of_copy,
)
from .steps import SANITIZERS


@dataclass(frozen=True)
class Line:
    """A figure with a bound, or, without one, a figure that is to be stated."""

    id: str
    text: str
    read: Callable[[Results], Got | None]
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def wanted(self) -> str:
        if self.at_most is not None:
            return "0" if self.at_most == 0 else f"≤ {self.at_most:g} {self.unit}".rstrip()
        return "stated" if self.at_least is None else f"≥ {self.at_least:g} {self.unit}".rstrip()

    def judge(self, results: Results) -> tuple[Got | None, str]:
        """What was got, and "met", "missed", "stated" or "not run"."""
        got = None if results.dry else self.read(results)
        if got is None:
            return None, "not run"
        if self.at_most is None and self.at_least is None:
            return got, "stated"
        low = float("-inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return got, "met" if low <= got.value <= high else "missed"


def _topk(rows: int, k: int) -> str:
    return f"B={rows} V=151936 bfloat16 k={k}"


STEP_CASES = tuple(f"B={rows} k=10 H=4096 bfloat16" for rows in (1, 8, 64))
VOCAB_CASE = "B=64 k=64 V=128000 H=4096 bfloat16"
ATTENTION_CASES = tuple(
    f"B={rows} T={length} k=10 32/8x128 bfloat16" for rows, length in ((1, 2048), (8, 8192))
)
TOPK_64 = tuple(_topk(rows, 64) for rows in (1, 64, 256))
GUIDED = ("auto", "compiled")  # contenders with a separate reward model
PAIR = "8B + 8B, prompt 512"

LINES = (
    Line(
        "tests", "the tests that need a GPU: graphs, streams, no host wait, memory given back",
        failed_tests("test_gpu"), "failed", at_most=0,
    ),
    Line(
        "matrix", "every op on every backend against the reference",
        failed_tests("matrix"), "failed", at_most=0,
    ),
    *(
        Line(f"sanitizer-{tool}", f"compute-sanitizer {tool} over every op", read, "", at_most=0)
        for tool in SANITIZERS
        for read in [failed_tests(f"sanitizer.{tool}")]
    ),
    *(
        Line(
            f"topk-k{k}-b{rows}", f"topk_logprobs, V=151,936 bf16, k={k}, B={rows}",
            microseconds("topk_logprobs", _topk(rows, k)), "µs", at_most=bound,
        )
        for k, rows, bound in (
            (10, 1, 10), (10, 64, 12), (10, 256, 30), (64, 1, 15), (64, 64, 20), (64, 256, 40),
        )
    ),
    Line(
        "topk-torch", "topk_logprobs, k=64: times faster than torch's log_softmax + topk, least",
        least_over_torch("topk_logprobs", TOPK_64), "x", at_least=4,
    ),
    Line(
        "topk-flashinfer", "topk_logprobs, k=64: time over FlashInfer's top_k, most",
        most_over_other("topk_logprobs", TOPK_64, "flashinfer"), "x", at_most=1,
    ),
    *(
        Line(
            f"ratio-step-b{rows}", f"ratio_step, H=4096, k=10, B={rows}",
            microseconds("ratio_step", case), "µs", at_most=5,
        )
        for rows, case in zip((1, 8, 64), STEP_CASES, strict=True)
    ),
    Line(
        "ratio-step-launch", "ratio_step, H=4096, k=10, B ≤ 64: time over an empty launch, most",
        most_over_empty_launch("ratio_step", STEP_CASES), "x", at_most=1.5,
    ),
    *(
        Line(
            f"vocab-reward-{bound}", "vocab_reward, B=64, k=64, H=4096: share of a copy",
            share_of_copy("vocab_reward", VOCAB_CASE), "%", at_least=bound,
        )
        for bound in (60, 65)
    ),
    *(
        Line(
            f"attention-{bound}", "candidate_attention, B=8, L=8192, k=10, 32/8: share of a copy",
            share_of_copy("candidate_attention", ATTENTION_CASES[1]), "%", at_least=bound,
        )
        for bound in (70, 75)
    ),
    Line(
        "attention-host", "candidate_attention in Triton: what a call costs the host, most",
        host_microseconds("candidate_attention", ATTENTION_CASES, "triton"), "µs", at_most=15,
    ),
    Line(
        "token", f"{PAIR}, B=1, k=10: a token after the first",
        of_contender(1, 10, GUIDED, "decode_ms", "{name}, {ms_per_token:.1f} in whole calls"),
        "ms", at_most=10,
    ),
    Line(
        "floor", f"{PAIR}, B=1, k=10: a token over the weights' read",
        of_contender(1, 10, GUIDED, "over_floor", "{name}, floor {floor_ms:.1f} ms"),
        "x", at_most=1.25,
    ),
    Line(
        "plain", f"{PAIR}, B=1, k=10: over plain eager generate of the LM alone",
        of_contender(1, 10, GUIDED, "over_plain", "{name}"), "x", at_most=1,
    ),
    Line(
        "k40", f"{PAIR}, B=1: a token at k=40 over k=10",
        of_two(1, ("auto", 40), ("auto", 10), "decode_ms"), "x", at_most=1.15,
    ),
    *(
        Line(
            f"adapter-{bound}", f"{PAIR}, B=1, k=10: adapter over plain static compiled generate",
            of_two(1, ("adapter", 10), ("static", 10), "ms_per_token"), "x", at_most=bound,
        )
        for bound in (1.4, 1.3)
    ),
    *(
        Line(
            f"throughput-b{rows}", f"{PAIR}, B={rows}, k=10: guided tokens a second",
            of_contender(rows, 10, GUIDED, "tokens_per_s", "{name}, {over_plain:.2f} x plain"),
        )
        for rows in (1, 8, 32)
    ),
    *(
        Line(
            f"speculation-b{rows}", f"{PAIR}, B={rows}, k=10: with speculation over without",
            of_two(rows, ("speculation", 10), ("auto", 10), "ms_per_token"), "x",
        )
        for rows in (1, 8)
    ),
)  # fmt: skip
