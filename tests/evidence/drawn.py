"""How often weights that were only drawn seem to gain: small studies, each with its own draw and seeds."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import yaml

REPETITIONS = 20
TASKS = ("classification", "segmentation", "distortion_correction")


def study_of(r: int) -> dict:
    "The default study's design with nothing but random weights and one draw presented as pretrained."
    from vfm_notes.foundation.places import report_notebooks

    shipped = report_notebooks()[0].parent.parent / "studies" / "phantom.yaml"
    base = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    made = deepcopy({k: base[k] for k in ("cohort", "size", "spacing", "cases", "n_train", "budget")})
    return made | {
        "name": f"drawn_{r:02d}", "title": "Weights that were only drawn", "strategies": ["full"],
        "pretrain": {"drawn": {"backbone": "profound_toy", "epochs": 0, "seed": 5000 + r, "probe_every": 0,
                               "expected": "none"}},
        "backbones": ["profound_toy.random", "profound_toy.drawn"], "tasks": {t: base["tasks"][t] for t in TASKS},
        "seeds": [1000 + 3 * r + k for k in range(3)],
    }


def rows_of(r: int, folder: Path) -> list[dict]:
    "Run one repetition, or read its records, and return its cells."
    import vfm_notes
    from vfm_notes.analysis.planted import planted_table
    from vfm_notes.analysis.tables import load_tables

    path = folder / f"drawn_{r:02d}.yaml"
    path.write_text(yaml.safe_dump(study_of(r)), encoding="utf-8")
    vfm_notes.run_study(str(path))
    table = planted_table(load_tables(vfm_notes.load_study(str(path))))
    kept = table[["task", "metric", "rpg", "low", "high", "tuned", "reference", "found"]]
    return kept.assign(repetition=r).to_dict("records")


def make(path: Path, repetitions: int = REPETITIONS) -> None:
    "Write the cells of all repetitions; what has a record is not run again."
    folder = path.parent / "drawn_studies"
    folder.mkdir(exist_ok=True)
    rows = [row for r in range(repetitions) for row in rows_of(r, folder)]
    clear = sum(row["found"] in ("gain", "loss") for row in rows)
    path.write_text(json.dumps({"repetitions": repetitions, "clear": clear, "cells": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else REPETITIONS)
