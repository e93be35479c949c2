"""Cases per second of the loader beside two MONAI pipelines on the same files with the same transforms, and how long a
step waits.

Files: compressed NIfTI made from the phantom, three sequences and a mask a case; with VFM_DATA also the hippocampus
crops.
Transforms: read, orient, cut or pad, z-score over voxels that are not zero, flip left-right, scale and shift
intensities, batches of 4.
Ours checks every file before it is used and keeps what it decoded in a cache; MONAI does neither. Before any time
is taken, the
deterministic parts are compared. Seconds are wall time, of the first epoch and the best of the later ones.
"""
import os
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.data.augment import augment
from vfm_notes.data.cohort import CohortCard
from vfm_notes.data.load import load_cohort
from vfm_notes.data.loader import Loader, normalise
from vfm_notes.data.manifest import Manifest, text_table, write_manifest
from vfm_notes.data.phantom import phantom_case
from vfm_notes.foundation.spec import RunSpec
from vfm_notes.nets.decoder import Network
from vfm_notes.tune import catalog  # fills the registries
from vfm_notes.tune.fit import fit, training_batches
from vfm_notes.tune.task import Segmentation

THREADS, CASES, BATCH, EPOCHS = 2, 48, 4, 3
# the study's grid; the files hold more than is cut out
SIZE, SPACING, MADE = (12, 64, 64), (4.0, 1.5, 1.5), (16, 80, 80)
SEQUENCES = ("t2w", "dwi", "adc")


def write_phantoms(folder):
    "A manifest of NIfTI files as a scanner's export has them: x y z, compressed."
    affine, rows = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0]), []  # LPS
    for i in range(CASES):
        case = phantom_case(0, i, MADE, SPACING)
        row = {k: f"{i:03d}_{k}.nii.gz" for k in (*SEQUENCES, "label")}
        for name, values in zip(row.values(), (*case.volume, case.label)):
            nib.save(nib.Nifti1Image(values.transpose(2, 1, 0), affine), folder/name)
        rows.append({"case": f"{i:03d}", "patient": f"{i:03d}", **row})
    card = CohortCard(
        "bench", "Phantoms as files", "Apache-2.0", "this benchmark", "none", SEQUENCES,
        ("background", "gland", "lesion"), (), SPACING,
    )
    return write_manifest(Manifest(text_table(pd.DataFrame(rows)), card, folder), folder)


# --- ours ---

def our_epochs(load):
    "Seconds of each epoch, the first with decoding or opening the cache."
    start, took = time.perf_counter(), []
    cohort = load()
    loader = Loader(
        {"inputs": normalise(cohort.volumes), "target": cohort.labels}, BATCH, change=augment(("flip", "intensity"))
    )
    for epoch in range(EPOCHS + 1):
        for batch in loader.epoch(epoch): assert len(batch["inputs"]) == BATCH
        took.append(time.perf_counter() - start)
        start = time.perf_counter()
    return took


# --- MONAI ---

def monai_steps(cases, size):
    """Deterministic transforms and random ones, for dictionaries of files, the mask last. Axes of MONAI's arrays are x
    y z."""
    from monai import transforms as t
    *inputs, mask = keys = list(cases[0])
    fixed = [
        t.LoadImaged(keys), t.EnsureChannelFirstd(keys), t.Orientationd(keys, axcodes="LPS", labels=None),
        t.ResizeWithPadOrCropd(keys, size[::-1]), t.ConcatItemsd(inputs, "inputs"), t.SelectItemsd(["inputs", mask]),
        t.NormalizeIntensityd("inputs", nonzero=True, channel_wise=True),
    ]
    random = [
        t.RandFlipd(["inputs", mask], prob=0.5, spatial_axis=0), t.RandScaleIntensityd("inputs", factors=0.1, prob=1.0),
        t.RandShiftIntensityd("inputs", offsets=0.1, prob=1.0),
    ]
    return fixed, random


def monai_epochs(cases, size, cached, workers):
    "Seconds of each epoch; where the cases are cached, the first one fills the cache."
    from monai.data import CacheDataset, DataLoader, Dataset
    from monai.transforms import Compose
    fixed, random = monai_steps(cases, size)
    start, took = time.perf_counter(), []
    data = (
        CacheDataset(cases, Compose(fixed + random), num_workers=workers, progress=False)
        if cached
        else Dataset(cases, Compose(fixed + random))
    )
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    for _ in range((EPOCHS if cached else 1) + 1):
        for batch in loader: assert batch["inputs"].shape[0] == BATCH
        took.append(time.perf_counter() - start)
        start = time.perf_counter()
    return took


