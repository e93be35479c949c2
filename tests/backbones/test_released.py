"""Released weights: published key lists where there are some, and a made file of every layout."""

import re
from functools import partial

import pytest
import torch
from published import published_keys

pytest.importorskip("monai")
pytest.importorskip("transformers")
import vfm_notes.backbones.natural as natural
import vfm_notes.backbones.released as r
from vfm_notes.backbones.keys import build_tiny, compare_keys, load_backbone
from vfm_notes.backbones.weights import check_licence, fetch_weights, weights, weights_card
from vfm_notes.foundation.registry import VfmError, backbones

RELEASED = [n for n in weights if weights[n].__module__ == "vfm_notes.backbones.released" or n in r.MORE_HUB]


def chunked(s):
    return {"backbone." + re.sub(r"^blocks\.", "blocks.0.", k): v for k, v in s.items()}


OWN = {  # weights → their file at the tiny size, from the network's own names
    "swin_unetr_48.suprem": lambda s: {
        "net": {f"module.backbone.swinViT.{k}": v for k, v in s.items()}
        | {"module.organ_embedding": torch.ones(2), "module.GAP.0.bias": torch.ones(2)},
        "epoch": 3,
    },
    "segresnet_16.suprem": lambda s: {
        "net": {f"module.{k}": v for k, v in s.items()}
        | {"module.up_layers.0.x": torch.ones(1), "module.conv_final.2.conv.bias": torch.ones(2)}
    },
    "genesis_unet.suprem": lambda s: {
        "net": {f"module.backbone.{k}": v for k, v in s.items()}
        | {"module.backbone.down_tr64.ops.0.bn1.running_mean": torch.ones(4)}
    },
    "swin_unetr_48.clip_driven": lambda s: {
        "net": {f"module.backbone.swinViT.{k}": v for k, v in s.items()} | {"organ_embedding": torch.ones(2)}
    },
    "genesis_unet.clip_driven": lambda s: {
        "net": {f"module.backbone.{k}": v for k, v in s.items()} | {"organ_embedding": torch.ones(2)}
    },
    "dino_vit_3d.3dino": lambda s: {"teacher": chunked(s) | {"dino_head.mlp.0.weight": torch.ones(2)}},
    "stunet_small.totalsegmentator": lambda s: {"state_dict": s | {"seg_outputs.0.weight": torch.ones(2)}, "epoch": 1},
    "stunet_base.totalsegmentator": lambda s: {"network_weights": s | {"conv_blocks_localization.0.x": torch.ones(2)}},
}


@pytest.fixture
def put(tmp_path, monkeypatch):
    "Write a made file where a user would put it; networks are tiny."
    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path))

    def write(name, content):
        net = name.split(".")[0]
        monkeypatch.setitem(backbones._entries, net, partial(backbones[net], tiny=True))
        path = tmp_path / weights_card(name).file
        path.parent.mkdir(exist_ok=True, parents=True)
        torch.save(content, path)
        with pytest.warns(UserWarning, match="No checksum"):
            fetch_weights(name, [name])
        return load_backbone(name, 1, accepted=[name])

    return write


def drawn(net):
    "The tiny network's tensors, of random numbers, by the names below its wrapper."
    torch.manual_seed(0)
    state = build_tiny(net, 1).state_dict()
    return {
        k.removeprefix("encoder.model."): torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()
    }


@pytest.mark.parametrize("name", OWN)
def test_a_made_file_fills_the_network(put, name):
    own = drawn(name.split(".")[0])
    model = put(name, OWN[name](own))
    for k, v in model.state_dict().items():
        assert torch.equal(v, own[k.removeprefix("encoder.model.")]), k


def test_two_channels_are_added(put):
    own = drawn("swin_unetr_48")
    first = torch.randn(own["patch_embed.proj.weight"].shape[0], 2, 2, 2, 2)
    file = {f"module.swinViT.{k}": v for k, v in (own | {"patch_embed.proj.weight": first}).items()} | {
        "module.rotation_head.bias": torch.ones(4)
    }
    model = put("swin_unetr_48.brainsegfounder_ukb", {"state_dict": file})
    net, x = model.encoder.model, torch.randn(1, 1, 32, 32, 32)
    assert torch.equal(net.state_dict()["layers1.0.blocks.0.norm1.bias"], own["layers1.0.blocks.0.norm1.bias"])
    with torch.no_grad():
        twice = torch.nn.functional.conv3d(x.expand(-1, 2, -1, -1, -1), first, own["patch_embed.proj.bias"], stride=2)
        assert torch.allclose(net.patch_embed.proj(x), twice, atol=1e-5)


