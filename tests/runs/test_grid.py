"""The grid: ids never change, jobs and parameters are two views of the same specs, templates are checked."""
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_batch import write_template

from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import StudySpec, external_specs, load_study, pretrain_specs, run_id, run_specs
from vfm_notes.runs.grid import (
    check_template, check_templates, job_specs, known_records, parameter_names, parse_only, jobs_of, seed_choice,
    shard_jobs, run_states, template_parameters,
)
from vfm_notes.runs.locks import job_lock
from vfm_notes.runs.record import failed_record, new_record, write_record
from vfm_notes.runs.grid import count_states, job_state
from vfm_notes.runs.watch import job_status

WEIGHTS = {"mae_phantom": "profound_toy", "contrast_phantom": "provicnet_toy", "other": "profound_toy"}
BACKBONES = [f"{a}.{w}" for w, a in WEIGHTS.items()]


def study(**changes) -> StudySpec:
    base = dict(
        name="toy", title="t", cohort="phantom", size=(4, 8, 8), spacing=(4, 1.5, 1.5),
        cases=dict(pretrain=2, train=8, val=2, test=2), backbones=BACKBONES[:2],
        pretrain={w: {"backbone": a} for w, a in WEIGHTS.items()},
        tasks={"segmentation": {}, "translation": {"source": "t2w"}}, strategies=["scratch", "full"], seeds=[0, 1],
    )
    return StudySpec(**base | changes)


def some(values, least=1): return st.lists(st.sampled_from(values), min_size=least, max_size=len(values), unique=True)


axes = st.fixed_dictionaries({
    "tasks": some(["segmentation", "classification", "translation"]).map(lambda t: {k: {"x": len(k)} for k in t}),
    "backbones": some(BACKBONES), "strategies": some(["scratch", "full", "frozen"]), "seeds": some(list(range(6))),
    "n_train": some([1, 2, 4, 8], 0),
})


def ids(s): return {i for j in jobs_of(s) for i in j.runs}


@settings(max_examples=60, deadline=None)
@given(axes, axes)
def test_widening_keeps_old_ids(a, b):
    wide = {k: v | b[k] if isinstance(v, dict) else list(dict.fromkeys(v + b[k])) for k, v in a.items()}
    if not a["n_train"]: wide["n_train"] = []  # an empty list means one default size, which a list would replace
    assert ids(study(**a)) <= ids(study(**wide))


@settings(max_examples=60, deadline=None)
@given(axes)
def test_a_plan_covers_the_grid_once_and_in_order(a):
    s = study(**a)
    jobs = jobs_of(s)
    runs = [i for j in jobs for i in j.runs]
    assert len(set(runs)) == len(runs) and len({j.name for j in jobs}) == len(jobs)
    assert {run_id(r) for r in run_specs(s)} == {i for j in jobs if j.kind == "transfer" for i in j.runs}
    assert {run_id(r) for r in pretrain_specs(s)} == {i for j in jobs if j.kind == "pretrain" for i in j.runs}
    seen = set()
    for j in jobs:
        assert set(j.needs) <= seen and (j.kind != "pretrain" or not j.needs)
        seen.add(j.name)
        parents = {x.parent for x in j.specs if getattr(x, "parent", "")}
        assert parents == {i for k in jobs if k.name in j.needs for i in k.runs if k.kind == "pretrain"}


@settings(max_examples=60, deadline=None)
@given(axes)
def test_parameters_say_the_same_as_specs(a):
    for j in jobs_of(study(**a)):
        values = json.loads(json.dumps(j.parameters))  # what a notebook can be given
        assert values == j.parameters and sorted(values) == sorted(parameter_names(j.kind))
        assert [run_id(x) for x in job_specs(j.kind, **values)] == list(j.runs)


@settings(max_examples=40, deadline=None)
@given(axes, st.data())
def test_only_chooses_what_it_names_and_what_that_needs(a, data):
    s = study(**a)
    run = data.draw(st.sampled_from(run_specs(s)))
    jobs = jobs_of(
        s,
        [f"task={run.task},backbone={run.backbone}", f"strategy={run.strategy},seed={run.seed},n_train={run.n_train}"],
    )
    assert [j.runs for j in jobs if j.kind == "transfer"] == [(run_id(run),)]
    assert [j.runs for j in jobs if j.kind == "pretrain"] == ([(run.parent,)] if run.parent else [])


def test_only_by_kind():
    assert {j.kind for j in jobs_of(study(), "kind=pretrain")} == {"pretrain"} and len(
        jobs_of(study(), "kind=pretrain,backbone=profound_toy.mae_phantom")
    ) == 1
    assert parse_only(["seed=0", "seed=1"], study()) == {"seed": {"0", "1"}}


@pytest.mark.parametrize(
    "only, said",
    [
        ("task=segmentatoin", "Did you mean 'segmentation'"),
        ("backbone=profound_toy", "Did you mean 'profound_toy.mae_phantom'"), ("sed=1", "Did you mean 'seed'"),
        ("seed=9", "has no seed '9'"), ("segmentation", "expected key=value"), ("strategy=", "has no strategy ''"),
    ],
)
def test_a_wrong_choice_is_one_sentence(only, said):
    with pytest.raises(VfmError, match=said) as e: jobs_of(study(), only)
    assert "\n" not in str(e.value)


