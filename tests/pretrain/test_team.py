"""One training in two real processes: the weights of one with the whole batch, stops and failures that both know of,
and nobody who waits for the dead."""
import json
import os
import signal
import sys
from collections import Counter

import pytest
from toy_batch import Toy, alive_with, wait_until, write_template

from vfm_notes.runs.forkserver import Forked, python_path
from vfm_notes.foundation.places import pid_alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and sockets as on Linux")

TRAINING = '''
import os, time, torch
from pathlib import Path
from torch import nn
from vfm_notes.data.loader import Loader
from vfm_notes.pretrain.trainer import Checkpointer, TrainConfig, Trainer, train

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.unused = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(3, 3)
    def forward(self, x): return self.outer(self.inner(x).tanh())

def fit(seed, how, folder, progress=None, keeper=Checkpointer()):
    "A small net on made-up cases, 6 in a batch, of which the last is 2 of 14 filled up; how: what goes wrong, where."
    helper = bool(os.environ.get("VFM_HELPER"))
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(14, 4, generator=generator)
    torch.manual_seed(seed + helper)  # a helper whose weights differ at first
    def loss(module, batch):
        at = 3 * (trainer.epoch - 1) + trainer.done
        if helper: Path(folder, f"helper-{os.getpid()}").touch()
        if how == "die" and helper and at == 4: os.kill(os.getpid(), 9)
        if how == "raise" and helper and at == 4: raise ValueError("told to fail")
        if how == "memory" and helper and at == 1 and len(batch["x"]) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if how == "nan" and helper and at == 4: return module(batch["x"]).sum() * float("nan"), {"cases": 0.0}
        if how == "slow": time.sleep(0.03)
        return (module(batch["x"]) - batch["y"]).square().mean(), {"cases": float(len(batch["x"]))}
    config = TrainConfig(epochs=60 if how == "slow" else 6, lr=0.05, ema=0.9)
    trainer = Trainer(Net(), loss, Loader({"x": x, "y": x[:, :2].roll(1, 0)}, 5, seed=3), config)
    def look(epoch, logs):
        if progress: progress(epoch)
        return {}
    rows = train(trainer, look, [], keeper, enough=lambda epoch: how == "enough" and not helper and epoch == 3)
    weights = {k: v.tolist() for k, v in trainer.module.state_dict().items()}
    return weights, rows, trainer.average.module.outer.bias.tolist(), trainer.notes
'''
CALL = '''
import json, os
from vfm_notes.runs.launch import run_distributed
from team_training import fit
folder = os.environ["FOLDER"]
try: said = run_distributed(fit, 0, os.environ["HOW"], folder)
except Exception as error: said = {"error": f"{type(error).__name__}: {error}"}
with open(f"{folder}/said", "w") as f: json.dump(said, f)
'''


@pytest.fixture(scope="module")
def server(toy_server): return toy_server


def call(folder, how="", processes=2, *, server, **env):
    "A training in so many processes, begun."
    (folder/"team_training.py").write_text(TRAINING)
    here = {
        "OMP_NUM_THREADS": "1", "VFM_PROCESSES": str(processes), "PYTHONPATH": f"{folder}{os.pathsep}{python_path()}",
        "VFM_LOG": str(folder / "log"), "HOW": how, "FOLDER": str(folder), "VFM_FORKSERVER": server,
    }
    return Forked(server, "builtins:exec", CALL, env=os.environ | here | env, log=folder/"log")


def said(process, folder):
    "What it has found."
    process.wait(300)
    assert (folder/"said").exists(), (folder/"log").read_text(encoding="utf-8")
    return json.loads((folder/"said").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, server):
    return said(call(folder := tmp_path_factory.mktemp("alone"), processes=1, server=server), folder)


def close(a, b):
    return a.keys() == b.keys() and all(
        pytest.approx(x, abs=2e-6) == y for k in a for x, y in zip(flat(a[k]), flat(b[k]))
    )
def flat(v): return [x for w in v for x in flat(w)] if isinstance(v, list) else [v]


@pytest.mark.parametrize("how", ["", "memory"])
def test_two_processes_take_the_steps_of_one(tmp_path, server, alone, how):
    weights, rows, average, notes = said(call(tmp_path, how, server=server), tmp_path)
    # unequal parts: 3 and 2 cases of a batch of 5
    assert close(weights, alone[0]) and average == pytest.approx(alone[2], abs=2e-6)
    losses = [[r[3] for r in x if r[2] == "loss"] for x in (rows, alone[1])]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6) and len(losses[0]) == 6
    assert notes == ["trained in 2 processes"] and alone[3] == []
    assert weights["unused.weight"] == alone[0]["unused.weight"]  # what is not used has no gradient, and does not decay
    assert not alive_with(str(tmp_path))


def test_three_processes_agree_on_an_early_end(tmp_path, server):
    weights, rows, *_ = said(call(tmp_path, "enough", processes=3, server=server), tmp_path)
    assert {r[0] for r in rows} == {1, 2, 3} and not alive_with(str(tmp_path))


