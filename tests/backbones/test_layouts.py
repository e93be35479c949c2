"""ProFound's and ProViCNet's published layouts: keys and shapes, the sparse conversion, and independent
implementations of their parts."""
import itertools
import math

import pytest
import torch
from published import published_keys
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import profound_networks as pn
from vfm_notes.backbones import profound as pl
from vfm_notes.backbones import provicnet as vl
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.backbones.keys import compare_keys, load_weights
from vfm_notes.backbones.weights import weights
from vfm_notes.nets.convnext3d import ConvNeXt3d
from vfm_notes.nets.decoder import ResidualUnit, UNETRDecoder
from vfm_notes.nets.mae3d import ConvMAE3d, MAE3d
from vfm_notes.nets.vit import ViT

MRI = dict(n_classes=4, contrast={})
LAYOUTS = {  # published list → (network, number of keys, number of values)
    "profound_convnextv2_tiny_encoder": (ConvNeXt3d, 198, 29_311_680),
    "profound_classification_risk": (lambda: pn.Classifier(ConvNeXt3d()), 207, 29_510_597),
    "profound_upernet_lesion": (lambda: pn.UPerNet(ConvNeXt3d(), 1), 249, 122_372_866),
    "profound_upernet_anatomy": (lambda: pn.UPerNet(ConvNeXt3d(), 9), 249, 122_379_026),
    "profound_unetr3d_lesion": (lambda: pn.UNETR(ConvNeXt3d(), 1), 228, 39_516_833),
    "profound_fcmae_pretrain": (lambda: pn.FCMAE(ConvNeXt3d()), 211, 38_289_088),
    "profound_mae_vit_base": (MAE3d, 254, 156_518_016),
    "profound_convmae_vit_base": (ConvMAE3d, 370, 122_808_000),
    "provicnet_plain_vits14reg_4class": (lambda: vl.ProViCNetSegmenter(4), 196, 22_579_014),
    "provicnet_contrastive_mri_vits14reg_4class": (lambda: vl.ProViCNetSegmenter(**MRI), 204, 44_931_142),
    "provicnet_contrastive_trus9_vits14reg_4class": (lambda: vl.ProViCNetSegmenter(slices=9, **MRI), 206, 44_931_172),
    "provicnet_fusion_4class": (vl.Fusion, 30, 1_776_648),
}


