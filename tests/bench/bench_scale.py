"""What many records cost: `vfm status`, `vfm table` and the site of 10,000 invented runs beside those of 1,000.

Wall and processor seconds, children included. Aims on a quiet machine: status and table under 2 s of processor time
at 10,000;
the site in proportion to the records (ten times as many cost at most ten times as much); after one new record only
the pages
that depend on it are made again.   VFM_SCALE=1000 for a shorter look.
"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
LARGE = int(os.environ.get("VFM_SCALE", 10000))  # records


def many(folder, seeds):
    "Records: one made in full, the others with its numbers and their own specs."
    os.environ["VFM_RUNS"] = str(folder/"runs")  # pages and site lie beside it
    import fake_runs
    import numpy as np
    import yaml
    from vfm_notes.foundation.places import run_folder
    from vfm_notes.foundation.spec import load_study, run_id, run_specs
    values = {
        "name": "big", "title": "big", "cohort": "phantom", "size": [12, 48, 48], "spacing": [4.0, 1.5, 1.5],
        "cases": {"pretrain": 2, "train": 4, "val": 2, "test": 2},
        "backbones": ["profound_toy.mae_phantom", "provicnet_toy.contrast_phantom"],
        "tasks": {t: {} for t in fake_runs.PRIMARY}, "strategies": ["scratch", "full"], "seeds": list(range(seeds)),
    }
    (folder/"big.yaml").write_text(yaml.safe_dump(values))
    study = load_study(folder/"big.yaml")
    specs = run_specs(study)
    fake_runs.transfer(study, specs[0], np.random.default_rng(0))
    first = run_folder("big", run_id(specs[0]))
    record = json.loads((first/"record.json").read_text())
    for spec in specs[1:]:
        new = run_folder("big", run_id(spec))
        new.mkdir()
        for f in first.iterdir():
            if f.name != "record.json": os.link(f, new/f.name)
        (new / "record.json").write_text(
            json.dumps(record | {"id": run_id(spec), "spec": {"kind": spec.kind} | asdict(spec)})
        )
    return len(specs)


def measured(words, folder):
    "What a command says, its wall and its processor seconds."
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [Path(sys.executable).with_name("vfm"), words[0], folder / "big.yaml", *words[1:]], capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    return done, time.monotonic() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def new_record(folder):
    "One record is written again, with another value."
    path = next((folder/"runs"/"big").glob("*-s0-*/record.json"))
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"metrics": {k: v * 1.01 for k, v in record["metrics"].items()}}))


def look(n):
    "All commands on so many records."
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n = many(folder, n // 20)
        for what, words, said in (
            ("vfm status", ["status"], f"{n} done"),
            ("vfm table", ["table", "-o", str(folder / "big.csv")], f"{n} runs"),
            ("vfm site", ["site", "--renderer", "smalldocs"], "pages"),
            ("vfm site, nothing new", ["site", "--renderer", "smalldocs"], "up to date"),
            ("vfm site, one new record", ["site", "--renderer", "smalldocs"], "pages"),
        ):
            if "new record" in what: new_record(folder)
            done, wall, used = measured(words, folder)
            assert said in done.stdout, done.stdout[-500:]
            seconds[what] = used
            print(
                f"{n:8,}  {what:28}{wall:10.2f}{used:12.2f}   "
                f"{next((l for l in done.stdout.splitlines() if 'pages' in l), '')}",
                flush=True,
            )
    return seconds


def main():
    print(
        f"load on the machine {os.getloadavg()[0]:.1f}\n{'records':>8}  {'command':28}{'wall s':>10}{'processor s':>12}"
    )
    small, large = look(LARGE // 10), look(LARGE)
    print("\nten times the records cost " + ", ".join(f"{large[k] / small[k]:.1f} times ({k})" for k in small))


if __name__ == "__main__": main()
