"""The file of `python -m rgtg_fast eval --config`: read, checked key by key, grids spelt out."""

from __future__ import annotations

import dataclasses
import filecmp
import importlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..scorers.factory import EOS_REWARDS, METHODS
from ..scorers.registry import HEAD_FILE, KINDS
from ..training.config_file import check_keys, read_yaml, typed

GRID = ("reward_model", "k", "beta", "temperature", "best_of", "top_k", "top_p")
CONFIGS = ("config.json", "adapter_config.json")
MOST_SEEDS = 10_000
_GUIDED = ("k", "beta", "kind", "options", "eos_reward", "reward_method")
_UNGUIDED = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Run:
    """One way to decode. Without `reward_model` the base policy answers, else it is guided.

    Args:
        name: in the report and in file names; a grid's runs get their values behind it.
        reward_model: folder or hub name of the guide.
        kind: what the guide is, one of `rgtg_fast.scorers.KINDS`: a `classifier` with one label,
            FaRMA's `vocab` head, GenARM's `autoregressive` model, a `head` fitted on the base's
            hidden states, a classifier's `attention_credit`; help(rgtg_fast.scorers) has them all.
        options: of the kind, such as `{share: 0.3}` of `attention_credit`; see its scorer.
        k, beta, eos_reward, reward_method: as in `rgtg_fast.generate`; guided runs only.
        temperature: of the guided policy, or of the base.
        do_sample: false takes the likeliest token of either; one seed is then enough.
        top_k, top_p, min_p: cut the base's distribution, 0, 1 and 0 do not; unguided runs only.
        best_of: so many sampled answers, of which the classifier `select_by` takes the best.
    """

    name: str
    reward_model: str | None = None
    kind: str = "classifier"
    options: dict = dataclasses.field(default_factory=dict)
    k: int = 10
    beta: float = 1.0
    temperature: float = 1.0
    do_sample: bool = True
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    best_of: int = 1
    select_by: str | None = None
    eos_reward: str = "auto"
    reward_method: str = "auto"


@dataclass(frozen=True)
class WinJudge:
    """Who prefers one of two answers: `function` (`module:name`), or an OpenAI-compatible endpoint.

    Verdicts are kept, each as it comes. A function is asked again once its own file has changed.

    Args:
        function: called with (prompt, a, b); gives the preference for a, 0 to 1.
        url: of the endpoint, with its version (`http://host:8000/v1`).
        model: as the endpoint calls it.
        template: a text with {prompt}, {a} and {b} (None: `wins.TEMPLATE`). The reply must name A,
            B, or C for a tie.
        key_env: the environment variable that holds the API key, which is written nowhere.
        timeout: seconds for a whole reply, from the first try to connect to its last byte.
        retries: how often to try in all, with growing pauses, where the endpoint is busy or away.
        workers: pairs asked about at a time.
        max_tokens: of the reply; a judge that reasons first needs hundreds.
    """

    function: str | None = None
    url: str | None = None
    model: str | None = None
    template: str | None = None
    key_env: str | None = None
    timeout: float = 60.0
    retries: int = 6
    workers: int = 4
    max_tokens: int = 16


@dataclass(frozen=True)
class Settings:
    """What an evaluation does.

    Args:
        model: the base policy, folder or hub name. Sampling defaults in its folder are dropped.
        prompts: JSONL file, `{"prompt": text or messages}` a line.
        judge: a one-label classifier that is not the guide, folder or hub name, or a function
            `module:name` called with (prompt, answer, finished) for a number. Functions are called
            anew each time, classifiers' rewards are kept.
        output_dir: folder of the report, the figures, the texts, and rows/ to go on from.
        runs: ways to decode; lists of values make a run of each.
        baseline: name of the run that the others are compared with (default: the first).
        seeds: how many (0, 1, ..), or which.
        tokenizer: of the base, where its folder has none.
        max_new_tokens: per answer, the EOS token included.
        batch_size: answers generated or judged at a time; at least the `best_of` of one prompt.
        limit: takes the first so many prompts.
        dtype: of all models: float32, bfloat16 or float16.
        device: auto (a GPU where there is one), cpu or cuda.
        allow_same_judge: lets a guide or selector judge itself; the report then says so.
        win_judge: `module:function`, or a mapping, see `WinJudge`.
        resamples, confidence: of the bootstrap intervals.
        plots: whether to draw.
    """

    model: str
    prompts: str
    judge: str
    output_dir: str
    runs: tuple[Run, ...]
    baseline: str = ""
    seeds: tuple[int, ...] = (0,)
    tokenizer: str | None = None
    max_new_tokens: int = 64
    batch_size: int = 16
    limit: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    allow_same_judge: bool = False
    win_judge: WinJudge | None = None
    resamples: int = 2000
    confidence: float = 0.95
    plots: bool = True


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
RUN_FIELDS = {f.name: f for f in dataclasses.fields(Run)}
WIN_FIELDS = {f.name: f for f in dataclasses.fields(WinJudge)}


