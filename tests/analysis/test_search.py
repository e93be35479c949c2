"""A small search: ordinary runs, the same grid for everybody, chosen on validation scores alone."""
from dataclasses import replace

import numpy as np
import pytest

from vfm_notes.analysis.gain import gain_table
from vfm_notes.analysis.tables import search_candidates, curves_table, load_tables, runs_table
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import Budget, StudySpec, run_id, run_specs
from vfm_notes.runs.grid import jobs_of
from vfm_notes.runs.record import failed_record, new_record, read_records, write_record

RATES = [0.0005, 0.001, 0.002]
STUDY = dict(
    name="s", title="s", cohort="phantom", size=(4, 32, 32), spacing=(4, 1.5, 1.5),
    cases=dict(pretrain=0, train=8, val=4, test=6), backbones=["a.x", "b.y"],
    tasks={"segmentation": {}, "super_resolution": {}}, strategies=["scratch", "full"], seeds=[0, 1],
    budget=Budget(epochs=3), search={"lr": RATES},
)
DIRECTION = {"dice": 1, "mae": -1}


@pytest.fixture(autouse=True)
def runs_root(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_RUNS", str(tmp_path))
    return tmp_path


def write(spec, validation, test, metric="dice", study="s"):
    "One finished run whose validation curve ends in `validation`."
    curves = [{"epoch": e, "seconds": float(e), "name": f"val_{metric}", "value": v} for e, v in enumerate(validation)]
    record = new_record(
        spec, study, metrics={metric: test}, primary=metric, directions={metric: DIRECTION[metric]},
        controls={metric: 0.1}, cost={"seconds": {"total": 2.0}},
    )
    write_record(
        run_folder(study, run_id(spec)), record, curves,
        [{"case": f"c{i}", "patient": f"c{i}", "metric": metric, "value": test + 0.01 * i} for i in range(6)],
    )


def fill(study, rng, skip=()):
    "A whole study with random scores; returns what it wrote: spec, validation curve, test score."
    known = []
    for spec in run_specs(study):
        if spec in skip: continue
        metric = "dice" if spec.task == "segmentation" else "mae"
        known.append((spec, rng.random(4).tolist(), float(rng.random())))
        write(*known[-1], metric)
    return known


def brute(known, study):
    "The chosen rate of every cell, by looking at each."
    found = {}
    for task in study.tasks:
        for backbone in study.backbones:
            for strategy in study.strategies:
                sign = 1 if task == "segmentation" else -1
                means = {}
                for rate in RATES:
                    ends = [
                        curve[-1]
                        for spec, curve, _ in known
                        if (spec.task, spec.backbone, spec.strategy, spec.lr) == (task, backbone, strategy, rate)
                    ]
                    means[rate] = sign * sum(ends) / len(ends)
                found[task, backbone, strategy] = max(means, key=means.get)
    return found


def choice(tables):
    c = tables.search[tables.search.chosen]
    return {(r.task, r.backbone, r.strategy): r.lr for r in c.itertuples()}


# --- the grid ---

def test_every_backbone_gets_the_same_grid():
    specs = run_specs(StudySpec(**STUDY))
    assert len(specs) == 2 * 2 * 2 * 2 * 3 and len({run_id(s) for s in specs}) == len(specs)
    spent = {
        b: sorted(
            (s.task, s.strategy, s.seed, s.lr, s.epochs, s.batch_size, s.n_train) for s in specs if s.backbone == b
        )
        for b in STUDY["backbones"]
    }
    assert spent["a.x"] == spent["b.y"]


def test_points_of_the_grid_are_ordinary_runs():
    plain = run_specs(StudySpec(**STUDY | {"search": {}}))
    assert {run_id(s) for s in plain} <= {run_id(s) for s in run_specs(StudySpec(**STUDY))}
    two = StudySpec(
        **STUDY | {"search": {"lr": RATES, "weight_decay": [0.0, 0.05]}, "specialists": {"segmentation": "unet_3d"}}
    )
    jobs = jobs_of(two)
    assert len({j.name for j in jobs}) == len(jobs) and sum(len(j.specs) for j in jobs) == len(run_specs(two)) == 6 * (
        16 + 2
    )
    for job in jobs:
        assert {(s.lr, s.weight_decay) for s in job.specs} == {(job.parameters["lr"], job.parameters["weight_decay"])}
    assert [
        s.lr for j in jobs_of(two, "lr=0.001,seed=0,task=segmentation,backbone=a.x,strategy=full") for s in j.specs
    ] == [0.001, 0.001]


@pytest.mark.parametrize(
    "search, said",
    [
        ({"epochs": [4, 8]}, "key of search is 'epochs'"), ({"lr": [1e-3, 1e-3]}, "search.lr names 0.001 twice"),
        ({"lr": []}, "at least one"), ({"lr": 1e-3}, "expected a list"), ([1], "a mapping"),
        ({"lr": [1e-3, -1]}, r"search.lr\[1\] is -1, expected a number above 0"),
        ({"schedule": ["cosine", "linear"]}, r"search.schedule\[1\] is 'linear'"),
        ({"lr": [1, 2, 3, 4], "warmup": [0.1, 0.2, 0.3]}, "at most 9"), ({"leraning": [1, 2]}, "Did you mean 'lr'"),
    ],
)
def test_wrong_searches_are_told(search, said):
    with pytest.raises(VfmError, match=said): StudySpec(**STUDY | {"search": search})


def test_external_runs_do_not_go_with_a_search():
    with pytest.raises(VfmError, match="second study"):
        StudySpec(**STUDY, external={"cohort": "prostate_cases", "task": "segmentation"})


# --- the choice ---

@pytest.mark.parametrize("seed", range(3))
def test_the_choice_against_brute_force(seed):
    study = StudySpec(**STUDY)
    known = fill(study, np.random.default_rng(seed))
    tables = load_tables("s")
    assert choice(tables) == brute(known, study) and len(tables.search) == 24 and tables.search.chosen.sum() == 8
    assert len(tables.runs) == 48 and tables.runs.chosen.sum() == len(tables.done()) == 16
    for table in (tables.metrics, tables.cases, tables.curves): assert set(table.id) == set(tables.done().id)
    assert {
        (s.task, s.backbone, s.strategy): s.lr for s, _, _ in known if run_id(s) in set(tables.done().id)
    } == choice(tables)


def test_test_scores_are_never_looked_at():
    "Whatever the test scores are, the choice is the same."
    study, rng = StudySpec(**STUDY), np.random.default_rng(0)
    known = fill(study, rng)
    first = choice(load_tables("s"))
    for _ in range(3):
        shuffled = rng.permutation([t for _, _, t in known])
        for (spec, curve, _), test in zip(known, shuffled):
            write(spec, curve, float(test), "dice" if spec.task == "segmentation" else "mae")
        assert choice(load_tables("s")) == first
    runs = runs_table(read_records("s"))
    curves = curves_table("s")
    assert search_candidates(runs.assign(value=np.nan, control=np.nan), curves).equals(search_candidates(runs, curves))


def test_gains_compare_chosen_with_chosen():
    study = StudySpec(**STUDY)
    known = fill(study, np.random.default_rng(4))
    best = brute(known, study)
    for row in gain_table(load_tables("s")).itertuples():
        mean = lambda strategy: np.mean([
            t + 0.025
            for s, _, t in known
            if (s.task, s.backbone, s.strategy, s.lr)
            == (row.task, row.backbone, strategy, best[row.task, row.backbone, strategy])
        ])
        m, ref = mean("full"), mean("scratch")
        assert row.rpg == pytest.approx(100 * row.direction * (m - ref) / abs(ref))


def test_the_best_epoch_counts_where_its_weights_are_kept():
    study = StudySpec(
        **STUDY
        | {
            "tasks": {"segmentation": {}}, "strategies": ["full"], "backbones": ["a.x"],
            "budget": Budget(epochs=3, keep="best"),
        }
    )
    curves = {0.0005: [0.1, 0.2, 0.2, 0.3], 0.001: [0.1, 0.9, 0.2, 0.1], 0.002: [0.1, 0.2, np.nan, 0.4]}
    for spec in run_specs(study): write(spec, curves[spec.lr], 0.5)
    assert list(choice(load_tables("s")).values()) == [0.001]
    for spec in run_specs(study): write(replace(spec, keep="last"), curves[spec.lr], 0.5, study="last")
    assert list(choice(load_tables("last")).values()) == [0.002]


def test_a_failed_setting_cannot_win_and_a_hole_decides_nothing():
    study = StudySpec(**STUDY | {"tasks": {"segmentation": {}}, "strategies": ["full"]})
    specs = run_specs(study)
    for spec in specs:
        if spec.backbone == "b.y" and spec.lr == 0.001 and spec.seed == 1: continue  # a hole
        if spec.backbone == "a.x" and spec.lr == 0.002 and spec.seed == 0:
            write_record(run_folder("s", run_id(spec)), failed_record(spec, "s", RuntimeError("The loss became nan")))
        else: write(spec, [0.1, spec.lr * 100], 0.5)
    tables = load_tables("s")
    assert choice(tables) == {("segmentation", "a.x", "full"): 0.001} and set(tables.done().backbone) == {"a.x"}
    assert tables.search.set_index(["backbone", "lr"]).failed.to_dict()["a.x", 0.002] == 1
    write(next(s for s in specs if s.backbone == "b.y" and s.lr == 0.001 and s.seed == 1), [0.1, 0.1], 0.5)
    assert choice(load_tables("s"))["segmentation", "b.y", "full"] == 0.002


def test_a_tie_goes_to_the_first_of_the_grid():
    study = StudySpec(**STUDY | {"tasks": {"super_resolution": {}}, "strategies": ["full"], "backbones": ["a.x"]})
    for spec in run_specs(study): write(spec, [0.4, 0.3], 0.5, "mae")
    assert list(choice(load_tables("s")).values()) == [0.0005]


def test_without_a_search_everything_is_as_before():
    for spec in run_specs(StudySpec(**STUDY | {"search": {}})):
        write(spec, [0.1, 0.2], 0.5, "dice" if spec.task == "segmentation" else "mae")
    tables = load_tables("s")
    assert tables.search.empty and tables.runs.chosen.all() and len(tables.done()) == 16
