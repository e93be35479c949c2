"""The contract of every registered objective, and masked reconstruction and patch contrast against slow explicit
computations."""
import math

import numpy as np
import pytest
import torch
from published import published_keys
from torch.nn import functional as F

import vfm_notes.backbones.natural
import vfm_notes.backbones.volumetric
import vfm_notes.pretrain.reconstruction
import vfm_notes.pretrain.reconstruction
import vfm_notes.pretrain.contrast as contrast
import vfm_notes.pretrain.diffusion
import vfm_notes.pretrain.distillation
import vfm_notes.pretrain.reconstruction as reconstruction
import vfm_notes.pretrain.distillation
import vfm_notes.pretrain.contrast
from vfm_notes.backbones.profound import profound_toy
from vfm_notes.backbones.provicnet import provicnet_toy
from vfm_notes.foundation.registry import VfmError, backbones, objectives
from vfm_notes.foundation.spec import PretrainSpec
from vfm_notes.nets.convnext3d import enlarge_mask
from vfm_notes.pretrain.loop import pretrain, pretraining_batches
from vfm_notes.pretrain.trainer import parameter_groups, lr_factor

SIZE = (4, 32, 32)
BACKBONES = {
    "profound_toy": (profound_toy, SIZE), "provicnet_toy": (provicnet_toy, SIZE),
    "lifted": (backbones["efficientnet_toy"], SIZE),
    "volumetric": (lambda: backbones["segresnet"](3, tiny=True), (8, 16, 16)),
    "picture": (backbones["efficientnet_toy"], (1, 32, 32)),
}
PLAIN_TRANSFORMERS = {"provicnet_toy"}


