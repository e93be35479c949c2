"""Where a volume lies: against nibabel, and against a mask that does not lie on its image."""
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from made_cases import GLAND, GRID, LESION, boxes, message, nifti, picture_of
from vfm_notes.data.cohort import CohortCard
from vfm_notes.data.load import check_manifest
from vfm_notes.data.load import manifest_cohort
from vfm_notes.data.volume import GRID_MM, displacement
from vfm_notes.data.manifest import Manifest, text_table
from vfm_notes.data.volume import read_image, read_mask, stored_geometry, to_array

STRAIGHT = np.array([[-1.5, 0, 0, 8], [0, -1.5, 0, 10], [0, 0, 3, -7.5], [0, 0, 0, 1.0]])


def rotation(a: float, b: float, c: float) -> np.ndarray:
    return np.reshape(sitk.Euler3DTransform((0, 0, 0), a, b, c).GetMatrix(), (3, 3))


def affine_from(columns: np.ndarray, spacing: tuple, origin: tuple = (12.5, -7.25, 31)) -> np.ndarray:
    return np.vstack([np.column_stack([columns * spacing, origin]), (0, 0, 0, 1)])


AFFINES = {
    "straight": STRAIGHT,
    "anisotropic": affine_from(np.eye(3), (0.3125, 0.7, 4.4)),
    "oblique": affine_from(rotation(0.3, 0.2, -0.4), (0.5, 0.75, 3.3)),
    "left-handed": affine_from(rotation(0.1, 0, 0) @ np.diag([-1, 1, 1]), (1, 1, 2)),
    "flipped": affine_from(np.diag([-1, -1, -1]), (1, 2, 3)),
    "axes exchanged": affine_from(np.eye(3)[:, [2, 0, 1]], (3, 0.5, 0.6)),
    "far from straight": affine_from(rotation(0.7, -0.7, 0.5), (1, 1, 1)),
}


