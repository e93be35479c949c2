"""The claim over all studies: rows from records against the tables they are made of, and what is shipped for others."""
import json

import numpy as np
import pytest
import yaml
from fake_runs import write_study
from scipy.stats import spearmanr
from test_one_number import text_of

from vfm_notes.analysis import claim
from vfm_notes.analysis.association import cell_points
from vfm_notes.analysis.claim import all_rows, claim_sentence, claim_words, rows_here, studies_here, study_row
from vfm_notes.analysis.findings import pretrained_cells
from vfm_notes.analysis.gain import gain_table
from vfm_notes.analysis.power import smallest_rho
from vfm_notes.analysis.tables import load_tables
from vfm_notes.foundation.places import report_notebooks
from vfm_notes.foundation.spec import load_study
from vfm_notes.report.pages import execute_pages, report_pages, studies_fingerprint
from vfm_notes.runs.record import read_records

STUDY = {
    "name": "told", "title": "Truth was planted", "cohort": "phantom", "size": [4, 32, 32], "spacing": [8.0, 3.0, 3.0],
    "cases": {"pretrain": 8, "train": 12, "val": 4, "test": 48}, "n_train": [8],
    "pretrain": {
        "matched": {"backbone": ["profound_toy", "provicnet_toy"], "expected": {"segmentation": "gain"}},
        "other": {"backbone": ["profound_toy", "provicnet_toy"]},
        "drawn": {"backbone": ["profound_toy", "provicnet_toy"], "epochs": 0, "seed": 9, "expected": "none"},
    },
    "backbones": [
        f"{n}.{w}" for n in ("profound_toy", "provicnet_toy") for w in ("random", "matched", "other", "drawn")
    ],
    "tasks": {"segmentation": {}, "super_resolution": {"factor": [1, 2, 2]}, "distortion_correction": {}},
    "strategies": ["full"], "seeds": [0, 1, 2], "budget": {"epochs": 2}, "divergences": ["energy", "frechet"],
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    root = tmp_path_factory.mktemp("claim")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFM_RUNS", str(root/"runs"))
        patch.delenv("VFM_DATA", raising=False)
        (root/"told.yaml").write_text(yaml.safe_dump(STUDY))
        study = load_study(str(root/"told.yaml"))
        write_study(study, failed=0, absent=0)
        yield root, study


def test_a_row_is_what_the_tables_say(told):
    _, study = told
    tables = load_tables(study)
    row = study_row(tables, study.title)
    gains = pretrained_cells(gain_table(tables))
    clear = {(g.task, g.backbone): g.low > 0 for g in gains.itertuples()}
    matched = [clear["segmentation", f"{n}.matched"] for n in ("profound_toy", "provicnet_toy")]
    drawn = gains[gains.backbone.str.endswith("drawn")]
    assert row["planted"] == {
        "matched": 2, "matched_found": sum(matched), "drawn": 6,
        "drawn_clear": int(((drawn.low > 0) | (drawn.high < 0)).sum()),
    }
    points = cell_points(tables, gains, "embed")
    d = row["distance"]["gain"]
    assert d["rho"] == pytest.approx(spearmanr(points.d2p, points.rpg)[0]) and d["n"] == 18
    assert d["least"] == pytest.approx(smallest_rho(3, 6)) and row["runs"] == 3 * 8 * 3
    assert row["clear"] == int((gains.low > 0).sum()) and row["smallest"] == pytest.approx(gains.smallest.median())
    assert json.loads(json.dumps(row)) == row and row["which"]["looks"] > 10


def test_epochs_saved_are_those_of_the_curves(told):
    "By hand from the curves: 95 % of the way from scratch's first to its best score, censored at the budget."
    _, study = told
    tables = load_tables(study)
    done = tables.done()
    def epochs(task, backbone, strategy, seed, of):
        id = done[(done.task == task) & (done.backbone == backbone) & (done.strategy == strategy)
                  & (done.seed == seed)].id.iloc[0]
        own = tables.curves[(tables.curves.id == id) & (tables.curves.name == f"val_{of}")].sort_values("epoch")
        return own["value"].to_numpy()
    saved = []
    for net in ("profound_toy", "provicnet_toy"):
        each = []
        for s in range(3):
            ref = epochs("segmentation", f"{net}.random", "scratch", s, "dice")
            own = epochs("segmentation", f"{net}.matched", "full", s, "dice")
            target = ref[0] + 0.95 * (ref.max() - ref[0])
            first = lambda v: next((i for i, x in enumerate(v) if x >= target), len(v) - 1)
            each.append(first(ref) - first(own))
        saved.append(np.mean(each))
    row = study_row(tables)
    assert row["sooner_matched"]["cells"] == 2 and row["sooner_matched"]["mean"] == pytest.approx(np.mean(saved))


def test_records_here_win_over_what_was_shipped(told):
    assert studies_here() == ["told"]
    [own] = rows_here()
    shipped = [own | {"cells": -1}, own | {"study": "elsewhere"}]
    rows = all_rows(shipped)
    assert [(r["study"], r["from"]) for r in rows] == [("told", "records"), ("elsewhere", "shipped")]
    assert rows[0]["cells"] == own["cells"]


def test_the_three_sentences(told):
    [row] = rows_here()
    gain, soon, distance = claim_words([row, row | {"study": "more"}])
    p = row["planted"]
    assert f"in {2 * p['matched_found']} of 4 cells" in gain and f"in {2 * p['drawn_clear']} of 12" in gain
    assert "of 2 studies" in soon and "of 2 studies" in distance
    assert "could have been seen" in claim_sentence(row) and claim_sentence(row).startswith("told: ")
    shown = row | {"distance": {"gain": row["distance"]["gain"] | {"shown": True, "rho": -0.8}}}
    assert "small distance goes with large gain in 1 (told)" in claim_words([shown])[2]


def test_one_kept_row_made_again(tmp_path, monkeypatch, told):
    "What is written is what is read, and the rows beside the pages have the fields of today."
    path = claim.write_claim(tmp_path/"claim.json")
    kept = json.loads(path.read_text())
    assert kept["rows"] == rows_here() and kept["origin"]["versions"]
    beside = json.loads((report_notebooks()[0].parent/"claim.json").read_text())
    assert set(beside) == set(kept)
    for row in beside["rows"]:
        assert set(row) == set(kept["rows"][0]) and claim_sentence(row).startswith(row["study"])


@pytest.mark.parametrize("name", ["claim", "which", "power"])
def test_the_pages_say_it(told, name):
    root, study = told
    seen = {}
    def done(page, nb, error):
        assert not error, error
        seen[page.name] = text_of(nb)
    pages = [p for p in report_pages(study, read_records("told")) if p.name == name]
    execute_pages(pages, str(root/"told.yaml"), done)
    kept = json.loads((report_notebooks()[0].parent/"claim.json").read_text())["rows"]
    if name == "claim": assert all(s in seen[name] for s in claim_words(all_rows(kept)))
    if name == "which": assert "There is " in seen[name] and "choice and confirmation" in seen[name]
    if name == "power": assert "Dice points" in seen[name] and "finished runs of this study" in seen[name]


def test_a_new_record_of_any_study_makes_the_page_anew(told, monkeypatch, tmp_path):
    monkeypatch.setenv("VFM_RUNS", str(tmp_path))
    before = studies_fingerprint()
    (tmp_path/"other"/"run").mkdir(parents=True)
    (tmp_path/"other"/"run"/"record.json").write_text("{}")
    assert studies_fingerprint() != before
