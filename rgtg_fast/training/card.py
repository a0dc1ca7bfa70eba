"""The model card of a trained reward model."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..scorers.registry import kinds_trained_by
from .config import PrefixRewardConfig
from .objectives import OBJECTIVES
from .settings import Settings

WHAT = {
    "prefix": "Bradley-Terry at every prefix of the answers (arXiv 2406.07780)",
    "full": "Bradley-Terry on whole answers; its rewards of prefixes are untrained",
    "farma": "FaRMA's vocabulary head (arXiv 2502.04517): output row v is the reward of token v",
    "genarm": "GenARM's autoregressive reward model (arXiv 2410.08193)",
    "genarm_prefix": "An autoregressive reward model: GenARM's reward (arXiv 2410.08193) under "
    "Bradley-Terry at every prefix of the answers (arXiv 2406.07780), a combination of which no "
    "publication is known",
    "seq2seq": "a rewriter of drafts into chosen answers (arXiv 2409.00162), trained by likelihood",
    "copg": "a language model trained by Contrastive Policy Gradient (arXiv 2406.19185) on the "
    "scores of answers: it needs no guide",
    "distill": "a language model trained towards a guided policy, whose KL from it is the loss: it "
    "needs no guide",
    "sequencematch": "a language model that can undo its last token, trained on answers with slips "
    "in the way of SequenceMatch (arXiv 2306.05426)",
    "soft_q": "Soft Q-learning of rewards of whole texts (as arXiv 2106.07704, with the language "
    "model as the measure): output row v is the soft value of going on with token v",
    "rad": "RAD's cumulative squared error to labels in [0, 1] (arXiv 2310.09520)",
}


def write_card(
    path: Path,
    metrics: dict[str, Any],
    settings: Settings,
    args: PrefixRewardConfig,
    model_config: Any,
    plotted: bool,
    note: str,
    lm: str,
) -> None:
    """Writes the card: what it is (with `note` behind it), how to use it (to guide the language
    model `lm`), how well it does, how it was made."""
    policy = OBJECTIVES[args.loss_type].policy
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {json.dumps(settings.model)}",
        f"tags: [{'text-generation' if policy else 'reward-model, reward-guided-text-generation'}]",
        "---",
        f"# {'Language' if policy else 'Reward'} model: {args.loss_type}"
        + (" (head only)" if settings.frozen else ""),
        "",
        f"{WHAT[args.loss_type]}. Trained from `{settings.model}`.",
        "",
        *([note, ""] if note else []),
        *(_policy_usage(settings, args) if policy else _usage(settings, args, model_config, lm)),
        *_accuracy(metrics, plotted),
        "## Training",
        "",
        *(
            f"- {name}: {data['kept']} of {data['rows']} rows{_counts(data)}"
            for name, data in metrics["data"].items()
        ),
        f"- loss {metrics['train_loss']:.4f}"
        + (f" after {metrics['steps']} steps" if "steps" in metrics else ""),
        "",
        "```yaml",
        *(
            f"{f.name}: {json.dumps(value)}"
            for f in fields(settings)
            if f.name not in ("args", "resume", "overwrite")
            and (value := getattr(settings, f.name)) != f.default
        ),
        *(f"{key}: {json.dumps(value)}" for key, value in sorted(settings.args.items())),
        "```",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _usage(settings: Settings, args: PrefixRewardConfig, model_config: Any, lm: str) -> list[str]:
    out = str(args.output_dir)
    head = "SequenceClassification" if OBJECTIVES[args.loss_type].head == "scalar" else "CausalLM"
    guide, *others = (k.usage for k in kinds_trained_by(args.loss_type, settings.frozen))
    if OBJECTIVES[args.loss_type].rewrites and settings.lora is not None:
        # An adapter is saved without the configuration, which would say so.
        guide = guide.replace("(rm)", f"(rm, separator={model_config.draft_separator_id})")
    imports: dict[str, set[str]] = {"transformers": {"AutoModelForCausalLM", "AutoTokenizer"}}
    if settings.frozen:
        imports["safetensors.torch"] = {"load_file"}
        load = [f'weight = load_file({json.dumps(f"{out}/reward_head.safetensors")})["weight"]']
    else:
        package, auto = "transformers", f"AutoModelFor{head}"
        if settings.lora is not None:
            package, auto = "peft", f"AutoPeftModelFor{head}"
        imports.setdefault(package, set()).add(auto)
        labels = ", num_labels=1" if package == "peft" and guide == "rm" else ""
        load = [f"rm = {auto}.from_pretrained({json.dumps(out)}{labels})"]
    pad, eos = (getattr(model_config, name, None) for name in ("pad_token_id", "eos_token_id"))
    extra = ""
    note: list[str] = []
    if pad is not None and pad == eos and args.eos == "append" and guide == "rm":
        extra = ', eos_reward="hidden"'
        note = [
            "The padding token is EOS and the model was trained to judge EOS: say "
            '`eos_reward="hidden"`; the public forward would score the prefix without it.',
            "",
        ]
    return [
        f"It guides {_guides(settings, lm)}, or another with the same tokenizer:",
        "",
        "```python",
        "import rgtg_fast",
        *(
            f"from {package} import {', '.join(sorted(names))}"
            for package, names in sorted(imports.items())
        ),
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(out)})",
        f"lm = AutoModelForCausalLM.from_pretrained({json.dumps(lm)})",
        *load,
        'ids = tokenizer("A prompt like those trained on.", return_tensors="pt").input_ids',
        "out = rgtg_fast.generate(",
        f"    lm, ids, reward_model={guide}, k=10, max_new_tokens=32{extra}",
        ")",
        "print(tokenizer.decode(out[0]))",
        "```",
        "",
        *(line for other in others for line in (f"It can guide as `{other}` too.", "")),
        *note,
    ]


def _policy_usage(settings: Settings, args: PrefixRewardConfig) -> list[str]:
    out = json.dumps(str(args.output_dir))
    auto, imports = (
        "AutoModelForCausalLM",
        ["transformers import AutoModelForCausalLM, AutoTokenizer"],
    )
    if settings.lora is not None:
        auto = "AutoPeftModelForCausalLM"
        imports = [f"peft import {auto}", "transformers import AutoTokenizer"]
    decoding = [
        'ids = tokenizer("A prompt like those trained on.", return_tensors="pt").input_ids',
        "out = lm.generate(input_ids=ids, do_sample=True, top_k=0, max_new_tokens=32)",
        "print(tokenizer.decode(out[0]))",
    ]
    undoes, load = OBJECTIVES[args.loss_type].data == "answers", f"{auto}.from_pretrained({out})"
    if undoes and settings.lora is not None:
        load += ".merge_and_unload()"  # rows of their own length need the model itself
    if undoes:
        decoding = [
            'prompts = ["A prompt like those trained on."]',
            f"back = tokenizer.convert_tokens_to_ids({json.dumps(args.backspace)})",
            "for answer in rgtg_fast.backtracking(",
            "    lm, prompts, backspace_token_id=back, tokenizer=tokenizer, k=None, "
            "max_new_tokens=32",
            "):",
            "    print(answer.text, answer.undone)",
        ]
    return [
        "```python",
        *(["import rgtg_fast"] if undoes else []),
        *(f"from {line}" for line in imports),
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({out})",
        f"lm = {load}",
        *decoding,
        "```",
        "",
    ]


def _guides(settings: Settings, lm: str) -> str:
    return "the model that it was trained from" if lm == settings.model else f"`{lm}`"


def _accuracy(metrics: dict[str, Any], plotted: bool) -> list[str]:
    report = metrics.get("eval")
    if report is None:
        if "eval_loss" in metrics:
            return [f"Loss on held-out answers: {metrics['eval_loss']:.4f}.", ""]
        return ["No eval set was given.", ""]
    if not plotted:
        rows = [f"| {key} % | {value:.4f} |" for key, value in report["deciles"].items()]
        return ["| prefix | squared error |", "| --- | --- |", *rows, ""]
    rows = [
        f"| {key} % | {_share(value)} | {value['pairs']} |"
        for key, value in report["deciles"].items()
    ]
    return [
        f"Accuracy on held-out pairs: {_share(report['full'])} on whole answers, "
        f"{_share(report['mean'])} over all prefixes. Prefixes in % of the longer answer:",
        "",
        "| prefix | accuracy | pairs |",
        "| --- | --- | --- |",
        *rows,
        "",
        "![accuracy by prefix length](accuracy_by_prefix.png)",
        "",
    ]


def _share(value: dict[str, float]) -> str:
    spread = "" if math.isnan(value["ci95"]) else f" ± {value['ci95']:.3f}"
    return f"{value['accuracy']:.3f}{spread}"


def _counts(data: dict[str, Any]) -> str:
    said = {k: v for k, v in data.items() if v and k not in ("rows", "kept", "invalid")}
    return "".join(f", {key.replace('_', ' ')} {value}" for key, value in said.items())
