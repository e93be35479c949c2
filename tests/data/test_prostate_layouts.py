"""Layouts of prostate collections: each reads its example, and a broken source is told in one error that lists
everything."""
import atexit
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from vfm_notes.data import layouts_mri
from vfm_notes.data.load import load_cohort
from vfm_notes.data.cohort import cohort_problems
from vfm_notes.data.load import manifest_cohort
from vfm_notes.data.dicom import write_series
from vfm_notes.data.manifest import layouts, manifest_problems, read_manifest, write_manifest
from vfm_notes.data.layouts_mri import PICAI_LESIONS, picai, prostate158, toy_case
from vfm_notes.data.layouts_tables import msd, profound, table_manifest
from vfm_notes.data.layouts_trees import bids, prostatex
from vfm_notes.data.volume import read_image, to_array
from vfm_notes.data.dicom import split_address
from vfm_notes.foundation.registry import VfmError

OURS = [
    name
    for name in layouts
    if layouts[name].__module__.split(".")[-1] in ("layouts_mri", "layouts_trees", "layouts_tables")
    and name != "brainvisa"  # of the sulcus study
]


@lru_cache
def made(name: str) -> Path:
    "The example of a layout, written once."
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    layouts.card(name)["example"](folder)
    return folder


def source(name: str, folder: Path) -> Path:
    "A copy of the example, to be spoiled."
    return Path(shutil.copytree(made(name), folder, dirs_exist_ok=True))


def told(function, *args, **kwargs) -> str:
    with pytest.raises(VfmError) as caught: function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change) -> None:
    "Change the rows of a sheet."
    sep = "\t" if path.suffix == ".tsv" else ","
    change(pd.read_csv(path, dtype=str, keep_default_na=False, sep=sep)).to_csv(path, index=False, sep=sep)


def test_all_seven_are_registered():
    assert set(OURS) == {"picai", "prostatex", "prostate158", "msd", "profound", "bids", "table"}


@pytest.mark.parametrize("name", OURS)
def test_a_manifest_points_to_the_images(tmp_path, name):
    "Every path of the manifest, written and read back, opens as what it is."
    manifest = read_manifest(write_manifest(layouts[name](source(name, tmp_path/"src")), tmp_path/"cohort"))
    assert manifest_problems(manifest) == [] and len(manifest) >= 3 and manifest.card.licence
    means = {}
    for row in manifest.table.to_dict("records"):
        for s in manifest.card.sequences:
            means.setdefault(s, []).append(to_array(read_image(manifest.root/row[s])).mean())
        for m in [c for c in row if c.startswith("mask_") or c in ("label", "zones")]:
            if row[m] != "none": assert to_array(read_image(manifest.root/row[m], constant=True)).max() in (0, 1, 2, 3)
    for s, low, high in (("t2w", 200, 300), ("dwi", 55, 110), ("adc", 900, 1300)):
        assert all(low < m < high for m in means.get(s, [])), f"{s} is {s}"


@pytest.mark.parametrize("name", OURS)
def test_the_licence_is_on_the_card(tmp_path, name):
    card = layouts[name](source(name, tmp_path)).card
    known = {
        "picai": ("CC BY-NC 4.0", True), "prostatex": ("CC BY 3.0", False), "prostate158": ("CC BY 4.0", False),
        "msd": ("CC BY-SA 4.0", False),
    }
    assert (card.licence, card.non_commercial) == known.get(name, ("not stated", True))
    assert card.source and card.citation and card.note


@pytest.mark.parametrize("name", OURS)
def test_an_empty_folder_is_no_source(tmp_path, name):
    assert str(tmp_path) in told(layouts[name], tmp_path)


@pytest.mark.parametrize("name", OURS)
def test_lost_images_are_all_listed(tmp_path, name):
    folder = source(name, tmp_path)
    lost = [
        split_address(path)[0]
        for row in layouts[name](folder).table.to_dict("records")[1:3]
        for path in [folder / row[layouts[name](folder).card.sequences[-1]]]
    ]
    for p in lost: shutil.rmtree(p) if p.is_dir() else p.unlink()
    text = told(layouts[name], folder)
    for p in lost: assert p.name in text or p.parent.parent.name in text, text


