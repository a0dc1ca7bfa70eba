"""`python -m rgtg_fast select-pairs`: the pairs most worth a label, by D-optimal design."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils.data import Subset

from ..config_file import check_keys, read_yaml, typed
from ..data import PreferenceDataset
from ..formats import Row, load_rows
from ..head_only import pair_features
from ..settings import load_pretrained, load_tokenizer
from .design import d_optimal


@dataclass
class SelectSettings:
    """The keys of the config file; the first four are needed.

    Args:
        model: causal LM (folder or hub name) whose last hidden states are the features.
        candidates: pairs to choose from: what `train` takes, or rows `{prompt, responses: [a, b]}`.
            Which answer is called chosen does not matter.
        count: how many to choose.
        out: JSONL file to write: the candidates' rows as they are, in the order chosen, each with
            `gain` (what it adds to log det Σ) and `row` (its place among the candidates, from 0).
        labelled: pairs that have labels already, of the same formats: Σ begins with them, so that
            little is gained by what is like them.
        l2: λ of Σ = λ I + Σ x xᵀ.
        layer: which hidden state; -1 for the last.
        invalid: "error", or "drop" for candidates with an empty or two equal answers.
    """

    model: str
    candidates: str
    count: int
    out: str
    labelled: str | None = None
    tokenizer: str | None = None
    l2: float = 1.0
    layer: int = -1
    max_length: int | None = 512
    overlong: str = "truncate"
    invalid: str = "error"
    eos: str = "append"
    batch_size: int = 16
    dtype: str = "float32"
    device: str | None = None


FIELDS = {f.name: f for f in dataclasses.fields(SelectSettings)}


def select_pairs(
    path: str | os.PathLike[str], overrides: list[str] | None = None
) -> list[dict[str, Any]]:
    """Chooses as the config file says, writes `out` and returns its rows.

    The feature of a pair is the difference of the last hidden states of its two whole answers; see
    `d_optimal`. Raises `ValueError` for a bad file, bad keys, or bad rows. A config file::

        # python -m rgtg_fast select-pairs --config select.yaml count=500
        model: gpt2
        candidates: unlabelled.jsonl    # {"prompt": .., "responses": [.., ..]} a line
        labelled: pairs.jsonl           # optional
        count: 200
        out: to_label.jsonl
    """
    settings = check(read_yaml(path, overrides or ()))
    out = Path(settings.out)
    if not out.parent.is_dir():
        raise ValueError(f"out={settings.out!r} lies in a folder that does not exist; make it")
    dtype = getattr(torch, settings.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={settings.dtype!r}; write float32, bfloat16 or float16")
    tokenizer = load_tokenizer(settings)
    raw, candidates = _pairs(settings.candidates, settings, tokenizer)
    labelled = _pairs(settings.labelled, settings, tokenizer)[1] if settings.labelled else None
    for name, data in (("candidates", candidates), ("labelled", labelled)):
        if data is not None:
            print(f"{name}: {data.report}", flush=True)
    if not 1 <= settings.count <= len(candidates):
        raise ValueError(
            f"count={settings.count} of {len(candidates)} candidates; pass 1 to {len(candidates)}"
        )
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    auto = transformers.AutoModelForCausalLM
    lm = load_pretrained(auto, "model", settings.model, dtype=dtype)
    lm = lm.to(device).eval()
    features = _features(lm, candidates, settings, "features of candidates")
    known = None if labelled is None else _features(lm, labelled, settings, "features of labelled")
    with _progress("pairs chosen", settings.count) as advance:
        chosen = d_optimal(
            features,
            settings.count,
            l2=settings.l2,
            labelled=known,
            progress=lambda done, gain: advance(done),
        )
    rows = []
    for index, gain in zip(chosen.index.tolist(), chosen.gain.tolist(), strict=True):
        source = candidates.sources[index]
        rows.append(raw[source] | {"gain": gain, "row": source})
    # A lone surrogate could not be written as UTF-8; its backslash escape is valid JSON.
    with out.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    total = chosen.gain.sum()
    print(
        f"wrote {out}: {len(rows)} of {len(candidates)} pairs, log det Σ + {total:.4g} "
        f"(first gain {chosen.gain[0]:.4g}, last {chosen.gain[-1]:.4g})"
    )
    return rows


def check(values: dict[str, Any]) -> SelectSettings:
    """Settings from a mapping; raises `ValueError` for unknown or missing keys and wrong kinds."""
    check_keys(values, FIELDS)
    needed = [f.name for f in FIELDS.values() if f.default is dataclasses.MISSING]
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}; set {missing[0]}: ...")
    return SelectSettings(**{key: typed(key, value, FIELDS[key]) for key, value in values.items()})


def _pairs(
    source: str, settings: SelectSettings, tokenizer: Any
) -> tuple[list[Row], PreferenceDataset]:
    """The raw rows, and the pairs of them as token ids."""
    loaded = load_rows(source)
    pairs = []
    for number, row in enumerate(loaded.rows):
        if "responses" in row:
            if not isinstance(row["responses"], list) or len(row["responses"]) != 2:
                raise ValueError(
                    f"{loaded.place(number)}: responses must be a list of two answers; write one "
                    "row per pair"
                )
            row = {k: v for k, v in row.items() if k == "prompt"} | dict(
                zip(("chosen", "rejected"), row["responses"], strict=True)
            )
        pairs.append(row)
    data = PreferenceDataset(
        loaded._replace(rows=pairs),
        tokenizer,
        max_length=settings.max_length,
        overlong=settings.overlong,
        invalid=settings.invalid,
        eos=settings.eos,
    )
    return loaded.rows, data


def _features(
    lm: Any, data: PreferenceDataset, settings: SelectSettings, what: str
) -> torch.Tensor:
    """Differences fp32 [M, H] of the whole answers' hidden states, in some pieces for progress."""
    parts = []
    with _progress(what, len(data)) as advance:
        piece = 16 * settings.batch_size
        for at in range(0, len(data), piece):
            end = min(at + piece, len(data))
            some: Any = Subset(data, range(at, end))
            options: dict[str, Any] = {"layer": settings.layer, "batch_size": settings.batch_size}
            parts.append(pair_features(lm, some, full=True, **options).differences)
            advance(end)
    return torch.cat(parts)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