def agrees_with_nibabel(path: Path, part: int | None = None) -> None:
    "Every voxel of ours is found by nibabel's affine, with nibabel's value."
    image, theirs = read_image(path if part is None else f"{path}#{part}", constant=True), nib.load(path)
    values = theirs.get_fdata() if part is None else theirs.get_fdata()[..., part]
    values = np.squeeze(values).astype(np.float32)
    index = np.array(list(itertools.product(*[sorted({0, n // 3, n - 1}) for n in values.shape])))
    places = (index @ theirs.affine[:3, :3].T + theirs.affine[:3, 3]) * (-1, -1, 1)
    ours = np.array([image.TransformPhysicalPointToContinuousIndex(p.tolist()) for p in places])
    np.testing.assert_allclose(ours, ours.round(), atol=2e-3)
    found = to_array(image)[tuple(ours.round().astype(int).T[::-1])]
    np.testing.assert_array_equal(found, values[tuple(index.T)])
    assert sorted(image.GetSize()) == sorted(values.shape)


# what is read lies where nibabel says

@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_orientation_is_nibabels(tmp_path, name, suffix):
    values = np.random.default_rng(0).normal(0, 99, (5, 7, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, AFFINES[name]), tmp_path/f"x{suffix}")
    agrees_with_nibabel(tmp_path/f"x{suffix}")


@pytest.mark.parametrize("kind", "u1 i1 <i2 >i2 <u2 >u2 <i4 >i4 <u4 <i8 <u8 <f4 >f4 <f8 >f8".split())
@pytest.mark.parametrize("slope, intercept", [(None, None), (0.5, -3.0), (1.0, 7.0), (0.0, 9.0)])
def test_every_type_and_scale_is_nibabels(tmp_path, kind, slope, intercept):
    kind = np.dtype(kind)
    values = np.random.default_rng(0).integers(0, 100, (4, 5, 6)).astype(kind)
    for Kind in (nib.Nifti1Image, nib.Nifti2Image):
        image = Kind(
            values,
            AFFINES["oblique"],
            Kind.header_class(endianness=kind.byteorder if kind.byteorder in "<>" else "<"),
            dtype=kind,
        )
        image.header.set_data_dtype(kind)
        nib.save(image, path := tmp_path/"x.nii")
        raw = bytearray(path.read_bytes())
        if slope is not None:  # as others write it; nibabel would scale the stored values itself
            header = image.header.__class__(bytes(raw[:image.header.sizeof_hdr]))
            header["scl_slope"], header["scl_inter"] = slope, intercept
            raw[:image.header.sizeof_hdr] = header.binaryblock
            path.write_bytes(raw)
        agrees_with_nibabel(path)


def test_a_volume_of_a_4d_file_is_nibabels(tmp_path):
    values = np.random.default_rng(0).integers(-999, 999, (6, 5, 4, 7)).astype(np.int16)
    for name in ("x.nii", "x.nii.gz"):
        nib.save(nib.Nifti1Image(values, AFFINES["oblique"]), tmp_path/name)
        for k in (0, 3, 6): agrees_with_nibabel(tmp_path/name, k)


# qform, sform, pixdim

FORMS = {"neither": (0, 0), "qform": (1, 0), "sform": (0, 2), "both": (1, 1), "both, moved": (1, 4)}


def with_forms(path: Path, values: np.ndarray, q: np.ndarray, s: np.ndarray, codes: tuple[int, int]) -> Path:
    image = nib.Nifti1Image(values, None)
    image.header.set_zooms(np.linalg.norm(q[:3, :3], axis=0))
    image.header.set_qform(q, codes[0])
    image.header.set_sform(s, codes[1])
    nib.save(image, path)
    header = nib.load(path).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == codes
    return path


@pytest.mark.parametrize("forms", FORMS)
def test_of_two_geometries_nibabels_is_read(tmp_path, forms):
    q, s = AFFINES["oblique"], affine_from(rotation(-0.2, 0, 0.1), (0.5, 0.75, 3.3), (0, 4, -9))
    agrees_with_nibabel(with_forms(tmp_path/"x.nii.gz", picture_of(0), q, s, FORMS[forms]))


def test_geometries_that_exchange_left_and_right_are_refused(tmp_path):
    path = with_forms(tmp_path/"x.nii.gz", picture_of(0), STRAIGHT, np.diag([-1.0, 1, 1, 1]) @ STRAIGHT, (1, 1))
    said = message(read_image, path)
    assert "qform and an sform that disagree about left and right" in said and "fslorient" in said


@pytest.mark.parametrize("pixdim", [1.0, -1.5])
def test_pixdim_against_sform(tmp_path, capfd, pixdim):
    path = Path(with_forms(tmp_path/"x.nii", picture_of(0), STRAIGHT, STRAIGHT, (0, 1)))
    raw = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]))
    header["pixdim"][1:4] = pixdim
    path.write_bytes(header.binaryblock + raw[348:])
    image = read_image(path)
    assert capfd.readouterr() == ("", ""), "nothing is printed"
    assert image.GetSpacing() == pytest.approx((1.5, 1.5, 3.0))
    agrees_with_nibabel(path)


# axes that are not at right angles

@pytest.mark.parametrize("suffix", [".nii", ".mha"])
@pytest.mark.parametrize("shear, fine", [(2e-3, True), (0.05, False)])
def test_a_little_shear_is_straightened_and_more_is_refused(tmp_path, suffix, shear, fine):
    affine, path = (
        affine_from(np.array([[-1.0, shear, 0], [0, -1, 0], [0, 0, 1]]), (1.5, 1.5, 3)),
        tmp_path / f"x{suffix}",
    )
    values = picture_of(0)
    if suffix == ".nii": nib.save(nib.Nifti1Image(values, affine), path)
    else:
        image, lps = sitk.GetImageFromArray(values.T), np.diag([-1, -1, 1, 1]) @ affine
        image.SetSpacing(np.linalg.norm(lps[:3, :3], axis=0)), image.SetOrigin(lps[:3, 3])
        image.SetDirection((lps[:3, :3] / np.linalg.norm(lps[:3, :3], axis=0)).ravel())
        sitk.WriteImage(image, str(path))
    if not fine:
        said = message(read_image, path)
        assert "not at right angles: straightening them moves a corner by 0." in said and "resample_to_output" in said
        return
    image = read_image(path)
    direction = np.reshape(image.GetDirection(), (3, 3))
    np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-9)
    corners = np.array(list(itertools.product(*[(0, n - 1) for n in values.shape])))
    theirs = (corners @ affine[:3, :3].T + affine[:3, 3]) * (-1, -1, 1)
    ours = np.array([image.TransformContinuousIndexToPhysicalPoint(c.astype(float).tolist()) for c in corners])
    worst = np.linalg.norm(theirs - ours, axis=1).max()
    assert 0 < worst < 0.25 * 1.5 and worst == pytest.approx(
        0.5 * shear * np.hypot(*(np.array([15, 15]) * 1.5 / 2)), rel=0.2
    ), "half of the shear in each axis, about the centre"
    np.testing.assert_array_equal(to_array(image), values.T)


# other formats

SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "RAS": (-1, -1, 1),
}


def nrrd(path: Path, values: np.ndarray, space: str) -> Path:
    "Written by hand after the format's definition: axes of 2, 3 and 4 mm, origin 5 6 7."
    lines = [
        "NRRD0004",
        "type: float",
        "dimension: 3",
        f"sizes: {' '.join(map(str, values.shape))}",
        "encoding: raw",
        "endian: little",
        *[f"space: {space}"] * bool(space),
        *["space directions: (2,0,0) (0,3,0) (0,0,4)", "space origin: (5,6,7)"] * bool(space),
        *["spacings: 2 3 4"] * (not space),
    ]
    path.write_bytes(("\n".join(lines) + "\n\n").encode() + values.astype("<f4").tobytes("F"))
    return path


@pytest.mark.parametrize("space", SPACES)
def test_the_space_of_a_nrrd(tmp_path, space):
    values = picture_of(0)
    image = read_image(nrrd(tmp_path/"x.nrrd", values, space))
    for index in ((0, 0, 0), (3, 5, 2), (15, 15, 5)):
        place = (np.array(index) * (2, 3, 4) + (5, 6, 7)) * SPACES[space]
        i, j, k = image.TransformPhysicalPointToIndex(place.astype(float).tolist())
        assert to_array(image)[k, j, i] == values[index]


def test_a_nrrd_without_anatomy_is_refused(tmp_path):
    said = message(read_image, nrrd(tmp_path/"x.nrrd", picture_of(0), "scanner-xyz"))
    assert "has the space 'scanner-xyz', expected left-anterior-superior, left-posterior-superior" in said
    assert read_image(nrrd(tmp_path/"y.nrrd", picture_of(0), "")).GetSpacing() == (2, 3, 4)


def foreign(kind: str, folder: Path) -> Path:
    values, path = picture_of(0), folder/"x.nii"
    match kind:
        case "complex": nib.save(nib.Nifti1Image((values + 1j).astype(np.complex64), STRAIGHT), path)
        case "colour":
            nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.dtype([(c, "u1") for c in "RGB"])), STRAIGHT), path)
        case "one slice": nib.save(nib.Nifti1Image(values[:, :, 0], STRAIGHT), path)
        case "one slice of a MetaImage":
            sitk.WriteImage(sitk.GetImageFromArray(values[:, :, 0]), str(path := folder / "x.mha"))
        case "five dimensions": nib.save(nib.Nifti1Image(np.stack([values[..., None]] * 3, -1), STRAIGHT), path)
        case "no voxels" | "wrong code" | "damaged qform":
            header = nib.Nifti1Header()
            header.set_data_shape((4, 5, 6))
            if kind == "no voxels": header["dim"][2] = 0
            if kind == "wrong code": header["datatype"] = 1234
            if kind == "damaged qform": header["qform_code"], header["quatern_b"] = 1, 7
            path.write_bytes(header.binaryblock + bytes(4 + 480))
        case "CIFTI":
            axes = (
                nib.cifti2.SeriesAxis(0, 1, 2),
                nib.cifti2.BrainModelAxis.from_mask(np.ones((2, 2, 2), bool), affine=np.eye(4)),
            )
            nib.save(nib.Cifti2Image(np.ones((2, 8), np.float32), axes), path := folder/"x.dtseries.nii")
        case "Analyze": nib.save(nib.AnalyzeImage(values, STRAIGHT), folder/"x.img"), (folder/"x.hdr").rename(path)
        case "half a pair": nib.save(nib.Nifti1Pair(values, STRAIGHT), folder/"x.img"), (folder/"x.hdr").rename(path)
        case "micrometres":
            image = nib.Nifti1Image(values, STRAIGHT)
            image.header.set_xyzt_units("micron")
            nib.save(image, path)
        case "hdr": nib.save(nib.Nifti1Pair(values, STRAIGHT), path := folder/"x.hdr")
        case "FreeSurfer": nib.save(nib.MGHImage(values, STRAIGHT), path := folder/"x.mgz")
        case "compressed .nii":
            nib.save(nib.Nifti1Image(values, STRAIGHT), folder / "x.nii.gz"), (folder / "x.nii.gz").rename(path)
        case "plain .nii.gz":
            nib.save(nib.Nifti1Image(values, STRAIGHT), path), (path := path.rename(folder / "x.nii.gz"))
        case "garbage behind gzip":
            nib.save(nib.Nifti1Image(values, STRAIGHT), path := folder/"x.nii.gz")
            path.write_bytes(path.read_bytes() + b"more")
    return path