def read_settings(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Settings:
    """Settings from a YAML file and `key=value` overrides; paths are as seen from where one runs.

    Raises `ValueError` for what `check_settings` refuses, and for a file that cannot be read.
    """
    return check_settings(read_yaml(path, overrides))


def check_settings(values: dict[str, Any]) -> Settings:
    """Settings from a mapping.

    Raises `ValueError` for unknown keys (naming the nearest known one), missing keys, values of the
    wrong kind or out of range, options that a run cannot use, models that are not there, and a
    judge that is also a guide.
    """
    check_keys(values, FIELDS)
    missing = [k for k in ("model", "prompts", "judge", "output_dir", "runs") if not values.get(k)]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}; set {missing[0]}: ...")
    plain = {
        key: typed(key, value, FIELDS[key])
        for key, value in values.items()
        if key not in ("runs", "seeds", "win_judge")
    }
    runs = _runs(values["runs"])
    settings = Settings(
        **plain
        | {
            "runs": runs,
            "baseline": plain.get("baseline") or runs[0].name,
            "seeds": _seeds(values.get("seeds", 1)),
            "win_judge": _win_judge(values.get("win_judge")),
        }
    )
    _check_numbers(settings)
    names = [run.name for run in settings.runs]
    if settings.baseline not in names:
        raise ValueError(f"baseline={settings.baseline!r} is no run; pass one of {names}")
    check_model("model", settings.model)
    if not is_function(settings.judge):
        check_model("judge", settings.judge)
    for run in settings.runs:
        for key in ("reward_model", "select_by"):
            if getattr(run, key) is not None:
                check_model(f"run {run.name}: {key}", getattr(run, key))
    _check_judge(settings)
    return settings


def _check_numbers(settings: Settings) -> None:
    for name in ("max_new_tokens", "batch_size", "limit"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; pass at least 1")
    if settings.resamples < 100:
        raise ValueError(f"resamples={settings.resamples}; pass at least 100")
    if not 0.5 <= settings.confidence < 1:
        raise ValueError(f"confidence={settings.confidence}; pass 0.5 <= value < 1")
    if settings.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={settings.dtype!r}; write float32, bfloat16 or float16")


def _seeds(value: Any) -> tuple[int, ...]:
    if type(value) is int and value > MOST_SEEDS:  # their list would fill the memory
        raise ValueError(f"seeds={value} is how many; pass at most {MOST_SEEDS}, or a list of ints")
    seeds = list(range(value)) if type(value) is int else value
    if not isinstance(seeds, list) or not seeds or any(type(s) is not int for s in seeds):
        raise ValueError(f"seeds={value!r}; write how many, or a list of ints such as [0, 1, 2]")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**63:
        raise ValueError(f"seeds={value!r}; the seeds must differ and be 0 to 2**63 - 1")
    return tuple(seeds)


def _runs(value: Any) -> tuple[Run, ...]:
    if not isinstance(value, list) or not all(isinstance(run, dict) for run in value):
        raise ValueError("runs must be a list of mappings, such as `- {name: base}`")
    runs = [run for entry in value for run in _grid(entry)]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"runs have the same name {', '.join(twice)}; give each its own")
    return tuple(runs)


def _grid(entry: dict[str, Any]) -> list[Run]:
    """The runs of an entry, one for each combination of its lists of values."""
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+=,@-]+", name):
        raise ValueError(f"run name {name!r}; write letters, digits and . + = , @ _ - only")
    check_keys(entry, RUN_FIELDS, f"run {name}: ")
    lists = {key: value for key, value in entry.items() if isinstance(value, list)}
    for key, options in lists.items():
        if key not in GRID or not options:
            raise ValueError(f"run {name}: {key}: {options!r}; lists go with {', '.join(GRID)}")
    runs = []
    for chosen in itertools.product(*lists.values()):
        point = dict(zip(lists, chosen, strict=True))
        shown = {key: os.path.basename(str(value).rstrip("/")) for key, value in point.items()}
        parts = [f"{key}={value}" for key, value in shown.items()]
        values = entry | point | {"name": " ".join([name, *parts])}
        where = f"run {values['name']}: "
        runs.append(Run(**{k: typed(where + k, v, RUN_FIELDS[k]) for k, v in values.items()}))
        _check_run(runs[-1], set(values))
    return runs


