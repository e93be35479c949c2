"""Manifests: a table and a card become a cohort, every layout the same way; damage is named, and nothing leaves
silently."""
import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import yaml
from hypothesis import given, settings, strategies as st

import vfm_notes.data
from made_cases import CARD, GLAND, GRID, boxes, message
from vfm_notes.data import cache
from vfm_notes.data.cache import read_cohort
from vfm_notes.data.load import load_cohort
from vfm_notes.data.cohort import cohort_problems
from vfm_notes.data.load import check_manifest, is_picture
from vfm_notes.data.load import manifest_cohort
from vfm_notes.data.load import cohort_maker
from vfm_notes.data.manifest import (
    Manifest, text_table, layouts, resolve_cell, manifest_problems, read_manifest, write_manifest,
)
from vfm_notes.data.volume import read_image, to_array
from vfm_notes.data.dicom import split_address
from vfm_notes.foundation.registry import VfmError

# all layouts register
for module in pkgutil.iter_modules(vfm_notes.data.__path__): importlib.import_module(f"vfm_notes.data.{module.name}")

# the contract of a layout: registering it is being tested

@pytest.fixture(params=list(layouts))
def imported(request, tmp_path, runs_root) -> tuple[str, Path, Manifest]:
    src = tmp_path/"src"
    src.mkdir()
    layouts.card(request.param)["example"](src)
    return request.param, src, layouts[request.param](src)


def tiny_grid(manifest: Manifest) -> dict:
    flat = is_picture(resolve_cell(manifest.root, manifest.table[manifest.card.sequences[0]][0]))
    return (
        dict(size=(1, 8, 8), spacing=manifest.card.spacing)
        if flat
        else dict(size=(4, 16, 16), spacing=manifest.card.spacing)
    )


def test_layout_contract(imported, tmp_path):
    name, src, manifest = imported
    assert layouts.card(name)["title"] and layouts[name].__doc__
    assert manifest_problems(manifest) == [] and len(manifest)
    dest = write_manifest(manifest, tmp_path/"dest")
    again = read_manifest(dest)
    assert again.table.equals(manifest.table) and (again.card, again.crop, again.targets, again.root) == (
        manifest.card, manifest.crop, manifest.targets, manifest.root.resolve(),
    )
    assert check_manifest(again) == []
    cohort = load_cohort(str(dest), **tiny_grid(manifest), n={})
    assert cohort_problems(cohort) == [] and len(cohort) == len(manifest) and not cohort.excluded
    assert set(cohort.names) == set(manifest.table.case) and cohort.volumes.std() > 0
    assert len(set(zip(cohort.patients, cohort.split))) == len(set(cohort.patients)), "a patient is in one split"


