"""`vfm run --halving`: who is stopped when, that a stopped run is a prefix of the whole one bit by bit, that those who
go on end as they would have alone, and that a kill changes nothing."""
import json
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from toy_batch import Toy, write_template
from vfm_notes.foundation.places import checkpoint_file, run_folder
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.shutdown import Paused
from vfm_notes.foundation.spec import RunSpec, run_id
from vfm_notes.pretrain.trainer import Checkpointer, make_checkpointer
from vfm_notes.runs.race import (
    Race, Standing, check_halving, later_seconds, losers, races_of, rung_epochs, saved_seconds, score_at, standing,
)
from vfm_notes.runs.record import (
    asked_epochs, epochs_done, missing_specs, new_record, read_record, read_table, recording_failures, stopped_words,
    write_record,
)
from vfm_notes.tune import catalog
from vfm_notes.tune.transfer import transfer

SMALL = RunSpec(size=(4, 32, 32), spacing=(8, 3, 3), cases={"pretrain": 0, "train": 6, "val": 3, "test": 4}, n_train=6,
                epochs=4, batch_size=4, strategy="scratch", backbone="profound_toy.random")


# --- a real training ---

@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_stopped_run_is_a_prefix_and_its_rest_ends_as_if_nothing_had_been(tmp_path, runs_root, keep):
    spec = replace(SMALL, keep=keep)
    whole = transfer(spec)
    for epochs in (1, 2):  # two rungs, one after the other
        with recording_failures("s", spec):
            transfer(spec, keeper=make_checkpointer("s", spec, pause=epochs))
        record = read_record(run_folder("s", run_id(spec)))
        assert record["status"] == "stopped" and epochs_done(record) == epochs and record["metrics"] == {}
        own, plain = read_table("s", run_id(spec), "curves"), whole.curves
        plain = plain[plain.epoch <= epochs].reset_index(drop=True)
        assert own[["epoch", "name"]].equals(plain[["epoch", "name"]]) and np.array_equal(
            own.value, plain.value, equal_nan=True)
        score = plain[(plain.name == "val_dice") & (plain.epoch == epochs)].value.iloc[0]
        assert record["stopped"]["score"] == score and f"after epoch {epochs} of 4" in stopped_words(record)
        assert missing_specs("s", [spec]) == [spec] and missing_specs("s", [spec], asked={run_id(spec): epochs}) == []
    rest = transfer(spec, keeper=make_checkpointer("s", spec))
    assert np.array_equal(rest.curves.value, whole.curves.value, equal_nan=True)
    assert rest.cases.equals(whole.cases) and rest.summary["metrics"] == whole.summary["metrics"]
    assert rest.summary["d2p"] == whole.summary["d2p"] and rest.summary["d2p_moments"] == whole.summary["d2p_moments"]
    assert all(np.array_equal(v, whole.weights[k]) for k, v in rest.weights.items())
    assert rest.summary["cost"]["processes"] == 3  # the seconds of all three starts are counted
    write_record(run_folder("s", run_id(spec)), new_record(spec, "s", **rest.summary), rest.curves)
    assert missing_specs("s", [spec]) == [] and not checkpoint_file("s", run_id(spec)).exists()


def test_a_halt_at_the_end_is_none(tmp_path):
    assert transfer(replace(SMALL, epochs=1), keeper=Checkpointer(tmp_path/"c.pt", "k", pause=1)).summary["metrics"]
    with pytest.raises(Paused, match="after epoch 1 of 4"):
        transfer(SMALL, keeper=Checkpointer(tmp_path/"c.pt", "k", pause=1))


# --- the rule ---

def test_rungs_and_losers_by_hand():
    assert rung_epochs(100) == [25, 50] and rung_epochs(6) == [1, 3] and rung_epochs(3) == [1] and rung_epochs(1) == []
    assert losers(dict(zip("abcdefg", [7, 1, 3, 2, 6, 5, 4]))) == ["b", "d", "c"]  # four of seven go on
    assert losers({"a": 1, "b": 1, "c": 1}) == ["c"] and losers({}) == [] and losers({"a": 1}, 0.1) == []
    assert len(losers(dict.fromkeys(range(10), 0), 0.75)) == 2 and len(losers(dict.fromkeys(range(10), 0), 0.01)) == 9


