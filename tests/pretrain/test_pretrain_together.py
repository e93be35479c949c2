"""A pretraining whose steps leave parameters without gradients in turn, shared by two real processes: the weights of
one with the whole batch."""
import os
import subprocess
import sys

import pytest
import torch

SCRIPT = '''
import sys, torch
import vfm_notes.backbones.profound
import vfm_notes.pretrain.reconstruction
from vfm_notes.foundation.spec import PretrainSpec
from vfm_notes.pretrain.loop import pretrain
from vfm_notes.runs.launch import run_distributed

def job():
    "A pretraining in as many processes as it is told to share."
    torch.manual_seed(0)
    volumes = torch.randn(8, 3, 4, 32, 32)
    spec = PretrainSpec(
        backbone="profound_toy.test", objective="adversarial", options={"alternate": True}, size=(4, 32, 32), epochs=3,
        batch_size=4, lr=1e-3,
    )
    made = run_distributed(pretrain, spec, volumes, None, 3)
    rows = made.curves[["epoch", "name", "value"]].values.tolist()
    return {"net": made.backbone.state_dict(), "rows": rows, "notes": made.notes, "untouched": made.untouched}

if __name__ == "__main__": torch.save(job(), sys.argv[1])
'''


@pytest.mark.skipif(sys.platform != "linux", reason="processes meet as on Linux")
def test_adversaries_in_turn_in_two_processes(tmp_path, monkeypatch):
    """Discriminator and generator have gradients in every other step only; the loss is a mean over cases, so two
    halves give what the whole gives."""
    (tmp_path/"job.py").write_text(SCRIPT)
    env = os.environ | {
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "VFM_PROCESSES": "2", "VFM_LOG": str(tmp_path / "log"),
    }
    done = subprocess.run(
        [sys.executable, tmp_path / "job.py", tmp_path / "2.pt"], capture_output=True, text=True, timeout=600, env=env
    )
    assert done.returncode == 0, (
        done.stderr[-1500:] + (tmp_path / "log").read_text(encoding="utf-8")[-1500:] * (tmp_path / "log").exists()
    )
    monkeypatch.setenv("VFM_PROCESSES", "1")
    here = {"__name__": "here"}
    exec(SCRIPT, here)
    one, two = here["job"](), torch.load(tmp_path/"2.pt", weights_only=True)
    assert one["notes"] == [] and two["notes"] == ["trained in 2 processes"] and one["untouched"] == two["untouched"]
    # Adam's first steps divide by tiny gradients
    assert all(torch.allclose(v, two["net"][k], atol=2e-4) for k, v in one["net"].items())
    curves = [{(epoch, name): value for epoch, name, value in made["rows"]} for made in (one, two)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)
