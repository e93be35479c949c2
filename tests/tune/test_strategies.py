"""Every strategy on small backbones: what moves, what does not, what is stored, and what is refused."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.foundation.registry import parse_strategy, canonical_strategy
from vfm_notes.foundation.registry import VfmError, backbones, strategies
from vfm_notes.foundation.spec import RunSpec, StudySpec, load_study, run_id, run_specs
from vfm_notes.nets.decoder import ClassificationHead, DenseDecoder, Network
from vfm_notes.pretrain.trainer import TrainConfig, Trainer
from vfm_notes.runs.grid import job_parameters, job_specs, parse_only, jobs_of
from vfm_notes.tune import study_names
from vfm_notes.tune.fit import fit, predict, training_batches
from vfm_notes.tune.probe import CachedHead, cache_features
from vfm_notes.tune.strategy import apply_strategy, block_names, parameter_depths
from vfm_notes.tune.transfer import build_model, run_data, transfer, tuned_model

# lines of text to try for each strategy; one that is registered and not named here is tried without options
LINES = {
    "full": ["full", "full decay=0.75", "full drop=1"], "top": ["top", "top k=2", "top from=2", "top fraction=0.3"],
    "decoder": ["decoder", "decoder fraction=0.5"], "probe": ["probe", "probe head=mlp"],
    "knn": ["knn k=2", "knn k=3 metric=euclidean"],
    "lora": ["lora rank=2 targets=linear", "lora rank=2 targets=conv", "lora alpha=1 targets=attention"],
}
EVERY = [line for name in strategies if name != "nothing" for line in LINES.get(name, [name])]
TINY = {"profound_toy": {}, "provicnet_toy": {}, "vit_3d": {"tiny": True}, "resnet18_3d": {"tiny": True}}
CASES = {"pretrain": 0, "train": 8, "val": 4, "test": 8}
SPEC = RunSpec(size=(4, 32, 32), spacing=(8.0, 3.0, 3.0), cases=CASES, n_train=8, epochs=2, lr=1e-2, strategy="full")


def network(name, dense=False, seed=0):
    torch.manual_seed(seed)
    backbone = backbones[name](in_channels=3, **TINY.get(name, {}))
    return Network(backbone, DenseDecoder(backbone, 3, 2) if dense else ClassificationHead(backbone, 3))


def volume(model, n=4):
    return torch.randn(
        n, 3, *(max(2 * s, 4) for s in model.backbone.strides[-1]), generator=torch.Generator().manual_seed(1)
    )


# --- exactly what a strategy says, and nothing else ---

@pytest.mark.parametrize("backbone, dense", [*((name, False) for name in TINY), ("profound_toy", True)])
@pytest.mark.parametrize("line", EVERY)
def test_two_steps_change_what_the_strategy_says_and_nothing_else(line, backbone, dense):
    model = network(backbone, dense)
    x = volume(model)
    try: tuning = apply_strategy(line, model)
    except VfmError as error:
        assert str(error).count(". ") <= 1 and any(
            word in str(error) for word in ("matches no layer", "knn", "can be left out")
        )
        return
    said = {k for k, p in model.named_parameters() if p.requires_grad}
    assert tuning.parameters == {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total": sum(p.numel() for p in model.parameters()),
    }
    assert sum(part["tensors"] for part in tuning.parts) == len(said)
    before, pushed = {k: v.clone() for k, v in model.state_dict().items()}, set()
    for k, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, k=k: pushed.add(k) if p.grad.abs().max() > 1e-6 else None)
    if tuning.steps:
        from vfm_notes.data.loader import Loader
        trainer = Trainer(
            model, lambda net, b: (net(b["x"]).square().mean(), {}), Loader({"x": x}, 4),
            TrainConfig(epochs=2, lr=1e-2, warmup=0.0), tuning.groups(model, 1e-2, 0.05),
        )
        trainer.run_epoch(); trainer.run_epoch()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    parameters = dict(model.named_parameters())
    assert pushed <= moved & set(parameters) <= said, "parameters"
    norms = {
        f"{name}.{b}"
        for name, m in model.named_modules()
        for b, _ in m.named_buffers(recurse=False)
        if any(p.requires_grad for p in m.parameters(recurse=False))
    }
    assert moved - set(parameters) <= norms, "buffers of what is frozen"
    if line.split()[0] in ("probe", "decoder", "knn") and "fraction" not in line:
        assert not any(k.startswith("backbone.") for k in moved) and tuning.frozen
    if line.split()[0] in ("scratch", "full"): assert {k for k in parameters if k.startswith("head.")} <= moved


def test_frozen_parts_stay_in_evaluation_mode():
    model = network("resnet18_3d")
    apply_strategy("top", model)
    model.train()
    names = block_names(model.backbone)
    modes = [{m.training for m in model.backbone.get_submodule(n).modules()} for n in names]
    assert modes[-1] == {True} and all(m == {False} for m in modes[:-1])
    assert all(m.training for m in model.head.modules()) and not any(m.training for m in model.eval().modules())


def test_rates_fall_from_block_to_block_as_written():
    model = network("vit_3d")
    tuning = apply_strategy("full decay=0.5", model)
    depth, last = parameter_depths(model, block_names(model.backbone)), len(block_names(model.backbone)) + 1
    groups = tuning.groups(model, 0.1, 0.05)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(rate) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert rate[id(p)] == pytest.approx(0.1 * 0.5 ** (last - depth[name]))
        assert decays[id(p)] == (0.05 if sum(s > 1 for s in p.shape) > 1 else 0)
    from vfm_notes.data.loader import Loader
    trainer = Trainer(
        model, lambda net, b: (net(b["x"]).square().mean(), {}), Loader({"x": volume(model)}, 2),
        TrainConfig(epochs=4, lr=0.1, warmup=0.25), groups,
    )
    trainer.run_epoch()
    assert {round(g["lr"] / g["initial_lr"], 6) for g in trainer.optimiser.param_groups} == {1.0}, (
        "warm-up and cosine scale every group alike"
    )


def test_top_counts_blocks_from_the_end_and_from_the_start():
    def trained(line):
        apply_strategy(line, model := network("vit_3d"))
        return {k for k, p in model.named_parameters() if p.requires_grad}
    blocks = len(block_names(network("vit_3d").backbone))
    assert trained(f"top k={blocks}") == trained("top from=1") and trained("top k=1") == trained(
        f"top from={blocks}"
    ) < trained("top k=2")
    own = [k for k, _ in network("vit_3d").named_parameters() if k.startswith("backbone.")]
    half, tenth = trained("decoder fraction=0.5"), trained("top fraction=0.1")
    assert [k for k in own if k in half] == own[len(own) // 2:]
    assert [k for k in own if k in tenth] == own[len(own) - round(0.1 * len(own)):]
    assert trained("top fraction=1") == trained("full")


@pytest.mark.parametrize("backbone", ["profound_toy", "provicnet_toy", "vit_3d"])
def test_dropped_blocks_are_passed_by(backbone):
    model, whole = network(backbone).eval(), network(backbone).eval()
    x = volume(model)
    apply_strategy("full drop=1", model)
    left = block_names(whole.backbone)[1:]
    gone = [n for n in left if not list(model.backbone.get_submodule(n).parameters())]
    seen = {}
    for n in left:
        whole.backbone.get_submodule(n).register_forward_hook(
            lambda m, given, out, n=n: (
                seen.update({n: given[0].shape == out.shape}) or (given[0] if given[0].shape == out.shape else None)
            )
        )
    with torch.no_grad(): assert torch.allclose(model(x), whole(x), atol=1e-6)
    assert gone == [n for n in left if seen[n]] and gone


# --- what the text says ---

def test_one_strategy_has_one_text_name_and_choice():
    spec = RunSpec(strategy="lora  targets=conv rank=8.0")
    assert spec.strategy == "lora rank=8 targets=conv" and run_id(spec) == run_id(
        replace(spec, strategy="lora rank=8 targets=conv")
    )
    assert run_id(spec).rpartition("-")[0] == "segmentation-profound_toy.mae_phantom-lora_rank=8_targets=conv-n24-s0"
    shipped = load_study("learning_rate")
    study = StudySpec(**{
        **vars(shipped), "leave_out": [], "backbones": [b for b in shipped.backbones if not b.endswith("random")],
        "strategies": ["scratch", "top   k=2", "lora targets=conv rank=8", "scratch drop=2"],
    })
    assert study.strategies == ["scratch", "top k=2", "lora rank=8 targets=conv", "scratch drop=2"]
    assert {s.strategy: bool(s.parent) for s in run_specs(study)} == {
        "scratch": False, "top k=2": True, "lora rank=8 targets=conv": True, "scratch drop=2": False,
    }
    assert parse_only("strategy=lora targets=conv rank=8,strategy=top k=2", study) == {
        "strategy": {"lora rank=8 targets=conv", "top k=2"}
    }
    jobs = jobs_of(study, "strategy=top k=2,kind=transfer")
    assert {s.strategy for j in jobs if j.kind == "transfer" for s in j.specs} == {"top k=2"}
    assert all(
        job_specs(j.kind, **job_parameters(study.name, list(j.specs))) == list(j.specs)
        for j in jobs_of(study)
        if j.kind == "transfer"
    )
    with pytest.raises(VfmError, match="without doubles"):
        StudySpec(**{**vars(study), "strategies": ["top k=2", "top  k=2"]})


@pytest.mark.parametrize(
    "line, told",
    [
        ("full dekay=0.5", "Did you mean 'decay'"), ("fool", "Did you mean 'full'"), ("full decay=0", "above 0 to 1"),
        ("full decay=2", "above 0 to 1"), ("top k=6", "has 5 blocks"), ("top k=0", "has 5 blocks"),
        ("top from=6", "has 5 blocks"), ("top k=1 from=2", "leave one"), ("top k=1.5", "expected a whole number"),
        ("top fraction=0", "above 0 to 1"), ("decoder fraction=1.01", "above 0 to 1"),
        ("decoder fraction=half", "expected a number"),
        ("lora targets=attention", "write targets=linear (linear: 10, conv"), ("lora rank=0", "at least 1"),
        ("lora alpha=0", "above 0"), ("lora targets=convs", "Did you mean 'conv'"),
        ("probe head=linaer", "Did you mean 'linear'"), ("knn k=0", "at least 1"), ("full drop=5", "has 5 blocks"),
        ("full drop=0", "has 5 blocks"), ("top k = 2", "option=value"), ("top k=1 k=2", "twice"),
        ("", "begin with a name"),
    ],
)
def test_a_wrong_line_is_told_in_one_sentence(line, told):
    with pytest.raises(VfmError, match=told.replace("(", r"\(")) as error: apply_strategy(line, network("profound_toy"))
    assert "\n" not in str(error.value)


def test_a_study_is_told_of_wrong_and_doubled_strategies():
    study = load_study("learning_rate")
    def check(*lines): study_names.check_names(replace(study, strategies=list(lines), leave_out=[]))
    check(*EVERY)
    for lines, told in (
        (("full", "full decay=1"), "are the same"), (("top", "top k=one"), "expected a whole number"),
        (("lora rnak=2",), "Did you mean 'rank'"),
    ):
        with pytest.raises(VfmError, match=f"Study 'learning_rate'.*{told}"): check(*lines)


def test_a_strategy_that_trains_nothing_is_refused():
    strategies("nothing", title="an example", pretrained=False)(lambda model: model.requires_grad_(False) and None)
    try:
        with pytest.raises(VfmError, match="trains no parameter"): apply_strategy("nothing", network("profound_toy"))
    finally: strategies._entries.pop("nothing"), strategies._cards.pop("nothing")


# --- a frozen encoder ---

@pytest.fixture(scope="module")
def problems():
    return {name: run_data(replace(SPEC, task=name)) for name in ("classification", "segmentation", "super_resolution")}


@pytest.mark.parametrize(
    "task_name, line",
    [
        ("classification", "probe"), ("classification", "decoder"), ("segmentation", "probe head=mlp"),
        ("super_resolution", "probe"), ("segmentation", "decoder"),
    ],
)
def test_features_once_equals_training_through_the_encoder(problems, task_name, line):
    task, data = problems[task_name]
    spec, ends = replace(SPEC, task=task_name, strategy="scratch"), []
    for once in (False, True):
        model = build_model(spec, task, 3)
        torch.manual_seed(0)
        apply_strategy(line, model)
        net, seen = cache_features(model, data) if once else (model, data)
        curves, _ = fit(net, task, training_batches(seen["train"], spec, ()), spec, lambda epoch: {})
        ends.append((
            curves.query("name == 'loss'").value.to_numpy(), predict(net, seen["test"].inputs),
            predict(model, data["test"].inputs),
        ))
    (loss, through, _), (quick, rows, plain) = ends
    np.testing.assert_allclose(loss, quick, rtol=2e-4)
    assert torch.allclose(through, rows, atol=2e-3, rtol=2e-3) and torch.allclose(rows, plain, atol=1e-4, rtol=1e-4)


def test_blocks_that_all_change_the_shape_cannot_be_dropped():
    with pytest.raises(VfmError, match="none of the blocks of backbone 'efficientnet_toy' after block 1"):
        apply_strategy("full drop=1", network("efficientnet_toy"))


def test_one_cache_serves_many_heads_and_rates(problems):
    task, data = problems["classification"]
    model = build_model(replace(SPEC, task="classification", strategy="scratch"), task, 3)
    apply_strategy("probe", model)
    calls = []
    model.backbone.get_submodule(block_names(model.backbone)[0]).register_forward_pre_hook(lambda *_: calls.append(1))
    net, seen = cache_features(model, data)
    used, losses = len(calls), {}
    for lr in (1e-3, 1e-2):
        head = CachedHead(ClassificationHead(model.backbone, 3), net.shapes)
        curves, _ = fit(
            head, task, training_batches(seen["train"], SPEC, ()), replace(SPEC, lr=lr, epochs=6), lambda epoch: {}
        )
        losses[lr] = curves.value.iloc[-1]
    assert used == len(calls) == 3 and losses[1e-2] < losses[1e-3]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_knn_equals_scikit_learn(problems, metric):
    task, data = problems["classification"]
    model = build_model(replace(SPEC, task="classification", strategy="scratch"), task, 3)
    apply_strategy(f"knn k=3 metric={metric}", model)
    net, seen = cache_features(model, data)
    model.head.remember(seen["train"].inputs, seen["train"].target)
    shares = predict(net, seen["test"].inputs).softmax(1)
    other = KNeighborsClassifier(3, metric=metric).fit(
        seen["train"].inputs.double().numpy(), data["train"].target.numpy()
    )
    wanted = other.predict_proba(seen["test"].inputs.double().numpy())
    np.testing.assert_allclose(shares[:, other.classes_].numpy(), wanted, atol=1e-4)
    with pytest.raises(VfmError, match="k=9 neighbours.*8 training cases"):
        apply_strategy(
            "knn k=9", model2 := build_model(replace(SPEC, task="classification", strategy="scratch"), task, 3)
        )
        model2.head.remember(seen["train"].inputs, seen["train"].target)
    dense, _ = problems["segmentation"]
    with pytest.raises(VfmError, match="answers with voxels"):
        apply_strategy("knn", build_model(replace(SPEC, strategy="scratch"), dense, 3))


def test_features_that_do_not_fit_in_memory_are_told(problems, monkeypatch):
    task, data = problems["classification"]
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    with pytest.raises(VfmError, match="GiB of memory"): cache_features(network("profound_toy"), data)


# --- low-rank updates ---

@pytest.mark.parametrize(
    "backbone, targets",
    [
        ("profound_toy", "linear"), ("profound_toy", "conv"), ("resnet18_3d", "conv"), ("vit_3d", "attention"),
        ("provicnet_toy", "linear"),
    ],
)
def test_merged_updates_are_the_network_that_was_trained(backbone, targets):
    model = network(backbone)
    names, shapes, x = list(model.state_dict()), [v.shape for v in model.state_dict().values()], volume(model)
    start = model.eval()(x)
    tuning = apply_strategy(f"lora alpha=8 rank=2 targets={targets}", model)
    assert torch.allclose(model.eval()(x), start, atol=1e-6), "an update starts at nothing"
    generator = torch.Generator().manual_seed(0)
    for k, p in model.named_parameters():
        if ".lora_B" in k: p.data = 0.02 * torch.randn(p.shape, generator=generator)
    tuned = model(x)
    tuning.finish(model)
    assert torch.allclose(model(x), tuned, rtol=1e-3, atol=1e-3) and not torch.allclose(
        tuned, start, rtol=1e-2, atol=1e-3
    )
    assert (
        list(model.state_dict()) == names
        and [v.shape for v in model.state_dict().values()] == shapes
        and not hasattr(model.backbone, "peft_config")
    )
    network(backbone).load_state_dict(model.state_dict())


# --- whole runs ---

@pytest.mark.parametrize(
    "line, task_name, backbone",
    [
        ("probe", "classification", "profound_toy"), ("knn k=3", "classification", "provicnet_toy"),
        ("decoder", "segmentation", "profound_toy"), ("lora rank=2 targets=attention", "segmentation", "provicnet_toy"),
        ("full decay=0.75 drop=2", "classification", "provicnet_toy"), ("top k=1", "segmentation", "profound_toy"),
    ],
)
def test_a_whole_run_and_its_stored_network(problems, line, task_name, backbone):
    task, data = problems[task_name]
    state = build_backbone(backbone, 3).state_dict()
    spec = replace(SPEC, task=task_name, strategy=line, backbone=f"{backbone}.x")
    one, two = transfer(spec, state), transfer(spec, state)
    assert one.cases.equals(two.cases) and all(np.array_equal(v, two.weights[k]) for k, v in one.weights.items())
    model = tuned_model(spec, task, 3, {k: torch.from_numpy(v) for k, v in one.weights.items()})
    again = task.evaluate(predict(model, data["test"].inputs), data["test"])
    np.testing.assert_allclose(again.value, one.cases.value[~one.cases.metric.str.startswith("control_")], atol=1e-3)
    frozen, moved = line.split()[0] in ("probe", "knn", "decoder"), max(row["mmd2"] for row in one.summary["d2p"])
    assert (moved < 1e-12) == frozen and any("augmented" in n for n in one.summary["notes"]) == frozen
    cost = one.summary["cost"]
    assert (cost["parameters"]["trainable"] == 0) == line.startswith("knn") and 0 <= cost["seconds"]["training"] < cost[
        "seconds"
    ]["total"]


def test_text_of_every_entry_survives_reading():
    for line in EVERY: assert canonical_strategy(line) == line and parse_strategy(line)[0] in strategies


@pytest.mark.parametrize("name,kinds", [("profound_toy", {"Linear"}), ("provicnet_toy", {"Linear"}),
                                        ("unet_toy", {"Conv3d"}), ("resnet18_3d", {"Conv3d"}),
                                        ("segresnet", {"Conv3d"})])
def test_lora_goes_where_the_weights_are(name, kinds):
    "By default: linear layers, convolutions, or both; and something of the encoder is trained."
    from vfm_notes.backbones.keys import build_tiny
    from vfm_notes.tune.strategy import lora_layers
    net = build_tiny(name, 3)
    chosen = lora_layers(net)["auto"]
    assert chosen and {type(net.get_submodule(k)).__name__ for k in chosen} == kinds
    model = Network(net, ClassificationHead(net, 2))
    tuning = apply_strategy("lora", model)
    assert 0 < sum(p.numel() for k, p in model.backbone.named_parameters() if p.requires_grad)
    assert all(".lora_" in k for k, p in model.backbone.named_parameters() if p.requires_grad) and not tuning.frozen
