"""What vLLM's model runners hand to a logits processor, without vLLM: batches whose requests come,
go and move as the scheduler likes, with logits by plain forwards of the whole text."""

import enum
import functools
from types import SimpleNamespace

import numpy as np
import tiny
import torch

import rgtg_fast
from rgtg_fast.vllm import RewardGuided

MAX_LEN = 48


class Direction(enum.Enum):
    UNIDIRECTIONAL = 1
    SWAP = 2


def params(temperature=1.0, seed=None, n=1, top_p=1.0, top_k=0, min_p=0.0, **extra_args):
    """`SamplingParams`, as far as a processor looks at them."""
    return SimpleNamespace(
        temperature=temperature,
        seed=seed,
        n=n,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        extra_args=extra_args,
    )


def config(lm, reward_model, max_len=MAX_LEN, **rgtg):
    """`VllmConfig` for a language model of transformers."""
    model = SimpleNamespace(
        model="none",
        tokenizer=rgtg.pop("tokenizer", None),
        max_model_len=max_len,
        dtype=torch.float32,
        enable_prompt_embeds=False,
        hf_text_config=lm.config,
        get_vocab_size=lambda: lm.config.vocab_size,
        try_get_generation_config=lambda: {"eos_token_id": tiny.EOS},
    )
    parallel = SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1)
    return SimpleNamespace(
        additional_config={"rgtg": {"reward_model": reward_model} | rgtg},
        speculative_config=None,
        model_config=model,
        parallel_config=parallel,
    )


class Logits:
    """Logits fp32 [V] behind a text, by a plain forward; each text once."""

    def __init__(self, lm):
        self.lm = lm
        self.of = functools.lru_cache(None)(self._of)

    @torch.no_grad()
    def _of(self, text):
        return self.lm(torch.tensor([text]), use_cache=False).logits[0, -1].float()


class Job:
    """A request: prompt, how it is drawn, what it got. `want` is what `generate` gives."""

    def __init__(self, prompt, steps, own, want=None):
        self.prompt, self.steps, self.params, self.want = prompt, steps, own, want
        self.outputs = []

    @property
    def text(self):
        return [*self.prompt, *self.outputs]

    @property
    def done(self):
        ended = self.outputs and self.outputs[-1] == tiny.EOS
        return bool(ended) or len(self.outputs) >= self.steps


def oracle(lm, rm, job, k, beta, **options):
    """The answer that `rgtg_fast.generate` gives: a list of ids."""
    own, given = job.params, job.params.extra_args
    if own.temperature > 0:
        options = {"temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k} | options
        options |= {"min_p": own.min_p or None}
    out = rgtg_fast.generate(
        lm,
        torch.tensor([job.prompt]),
        reward_model=rm,
        k=given.get("rgtg_k", k),
        beta=given.get("rgtg_beta", beta),
        seed=given.get("rgtg_seed", own.seed),
        do_sample=own.temperature > 0,
        max_new_tokens=job.steps,
        eos_token_id=tiny.EOS,
        pad_token_id=tiny.PAD,
        **options,
    )
    if options.get("return_dict_in_generate"):
        return out
    return out[0, len(job.prompt) :].tolist()


class RunnerV1:
    """vLLM's persistent batch. Requests that come take the rows of those that left, lowest first;
    the last ones move into what is free then. `removed` are the rows that nobody was put into."""

    def __init__(self, lm, settings):
        self.logits = Logits(lm)
        self.processor = RewardGuided(settings, torch.device("cpu"), False)
        self.batch = []

    def step(self, leaving=(), coming=(), swaps=(), chunked=()):
        """One step. `chunked` jobs have a row of logits whose token is thrown away."""
        removed = sorted(self.batch.index(job) for job in leaving)
        for row in removed:
            self.batch[row] = None
        added, moved = [], []
        for job in coming:
            row = removed.pop(0) if removed else len(self.batch)
            if row == len(self.batch):
                self.batch.append(None)
            self.batch[row] = job
            job.outputs = list(job.outputs)  # one that comes back has another list
            added.append((row, job.params, list(job.prompt), job.outputs))
        while removed:
            while self.batch and self.batch[-1] is None:
                self.batch.pop()
            if removed[0] >= len(self.batch):
                break
            hole = removed.pop(0)
            self.batch[hole] = self.batch.pop()
            moved.append((len(self.batch), hole, Direction.UNIDIRECTIONAL))
        for one, two in swaps if self.batch else ():
            one, two = one % len(self.batch), two % len(self.batch)
            if one != two:
                self.batch[one], self.batch[two] = self.batch[two], self.batch[one]
                moved.append((one, two, Direction.SWAP))
        update = SimpleNamespace(
            batch_size=len(self.batch), removed=removed[::-1], added=added, moved=moved
        )
        self.processor.update_state(update if removed or added or moved else None)
        if not self.batch:
            return
        logits = torch.stack([self.logits.of(tuple(job.text)) for job in self.batch])
        out = self.processor.apply(logits)
        for job, row in zip(self.batch, out, strict=True):
            if job not in chunked:
                job.outputs.append(int(row.argmax()))


class RunnerV2:
    """vLLM's second runner: requests keep their slots, rows come in any order, and nobody says when
    a request has left."""

    def __init__(self, lm, settings, slots=4):
        self.logits = Logits(lm)

        def per_slot():
            return SimpleNamespace(np=np.zeros(slots, dtype=np.int32))

        self.states = SimpleNamespace(
            device=torch.device("cpu"),
            all_token_ids=SimpleNamespace(gpu=torch.full((slots, MAX_LEN), -7, dtype=torch.int32)),
            prompt_len=per_slot(),
            prefill_len=per_slot(),
        )
        self.processor = RewardGuided(settings, self.states)
        self.slots = {}
        self.free = list(range(slots))

    @property
    def batch(self):
        return list(self.slots)

    def step(self, leaving=(), coming=(), swaps=(), chunked=(), idle=()):
        """One step. `chunked` jobs read a part of their text, `idle` ones are not scheduled."""
        for job in leaving:
            self.free.append(self.slots.pop(job))
        for job in coming:
            slot = self.slots[job] = self.free.pop()
            self.states.prompt_len.np[slot] = len(job.prompt)
            self.states.prefill_len.np[slot] = len(job.text)
            self.states.all_token_ids.gpu[slot, : len(job.text)] = torch.tensor(job.text).int()
            self.processor.add_request(slot, job.params)
        rows = [job for job in self.slots if job not in idle]
        for one, two in swaps if rows else ():
            one, two = one % len(rows), two % len(rows)
            rows[one], rows[two] = rows[two], rows[one]
        if not rows:
            return
        # A part of a text is only ever read when it has just come (or come back).
        part = [job in chunked and job in coming and len(job.text) > 1 for job in rows]
        lengths = [len(job.text) - cut for job, cut in zip(rows, part, strict=True)]
        slots = torch.tensor([self.slots[job] for job in rows])
        ctx = SimpleNamespace(
            expanded_idx_mapping=slots,
            idx_mapping_np=slots.numpy(),
            seq_lens_upper_bound_np=np.array(lengths, dtype=np.int32),
        )
        texts = [tuple(job.text[:n]) for job, n in zip(rows, lengths, strict=True)]
        out = self.processor.apply(torch.stack([self.logits.of(text) for text in texts]), ctx)
        for job, row, cut in zip(rows, out, part, strict=True):
            if not cut:
                job.outputs.append(int(row.argmax()))
                table = self.states.all_token_ids.gpu
                table[self.slots[job], len(job.text) - 1] = job.outputs[-1]