def batch(n=2, size=SIZE):
    "Noise with a bright block, labelled 1, with a brighter one in it, labelled 2, in another place in every case."
    torch.manual_seed(5)
    labels, (d, h, w) = torch.zeros(n, *size, dtype=torch.uint8), size
    labels[:, d // 4:, h // 8:7 * h // 8, w // 8:7 * w // 8] = 1
    for i in range(n):
        labels[i, d // 4:max(3 * d // 4, 1), h // 4:5 * h // 8, w // 4 + i % 2 * w // 8:5 * w // 8 + i % 2 * w // 8] = 2
    return {"volumes": labels[:, None] + 0.3 * torch.randn(n, 3, *size), "labels": labels}


def fits(name, backbone): return name != "masked_tokens" or backbone in PLAIN_TRANSFORMERS


@pytest.fixture(params=[(o, b) for o in objectives for b in BACKBONES if fits(o, b)], ids="-".join)
def made(request):
    "An objective on a backbone, and a batch."
    torch.manual_seed(0)
    make, size = BACKBONES[request.param[1]]
    return objectives[request.param[0]](make()), batch(size=size)


def reached(backbone, result):
    "Parameters that a result depends on."
    named = dict(backbone.named_parameters())
    grads = torch.autograd.grad(result.square().sum(), list(named.values()), allow_unused=True)
    return {n for n, g in zip(named, grads) if g is not None and g.abs().sum() > 0}


def test_loss_is_finite_and_trains_the_backbone(made):
    objective, data = made
    backbone = objective.backbone
    wanted = reached(backbone, backbone.pyramid(data["volumes"])[-1]) & reached(
        backbone, backbone.embed(data["volumes"])
    )
    loss, parts = objective.loss(data)
    assert loss.ndim == 0 and torch.isfinite(loss) and all(math.isfinite(v) for v in parts.values())
    moved = reached(backbone, loss)
    assert len(wanted) > 10 and not wanted - moved


def test_loss_repeats_with_the_seed(made):
    objective, data = made
    objective.eval()
    values = []
    for _ in range(2):
        torch.manual_seed(7)
        values.append(objective.loss(data)[0].item())
    assert values[0] == values[1]


def test_pictures_are_volumes(made):
    objective, data = made
    objective.eval()
    pictures = objective.pictures(data)
    assert "input" in pictures and all(
        isinstance(v, np.ndarray) and v.shape == data["labels"].shape[1:] and np.isfinite(v).all()
        for v in pictures.values()
    )


def test_some_steps_lower_the_loss(made):
    "With the same masks, views and noise in every step."
    objective, data = made
    optimiser, values = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3), []
    for _ in range(8):
        torch.manual_seed(1)
        loss, _ = objective.loss(data)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        values.append(loss.item())
    assert min(values[4:]) < values[0]


def test_every_family_is_there():
    assert {objectives.card(n)["family"] for n in objectives} == {
        "reconstruction", "contrast", "adversarial", "diffusion", "supervised",
    }


@pytest.mark.parametrize("name", ["profound_toy", "lifted", "volumetric"])
def test_masked_tokens_refuses_encoders_without_tokens(name):
    with pytest.raises(VfmError, match="no plain transformer.*use masked_reconstruction"):
        objectives["masked_tokens"](BACKBONES[name][0]())


def test_unlabelled_batches():
    with pytest.raises(VfmError, match="guided by labels and the batch has none"):
        objectives["patch_contrast"](provicnet_toy()).loss({"volumes": batch()["volumes"]})


def test_objectives_that_compare_cases_say_so():
    whole = {n for n in objectives if getattr(objectives[n], "whole_batches", False)}
    assert whole == {"nt_xent", "self_distillation"}
    # the loss of a batch is the mean of its cases'; patch_contrast weighs classes, diffusion draws steps, a Dice is one
    # of the batch
    for name in set(objectives) - whole - {"patch_contrast", "diffusion", "task"}:
        torch.manual_seed(0)
        objective, data, losses = objectives[name](provicnet_toy()).eval(), batch(2), []
        keep = torch.ones(2, 1, 4, 4, 4)
        keep[0, 0, :, 1:, :2] = keep[1, 0, :, :3, 1:3] = 0
        for part in (slice(0, 2), slice(0, 1), slice(1, 2)):
            objective.keep = lambda x, part=part: keep[part]
            losses.append(objective.loss({k: v[part] for k, v in data.items()})[0].item())
        assert math.isclose(losses[0], (losses[1] + losses[2]) / 2, rel_tol=1e-5), name


# masked reconstruction

def test_random_keep_hides_the_asked_share_of_every_case():
    for ratio in (0.01, 0.25, 0.6, 0.99):
        keep = reconstruction.random_keep(50, (3, 4, 4), ratio)
        assert ((1 - keep).flatten(1).sum(1) == round(48 * ratio)).all()
    keep = reconstruction.random_keep(4000, (1, 2, 2), 0.5).flatten(1).mean(0)
    assert (keep - 0.5).abs().max() < 0.05  # every patch equally often


def test_reconstruction_loss_by_explicit_loop():
    torch.manual_seed(0)
    objective, x = reconstruction.MaskedReconstruction(profound_toy()).eval(), batch()["volumes"]
    torch.manual_seed(3); loss = objective.loss({"volumes": x})[0]
    torch.manual_seed(3); keep = objective.keep(x)
    prediction, (pd, ph, pw), errors = objective(x, keep), (4, 16, 16), []
    for b, _, z, y, w in (keep == 0).nonzero().tolist():
        patch = x[b, :, z * pd:(z + 1) * pd, y * ph:(y + 1) * ph, w * pw:(w + 1) * pw]
        patch = patch.permute(1, 2, 3, 0).reshape(-1)  # channel fastest
        target = (patch - patch.mean()) / torch.sqrt(patch.var(unbiased=True) + 1e-6)
        errors.append(((prediction[b, :, z, y, w] - target) ** 2).mean())
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-5)