FOREIGN = {
    "complex": ("complex values", "write its magnitude or its phase"),
    "colour": ("3 values per voxel (colours)", "grey"),
    "one slice": ("is one slice (16x16)", "join the slices"),
    "one slice of a MetaImage": ("is one slice (16x16)", "join the slices"),
    "five dimensions": ("has 5 dimensions (16x16x6x1x3)", "slicer[..., 0, 0]"),
    "no voxels": ("has no voxels (its header declares 4x0x6)", "copy"),
    "wrong code": ("1234", "convert"),
    "damaged qform": ("damaged qform", "repair"),
    "CIFTI": ("is a CIFTI file", "wb_command"),
    "Analyze": ("Analyze", "left from right"),
    "half a pair": ("header of a pair", "nibabel.save"),
    "micrometres": ("has its geometry in micrometres", "expected millimetres"),
    "hdr": ("is one half of a pair", "as one .nii file"),
    "FreeSurfer": ("is a FreeSurfer volume", "nibabel.load('x.mgz')"),
    "compressed .nii": ("is compressed, though its name does not end in .gz", "rename"),
    "plain .nii.gz": ("is not a gzip file", "expected a compressed"),
    "garbage behind gzip": ("checksum is wrong, or something follows", "copy"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_read_is_told_with_a_way_out(tmp_path, kind):
    path = foreign(kind, tmp_path)
    for address in (path, f"{path}#0"):
        said = message(read_image, address)
        assert all(w in said for w in FOREIGN[kind]) and str(path) in said and "\n" not in said and "#0" not in said, (
            "no advice that leads back"
        )


@pytest.mark.parametrize(
    "kind", ["five dimensions", "one slice", "complex", "hdr", "half a pair", "FreeSurfer", "compressed .nii"]
)
def test_the_way_out_is_one(tmp_path, kind):
    path, out = foreign(kind, tmp_path), tmp_path/"out.nii.gz"
    match kind:
        case "five dimensions": nib.save(nib.load(path).slicer[..., 0, 0], out)
        case "one slice": nib.save(nib.concat_images([nib.load(path)] * 3), out)
        case "complex": nib.save(nib.Nifti1Image(np.abs(np.asarray(nib.load(path).dataobj)), STRAIGHT), out)
        case "hdr" | "FreeSurfer": nib.save(nib.load(path), out)
        case "half a pair": nib.save(nib.load(path.rename(tmp_path/"x.hdr")), out)
        case "compressed .nii": path.rename(out)
    image = read_image(out)
    assert image.GetDimension() == 3
    agrees_with_nibabel(out)


def test_files_of_other_programs(tmp_path):
    "All image files that nibabel brings for its own tests: equal to what nibabel reads, or one sentence."
    folder = Path(nib.__file__).parent/"tests"/"data"
    files = (
        sorted(
            p
            for p in folder.glob("*")
            if p.name.endswith(
                (".nii", ".nii.gz", ".mgz", ".hdr", ".mnc", ".PAR", ".REC", ".HEAD", ".BRIK", ".BRIK.gz")
            )
        )
        if folder.is_dir()
        else []
    )
    if not files: pytest.skip("this nibabel was installed without its test data")
    read = set()
    for path in files:
        if path.stat().st_size > 20e6: continue
        try: read_image(path, constant=True)
        except Exception as e:
            said = str(e)
            assert type(e).__name__ == "VfmError" and str(path) in said and "\n" not in said, said
            if "name one of its volumes" not in said: continue
            agrees_with_nibabel(path, 1)
        else: agrees_with_nibabel(path)
        read.add(path.name)
    assert {
        "anatomical.nii",
        "functional.nii",
        "example4d.nii.gz",
        "example_nifti2.nii.gz",
        "standard.nii.gz",
        "reoriented_anat_moved.nii",
    } <= read


# a mask and its image

def one_case(folder: Path, mask: np.ndarray, affine: np.ndarray) -> Manifest:
    nifti(folder/"t2w.nii", picture_of(0)[:12, :14], STRAIGHT)
    nifti(folder/"mask.nii", mask, affine)
    card = CohortCard(
        "one", "One", "Apache-2.0", "made", "none", ("t2w",), ("background", "gland"), (), (3.0, 1.5, 1.5)
    )
    return Manifest(
        text_table(pd.DataFrame({"case": ["a"], "patient": ["a"], "t2w": ["t2w.nii"], "mask_gland": ["mask.nii"]})),
        card,
        folder,
    )


def moved(x: float, y: float = 0, z: float = 0) -> np.ndarray:
    return STRAIGHT + np.array([[0, 0, 0, x], [0, 0, 0, y], [0, 0, 0, z], [0, 0, 0, 0]])


OFF = {
    "identity": (
        np.eye(4),
        (
            "its axes x and y point in the other direction",
            "its spacing is 1x1x1 mm instead of 1.5x1.5x3",
            "its origin differs by 14.8 mm",
        ),
    ),
    "signs": (
        np.diag([-1.0, -1, 1, 1]) @ STRAIGHT,
        ("its axes x and y point in the other direction", "origin differs by 25.6 mm, 16 to the left, 20 to the back"),
    ),
    "origin zero": (
        moved(-8, -10, 7.5),
        ("origin differs by 14.8 mm, 8 to the left, 10 to the back, 7.5 to the head",),
    ),
    "shifted": (moved(4.5), ("a corner is 4.5 mm off, at most 0.2", "origin differs by 4.5 mm, 4.5 to the right")),
    "mirrored": (STRAIGHT @ np.diag([-1.0, 1, 1, 1]), ("its axis x points in the other direction", "other handedness")),
    "spacing": (STRAIGHT @ np.diag([1.02, 1, 1, 1]), ("its spacing is 1.53x1.5x3 mm instead of 1.5x1.5x3",)),
    "turned": (
        np.vstack([np.column_stack([rotation(0, 0, 0.035) @ STRAIGHT[:3, :3], STRAIGHT[:3, 3]]), (0, 0, 0, 1)]),
        ("its axes are turned by 2.01 degrees",),
    ),
    "just too far": (moved(GRID_MM * 1.2), ("a corner is 0.24 mm off",)),
}


@pytest.mark.parametrize("kind", OFF)
def test_a_mask_that_lies_elsewhere_is_refused(tmp_path, runs_root, kind):
    affine, words = OFF[kind]
    manifest = one_case(tmp_path, GLAND[:12, :14], affine)
    said, = check_manifest(manifest)
    assert (
        all(w in said for w in words)
        and "a: " in said
        and "mask.nii does not lie on its image (t2w)" in said
        and "\n" not in said
    ), said
    assert said.rstrip(".") in message(manifest_cohort, manifest, **GRID, n={})


@pytest.mark.parametrize("kind", ["right", "rounded", "stored in other axes", "in the other order of forms"])
def test_a_mask_that_lies_on_its_image_is_read(tmp_path, runs_root, kind):
    "Counted on the tissue: the image is bright where the mask is."
    mask = GLAND[:12, :14]
    manifest = one_case(tmp_path, mask, STRAIGHT)
    nifti(tmp_path/"t2w.nii", mask * np.float32(800) + picture_of(0)[:12, :14], STRAIGHT)
    match kind:
        case "rounded":
            nifti(
                tmp_path / "mask.nii",
                mask,
                STRAIGHT + np.random.default_rng(0).uniform(-1e-4, 1e-4, (4, 4)) * [[1], [1], [1], [0]],
            )
        case "stored in other axes":
            sitk.WriteImage(
                sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "mask.nii")), "SAR"), str(tmp_path / "mask.nii")
            )
        case "in the other order of forms": with_forms(tmp_path/"mask.nii", mask, moved(4.5), STRAIGHT, (1, 1))
    assert check_manifest(manifest) == []
    cohort = manifest_cohort(manifest, (6, 14, 12), (3.0, 1.5, 1.5), n={})
    assert (
        cohort.volumes[0, 0][cohort.labels[0] > 0].min() > 700 > cohort.volumes[0, 0][cohort.labels[0] == 0].max()
        and cohort.labels.sum() == mask.sum()
    )


