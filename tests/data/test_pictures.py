"""Pictures and sets of pictures: files made byte by byte, bad files, and every published split and label rule against
another implementation."""
import random
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings, strategies as st

from vfm_notes.data import picture
from vfm_notes.data.cohort import cohort_problems
from vfm_notes.data.load import manifest_cohort
from vfm_notes.data.loader import normalise
from vfm_notes.data.manifest import layouts
from vfm_notes.data.picture import read_picture, resize_picture, resize_crop
from vfm_notes.data.layouts_pictures import MEDMNIST, aptos2019, cbis_ddsm, chexpert, isic2019, medmnist
from vfm_notes.data.picture_splits import (
    CHEXPERT, ISIC, STATISTICS, chexpert_labels, chexpert_parts, keep_together, one_hot_grades, shuffled_split,
)
from vfm_notes.foundation.registry import VfmError

RNG = np.random.default_rng(0)
GREY, RGB = RNG.integers(0, 256, (20, 24), dtype=np.uint8), RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)


def message(function, *args, **kwargs) -> str:
    with pytest.raises(VfmError) as caught: function(*args, **kwargs)
    return str(caught.value)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(path: Path, rows: np.ndarray, width: int, bits: int, colour: int, *more: bytes) -> Path:
    "A PNG by the letter of its specification; rows: (h, ...) of bytes or big-endian words."
    body = zlib.compress(b"".join(b"\0" + r.tobytes() for r in rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0))
        + b"".join(more)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )
    return path


def jpeg(path: Path, values: np.ndarray) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=values.ndim == 3), str(path))
    return path


def dicom(path: Path, values: np.ndarray, photometric: str = "MONOCHROME2") -> Path:
    image = sitk.GetImageFromArray(values)
    image.SetMetaData("0008|0060", "DX")
    sitk.WriteImage(image, str(path))
    path.write_bytes(path.read_bytes().replace(b"MONOCHROME2", photometric.encode()))
    return path


# reading

def test_png_of_each_kind(tmp_path):
    high, palette, bits = (
        RNG.integers(0, 65536, (20, 24)).astype(">u2"), RNG.integers(0, 256, (256, 3), dtype=np.uint8),
        RNG.integers(0, 2, (20, 24), dtype=np.uint8),
    )
    deep, opaque = (
        RNG.integers(0, 65536, (20, 24, 3)).astype(">u2"),
        np.concatenate([RGB, np.full((20, 24, 1), 255, np.uint8)], -1),
    )
    made = {
        "grey": ((GREY, 24, 8, 0), GREY / 255), "grey16": ((high, 24, 16, 0), high / 65535),
        "rgb": ((RGB, 24, 8, 2), RGB / 255), "rgb16": ((deep, 24, 16, 2), deep / 65535),
        "rgba": ((opaque, 24, 8, 6), RGB / 255),
        "palette": ((GREY, 24, 8, 3, chunk(b"PLTE", palette.tobytes())), palette[GREY] / 255),
        "one bit": ((np.packbits(bits, axis=1), 24, 1, 0), bits),
    }
    for name, (parts, expected) in made.items():
        read = read_picture(png(tmp_path/f"{name}.png", *parts))
        expected = expected[..., None] if expected.ndim == 2 else expected
        assert read.dtype == np.float32 and read.shape == (expected.shape[-1], 1, 20, 24), name
        np.testing.assert_allclose(np.moveaxis(read[:, 0], 0, -1), expected, atol=1e-6, err_msg=name)


def test_channels_by_name(tmp_path):
    path, grey = png(tmp_path/"x.png", RGB, 24, 8, 2), png(tmp_path/"g.png", GREY, 24, 8, 0)
    for k, name in enumerate(("red", "green", "blue")):
        np.testing.assert_allclose(read_picture(f"{path}#{name}")[0, 0], RGB[..., k] / 255, atol=1e-6)
    np.testing.assert_allclose(
        read_picture(f"{path}#grey")[0, 0], RGB.astype(float) @ [299, 587, 114] / 255000, atol=1e-6
    )
    np.testing.assert_array_equal(read_picture(f"{grey}#grey"), read_picture(grey))
    assert "Did you mean 'green'?" in message(read_picture, f"{path}#gren") and "of a grey picture" in message(
        read_picture, f"{grey}#red"
    )