@pytest.mark.parametrize(
    "how, error",
    [
        (
            "die",
            r"VfmError: Process 2 of 2 that share this training is gone (killed by signal 9): the run cannot go on.",
        ),
        (
            "raise",
            "VfmError: Process 2 of 2 that share this training is gone (ValueError: told to fail): the run cannot go "
            "on.",
        ),
        ("nan", "Diverged: The loss became nan in epoch 2, step 2"),
    ],
)
def test_what_goes_wrong_in_one_ends_both(tmp_path, server, how, error):
    # both end long before a wait for each other would
    assert said(call(tmp_path, how, server=server), tmp_path)["error"].startswith(error)
    wait_until(lambda: not alive_with(str(tmp_path)))


def test_a_batch_that_cannot_be_shared_is_told(tmp_path, server):
    assert (
        "A batch of 5 cases (last batch: fill) cannot be shared by 6 processes"
        in said(call(tmp_path, processes=6, server=server), tmp_path)["error"]
    )


def test_a_kernel_that_is_killed_takes_its_helpers_with_it(tmp_path, server):
    # a helper that is started the plain way; forked ones end with their server's lease
    process = call(tmp_path, "slow", server=server, VFM_FORKSERVER="")
    helper = int(wait_until(lambda: list(tmp_path.glob("helper-*")))[0].name.split("-")[1])  # it trains
    process.kill()
    process.wait(300)
    wait_until(lambda: not pid_alive(helper))


# ---- as notebooks of a study

BODY = '''
import os
from vfm_notes.pretrain.trainer import make_checkpointer
from vfm_notes.runs.launch import run_distributed
from team_training import fit
here = globals()
specs = job_specs(KIND, **{n: here[n] for n in NAMES})
flags = Path(options["flags"])
for spec in missing_specs(study, specs):
    with recording_failures(study, spec, 0, 1):
        how = "die" if (flags/"die").exists() else "slow"
        def told(epoch):
            with open(flags/"epochs", "a") as f: f.write(f"{epoch}\\n")
        keeper = make_checkpointer(study, spec)
        weights, rows, average, notes = run_distributed(fit, spec.seed, how, str(flags), progress=told, keeper=keeper)
        metrics = {"sum": sum(map(sum, weights["inner.weight"]))}
        record = new_record(spec, study, metrics=metrics, notes=notes, primary="sum")
        write_record(run_folder(study, run_id(spec)), record)
'''


def notebooks(tmp_path, processes) -> Toy:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path/"team_training.py").write_text(TRAINING)
    toy = Toy(
        tmp_path, tasks={"segmentation": {"flags": str(tmp_path / "flags")}}, strategies=["scratch"], seeds=[0],
        local={"processes": processes},
    )
    write_template(toy.templates/"pretrain.ipynb", "pretrain", body="from pathlib import Path\n" + BODY)
    return toy


def run(toy, server, begin=False):
    words = ("run", str(toy.study), "--templates", str(toy.templates), "--only", "kind=pretrain")
    env = {"PYTHONPATH": f"{toy.root}{os.pathsep}{python_path()}", "VFM_FORKSERVER": server}
    return toy.start(*words, **env) if begin else toy.vfm(*words, **env)


def test_a_notebook_in_two_processes_leaves_when_asked_and_goes_on(tmp_path, server):
    one, two = notebooks(tmp_path/"one", 1), notebooks(tmp_path/"two", 2)
    done = run(one, server)
    assert done.returncode == 0, done.stdout + done.stderr
    runner = run(two, server, begin=True)
    wait_until(lambda: (two.flags/"epochs").exists())
    runner.send_signal(signal.SIGTERM)
    out, err = runner.communicate(timeout=300)
    assert runner.returncode == 1 and not two.records(), out + err
    assert "missing pretrain" in out and ": paused as requested" in out
    assert list((two.runs/"toy"/"checkpoints").glob("*.pt"))
    again = run(two, server)
    assert again.returncode == 0, again.stdout + again.stderr
    (a,), (b,) = one.records().values(), two.records().values()
    assert b["metrics"]["sum"] == pytest.approx(a["metrics"]["sum"], abs=1e-5) and b["notes"] == [
        "trained in 2 processes"
    ]
    # none was taken twice
    assert (two.flags/"epochs").read_text(encoding="utf-8").split() == [str(e) for e in range(1, 61)]


def test_a_killed_process_of_a_notebook_is_a_failed_record(tmp_path, server):
    toy = notebooks(tmp_path, 2)
    toy.flag("die")
    done = run(toy, server)
    assert done.returncode == 1 and Counter(r["status"] for r in toy.records().values()) == {"failed": 1}, (
        done.stdout + done.stderr
    )
    record, = toy.records().values()
    assert "Process 2 of 2" in record["error"]["message"] and not [p for p in alive_with(str(toy.runs)) if pid_alive(p)]
