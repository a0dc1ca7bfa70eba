"""Preference rows of every shape to token ids, with what is wrong counted and said."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny import EOS, PAD, tokenizer
from training import id_pairs

from rgtg_fast.training import LabelledDataset, PairCollator, PreferenceDataset
from rgtg_fast.training.data import remove_leaks
from rgtg_fast.training.formats import hh_row, load_rows, tldr_row

DATA = Path(__file__).parent / "data"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text(ids):
    return tokenizer().decode(ids)


def chat_tokenizer():
    tok = copy.deepcopy(tokenizer())
    tok.chat_template = TEMPLATE
    return tok


def read(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def test_jsonl_gives_prompt_and_answers_with_eos_at_the_end():
    data = PreferenceDataset(DATA / "preference.jsonl", tokenizer())
    assert len(data) == data.report.rows == data.report.kept == 3
    row = data[0]
    assert text(row["prompt_ids"]) == "where is my order?"
    assert text(row["chosen_ids"]) == " the parcel will arrive tomorrow.<eos>"
    assert row["rejected_ids"].count(EOS) == 1


def test_eos_is_kept_as_it_is_where_that_is_asked_for():
    rows = [{"prompt": "a", "chosen": " b<eos>", "rejected": " c"}]
    kept = PreferenceDataset(rows, tokenizer(), eos="keep")[0]
    assert kept["chosen_ids"][-1] == EOS and EOS not in kept["rejected_ids"]
    appended = PreferenceDataset(rows, tokenizer())[0]
    assert appended["chosen_ids"].count(EOS) == appended["rejected_ids"].count(EOS) == 1


def test_a_dataset_of_datasets_reads_like_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(read("preference.jsonl"))
    expected = PreferenceDataset(DATA / "preference.jsonl", tokenizer()).rows
    assert PreferenceDataset(table, tokenizer()).rows == expected
    table.save_to_disk(tmp_path / "table")
    assert PreferenceDataset(tmp_path / "table", tokenizer()).rows == expected


def test_without_a_prompt_the_common_words_are_the_prompt():
    rows = [{"chosen": "hello, thank you", "rejected": "hello, that is wrong"}]
    row = PreferenceDataset(rows, tokenizer())[0]
    assert text(row["prompt_ids"]) == "hello,"
    assert text(row["chosen_ids"]) == " thank you<eos>"


def test_token_ids_without_a_prompt_share_theirs():
    row = PreferenceDataset([{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9]}])[0]
    assert row == {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}


def test_conversations_go_through_the_chat_template():
    data = PreferenceDataset(DATA / "chat.jsonl", chat_tokenizer())
    for row, question in zip(data.rows, ("where is my order?", "hello"), strict=True):
        assert text(row["prompt_ids"]) == f"<user>{question}<eos>\n<assistant>"
        for side in ("chosen_ids", "rejected_ids"):
            assert row[side][-1] == EOS and row[side].count(EOS) == 1
    assert text(data[1]["chosen_ids"]) == "hello, how may I help you?<eos>"


def test_conversations_without_a_template_are_refused():
    with pytest.raises(ValueError, match="no chat template"):
        PreferenceDataset(DATA / "chat.jsonl", tokenizer())


def test_tldr_has_the_authors_prompt_and_skips_articles_and_short_summaries():
    rows, named = load_rows(f"tldr:{DATA / 'tldr.jsonl'}")
    assert [tldr_row(row) is None for row in read("tldr.jsonl")] == [False, True, False]
    assert rows[0]["prompt"].startswith('Content: "I moved') and named.first == 2
    assert rows[0]["prompt"].endswith('"\nSummary:')
    assert rows[0]["chosen"].startswith(" Someone moved away")  # choice 1
    data = PreferenceDataset(f"tldr:{DATA / 'tldr.jsonl'}", tokenizer())
    assert len(data) == 1 and data.report.dropped_short == 1


def test_hh_is_split_at_the_last_assistant_turn():
    row = hh_row(read("hh.jsonl")[0])
    assert row["prompt"].endswith("Human: It is 4711.\n\nAssistant:")
    assert row["chosen"].startswith(" Thank you. It left")
    assert row["rejected"] == " Just wait."
    assert len(PreferenceDataset(f"hh:{DATA / 'hh.jsonl'}", tokenizer())) == 2


def test_overlong_answers_are_cut_counted_and_get_no_eos():
    rows = id_pairs(1, longest=7)
    rows[0] |= {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, EOS], "rejected_ids": [8, EOS]}
    data = PreferenceDataset(rows, max_length=5)
    assert data[0]["chosen_ids"] == [7, 8, 9] and data[0]["rejected_ids"] == [8, EOS]
    assert (data.report.overlong, data.report.truncated_answers) == (1, 1)
    assert "overlong 1" in str(data.report)


def test_overlong_rows_are_dropped_or_refused_only_when_asked_for():
    rows = [
        *id_pairs(3, longest=2),
        {"prompt_ids": [3] * 9, "chosen_ids": [4], "rejected_ids": [5]},
    ]
    data = PreferenceDataset(rows, max_length=9, overlong="drop")
    assert len(data) == 3 and data.report.dropped_overlong == 1
    with pytest.raises(ValueError, match=r"1 of 4 rows are longer than max_length=9.*overlong="):
        PreferenceDataset(rows, max_length=9, overlong="error")
    with pytest.raises(ValueError, match="1 with an empty answer after the cut"):
        PreferenceDataset(rows, max_length=9)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "1 with an empty answer"),
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "1 with two equal answers"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "1 with an empty prompt"),
    ],
)
def test_bad_rows_are_an_error_with_counts_or_dropped(row, what):
    rows = [{"prompt": "a", "chosen": " x", "rejected": " y"}, row]
    with pytest.raises(ValueError, match=rf"of 2 rows there are {what}.*invalid='drop'"):
        PreferenceDataset(rows, tokenizer())
    data = PreferenceDataset(rows, tokenizer(), invalid="drop")
    assert len(data) == 1 and data.report.dropped_invalid == 1


def test_pairs_in_train_and_eval_are_an_error_or_dropped():
    rows = id_pairs(6)
    swapped = {**rows[1], "chosen_ids": rows[1]["rejected_ids"]}
    swapped["rejected_ids"] = rows[1]["chosen_ids"]
    train, held_out = PreferenceDataset(rows), PreferenceDataset([rows[0], swapped])
    with pytest.raises(ValueError, match=r"2 of 6 training pairs.*leaks='drop'"):
        remove_leaks(train, held_out)
    remove_leaks(train, held_out, "drop")
    assert len(train) == 4 and train.report.dropped_leaks == 2


def test_duplicates_are_counted():
    assert PreferenceDataset([*id_pairs(3), id_pairs(1)[0]]).report.duplicates == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "no data at 'nowhere.jsonl'"),
        ([{"prompt": "a", "answer": "b"}], "needs chosen and rejected"),
        ([{"prompt_ids": [1], "chosen_ids": [2]}], "no rejected_ids"),
        ([], "no pair is left"),
    ],
)
def test_sources_that_are_no_pairs_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        PreferenceDataset(source, tokenizer())


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{oops\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        PreferenceDataset(path, tokenizer())


def test_the_collator_pads_right_and_masks_the_prompt():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, EOS], "rejected_ids": [9]},
        {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8, EOS], "margin": 0.5},
    ]
    batch = PairCollator(PAD)(rows)
    assert batch["input_ids"].tolist() == [
        [[5, 6, 7, 8, EOS], [5, 6, 9, PAD, PAD]],
        [[5, 7, PAD, PAD, PAD], [5, 8, EOS, PAD, PAD]],
    ]
    assert batch["answer_mask"].tolist() == [
        [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]],
        [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0]],
    ]
    assert torch.equal(batch["attention_mask"].sum(-1), torch.tensor([[5, 3], [2, 3]]))
    assert batch["start"].tolist() == [2, 1] and batch["margin"].tolist() == [0.0, 0.5]


def test_the_published_padding_puts_eos_behind_the_shorter_answer():
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [9]}]
    batch = PairCollator(PAD, fill_eos=EOS)(rows)
    assert batch["input_ids"][0, 1].tolist() == [5, 6, 9, EOS, EOS]
    assert batch["attention_mask"][0, 1].tolist() == [1] * 5
    assert batch["answer_mask"][0, 1].tolist() == [0, 0, 1, 0, 0]


def test_labelled_texts_are_read_and_labels_checked():
    rows = [{"text": "hello", "label": 0.25}, {"prompt": "a", "completion": " b", "label": True}]
    data = LabelledDataset(rows, tokenizer(), eos="append")
    assert data[0]["prompt_ids"] == [] and text(data[0]["answer_ids"]) == "hello<eos>"
    assert text(data[1]["prompt_ids"]) == "a" and data[1]["label"] == 1.0
    with pytest.raises(ValueError, match=r"1 with a label outside \[0, 1\]"):
        LabelledDataset([*rows, {"text": "x", "label": 2}], tokenizer())
