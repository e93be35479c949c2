"""New cases: what a user names, and where a scan lies; against resampling by hand with nibabel's affines and scipy."""
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from made_cases import message
from vfm_notes.data.dicom import write_series
from vfm_notes.data.new_cases import NewCase, new_cases, place_case, place_volumes, to_native, write_like

TURN = Rotation.from_euler("xyz", (12, -7, 31), degrees=True).as_matrix()
AXES = {  # columns: where the file's axes x, y, z point (right, front, head)
    "plain": np.eye(3), "flipped": np.diag([-1.0, 1, -1]), "permuted": np.eye(3)[:, [1, 2, 0]],
    "oblique": TURN, "oblique and flipped": TURN @ np.diag([1.0, -1, -1]),
    "oblique and permuted": TURN @ np.eye(3)[:, [2, 0, 1]],
}
SLOPE, LEVEL = np.array([0.7, -1.1, 0.45]), 300.0  # a brightness that rises evenly through the room


def bright(points: np.ndarray) -> np.ndarray: return points @ SLOPE + LEVEL  # points: (..., 3) mm


def room(affine: np.ndarray, shape: tuple) -> np.ndarray:
    "Where the voxels of a file lie, by its affine alone."
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def scan(path: Path, axes: np.ndarray, spacing=(0.9, 0.7, 3.3), shape=(44, 50, 14), values=None) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * spacing, (-17.0, 23.0, 41.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image((bright(room(affine, shape)) if values is None else values).astype(np.float32), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 2)
    nib.save(image, path)
    return affine


def far_from_edges(shape: tuple, margin=(8, 8, 3)) -> tuple:
    return tuple(slice(m, n - m) for m, n in zip(margin, shape))


@pytest.mark.parametrize("spacing", [(3.3, 0.7, 0.9), (2.0, 2.0, 2.0), (6.6, 1.4, 1.8), (1.1, 0.5, 0.5)])
@pytest.mark.parametrize("axes", AXES)
def test_an_even_brightness_comes_back_to_every_voxel(tmp_path, axes, spacing):
    "Linear interpolation and smoothing keep an even rise, so what comes back is known in closed form."
    affine = scan(tmp_path/"a.nii.gz", AXES[axes])
    shape = (44, 50, 14)
    try: placed = place_volumes(NewCase("a", {"t2w": str(tmp_path/"a.nii.gz")}), (6, 20, 20), spacing)
    except Exception as e:  # an axis of thick slices that is not that of the grid is another series
        assert "slices" in str(e) and "permuted" in axes
        return
    write_like(to_native(placed.volume[0], placed), placed, tmp_path/"back.nii.gz")
    back = nib.load(tmp_path/"back.nii.gz")
    assert back.shape == shape and np.allclose(back.affine, affine, atol=1e-4)
    assert (back.header["qform_code"], back.header["sform_code"]) == (1, 2)
    inside, wanted = far_from_edges(shape), bright(room(affine, shape))
    assert np.abs(back.get_fdata()[inside] - wanted[inside]).max() < 0.05, axes
    again = sitk.ReadImage(str(tmp_path/"back.nii.gz"))  # another reader sees it at the same place
    point = again.TransformIndexToPhysicalPoint((20, 25, 7))
    assert again.GetPixel(20, 25, 7) == pytest.approx(bright(np.array(point) * (-1, -1, 1)), abs=0.05)


def by_hand(image: nib.Nifti1Image, points: np.ndarray) -> np.ndarray:
    "Linear interpolation at points of the room, NaN outside."
    index = (points - image.affine[:3, 3]) @ np.linalg.inv(image.affine[:3, :3]).T
    return map_coordinates(image.get_fdata(dtype=np.float64), np.moveaxis(index, -1, 0), order=1, cval=np.nan)


REAL = [("prostatex_0000/t2_tra.nii.gz", (3.0, 0.5, 0.5)), ("prostatex_0001/adc.nii.gz", (3.0, 2.0, 2.0)),
        ("prostatex_0000/t2_sag.nii.gz", (0.5, 0.5, 3.0)), ("provicnet_picai_sample/t2.nii.gz", (3.0, 0.5, 0.5)),
        ("msd_hippocampus_100/images/hippocampus_001.nii.gz", (1.0, 1.0, 1.0)),
        ("msd_hippocampus_100/images/hippocampus_001.nii.gz", (0.8, 0.9, 0.7))]


@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "oblique, flipped"])
@pytest.mark.parametrize("file, spacing", REAL, ids=[f"{f} {s}" for f, s in REAL])
def test_real_scans_are_resampled_as_by_hand(tmp_path, real_data, file, spacing, turned):
    source = nib.load(real_data/file)
    affine = source.affine.copy()
    if turned: affine[:3, :3] = TURN @ np.diag([-1.0, 1, 1]) @ affine[:3, :3]
    values = source.get_fdata(dtype=np.float32)
    scanned = nib.Nifti1Image(values, affine)
    scanned.set_qform(affine, 1)
    nib.save(scanned, tmp_path/"a.nii.gz")
    scanned = nib.load(tmp_path/"a.nii.gz")
    placed = place_volumes(NewCase("a", {"t2w": str(tmp_path/"a.nii.gz")}), (8, 32, 32), spacing)
    grid = placed.grid
    lps = np.reshape(grid.GetDirection(), (3, 3)) * grid.GetSpacing()
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.GetSize()], indexing="ij"), -1)
    points = (index @ lps.T + grid.GetOrigin()) * (-1, -1, 1)
    wanted, found = by_hand(scanned, points), placed.volume[0].transpose(2, 1, 0)
    known, scale = np.isfinite(wanted), float(np.ptp(values))
    assert known.mean() > 0.4
    smooth = any(s > z * 1.01 for s, z in zip(sorted(spacing), sorted(scanned.header.get_zooms())))
    if not smooth: assert np.abs(found - wanted)[known].max() < 2e-4 * scale
    back = to_native(placed.volume[0], placed)
    assert back.shape == values.shape[::-1]
    answer = nib.Nifti1Image(found.astype(np.float64), np.diag([-1.0, -1, 1, 1]) @ np.block(
        [[lps, np.array(grid.GetOrigin())[:, None]], [np.zeros((1, 3)), 1]]))
    if not any(s < z * 0.99 for s, z in zip(sorted(spacing), sorted(scanned.header.get_zooms()))):
        again = by_hand(answer, room(scanned.affine, values.shape))
        inside = np.isfinite(again)
        assert inside.mean() > 0.9
        assert np.abs(back.transpose(2, 1, 0) - again)[inside].max() < 2e-4 * scale


