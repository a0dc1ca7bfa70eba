"""The study's third task: sentences of speeches, judged by a lexicon of sentiment.

A prompt is the first four words of a sentence, and the answer its rest. Neither text nor reward is
made for this study: the language model is trained on State of the Union addresses, pairs are its
own samples, and the words' valences are VADER's.

The gold reward reads the finished sentence only, prompt included: the valence of each word counts
in proportion to its place, so that what a sentence comes to weighs more than how it begins, and a
prefix does not know yet what place its words will have.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import small_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from study_parts import corpus
from study_parts.tasks import Sizes, Task

PROMPT = 4  # words
VOCABULARY = 2048
MAX_NEW = 24  # tokens, EOS included
SAMPLES = 8  # of the language model, to each prompt, that pairs are made of
ROWS = 500  # of one call of `generate`
# The trained model's logits are multiplied by this (in its last norm), so that its samples at
# temperature 1 are sentences: the tail of so small a model is noise, and half of the mass.
SHARPNESS = 1.6

TONE, LENGTH, PER_WORD = 0.7, 14, -0.1
REPEATED, UNFINISHED, OPEN_END = -0.5, -1.0, -0.5
LONG = 4  # letters of a word that may not be repeated

PROSE_SIZES = Sizes(40, 80, 120, 6000, 8, 32, 2, 2, corpus=1000, lm_epochs=6)
_CLASSIFIER = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_AUTOREGRESSIVE = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
BETAS = {
    **dict.fromkeys(("ARGS", "ARGS-G", "PARGS", "PARGS-G"), _CLASSIFIER),
    **dict.fromkeys(("GenARM-prefix", "GenARM"), _AUTOREGRESSIVE),
}


def gold_reward(lexicon: dict[str, float], prompt: str, reply: str, finished: bool = True) -> float:
    """Gold reward of the whole sentence."""
    said = f"{prompt} {reply}".split()
    words = [word for word in said if word[0].isalpha()]
    first = {word: at for at, word in reversed(list(enumerate(words, start=1)))}
    total = TONE * sum(lexicon.get(word, 0.0) * at / len(words) for word, at in first.items())
    total += PER_WORD * abs(len(words) - LENGTH)
    total += REPEATED * sum(words.count(word) - 1 for word in first if len(word) >= LONG)
    total += 0.0 if said[-1] == "." else OPEN_END
    return total + (0.0 if finished else UNFINISHED)


def _drawn(pool: dict[str, list[str]], prompt: str, rng: random.Random) -> str:
    return rng.choice(pool[prompt])


def _make(saved: Path, sentences: list[str], sizes: Sizes) -> None:
    """Trains tokenizer and language model, and samples answers to the prompts of all splits."""
    tokenizer = _tokenizer(sentences)
    rest = defaultdict(list)
    for sentence in sentences:
        said = sentence.split()
        prompt, reply = " ".join(said[:PROMPT]), " ".join(said[PROMPT:])
        if len(tokenizer(reply)["input_ids"]) < MAX_NEW:
            rest[prompt].append(reply)
    prompts = list(rest)
    random.Random(0).shuffle(prompts)
    names = ("beta", "test", "eval", "train")
    counts = (sizes.beta_prompts, sizes.test_prompts, sizes.eval_prompts, sizes.corpus)
    ends = list(itertools.accumulate(counts))
    splits = {
        name: prompts[end - n : end] for name, n, end in zip(names, counts, ends, strict=True)
    }
    known = [prompt for prompt in prompts[ends[2] :] for _ in rest[prompt]]
    replies = {prompt: iter(rest[prompt]) for prompt in known}
    torch.manual_seed(0)
    lm = small_models.small_lm(tokenizer, width=64, inner=256, layers=3, longest=64)
    small_models.train_lm(
        lm, tokenizer, known, lambda p, _: next(replies[p]), sizes.lm_epochs, random.Random(0)
    )
    lm.model.norm.weight.data *= SHARPNESS
    samples = {name: _samples(tokenizer, lm, of) for name, of in splits.items()}
    tokenizer.save_pretrained(saved)
    lm.save_pretrained(saved)
    (saved / "samples.json").write_text(json.dumps(samples))


def _tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding within words, the same in every run."""
    end, special = "</w>", ["<pad>", "<eos>", "<unk>"]
    words = {word for sentence in sentences for word in sentence.split()}
    # The trainer numbers letters that end a word as its hash table has them, and pairs that are as
    # frequent by these numbers: named first they have the same ones in every run.
    letters = sorted({c for word in words for c in word[:-1]} | {word[-1] + end for word in words})
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix=end))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[*special, *letters],
            end_of_word_suffix=end,
            show_progress=False,
        ),
    )
    learnt = json.loads(core.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    # Anew, as letters are no special tokens.
    core = Tokenizer(models.BPE(learnt["vocab"], merges, unk_token="<unk>", end_of_word_suffix=end))
    core.pre_tokenizer, core.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder(end)
    return small_models.hf_tokenizer(core)


def _samples(tokenizer: Any, lm: LlamaForCausalLM, prompts: list[str]) -> dict[str, list[str]]:
    """For each prompt, those of SAMPLES samples of the language model that are finished."""
    torch.manual_seed(1)
    found: dict[str, list[str]] = {prompt: [] for prompt in prompts}
    rows = prompts * SAMPLES
    for i in range(0, len(rows), ROWS):
        part = rows[i : i + ROWS]
        inputs = tokenizer(part, return_tensors="pt", padding=True)
        ids = lm.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=MAX_NEW)
        ids = ids[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        ended = (ids == tokenizer.eos_token_id).any(1).tolist()
        for prompt, text, whole in zip(part, texts, ended, strict=True):
            if whole and text:
                found[prompt].append(text)
    return found


def prose_task(
    folder: Path,
    sizes: Sizes = PROSE_SIZES,
    texts: Callable[[Path], list[str]] = corpus.speeches,
    lexicon: Callable[[Path], dict[str, float]] = corpus.lexicon,
) -> Task:
    """The third task. Corpus and lexicon are fetched into `folder`; tokenizer, language model and
    its samples are made once and kept there."""
    known = lexicon(folder / "prose_data")

    gold = partial(gold_reward, known)
    saved = folder / "prose_lm"
    if not (saved / "samples.json").exists():
        _make(saved, corpus.sentences(texts(folder / "prose_data")), sizes)
    samples = json.loads((saved / "samples.json").read_text())
    pool = {
        prompt: replies
        for split in ("train", "eval")
        for prompt, replies in samples[split].items()
        if len({gold(prompt, reply) for reply in replies}) > 1  # or there is no pair to judge
    }
    prompts = {
        split: [p for p in of if split in ("beta", "test") or p in pool]
        for split, of in samples.items()
    }
    return Task(
        name="prose",
        prompts=prompts,
        sample_reply=partial(_drawn, pool),
        gold=gold,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(saved),
        lm=LlamaForCausalLM.from_pretrained(saved, dtype=torch.float32).eval(),
        max_new_tokens=MAX_NEW,
        learning_rate=2e-3,
        sizes=sizes,
        betas=BETAS,
        ks=(10, 32),
    )
