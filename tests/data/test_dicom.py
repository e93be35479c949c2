"""DICOM series: what is written comes back voxel by voxel, and each way to spoil a series is told in one sentence."""
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from vfm_notes.data.load import load_cohort
from vfm_notes.data.load import manifest_cohort
from vfm_notes.data.dicom import (
    TAGS, b_value, list_series, read_header, read_headers, read_series, sorted_slices, write_series,
)
from vfm_notes.data.picture import read_picture
from vfm_notes.data.layouts_trees import prostatex
from vfm_notes.data.dicom import keeping_locale
from vfm_notes.data.volume import read_image, to_array
from vfm_notes.foundation.registry import VfmError
from vfm_notes.report.data_commands import data_app


def made(
    size: tuple[int, int, int] = (6, 11, 9), direction: str = "LPS", kind: type = np.int16, seed: int = 0
) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(seed).integers(0, 900, size).astype(kind))
    image.SetSpacing((0.5, 0.75, 3.3))
    image.SetOrigin((-41.25, 12.5, 7.125))
    return sitk.DICOMOrient(image, direction)


def message(function, *args, **kwargs) -> str:
    with pytest.raises(VfmError) as caught: function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(a: sitk.Image, b: sitk.Image) -> None:
    np.testing.assert_array_equal(sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b))
    np.testing.assert_allclose(a.GetSpacing(), b.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(a.GetOrigin(), b.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(a.GetDirection(), b.GetDirection(), atol=1e-6)


def oblique(image: sitk.Image) -> sitk.Image:
    "Tilted by 0.3 and 0.2 rad, as an axial series along the prostate is."
    tilt = sitk.Euler3DTransform((0, 0, 0), 0.3, 0.2, -0.1).GetMatrix()
    image.SetDirection((np.reshape(tilt, (3, 3)) @ np.reshape(image.GetDirection(), (3, 3))).ravel().tolist())
    return image


@keeping_locale()
def rewrite(path: Path, **changes: str) -> None:
    "The same slice with other tags, by the names of TAGS."
    image = sitk.ReadImage(str(path))[:, :, 0]
    kept = ("series", "description", "position", "axes", "slope", "intercept", *changes)
    header = {TAGS[k]: v for k, v in (read_header(path) | changes).items() if k in kept and v}
    for tag, value in {"0008|0060": "MR", **header}.items(): image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)


# what is right

# axial, sagittal, coronal, and axial with rows to the back
@pytest.mark.parametrize("direction", ["LPS", "PIL", "LIP", "PSL"])
def test_a_series_comes_back_exactly(tmp_path, direction):
    image = made(direction=direction)
    write_series(image, tmp_path/"a")
    back = read_series(tmp_path/"a")
    if np.linalg.det(np.reshape(image.GetDirection(), (3, 3))) > 0: same(back, image)
    else: same(sitk.DICOMOrient(back, "LPS"), sitk.DICOMOrient(image, "LPS"))


def test_an_oblique_series_comes_back_exactly(tmp_path):
    image = oblique(made())
    write_series(image, tmp_path/"a")
    same(read_series(tmp_path/"a"), image)


def test_itk_reads_the_same_geometry(tmp_path):
    "Against ITK's own series reader, which sorts by position too."
    write_series(oblique(made()), tmp_path/"a")
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path/"a"))
    same(read_series(tmp_path/"a"), sitk.ReadImage(names))


def test_the_names_of_the_files_do_not_matter(tmp_path):
    image = made()
    write_series(image, tmp_path/"a")
    for i, p in enumerate(sorted((tmp_path/"a").iterdir(), reverse=True)): p.rename(tmp_path/"a"/f"IM{i:04d}")
    same(read_series(tmp_path/"a"), image)


@pytest.mark.parametrize("slope, intercept", [(2, -10), (1, -1000), (4, 7)])
def test_slope_and_intercept_are_applied(tmp_path, slope, intercept):
    image = made() * slope + intercept
    write_series(image, tmp_path/"a", slope=slope, intercept=intercept)
    same(read_series(tmp_path/"a"), image)


def test_each_slice_has_its_own_slope(tmp_path):
    "Some scanners scale every slice on its own; ITK's series reader is right only when they agree."
    image = made((4, 11, 9))
    for k, slope in enumerate((1, 2, 3, 5)):
        write_series(image * slope, tmp_path/str(k), slope=slope)
        files, _ = sorted_slices(tmp_path/str(k), read_headers(tmp_path/str(k)))
        (tmp_path/"all").mkdir(exist_ok=True)
        rewrite(shutil.copy(files[k], tmp_path/"all"/f"{k}.dcm"), series="2.25.7")
    expected = sitk.GetArrayFromImage(image) * np.array([1, 2, 3, 5])[:, None, None]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_series(tmp_path/"all")), expected)