def test_the_part_of_the_training_lies_where_training_put_it(tmp_path):
    "On the scan's own spacing the inner part is a cut-out of the scan, as in training."
    noise = np.random.default_rng(0).normal(100, 20, (30, 40, 12)).astype(np.float32)
    scan(tmp_path/"a.nii", AXES["plain"] @ np.diag([-1.0, -1, 1]), (1, 1, 3), (30, 40, 12), noise)
    placed = place_volumes(NewCase("a", {"t2w": str(tmp_path/"a.nii")}), (6, 16, 16), (3.0, 1.0, 1.0))
    whole = noise.transpose(2, 1, 0)
    assert np.array_equal(placed.volume[0], whole)
    assert np.array_equal(placed.volume[0][placed.inner], whole[3:9, 12:28, 7:23])
    small = place_volumes(NewCase("a", {"t2w": str(tmp_path/"a.nii")}), (20, 64, 64), (3.0, 1.0, 1.0))
    assert small.volume.shape == (1, 20, 64, 64) and np.array_equal(to_native(small.volume[0], small), whole)
    at = place_volumes(NewCase("a", {"t2w": str(tmp_path/"a.nii")}), (6, 16, 16), (3.0, 1.0, 1.0), (-24.0, 8.0, 50.0))
    first = np.array([(-17 + 24), (23 - 8), (50 - 41) / 3])  # voxel of the centre
    low = np.floor(first - (np.array([16, 16, 6]) - 1) / 2 + 0.5).astype(int)
    assert [s.start for s in at.inner][::-1] == low.tolist()
    assert "lies outside" in message(place_volumes, NewCase("a", {"t2w": str(tmp_path/"a.nii")}), (6, 16, 16),
                                     (3.0, 1.0, 1.0), (500.0, 0.0, 0.0))


def test_a_dicom_series_answers_at_the_same_place(tmp_path):
    affine = scan(tmp_path/"a.nii.gz", TURN, (0.9, 0.9, 3.0), (32, 32, 9),
                  np.random.default_rng(1).integers(10, 900, (32, 32, 9)))
    write_series(sitk.Cast(sitk.ReadImage(str(tmp_path/"a.nii.gz")), sitk.sitkInt16), tmp_path/"series")
    found = {}
    for name, file in (("nifti", tmp_path/"a.nii.gz"), ("dicom", tmp_path/"series")):
        case, = new_cases([file], ("t2w",))
        placed = place_volumes(case, (8, 32, 32), (3.0, 0.9, 0.9))
        write_like(to_native(placed.volume[0], placed), placed, tmp_path/f"{name}.nii.gz")
        found[name] = nib.load(tmp_path/f"{name}.nii.gz")
    inside = far_from_edges((32, 32, 9), (2, 2, 1))
    points = room(affine, (32, 32, 9))[inside]
    assert np.allclose(by_hand(found["dicom"], points), by_hand(found["nifti"], points), atol=0.5)
    assert np.allclose(found["dicom"].affine[:3, :3] @ found["dicom"].affine[:3, :3].T,
                       affine[:3, :3] @ affine[:3, :3].T, atol=1e-3)


