"""The demo's task: short customer-support replies with an exact, explainable gold reward.

A prompt names a product, a problem and an age, which together decide the *right fix*. A reply is a
sequence of sentences, each from a finite grammar, so every reply can be parsed back exactly and the
gold reward of the whole text is a small sum of terms that a reader can check by hand
(`explain_gold`). Most of it is decided late:

- a promise counts only if nothing later takes it back, and only the last one counts;
- blame is forgiven if an apology follows, and an apology is empty if help is refused;
- "have a nice day" is good after a fix and mockery after a refusal;
- several sentences share their first words and mean opposite things ("a new kettle is on its way to
  you." and "a new kettle is not something we can offer.").

Replies come from three tempers. *Smooth* ones begin warmly and often end in a refusal, *gruff* ones
begin with blame and often end in an apology and a fix, *plain* ones do as they say. So the value of
a prefix (what it tends to lead to) is not its value as a text, which is the situation that reward
models for guided decoding have to handle. One reply in five has a slip, so that reward models have
seen broken text as well. Nothing in the task knows about any decoding method.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

# fmt: off
PRODUCTS = (
    "kettle", "lamp", "toaster", "radio", "drill", "heater", "mixer", "printer",
    "camera", "phone", "scooter", "tent", "blender", "fan", "watch", "chair",
)
# fmt: on

# problem -> the kind of case it is; a fault's right fix also depends on the product's age.
PROBLEMS = {
    "does not work": "fault",
    "stops after a minute": "fault",
    "came apart": "fault",
    "has a crack": "fault",
    "makes a loud noise": "fault",
    "gets too hot": "fault",
    "never arrived": "parcel",
    "is lost in the post": "parcel",
    "was charged twice": "billing",
    "cost more than you said": "billing",
}
AGES = {
    "i bought it last week": "new",
    "it is one month old": "new",
    "i got it in spring": "new",
    "i bought it long ago": "old",
    "it is four years old": "old",
    "i have had it for ages": "old",
}
GREETINGS = ("", "hello ,", "hi there ,", "good morning ,", "listen ,")
TAILS = (
    "",
    "please help .",
    "what now ?",
    "i am not happy .",
    "it was a gift .",
    "i need it today .",
)

FIXES = ("replace", "repair", "refund", "resend")

# act -> its sentences. An act `fix:<name>` promises that fix.
SENTENCES: dict[str, tuple[str, ...]] = {
    "thanks": (
        "thank you for your message .",
        "thank you for telling us about the {product} .",
        "it is good that you wrote to us .",
    ),
    "check": (
        "let me look at your order .",
        "i have looked at your order .",
        "i have asked our workshop about your {product} .",
    ),
    "apology": (
        "we are sorry about the {product} .",
        "we are very sorry for the trouble .",
        "to be honest , this is our own fault and we are sorry .",
    ),
    "blame": (
        "to be honest , this is your own fault .",
        "you must have used the {product} in the wrong way .",
        "i have to say that nobody else has trouble with this {product} .",
    ),
    "fix:replace": (
        "we will send you a new {product} today .",
        "a new {product} is on its way to you .",
        "we cannot leave it like this , so you will get a new {product} .",
    ),
    "fix:repair": (
        "our workshop will repair your {product} at half the price .",
        "we will repair your {product} at half the price .",
        "we cannot leave it like this , so our workshop will repair your {product} .",
    ),
    "fix:refund": (
        "the money for the {product} is on its way back to you .",
        "we will send your money back today .",
        "we cannot leave it like this , so you will get your money back .",
    ),
    "fix:resend": (
        "we will send your parcel again by express .",
        "your parcel is on its way again by express .",
        "we cannot leave it like this , so your parcel will go out again today .",
    ),
    "refuse": (
        "a new {product} is not something we can offer .",
        "the money for the {product} will stay with us .",
        "our workshop will not look at your {product} .",
        "your parcel is not our problem .",
        "we cannot do anything about your {product} .",
        "we will not do more for you .",
    ),
    "withdraw": (
        "but please do not count on it .",
        "but you will have to pay for that in full .",
        "but that is up to our workshop , and they say no .",
    ),
    "care": (
        "but please tell us if anything else is wrong .",
        "you will not have to pay for the post .",
        "we will write to you as soon as it is done .",
    ),
    "close": (
        "have a nice day !",
        "we wish you all the best !",
        "all the best from our team !",
    ),
    "curt": (
        "have it your way .",
        "that is all .",
        "we wish to hear no more about it .",
    ),
}

# The terms of the gold reward. Their sums lie in GOLD_RANGE.
RESOLUTION = {"right": 1.5, "wrong": -0.5, "none": -0.75, "refused": -1.0, "withdrawn": -1.5}
APOLOGY, BLAME = 0.25, -0.75
CLOSE_AFTER_FIX, CLOSE_AS_MOCKERY, CURT, NO_CLOSING = 0.75, -0.25, -0.5, -0.5
UNFINISHED = -1.0
SLIP, MAX_SLIPS = -0.5, 3  # a sentence outside the grammar, about another product, or said twice
GOLD_RANGE = (-5.25, 2.5)


@dataclass(frozen=True)
class Case:
    """What a prompt says: `product`, and the one `fix` (of FIXES) that is right for it."""

    product: str
    fix: str


def right_fix(problem: str, age: str) -> str:
    """The fix that settles `problem` (a key of PROBLEMS) at `age` (a key of AGES)."""
    kind = PROBLEMS[problem]
    if kind == "fault":
        return "replace" if AGES[age] == "new" else "repair"
    return "resend" if kind == "parcel" else "refund"


def _prompt(greeting: str, product: str, problem: str, age: str, tail: str) -> str:
    said = f"{greeting} my {product} {problem} and {age} . {tail}"
    return " ".join(f"customer : {said} agent :".split())


def all_prompts() -> list[str]:
    """Every prompt of the grammar, in a fixed order: 28,800 of them."""
    parts = itertools.product(GREETINGS, PRODUCTS, PROBLEMS, AGES, TAILS)
    return [_prompt(*p) for p in parts]


SPLIT_SIZES = {"test": 200, "beta": 200, "eval": 1000}


def split_prompts(seed: int) -> dict[str, list[str]]:
    """Disjoint prompts: `test` for the demo, `beta` to choose β on, `eval` to measure the models
    on, and `train` (all others)."""
    prompts = all_prompts()
    random.Random(seed).shuffle(prompts)
    splits, start = {}, 0
    for name, size in SPLIT_SIZES.items():
        splits[name] = prompts[start : start + size]
        start += size
    return {**splits, "train": prompts[start:]}


_PROMPT = re.compile(
    rf"my (?P<product>{'|'.join(PRODUCTS)}) "
    rf"(?P<problem>{'|'.join(PROBLEMS)}) and (?P<age>{'|'.join(AGES)}) "
)


def read_case(prompt: str) -> Case:
    """Product and right fix of a `prompt`. Raises ValueError if it is none of the grammar's."""
    found = _PROMPT.search(words(prompt))
    if found is None:
        raise ValueError(f"prompt={prompt!r} is not of this task's grammar; see all_prompts()")
    return Case(found["product"], right_fix(found["problem"], found["age"]))


