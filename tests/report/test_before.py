"""The page and the command of a ranking: what is said, what is shown, what is refused."""
import base64
import json
import re
from io import BytesIO

import numpy as np
import pytest

from vfm_notes.analysis.ranking import (
    ranking_findings, ranking_lines, ranking_verdict, read_ranking, rankings_of, shown_less, short_amount,
)
from vfm_notes.foundation.blocks import plain_text
from vfm_notes.foundation.registry import VfmError
from vfm_notes.report.before import before_you_train, feature_pictures, page_of_its_own, ranking_figure
from vfm_notes.report.rank_command import check_outputs, read_budget, write_ranking
from vfm_notes.foundation.spec import load_study
from vfm_notes.report import pages


def row(name, kind, value, behind, wide=0.05, **more):
    return dict(
        name=name, kind=kind, value=value, low=value - wide, high=value + wide, behind=behind, reason="",
        behind_low=behind - wide, behind_high=behind + wide, parameters=2_000_000, images=None, imagenet=None,
        seconds=1.5, licence="MIT", overlap="unknown", imagenet_how="", seen=[4, 32, 32], score_logme=-0.5,
    ) | more


def made(**more):
    rows = [
        row("big.x", "weights", 0.9, 0.0, parameters=9e7, images=1e6), row("hand_made", "control", 0.8, 0.1),
        row("small.y", "weights", 0.7, 0.2, images=5e6, imagenet=80.0, imagenet_how="linear"),
        row("big.random", "random", 0.6, 0.3), row("trivial", "control", 0.5, 0.4),
    ]
    return {
        "version": 1, "task": "grades", "kind": "classes", "by": "probe", "layer": "embed", "cases": 40, "patients": 39,
        "cells": False, "title": "A cohort <b>", "cohort": "toy", "licence": "CC0", "reference": "big.x",
        "left_out": {}, "size": [4, 32, 32], "rows": rows, "scores": ["probe", "logme"],
        "directions": {"probe": 1, "logme": 1},
    } | more


def test_the_verdict_says_who_is_first_and_whether_it_is_ahead():
    said = ranking_verdict(made())
    assert said.startswith("big.x comes first of 2 weights on 40 training cases: 0.900 (95 % interval 0.850 to 0.950)")
    assert said.endswith("It is ahead of all others.") and "balanced accuracy of a linear probe" in said
    close = made()
    close["rows"][2] |= dict(behind=0.02, behind_low=-0.03, behind_high=0.07)
    assert ranking_verdict(close).endswith("Nothing separates it from small.y.")
    tied = "Nothing separates big.x from the second, small.y at 39 patients"
    assert any(s.startswith(tied) for s in ranking_findings(close))
    worse = made()
    worse["rows"][1] |= dict(value=0.95, behind=-0.05, behind_low=-0.09, behind_high=-0.01)
    assert "But hand-made features scored higher without any pretraining." in ranking_verdict(worse)
    assert any(s.startswith("big.x is behind hand-made features: −0.050") for s in ranking_findings(worse))


def test_an_order_of_failures_is_called_one():
    lost = made(kind="values")
    assert "nothing was learned" not in ranking_verdict(lost)
    lost["rows"][0] |= dict(value=-0.1, low=-0.4, high=0.1)
    assert "nothing was learned and the order says nothing" in ranking_verdict(lost)


def test_controls_that_look_at_no_case_are_told():
    said = ranking_findings(made())
    assert "By parameter count one would pick big.x: the same pick" in said
    assert any(s.startswith("By number of pretraining images one would pick small.y: +0.200 behind") for s in said)
    assert "By ImageNet accuracy nothing can be picked: it is known of 1 of 2 weights" in said
    assert any("ahead of the same network with random weights by +0.300" in s for s in said)


def test_nothing_to_rank_is_said():
    none = made(rows=[row("trivial", "control", 0.5, 0.0)], reference="trivial", left_out={"a.b": "no size fits"})
    assert ranking_verdict(none).startswith("No weights could be ranked") and ranking_findings(none) == []
    assert "left out  a.b: no size fits" in ranking_lines(none)
    assert "a.b: no size fits" in plain_text(before_you_train(none))


def test_lines_of_the_terminal():
    lines = ranking_lines(made())
    assert lines[0].split()[:2] == ["name", "score"] and lines[1].split()[:3] == ["1", "big.x", "0.900"]
    assert lines[3].split()[:2] == ["2", "small.y"] and lines[2].split()[:2] == ["·", "hand_made"]
    assert [short_amount(v) for v in (90e6, 1.28e6, None, 12)] == ["90 M", "1.28 M", "?", "12"]
    part = made()
    part["rows"][0]["seen"] = [4, 28, 28]
    assert shown_less(part) == ["big.x: the middle 4 x 28 x 28 of 4 x 32 x 32 voxels, which its stride divides"]
    assert not shown_less(made()) and any("shown less" in l for l in ranking_lines(part))