def test_one_of_two_series_is_chosen_by_its_uid(tmp_path):
    first, second = made(), made(seed=1)
    a, b = write_series(first, tmp_path/"x"), write_series(second, tmp_path/"x", "ep2d_diff_CALC_BVAL", 4, b=1400)
    same(read_series(f"{tmp_path/'x'}#{a}"), first)
    same(read_series(f"{tmp_path/'x'}#{b}"), second)
    table = list_series(tmp_path/"x").set_index("series")
    assert (
        table.loc[b].to_dict()
        == dict(number="4", description="ep2d_diff_CALC_BVAL", b="1400", n=6, size="9x11", spacing=".75 x .5")
        and table.loc[a, "n"] == 6
    )
    shown = CliRunner().invoke(data_app, ["series", str(tmp_path/"x")]).output
    assert a in shown and re.search(rf"{re.escape(b)} +4 +ep2d_diff_CALC_BVAL +1400 +6", shown)
    text = message(read_series, f"{tmp_path/'x'}#{a}9")
    assert "has no series" in text and f"Did you mean '{a}'?" in text


def test_b_values_of_several_makers():
    header = dict.fromkeys(TAGS, "")
    assert [
        b_value(header | h) for h in ({"b": "800"}, {"b": "1400.0"}, {"siemens_b": "50"}, {"sequence": "*ep_b400t"}, {})
    ] == ["800", "1400", "50", "400", ""]


@pytest.mark.parametrize("stored", ["LPS", "RAS", "PIL", "LIP", "ASR", "SLP"])
def test_one_orientation_for_files_and_series(tmp_path, stored):
    "The same oblique volume stored as a series or a file, in any order of axes, is one array in one place."
    straight = oblique(made())
    image = sitk.DICOMOrient(straight, stored)
    sitk.WriteImage(image, str(tmp_path/"x.nii.gz"))
    sitk.WriteImage(image, str(tmp_path/"x.mha"))
    write_series(image, tmp_path/"x")
    for name in ("x.nii.gz", "x.mha", "x"):
        back = read_image(tmp_path/name)
        np.testing.assert_array_equal(to_array(back), to_array(straight))
        np.testing.assert_allclose(back.GetOrigin(), straight.GetOrigin(), atol=1e-4)
        np.testing.assert_allclose(back.GetDirection(), straight.GetDirection(), atol=1e-5)


# what is wrong

def spoil(kind: str, root: Path) -> Path:
    folder = root/"series"
    write_series(made(kind=np.uint16 if kind == "unsigned overflow" else np.int16), folder)
    files, places = sorted_slices(folder, read_headers(folder))
    match kind:
        case "absent":
            return root / "nowhere"
        case "a file":
            return files[0]
        case "empty folder":
            [p.unlink() for p in files]
        case "not DICOM":
            [p.write_text("Dear colleague,") for p in files]
        case "a letter among the slices":
            (folder / "letter.txt").write_text("Dear colleague,")
        case "empty file":
            files[2].write_bytes(b"")
        case "truncated":
            files[2].write_bytes(files[2].read_bytes()[:-20])
        case "truncated in the header":
            files[2].write_bytes(files[2].read_bytes()[:300])
        case "two bad files":
            [p.write_bytes(p.read_bytes()[:300]) for p in files[2:4]]
        case "missing slice":
            files[2].unlink()
        case "two missing slices":
            [files[i].unlink() for i in (2, 3)]
        case "doubled slice":
            shutil.copy(files[2], folder / "copy.dcm")
        case "several b-values":
            [write_series(made(seed=b), folder, b=b) for b in (50, 800)]
        case "uneven":
            rewrite(files[3], position="\\".join(f"{v:.6f}" for v in places[3] + [0, 0, 0.8]))
        case "sideways":
            [
                rewrite(p, position="\\".join(f"{v:.6f}" for v in at + [0.2 * i, 0, 0]))
                for i, (p, at) in enumerate(zip(files, places))
            ]
        case "two series":
            write_series(made(seed=1), folder, "ep2d_diff", 2)
        case "mixed orientation":
            rewrite(files[1], axes="0\\1\\0\\0\\0\\-1")
        case "mixed matrix":
            write_series(made((2, 7, 9)), root / "small")
            for p in (root / "small").iterdir():
                rewrite(p, series=read_header(files[0])["series"])
            shutil.copy(next((root / "small").iterdir()), folder / "small.dcm")
        case "mixed spacing":
            image = made((2, 11, 9))
            image.SetSpacing((0.9, 0.9, 3.3))
            write_series(image, root / "wide")
            for p in (root / "wide").iterdir():
                rewrite(p, series=read_header(files[0])["series"])
            shutil.copy(next((root / "wide").iterdir()), folder / "wide.dcm")
        case "one slice":
            [p.unlink() for p in files[1:]]
        case "no position":
            files[2].write_bytes(files[2].read_bytes().replace(b"\x20\x00\x32\x00", b"\x20\x00\x33\x00", 1))
        case "colour":
            (
                [p.unlink() for p in files],
                sitk.WriteImage(
                    sitk.GetImageFromArray(np.zeros((4, 5, 3), np.uint8), isVector=True), str(folder / "photo.dcm")
                ),
            )
        case "frames":
            image = made()
            image.SetMetaData("0008|0060", "MR")
            [p.unlink() for p in files], sitk.WriteImage(image, str(folder / "all.dcm"))
        case "unsigned overflow":
            image = made(kind=np.uint16)
            image[3, 4, 2] = 65535
            shutil.rmtree(folder)
            write_series(image, folder)
        case "mosaic":
            [rewrite(p, type=r"ORIGINAL\PRIMARY\M\ND\MOSAIC") for p in files]
        case "constant":
            shutil.rmtree(folder), write_series(made() * 0 + 7, folder)
    return folder