def test_what_a_user_names(tmp_path):
    for p in ("P1", "P2"):
        for s in ("t2w", "adc"): scan(tmp_path/p/f"{s}.nii.gz", np.eye(3), shape=(6, 6, 4))
    both = ("t2w", "adc")
    t, a = (str(tmp_path/"P1"/f"{s}.nii.gz") for s in both)
    assert new_cases([tmp_path/"P1", tmp_path/"P2"], both)[1] == NewCase("P2", {
        s: str(tmp_path/"P2"/f"{s}.nii.gz") for s in both})
    others = f"adc={tmp_path}/P2/adc.nii.gz", f"t2w={tmp_path}/P2/t2w.nii.gz"
    one, two = new_cases([f"t2w={t}", f"adc={a}", *others], both)
    assert (one.name, two.name) == ("P1", "P2") and list(two.files) == ["t2w", "adc"]
    assert new_cases([a], ("adc",)) == [NewCase("P1", {"adc": a})]
    (tmp_path/"s.csv").write_text("Case;T2w;ADC\nx;P1/t2w.nii.gz;P1/adc.nii.gz\n")
    assert new_cases([tmp_path/"s.csv"], both)[0].name == "x"


@pytest.mark.parametrize("words, sequences, said", [
    (["P1"], ("t2w", "dwi", "adc"), "P1 has no dwi .it has adc.nii.gz, t2w.nii.gz.: the network reads t2w, dwi, adc"),
    (["P1/t2w.nii.gz"], ("t2w", "adc"), "is one file, and the network reads 2 sequences"),
    (["t2=P1/t2w.nii.gz"], ("t2w",), "no sequence 't2'. Did you mean 't2w'"),
    (["t2w=P1/t2w.nii.gz"], ("t2w", "adc"), "has no adc"),
    (["nowhere.nii.gz"], ("t2w",), "nowhere.nii.gz does not exist; expected a scan"),
    (["P1/t2w.nii.gz", "P1/t2w.nii.gz"], ("t2w",), "2 of the cases are called 'P1'"),
    (["s.csv"], ("t2w", "adc"), "s.csv, row 2, has no adc"), ([], ("t2w",), "No case is named"),
])
def test_what_is_wrong_is_told_in_one_sentence(tmp_path, monkeypatch, words, sequences, said):
    import re
    for s in ("t2w", "adc"): scan(tmp_path/"P1"/f"{s}.nii.gz", np.eye(3), shape=(6, 6, 4))
    (tmp_path/"s.csv").write_text("case,t2w\nx,P1/t2w.nii.gz\n")
    monkeypatch.chdir(tmp_path)
    told = message(new_cases, words, sequences)
    assert re.search(said, told) and "\n" not in told, told


def test_pictures_come_back_to_their_own_pixels(tmp_path):
    ramp = np.add.outer(np.arange(60), 2 * np.arange(90)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(ramp), str(tmp_path/"a.png"))
    case, = new_cases([tmp_path/"a.png"], ("us",))
    place = lambda **more: place_case(case, ("us",), True, (1, 56, 56), (1.0, 1.0, 1.0), **more)
    back = to_native(place().volume[0], place())
    assert back.shape == (1, 60, 90) and np.abs(back[0] * 255 - ramp)[3:-3, 3:-3].max() < 1
    middle = place(crop="middle")
    cut = to_native(middle.volume[0], middle, -1.0)
    assert cut.shape == (1, 60, 90) and np.abs(cut[0] * 255 - ramp)[8:-8, 12:-12].max() < 1.5 and cut[0, 0, 0] < 0
    scan(tmp_path/"v.nii.gz", np.eye(3), shape=(6, 6, 4))
    assert "v.nii.gz is a volume, and the network was trained on pictures" in message(
        place_case, NewCase("v", {"us": str(tmp_path/"v.nii.gz")}), ("us",), True, (1, 56, 56), (1.0, 1.0, 1.0))
    assert "is a picture, and the network was trained on volumes" in message(
        place_case, case, ("us",), False, (4, 56, 56), (1.0, 1.0, 1.0))
