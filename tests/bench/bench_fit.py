"""The toy segmentation task to equal Dice: our loop and cache beside a loop as MONAI's tutorials write it, in one run.

The same NIfTI files, network, starting weights, batch size, constant learning rate, decay, transforms and loss.
Ours: `load_cohort` (decoded once,
kept in a cache), `training_batches` (augmented batch by batch), `fit`. Theirs: CacheDataset with their transforms
case by case,
DataLoader, DiceCELoss, AdamW, a plain loop with validation by sliding windows after every epoch. Steps per second
are those of the training loop
with its waiting for data; the clock to the target runs from the files on, with reading and validation in it.
The target is 95 % of the lowest best score of a seed; every figure is the median over seeds. Ours is timed twice:
with an empty cache, and with the cache of the first time.
"""
import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from bench_loader import BATCH, SEQUENCES, SIZE, SPACING, THREADS, monai_steps, write_phantoms

from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.data.load import load_cohort
from vfm_notes.foundation.spec import RunSpec
from vfm_notes.nets.decoder import Network
from vfm_notes.tune import catalog  # fills the registries
from vfm_notes.tune.fit import fit, predict, training_batches
from vfm_notes.tune.task import Segmentation

TRAIN, LR, DECAY = 36, 2e-3, 0.01  # cases, the other 12 validate; of AdamW


def network(name, seed):
    torch.manual_seed(seed)
    backbone = build_backbone(name, 3)
    return Network(backbone, Segmentation(CARD[0]).head(backbone, 3))


CARD = []  # of the cohort, known once it is read


def ours(folder, name, epochs, device, seed):
    "Steps per second, and (seconds since the start, Dice) after every epoch."
    start, seen = time.perf_counter(), []
    cohort = load_cohort(str(folder), SIZE, SPACING, {})
    CARD[:] = [cohort.card]
    task = Segmentation(cohort.card)
    data = task.prepare(cohort)
    train, val = (
        type(data)(data.inputs[s], data.target[s], data.names[s], data.patients[s], data.spacing)
        for s in (slice(TRAIN), slice(TRAIN, None))
    )
    model, spec = (
        network(name, seed).to(device),
        RunSpec(epochs=epochs, lr=LR, weight_decay=DECAY, warmup=0.0, schedule="constant", batch_size=BATCH, seed=seed),
    )
    def watch(epoch):
        seen.append((time.perf_counter() - start, task.validate(predict(model, val.inputs), val)))
        return {}
    batches = training_batches(train, spec, ("flip", "intensity"))
    curves, _ = fit(model, task, batches, spec, watch)
    return epochs * len(batches) / curves.seconds.max(), seen


def theirs(cases, name, epochs, device, workers, seed):
    "The same of a loop as in MONAI's tutorials."
    from monai.data import CacheDataset, DataLoader
    from monai.inferers import sliding_window_inference
    from monai.losses import DiceCELoss
    from monai.metrics import compute_dice
    from monai.transforms import Compose
    start, seen, training = time.perf_counter(), [], 0.0
    fixed, random = monai_steps(cases, SIZE)
    data = CacheDataset(cases[:TRAIN], Compose(fixed + random), num_workers=workers, progress=False)
    held = CacheDataset(cases[TRAIN:], Compose(fixed), num_workers=workers, progress=False)
    loader, after = (
        DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0),
        DataLoader(held, batch_size=1),
    )
    # x y z, as MONAI reads, to d h w
    turn = lambda batch: (
        batch["inputs"].permute(0, 1, 4, 3, 2).as_tensor().to(device),
        batch["label"].permute(0, 1, 4, 3, 2).as_tensor().to(device),
    )
    model, loss = (
        network(name, seed).to(device),
        DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True),
    )
    optimiser, classes = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY), len(CARD[0].classes)
    for _ in range(epochs):
        model.train()
        begin = time.perf_counter()
        for batch in loader:
            x, y = turn(batch)
            optimiser.zero_grad()
            loss(model(x), y).backward()
            optimiser.step()
        training += time.perf_counter() - begin
        model.eval()
        with torch.no_grad():
            scores = []
            for batch in after:
                x, y = turn(batch)
                said = sliding_window_inference(x, SIZE, BATCH, model).argmax(1, keepdim=True)
                hot = [torch.nn.functional.one_hot(m[:, 0].long(), classes).movedim(-1, 1) for m in (said, y)]
                scores.append(np.nanmean(compute_dice(*hot, include_background=False).cpu().numpy()))
        seen.append((time.perf_counter() - start, float(np.nanmean(scores))))
    return epochs * len(loader) / training, seen


OURS = ["ours, decoding", "ours, from the cache"]  # in this order: the first fills the cache of the second


def reached(seen, target): return next((t for t, dice in seen if dice >= target), float("nan"))


def once(folder, name, epochs, device, seed):
    """Steps per second, seconds to the target, best Dice and seconds to the first epoch's end of each way, and the
    target."""
    folder, os.environ["VFM_RUNS"] = Path(folder), f"{folder}/runs"
    write_phantoms(folder)
    cases = [{k: folder/f"{i:03d}_{k}.nii.gz" for k in (*SEQUENCES, "label")} for i in range(TRAIN + 12)]
    runs = {k: ours(folder, name, epochs, device, seed) for k in OURS}
    for workers in (0, 2):
        runs[f"MONAI tutorial, {workers} workers"] = theirs(cases, name, epochs, device, workers, seed)
    target = 0.95 * min(max(d for _, d in seen) for _, seen in runs.values())
    return [
        {
            "way": k, "steps/s": rate, "best Dice": max(d for _, d in seen), "s to target": reached(seen, target),
            "target": target, "first epoch s": seen["MONAI" not in k][0],
        }
        for k, (rate, seen) in runs.items()
    ]


def compare(name, epochs, device, seeds):
    print(
        f"\n{name} on {device}, {epochs} epochs of {TRAIN // BATCH} batches of {BATCH}, "
        f"{'x'.join(map(str, SIZE))} voxels, {seeds} seeds"
    )
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows += [{"seed": seed} | r for r in once(folder, name, epochs, device, seed)]
    every = pd.DataFrame(rows)
    table = every.groupby("way", sort=False).median().drop(columns="seed")
    print(table.round(3).to_string(), flush=True)
    of_seed = every.pivot(index="seed", columns="way", values="s to target")
    fastest = of_seed[[k for k in of_seed if "MONAI" in k]].min(axis=1)
    rate = table["steps/s"]
    say = lambda values: f"{values.median():.2f} (of the seeds: {', '.join(f'{v:.2f}' for v in values)})"
    print(
        f"steps/s: {rate[OURS].max() / rate.drop(OURS).max():.2f} times MONAI's best (aim: at least 1); times faster "
        f"to the target (aim: above 1): from the cache {say(fastest / of_seed[OURS[1]])}, with decoding "
        f"{say(fastest / of_seed[OURS[0]])}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backbone", nargs="+", default=["profound_toy", "provicnet_toy"])
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    import monai.data  # noqa: F401 (takes seconds, which are nobody's epoch)
    from monai.losses import DiceCELoss  # noqa: F401
    print(f"{THREADS} threads, load on the machine {os.getloadavg()[0]:.1f}")
    for name in args.backbone: compare(name, args.epochs, "cpu", args.seeds)
    if torch.cuda.is_available():
        for name in args.backbone: compare(name, args.epochs, "cuda", args.seeds)
    else: print("GPU: left out, no CUDA device here")


if __name__ == "__main__": main()
