"""Shared by the tests of training: models, data and config files as a user has them."""

import pytest
import transformers
from tiny import gpt2_lm, gpt2_rm, tokenizer
from training import text_pairs, write_rows


@pytest.fixture
def folder(tmp_path):
    """With a language model `lm`, a classifier without head training `rm`, and pairs in
    train.jsonl and eval.jsonl."""
    gpt2_lm(initializer_range=0.1, n_positions=128).save_pretrained(tmp_path / "lm")
    gpt2_rm(initializer_range=0.1).save_pretrained(tmp_path / "rm")
    for name in ("lm", "rm"):
        tokenizer().save_pretrained(tmp_path / name)
    write_rows(tmp_path / "train.jsonl", text_pairs(48))
    write_rows(tmp_path / "eval.jsonl", text_pairs(24, seed=3))
    transformers.utils.logging.set_verbosity_error()
    return tmp_path
