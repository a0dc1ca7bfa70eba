"""Which shortcuts the decode loop may take in a call without changing its result."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

SYNC_EVERY = 16  # steps between two looks at whether rows have ended, on a GPU

# Processors that treat each row by itself, so that ended rows may leave the batch.
ROW_BY_ROW = (
    tf.MinLengthLogitsProcessor,
    tf.MinNewTokensLengthLogitsProcessor,
    tf.RepetitionPenaltyLogitsProcessor,
    tf.TopPLogitsWarper,
    tf.TopKLogitsWarper,
    tf.MinPLogitsWarper,
    tf.TypicalLogitsWarper,
    tf.EpsilonLogitsWarper,
    tf.EtaLogitsWarper,
    tf.NoRepeatNGramLogitsProcessor,
    tf.SequenceBiasLogitsProcessor,
    tf.NoBadWordsLogitsProcessor,
    tf.ForcedBOSTokenLogitsProcessor,
    tf.ForcedEOSTokenLogitsProcessor,
    tf.InfNanRemoveLogitsProcessor,
    tf.ExponentialDecayLengthPenalty,
    tf.LogitNormalization,
    tf.SuppressTokensLogitsProcessor,
    tf.SuppressTokensAtBeginLogitsProcessor,
)
# Tensors that they may hold: the same for all rows, or (PER_ROW) a value for each row [B], which is
# indexed when rows leave (since transformers 5.23 the repetition penalty's lengths of padding).
SAME_FOR_ALL = (
    "eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "epsilon",
    "length_1_bias",
)
PER_ROW = ("prompt_ignore_length",)

# Those of them that depend on the scores alone, not on the text, and never wait for the device: a
# CUDA graph can hold them. (Not EtaLogitsWarper: torch.distributions checks its arguments there.)
SCORES_ALONE = (
    tf.TopKLogitsWarper,
    tf.TopPLogitsWarper,
    tf.MinPLogitsWarper,
    tf.TypicalLogitsWarper,
    tf.EpsilonLogitsWarper,
    tf.InfNanRemoveLogitsProcessor,
    tf.LogitNormalization,
    tf.SuppressTokensLogitsProcessor,
)


@dataclass
class Plan:
    """`steps` at most; the host looks whether rows have ended every `sync_every` of them, and drops
    those that have once they are half of the batch (`compact`). `pad` (int64 [], or None) is what
    ended rows are filled with, `eos` int64 [n] are the tokens that end one; `foreign` names a
    criterion that has to be asked instead. `reads_ids`: a logits processor may look at the text."""

    steps: int
    eos: Tensor
    sync_every: int = 1
    compact: bool = False
    pad: Tensor | None = None
    foreign: str | None = None
    synced_gpus: bool = False
    reads_ids: bool = True

    @property
    def can_end(self) -> bool:
        """Whether a row can end before the last step, so that the host has to look."""
        return bool(self.foreign or self.synced_gpus or len(self.eos))


def make_plan(
    new_tokens: int,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    pad: Tensor | None,
    *,
    sync_every: int | None,
    compact: bool,
    step_by_step: bool,
    whole_batch: bool,
    synced_gpus: bool,
) -> Plan:
    """The plan of a call.

    Steps beyond the end of every row change nothing and are cut off, so the host need not look at
    each one, unless somebody does: a stopping criterion other than Hugging Face's length and EOS,
    or (`step_by_step`) a streamer or a cache that is given back. Rows may leave unless something
    needs the `whole_batch`, or may count its rows: a processor or criterion of the user's.
    """
    device, foreign = input_ids.device, foreign_criterion(criteria)
    ends = any(hasattr(c, "eos_token_id") for c in criteria) and pad is not None
    every = sync_every or (1 if device.type == "cpu" else SYNC_EVERY)
    plain = foreign is None and not synced_gpus
    eos = eos_ids(criteria, device)
    return Plan(
        # Hugging Face's own criteria are known beforehand, and need not be asked.
        steps=new_tokens if foreign else last_step(new_tokens, criteria, input_ids.shape[1]),
        eos=eos[:0] if foreign else eos,
        sync_every=every if plain and not step_by_step else 1,
        compact=compact
        and plain
        and ends
        and not whole_batch
        and all(map(_row_by_row, processors)),
        pad=pad.to(device) if ends and pad is not None else None,
        foreign=foreign,
        synced_gpus=synced_gpus,
        reads_ids=any(type(p) not in SCORES_ALONE for p in processors),
    )


def _row_by_row(processor: LogitsProcessor) -> bool:
    held = {name for name, value in vars(processor).items() if isinstance(value, Tensor)}
    return type(processor) in ROW_BY_ROW and held <= {*SAME_FOR_ALL, *PER_ROW}


def keep_rows(processors: LogitsProcessorList, rows: Tensor) -> LogitsProcessorList:
    """The processors for rows `rows` int64 [n] alone; those given, which may be the caller's own,
    stay as they are."""
    kept = LogitsProcessorList()
    for processor in processors:
        per_row = {n: v for n, v in vars(processor).items() if n in PER_ROW and torch.is_tensor(v)}
        if per_row:
            processor = copy.copy(processor)
            for name, value in per_row.items():
                setattr(processor, name, value[rows.to(value.device)])
        kept.append(processor)
    return kept


def foreign_criterion(criteria: StoppingCriteriaList) -> str | None:
    """The name of a criterion other than Hugging Face's length and EOS, if there is one."""
    own = (MaxLengthCriteria, EosTokenCriteria)
    return next((type(c).__name__ for c in criteria if type(c) not in own), None)


def ended(criteria: StoppingCriteriaList, input_ids: Tensor, scores: Any) -> Tensor:
    """Which rows [B] the criteria end; `ValueError` names one that gives something else."""
    done = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    for criterion in criteria:
        got = criterion(input_ids, scores)
        if isinstance(got, bool) or (isinstance(got, Tensor) and got.shape in ((), (1,))):
            got = torch.as_tensor(got).expand(done.shape)  # a single bool is for all rows
        if not isinstance(got, Tensor) or got.shape != done.shape or got.dtype != torch.bool:
            what = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise ValueError(
                f"the stopping criterion {type(criterion).__name__} gave {what}; it must give a "
                f"bool tensor {list(done.shape)}: whether each row has ended"
            )
        done |= got.to(done.device)
    return done


def last_step(steps: int, criteria: StoppingCriteriaList, prompt: int) -> int:
    """`steps`, or fewer where a length criterion ends all rows before."""
    limits = [c.max_length - prompt for c in criteria if hasattr(c, "max_length")]
    return max(1, min([steps, *limits]))


def eos_ids(criteria: StoppingCriteriaList, device: torch.device) -> Tensor:
    """All EOS ids int64 [n] of the criteria; n may be 0."""
    ids = [c.eos_token_id.to(device).view(-1) for c in criteria if hasattr(c, "eos_token_id")]
    return torch.cat([torch.zeros((0,), dtype=torch.int64, device=device), *ids])