# PI-CAI

def picai_source(folder: Path) -> tuple[Path, Path, Path]:
    "The example, its marksheet and its human lesions."
    source("picai", folder)
    return (
        folder, folder / "picai_labels" / "clinical_information" / "marksheet.csv",
        folder / "picai_labels" / PICAI_LESIONS["human"],
    )


def test_picai_lists_everything_that_is_wrong(tmp_path):
    folder, sheet, lesions = picai_source(tmp_path)
    next(folder.rglob("10000_*_adc.mha")).unlink()
    (lesions/"10001_1000001.nii.gz").unlink()
    next(folder.rglob("*Bosma22b/10002*")).unlink()
    extra = folder/"picai_public_images_fold4"/"10003"
    shutil.copytree(next(folder.glob("*fold1/10003")), extra)
    (folder/"stray.mha").write_bytes(b"x")
    edit(sheet, lambda t: pd.concat([t.assign(case_csPCa=["YES", "YES", "NO", "maybe", "YES"]), t.iloc[[1]]]))
    text = told(picai, folder)
    for words in (
        "10000_1000000_adc.mha does not exist", "1 of 5 cases have no lesion delineation by human: 10001_1000001",
        "Bosma22b/10002_1000002.nii.gz does not exist", "are the same image", "stray.mha is named like no image",
        "10000_1000000: case_ISUP is 0 but case_csPCa YES", "10003_1000003: case_csPCa is 'maybe'",
        "2 rows for 10001_1000001",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda p: p.unlink(), "does not exist"), (lambda p: p.write_bytes(b"patient\x80\x81" * 50), "is not UTF-8"),
        (
            lambda p: p.write_text("patient_id,study_id,lesion_GS\n1,2,3+4\n"),
            "has no column 'case_ISUP' and no 'case_csPCa'",
        ),
        (lambda p: p.write_text("patient_id,study_id,case_ISUP,case_csPCa\n"), "has no rows"),
        (lambda p: edit(p, lambda t: t.iloc[1:]), "10000_1000000 has images but no row in marksheet.csv"),
    ],
)
def test_a_bad_marksheet_is_told_beside_the_rest(tmp_path, damage, words):
    folder, sheet, _ = picai_source(tmp_path)
    damage(sheet)
    next(folder.rglob("10001_*_hbv.mha")).unlink()
    text = told(picai, folder)
    assert words in text and "10001_1000001_hbv.mha does not exist" in text


def test_cases_without_delineation_are_refused_left_out_by_name_or_taken_from_elsewhere(tmp_path):
    folder, _, lesions = picai_source(tmp_path)
    other = folder/"picai_labels"/PICAI_LESIONS["Pooch25"]
    other.mkdir(parents=True)
    shutil.move(lesions/"10001_1000001.nii.gz", other)
    assert "human+Pooch25" in told(picai, folder)
    out = picai(folder, unlabelled="leave out")
    assert (
        len(out) == 4 and "Left out: 1 of 5 cases have no lesion delineation by human: 10001_1000001." in out.card.note
    )
    both = picai(folder, lesions="human+Pooch25").table.set_index("case")
    assert len(both) == 5 and both["note_lesion"].to_dict() == {
        c: "Pooch25" if c == "10001_1000001" else "human" for c in both.index
    }
    assert "Did you mean 'Pooch25'" in told(picai, folder, lesions="Pooch")
    assert "Guerbet23/10000_1000000.nii.gz does not exist" in told(
        picai, folder, lesions="human+Pooch25", gland="Guerbet23"
    )


def folds(path: Path, cases: list[list[str]]) -> Path:
    path.write_text(
        json.dumps([{"train": sum(cases[:k] + cases[k + 1 :], []), "val": of} for k, of in enumerate(cases)])
    )
    return path


