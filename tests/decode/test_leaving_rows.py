"""Every logits processor that rows may leave under: the same tokens as with the whole batch."""

import copy

import pytest
import tiny
import torch
import transformers as tf

import rgtg_fast
from rgtg_fast.decode.plan import ROW_BY_ROW
from rgtg_fast.scorers.base import RewardModelScorer

LENGTHS, WIDTH, NEW = (5, 9, 3, 7, 1, 6, 8, 2), 9, 14
EOS = [tiny.EOS]
# Each by the option that makes it, or as a processor of the caller's.
OPTIONS = {
    tf.MinLengthLogitsProcessor: {"min_length": WIDTH + 3},
    tf.MinNewTokensLengthLogitsProcessor: {"min_new_tokens": 3},
    tf.RepetitionPenaltyLogitsProcessor: {"repetition_penalty": 1.7},
    tf.TopPLogitsWarper: {"top_p": 0.8},
    tf.TopKLogitsWarper: {"top_k": 5},
    tf.MinPLogitsWarper: {"min_p": 0.05},
    tf.TypicalLogitsWarper: {"typical_p": 0.8},
    tf.EpsilonLogitsWarper: {"epsilon_cutoff": 0.02},
    tf.EtaLogitsWarper: {"eta_cutoff": 0.02},
    tf.NoRepeatNGramLogitsProcessor: {"no_repeat_ngram_size": 1},
    tf.SequenceBiasLogitsProcessor: {"sequence_bias": {(tiny.EOS,): 6.0, (7, 8): 2.0}},
    tf.NoBadWordsLogitsProcessor: {"bad_words_ids": [[5], [17, 3]]},
    tf.ForcedBOSTokenLogitsProcessor: {"forced_bos_token_id": 9},
    tf.ForcedEOSTokenLogitsProcessor: {"forced_eos_token_id": tiny.EOS},
    tf.InfNanRemoveLogitsProcessor: {"remove_invalid_values": True},
    tf.ExponentialDecayLengthPenalty: {"exponential_decay_length_penalty": (2, 1.1)},
    tf.LogitNormalization: {"renormalize_logits": True},
    tf.SuppressTokensLogitsProcessor: {"suppress_tokens": [5, 17]},
    tf.SuppressTokensAtBeginLogitsProcessor: {"begin_suppress_tokens": EOS},
}


@pytest.fixture(scope="module")
def models():
    return tiny.llama_lm(), tiny.gpt2_rm()


@pytest.fixture
def left(monkeypatch):
    """How many rows stayed, each time some left."""
    counts, keep_rows = [], RewardModelScorer.keep_rows
    monkeypatch.setattr(
        RewardModelScorer,
        "keep_rows",
        lambda self, rows: counts.append(len(rows)) or keep_rows(self, rows),
    )
    return counts


def guided(models, **options):
    lm, rm = models
    options = {
        "sequence_bias": {(tiny.EOS,): 6.0},
        "do_sample": True,
        "seed": torch.arange(len(LENGTHS)) + 3,
        **tiny.prompts(*LENGTHS),
    } | options
    return rgtg_fast.generate(lm, reward_model=rm, k=4, beta=2.0, max_new_tokens=NEW, **options)


def test_every_processor_is_tried():
    assert OPTIONS.keys() == set(ROW_BY_ROW)


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_rows_leave_under(kind, models, left):
    whole = guided(models, compact=False, **OPTIONS[kind])
    assert not left
    assert torch.equal(guided(models, **OPTIONS[kind]), whole)
    assert left and left[-1] < len(LENGTHS)


def test_rows_leave_under_a_penalty_of_three_answers_each(models, left):
    options = {"num_return_sequences": 3, "repetition_penalty": 1.7, "seed": torch.arange(24)}
    whole = guided(models, compact=False, **options)
    assert torch.equal(guided(models, **options), whole)
    assert left


def test_rows_leave_under_a_penalty_from_the_checkpoints_configuration(models, left):
    lm = copy.copy(models[0])
    lm.generation_config = copy.deepcopy(lm.generation_config)
    lm.generation_config.repetition_penalty = 1.3
    whole = guided((lm, models[1]), compact=False)
    assert torch.equal(guided((lm, models[1])), whole)
    assert left


def test_a_processor_of_the_callers_stays_as_it_was(models):
    lengths = torch.arange(len(LENGTHS))
    try:
        processor = tf.RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=lengths)
    except ValueError:
        pytest.skip("this transformers takes one length for all rows")
    whole = guided(models, compact=False, logits_processor=[processor])
    assert torch.equal(guided(models, logits_processor=[processor]), whole)
    assert processor.prompt_ignore_length is lengths


def test_rows_stay_where_a_processor_holds_a_tensor_that_is_not_known(models, left):
    processor = tf.TopKLogitsWarper(5)
    processor.weights = torch.ones(len(LENGTHS))
    guided(models, logits_processor=[processor])
    assert not left
