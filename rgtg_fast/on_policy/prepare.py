"""One run of on-policy rounds: what is known before anything is sampled or trained."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..evaluation import models
from ..evaluation.prompts import Prompt, load_prompts
from ..evaluation.store import write_whole
from ..scorers import registry
from ..scorers.factory import same_vocabulary
from ..training.config import PrefixRewardConfig
from ..training.data import TokenRows
from ..training.objectives import OBJECTIVES
from ..training.run import load_model
from ..training.settings import Settings, check_settings
from ..training.trainer import make_dataset
from ..training.trainer_options import check_trainer_options
from .judges import make_judge
from .samples import sampled
from .settings import OnPolicy, check_on_policy, judge_identity

STATE = "on_policy.json"


@dataclass
class Rounds:
    """One run: its settings, and what is read before any model is loaded."""

    settings: Settings
    args: PrefixRewardConfig
    own: OnPolicy
    folder: Path
    tokenizer: Any
    prompts: list[Prompt]
    original: TokenRows | None
    held_out: TokenRows | None

    @property
    def kind(self) -> str:
        """What the trained models guide as, the name of a kind of the registry."""
        (kind, *_) = registry.kinds_trained_by(self.args.loss_type, self.settings.frozen)
        return next(name for name, other in registry.KINDS.items() if other is kind)

    @property
    def labelled(self) -> bool:
        return OBJECTIVES[self.args.loss_type].data == "labelled"

    def round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number}"


def prepare(values: dict[str, Any]) -> Rounds:
    """Everything that can be wrong before models are loaded."""
    own = check_on_policy(values.pop("on_policy", None))
    for key in ("resume", "overwrite"):
        if values.get(key):
            raise ValueError(
                f"{key} has no part in on-policy rounds, which go on by themselves; drop it, and "
                "to begin anew name another output_dir"
            )
    has_pairs = bool(values.get("train"))
    settings = check_settings(values if has_pairs else {**values, "train": "on_policy"})
    args = PrefixRewardConfig(**settings.args)
    check_trainer_options(args, OBJECTIVES[args.loss_type].data)
    if args.world_size > 1:
        raise ValueError(
            f"on-policy rounds run in one process, and {args.world_size} were started; start it "
            "without torchrun and accelerate"
        )
    if OBJECTIVES[args.loss_type].policy:
        raise ValueError(
            f"loss_type={args.loss_type!r} trains a language model that needs no guide, and "
            "on-policy rounds train a guide; train one, and then on the own_pairs.jsonl of a round"
        )
    if own.by_hand and OBJECTIVES[args.loss_type].data == "labelled":
        raise ValueError(
            f"judge=hand gives pairs, and loss_type={args.loss_type!r} wants labels in [0, 1]; "
            "pass another judge, or another loss_type"
        )
    tokenizer = models.load_tokenizer(own.lm)
    trained = models.load_tokenizer(settings.tokenizer or settings.model)
    if not same_vocabulary(tokenizer, trained):
        raise ValueError(
            f"on_policy: lm={own.lm!r} and model={settings.model!r} have different vocabularies, "
            "and the rounds train on the very tokens that were drawn; pass models that share theirs"
        )
    prompts = load_prompts(own.prompts, tokenizer)
    original = make_dataset(settings.train, args, trained, "train") if has_pairs else None
    held_out = None
    if settings.hold_out and original is None:
        raise ValueError("hold_out is taken from the pairs of train, and there is none; set eval")
    if original is not None and settings.hold_out:
        held_out = original.take_out(settings.hold_out, args.seed)
    return Rounds(
        settings, args, own, Path(str(args.output_dir)), tokenizer, prompts, original, held_out
    )


def take_folder(rounds: Rounds) -> None:
    """Takes the folder, or finds that it is this run's. The models are tried on one prompt first: a
    guide, a judge or an option that fails would do so after the first training otherwise."""
    path, key = rounds.folder / STATE, _key(rounds)
    if path.exists():
        try:
            before = json.loads(path.read_bytes())["key"]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path} is of no run; name another output_dir") from None
        changed = [name for name in {**before, **key} if before.get(name) != key.get(name)]
        if changed:
            raise ValueError(
                f"output_dir={str(rounds.folder)!r} has the rounds of a run with another "
                f"{', '.join(changed)}; give what it was to go on, or name another output_dir"
            )
        return
    # A kill may have left the second one.
    found = {p.name for p in rounds.folder.iterdir()} - {".lock", f"{STATE}.part"}
    if found:
        raise ValueError(
            f"output_dir={str(rounds.folder)!r} holds other files "
            f"({', '.join(sorted(found)[:4])}); name an empty folder, or one that is not there"
        )
    _rehearse(rounds)
    write_whole(path, json.dumps({"key": key}, indent=1).encode() + b"\n")


def _key(rounds: Rounds) -> dict[str, Any]:
    """What the models depend on, by the names of the config's keys, as JSON has it. More rounds may
    follow."""
    s, own = rounds.settings, rounds.own
    key: dict[str, Any] = {
        **{k: v for k, v in asdict(s).items() if k not in ("args", "resume", "overwrite")},
        **{k: v for k, v in s.args.items() if k != "output_dir"},
        **{f"on_policy: {k}": v for k, v in vars(own).items() if k not in ("rounds", "options")},
        **{f"on_policy: {k}": v for k, v in own.options.items()},
        "model": models.identity(s.model),
        "on_policy: lm": models.identity(own.lm),
        "on_policy: judge": judge_identity(own.judge),
        "on_policy: reward_model": own.reward_model and models.identity(own.reward_model),
        "on_policy: prompts": models.digest([prompt.ids for prompt in rounds.prompts]),
        "train": rounds.original and models.digest(rounds.original.rows),
    }
    return json.loads(json.dumps(key, default=str))


def _device(rounds: Rounds) -> str:
    return str(rounds.args.device)


def load_lm(rounds: Rounds) -> Any:
    """The language model, without its folder's sampling defaults: the rounds say how to sample."""
    lm = models.load_model("CausalLM", rounds.own.lm, rounds.settings.dtype, _device(rounds))
    eos = lm.generation_config.eos_token_id
    lm.generation_config = transformers.GenerationConfig(
        eos_token_id=rounds.tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=rounds.tokenizer.pad_token_id,
    )
    return lm


