"""A small study from its file to its records, through the real templates and the real command."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from vfm_notes.foundation.spec import load_study, run_id, run_specs

VFM = [sys.executable, "-c", "from vfm_notes.report.cli import main; main()"]
STUDY = {
    "name": "small", "title": "A small study", "cohort": "phantom", "size": [4, 32, 32], "spacing": [8.0, 3.0, 3.0],
    "cases": {"pretrain": 8, "train": 8, "val": 4, "test": 8},
    "pretrain": {
        "mae": {"backbone": "profound_toy", "objective": "masked_reconstruction", "epochs": 1},
        "contrast": {"backbone": "provicnet_toy", "objective": "patch_contrast", "epochs": 1},
    },
    "backbones": ["profound_toy.mae", "provicnet_toy.contrast"],
    "tasks": {"classification": {}, "super_resolution": {"factor": [1, 2, 2]}},
    "strategies": ["scratch", "full"],
    "seeds": [0],
    "budget": {"epochs": 2},
}


def vfm(folder: Path, *args, **env):
    return subprocess.run(
        [*VFM, *args], cwd=folder, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "VFM_DATA"} | {"VFM_RUNS": str(folder / "runs")} | env,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory, toy_server):
    folder = tmp_path_factory.mktemp("study")
    (folder/"small.yaml").write_text(yaml.safe_dump(STUDY))
    ran = vfm(folder, "run", "small.yaml", VFM_FORKSERVER=toy_server)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def records(folder, study="small"):
    return {
        p.parent.name: json.loads(p.read_text(encoding="utf-8"))
        for p in (folder / "runs" / study).glob("*/record.json")
    }


def test_every_run_of_the_study_has_its_record(done):
    wanted = {run_id(s) for s in run_specs(load_study(done/"small.yaml"))}
    found = records(done)
    assert wanted <= set(found) and len(found) == len(wanted) + 2
    for r in found.values():
        assert (
            r["status"] == "done"
            and r["versions"]
            and r["cohort_hash"]
            and r["licences"]
            and r["notebook"]
            and r["template_hash"]
        )
        assert r["cost"]["parameters"]["trainable"] > 0 and r["cost"]["seconds"]["total"] > 0
        if r["kind"] == "transfer":
            assert set(r["metrics"]) == set(r["controls"]) and r["n"] == {"train": 8, "val": 4, "test": 8}
            assert bool(r["weights_hash"]) == (r["spec"]["strategy"] == "full") == bool(r["spec"]["parent"])


def test_curves_hold_every_epoch_and_the_distance_starts_at_zero(done):
    for name, r in records(done).items():
        if r["kind"] != "transfer": continue
        curves = pd.read_parquet(done/"runs"/"small"/name/"curves.parquet")
        d2p = curves[curves.name.str.startswith("d2p_")]
        assert set(d2p.epoch) == {0, 1, 2} and d2p[d2p.epoch == 0].value.abs().max() < 1e-9
        assert {row["layer"] for row in r["d2p"]} == {n.removeprefix("d2p_") for n in set(d2p.name)}
        last = d2p[d2p.epoch == 2].set_index("name").value
        for row in r["d2p"]:
            assert last[f"d2p_{row['layer']}"] == pytest.approx(row["mmd2"], abs=1e-9) and 0 < row["p_value"] <= 1


def test_notebooks_are_executed_and_show_images(done):
    notebooks = sorted((done/"runs"/"small"/"notebooks").glob("*.ipynb"))
    assert len(notebooks) == 6
    for path in notebooks:
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        outputs = [o for c in cells for o in c["outputs"]]
        assert not any(o["output_type"] == "error" for o in outputs)
        assert not [o for o in outputs if "Warning" in "".join(o.get("text", []))], path.name
        assert sum("<svg" in "".join(o.get("data", {}).get("text/html", "")) for o in outputs) >= 2


def test_a_second_run_finds_everything_done(done, toy_server):
    before = {
        p: p.stat().st_mtime_ns for p in (done / "runs" / "small").rglob("*") if p.is_file() and "locks" not in p.parts
    }
    again = vfm(done, "run", "small.yaml", VFM_FORKSERVER=toy_server)
    assert again.returncode == 0 and "everything is up to date" in again.stdout + again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_run_that_raises_is_recorded_and_the_others_go_on(done, toy_server):
    rest = {k: v for k, v in STUDY["tasks"].items() if k != "classification"}
    # two cases have two of three grades
    broken = STUDY | {"tasks": rest | {"ordinal": {}}, "backbones": STUDY["backbones"][:1], "n_train": [2]}
    (done/"broken.yaml").write_text(yaml.safe_dump(broken))
    ran = vfm(done, "run", "broken.yaml", VFM_FORKSERVER=toy_server)
    assert ran.returncode == 1 and "so it cannot be learned" in ran.stdout + ran.stderr
    failed = [r for r in records(done).values() if r["status"] == "failed"]
    assert {r["spec"]["task"] for r in failed} == {"ordinal"} and all(r["error"]["message"] for r in failed)
    status = vfm(done, "status", "broken.yaml")
    assert "ordinal-profound_toy.mae" in status.stdout and "failed" in status.stdout


def test_the_real_prostate_cases_load_and_are_scored(done, real_data, toy_server):
    outside = STUDY | {
        "tasks": {"segmentation": {}}, "backbones": STUDY["backbones"][:1], "strategies": ["full"],
        "external": {"cohort": "prostate_cases", "task": "segmentation"}, "name": "outside", "size": [12, 48, 48],
        "spacing": [4.0, 1.5, 1.5],
    }
    (done/"outside.yaml").write_text(yaml.safe_dump(outside))
    ran = vfm(done, "run", "outside.yaml", VFM_DATA=str(real_data), VFM_FORKSERVER=toy_server)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    record = next(r for r in records(done, "outside").values() if r["kind"] == "external")
    cases = pd.read_parquet(done/"runs"/"outside"/record["id"]/"cases.parquet")
    assert cases.case.nunique() == 3 and cases[cases.metric == "dice_gland"].value.between(0, 1).all()
    assert record["licences"] and "NC" in record["licences"][0]