def test_the_page_shows_what_the_terminal_says():
    words = plain_text(before_you_train(made()))
    for s in (ranking_verdict(made()), *ranking_findings(made())): assert s in words
    html = page_of_its_own(made())
    assert "A cohort &lt;b&gt;" in html and "A cohort <b>" not in html and "<style>" in html
    figure = ranking_figure(made()).svg
    assert figure.count("<circle") == 5 and figure.count("<line") == 5
    at = [float(x) for x in re.findall(r'circle cx="([\d.]+)"', figure)]
    assert at == sorted(at, reverse=True)  # the best on top, and furthest to the right


def test_colours_mean_the_same_in_all_cases():
    from PIL import Image
    r = np.random.default_rng(0)
    one = r.normal(size=(6, 8, 8))
    found = feature_pictures([r.normal(size=(16, 16))] * 3, {"a": [one, one, 5 * r.normal(size=(6, 8, 8))]})
    decode = lambda text: np.asarray(Image.open(BytesIO(base64.b64decode(text))))
    same, again, other = map(decode, found["maps"]["a"])
    assert np.array_equal(same, again) and not np.array_equal(same, other) and same.shape[:2] == (16, 16)


def test_files_and_budgets(tmp_path):
    for name in ("a.json", "a.csv", "a.html"): write_ranking(made(), tmp_path / name)
    assert read_ranking(tmp_path / "a.json")["reference"] == "big.x"
    assert (tmp_path / "a.csv").read_text().splitlines()[1].startswith("big.x,weights,0.9")
    with pytest.raises(VfmError, match="expected a name that ends in .json"): check_outputs([tmp_path / "a.xlsx"])
    (tmp_path / "b.json").write_text(json.dumps({"version": 2, "rows": []}))
    with pytest.raises(VfmError, match="no ranking of this version"): read_ranking(tmp_path / "b.json")
    with pytest.raises(VfmError, match="cannot be read"): read_ranking(tmp_path / "none.json")
    assert (read_budget("90s"), read_budget("1.5m"), read_budget("2h"), read_budget("")) == (90, 90, 7200, None)
    for text in ("10", "m", "-3s", "0m", "1d"):
        with pytest.raises(VfmError, match="expected a number and s, m or h"): read_budget(text)


def test_the_page_is_shown_where_there_is_a_ranking(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_RUNS", str(tmp_path))
    study = load_study("phantom")
    assert "before" not in {p.name for p in pages.report_pages(study, [])}
    write_ranking(made(), tmp_path / "phantom" / "rank" / "toy-grades.json")
    assert rankings_of("phantom") == [tmp_path / "phantom" / "rank" / "toy-grades.json"]
    first = {p.name: p.print for p in pages.report_pages(study, [])}
    write_ranking(made(cases=41), tmp_path / "phantom" / "rank" / "toy-grades.json")
    then = {p.name: p.print for p in pages.report_pages(study, [])}
    assert first["before"] != then["before"] and first["index"] == then["index"]


STUDY = """
name: tiny
title: A tiny study
cohort: phantom
size: [4, 32, 32]
spacing: [8.0, 3.0, 3.0]
cases: {pretrain: 0, train: 16, val: 2, test: 2}
backbones: [profound_toy.random]
tasks: {grades: {task: classification}}
strategies: [full]
seeds: [0]
budget: {epochs: 1}
"""


def test_the_command_from_end_to_end(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from vfm_notes.report.cli import app
    for name in ("VFM_RUNS", "VFM_WEIGHTS"): monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(STUDY)
    call = ["rank", "phantom", "--task", "grades", "--study", "tiny.yaml"]
    done = CliRunner().invoke(app, [*call, "-o", "out.csv"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "No weights could be ranked" in done.output and "hand_made" in done.output  # none are here
    kept = tmp_path / "VFM_RUNS" / "tiny" / "rank" / "phantom-grades.json"
    assert kept.is_file() and rankings_of("tiny") == [kept] and str(kept) in done.output
    found = read_ranking(kept)
    assert found["cases"] == 16 and {r["name"] for r in found["rows"]} == {"trivial", "hand_made"}
    assert (tmp_path / "out.csv").read_text().startswith("name,kind,")
    with pytest.raises(VfmError, match="expected a number and s, m or h"):
        CliRunner().invoke(app, [*call, "--budget", "soon"], catch_exceptions=False)
