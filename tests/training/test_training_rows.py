"""Rows that are no training data are named, counted or dropped."""

import json
from pathlib import Path

import pytest
from tiny import tokenizer

from rgtg_fast.training import LabelledDataset, PreferenceDataset
from rgtg_fast.training.formats import load_rows

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "1 with an empty answer"),
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "1 with two equal answers"),
        ({"chosen": "b c", "rejected": "b c"}, "1 with two equal answers"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "1 with an empty prompt"),
    ],
)
def test_bad_rows_are_an_error_with_counts_or_dropped(row, what):
    rows = [{"prompt": "a", "chosen": " x", "rejected": " y"}, row]
    with pytest.raises(ValueError, match=rf"of 2 rows there are {what}.*invalid='drop'"):
        PreferenceDataset(rows, tokenizer())
    data = PreferenceDataset(rows, tokenizer(), invalid="drop")
    assert len(data) == 1 and data.report.dropped_invalid == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "no data at 'nowhere.jsonl'"),
        ([{"prompt": "a", "answer": "b"}], "needs chosen and rejected"),
        ([{"prompt_ids": [1], "chosen_ids": [2]}], "no rejected_ids"),
        ([], "no row is left"),
    ],
)
def test_sources_that_are_no_pairs_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        PreferenceDataset(source, tokenizer())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{oops\n', "line 3 is not JSON"),
        (b"prompt,chosen,rejected\na,b,c\n", "line 1 is not JSON .*one JSON object a line"),
        (b'["a", "b"]\n', "line 1 is list; write an object"),
        ('{"prompt": "caf\xe9"}'.encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_file_that_is_not_jsonl_is_an_error_with_its_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PreferenceDataset(path, tokenizer())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": None, "rejected": " c"}, "row 2 of 2: chosen is None; pass a"),
        ({"prompt": "a", "chosen": 3, "rejected": " c"}, "chosen is 3; pass a text"),
        ({"prompt": 1, "chosen": "b", "rejected": " c"}, "prompt is 1; pass a text"),
        ({"prompt": "a", "chosen": ["b"], "rejected": " c"}, r"chosen is \['b'\]; pass a text"),
        (
            {"prompt": "a", "chosen": " b", "rejected": " c", "margin": "big"},
            "margin is 'big'; pass a finite number",
        ),
    ],
)
def test_values_of_another_kind_are_named_with_their_row(row, message):
    rows = [{"prompt": "a", "chosen": " x", "rejected": " y"}, row]
    with pytest.raises(ValueError, match=message):
        PreferenceDataset(rows, tokenizer())


def test_token_ids_that_are_none_are_named():
    with pytest.raises(ValueError, match="chosen_ids='abc'; pass a list of token ids"):
        PreferenceDataset([{"prompt_ids": [1], "chosen_ids": "abc", "rejected_ids": [2]}])


@pytest.mark.parametrize(("name", "file"), [("tldr", "preference"), ("hh", "tldr")])
def test_rows_of_another_schema_are_refused_by_the_named_sets(name, file):
    with pytest.raises(ValueError, match=rf"keys \['.* not as in .*; pass '.*{file}.jsonl' alone"):
        load_rows(f"{name}:{DATA / file}.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": "good"}, "label is 'good'; pass a finite number"),
        ({"text": [{"role": "user", "content": "a"}], "label": 1}, "pass strings"),
        ({"prompt": "a", "label": 1}, r"keys \['label', 'prompt'\]; it needs text and label"),
    ],
)
def test_labelled_rows_of_another_kind_are_named(row, message):
    with pytest.raises(ValueError, match=f"row 1 of 1: .*{message}"):
        LabelledDataset([row], tokenizer())


def unreadable(tmp_path):
    """Three lines: a good pair, one with half a character, one nested too deeply."""
    good = json.dumps({"prompt": "a", "chosen": " b", "rejected": " c"})
    deep = good[:-1] + ', "more": ' + "[" * 200_000 + "]" * 200_000 + "}"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good, good.replace(" b", "\\ud800"), deep]))
    return path


def test_rows_that_are_no_text_are_named_by_file_and_line(tmp_path):
    path = unreadable(tmp_path)
    with pytest.raises(ValueError) as error:
        PreferenceDataset(path, tokenizer())
    assert f"1 with a lone surrogate, which is half a character (the first: {path} line 2)" in str(
        error.value
    )
    assert f"nested too deeply (the first: {path} line 3)" in str(error.value)


def test_rows_that_are_no_text_are_counted_where_they_are_dropped(tmp_path):
    data = PreferenceDataset(unreadable(tmp_path), tokenizer(), invalid="drop")
    assert len(data) == 1 and data.report.dropped_invalid == 2
    assert sorted(data.report.invalid.values()) == [1, 1]
