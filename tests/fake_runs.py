"""A made-up runs folder for tests of tables and pages: right in form, invented in content, never in a real site."""
import json

import numpy as np
import pandas as pd

from sklearn.metrics import cohen_kappa_score, roc_auc_score

from vfm_notes.analysis.tables import class_scores
from vfm_notes.foundation.places import notebook_file, run_folder
from vfm_notes.foundation.show import slices
from vfm_notes.foundation.spec import StudySpec, run_id
from vfm_notes.runs.grid import jobs_of
from vfm_notes.runs.record import failed_record, new_record, write_record

PRIMARY = {
    "classification": "auc", "segmentation": "dice", "super_resolution": "psnr", "distortion_correction": "psnr",
    "translation": "psnr",
}
METRICS = {
    "auc": (0.72, "", 0.5), "kappa": (0.4, "", 0.0), "dice": (0.7, "", 0.05), "hd95": (9.0, "mm", 30.0),
    "psnr": (26.0, "dB", 22.0), "ssim": (0.8, "", 0.7),
}
NAMES = {"classification": ("auc", "kappa"), "segmentation": ("dice", "hd95"), "super_resolution": ("psnr", "ssim"),
         "distortion_correction": ("psnr", "ssim"), "translation": ("psnr", "ssim")}
LAYERS = ("stem", "stage1", "stage2", "embed")
# how much of the gain and of the distance each strategy has
TUNED = {"full": 1.0, "probe": 0.3, "decoder": 0.6, "lora rank=4": 0.8, "top k=1": 0.7}


def value_of(cases, metric):
    "A metric of one run from its cases, by scikit-learn; the last class is the positive one."
    if metric not in ("auc", "kappa"): return float(cases.loc[cases.metric == metric, "value"].mean())
    label, score = class_scores(cases)
    if metric == "auc": return float(roc_auc_score(label == score.shape[1] - 1, score[:, -1]))
    return float(cohen_kappa_score(label, score.argmax(1), labels=list(range(score.shape[1])), weights="quadratic"))


def curves(spec, final, metric, distance, rng):
    "Loss, validation metric and distance of each epoch."
    rows, span = [], spec.epochs
    for e in range(span + 1):
        t, rise = 2.1 * e, 1 - np.exp(-(3 + 3 * TUNED.get(spec.strategy, 0)) * e / span)
        rows.append((e, t, f"val_{metric}", float(final * (0.5 + 0.5 * rise) + rng.normal(0, 0.004) * final)))
        if e: rows.append((e, t, "loss", float(1.2 - rise + rng.normal(0, 0.01))))
        rows += [(e, t, f"d2p_{layer}", float(distance * (k + 1) / 4 * rise)) for k, layer in enumerate(LAYERS)]
    return [dict(zip(("epoch", "seconds", "name", "value"), r)) for r in rows]


def cases(task, metrics, n, rng):
    "Values of each test case; scores and labels for a classification."
    rows = []
    for i in range(n):
        who = {"case": f"case_{i:03d}" if i else "<i>case</i> & co", "patient": f"p{i:03d}"}
        if task == "classification":
            label = (i * 7) % 3
            score = rng.dirichlet(np.ones(3) + 2.0 * np.eye(3)[label])
            rows += [who | {"metric": "label", "value": float(label)}] + [
                who | {"metric": f"score_{k}", "value": float(s)} for k, s in enumerate(score)
            ]
        else:
            rows += [
                who | {"metric": m, "value": float(v * (1 + rng.normal(0, 0.08))) if i != 3 else np.nan}
                for m, v in metrics.items()
            ]
    return rows


def known(spec):
    "Scores before fine-tuning: LogME knows the better backbone, kNN does not, GBC is not defined for one task."
    good, cases = spec.backbone.startswith("profound"), spec.task == "classification"
    rows = []
    for layer in LAYERS if cases else ("pyramid 0", "pyramid 1"):
        for name, value in (
            ("logme", 0.2 + 0.1 * good), ("knn", 0.6 - 0.1 * good),
            ("gbc", None if spec.task == "segmentation" else -0.3),
        ):
            rows.append(
                dict(
                    score=name, layer=layer, value=value, n=40, features=16, direction=1, seconds=0.02,
                    reason="" if value is not None else "GBC needs <two> rows in every class.",
                )
            )
    return rows


def cost(seconds, mib):
    return {
        "seconds": seconds, "memory_mib": {"host": mib, "device": None},
        "parameters": {"trainable": 450_000, "total": 450_000}, "gpu_hours": 0.0, "flops_per_case": 3.2e8,
        "flops_counted": "invented", "energy_j": None,
    }