def _check_run(run: Run, given: set[str]) -> None:
    where = f"run {run.name}: "
    useless = given & set(_UNGUIDED if run.reward_model else _GUIDED)
    if useless:
        word, way = (
            ("a guided", "drop it") if run.reward_model else ("an unguided", "set reward_model")
        )
        raise ValueError(f"{where}{sorted(useless)[0]} does nothing in {word} run; {way}")
    tempered = given & {"temperature", *_UNGUIDED}
    if not run.do_sample and tempered:
        raise ValueError(f"{where}{sorted(tempered)[0]} does nothing in a greedy run; drop it")
    for key, allowed in (
        ("kind", KINDS),
        ("eos_reward", EOS_REWARDS),
        ("reward_method", METHODS),
    ):
        if getattr(run, key) not in allowed:
            raise ValueError(
                f"{where}{key}={getattr(run, key)!r}; pass one of {', '.join(allowed)}"
            )
    kind, ignored = KINDS[run.kind], sorted(given & {"eos_reward", "reward_method"})
    if ignored and kind.holds != "head" and not kind.is_model:
        raise ValueError(f"{where}{ignored[0]} does nothing with kind: {run.kind}; drop it")
    try:
        kind.check_options(run.options)
    except ValueError as error:
        raise ValueError(f"{where}options: {error}") from None
    for key, right, wanted in (
        ("k", 1 <= run.k <= 64, "1 to 64"),
        ("beta", abs(run.beta) < float("inf"), "a finite number"),
        ("temperature", 0 < run.temperature < float("inf"), "a number > 0"),
        ("top_k", run.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 < run.top_p <= 1, "a number in (0, 1]"),
        ("min_p", 0 <= run.min_p < 1, "a number in [0, 1)"),
        ("best_of", run.best_of >= 1, "1 or more"),
    ):
        if not right:
            raise ValueError(f"{where}{key}={getattr(run, key)!r}; pass {wanted}")
    if run.best_of > 1 and (run.select_by is None or not run.do_sample):
        raise ValueError(f"{where}best_of needs select_by (a classifier) and do_sample: true")
    if run.select_by is not None and run.best_of == 1:
        raise ValueError(f"{where}select_by without best_of; set best_of to 2 or more")


def _win_judge(value: Any) -> WinJudge | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = {"function": value}
    if not isinstance(value, dict):
        raise ValueError(f"win_judge={value!r}; write module:function, or {{url: .., model: ..}}")
    check_keys(value, WIN_FIELDS, "win_judge: ")
    judge = WinJudge(**{k: typed(f"win_judge: {k}", v, WIN_FIELDS[k]) for k, v in value.items()})
    if (judge.function is None) == (judge.url is None):
        raise ValueError("win_judge needs either function (module:name) or url and model")
    if judge.function is not None:
        load_function("win_judge", judge.function)
    else:
        if not judge.model or not str(judge.url).startswith(("http://", "https://")):
            raise ValueError("win_judge needs model and a url that begins with http:// or https://")
        if {"@", "?"} & set(str(judge.url)):  # it is written to the results
            raise ValueError("win_judge: url must not hold a user, key or query; set key_env")
        for part in ("{prompt}", "{a}", "{b}"):
            if judge.template is not None and part not in judge.template:
                raise ValueError(f"win_judge: template lacks {part}")
        if judge.key_env is not None and not os.environ.get(judge.key_env):
            raise ValueError(f"win_judge: the environment has no {judge.key_env}; export it")
    if judge.retries < 1 or judge.workers < 1 or judge.timeout <= 0 or judge.max_tokens < 1:
        raise ValueError("win_judge: retries, workers, timeout and max_tokens must be positive")
    return judge


def is_function(name: str) -> bool:
    """Whether `name` is `module:function` rather than a folder or a name on the hub."""
    return not Path(name).exists() and bool(re.fullmatch(r"[\w.]+:[\w.]+", name))


def load_function(key: str, name: str) -> Callable[..., Any]:
    """The function `module:name`; raises `ValueError` where there is none."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ValueError(f"{key}={name!r}; write module:function")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}={name!r} cannot be imported: {error}; check PYTHONPATH") from None
    if not callable(found):
        raise ValueError(f"{key}={name!r} is {type(found).__name__}; it must be callable")
    return found


def check_model(key: str, name: str) -> None:
    """Raises `ValueError` for a folder without a model in it, or a path that is not there."""
    path = Path(name)
    if path.is_dir():
        files = (*CONFIGS, HEAD_FILE)
        if not any((path / file).is_file() for file in files):
            raise ValueError(f"{key}={name!r} holds no config.json; pass a model's folder")
    elif path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name[0] in "./":
        raise ValueError(f"{key}: no model at {name!r}; pass a folder or a name on the hub")


def _same(a: str, b: str) -> bool:
    """Whether two names mean one model: the same name or folder, or a copy of its weights."""
    if a == b or os.path.realpath(a) == os.path.realpath(b):
        return True
    one, other = (sorted(Path(folder).glob("*.safetensors")) for folder in (a, b))
    if not one or [f.name for f in one] != [f.name for f in other]:
        return False
    return all(filecmp.cmp(*pair, shallow=False) for pair in zip(one, other, strict=True))


def judged_by_guide(settings: Settings, run: Run) -> str | None:
    """The key under which the judge is also the run's guide or selector; None where it is not."""
    for key in ("reward_model", "select_by"):
        name = getattr(run, key)
        if name is not None and _same(name, settings.judge):
            return key
    return None


def _check_judge(settings: Settings) -> None:
    for run in settings.runs:
        key = judged_by_guide(settings, run)
        if key is None:
            continue
        said = (
            f"judge={settings.judge!r} is also the {key} of run {run.name}: it would rate its own "
            "choices"
        )
        if not settings.allow_same_judge:
            raise ValueError(
                f"{said}; pass another judge, or allow_same_judge: true to see the proxy reward"
            )
        warnings.warn(f"{said}; its rewards are proxy rewards", UserWarning, stacklevel=3)
        return
