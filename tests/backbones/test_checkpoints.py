"""Checkpoints as training leaves them: the network is found below its prefix, and of several the right one or none."""
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import folder, full_registries, vfm  # noqa: F401 (fixtures)

from vfm_notes.backbones import keys as k
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.foundation.registry import VfmError
from vfm_notes.nets.files import parts_of


def toy(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    return build_backbone("profound_toy", 1).state_dict()


def under(prefix: str, state: dict) -> dict: return {prefix + name: v for name, v in state.items()}


CHECKPOINTS = {
    "torch.compile": lambda s: under("_orig_mod.", s), "compiled inside": lambda s: {n.replace("encoder.",
    "encoder._orig_mod.", 1): v for n, v in s.items()},
    "DataParallel": lambda s: {"state_dict": under("module.", s), "epoch": 3},
    "Lightning": lambda s: {"state_dict": under("model.", s) | {"criterion.weight": torch.ones(2)},
    "hyper_parameters": {"lr": 1e-3}},
    "DDP of a compiled one": lambda s: {"model": under("module._orig_mod.", s),
    "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, "backbone with a "
    "head": lambda s: under("backbone.", s) | {"head.weight": torch.ones(2, 3)},
    "model_state": lambda s: {"model_state": s, "step": torch.tensor(3)},
    "deep": lambda s: {"state": {"nets": {"ema_model": under("net.", s)}}}, "the encoder "
    "alone": lambda s: {n.removeprefix("encoder."): v for n, v in s.items()},
    "a prefix of one's own": lambda s: under("prostate_net_v2.", s),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_check_and_load_find_the_network(tmp_path, kind):
    state, path, model = toy(), tmp_path/"x.ckpt", build_backbone("profound_toy", 1)
    torch.save(CHECKPOINTS[kind](state), path)
    report, found, _ = k.check_weights_file(path, "profound_toy", 1)
    assert report.share == 1 and all(torch.equal(found[n], v) for n, v in state.items())
    if kind == "the encoder alone": return
    loaded = k.load_weights(model, path)
    assert loaded.matched == report.matched and all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert k.load_weights(build_backbone("profound_toy", 1), CHECKPOINTS[kind](state)).share == 1


@pytest.mark.parametrize("kind, said", [("torch.compile", "without the prefix '_orig_mod.'"),
    ("Lightning", "without the prefix 'model.' (1 other tensors"), ("DataParallel", "without the prefix 'module.'"),
    ("deep", "without the prefix 'net.'")])
def test_the_command_says_what_was_taken_off(folder, full_registries, tmp_path, kind, said):
    torch.save(CHECKPOINTS[kind](toy()), tmp_path/"x.pth")
    status, out, err = vfm("check", tmp_path/"x.pth", "--arch", "profound_toy", "--channels", "1")
    assert status == 0 and said in out and "100.0%" in out and err == ""


def test_the_search_without_an_architecture_takes_prefixes_off(folder, full_registries, tmp_path, capfd):
    state = build_backbone("provicnet_toy", 3).state_dict()
    torch.save({"state_dict": under("student_net.module.", state)}, tmp_path/"x.pth")
    report, found, _ = k.check_weights_file(tmp_path/"x.pth")
    assert report.share == 1 and "provicnet_toy" in report.name and all(torch.equal(found[n], v) for n,
        v in state.items())
    assert "it/s" not in capfd.readouterr().err, "no bar of another library"


def test_of_teacher_and_student_the_owner_chooses(tmp_path):
    pair, path = {"student": under("backbone.", toy(1)), "teacher": under("backbone.", toy(2)),
        "epoch": 9}, tmp_path/"dino.pth"
    torch.save(pair, path)
    with pytest.raises(VfmError, match="2 networks that fit equally well.*dino.pth#teacher.backbone"):
        k.check_weights_file(path, "profound_toy", 1)
    with pytest.raises(VfmError, match="2 networks"): k.load_weights(build_backbone("profound_toy", 1), path)
    for side, seed in (("student", 1), ("teacher", 2)):
        report, state, _ = k.check_weights_file(f"{path}#{side}", "profound_toy", 1)
        assert report.share == 1 and f"its part '{side}'" in report.name and all(torch.equal(state[n], v) for n,
            v in toy(seed).items())
    model = build_backbone("profound_toy", 1)
    k.load_weights(model, f"{path}#teacher")
    assert all(torch.equal(v, toy(2)[n]) for n, v in model.state_dict().items())
    with pytest.raises(VfmError, match="no part 'techer'. Did you mean 'teacher"):
        k.check_weights_file(f"{path}#techer", "profound_toy", 1)


def test_equal_copies_and_lesser_fits_are_no_question(tmp_path):
    "An average that is still the network itself; a student without its last stage."
    torch.save({"model": toy(), "ema": toy()}, tmp_path/"same.pth")
    assert k.check_weights_file(tmp_path/"same.pth", "profound_toy", 1)[0].share == 1
    less = {n: v for n, v in toy(1).items() if "stages.0" not in n}
    torch.save({"student": less, "teacher": toy(2)}, tmp_path/"two.pth")
    report, state, _ = k.check_weights_file(tmp_path/"two.pth", "profound_toy", 1)
    assert report.share == 1 and "its part 'teacher'" in report.name and all(torch.equal(state[n], v) for n,
        v in toy(2).items())


def test_what_is_no_network_is_left_alone():
    one = torch.ones(1)
    parts = parts_of({"optimizer_states": [{"state": {}}], "optimizer": {"a": one}, "lr_schedulers": {"b": one},
        "state_dict": {"net.w": one}})
    assert [(p.place, p.prefix) for p in parts] == [("state_dict", ""), ("state_dict", "net")]


def test_bad_numbers_count_in_the_network_that_is_taken(tmp_path):
    bad = {n: v * float("nan") for n, v in toy(1).items()}
    torch.save({"student": bad, "teacher": toy(2)}, tmp_path/"x.pth")
    assert k.check_weights_file(f"{tmp_path/'x.pth'}#teacher", "profound_toy", 1)[0].share == 1
    with pytest.raises(VfmError, match="not finite"):
        k.check_weights_file(f"{tmp_path/'x.pth'}#student", "profound_toy", 1)
    save_file(toy(), tmp_path/"x.safetensors")
    assert load_file(tmp_path/"x.safetensors").keys() == toy().keys()