def test_suprem_fits_its_published_lists():
    for listed, name in (
        ("suprem_swinunetr_swinvit", "swin_unetr_48.suprem"),
        ("suprem_segresnet16", "segresnet_16.suprem"),
    ):
        keys = published_keys(listed)
        state = {k: torch.empty(s, device="meta") for k, s in keys.items()}
        own = backbones[name.split(".")[0]]()
        report = compare_keys(weights[name](state), own)
        assert report.share == 1 and not report.unexpected and not report.reshaped, str(report)
        encoder = [k for k in keys if "up_" not in k and "conv_final" not in k]
        assert len(report.matched) == len(encoder)


@pytest.mark.parametrize(
    "listed, name",
    [("dinov3_vits16_hf", "dinov3_small"), ("dinov3_vitl16_hf", "dinov3_large"), ("medsiglip_448_vision", "medsiglip")],
)
def test_networks_of_transformers_have_the_published_names_and_shapes(listed, name):
    with torch.device("meta"):
        own = backbones[name]().state_dict()
    assert {k.removeprefix("encoder.model."): list(v.shape) for k, v in own.items()} == published_keys(listed)


def test_stunet_has_the_published_number_of_parameters():
    "Of the whole network (14.6 and 58.26 millions) the encoder is what its code makes of widths and blocks."
    for size, base in (("small", 16), ("base", 32)):
        with torch.device("meta"):
            net = backbones[f"stunet_{size}"]()
        w = [1, *(base * k for k in (1, 2, 4, 8, 16, 16))]
        by_hand = sum((27 * a + 1) * b + (27 * b + 1) * b + (a + 1) * b + 4 * b for a, b in zip(w, w[1:]))
        assert sum(p.numel() for p in net.parameters()) == by_hand


# ---- original layouts of transformers -------------------------------------------------------------------------------


def shrink(monkeypatch, net):
    "Make a network of transformers small in every place that looks it up."
    config = natural.network_config(net, tiny=True)
    real = natural.network_config
    monkeypatch.setattr(natural, "network_config", lambda name, tiny=False: config if name == net else real(name, tiny))


def original(dim, depth, patch, grid, layer_scale):
    "An original ViT's tensors."
    torch.manual_seed(1)
    draw = torch.randn
    state = {
        "cls_token": draw(1, 1, dim),
        "pos_embed": draw(1, 1 + grid**2, dim),
        "norm.weight": draw(dim),
        "norm.bias": draw(dim),
        "patch_embed.proj.weight": draw(dim, 3, patch, patch),
        "patch_embed.proj.bias": draw(dim),
    }
    for i in range(depth):
        sizes = {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
        }
        hidden = 96 if layer_scale else 48
        sizes |= {
            "mlp.fc1.weight": (hidden, dim),
            "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (dim, hidden),
            "mlp.fc2.bias": (dim,),
        }
        if layer_scale:
            sizes |= {"ls1.gamma": (dim,), "ls2.gamma": (dim,)}
        state |= {f"blocks.{i}.{k}": draw(s) for k, s in sizes.items()}
    return state


def feature_by_hand(state, x, patch, heads, eps, mean):
    "A ViT from its tensors alone, in float64: the class token, or the mean of the patches."
    s = {k: v.double() for k, v in state.items()}
    norm = lambda v, n: torch.nn.functional.layer_norm(v, v.shape[-1:], s[f"{n}.weight"], s[f"{n}.bias"], eps)
    linear = lambda v, n: v @ s[f"{n}.weight"].T + s[f"{n}.bias"]
    v = torch.nn.functional.conv2d(x.double(), s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    v = torch.cat([s["cls_token"].expand(len(x), -1, -1), v.flatten(2).mT], 1) + s["pos_embed"]
    for i in range(2):
        b, at = f"blocks.{i}", norm(v, f"blocks.{i}.norm1")
        q, k, w = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in linear(at, f"{b}.attn.qkv").chunk(3, -1))
        out = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ w).transpose(1, 2).flatten(2)
        v = v + s.get(f"{b}.ls1.gamma", 1) * linear(out, f"{b}.attn.proj")
        inner = torch.nn.functional.gelu(linear(norm(v, f"{b}.norm2"), f"{b}.mlp.fc1"))
        v = v + s.get(f"{b}.ls2.gamma", 1) * linear(inner, f"{b}.mlp.fc2")
    v = norm(v, "norm")
    return v[:, 1:].mean(1) if mean else v[:, 0]