def words(text: str) -> str:
    """Lower-case `text` with single spaces around words and marks, as the tokenizer splits it."""
    return " ".join(re.findall(r"[a-z]+|[.,:!?]", text.lower()))


def pretty(text: str) -> str:
    """`text` as people write it: marks joined to their word, sentences capitalised."""
    joined = re.sub(r" ([.,:!?])", r"\1", words(text))
    capital = re.sub(r"(^|[.!?:] )([a-z])", lambda m: m[1] + m[2].upper(), joined)
    return re.sub(r"\bi\b", "I", capital)


# How often a temper is met and how often it helps; how a promised fix is chosen: the right one, the
# house habit (the workshop), or any. Habits are the mode of the corpus, as cheap answers are.
TEMPERS = {"plain": (0.35, 0.55), "smooth": (0.45, 0.25), "gruff": (0.2, 0.7)}
FIX_CHOICE = {"right": 0.4, "habit": 0.3, "any": 0.3}


def _fix_promised(case: Case, rng: random.Random) -> str:
    how = rng.choices(list(FIX_CHOICE), list(FIX_CHOICE.values()))[0]
    fix = {"right": case.fix, "habit": "repair", "any": rng.choice(FIXES)}[how]
    return f"fix:{fix}"


def _opening(temper: str, helps: bool, rng: random.Random) -> list[str]:
    if temper == "plain":
        return rng.choice([["thanks"], ["check"], ["thanks", "check"], ["check", "apology"]])
    if temper == "smooth":
        return rng.choice([["thanks", "apology"], ["apology", "check"], ["apology", "thanks"]])
    opening = rng.choice([["blame"], ["check", "blame"], ["blame", "check"]])
    return opening + ["apology"] * (rng.random() < (0.8 if helps else 0.2))


def _outcome(case: Case, helps: bool, rng: random.Random) -> list[str]:
    if helps:
        return [_fix_promised(case, rng)] + ["care"] * (rng.random() < 0.4)
    how = rng.choices(["withdraw", "refuse", "nothing"], [0.5, 0.4, 0.1])[0]
    if how == "withdraw":
        return [_fix_promised(case, rng), "withdraw"]
    return ["refuse"] if how == "refuse" else []


