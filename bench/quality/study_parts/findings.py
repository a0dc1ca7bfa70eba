"""The paper's two findings as tests with a verdict."""

from __future__ import annotations

from typing import Any

import numpy as np

from study_parts.figures import Curve, crossed

STANDARD_ERRORS = 3.0


def prefix_accuracy(accuracy: dict[str, Any]) -> dict[str, Any]:
    """Finding 1: the partial-sequence model orders prefixes better than the full-sequence one at
    every decile of length but the last; `passed` means each difference is above zero, and
    `significant` that its 95 % interval is too."""
    gaps = accuracy["partial - full"][:9]
    return {
        "finding": "prefix accuracy of the partial RM above the full RM at deciles 1 to 9",
        "differences": gaps,
        "passed": all(g["mean"] > 0 for g in gaps),
        "significant": [g["mean"] > g["ci95"] for g in gaps],
    }


def guidance(curves: dict[str, Curve], base: Any) -> dict[str, Any]:
    """Finding 2: mean gold of PARGS above that of ARGS and of the base by more than three standard
    errors, each at its own best β, and above that of ARGS at equal KL: at the KL that ARGS spends
    at its best β and at the one that PARGS spends (where ARGS reaches it). The greedy pair is
    reported beside it."""
    pargs, args = curves["PARGS"], curves["ARGS"]
    spent = {"ARGS": args.at_best("kl").mean(-1), "PARGS": pargs.at_best("kl").mean(-1)}
    tests = {
        "PARGS - base, own best beta": pargs.at_best("gold") - base,
        "PARGS - ARGS, own best beta": pargs.at_best("gold") - args.at_best("gold"),
    }
    for name, kl in spent.items():
        tests[f"PARGS - ARGS, at the KL of {name}"] = pargs.at_kl(base, kl) - args.at_kl(base, kl)
    rows: dict[str, Any] = {name: _verdict(values) for name, values in tests.items()}
    allowed = args.within_kl(base, spent["PARGS"])
    gap = pargs.at_best("gold") - allowed
    beside = {"PARGS - the best ARGS within the KL of PARGS": _verdict(gap)}
    if {"PARGS-G", "ARGS-G"} <= curves.keys():
        gap = curves["PARGS-G"].at_best("gold") - curves["ARGS-G"].at_best("gold")
        beside["PARGS-G - ARGS-G, own best beta"] = _verdict(gap)
    return {
        "finding": "gold of PARGS above ARGS and base by more than 3 standard errors",
        "kl_spent": {name: float(kl.mean()) for name, kl in spent.items()},
        "tests": rows,
        "beside": beside,
        "passed": all(row["passed"] for row in rows.values()),
    }


def _verdict(values: Any) -> dict[str, Any]:
    seeds = int((~np.isnan(values).all(1)).sum())
    if not seeds:
        return {"seeds": 0, "passed": False}
    got = crossed(values[~np.isnan(values).all(1)])
    # Without a standard error (a single value, say) there is no evidence.
    ratio = got["mean"] / got["se"] if got["se"] else 0.0
    return {**got, "in_se": ratio, "seeds": seeds, "passed": ratio > STANDARD_ERRORS}