def test_layout_names_a_broken_file(imported, tmp_path):
    name, src, manifest = imported
    row = manifest.table.iloc[0]
    path, _ = split_address(resolve_cell(manifest.root, row[manifest.card.sequences[0]]))
    if path.is_dir(): path = sorted(p for p in path.rglob("*") if p.is_file())[0]
    path.write_bytes(path.read_bytes()[:-max(20, path.stat().st_size // 3)])
    said = message(manifest_cohort, manifest, **tiny_grid(manifest), n={})
    assert path.name in said and row.case in said and "\n" not in said
    assert any(path.name in p for p in check_manifest(manifest))
    left = (
        manifest_cohort(manifest, **tiny_grid(manifest), n={}, exclude_bad=True)
        if path.suffix != ".npz" and len(manifest) > 1
        else None
    )
    if left: assert row.case in {e["case"] for e in left.excluded} and row.case not in left.names


def test_the_layouts_of_the_studies_are_there():
    assert {
        "picai", "prostate158", "prostatex", "bids", "medmnist", "aptos2019", "isic2019", "cbis_ddsm", "chexpert",
    } <= set(layouts)


# reading and writing

@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_csv_and_parquet_are_the_same(tmp_path, runs_root, kind):
    manifest = boxes(tmp_path/"a")
    manifest.table = text_table(manifest.table.assign(grade=[0, 1] * 3))
    manifest.card = replace(manifest.card, grades=("0", "1"))
    folder = write_manifest(manifest, tmp_path/"a")
    if kind == "parquet":
        manifest.table.assign(grade=[0, 1] * 3).to_parquet(folder/"manifest.parquet")
        (folder/"manifest.csv").unlink()
    again = read_manifest(folder)
    assert again.table.equals(manifest.table)
    cohort = load_cohort(str(folder), **GRID, n={})
    assert cohort.grade.tolist() == [0, 1] * 3 and cohort.card.licence == "Apache-2.0"


text = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12).map(str.strip).filter(bool)


@given(st.lists(text, min_size=1, max_size=5, unique=True), text, st.lists(text, max_size=3, unique=True))
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, cells, title, grades):
    folder = tmp_path_factory.mktemp("m")
    card = replace(CARD, title=title, note=title, grades=tuple(grades))
    manifest = Manifest(
        text_table(pd.DataFrame({"case": cells, "patient": cells, "note_x": cells[::-1]})), card, folder,
        targets=tuple(grades),
    )
    again = read_manifest(write_manifest(manifest, folder))
    assert (
        again.table.equals(manifest.table)
        and again.card == manifest.card
        and again.targets == tuple(grades)
        and again.root == folder.resolve()
    )


def test_another_cohort_is_not_overwritten(tmp_path):
    folder = write_manifest(boxes(tmp_path), tmp_path)
    write_manifest(boxes(tmp_path, 4), tmp_path)  # the same cohort again is fine
    assert len(read_manifest(folder)) == 4
    assert "holds the cohort 'boxes', not 'other'" in message(
        write_manifest, replace(boxes(tmp_path), card=replace(CARD, name="other")), folder
    )
    (folder/"card.yaml").unlink()
    assert "was not written here" in message(write_manifest, boxes(tmp_path), folder)


@pytest.mark.parametrize("name", ["manifest.csv", "card.yaml"])
def test_what_somebody_changed_by_hand_is_not_overwritten(tmp_path, name):
    folder = write_manifest(boxes(tmp_path), tmp_path)
    edited = (folder/name).read_text(encoding="utf-8") + ("\n" if name == "card.yaml" else "")
    if name == "manifest.csv": edited = "".join(edited.splitlines(True)[:-1])  # a case that somebody left out
    (folder/name).write_text(edited, encoding="utf-8")
    assert f"{name} was written or changed by hand" in message(write_manifest, boxes(tmp_path), folder)
    assert (folder/name).read_text(encoding="utf-8") == edited
    (folder/name).unlink()
    if name == "card.yaml": (folder/"manifest.csv").unlink()
    assert len(read_manifest(write_manifest(boxes(tmp_path), folder))) == 6


def test_a_crash_leaves_no_half_manifest(tmp_path, monkeypatch):
    folder, real = write_manifest(boxes(tmp_path), tmp_path), cache.os.replace
    monkeypatch.setattr(
        cache.os, "replace",
        lambda a, b: (_ for _ in ()).throw(OSError("disk full")) if Path(b).name == "card.yaml" else real(a, b),
    )
    with pytest.raises(OSError): write_manifest(boxes(tmp_path, 4), folder)
    assert "card.yaml does not exist" in message(read_manifest, folder), "a folder with a card is complete"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"licence": None}, "licence is nothing, expected text"),
        ({"sequences": "t2w"}, "sequences is 't2w', expected a list"),
        ({"classes": ["gland"]}, "expected 'background' and"), ({"grades": [True, False]}, "in quotes"),
        ({"spacing": [1, 1]}, "three numbers of mm"), ({"non_commercial": "no"}, "expected true or false"),
        ({"lisence": "x"}, "Did you mean 'licence'"), ({"name": ...}, "name is missing"),
    ],
)
def test_a_wrong_card_is_told(tmp_path, change, words):
    folder = write_manifest(boxes(tmp_path), tmp_path)
    values = yaml.safe_load((folder/"card.yaml").read_text(encoding="utf-8")) | change
    (folder/"card.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not ...}))
    said = message(read_manifest, folder)
    assert words in said and "card.yaml" in said and "\n" not in said


@pytest.mark.parametrize(
    "how, words",
    {
        "no folder": "no manifest.csv", "two tables": "both manifest.csv and manifest.parquet",
        "no card": "card.yaml does not exist", "bad yaml": "not valid YAML", "a list": "expected a mapping",
        "not a table": "cannot be read as a table",
    }.items(),
)
def test_a_folder_that_is_no_cohort(tmp_path, how, words):
    folder = write_manifest(boxes(tmp_path), tmp_path)
    match how:
        case "no folder": folder = tmp_path/"nowhere"
        case "two tables": boxes(tmp_path).table.to_parquet(folder/"manifest.parquet")
        case "no card": (folder/"card.yaml").unlink()
        case "bad yaml": (folder/"card.yaml").write_text("name: [")
        case "a list": (folder/"card.yaml").write_text("- name")
        case "not a table": (folder/"manifest.csv").write_bytes(b"PK\x03\x04case\n")
    assert words in message(read_manifest, folder)


# what may be wrong with a table

def cell(column: str, value: str):
    def change(m: Manifest) -> None: m.table.loc[1, column] = value
    return change


TABLES = {
    "missing column": (lambda m: setattr(m, "table", m.table.drop(columns="adc")), "column 'adc' is missing"),
    "unknown column": (lambda m: m.table.insert(2, "pateint", "x"), "unknown column 'pateint'. Did you mean 'patient'"),
    "duplicate row": (cell("case", "c0"), "case c0 has 2 rows, expected one"),
    "no name": (cell("case", ""), "row 3: case is missing"),
    "no patient": (cell("patient", ""), "c1: patient is missing"),
    "path outside the root": (cell("t2w", "../../etc/x.nii.gz"), "lies outside the root"),
    "absolute path outside": (cell("t2w", "/etc/hostname"), "lies outside the root"),
    "missing sequence": (cell("adc", ""), "c1: adc is missing, expected a path"),
    "absent file": (cell("adc", "nowhere.nii.gz"), "nowhere.nii.gz does not exist"),
    "one file in two rows": (cell("adc", "c0_adc.nii.gz"), "c1: adc is c0_adc.nii.gz, which is also that of c0"),
    "missing label": (cell("mask_gland", ""), "c1: mask_gland is missing, expected a path (or 'none'"),
    "missing grade": (cell("grade", ""), "c1: grade is missing"),
    "grade out of range": (cell("grade", "2"), "c1: grade is '2', expected a name of the card: low, high"),
    "unknown split": (
        lambda m: m.table.insert(2, "split", ["train", "tset"] + ["test"] * 4),
        "c1: split is 'tset', expected one of pretrain, train, val, test. Did you mean 'test'?",
    ),
    "missing split": (lambda m: m.table.insert(2, "split", ["train", ""] + ["test"] * 4), "c1: split is missing"),
    "patient in two splits": (
        lambda m: (m.table.insert(2, "split", ["train", "test"] * 3), cell("patient", "p0")(m)),
        "patient p0 is in the splits test and train",
    ),
    "target": (
        lambda m: (m.table.insert(2, "target_gas", ["0", "yes"] + ["1"] * 4), setattr(m, "targets", ("gas",))),
        "c1: target_gas is 'yes', expected 0 or 1",
    ),
    "missing target": (lambda m: setattr(m, "targets", ("gas",)), "column 'target_gas' is missing"),
    "crop": (lambda m: setattr(m, "crop", "mask_glnd"), "crop is 'mask_glnd', expected 'volume' or a mask column"),
    "root": (lambda m: setattr(m, "root", m.root / "nowhere"), "is not a folder"),
    "no rows": (lambda m: setattr(m, "table", m.table[:0]), "the table has no rows"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_wrong_with_a_table(tmp_path, runs_root, kind):
    manifest, (change, words) = boxes(tmp_path), TABLES[kind]
    assert manifest_problems(manifest) == []
    change(manifest)
    assert any(words in p for p in manifest_problems(manifest)), manifest_problems(manifest)
    assert words in message(manifest_cohort, manifest, **GRID, n={}) and any(
        words in p for p in check_manifest(manifest)
    )


def test_all_problems_of_a_table_are_listed(tmp_path):
    manifest = boxes(tmp_path)
    for i, (column, value) in enumerate([
        ("t2w", ""), ("grade", "huge"), ("adc", "no.nii.gz"), ("mask_gland", ""), ("patient", ""),
    ]):
        manifest.table.loc[i, column] = value
    assert [p.split(":")[0] for p in manifest_problems(manifest)] == ["c0", "c1", "c2", "c3", "c4"]


# geometry

def test_a_grid_of_the_images_spacing_interpolates_nothing(tmp_path, runs_root):
    cohort = manifest_cohort(boxes(tmp_path, 2), **GRID, n={})
    stored = to_array(read_image(tmp_path/"c0_t2w.nii.gz"))
    cut = [stored[k:k + 4, j:j + 12, i:i + 12] for k in range(3) for j in range(5) for i in range(5)]
    best = min(np.abs(cohort.volumes[0, 0] - c).max() for c in cut)
    assert best < 1e-4 and cohort.labels[0].sum() >= (cohort.labels[0] > 0).sum() == GLAND.sum(), (
        "a piece of the file, with the whole gland"
    )


@pytest.mark.parametrize("how", ["flipped", "nrrd", "mha", "shifted grid"])
def test_the_same_anatomy_gives_the_same_arrays(tmp_path, runs_root, how):
    manifest = boxes(tmp_path, 2)
    plain = manifest_cohort(manifest, **GRID, n={})
    match how:
        case "flipped":
            for p in tmp_path.glob("c0_*"): sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(p)), "PIR"), str(p))
        case "nrrd" | "mha":
            sitk.WriteImage(sitk.ReadImage(str(tmp_path/"c0_t2w.nii.gz")), str(tmp_path/f"c0.{how}"))
            manifest.table.loc[0, "t2w"] = f"c0.{how}"
        case "shifted grid":
            image = sitk.ConstantPad(sitk.ReadImage(str(tmp_path/"c0_adc.nii.gz")), (3, 2, 1), (1, 4, 2), 0)
            sitk.WriteImage(image, str(tmp_path/"c0_adc.nii.gz"))
    other = manifest_cohort(manifest, **GRID, n={})
    np.testing.assert_allclose(other.volumes, plain.volumes, atol=1e-4)
    assert np.array_equal(other.labels, plain.labels)


