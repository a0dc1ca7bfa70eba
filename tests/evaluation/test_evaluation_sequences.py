"""`eval`'s best of n and `rgtg_fast.best_of` of the same texts."""

import pytest
import tiny

import rgtg_fast
from rgtg_fast.evaluation.answers import Answer, Answerer
from rgtg_fast.evaluation.prompts import Prompt
from rgtg_fast.evaluation.scoring import Classifier
from rgtg_fast.evaluation.settings import Run


@pytest.mark.parametrize("eos", [[2], [2, *range(3, 300, 4)]], ids=["long", "short"])
def test_best_of_takes_the_text_that_eval_takes(eos):
    """Eval's selector is the classifier's public forward, on whole texts in padded batches."""
    lm, rm, tok, n = tiny.llama_lm(), tiny.gpt2_rm(), tiny.tokenizer(), 5
    lm.generation_config.eos_token_id = eos
    texts = ["hello world", "thank you", "p", "please wait while we check"]
    selector = Classifier(rm, tok, tok, 3)
    answerer = Answerer(lm, tok, Run("best", best_of=n), 8, selector=selector)
    prompts = [Prompt(text, text, tok(text)["input_ids"]) for text in texts]
    got = list(
        rgtg_fast.best_of(lm, texts, reward_model=rm, n=n, tokenizer=tok, seed=1, max_new_tokens=8)
    )
    drawn = []
    for candidate in (c for answer in got for c in answer.candidates):
        ids = list(candidate.tokens)
        end = ids.pop() if ids[-1] in eos else None
        drawn.append(Answer(candidate.text, ids, end, candidate.logprob, 0.0, 0.0))
    rows = answerer.batch(prompts, list(range(len(texts))), drawn)
    for answer, row in zip(got, rows, strict=True):
        assert answer.tokens == row["ids"] + ([] if row["end"] is None else [row["end"]])
        assert answer.reward == pytest.approx(row["proxy"], abs=1e-4)
        assert answer.logprob == pytest.approx(row["logp"])
