"""Tables, masks and stubs as others leave them: read as what they are, or refused in a sentence that helps."""
import json
import re
import shlex
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from made_cases import GLAND, GRID, boxes, message, nifti, picture_of
from vfm_notes.data.load import check_manifest
from vfm_notes.data.load import manifest_cohort
from vfm_notes.data.load import load_entries
from vfm_notes.data.manifest import layouts, manifest_problems, read_manifest, write_manifest
from vfm_notes.data.nifti import mask_values
from vfm_notes.data.picture import read_picture, read_picture_mask
from vfm_notes.data.sheets import read_sheet
from vfm_notes.data.volume import read_image, read_mask
from vfm_notes.nets.files import read_state
from vfm_notes.report.data_commands import layout_options

load_entries()
table = layouts["table"]


def scans(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names): nifti(folder/name, picture_of(i))
    return folder


def written(folder: Path, text: str, name: str = "cases.csv", encoding: str = "utf-8") -> Path:
    (folder/name).write_bytes(text.encode(encoding))
    return folder


def options(advice: str) -> dict:
    "The options that a message proposes, as the command line would take them."
    found = re.findall(r"-o ('(?:[^']|'\"'\"')*'|\S+)", advice)
    return layout_options("table", [shlex.split(found[0])[0]])


# what hospitals and other programs export

