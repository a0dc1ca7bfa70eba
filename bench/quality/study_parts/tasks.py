"""Two of the tasks: prompts, texts, gold reward, tokenizer and base language model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import make_assets
import small_models
import torch
from transformers import LlamaForCausalLM

from rgtg_fast.demo import task as support
from rgtg_fast.demo.run import ASSETS
from study_parts import recipe


@dataclass(frozen=True)
class Sizes:
    """How much of everything: prompts to choose β on, to test on, and (more of them, where they are
    few) to draw evaluation pairs for; pairs to train reward models on, and of each evaluation
    prompt; samples of a policy per test prompt."""

    beta_prompts: int
    test_prompts: int
    eval_prompts: int
    pairs: int
    eval_pairs: int
    batch: int
    epochs: int
    draws: int
    corpus: int = 0
    lm_epochs: int = 0


@dataclass(frozen=True)
class Task:
    """Everything the study needs to know of a task."""

    name: str
    prompts: dict[str, list[str]]  # by split: train, eval, beta, test
    sample_reply: Callable[[str, random.Random], str]
    gold: Callable[[str, str, bool], float]
    tokenizer: Any
    lm: Any
    max_new_tokens: int
    learning_rate: float
    sizes: Sizes
    enumerable: bool = False
    betas: dict[str, tuple[float, ...]] = field(default_factory=dict)
    ks: tuple[int, ...] = (2, 5, 20)  # beside K, at the best β of it


# Candidates of a step.
K = {"recipe": 10, "support": 10, "prose": 64}
# The models that a task is studied with, where they are not all.
MODELS = {"prose": ("full", "partial", "genarm", "genarm_prefix")}

SUPPORT_SIZES = Sizes(60, 150, 1000, 4000, 8, 32, 1, 2)
RECIPE_SIZES = Sizes(60, 90, 72, 6000, 36, 64, 3, 4, corpus=12_000, lm_epochs=3)

_REWARD = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
HEADS = ("head", "pessimistic, mild", "pessimistic, strong")
BETAS = {
    "ARGS": _REWARD,
    "ARGS-G": _REWARD,
    "PARGS": _REWARD,
    "PARGS-G": _REWARD,
    "FaRMA": _REWARD,
    "RAD": (4.0, 8.0, 16.0, 32.0, 64.0, 128.0),
    "GenARM-prefix": (0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "GenARM": (0.06, 0.125, 0.25, 0.5, 1.0, 2.0),
    "seq2seq": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "soft-Q": _REWARD,
    "twist": (0.125, 0.25, 0.5, 1.0, 2.0, 2.5, 3.0, 4.0),
    "ABC": _REWARD,
    "ABC credit": _REWARD,
    "CREAM": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    **dict.fromkeys(HEADS, (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)),
}


def support_task(sizes: Sizes = SUPPORT_SIZES) -> Task:
    """The embedded task, on the language model that is shipped with the package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    splits = support.split_prompts(0)
    return Task(
        name="support",
        prompts={
            **splits,
            "beta": splits["beta"][: sizes.beta_prompts],
            "test": splits["test"][: sizes.test_prompts],
            "eval": splits["eval"][: sizes.eval_prompts],
        },
        sample_reply=support.sample_reply,
        gold=support.gold_reward,
        tokenizer=AutoTokenizer.from_pretrained(ASSETS / "lm"),
        lm=AutoModelForCausalLM.from_pretrained(ASSETS / "lm", dtype=torch.float32).eval(),
        max_new_tokens=make_assets.MAX_NEW,
        learning_rate=1e-3,
        sizes=sizes,
        # Answers are five times as long as a recipe: a coarser grid around what is best.
        betas={name: grid[1:-1] for name, grid in BETAS.items()}
        | dict.fromkeys(HEADS, (0.5, 1.0, 2.0, 4.0, 8.0))
        | {"ABC credit": (2.0, 4.0, 8.0), "FaRMA": (1.0, 2.0, 4.0, 8.0, 16.0)},
        ks=(2, 5),
    )


def recipe_task(folder: Path, sizes: Sizes = RECIPE_SIZES) -> Task:
    """The second task; its language model is trained once and kept in `folder`."""
    prompts = recipe.all_prompts()
    random.Random(0).shuffle(prompts)
    beta, test, held = itertools.accumulate(
        (sizes.beta_prompts, sizes.test_prompts, sizes.eval_prompts)
    )
    splits = {
        "beta": prompts[:beta],
        "test": prompts[beta:test],
        # Nothing was chosen by pairs of grammar replies: all prompts outside training are used.
        "eval": prompts[:held],
        "train": prompts[held:],
    }
    tokenizer = small_models.word_tokenizer([*recipe.all_prompts(), *recipe.STEPS])
    saved = folder / "recipe_lm"
    if not (saved / "model.safetensors").exists():
        _train_recipe_lm(tokenizer, splits["train"], sizes).save_pretrained(saved)
    return Task(
        name="recipe",
        prompts=splits,
        sample_reply=recipe.sample_reply,
        gold=recipe.gold_reward,
        tokenizer=tokenizer,
        lm=LlamaForCausalLM.from_pretrained(saved, dtype=torch.float32).eval(),
        max_new_tokens=18,
        learning_rate=2e-3,
        sizes=sizes,
        enumerable=True,
        betas=BETAS,
    )


def _train_recipe_lm(tokenizer: Any, prompts: list[str], sizes: Sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    rng = random.Random(0)
    lm = small_models.small_lm(tokenizer, width=64, inner=128, layers=2, longest=64)
    corpus = [rng.choice(prompts) for _ in range(sizes.corpus)]
    small_models.train_lm(lm, tokenizer, corpus, recipe.sample_reply, sizes.lm_epochs, rng)
    return lm
