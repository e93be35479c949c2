"""What a study can see: formulas against simulated studies that are judged as real ones are."""
import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from vfm_notes.analysis.crossed import two_way, two_way_test
from vfm_notes.analysis.gain import Means, Pair, difference_interval
from vfm_notes.analysis.interval import smallest_shift
from vfm_notes.analysis.power import Variances, fewest, gains_seen, smallest_effect, smallest_rho
from vfm_notes.report import cli


@pytest.mark.parametrize(
    ("seeds", "cases", "sds"),
    [
        (2, 40, (0.02, 0.09, 0.03)), (3, 20, (0.03, 0.05, 0.05)), (5, 40, (0.02, 0.09, 0.0)),
        (10, 60, (0.05, 0.05, 0.05)),
    ],
)
def test_the_smallest_gain_is_seen_in_four_of_five_studies(seeds, cases, sds):
    v, r, seen = Variances("dice", *sds), np.random.default_rng(0), 0
    effect = smallest_effect(v.squares(seeds, cases))
    for _ in range(600):
        d = (
            effect
            + sds[0] * r.normal(size=(seeds, 1))
            + sds[1] * r.normal(size=(1, cases))
            + sds[2] * r.normal(size=(seeds, cases))
        )
        base = 0.5 + 0.1 * r.normal(size=(1, cases)) + np.zeros((seeds, 1))
        seen += (
            difference_interval(Pair(Means(base + d), Means(base), list(range(seeds)), np.arange(cases)), "psnr").low
            > 0
        )
    assert 0.75 <= seen / 600 <= 0.85, seen / 600


@pytest.mark.parametrize("n", [3, 10, 34])
def test_the_smallest_shift_of_a_t_test(n):
    r = np.random.default_rng(n)
    x = smallest_shift(2.0, n) + 2.0 * r.normal(size=(20_000, n))
    from scipy.stats import ttest_1samp
    assert np.mean(ttest_1samp(x, 0, axis=1).pvalue <= 0.05) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(("tasks", "backbones"), [(5, 4), (5, 6)])
def test_the_smallest_correlation_is_shown_in_about_four_of_five_studies(tasks, backbones):
    r, rho, shown = np.random.default_rng(0), smallest_rho(tasks, backbones), 0
    t, b = np.repeat(np.arange(tasks), backbones), np.tile(np.arange(backbones), tasks)
    for i in range(120):
        x = r.normal(size=len(t))
        y = rho * x + np.sqrt(1 - rho**2) * r.normal(size=len(t))
        p, _, _ = two_way_test(x, y, t, b, np.zeros(len(t)), 200, i)
        low, high = two_way(x, y, t, b, 200, i)
        shown += p <= 0.05 and (low > 0 or high < 0)
    assert 0.68 <= shown / 120 <= 0.92, shown / 120


def test_what_is_needed_is_the_first_that_sees():
    seen = gains_seen(Variances("dice", 0.018, 0.091, 0.0), 3, 40)
    along = [(n, s) for more, n, s in seen.itertuples(index=False) if more == "seeds"]
    wanted = 6.0
    first = fewest(along, wanted)
    assert first and all(s > wanted for n, s in along if n < first) and dict(along)[first] <= wanted
    assert fewest(along, 0.1) is None


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_RUNS", str(tmp_path))
    made = CliRunner().invoke(cli.app, ["plan", "phantom", "--gain", "dice=6", "--gain", "psnr=0.2"])
    assert made.exit_code == 0, made.output
    assert (
        max(map(len, made.output.splitlines())) <= 100
        and "Dice points" in made.output
        and "|rho| from 0." in made.output
    )
    few = CliRunner().invoke(cli.app, ["plan", "hippocampus"]).output
    assert "2 backbones" in few and "no correlation" in few
    needed = int(re.search(r"^For \|rho\| = 0\.57: (\d+) backbones \([^)]+\)\.$", few, re.M)[1])  # tasks do not suffice
    assert smallest_rho(3, needed) <= 0.57 < smallest_rho(3, needed - 1) and not smallest_rho(40, 2) <= 0.57
    plain = json.loads(CliRunner().invoke(cli.app, ["plan", "phantom", "--json"]).output)
    assert plain["seeds"] == 3 and 0 < plain["rho"] < 1
    assert {r["metric"] for r in plain["rows"]} == {"auc", "dice", "psnr"}
