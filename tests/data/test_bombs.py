"""Small files that declare large things, and decoders that fail in any way: one sentence each, and no memory taken."""
import gzip
import io
import json
import re
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from made_cases import GRID, boxes, message
from vfm_notes.data import load
from vfm_notes.data.cohort import cohort_problems
from vfm_notes.data.load import check_manifest
from vfm_notes.data.load import manifest_cohort
from vfm_notes.data.dicom import write_series
from vfm_notes.data.manifest import manifest_problems, read_manifest, write_manifest
from vfm_notes.data.picture import read_picture
from vfm_notes.data.volume import read_image
from vfm_notes.foundation import meter
from vfm_notes.foundation.meter import format_bytes, check_allocation, free_memory, cgroup_memory
from vfm_notes.foundation.registry import VfmError
from vfm_notes.nets.files import read_content, read_state, unwrap_state

GIB = 2**30


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    "A machine with a quarter of a GiB free."
    monkeypatch.setattr(meter, "free_memory", lambda: GIB // 4)


def refused(function, *args) -> str:
    "The message of a call that takes less than 100 MiB."
    tracemalloc.start()
    try: said = message(function, *args)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100 * 2**20 and "\n" not in said
    return said


# how much memory there is

def test_free_memory_is_what_the_system_says():
    lines = (
        dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        if Path("/proc/meminfo").is_file()
        else pytest.skip("no /proc/meminfo")
    )
    assert 0 < free_memory() <= int(lines["MemTotal"].split()[0]) * 1024


@pytest.mark.parametrize(
    "groups, expected",
    [
        ({"0::/job/step": {"job": ("max", 5 * GIB, 0), "job/step": (4 * GIB, GIB, GIB // 2)}}, 3.5),
        ({"0::/job/step": {"job": (2 * GIB, GIB, 0), "job/step": (4 * GIB, GIB, 0)}}, 1.0),
        ({"0::/": {"": ("max", GIB, 0)}}, None),
        ({"4:memory:/docker/x": {"memory/docker/x": (3 * GIB, GIB, GIB)}}, 3.0),
        ({"4:memory:/hidden": {"memory": (2 * GIB, GIB, 0)}}, 1.0),
        ({"9:cpu:/x": {}}, None),
    ],
)
def test_limits_of_containers_and_jobs(tmp_path, groups, expected):
    "Trees of control groups as the kernel shows them, version 2 and 1."
    (line, tree), = groups.items()
    (own := tmp_path/"cgroup").write_text(line + "\n")
    for place, (limit, used, cached) in tree.items():
        folder, old = tmp_path/"fs"/place, place.startswith("memory")
        folder.mkdir(parents=True, exist_ok=True)
        (folder/("memory.limit_in_bytes" if old else "memory.max")).write_text(f"{limit}\n")
        (folder/("memory.usage_in_bytes" if old else "memory.current")).write_text(f"{used}\n")
        (folder/"memory.stat").write_text(f"anon 1\n{'total_' * old}inactive_file {cached}\n")
    found = cgroup_memory(own, tmp_path/"fs")
    assert found == (None if expected is None else int(expected * GIB))
    assert cgroup_memory(tmp_path/"absent", tmp_path) is None


def test_what_fits_is_granted_and_what_does_not_is_told():
    check_allocation(GIB // 4, "a")
    assert message(check_allocation, GIB // 4 + 1, "a.nii (1x1x1 voxels)").startswith(
        "a.nii (1x1x1 voxels) would take 268 MB of memory, 268 MB are free; "
    )
    assert [format_bytes(n) for n in (0, 999, 1000, 4e12, 9e20)] == ["0 B", "999 B", "1 kB", "4 TB", "9.0e+05 PB"]


# volumes

def header(shape: tuple = (30000, 30000, 30000), kind: type = nib.Nifti1Header) -> bytes:
    h = kind()
    h.set_data_shape(shape)
    h.set_sform(np.eye(4), 1)
    h.set_data_offset(h.sizeof_hdr + 4)
    return h.binaryblock + bytes(4)


def volume(kind: str, folder: Path) -> Path:
    path = folder/"x.nii.gz"
    match kind:
        case "terabytes": path.write_bytes(gzip.compress(header() + bytes(1000)))
        case "terabytes, plain": (path := folder/"x.nii").write_bytes(header() + bytes(1000))
        case "more than any": path.write_bytes(gzip.compress(header((2**60, 2**60, 2**60), nib.Nifti2Header)))
        case "gigabytes of zeros":
            with gzip.open(path, "wb", 1) as f:
                f.write(header((400, 400, 250)))
                for _ in range(80): f.write(bytes(2_000_000))
            assert path.stat().st_size < 1e6
        case "a stream without end":
            with gzip.open(path, "wb", 1) as f:
                f.write(header((4, 5, 6)))
                for _ in range(20): f.write(bytes(2_000_000))
        case "a far offset":
            raw = bytearray(header((4, 5, 6)))
            raw[108:112] = struct.pack("<f", 1e30)
            path.write_bytes(gzip.compress(bytes(raw) + bytes(480)))
        case "MetaImage":
            (path := folder / "x.mha").write_text(
                "ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nCompressedDataSize = 9\n"
                "DimSize = 30000 30000 30000\nElementType = MET_FLOAT\nElementDataFile = LOCAL\n123456789"
            )
        case "NRRD":
            (path := folder / "x.nrrd").write_text(
                "NRRD0004\ntype: float\ndimension: 3\nsizes: 30000 30000 30000\n"
                "encoding: gzip\nendian: little\n\n123456789"
            )
    return path


@pytest.mark.parametrize(
    "kind, words",
    {
        "terabytes": "is cut off, or its header is damaged",
        "terabytes, plain": "is cut off, or its header is damaged",
        "more than any": "is cut off, or its header is damaged",
        "gigabytes of zeros": "(400x400x250 voxels) would take 640 MB of memory, 268 MB are free",
        "a stream without end": "unpacks to more than 1.05 MB, its header declares 832 B",
        "a far offset": "x.nii.gz is ",
        "MetaImage": "(30000x30000x30000 voxels) would take",
        "NRRD": "(30000x30000x30000 voxels) would take",
    }.items(),
)
def test_a_volume_that_declares_too_much(tmp_path, kind, words):
    said = refused(read_image, volume(kind, tmp_path))
    assert words in said and str(tmp_path) in said


def test_a_series_that_declares_too_much(tmp_path):
    write_series(
        sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 99, (3, 6, 5)).astype(np.int16)), tmp_path / "a"
    )
    for path in (tmp_path/"a").iterdir():
        raw = path.read_bytes()
        for tag in (b"\x28\x00\x10\x00\x02\x00\x00\x00", b"\x28\x00\x11\x00\x02\x00\x00\x00"):  # rows, columns
            at = raw.index(tag) + len(tag)
            raw = raw[:at] + b"\xff\xff" + raw[at + 2:]
        path.write_bytes(raw)
    assert "(65535x65535x3 voxels) would take 361 GB of memory" in refused(read_image, tmp_path/"a")


# pictures

def png(width: int, height: int, data: bytes) -> bytes:
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def npy(shape: tuple, n: int) -> bytes:
    np.lib.format.write_array_header_1_0(out := io.BytesIO(), dict(descr="|u1", fortran_order=False, shape=shape))
    return out.getvalue() + bytes(n)


def picture(kind: str, folder: Path) -> Path:
    path = folder/"x.png"
    match kind:
        case "PNG": path.write_bytes(png(60000, 60000, bytes(100)))
        case "PNG of zeros": path.write_bytes(png(4000, 4000, bytes(4001 * 4000)))
        case "JPEG":
            sitk.WriteImage(sitk.GetImageFromArray(np.zeros((16, 16), np.uint8)), str(path := folder/"x.jpg"))
            raw = path.read_bytes()
            at = re.search(rb"\xff[\xc0-\xc2]", raw).start() + 5
            path.write_bytes(raw[:at] + b"\xff\xdc\xff\xdc" + raw[at + 4:])
        case "npz":
            with zipfile.ZipFile(path := folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as z:
                z.writestr("a.npy", npy((10**6, 10**4, 10**4), 100))
        case "npz of zeros":
            with (
                zipfile.ZipFile(path := folder / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z,
                z.open("a.npy", "w", force_zip64=True) as f,
            ):
                f.write(npy((200, 1000, 1000), 0))
                for _ in range(200): f.write(bytes(10**6))
    return path


@pytest.mark.parametrize(
    "kind, words",
    {
        "PNG": "its header declares 60000x60000 pixels, more than its",
        "PNG of zeros": "(4000x4000 pixels) would take 320 MB",
        "JPEG": "(65500x65500 pixels) would take 85.8 GB",
        "npz": "the array 'a' declares 1000000x10000x10000 numbers",
        "npz of zeros": "array 'a' would take 400 MB",
    }.items(),
)
def test_a_picture_that_declares_too_much(tmp_path, kind, words):
    path = picture(kind, tmp_path)
    said = refused(read_picture, f"{path}#a/0" if path.suffix == ".npz" else path)
    assert words in said and str(path) in said and path.stat().st_size < 5e6


# weights

def varint(n: int) -> bytes:
    out = b""
    while n > 127: out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number: int, body: bytes, n: int | None = None) -> bytes:
    return varint(number << 3 | 2) + varint(len(body) if n is None else n) + body


def weights(kind: str, folder: Path) -> Path:
    path, tensor = folder/"x.onnx", varint(1 << 3) + varint(4) + varint(2 << 3) + varint(1) + field(8, b"w")
    match kind:
        case "ONNX beyond the file": path.write_bytes(field(7, field(5, tensor + field(9, bytes(16), 2**62))))
        case "ONNX without end": path.write_bytes(b"\x3a" + b"\xff" * 100_000)
        case "ONNX of many numbers":
            path.write_bytes(field(7, field(5, varint(1 << 3) + varint(2**62) + tensor + field(9, bytes(16)))))
        case "safetensors": (path := folder/"x.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
        case "safetensors of many numbers":
            head = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
            (path := folder/"x.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(16))
        case "torch, compressed":
            torch.save({"w": torch.zeros(4)}, folder/"a.pth")
            with (
                zipfile.ZipFile(folder / "a.pth") as a,
                zipfile.ZipFile(path := folder / "x.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z,
            ):
                for name in a.namelist(): z.writestr(name, a.read(name))
                with z.open("archive/data/1", "w", force_zip64=True) as f:
                    for _ in range(300): f.write(bytes(10**6))
        case "torch, repeated": torch.save({"w": torch.zeros(1).expand(10**13)}, path := folder/"x.pth")
        case "torch in itself":
            content = {"w": 1}
            content["model"] = content
            torch.save(content, path := folder/"x.pth")
    return path


@pytest.mark.parametrize(
    "kind, words",
    {
        "ONNX beyond the file": "damaged or truncated",
        "ONNX without end": "damaged or truncated",
        "ONNX of many numbers": "damaged or truncated",
        "safetensors": "damaged or truncated",
        "safetensors of many numbers": "damaged or truncated",
        "torch, compressed": "would take 300 MB of memory",
        "torch, repeated": "'w' (10000000000000 numbers) would take 80 TB",
        "torch in itself": "more than 50 dictionaries inside each other, or one that holds itself",
    }.items(),
)
def test_weights_that_declare_too_much(tmp_path, kind, words):
    said = refused(read_state, weights(kind, tmp_path))
    assert words in said and str(tmp_path) in said


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_message_or_an_end(data):
    "Whatever a file of ONNX holds, reading ends."
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder)/"x.onnx").write_bytes(data)
        try: assert not unwrap_state(read_content(path))
        except VfmError as e: assert re.search("damaged or truncated|never fetched", str(e))


def test_sound_weights_are_read(tmp_path):
    save_file({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path/"a.safetensors")
    torch.save({"model": {"w": torch.arange(6.0).reshape(2, 3), "i": torch.arange(3).expand(1, -1)}}, tmp_path/"a.pth")
    (tmp_path / "a.onnx").write_bytes(
        field(
            7,
            field(
                5,
                b"".join(varint(1 << 3) + varint(n) for n in (2, 3))
                + varint(2 << 3)
                + varint(1)
                + field(8, b"w")
                + field(9, np.arange(6, dtype="<f4").tobytes()),
            ),
        )
    )
    for path in tmp_path.iterdir(): assert torch.equal(read_state(path)["w"], torch.arange(6.0).reshape(2, 3))


# tables

def test_a_table_that_declares_too_much(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = write_manifest(boxes(tmp_path, 4), tmp_path)
    (folder/"manifest.csv").unlink()
    schema = pa.schema([(f"note_{i}", pa.dictionary(pa.int32(), pa.string())) for i in range(40)])
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(75_000, np.int32)), ["x"])
    pq.write_table(pa.table([column] * 40, schema), folder/"manifest.parquet")
    assert (folder/"manifest.parquet").stat().st_size < 1e5
    assert "manifest.parquet (75000 rows of 40 columns) would take 300 MB of memory" in refused(read_manifest, folder)


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "a: &a [x, x]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk")),
            "stands for more than 50,000 values",
        ),
        ("name: " + "[" * 5000, "maximum nesting depth"),
    ],
)
def test_a_card_that_unfolds(tmp_path, text, words):
    folder = write_manifest(boxes(tmp_path, 4), tmp_path)
    (folder/"card.yaml").write_text(text)
    assert words in refused(read_manifest, folder)


@pytest.mark.parametrize("cell", ["x" * 5000, "a/" * 3000, "nul\0.nii"])
def test_a_cell_that_is_no_path_is_a_bad_case(tmp_path, runs_root, cell):
    manifest = boxes(tmp_path, 4)
    manifest.table.loc[1, "adc"] = cell
    found = manifest_problems(manifest)
    assert len(found) == 1 and found[0].startswith("c1: adc")
    left = manifest_cohort(manifest, **GRID, n={}, exclude_bad=True)
    assert left.names == ["c0", "c2", "c3"] and [p.split(":")[0] for p in check_manifest(manifest)] == ["c1"]


# any failure of a decoder is a bad case

FAILURES = {
    "MemoryError": MemoryError(),
    "RecursionError": RecursionError("maximum recursion depth exceeded"),
    "error": zlib.error("Error -3 while decompressing data"),
    "OverflowError": OverflowError("too large"),
    "RuntimeError": RuntimeError("sitk::ERROR:\nBad allocation."),
    "AssertionError": AssertionError(),
    "KeyError": KeyError("x"),
}


def test_any_failure_is_a_bad_case_with_its_name(tmp_path, runs_root, monkeypatch):
    manifest, real = boxes(tmp_path, 2 + len(FAILURES)), load.read_image

    def read(path, *args, **kwargs):
        i, what = Path(path).name.removesuffix(".nii.gz").removeprefix("c").split("_")
        if what == "adc" and int(i) < len(FAILURES): raise list(FAILURES.values())[int(i)]
        return real(path, *args, **kwargs)
    monkeypatch.setattr(load, "read_image", read)
    said, found = message(manifest_cohort, manifest, **GRID, n={}), check_manifest(manifest)
    left = manifest_cohort(manifest, **GRID, n={}, exclude_bad=True)
    for i, name in enumerate(FAILURES):
        assert all(f"c{i}: cannot be decoded ({name}" in text and "\n" not in text for text in (said, found[i]))
    assert f"has {len(FAILURES)} bad cases" in said and len(found) == len(left.excluded) == len(FAILURES)
    assert (
        left.names == [f"c{len(FAILURES) + i}" for i in (0, 1)]
        and "MemoryError" in left.excluded[0]["reason"]
        and cohort_problems(left) == []
    )


def test_a_failure_inside_a_library_names_the_file(tmp_path, monkeypatch):
    boxes(tmp_path, 2)
    monkeypatch.setattr(sitk, "DICOMOrient", lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert (
        message(read_image, tmp_path / "c0_t2w.nii.gz")
        == f"{tmp_path / 'c0_t2w.nii.gz'} cannot be read (MemoryError); repair it or leave out its case."
    )


def test_a_bomb_among_the_cases_leaves_the_others(tmp_path, runs_root):
    manifest = boxes(tmp_path, 4)
    (tmp_path/"c1_adc.nii.gz").write_bytes(gzip.compress(header()))
    assert len(check_manifest(manifest)) == 1 and "c1: " in check_manifest(manifest)[0]
    assert manifest_cohort(manifest, **GRID, n={}, exclude_bad=True).names == ["c0", "c2", "c3"]
