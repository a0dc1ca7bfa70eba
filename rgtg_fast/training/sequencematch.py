"""SequenceMatch: data, and a language model's token that undoes the one before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import TokenRows
from .encode import encode_answers
from .formats import Row
from .forward import TrainedParts
from .trees import Tree, add_slips, check_trees, grow, undoes_too_much


def add_backspace(model: Any, tokenizer: Any, token: str = "<backspace>") -> int:
    """The id of `token`, which is added to the tokenizer, and given an embedding, where it is not
    there yet; the model's configuration says so as `backspace_token_id`.

    Raises `ValueError` where it is the EOS, padding or unknown token.
    """
    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens(token, special_tokens=True)
    number = backspace_of(tokenizer, token)
    if number >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    model.config.backspace_token_id = number
    return number


def backspace_of(tokenizer: Any, token: str) -> int:
    """The id of the backspace token; `ValueError` where there is none, or it has another use."""
    found = None if tokenizer is None else tokenizer.get_vocab().get(token)
    if found is None:
        known = "no tokenizer was given" if tokenizer is None else "the tokenizer has no such token"
        raise ValueError(
            f"backspace={token!r} is to be one token, and {known}; give it one, and the model an "
            "embedding, by rgtg_fast.training.add_backspace(model, tokenizer)"
        )
    for name in ("eos", "pad", "unk"):
        if found == getattr(tokenizer, f"{name}_token_id"):
            raise ValueError(
                f"backspace={token!r} is the {name.upper()} token; name one without another use"
            )
    return found


class AnswerRows(TokenRows):
    """Answers to imitate: `prompt_ids`, `answer_ids` and, given, `own_ids`.

    Rows are `{prompt, text}` (`completion` is as good as `text`), preference pairs, whose chosen
    answer is taken, or `{prompt_ids, answer_ids}`. `own` (`own_ids`) is an answer that the model
    itself gave to the prompt. Answers of token ids may hold the backspace token. Options as in
    `PreferenceDataset`.

    Raises `ValueError` for missing keys, and empty answers and prompts, with counts.
    """

    answers = ("answer_ids",)
    eos_rule = "append"
    encode = staticmethod(encode_answers)

    @staticmethod
    def fault(row: Row) -> str | None:
        if not row["answer_ids"] or not row["prompt_ids"] or row.get("own_ids") == []:
            return "an empty answer, or an empty or missing prompt"
        return None

    def _longest(self, row: Row) -> int:
        return max(len(row["answer_ids"]), len(row.get("own_ids", ())))

    def largest_id(self) -> int:
        """The largest token id of all rows."""
        return max(super().largest_id(), *(max(row.get("own_ids", [0])) for row in self.rows))


@dataclass
class AnswerCollator:
    """N rows to `input_ids` and `attention_mask` int64 [N, L], padded on the right, `start` int64
    [N] and `answer_mask` int64 [N, T] as in `PairCollator`; `own_ids` int64 [N, T'], padded with
    -1 (T' is 0 where no row has any); and `backspace` and `eos` int64 [N], the tokens' ids."""

    backspace: int
    eos: int

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        tokens = [row["prompt_ids"] + row["answer_ids"] for row in rows]
        own = [row.get("own_ids", []) for row in rows]
        ids = torch.zeros(len(rows), max(map(len, tokens)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        width = max(len(row["answer_ids"]) for row in rows)
        answer = torch.zeros(len(rows), width, dtype=torch.int64)
        own_ids = torch.full((len(rows), max(map(len, own))), -1)
        for n, (row, sequence) in enumerate(zip(rows, tokens, strict=True)):
            ids[n, : len(sequence)] = torch.tensor(sequence)
            mask[n, : len(sequence)] = 1
            answer[n, : len(row["answer_ids"])] = 1
            own_ids[n, : len(own[n])] = torch.tensor(own[n], dtype=torch.int64)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "answer_mask": answer,
            "start": torch.tensor([len(row["prompt_ids"]) for row in rows]),
            "own_ids": own_ids,
            "backspace": torch.full((len(rows),), self.backspace),
            "eos": torch.full((len(rows),), self.eos),
        }


def check_answers(data: AnswerRows, parts: TrainedParts, backspace: int, eos: int) -> None:
    """Raises `ValueError` for a model without an embedding of the token `backspace`, or that cannot
    be trained on trees, for answers with a backspace that has nothing to undo, and for prompts with
    one."""
    if backspace >= parts.rm.vocab_size:
        raise ValueError(
            f"the backspace is token {backspace} and the model has {parts.rm.vocab_size} "
            "embeddings; add one by rgtg_fast.training.add_backspace(model, tokenizer)"
        )
    both = [row.get(name, ()) for row in data.rows for name in ("answer_ids", "own_ids")]
    bad = sum(undoes_too_much(actions, backspace, eos) for actions in both)
    if bad:
        raise ValueError(
            f"{bad} answers hold a backspace (token {backspace}) with no token before it to undo, "
            "or behind EOS, which ends an answer; take it out"
        )
    prompts = sum(backspace in row["prompt_ids"] for row in data.rows)
    if prompts:
        raise ValueError(
            f"{prompts} prompts hold a backspace (token {backspace}), which is part of no text; "
            "take out it and the token before it"
        )
    check_trees(parts, max(data.lengths()))
    parts.inner.config.backspace_token_id = backspace  # saved with the model, for decoding


def grown(
    batch: dict[str, Tensor], args: Any, vocabulary: int, step: int | None
) -> tuple[list[Tree], list[Tree]]:
    """The trees of the batch's answers, with slips, and of the model's own answers, where given.

    The slips hang on the row, the step and the seed alone, so that a run that goes on from a
    checkpoint has those of one that nothing stopped, and evaluation has the same every time.
    """
    trees, own = [], []
    lengths, starts = batch["answer_mask"].sum(-1).tolist(), batch["start"].tolist()
    backspace, eos = int(batch["backspace"][0]), int(batch["eos"][0])
    rows = zip(batch["input_ids"].tolist(), starts, lengths, batch["own_ids"].tolist(), strict=True)
    for ids, start, length, mine in rows:
        prompt, answer = ids[:start], ids[start : start + length]
        tree = grow(prompt, answer, backspace, eos)
        seed = f"{args.seed} {step} {prompt} {answer}"
        add_slips(tree, args.slip_rate, vocabulary, (backspace, eos), seed)
        trees.append(tree)
        mine = [token for token in mine if token >= 0]
        if mine:
            own.append(grow(prompt, mine, backspace, eos))
    return trees, own


def match_loss(
    logits: Tensor,
    trees: list[Tree],
    own: list[Tree],
    first: int,
    gamma: float,
    alpha: float,
    share: float,
) -> Tensor:
    """share times -J, SequenceMatch's objective, and 1 - share times -Σ log π(a | s) of the data.

    The logits ℓ(a | s) are soft Q-values: V(s) = log Σ_a exp ℓ(a | s), and the reward that they
    imply is r = ℓ(a | s) - γ V(s'). EOS is absorbing: behind it r = (1 - γ) V(s) at every step.
    With t the number of actions before s,

        J = Σ_data γᵗ (r - α r²/4) - Σ_own γᵗ α r²/4 - Σ_data V(s_0),

    where `own` are the model's own answers to the same prompts, E_own of r being V(s_0) but for π's
    entropy. Its maximum over r, (2/α) (ρ_data - ρ_own)/(ρ_data + ρ_own), gives the χ²-divergence of
    ρ_data from (ρ_data + ρ_own)/2 (without `own` that of ρ_own from ρ_data), up to a factor. Along
    any answer that ends, Σγᵗ (V(s) - γ V(s')) is V(s_0), so that J is the discounted likelihood and
    a penalty, which is computed:

        J = Σ_data γᵗ log π(a | s) - (α/4) Σ_data,own γᵗ r².

    A step back from a slip counts as an answer of one action that begins there.

    `logits` [N, L, V] are of the nodes from `first` on of `trees + own`; a scalar, the sum.

    Read: the abstract of SequenceMatch (arXiv 2306.05426) and summaries of it (logits as Q-values,
    the χ²-mixture, the backspace with a mask, likelihood alone for a while and a convex combination
    with it then), and IQ-Learn's code (arXiv 2106.12142), from which SequenceMatch descends: its
    r, its χ² penalty (α is 1/ours) and, as "regularize", the penalty on both. Not read: the paper's
    own equations. The discounted sums, the absorbing end and the slips are worked out from those.
    """
    values = logits.logsumexp(-1)  # [N, L]
    steps = [(n, *step) for n, tree in enumerate(trees + own) for step in tree.steps]
    row, source, action, target, before = torch.tensor(steps, device=logits.device).unbind(-1)
    discount = gamma ** before.to(values.dtype)
    scores = logits[row, source - first, action]
    logprobs = scores - values[row, source - first]
    rewards = scores - gamma * values[row, target - first]
    penalty = (discount * rewards**2).sum()
    ends = [(n, *tree.end) for n, tree in enumerate(trees + own) if tree.end is not None]
    if ends:
        row_of, node, length = torch.tensor(ends, device=logits.device).unbind(-1)
        at_end = (1 - gamma) * gamma ** length.to(values.dtype) * values[row_of, node - first] ** 2
        penalty = penalty + at_end.sum()
    given = row < len(trees)
    match = (discount * logprobs)[given].sum() - alpha / 4 * penalty
    return -share * match - (1 - share) * logprobs[given].sum()
