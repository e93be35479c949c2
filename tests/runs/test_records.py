"""The run store: a record exists whole or not at all, and what is corrupt is set aside and said."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors import SafetensorError

from vfm_notes.foundation.places import run_folder, study_root
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import ExternalSpec, PretrainSpec, RunSpec, run_id
from vfm_notes.runs.forkserver import python_path
from vfm_notes.foundation.places import DamagedFile
from vfm_notes.runs.record import (
    recording_failures, drop_record, failed_record, missing_specs, new_record, read_arrays, read_record, read_records,
    read_table, scan_records, stored_record, valid, write_record,
)
from vfm_notes.runs.locks import repair, remove_stale

SPEC = RunSpec(size=(4, 8, 8))
KEYS = {
    "schema", "id", "kind", "status", "study", "spec", "metrics", "primary", "directions", "units", "controls", "d2p",
    "d2p_moments", "scores", "cost", "n", "train_cases", "head", "shown", "hand_made", "normalisation", "device",
    "threads", "versions", "commit", "cohort_hash", "weights_hash", "weights_files", "licences", "excluded", "notes",
    "overlap", "notebook", "template_hash", "created", "error", "stopped", "input",
}


def write(spec=SPEC, study="s", **values):
    rng = np.random.default_rng(spec.seed)
    return write_record(
        run_folder(study, run_id(spec)), new_record(spec, study, metrics={"dice": 0.5}, **values),
        curves=pd.DataFrame({"epoch": range(3), "seconds": 0.1, "name": "loss", "value": rng.normal(size=3)}),
        cases=[{"case": "c", "patient": "p", "metric": "dice", "value": np.nan}],
        features={"embed": rng.normal(size=(5, 4)).astype("f4")}, weights={"w": rng.normal(size=(3, 3)).T},
    )


@pytest.mark.parametrize("spec", [SPEC, PretrainSpec(), ExternalSpec(parents=("a", "b"))])
def test_a_record_comes_back_as_it_was(runs_root, spec):
    folder = run_folder("s", run_id(spec))
    record = write_record(
        folder, new_record(spec, "s", metrics={"dice": np.float32(0.25), "hd95": float("nan")}),
        weights={"w": np.arange(6.0).reshape(2, 3).T},
    )
    assert read_record(folder) == record == read_records("s")[0] and set(record) == KEYS | {"files", "host"}
    assert record["metrics"] == {"dice": 0.25, "hd95": None} and valid(record, spec)
    json.loads(
        (folder / "record.json").read_text(encoding="utf-8"), parse_constant=lambda c: pytest.fail(f"{c} is not JSON")
    )
    assert (read_arrays("s", run_id(spec), "weights")["w"] == np.arange(6.0).reshape(2, 3).T).all() and read_table(
        "s", run_id(spec), "cases"
    ) is None


def test_tables_come_back(runs_root):
    write()
    assert list(read_table("s", run_id(SPEC), "curves").columns) == ["epoch", "seconds", "name", "value"]
    assert (
        np.isnan(read_table("s", run_id(SPEC), "cases").value[0])
        and read_arrays("s", run_id(SPEC), "features")["embed"].dtype == "f4"
    )


def test_a_record_is_on_the_disk_before_it_has_its_name(runs_root, monkeypatch):
    from vfm_notes.foundation import places
    from vfm_notes.runs import record as module
    folder, done, sync, rename = run_folder("s", run_id(SPEC)), [], places.fsync, os.rename
    for m in (places, module):
        monkeypatch.setattr(m, "fsync", lambda path: done.append(("sync", Path(path).name)) or sync(path))
    monkeypatch.setattr(os, "rename", lambda a, b: done.append(("rename", Path(b).name)) or rename(a, b))
    for _ in range(2):  # the first, and one in its place
        done.clear()
        write()
        own = [
            (w, n if not n.startswith(".") else "part of " + n[1:].split(f".{socket.gethostname()}.")[0])
            for w, n in done
        ]
        part = f"part of {folder.name}"
        files = [
            ("sync", f) for f in ("cases.parquet", "curves.parquet", "features.safetensors", "weights.safetensors")
        ]
        assert own == [
            *files, ("sync", "part of record.json"), ("sync", part), ("sync", part), ("rename", part),
            ("rename", folder.name), ("sync", "s"),
        ]
    assert not list(folder.parent.glob(".*")) and read_record(folder)


def test_only_what_dead_writers_of_this_machine_left_is_swept(runs_root):
    from vfm_notes.foundation.places import cache_root
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, name, root, cache = socket.gethostname(), run_id(SPEC), study_root("s"), cache_root()
    left = {
        root / f".{name}.{host}.{pid}.{n}.part": stays
        for n, (host, pid, stays) in enumerate([
            (here, gone.pid, False), (here, os.getpid(), True), ("elsewhere", gone.pid, True),
        ])
    }
    left |= {
        cache / f".x.{host}.{pid}.0.part": stays
        for host, pid, stays in [(here, gone.pid, False), (here, os.getpid(), True), ("elsewhere", gone.pid, True)]
    }
    for path in left: path.mkdir(parents=True)
    stray = cache/f".file.{here}.{gone.pid}.0.part"
    stray.touch()  # no folder: left where it is, not counted, and no reason to stop
    assert remove_stale("s") == 2 and {p: p.exists() for p in left} == left
    assert remove_stale("s") == 0 and stray.exists()


def test_memory_of_what_is_done(runs_root):
    assert stored_record("s", SPEC) is None and missing_specs("s", [SPEC]) == [SPEC]
    write()
    other = RunSpec(size=(4, 8, 8), lr=2e-3)
    assert (
        stored_record("s", SPEC)["id"] == run_id(SPEC)
        and missing_specs("s", [SPEC, other]) == [other]
        and not valid(stored_record("s", SPEC), other)
    )
    write_record(run_folder("s", run_id(other)), failed_record(other, "s", ValueError("no")))
    assert (
        stored_record("s", other) is None
        and missing_specs("s", [SPEC, other]) == []
        and missing_specs("s", [SPEC, other], failed=True) == [other]
    )


def test_attempt_records_the_failure_and_goes_on(runs_root, capsys):
    def deep(): raise ZeroDivisionError("division by nothing")
    for spec in (SPEC, RunSpec(size=(4, 8, 8), seed=1)):
        with recording_failures("s", spec):
            if spec is SPEC: deep()
            write(spec)
    failed, done = (read_record(run_folder("s", run_id(s))) for s in (SPEC, RunSpec(size=(4, 8, 8), seed=1)))
    assert (failed["status"], done["status"]) == ("failed", "done") and set(failed) == set(done)
    assert (
        failed["error"]["type"] == "ZeroDivisionError"
        and failed["error"]["message"] == "division by nothing"
        and "in deep" in failed["error"]["traceback"]
    )
    assert "recorded as failed" in capsys.readouterr().err


def test_an_interrupt_is_not_a_failure(runs_root):
    with pytest.raises(KeyboardInterrupt):
        with recording_failures("s", SPEC): raise KeyboardInterrupt
    assert read_records("s") == []


def test_an_unknown_field_is_refused(runs_root):
    with pytest.raises(VfmError, match="Did you mean 'metrics'"): new_record(SPEC, "s", metricks={})


# What can happen to the files of a record afterwards.
def cut(path): path.write_bytes(path.read_bytes()[:-7])
def flip(path, hidden=False):
    "Another byte in the middle; as a bad disk does it, the time of the file stays."
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if hidden: os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
DAMAGE = {
    "cut record": lambda f: cut(f / "record.json"), "empty record": lambda f: (f / "record.json").write_text(""),
    "no object": lambda f: (f / "record.json").write_text("[1]"),
    "not a record": lambda f: (f / "record.json").write_text("{}"), "no record": lambda f: (f / "record.json").unlink(),
    "cut table": lambda f: cut(f / "curves.parquet"), "no weights": lambda f: (f / "weights.safetensors").unlink(),
    "no text": lambda f: (f / "record.json").write_bytes(b"\xff\xfe\x00{"),
    "other id": lambda f: (f / "record.json").write_text(
        (f / "record.json").read_text(encoding="utf-8").replace(run_id(SPEC), "somebody-else")
    ),
    "other table": lambda f: flip(f / "curves.parquet"),
    "other weights": lambda f: flip(f / "weights.safetensors"),
}


def snapshot(root):
    "Names, times and bytes of everything below a folder."
    return {str(p.relative_to(root)): (p.lstat().st_mtime_ns, p.is_file() and p.read_bytes())
            for p in sorted(root.rglob("*"))}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_left_out_and_set_aside_by_a_run_alone(runs_root, capsys, damage):
    folder, id = run_folder("s", run_id(SPEC)), run_id(SPEC)
    for n in (1, 2):
        write()
        DAMAGE[damage](folder)
        before = snapshot(runs_root)
        records, damaged = scan_records("s", [id])
        assert read_records("s") == records == [] and read_record(folder) is None and list(damaged) == [id]
        assert missing_specs("s", [SPEC]) == [SPEC]
        assert snapshot(runs_root) == before and capsys.readouterr().err == ""
        assert repair("s", [id]) == [id] and not folder.exists() and folder.with_name(f"{id}.corrupt-{n}").is_dir()
        said = capsys.readouterr().err
        assert id in said and f"corrupt-{n}" in said and damaged[id] in said and said.count("\n") == 1
    assert missing_specs("s", [SPEC]) == [SPEC] and valid(write(), SPEC) and len(read_records("s")) == 1


def test_what_a_bad_disk_does_is_found_where_it_is_read(runs_root, monkeypatch):
    id = run_id(SPEC)
    folder = run_folder("s", id)
    write()
    flip(folder/"curves.parquet", hidden=True)
    assert len(read_records("s")) == 1  # a look opens no file
    with pytest.raises(DamagedFile, match="curves.parquet is damaged .* study file of 's' and --retry-failed"):
        read_table("s", id, "curves")
    assert read_table("s", id, "cases") is not None and repair("s", [id]) == [id]
    write()
    monkeypatch.setattr("vfm_notes.runs.locks.SMALL_FILE", 10)  # as if the weights were large
    flip(folder/"weights.safetensors", hidden=True)
    with pytest.raises(DamagedFile, match="weights.safetensors is damaged"): read_arrays("s", id, "weights")
    assert repair("s", [id]) == [] and repair("s", [id], everything=True) == [id]


def test_a_copied_folder_is_read_once_and_then_known(runs_root, monkeypatch):
    write()
    for p in run_folder("s", run_id(SPEC)).iterdir(): os.utime(p)
    opened, real = [], __import__("vfm_notes.runs.record").runs.record.file_hash
    monkeypatch.setattr("vfm_notes.runs.record.file_hash", lambda path: (opened.append(path), real(path))[1])
    assert len(read_records("s")) == 1 and len(opened) == 4
    assert repair("s", [run_id(SPEC)]) == []
    opened.clear()
    assert len(read_records("s")) == 1 and not opened


def test_folders_of_somebody_else_are_not_looked_at(runs_root, capsys):
    write()
    own = study_root("s")
    for name in ("my notes", "results-2024", "segmentation-mine-12345678", ".hidden"): (own/name).mkdir()
    (own/"my notes"/"record.json").write_text("{}")
    (own/"paper-abcdef12").write_text("a file with such a name")
    before = snapshot(runs_root)
    assert len(read_records("s")) == 1 and scan_records("s", [run_id(SPEC)])[1] == {}
    assert repair("s", [run_id(SPEC)]) == [] and remove_stale("s") == 0
    assert snapshot(runs_root) == before and capsys.readouterr().err == ""


def test_a_record_with_files_of_somebody_else_is_set_aside_not_dropped(runs_root, capsys):
    write()
    folder = run_folder("s", run_id(SPEC))
    (folder/"figure.png").write_text("mine")
    write()
    assert "also holds figure.png" in capsys.readouterr().err
    assert (folder.with_name(f"{folder.name}.corrupt-1")/"figure.png").read_text() == "mine"
    drop_record(folder)
    assert not folder.exists() and [p.name for p in study_root("s").iterdir()] == [f"{folder.name}.corrupt-1"]


def test_another_schema_is_refused_and_left_alone(runs_root):
    write()
    path = run_folder("s", run_id(SPEC))/"record.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"schema": 1', '"schema": 99'))
    with pytest.raises(VfmError, match="schema 99"): read_records("s")
    assert path.exists()


# Atomicity, with real kills.
WRITER = """
import os, sys, time
import numpy as np, pandas as pd, pyarrow, safetensors.numpy
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import RunSpec, run_id
from vfm_notes.runs.record import new_record, write_record
pd.DataFrame({"value": [1.0]}).to_parquet(os.path.join(sys.argv[2], "warm.parquet"))
new_record(RunSpec(), "s")  # asks git once, before the forks
def write(k):
    spec = RunSpec(size=(4, 8, 8), seed=k % 3)
    write_record(
        run_folder("s", run_id(spec)), new_record(spec, "s", metrics={"k": k}),
        curves=pd.DataFrame({"value": np.full(5000, float(k))}), weights={"w": np.full(50000, float(k))},
    )
