"""What `vfm table` and `vfm compare` show: the right numbers, within a terminal's width, in files others can read."""
import json
import zipfile
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from vfm_notes.foundation.spec import load_study, run_id, run_specs
from vfm_notes.report import cli
from vfm_notes.report.result_commands import WIDTH, WORD
from vfm_notes.runs.record import new_record, write_record

STUDY = {
    "title": "Which one? 100 % of a_b", "cohort": "phantom", "size": [4, 32, 32], "spacing": [8.0, 3.0, 3.0],
    "cases": {"pretrain": 0, "train": 8, "val": 4, "test": 6},
    "backbones": ["profound_toy.random", "provicnet_toy.random"],
    "tasks": {"segmentation": {}}, "strategies": ["scratch", "top k=1"], "seeds": [0, 1], "budget": {"epochs": 2},
}


def values(spec, shift):
    "The Dice of six cases, by patient, seed and strategy."
    grown = 0.1 if spec.strategy.startswith("top") else 0.0
    return [0.3 + shift + grown + 0.05 * i + 0.01 * spec.seed + 0.003 * i * spec.seed for i in range(6)]


@pytest.fixture
def two(tmp_path, monkeypatch):
    "Two studies whose records were written by hand: in B every case is 0.02 lower, but for one that it lacks."
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    monkeypatch.chdir(tmp_path)
    for name, shift, budget in (("a", 0.0, 2), ("b", -0.02, 3)):
        (tmp_path/f"{name}.yaml").write_text(yaml.safe_dump(STUDY | {"name": name, "budget": {"epochs": budget}}))
        for spec in run_specs(load_study(tmp_path/f"{name}.yaml")):
            dice = values(spec, shift)
            kept = dice[:5] if name == "b" else dice
            record = new_record(
                spec, name, metrics={"dice": float(np.mean(kept))}, primary="dice", directions={"dice": 1},
                controls={"dice": 0.05}, units={"dice": ""}, cost={"seconds": {"total": 1.0, "training": 1.0}},
            )
            cases = [{"case": f"c{i}", "patient": f"p{i}", "metric": m, "value": v}
                     for i, d in enumerate(kept) for m, v in (("dice", d), ("control: dice", 0.05 + 0.001 * i))]
            write_record(tmp_path/"runs"/name/run_id(spec), record, [], cases)
    return tmp_path


def vfm(*words):
    made = CliRunner().invoke(cli.app, list(words))
    assert made.exit_code == 0, (made.output, made.exception)
    return made.stdout


def test_the_table_fits_a_terminal_and_has_the_scores(two):
    lines = vfm("table", "a.yaml").splitlines()
    assert max(map(len, lines)) <= WIDTH == 100
    of = next(l for l in lines if l.startswith("provicnet_toy.random top"))
    mean = np.mean([values(s, 0.0) for s in run_specs(load_study("a.yaml")) if s.strategy == "top k=1"][:2])
    assert f"{mean:.3f} [" in of and " 2 " in of
    cells = json.loads(vfm("table", "a.yaml", "--json"))["cells"]
    top = next(c for c in cells if c["strategy"] == "top k=1")
    base = next(c for c in cells if c["strategy"] == "scratch")
    assert top["score"] == pytest.approx(mean) and top["n_seeds"] == 2 and top["n_cases"] == 6
    assert top["rpg"] == pytest.approx(100 * 0.1 / base["score"]) and base["rpg"] is None
    assert top["low"] < top["score"] < top["high"]


def test_tidy_tables_have_a_row_for_each_run_or_each_metric_of_it(two):
    vfm("table", "a.yaml", "-o", "wide.csv")
    vfm("table", "a.yaml", "--long", "-o", "long.csv")
    wide, long = pd.read_csv("wide.csv"), pd.read_csv("long.csv")
    assert len(wide) == 8 and len(long) == 8 and set(long.metric) == {"dice"}
    both = wide.merge(long, on="id", suffixes=("", "_long"))
    assert np.allclose(both.dice, both.value_long) and np.allclose(long.control, 0.05)


