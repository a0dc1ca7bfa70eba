"""What the figures depend on, as JSON.

    python -m rgtg_fast.cli.gpu_report.environment FILE cuda

In a process of its own, after the build: importing what was just built may fail.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ..microbench import circumstances, gpu


def main(file: str, device: str) -> None:
    facts = {**circumstances(), **gpu(device), "cores": os.cpu_count()}
    Path(file).write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts["versions"]), facts["gpu"], facts["driver"], facts["commit"])


if __name__ == "__main__":
    main(*sys.argv[1:])