def test_controls_and_frozen_encoders_do_not_race():
    runs = [RunSpec(backbone=f"profound_toy.{w}", strategy=s, epochs=4, task=t) for w in ("a", "b", "random")
            for s in ("full", "lora rank=4", "scratch", "random", "decoder", "probe", "knn") for t in ("x", "y")]
    held, others = races_of(runs)
    assert {r.key[:2] for r in held} == {(t, s) for t in "xy" for s in ("full", "lora rank=4")}
    assert all(list(r.cells) == ["profound_toy.a", "profound_toy.b"] for r in held)
    assert len(others) + sum(len(own) for r in held for own in r.cells.values()) == len(runs)
    assert races_of([replace(s, epochs=1) for s in runs])[0] == []
    searched, _ = races_of([replace(runs[0], lr=lr) for lr in (0.1, 0.2)], ["lr"])
    assert list(searched[0].cells) == ["profound_toy.a lr=0.1", "profound_toy.a lr=0.2"]


def written(backbone, seed, epoch, values, direction=1, status="stopped", epochs=8, seconds=2.0):
    spec = RunSpec(backbone=f"profound_toy.{backbone}", strategy="full", seed=seed, epochs=epochs)
    rows = [dict(epoch=e, seconds=seconds * e, name="val_dice", value=v) for e, v in enumerate(values[: epoch + 1])]
    halted = {"epoch": epoch, "epochs": epochs, "score": values[epoch]} if status == "stopped" else None
    write_record(run_folder("s", run_id(spec)), new_record(
        spec, "s", status, primary="dice", directions={"dice": direction}, stopped=halted,
        cost={"seconds": {"total": 3 * seconds * epoch, "training": seconds * epoch}}), rows)
    return spec


def test_seeds_are_averaged_signs_are_kept_and_failures_leave_the_race(runs_root):
    "Seed 1 of `a` is bad and seed 0 good; less is better; all runs of `d` failed."
    levels = {"a": (1, 9), "b": (4, 4), "c": (6, 6)}
    specs = [written(b, s, 2, [99] + [v] * 8, -1) for b, own in levels.items() for s, v in enumerate(own)]
    for s in (0, 1):
        specs.append(RunSpec(backbone="profound_toy.d", strategy="full", seed=s, epochs=8))
        write_record(run_folder("s", run_id(specs[-1])), new_record(specs[-1], "s", "failed"))
    (race,), _ = races_of(specs)
    records = {run_id(s): read_record(run_folder("s", run_id(s))) for s in specs}
    now = standing("s", race, records)
    assert list(now.stopped) == ["profound_toy.c"] and now.at == 4 and now.left[-1] == "profound_toy.d"
    assert now.stopped["profound_toy.c"] == {"epoch": 2, "score": -6, "place": 3, "of": 3}
    assert set(now.waiting) == {"profound_toy.a", "profound_toy.b"}  # the fourth epoch is not known yet
    assert {now.asked[run_id(s)] for s in specs if s.backbone.endswith("c")} == {2}
    assert {now.asked[run_id(s)] for s in specs if s.backbone.endswith("a")} == {4}
    assert saved_seconds([now], records) == (2 * 4.0 * 3, 2)  # two runs, 4 s for two of eight epochs each
    later = standing("s", race, records, absent=["profound_toy.a"])
    assert "profound_toy.a" not in later.left and not set(later.asked) & {run_id(s) for s in specs[:2]}


def test_a_run_that_went_on_is_judged_by_its_curve_at_the_rung(runs_root):
    "Whoever completes a stopped run afterwards changes no decision."
    rising = [written("a", 0, 8, [0, 1, 1, 1, 1, 9, 9, 9, 9], status="done"), written("b", 0, 2, [0, 1, 2, 0, 0] * 2)]
    (race,), _ = races_of(rising)
    records = {run_id(s): read_record(run_folder("s", run_id(s))) for s in rising}
    now = standing("s", race, records)
    assert list(now.stopped) == ["profound_toy.a"] and score_at("s", records[run_id(rising[0])], 4) == 1
    assert score_at("s", records[run_id(rising[1])], 4) is None and score_at("s", None, 1) is None
    assert saved_seconds([now], records) == (0, 0)  # it has been completed: nothing was saved


