"""Overhead of a notebook in the forked engine beside plain papermill, and what 10,000 records cost.

Overhead: the same small notebook that imports torch and MONAI, executed by both engines in turn; what is counted is the time
around the cells' own work (a sleep of known length). Its cells and outputs must be the same. Aim: at most 0.5 s.
Records: 10,000 invented ones; wall and processor seconds of `vfm status` and `vfm table`. Aim: under 2 s each on a quiet machine.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
WORK, TIMES, SEEDS = 0.5, 3, 500


def notebook(path):
    "Imports as a run has them, then a known amount of work."
    import nbformat
    cells = ["x = 1", "import torch, monai, transformers, pandas", f"import time; time.sleep({WORK})", "print(torch.ones(3).sum().item() * x)"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, path)


def engines(folder):
    "Seconds of overhead of both engines, and the proof that they give the same."
    import papermill
    import vfm_notes.runs.engine  # noqa: F401  (registers the engine)
    from vfm_notes.runs.forkserver import ForkServer
    notebook(folder/"in.ipynb")
    took, cells = {"forked": [], "papermill": []}, {}
    start = time.monotonic()
    with ForkServer() as server:
        os.environ["VFM_FORKSERVER"] = server.address
        def execute(name):
            begun = time.monotonic()
            done = papermill.execute_notebook(folder/"in.ipynb", folder/"out.ipynb", {"x": 2}, engine_name="forked" if name == "forked" else None, progress_bar=False)
            took[name].append(time.monotonic() - begun - WORK)
            cells[name] = [(c.cell_type, c.source, c.get("execution_count"), c.get("outputs")) for c in done.cells]
        execute("forked")  # the first waits for the server's imports
        print(f"fork server ready and first notebook done after {time.monotonic() - start:.1f} s, once for a study")
        took["forked"].clear()
        for _ in range(TIMES):
            for name in took: execute(name)
    assert cells["forked"] == cells["papermill"], "the engines give different notebooks"
    forked, plain = (statistics.median(took[k]) for k in ("forked", "papermill"))
    print(f"{'overhead per notebook, median of ' + str(TIMES):40}{'seconds':>10}\n{'forked':40}{forked:10.2f}   (aim: 0.5)\n{'plain papermill':40}{plain:10.2f}   {plain/forked:.1f} times as much; same cells, same outputs", flush=True)


def many(folder):
    "10,000 records: one made in full, the others with its numbers and their own specs."
    os.environ["VFM_RUNS"] = str(folder/"runs")
    import fake_runs
    import numpy as np
    import yaml
    from vfm_notes.foundation.places import run_folder
    from vfm_notes.foundation.spec import load_study, run_id, run_specs
    values = {"name": "big", "title": "big", "cohort": "phantom", "size": [12, 48, 48], "spacing": [4.0, 1.5, 1.5], "cases": {"pretrain": 2, "train": 4, "val": 2, "test": 2},
              "backbones": ["profound_toy.mae_phantom", "provicnet_toy.contrast_phantom"], "tasks": {t: {} for t in fake_runs.PRIMARY}, "strategies": ["scratch", "full"], "seeds": list(range(SEEDS))}
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
        (new/"record.json").write_text(json.dumps(record | {"id": run_id(spec), "spec": {"kind": spec.kind} | asdict(spec)}))
    return len(specs)


def commands(folder):
    n = many(folder)
    print(f"\n{f'{n:,} records':40}{'wall':>10}{'processor':>12}   aim: 2 s")
    for words in (["status"], ["table", "-o", str(folder/"big.csv")]):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run([Path(sys.executable).with_name("vfm"), words[0], folder/"big.yaml", *words[1:]], capture_output=True, text=True)
        wall, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and (f"{n} done" in done.stdout or f"{n} runs" in done.stdout), done.stdout[-500:] + done.stderr
        print(f"{'vfm ' + words[0]:40}{wall:10.2f}{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:12.2f}", flush=True)


def main():
    print(f"load on the machine {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        engines(Path(folder))
        commands(Path(folder))


if __name__ == "__main__": main()