KINDS = {
    "absent": "does not exist", "empty folder": "is a folder without files",
    "not DICOM": "has no DICOM file among its 6", "a letter among the slices": "1 of the 7 files",
    "empty file": "is empty (0 bytes)", "truncated": "is cut off or damaged",
    "truncated in the header": "is cut off or damaged", "two bad files": "2 of the 6 files",
    "missing slice": "has a gap of 6.60 mm", "two missing slices": "has a gap of 9.90 mm",
    "doubled slice": "7 slices at 6 places", "several b-values": "18 slices at 6 places",
    "uneven": "expected 3.30 mm as elsewhere", "sideways": "shifted sideways by up to 1.00 mm",
    "two series": "has 2 series", "mixed orientation": "different orientation", "mixed matrix": "different matrix",
    "mixed spacing": "different pixel spacing", "one slice": "has 1 slice", "no position": "has no position",
    "colour": "3 values per voxel", "frames": "6 frames in one file", "unsigned overflow": "unsigned overflow",
    "mosaic": "is a Siemens mosaic (the slices of a volume as tiles of one picture of 9x11)",
    "constant": "is constant (7 everywhere)",
}


@pytest.mark.parametrize("kind, words", KINDS.items())
def test_a_bad_series_is_told_in_one_sentence(tmp_path, kind, words):
    folder = spoil(kind, tmp_path)
    text = message(read_image, folder)
    assert words in text and str(folder) in text and "expected" in text


def test_real_mosaics_are_named(tmp_path):
    "The Siemens files that nibabel brings for its own tests, as a series and as a picture."
    files = sorted((Path(nib.__file__).parent/"nicom"/"tests"/"data").glob("[01].dcm"))
    if not files: pytest.skip("this nibabel was installed without its test data")
    for path in files:
        (tmp_path/path.stem).mkdir()
        shutil.copy(path, tmp_path/path.stem)
        assert "is a Siemens mosaic (the slices of a volume as tiles" in message(read_image, tmp_path/path.stem)
        assert "is a Siemens mosaic" in message(read_picture, path)


def test_what_a_message_names(tmp_path):
    folder = spoil("several b-values", tmp_path/"a")
    assert "b-values 50, 800" in message(read_series, folder), "so one can see that it is no copy"
    assert "letter.txt is not a DICOM file" in message(read_series, spoil("a letter among the slices", tmp_path/"b"))
    text = message(read_series, spoil("two series", tmp_path/"c"))
    assert "t2_tse_tra" in text and "ep2d_diff" in text and "FOLDER#UID" in text
    assert "(below it: series)" in message(read_series, tmp_path/"c"), "one folder too high"
    assert "is not a folder" in message(read_series, spoil("a file", tmp_path/"d"))


# 4D files

def test_a_volume_of_a_4d_file_by_its_number(tmp_path):
    parts = [made(seed=i) for i in range(2)]
    sitk.WriteImage(sitk.JoinSeries(parts), str(tmp_path/"x.nii.gz"))
    sitk.WriteImage(sitk.Compose(*parts), str(tmp_path/"x.mha"))
    for name in ("x.nii.gz", "x.mha"):
        for k, part in enumerate(parts): same(read_image(f"{tmp_path/name}#{k}"), part)
        assert "has 2 volumes; '#2' is none of them, expected #0 to #1" in message(read_image, f"{tmp_path/name}#2")
        assert "'#t2w' is none of them" in message(read_image, f"{tmp_path/name}#t2w")
    assert "x.nii.gz#0" in message(read_image, tmp_path/"x.nii.gz"), "says how to name one"


