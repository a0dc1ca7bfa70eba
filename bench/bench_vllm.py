"""CPU seconds of vLLM, plain and guided, over the same tokens: `python bench/bench_vllm.py`.

Needs vLLM: `make test-vllm` makes an environment for it, .venv-vllm. Models of GPT-2's size (124M)
with random weights in float32, prompts of 64 tokens, 32 new ones, k = 10, greedy, the end of an
answer ignored. CPU time of the process on one thread, the best of the runs, which alternate.
"""

import argparse
import os
import tempfile
import time

import torch
import transformers

SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
SHAPE |= {"num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 256}
SHAPE |= {"vocab_size": 50304, "tie_word_embeddings": True}
PROMPT, NEW = 64, 32


def folders(root, layers):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": layers}, num_labels=1)
    found = {}
    for name, kind in (("lm", "ForCausalLM"), ("rm", "ForSequenceClassification")):
        found[name] = f"{root}/{name}"
        getattr(transformers, f"Llama{kind}")(config).save_pretrained(found[name])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        made = folders(root, args.layers)
        llm = LLM(
            made["lm"],
            dtype="float32",
            max_model_len=PROMPT + NEW,
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            logits_processors=["rgtg_fast.vllm:RewardGuided"],
            additional_config={"rgtg": {"reward_model": made["rm"], "k": 10, "guide": False}},
        )
        for batch in args.batch:
            best = {}
            for _ in range(args.repeat):
                for guided in (False, True):
                    # Other texts each time: nothing is found read.
                    ids = torch.randint(3, 50000, (batch, PROMPT)).tolist()
                    own = SamplingParams(
                        temperature=0.0,
                        max_tokens=NEW,
                        ignore_eos=True,
                        detokenize=False,
                        extra_args={"rgtg": guided},
                    )
                    prompts = [{"prompt_token_ids": row} for row in ids]
                    begin = time.process_time()
                    llm.generate(prompts, own, use_tqdm=False)
                    took = time.process_time() - begin
                    best[guided] = min(took, best.get(guided, took))
            ratio = best[True] / best[False]
            print(
                f"B={batch}: plain {best[False]:.2f} s, guided {best[True]:.2f} s, {ratio:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
