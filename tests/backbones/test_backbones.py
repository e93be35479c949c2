"""The contract of every registered backbone, on its smallest version, and the published layouts."""
import json
import re

import pytest
import torch
from published import published_keys

pytest.importorskip("monai")
pytest.importorskip("transformers")
from vfm_notes.backbones.protocol import backbone_card, build_backbone, check_backbone, load_exact
from vfm_notes.backbones.keys import build_tiny
from vfm_notes.backbones.weights import normalisation, weights
from vfm_notes.data.loader import NORMALISATIONS
from vfm_notes.foundation.places import report_notebooks
from vfm_notes.foundation.registry import VfmError, backbones
from vfm_notes.tune import catalog

NAMES = list(backbones)


def volume(model, batch=2, cells=(2, 2, 2)):
    "A small volume that the backbone accepts, of `cells` coarsest cells."
    torch.manual_seed(1)
    return torch.randn(batch, model.in_channels, *(max(c * s, 2) for c, s in zip(cells, model.strides[-1])))


@pytest.fixture(
    scope="module",
    params=[(n, c) for n in NAMES for c in (1, 3)]
    + [(n, 2) for n in ("dinov2_small", "resnet50", "seem_focal_t", "double_3d")],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def model(request):
    torch.manual_seed(0)
    return build_tiny(*request.param)


def test_shapes_names_and_dtype(model):
    model.eval()
    with torch.no_grad(): seen = check_backbone(model, volume(model))
    assert seen["embed"] == (2, model.embed_dim)


def test_card(model):
    card = model.card
    assert card.name == model.name and card.title and card.source and card.licence and card.sequences
    assert card.normalisation in NORMALISATIONS and len(card.size) == len(card.spacing) == 3
    assert card == backbone_card(model.name)


def test_cases_do_not_mix(model):
    "A case's features do not depend on the other cases of the batch."
    model.eval()
    x = volume(model)
    with torch.no_grad(): assert torch.allclose(model.embed(x)[:1], model.embed(x[:1]), atol=1e-5)


def test_gradient_reaches_the_parameters_and_the_input(model):
    """All of them in a toy; published networks carry a few that these outputs do not use (a mask token, a pooling
    layer)."""
    model.train().zero_grad()
    x = volume(model).requires_grad_()
    (sum(m.square().mean() for m in model.pyramid(x)) + model.embed(x).square().mean()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    if model.card.toy: assert all(n.endswith("mask_token") for n in silent), silent
    assert len(silent) < 0.15 * len(list(model.parameters())), silent
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def test_masked_pyramid_ignores_hidden_voxels(model):
    model.eval()
    x = volume(model)
    keep = torch.ones(2, 1, *(s // t for s, t in zip(x.shape[2:], model.strides[-1])))
    keep[:, :, :, :1] = 0
    noisy = x.clone()
    noisy[:, :, :, :model.strides[-1][1]] = 7.
    with torch.no_grad():
        for a, b in zip(model.masked_pyramid(x, keep), model.masked_pyramid(noisy, keep)): assert torch.equal(a, b)


def test_same_seed_same_weights(model):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_tiny(model.name, model.in_channels).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_state_goes_round(model):
    torch.manual_seed(5)
    other = build_tiny(model.name, model.in_channels)
    load_exact(other, model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    with pytest.raises(VfmError, match="do not fit"): load_exact(other, {"nothing": torch.zeros(1)})


def test_wrong_input_is_refused(model):
    x = volume(model)
    with pytest.raises(VfmError, match=f"pass in_channels={2 * model.in_channels}"):
        model.embed(x.repeat(1, 2, 1, 1, 1))
    if getattr(model, "ragged", False):  # fills up at the edge by itself
        with torch.no_grad(): assert model.eval().embed(x[..., :-1]).shape == (len(x), model.embed_dim)
    else:
        with pytest.raises(VfmError, match=re.escape(f"write size: {list(x.shape[2:])} in")): model.embed(x[..., :-1])


@pytest.mark.parametrize("name", [n for n in NAMES if backbone_card(n).toy])
def test_build_with_a_state(name):
    model = build_backbone(name, 3)
    other = build_backbone(f"{name}.any_weights", 3, state=model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    with pytest.raises(VfmError, match="do not fit"): build_backbone(name, 3, state={"nothing": torch.zeros(1)})


def test_the_cards_of_the_report_are_up_to_date(tmp_path):
    catalog.write_cards(tmp_path/"cards.json")
    kept = report_notebooks()[0].parent/"backbones.json"
    assert (tmp_path / "cards.json").read_text(encoding="utf-8") == kept.read_text(encoding="utf-8"), (
        "run: python -c 'from vfm_notes.tune.catalog import write_cards; write_cards()'"
    )


def test_the_costs_of_the_report_are_measured_or_say_why_not():
    path = report_notebooks()[0].parent/"backbone_costs.json"
    for run in json.loads(path.read_text(encoding="utf-8")):
        assert run["device"] and run["date"] and run["versions"]["torch"] and run["seconds"] > 0 and run["gib"] > 0
        for row in run["rows"]:
            assert row["name"] in NAMES and row["card_size"] == list(backbone_card(row["name"]).size), row["name"]
            assert row["left_out"] or {"forward_s", "step_s", "step_mib"} <= set(row), row["name"]
            if "size" in row and row["size"] < row["card_size"]:
                assert row["left_out"], f"{row['name']}: a smaller size without a reason"


def test_the_weights_own_rule_comes_before_the_backbones():
    for name in weights: assert normalisation(name) in NORMALISATIONS, name
    assert [
        normalisation(n) for n in ("swin_unetr_48", "swin_unetr_48.ssl", "dinov2_base.rad_dino", "profound_toy.mae")
    ] == ["zscore_nonzero", "unit_range", "cohort", "zscore_nonzero"]


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(VfmError, match="profound_toy"): build_backbone("profund_toy.mae", 3)


def test_every_family_has_a_toy():
    families = {backbone_card(n).family for n in NAMES}
    assert families == {backbone_card(n).family for n in NAMES if backbone_card(n).toy}


@pytest.mark.parametrize("name", [n for n in NAMES if backbone_card(n).toy])
@pytest.mark.parametrize("size", [(12, 64, 64), (24, 48, 48), (4, 32, 80)])
def test_toys_take_other_sizes(name, size):
    model = build_backbone(name, 3).eval()
    size = [-(-s // t) * t for s, t in zip(size, model.strides[-1])]  # the next that it takes
    with torch.no_grad(): check_backbone(model, torch.randn(1, 3, *size))


def test_published_provicnet_keys():
    wanted = {k: v for k, v in published_keys("provicnet_plain_vits14reg_4class").items() if not k.startswith("head.")}
    with torch.device("meta"): net = build_backbone("provicnet_small", 1)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == wanted


def test_published_profound_keys_with_prefix():
    wanted = {k: v for k, v in published_keys("profound_classification_risk").items() if not k.startswith("head.")}
    with torch.device("meta"): net = build_backbone("profound_tiny", 3)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == wanted