def test_published_decoder_layout():
    from vfm_notes.backbones.profound import profound_tiny
    wanted = {k: v for k, v in published_keys("profound_fcmae_pretrain").items() if not k.startswith("encoder.")}
    with torch.device("meta"): objective = reconstruction.MaskedReconstruction(profound_tiny(), kernel=7)
    assert {k: list(v.shape) for k, v in objective.state_dict().items() if not k.startswith("backbone.")} == wanted


def test_larger_blocks_are_hidden_together():
    objective = reconstruction.MaskedReconstruction(provicnet_toy(), patch=(4, 16, 16))
    keep = objective.keep(torch.zeros(3, 3, 8, 64, 64))
    assert keep.shape == (3, 1, 8, 8, 8)
    blocks = keep.reshape(3, 2, 4, 4, 2, 4, 2)
    assert torch.equal(blocks.amax((2, 4, 6)), blocks.amin((2, 4, 6)))


@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.6, 0.9])
@pytest.mark.parametrize(
    "make,size,patches",
    [
        (profound_toy, (8, 64, 64), (None, (8, 16, 16), (4, 32, 16), (4, 64, 16))),
        (provicnet_toy, (2, 40, 48), (None, (2, 8, 16), (1, 40, 8))),
        (backbones["efficientnet_toy"], (1, 128, 96), (None, (1, 64, 32), (1, 32, 96))),
    ],
    ids=["volumes", "slices", "picture"],
)
def test_any_patch_and_any_ratio(make, size, patches, ratio):
    """As many whole blocks are hidden as the ratio asks for, nothing of them is seen, and a mask of all or nothing is
    refused."""
    torch.manual_seed(0)
    backbone, x = make(), torch.randn(2, 3, *size)
    for patch in patches:
        objective = reconstruction.MaskedReconstruction(backbone, mask_ratio=ratio, patch=patch).eval()
        per = math.prod(b // c for b, c in zip(objective.patch, objective.cell))
        blocks = math.prod(s // b for s, b in zip(size, objective.patch))
        if not 0 < round(blocks * ratio) < blocks:
            with pytest.raises(VfmError, match="choose another ratio or a smaller patch"): objective.keep(x)
            continue
        keep = objective.keep(x)
        assert ((keep == 0).flatten(1).sum(1) == per * round(blocks * ratio)).all()
        seen = enlarge_mask(keep, x.shape[2:])
        with torch.no_grad(): assert torch.equal(objective(x, keep), objective(x * seen - 7 * (1 - seen), keep))


@pytest.mark.parametrize(
    "options", [{"mask_ratio": 0}, {"mask_ratio": 1}, {"mask_ratio": -2.5}, {"patch": 5}, {"patch": (0, 16, 16)}]
)
def test_bad_reconstruction_options(options):
    with pytest.raises(VfmError, match="Masking"): reconstruction.MaskedReconstruction(profound_toy(), **options)


def test_patch_that_does_not_divide_the_volume():
    objective = reconstruction.MaskedReconstruction(profound_toy(), patch=(4, 32, 32))
    with pytest.raises(VfmError, match="divide"): objective.loss({"volumes": torch.zeros(1, 3, 4, 48, 48)})
    with pytest.raises(VfmError, match="nothing would be visible"):
        objective.loss({"volumes": torch.zeros(1, 3, 4, 32, 32)})


# patch contrast

def brute_force_pairs(share, high, low):
    "Positive and negative pairs of tile coordinates, tile by tile."
    b, d, h, w = share.shape
    inside, positive, negative = (lambda y, x: 0 <= y < h and 0 <= x < w), set(), set()
    for i in range(b):
        for z in range(d):
            for y in range(h):
                for x in range(w):
                    if share[i, z, y, x] < high: continue
                    for dy in (-1, 0, 1):
                        for dx in (-1, 0, 1):
                            if dy == dx == 0: continue
                            near, far = (y + dy, x + dx), (y + 2 * dy, x + 2 * dx)
                            number = lambda p: ((i * d + z) * h + p[0]) * w + p[1]
                            if inside(*near) and share[i, z][near] >= high: positive.add((number((y, x)), number(near)))
                            if inside(*far) and share[i, z][near] <= low and share[i, z][far] <= low:
                                negative.add((number((y, x)), number(far)))
    return positive, negative


def test_pairs_by_brute_force():
    torch.manual_seed(2)
    share = torch.rand(2, 3, 7, 6) * (torch.rand(2, 3, 7, 6) > 0.6)
    positive, negative = contrast.find_pairs(share, 0.5, 2 / 64)
    wanted = brute_force_pairs(share, 0.5, 2 / 64)
    for got, want in zip((positive, negative), wanted):
        assert len(want) > 5 and got.shape[1] == len(want) and set(map(tuple, got.T.tolist())) == want


def test_tile_shares_by_slicing():
    labels = torch.randint(0, 4, (2, 4, 16, 24))
    share = contrast.tile_shares(labels, 2, (2, 8, 8))
    assert share[1, 0, 1, 2] == (labels[1, :2, 8:16, 16:24] >= 2).float().mean()


def test_contrast_loss_by_brute_force():
    torch.manual_seed(0)
    objective, data = contrast.PatchContrast(provicnet_toy(), pairs=10 ** 6), batch(size=(4, 64, 64))
    tokens = torch.randn(2, 64, 4, 8, 8)
    loss, n = objective.tiles(tokens, data["labels"])
    assert n > 0
    share = contrast.tile_shares(data["labels"], 2, (1, 8, 8))
    positive, negative = brute_force_pairs(share, 0.3, 2 / 64)
    assert n == min(len(positive), len(negative))
    z = objective.tiles.projection(tokens.permute(0, 2, 3, 4, 1).reshape(-1, 64))
    cos = lambda p: (z[p[0]] @ z[p[1]] / z[p[0]].norm() / z[p[1]].norm()).item()
    pull, push = [1 - cos(p) for p in positive], [max(0, cos(p) - 0.5) for p in negative]
    if len(positive) == len(negative): assert math.isclose(loss.item(), sum(pull + push) / (2 * n), rel_tol=1e-4)
    balanced = lambda a, b: sum(sorted(a)[:n]) / n + sum(sorted(b)[:n]) / n
    assert (
        balanced(pull, push) / 2 - 1e-4 <= loss.item() <= -balanced([-v for v in pull], [-v for v in push]) / 2 + 1e-4
    )


def test_no_lesion_no_contrast():
    objective, data = contrast.PatchContrast(provicnet_toy(), a=0.5), batch()
    data["labels"].clamp_(max=1)
    loss, parts = objective.loss(data)
    assert (
        parts["pairs"] == 0
        and parts["contrast"] == 0
        and math.isclose(loss.item(), 0.5 * parts["dice_ce"], rel_tol=1e-5)
    )
    loss.backward()


def test_projection_is_not_trained():
    objective = contrast.PatchContrast(provicnet_toy())
    before = [p.clone() for p in objective.tiles.projection.parameters()]
    optimiser = torch.optim.AdamW([g for g in parameter_groups(objective, 0.1)], lr=0.1)
    objective.loss(batch())[0].backward(); optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, objective.tiles.projection.parameters()))
    norms = objective.tiles.projection.last.weight.norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6)


