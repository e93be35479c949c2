"""Early stopping, the best epoch, the deterministic switch, and the few-shot axis: the same cases for every backbone
and seed."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vfm_notes.data.loader import Loader
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import Budget, PretrainSpec, RunSpec, StudySpec, run_id, run_specs
from vfm_notes.pretrain.trainer import Checkpointer, TrainConfig, Stopped, Trainer
from vfm_notes.tune import catalog  # fills the registries
from vfm_notes.tune.fit import fit
from vfm_notes.tune.transfer import run_data

SPEC = RunSpec(epochs=8, lr=0.05, batch_size=4)
RISE = [0.1, 0.3, 0.6, 0.5, 0.4, 0.55, 0.2, 0.7, 0.1]  # validation score at epochs 0 … 8
TASK = SimpleNamespace(primary="dice", loss=lambda output, target: (output - target).square().mean())


def scripted(spec, scores=RISE, metric="dice", keeper=Checkpointer()):
    "A training whose validation scores are written beforehand; also the weight after every epoch."
    torch.manual_seed(0)
    net, x, after = nn.Linear(2, 1), torch.randn(8, 2), []
    task = SimpleNamespace(**vars(TASK) | {"primary": metric})
    def watch(epoch):
        after.append(net.weight.detach().clone())
        return {f"val_{metric}": scores[epoch]}
    curves, notes = fit(
        net, task, Loader({"inputs": x, "target": x.sum(1, keepdim=True)}, 4), spec, watch, keeper=keeper
    )
    return net, curves, notes, after


@pytest.mark.parametrize("patience, last", [(0, 8), (1, 3), (3, 5), (4, 6), (5, 8)])
def test_it_stops_when_there_was_no_better_score_for_so_many_epochs(patience, last):
    "The best score so far is that of epoch 2 until epoch 7."
    _, curves, notes, _ = scripted(replace(SPEC, patience=patience))
    assert curves.epoch.max() == last and any("stopped after epoch" in n for n in notes) == (last < 8)


def test_a_distance_is_better_when_it_is_smaller():
    _, curves, _, _ = scripted(replace(SPEC, patience=2), [9, 5, 3, 4, 5, 6, 1, 1, 1], "hd95")
    assert curves.epoch.max() == 4


@pytest.mark.parametrize("keep, epoch", [("last", 8), ("best", 7)])
def test_the_weights_of_the_best_epoch_are_kept_where_asked(keep, epoch):
    net, _, _, after = scripted(replace(SPEC, keep=keep))
    assert torch.equal(net.weight, after[epoch]) and not any(
        torch.equal(after[epoch], w) for i, w in enumerate(after) if i != epoch
    )


def test_best_and_patience_together_and_undefined_scores():
    net, curves, _, after = scripted(
        replace(SPEC, keep="best", patience=2), [math.nan, math.nan, 0.3, math.nan, 0.2] + RISE[5:]
    )
    assert curves.epoch.max() == 4 and torch.equal(net.weight, after[2])
    with pytest.raises(VfmError, match="undefined in every epoch"): scripted(replace(SPEC, keep="best"), [math.nan] * 9)
    with pytest.raises(VfmError, match="expected last or best"): scripted(replace(SPEC, keep="beste"))


def test_the_best_epoch_survives_a_stop(tmp_path):
    spec = replace(SPEC, keep="best", patience=5)
    whole, *_ = scripted(spec)
    calls = iter([False] * 9 + [True] * 99)  # asked to leave in the fifth epoch
    with pytest.raises(Stopped):
        scripted(spec, keeper=Checkpointer(tmp_path/"c.pt", "k", 0.0, stop=lambda: next(calls)))
    assert (tmp_path/"c.pt").is_file()
    net, curves, _, _ = scripted(spec, keeper=Checkpointer(tmp_path/"c.pt", "k", 10.0))
    assert torch.equal(net.weight, whole.weight) and curves.epoch.max() == 8


# --- determinism ---

def test_the_switch_reaches_torch_and_is_taken_back():
    trainer = lambda on: Trainer(
        nn.Linear(2, 1), lambda m, b: (m(b["x"]).sum(), {}), Loader({"x": torch.zeros(4, 2)}, 2),
        TrainConfig(epochs=1, lr=0.1, deterministic=on),
    )
    trainer(True)
    assert (
        torch.are_deterministic_algorithms_enabled()
        and torch.is_deterministic_algorithms_warn_only_enabled()
        and torch.backends.cudnn.deterministic
    )
    trainer(False)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


def test_a_study_asks_for_it_and_its_runs_have_other_names():
    toy = dict(
        name="s", title="s", cohort="phantom", size=(4, 32, 32), spacing=(4, 1.5, 1.5),
        cases=dict(pretrain=0, train=8, val=4, test=6), backbones=["a.x"], tasks={"segmentation": {}},
        strategies=["full"], seeds=[0],
    )
    plain, asked = (run_specs(StudySpec(**toy, budget=Budget(deterministic=on)))[0] for on in (False, True))
    assert asked.deterministic and TrainConfig.of(asked).deterministic and run_id(plain) != run_id(asked)
    assert (
        run_id(RunSpec()) == "segmentation-profound_toy.mae_phantom-full-n24-s0-5ec46327"
        and TrainConfig.of(PretrainSpec(deterministic=True)).deterministic
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_two_runs_on_a_gpu_are_the_same():
    def once():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.GELU(), nn.Conv3d(4, 1, 3)).cuda()
        x = torch.randn(8, 1, 12, 12, 12)
        trainer = Trainer(
            net, lambda m, b: (m(b["x"]).square().mean(), {}), Loader({"x": x}, 4),
            TrainConfig(epochs=3, lr=0.01, deterministic=True),
        )
        for _ in range(3): trainer.run_epoch()
        return torch.cat([p.flatten() for p in net.parameters()])
    assert torch.equal(once(), once())


# --- few shots ---

def test_few_shots_are_nested_and_the_same_for_every_backbone_and_strategy_while_each_seed_draws_its_own():
    base = RunSpec(
        task="classification", size=(4, 32, 32), spacing=(8, 3, 3),
        cases={"pretrain": 0, "train": 12, "val": 3, "test": 3},
    )
    def names(n, **changes):
        task, data = run_data(replace(base, n_train=n, **changes))
        return data["train"].names, data["test"].names, data["train"].target
    (four, test, grades), (eight, _, _), (twelve, _, _) = names(4), names(8), names(12)
    assert set(four) < set(eight) < set(twelve) and len(four) == 4
    for other in (dict(backbone="provicnet_toy.x"), dict(strategy="probe"), dict(lr=0.1)):
        assert names(4, **other)[:2] == (four, test)
    drawn, seen, _ = names(4, seed=7)
    assert set(drawn) != set(four) and set(drawn) < set(names(8, seed=7)[0]) < set(twelve) and seen == test
    # every grade is there as early as can be
    assert len(set(grades.tolist())) == min(4, len(set(names(12)[2].tolist())))
