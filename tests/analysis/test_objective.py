"""Objective and task: leads against scipy's U, the exact test by hand, the interval, the published table."""

import json
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu

from vfm_notes.analysis import objective as o
from vfm_notes.foundation.places import report_notebooks

GROUPS = ("dense", "single")


def made(draw, n=4, shift=(0.0, 0.0), names=("a", "b", "c", "d", "e"), first=("a", "b")):
    rows = []
    for g, s in zip(GROUPS, shift):
        for k in range(n):
            rows += [(g, f"{g}{k}", name, float(draw.normal() + s * (name in first))) for name in names]
    return pd.DataFrame(rows, columns=["group", "column", "objective", "score"])


def test_lead_is_u_over_all_pairs():
    draw = np.random.default_rng(0)
    for _ in range(20):
        x, y = draw.integers(0, 5, 4), draw.integers(0, 5, 3)
        assert o.pair_wins(x, y) == pytest.approx(mannwhitneyu(x, y).statistic / 12)


def test_columns_without_one_family_are_left_out_and_absent_scores_too():
    table = made(np.random.default_rng(1))
    table.loc[(table.column == "dense0") & table.objective.isin(["a", "b"]), "score"] = np.nan
    table = table[~((table.column == "single1") & table.objective.isin(["c", "d", "e"]))]
    found = o.column_wins(table, ["a", "b"], ["c", "d", "e"])
    assert len(found) == 6 and ("dense", "dense0") not in found and ("single", "single1") not in found
    assert o.family_lead(table[table.group == "dense"], ["a", "b"], ["c"], GROUPS) is None


def test_the_exact_test_counts_every_naming():
    table = made(np.random.default_rng(2), shift=(0.6, -0.4))
    found = o.family_lead(table, ["a", "b"], ["c", "d", "e"], GROUPS, draws=50)
    wide = table.pivot(index=["group", "column"], columns="objective", values="score")

    def difference(first, second):
        wins = [
            [sum(r[a] > r[b] for a in first for b in second) / 6 for _, r in wide.loc[g].iterrows()] for g in GROUPS
        ]
        return np.mean(wins[0]) - np.mean(wins[1])

    given = [difference(p[:2], p[2:]) for p in permutations("abcde")]  # every naming, twelve times
    assert found.difference == pytest.approx(difference("ab", "cde"))
    assert found.p == pytest.approx(np.mean([g >= found.difference - 1e-9 for g in given]))
    assert found.least_p == pytest.approx(1 / 10) and found.columns == (4, 4) and found.objectives == 5


def test_the_interval_holds_the_truth_about_as_often_as_it_claims():
    "No family is ahead: 0 lies in most intervals, and a planted pattern is found."
    inside = []
    for i in range(60):
        leads = o.column_wins(made(np.random.default_rng(100 + i), 12), ["a", "b"], ["c", "d", "e"])
        low, high = np.quantile(o.resampled_leads(leads, GROUPS, 300, 0)[:, 2], [0.025, 0.975])
        inside.append(low <= 0 <= high)
    assert 0.8 <= np.mean(inside) <= 1
    clear = o.family_lead(
        made(np.random.default_rng(3), 12, (2.0, -2.0)), ["a", "b"], ["c", "d", "e"], GROUPS, draws=300
    )
    assert clear.lows[2] > 0.4 and clear.leads[0] > 0.8 > 0.2 > clear.leads[1] and clear.p == clear.least_p
    said = " ".join(o.lead_words(clear, "masked", "others", "x"))
    assert "clear of 0" in said and "with 5 objectives no p below 0.1 is possible" in said


def test_the_published_table_is_read_as_its_authors_do():
    "Ranks by hand of one column, and the order of the two groups' leads."
    paper = json.loads((report_notebooks()[0].parent / "openmind_results.json").read_text(encoding="utf-8"))
    t = pd.DataFrame(paper["rows"])
    t = t[~t.column.isin(["ID", "OOD", "All", "Mean"]) & t.metric.isin(["DSC", "AP"])]
    scores = pd.DataFrame(
        {"group": t.task, "column": t.architecture + t.column, "objective": t.objective, "score": t.value}
    )
    found = o.family_lead(scores, paper["masked"], paper["contrast"], ("segmentation", "classification"))
    assert found.columns == (24, 6) and found.objectives == 6 and found.least_p == pytest.approx(1 / 20)
    wins = o.column_wins(scores, paper["masked"], paper["contrast"])
    line = t[(t.architecture == "ResEnc-L") & (t.column == "ATL")].set_index("objective").value
    by_hand = np.mean([line[a] > line[b] for a in ("mae", "s3d") for b in ("voco", "simclr", "swinunetr")])
    assert wins[("segmentation", "ResEnc-LATL")] == pytest.approx(by_hand)
    assert found.leads[0] > 0.5 > found.leads[1] and found.lows[2] > 0


def test_a_study_without_finished_runs_has_no_scores_and_a_study_with_them_keeps_directions():
    from types import SimpleNamespace

    columns = ["task", "backbone", "strategy", "seed", "value", "direction"]
    runs = pd.DataFrame(
        [
            ("seg", "net.masked", "full", 0, 0.5, 1),
            ("vol", "net.contrast", "full", 1, 3.0, -1),
            ("vol", "net.x", "decoder", 1, 9.0, -1),
        ],
        columns=columns,
    )
    made = lambda t: o.study_scores(SimpleNamespace(done=lambda: t), {"seg": "dense", "vol": "single"}, "full")
    assert made(runs).values.tolist() == [
        ["dense", "seg, net, seed 0", "masked", 0.5],
        ["single", "vol, net, seed 1", "contrast", -3.0],
    ]
    assert made(runs.iloc[:0]).empty and o.family_lead(made(runs.iloc[:0]), ["masked"], ["contrast"], GROUPS) is None
