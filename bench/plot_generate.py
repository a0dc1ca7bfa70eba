"""Cost of a token over prompt length and over k, from the raw results of bench_generate.py.

python bench/plot_generate.py results.json out.png
"""

import json
import sys
from collections import Counter
from pathlib import Path

from generate_contenders import LABELS

AXES = {"prompt": "prompt tokens", "k": "candidates k"}


def curves(cells, axis):
    """Contender -> [(x, decode ms per token)] along `axis` ("prompt" or "k"), and what is fixed.

    The other two of batch, k and prompt stay at the values with which most points were measured.
    """
    others = [name for name in ("batch", "k", "prompt") if name != axis]
    counts = Counter(tuple(cell[name] for name in others) for cell in cells)
    fixed = dict(zip(others, counts.most_common(1)[0][0], strict=True))
    found = {}
    for cell in sorted(cells, key=lambda c: c[axis]):
        if all(cell[name] == value for name, value in fixed.items()):
            for row in cell["rows"]:
                found.setdefault(row["name"], []).append((cell[axis], row["decode_ms"]))
    return found, fixed


def plot(cells, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        found, fixed = curves(cells, axis)
        for name, points in found.items():
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=LABELS[name])
        ticks = sorted({x for points in found.values() for x, _ in points})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(x) for x in ticks])
        panel.set_yscale("log")
        panel.grid(True, which="major", alpha=0.3)
        panel.set_xlabel(label)
        panel.set_title(", ".join(f"{name} {value}" for name, value in fixed.items()), fontsize=10)
    panels[0].set_ylabel("ms per decoded token, prompt excluded")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: python bench/plot_generate.py results.json out.png")
    plot(json.loads(Path(sys.argv[1]).read_text())["cells"], sys.argv[2])


if __name__ == "__main__":
    main()