# splits

@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1)), min_size=4, max_size=30), st.integers(0, 50),
    st.tuples(*[st.integers(0, 6)] * 4),
)
@settings(max_examples=60, deadline=None)
def test_splits_never_share_a_patient(rows, seed, counts):
    plan = cache.DecodePlan(
        CARD, [cache.CaseSource(f"c{i}", f"p{p}", tuple, grade=g) for i, (p, g) in enumerate(rows)], (1, 1, 1),
        {k: v for k, v in zip(cache.SPLITS, counts) if v} or {"train": 1}, seed, {},
    )
    try: used = cache.assign_splits(plan, {})
    except VfmError: return
    homes = {}
    for s, split in used: homes.setdefault(s.patient, set()).add(split)
    assert all(len(h) == 1 for h in homes.values())
    assert [s.name for s, _ in used] == [s.name for s, _ in cache.assign_splits(plan, {})], "reproducible"
    assert [cache.SPLITS.index(k) for _, k in used] == sorted(cache.SPLITS.index(k) for _, k in used), (
        "a split is one piece"
    )
    assert all(sum(h == k for _, h in used) <= v for k, v in plan.n.items())


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_given_splits_are_kept_and_nested(a, b, seed):
    sources = [cache.CaseSource(f"c{i}", f"p{i}", tuple, split=cache.SPLITS[i % 4], grade=i % 3) for i in range(24)]
    used = lambda k: dict(
        (s.name, home)
        for s, home in cache.assign_splits(cache.DecodePlan(CARD, sources, (1, 1, 1), {"train": k}, seed, {}), {})
    )
    small, large = used(min(a, b)), used(max(a, b))
    assert set(small) <= set(large) and set(large.values()) == {"train"} and all(int(c[1:]) % 4 == 1 for c in large)


