"""Weights from elsewhere: each layout read to the same network, nothing run, and what a plan must state."""
import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import yaml

import vfm_notes.tune.catalog
from vfm_notes.backbones.imported import Origin, import_weights
from vfm_notes.backbones.plan import local_weights_file, read_planned
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.backbones.weights import weights_card
from vfm_notes.foundation.registry import VfmError

NNSSL = {
    "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None},
    "pretrain_plan": {"configurations": {"onemmiso": {
        "spacing": [1.0, 1.0, 1.0], "patch_size": [16, 64, 64], "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
    }}},
    "pretrain_num_input_channels": 1, "key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem",
}
NNUNET = {
    "configuration": "3d_lowres", "fold": 0, "device": torch.device("cpu"),
    "dataset_json": {"channel_names": {"0": "T2", "1": "ADC"}},
    "plans": {"configurations": {
        "3d_fullres": {"patch_size": [16, 64, 64], "spacing": [3.0, 0.5, 0.5],
                       "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
                       "use_mask_for_norm": [False, False]},
        "3d_lowres": {"inherits_from": "3d_fullres", "spacing": [3.0, 1.0, 1.0]},
    }},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path


def network(channels, seed=5):
    torch.manual_seed(seed)
    net = build_backbone("profound_toy", channels).eval()
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.05 * torch.randn_like(p))
    return net


def layouts(net):
    "One content for each layout, of the same network; each also holds what is not the network."
    state, head = dict(net.state_dict()), {"head.weight": torch.ones(3, 3)}
    inside = lambda prefix: {f"{prefix}{k}": v for k, v in state.items()}
    return {
        "nnU-Net": {
            "network_weights": inside("backbone.") | {"decoder.x": torch.ones(2)}, "init_args": NNUNET,
            "optimizer_state": {"state": {0: {"exp_avg": torch.ones(4)}}}, "current_epoch": 3, "trainer_name": "x",
            "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.6)]}, "_best_ema": np.float64(0.5),
        },
        "nnssl": {"network_weights": inside("") | head, "nnssl_adaptation_plan": NNSSL, "citations": ["x"]},
        "Lightning": {
            "state_dict": inside("model.net.") | {"criterion.w": torch.ones(1)}, "epoch": 1, "global_step": 2,
            "pytorch-lightning_version": "2.4", "hyper_parameters": {"lr": 1e-3}, "optimizer_states": [],
        },
        "state dict": {"state_dict": inside("module."), "epoch": 3},
        "compiled": inside("_orig_mod.module."),
        "half": {k: v.half() for k, v in state.items()},
    }


CHANNELS = {"nnU-Net": 2, "nnssl": 1}


@pytest.mark.parametrize("layout", ["nnU-Net", "nnssl", "Lightning", "state dict", "compiled", "half"])
def test_each_layout_gives_the_network_that_was_written(here, layout):
    n = CHANNELS.get(layout, 2)
    net = network(n)
    torch.save(layouts(net)[layout], here / "found.pth")
    made = import_weights(str(here / "found.pth"), "profound_toy.found", Origin("CC-BY-4.0", True, "doi:10/x"))
    state, plan = read_planned(local_weights_file("profound_toy.found"))
    x = torch.randn(1, n, 4, 32, 32)
    again = build_backbone("profound_toy", n, state).eval()
    with torch.no_grad(): error = (again.embed(x) - net.embed(x)).abs().max()
    assert error < (5e-3 if layout == "half" else 1e-9) and made.report.share == 1
    assert plan.arguments == {"in_channels": n} and plan.licences == ("CC-BY-4.0",)
    card = weights_card("profound_toy.found")
    assert card.non_commercial and card.licence == "CC-BY-4.0" and "found.pth" in card.source
    assert made.facts.layout == (layout if layout in ("nnU-Net", "nnssl", "Lightning") else "state dict")


