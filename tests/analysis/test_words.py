"""Sentences, bold type and colours against the table that they speak of, for every sign and certainty."""
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest

from vfm_notes.analysis.association import Association, association_words
from vfm_notes.analysis.contrasts import contrast_words
from vfm_notes.analysis.crossed import CrossedAssociation, crossed_words, crossed_verdict
from vfm_notes.analysis.findings import convergence_finding, name_extremes, gain_findings, gain_words
from vfm_notes.analysis.mixed import MixedModel
from vfm_notes.analysis.prediction import prediction_finding, prediction_verdict
from vfm_notes.analysis.findings import backbone_verdict, sooner_ends
from vfm_notes.analysis.tradeoff import search_words
from vfm_notes.analysis.tradeoff import axis_words
from vfm_notes.report.figures import alignment_title, gain_cells, gain_finding, gain_matrix

SIGNS, CERTAIN = {"gain": 1, "loss": -1}, (True, False)


def gains(cells, **more):
    "Rows of a gain table: (sign, clear, corrected p)."
    rows = []
    for i, (sign, clear, p) in enumerate(cells):
        value, far = sign * (10.0 + i), 5.0 if clear else 15.0 + i
        rows.append(
            dict(
                task=f"task_{i}", backbone="net.made", strategy="full", n_train=8, metric="dice", direction=1,
                versus="scratch", rpg=value, low=value - far, high=value + far, change=value / 100,
                change_low=(value - far) / 100, change_high=(value + far) / 100, p=p / 70, p_holm=p, n_seeds=3,
                n_cases=40, smallest=12.5, learned=True, reason="", note="",
            )
            | more
        )
    return pd.DataFrame(rows)


EVERY = [(s, c, p) for s, c, p in product((1, -1), CERTAIN, (0.014, 0.49))]


@pytest.mark.parametrize(("sign", "clear", "p"), EVERY)
def test_a_gain_in_words(sign, clear, p):
    said = gain_words(gains([(sign, clear, p)]).iloc[0], "Lead")
    assert said.startswith(f"Lead: task 0 with net.made, {'+' if sign > 0 else '−'}0.100 Dice against scratch")
    assert f"; {'+' if sign > 0 else '−'}10.0 %; " in said
    assert f"p = {p:g} over seeds and cases, corrected" in said and f"{p / 70:.2g}" not in said
    assert (
        "95 % interval "
        + {
            (1, True): "+0.050 to +0.150;", (1, False): "−0.050 to +0.250;", (-1, True): "−0.150 to −0.050;",
            (-1, False): "−0.250 to +0.050;",
        }[sign, clear]
        in said
    )


@pytest.mark.parametrize(("up", "down", "open_up", "open_down"), list(product((0, 1, 2), repeat=4))[1:])
def test_counts_of_gains_are_those_of_the_table(up, down, open_up, open_down):
    table = gains(
        [(1, True, 0.01)] * up
        + [(-1, True, 0.01)] * down
        + [(1, False, 0.5)] * open_up
        + [(-1, False, 0.5)] * open_down
    )
    n = len(table)
    counts, *named = gain_findings(table)
    verbs = {
        "gain": {1: "gains"}.get(up, "gain"), "lose": {1: "loses"}.get(down, "lose"),
        "are": {1: "is"}.get(n - up - down, "are"),
    }
    assert counts.startswith(
        f"Of {n} cell{'s' * (n > 1)}, {up} {verbs['gain']} and {down} {verbs['lose']} clearly (after correction); "
        f"{n - up - down} {verbs['are']} undecided."
    )
    assert counts.endswith("can change with the seed or the processor.") == (up + down == 0)
    leads = ["Largest gain"] * (up > 0) + ["Largest loss"] * (down > 0)
    # each cell is larger than the one before
    largest = [f"task {up - 1} with"] * (up > 0) + [f"task {up + down - 1} with"] * (down > 0)
    assert all(cell in s for s, cell in zip(named, largest, strict=True))
    assert len(named) == len(leads) and all(s.startswith(f"{lead}: ") for s, lead in zip(named, leads))
    lose = "; one clearly loses" if down == 1 else f"; {down} clearly lose" if down else ""
    assert gain_finding(table) == f"Pretraining clearly helps in {up} of {n} cells{lose}"
    assert [lead for _, lead in name_extremes(table)] == leads