def test_jpeg_is_near_what_was_written(tmp_path):
    smooth = (np.add.outer(np.arange(40), np.arange(60)) * 2).astype(np.uint8)
    assert np.abs(read_picture(jpeg(tmp_path/"x.JPG", smooth))[0, 0] * 255 - smooth).mean() < 2


def test_a_thumbnail_does_not_hide_that_a_jpeg_is_cut(tmp_path):
    data = jpeg(tmp_path/"x.jpg", RGB).read_bytes()
    thumb = data[:2] + b"\xff\xe1" + struct.pack(">H", 12) + b"thumb\xff\xd8\xff\xd9.." [:10] + data[2:]
    (tmp_path/"thumb.jpg").write_bytes(thumb)
    assert read_picture(tmp_path/"thumb.jpg").shape == (3, 1, 20, 24)
    (tmp_path/"cut.jpg").write_bytes(thumb[:-20])
    assert "cut off" in message(read_picture, tmp_path/"cut.jpg")


def test_dicom_values_are_kept_and_inverted_where_high_is_dark(tmp_path):
    values = RNG.integers(-1000, 2000, (1, 20, 24)).astype(np.int16)
    np.testing.assert_array_equal(read_picture(dicom(tmp_path/"x.dcm", values))[0], values)
    inverted = read_picture(dicom(tmp_path/"y.dcm", values, "MONOCHROME1"))[0]
    assert np.ptp(inverted + values) == 0, "high is bright again"
    assert "cannot be read as a picture" in message(read_picture, _text(tmp_path/"z.dcm"))


def _text(path: Path) -> Path:
    path.write_text("Dear colleague,\nthe picture is in the other letter.\n" * 4)
    return path


