"""Preference rows of every shape to token ids, with what is wrong counted and said."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny import BOS, EOS, PAD, tokenizer
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


def test_a_prompt_keeps_its_own_ids_where_the_answer_would_grow_into_them():
    rows = [{"prompt": "say h", "chosen": "ello", "rejected": "ow"}]
    row = PreferenceDataset(rows, tokenizer(), eos="keep")[0]
    alone = [tokenizer()(t)["input_ids"] for t in ("say h", "ello")]
    assert [row["prompt_ids"], row["chosen_ids"]] == alone
    assert tokenizer()("say hello")["input_ids"] != alone[0] + alone[1]


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


def test_a_prompt_that_the_conversations_repeat_is_taken_once():
    question = {"role": "user", "content": "hello"}
    answers = [{"role": "assistant", "content": word} for word in ("thank you", "no")]
    rows = [
        {"prompt": "hello", "chosen": [question, answers[0]], "rejected": [question, answers[1]]},
        {"chosen": [question, answers[0]], "rejected": [question, answers[1]]},
        {"prompt": [question], "chosen": answers[:1], "rejected": answers[1:]},
        {"prompt": "hello", "chosen": "thank you", "rejected": answers[1:]},
    ]
    data = PreferenceDataset(rows, chat_tokenizer())
    assert text(data[0]["prompt_ids"]) == "<user>hello<eos>\n<assistant>"
    assert all(row == data[0] for row in data.rows)


@pytest.mark.parametrize(
    ("words", "fault"), [(("no", "no"), "two equal answers"), (("no", " "), "an empty answer")]
)
def test_bad_conversations_are_counted_as_what_they_are(words, fault):
    question = {"role": "user", "content": "hello"}
    chosen, rejected = ([question, {"role": "assistant", "content": w}] for w in words)
    with pytest.raises(ValueError, match=f"1 with {fault}"):
        PreferenceDataset([{"chosen": chosen, "rejected": rejected}], chat_tokenizer())
    with pytest.raises(ValueError, match="do not begin with the same message"):
        PreferenceDataset([{"chosen": chosen[1:], "rejected": rejected[1:]}], chat_tokenizer())


def test_tldr_has_the_authors_prompt_and_skips_articles_and_short_summaries():
    rows, named, left_out, _ = load_rows(f"tldr:{DATA / 'tldr.jsonl'}")
    assert left_out == 1
    assert [tldr_row(row) is None for row in read("tldr.jsonl")] == [False, True, False]
    assert rows[0]["prompt"].startswith('Content: "I moved') and named.first == 2
    assert rows[0]["prompt"].endswith('"\nSummary:')
    assert rows[0]["chosen"].startswith(" Someone moved away")  # choice 1
    data = PreferenceDataset(f"tldr:{DATA / 'tldr.jsonl'}", tokenizer())
    assert len(data) == 1 and data.report.dropped_short == 1
    assert str(data.report) == "1 of 3 rows kept, dropped short 1, left out by recipe 1"


def test_hh_is_split_at_the_last_assistant_turn():
    row = hh_row(read("hh.jsonl")[0])
    assert row["prompt"].endswith("Human: It is 4711.\n\nAssistant:")
    assert row["chosen"].startswith(" Thank you. It left")
    assert row["rejected"] == " Just wait."
    other = {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: C\n\nAssistant: D"}
    prompt = "\n\nHuman: C\n\nAssistant:"  # the rejected's, as the authors have it
    assert hh_row(other) == {"prompt": prompt, "chosen": " B", "rejected": " D"}
    assert len(PreferenceDataset(f"hh:{DATA / 'hh.jsonl'}", tokenizer())) == 2


def test_overlong_answers_are_cut_counted_and_get_no_eos():
    rows = id_pairs(1, longest=7)
    rows[0] |= {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, EOS], "rejected_ids": [8, EOS]}
    data = PreferenceDataset(rows, max_length=5)
    assert data[0]["chosen_ids"] == [7, 8, 9] and data[0]["rejected_ids"] == [8, EOS]
    assert (data.report.overlong, data.report.truncated_answers) == (1, 1)
    assert "overlong 1" in str(data.report)
    whole = PreferenceDataset(rows, max_length=6)
    assert whole[0]["chosen_ids"] == [7, 8, 9, EOS] and whole.report.overlong == 0


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


def test_pairs_in_train_and_eval_are_an_error_or_dropped():
    rows = id_pairs(6)
    swapped = {**rows[1], "chosen_ids": rows[1]["rejected_ids"]}
    swapped["rejected_ids"] = rows[1]["chosen_ids"]
    train, held_out = PreferenceDataset(rows), PreferenceDataset([rows[0], swapped])
    with pytest.raises(ValueError, match=r"2 of 6 training rows.*leaks='drop'"):
        remove_leaks(train, held_out)
    remove_leaks(train, held_out, "drop")
    assert train.rows == rows[2:] and train.sources == [2, 3, 4, 5]
    assert train.report.dropped_leaks == 2 and train.report.kept == 4


def test_labelled_texts_in_train_and_eval_are_an_error_too():
    rows = [{"text": word, "label": 1} for word in ("a", "b", "c")]
    train, held_out = (LabelledDataset(r, tokenizer()) for r in (rows, rows[1:2]))
    with pytest.raises(ValueError, match="1 of 3 training rows"):
        remove_leaks(train, held_out)


def test_other_pairs_of_a_prompt_that_was_trained_on_are_counted():
    rows = id_pairs(4)
    other = rows[0] | {"chosen_ids": [9, 9, 9, EOS]}
    held_out = PreferenceDataset([other, *id_pairs(1, seed=5)])
    remove_leaks(PreferenceDataset(rows), held_out)
    assert str(held_out.report) == "2 of 2 rows kept, prompts seen in training 1"


def test_rows_taken_out_share_no_prompt_with_those_that_stay():
    rows = id_pairs(12)
    for n, row in enumerate(rows):
        row["prompt_ids"] = [5, 6 + n // 3]
    train = PreferenceDataset(rows)
    held_out = train.take_out(4, seed=1)
    assert sorted(train.sources + held_out.sources) == list(range(12))
    assert [r for n, r in enumerate(rows) if n in held_out.sources] == held_out.rows
    prompts = [{tuple(row["prompt_ids"]) for row in data.rows} for data in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert (len(held_out), held_out.report.rows) == (6, 6)
    assert str(train.report) == "6 of 12 rows kept, held out 6"
    with pytest.raises(ValueError, match="4 rows to hold out leave nothing of 6 rows with 2"):
        train.take_out(4)


def test_duplicates_are_counted():
    assert PreferenceDataset([*id_pairs(3), id_pairs(1)[0]]).report.duplicates == 1


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    rows = [{"prompt": "a", "chosen": " b\u2028c\x85", "rejected": " d"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    assert PreferenceDataset(path, tokenizer()).rows == PreferenceDataset(rows, tokenizer()).rows


def test_a_folder_with_splits_gives_the_one_asked_for(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(read("preference.jsonl"))
    datasets.DatasetDict({"train": table.select([0, 1])}).save_to_disk(tmp_path / "both")
    assert len(PreferenceDataset(tmp_path / "both", tokenizer())) == 2
    with pytest.raises(ValueError, match="holds the splits train and no test"):
        PreferenceDataset(tmp_path / "both", tokenizer(), split="eval")
    with pytest.raises(ValueError, match="save_to_disk did not write"):
        PreferenceDataset(tmp_path, tokenizer())


def test_the_collator_pads_right_and_marks_the_answers():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, EOS], "rejected_ids": [9]},
        {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8, EOS], "margin": 0.5},
    ]
    batch = PairCollator(PAD, margin=0.25)(rows)
    assert batch["input_ids"].tolist() == [
        [[5, 6, 7, 8, EOS], [5, 6, 9, PAD, PAD]],
        [[5, 7, PAD, PAD, PAD], [5, 8, EOS, PAD, PAD]],
    ]
    assert batch["answer_mask"].tolist() == [
        [[1, 1, 1], [1, 0, 0]],
        [[1, 0, 0], [1, 1, 0]],
    ]
    assert torch.equal(batch["attention_mask"].sum(-1), torch.tensor([[5, 3], [2, 3]]))
    assert batch["start"].tolist() == [2, 1] and batch["margin"].tolist() == [0.25, 0.5]


def test_the_published_padding_puts_eos_behind_the_shorter_answer():
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [9]}]
    batch = PairCollator(PAD, fill_eos=EOS)(rows)
    assert batch["input_ids"][0, 1].tolist() == [5, 6, 9, EOS, EOS]
    assert batch["attention_mask"][0, 1].tolist() == [1] * 5
    assert batch["answer_mask"][0, 1].tolist() == [1, 0, 0]


def test_labelled_texts_are_read_and_labels_checked():
    rows = [{"text": "hello", "label": 0.25}, {"prompt": "a", "completion": " b", "label": True}]
    data = LabelledDataset(rows, tokenizer(), eos="append")
    assert data[0]["prompt_ids"] == [] and text(data[0]["answer_ids"]) == "hello<eos>"
    assert text(data[1]["prompt_ids"]) == "a" and data[1]["label"] == 1.0
    with pytest.raises(ValueError, match=r"1 with a label outside \[0, 1\]"):
        LabelledDataset([*rows, {"text": "x", "label": 2}], tokenizer())


class WithSpecialTokens:
    """A tokenizer that puts BOS before and EOS behind every text, as some do."""

    def __init__(self):
        self.inner = tokenizer()
        self.eos_token_id, self.sep_token_id = EOS, None

    def __call__(self, text, add_special_tokens=True):
        ids = self.inner(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [BOS, *ids, EOS] if add_special_tokens else ids}


def test_special_tokens_of_the_tokenizer_frame_the_whole_and_not_the_parts():
    rows = [{"prompt": "hello", "chosen": " thank you", "rejected": " no<eos>"}]
    row = PreferenceDataset(rows, WithSpecialTokens())[0]
    plain = PreferenceDataset(rows, tokenizer())[0]
    assert row == plain | {"prompt_ids": [BOS, *plain["prompt_ids"]]}
    kept = PreferenceDataset(rows, WithSpecialTokens(), eos="keep")[0]
    assert EOS not in kept["chosen_ids"] and kept["rejected_ids"][-1] == EOS


def test_a_text_without_prompt_has_the_first_special_token_as_its_prompt():
    row = LabelledDataset([{"text": "hello", "label": 1}], WithSpecialTokens())[0]
    assert row["prompt_ids"] == [BOS] and text(row["answer_ids"]) == "hello"


def test_texts_shorter_than_the_first_prefix_are_dropped_and_counted():
    rows = [{"answer_ids": [5] * n, "label": 1} for n in (1, 3)]
    data = LabelledDataset(rows, min_answer_tokens=2)
    assert len(data) == 1 and data.report.dropped_short == 1


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self):
        self.seen, self.eos_token_id = 0, EOS

    def __call__(self, text, **options):
        self.seen += len(text)
        return tokenizer()(text, **options)


@pytest.mark.parametrize("at", ["prompt", "chosen"])
def test_of_a_long_text_only_what_is_kept_is_encoded(at):
    row = {"prompt": "order:", "chosen": " yes", "rejected": " no"}
    row[at] = " the parcel will arrive;" * 20_000
    counting = Counting()
    kept = (
        PreferenceDataset([row] * 2, counting, max_length=32, overlong="truncate").rows
        if at == "chosen"
        else []
    )
    dropped = PreferenceDataset(
        [row, {"prompt": "a", "chosen": " b", "rejected": " c"}],
        counting,
        max_length=32,
        overlong="drop",
    )
    assert dropped.report.dropped_overlong == 1
    assert counting.seen < len(row[at]) / 10
    whole = tokenizer()(row["prompt"] + row["chosen"])["input_ids"]
    for short in kept:
        assert short["prompt_ids"] + short["chosen_ids"] == whole[:32]