def test_an_external_cohort_waits_for_the_tuned_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("VFM_DATA", raising=False)
    s = study(external={"cohort": "prostate_cases", "task": "segmentation"})
    jobs = jobs_of(s)
    last = [j for j in jobs if j.kind == "external"]
    assert len(last) == 2 and all("VFM_DATA" in j.skipped for j in last)
    for j in last: assert {i for k in jobs if k.name in j.needs for i in k.runs} == set(j.specs[0].parents)
    assert not [j for j in jobs_of(s, "seed=0") if j.kind == "external"] and [
        j for j in jobs_of(s, "task=segmentation") if j.kind == "external"
    ]


def test_states(runs_root, monkeypatch):
    monkeypatch.delenv("VFM_DATA", raising=False)
    def stands(job, queued=""):
        states = job_status("toy", job, known_records("toy"), queued).states
        return job_state(states.values()), count_states(states.values())
    job = jobs_of(study(), "task=segmentation,backbone=profound_toy.mae_phantom")[-1]
    assert stands(job) == ("missing", "4 missing") and stands(job, "pending") == ("queued", "4 queued")
    for spec in job.specs[:-1]: write_record(run_folder("toy", run_id(spec)), new_record(spec, "toy"))
    assert stands(job) == ("missing", "3 done, 1 missing")
    with job_lock("toy", job.name): assert stands(job, "pending") == ("running", "3 done, 1 running")
    write_record(run_folder("toy", job.runs[-1]), failed_record(job.specs[-1], "toy", ValueError("no")))
    assert stands(job) == ("failed", "3 done, 1 failed") and list(run_states(job, known_records("toy")).values()) == [
        "done"
    ] * 3 + ["failed"]
    write_record(run_folder("toy", job.runs[-1]), new_record(job.specs[-1], "toy"))
    assert stands(job) == ("done", "4 done")
    changed = jobs_of(replace(study(), size=(4, 8, 16)), "task=segmentation,backbone=profound_toy.mae_phantom")[-1]
    assert stands(changed) == ("missing", "4 missing")  # same job, other spec: old records are never taken for new ones
    outside = [j for j in jobs_of(load_study("phantom")) if j.kind == "external"][0]
    assert stands(outside) == ("skipped", "1 skipped") and stands(outside, "pending") == ("queued", "1 queued")


def test_templates_are_checked_in_both_directions(tmp_path):
    jobs, names = jobs_of(study(), templates=tmp_path), parameter_names("transfer")
    write_template(tmp_path/"pretrain.ipynb", "pretrain")
    with pytest.raises(VfmError, match="transfer.ipynb does not exist"): check_templates(jobs)
    write_template(tmp_path/"transfer.ipynb", "transfer")
    check_templates(jobs)
    write_template(tmp_path/"transfer.ipynb", "transfer", [n for n in names if n != "options"])
    with pytest.raises(VfmError, match="no parameter 'options', which job .*-n8 passes") as e: check_templates(jobs)
    assert "transfer.ipynb" in str(e.value) and "\n" not in str(e.value)
    write_template(tmp_path/"transfer.ipynb", "transfer", [*names, "optoins"])
    with pytest.raises(VfmError, match="parameter 'optoins' that no transfer job passes"): check_templates(jobs)
    write_template(tmp_path/"transfer.ipynb", "transfer", [*(n for n in names if n != "options"), "optoins"])
    with pytest.raises(VfmError, match="no parameter 'options'.*Did you mean 'optoins'"): check_templates(jobs)


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "no json", '{"cells": []}',
        '{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "a = ("}]}',
    ],
)
def test_a_broken_template_is_one_sentence(tmp_path, text):
    (tmp_path/"t.ipynb").write_text(text)
    with pytest.raises(VfmError, match="t.ipynb") as e: template_parameters(tmp_path/"t.ipynb")
    assert "\n" not in str(e.value)


def test_the_projects_own_templates_fit():
    for name in ("phantom", "hippocampus"):
        for job in jobs_of(load_study(name)): check_template(job)


@given(st.integers(1, 7), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_shards_are_a_partition_and_bring_what_they_need(n, seeds):
    jobs = jobs_of(study(seeds=list(range(seeds))))
    parts = [shard_jobs(jobs, f"{i}/{n}") for i in range(1, n + 1)]
    transfers = [j.name for p in parts for j in p if j.kind == "transfer"]
    assert sorted(transfers) == sorted(j.name for j in jobs if j.kind == "transfer")
    for part in parts: assert {name for j in part for name in j.needs} <= {j.name for j in part}


def test_seeds_and_shards_are_read_strictly():
    assert seed_choice("0-2, 7") == ["seed=0", "seed=1", "seed=2", "seed=7"] and seed_choice(None) == []
    for text in ("a", "3-1", "-2"):
        with pytest.raises(VfmError, match="--seeds"): seed_choice(text)
    for text in ("0/4", "5/4", "2", "a/b"):
        with pytest.raises(VfmError, match="--shard"): shard_jobs([], text)


def test_only_backbones_that_have_runs_of_the_task_are_tried_elsewhere():
    study = replace(
        load_study("phantom"), leave_out=[{"backbone": "profound_toy.drawn", "task": "segmentation"}],
        external={"cohort": "prostate_cases", "task": "segmentation"},
    )
    tried = [s.backbone for s in external_specs(study)]
    assert set(study.backbones) - set(tried) == {"profound_toy.drawn"} and all(s.parents for s in external_specs(study))