EXPORTS = {
    "Excel, German: semicolons, BOM, decimal commas, an empty "
    "row": ("case;t2w;PSA\r\na;a.nii;4,5\r\nb;b.nii;6,1\r\n;;\r\n", "utf-8-sig", {}),
    "Excel, Unicode text": ("case\tt2w\tgrade\r\na\ta.nii\tlow\r\nb\tb.nii\thigh\r\n", "utf-16", {}),
    "Excel, with its own first line": ("sep=;\r\ncase;t2w\r\na;a.nii\r\nb;b.nii\r\n", "utf-8", {}),
    "typed: a space after the comma": ("case, t2w\na, a.nii\nb, b.nii\n", "utf-8", {}),
    "pandas, with its row numbers": (",case,t2w\n0,a,a.nii\n1,b,b.nii\n", "utf-8", {}),
    "R: quotes around everything": ('"case","t2w","site"\n"a","a.nii","Jena, Haus 2"\n"b","b.nii","x"\n', "utf-8", {}),
    "REDCap": ("record_id,redcap_event_name,t2w_path,psa\na,baseline_arm_1,a.nii,4.5\nb,baseline_arm_1,b.nii,6\n",
    "utf-8", {"columns": {"case": "record_id", "t2w": "t2w_path"}}),
    "BIDS participants.tsv with a column of paths": ("participant_id\tage\tT2w\na\t61\ta.nii\nb\tn/a\tb.nii\n",
    "utf-8", {"columns": {"case": "participant_id"}}),
    "capitals": ("Case,Patient,T2W\na,1,a.nii\nb,2,b.nii\n", "utf-8", {}),
    "a trailing separator": ("case,t2w,\na,a.nii,\nb,b.nii,\n", "utf-8", {}),
    "bars": ("case|t2w\na|a.nii\nb|b.nii\n", "utf-8", {}),
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_exports_are_read(tmp_path, kind):
    text, encoding, more = EXPORTS[kind]
    manifest = table(written(scans(tmp_path, "a.nii", "b.nii"), text, encoding=encoding), **more)
    assert manifest.table[["case", "t2w"]].values.tolist() == [["a", "a.nii"],
        ["b", "b.nii"]] and manifest.card.sequences == ("t2w",)
    if "PSA" in text: assert manifest.table["note_psa"].tolist() == ["4,5", "6,1"]
    if "Jena" in text: assert manifest.table["site"].tolist() == ["Jena, Haus 2", "x"]


REFUSED = {
    "a workbook that was renamed": (b"PK\x03\x04\x14\x00\x06\x00", "workbook of Excel or LibreOffice.*CSV UTF-8"),
    "an old workbook": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Excel"),
    "an 8-bit encoding": ("case,t2w,Größe\na,a.nii,1\n".encode("cp1252"), r"byte 0xf6 in line 1 is not UTF-8.*CSV "
    r"UTF-8"),
    "two columns of one name": (b"case,t2w,age,age\na,a.nii,1,2\n", "column 'age' more than once"),
    "a decimal comma between commas": (b"case,t2w,PSA\na,a.nii,4,5\nb,b.nii,6\n", "line 2 has 4 cells, the heading 3"),
    "a separator that cannot be told": (b"case,t2w;age\na,a.nii;1\n", "commas and semicolons.*sep=;"),
    "two columns that mean the same": (b"Case,case,t2w\na,b,a.nii\n", "several columns for case"),
    "a grade that may be missing": (b"case,t2w,grade\na,a.nii,n/a\nb,b.nii,1\n", "grade 'n/a', which may stand for a "
    "missing value"),
    "no images": (b"case,age\na,61\n", "no column of images"),
    "nothing": (b"case,t2w\n", "has no rows"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_told(tmp_path, kind):
    data, words = REFUSED[kind]
    (scans(tmp_path, "a.nii", "b.nii")/"cases.csv").write_bytes(data)
    said = message(table, tmp_path)
    assert re.search(words, said) and "\n" not in said, said


@pytest.mark.parametrize("text", ["id,MTT map\na,a.nii\nb,b.nii\n", "Study ID;Pfad: Bild\na;a.nii\nb;b.nii\n",
    "nr,age,it's here\na,61,a.nii\nb,62,b.nii\n"])
def test_advice_works_when_it_is_typed(tmp_path, text):
    "The case is asked for; a column of images is a sequence under its own name."
    written(scans(tmp_path, "a.nii", "b.nii"), text)
    manifest = table(tmp_path, **options(message(table, tmp_path)))
    assert manifest.table["case"].tolist() == ["a",
        "b"] and len(manifest.card.sequences) == 1 and manifest_problems(manifest) == []


def test_advice_knows_a_folder_of_slices(tmp_path):
    (tmp_path/"S1").mkdir()
    written(tmp_path, "case,series\na,S1\n")
    assert "S1 is a folder without files; expected the slices" in message(table, tmp_path)  # taken for a sequence


def test_a_column_of_images_that_sounds_like_a_mask_is_asked_for(tmp_path):
    written(scans(tmp_path, "a.nii", "m.nii"), "case,CT,Tumour seg\na,a.nii,m.nii\n")
    said = message(table, tmp_path)
    assert "'Tumour seg' holds images and sounds like a mask" in said
    as_mask = table(tmp_path, columns={"mask_tumour": "Tumour seg"})
    assert as_mask.card.sequences == ("ct",) and as_mask.card.classes == ("background", "tumour")
    as_note = table(tmp_path, columns={"note_seg": "Tumour seg"})
    assert as_note.card.sequences == ("ct",) and as_note.table["note_seg"].tolist() == ["m.nii"]


@pytest.mark.parametrize("given, words", [({"columns": "id"}, "columns is 'id'"),
    ({"classes": "gland"}, "classes is 'gland', expected a list"), ({"grades": [True]}, "grades is .True."),
                                          ({"classes": ["gland"]}, "no column label"),
                                          ({"grades": ["a", "b"]}, "no column grade"),
                                          ({"columns": {"t2w": "T2"}}, "no column 'T2'"),
                                          ({"columns": {"T2 w": "t2w"}}, "sequence 'T2 w'"),
                                          ({"threshold": "half"}, "threshold is 'half', expected a number"),
                                          ({"threshold": 0.5}, "no column of masks")])
def test_options_of_the_table_are_checked(tmp_path, given, words):
    assert re.search(words, message(table, written(scans(tmp_path, "a.nii"), "case,t2w\na,a.nii\n"), **given))


def test_any_sequence_may_have_a_name(tmp_path):
    written(scans(tmp_path, "a.nii", "b.nii", "c.nii"), "case,CT,Tmax,CT portal phase\na,a.nii,b.nii,c.nii\n")
    assert table(tmp_path).card.sequences == ("ct", "tmax", "ct_portal_phase")
    assert table(tmp_path, columns={"perfusion": "Tmax", "note_x": "CT portal phase"}).card.sequences == (
        "ct", "perfusion")


# the Decathlon's index

@pytest.mark.parametrize("change, words", [
    (dict(training=["imagesTr/a.nii.gz"]), r'training holds "imagesTr/a.nii.gz", expected a list of \{"image"'),
    (dict(training={"image": "a"}), "training holds"),
    (dict(training=[{"image": "a.nii"}]), "training holds"), (dict(training=[{"image": "/elsewhere/a.nii",
    "label": "b.nii"}]), "outside"), (dict(labels=["background", "a"]), "labels is .*expected names by number"),
    (dict(labels={"background": "0", "a": "1"}), "labels has the keys background, a"),
    (dict(training=None, channel_names={"0": "T2"}), "nnU-Net.*layout table")])
def test_variants_of_a_decathlon_index(tmp_path, change, words):
    index = dict(name="X", modality={"0": "MRI"}, labels={"0": "background", "1": "a"},
        training=[{"image": "a.nii", "label": "b.nii"}]) | change
    (tmp_path/"dataset.json").write_text(json.dumps(index))
    said = message(layouts["msd"], tmp_path)
    assert re.search(words, said) and "\n" not in said, said


# grades and labels

def test_a_grade_is_a_name_and_never_an_index(tmp_path, runs_root):
    written(scans(tmp_path, "a.nii", "b.nii", "c.nii"), "case,t2w,grade\na,a.nii,1\nb,b.nii,2.0\nc,c.nii,10\n")
    assert "a: grade is '1', expected a name of the card: 2, 3, 10" in message(table, tmp_path, grades=[2, 3, 10])
    manifest = table(tmp_path)
    assert manifest.card.grades == ("1", "2", "10"), "numbers as numbers"
    assert manifest_cohort(manifest, **GRID, n={}).grade.tolist() == [0, 1, 2]
    assert table(tmp_path, grades=[10, 2.0, "1"]).card.grades == ("10", "2", "1")
    folder = write_manifest(manifest, tmp_path/"out")
    (folder/"manifest.csv").write_text((folder/"manifest.csv").read_text().replace(",10\n", ",0\n"))
    assert any("c: grade is '0'" in p for p in check_manifest(read_manifest(folder)))


def test_bids_orders_grades_as_numbers(tmp_path):
    layouts.card("bids")["example"](tmp_path)
    sheet = pd.read_csv(tmp_path/"participants.tsv", sep="\t").assign(score=[10, 9, 2])
    sheet.to_csv(tmp_path/"participants.tsv", sep="\t", index=False)
    assert layouts["bids"](tmp_path, grade="score").card.grades == ("2", "9", "10")


def test_targets_may_be_written_as_numbers(tmp_path, runs_root):
    manifest = table(written(scans(tmp_path, "a.nii", "b.nii"), "case,t2w,target_x\na,a.nii,1.0\nb,b.nii,0\n"))
    assert manifest_cohort(manifest, **GRID, n={}).targets.tolist() == [[1], [0]]


def test_a_label_column_needs_names(tmp_path, runs_root):
    nifti(scans(tmp_path, "a.nii")/"label.nii", GLAND)
    written(tmp_path, "case,t2w,label\na,a.nii,label.nii\n")
    said = message(table, tmp_path)
    assert "column label" in said and table(tmp_path, **options(said)).card.classes == ("background", "gland", "lesion")
    folder = write_manifest(table(tmp_path, classes=["gland"]), tmp_path/"out")
    text = (folder/"card.yaml").read_text()
    (folder/"card.yaml").write_text(text.replace("- background\n- gland\n", "- background\n"))
    assert any("column 'label' is there, but the card names no classes" in p
        for p in check_manifest(read_manifest(folder)))


# the values of masks

WRONG = {"fractions": (GLAND * 0.7, "between whole numbers"), "minus one": (GLAND * 2.0 - 1, "negative values"), "no "
    "background": (GLAND + 1, "no background"),
         "lost sharpness": (GLAND * 250 + np.arange(6) % 3, "lost sharpness"), "an "
         "image": (np.arange(16 * 16 * 6).reshape(16, 16, 6), "so it is an image")}


@pytest.mark.parametrize("kind", WRONG)
def test_a_mask_of_other_values_is_refused_or_has_a_threshold(tmp_path, runs_root, kind):
    "In volumes; the advice gives a threshold that works where the mask is a soft one."
    values, words = WRONG[kind]
    manifest = boxes(tmp_path, 2, mask_lesion=None)
    manifest.card = replace(manifest.card, classes=("background", "gland"))
    nifti(tmp_path/"c0_gland.nii.gz", np.asarray(values, np.float32))
    said = [p for p in check_manifest(manifest) if "c0" in p]
    assert len(said) == 1 and words in said[0] and "threshold" in said[0], said
    limit = float(re.search(r"threshold: (\S+) in card.yaml", said[0])[1])
    with_limit = read_manifest(write_manifest(replace(manifest, threshold=limit), tmp_path/"out"))
    nifti(tmp_path/"c1_gland.nii.gz", np.asarray(values, np.float32))
    if kind in ("fractions", "minus one", "lost sharpness"):
        assert (manifest_cohort(with_limit, **GRID, n={}).labels[0] == 1).sum() == GLAND.sum()


@pytest.mark.parametrize("values", [GLAND * 255, GLAND * 3, GLAND * 1.0000001, GLAND * 0.9995,
    GLAND + GLAND * (np.arange(6) > 2)], ids=["255", "3", "nearly", "by a scale", "two parts"])
def test_masks_that_are_fine(tmp_path, values):
    nifti(tmp_path/"m.nii", np.asarray(values, np.float32))
    assert np.array_equal(sitk.GetArrayFromImage(read_mask(tmp_path/"m.nii")),
        sitk.GetArrayFromImage(read_image(nifti(tmp_path/"g.nii", GLAND) and tmp_path/"g.nii", constant=True)))


def test_the_tolerance_of_whole_numbers_is_a_thousandth():
    for off, fine in ((0.0009, True), (0.0011, False)):
        values = np.array([0, 1 + off, 2])
        if fine:
            assert mask_values(values, "x", range(3)).tolist() == [0, 1, 2] and mask_values(values,
                "x").tolist() == [0, 1, 1]
        else:
            assert "1.0011" in message(mask_values, values, "x", range(3)) and "1.0011" in message(mask_values,
                values, "x")


# pictures

PHOTO = np.random.default_rng(3).integers(1, 255, (12, 20), dtype=np.uint8)
MARK = np.zeros((12, 20), np.uint8)
MARK[2:6, 3:15] = 1


def save(path: Path, values: np.ndarray) -> str:
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=values.ndim == 3), str(path))
    return path.name


def pictures(folder: Path, mask: np.ndarray, photo: np.ndarray = PHOTO, ending: str = "png"):
    save(folder/f"a.{ending}", photo)
    save(folder/"m.png", mask)
    return table(written(folder, f"case,us,mask_gland\na,a.{ending},m.png\n"))


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_pictures_in_a_table(tmp_path, runs_root, ending):
    manifest = pictures(tmp_path, MARK * 255, ending=ending)
    assert check_manifest(manifest) == [] and manifest.card.sequences == ("us",
        ) and "size of a pixel" in manifest.card.note
    cohort = manifest_cohort(replace(manifest, crop="volume"), (1, 12, 20), (1, 1, 1), {})
    assert np.array_equal(cohort.labels[0, 0], MARK) and (ending == "jpg"
        or np.array_equal(cohort.volumes[0, 0, 0], PHOTO / np.float32(255)))


def test_colour_pictures_in_a_table_are_three_sequences(tmp_path, runs_root):
    manifest = pictures(tmp_path, MARK, np.stack([PHOTO, PHOTO // 2, PHOTO // 3], -1))
    assert manifest.card.sequences == ("red", "green", "blue") and check_manifest(manifest) == []
    cohort = manifest_cohort(manifest, (1, 12, 20), (1, 1, 1), {})
    assert np.array_equal(cohort.volumes[0, 1, 0], (PHOTO // 2) / np.float32(255))


@pytest.mark.parametrize("mask, words", [
    (MARK[:6], "has 20x6 pixels, expected as many as a picture of the case"),
    (np.stack([MARK * 255, MARK, MARK], -1), "is coloured"), (MARK * 250 + PHOTO % 3, "lost sharpness"),
    (MARK + 1, "no background")])
def test_masks_of_pictures_are_checked_as_those_of_volumes(tmp_path, mask, words):
    said = check_manifest(pictures(tmp_path, mask))
    assert len(said) == 1 and words in said[0] and "m.png" in said[0], said


def test_grey_masks_saved_in_colour_and_labels_of_pictures(tmp_path, runs_root):
    assert check_manifest(pictures(tmp_path, np.stack([MARK * 255] * 3, -1))) == []
    save(tmp_path/"m.png", MARK * 2)
    manifest = table(written(tmp_path, "case,us,label\na,a.png,m.png\n"), classes=["a", "b"])
    assert np.array_equal(manifest_cohort(manifest, (1, 12, 20), (1, 1, 1), {}).labels[0, 0], MARK * 2)
    assert "has the values 2, expected only 0, 1" in check_manifest(table(tmp_path, classes=["a"]))[0]


def exif(orientation: int) -> bytes: return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1,
    orientation, 0) + b"\0\0\0\0"


# what the tag says of the stored picture: (side that row 0 shows, side that column 0 shows), EXIF 2.3, table 6
TURNS = {1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"), 5: ("left", "top"),
    6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}


@pytest.mark.parametrize("orientation", TURNS)
def test_a_turned_picture_is_upright_and_so_is_its_mask(tmp_path, orientation):
    upright = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
    side = {"top": upright[0], "bottom": upright[-1], "left": upright[:, 0], "right": upright[:, -1]}
    row, column = (side[s] for s in TURNS[orientation])
    stored = next(s for s in (f(t) for t in (upright, upright.T) for f in (lambda x: x, lambda x: x[::-1],
        lambda x: x[:, ::-1], lambda x: x[::-1, ::-1]))
                  if len(s[0]) == len(row) and set(s[0]) == set(row) and set(s[:, 0]) == set(column))
    data = (tmp_path/save(tmp_path/"a.png", np.ascontiguousarray(stored))).read_bytes()
    chunk = b"eXIf" + exif(orientation)
    (tmp_path/"a.png").write_bytes(data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I",
        zlib.crc32(chunk)) + data[33:])
    assert np.array_equal(read_picture_mask(tmp_path/"a.png"), upright)
    assert np.array_equal(np.rint(read_picture(tmp_path/"a.png")[0, 0] * 255), upright)
    jpeg = (tmp_path/save(tmp_path/"a.jpg", np.ascontiguousarray(stored))).read_bytes()
    part = b"Exif\0\0" + exif(orientation)
    (tmp_path/"a.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part + jpeg[2:])
    assert np.abs(read_picture(tmp_path/"a.jpg")[0, 0] * 255 - upright).max() < 40


# stubs

STUBS = {"lfs": "git lfs pull", "annex link": "git annex get {name}", "annex text": "git annex get {name}", "dvc "
    "beside": "dvc pull {name}.dvc", "dvc inside": "dvc pull {name}"}


def stub(path: Path, kind: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    text = "outs:\n- md5: d41d8cd98f00b204e9800998ecf8427e\n  size: 12\n  path: x\n"
    if kind == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid "
            "sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n")
    if kind == "annex link": path.symlink_to("../.git/annex/objects/Gx/1W/MD5E-s12--d41d/MD5E-s12--d41d")
    if kind == "annex text": path.write_text("/annex/objects/MD5E-s12345--d41d8cd98f00b204e9800998ecf8427e\n")
    if kind == "dvc beside": path.with_name(f"{path.name}.dvc").write_text(text)
    if kind == "dvc inside": path.write_text(text)
    return path


def card_of(path: Path) -> object: return read_manifest(path.parent)


def slices_of(path: Path) -> object:
    (path.parent/"a.dcm").write_bytes(b"x")
    return read_image(path.parent)


READERS = {"t2w.nii.gz": read_image, "t2w.mha": read_image, "a.png": read_picture, "a.tif": read_picture_mask,
    "set.npz": lambda p: read_picture(f"{p}#images/0"), "cases.csv": read_sheet, "model.pth": read_state,
           "model.safetensors": read_state, "model.onnx": read_state,
           "dataset.json": lambda p: layouts["msd"](p.parent), "card.yaml": card_of, "series/b.dcm": slices_of}


@pytest.mark.parametrize("kind", STUBS)
@pytest.mark.parametrize("name", READERS)
def test_a_stub_is_named_by_every_reader(tmp_path, name, kind):
    if name == "series/b.dcm" and kind == "dvc beside":
        pytest.skip("a slice that is not there leaves no trace in its folder but the .dvc file itself")
    path = stub(tmp_path/name, kind)
    if name == "card.yaml": written(tmp_path, "case\na\n", "manifest.csv")
    said = message(READERS[name], path)
    command = STUBS[kind].format(name=path.name)
    assert f"is a pointer to content that was never fetched: run '{command}' in {path.parent}" in said, said
    assert "\n" not in said


@pytest.mark.parametrize("kind", STUBS)
def test_stubs_of_a_cohort_are_told_before_anything_is_decoded(tmp_path, kind):
    manifest = boxes(tmp_path, 2)
    stub(tmp_path/"c1_adc.nii.gz", kind)
    assert [p for p in manifest_problems(manifest) if "never fetched" in p and p.startswith("c1: adc: ")]


def test_a_folder_of_dvc_is_fetched_as_a_whole(tmp_path):
    stub(tmp_path/"images", "dvc beside")
    assert f"run 'dvc pull images.dvc' in {tmp_path}" in message(read_image, tmp_path/"images"/"deep"/"a.nii.gz")
