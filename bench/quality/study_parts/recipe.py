"""The study's second task: a cook's notes, judged by the balance of the finished dish.

A prompt names a dish (which begins with some sweetness and sourness), a guest, and how sweet and
how sour the guest wants it. The notes add things, may boil the dish down (which doubles what is in
it so far) or water it (which takes one of each), may correct it, taste it, and serve or leave it:
some 1,200 different texts per prompt, so that the policy's whole tree can be enumerated.

The gold reward reads the finished text only. It is of another nature than that of the support task
(`rgtg_fast/demo/task.py`): not one sentence decides but a running balance and the order of the
steps. Cooks who stay below the wish tend to boil down and those above it to add water, so a prefix
that is far from the wish is often worth more than one that is already there.
"""

from __future__ import annotations

import itertools
import random

# dish -> sweetness and sourness before anything is added
DISHES = {
    "plums": (1, 1),
    "cake": (2, 0),
    "porridge": (0, 0),
    "berries": (1, 2),
    "rhubarb": (0, 2),
    "apples": (1, 0),
    "salad": (0, 1),
    "pudding": (2, 1),
}
WISHES = {"plain": 0, "some": 2, "much": 4}
GUESTS = ("anna", "bela", "carl", "dora", "emil", "frida")
# what is added -> sweetness and sourness
ADDED = {"honey": (1, 0), "jam": (2, 0), "lemon": (0, 1), "vinegar": (0, 2)}
BOIL, WATER, TASTE = "boil down", "pour water", "taste it"
SERVE, LEAVE = "serve warm", "leave it"
STEPS = (*(f"add {thing}" for thing in ADDED), BOIL, WATER, TASTE, SERVE, LEAVE)

BEST, PER_POINT, WORST = 2.0, -0.5, -2.0  # of the balance
TASTED, LEFT, UNFINISHED, SLIP = 0.25, -1.0, -1.0, -0.5
HONEY_BOILED, VINEGAR_RAW = -0.5, -0.5


def prompt_of(dish: str, sweet: str, sour: str, guest: str) -> str:
    return f"{dish} for {guest} , {sweet} sweet and {sour} sour :"


def all_prompts() -> list[str]:
    """Every prompt, in a fixed order: 432 of them."""
    return [prompt_of(*p) for p in itertools.product(DISHES, WISHES, WISHES, GUESTS)]


def read_prompt(prompt: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The balance (sweet, sour) at the start, and the one that is wished for."""
    said = prompt.split()
    return DISHES[said[0]], (WISHES[said[4]], WISHES[said[7]])


def after_step(balance: tuple[int, int], step: str) -> tuple[int, int]:
    """The balance after one of STEPS."""
    sweet, sour = balance
    if step == BOIL:
        return 2 * sweet, 2 * sour
    if step == WATER:
        return max(sweet - 1, 0), max(sour - 1, 0)
    if step.startswith("add "):
        more = ADDED[step.split()[1]]
        return sweet + more[0], sour + more[1]
    return balance


def parse(reply: str) -> tuple[list[str], int]:
    """The steps of a reply, and the number of its words that belong to none."""
    said, steps, slips, at = reply.split(), [], 0, 0
    while at < len(said):
        step = " ".join(said[at : at + 2])
        if step in STEPS:
            steps.append(step)
            at += 2
        else:
            slips += 1
            at += 1
    return steps, slips


def gold_reward(prompt: str, reply: str, finished: bool = True) -> float:
    """Gold reward of the whole reply, from -7 (nearly) to 2.25."""
    balance, wish = read_prompt(prompt)
    steps, slips = parse(reply)
    for step in steps:
        balance = after_step(balance, step)
    away = abs(balance[0] - wish[0]) + abs(balance[1] - wish[1])
    total = max(BEST + PER_POINT * away, WORST)
    if BOIL in steps:
        boiled = steps.index(BOIL)
        total += HONEY_BOILED * ("add honey" in steps[:boiled])
        total += VINEGAR_RAW * ("add vinegar" in steps[boiled:])
    else:
        total += VINEGAR_RAW * ("add vinegar" in steps)
    if steps[-2:-1] == [TASTE]:
        total += TASTED
    total += 0.0 if steps[-1:] == [SERVE] else LEFT
    return total + min(slips, 3) * SLIP + (0.0 if finished else UNFINISHED)


def _addition(balance: tuple[int, int], wish: tuple[int, int], rng: random.Random) -> str:
    """Some cooks add what brings the dish nearer to the wish, the others what they like."""
    steps = [f"add {thing}" for thing in ADDED]
    if rng.random() < 0.35:
        gaps = [
            sum(abs(b - w) for b, w in zip(after_step(balance, s), wish, strict=True))
            for s in steps
        ]
        return steps[gaps.index(min(gaps))]
    return rng.choices(steps, [0.35, 0.25, 0.25, 0.15])[0]


def sample_reply(prompt: str, rng: random.Random) -> str:
    """One reply from the grammar, as space-separated words (no EOS)."""
    balance, wish = read_prompt(prompt)
    steps = []

    def do(step: str) -> None:
        nonlocal balance
        steps.append(step)
        balance = after_step(balance, step)

    for _ in range(rng.choice((1, 2))):
        do(_addition(balance, wish, rng))
    below = sum(balance) < sum(wish)
    boil, water, none = (0.6, 0.1, 0.3) if below else (0.15, 0.5, 0.35)
    change = rng.choices((BOIL, WATER, ""), (boil, water, none))[0]
    if change:
        do(change)
    if rng.random() < 0.4:
        do(_addition(balance, wish, rng))
    if rng.random() < 0.4:
        do(TASTE)
    do(SERVE if rng.random() < 0.7 else LEAVE)
    return " ".join(steps)
