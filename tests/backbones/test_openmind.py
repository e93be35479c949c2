"""ResEnc-L and Primus-M against published key lists, the field's own package where it is there, and made files."""

import json
import re
import warnings
from functools import partial

import pytest
import torch
from published import published_keys
from safetensors import safe_open
from torch.nn import functional as F

import vfm_notes.backbones.openmind as o
from vfm_notes.backbones.keys import build_tiny, check_weights_file, compare_keys, load_backbone
from vfm_notes.backbones.weights import fetch_weights, weights, weights_card, weights_origin
from vfm_notes.foundation.registry import VfmError, backbones
from vfm_notes.nets.nnssl import read_once
from vfm_notes.nets.primus import Primus, fit_primus_positions, rotary_table, rotate
from vfm_notes.nets.resenc import ResidualEncoder

OPENMIND = [n for n in weights if n.startswith(("resenc_l.", "primus_m."))]


def meta(keys):
    return {k: torch.empty(s, device="meta") for k, s in keys.items()}


def shapes(state):
    return {k: tuple(v.shape) for k, v in state.items()}


def test_seven_objectives_each():
    assert len([n for n in OPENMIND if n.startswith("resenc_l.")]) == 7 == len(OPENMIND) - 7
    for n in OPENMIND:
        card = weights_card(n)
        assert (
            card.licence == "CC-BY-4.0" and "keys inferred" in card.note and card.file.endswith("checkpoint_final.pth")
        )
        assert bool(card.hub) == ("not established" not in card.note), n


@pytest.mark.parametrize("listed", ["openmind_resencl_encoder", "openmind_resencl_full"])
def test_every_published_tensor_of_resenc_l_is_read_once(listed):
    keys = published_keys(listed)
    if listed.endswith("encoder"):
        assert len(keys) == 448 and len(read_once(meta(keys))) == 224
    else:
        assert len(keys) == 956
    with torch.device("meta"):
        own = backbones["resenc_l"]()
    found = weights["resenc_l.mae"](meta(keys))
    assert len(found) == 224 and shapes(found) == shapes(own.state_dict())
    assert sum(p.numel() for p in own.parameters()) == 90_296_576


@pytest.mark.parametrize("listed", ["openmind_primusm_encoder", "openmind_primusm_full"])
@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_every_published_tensor_of_primus_m_is_read(listed, prefix):
    keys = {prefix + k: s for k, s in published_keys(listed).items()}
    with torch.device("meta"):
        own = backbones["primus_m"]()
    found = weights["primus_m.mae"](meta(keys))
    assert shapes(found) == shapes(own.state_dict())
    left = {k.removeprefix(prefix) for k in keys} - {k.removeprefix("encoder.model.") for k in found}
    assert all(k == "mask_token" or k.startswith("up_projection.") for k in left)
    assert sum(p.numel() for p in own.parameters()) == 150_554_304 + 443_232


# ---- the field's own package ----------------------------------------------------------------------------------------

SMALL = dict(widths=(4, 8, 8, 12), blocks=(1, 2, 1, 2), strides=(1, 2, 2, 2))


def published_unet(widths, blocks, strides):
    pytest.importorskip(
        "dynamic_network_architectures.architectures.unet",
        exc_type=ImportError,
        reason="dynamic-network-architectures is not installed",
    )
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    n = len(widths)
    return ResidualEncoderUNet(
        1,
        n,
        widths,
        torch.nn.Conv3d,
        [[3] * 3] * n,
        [[s] * 3 for s in strides],
        blocks,
        1,
        [1] * (n - 1),
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs=dict(eps=1e-5, affine=True),
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs=dict(inplace=True),
    ).eval()


def test_residual_encoder_gives_the_outputs_of_the_published_class():
    "Stage 3 keeps its width and strides: pooling alone on the way around."
    torch.manual_seed(0)
    whole, own = published_unet(**SMALL), ResidualEncoder(**SMALL).eval()
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=0.3)
    state = {
        k.removeprefix("encoder."): v for k, v in read_once(whole.state_dict()).items() if k.startswith("encoder.")
    }
    own.load_state_dict(state)
    x = torch.randn(2, 1, 16, 24, 8)
    with torch.no_grad():
        pairs = list(zip(own(x), whole.encoder(x), strict=True))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