def test_random_weights_are_no_pretraining_in_any_count():
    table = pd.concat([gains([(1, True, 0.01)]), gains([(-1, True, 0.01)], backbone="net.random")])
    assert gain_finding(table) == "Pretraining clearly helps in 1 of 1 cells" and gain_findings(table)[0].startswith(
        "Of 1 cell, 1 gains and 0 lose"
    )


def test_equal_gains_share_the_first_place():
    table = gains([(1, True, 0.01)] * 2).assign(rpg=10.0)
    assert [lead for _, lead in name_extremes(table)] == ["Largest gain, shared by 2 cells"]


def test_the_matrix_shows_what_the_table_says():
    none = gains([(1, True, 0.1)]).assign(task="none")
    none[["rpg", "low", "high", "change", "change_low", "change_high"]] = np.nan
    poor = gains([(1, True, 0.014)]).assign(task="poor", learned=False)
    table = pd.concat([gains(EVERY), none, poor], ignore_index=True)
    cells = gain_cells(table)
    # clear: the interval leaves out zero, and the corrected p-value is small; only this is coloured
    sure = [clear and p < 0.05 for _, clear, p in EVERY]
    assert cells.clear.tolist() == [*sure, False, False]
    signs = [("gain" if s > 0 else "loss") if ok else "none" for (s, *_), ok in zip(EVERY, sure)]
    assert cells.sign.tolist() == signs + ["none"] * 2
    # in the unit of the metric, the relative gain beside it
    assert cells["value"].tolist()[:8] == [f"+0.1{i}0" for i in range(4)] + [f"−0.1{i}0" for i in range(4, 8)]
    assert cells["value"].tolist()[8:] == ["missing", "not learned"]
    assert cells["relative"].tolist()[:5:4] == ["+10.0 %", "−14.0 %"]
    assert cells["interval"].tolist()[::9] == ["[+0.050, +0.150]", ""]
    chart = gain_matrix(table).to_dict()
    drawn = {r["task"]: r for r in next(iter(chart["datasets"].values()))}
    for row in cells.itertuples():
        assert {k: drawn[row.task.replace("_", " ")][k] for k in ("sign", "clear", "value")} == {
            "sign": row.sign, "clear": row.clear, "value": row.value}
    tiles, hatch, thin, bold, small = chart["layer"]
    assert small["encoding"]["text"]["field"] == "interval"
    colour = tiles["encoding"]["color"]["scale"]
    # green, purple, grey
    assert {k: v[:7] for k, v in zip(colour["domain"], colour["range"])} == {
        "gain": "#009E73", "loss": "#CC79A7", "none": "#8881"}
    assert bold["mark"]["fontWeight"] == "bold" and bold["transform"] == [{"filter": "datum.clear"}]
    assert thin["transform"] == [{"filter": "!datum.clear"}] and "fontWeight" not in thin["mark"]
    assert hatch["transform"] == [{"filter": "!datum.learned"}]
    assert {r["p_words"] for r in drawn.values()} == {"0.014", "0.49", "0.1"}  # the corrected ones
    places = [r["href"] for r in drawn.values()]
    assert len(set(places)) == len(places) and all(p.startswith("#cell-") for p in places)


def contrasts(cells):
    "Rows of a contrast table: (sign, clear, corrected p)."
    rows = [
        dict(
            contrast="c", first=0.6, second=0.5, difference=s * 0.1, low=s * 0.1 - (0.05 if clear else 0.2),
            high=s * 0.1 + (0.05 if clear else 0.2), p=p / 70, p_holm=p, metric="dice", direction=1, n_seeds=3,
            n_cases=40, reason="", pretraining="made", network="net", tuning="full",
            smallest=0.15 if clear else 0.25,
        )
        for s, clear, p in cells
    ]
    return pd.DataFrame(rows)