@pytest.mark.parametrize(
    "name, wrap",
    [
        ("vit_base.mri_core", lambda s: {"teacher": chunked(s) | {"dino_head.last_layer.weight": torch.ones(2, 2)}}),
        (
            "vit_large.retfound_naturecfp",
            lambda s: {"model": s | {"decoder_embed.bias": torch.ones(3), "mask_token": torch.ones(1, 1, 24)}},
        ),
        (
            "dinov2_large.retfound_meh",
            lambda s: {"teacher": {f"backbone.{k}": v for k, v in s.items()} | {"dino_head.x": torch.ones(2)}},
        ),
    ],
)
def test_original_layouts_give_the_features_of_their_tensors(put, monkeypatch, name, wrap):
    "Against the transformer written out by hand."
    net = name.split(".")[0]
    shrink(monkeypatch, net)
    dino = net.startswith("dinov2")
    state = original(24, 2, 8, 4, dino)
    if dino:
        state["mask_token"] = torch.randn(1, 24)
        monkeypatch.setattr(r, "original_dinov2", partial(r.original_dinov2, grid=4))
    model = put(name, wrap(state)).eval()
    x = torch.randn(2, 1, 1, 32, 32)
    with torch.no_grad():
        found = model.embed(x)
    wanted = feature_by_hand(state, x[:, :, 0].expand(-1, 3, -1, -1), 8, 2, 1e-6 if dino else 1e-12, net == "vit_large")
    assert torch.allclose(found.double(), wanted, rtol=1e-3, atol=1e-4)


def test_positions_of_another_grid_are_resized():
    state = {"pos_embed": torch.randn(1, 17, 8)}
    assert r.original_dinov2(state, 6)["embeddings.position_embeddings"].shape == (1, 37, 8)


def test_medsam2_fills_the_trunk(put, monkeypatch):
    own = drawn("sam2_hiera_t")
    back = [(new, old) for old, new in r.TRUNK]

    def meta_name(k):
        for new, old in back:
            k = k.replace(new, old)
        return f"image_encoder.trunk.{k}"

    file = {meta_name(k): v for k, v in own.items()} | {
        "image_encoder.neck.convs.0.conv.bias": torch.ones(3),
        "maskmem_tpos_enc": torch.ones(1),
    }
    assert (
        "image_encoder.trunk.blocks.0.mlp.layers.0.weight" in file and "image_encoder.trunk.blocks.1.norm1.bias" in file
    )
    model = put("sam2_hiera_t.medsam2", {"model": file})
    for k, v in model.state_dict().items():
        assert torch.equal(v, own[k.removeprefix("encoder.model.")]), k


def test_three_equal_channels_are_one_for_a_network_of_one(monkeypatch):
    config = natural.network_config("curia")
    assert config.num_channels == 1 and config.image_size == 512
    small = type(config)(**natural.TINY_CONFIG | dict(num_channels=1))
    monkeypatch.setattr(natural, "network_config", lambda *a, **k: small)
    model = backbones["curia"](1).eval()
    x = torch.randn(1, 1, 1, 32, 32)
    with torch.no_grad():
        wanted = model.encoder.model(pixel_values=x[:, 0]).last_hidden_state[:, 0]
        assert torch.allclose(model.embed(x), wanted, atol=1e-5)
        assert model.tokens(x).shape == (1, 16, 24)


def test_cards_say_what_is_not_known_and_licences_are_asked_for():
    assert len(RELEASED) == 29
    for n in RELEASED:
        card = weights_card(n)
        known = ("keys inferred", "names of the publishing code", "names of SAM 2's own code")
        assert any(words in card.note for words in known) or n.startswith("dinov3"), n
        if card.gated or card.non_commercial:
            with pytest.raises(VfmError, match=re.escape(card.licence)):
                check_licence(card)
    free = {n for n in RELEASED if not (weights_card(n).gated or weights_card(n).non_commercial)}
    assert {n.split(".")[0] for n in free} == {"vit_base", "sam2_hiera_t", *(f"stunet_{s}" for s in r.STU_SIZES)}