def transfer(study, spec, rng):
    "One fine-tuning with invented values."
    better = 0.03 + 0.02 * spec.backbone.startswith("profound") * (spec.task != "classification")
    share = TUNED.get(spec.strategy, 0.0)
    factor = 1 + better * share + rng.normal(0, 0.008)
    metrics = {m: METRICS[m][0] * (factor if m != "hd95" else 2 - factor) for m in NAMES[spec.task]}
    tested = cases(spec.task, metrics, 48, rng)
    metrics = {m: value_of(pd.DataFrame(tested), m) for m in metrics}  # a record's score is that of its cases
    distance = {"profound": 0.06, "provicne": 0.12}.get(spec.backbone[:8], 0.1) * (share or 1.5) + 0.02 * list(
        PRIMARY
    ).index(spec.task)
    d2p = [
        dict(
            layer=layer, mmd2=distance * (k + 1) / 4, mmd2_independent=distance * (k + 1) / 4, p_value=0.001,
            bandwidth=8.1 + k, n=48, estimator="unbiased", bandwidth_rule="median", pooling="mean over voxels",
            standardised="by pretrained features", permutations=1000, seed=0,
        )
        for k, layer in enumerate(LAYERS)
    ]
    if spec.divergences:  # "energy" says what MMD² says, any other the opposite
        d2p = [
            d | {"divergences": {name: d["mmd2"] if name == "energy" else 1 - d["mmd2"] for name in spec.divergences}}
            for d in d2p
        ]
    at = lambda when, part, **more: [d | {"when": when, "mmd2": part * d["mmd2"]} | more for d in d2p]
    moments = (
        at("early", 0.2, step=3) + at("best", 0.9, epoch=spec.epochs - 1) + (at("random weights", 2.0) if share else [])
    )
    primary = PRIMARY[spec.task]
    record = new_record(
        spec, study.name, metrics=metrics, primary=primary, directions={m: -1 if m == "hd95" else 1 for m in metrics},
        units={m: METRICS[m][1] for m in metrics}, controls={m: METRICS[m][2] for m in metrics}, d2p=d2p,
        d2p_moments=moments, scores=known(spec) if share else [],
        cost=cost(
            {
                "total": 24.0 + rng.normal(0, 1), "training": 20.0, "waiting": 0.2, "evaluation": 3.0,
                "per_epoch": [20.0 / spec.epochs] * spec.epochs,
            },
            400.0 + 150 * spec.backbone.startswith("provicnet"),
        ),
        n={"train": spec.n_train, "val": 12, "test": 48},
        licences=["synthetic"],
    )
    write_record(
        run_folder(study.name, run_id(spec)), record, curves(spec, metrics[primary], primary, distance, rng), tested
    )


def pretrain(study, spec, rng):
    rows = [
        {"epoch": e, "seconds": 3.0 * e, "name": "loss", "value": float(np.exp(-e / 5) + 0.2)}
        for e in range(1, spec.epochs + 1)
    ]
    write_record(
        run_folder(study.name, run_id(spec)),
        new_record(spec, study.name, cost=cost({"total": 40.0, "training": 36.0, "waiting": 0.3}, 380.0)), rows,
    )


def external(study, spec, rng):
    rows = [
        {
            "case": c, "patient": c, "metric": m, "value": float(v), "tuned": parent,
            "strategy": "full" if "full" in parent else "scratch", "seed": i,
        }
        for i, parent in enumerate(spec.parents)
        for c in ("prostatex_0000", "prostatex_0001", "provicnet_picai_sample")
        for m, v in (
            ("dice_gland", rng.uniform(0.1, 0.5)), ("dice", rng.uniform(0, 0.1)),
            ("dice_lesion", np.nan if c == "prostatex_0001" else 0.0),
        )
    ]
    write_record(
        run_folder(study.name, run_id(spec)),
        new_record(
            spec, study.name, metrics={"dice": 0.05, "dice_gland": 0.3}, primary="dice",
            directions={"dice": 1, "dice_gland": 1}, n={"test": 3},
        ),
        cases=rows,
    )


def notebook(study, job):
    "An executed notebook with one output of each kind that pages must cope with."
    image = np.random.default_rng(0).random((6, 16, 16))
    chart = {
        "title": "Loss", "data": {"values": [{"e": 1, "loss": 1.0}, {"e": 2, "loss": 0.4}]}, "mark": "line",
        "width": 240, "height": 120,
        "encoding": {"x": {"field": "e", "type": "quantitative"}, "y": {"field": "loss", "type": "quantitative"}},
    }
    out = [
        {
            "output_type": "stream", "name": "stdout",
            "text": "epoch 1/8\n" + ("x" * 79 + "\n") * (1000 if job.specs[0].kind == "pretrain" else 2),
        },
        {
            "output_type": "display_data", "metadata": {},
            "data": {"application/vnd.vegalite.v5+json": chart, "text/plain": "chart"},
        },
        {
            "output_type": "display_data", "metadata": {},
            "data": {
                "text/html": slices({"input": image, "error": image - 0.5}, image > 0.7, signed=["error"])._repr_html_()
            },
        },
        {
            "output_type": "display_data", "metadata": {},
            "data": {"text/html": '<script src="https://cdn.example.org/x.js"></script>'},
        },
    ]
    cells = [
        {
            "cell_type": "markdown", "metadata": {},
            "source": f"# {job.kind}\n\nLoss is $\\ell = -\\log p_y$.\n\n$$\\sum_i \\frac{{a_i}}{{b}}$$",
        },
        {
            "cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "seed = 0", "execution_count": 1,
            "outputs": [],
        },
        {"cell_type": "code", "metadata": {}, "source": "fit()", "execution_count": 2, "outputs": out},
    ]
    nb = {
        "cells": [c | {"id": f"c{i}"} for i, c in enumerate(cells)],
        "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}, "nbformat": 4,
        "nbformat_minor": 5,
    }
    path = notebook_file(study.name, job.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb))


def write_study(study: StudySpec, failed: int = 1, absent: int = 1, seed: int = 0) -> None:
    "Write records and notebooks of a whole study; the last transfer runs fail or are absent."
    rng, make = np.random.default_rng(seed), {"pretrain": pretrain, "transfer": transfer, "external": external}
    jobs = jobs_of(study)
    last = [s for j in jobs if j.kind == "transfer" for s in j.specs][::-1]
    bad, gone = last[:failed], last[failed:failed + absent]
    for job in jobs:
        notebook(study, job)
        for spec in job.specs:
            if spec in gone: continue
            if spec in bad:
                write_record(
                    run_folder(study.name, run_id(spec)),
                    failed_record(spec, study.name, RuntimeError("<b>out of memory</b> & luck"), cell=4),
                )
            else: make[spec.kind](study, spec, rng)
