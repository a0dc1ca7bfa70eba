"""Small on-policy runs: as a user starts them, and in processes that kill themselves."""

import json
import os
import signal

import transformers

from rgtg_fast.on_policy import train_on_policy

PROMPTS = ("order 17:", "order 8:", "my parcel", "hello", "please", "sorry")


def polite(texts):
    """The judge: how often a letter of "thank" is in the text; hardly two texts are alike to it."""
    return [
        sum(text.count(letter) for letter in "thank") / 10 + sum(map(ord, text)) / 1e6
        for text in texts
    ]


def share(texts):
    """A judge of scores in [0, 1]."""
    return [min(1.0, score / 4) for score in polite(texts)]


def config(folder, out="out", model="rm", **changes):
    """A run's config; `own` in `changes` are keys of its mapping on_policy."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    own = {
        "lm": str(folder / "lm"),
        "prompts": str(path),
        "judge": "on_policy:polite",
        "rounds": 2,
        "samples": 3,
        "max_new_tokens": 6,
        "batch_size": 4,
        "beta": 2.0,
        "k": 5,
    }
    return {
        "model": str(folder / model),
        "train": str(folder / "train.jsonl"),
        "output_dir": str(folder / out),
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "on_policy": own | changes.pop("own", {}),
    } | changes


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill():
    """No clean-up, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while(monkey, where, count):
    """Patch so that the process dies at the `count`-th time it is `where`."""
    from rgtg_fast.evaluation import store
    from rgtg_fast.on_policy import pairs, run

    left = [count]

    def now():
        left[0] -= 1
        return left[0] == 0

    if where == "between rows":
        add = store.Rows.add

        def adding(self, new):
            add(self, new)
            if now():
                kill()

        monkey(store.Rows, "add", adding)
    elif where == "within a row":
        through = store._write_through

        def torn(file, data):
            if now():
                file.write(data[: len(data) // 2])
                file.flush()
                kill()
            through(file, data)

        monkey(store, "_write_through", torn)
    elif where == "in training":

        class Kill(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if now():
                    kill()

        from rgtg_fast.training import PrefixRewardTrainer

        make = PrefixRewardTrainer.__init__

        def made(self, *args, **kwargs):
            make(self, *args, **kwargs)
            self.add_callback(Kill)

        monkey(PrefixRewardTrainer, "__init__", made)
    else:
        module = {"scored_pairs": run, "write_figures": run, "write_whole": pairs}[where]
        original = getattr(module, where)

        def dying(*args, **kwargs):
            if now():
                kill()
            return original(*args, **kwargs)

        monkey(module, where, dying)


def run_until_killed(values, where=None, count=1):
    """In a process of its own."""
    import torch

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    if where is not None:
        killed_while(setattr, where, count)
    train_on_policy(values)
