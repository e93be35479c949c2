"""The guide "The prostate study on your cluster": every command of it, as it stands there, in an empty folder, on made
data in the real layouts and made weights with the published keys; and the small study, in a still smaller form."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import published_keys
from slurm_cluster import absent, cluster
from test_guides import TEXTS

from vfm_notes.backbones.weights import fetch_weights
from vfm_notes.data.layouts_mri import picai_example, prostate158_example
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import load_study, run_specs
from vfm_notes.foundation.places import project_root
from vfm_notes.tune import catalog

TEXT = TEXTS["guide_prostate"]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.S | re.M)
SITE = "vfm site prostate_full"


def made_weights(folder: Path) -> None:
    "Files with the published keys and shapes, of random numbers."
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    def drawn(name: str) -> dict[str, torch.Tensor]:
        keys = published_keys(name).items()
        return {k: 0.02 * torch.randn(s, generator=draw) + (k.endswith("weight") and len(s) == 1) for k, s in keys}
    torch.save({"model": drawn("profound_fcmae_pretrain")}, folder / "profound_alpha.pth")
    torch.save(drawn("provicnet_contrastive_mri_vits14reg_4class"), folder / "T2_best.pth")


def smaller(text: str) -> str:
    "A study for the five made cases of PI-CAI, its axes and budget as they are."
    text = text.replace("train: 600, val: 200, test: 200", "train: 2, val: 1, test: 2")
    text = text.replace("n_train: [60, 180, 600]", "n_train: [2]")
    return text.split("leave_out:")[0] + text[text.index("external:"):]


def made_folder(place: Path) -> Path:
    "Raw data in their layouts, weights, study and profile, as the guide expects them."
    for name, example in (("picai", picai_example), ("prostate158", prostate158_example)):
        (place / "raw" / name).mkdir(parents=True)
        example(place / "raw" / name)
    made_weights(place / "weights")
    (place / "studies").mkdir()
    shipped = project_root() / "nbs" / "studies" / "prostate_full.yaml"
    text = smaller(shipped.read_text(encoding="utf-8"))
    (place / "studies" / "prostate_full.yaml").write_text(text, encoding="utf-8")
    (place / "cluster.yaml").write_text(next(b for kind, b in BLOCKS if kind == "yaml"), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path: return made_folder(tmp_path_factory.mktemp("guide"))


def test_every_command_runs_as_it_stands(folder):
    "What it shows: what cannot work with these cases, overlap, and all that Slurm is given."
    lines = [l for kind, block in BLOCKS if kind == "sh" for l in block.splitlines() if l and l != SITE]
    assert len(lines) > 8
    vfm = f'vfm() {{ "{sys.executable}" -c "from vfm_notes.report.cli import main; main()" "$@"; }}'
    script = "\n".join(["set -e", vfm, *(f"echo '>>> {l}'; {l}" for l in lines)])
    env = {k: v for k, v in os.environ.items() if not k.startswith("VFM_")}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = dict(re.findall(r"^>>> (.*)\n((?:(?!>>> ).*\n?)*)", done.stdout, re.M))
    whole = said["vfm run prostate_full --dry-run --executor slurm"]
    assert "task 'classification' needs a grade" in whole and "10002_1000002" in whole
    assert whole.count("cannot work") == 1, whole
    assert "weights 'profound_tiny.alpha' and cohort 'picai': seen" in whole
    assert "weights 'provicnet_small.t2' and cohort 'prostate158': unknown" in whole
    assert "missing: weights 'profound_tiny.alpha'" not in whole and "missing: weights 'provicnet_small.adc'" in whole
    told = re.findall(r"^estimate: backbone '(\w+)', task '(\w+)', .* n_train 2: at least [\d.]+ GiB a step, [\d.]+ "
                      r"PFLOP a run: [\d.]+ h at 20 TFLOP/s$", whole, re.M)
    assert {b for b, _ in told} >= {"profound_tiny", "provicnet_small", "dinov2_reg_small"}
    assert {t for b, t in told if b == "profound_tiny"} == set(load_study("prostate_full").tasks)
    assert {"#SBATCH --gpus-per-node=1", "#SBATCH --time=1440", "#SBATCH --mem=64GB"} <= set(whole.splitlines())
    assert re.search(r"^#SBATCH --array=0-\d+%8$", whole, re.M)
    profiled = said["vfm run prostate_full --dry-run --executor slurm --profile cluster.yaml --only task=segmentation"]
    assert "#SBATCH --partition=gpu" in profiled and "module load cuda" in profiled and "translation" not in profiled
    assert "5 tasks" in said["vfm plan prostate_full"] and "smallest gain" in said["vfm plan prostate_full"]


def test_a_file_of_another_layout_is_refused_and_nothing_is_kept(tmp_path, monkeypatch):
    "ProFound's encoder alone has other names than the pretraining that `profound_alpha.pth` is."
    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path))
    keys = published_keys("profound_convnextv2_tiny_encoder")
    torch.save({"model": {k: torch.full(s, 0.01) for k, s in keys.items()}}, tmp_path / "profound_alpha.pth")
    with pytest.raises(VfmError, match="profound_alpha.pth has no tensor that weights 'profound_tiny.alpha' are read"):
        fetch_weights("profound_tiny.alpha")
    assert [p.name for p in tmp_path.iterdir()] == ["profound_alpha.pth"]


def test_the_first_cells_run_on_a_real_node(tmp_path):
    """One network with its made checkpoint, all six strategies of a task, submitted by the command of the guide to a
    Slurm of one node; volumes, epochs and what a job requests are cut to what this machine has."""
    if reason := absent(): pytest.skip(reason)
    place = made_folder(tmp_path / "place")
    study = place / "studies" / "prostate_full.yaml"
    text = study.read_text(encoding="utf-8")
    for old, new in (("size: [64, 224, 224]", "size: [16, 32, 32]"), ("epochs: 100,", "epochs: 1,"),
                     ("precision: bf16,", "precision: 'no',"), ("seeds: [0, 1, 2, 3, 4]", "seeds: [0]"),
                     ("gpus: 1, time: 1440, memory: 64GB, cpus: 8", "time: 10, memory: '0', cpus: 1")):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    study.write_text(text, encoding="utf-8")
    vfm = [sys.executable, "-c", "from vfm_notes.report.cli import main; main()"]
    cells = "kind=transfer,task=segmentation,backbone=profound_tiny.alpha"
    with cluster(tmp_path / "slurm") as slurm:
        env = {k: v for k, v in os.environ.items() if not k.startswith("VFM_")}
        env |= {f"VFM_{k}": str(place / k.lower()) for k in ("DATA", "WEIGHTS", "RUNS")}
        def call(*words): return subprocess.run([*vfm, *words], cwd=place, env=env, capture_output=True, text=True)
        made = [*(call("data", "import", c, f"raw/{c}", f"data/{c}") for c in ("picai", "prostate158")),
                call("weights", "fetch", "profound_tiny.alpha"),
                call("run", "prostate_full", "--executor", "slurm", "--only", cells)]
        assert not any(d.returncode for d in made), made[-1].stdout[-3000:] + made[-1].stderr[-3000:]
        jobs = slurm("scontrol", "show", "job").stdout
        assert jobs.count("JobState=COMPLETED") == 1 and "FAILED" not in jobs, jobs
    records = [json.loads(p.read_text(encoding="utf-8")) for p in (place / "runs").rglob("record.json")]
    assert {r["status"] for r in records} == {"done"} and all(r["notebook"] for r in records)
    strategies = sorted(r["spec"]["strategy"] for r in records)
    assert strategies == ["decoder", "full", "lora rank=8", "probe", "random", "scratch"]
    tuned = next(r for r in records if r["spec"]["strategy"] == "full")
    assert tuned["overlap"]["answer"] == "seen" and tuned["weights_files"][0]["weights"] == "profound_tiny.alpha"
    assert "dice" in tuned["metrics"] and tuned["n"]["test"] == 2


@pytest.mark.parametrize("name,runs", [("prostate_small", 273), ("prostate", 273), ("prostate_full", 965)])
def test_the_guide_counts_the_runs_of_its_studies(name, runs):
    spec = load_study(name)
    found = run_specs(spec)
    assert len(found) == runs and f"| `{name}` |" in TEXT and str(runs) in TEXT
    assert len(spec.tasks) == 5 and len(spec.seeds) >= 3 and len(spec.n_train) == 3
    shares = [n / max(spec.n_train) for n in sorted(spec.n_train)]
    assert shares == pytest.approx([0.1, 0.3, 1.0], abs=0.01)
    strategies = {s.strategy.partition(" ")[0] for s in found}
    assert strategies == {"scratch", "full", "decoder", "probe", "lora", "random", "specialist"}


def test_the_small_study_in_a_still_smaller_form(tmp_path, monkeypatch):
    "One seed, fewer and smaller cases and one epoch: every task with every strategy leaves a finished record."
    text = (project_root() / "nbs" / "studies" / "prostate_small.yaml").read_text(encoding="utf-8")
    for old, new in (("size: [8, 32, 32]", "size: [4, 32, 32]"), ("[6.0, 2.25", "[12.0, 2.25"),
                     ("{pretrain: 96, train: 40, val: 12, test: 32}", "{pretrain: 16, train: 10, val: 6, test: 8}"),
                     ("n_train: [4, 12, 40]", "n_train: [10]"), ("seeds: [0, 1, 2]", "seeds: [0]"),
                     ("epochs: 3,", "epochs: 1,"), ("epochs: 8,", "epochs: 1,"), ("epochs: 4,", "epochs: 1,")):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    text = text.split("leave_out:")[0]
    (tmp_path / "prostate_smaller.yaml").write_text(text.replace("name: prostate_small", "name: prostate_smaller"))
    env = {k: v for k, v in os.environ.items() if k != "VFM_DATA"} | {"VFM_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, "-c", "from vfm_notes.report.cli import main; main()", "run", "prostate_smaller.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = [json.loads(p.read_text()) for p in (tmp_path / "runs").rglob("record.json")]
    runs = [r for r in records if r["kind"] == "transfer"]
    assert len(runs) == 5 * (2 * 6 + 1) and {r["status"] for r in records} == {"done"}
    answers = {(r["spec"]["strategy"] in ("scratch", "random", "specialist"), r["overlap"]["answer"]) for r in runs}
    assert answers == {(True, "not seen"), (False, "not seen")}
    assert {r["overlap"]["why"] for r in runs if r["spec"]["strategy"] == "full"} == {"by fingerprints of patients"}