def difference(cases, size, cohort, names):
    "Largest difference between MONAI's deterministic part and ours; masks must be equal."
    from monai.transforms import Compose
    steps, worst = Compose(monai_steps(cases, size)[0]), 0.0
    for case, name in list(zip(cases, names))[:8]:
        theirs, i = steps(case), cohort.names.index(name)
        inputs, mask = (np.asarray(theirs[k]).transpose(0, 3, 2, 1) for k in ("inputs", list(case)[-1]))
        assert (mask[0] == cohort.labels[i]).all(), f"masks of {name} differ"
        worst = max(worst, float(np.abs(inputs - normalise(cohort.volumes[[i]])[0]).max()))
    assert worst < 1e-4, f"inputs differ by {worst}"
    return worst


def table(title, cases, names, size, load):
    "Cases per second in the first epoch and afterwards, and how many times faster ours is."
    runs = [("ours, decoding", our_epochs(load)), ("ours, from the cache", our_epochs(load))]
    worst, sequences = difference(cases, size, load(), names), len(cases[0]) - 1
    runs += [
        (f"MONAI {kind}, {w} workers", monai_epochs(cases, size, cached, w))
        for cached, kind in ((False, "from files"), (True, "CacheDataset"))
        for w in (0, 2)
    ]
    print(
        f"\n{title}: {len(cases)} cases of {sequences} sequence{'s' * (sequences > 1)} and a mask, "
        f"{'x'.join(map(str, size))} voxels; largest difference between MONAI's deterministic part and ours "
        f"{worst:.0e}"
    )
    later = min(t for _, took in runs[:2] for t in took[1:])
    print(f"{'cases per second':32}{'epoch 1':>10}{'later':>10}   later, ours is faster by")
    for name, took in runs:
        print(
            f"{name:32}{len(cases) / took[0]:10.1f}{len(cases) / min(took[1:]):10.1f}"
            + (f"{min(took[1:]) / later:10.1f}" if "MONAI" in name else ""),
            flush=True,
        )
    return min(min(took[1:]) for name, took in runs if "Cache" in name)/later


def waiting(cohort):
    "Share of a training's seconds that its steps wait for data: toy backbones, segmentation."
    task = Segmentation(cohort.card)
    data = task.prepare(cohort)
    print(
        f"\n{'a step of ' + str(BATCH) + ' cases':52}{'waits, ms':>10}{'of ms':>10}{'share, %':>10}   wanted: under 5"
    )
    for name in ("profound_toy", "provicnet_toy"):
        for what in (("flip",), ("flip", "intensity"), ("flip", "intensity", "affine", "noise")):
            torch.manual_seed(0)
            backbone, spec = build_backbone(name, 3), RunSpec(batch_size=BATCH, epochs=1)
            train = training_batches(data, spec, what)
            seconds = float(
                fit(Network(backbone, task.head(backbone, 3)), task, train, spec, lambda epoch: {})[0].seconds.max()
            )
            print(
                f"{name + ': ' + ', '.join(what):52}{1e3 * train.waited / len(train):10.2f}"
                f"{1e3 * seconds / len(train):10.1f}{100 * train.waited / seconds:10.2f}",
                flush=True,
            )


def main():
    torch.set_num_threads(THREADS)
    import monai.data  # noqa: F401  (takes seconds, which are nobody's epoch)
    print(f"{THREADS} threads, batches of {BATCH}, load on the machine {os.getloadavg()[0]:.1f}")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        folder, os.environ["VFM_RUNS"] = Path(folder), f"{folder}/runs"
        write_phantoms(folder)
        names = [f"{i:03d}" for i in range(CASES)]
        load = lambda: load_cohort(str(folder), SIZE, SPACING, {})
        ratios.append(
            table(
                "Phantom", [{k: folder / f"{n}_{k}.nii.gz" for k in (*SEQUENCES, "label")} for n in names], names, SIZE,
                load,
            )
        )
        waiting(load())
        if os.environ.get("VFM_DATA"):
            load = lambda: load_cohort("hippocampus", (32, 48, 32), (1, 1, 1), {"test": CASES})
            root, names = Path(os.environ["VFM_DATA"])/"msd_hippocampus_100", list(load().names)
            os.environ["VFM_RUNS"] = f"{folder}/again"
            ratios.append(
                table(
                    "Hippocampus, real files",
                    [{k: root / f"{k}s" / f"{n}.nii.gz" for k in ("image", "label")} for n in names], names,
                    (32, 48, 32), load,
                )
            )
        else: print("\nHippocampus: VFM_DATA is not set, left out.")
    assert min(ratios) > 1, f"MONAI's CacheDataset is faster from the second epoch on: {ratios}"


if __name__ == "__main__": main()