def test_too_many_cases_are_told_in_one_sentence(tmp_path, runs_root):
    manifest = boxes(tmp_path)
    manifest.table.insert(2, "split", ["train"] * 4 + ["test"] * 2)
    assert "requested are 5 of split 'train', which has 4" in message(manifest_cohort, manifest, **GRID, n={"train": 5})
    (tmp_path/"c0_t2w.nii.gz").unlink()
    said = message(manifest_cohort, manifest, **GRID, n={"train": 4}, exclude_bad=True)
    assert "boxes without its 1 bad case has too few cases" in said and "4 of split 'train', which has 3" in said


def test_another_case_takes_the_place_of_a_bad_one(tmp_path, runs_root):
    manifest, n = boxes(tmp_path, 8), {"train": 4, "test": 2}
    whole = manifest_cohort(manifest, **GRID, n=n, exclude_bad=True)
    assert whole.excluded == []
    victim = whole.names[0]
    (tmp_path/f"{victim}_adc.nii.gz").write_bytes(b"")
    rest = manifest_cohort(manifest, **GRID, n=n, exclude_bad=True)
    assert (
        victim not in rest.names
        and len(rest) == 6
        and [e["case"] for e in rest.excluded] == [victim]
        and "is empty" in rest.excluded[0]["reason"]
    )
    assert [c.excluded for p in (runs_root / "cache").iterdir() if (c := read_cohort(p)) and c.excluded] == [
        rest.excluded
    ], "also from the cache"


