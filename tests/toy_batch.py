"""A study of milliseconds: real names, toy templates, faults on demand. Used by the tests of the runner."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import yaml

from vfm_notes.runs.forkserver import KERNEL, python_path
from vfm_notes.runs.grid import parameter_names

LIGHT = ",".join([*KERNEL, "numpy", "vfm_notes.runs.batch", "vfm_notes.runs.engine"])  # nothing heavy before the fork
# and what trains, and what is asked before the first notebook
WHOLE = [
    *LIGHT.split(","), "accelerate", "vfm_notes.pretrain.trainer", "vfm_notes.tune.conflicts", "vfm_notes.tune.catalog",
]

WORK = '''
import os, signal, time
import numpy as np
from pathlib import Path
here = globals()
specs = job_specs(KIND, **{n: here[n] for n in NAMES})
flags = Path(options.get("flags", "/nonexistent"))  # files in this folder cause faults

def work(spec):
    "A training that takes no time, and leaves a line in a log each time it is done."
    name = f"{spec.kind}-{getattr(spec, 'strategy', '')}-{getattr(spec, 'seed', '')}"
    if (flags/f"raise-{name}").exists(): raise RuntimeError(f"told to fail: {name}")
    if (flags/f"die-{name}").exists(): os.kill(os.getpid(), signal.SIGKILL)
    if (flags/f"die-once-{name}").exists(): (flags/f"die-once-{name}").unlink(); os.kill(os.getpid(), signal.SIGKILL)
    if (flags/f"hungry-{name}").exists():  # no room for what it wants; as a system without memory to give
        import resource
        before = resource.getrlimit(resource.RLIMIT_AS)
        now = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (now + (200 << 20), before[1]))
        try: np.ones(1 << 28)
        finally: resource.setrlimit(resource.RLIMIT_AS, before)
    if (flags/f"hungry-group-{name}").exists():  # a cgroup with little memory, in which the system kills
        Path(options["group"], "cgroup.procs").write_text(str(os.getpid()))
        np.ones(1 << 28)
    if (flags/f"fill-{name}").exists():
        with open((flags/"where").read_text(encoding="utf-8"), "wb") as f:
            try:
                while True: f.write(b"0" * 4096); f.flush()
            except OSError: pass
    while (flags/f"hang-{name}").exists(): time.sleep(0.01)
    if (flags/"hold").exists():
        (flags/f"holding-{os.getpid()}").touch()
        while (flags/"hold").exists(): time.sleep(0.01)
    # without the hash, which knows the folder of the flags
    rng = np.random.default_rng(list(run_id(spec)[:-9].encode()))
    time.sleep(options.get("sleep", 0))
    if flags.exists():
        with open(flags/"log", "a") as f: f.write(run_id(spec) + "\\n")
    values = rng.normal(size=20)
    cost = {"seconds": {"total": 0.01, "training": 0.01}}
    metrics = {"dice": float(values.mean())}
    record = new_record(spec, study, metrics=metrics, primary="dice", directions={"dice": 1}, cost=cost)
    curves = [{"epoch": i, "seconds": 0.1 * i, "name": "loss", "value": v} for i, v in enumerate(values)]
    cases = [{"case": f"c{i}", "patient": f"p{i}", "metric": "dice", "value": v} for i, v in enumerate(values)]
    write_record(run_folder(study, run_id(spec)), record, curves=curves, cases=cases, weights={"w": values})

todo = missing_specs(study, specs)
for i, spec in enumerate(todo):
    with recording_failures(study, spec, i, len(todo)): work(spec)
'''
TRAINING = '''
import os, time, torch
from pathlib import Path
from torch import nn
from vfm_notes.data.loader import Loader
from vfm_notes.pretrain.trainer import TrainConfig, Trainer, make_checkpointer, train
here = globals()
specs = job_specs(KIND, **{n: here[n] for n in NAMES})
flags = Path(options.get("flags", "/nonexistent"))
torch.manual_seed(0)
x = torch.randn(8, 4)
for spec in missing_specs(study, specs):
    with recording_failures(study, spec, 0, 1):
        def loss(module, batch):
            (flags/f"holding-{os.getpid()}").touch()
            if (flags/"slow").exists(): time.sleep(0.02)
            # the last step of the second epoch
            while trainer.epoch * 4 + trainer.done == 11 and (flags/"endless-step-7").exists():
                (flags/"endless").touch()
                time.sleep(0.01)
            return (module(batch["x"]) - batch["y"]).square().mean(), {}
        def look(epoch, logs):
            with open(flags/"epochs", "a") as f: f.write(f"{epoch}\\n")
            return {}
        config = TrainConfig(epochs=40, lr=0.01)
        trainer = Trainer(nn.Linear(4, 4), loss, Loader({"x": x, "y": x.roll(1, -1)}, 2, seed=3), config)
        rows = train(trainer, look, [], make_checkpointer(study, spec))
        metrics = {"last": rows[-1][3], "sum": float(trainer.module.weight.sum())}
        curves = [dict(zip(("epoch", "seconds", "name", "value"), r)) for r in rows]
        write_record(run_folder(study, run_id(spec)), new_record(spec, study, metrics=metrics, primary="last"), curves)
'''
IMPORTS = '''
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import run_id
from vfm_notes.runs.grid import job_specs
from vfm_notes.runs.record import recording_failures, missing_specs, new_record, read_record, write_record
'''
LAST = '''
while (flags/"hang-at-the-end").exists(): time.sleep(0.01)
records = [read_record(run_folder(study, run_id(s))) for s in specs]
if (flags/"raise-at-the-end").exists(): raise ValueError("told to fail at the end")
print([(r["status"], r["metrics"]) for r in records])
'''


def write_template(path: Path, kind: str, names: list[str] | None = None, body: str = WORK) -> None:
    "A template with the parameters that `kind` needs, or with others."
    names = parameter_names(kind) if names is None else names
    code = nbformat.v4.new_code_cell
    cells = [code(IMPORTS), code("\n".join(f"{n} = None" for n in names), metadata={"tags": ["parameters"]}),
             code(body.replace("KIND", repr(kind)).replace("NAMES", repr(parameter_names(kind)))), code(LAST)]
    for i, c in enumerate(cells): c["id"] = f"cell-{i}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        ),
        path,
    )


class Toy:
    "A scratch folder with a study, templates and runs, and the real command."
    server = None  # address of a fork server that many runs share; None: each run starts its own
    def __init__(self, root: Path, sleep: float = 0.0, **axes):
        self.root, self.flags, self.templates, self.runs = root, root/"flags", root/"templates", root/"runs"
        self.flags.mkdir(parents=True)
        for kind in ("pretrain", "transfer", "external"): write_template(self.templates/f"{kind}.ipynb", kind)
        options = {"sleep": sleep, "flags": str(self.flags)}
        self.values = {
            "name": "toy", "title": "a toy", "cohort": "phantom", "size": [4, 8, 8], "spacing": [4.0, 1.5, 1.5],
            "cases": {"pretrain": 2, "train": 4, "val": 2, "test": 2},
            "pretrain": {"mae_phantom": {"backbone": "profound_toy", "options": options}},
            "backbones": ["profound_toy.mae_phantom"], "tasks": {"segmentation": options},
            "strategies": ["scratch", "full"], "seeds": [0, 1, 2],
        } | axes
        self.study = root/"toy.yaml"
        self.write()

    def write(self, **changes) -> None:
        self.values |= changes
        self.study.write_text(yaml.safe_dump(self.values))

    @property
    def env(self) -> dict:
        shared = {"VFM_FORKSERVER": self.server} if self.server else {}
        return (
            os.environ
            | {"VFM_RUNS": str(self.runs), "VFM_PRELOAD": LIGHT, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
            | shared
        )

    def start(self, *words: str, **env) -> subprocess.Popen:
        "Start `vfm` with these words."
        return subprocess.Popen(
            [*vfm(), *words], env=self.env | env, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )

    def vfm(self, *words: str, **env) -> subprocess.CompletedProcess:
        "Run `vfm` with these words to its end."
        return subprocess.run(
            [*vfm(), *words], env=self.env | env, cwd=self.root, capture_output=True, text=True, timeout=600
        )

    def run(self, *words: str, **env) -> subprocess.CompletedProcess:
        return self.vfm("run", str(self.study), "--templates", str(self.templates), *words, **env)

    def start_run(self, *words: str, **env) -> subprocess.Popen:
        return self.start("run", str(self.study), "--templates", str(self.templates), *words, **env)

    def flag(self, name: str, on: bool = True) -> None:
        (self.flags/name).touch() if on else (self.flags/name).unlink()

    def log(self) -> list[str]:  # ids in the order in which they were computed
        return (self.flags/"log").read_text(encoding="utf-8").split() if (self.flags/"log").exists() else []

    def records(self) -> dict[str, dict]:
        return {
            p.parent.name: json.loads(p.read_text(encoding="utf-8"))
            for p in sorted((self.runs / "toy").glob("[!.]*/record.json"))
            if ".corrupt-" not in p.parent.name
        }

    def results(self) -> dict[str, tuple]:  # what must not depend on what happened on the way
        return {
            i: (r["status"], r["metrics"], {k: v["sha256"] for k, v in r["files"].items()})
            for i, r in self.records().items()
        }

    def table(self) -> dict[str, tuple]:  # the same by names that another folder would give, too
        found = {i[:-9]: r for i, r in self.results().items()}
        assert len(found) == len(self.results())
        return found


def undisturbed(root: Path) -> Toy:
    "The toy study, run once without a fault."
    toy = Toy(root)
    done = toy.run()
    assert done.returncode == 0 and len(toy.table()) == 7, done.stdout + done.stderr
    return toy


def vfm() -> list[str]:
    "The installed command, or its function."
    script = Path(sys.executable).with_name("vfm")
    return [str(script)] if script.exists() else [sys.executable, "-c", "from vfm_notes.report.cli import main; main()"]


def alive_with(text: str) -> list[int]:  # process numbers
    "Living processes that have `text` in their environment or command line."
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                folder.name != str(os.getpid())
                and text.encode() in (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
                and (folder / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
            ):
                found.append(int(folder.name))
        except (OSError, IndexError): pass
    return found


def wait_until(true, seconds=300):
    "Wait for something to become true, and hand it back; the limit only ends a test that hangs."
    end = time.monotonic() + seconds
    while not (answer := true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return answer


HOSTILE = (
    "random", "altair", "torch", "yaml", "sitecustomize", "usercustomize", "nbformat", "json", "numpy", "pandas",
    "papermill", "IPython", "ipykernel", "ipykernel_launcher", "pip", "typing", "submitit", "ipython_config",
    "ipython_kernel_config", "jupyter_config",
)


def hostile(folder: Path) -> Path:  # the mark that each of them leaves
    "Modules that nobody meant to run."
    mark = folder/"mark"
    for name in HOSTILE: (folder/f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write('{name} ')\n")
    return mark