def _acts(case: Case, rng: random.Random) -> list[str]:
    temper = rng.choices(list(TEMPERS), [often for often, _ in TEMPERS.values()])[0]
    helps = rng.random() < TEMPERS[temper][1]
    ending = rng.choices(["close", "curt", ""], [0.6, 0.2, 0.2])[0]
    acts = _opening(temper, helps, rng) + _outcome(case, helps, rng)
    return acts + [ending] * bool(ending)


def _with_slip(said: list[str], rng: random.Random) -> list[str]:
    """`said` with a slip of the hand: a word left out, said twice or mistaken for another, or the
    rest of the reply missing."""
    at = rng.randrange(len(said))
    slip = rng.choice(["drop", "repeat", "mistake", "stop"])
    if slip == "drop":
        return said[:at] + said[at + 1 :]
    if slip == "repeat":
        return said[: at + 1] + said[at:]
    if slip == "mistake":
        mistaken = rng.choice(PRODUCTS) if said[at] in PRODUCTS else rng.choice(said)
        return [*said[:at], mistaken, *said[at + 1 :]]
    return said[:at]


def sample_reply(prompt: str, rng: random.Random, slips: float = 0.2) -> str:
    """One reply to `prompt` from the grammar, as space-separated words (no EOS).

    People type with slips: a share `slips` of the replies has one.
    """
    case = read_case(prompt)
    said = " ".join(rng.choice(SENTENCES[act]) for act in _acts(case, rng))
    reply = said.format(product=case.product).split()
    return " ".join(_with_slip(reply, rng) if rng.random() < slips else reply)


_ACT_OF = {
    sentence.format(product=product): (act, product if "{product}" in sentence else None)
    for act, sentences in SENTENCES.items()
    for sentence in sentences
    for product in PRODUCTS
}


def parse_reply(case: Case, reply: str) -> list[str]:
    """The acts of `reply` in order; `slip` for a sentence that is outside the grammar, names
    another product or was said before, and `cut` for a last sentence without its end mark."""
    acts: list[str] = []
    seen: set[str] = set()
    for sentence in re.findall(r"[^.!?]+[.!?]?|[.!?]", words(reply)):
        sentence = sentence.strip()
        if not sentence:
            continue
        act, product = _ACT_OF.get(sentence, ("slip", None))
        if sentence[-1] not in ".!?":
            act = "cut"
        elif sentence in seen or product not in (None, case.product):
            act = "slip"
        seen.add(sentence)
        acts.append(act)
    return acts


def _resolution(case: Case, acts: list[str]) -> str:
    """How the matter stands at the end: a key of RESOLUTION."""
    state = "none"
    for act in acts:
        if act.startswith("fix:"):
            state = "right" if act == f"fix:{case.fix}" else "wrong"
        elif act == "refuse" or (act == "withdraw" and state == "none"):
            state = "refused"
        elif act == "withdraw":
            state = "withdrawn"
    return state


def _last(acts: list[str], act: str) -> int:
    return max((i for i, a in enumerate(acts) if a == act), default=-1)


def explain_gold(prompt: str, reply: str, finished: bool = True) -> dict[str, float]:
    """The terms of the gold reward of `reply` to `prompt`, by name; their sum is `gold_reward`.

    `finished` says whether the reply came to its own end (EOS) or was stopped by a length limit.
    """
    case = read_case(prompt)
    acts = parse_reply(case, reply)
    state = _resolution(case, acts)
    terms = {f"resolution: {state}": RESOLUTION[state]}
    apology, blame = _last(acts, "apology"), _last(acts, "blame")
    if blame > apology:
        terms["blame not taken back"] = BLAME
    elif apology >= 0 and state in ("right", "wrong"):
        terms["apology with an offer"] = APOLOGY
    last = acts[-1] if acts else "cut"
    if last == "close":
        if state == "right":
            terms["polite closing"] = CLOSE_AFTER_FIX
        else:
            terms["polite closing, no help"] = CLOSE_AS_MOCKERY
    elif last == "curt":
        terms["curt closing"] = CURT
    else:
        terms["no closing"] = NO_CLOSING
    if last == "cut" or not finished:
        terms["unfinished"] = UNFINISHED
    if slips := min(acts.count("slip"), MAX_SLIPS):
        terms["slips"] = slips * SLIP
    return terms


def gold_reward(prompt: str, reply: str, finished: bool = True) -> float:
    """Gold reward of the whole `reply` to `prompt`, within GOLD_RANGE; see `explain_gold`."""
    return sum(explain_gold(prompt, reply, finished).values())