def test_picai_folds(tmp_path):
    folder, _, _ = picai_source(tmp_path)
    cases = [["10000_1000000"], ["10001_1000001"], ["10002_1000002"], ["10003_1000003", "10003_1000004"]]
    path, tested = folds(tmp_path/"splits.json", cases), []
    for k in range(4):
        split = picai(folder, splits=path, fold=k).table.set_index("case")["split"]
        assert (
            set(split[cases[k]]) == {"test"}
            and set(split[cases[(k + 1) % 4]]) == {"val"}
            and (split == "train").sum() == 5 - len(cases[k]) - len(cases[(k + 1) % 4])
        )
        tested += cases[k]
    assert sorted(tested) == sorted(sum(cases, []))
    assert "patient 10003 is in the splits" in told(
        picai, folder,
        splits=folds(tmp_path / "a.json", [*cases[:2], ["10003_1000003"], ["10003_1000004", "10002_1000002"]]), fold=2,
    )
    assert "10002_1000002 is in no fold" in told(picai, folder, splits=folds(tmp_path/"b.json", [*cases[:2], cases[3]]))
    assert "in two folds" in told(picai, folder, splits=folds(tmp_path/"c.json", [*cases, cases[0]]))
    assert "4 folds, but fold 4 is requested" in told(picai, folder, splits=path, fold=4)
    (tmp_path/"d.json").write_text("[1, 2]")
    assert "no list of folds" in told(picai, folder, splits=tmp_path/"d.json")


def test_picai_with_labels_elsewhere(tmp_path):
    folder, _, _ = picai_source(tmp_path/"images")
    shutil.move(folder/"picai_labels", tmp_path/"labels")
    manifest = picai(folder, labels=tmp_path/"labels")
    assert (
        manifest.root == tmp_path
        and manifest.table["mask_gland"][0].startswith("labels/anatomical_delineations")
        and manifest_problems(manifest) == []
    )


# PROSTATEx

def test_prostatex_takes_the_series_by_description(tmp_path):
    folder = source("prostatex", tmp_path)
    manifest = prostatex(folder)
    assert manifest.table["grade"].tolist() == [
        "no clinically significant finding", "clinically significant finding", "unknown",
    ], "the worst finding of a patient; none is known of test patients"
    for row in manifest.table.to_dict("records"):
        assert ["tset" in row["t2w"], "CALCBVAL" in row["dwi"], "DISTADC" in row["adc"]] == [True] * 3
    np.testing.assert_array_equal(
        to_array(read_image(folder / manifest.table["t2w"][1])), sitk.GetArrayFromImage(toy_case(1, True)["t2w"])
    )


def test_prostatex_refuses_what_is_ambiguous(tmp_path):
    folder = source("prostatex", tmp_path)
    study = next(folder.rglob("ProstateX-0001/*"))
    write_series(toy_case(8, False)["t2w"], study/"10.0-t2tsetra-1", "t2_tse_tra", 10)
    shutil.rmtree(next(folder.rglob("ProstateX-0002/*/*ADC*")))
    min(next(folder.rglob("ProstateX-0000/*/*CALC*")).iterdir()).write_text("no slice")
    (folder/"PROSTATEx"/"ProstateX-0009").mkdir()
    text = told(prostatex, folder)
    for words in (
        "ProstateX-0001 has 2 series for t2w: t2_tse_tra (number 3",
        "t2_tse_tra (number 10, 10.0-t2tsetra-1); expected one, set repeat",
        "ProstateX-0002 has no series for adc; it has ep2d_diff_tra_DYNDISTCALC_BVAL",
        "ProstateX-0009 has no series for t2w; it has no series at all", "ProstateX-0009 is in no sheet of findings",
        "is not a DICOM file", "ProstateX-0000 has no series for dwi",
    ):
        assert words in text, text


