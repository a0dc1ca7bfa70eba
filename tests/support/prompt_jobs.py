"""What tests of `rgtg-fast generate` share: a job in a folder, and an engine without models."""

import json

from rgtg_fast.cli import main
from rgtg_fast.demo.run import ASSETS

LM, RM = str(ASSETS / "lm"), str(ASSETS / "rm_partial")
PROMPTS = [json.loads(line)["prompt"] for line in (ASSETS / "prompts.jsonl").open()]
FLAGS = {"model": LM, "reward_model": RM, "beta": 2.0, "max_new_tokens": 12, "batch_size": 4}


def flags_of(options):
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        yield from [flag] if value is True else [flag, str(value)]


class Job:
    """A job in a folder: its input, its output and what the command says."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"

    def write(self, rows):
        texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self.input.write_text("".join(f"{text}\n" for text in texts))
        return self

    def __call__(self, *more, **options):
        """Runs the command; its exit status, 0 where it ends well."""
        files = {"input": self.input, "output": self.output}
        self.said = ""
        try:
            main(["generate", *flags_of(FLAGS | files | options), *more])
        except SystemExit as stop:
            return stop.code
        finally:
            self.said = self.capsys.readouterr().err
        return 0

    def rows(self, path=None):
        return [json.loads(line) for line in (path or self.output).read_text().splitlines()]

    def answers(self):
        rows = self.rows()
        assert len({row["id"] for row in rows}) == len(rows)
        return {row["id"]: row for row in rows}


def fake(fails_at=None):
    """An engine without models: an answer to each row, and an end after `fails_at` of them."""

    def engine(job, rows):
        for count, row in enumerate(rows):
            if count == fails_at:
                raise KeyboardInterrupt
            yield {"id": row.id, "text": f"é {row.prompt}", "tokens": [row.index], "reward": 0.5,
                   "kl": 1.0}  # fmt: skip

    return engine