def test_tables_for_a_paper_hold_every_cell(two):
    vfm("table", "a.yaml", "-o", "t.tex")
    vfm("table", "a.yaml", "-o", "t.docx")
    text = (two/"t.tex").read_text(encoding="utf-8")
    assert text.count(r" \\") == 1 + 4 and r"100 \% of a\_b" in text and "_" not in text.replace(r"\_", "")
    assert text.count("&") == 5 * 6
    with zipfile.ZipFile("t.docx") as z:
        assert z.testzip() is None and {"[Content_Types].xml", "_rels/.rels", "word/document.xml"} == set(z.namelist())
        tree = ElementTree.fromstring(z.read("word/document.xml"))
    rows = [["".join(c.itertext()) for c in r.iter(f"{{{WORD}}}tc")] for r in tree.iter(f"{{{WORD}}}tr")]
    assert len(rows) == 5 and {len(r) for r in rows} == {7} and rows[2][2] == "profound_toy.random top k=1"


def test_two_studies_are_compared_by_seed_and_case(two):
    found = json.loads(vfm("compare", "a.yaml", "b.yaml", "--json"))
    assert {d["field"]: (d["a"], d["b"]) for d in found["specs"]} == {"name": ("a", "b"), "budget.epochs": (2, 3)}
    assert len(found["cells"]) == 4
    for cell in found["cells"]:  # 0.02 in each pair, on the five cases that both have
        assert cell["difference"] == pytest.approx(0.02) and (cell["n_seeds"], cell["n_cases"]) == (2, 5)
        assert cell["low"] <= cell["difference"] <= cell["high"]
    shown = vfm("compare", "a.yaml", "b.yaml")
    assert "budget.epochs" in shown and shown.count("+0.020") >= 4


def test_two_runs_are_compared_whatever_their_seeds(two):
    a, b = ([s for s in run_specs(load_study("a.yaml")) if s.backbone.startswith("profound") and s.seed == n and
             s.strategy == "scratch"][0] for n in (0, 1))
    found = json.loads(vfm("compare", f"a/{run_id(b)}", str(two/"runs"/"a"/run_id(a)), "--json"))
    assert [d["field"] for d in found["specs"]] == ["spec.seed"]
    by_hand = np.mean(np.array(values(b, 0.0)) - np.array(values(a, 0.0)))
    assert found["cells"][0]["difference"] == pytest.approx(by_hand) and found["cells"][0]["n_cases"] == 6
    made = CliRunner().invoke(cli.app, ["compare", f"a/{run_id(a)}", "b.yaml"])
    assert "a run and a study" in str(made.exception)


def test_kept_results_stand_beside_those_of_a_study(two):
    text = vfm("table", "b.yaml", "--json")
    (two/"theirs.json").write_text(text[text.index("{"):], encoding="utf-8")
    shown = vfm("compare", "a.yaml", "theirs.json")
    assert shown.count("  A ") == shown.count("  B ") == 4 and "(b, 20" in shown
    (two/"other.json").write_text("[]", encoding="utf-8")
    assert "holds no results" in str(CliRunner().invoke(cli.app, ["compare", "a.yaml", "other.json"]).exception)


def test_hints_repeat_what_was_typed(two, monkeypatch):
    from vfm_notes.report.cli import again_command
    monkeypatch.setattr("sys.argv", ["vfm", "run", "my studies/a.yaml", "--jobs", "2"])
    assert again_command("my studies/a.yaml") == "vfm run 'my studies/a.yaml' --jobs 2 --retry-failed"
    monkeypatch.setattr("sys.argv", ["vfm", "status", "a.yaml"])
    assert again_command("a.yaml") == "vfm run a.yaml --retry-failed"
    assert vfm("status", "a.yaml").splitlines() == ["Study a: 8 done of 8 runs."]


def test_studies_are_completed_by_their_files(two):
    from vfm_notes.report.data_commands import study_names
    assert study_names("a") == ["a.yaml"] and "phantom" in study_names("ph")
    from vfm_notes.report.cli import failures
    from vfm_notes.runs.batch import Summary
    many = failures(Summary("a", failed={f"r{i}": "E: x" for i in range(12)}), typed="my studies/a.yaml")
    assert many[-1] == "failed  2 more; for all with their errors: vfm table 'my studies/a.yaml' -o failed.csv"