def test_prostatex_sheets_and_repeats(tmp_path):
    folder = source("prostatex", tmp_path)
    study = next(folder.rglob("ProstateX-0001/*"))
    write_series(toy_case(8, False)["t2w"], study/"10.0-t2tsetra-1", "t2_tse_tra", 10)
    assert (
        prostatex(folder, repeat="last").table["t2w"][1].endswith("10.0-t2tsetra-1")
        and "3.000000" in prostatex(folder, repeat="first").table["t2w"][1]
    )
    edit(folder/"ProstateX-Findings-Train.csv", lambda t: t.assign(ClinSig=["FALSE", "1", "TRUE"]))
    assert "ProstateX-0001 finding 1 has ClinSig '1', expected TRUE or FALSE" in told(prostatex, folder, repeat="last")
    (folder/"ProstateX-Findings-Train.csv").unlink()
    text = told(prostatex, folder, repeat="last")
    assert "0 sheets are named" in text and "ProstateX-0000 is in no sheet" in text


def test_prostatex_with_masks_of_the_gland(tmp_path):
    folder, masks = source("prostatex", tmp_path/"src"), tmp_path/"masks"
    for i in range(3): layouts_mri.write_image(toy_case(i, False)["gland"], masks/f"ProstateX-{i:04d}.nii.gz")
    manifest = prostatex(folder, gland=masks)
    assert (
        manifest.card.classes == ("background", "gland")
        and manifest.crop == "mask_gland"
        and manifest.table["mask_gland"][2] == "masks/ProstateX-0002.nii.gz"
    )
    (masks/"ProstateX-0002.nii.gz").unlink()
    shutil.copy(masks/"ProstateX-0000.nii.gz", masks/"second_ProstateX-0000.nii.gz")
    text = told(prostatex, folder, gland=masks)
    assert "has 0 files for ProstateX-0002" in text and "has 2 files for ProstateX-0000" in text


# Prostate158

def test_prostate158_splits_and_empty_masks(tmp_path):
    folder = source("prostate158", tmp_path)
    manifest = prostate158(folder)
    assert dict(zip(manifest.table["case"], manifest.table["split"])) == {
        "020": "train", "021": "train", "022": "val", "001": "test",
    }
    assert (
        manifest.table["grade"].tolist() == ["tumour", "no tumour"] * 2
        and manifest.table["mask_lesion"].tolist()[1] == "none"
    )
    zones = prostate158(folder, labels="zones")
    assert (
        zones.card.classes[1:] == ("central gland", "peripheral zone")
        and "mask_lesion" not in zones.table
        and zones.crop == "label"
    )
    (folder/"test.csv").unlink()
    assert len(prostate158(folder)) == 3, "the test set is not public"


def test_prostate158_lists_everything_that_is_wrong(tmp_path):
    folder = source("prostate158", tmp_path)
    (folder/"train"/"020"/"dwi.nii.gz").unlink()
    edit(folder/"valid.csv", lambda t: pd.concat([t, pd.read_csv(folder/"train.csv", dtype=str).iloc[[1]]]))
    (folder/"test.csv").write_text("ID,t2\n1,test/001/t2.nii.gz\n")
    edit(folder/"train.csv", lambda t: t.assign(t2_anatomy_reader1=["", t["t2_anatomy_reader1"][1]]))
    text = told(prostate158, folder)
    for words in (
        "020/dwi.nii.gz does not exist", "valid.csv: 021 is listed in train.csv already",
        "test.csv has no column 'dwi'", "020: mask_gland is missing", "patient 021 is in the splits",
    ):
        assert words in text, text


# the Decathlon

def test_msd_volumes_of_a_4d_file(tmp_path):
    folder = source("msd", tmp_path)
    manifest = msd(folder)
    assert (
        manifest.table["adc"][2] == "imagesTr/prostate_02.nii.gz#1"
        and manifest.card.spacing == (3.0, 2.0, 2.0)
        and "1 test images" in manifest.card.note
    )
    for s in ("t2w", "adc"):
        np.testing.assert_array_equal(
            to_array(read_image(folder / manifest.table[s][2])), sitk.GetArrayFromImage(toy_case(2, False)[s])
        )