def test_dice_ce_equals_monai():
    from monai.losses import DiceCELoss
    scores, labels = torch.randn(2, 3, 4, 8, 8), torch.randint(0, 3, (2, 4, 8, 8))
    wanted = DiceCELoss(softmax=True, to_onehot_y=True)(scores, labels[:, None])
    assert torch.allclose(contrast.dice_ce(scores, labels, torch.ones(3)), wanted, atol=1e-5)
    weights = torch.tensor([0.1, 0.2, 0.9])
    cross = F.cross_entropy(scores, labels, weights)
    assert torch.allclose(contrast.dice_ce(scores, labels, 7 * weights), contrast.dice_ce(scores, labels, weights))
    assert contrast.dice_ce(scores, labels, weights) > cross


@pytest.mark.parametrize(
    "options",
    [
        {"a": -0.1}, {"a": 1.1}, {"anchor_share": 0}, {"clear_share": 0.5}, {"pairs": 0}, {"anchor_class": 3},
        {"class_weights": (1.0,)},
    ],
)
def test_bad_contrast_options(options):
    with pytest.raises(VfmError, match="patch_contrast"): contrast.PatchContrast(provicnet_toy(), **options)


def test_more_classes_than_weights():
    data = batch()
    data["labels"][0, 0, 0, 0] = 5
    with pytest.raises(VfmError, match="class_weights"): contrast.PatchContrast(provicnet_toy()).loss(data)


