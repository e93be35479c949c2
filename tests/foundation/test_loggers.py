"""Loggers: none by default, each handed the same run by its own interface, none that ends a training."""
import sys
import types

import pytest

from vfm_notes.foundation.loggers import chosen_loggers, log_run
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import RunSpec, run_id
from vfm_notes.runs.record import new_record, write_record

CURVES = [{"epoch": e, "seconds": 0.0, "name": n, "value": v} for e, n, v in ((1, "loss", 0.5), (1, "dice", 0.2),
                                                                             (2, "loss", 0.25))]


def write(folder, monkeypatch):
    monkeypatch.setenv("VFM_RUNS", str(folder))
    spec = RunSpec()
    record = new_record(spec, "mine", metrics={"dice": 0.75, "hd95": float("nan")})
    write_record(folder/"mine"/run_id(spec), record, CURVES)
    return run_id(spec)


def test_nothing_is_imported_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("VFM_LOG_TO", raising=False)
    for name in ("tensorboard", "mlflow", "wandb"): monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    write(tmp_path, monkeypatch)
    assert chosen_loggers("") == []


def test_a_logger_that_is_not_there_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(VfmError, match="pip install mlflow"): chosen_loggers("mlflow")
    with pytest.raises(VfmError, match="Did you mean 'wandb'"): chosen_loggers("wandbb")


class Run:
    def __init__(self, calls): self.calls, self.summary = calls, types.SimpleNamespace(update=lambda d: calls.append(d))
    def __enter__(self): return self
    def __exit__(self, *error): self.calls.append("closed")
    def log(self, values, step): self.calls.append((step, values))
    def finish(self): self.calls.append("finished")


def test_mlflow_and_wandb_get_spec_curves_and_metrics(tmp_path, monkeypatch):
    calls, begun = [], {}
    def start_run(run_name):
        begun["mlflow"] = run_name
        return Run(calls)
    mlflow = types.SimpleNamespace(
        set_experiment=lambda n: calls.append(("experiment", n)), start_run=start_run,
        log_params=lambda p: calls.append(("params", p["task"], p["lr"])),
        log_metric=lambda n, v, step: calls.append((n, v, step)), log_metrics=lambda m: calls.append(m),
        set_tag=lambda k, v: calls.append((k, v)),
    )
    def init(project, name, config, **where):
        begun["wandb"] = (project, name, config["backbone"], where["dir"])
        return Run(calls)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("VFM_LOG_TO", "mlflow,wandb")
    id = write(tmp_path, monkeypatch)
    assert begun == {"mlflow": id, "wandb": ("mine", id, "profound_toy.mae_phantom", str(tmp_path/"mine"))}
    assert calls == [
        ("experiment", "mine"), ("params", "segmentation", "0.001"), ("loss", 0.5, 1), ("dice", 0.2, 1),
        ("loss", 0.25, 2), {"test/dice": 0.75}, ("status", "done"), "closed",
        (1, {"loss": 0.5, "dice": 0.2}), (2, {"loss": 0.25}), {"test/dice": 0.75}, "finished",
    ]


def test_a_logger_that_fails_ends_nothing(tmp_path, monkeypatch, capsys):
    def fail(*args, **more): raise OSError("no server")
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(set_experiment=fail))
    monkeypatch.setenv("VFM_LOG_TO", "mlflow")
    id = write(tmp_path, monkeypatch)
    assert (tmp_path/"mine"/id/"record.json").is_file()
    assert "was not logged to mlflow (OSError: no server)" in capsys.readouterr().err


def test_tensorboard_reads_what_is_written(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setenv("VFM_LOG_TO", "tensorboard")
    id = write(tmp_path, monkeypatch)
    found = EventAccumulator(str(tmp_path/"mine"/"tensorboard"/id)).Reload()
    assert [(s.step, s.value) for s in found.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert found.Scalars("test/dice")[0].value == 0.75


def test_the_dict_of_a_record_is_left_as_it_is():
    record = {"id": "a", "metrics": {"dice": None}, "spec": {}}
    log_run(record, None, None, print)
    assert record == {"id": "a", "metrics": {"dice": None}, "spec": {}}
