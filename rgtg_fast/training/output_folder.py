"""The folder that a training run writes to: one run, one process, and nothing foreign removed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer import TRAINER_STATE_NAME

FIGURES = "metrics.json"  # written last: a folder that has it holds a finished run
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# The files that save_model and save_pretrained of transformers and peft write, in the folder and in
# its checkpoints. Only these are removed: any other file may be the user's.
_MODEL = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(config|generation_config|adapter_config|tokenizer|tokenizer_config)\.json"
    r"|(special_tokens_map|added_tokens|vocab)\.json|training_args\.bin|merges\.txt|vocab\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|README\.md"
)
_OWN = re.compile(r"metrics\.json|reward_head\.safetensors|accuracy_by_prefix\.png")
_STATE = re.compile(
    r"trainer_state\.json|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth"
    r"|latest|zero_to_fp32\.py"
)
_STATE_FOLDERS = re.compile(r"global_step\d+|(optimizer|pytorch_model_fsdp)_\d+")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made where it is not there, against other processes; the system lets go of it
    even where this one is killed.

    Raises `ValueError` where another one holds it, and where it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r} is no directory; name a folder")
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"output_dir={str(folder)!r} is being written by another process; wait until it has "
            "ended, or pass another output_dir"
        ) from None
    except OSError as error:
        raise ValueError(
            f"output_dir={str(folder)!r} cannot be written to ({error.strerror or error}); name "
            "another"
        ) from None
    try:
        yield
    finally:
        lock.release()


def run_files(folder: Path) -> list[Path]:
    """What a training run writes and `folder` has, checkpoints as folders; sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if ((_OWN.fullmatch(path.name) or _MODEL.fullmatch(path.name)) and _no_folder(path))
        or (_CHECKPOINT.fullmatch(path.name) and path.is_dir())
    )


def check_unused(folder: Path, can_resume: bool = True) -> None:
    """Raises `ValueError`, with the ways out, where `folder` has files that a run writes."""
    found = [path.name for path in run_files(folder)]
    if not found:
        return
    is_run = any(_OWN.fullmatch(name) or _CHECKPOINT.fullmatch(name) for name in found)
    state = "files that a run writes"
    if is_run:
        state = f"a {'finished' if FIGURES in found else 'half-finished'} run"
    shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    last = can_resume and last_checkpoint(folder)
    resume = f"resume: true to go on from {last}, " if last else ""
    raise ValueError(
        f"output_dir={str(folder)!r} holds {state} ({shown}); pass {resume}overwrite: true to "
        "remove what a run writes and start over, or another output_dir"
    )


def remove_run(folder: Path) -> None:
    """Removes `run_files(folder)`; of a checkpoint only what a run writes there."""
    for path in run_files(folder):
        if _no_folder(path):
            path.unlink()
            continue
        for part in path.iterdir():
            if _STATE_FOLDERS.fullmatch(part.name) and part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            elif (_STATE.fullmatch(part.name) or _MODEL.fullmatch(part.name)) and _no_folder(part):
                part.unlink()
        with contextlib.suppress(OSError):  # not empty: it holds files of the user's
            path.rmdir()


def _no_folder(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def step_of(checkpoint: Path) -> int | None:
    """The step of a complete checkpoint; None for one that a killed run left unfinished. The
    Trainer's state is written last and so marks a complete one."""
    try:
        return int(json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`."""
    steps = {path: step_of(path) for path in folder.glob("checkpoint-*")}
    whole = [(step, path) for path, step in steps.items() if step is not None]
    return max(whole)[1] if whole else None


def find_checkpoint(resume: bool | str, folder: Path) -> Path:
    """The checkpoint that `resume` means for a run that writes to `folder`.

    Raises `ValueError` where there is none or only half of it, and where `folder` has later ones: a
    run that is resumed again would go on from those, which are of another course.
    """
    last = last_checkpoint(folder)
    if resume is True:
        if last is None:
            raise ValueError(
                f"{str(folder)!r} holds no whole checkpoint to go on from; start without resume "
                "(with overwrite: true where a run has left files), and set save_steps to less "
                "than the steps of the run"
            )
        return last
    path = Path(str(resume))
    if not path.is_dir():
        raise ValueError(f"resume={resume!r} is no folder; name a checkpoint's, or true")
    step = step_of(path)
    if step is None:
        raise ValueError(f"resume={resume!r} holds no whole checkpoint; name another, or true")
    if path.resolve().parent != folder.resolve():
        check_unused(folder)
    elif last is not None and (step_of(last) or 0) > step:
        raise ValueError(
            f"resume={resume!r} is not the last checkpoint, {last} is; pass resume: true, or "
            "another output_dir for a run that goes on from an earlier one"
        )
    return path


def finished_at(folder: Path) -> int | None:
    """The step of the finished run in `folder`; None where there is none."""
    try:
        return json.loads((folder / FIGURES).read_text(encoding="utf-8")).get("steps")
    except (OSError, ValueError, AttributeError):
        return None


def write_figures(folder: Path, figures: dict[str, Any]) -> None:
    """Writes metrics.json whole or not at all."""
    text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
    partial = folder / f".{FIGURES}.part"
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / FIGURES)
    finally:
        partial.unlink(missing_ok=True)


def how_to_go_on(folder: Path) -> str:
    """What a run that was interrupted has left in `folder`, and how to go on."""
    last = last_checkpoint(folder)
    if last is not None:
        return f"the last checkpoint is {last}; go on with resume=true"
    if run_files(folder):
        return f"{folder} holds no whole checkpoint; start over with overwrite=true"
    return "nothing had been written; the same command starts again"
