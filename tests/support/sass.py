"""Reads machine code as cuobjdump prints it."""

import re
import subprocess
from itertools import pairwise


def instructions(cuobjdump, cubin, kernel):
    """``(address, text)`` of every instruction of the kernel whose mangled name has ``kernel``."""
    command = [cuobjdump, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (body,) = [part for part in text.split("Function : ")[1:] if kernel in part.split("\n")[0]]
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", body, flags=re.M)
    return [(int(address, 16), line) for address, line in found]


def target(line):
    """The address that a branch goes to, or None."""
    found = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)
    return int(found[1], 16) if found else None


def steady_loop(code, marker, wanted):
    """One round of the shortest loop around a ``marker``: the instructions on the way on which most
    of the ``wanted`` ones are met and, of those ways, the shortest. So without what the loop
    branches around in the usual case."""
    loops = [
        [x for x in code if to <= x[0] <= at]
        for at, line in code
        if (to := target(line)) is not None and to < at
    ]
    body = min((b for b in loops if any(marker in line for _, line in b)), key=len)
    best = {body[-1][0]: (0, 0, ())}  # address -> wanted met, -length, path to the end
    after = {a: b for (a, _), (b, _) in pairwise(body)}
    for address, line in reversed(body[:-1]):
        ways = [] if re.match(r"BRA 0x", line) else [after[address]]
        to = target(line)
        if to is not None and to > address and to in best:
            ways.append(to)
        known = [best[way] for way in ways if way in best]
        if known and "EXIT" not in line:
            met, length, path = max(known, key=lambda way: way[:2])
            met += any(name in line for name in wanted)
            best[address] = (met, length - 1, (line, *path))
    return best[body[0][0]][2]
