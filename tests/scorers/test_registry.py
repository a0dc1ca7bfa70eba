"""The registry of scorers: what loads, trains or describes a kind of reward takes it from there."""

import pytest
import torch
from tiny import gpt2_lm, gpt2_rm

import rgtg_fast
from rgtg_fast import scorers
from rgtg_fast.evaluation.settings import check_settings
from rgtg_fast.scorers import KINDS
from rgtg_fast.scorers.registry import Kind, kinds_trained_by, load_guide
from rgtg_fast.training.objectives import OBJECTIVES

MODELS = {"SequenceClassification": gpt2_rm, "CausalLM": gpt2_lm}


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.holds != "head"])
def test_every_kind_guides(name):
    """As its line says: by what it makes of a model that its folder holds."""
    asked = []

    def load(holds, folder):
        asked.append((holds, folder))
        return MODELS[holds]().eval()

    guide = load_guide(name, "folder", load, lm=None)
    out = rgtg_fast.generate(
        gpt2_lm().eval(), torch.tensor([[3, 4, 5]]), reward_model=guide, k=4, max_new_tokens=3
    )
    assert asked == [(KINDS[name].holds, "folder")] and out.shape[1] > 3


def test_every_scorer_of_the_registry_is_importable_and_described():
    for name, kind in KINDS.items():
        assert f"| {name} | `{kind.usage}` |" in scorers.__doc__
        if not kind.is_model:
            assert getattr(scorers, kind.make.__name__) is kind.make
            assert kind.make.__name__ in scorers.__all__


# What trains the language model itself makes no guide.
OF_GUIDES = [name for name, objective in OBJECTIVES.items() if not objective.policy]


@pytest.mark.parametrize("loss_type", OF_GUIDES)
def test_what_training_makes_has_a_kind_that_holds_it(loss_type):
    holds = {"scalar": "SequenceClassification", "vocab": "CausalLM"}[OBJECTIVES[loss_type].head]
    kinds = kinds_trained_by(loss_type)
    assert kinds and {kind.holds for kind in kinds} == {holds}
    assert set().union(*(kind.loss_types for kind in KINDS.values())) == set(OF_GUIDES)


def test_options_that_a_kind_does_not_have_are_named():
    kind = KINDS["attention_credit"]
    kind.check_options({"share": 0.3})
    with pytest.raises(ValueError, match=r"'shar'; AttentionCreditScorer takes share, backend"):
        kind.check_options({"shar": 0.3})
    with pytest.raises(ValueError, match="takes no options"):
        KINDS["autoregressive"].check_options({"share": 1})


class Shorter:
    """A scorer of nobody's."""

    def __init__(self, model, penalty=1.0):
        self.model, self.penalty = model, penalty


def test_a_new_line_is_all_that_eval_and_train_need(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    run = {"name": "r", "reward_model": str(tmp_path), "kind": "shorter"}
    values = {"model": str(tmp_path), "prompts": "p", "judge": "math:fsum", "output_dir": "o"}
    with pytest.raises(ValueError, match="kind='shorter'; pass one of classifier, head"):
        check_settings(values | {"runs": [run]})
    monkeypatch.setitem(KINDS, "shorter", Kind(Shorter, "SequenceClassification", ("full",)))
    (found,) = check_settings(values | {"runs": [run | {"options": {"penalty": 2.0}}]}).runs
    assert found.kind == "shorter" and found.options == {"penalty": 2.0}
    assert KINDS["shorter"] in kinds_trained_by("full")
    assert "| shorter | `rgtg_fast.scorers.Shorter(rm)` |" in scorers.registry.table()