def test_the_plans_of_nnssl_and_nnunet_are_taken_over(here):
    for layout, size, spacing, rule, names in (
        ("nnssl", (16, 64, 64), (1.0, 1.0, 1.0), "zscore", ("any",)),
        ("nnU-Net", (16, 64, 64), (3.0, 1.0, 1.0), "zscore_nonzero", ("T2", "ADC")),
    ):
        torch.save(layouts(network(CHANNELS[layout]))[layout], here / "found.pth")
        made = import_weights(str(here / "found.pth"), "profound_toy.found", Origin("MIT"), over=True)
        assert (made.plan.size, made.plan.spacing, made.plan.sequences) == (size, spacing, names), layout
        assert made.plan.normalisation == {"how": rule}
        assert bool(made.facts.notes) == (layout == "nnU-Net")  # two schemes have no counterpart


def test_of_two_networks_one_is_named(here):
    a, b = network(2, 1), network(2, 2)
    both = {"student": a.state_dict(), "teacher": b.state_dict()}
    state = {f"{who}.encoder.{k}": v for who, own in both.items() for k, v in own.items()}
    torch.save(state, here / "two.pth")
    with pytest.raises(VfmError, match="2 networks that fit equally well"):
        import_weights(str(here / "two.pth"), "profound_toy.two", Origin("MIT"))
    with pytest.raises(VfmError, match="no names below it.*student"):
        import_weights(str(here / "two.pth"), "profound_toy.two", Origin("MIT"), "studnet.encoder")
    import_weights(str(here / "two.pth"), "profound_toy.two", Origin("MIT"), "teacher.encoder.")
    state, _ = read_planned(local_weights_file("profound_toy.two"))
    assert all(torch.equal(state[k], v) for k, v in b.state_dict().items())
    with pytest.raises(VfmError, match="exists: give another name"):
        import_weights(str(here / "two.pth"), "profound_toy.two", Origin("MIT"), "teacher.encoder")


class Evil:
    def __reduce__(self): return (open, ("ran.txt", "w"))


def test_code_is_refused_and_not_run(here, monkeypatch):
    monkeypatch.chdir(here)
    torch.save({"network_weights": dict(network(2).state_dict()), "logging": Evil()}, here / "evil.pth")
    with pytest.raises(VfmError, match="holds code"):
        import_weights(str(here / "evil.pth"), "profound_toy.evil", Origin("MIT"))
    assert not (here / "ran.txt").exists() and not list((here / "weights").glob("*"))


def test_too_little_and_what_is_not_finite_are_refused(here):
    state = dict(network(2).state_dict())
    few = {k: v for i, (k, v) in enumerate(state.items()) if i % 2}
    torch.save(few, here / "few.pth")
    with pytest.raises(VfmError, match="do not fit backbone 'profound_toy'"):
        import_weights(str(here / "few.pth"), "profound_toy.few", Origin("MIT"))
    key = next(iter(state))
    torch.save(state | {key: torch.full_like(state[key], float("nan"))}, here / "nan.pth")
    with pytest.raises(VfmError, match="not finite"):
        import_weights(str(here / "nan.pth"), "profound_toy.nan", Origin("MIT"))
    assert not list((here / "weights").glob("*.safetensors"))


def test_what_a_file_leaves_open_is_drawn_and_named(here):
    state = dict(network(2).state_dict())
    last = [k for k in state if state[k].numel() < 40][-1]
    torch.save({k: v for k, v in state.items() if k != last}, here / "most.pth")
    made = import_weights(str(here / "most.pth"), "profound_toy.most", Origin("MIT"))
    assert made.report.missing == (last,) and made.plan.keys["untouched"] == [last]
    written, _ = read_planned(made.path)
    assert written.keys() == state.keys()