if sys.argv[1] == "for ever":
    print("ready", flush=True)
    k = 0
    while True: write(k := k + 1)
for line in sys.stdin:  # a child that writes without end, to be killed by the parent
    pid = os.fork()
    if not pid:
        os.close(0)
        k = int(line) * 1000
        while True: write(k := k + 1)
    time.sleep(0.001)
    print(pid, flush=True)
"""


def writer(mode, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, mode, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        bufsize=1, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
    )
    return process


def consistent(record) -> bool:
    k = record["metrics"]["k"]
    return (read_table("s", record["id"], "curves").value == k).all() and (
        read_arrays("s", record["id"], "weights")["w"] == k
    ).all()


def test_kill_in_the_middle_of_writing_leaves_no_half_record(runs_root, tmp_path, capsys):
    rng, process, seen, hidden, turn = random.Random(0), writer("fork", tmp_path), set(), 0, 0
    # on a busy machine a kill hits nothing more often
    while turn < 15 or (turn < 200 and (len(seen) < 8 or not hidden)):
        turn += 1
        process.stdin.write(f"{turn}\n")
        pid = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}/status").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.001)
        records = read_records("s")
        assert all(map(consistent, records))
        seen |= {r["metrics"]["k"] for r in records}
        hidden = max(hidden, len(list(study_root("s").glob(".*"))))
    process.kill(); process.wait()
    assert capsys.readouterr().err == "" and not list(study_root("s").glob("*.corrupt-*"))
    assert len(seen) >= 8 and hidden > 0  # records were written, and writers were hit at work
    time.sleep(0.1)
    assert remove_stale("s") > 0 and not list(study_root("s").glob(".*")) and read_records("s")


def test_a_reader_never_sees_half_of_a_replacement(runs_root, tmp_path, capsys):
    process = writer("for ever", tmp_path)
    assert process.stdout.readline() == "ready\n"
    end, kinds = time.monotonic() + 2, set()
    while time.monotonic() < end: kinds |= {(r["status"], len(r["files"])) for r in read_records("s")}
    process.kill(); process.wait()
    assert kinds == {("done", 2)} and capsys.readouterr().err == "" and not list(study_root("s").glob("*.corrupt-*"))


def test_a_failing_write_leaves_what_was_there(runs_root):
    before = write()
    with pytest.raises(SafetensorError):
        write_record(run_folder("s", run_id(SPEC)), new_record(SPEC, "s"), weights={"w": "no array"})
    assert read_record(run_folder("s", run_id(SPEC))) == before and len(list(study_root("s").iterdir())) == 1


def test_reading_records_needs_neither_torch_nor_pandas(runs_root):
    write()
    code = (
        "import sys; from vfm_notes.runs.record import read_records; assert len(read_records('s')) == 1; print([m "
        "for m in ('torch', 'monai', 'pandas', 'numpy') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": python_path()}
        ).stdout
        == "[]\n"
    )
