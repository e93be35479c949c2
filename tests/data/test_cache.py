"""The cache of decoded cohorts: only what changed is decoded, what is damaged is made again, nothing half written."""
import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rich.console

import vfm_notes.data.load
from made_cases import CARD, GLAND, GRID, boxes, message, nifti, picture_of
from vfm_notes.data.cache import publish, read_cohort
from vfm_notes.foundation.progress import track_progress
from vfm_notes.data.cohort import cohort_problems
from vfm_notes.data.load import manifest_cohort
from vfm_notes.data.manifest import Manifest, text_table, read_manifest, write_manifest


def counted(monkeypatch) -> list:
    seen, real = [], vfm_notes.data.load.decode_row
    monkeypatch.setattr(
        vfm_notes.data.load, "decode_row", lambda m, row, *rest: (seen.append(row["case"]), real(m, row, *rest))[1]
    )
    return seen


def test_only_new_and_changed_cases_are_decoded(tmp_path, runs_root, monkeypatch):
    seen = counted(monkeypatch)
    first = manifest_cohort(boxes(tmp_path, 4), **GRID, n={})
    assert sorted(seen) == ["c0", "c1", "c2", "c3"]
    manifest_cohort(
        read_manifest(write_manifest(Manifest(boxes_table(tmp_path, 4), CARD, tmp_path, "mask_gland"), tmp_path)),
        **GRID, n={},
    )
    assert len(seen) == 4, "nothing changed"
    nifti(tmp_path/"c1_adc.nii.gz", picture_of(77))
    for s in CARD.sequences: nifti(tmp_path/f"c4_{s}.nii.gz", picture_of(50 + len(s) + ord(s[0])))
    nifti(tmp_path/"c4_gland.nii.gz", GLAND)
    more = manifest_cohort(Manifest(boxes_table(tmp_path, 5), CARD, tmp_path, "mask_gland"), **GRID, n={})
    assert seen[4:] == ["c1", "c4"] and np.array_equal(more.volumes[0], first.volumes[0])
    manifest_cohort(Manifest(boxes_table(tmp_path, 5), CARD, tmp_path, "mask_gland"), (4, 12, 10), (3, 1, 1), {})
    assert len(seen) == 11, "another transform"


def boxes_table(folder: Path, n: int) -> pd.DataFrame:
    return text_table(
        pd.DataFrame([
            dict(
                case=f"c{i}", patient=f"p{i}", t2w=f"c{i}_t2w.nii.gz", adc=f"c{i}_adc.nii.gz",
                mask_gland=f"c{i}_gland.nii.gz", mask_lesion=f"c{i}_lesion.nii.gz" if i % 2 else "none",
                grade=("low", "high")[i % 2],
            )
            for i in range(n)
        ])
    )


def test_a_known_case_that_is_damaged_is_decoded_again(tmp_path, runs_root, monkeypatch):
    seen, manifest = counted(monkeypatch), boxes(tmp_path, 4)
    manifest_cohort(manifest, **GRID, n={})
    folder, = (runs_root/"cache").iterdir()
    raw = bytearray((folder/"volumes.npy").read_bytes())
    raw[-5] ^= 1  # in the last case
    (folder/"volumes.npy").write_bytes(raw)
    seen.clear()
    again = manifest_cohort(manifest, **GRID, n={})
    assert seen == ["c3"] and cohort_problems(again) == [] and again.hash() == read_cohort(folder).hash()


def test_the_cohort_is_mapped_and_a_split_is_a_view(tmp_path, runs_root):
    cohort = manifest_cohort(boxes(tmp_path, 6), **GRID, n={"train": 3, "test": 3})
    assert isinstance(cohort.volumes, np.memmap)
    test = cohort.subset("test")
    assert np.shares_memory(test.volumes, cohort.volumes) and test.hash() == test.pick(range(3)).hash() != cohort.hash()
    before = cohort.hash()
    cohort.volumes[:] = 0  # the process's own copy
    assert manifest_cohort(boxes_manifest(tmp_path), **GRID, n={"train": 3, "test": 3}).hash() == before


def boxes_manifest(folder: Path) -> Manifest: return Manifest(boxes_table(folder, 6), CARD, folder, "mask_gland")


def test_a_stopped_decoding_leaves_nothing(tmp_path, runs_root, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(vfm_notes.data.load, "decode_row", stop)
    with pytest.raises(KeyboardInterrupt): manifest_cohort(boxes(tmp_path, 2), **GRID, n={})
    assert list((runs_root/"cache").iterdir()) == []


# two processes, and people who wait

@pytest.mark.parametrize("state", ["absent", "sound", "damaged"])
def test_the_first_sound_folder_stays(tmp_path, runs_root, state):
    manifest_cohort(boxes(tmp_path/"files", 2), **GRID, n={})
    made, = (runs_root/"cache").iterdir()
    new, there = shutil.copytree(made, tmp_path/"new"), tmp_path/"there"
    if state != "absent": shutil.copytree(made, there)
    if state == "damaged": (there/"labels.npy").write_bytes(b"half")
    inode = there.stat().st_ino if state == "sound" else new.stat().st_ino
    publish(new, there)
    assert read_cohort(there) is not None and there.stat().st_ino == inode and not new.exists()


def test_who_waits_sees_what_is_left(monkeypatch):
    seen, real = io.StringIO(), rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda stderr: real(file=seen, force_terminal=True, width=80))
    assert list(track_progress(range(5), "decoding boxes", patience=9)) == list(range(5)) and seen.getvalue() == ""
    assert list(track_progress(range(5), "decoding boxes", patience=-1)) == list(range(5))
    assert "decoding boxes" in seen.getvalue() and "/5" in seen.getvalue()


def test_nothing_is_left_out_of_a_cohort_without_any_good_case(tmp_path, runs_root):
    manifest = boxes(tmp_path, 2)
    for i in range(2): (tmp_path/f"c{i}_t2w.nii.gz").write_bytes(b"")
    assert "has no case that can be used (c0: " in message(manifest_cohort, manifest, **GRID, n={}, exclude_bad=True)
    assert list((runs_root/"cache").iterdir()) == []
