"""LoRA, bf16, gradient checkpointing, and what is left as it was."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import gpt2_lm, gpt2_rm, llama_lm, llama_rm, prompts
from training import close, id_pairs, step, text_pairs, trainer
from transformers import AutoModelForCausalLM, OPTConfig, OPTForSequenceClassification

import rgtg_fast
from rgtg_fast.scorers import VocabRewardScorer


def lora(task="SEQ_CLS", **changes):
    return LoraConfig(task_type=task, r=4, target_modules="all-linear", **changes)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    rows = id_pairs(4)
    results = []
    for on in (False, True):
        trained = trainer(tmp_path, llama_rm(), rows, gradient_checkpointing=on, max_steps=1)
        trained.train()
        results.append(step(trained, rows))
    torch.testing.assert_close(results[0][0], results[1][0])
    close(results[0][1], results[1][1], 1e-5)


def test_lora_trains_adapters_and_head_only_and_the_saved_adapter_scores_alike(tmp_path):
    from peft import PeftModel

    rows = text_pairs(16)
    trained = trainer(tmp_path, llama_rm(), rows, peft_config=lora(), gradient_checkpointing=True)
    before = {n: p.clone() for n, p in trained.model.named_parameters()}
    trained.train()
    moved = {n for n, p in trained.model.named_parameters() if not torch.equal(p, before[n])}
    assert all("lora_" in n or "modules_to_save" in n for n in moved)
    assert any("lora_B" in n for n in moved) and any("score" in n for n in moved)
    trained.save_model()
    loaded = PeftModel.from_pretrained(llama_rm(), tmp_path).eval()
    inputs = prompts(5)
    arguments = {"k": 3, "max_new_tokens": 3, "return_dict_in_generate": True}
    rewards = [
        rgtg_fast.generate(llama_lm(), **inputs, reward_model=rm, **arguments).rewards
        for rm in (trained.model.eval(), loaded)
    ]
    torch.testing.assert_close(*rewards)


def test_a_vocabulary_head_with_an_adapter_trains_and_scores(tmp_path):
    model = gpt2_lm()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head", "c_attn"])
    trained = trainer(
        tmp_path, model, text_pairs(16), peft_config=config, loss_type="farma", max_steps=4
    )
    trained.train()
    history = [h for h in trained.state.log_history if "loss" in h]
    assert "bt_loss" in history[0] and "consistency_loss" in history[1]
    with_adapter = VocabRewardScorer(trained.model.eval())
    merged = VocabRewardScorer(trained.model.merge_and_unload())
    ids = torch.tensor([[5, 9, 40]])
    with_adapter.prefill(**prompts(4))
    rewards = with_adapter.score(ids)
    merged.prefill(**prompts(4))
    torch.testing.assert_close(rewards, merged.score(ids), rtol=1e-4, atol=1e-4)


def test_virtual_tokens_are_refused(tmp_path):
    model = get_peft_model(gpt2_rm(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="virtual tokens"):
        trainer(tmp_path, model, id_pairs(4))


def test_bf16_trains_fp32_weights_under_autocast(tmp_path):
    rows = id_pairs(6)
    trained = trainer(tmp_path, gpt2_rm(initializer_range=0.1), rows, bf16=True, max_steps=1)
    trained.train()
    seen = []
    layer = trained.model.transformer.h[0].mlp.c_fc
    layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    loss, gradients = step(trained, rows)
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients.values())
    plain = trainer(tmp_path, trained.model, rows)
    torch.testing.assert_close(loss, step(plain, rows)[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("adapter", [False, True])
def test_rewards_are_fp32_numbers_under_autocast(tmp_path, adapter):
    trained = trainer(
        tmp_path,
        llama_rm(initializer_range=0.1),
        id_pairs(6),
        peft_config=lora() if adapter else None,
        bf16=True,
    )
    rewards = trained.score(trained.model, trained.data_collator(id_pairs(6)), None).rewards
    assert rewards.dtype == torch.float32
    assert (rewards != rewards.bfloat16()).float().mean() > 0.9


def test_bf16_weights_train_too(tmp_path):
    rows, losses = id_pairs(6), {}
    for dtype in (torch.bfloat16, torch.float32):
        model = gpt2_rm(initializer_range=0.1).to(dtype)
        trained = trainer(tmp_path, model, rows, bf16=dtype == torch.bfloat16, max_steps=8)
        trained.train()
        losses[dtype] = [h["loss"] for h in trained.state.log_history if "loss" in h]
    assert losses[torch.float32][-1] < 0.8 * losses[torch.float32][0]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], abs=0.05)


def test_dropout_is_off_unless_asked_for(tmp_path):
    rows = id_pairs(4)
    model = gpt2_rm(initializer_range=0.1, resid_pdrop=0.5)
    noisy = trainer(tmp_path, model, rows, disable_dropout=False)
    assert step(noisy, rows)[0] != step(noisy, rows)[0]
    quiet = trainer(tmp_path, model, rows)
    assert step(quiet, rows)[0] == step(quiet, rows)[0]


def test_dropout_that_is_no_module_is_off_and_that_of_adapters_is_kept(tmp_path):
    shape = {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 1}
    opt = OPTForSequenceClassification(
        OPTConfig(vocab_size=320, num_attention_heads=2, num_labels=1, dropout=0.5, **shape)
    )
    rows = id_pairs(4)
    quiet = trainer(tmp_path, opt, rows)
    assert step(quiet, rows)[0] == step(quiet, rows)[0]
    adapter = lora(lora_dropout=0.5, init_lora_weights=False)
    noisy = trainer(tmp_path, llama_rm(), rows, peft_config=adapter)
    assert step(noisy, rows)[0] != step(noisy, rows)[0]


def test_the_saved_config_keeps_the_cache_that_the_model_came_with(tmp_path):
    trained = trainer(tmp_path, loss_type="genarm", max_steps=1)
    trained.train()
    trained.save_model()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.use_cache


def test_batches_can_be_of_like_length_in_the_order_of_the_epoch(tmp_path):
    rows = id_pairs(32, longest=20)
    trained = trainer(
        tmp_path,
        train=rows,
        evaluate=id_pairs(5, seed=4),
        train_sampling_strategy="group_by_length",
        max_steps=2,
    )
    trained.train()
    assert "eval_accuracy" in trained.evaluate()
    sampler = trained._get_train_sampler()
    lengths = trained.train_dataset.lengths()
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == list(range(32))

    def spread(order):
        batches = [[lengths[i] for i in order[at : at + 4]] for at in range(0, 32, 4)]
        return sum(max(batch) - min(batch) for batch in batches)

    assert spread(orders[0]) < 0.8 * spread(range(32))
