"""The first sentence of a report against the tables that it speaks of, for every way a study can end."""
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from vfm_notes.analysis.planted import control_verdict
from vfm_notes.analysis.verdict import gain_verdict, planted_verdict, verdict

NOTHING = pd.DataFrame(columns=["expected", "found", "agrees"])


def gains(up, down, quiet, dull=0, learned=True):
    "Cells that gain, lose, show nothing, or are clear before correction only."
    row = lambda rpg, far, p: dict(rpg=rpg, low=rpg - far, high=rpg + far, p_holm=p, learned=learned, task="t",
                                   backbone="net.made", strategy="full")
    return pd.DataFrame(
        [row(5.0, 2, 0.01)] * up + [row(-5.0, 2, 0.01)] * down + [row(1.0, 9, 0.9)] * quiet + [row(5.0, 2, 0.2)] * dull
    )


def planted(good, missed, false, clean, missing=0):
    "Cells with a known truth: found or not where a gain is, clear or not where none is."
    rows = [("gain", "gain", True)] * good + [("gain", "not clear", False)] * missed + [("none", "gain", False)] * false
    rows += [("none", "not clear", True)] * clean + [("gain", "missing", None)] * missing
    return pd.DataFrame(rows, columns=["expected", "found", "agrees"])


@pytest.mark.parametrize(("up", "down", "quiet", "dull"), list(product((0, 2), (0, 1), (0, 3), (0, 2)))[1:])
def test_a_study_is_summed_up_by_what_is_clear_after_correction(up, down, quiet, dull):
    said, n = gain_verdict(gains(up, down, quiet, dull)), up + down + quiet + dull
    assert len(said.split()) <= 20
    assert (f"clearly helps in {up} of {n} cells" in said) == (up > 0)
    assert ("harms" in said) == (down > 0) and (f"harms in {down}" in said) == (down > 0)
    assert ("no clear difference" in said) == (not up and not down)


def test_nothing_learned_is_no_gain():
    assert "nothing was learned" in gain_verdict(gains(3, 0, 0, learned=False))
    assert gain_verdict(gains(0, 0, 2).assign(rpg=np.nan)) == "No run is finished yet."


@pytest.mark.parametrize("n", [5, 13, 20, 40])
def test_a_negative_control_fails_where_chance_does_not_explain_it(n):
    "One interval of 95 % in twenty leaves out zero: only more than that is a fault of the instrument."
    for wrong in range(n + 1):
        by_hand = sum(binom.pmf(k, n, 0.05) for k in range(wrong, n + 1))
        found = control_verdict(planted(0, 0, wrong, n - wrong))
        assert found == ("as expected" if not wrong else "within chance" if by_hand > 0.05 else "failed")
        said = planted_verdict(planted(4, 0, wrong, n - wrong))
        assert said.startswith("Do not trust this study") == (found == "failed") and len(said.split()) <= 20


@pytest.mark.parametrize(("good", "missed"), [(4, 0), (3, 1), (2, 2), (1, 3), (0, 4)])
def test_what_was_planted_and_not_found_is_the_headline(good, missed):
    said = planted_verdict(planted(good, missed, 0, 6))
    if missed > 2: assert said.startswith(f"This study cannot see what is there: of 4 planted effects it finds {good}")
    else: assert said == f"Planted effects are found in {good} of 4 cells, and in none of 6 where nothing was planted."
    assert verdict(gains(3, 0, 0), planted(good, missed, 0, 6)) == said  # a known truth comes before any gain
    assert verdict(gains(3, 0, 0), NOTHING) == gain_verdict(gains(3, 0, 0))
    assert planted_verdict(planted(0, 0, 0, 0, 3)) == ""  # nothing finished, nothing said