# the loop

def test_rate_warms_up_and_ends_at_zero():
    rates = [lr_factor(t, 200, 0.1) for t in range(200)]
    assert (
        rates[0] == 0.05
        and rates[19] == 1
        and rates == rates[:20] + sorted(rates[20:], reverse=True)
        and rates[-1] < 1e-3
    )
    assert lr_factor(0, 1, 0.) == 1


def test_batches_show_every_case_once():
    volumes = torch.arange(9.).reshape(9, 1, 1, 1, 1)
    seen = torch.cat([
        b["volumes"] for b in pretraining_batches(volumes, None, tiny_spec(batch_size=3)).epoch(1)
    ]).flatten()
    assert sorted(seen.tolist()) == list(range(9))
    assert len(list(pretraining_batches(volumes, None, tiny_spec(batch_size=4)).epoch(1))) == 2


def tiny_spec(**changes):
    return PretrainSpec(**{
        **dict(size=SIZE, epochs=2, batch_size=2, backbone="provicnet_toy.test", objective="patch_contrast"), **changes,
    })


def test_pretrain_is_a_function_of_its_spec():
    data = batch(4)
    run = lambda seed: pretrain(tiny_spec(seed=seed), data["volumes"], data["labels"], 3)
    a, b, c = run(0), run(0), run(1)
    states = [r.backbone.state_dict() for r in (a, b, c)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])
    assert a.curves.drop(columns="seconds").equals(b.curves.drop(columns="seconds"))
    assert set(a.curves.epoch) == {0, 1, 2} and set(a.curves.name) == {"loss", "dice_ce", "contrast", "pairs"}
    assert (
        a.cost["seconds"]["total"] > a.cost["seconds"]["training"] > a.cost["seconds"]["waiting"] > 0
        and a.cost["memory_mib"]["host"] > 0
        and a.pictures
    )


def test_pretrain_leaves_the_volumes_alone_and_reports():
    data, told = batch(4), []
    before = data["volumes"].clone()
    pretrain(tiny_spec(objective="masked_reconstruction"), data["volumes"], None, 3, lambda *a: told.append(a))
    assert torch.equal(before, data["volumes"])
    assert [t[:2] for t in told] == [(1, 2), (2, 2)] and {"loss", "seconds", "left"} <= told[-1][2].keys()


def test_pretrain_refuses():
    data = batch(4)
    run = lambda volumes=data["volumes"], **changes: pretrain(tiny_spec(**changes), volumes, data["labels"], 3)
    with pytest.raises(VfmError, match="fewer than a batch"): run(batch_size=8)
    with pytest.raises(VfmError, match="not finite"): run(torch.full_like(data["volumes"], torch.nan))
    with pytest.raises(VfmError, match="Did you mean"): run(objective="patch_contrst")
    with pytest.raises(VfmError, match="has no option 'alpha'"): run(options={"alpha": 1})
    with pytest.raises(VfmError, match="channels"): run(data["volumes"][:, :1])
    with pytest.raises(VfmError, match="became nan"): run(data["volumes"] * 1e30)
