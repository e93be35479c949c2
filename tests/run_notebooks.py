"""Run every library notebook and the tour, as `make test` does: each in a process of its own.

No example can depend on what ran before it, or on what was registered meanwhile. The heavy libraries are in memory
before a process begins; ours is not.

    python tests/run_notebooks.py                  all, two at a time
    python tests/run_notebooks.py 13_load mmd      those whose path holds one of these words
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

HEAVY = [
    "altair", "matplotlib.pyplot", "monai.losses", "monai.metrics", "nbdev.test", "nibabel", "pandas", "peft",
    "pyarrow.parquet", "scipy.stats", "SimpleITK", "sklearn.linear_model", "torch", "transformers",
]
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted([ROOT/"nbs"/"00_tour.ipynb", ROOT/"nbs"/"index.ipynb", *ROOT.glob("nbs/[0-9]_*/*.ipynb")])


def run(path: Path) -> tuple[Path, bool, float]:
    "Run one notebook: its path, whether every cell passed, and seconds."
    from nbdev.test import test_nb as run_cells
    early, begun = [m for m in sys.modules if m.startswith("vfm_notes")], time.monotonic()
    assert not early, f"{early[0]} is imported before the notebook"
    passed, _ = run_cells(path, basepath=ROOT)
    return path, passed, time.monotonic() - begun


def main(words: list[str]) -> int:
    "Run notebooks, the slow ones named; the exit status."
    chosen = [p for p in NOTEBOOKS if not words or any(w in str(p) for w in words)]
    os.chdir(ROOT/"nbs")
    server = get_context("forkserver")
    server.set_forkserver_preload(HEAVY)
    with ProcessPoolExecutor(2, server, max_tasks_per_child=1) as pool: done = list(pool.map(run, chosen))
    slow = sorted(done, key=lambda d: -d[2])[:5]
    print(f"{len(done)} notebooks; slowest: {', '.join(f'{p.stem} {s:.0f} s' for p, _, s in slow)}")
    failed = sorted(str(p.relative_to(ROOT)) for p, passed, _ in done if not passed)
    if failed: print("Failed:", *failed, sep="\n    ")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