def test_random_weights_are_drawn_as_published():
    "The same spread of every tensor; a block begins as its skip."
    whole, own = published_unet(**SMALL), ResidualEncoder(**SMALL)
    whole.apply(whole.initialize)
    for k, v in read_once(whole.encoder.state_dict()).items():
        a, b = own.state_dict()[k], v
        if a.numel() > 500:
            assert 0.8 < a.std() / b.std() < 1.25, k
        if k.endswith(("norm.weight", "norm.bias")):
            assert torch.equal(a, b), k


def test_primus_gives_the_outputs_of_the_published_class():
    primus = pytest.importorskip(
        "dynamic_network_architectures.architectures.primus",
        exc_type=ImportError,
        reason="dynamic-network-architectures and timm are not installed",
    )
    torch.manual_seed(0)
    whole = primus.Primus(
        1, 48, (4, 4, 4), 1, 3, 4, (8, 12, 16), drop_path_rate=0.2, init_values=0.1, scale_attn_inner=True
    ).eval()
    own = Primus(48, 3, 4, 4, 2).eval()
    state = {k: v for k, v in whole.state_dict().items() if k.startswith(("eva.", "down_projection."))}
    own.eva.pos_embed = torch.nn.Parameter(state["eva.pos_embed"].clone())  # this one is no cube
    own.load_state_dict(state)
    x = torch.randn(2, 1, 8, 12, 16)
    with torch.no_grad():
        wanted = whole.eva(whole.down_projection(x).flatten(2).mT)[0]
        with pytest.MonkeyPatch.context() as m:
            m.setattr("vfm_notes.nets.primus.fit_primus_positions", lambda table, grid: table)
            found = own(x)[-1].flatten(2).mT
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


# ---- parts against a calculation by hand ----------------------------------------------------------------------------


