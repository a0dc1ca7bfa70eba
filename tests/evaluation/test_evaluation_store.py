"""Kept rows of an evaluation: a file is believed up to the first line that was not written so."""

import errno
import json
import os
import warnings

import pytest

from rgtg_fast.evaluation import store
from rgtg_fast.evaluation.store import Rows, write_whole

KEY = {"model": "m", "stamps": [("a", 1)]}


def reward(i, value=0.5):
    return {"i": i, "reward": value}


def rewards(folder, total=9, key=KEY):
    return Rows(folder, "base.0", "rewards", key, total)


@pytest.fixture
def written(tmp_path):
    """A folder with a file of four rows, and that file."""
    rewards(tmp_path).add([reward(i) for i in range(4)])
    (path,) = tmp_path.iterdir()
    return tmp_path, path


def test_rows_come_back_and_another_key_has_its_own(written):
    folder, _ = written
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rewards(folder).rows == [reward(i) for i in range(4)]
        assert rewards(folder, key={"model": "n"}).rows == []


def row(**changes):
    return json.dumps(reward(2) | changes).encode()


WRONG = {
    "twice": (lambda lines: [*lines[:3], lines[2], *lines[3:]], 2, "has i=1 where i=2 belongs"),
    "missing": (lambda lines: [*lines[:3], *lines[4:]], 2, "has i=3 where i=2 belongs"),
    "out of order": (lambda x: [*x[:3], x[4], x[3]], 2, "has i=3 where i=2 belongs"),
    "no JSON": (lambda x: [*x[:3], b"\xff{", x[4]], 2, "line 4 is not JSON"),
    "an empty line": (lambda x: [*x[:3], b"", *x[3:]], 2, "line 4 is not JSON"),
    "deep JSON": (lambda x: [*x[:3], b"[" * 200_000, x[4]], 2, "line 4 is not JSON"),
    "a list": (lambda x: [*x[:3], b"[1]", x[4]], 2, "line 4 is no row"),
    "without i": (lambda x: [*x[:3], b'{"reward": 1.0}', x[4]], 2, "line 4 is no row"),
    "i as text": (lambda x: [*x[:3], row(i="2"), x[4]], 2, "line 4 is no row"),
    "a reward as text": (lambda x: [*x[:3], row(reward="1"), x[4]], 2, "has no reward, or one of"),
    "a reward of null": (lambda x: [*x[:3], row(reward=None), x[4]], 2, "has no reward, or one of"),
    "another key": (lambda x: [b'{"key": {}}', *x[1:]], 0, "line 1 is not the key"),
    "no key": (lambda x: x[1:], 0, "line 1 is not the key"),
    "nothing": (lambda x: [], 0, "line 1 is not the key"),
}


@pytest.mark.parametrize(("break_it", "kept", "message"), WRONG.values(), ids=WRONG)
def test_a_file_is_cut_at_its_first_wrong_line(written, break_it, kept, message):
    folder, path = written
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"".join(line + b"\n" for line in break_it(lines)))
    with pytest.warns(UserWarning, match=rf"{path.name}: .*{message}.*{kept} of 9 rows are kept"):
        assert rewards(folder).rows == [reward(i) for i in range(kept)]
    again = rewards(folder)
    again.add([reward(i) for i in range(kept, 4)])
    assert path.read_bytes().splitlines() == lines


def test_a_line_cut_short_is_dropped(written):
    folder, path = written
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match=r"the last line is cut short.*3 of 9 rows are kept"):
        assert len(rewards(folder).rows) == 3


def test_more_rows_than_prompts_are_cut(written):
    with pytest.warns(UserWarning, match="line 4 is one more than the 2 prompts"):
        assert len(rewards(written[0], total=2).rows) == 2


ANSWER = {"i": 0, "text": "a", "ids": [1], "end": None, "logp": -1.0}
ANSWER |= {"kl": None, "log_ratio": 0.5, "proxy": None}
WIN = {"i": 0, "win": 0.5, "unread": 0, "swapped": False}


@pytest.mark.parametrize(
    ("kind", "good", "wrong"),
    [
        ("answers", ANSWER, {"ids": [1, "2"]}),
        ("answers", ANSWER, {"ids": "12"}),
        ("answers", ANSWER, {"text": None}),
        ("answers", ANSWER, {"end": 1.0}),
        ("answers", ANSWER, {"logp": None}),
        ("answers", ANSWER, {"kl": True}),
        ("wins", WIN, {"swapped": 1}),
        ("wins", WIN, {"unread": 0.5}),
    ],
)
def test_rows_of_each_kind_have_their_types(tmp_path, kind, good, wrong):
    Rows(tmp_path, "r", kind, KEY, 1).add([good])
    assert Rows(tmp_path, "r", kind, KEY, 1).rows == [good]
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().split("\n")[0] + "\n" + json.dumps(good | wrong) + "\n")
    with pytest.warns(UserWarning, match=f"line 2 has .*{next(iter(wrong))}.*0 of 1 rows are kept"):
        assert Rows(tmp_path, "r", kind, KEY, 1).rows == []


def test_cutting_leaves_the_old_file_or_the_new_one(written, monkeypatch):
    folder, path = written
    before = path.read_bytes()
    rows = rewards(folder)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        rows.cut(1)
    assert path.read_bytes() == before
    monkeypatch.undo()
    rows = rewards(folder)
    rows.cut(1)
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])


def test_a_full_disk_leaves_whole_rows_and_names_the_file(written):
    """/dev/full is a disk without room."""
    folder, path = written
    rows = rewards(folder)
    rows.path = type(path)("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as error:
        rows.add([reward(4)])
    assert error.value.errno == errno.ENOSPC and len(rows.rows) == 4


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_whole(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match=r"results\.json"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