def archive(path: Path, **more) -> Path:
    np.savez_compressed(
        path, images=np.stack([GREY, GREY // 2]), colour=np.stack([RGB, 255 - RGB]),
        ct=np.stack([GREY.astype(np.int16) - 1024]), **more,
    )
    return path


def test_archive_entries(tmp_path, monkeypatch):
    path, calls, load = archive(tmp_path/"set.npz"), [], np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: calls.append(k) or load(*a, **k))
    np.testing.assert_allclose(read_picture(f"{path}#images/1")[0, 0], (GREY // 2) / 255, atol=1e-6)
    np.testing.assert_allclose(read_picture(f"{path}#colour/1/blue")[0, 0], 1 - RGB[..., 2] / 255, atol=1e-6)
    np.testing.assert_array_equal(read_picture(f"{path}#ct/0")[0, 0], GREY.astype(float) - 1024)
    for i in range(2): read_picture(f"{path}#images/{i}")
    assert len(calls) == 3 and all(k == {"allow_pickle": False} for k in calls), (
        "each array is read once, and never unpickled"
    )
    np.savez(path, images=np.stack([255 - GREY, GREY]))
    np.testing.assert_allclose(
        read_picture(f"{path}#images/0")[0, 0], 1 - GREY / 255, atol=1e-6, err_msg="a changed file is read again"
    )


def damage(kind: str, folder: Path) -> str:
    good, shot = png(folder/"good.png", RGB, 24, 8, 2), jpeg(folder/"good.jpg", RGB)
    path, transparent = folder/f"{kind.replace(' ', '_')}.png", np.concatenate([RGB, RGB[..., :1]], -1)
    flipped = bytearray(good.read_bytes())
    flipped[60] ^= 1
    match kind:
        case "folder": path.mkdir()
        case "empty": path.write_bytes(b"")
        case "ending": shutil.copy(good, path := folder/"x.bmp")
        case "text": _text(path)
        case "text jpeg": path = _text(folder/"x.jpg")
        case "jpeg named png": shutil.copy(shot, path)
        case "png named jpeg": shutil.copy(good, path := folder/"y.jpg")
        case "cut png": path.write_bytes(good.read_bytes()[:-20])
        case "cut to the signature": path.write_bytes(good.read_bytes()[:8])
        case "flipped bit": path.write_bytes(bytes(flipped))
        case "cut jpeg": (path := folder/"cut.jpg").write_bytes(shot.read_bytes()[:-100])
        case "jpeg header": (path := folder/"head.jpg").write_bytes(shot.read_bytes()[:40])
        case "transparent": png(path, transparent, 24, 8, 6)
        case "grey with alpha": png(path, transparent[..., :2], 24, 8, 4)
        case "constant": png(path, GREY * 0 + 7, 24, 8, 0)
        case "frames": dicom(path := folder/"x.dcm", np.stack([GREY, GREY // 2]).astype(np.int16))
        case "not an archive": path = _text(folder/"x.npz")
        case "cut archive": (path := folder/"cut.npz").write_bytes(archive(folder/"set.npz").read_bytes()[:-200])
    return str(path)


@pytest.mark.parametrize(
    "kind, words",
    {
        "absent": "does not exist", "folder": "is a folder", "empty": "is empty (0 bytes)", "ending": "unknown ending",
        "text": "is not a PNG", "text jpeg": "is not a JPEG", "jpeg named png": "is not a PNG",
        "png named jpeg": "is not a JPEG", "cut png": "cut off or damaged",
        "cut to the signature": "cut off or damaged", "flipped bit": "cut off or damaged",
        "cut jpeg": "cut off or damaged", "jpeg header": "cut off or damaged", "transparent": "partly transparent",
        "grey with alpha": "grey with transparency", "constant": "is constant (0.027", "frames": "has 2 frames",
        "not an archive": "is not an .npz archive", "cut archive": "is cut off",
    }.items(),
)
def test_bad_files_are_told_in_one_sentence(tmp_path, kind, words):
    path = damage(kind, tmp_path)
    text = message(read_picture, path + "#images/0" if path.endswith("npz") else path)
    assert words in text and path in text and "\n" not in text


@pytest.mark.parametrize(
    "part, words",
    [
        ("", "names no picture"), ("images", "names no picture"), ("images/x", "names no picture"),
        ("images/-1", "names no picture"), ("image/0", "Did you mean 'images'?"),
        ("images/2", "there is no entry 2, the array has 2"),
        ("objects/0", "Python objects, which are never unpickled"), ("line/0", "expected numbers of shape (n, h, w)"),
        ("volumes/0", "expected numbers of shape (n, h, w)"), ("words/0", "expected numbers"),
        ("bad/0", "1 voxels that are not finite"), ("images/0/red", "of a grey picture"),
    ],
)
def test_bad_entries_are_told(tmp_path, part, words):
    bad = GREY.astype(np.float32)[None].copy()
    bad[0, 3, 3] = np.nan
    path = archive(
        tmp_path / "set.npz", objects=np.array([None, {}], dtype=object), line=np.arange(5),
        volumes=np.zeros((2, 4, 4, 4)), words=np.array([[["a"]]]), bad=bad,
    )
    text = message(read_picture, f"{path}#{part}")
    assert words in text and str(path) in text


# size

@given(*[st.integers(2, 40)] * 4)  # to a single column torch 2.13 repeats its first row
@settings(max_examples=60, deadline=None)
def test_resizing_is_torchs(h, w, out_h, out_w):
    x = np.random.default_rng(h * w).random((2, 1, h, w), dtype=np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=(out_h, out_w), mode="bilinear", antialias=True, align_corners=False
    )
    np.testing.assert_allclose(resize_picture(x, (out_h, out_w)), theirs.numpy(), atol=2e-5)


def test_the_published_cut(tmp_path):
    x = RNG.random((3, 1, 300, 500), dtype=np.float32)
    np.testing.assert_array_equal(resize_crop(x), resize_picture(x, (256, 256))[..., 16:240, 16:240])
    path = png(tmp_path/"x.png", RGB, 24, 8, 2)
    np.testing.assert_array_equal(read_picture(path, (8, 12)), resize_picture(read_picture(path), (8, 12)))
    assert "larger than the whole" in message(
        resize_crop, x, (100, 100), (224, 224)
    ) and "two positive whole numbers" in message(read_picture, path, (0, 4))


# splits, against the released logic written with pandas and plain lists

@given(st.integers(1, 500), st.sampled_from([0.2, 0.3]))
@settings(deadline=None)
def test_shuffled_split(n, held):
    rows = pd.DataFrame({"name": range(n)})
    shuffled = random.Random(42).sample(range(n), 0) + list(range(n))
    random.Random(42).shuffle(shuffled)
    aside, size = shuffled[:int(n * held)], int(n * held)
    parts = {
        "train": rows.loc[shuffled[size:]], "val": rows.loc[aside[: int(len(aside) / 2)]],
        "test": rows.loc[aside[int(len(aside) / 2) :]],
    }
    split = shuffled_split(n, held)
    for name, part in parts.items(): assert sorted(part["name"]) == [i for i, s in enumerate(split) if s == name]


def test_split_sizes_of_the_published_sets():
    "3662 labelled pictures of APTOS 2019, 25331 of ISIC 2019."
    assert [shuffled_split(3662, 0.3).count(s) for s in ("train", "val", "test")] == [2564, 549, 549]
    assert [shuffled_split(25331, 0.2).count(s) for s in ("train", "val", "test")] == [20265, 2533, 2533]


@given(st.integers(20, 120), st.integers(0, 40), st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_chexpert_parts_are_slices_by_label(n, swaps, seed):
    "The released slices, with pandas itself; where pandas finds no such label, one sentence."
    rng, paths = np.random.default_rng(seed), [f"train/patient{i // 3:05d}/study{i % 3}" for i in range(n)]
    for i, j in rng.integers(0, n, (swaps, 2)): paths[i], paths[j] = paths[j], paths[i]
    table = pd.DataFrame({"Path": paths}).sort_values(by=["Path"])
    cut = int(n * 0.2) + 15
    try:
        if cut >= n: raise KeyError(cut)
        held = table.loc[:cut]
        theirs = {"val": held.loc[:int(len(held) / 2)], "test": held.loc[int(len(held) / 2):], "train": table.loc[cut:]}
    except KeyError:
        message(chexpert_parts, paths)
        return
    # pandas guesses a place when what is left happens to be sorted; we refuse
    if len(held) // 2 not in held.index: return
    for name, rows in chexpert_parts(paths).items():
        assert [paths[i] for i in rows] == theirs[name]["Path"].tolist(), name


def test_neighbouring_parts_of_chexpert_share_a_row():
    "As the facts say: 20 % and 15 rows held out, one row shared at each boundary of a sorted file."
    parts = chexpert_parts([f"p{i:06d}" for i in range(1000)])
    assert {k: len(v) for k, v in parts.items()} == {"val": 109, "test": 108, "train": 785}
    assert set(parts["val"]) & set(parts["test"]) == {108} and set(parts["test"]) & set(parts["train"]) == {215}


@given(st.lists(st.tuples(st.sampled_from(["train", "val", "test"]), st.integers(0, 9)), max_size=60))
def test_groups_are_kept_together(pairs):
    split, group = [s for s, _ in pairs], [str(g) for _, g in pairs]
    out = keep_together(split, group)
    for g in set(group):
        mine = {s for s, h in zip(split, group) if h == g}
        assert {s for s, h in zip(out, group) if h == g} == {next(s for s in ("val", "test", "train") if s in mine)}


def test_rules_are_the_same_in_another_process():
    program = (
        "from vfm_notes.data.picture_splits import shuffled_split, chexpert_parts; print(shuffled_split(500, 0.3), "
        "chexpert_parts([f'p{i * 7 % 101}' for i in range(101)]))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": str(k), "PATH": ""},
        ).stdout
        for k in (1, 2)
    ]
    assert runs[0] == runs[1] and "'val'" in runs[0]


# labels

def test_chexpert_labels_by_hand():
    row = lambda **found: {"Path": "x"} | {k: found.get(k.replace(" ", "_"), "") for k in CHEXPERT}
    table = pd.DataFrame([
        row(), row(Edema="-1.0"), row(Edema="1.0", Pneumonia="-1.0", Fracture="0.0"),
        row(No_Finding="1.0", Support_Devices="1.0"), row(Edema="maybe"),
    ])
    labels, bad = chexpert_labels(table)
    assert [[CHEXPERT[k] for k in np.flatnonzero(r)] for r in labels[:4]] == [
        ["No Finding"], ["No Finding"], ["Edema"], ["No Finding", "Support Devices"],
    ]
    assert len(bad) == 1 and "Edema is 'maybe'" in bad[0]


def test_one_hot_grades_by_hand():
    rows = [{"image": f"i{k}"} | {n: float(n == name) for n in ISIC} for k, name in enumerate(ISIC)]
    table = pd.DataFrame(rows).astype(str)
    assert one_hot_grades(table, list(ISIC), "image") == (list(range(8)), [])
    assert one_hot_grades(table, list(ISIC), "image")[0] == pd.DataFrame(rows).values[:, 1:].nonzero()[1].tolist()
    table.loc[2, "MEL"], table.loc[3, "AK"] = "1.0", "0.0"
    grades, bad = one_hot_grades(table, list(ISIC), "image")
    assert grades[2:4] == [-1, -1] and len(bad) == 2 and "i2" in bad[0] and "i3" in bad[1]


# layouts

def made(name: str, folder: Path) -> Path:
    layouts.card(name)["example"](folder)
    return folder


def test_aptos(tmp_path):
    manifest = aptos2019(made("aptos2019", tmp_path))
    table = pd.read_csv(tmp_path/"train.csv")
    words = ("no DR", "mild", "moderate", "severe", "proliferative DR")
    assert manifest.table["grade"].tolist() == [words[d] for d in table["diagnosis"]] and manifest.table[
        "split"
    ].tolist() == shuffled_split(20, 0.3)
    assert (
        manifest.card.sequences == ("red", "green", "blue")
        and manifest.card.non_commercial
        and ".415" in manifest.card.note
    )
    jpeg(tmp_path/"x.jpg", RGB)
    (tmp_path / "train.csv").write_text(
        "id_code,diagnosis\n" + "\n".join(f"eye{i:02d},{'7' if i == 2 else 1}" for i in range(21))
    )
    text = message(aptos2019, tmp_path)
    assert "eye02: grade is '7'" in text and "eye20.png does not exist" in text
    (tmp_path/"train.csv").write_text("id,diagnosis\na,1\n")
    assert "has no column 'id_code'" in message(aptos2019, tmp_path)


def test_isic_keeps_lesions_together(tmp_path):
    made("isic2019", tmp_path)
    kept, released = isic2019(tmp_path), isic2019(tmp_path, as_released=True)
    assert (
        released.table["split"].tolist() == shuffled_split(20, 0.2)
        and released.table["patient"].tolist() == released.table["case"].tolist()
    )
    assert (
        kept.table.groupby("note_lesion").get_group("L3")["split"].nunique() == 1
        and kept.table["patient"].nunique() == 7 + 6
    )
    assert kept.table["split"].tolist() == keep_together(shuffled_split(20, 0.2), kept.table["patient"].tolist())
    png(tmp_path/"train"/"ISIC_0000004.png", RGB, 24, 8, 2)
    assert isic2019(tmp_path).table["red"][4] == "train/ISIC_0000004.png#red", (
        "a converted file wins, as in the released code"
    )


def test_ddsm_words_and_patients(tmp_path):
    made("cbis_ddsm", tmp_path)
    two, three = cbis_ddsm(tmp_path), cbis_ddsm(tmp_path, classes=3)
    words = [Path(p).name.split("_")[0] for p in two.table["grey"]]
    assert (
        two.table["grade"].tolist() == ["normal" if w == "normal" else "abnormal" for w in words]
        and three.table["grade"].tolist() == words
    )
    assert (
        two.table["patient"].nunique() == 6
        and three.card.grades == ("normal", "benign", "cancer")
        and "2 or 3 classes" in message(cbis_ddsm, tmp_path, classes=4)
    )
    lists = tmp_path/"ddsm_raw_image_lists"
    (lists / "val.txt").write_text(
        (lists / "train.txt").read_text(encoding="utf-8").splitlines()[0].replace("LEFT", "RIGHT")
        + "\nodd_1.LEFT_CC.png\n"
    )
    text = message(cbis_ddsm, tmp_path)
    assert (
        "is in the splits train and val" in text
        and "begins with 'odd'" in text
        and "odd_1.LEFT_CC.png does not exist" in text
    )
    assert "no patient in its name" in message(cbis_ddsm, tmp_path, patient="^(P[0-9]+)")
    assert "is no pattern" in message(cbis_ddsm, tmp_path, patient="(P") and "has no group" in message(
        cbis_ddsm, tmp_path, patient="P[0-9]+"
    )
    (lists/"test.txt").unlink()
    assert "has no test.txt" in message(cbis_ddsm, tmp_path)


def test_chexpert_patients(tmp_path):
    made("chexpert", tmp_path)
    kept, released = chexpert(tmp_path), chexpert(tmp_path, as_released=True)
    table = pd.read_csv(tmp_path/"train.csv")
    parts = chexpert_parts(table["Path"].tolist())
    for k, i in enumerate(range(40)): assert i in parts[released.table["split"][k]]
    moved = kept.table["split"] != released.table["split"]
    assert kept.table["patient"].nunique() == 20 and kept.table.groupby("patient")["split"].nunique().max() == 1
    assert (
        kept.table.loc[moved, "patient"].nunique() == int(kept.card.note.split("but the ")[1].split()[0])
        and len(kept.targets) == 14
    )
    (tmp_path/"train.csv").write_text("\n".join((tmp_path/"train.csv").read_text(encoding="utf-8").splitlines()[:12]))
    assert "holds out 17 of them" in message(chexpert, tmp_path)


def test_medmnist_names_and_options(tmp_path):
    made("medmnist", tmp_path)
    (tmp_path/"breastmnist.npz").rename(tmp_path/"breastmnist_64.npz")
    assert (
        medmnist(tmp_path).card.name == "breastmnist"
        and medmnist(tmp_path / "breastmnist_64.npz").card.licence == "CC BY 4.0"
    )
    (tmp_path/"breastmnist_64.npz").rename(tmp_path/"brestmnist.npz")
    assert "Did you mean 'breastmnist'?" in message(medmnist, tmp_path)
    own = medmnist(tmp_path, licence="CC BY-NC 4.0", grades=("bad", "good"))
    assert own.card.non_commercial and own.card.grades == ("bad", "good")
    shutil.copy(tmp_path/"brestmnist.npz", tmp_path/"another.npz")
    assert "has 2 .npz archives" in message(medmnist, tmp_path)


def test_medmnist_labels(tmp_path):
    images = RNG.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    parts = {f"{s}_images": images for s in ("train", "val", "test")}
    labels = RNG.integers(0, 2, (3, 14))
    np.savez(tmp_path/"chestmnist.npz", **parts, **{f"{s}_labels": labels for s in ("train", "val", "test")})
    chest = medmnist(tmp_path)
    assert (
        chest.targets == MEDMNIST["chestmnist"][1]
        and chest.table[[f"target_{t}" for t in chest.targets]].astype(int).to_numpy()[:3].tolist() == labels.tolist()
    )
    np.savez(
        tmp_path / "chestmnist.npz", **parts, train_labels=labels[:2], val_labels=labels + 1, test_labels=labels[:, :3]
    )
    text = message(medmnist, tmp_path)
    assert (
        "train_images has 3 entries and train_labels 2" in text
        and "expected 0 to 1" in text
        and "test_labels has 3 columns" in text
    )
    np.savez(tmp_path/"chestmnist.npz", **parts, train_labels=labels)
    assert "no array 'val_labels'" in message(medmnist, tmp_path)


def test_a_cohort_of_pictures_by_the_published_recipe(tmp_path, runs_root):
    "Resized to 256, the middle 224 kept, normalised by the published moments."
    manifest = aptos2019(made("aptos2019", tmp_path))
    cohort = manifest_cohort(manifest, (1, 56, 56), (1.0, 1.0, 1.0), {})
    assert cohort.volumes.shape == (20, 3, 1, 56, 56) and (cohort.labels == 0).all() and cohort_problems(cohort) == []
    whole = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "train_images" / f"{cohort.names[4]}.png"))).astype(
            np.float32
        )
        / 255
    )
    large = torch.nn.functional.interpolate(
        torch.from_numpy(np.moveaxis(whole, -1, 0))[None], size=(64, 64), mode="bilinear", antialias=True
    )[0].numpy()
    np.testing.assert_allclose(cohort.volumes[4, :, 0], large[:, 4:60, 4:60], atol=2e-5)
    mean, sd = STATISTICS["aptos2019"]
    np.testing.assert_allclose(
        normalise(cohort.volumes, "cohort", (mean, sd))[4, 2, 0], (large[2, 4:60, 4:60] - mean[2]) / sd[2], atol=1e-3
    )


def test_statistics_have_a_value_for_each_channel(tmp_path):
    for name, (mean, sd) in STATISTICS.items():
        folder = tmp_path/name
        folder.mkdir()
        assert len(layouts[name](made(name, folder)).card.sequences) == len(mean) == len(sd)


# real data

def test_real_breastmnist(real_data):
    "780 pictures, the official numbers, every pixel; and one picture that stands in two splits under two labels."
    manifest = medmnist(real_data/"breastmnist_28")
    assert manifest.table["split"].value_counts().to_dict() == {"train": 546, "test": 156, "val": 78}
    assert manifest.table.groupby("split")["grade"].value_counts().to_dict() == {
        (s, g): n
        for g, of in (("malignant", (147, 21, 42)), ("normal or benign", (399, 57, 114)))
        for s, n in zip(("train", "val", "test"), of)
    }
    with np.load(real_data/"breastmnist_28"/"breastmnist.npz") as archive:
        expected = np.concatenate([archive[f"{s}_images"] for s in ("train", "val", "test")])
    read = np.concatenate([read_picture(manifest.root/cell)[0] for cell in manifest.table["grey"]])
    np.testing.assert_allclose(read * 255, expected, atol=1e-4)
    seen, twins = {}, []
    for case, values in zip(manifest.table["case"], read):
        twins += [(seen[values.tobytes()], case)] if values.tobytes() in seen else []
        seen.setdefault(values.tobytes(), case)
    assert twins == [("breastmnist-train-0115", "breastmnist-test-0076")]
    assert manifest.table.set_index("case").loc[list(twins[0]), "grade"].tolist() == ["malignant", "normal or benign"]


def test_real_breastmnist_does_not_load_with_its_twins(real_data, runs_root):
    manifest = medmnist(real_data/"breastmnist_28")
    manifest.table = pd.concat(
        [manifest.table.iloc[110:120], manifest.table.iloc[546 + 78 + 70 : 546 + 78 + 80]], ignore_index=True
    )
    assert (
        "have the same grey" in (text := message(manifest_cohort, manifest, (1, 28, 28), (1.0, 1.0, 1.0), {}))
        or "has the same grey" in text
    )
    cohort = manifest_cohort(manifest, (1, 28, 28), (1.0, 1.0, 1.0), {}, exclude_bad=True)
    assert len(cohort) < 20 and {e["case"] for e in cohort.excluded} <= {
        "breastmnist-train-0115", "breastmnist-test-0076",
    }
