"""`RewardGuided`: one logits processor for both of vLLM's model runners."""

from __future__ import annotations

import logging
import time
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..decode.record import divergence
from .candidates import Request, candidates
from .settings import check_engine, check_penalties, guidance_of, settings_of
from .steps import StepWriter


def _interfaces() -> tuple[type, ...]:
    """What vLLM wants a processor to derive from; nothing where vLLM is not installed."""
    found: list[type] = []
    try:
        from vllm.v1.sample.logits_processor.interface import LogitsProcessor as OfV1

        found.append(OfV1)
        from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as OfV2

        found.append(OfV2)
    except ImportError:
        pass
    return tuple(found) or (object,)


logger = logging.getLogger("vllm.rgtg_fast")
LOG_SECONDS = 10.0


class RewardGuided(*_interfaces()):  # type: ignore[misc]
    """Reward-guided decoding in vLLM: `--logits-processors rgtg_fast.vllm:RewardGuided`.

    Options of the engine: `--additional-config '{"rgtg": {"reward_model": ..., "k": 10}}'`, see
    `Settings`. Of a request, by `SamplingParams.extra_args` (HTTP: `vllm_xargs`): `rgtg` (false:
    unguided), `rgtg_k`, `rgtg_beta`, `rgtg_preset` (for these two, of a decoder of the engine's
    reward: `settings.PRESETS`), `rgtg_seed` (instead of `seed`; `rgtg_row_seed` is one that
    `ops.split_seed` gave), `rgtg_draw`, and `rgtg_number` in the file of `steps`.
    `SamplingParams.temperature` is T of softmax((log π + β r) / T), 0 the best candidate.

    A request that is greedy or has a seed gets the tokens of `rgtg_fast.generate` with that seed;
    `top_p`, `top_k` and `min_p` then cut π. Others are drawn by vLLM from log π + β r at the
    candidates, which `top_p` and the like then cut, as do V1's penalties.

    Raises `ValueError` at construction for options out of range, a reward model that does not fit
    the language model, speculative decoding, and prompts given as embeddings.
    """

    def __init__(self, vllm_config: Any, second: Any, is_pin_memory: bool | None = None) -> None:
        # V1: (vllm_config, device, is_pin_memory); V2: (vllm_config, req_states).
        self.states = None if isinstance(second, torch.device) else second
        device = second if self.states is None else self.states.device
        self.settings = settings_of(vllm_config.additional_config)
        check_engine(vllm_config)
        self.requests: dict[int, Request] = {}  # by row of the batch (V1) or slot (V2)
        self.rows: Any = None
        self.guide: Any = None
        self.reserved: Tensor | None = None
        self.group: Any = None
        self.guided = 0
        self.said: tuple[float, tuple[int, ...] | None] = (0.0, None)
        self.steps: StepWriter | None = None
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1 and not _is_last_stage():
            return  # only the last stage samples
        from .loading import GIB, load_guide

        self.guide = load_guide(self.settings, vllm_config.model_config, device)
        self.rows = self.guide.rows
        if device.type != "cpu":
            # vLLM does not run custom processors while it finds out how much memory is left for its
            # own cache; held until then, this much is not taken for that.
            size = int(self.settings.kv_gib * GIB)
            self.reserved = torch.empty(size, dtype=torch.uint8, device=device)
        if parallel.tensor_parallel_size > 1:
            from vllm.distributed import get_tp_group

            self.group = get_tp_group()
        if self.settings.steps is not None and (self.group is None or self.group.is_first_rank):
            self.steps = StepWriter(self.settings.steps)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """`ValueError` for `extra_args` that are unknown or out of range; vLLM answers 400."""
        check_penalties(sampling_params, guidance_of(sampling_params))

    def is_argmax_invariant(self) -> bool:
        """False: guidance changes which token is the best."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: requests that leave, come and move between the batch's rows, in that order."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.requests.pop(row, None)
        for row, params, prompt, outputs in batch_update.added:
            if self._is_guided(row, params):
                if prompt is None:
                    raise ValueError("a prompt of embeddings has no tokens for the reward model")
                self._add(row, params, len(prompt), outputs).text.tokens.extend(prompt)
        for one, two, direction in batch_update.moved:
            a, b = self.requests.pop(one, None), self.requests.pop(two, None)
            if a is not None:
                self.requests[two] = a
            if b is not None and direction.name == "SWAP":
                self.requests[one] = b

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request comes to a slot; whether it is guided."""
        assert self.states is not None
        guided = self._is_guided(req_idx, sampling_params)
        if guided:
            self._add(req_idx, sampling_params, int(self.states.prompt_len.np[req_idx]), None)
        return guided

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Logits fp32 [n, V] of guided requests become those of the ratio policy, in place: log π +
        β r at the candidates, or 0 at the token that was drawn, and -inf elsewhere."""
        if not self.requests:
            return logits
        at = self._of_v1() if ctx is None else self._of_v2(ctx)
        if at:
            self._guide(logits, at)
        return logits

    def _is_guided(self, at: int, params: Any) -> bool:
        """Whether the request that comes in is, which is no longer the one that was there."""
        self.requests.pop(at, None)
        given = guidance_of(params).guide
        asked = self.settings.guide if given is None else given
        return asked and self.guide is not None  # which a stage that does not sample has not

    def _add(self, at: int, params: Any, prompt: int, outputs: list[int] | None) -> Request:
        """A guided request comes in, with a prompt of so many tokens."""
        from .rows import Text

        given, engine = guidance_of(params), self.settings
        seed = params.seed if given.seed is None else given.seed
        own = (given.draw or engine.draw) == "rgtg"
        if params.temperature == 0 and seed is None:
            seed = 0  # nothing is drawn
        row_seed = given.row_seed
        if row_seed is None and seed is not None:
            row_seed = int(ops.split_seed(seed, 1, "cpu")[0])
        self.requests[at] = Request(
            prompt=prompt,
            outputs=outputs,
            text=Text([]),
            k=self.guide.k if given.k is None else given.k,
            beta=self.guide.beta if given.beta is None else given.beta,
            temperature=params.temperature,
            seed=row_seed if own else None,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            number=given.number,
        )
        self.guided += 1
        return self.requests[at]

    def _of_v1(self) -> dict[int, Request]:
        """The guided rows, their texts brought up to date. Under asynchronous scheduling vLLM mends
        the lists of outputs just before `apply`, and not before `update_state`."""
        for request in self.requests.values():
            outputs, text = request.outputs, request.text
            assert outputs is not None
            known = len(text.tokens) - request.prompt
            if known > len(outputs) or (known and outputs[known - 1] != text.tokens[-1]):
                # vLLM has taken tokens back.
                request.text = text = type(text)(text.tokens[: request.prompt])
                known = 0
            new = outputs[known:]
            if -1 in new:
                raise RuntimeError(
                    "vLLM gave placeholders in the place of a request's last tokens: the plug-in "
                    "must be loaded with --logits-processors rgtg_fast.vllm:RewardGuided (of one "
                    "loaded by an entry point, vLLM does not know that it reads the outputs)"
                )
            text.tokens.extend(new)
        return {row: self.requests[row] for row in sorted(self.requests)}

    def _of_v2(self, ctx: Any) -> dict[int, Request]:
        """The same from the runner's tables; rows of prompts that are not yet read to their end are
        left out, as no token is drawn there."""
        states: Any = self.states
        found = {}
        if len(ctx.expanded_idx_mapping) != len(ctx.idx_mapping_np):
            raise RuntimeError("several rows of logits for a request: speculative decoding")
        lengths = ctx.seq_lens_upper_bound_np.tolist()
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            request = self.requests.get(slot)
            if request is not None and lengths[row] >= int(states.prefill_len.np[slot]):
                found[row] = (slot, request, lengths[row])
        one = {r: f for r, f in found.items() if f[2] == len(f[1].text.tokens) + 1}
        table = states.all_token_ids.gpu
        if one:  # one copy from the device for all of them
            slots = torch.tensor([f[0] for f in one.values()], device=table.device)
            places = torch.tensor([f[2] - 1 for f in one.values()], device=table.device)
            for (_, request, _), token in zip(
                one.values(), table[slots, places].tolist(), strict=True
            ):
                request.text.tokens.append(token)
        for slot, request, length in found.values():
            if len(request.text.tokens) != length:
                request.text = type(request.text)(table[slot, :length].tolist())
        return {row: request for row, (_, request, _) in found.items()}

    def _guide(self, logits: Tensor, at: dict[int, Request]) -> None:
        self.reserved = None  # to torch's allocator, which the rows now take it from
        rows, requests = list(at), list(at.values())
        whole = len(rows) == len(logits) and rows == list(range(len(rows)))
        index = torch.tensor(rows, dtype=torch.int64, device=logits.device)
        own = logits if whole else logits[index]
        for warper in self.guide.warpers:
            own = warper(None, own)
        logprobs, ids, known = candidates(own, requests)
        keep = logprobs != -torch.inf  # a NaN is kept, to be seen
        texts = [request.text for request in requests]
        rewards = self.rows.score(texts, ids, keep)
        if self.group is not None:  # the ranks' sums differ in their last bits, and so would tokens
            rewards = self.group.broadcast(rewards.contiguous(), src=0)
        rewards = rewards.where(keep, 0.0)
        values = self._values(logprobs, rewards, ids, requests, known)
        new = torch.full_like(own, -torch.inf).scatter_(1, ids, values.to(own.dtype))
        if whole:
            logits.copy_(new)
        else:
            logits[index] = new
        self._log()

    def _values(
        self, logprobs: Tensor, rewards: Tensor, ids: Tensor, requests: list[Request], known: Tensor
    ) -> Tensor:
        """What vLLM's sampler gets at the candidates, fp32 [n, k]."""

        def column(name: str, dtype: torch.dtype) -> Tensor:
            values = [getattr(request, name) or 0 for request in requests]
            return torch.tensor(values, dtype=dtype, device=logprobs.device)

        beta = column("beta", torch.float32)
        tilt = (beta[:, None] * rewards).masked_fill(rewards == -torch.inf, -torch.inf)
        values = logprobs + tilt
        bad = ~values.isfinite().any(1) | values.isnan().any(1) | (values == torch.inf).any(1)
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise RuntimeError(
                f"no candidate of a guided request can be chosen: log-probabilities "
                f"{logprobs[row].tolist()}, rewards {rewards[row].tolist()}; check the models' "
                "dtype, and what masks the logits"
            )
        position = torch.tensor(
            [len(r.text.tokens) - r.prompt for r in requests],
            dtype=torch.int64,
            device=logprobs.device,
        )
        seeds = column("seed", torch.int64)
        temperature = column("temperature", torch.float32)
        for sampled in (False, True):
            rows = [i for i, r in enumerate(requests) if r.draws and (r.temperature > 0) == sampled]
            if rows:
                i = torch.tensor(rows, dtype=torch.int64, device=logprobs.device)
                t = temperature[i] if sampled else 1.0
                slot, logq = ops.ratio_sample(
                    logprobs[i], rewards[i], ids[i], beta[i], t, seeds[i], position[i], sampled
                )
                chosen = slot[:, None]
                values[i] = torch.full_like(values[i], -torch.inf).scatter_(1, chosen, 0.0)
                if self.steps is not None:
                    of_token = -logprobs[i].gather(1, chosen)[:, 0]
                    kl = divergence(logq, logprobs[i]) if sampled else of_token
                    kl = kl.masked_fill(~known[i], torch.nan)
                    columns = position[i], rewards[i].gather(1, chosen)[:, 0], kl
                    numbers = [requests[row].number for row in rows]
                    self.steps.write(zip(numbers, *(c.tolist() for c in columns), strict=True))
        return values

    def _log(self) -> None:
        """Say every ten seconds what was done, as vLLM does."""
        now, counts = time.monotonic(), self.rows.counts
        before, last = self.said
        if now - before < LOG_SECONDS:
            return
        state = tuple(getattr(counts, f.name) for f in fields(counts))
        if last is not None:
            logger.info(
                "rgtg: %d guided requests so far, %d candidates scored, %d reward tokens read, %d "
                "found read, %d rows evicted, %d steps split, reward cache %.1f %% full",
                self.guided,
                counts.scored,
                counts.prefilled,
                counts.reused,
                counts.evicted,
                counts.waves,
                100 * self.rows.used / self.rows.budget,
            )
            if counts.waves > last[-1]:
                logger.warning(
                    "rgtg: kv_gib=%s holds fewer rows than run at a time, so texts are read again "
                    "at every step; raise it, or lower --max-num-seqs",
                    self.settings.kv_gib,
                )
        self.said = (now, state)


def _is_last_stage() -> bool:
    from vllm.distributed import get_pp_group

    return get_pp_group().is_last_rank
