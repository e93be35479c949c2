"""Cross-validation: who is dealt where, what a run of a fold sees, and statistics over all tested cases."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import cohen_kappa_score, roc_auc_score

import vfm_notes.tune.catalog
from made_cases import message
from vfm_notes.analysis.gain import gain_table
from vfm_notes.analysis.tables import load_tables
from vfm_notes.data.cohort import deal_folds, fold_cohort, phantom_cohort
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import load_study, run_id, run_specs, RunSpec
from vfm_notes.runs.grid import jobs_of
from vfm_notes.runs.record import new_record, write_record


@pytest.mark.parametrize("k", [2, 3, 5])
def test_folds_are_even_by_patient_and_by_grade(k):
    rng = np.random.default_rng(0)
    patients = [f"p{i}" for i in rng.integers(0, 40, 90)]
    grade = [hash(p) % 3 for p in map(lambda p: int(p[1:]), patients)]
    part = np.array(deal_folds(patients, grade, k, 0))
    assert set(part) == set(range(k))
    for p in set(patients): assert len({part[i] for i, q in enumerate(patients) if q == p}) == 1
    assert np.ptp(np.bincount(part)) <= 6
    for g in range(3): assert np.ptp(np.bincount(part[np.array(grade) == g], minlength=k)) <= 5
    assert part.tolist() == deal_folds(patients, grade, k, 0) != deal_folds(patients, grade, k, 1)
    assert "request fewer" in message(deal_folds, ["a", "b"], [0, 0], 3, 0)


def test_every_case_is_tested_once():
    cohort = phantom_cohort((4, 16, 16), (4.0, 4.0, 4.0), {"pretrain": 3, "train": 10, "val": 4, "test": 6}, 0)
    cohort.patients = [*cohort.names[:3], *[cohort.names[3]] * 6, *cohort.names[9:]]  # one patient with six cases
    tested = []
    for fold in range(4):
        of = fold_cohort(cohort, 4, fold, 0.25)
        home = dict(zip(of.names, of.split))
        assert [n for n, s in home.items() if s == "pretrain"] == cohort.names[:3] and len(home) == 23
        assert len({home[n] for n in cohort.names[3:9]}) == 1
        assert {"train", "val", "test"} <= set(of.split)
        tested += of.subset("test").names
        at = of.names.index(cohort.names[12])
        assert np.array_equal(of.volumes[at], cohort.volumes[12]) and of.hash() != cohort.hash()
    assert sorted(tested) == sorted(cohort.names[3:])


def test_a_study_with_folds_and_one_without(tmp_path, runs_root):
    study = dict(name="cv", title="made", cohort="phantom", size=[4, 16, 16], spacing=[4.0, 4.0, 4.0],
                 cases={"pretrain": 0, "train": 8, "val": 2, "test": 2}, backbones=["profound_toy.random"],
                 tasks={"segmentation": {}}, strategies=["scratch"], seeds=[0, 1])
    def read(**changes):
        (tmp_path/"cv.yaml").write_text(yaml.safe_dump(study | changes))
        return load_study(tmp_path/"cv.yaml")
    specs = run_specs(read(folds=3))
    assert [(s.seed, s.fold) for s in specs] == [(s, f) for s in (0, 1) for f in range(3)]
    assert len({run_id(s) for s in specs}) == 6 and all(f"-f{s.fold}-" in run_id(s) for s in specs)
    assert [j.name[-3:] for j in jobs_of(read(folds=3))] == ["-f0", "-f1", "-f2"]
    assert all(s.n_train == 0 for s in specs)
    assert run_id(RunSpec()) == run_id(replace(RunSpec(), fold=0)) != run_id(replace(RunSpec(), folds=3))
    assert "expected 0 (none) or at least 2" in message(read, folds=1)
    assert "needs validation cases" in message(read, folds=3, cases=study["cases"] | {"val": 0})


@pytest.fixture
def answers(tmp_path, runs_root):
    "Records of a cross-validation of grades, made up: two strategies, one of them better."
    values = dict(name="cv", title="made", cohort="phantom", size=[4, 16, 16], spacing=[4.0, 4.0, 4.0],
                  cases={"pretrain": 0, "train": 20, "val": 5, "test": 5}, backbones=["profound_toy.mae"],
                  pretrain={"mae": {"backbone": "profound_toy"}}, tasks={"classification": {"positive": 1}},
                  strategies=["scratch", "full"], seeds=[0, 1], folds=3)
    (tmp_path/"cv.yaml").write_text(yaml.safe_dump(values))
    study, rng, kept = load_study(tmp_path/"cv.yaml"), np.random.default_rng(0), {}
    for spec in run_specs(study):
        rows = []
        for i in range(10):
            label, name = (i * 7 + spec.fold) % 3, f"c{10 * spec.fold + i}"
            score = rng.dirichlet(np.ones(3)) * 0.5 + np.eye(3)[label] * (0.3 if spec.strategy == "full" else 0.05)
            score = score / score.sum()
            kept.setdefault((spec.strategy, spec.seed), []).append((label, score))
            values = {"label": label, "accuracy": score.argmax() == label} | {f"score_{k}": score[k] for k in range(3)}
            for m, v in values.items():
                rows += [{"case": name, "patient": name, "metric": m, "value": float(v)},
                         {"case": name, "patient": name, "metric": f"control_{m}", "value": float(v)}]
        write_record(run_folder("cv", run_id(spec)), new_record(
            spec, "cv", metrics={"auc": 0.5, "kappa": 0.5}, primary="auc", directions={"auc": 1, "kappa": 1},
            controls={"auc": 0.5, "kappa": 0.1}, n={"train": 16, "val": 4, "test": 10},
            cost={"seconds": {"total": 3.0, "training": 2.0, "waiting": 0.1, "per_epoch": [1.0]}},
            d2p=[{"layer": "embed", "mmd2": 0.1 * (spec.fold + 1), "p_value": 0.01, "n": 10}],
        ), [{"epoch": e, "seconds": 1.0 * e, "name": "val_auc", "value": 0.5 + 0.1 * spec.fold} for e in (0, 1)], rows)
    return study, kept


def test_statistics_are_those_of_all_tested_cases_together(answers):
    study, kept = answers
    tables = load_tables(study)
    assert len(tables.runs) == 4 and set(tables.runs.seed) == {0, 1} and set(map(len, tables.folds.values())) == {3}
    for (strategy, seed), cases in kept.items():
        label, score = np.array([c[0] for c in cases]), np.array([c[1] for c in cases])
        own = tables.runs[(tables.runs.strategy == strategy) & (tables.runs.seed == seed)].iloc[0]
        assert own["value"] == pytest.approx(roc_auc_score(label >= 1, score[:, 1:].sum(1)))
        wanted = cohen_kappa_score(label, score.argmax(1), weights="quadratic")
        assert tables.metrics[(tables.metrics.id == own.id) & (tables.metrics.metric == "kappa")][
            "value"].item() == pytest.approx(wanted)
        assert tables.cases[tables.cases.id == own.id].case.nunique() == 30 and own.cases_test == 30
        assert own.seconds_total == 9 and tables.d2p[tables.d2p.id == own.id].mmd2.item() == pytest.approx(0.2)
        assert tables.curves[tables.curves.id == own.id]["value"].tolist() == pytest.approx([0.6, 0.6])
    row = gain_table(tables, "auc", "scratch").query("strategy == 'full'").iloc[0]
    both = [np.mean([roc_auc_score([c[0] >= 1 for c in kept[s, k]], [c[1][1:].sum() for c in kept[s, k]])
                     for k in (0, 1)]) for s in ("full", "scratch")]
    assert row.tuned == pytest.approx(both[0]) and row.reference == pytest.approx(both[1]) and row.n_cases == 30


def cli(*words):
    from typer.testing import CliRunner
    from vfm_notes.report.cli import app
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_tables_have_the_folds_and_the_statistics_over_all_tested_cases(answers, tmp_path, monkeypatch):
    "AUC by scikit-learn over the 30 cases of a seed; a fold's own row keeps its own."
    _, kept = answers
    monkeypatch.chdir(tmp_path)
    pooled = {k: roc_auc_score([c[0] >= 1 for c in v], [c[1][1:].sum() for c in v]) for k, v in kept.items()}
    shown = cli("table", "cv.yaml")
    assert shown.startswith("3-fold cross-validation: every case is tested once")
    of = next(l for l in shown.splitlines() if l.startswith("profound_toy.mae full"))
    assert f" 2      {np.mean([pooled['full', k] for k in (0, 1)]):.3f} [" in of
    for words in ((), ("--long",)):
        cli("table", "cv.yaml", "-o", "t.csv", *words)
        table = pd.read_csv("t.csv", dtype={"fold": str})
        table = table[table.metric == "auc"]
        assert table.fold.value_counts().to_dict() == {"0": 4, "1": 4, "2": 4, "all": 4}
        for row in table[table.fold == "all"].itertuples():
            assert row.value == pytest.approx(pooled[row.strategy, row.seed]) and "-pooled-" in row.id
        assert (table[table.fold != "all"].value == 0.5).all()
    cells = json.loads(cli("table", "cv.yaml", "--json"))["cells"]
    assert [c["n_cases"] for c in cells] == [30, 30]
    cli("table", "cv.yaml", "-o", "t.tex")
    assert r"\caption{made (3-fold cross-validation:" in (tmp_path/"t.tex").read_text(encoding="utf-8")
    lines = cli("table", "cv.yaml", "--long").splitlines()
    assert sum(l.endswith(" all") and "-pooled-" in l for l in lines) == 4 and len(lines) == 1 + 12 + 4


def test_a_plan_counts_every_case_of_a_cross_validation(answers, tmp_path, monkeypatch):
    from vfm_notes.analysis.power import tested_cases, with_tested
    study, _ = answers
    monkeypatch.chdir(tmp_path)
    assert "2 seeds, 30 test cases, each tested once in 3 folds." in cli("plan", "cv.yaml")
    assert json.loads(cli("plan", "cv.yaml", "--json"))["cases"] == 30
    more = with_tested(study, 90)
    assert tested_cases(more) == 90 and more.cases == {"pretrain": 0, "train": 60, "val": 15, "test": 15}
    assert with_tested(replace(study, folds=0), 90).cases == study.cases | {"test": 90}


def test_a_cross_validation_that_lacks_a_fold_is_not_there_yet(answers):
    import shutil
    study, _ = answers
    gone = next(s for s in run_specs(study) if (s.strategy, s.seed, s.fold) == ("full", 1, 2))
    shutil.rmtree(run_folder("cv", run_id(gone)))
    runs = load_tables(study).runs
    assert sorted(zip(runs.strategy, runs.seed)) == [("full", 0), ("scratch", 0), ("scratch", 1)]
