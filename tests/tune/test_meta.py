"""Nothing is made on the wrong device: everything that a step computes runs on the meta device, where mixing is an error."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("monai")
pytest.importorskip("transformers")
from test_tasks import SPEC
from vfm_notes.backbones.keys import build_tiny
from vfm_notes.data.augment import AUGMENTATIONS
from vfm_notes.foundation.registry import backbones, objectives, strategies, tasks
from vfm_notes.tune import catalog  # noqa: F401 (fills the registries)
from vfm_notes.tune.strategy import apply_strategy
from vfm_notes.tune.transfer import build_model, run_data

# which voxels, tokens or answers take part is read off the values, which meta tensors do not have; a GPU waits for it
READS_VALUES = {"masked_tokens", "patch_contrast", "ordinal"}
BATCHES = {"profound_toy": (4, 32, 32), "resenc_toy": (16, 32, 32), "provicnet_toy": (4, 32, 32)}


class OneDevice(TorchDispatchMode):
    "Refuse operations on tensors of two devices: convolutions and matrix products do not look on the meta device."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        places = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()}
        if len(places) > 1 and not func.__name__.startswith(
            ("index", "_to_copy", "copy_")
        ):  # places may lie on the CPU
            raise RuntimeError(f"{func} got tensors on {' and '.join(sorted(places))}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_device(request):
    if "prepared" in request.fixturenames:
        request.getfixturevalue("prepared")
    with OneDevice():
        yield


@pytest.fixture
def numbers(monkeypatch):
    "Where a step reads a number (a check of labels, a loss for the curves), a meta tensor gives one."
    for name, value in (("item", 0.5), ("__bool__", False), ("__int__", 0), ("__float__", 0.5)):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, real=real, value=value: value if t.is_meta else real(t))
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: torch.zeros(t.shape).tolist() if t.is_meta else real(t))
    made = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": made("cpu" if str(device) == "meta" else device))


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_meta_tensors_do_not_mix():
    "What this file rests on."
    with pytest.raises(RuntimeError):
        meta(2, 3) + torch.ones(2, 3)
    for layer in (torch.nn.Conv3d(1, 1, 3), torch.nn.Linear(4, 2)):
        with pytest.raises(RuntimeError, match="cpu and meta"):
            layer(meta(1, 1, 4, 4, 4))
    with pytest.raises(RuntimeError):
        torch.einsum("ab,b->a", meta(2, 3), torch.ones(3))


@pytest.mark.parametrize("name", list(backbones))
def test_backbone(name):
    model = build_tiny(name, 1).train().to("meta")
    x = meta(2, 1, *(max(2 * s, 2) for s in model.strides[-1]))
    keep = meta(2, 1, *(s // t for s, t in zip(x.shape[2:], model.strides[-1])))
    given = [
        *model.pyramid(x),
        model.embed(x),
        *model.layers(x).values(),
        model.tokens(x),
        *model.masked_pyramid(x, keep),
    ]
    assert all(v.is_meta for v in given)
    given[0].sum().backward()


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_augmentation(name, numbers):
    batch = {"inputs": meta(2, 3, 4, 16, 16), "target": meta(2, 4, 16, 16, dtype=torch.uint8)}
    out = AUGMENTATIONS[name](batch, np.random.default_rng(0))
    assert all(v.is_meta and v.shape == batch[k].shape and v.dtype == batch[k].dtype for k, v in out.items())


@pytest.mark.parametrize("backbone", BATCHES)
@pytest.mark.parametrize("name", [o for o in objectives if o != "task"])
def test_objective(name, backbone, numbers):
    if name == "masked_tokens" and backbone != "provicnet_toy":
        pytest.skip("for plain transformers")
    objective, size = objectives[name](backbones[backbone](3)).to("meta"), BATCHES[backbone]
    batch = {"volumes": meta(2, 3, *size), "labels": meta(2, *size, dtype=torch.uint8)}
    if name in READS_VALUES:
        with pytest.raises(NotImplementedError, match="nonzero"):
            objective.loss(batch)
        return
    loss, _ = objective.loss(batch)
    assert loss.is_meta
    loss.backward()
    if hasattr(objective, "after_step"):
        objective.after_step()


@pytest.fixture(scope="module")
def prepared():
    return {name: run_data(replace(SPEC, task=name, backbone="profound_toy.x")) for name in tasks}


@pytest.mark.parametrize("backbone", ["profound_toy.x", "provicnet_toy.x"])
@pytest.mark.parametrize("name", list(tasks))
def test_head_and_loss_and_what_is_scored(name, backbone, numbers, prepared):
    "Scores are computed from outputs that were brought back to the CPU."
    task, data = prepared[name]
    model = build_model(replace(SPEC, task=name, backbone=backbone), task, len(task.card.sequences)).to("meta")
    output, target = model(data["train"].inputs[:4].to("meta")), data["train"].target[:4].to("meta")
    if name in READS_VALUES:
        with pytest.raises(NotImplementedError, match="nonzero"):
            task.loss(output, target)
        return
    loss = task.loss(output, target)
    assert loss.is_meta
    loss.backward()


@pytest.mark.parametrize("line", [s for s in strategies if s != "knn"] + ["lora rank=2 targets=all", "top k=1"])
def test_strategy_step(line, numbers, prepared):
    task, data = prepared["segmentation"]
    model = build_model(replace(SPEC, task="segmentation", strategy="scratch"), task, len(task.card.sequences))
    apply_strategy(line, model)
    model.to("meta")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, 1e-3)
    task.loss(model(data["train"].inputs[:2].to("meta")), data["train"].target[:2].to("meta")).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimiser.step()
    assert trained and all(p.is_meta for p in trained)