def test_what_comes_later_is_counted():
    "Four cells at the first of two rungs: two go on for two epochs, and one for the last four of eight."
    runs = {w: [RunSpec(backbone=f"profound_toy.{w}", strategy="full", epochs=8)] for w in "abcd"}
    now = Standing(Race(("t", "full", 0), runs), 2, list("abcd"))
    known = {(): (1.0, 1.0, 1)}
    from vfm_notes.runs.watch import run_time
    one = run_time("transfer", vars(runs["a"][0]), known).seconds
    assert later_seconds([now], 0.5, known) == pytest.approx(one * (2 * 2 / 8 + 1 * 4 / 8))
    assert later_seconds([replace(now, at=8, left=["a"])], 0.5, known) == 0


def test_what_cannot_be_raced_is_refused():
    for keep in (0, 1, -1, 7): pytest.raises(VfmError, check_halving, keep, None)
    with pytest.raises(VfmError, match="leave --shard out"): check_halving(0.5, "1/2")


def test_what_is_asked_of_a_notebook(monkeypatch):
    monkeypatch.delenv("VFM_ASKED", raising=False)
    assert asked_epochs() == {}
    monkeypatch.setenv("VFM_ASKED", json.dumps({"x": 3}))
    assert asked_epochs() == {"x": 3}


# --- the whole command, with trainings of milliseconds ---

BODY = '''
import os, time, torch
from pathlib import Path
from torch import nn
from vfm_notes.data.loader import Loader
from vfm_notes.foundation.shutdown import Paused
from vfm_notes.pretrain.trainer import TrainConfig, Trainer, make_checkpointer, train
from vfm_notes.runs.record import asked_epochs
here = globals()
specs = job_specs(KIND, **{n: here[n] for n in NAMES})
flags, asked = Path(options["flags"]), asked_epochs()
for spec in missing_specs(study, specs, asked=asked):
    with recording_failures(study, spec, 0, 1):
        if (flags/f"fail-{spec.backbone}").exists(): raise RuntimeError("told to fail")
        torch.manual_seed(spec.seed)
        x = torch.randn(8, 4)
        level = options["levels"].get(spec.backbone.split(".")[1], 0.0)
        def look(epoch, logs):
            with open(flags/"epochs", "a") as f: f.write(f"{spec.backbone} {spec.strategy} {epoch}\\n")
            while (flags/"linger").exists() and spec.strategy == "full" and epoch >= 3: time.sleep(0.01)
            return {"val_dice": level}
        trainer = Trainer(nn.Linear(4, 4), lambda m, b: ((m(b["x"]) - b["y"]).square().mean(), {}),
                          Loader({"x": x, "y": x.roll(1, -1)}, 2, seed=3), TrainConfig(epochs=spec.epochs, lr=0.01))
        try: rows = train(trainer, look, [], make_checkpointer(study, spec, pause=asked.get(run_id(spec), 0)))
        except Paused as paused:
            paused.facts = {"primary": "dice", "directions": {"dice": 1}, "cost": {"seconds": {
                "total": 2.0 * paused.epoch, "training": 1.0 * paused.epoch}}}
            raise
        metrics = {"dice": float(trainer.module.weight.double().sum())}
        curves = [{"epoch": e, "seconds": 0.0, "name": n, "value": v} for e, _, n, v in rows]
        cost = {"seconds": {"total": 2.0 * spec.epochs, "training": 1.0 * spec.epochs}}
        write_record(run_folder(study, run_id(spec)), new_record(
            spec, study, metrics=metrics, primary="dice", directions={"dice": 1}, cost=cost), curves)
'''
LEVELS = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}


def race_toy(root):
    toy = Toy(root)
    write_template(toy.templates/"transfer.ipynb", "transfer", body=BODY)
    options = {"flags": str(toy.flags)}
    toy.write(pretrain={w: {"backbone": "profound_toy", "options": options} for w in LEVELS},
              backbones=["profound_toy.random", *(f"profound_toy.{w}" for w in LEVELS)], strategies=["full"],
              tasks={"segmentation": options | {"levels": LEVELS}}, seeds=[0, 1], budget={"epochs": 8})
    return toy


def runs_of(toy, kind="transfer"):
    return {(r["spec"]["backbone"].split(".")[1], r["spec"]["seed"]): r for r in toy.records().values()
            if r["kind"] == kind}