def test_msd_of_one_modality(tmp_path):
    "Task04's form: one volume per file, the modality is called MRI."
    folder = source("msd", tmp_path)
    index = json.loads((folder/"dataset.json").read_text(encoding="utf-8"))
    for p in folder.glob("imagesT?/*"): sitk.WriteImage(sitk.ReadImage(str(p))[:, :, :, 0], str(p))
    (folder / "dataset.json").write_text(
        json.dumps(
            index
            | dict(
                name="Hippocampus", modality={"0": "MRI"}, labels={"0": "background", "1": "Anterior", "2": "Posterior"}
            )
        )
    )
    manifest = msd(folder)
    assert (
        manifest.card.sequences == ("mri",)
        and manifest.card.classes == ("background", "Anterior", "Posterior")
        and manifest.card.name == "msd_hippocampus"
        and manifest.table["mri"][0] == "imagesTr/prostate_00.nii.gz"
    )


def test_msd_lists_everything_that_is_wrong(tmp_path):
    folder = source("msd", tmp_path)
    (folder/"labelsTr"/"prostate_01.nii.gz").unlink()
    shutil.copy(folder/"imagesTr"/"prostate_00.nii.gz", folder/"imagesTr"/"prostate_77.nii.gz")
    index = json.loads((folder/"dataset.json").read_text(encoding="utf-8"))
    (folder/"dataset.json").write_text(json.dumps(index | {"training": [*index["training"], index["training"][0]]}))
    text = told(msd, folder)
    for words in (
        "prostate_01.nii.gz does not exist", "prostate_77.nii.gz is not listed in dataset.json",
        "case prostate_00 has 2 rows",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not valid JSON"), ("[]", "has no name and no modality"),
        (
            '{"name": "x", "modality": {"0": "T2", "2": "ADC"}, "labels": {"0": "background"}, "training": [{}]}',
            "expected 0 to 1",
        ),
    ],
)
def test_a_bad_index(tmp_path, text, words):
    (source("msd", tmp_path)/"dataset.json").write_text(text)
    assert words in told(msd, tmp_path)


# BIDS

def test_bids_patients_sessions_and_b_values(tmp_path):
    folder = source("bids", tmp_path)
    manifest = bids(folder, grade="isup")
    assert manifest.table["case"].tolist() == ["sub-01", "sub-02_ses-1", "sub-02_ses-2", "sub-03"] and manifest.table[
        "patient"
    ].tolist() == ["sub-01", "sub-02", "sub-02", "sub-03"]
    assert all(p.endswith("#1") for p in manifest.table["dwi"]), "the volume of b = 1000"
    assert manifest.table["grade"].tolist() == ["0", "2", "2", "3"] and manifest.card.spacing == (3.0, 2.0, 2.0)
    edit(folder/"participants.tsv", lambda t: t.assign(isup=["n/a", "", "3"]))
    assert "sub-02_ses-1: grade is missing" in told(bids, folder, grade="isup")


def test_bids_lists_everything_that_is_wrong(tmp_path):
    folder = source("bids", tmp_path)
    (folder/"sub-01"/"anat"/"sub-01_T2w.nii.gz").unlink()
    shutil.copy(folder/"sub-03"/"anat"/"sub-03_T2w.nii.gz", folder/"sub-03"/"anat"/"sub-03_run-2_T2w.nii.gz")
    (folder/"sub-03"/"dwi"/"sub-03_dwi.bval").write_text("1000 1000")
    next(folder.rglob("derivatives/*/sub-02/ses-2/anat/*")).unlink()
    edit(folder/"participants.tsv", lambda t: t.assign(participant_id=["sub-01", "sub-02", "sub-04"]))
    text = told(bids, folder)
    for words in (
        "sub-01: t2w: 0 files fit", "sub-03: t2w: 2 files fit", "2 volumes of the highest b-value",
        "sub-02_ses-2: mask of gland: 0 files fit", "sub-04 is in participants.tsv but has no folder",
        "sub-03 has a folder but is not in",
    ):
        assert words in text, text


# tables

HEADINGS = {"case": "id", "t2w": "T2 path", "adc": "ADC path", "mask_gland": "prostate mask", "grade": "result"}

