"""Cases per second of the loader beside two MONAI pipelines on the same files with the same transforms, and how long a step waits.

Files: compressed NIfTI made from the phantom, three sequences and a mask a case; with VFM_DATA also the hippocampus crops.
Transforms: read, orient, cut or pad, z-score over voxels that are not zero, flip left-right, scale and shift intensities, batches of 4.
Before any time is taken, the deterministic part of both is compared. Seconds are wall time, the best of the epochs after the first.
"""
import os
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from vfm_notes.backbones.protocol import build
from vfm_notes.data.augment import augment
from vfm_notes.data.cohort import CohortCard
from vfm_notes.data.loader import Loader, normalise
from vfm_notes.data.phantom import phantom_case
from vfm_notes.data.volume import crop_or_pad, read_image, read_mask, to_array
from vfm_notes.foundation.spec import RunSpec
from vfm_notes.nets.decoder import Network
from vfm_notes.tune import catalog  # noqa: F401  (fills the registries)
from vfm_notes.tune.fit import fit, training_batches
from vfm_notes.tune.task import Segmentation, TaskData

THREADS, CASES, BATCH, EPOCHS = 2, 48, 4, 3
SIZE, SPACING, MADE = (12, 64, 64), (4.0, 1.5, 1.5), (16, 80, 80)  # the study's grid; the files hold more than is cut out


def write_phantoms(folder, n=CASES):
    "NIfTI files as a scanner's export has them: x y z, compressed; one list of paths a case, the mask last."
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])  # LPS
    def write(path, values):
        nib.save(nib.Nifti1Image(values.transpose(2, 1, 0), affine), path)
        return path
    out = []
    for i in range(n):
        case = phantom_case(0, i, MADE, SPACING)
        out.append([write(folder/f"{i:03d}_{k}.nii.gz", v) for k, v in zip(("t2w", "dwi", "adc"), case.volume)] + [write(folder/f"{i:03d}_mask.nii.gz", case.label)])
    return out


def hippocampi(n=CASES):
    "Real crops of 31-42 x 40-57 x 26-45 mm, where VFM_DATA has them."
    folder = Path(os.environ.get("VFM_DATA", ""))/"msd_hippocampus_100"
    if not os.environ.get("VFM_DATA") or not folder.is_dir(): return []
    return [[p, folder/"labels"/p.name] for p in sorted((folder/"images").glob("*.nii.gz"))[:n]]


# --- ours ---

def decode(cases, size):
    "All cases in memory: normalised volumes and masks."
    volumes = np.stack([[crop_or_pad(to_array(read_image(p)), size) for p in case[:-1]] for case in cases])
    masks = np.stack([crop_or_pad(to_array(read_mask(case[-1], range(3))), size) for case in cases])
    return normalise(volumes), masks.astype(np.uint8)


def our_epochs(cases, size):
    "Seconds of each epoch; the first one decodes."
    start, took = time.perf_counter(), []
    volumes, masks = decode(cases, size)
    loader = Loader({"inputs": torch.from_numpy(volumes), "target": torch.from_numpy(masks)}, BATCH, change=augment(("flip", "intensity")))
    for epoch in range(EPOCHS + 1):
        for batch in loader.epoch(epoch): assert batch["inputs"].shape[0] == BATCH
        took.append(time.perf_counter() - start)
        start = time.perf_counter()
    return took


# --- MONAI ---

def monai_steps(cases, size):
    "Dictionaries of files; deterministic transforms; random ones. Axes of MONAI's arrays are x y z."
    from monai import transforms as t
    inputs = [f"s{i}" for i in range(len(cases[0]) - 1)]
    keys = [*inputs, "mask"]
    files = [dict(zip(keys, map(str, case))) for case in cases]
    fixed = [t.LoadImaged(keys), t.EnsureChannelFirstd(keys), t.Orientationd(keys, axcodes="LPS", labels=None), t.ResizeWithPadOrCropd(keys, size[::-1]),
             t.ConcatItemsd(inputs, "inputs"), t.SelectItemsd(["inputs", "mask"]), t.NormalizeIntensityd("inputs", nonzero=True, channel_wise=True)]
    random = [t.RandFlipd(["inputs", "mask"], prob=0.5, spatial_axis=0), t.RandScaleIntensityd("inputs", factors=0.1, prob=1.0), t.RandShiftIntensityd("inputs", offsets=0.1, prob=1.0)]
    return files, fixed, random


