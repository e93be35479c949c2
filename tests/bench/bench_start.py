"""Short waits, each beside a named alternative: the import, the help, a phantom case, the statistics of a cell."""
import subprocess
import sys
import time

import numpy as np
from monai.data import create_test_image_3d
from sklearn.metrics import roc_auc_score

from vfm_notes.analysis.gain import Pair, Ranking, permutation_test, gain_interval
from vfm_notes.data.phantom import phantom_case

DRAWS = 2000
random = np.random.default_rng(0)
label, tuned, scratch = np.arange(48) % 3 == 2, random.normal(size=(3, 48)), random.normal(size=(3, 48))


def seconds(work, times: int = 5) -> float:
    "The shortest of a few."
    took = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        took.append(time.perf_counter() - begun)
    return min(took)


def python(*words): return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)


def cell():
    pair = Pair(Ranking(tuned, label), Ranking(scratch, label), [0, 1, 2], np.arange(48))
    gain_interval(pair, "auc"), permutation_test(pair, DRAWS)


def loop(draws: int = DRAWS // 20):
    "The same draws one by one with scikit-learn, a twentieth of them."
    for _ in range(draws):
        at = random.integers(0, 48, 48)
        if label[at].any() and not label[at].all(): [roc_auc_score(label[at], s[at]) for s in (*tuned, *scratch)]
        flip = random.integers(0, 2, 48).astype(bool)
        [roc_auc_score(label, np.where(flip, a, b)) for a, b in zip((*tuned, *scratch), (*scratch, *tuned))]


def large():
    state = np.random.RandomState(0)
    create_test_image_3d(192, 192, 36, num_objs=12, rad_max=16, rad_min=4, random_state=state)


HELP = "import sys; sys.argv = ['vfm', '--help']; from vfm_notes.report.cli import main; main()"
ROWS = [("import vfm_notes", python("-c", "import vfm_notes"), "python that imports nothing", python("-c", "pass"), 1),
        ("vfm --help", python("-c", HELP), "pip --help", python("-m", "pip", "--help"), 1),
        ("a phantom case", lambda: phantom_case(9, 0), "MONAI's create_test_image_3d, thrice that size",
         large, 1),
        (f"a cell, {DRAWS} draws", cell, "scikit-learn in a loop", loop, 20)]
for what, ours, other, theirs, factor in ROWS:
    a, b = seconds(ours), factor * seconds(theirs, 2)
    print(f"{what:22}{a:8.3f} s   {other:48}{b:8.3f} s   ratio {a / b:.2f}", flush=True)