def test_timm_and_the_hub_are_reached_only_when_named(here, monkeypatch):
    net = network(2)
    with pytest.raises(VfmError, match="pip install timm"):
        monkeypatch.setitem(sys.modules, "timm", None)
        import_weights("timm:some.model", "profound_toy.timm", Origin("MIT"))
    asked = []
    def create_model(name, pretrained, num_classes):
        asked.append((name, pretrained, num_classes))
        net.pretrained_cfg = {"license": "apache-2.0"}
        return net
    fake = types.SimpleNamespace(__version__="1.0", create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", fake)
    made = import_weights("timm:some.model", "profound_toy.timm", Origin("Apache-2.0"))
    assert asked == [("some.model", True, 0)] and made.facts.layout == "timm" and made.report.share == 1
    assert made.plan.made["file"] == "timm 1.0, some.model"

    from safetensors.torch import save_file
    save_file({f"vision_model.{k}": v.contiguous() for k, v in net.state_dict().items()}, here / "model.safetensors")
    def download(repo, file):
        asked.append((repo, file))
        if file != "pytorch_model.bin": raise OSError("no such file")
        return str(here / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    made = import_weights("hf:lab/net", "profound_toy.hub", Origin("Apache-2.0"))
    assert asked[1:] == [("lab/net", "model.safetensors"), ("lab/net", "pytorch_model.bin")]
    assert made.report.share == 1 and made.plan.made["file"] == "huggingface.co/lab/net, pytorch_model.bin"
    with pytest.raises(VfmError, match="OWNER/REPO"): import_weights("hf:lab", "profound_toy.x", Origin("MIT"))


def test_input_channels_without_names_take_any_cohort_of_their_number(here):
    from vfm_notes.backbones.adaptation import adapt_weights
    torch.save(dict(network(2).state_dict()), here / "w.pth")
    made = import_weights(str(here / "w.pth"), "profound_toy.w", Origin("MIT"))
    state, plan = read_planned(made.path)
    to = lambda *names: adapt_weights(plan, state, "profound_toy.w", names, (4, 32, 32), (8, 3, 3), "zscore_nonzero")
    assert any("state no names" in n and "CT, PET" in n for n in to("CT", "PET").notes)
    with pytest.raises(VfmError, match="nothing was learned"): to("CT")
    with pytest.raises(VfmError, match="--sequences names 1"):
        import_weights(str(here / "w.pth"), "profound_toy.w", Origin("MIT", sequences=("CT",)), over=True)


def test_the_command_and_a_study_with_own_weights(here, toy_server):
    import os
    torch.save({"state_dict": {f"model.{k}": v for k, v in network(3).state_dict().items()}}, here / "own.ckpt")
    study = {
        "name": "ownweights", "title": "Own weights", "cohort": "phantom", "size": [4, 32, 32],
        "spacing": [8.0, 3.0, 3.0], "cases": {"pretrain": 0, "train": 4, "val": 4, "test": 4},
        "backbones": ["profound_toy.mine"], "tasks": {"segmentation": {}}, "strategies": ["scratch", "full"],
        "seeds": [0], "budget": {"epochs": 1}, "licences": ["CC-BY-NC-4.0"],
    }
    (here / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    own = {"VFM_WEIGHTS": str(here / "weights"), "VFM_RUNS": str(here / "runs"), "VFM_FORKSERVER": toy_server}
    env = os.environ | own
    def vfm(*args):
        return subprocess.run([sys.executable, "-c", "from vfm_notes.report.cli import main; main()", *args], cwd=here,
                              capture_output=True, text=True, env=env)
    wrong = vfm("weights", "import", "own.ckpt", "--arch", "profound_toy", "--licence", "MIT", "--as", "other.x")
    assert wrong.returncode == 2 and "expected profound_toy.NAME" in wrong.stderr
    made = vfm("weights", "import", "own.ckpt", "--arch", "profound_toy", "--licence", "CC-BY-NC-4.0", "--as", "mine",
               "--non-commercial", "--sequences", "t2w, dwi, adc")
    assert made.returncode == 0, made.stderr
    assert "100.0% of the backbone is filled" in made.stdout and "%|" not in made.stderr
    ran = vfm("run", "study.yaml")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    records = [json.loads(p.read_text(encoding="utf-8")) for p in (here / "runs" / "ownweights").glob("*/record.json")]
    full = next(r for r in records if r["spec"]["strategy"] == "full")
    assert full["weights_hash"] and "CC-BY-NC-4.0" in full["licences"]
    assert any("overlap of patients unknown" in n for n in full["notes"])