def test_contrasts_in_words():
    said = contrast_words(contrasts([*EVERY, (1, True, 0.014)]), "one", "other")
    assert (
        "3 are better and 2 worse with a 95 % interval that excludes 0 (3 seeds, 40 test cases), 5 with p ≤ 0.05"
        in said
    )
    assert "One against other: +0.011 Dice on average over 9 cells (−0.100 to +0.100)" in said
    assert "in the others differences from +0.250 on would have been seen in 80 of 100 such studies" in said
    less = contrast_words(contrasts([(1, True, 0.014)]).assign(metric="hd95", direction=-1), "one", "other")
    assert (
        "+0.10 95 % Hausdorff distance (positive: less, which is better)" in less and "1 is better and 0 worse" in less
    )


@pytest.mark.parametrize(("sign", "clear", "p"), EVERY)
def test_an_axis_of_the_grid_needs_test_and_interval(sign, clear, p):
    counts, steps = axis_words(contrasts([(sign, clear, p)]), "pretraining", "dice")
    sure = clear and p <= 0.05
    assert (
        f"of 1 comparisons of Dice, {int(sure and sign > 0)} {'is' if sure and sign > 0 else 'are'} better and "
        f"{int(sure and sign < 0)} worse" in counts
    )
    assert f"made {'+' if sign > 0 else '−'}0.100" in steps


def crossing(rho, p, low, high, tested=True):
    # an interval and a test of its own, which must not be shown
    simple = Association(rho, rho - 0.9, rho + 0.9, 1 - p, 20, 0, True, 100, 0.5, tested)
    return CrossedAssociation(
        simple, low, high, p, 240, 0.6, MixedModel(1.0, np.nan, np.nan, np.nan, {}, 0, 20), 5, 5, {}, {}, "d2p and rpg"
    )


@pytest.mark.parametrize(("rho", "p", "out"), list(product((0.7, -0.7), (0.01, 0.2), CERTAIN)))
def test_an_association_needs_test_and_interval(rho, p, out):
    c = crossing(rho, p, *sorted((rho - np.sign(rho) * (0.3 if out else 0.9), rho + np.sign(rho) * 0.2)))
    shown = p <= 0.05 and out
    assert c.shown == shown and ("show an association, but not a cause" in crossed_verdict(c)) == shown == (
        "show neither" not in crossed_verdict(c)
    )
    more = "more" if rho > 0 else "less"
    assert alignment_title(c) == (
        f"Cells whose features moved further gained {more}"
        if shown
        else "No clear association of distance and gain over 20 cells"
    )
    said = crossed_words(c)
    assert (
        f"rank correlation {'+' if rho > 0 else '−'}0.70" in said
        and f"p = {p:g} from 240" in said
        and f"{1 - p:g}" not in said
    )


@pytest.mark.parametrize(("rho", "p"), list(product((0.7, -0.7), (0.01, 0.2))))
def test_one_rank_correlation_in_words(rho, p):
    a = Association(rho, -0.9, 0.9, p, 20, 0, True, 100, 0.5, True)
    said = association_words(a)
    assert (
        (f"{'more' if rho > 0 else 'less'} gain goes with more distance" in said)
        == (p <= 0.05)
        == ("show neither" not in said)
    )
    assert "too few; not tested" in association_words(replace(a, tested=False, why="too few"))


@pytest.mark.parametrize(("sign", "clear", "p"), EVERY)
def test_objectives_in_words(sign, clear, p):
    low, high = sorted((sign * 0.2 - sign * (0.1 if clear else 0.3), sign * 0.2 + sign * 0.1))
    sure = "raises" if sign > 0 else "lowers"
    row = pd.DataFrame([
        dict(
            probe="AUC", objective="o", gain=sign * 0.2, low=low, high=high, n=3,
            verdict=sure if p <= 0.05 else "undecided",
        )
    ])
    said = backbone_verdict(row)
    assert (
        (f"{sure} AUC ({'+' if sign > 0 else '−'}0.200" in said)
        == (p <= 0.05)
        == ("shows no gain in 3 seeds" not in said)
    )
    weak = f"uncorrected intervals alone would suggest {'a rise' if sign > 0 else 'a fall'} of AUC"
    assert (weak in said) == (p > 0.05 and clear)