def load_guide(rounds: Rounds, folder: str, lm: Any) -> Any:
    dtype, device = rounds.settings.dtype, _device(rounds)
    return registry.load_guide(
        rounds.kind, folder, lambda holds, name: models.load_model(holds, name, dtype, device), lm
    )


def sampling_options(rounds: Rounds) -> dict[str, Any]:
    return {"top_k": 0} | rounds.own.options


def _rehearse(rounds: Rounds) -> None:
    """An answer to the longest prompt, by the guide or what it will be trained from, and its
    score."""
    lm, longest = load_lm(rounds), max(rounds.prompts, key=lambda prompt: len(prompt.ids))
    first = first_guide(rounds)
    if first is not None:
        guide = load_guide(rounds, first, lm)
    else:
        transformers.set_seed(rounds.args.seed)
        begin = load_model(rounds.settings, rounds.args).to(_device(rounds)).eval()
        kind = registry.KINDS[rounds.kind]
        weight = torch.zeros(lm.config.get_text_config().hidden_size, device=_device(rounds))
        guide = kind.make(lm, weight) if kind.holds == "head" else kind.make(begin)
    answers = sampled(
        lm,
        rounds.tokenizer,
        guide,
        [longest],
        0,
        1,
        sampling_options(rounds),
        registry.KINDS[rounds.kind].per_token,
    )
    for rows in answers:
        if not rounds.own.by_hand:
            load_judge(rounds).score([longest], rows)
    del lm, guide, answers
    release()


def load_judge(rounds: Rounds) -> Any:
    own, dtype = rounds.own, rounds.settings.dtype
    return make_judge(own.judge, rounds.tokenizer, own.batch_size, dtype, _device(rounds))


def first_guide(rounds: Rounds) -> str | None:
    """The folder of what guides round 1 where that is not trained in round 0."""
    if rounds.own.reward_model is not None:
        return rounds.own.reward_model
    return None if rounds.original is not None else rounds.settings.model


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