def monai_epochs(cases, size, cached, workers):
    "Seconds of each epoch; where the cases are cached, the first one fills the cache."
    from monai.data import CacheDataset, DataLoader, Dataset
    from monai.transforms import Compose
    files, fixed, random = monai_steps(cases, size)
    start, took = time.perf_counter(), []
    data = CacheDataset(files, Compose(fixed + random), num_workers=workers, progress=False) if cached else Dataset(files, Compose(fixed + random))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    for _ in range((EPOCHS if cached else 1) + 1):
        for batch in loader: assert batch["inputs"].shape[0] == BATCH
        took.append(time.perf_counter() - start)
        start = time.perf_counter()
    return took


def same(cases, size):
    "Largest difference between MONAI's deterministic part and ours; masks must be equal."
    from monai.transforms import Compose
    files, fixed, _ = monai_steps(cases[:8], size)
    theirs, (volumes, masks) = [Compose(fixed)(f) for f in files], decode(cases[:8], size)
    swapped = lambda x: np.asarray(x).transpose(0, 3, 2, 1)
    assert all((swapped(d["mask"])[0] == m).all() for d, m in zip(theirs, masks)), "masks differ"
    worst = max(float(np.abs(swapped(d["inputs"]) - v).max()) for d, v in zip(theirs, volumes))
    assert worst < 1e-4, f"inputs differ by {worst}"
    return worst


def table(title, cases, size):
    "Cases per second in the first epoch and afterwards, and how many times slower than ours."
    sequences = len(cases[0]) - 1
    print(f"\n{title}: {len(cases)} cases of {sequences} sequence{'s' * (sequences > 1)} and a mask, {'x'.join(map(str, size))} voxels; MONAI's deterministic part and ours differ by at most {same(cases, size):.0e}")
    runs = [("ours", our_epochs(cases, size))]
    runs += [(f"MONAI {kind}, {w} workers", monai_epochs(cases, size, cached, w)) for cached, kind in ((False, "from files"), (True, "CacheDataset")) for w in (0, 2)]
    first, later = runs[0][1][0], min(runs[0][1][1:])
    print(f"{'cases/s':36}{'epoch 1':>10}{'later':>12}{'ours is faster by':>22}")
    for name, took in runs: print(f"{name:36}{len(cases)/took[0]:10.1f}{len(cases)/min(took[1:]):12.1f}{took[0]/first:14.2f}{min(took[1:])/later:8.1f}")
    return min(min(took[1:]) for name, took in runs if "Cache" in name)/later


def waiting(cases):
    "Share of a training's seconds that its steps wait for data, toy backbones, segmentation."
    volumes, masks = decode(cases, SIZE)
    task = Segmentation(CohortCard("files", "", "", "", "", ("t2w", "dwi", "adc"), ("background", "gland", "lesion"), (), SPACING))
    names = [str(i) for i in range(len(cases))]
    data = TaskData(torch.from_numpy(volumes), torch.from_numpy(masks).long(), names, names, SPACING)
    print(f"\n{'a step of ' + str(BATCH) + ' cases waits for data':36}{'ms':>10}{'of ms':>12}{'share, %':>14}   wanted: under 5")
    for name in ("profound_toy", "provicnet_toy"):
        for what in (("flip",), ("flip", "intensity", "affine", "noise")):
            torch.manual_seed(0)
            backbone, spec = build(name, 3), RunSpec(batch_size=BATCH, epochs=2)
            train = training_batches(data, spec, what)
            curves = fit(Network(backbone, task.head(backbone, 3)), task, train, spec, lambda epoch: {})
            steps, seconds = spec.epochs*len(train), float(curves.seconds.max())
            print(f"{name + ', ' + ' '.join(what):46}{1e3*train.waited/steps:0.2f}{1e3*seconds/steps:12.1f}{100*train.waited/seconds:14.2f}")


def main():
    torch.set_num_threads(THREADS)
    print(f"{THREADS} threads, batches of {BATCH}, load on the machine {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        cases = write_phantoms(Path(folder))
        ratios = [table("Phantom", cases, SIZE)]
        waiting(cases)
    real = hippocampi()
    if real: ratios.append(table("Hippocampus, real files", real, (32, 48, 32)))
    else: print("\nHippocampus: VFM_DATA is not set or has no msd_hippocampus_100, left out.")
    assert min(ratios) > 1, f"CacheDataset is faster from the second epoch on: {ratios}"


if __name__ == "__main__": main()
