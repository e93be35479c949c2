"""Our results beside those of others: against records written by hand, and against what a spec says otherwise."""
import json

import numpy as np
import pytest
from test_result_commands import STUDY, two, values, vfm  # noqa: F401 (two is a fixture)

from vfm_notes.analysis import ours
from vfm_notes.foundation.places import report_notebooks
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import load_study, run_specs
from vfm_notes.report.result_commands import beside_bundle

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