def test_a_mask_written_by_a_program_that_took_the_other_form(tmp_path, runs_root):
    "The image has two geometries: a mask saved with the qform alone is refused, one with the sform is read."
    mask, q = GLAND[:12, :14], moved(4.5)
    manifest = one_case(tmp_path, mask, q)
    with_forms(tmp_path/"t2w.nii", picture_of(0)[:12, :14], q, STRAIGHT, (1, 1))
    assert "origin differs by 4.5 mm" in check_manifest(manifest)[0]
    nifti(tmp_path/"mask.nii", mask, STRAIGHT)
    assert check_manifest(manifest) == []


def test_zones_and_label_files_are_compared_too(tmp_path, runs_root):
    manifest = boxes(
        tmp_path,
        4,
        zones=[
            nifti(
                tmp_path / f"c{i}_z.nii.gz",
                GLAND,
                np.diag([1.0, 1, 3, 1]) if i else np.array([[1.0, 0, 0, 2], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]),
            )
            for i in range(4)
        ],
    )
    found = check_manifest(manifest)
    assert len(found) == 1 and "c0: " in found[0] and "c0_z.nii.gz does not lie on its image" in found[0]
    manifest = boxes(
        tmp_path,
        4,
        mask_gland=None,
        mask_lesion=None,
        label=[
            nifti(tmp_path / f"c{i}_label.nii.gz", GLAND + LESION, np.diag([1.0, 1, 3 + i / 10, 1])) for i in range(4)
        ],
    )
    manifest.crop = "volume"
    assert [p.split(":")[0] for p in check_manifest(manifest)] == [
        "c1",
        "c2",
        "c3",
    ] and "its spacing is 1x1x3.1 mm instead of 1x1x3" in check_manifest(manifest)[0]


def test_real_masks_lie_on_their_images(real_data):
    "What rounding there is in real headers stays far below the tolerance."
    for folder in ("prostatex_0000", "prostatex_0001"):
        t2w = read_image(real_data/folder/"t2_tra.nii.gz")
        for name in ("gland_Bosma22b", "zones_HeviAI23", "cspca_human"):
            assert displacement(t2w, read_mask(real_data/folder/f"{name}.nii.gz", range(6))) < GRID_MM / 2
    names = sorted(os.listdir(real_data/"msd_hippocampus_100"/"images"))[:5]
    for name in names:
        assert (
            displacement(*(read_image(real_data / "msd_hippocampus_100" / k / name) for k in ("images", "labels"))) == 0
        )


def test_the_geometry_of_the_file_is_kept(tmp_path):
    path = Path(nifti(tmp_path/"x.nii", picture_of(0), AFFINES["axes exchanged"]) and tmp_path/"x.nii")
    affine, size = stored_geometry(read_image(path))
    np.testing.assert_allclose(np.diag([-1, -1, 1, 1]) @ affine, nib.load(path).affine, atol=1e-5)
    assert size == (16, 16, 6)
