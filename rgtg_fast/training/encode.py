"""Raw rows to token ids: one prompt, the answers behind it, EOS where an answer ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .formats import (
    NUMBERS,
    UNUSABLE,
    Loaded,
    Row,
    common_prefix,
    finite_number,
    normalise,
    numbers_of,
)

# Characters tokenised per token of max_length. Without the limit a row of 20 MB takes a minute to
# encode, only to be cut to 512 tokens.
_HEAD = 64


def encode_pairs(
    loaded: Loaded, tokenizer: Any, eos: str, max_length: int | None = None
) -> list[Row]:
    """Rows `prompt_ids`, `chosen_ids`, `rejected_ids` (and given `NUMBERS`) of raw pairs.

    Of texts much longer than `max_length` only so much is encoded that they are still longer. A row
    whose text is no text is {UNUSABLE: why}.

    Raises `ValueError`, naming the row's place, for rows of another shape.
    """
    raw = [row for row in loaded.rows if UNUSABLE not in row]
    done = sum("chosen_ids" in row for row in raw)
    if done == len(raw):
        return _each(loaded, _ready)
    if done:
        raise ValueError(
            f"{done} of {len(raw)} rows hold token ids and the rest text; pass one kind"
        )
    _need_tokenizer(tokenizer)
    return _each(loaded, lambda row: _encode_pair(row, tokenizer, eos, max_length))


def encode_labelled(
    loaded: Loaded, tokenizer: Any, eos: str, max_length: int | None = None
) -> list[Row]:
    """Rows `prompt_ids`, `answer_ids`, `label` (and `targets`); as `encode_pairs` otherwise."""
    return _each(loaded, lambda row: _encode_labelled(row, tokenizer, eos, max_length))


def encode_answers(
    loaded: Loaded, tokenizer: Any, eos: str, max_length: int | None = None
) -> list[Row]:
    """Rows `prompt_ids`, `answer_ids` (and `own_ids`) of texts or pairs; as `encode_pairs`
    otherwise."""
    return _each(loaded, lambda row: _encode_demonstration(row, tokenizer, eos, max_length))


def encode_guided(
    loaded: Loaded, tokenizer: Any, eos: str, max_length: int | None = None
) -> list[Row]:
    """Rows `prompt_ids`, `answer_ids`, `candidate_ids` and `candidate_logprobs`, as they are."""
    return _each(loaded, _encode_guided)


def encode_prompt(
    tokenizer: Any, text: str, special: bool = True, max_length: int | None = None
) -> list[int]:
    """Ids of a prompt with the tokenizer's special tokens, but for an EOS or SEP at its end.

    Of a text much longer than `max_length` those of its beginning, more than `max_length`.
    """
    if _is_long(text, max_length):
        ids = encode_prompt(tokenizer, text[: _HEAD * max_length], special)  # type: ignore[operator]
        if len(ids) > 2 * max_length:  # type: ignore[operator]
            return ids  # tokens at the cut may differ, far beyond max_length
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    extra = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)}
    if special and ids and ids[-1] in extra:
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not bare or ids[-len(bare) :] != bare:
            ids = ids[:-1]
    return ids


def encode_answer(
    tokenizer: Any,
    prompt: str,
    prompt_ids: list[int],
    text: str,
    special: bool,
    eos: str,
    max_length: int | None = None,
) -> list[int]:
    """Ids of the answer behind the prompt, with EOS at its end as `eos` says; empty for no text.

    Prompt and answer are tokenised together where the prompt's own ids survive that, else apart.
    """
    if not text.strip():
        return []
    whole = None
    if not _is_long(prompt, max_length):
        whole = encode_prompt(tokenizer, prompt + text, special, max_length)
    if whole is not None and whole[: len(prompt_ids)] == prompt_ids:
        ids = whole[len(prompt_ids) :]
    else:
        ids = encode_prompt(tokenizer, text, False, max_length)
    if eos == "append" and ids and ids[-1] != tokenizer.eos_token_id:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "eos='append' needs a tokenizer with an EOS token; set tokenizer.eos_token, or "
                "pass eos='keep'"
            )
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def _is_long(text: str, max_length: int | None) -> bool:
    return max_length is not None and len(text) > _HEAD * max_length


def _each(loaded: Loaded, encode: Callable[[Row], Row]) -> list[Row]:
    encoded = []
    for number, row in enumerate(loaded.rows):
        try:
            encoded.append(row if UNUSABLE in row else encode(row))
        except UnicodeEncodeError:
            encoded.append({UNUSABLE: "a lone surrogate, which is half a character"})
        except ValueError as error:
            raise ValueError(f"{loaded.place(number)}: {error}") from None
    return encoded


def _need_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None:
        raise ValueError("rows of text need a tokenizer; pass tokenizer= (processing_class=)")


def _encode_pair(row: Row, tokenizer: Any, eos: str, max_length: int | None) -> Row:
    row = normalise(row, tokenizer)
    special = not row["templated"]
    for side in ("prompt", "chosen", "rejected"):
        row[side].encode()
    prompt = encode_prompt(tokenizer, row["prompt"], special, max_length)
    entry: Row = {"prompt_ids": prompt}
    for side in ("chosen", "rejected"):
        entry[f"{side}_ids"] = encode_answer(
            tokenizer, row["prompt"], prompt, row[side], special, eos, max_length
        )
    if entry["chosen_ids"] == entry["rejected_ids"] != []:
        # Long answers may differ only beyond what is encoded: compare the texts.
        entry["begins"] = row["chosen"] != row["rejected"] and _is_long(
            row["prompt"] + row["chosen"], max_length
        )
    return entry | {name: row[name] for name in NUMBERS if name in row}


def _ready(row: Row) -> Row:
    if row.get("rejected_ids") is None:
        raise ValueError("a row of token ids has chosen_ids but no rejected_ids; give both")
    chosen, rejected = _ids(row, "chosen_ids"), _ids(row, "rejected_ids")
    if row.get("prompt_ids") is None:
        same = common_prefix(chosen, rejected) if chosen != rejected else 0
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    else:
        prompt = _ids(row, "prompt_ids")
    entry: Row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return entry | numbers_of(row)


def _encode_labelled(row: Row, tokenizer: Any, eos: str, max_length: int | None) -> Row:
    if "label" not in row or not {"text", "completion", "answer_ids"} & row.keys():
        raise ValueError(f"a labelled row has the keys {sorted(row)}; it needs text and label")
    entry = _encode_text(row, tokenizer, eos, max_length)
    entry["label"] = finite_number("label", row["label"])
    if row.get("targets") is not None:
        entry["targets"] = [float(target) for target in row["targets"]]
    return entry


def _encode_text(row: Row, tokenizer: Any, eos: str, max_length: int | None) -> Row:
    """`prompt_ids`, `answer_ids` and, of a row with `own` (`own_ids`), `own_ids`."""
    own = row.get("own_ids") if "answer_ids" in row else row.get("own")
    if "answer_ids" in row:
        prompt = [] if row.get("prompt_ids") is None else _ids(row, "prompt_ids")
        entry = {"prompt_ids": prompt, "answer_ids": _ids(row, "answer_ids")}
        return entry if own is None else entry | {"own_ids": _ids(row, "own_ids")}
    _need_tokenizer(tokenizer)
    before, text = row.get("prompt") or "", row["completion" if "completion" in row else "text"]
    texts = [text] if own is None else [text, own]
    if not all(isinstance(value, str) for value in (before, *texts)):
        raise ValueError(
            f"text={text!r:.60} and prompt={before!r:.60}; pass strings (conversations as the "
            "text that the chat template makes of them)"
        )
    (before + "".join(texts)).encode()
    prompt = encode_prompt(tokenizer, before, True, max_length)
    answers = [
        encode_answer(tokenizer, before, prompt, value, True, eos, max_length) for value in texts
    ]
    return {"prompt_ids": prompt} | dict(zip(("answer_ids", "own_ids"), answers, strict=False))


def _encode_demonstration(row: Row, tokenizer: Any, eos: str, max_length: int | None) -> Row:
    if row.get("chosen_ids") is not None:
        pair = _ready(row)
    elif "chosen" in row:
        _need_tokenizer(tokenizer)
        pair = _encode_pair(row, tokenizer, eos, max_length)
    elif {"text", "completion", "answer_ids"} & row.keys():
        return _encode_text(row, tokenizer, eos, max_length)
    else:
        raise ValueError(
            f"a row has the keys {sorted(row)}; it needs prompt and text, or chosen and rejected"
        )
    return {"prompt_ids": pair["prompt_ids"], "answer_ids": pair["chosen_ids"]}


def _encode_guided(row: Row) -> Row:
    names = ("prompt_ids", "answer_ids", "candidate_ids", "candidate_logprobs")
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise ValueError(
            f"a row of a guided answer has no {', '.join(missing)}; make rows by "
            "rgtg_fast.training.guided_rows"
        )
    return {name: row[name] for name in names}


def _ids(row: Row, name: str) -> list[int]:
    try:
        return [int(i) for i in row[name]]
    except (TypeError, ValueError):
        raise ValueError(f"{name}={row[name]!r:.60}; pass a list of token ids") from None