def published(net):
    "Names and shapes as the file would have them."
    state = pn.sparse_state(net) if isinstance(net, pn.FCMAE) else net.state_dict()
    return {k: list(v.shape) for k, v in state.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_number_of_keys_and_values(name):
    make, keys, values = LAYOUTS[name]
    with torch.device("meta"): got = published(make())
    assert (len(got), sum(math.prod(s) for s in got.values())) == (keys, values)


@pytest.mark.parametrize("name", LAYOUTS)
def test_keys_and_shapes(name, evidence):
    with torch.device("meta"): got = published(LAYOUTS[name][0]())
    wanted = published_keys(name)
    assert got == wanted
    evidence(
        "keys", name, against="published list of keys and shapes", matched=sum(got[k] == wanted.get(k) for k in got),
        missing=len(got.keys() - wanted.keys()), unexpected=len(wanted.keys() - got.keys()),
        reshaped=sum(got[k] != wanted.get(k, got[k]) for k in got),
    )


def fresh(net, seed=0):
    "The same network with every parameter and buffer drawn anew, so that no zero or one hides a mistake."
    torch.manual_seed(seed)
    with torch.no_grad():
        for k, v in net.state_dict().items():
            if v.is_floating_point():
                v.copy_(torch.rand(v.shape) + 0.5 if "running_var" in k else torch.randn(v.shape) * 0.1)
    return net.eval()


# ---- sparse to dense ------------------------------------------------------------------------------------------------
# A sparse tensor is a dictionary {(i, j, k): features}. Offsets of a kernel are counted with the first coordinate
# fastest.

def offsets(k):
    side = range(-(k // 2), k // 2 + 1) if k % 2 else range(k)
    return [(a, b, c) for c, b, a in itertools.product(side, side, side)]


def sparse_conv(x, kernel, bias, k, stride=1):
    "kernel (offset, in, out), or (offset, channels) when depthwise, or (in, out) for one offset."
    if k == 1: return {u: v @ kernel + bias[0] for u, v in x.items()}
    out = {}
    for u in {tuple(a // stride for a in p) for p in x}:
        y = bias[0].clone()
        for w, o in zip(kernel, offsets(k)):
            v = x.get(tuple(stride * a + b for a, b in zip(u, o)))
            if v is not None: y = y + (v * w if kernel.ndim == 2 else v @ w)
        out[u] = y
    return out


def each(x, f): return {u: f(v) for u, v in x.items()}


def sparse_block(x, s, p, k):
    y = sparse_conv(x, s[p + "dwconv.kernel"], s[p + "dwconv.bias"], k)
    y = each(y, lambda v: F.layer_norm(v, v.shape, s[p + "norm.ln.weight"], s[p + "norm.ln.bias"], 1e-6))
    y = each(y, lambda v: F.gelu(s[p + "pwconv1.linear.weight"] @ v + s[p + "pwconv1.linear.bias"]))
    g = torch.stack(list(y.values())).square().sum(0).sqrt()
    n = g / (g.mean() + 1e-6)
    y = each(y, lambda v: s[p + "grn.gamma"][0] * (v * n) + s[p + "grn.beta"][0] + v)
    y = each(y, lambda v: s[p + "pwconv2.linear.weight"] @ v + s[p + "pwconv2.linear.bias"])
    return {u: x[u] + y[u] for u in x}


def sparse_encoder(image, s, depths, kernel, active=None):
    "Maps of the four stages as dictionaries, by the published sparse names alone."
    p = "encoder.downsample_layers."
    stem = F.conv3d(image, s[p + "0.0.weight"], s[p + "0.0.bias"], stride=4)[0]
    x = {u: stem[:, u[0], u[1], u[2]] for u in itertools.product(*map(range, stem.shape[1:]))}
    x = each(x, lambda v: F.layer_norm(v, v.shape, s[p + "0.1.weight"], s[p + "0.1.bias"], 1e-6))
    if active is not None: x = {u: v for u, v in x.items() if active(u)}
    maps = []
    for i, depth in enumerate(depths):
        if i:
            x = each(x, lambda v: F.layer_norm(v, v.shape, s[f"{p}{i}.0.ln.weight"], s[f"{p}{i}.0.ln.bias"], 1e-6))
            x = sparse_conv(x, s[f"{p}{i}.1.kernel"], s[f"{p}{i}.1.bias"], k := 1 if i == 3 else 2, k)
        for j in range(depth): x = sparse_block(x, s, f"encoder.stages.{i}.{j}.", kernel)
        maps.append(x)
    return maps


def dense(x, like):
    "A sparse map as a dense one, zero where nothing is."
    out = torch.zeros_like(like)
    for (i, j, k), v in x.items(): out[0, :, i, j, k] = v
    return out


SMALL = dict(depths=(1, 1, 2, 1), dims=(4, 6, 8, 10), kernel=3)


def small_pair(seed=0):
    "A pretraining state in the sparse layout, and a dense encoder that was filled from it."
    source = fresh(pn.FCMAE(ConvNeXt3d(2, **SMALL), 8, 3).double(), seed)
    state = pn.sparse_state(source)
    encoder = ConvNeXt3d(2, **SMALL).double().eval()
    missing = encoder.load_state_dict(pl.dense_state(state), strict=False)
    assert missing.missing_keys == ["norm.weight", "norm.bias"] and not missing.unexpected_keys
    return state, encoder


def test_dense_features_equal_sparse_ones_on_an_unmasked_input(evidence):
    state, encoder = small_pair()
    x = torch.randn(1, 2, 16, 32, 48, dtype=torch.float64)
    with torch.no_grad(): maps = encoder(x)
    worst = 0.
    for got, sparse in zip(maps, sparse_encoder(x, state, SMALL["depths"], 3)):
        wanted = dense(sparse, got)
        assert len(sparse) == got[0, 0].numel() and (got - wanted).abs().max() < 1e-10 * wanted.abs().max() + 1e-11
        worst = max(worst, (got - wanted).abs().max().item())
    evidence(
        "equality", "ProFound, sparse checkpoint as a dense network (small, float64)",
        against="a slow sparse convolution written for the test, all four stages", difference=worst,
        largest=maps[-1].abs().max().item(),
    )


def test_dense_features_equal_sparse_ones_on_a_masked_input():
    "The dense encoder's skipping of hidden cells is the sparse encoder's."
    state, encoder = small_pair(1)
    x = torch.randn(1, 2, 32, 32, 32, dtype=torch.float64)
    keep = torch.ones(1, 1, 2, 2, 2, dtype=torch.float64)
    keep[0, 0, 0, 1, 0] = keep[0, 0, 1, 0, 1] = 0
    with torch.no_grad(): maps = encoder(x, keep)
    for got, sparse in zip(
        maps,
        sparse_encoder(x, state, SMALL["depths"], 3, active=lambda u: keep[0, 0, u[0] // 4, u[1] // 4, u[2] // 4] > 0),
    ):
        assert (got - dense(sparse, got)).abs().max() < 1e-10


def test_a_wrong_axis_order_would_be_seen():
    state, encoder = small_pair()
    x = torch.randn(1, 2, 16, 32, 48, dtype=torch.float64)
    bad = {k: v.flip(0) if k.endswith("dwconv.kernel") else v for k, v in state.items()}
    with torch.no_grad(): got = encoder(x)[-1]
    assert (got - dense(sparse_encoder(x, bad, SMALL["depths"], 3)[-1], got)).abs().max() > 1e-3


def test_whole_checkpoint_loads_into_the_backbone():
    torch.manual_seed(0)
    state = pn.sparse_state(pn.FCMAE(ConvNeXt3d(3)))
    with torch.device("meta"): net = build_backbone("profound_tiny", 3)
    report = compare_keys(weights["profound_tiny.alpha"](state), net, "profound_tiny.alpha")
    assert (len(report.matched), report.missing, report.unexpected, report.reshaped) == (
        196, ("encoder.norm.weight", "encoder.norm.bias"), (), (),
    )
    assert 0.98 < report.share < 1
    with torch.device("meta"): fine = pn.UPerNet(ConvNeXt3d(3)).state_dict()
    assert compare_keys(weights["profound_tiny.finetuned"](fine), net).share == 1


@pytest.mark.parametrize("name", ["profound_vit", "profound_convmae"])
def test_mae_checkpoints_fill_their_backbones(name):
    with torch.device("meta"): net, file = build_backbone(name, 3), (MAE3d if name == "profound_vit" else ConvMAE3d)()
    report = compare_keys(weights[f"{name}.alpha"](file.state_dict()), net)
    assert (
        report.share == 1
        and not report.missing
        and all("dec" in k or "pred" in k or "mask" in k or ".down." in k for k in report.unexpected)
    )


# ---- heads ----------------------------------------------------------------------------------------------------------

def test_unetr_blocks_equal_monai(evidence):
    blocks = pytest.importorskip("monai.networks.blocks")
    dyn = pytest.importorskip("monai.networks.blocks.dynunet_block")
    ours, theirs = fresh(ResidualUnit(3, 6)), dyn.UnetResBlock(3, 3, 6, 3, 1, "instance").eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 6, 8, 10)
    with torch.no_grad(): assert (ours(x) - theirs(x)).abs().max() < 1e-5
    decoder = fresh(UNETRDecoder(3, [4, 6, 8, 12], 2, feature=4))
    up = blocks.UnetrUpBlock(3, 12, 32, 3, 2, "instance", res_block=True).eval()
    up.load_state_dict(decoder.decoder5.state_dict())
    x, skip = torch.randn(1, 12, 2, 3, 4), torch.randn(1, 32, 4, 6, 8)
    with torch.no_grad(): difference = (decoder.decoder5(x, skip) - up(x, skip)).abs().max().item()
    assert difference < 1e-5
    evidence(
        "equality", "ProFound's UNETR decoder block", against="MONAI's UnetrUpBlock", difference=difference,
        largest=up(x, skip).abs().max().item(),
    )
    pre = blocks.UnetrPrUpBlock(3, 4, 8, 0, 3, 1, 2, "instance", conv_block=True, res_block=True)
    assert {k: v.shape for k, v in pre.state_dict().items()} == {
        k: v.shape for k, v in decoder.encoder2.state_dict().items()
    }


def test_upernet_returns_the_training_head_in_training_only():
    net = pn.UPerNet(ConvNeXt3d(1, **SMALL), 2, 8, 8)
    x = torch.randn(1, 1, 16, 32, 32)
    assert [s.shape for s in net.train()(x)] == [(1, 2, 16, 32, 32)] * 2 and net.eval()(x).shape == (1, 2, 16, 32, 32)


def test_upernet_equals_transformers_in_a_plane():
    """One slice deep, with 2D kernels put into the middle of 3D ones, the head is transformers' 2D UPerNet head
    (BatchNorm set to LayerNorm's result is not possible, so norms are left out)."""
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    from transformers import UperNetConfig
    from vfm_notes.nets.decoder import UPerHead
    theirs = upernet.UperNetHead(
        UperNetConfig(hidden_size=8, num_labels=3, pool_scales=[1, 2, 3, 6]), [4, 5, 6, 7]
    ).eval()
    ours = UPerHead([4, 5, 6, 7], 3, 8).eval()
    state = {}
    for k, v in fresh(theirs).state_dict().items():
        if "batch_norm" in k: continue
        state[k] = F.pad(v[:, :, None], (0,) * 4 + (v.shape[-1] // 2,) * 2) if v.ndim == 4 else v
    for net in (ours, theirs):
        for m in net.modules():
            if hasattr(m, "batch_norm"): m.batch_norm = nn.Identity()
            if hasattr(m, "activation"): m.activation = nn.GELU()
    ours.load_state_dict(state)
    maps = [torch.randn(2, c, s, s) for c, s in zip((4, 5, 6, 7), (24, 12, 6, 6))]
    with torch.no_grad(): assert (ours([m[:, :, None] for m in maps])[:, :, 0] - theirs(maps)).abs().max() < 1e-4


def test_mae_equals_transformers_in_a_plane(tmp_path, evidence):
    "ViT-MAE's encoder in transformers, fed with one slice, gives the same tokens."
    from transformers import ViTMAEConfig, ViTMAEModel
    ours = fresh(
        MAE3d(
            2, size=(1, 16, 16), patch=(1, 4, 4), dim=24, depth=2, heads=2, decoder_dim=12, decoder_depth=1,
            decoder_heads=2,
        )
    )
    own = ours.state_dict()
    state = {"embeddings.cls_token": own["cls_token"], "embeddings.position_embeddings": own["pos_embed"]}
    for end in ("weight", "bias"):
        stem = own[f"patch_embed.proj.{end}"]
        state |= {
            f"embeddings.patch_embeddings.projection.{end}": stem.squeeze(2) if stem.ndim == 5 else stem,
            f"layernorm.{end}": own[f"norm.{end}"],
        }
        for i in range(2):
            a, b = f"blocks.{i}.", f"encoder.layer.{i}."
            state |= {
                f"{b}attention.attention.{k}.{end}": v
                for k, v in zip(("query", "key", "value"), own[f"{a}attn.qkv.{end}"].chunk(3))
            }
            state |= {
                f"{b}{new}.{end}": own[f"{a}{old}.{end}"]
                for old, new in (
                    ("attn.proj", "attention.output.dense"), ("norm1", "layernorm_before"),
                    ("norm2", "layernorm_after"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
                )
            }
    ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=16, patch_size=4,
        num_channels=2, mask_ratio=0.0, layer_norm_eps=1e-6,
    ).save_pretrained(tmp_path)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path/"model.safetensors", metadata={"format": "pt"})
    theirs, info = ViTMAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = torch.randn(2, 2, 16, 16)
    noise = torch.arange(16.)[None].expand(2, -1)  # keeps the order of patches
    with torch.no_grad(): wanted, got = theirs.eval()(x, noise=noise).last_hidden_state, ours.encode(x[:, :, None])[-1]
    assert (wanted - got).abs().max() < 1e-5
    evidence(
        "equality", "ProFound-ViT's encoder in a plane (small)", against="transformers' ViTMAEModel",
        difference=(wanted - got).abs().max().item(), largest=wanted.abs().max().item(),
    )


# ---- ProViCNet ------------------------------------------------------------------------------------------------------

def to_transformers(state, layers):
    "ViT's names and matrices as Dinov2WithRegisters has them."
    out = {
        "embeddings.cls_token": state["cls_token"], "embeddings.mask_token": state["mask_token"],
        "embeddings.register_tokens": state["register_tokens"], "embeddings.position_embeddings": state["pos_embed"],
        "layernorm.weight": state["norm.weight"], "layernorm.bias": state["norm.bias"],
    }
    for end in ("weight", "bias"):
        out[f"embeddings.patch_embeddings.projection.{end}"] = state[f"patch_embed.proj.{end}"]
        for i in range(layers):
            a, b = f"blocks.{i}.", f"encoder.layer.{i}."
            for part, value in zip(("query", "key", "value"), state[f"{a}attn.qkv.{end}"].chunk(3)):
                out[f"{b}attention.attention.{part}.{end}"] = value
            for old, new in (
                ("attn.proj", "attention.output.dense"), ("norm1", "norm1"), ("norm2", "norm2"), ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                out[f"{b}{new}.{end}"] = state[f"{a}{old}.{end}"]
    for i in range(layers):
        for n in (1, 2): out[f"encoder.layer.{i}.layer_scale{n}.lambda1"] = state[f"blocks.{i}.ls{n}.gamma"]
    return out


@pytest.mark.parametrize(
    "sizes, image", [(dict(dim=24, depth=2, heads=2, patch=4, grid=5, registers=3), 12), ({}, 448)],
    ids=["tiny", "ViT-S/14 at 448"],
)
def test_patch_tokens_equal_transformers(sizes, image, tmp_path, evidence):
    "The hub's names go through transformers' own loading, which may rename them."
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    s = dict(dim=384, depth=12, heads=6, patch=14, grid=37, registers=4) | sizes
    ours = fresh(ViT(3, **sizes))
    Dinov2WithRegistersConfig(
        hidden_size=s["dim"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"], patch_size=s["patch"],
        image_size=s["patch"] * s["grid"], num_register_tokens=s["registers"],
    ).save_pretrained(tmp_path)
    save_file(
        {k: v.contiguous() for k, v in to_transformers(ours.state_dict(), s["depth"]).items()},
        tmp_path / "model.safetensors", metadata={"format": "pt"},
    )
    theirs, info = Dinov2WithRegistersModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    x = torch.randn(1, 3, image, image)
    with torch.no_grad(): a, b = ours(x)[-1], theirs.eval()(x).last_hidden_state
    assert a.shape == b.shape and (a - b).abs().max() < 2e-4
    if not sizes:
        evidence(
            "equality", "ProViCNet's ViT-S/14 with registers at 448 pixels, all tokens",
            against="transformers' Dinov2WithRegistersModel", difference=(a - b).abs().max().item(),
            largest=b.abs().max().item(),
        )


def test_extra_tokens_stand_between_registers_and_patches():
    net = fresh(ViT(3, dim=24, depth=2, heads=2, patch=4, grid=4, registers=2))
    x, extra = torch.randn(1, 3, 16, 16), torch.randn(1, 2, 24)
    t = net.tokens(x, extra)
    assert (
        t.shape == (1, 1 + 2 + 2 + 16, 24)
        and torch.equal(t[:, 3:5], extra)
        and torch.equal(t[:, 5:], net.tokens(x)[:, 3:])
    )


def test_published_files_fill_the_backbone():
    with torch.device("meta"):
        file, trus = vl.ProViCNetSegmenter(**MRI).state_dict(), vl.ProViCNetSegmenter(slices=9, **MRI).state_dict()
        one, nine = build_backbone("provicnet_small", 1), build_backbone("provicnet_trus", 1)
    assert (
        compare_keys(weights["provicnet_small.t2"](file), one).share == 1
        and compare_keys(weights["provicnet_trus.trus"](trus), nine).share == 1
    )


def test_weight_norm_equals_torch():
    ours = vl.UnitLinear(8, 5)
    with pytest.warns(FutureWarning): theirs = nn.utils.weight_norm(nn.Linear(8, 5, bias=False))
    theirs.load_state_dict(fresh(ours).state_dict())
    x = torch.randn(3, 8)
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict()) and torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_load_weights_reports_a_sparse_file(tmp_path):
    torch.manual_seed(0)
    state = pn.sparse_state(pn.FCMAE(ConvNeXt3d(3, **SMALL), 8, 3))
    net = pl.ProFound("profound_tiny", 3, **SMALL)
    report = load_weights(net, pl.profound_keys(state))
    assert report.missing == ("encoder.norm.weight", "encoder.norm.bias") and "share" in str(report)
