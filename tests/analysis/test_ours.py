"""Our results beside those of others: against records written by hand, and against what a spec says otherwise."""
import json

import numpy as np
import pytest
import yaml
from test_one_number import text_of
from test_result_commands import STUDY, two, values, vfm  # noqa: F401 (two is a fixture)

from vfm_notes.analysis import ours
from vfm_notes.foundation.places import report_notebooks
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import load_study, run_id, run_specs
from vfm_notes.report.pages import execute_pages, report_pages
from vfm_notes.report.result_commands import beside_bundle
from vfm_notes.runs.record import new_record, read_records, write_record

FIELDS = {"study", "title", "cohort", "date", "commit", "data", "weights", "asked", "cells"}


def kept(tmp_path, monkeypatch, bundle):
    "The file beside the pages, with this bundle alone."
    monkeypatch.setattr(ours, "report_notebooks", lambda: [tmp_path/"index.ipynb"])
    (tmp_path/ours.OUR_RESULTS).write_text(json.dumps({"rows": [bundle]}), encoding="utf-8")


def test_ours_stand_beside_yours_with_what_was_asked_otherwise(two, monkeypatch):
    theirs = json.loads(vfm("table", "b.yaml", "--json")) | {"study": "a", "commit": "0123456789abcdef"}
    kept(two, monkeypatch, theirs)
    lines = vfm("compare", "a.yaml", "reference").splitlines()
    assert lines[1] == f"B: reference (ours, {theirs['date']}, commit 01234567)"
    assert "  asked otherwise: budget.epochs A 2, B 3" in lines and "The cases are not the same." in lines
    specs = [s for s in run_specs(load_study("a.yaml")) if s.strategy == "scratch" and s.backbone.startswith("prof")]
    yours, we = (np.mean([values(s, shift)[:n] for s in specs]) for shift, n in ((0.0, 6), (-0.02, 5)))
    at = lines.index(next(l for l in lines if l.startswith("  A profound_toy.random scratch")))
    assert f" {yours:.3f} [" in lines[at] and f" {we:.3f} [" in lines[at + 1]
    assert lines[at + 1].startswith("  B profound_toy.random scratch")


def test_same_cases_are_named_and_other_settings_of_another_task_are_not(two):
    a = ours.results_bundle(load_study("a.yaml")) | {"data": ["1", "2"]}
    b = json.loads(json.dumps(a | {"data": ["2"]}))
    b["asked"]["tasks"]["classification"] = {"positive": 1}
    b["cells"] = [c for c in b["cells"] if c["strategy"] == "scratch"]
    rows = ours.side_by_side(a, b)
    assert len(rows) == 2 and all(r["same_cases"] and r["otherwise"] == [] for r in rows)
    b["asked"]["tasks"]["segmentation"] = {"head": "linear"}
    assert ours.side_by_side(a, b)[0]["otherwise"] == [("tasks.segmentation", {}, None),
                                                       ("tasks.segmentation.head", None, "linear")]


def test_where_we_have_none_it_is_said(two, monkeypatch):
    kept(two, monkeypatch, {"study": "other"})
    with pytest.raises(VfmError, match="no results of ours for the study 'a'.*vfm table a.yaml --json > results.json"):
        beside_bundle("a.yaml", "reference")


def test_one_kept_bundle_made_again(two, monkeypatch):
    "From records of a study that is shipped under this name; and the file beside the pages has the fields of today."
    monkeypatch.setattr(ours, "shipped_studies", lambda: ["a"])
    monkeypatch.setattr(ours, "load_study", lambda name: load_study(f"{name}.yaml"))
    path = ours.write_reference(two/"made.json")
    made = json.loads(path.read_text(encoding="utf-8"))
    assert [b["study"] for b in made["rows"]] == ["a"] and made["origin"]["versions"]
    again = ours.results_bundle(load_study("a.yaml"))
    assert made["rows"][0] == json.loads(json.dumps(again)) and set(again) == FIELDS
    assert again["asked"]["budget"]["epochs"] == 2 and again["cohort"] == "phantom"
    beside = json.loads((report_notebooks()[0].parent/ours.OUR_RESULTS).read_text(encoding="utf-8"))
    assert beside["rows"] and all(set(b) == FIELDS and b["cells"] and b["data"] for b in beside["rows"])
    for b in beside["rows"]:
        study = load_study(b["study"])
        names = {(c["task"], c["backbone"]) for c in b["cells"]}
        assert {t for t, _ in names} <= set(study.tasks) and {n for _, n in names} <= set(study.backbones)


def test_the_page_of_runs_shows_ours_beside_yours(tmp_path, monkeypatch):
    "A study of the name of the first of ours, with one run of one of its cells, at another size."
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    bundle = json.loads((report_notebooks()[0].parent/ours.OUR_RESULTS).read_text(encoding="utf-8"))["rows"][0]
    cell = next(c for c in bundle["cells"] if not c["backbone"].endswith(".random"))
    study = STUDY | {
        "name": bundle["study"], "backbones": [cell["backbone"]], "seeds": [0], "n_train": [int(cell["n_train"])],
        "tasks": {cell["task"]: bundle["asked"]["tasks"][cell["task"]]}, "strategies": [cell["strategy"]],
        "cases": STUDY["cases"] | {"train": int(cell["n_train"])},
    }
    path, metric = tmp_path/"mine.yaml", cell["metric"]
    score, wanted = (0.1, 0.9, 0.6, 0.4, 0.2, 0.8), "0.889" if metric == "auc" else "0.123"  # 8 of 9 pairs in order
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    for spec in [s for s in run_specs(load_study(path)) if s.strategy == cell["strategy"]]:
        write_record(tmp_path/"runs"/bundle["study"]/run_id(spec), new_record(
            spec, bundle["study"], metrics={metric: 0.123}, primary=metric, directions={metric: cell["direction"]},
            controls={metric: 0.05}, cost={"seconds": {"total": 1.0, "training": 1.0}}), [],
            [{"case": f"c{i}", "patient": f"p{i}", "metric": m, "value": float(v)} for i, p in enumerate(score)
             for m, v in ((metric, 0.123), ("label", i % 2), ("score_0", 1 - p), ("score_1", p))])
    seen = {}
    def done(page, nb, error):
        assert not error, error
        seen[page.name] = text_of(nb)
    pages = [p for p in report_pages(load_study(path), read_records(bundle["study"])) if p.name == "runs"]
    execute_pages(pages, str(path), done)
    said = seen["runs"]
    assert "Yours beside ours" in said and f"as we ran it on {bundle['date']}" in said and wanted in said
    assert f"{cell['score']:.3f}" in said and "Yours were judged on other cases" in said
    assert "size A [4, 32, 32], B" in said and "vfm compare mine.yaml reference" in said