# names

def test_a_cohort_is_found_by_path_and_by_name(tmp_path, runs_root, monkeypatch):
    write_manifest(boxes(tmp_path/"mine", 4), tmp_path/"mine")
    by_path = load_cohort(str(tmp_path/"mine"), **GRID, n={})
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    assert load_cohort("mine", **GRID, n={}).hash() == by_path.hash()
    assert "Unknown cohort 'mein'" in message(cohort_maker, "mein") and "manifest.csv and card.yaml" in message(
        cohort_maker, "mein"
    )


# pictures

def test_pictures_are_volumes_of_one_slice(tmp_path, runs_root):
    rng = np.random.default_rng(0)
    np.savez(tmp_path/"set.npz", images=rng.integers(0, 255, (4, 9, 9), dtype=np.uint8))
    card = replace(CARD, name="pictures", sequences=("grey",), classes=("background",), grades=("no", "yes"))
    manifest = Manifest(
        text_table(
            pd.DataFrame({
                "case": list("abcd"), "patient": list("abcd"),
                "grey": [f"set.npz#images/{i}" for i in range(4)],
                "grade": ["no", "yes"] * 2, "target_x": [0, 1, 1, 0], "target_y": [1, 1, 0, 0],
            })
        ),
        card,
        tmp_path,
        targets=("x", "y"),
    )
    cohort = manifest_cohort(read_manifest(write_manifest(manifest, tmp_path)), (1, 9, 9), (1, 1, 1), {})
    assert cohort.volumes.shape == (4, 1, 1, 9, 9) and not cohort.labels.any() and cohort_problems(cohort) == []
    assert cohort.targets.tolist() == [[0, 1], [1, 1], [1, 0], [0, 0]] and cohort.card.targets == ("x", "y")
    assert cohort.describe().loc[0, "x"] == 2
    assert "is a picture, the study's size is [2, 9, 9]" in message(manifest_cohort, manifest, (2, 9, 9), (1, 1, 1), {})