def epochs_of(toy, backbone):
    return [int(e) for b, _, e in map(str.split, (toy.flags/"epochs").read_text().splitlines())
            if b == f"profound_toy.{backbone}"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "The same study without a race."
    toy = race_toy(tmp_path_factory.mktemp("plain"))
    done = toy.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return runs_of(toy)


def ends(records): return {k: (r["metrics"], r["files"]["curves.parquet"]["sha256"]) for k, r in records.items()
                           if r["status"] == "done"}


def test_a_race_from_the_plan_to_its_completion(tmp_path, plain):
    toy = race_toy(tmp_path)
    told = toy.run("--halving", "--dry-run").stdout
    assert "4 cells, 2 go on after epoch 2, 1 go on after epoch 4 of 8" in told and not toy.records()
    done = toy.run("--halving")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = runs_of(toy)
    states = {w: {(r["status"], (r["stopped"] or {}).get("epoch")) for (b, _), r in runs.items() if b == w}
              for w in ("random", *LEVELS)}
    assert states == {"random": {("done", None)}, "a": {("done", None)}, "b": {("stopped", 4)},
                      "c": {("stopped", 2)}, "d": {("stopped", 2)}}
    assert ends(runs) == {k: v for k, v in ends(plain).items() if k[0] in ("random", "a")}
    assert sorted(epochs_of(toy, "a")) == sorted([*range(1, 9)] * 2) and sorted(epochs_of(toy, "d")) == [1, 1, 2, 2]
    # 2 x 4 s of b, 2 x 6 s of c and of d
    assert "6 runs are stopped, which saved about 32 s of training" in done.stdout and "Risk" in done.stdout
    assert "stopped profound_toy.d after epoch 2 of 8 (place 4 of 4)" in done.stdout
    assert "8 of 14 runs done, 6 stopped early" in done.stdout
    stood = toy.vfm("status", str(toy.study))
    assert stood.returncode == 0 and "8 done, 6 stopped of 14 runs" in stood.stdout
    shown = toy.vfm("table", str(toy.study)).stdout
    assert "stopped early, without a test score" in shown and shown.count("after epoch 2 of 8, validation dice 0.") == 4
    again = toy.run("--halving")
    assert again.returncode == 0 and "up to date" in again.stdout and runs_of(toy) == runs
    rest = toy.run()
    assert rest.returncode == 0 and ends(runs_of(toy)) == ends(plain) and "14 of 14 runs done" in rest.stdout
    assert sorted(epochs_of(toy, "d")) == sorted([*range(1, 9)] * 2)  # no epoch twice


def test_a_race_that_is_killed_and_one_that_is_asked_to_leave(tmp_path, plain):
    toy = race_toy(tmp_path)
    toy.flag("linger")
    for sign in (signal.SIGKILL, signal.SIGTERM):
        going = toy.start_run("--halving", VFM_GRACE="1")
        end = time.monotonic() + 120
        while not ((toy.flags/"epochs").exists() and " full 3" in (toy.flags/"epochs").read_text()
                   and len(runs_of(toy)) >= 4):
            if time.monotonic() > end or going.poll() is not None:
                going.kill()
                pytest.fail("".join(map(str, going.communicate())))
            time.sleep(0.05)
        going.send_signal(sign)
        going.communicate(timeout=60)
        (toy.flags/"epochs").write_text("")
    toy.flag("linger", False)
    done = toy.run("--halving")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = runs_of(toy)
    assert {w for (w, _), r in runs.items() if r["status"] == "stopped"} == {"b", "c", "d"}
    assert ends(runs) == {k: v for k, v in ends(plain).items() if k[0] in ("random", "a")}


def test_a_cell_that_fails_stops_nobody(tmp_path):
    toy = race_toy(tmp_path)
    toy.flag("fail-profound_toy.a")
    done = toy.run("--halving")
    assert done.returncode == 1
    runs = runs_of(toy)
    assert {runs["a", s]["status"] for s in (0, 1)} == {"failed"}
    # of three that have a score two go on, then one
    assert [runs[w, 0]["status"] for w in "bcd"] == ["done", "stopped", "stopped"]
    assert [runs[w, 0]["stopped"]["epoch"] for w in "cd"] == [4, 2]
