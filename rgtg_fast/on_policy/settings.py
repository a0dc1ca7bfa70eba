"""What on-policy refinement is told: the mapping `on_policy` of a training config, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..evaluation import models
from ..evaluation.settings import check_model, is_function, load_function
from ..jobs.settings import known_options
from ..scorers.endpoint import RewardEndpoint
from ..training.config_file import check_keys, typed
from ..training.data import one_of

HAND = "hand"
PAIRS = ("all", "best_worst")
MAX_NEW_TOKENS = 64
# Of `generate_many`: what the rounds say themselves, or what would take several answers for one.
_NOT_SAID = {"do_sample", "num_return_sequences", "num_beams", "reward_kind", "reward_label"}
_ENDPOINT = ("url", "batch_size", "concurrency", "deadline", "retries", "key_env")


@dataclass(frozen=True)
class OnPolicy:
    """What the rounds do; the other keys of `generate_many` (beta, k, temperature, ..) stand beside
    these and are in `options`.

    Args:
        lm: the language model that is guided, folder or hub name; its token ids are the reward
            model's too.
        prompts: JSONL file, `{"prompt": text or messages}` a line.
        judge: who says which answer is better. A classifier with one label that reads whole answers
            (folder or hub name), a function `list[str] -> list[float]` of the texts prompt + answer
            (`module:function`, or a callable), a server of such scores (URL, or a mapping with
            `url` and options of `RewardEndpoint`); or "hand": each round writes its pairs to
            to_label.jsonl and stops, and the next start takes the labels from there.
        rounds: of sampling, labelling and training.
        samples: answers to each prompt in a round.
        reward_model: what guides the first round (default: a reward model that is trained on the
            pairs of `train` first, or, without `train`, the config's `model`).
        prompts_per_round: so many of the prompts, others in each round while there are any
            (default: all of them in every round).
        pairs: "all" two answers to a prompt, or the "best_worst" alone. "hand" asks for the first
            and second, third and fourth, .. of the answers that differ.
        draw: draws the winner of a pair by Bradley-Terry from the judge's scores, which are then
            log-odds, instead of taking the higher one.
        mix: share of the pairs of `train` that is trained on beside those of all rounds so far.
        batch_size: rows at a time, of sampling and judging.
        options: of `generate_many`.
    """

    lm: str
    prompts: str
    judge: Any
    rounds: int = 1
    samples: int = 4
    reward_model: str | None = None
    prompts_per_round: int | None = None
    pairs: str = "all"
    draw: bool = False
    mix: float = 1.0
    batch_size: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def by_hand(self) -> bool:
        """Whether people label."""
        return isinstance(self.judge, str) and self.judge == HAND


FIELDS = {f.name: f for f in dataclasses.fields(OnPolicy) if f.name != "options"}


def check_on_policy(values: Any) -> OnPolicy:
    """Settings from a mapping.

    Raises `ValueError` for unknown keys (naming the nearest known one), missing keys, values of the
    wrong kind or out of range, and models and functions that are not there.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"on_policy is {values!r:.60}; write a mapping with lm, prompts and judge")
    options = known_options() - _NOT_SAID
    check_keys(values, [*FIELDS, *sorted(options)], "on_policy: ")
    missing = [name for name in ("lm", "prompts", "judge") if not values.get(name)]
    if missing:
        raise ValueError(f"on_policy lacks {', '.join(missing)}; set {missing[0]}: ...")
    plain = {
        name: typed(f"on_policy: {name}", value, FIELDS[name])
        for name, value in values.items()
        if name in FIELDS and name != "judge"
    }
    own = {name: value for name, value in values.items() if name in options}
    found = OnPolicy(
        **plain, judge=values["judge"], options={"max_new_tokens": MAX_NEW_TOKENS} | own
    )
    one_of("on_policy: pairs", found.pairs, PAIRS)
    for name, least in (("rounds", 1), ("samples", 2), ("batch_size", 1), ("prompts_per_round", 1)):
        value = getattr(found, name)
        if value is not None and value < least:
            raise ValueError(f"on_policy: {name}={value}; pass at least {least}")
    if not 0 <= found.mix <= 1:
        raise ValueError(f"on_policy: mix={found.mix}; pass a share of the pairs, 0 to 1")
    for name in ("lm", "reward_model"):
        value = getattr(found, name)
        if value is not None:
            check_model(f"on_policy: {name}", value)
            models.check_found(f"on_policy: {name}", value)
    if found.by_hand:
        for name in ("pairs", "draw"):
            if name in values:
                raise ValueError(f"on_policy: {name} has no part in labels by hand; drop it")
    else:
        check_judge(found.judge)
    return found


def check_judge(judge: Any) -> None:
    """Raises `ValueError` for what cannot judge, before anything is loaded."""
    if callable(judge):
        return
    if isinstance(judge, Mapping):
        check_keys(judge, _ENDPOINT, "on_policy: judge: ")
        if "url" not in judge:
            raise ValueError(f"on_policy: judge={judge!r}; a mapping is a server's, with its url")
        endpoint_of(judge)
    elif not isinstance(judge, str):
        raise ValueError(
            f"on_policy: judge={judge!r}; write a folder or hub name, a URL, module:function, a "
            "mapping with url, or hand"
        )
    elif is_url(judge):
        endpoint_of(judge)
    elif is_function(judge):
        load_function("on_policy: judge", judge)
    else:
        check_model("on_policy: judge", judge)
        models.check_found("on_policy: judge", judge)
        models.check_classifier("on_policy: judge", judge)


def is_url(judge: str) -> bool:
    """Whether the judge is a server."""
    return judge.startswith(("http://", "https://"))


def endpoint_of(judge: Any) -> Callable[[list[str]], list[float]]:
    """The server that a URL, or a mapping with one, means."""
    given = {"url": judge} if isinstance(judge, str) else dict(judge)
    return RewardEndpoint(given.pop("url"), **given)


def judge_identity(judge: Any) -> Any:
    """What tells a judge from another."""
    if callable(judge):
        return f"{judge.__module__}:{getattr(judge, '__qualname__', type(judge).__qualname__)}"
    if isinstance(judge, Mapping):
        # It is written down, and a URL may hold a key.
        return {"url": models.digest(judge["url"])}
    if is_url(judge):
        return models.digest(judge)
    return judge if judge == HAND else models.identity(judge)