def test_rotation_is_a_product_of_complex_numbers():
    torch.manual_seed(0)
    grid, dim = (2, 3, 2), 12
    x = torch.randn(1, 2, 12, dim, dtype=torch.float64)
    found, n = rotate(x, tuple(t.double() for t in rotary_table(grid, dim))), 0
    for d in range(2):
        for h in range(3):
            for w in range(2):
                pairs = torch.view_as_complex(x[:, :, n].reshape(1, 2, dim // 2, 2))
                angles = torch.tensor([p * 10000 ** (-i / 2) for p in (d, h, w) for i in range(2)], dtype=torch.float64)
                turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
                assert torch.allclose(found[:, :, n], turned, atol=1e-6), (d, h, w)
                n += 1


def test_positions_of_another_grid():
    table = torch.randn(1, 27, 5)
    assert torch.equal(fit_primus_positions(table, (3, 3, 3)), table)
    found = fit_primus_positions(table, (2, 4, 3)).reshape(2, 4, 3, 5)
    wanted = F.interpolate(table.reshape(1, 3, 3, 3, 5).permute(0, 4, 1, 2, 3), (2, 4, 3), mode="trilinear")
    assert torch.allclose(found, wanted[0].permute(1, 2, 3, 0), atol=1e-6)


@pytest.mark.parametrize("name", ["resenc_l", "primus_m"])
def test_three_sequences_start_as_the_first_layer_repeated_and_divided(name):
    torch.manual_seed(0)
    one, three = build_tiny(name, 1).eval(), build_tiny(name, 3).eval()
    three.load_state_dict(one.state_dict(), strict=False)
    first = next(m for m in one.modules() if isinstance(m, torch.nn.Conv3d))
    x = torch.randn(1, 3, 16, 16, 16)
    with torch.no_grad():
        found, weight = three.embed(x), first.weight.data
        first.weight.data = weight.repeat(1, 3, 1, 1, 1) / 3
        one.channels = torch.nn.Identity()
        one.in_channels = 3
        first.in_channels = 3
        assert torch.allclose(found, one.embed(x), atol=1e-5)


# ---- made files -----------------------------------------------------------------------------------------------------

PREFIXES = {  # weights → the prefixes that its trainer writes into the plan
    "resenc_l.mae": ("ResEncL", "encoder.stages", "encoder.stem"),
    "resenc_l.s3d": ("ResEncL", "encoder.stages", "encoder.stem"),
    "primus_m.mae": ("PrimusM", "eva", "down_projection"),
    "primus_m.voco": ("PrimusM", "encoder.eva", "encoder.down_projection"),
}


def published_file(name, seed=0):
    "A checkpoint as nnssl's publishing step leaves it, of the tiny network."
    torch.manual_seed(seed)
    kind, body, stem = PREFIXES[name]
    heads = dict(zip(("stages", "stem") if kind == "ResEncL" else ("eva", "down_projection"), (body, stem)))
    own = {
        k.removeprefix("encoder.model."): torch.randn_like(v)
        for k, v in build_tiny(name.split(".")[0]).state_dict().items()
    }
    state = {heads[k.split(".")[0]] + k[len(k.split(".")[0]) :]: v for k, v in own.items()}
    if kind == "ResEncL":
        state |= {
            re.sub(r"\.conv\.(\w+)$", r".all_modules.0.\1", re.sub(r"\.norm\.(\w+)$", r".all_modules.1.\1", k)): v
            for k, v in state.items()
        }
        state |= {f"decoder.{k}": v for k, v in state.items()} | {
            "decoder.seg_layers.0.weight": torch.ones(1, 4, 1, 1, 1)
        }
    subjects = {"sub-01": {"sessions": {}}, "sub-02": {}}
    content = {
        "network_weights": state,
        "trainer_name": "SomeTrainer",
        "citations": ["one"],
        "init_args": {
            "pretrain_json": {
                "collection_name": "OpenMind",
                "datasets": {
                    "ds000228": {"name": "ds000228", "subjects": subjects},
                    "ds002385": {"subjects": {"7": {}}},
                },
            }
        },
        "nnssl_adaptation_plan": {
            "architecture_plans": {"arch_class_name": kind, "arch_kwargs": {}},
            "pretrain_num_input_channels": 1,
            "pretrain_plan": {"configurations": {"onemmiso": {"patch_size": [160] * 3, "spacing": [1, 1, 1]}}},
            "recommended_downstream_patchsize": [160] * 3,
            "key_to_encoder": body,
            "key_to_stem": stem,
            "keys_to_in_proj": [f"{stem}.proj"],
            "key_to_lpe": None,
        },
    }
    return content, own


@pytest.fixture
def put(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(o, "KNOWN_SUMS", {})
    for n in OPENMIND:
        monkeypatch.setitem(weights._cards, n, weights.card(n) | dict(sha256=""))
    for n in ("resenc_l", "primus_m"):
        monkeypatch.setitem(backbones._entries, n, partial(backbones[n], tiny=True))

    def write(name, content):
        path = tmp_path / weights_card(name).file
        path.parent.mkdir(exist_ok=True)
        torch.save(content, path)
        return path

    return write


@pytest.mark.parametrize("name", PREFIXES)
def test_a_published_file_is_read_by_its_own_plan(put, name):
    content, own = published_file(name)
    path = put(name, content)
    with pytest.warns(UserWarning, match="No checksum"):
        fetch_weights(name)
    model = load_backbone(name)
    for k, v in model.state_dict().items():
        assert torch.equal(v, own[k.removeprefix("encoder.model.")]), k
    told = json.loads(weights_origin(name)["pretraining_subjects"])
    assert told == {"ds000228": ["sub-01", "sub-02"], "ds002385": ["7"]}
    report, _, _ = check_weights_file(path, name.split(".")[0])
    assert report.share == 1 and not report.missing, str(report)


def test_a_file_without_a_plan_or_a_list_is_read_by_its_names(put):
    content, own = published_file("primus_m.voco")
    put("primus_m.voco", {"network_weights": content["network_weights"]})
    with pytest.warns(UserWarning, match="No checksum"):
        path = fetch_weights("primus_m.voco")
    with safe_open(path, "pt") as f:
        assert "pretraining_subjects" not in f.metadata()
        assert torch.equal(f.get_tensor("encoder.model.eva.norm.bias"), own["eva.norm.bias"])


def test_of_two_different_copies_the_trained_one_is_read_and_the_difference_reported(put):
    content, own = published_file("resenc_l.s3d")
    key = "encoder.stages.1.blocks.0.conv1.conv.weight"
    content["network_weights"][key] = torch.zeros_like(content["network_weights"][key])
    put("resenc_l.s3d", content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fetch_weights("resenc_l.s3d")
    assert [str(w.message) for w in said if "twice with different values" in str(w.message) and key in str(w.message)]
    found = load_backbone("resenc_l.s3d").state_dict()["encoder.model.stages.1.blocks.0.conv1.conv.weight"]
    assert torch.equal(found, own["stages.1.blocks.0.conv1.conv.weight"])


def test_a_file_of_the_other_architecture_and_a_damaged_plan_are_refused(put):
    put("resenc_l.mae", published_file("primus_m.mae")[0])
    with pytest.raises(VfmError, match="of 'PrimusM' by its own plan, expected ResEncL"):
        fetch_weights("resenc_l.mae")
    content = published_file("resenc_l.mae")[0]
    del content["nnssl_adaptation_plan"]["key_to_stem"]
    put("resenc_l.mae", content)
    with pytest.raises(VfmError, match="adaptation plan .* cannot be read .*key_to_stem"):
        fetch_weights("resenc_l.mae")


def test_the_checkpoint_is_found_without_naming_an_architecture(put):
    content, _ = published_file("resenc_l.mae")
    path = put("resenc_l.mae", content)
    report, state, _ = check_weights_file(path)
    assert "resenc" in report.name and report.share == 1
    assert compare_keys(state, build_tiny("resenc_l")).share == 1


def test_a_volume_of_one_cell_is_refused_in_the_users_terms():
    with pytest.raises(VfmError, match="leaves one voxel of .4, 4, 4.*8 along one axis"):
        build_tiny("resenc_l").embed(torch.randn(1, 1, 4, 4, 4))


def test_weights_are_chosen_by_what_their_cards_state(tmp_path, monkeypatch):
    from vfm_notes.analysis.published_weights import select_weights, weights_table
    from vfm_notes.backbones.weights import weights_cards

    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path))
    import vfm_notes.tune.catalog

    costs = {"resnet50": dict(parameters=2.35e7, step_mib=456, step_s=0.46), "vit_base": dict(parameters=8.6e7)}
    every = weights_table(weights_cards(), costs, ("PI-CAI",))
    chosen = lambda **k: set(select_weights(every, **k).name)
    contrast = chosen(objective="contrast", modality="MRI", domain="brain")
    assert {n for n in contrast if n.startswith("resenc_l.")} == {
        f"resenc_l.{k}" for k in ("voco", "simclr", "swinunetr")
    }
    assert "swin_unetr_48.suprem" in chosen(modality="ct") and "swin_unetr_48.suprem" not in chosen(licence="free")
    assert chosen(licence="NC-ND") == {n for n in every.name if weights_card(n).licence == "CC-BY-NC-ND-4.0"}
    assert not chosen(here=True) and chosen() == set(every.name) == set(weights)
    prostate = chosen(domain="prostate", modality="MRI")
    assert {"profound_tiny.alpha", "provicnet_small.adc", "segresnet_ds.taps"} <= prostate
    assert chosen(domain="prostate", modality="MRI", unseen=True) == {"segresnet_ds.taps"}
    assert chosen(domain="prostate", modality="T2w") == prostate, "every one of them reads T2w"
    assert chosen(most={"million": 30}) == chosen(most={"mib": 456}) == {"resnet50.in1k"}, "unknown is not small"
    flat = chosen(dimensions="2D")
    assert flat == set(every.name) - chosen(dimensions="3D") and "resnet50.in1k" in flat
    with pytest.raises(VfmError, match="dimensions is '2d'"): chosen(dimensions="2d")
