"""What a study can see: formulas against simulated studies that are judged as real ones are."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from vfm_notes.analysis.crossed import two_way, two_way_test
from vfm_notes.analysis.gain import Means, Pair, difference_interval
from vfm_notes.analysis.interval import Squares, half_width, smallest_shift
from vfm_notes.analysis.power import (
    Variances, crossed_cells, fewest, gains_seen, plan, plan_lines, smallest_effect, smallest_rho, study_variances,
)
from vfm_notes.analysis.tables import Tables, load_tables
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import StudySpec, load_study, run_id, run_specs
from vfm_notes.report import cli
from vfm_notes.runs.record import new_record, write_record


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


def test_a_correlation_over_a_table_with_holes_is_shown_in_about_four_of_five_studies():
    "Eight backbones, of which three were tuned on one task only: what they add is little."
    tasks, backbones = 5, 8
    whole = [(t, b) for t in range(tasks) for b in range(backbones) if b < 5 or t == b % tasks]
    t, b = np.array(whole).T
    r, shown, rho = np.random.default_rng(0), 0, smallest_rho(tasks, backbones, len(whole) / tasks / backbones)
    assert rho == pytest.approx(smallest_rho(5, 5)) and rho > smallest_rho(5, 8)
    for i in range(120):
        x = r.normal(size=len(t))
        y = rho * x + np.sqrt(1 - rho**2) * r.normal(size=len(t))
        p, _, _ = two_way_test(x, y, t, b, np.zeros(len(t)), 200, i)
        low, high = two_way(x, y, t, b, 200, i)
        shown += p <= 0.05 and (low > 0 or high < 0)
    assert 0.65 <= shown / 120 <= 0.95, shown / 120


# --- variances of finished studies

def simulated(sds, cells=80, seeds=4, cases=30, seed=0) -> Tables:
    "Records of cells whose difference to scratch varies as told; both runs share what is hard in a case."
    r, runs, rows = np.random.default_rng(seed), [], []
    for k in range(cells):
        hard, moved = r.normal(0, 2, cases), r.normal(0, sds[1], cases)
        for s in range(seeds):
            level, shift = r.normal(0, 1), r.normal(0, sds[0])
            scratch = 25 + hard + level
            tuned = scratch + 0.3 + shift + moved + r.normal(0, sds[2], cases)
            for name, value in (("scratch", scratch), ("full", tuned)):
                key = dict(id=f"{name}{k}{s}", task="t", backbone=f"net.w{k}", strategy=name, n_train=8, seed=s)
                runs.append(key | dict(kind="transfer", status="done", metric="psnr", value=value.mean(), direction=1,
                                       primary=True, positive=None, expected=""))
                rows += [key | dict(case=f"c{i}", patient=f"c{i}", metric="psnr", value=v) for i, v in enumerate(value)]
    return Tables("s", pd.DataFrame(runs), pd.DataFrame(runs), pd.DataFrame(rows), pd.DataFrame(), pd.DataFrame())


@pytest.mark.parametrize("sds", [(0.5, 1.0, 0.3), (0.1, 0.4, 1.0), (0.0, 0.5, 0.8)])
def test_variances_that_were_put_there_come_out(sds):
    found = study_variances(simulated(sds))["t"]
    assert (found.metric, found.cells) == ("psnr", 80)
    assert (found.seed, found.case, found.rest) == pytest.approx(sds, rel=0.12, abs=0.06)


def mean_squares_by_regression(d):
    "Sums of squares of two-way tables by least squares on dummy columns, one model after the other."
    s, c = d.shape
    y, seed, case = d.ravel(), np.repeat(np.arange(s), c), np.tile(np.arange(c), s)
    one = np.ones((len(y), 1))
    S, C = (seed[:, None] == np.arange(1, s)) * 1.0, (case[:, None] == np.arange(1, c)) * 1.0
    left = lambda *x: float(((y - (m := np.hstack(x)) @ np.linalg.lstsq(m, y, rcond=None)[0]) ** 2).sum())
    rest = left(one, S, C)
    return (left(one, C) - rest) / (s - 1), (left(one, S) - rest) / (c - 1), rest / (s - 1) / (c - 1)


def expected_variances(squares, s, c):
    a, b, e = np.mean(squares, axis=0)
    return [np.sqrt(max(0, v)) for v in ((a - e) / c, (b - e) / s, e)]


STUDY = {
    "name": "finished", "title": "A small finished study", "cohort": "phantom", "size": [4, 32, 32],
    "spacing": [8.0, 3.0, 3.0], "cases": {"pretrain": 0, "train": 12, "val": 4, "test": 10}, "n_train": [6],
    "backbones": ["profound_toy.random"], "tasks": {"segmentation": {"head": "linear"}, "classification": {}},
    "strategies": ["full", "decoder"], "seeds": [0, 1, 2], "budget": {"epochs": 1, "batch_size": 3},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A study whose runs were really trained, three seeds each."
    import vfm_notes.tune.catalog
    from vfm_notes.tune.transfer import transfer
    root = tmp_path_factory.mktemp("finished")
    (root/"finished.yaml").write_text(yaml.safe_dump(STUDY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFM_RUNS", str(root/"runs"))
        study = load_study(str(root/"finished.yaml"))
        for spec in run_specs(study):
            made = transfer(spec)
            kept = ("metrics", "primary", "controls", "directions", "units", "d2p", "n", "cost")
            summary = {k: made.summary[k] for k in kept}
            write_record(run_folder(study.name, run_id(spec)), new_record(spec, study.name, **summary),
                         made.curves.to_dict("records"), made.cases.to_dict("records"))
        yield root, study


def test_variances_of_a_study_that_was_run(finished):
    "Against regression on what the case files hold, and for the AUC on scikit-learn's with each case left out."
    _, study = finished
    tables = load_tables(study)
    found, cases = study_variances(tables), tables.cases
    assert set(found) == {"segmentation", "classification"} and all(v.cells == 1 for v in found.values())
    ids = {(r.task, r.strategy, r.seed): r.id for r in tables.done().itertuples()}
    def column(task, strategy, seed, metric):
        own = cases[(cases.id == ids[task, strategy, seed]) & (cases.metric == metric)]
        return own.set_index("case")["value"].sort_index()
    d = np.stack([
        column("segmentation", "random", s, "dice") - column("segmentation", "scratch", s, "dice") for s in range(3)
    ])
    one = found["segmentation"]
    assert [one.seed, one.case, one.rest] == pytest.approx(expected_variances([mean_squares_by_regression(d)], 3, 10))
    def carried(strategy, seed):
        label = column("classification", strategy, seed, "label").to_numpy()
        score = column("classification", strategy, seed, f"score_{2}").to_numpy()
        auc = lambda keep: roc_auc_score(label[keep] == 2, score[keep])
        every = np.ones(10, bool)
        return np.array([10 * auc(every) - 9 * auc(np.arange(10) != i) for i in range(10)])
    d = np.stack([carried("random", s) - carried("scratch", s) for s in range(3)])
    one = found["classification"]
    assert [one.seed, one.case, one.rest] == pytest.approx(expected_variances([mean_squares_by_regression(d)], 3, 10))


def test_the_plan_of_a_finished_study_uses_its_variances_and_says_so(finished, monkeypatch):
    root, study = finished
    monkeypatch.setenv("VFM_RUNS", str(root/"runs"))
    said = CliRunner().invoke(cli.app, ["plan", str(root/"finished.yaml")])
    assert said.exit_code == 0, said.output
    assert "finished runs of this study (1 cell a task)" in said.output and "tried on the phantom" not in said.output
    monkeypatch.setenv("VFM_RUNS", str(root/"none"))
    before = CliRunner().invoke(cli.app, ["plan", str(root/"finished.yaml")]).output
    assert "tried on the phantom" in before and before.splitlines()[2:4] != said.output.splitlines()[2:4]


def test_a_plan_as_a_picture_and_as_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_RUNS", str(tmp_path))
    for name, start in (("plan.png", b"\x89PNG"), ("plan.html", b"<!DOCTYPE html>")):
        made = CliRunner().invoke(cli.app, ["plan", "phantom", "--gain", "dice=4", "-o", str(tmp_path/name)])
        assert made.exit_code == 0, made.output
        assert (tmp_path/name).read_bytes().startswith(start)
    page = (tmp_path/"plan.html").read_text()
    assert "Dice points" in page and "https://" not in page.split("<pre>")[1].split("</pre>")[0]
    refused = CliRunner().invoke(cli.app, ["plan", "phantom", "-o", str(tmp_path/"plan.pdf")])
    assert refused.exit_code != 0 and ".html or .png" in str(refused.exception)


def test_hours_are_those_of_the_runs_that_more_takes():
    study = StudySpec(**STUDY | {"seeds": [0, 1], "backbones": ["profound_toy.random", "profound_toy.a"],
                                 "pretrain": {"a": {"backbone": "profound_toy"}}})
    made = plan(study, {"segmentation": "dice", "classification": "auc"}, {
        "segmentation": Variances("dice", 0.02, 0.09, 0.0, cells=3),
    }, gains={"dice": 20.0})
    row = made.rows[0]
    one = plan(replace(study, seeds=[0]), {}).hours
    pretraining = 2 * one - made.hours
    each = (made.hours - pretraining) / 2
    assert row["seeds_hours"] == pytest.approx(pretraining + row["seeds_needed"] * each)
    assert crossed_cells(study) == (2, 1, 1.0)
    assert "finished runs of this study (3 cells a task)" in "\n".join(plan_lines(made))


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
    study = STUDY | {"backbones": ["profound_toy.a", "provicnet_toy.a"],
                     "pretrain": {"a": {"backbone": ["profound_toy", "provicnet_toy"]}}}
    (tmp_path/"few.yaml").write_text(yaml.safe_dump(study))
    few = CliRunner().invoke(cli.app, ["plan", str(tmp_path/"few.yaml")]).output
    assert "2 backbones" in few and "no correlation" in few
    assert "For |rho| = 0.57: more tasks and more backbones." in few  # neither alone suffices
    tasks = len(study["tasks"])
    assert not any(smallest_rho(tasks, b) <= 0.57 or smallest_rho(b, 2) <= 0.57 for b in (2, 5, 10, 20, 40))
    plain = json.loads(CliRunner().invoke(cli.app, ["plan", "phantom", "--json"]).output)
    assert plain["seeds"] == 3 and 0 < plain["rho"] < 1
    assert {r["metric"] for r in plain["rows"]} == {"auc", "dice", "psnr"}


# --- the interval behind it

@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_intervals_hold_in_93_to_97_of_100_studies(seeds):
    "Ten settings of variances, true mean zero: what does not hold is a false positive; six percent are allowed."
    studies, cases, r = 6000, 40, np.random.default_rng(seeds)
    for rest in (0.3, 1.0):
        for ratio in (0, 0.3, 1, 4, 25):
            d = (
                np.sqrt(2 * ratio / cases) * r.normal(size=(studies, seeds, 1)) + r.normal(size=(studies, 1, cases))
                + rest * r.normal(size=(studies, seeds, cases))
            )
            rows, columns, mean = d.mean(2), d.mean(1), d.mean((1, 2))
            left = d - rows[:, :, None] - columns[:, None] + mean[:, None, None]
            ms = cases * rows.var(1, ddof=1), seeds * columns.var(1, ddof=1), (left**2).sum((1, 2)) / (seeds - 1) / 39
            held = np.mean([
                abs(m) <= half_width(Squares(*map(float, each), seeds, cases))
                for m, each in zip(mean, np.transpose(ms))
            ])
            assert 0.935 <= held <= 0.975, (rest, ratio, held)  # 94 to 97 % and what 6000 draws may miss
