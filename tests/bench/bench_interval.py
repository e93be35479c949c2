"""How often intervals of a mean over seeds and cases hold the truth: eight ways, 2 to 10 seeds, five ratios of
variances.

    python tests/bench/bench_interval.py [studies] [quick]    quick: without those that are re-drawn

Each study is a table of differences d = a(seed) + b(case) + e, all normal, 40 cases, true mean 0, so what does not
hold is
a false positive. `seeds` is the variance that seeds give to the mean of two, over that of the cases: on the phantom
.3
(AUC), .5 (distortion), 1.6 (Dice) and 4 (super-resolution). The standard deviation of e is .3 or 1 of that of b.
"""
import sys

import numpy as np
from scipy.stats import t as student

from vfm_notes.analysis.interval import student_squared

STUDIES = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
CASES, DRAWS = 40, 400


def studies(seeds: int, ratio: float, rest: float, rng) -> np.ndarray:  # (studies, seeds, cases)
    "Made-up studies."
    seed = np.sqrt(2 * ratio / CASES)
    return (
        seed * rng.normal(size=(STUDIES, seeds, 1))
        + rng.normal(size=(STUDIES, 1, CASES))
        + rest * rng.normal(size=(STUDIES, seeds, CASES))
    )


def redrawn(d: np.ndarray, rng, seeds: bool) -> np.ndarray:  # (studies,) bool: the percentile bootstrap holds 0
    "Draws of cases, and of seeds where asked, with replacement."
    s, held = d.shape[1], []
    for one in d:
        w = rng.multinomial(CASES, np.full(CASES, 1 / CASES), DRAWS) / CASES
        ws = rng.multinomial(s, np.full(s, 1 / s), DRAWS) / s if seeds else np.full((DRAWS, s), 1 / s)
        low, high = np.percentile(((ws @ one) * w).sum(1), [2.5, 97.5])
        held.append(low <= 0 <= high)
    return np.array(held)


def ways(d: np.ndarray, rng) -> dict[str, tuple[float, float]]:
    "Coverage and median half width of each way."
    _, s, c = d.shape
    mean, rows, columns = d.mean((1, 2)), d.mean(2), d.mean(1)
    seed, case = c * rows.var(1, ddof=1), s * columns.var(1, ddof=1)
    rest = ((d - rows[:, :, None] - columns[:, None, :] + mean[:, None, None]) ** 2).sum((1, 2)) / (s - 1) / (c - 1)
    t = lambda free: student.isf(0.025, free)
    total = np.maximum(seed + case - rest, 1e-12)
    free = np.maximum(1, total**2 / (seed**2 / (s - 1) + case**2 / (c - 1) + rest**2 / (s - 1) / (c - 1)))
    half = {
        "Student over cases": t(c - 1) * np.sqrt(case / (s * c)),
        "Student over seeds": t(s - 1) * np.sqrt(seed / (s * c)), "Satterthwaite": t(free) * np.sqrt(total / (s * c)),
        "one t for both (seeds - 1)": t(s - 1) * np.sqrt(total / (s * c)),
        "Banerjee": np.sqrt((t(s - 1) ** 2 * seed + t(c - 1) ** 2 * np.maximum(0, case - rest)) / (s * c)),
    }
    less = np.maximum(0, case - rest)
    half["squares (this project)"] = np.sqrt((seed + less) * student_squared(seed, less, s, c) / (s * c))
    found = {k: (float((np.abs(mean) <= h).mean()), float(np.median(h))) for k, h in half.items()}
    if sys.argv[2:] == ["quick"]: return found
    part = d[: max(200, STUDIES // 5)]
    return found | {
        "re-drawn cases": (redrawn(part, rng, False).mean(), np.nan),
        "re-drawn seeds and cases": (redrawn(part, rng, True).mean(), np.nan),
    }


if __name__ == "__main__":
    rng, table, wide = np.random.default_rng(0), {}, {}
    for seeds in (2, 3, 5, 10):
        for rest in (0.3, 1.0):
            for ratio in (0, 0.3, 1, 4, 25):
                for name, (held, half) in ways(studies(seeds, ratio, rest, rng), rng).items():
                    table.setdefault(name, {}).setdefault(seeds, []).append(held)
                    wide.setdefault(name, {}).setdefault(seeds, []).append(half)
    print(
        f"share of {STUDIES} studies whose 95 % interval holds the truth, in %: least to most over ten settings "
        "(mean half width)"
    )
    print(f"{'':28}" + "".join(f"{f'{s} seeds':>22}" for s in (2, 3, 5, 10)))
    for name, rows in table.items():
        cells = [
            f"{100 * min(v):.1f} to {100 * max(v):.1f}"
            + (f" ({np.mean(wide[name][s]):.2f})" if np.isfinite(wide[name][s]).all() else "")
            for s, v in rows.items()
        ]
        print(f"{name:28}" + "".join(f"{c:>22}" for c in cells))
