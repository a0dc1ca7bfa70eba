"""What the training benchmark prints and writes; a wrong result gets no time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rgtg_fast.cli.microbench import circumstances

RESULTS = Path(__file__).parent / "results"


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"parity with the reference fails, so no timing is shown: {what}")


def report(name: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints ``rows`` as a table and, with ``--json``, writes them with what they depend on."""
    columns = list(rows[0])
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    if not options.json:
        return
    record = {**circumstances(), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