def by_hand(folder: Path) -> Path:
    "The example with headings of its own."
    edit(source("table", folder)/"cases.csv", lambda t: t.rename(columns=HEADINGS))
    return folder


def test_a_table_by_hand(tmp_path):
    folder = by_hand(tmp_path)
    manifest = table_manifest(folder, columns=HEADINGS, grades=("cancer", "benign"), licence="CC0")
    assert (
        manifest.card.grades == ("cancer", "benign")
        and not manifest.card.non_commercial
        and manifest.card.classes == ("background", "gland")
        and manifest.crop == "mask_gland"
    )
    assert (
        manifest.table["note_psa"].tolist() == ["4", "5", "6", "7"]
        and manifest.table["patient"].tolist() == manifest.table["case"].tolist()
    )
    assert "grade is 'cancer'" in told(table_manifest, folder, columns=HEADINGS, grades=("benign", "malignant"))
    assert "no column 'T2 file' (for t2w) and no 'ident' (for case)" in told(
        table_manifest, folder, columns={"t2w": "T2 file", "case": "ident"}
    )
    assert "mask" in told(table_manifest, folder)  # a column of masks that nobody named is asked for
    shutil.copy(folder/"cases.csv", folder/"old.csv")
    assert "has 2 sheets" in told(table_manifest, folder, columns=HEADINGS)
    assert (
        len(table_manifest(folder / "old.csv", columns=HEADINGS))
        == len(table_manifest(folder, columns=HEADINGS, sheet="old.csv"))
        == 4
    )


def test_a_table_lists_everything_that_is_wrong(tmp_path):
    folder = by_hand(tmp_path)
    (folder/"P1"/"ADC.nrrd").unlink()
    edit(
        folder / "cases.csv",
        lambda t: t.assign(
            id=["P0", "P1", "P0", ""],
            **{"prostate mask": ["", *t["prostate mask"][1:]], "T2 path": [*t["T2 path"][:3], "../T2.nrrd"]},
        ),
    )
    text = told(table_manifest, folder, columns=HEADINGS)
    for words in (
        "P1/ADC.nrrd does not exist", "case P0 has 2 rows", "case is missing", "mask_gland is missing",
        "lies outside the root",
    ):
        assert words in text, text


def test_profounds_sheets(tmp_path):
    folder = source("profound", tmp_path)
    manifest = profound(folder)
    assert (
        manifest.card.grades == ("pirads 2", "pirads 3", "pirads 4", "pirads 5")
        and manifest.card.classes == ("background", "gland", "lesion")
        and manifest.table["patient"][0] == "study0"
    )
    edit(
        folder / "train.csv",
        lambda t: t.assign(zone_level="3", gleason=["0", "1", "2", "9"], patient=["a", "a", "b", "c"]).rename(
            columns={"highb": "dwi"}
        ),
    )
    assert "set the option grade" in told(profound, folder)
    assert "c: gleason is '9', expected 0, 1, 2, 3, 4 or unknown" in told(profound, folder, grade="gleason")
    edit(
        folder / "train.csv",
        lambda t: t.assign(case=["a1", "a2", "b", "c"], gleason=["0", "1", "2", "unknown"]).drop(columns="patient"),
    )
    manifest = profound(folder, grade="gleason")
    assert (
        manifest.table["grade"].tolist() == ["gleason 0", "gleason 1", "gleason 2", "unknown"]
        and manifest.table["note_zone_level"].tolist() == ["3"] * 4
        and manifest.table["note_pirads"].tolist() == ["2", "3", "4", "5"]
    )
    edit(
        folder / "train.csv",
        lambda t: t.drop(columns=["case", "gleason"]).assign(
            t2w=["study0/t2w.nii.gz"] * 2 + ["study2/gone.nii.gz", "study3/t2w.nii.gz"]
        ),
    )
    text = told(profound, folder)
    assert "study0 is the folder of several rows" in text and "study2/gone.nii.gz does not exist" in text


# real