def predicted(cells):
    rows = [
        dict(
            predictor=f"score_{i}", layer="", counts=True, outcome="gain", tasks=3 + i, questions=3, backbones=4,
            cells=12, pairs=18, right=0.7, right_low=0.5, right_high=0.9, regret=1.0 + i, random=3.0,
            saved=s * (2.0 - 0.1 * i), saved_low=s * 2 - (0.5 if clear else 4),
            saved_high=s * 2 + (0.5 if clear else 4), tau=0.5, p=p / 70, p_holm=p, least_p=0.001, tested=True,
            missing=0, why="",
        )
        for i, (s, clear, p) in enumerate(cells)
    ]
    return pd.DataFrame(rows)


def test_scores_that_know_are_named_and_no_others():
    said = prediction_verdict(predicted(EVERY))
    assert "score 0 picked better than chance" in said and not any(f"score {i}" in said for i in range(1, 8))
    assert "of 8 early measures, used to pick the best of 4 backbones in 3 to 10 tasks" in said
    assert "none clearly picked better than chance" in prediction_verdict(
        predicted([c for c in EVERY if c != (1, True, 0.014)])
    )


def test_the_best_score_is_the_same_everywhere_also_in_a_tie():
    from vfm_notes.analysis.prediction import best_predictors
    table = predicted([(1, True, 0.014)] * 3)
    assert best_predictors(table).predictor.tolist() == ["score_0"] and "Equally good" not in prediction_finding(table)
    tied = table.assign(saved=[1.5, 1.5 + 1e-12, 1.0])
    assert best_predictors(tied).predictor.tolist() == ["score_0", "score_1"] and prediction_finding(tied).endswith(
        "Equally good: score 1."
    )
    # the first of the unclear ones is not named
    assert prediction_finding(predicted([(1, False, 0.5)] * 3)) == prediction_verdict(predicted([(1, False, 0.5)] * 3))


@pytest.mark.parametrize(("sign", "clear"), list(product((1, -1), CERTAIN)))
def test_convergence_in_words(sign, clear):
    sooner = sign * np.array([2.0, 3.0, 4.0]) if clear else sign * np.array([-2.0, 1.0, 4.0])
    cells = [
        dict(
            task=f"task_{i}", backbone="net.made", strategy="full", n_train=8, rule="rise", sooner=v,
            sooner_low=v - (1 if clear else 5), censored=int(late), n_seeds=2, budget=8.0, learned=True,
        )
        for i, (v, late) in enumerate(zip(sooner, (True, False, False)))
    ]
    said = convergence_finding(pd.DataFrame(cells))
    way = "sooner" if sign > 0 else "later"
    assert f"{'3.0' if clear else '1.0'} epochs {way} on average" in said
    assert ("no clear difference" in said) == (not clear)
    assert f"sooner in {int((sooner > 0).sum())} cells, later in {int((sooner < 0).sum())}" in said
    assert ("soonest in task 2 with net.made (+4.0 epochs)" in said) == (clear and sign > 0) == ("soonest" in said)
    assert "1 of 6 tuned runs did not get there within 8 epochs" in said
    alone = convergence_finding(pd.DataFrame(cells[:1]))
    assert "interval" not in alone and "no clear difference" in alone  # one cell has no interval and shows nothing


@pytest.mark.parametrize(
    ("taus", "same"), [((1.0, 1.0), (True, True)), ((1.0, -1.0), (True, False)), ((0.0, -1.0), (False, False))]
)
def test_a_search_in_words(taus, same):
    said = search_words(pd.DataFrame(dict(tau=taus, same_best=same)))
    assert f"in {sum(t == 1 for t in taus)} of 2 comparisons" in said and said.endswith(
        "never changes" if all(same) else f"changes in {2 - sum(same)} of 2"
    )
    assert f"mean Kendall's τ {'+' if np.mean(taus) >= 0 else '−'}{abs(np.mean(taus)):.2f}" in said


def test_an_interval_of_epochs_needs_no_signs():
    assert sooner_ends(-1.2, -0.1) == "0.1 to 1.2 later" and sooner_ends(0.1, 2) == "0.1 to 2.0 sooner"
    assert sooner_ends(-1, 2) == "1.0 later to 2.0 sooner" and sooner_ends(0, 2) == "0.0 to 2.0 sooner"