def test_a_name_with_the_sign_in_it_is_still_a_name(tmp_path):
    sitk.WriteImage(made(), str(tmp_path/"case#7.nii.gz"))
    same(read_image(tmp_path/"case#7.nii.gz"), made())


def test_unsigned_overflow_in_a_file(tmp_path):
    image = made(kind=np.uint16)
    sitk.WriteImage(image, str(tmp_path/"good.mha"))
    image[1, 1, 1] = 65533
    sitk.WriteImage(image, str(tmp_path/"bad.mha"))
    same(read_image(tmp_path/"good.mha"), made())
    assert "unsigned overflow" in message(read_image, tmp_path/"bad.mha")


# real

def test_a_real_t2_survives_the_way_through_dicom(real_data, tmp_path):
    path = real_data/"prostatex_0000"/"t2_tra.nii.gz"
    stored, direct = sitk.ReadImage(str(path)), read_image(path)
    write_series(stored, tmp_path/"t2", "t2_tse_tra")
    back = read_image(tmp_path/"t2")
    np.testing.assert_array_equal(to_array(back), to_array(direct))
    np.testing.assert_allclose(back.GetSpacing(), direct.GetSpacing(), rtol=1e-5)
    np.testing.assert_allclose(back.GetOrigin(), direct.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(back.GetDirection(), direct.GetDirection(), atol=1e-5)


def test_real_examinations_as_a_tree_of_dicom_series(real_data, runs_root, tmp_path, monkeypatch):
    """Two PROSTATEx patients as TCIA keeps them (series by description, values rescaled) give the volumes that their
    NIfTI files give."""
    monkeypatch.setenv("VFM_DATA", str(real_data))
    for name in ("0000", "0001"):
        study = tmp_path/"src"/"PROSTATEx"/f"ProstateX-{name}"/"07-07-2011-NA-MR prostaat"
        for k, (file, description) in enumerate(
            {
                "t2_tra": "t2_tse_tra", "t2_sag": "t2_tse_sag", "adc": "ep2d_diff_tra_DYNDIST_ADC",
                "hbv": "ep2d_diff_tra_DYNDISTCALC_BVAL",
            }.items()
        ):
            write_series(
                sitk.ReadImage(str(real_data / f"prostatex_{name}" / f"{file}.nii.gz")), study / f"{k}.000000-{file}",
                description, k,
            )
        (tmp_path/"src"/"gland").mkdir(exist_ok=True)
        (tmp_path / "src" / "gland" / f"ProstateX-{name}.nii.gz").symlink_to(
            real_data / f"prostatex_{name}" / "gland_Bosma22b.nii.gz"
        )
    (tmp_path / "src" / "ProstateX-Findings-Train.csv").write_text(
        "ProxID,fid,pos,zone,ClinSig\nProstateX-0000,1,0 0 0,PZ,TRUE\nProstateX-0001,1,0 0 0,PZ,FALSE\n"
    )
    grid = dict(size=(12, 64, 64), spacing=(4, 1.5, 1.5))
    cohort = manifest_cohort(prostatex(tmp_path/"src", gland=tmp_path/"src"/"gland"), **grid, n={"test": 2})
    expected = load_cohort("prostate_cases", **grid, n={})
    for i, name in enumerate(cohort.names):
        # image and mask of the first are turned against each other by 0.0002 rad
        turned, k = name.endswith("0"), expected.names.index(name.lower().replace("-", "_"))
        for mine, theirs in zip(cohort.volumes[i], expected.volumes[k]):
            np.testing.assert_allclose(mine, theirs, atol=0.05 * theirs.std() if turned else 1e-2)
        assert cohort.grade[i] == turned and ((cohort.labels[i] > 0) != (expected.labels[k] > 0)).mean() < 1e-4


def test_reading_leaves_the_locale_alone(tmp_path):
    "GDCM sets the C locale, in which text files would be read as ASCII from then on."
    import locale
    before = locale.setlocale(locale.LC_ALL), locale.getencoding()
    write_series(sitk.GetImageFromArray(np.zeros((3, 6, 5), np.int16)), tmp_path/"series")
    read_series(tmp_path/"series")
    list_series(tmp_path/"series")
    assert (locale.setlocale(locale.LC_ALL), locale.getencoding()) == before