# case → folder, ISUP grade
REAL = {
    "11373_1001396": ("prostatex_0000", 3), "10795_1000811": ("prostatex_0001", 1),
    "10001_1000001": ("provicnet_picai_sample", 3),
}
REAL_FILES = {
    "t2w": "t2_tra", "adc": "adc", "hbv": "hbv", "cor": "t2_cor", "sag": "t2_sag", "lesion": "cspca_human",
    "gland": "gland_Bosma22b", "zones": "zones_HeviAI23",
}
SAMPLE_FILES = {"t2w": "t2", "adc": "adc", "hbv": "dwi", "lesion": "lesions", "gland": "mask"}

def picai_tree(real: Path, root: Path) -> Path:
    "The real cases as PI-CAI keeps them, by links; the sample has no zones, so its are empty."
    labels, rows = root/"picai_labels", []
    places = {
        "lesion": labels / PICAI_LESIONS["human"], "gland": labels / layouts_mri.PICAI_GLANDS["Bosma22b"],
        "zones": labels / layouts_mri.PICAI_ZONES["HeviAI23"], "": labels / "clinical_information",
    }
    for p in places.values(): p.mkdir(parents=True)
    for case, (folder, isup) in REAL.items():
        (root/"images"/case.split("_")[0]).mkdir(parents=True)
        for what, name in (SAMPLE_FILES if "sample" in folder else REAL_FILES).items():
            (
                places[what] / f"{case}.nii.gz"
                if what in places
                else root / "images" / case.split("_")[0] / f"{case}_{what}.nii.gz"
            ).symlink_to(real / folder / f"{name}.nii.gz")
        rows.append(
            dict(zip(("patient_id", "study_id"), case.split("_")))
            | dict(case_ISUP=isup, case_csPCa="YES" if isup > 1 else "NO")
        )
    sitk.WriteImage(
        sitk.ReadImage(str(real / "provicnet_picai_sample" / "mask.nii.gz")) * 0,
        str(places["zones"] / "10001_1000001.nii.gz"),
    )
    pd.DataFrame(rows).to_csv(places[""]/"marksheet.csv", index=False)
    return root


def test_real_cases_read_the_same_through_the_layout(runs_root, real_data, tmp_path, monkeypatch):
    "The three real prostates as a PI-CAI folder of links give the volumes of the registered cohort."
    monkeypatch.setenv("VFM_DATA", str(real_data))
    grid = dict(size=(12, 64, 64), spacing=(4, 1.5, 1.5))
    expected = load_cohort("prostate_cases", **grid, n={})
    manifest = picai(picai_tree(real_data, tmp_path/"picai"))
    assert manifest_problems(manifest) == [] and manifest.table["case"].tolist() == sorted(REAL)
    cohort = manifest_cohort(read_manifest(write_manifest(manifest, tmp_path/"cohort")), **grid, n={"test": 3})
    for i, name in enumerate(cohort.names):
        k = expected.names.index(REAL[name][0])
        # here the image and its mask, whose axes the registered cohort takes, are turned against each other by 0.0002
        # rad
        turned = name == "11373_1001396"
        for mine, theirs in zip(cohort.volumes[i], expected.volumes[k]):
            np.testing.assert_allclose(mine, theirs, atol=0.05 * theirs.std() if turned else 1e-3)
        for mine, theirs in ((cohort.labels[i], expected.labels[k]), (cohort.zones[i], expected.zones[k])):
            assert (mine != theirs).mean() <= 1e-4 * turned
        assert cohort.grade[i] == expected.grade[k]


@pytest.mark.parametrize("name", OURS)
def test_the_example_becomes_a_cohort(runs_root, tmp_path, name):
    manifest = layouts[name](source(name, tmp_path))
    n = {} if "split" in manifest.table else {"train": 1, "test": 1}
    cohort = manifest_cohort(manifest, size=(4, 12, 12), spacing=(6, 3, 3), n=n)
    assert (
        cohort_problems(cohort) == []
        and (cohort.labels > 0).any() == (len(manifest.card.classes) > 1)
        and len(cohort) == (len(manifest) if not n else 2)
    )
