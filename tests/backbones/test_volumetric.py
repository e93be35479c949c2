"""MONAI's volumetric networks as backbones: the contract, equality with MONAI's own forward, published layouts."""
import pytest
import torch

pytest.importorskip("monai")
from segmenters import Segmenter
import vfm_notes.backbones.sulcal  # registers
import vfm_notes.backbones.volumetric as v
from vfm_notes.backbones.keys import build_tiny, compare_keys
from vfm_notes.backbones.weights import weights
from vfm_notes.foundation.registry import backbones


def tiny(name, channels, seed=0):
    torch.manual_seed(seed)
    return build_tiny(name, channels)


def test_sequences_start_as_their_mean():
    one, three = tiny("simple_3d", 1).eval(), tiny("simple_3d", 3, 1).eval()
    report = compare_keys(one.state_dict(), three)
    assert report.missing == ("channels.reduce",)
    three.load_state_dict(one.state_dict(), strict=False)
    x = torch.randn(1, 3, 16, 16, 16)
    with torch.no_grad(): assert torch.allclose(three.embed(x), one.embed(x.mean(1, keepdim=True)), atol=1e-6)


def maps_of(name, x):
    model = tiny(name, 1).eval()
    with torch.no_grad():
        return (
            model, model.encoder.model, [m.permute(0, 1, 4, 3, 2) for m in model.read(x)[0]], x.permute(0, 1, 4, 3, 2),
        )


@pytest.mark.parametrize("name", ["resnet18_3d", "resnet50_3d"])
def test_resnet_equals_monai(name):
    "Its own forward ends in the pooled last map."
    model, net, maps, x = maps_of(name, torch.randn(1, 1, 32, 64, 32))
    with torch.no_grad(): assert torch.allclose(net(x).flatten(1), maps[-1].mean((2, 3, 4)), atol=1e-5)


def test_densenet_equals_monai():
    from monai.networks.nets import DenseNet
    model, net, maps, x = maps_of("densenet121_3d", torch.randn(1, 1, 32, 64, 32))
    whole = DenseNet(3, 1, 3, init_features=8, growth_rate=4, block_config=(1, 1, 1, 1)).eval()
    whole.features.load_state_dict(net.state_dict())
    with torch.no_grad(): assert torch.allclose(whole.class_layers[0](whole.features(x)), maps[-1], atol=1e-6)


def test_vit_equals_monai_at_its_own_size():
    model, net, maps, x = maps_of("vit_3d", torch.randn(1, 1, 16, 16, 16))
    with torch.no_grad():
        tokens, hidden = net(x)
        assert torch.allclose(tokens[:, 0], model.embed(x.permute(0, 1, 4, 3, 2)), atol=1e-5)
        assert torch.allclose(tokens.mT.reshape(1, 24, 2, 2, 2), maps[-1], atol=1e-5)


def test_swin_files_of_three_layouts():
    model = tiny("swin_unetr_24", 1)
    own = {k.removeprefix("encoder.model."): t for k, t in model.state_dict().items()}
    tang = {k.replace("mlp.linear", "mlp.fc"): t for k, t in own.items()} | {"rotation_head.weight": torch.zeros(2)}
    whole = {f"swinViT.{k}": t for k, t in own.items()} | {
        "encoder1.layer.conv1.conv.weight": torch.zeros(2), "decoder1.x": torch.zeros(1),
    }
    disrupted = {
        f"encoder.{k}" if k.startswith("patch_embed") else f"encoder.{k[:10]}0.{k[10:]}": t for k, t in own.items()
    } | {"encoder.norm.weight": torch.zeros(1)}
    for state in (tang, whole, disrupted):
        report = compare_keys(v.swin_keys(state), model)
        assert report.share == 1 and not report.unexpected, str(report)


def test_swin_encoder_equals_swin_unetr():
    from monai.networks.nets import SwinUNETR
    net = SwinUNETR(1, 2, feature_size=12, use_v2=True).eval()
    from monai.networks.nets.swin_unetr import SwinTransformer
    swin = SwinTransformer(1, 12, (7,) * 3, (2, 2, 2), (2,) * 4, (3, 6, 12, 24), spatial_dims=3, use_v2=True).eval()
    state = v.swin_keys(net.state_dict())
    assert not swin.load_state_dict({k.removeprefix("encoder.model."): t for k, t in state.items()}).missing_keys
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(swin(x), net.swinViT(x, net.normalize)))


def test_taps_names_from_an_export():
    "The exporter's nameless factors, in graph order, find their norms."
    net = Segmenter(8).net
    state, n = {}, 0
    for k, t in net.state_dict().items():
        if ".norm" not in k and not k.startswith(("up_layers.0.head", "up_layers.1.head")): state[k] = t
    for k, t in net.state_dict().items():
        if ".norm" in k:
            state[f"x.{n // 2}.{'Mul' if k.endswith('weight') else 'Add'}"] = t.reshape(-1, 1, 1, 1)
            n += 1
    got = weights["segresnet_ds.taps"](state)
    assert all(
        torch.equal(got[k.replace("encoder.", "encoder.model.", 1) if k.startswith("encoder.") else k], t)
        for k, t in net.state_dict().items()
        if "head" not in k or "2.head" in k
    )
    encoder = tiny("segresnet_ds", 1)
    assert compare_keys(got, encoder).share == 1


def test_segmenter_trains_and_keeps_the_size():
    torch.manual_seed(0)
    net = Segmenter(8)
    x = torch.randn(1, 1, 8, 16, 24)
    y = net(x)
    assert y.shape == x.shape
    y.square().mean().backward()
    assert net.net.encoder.conv_init.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert net.eval().windows(torch.randn(1, 1, 5, 20, 20), (8, 16, 16)).shape == (1, 1, 5, 20, 20)


# ---- the sulcus study's nets ----------------------------------------------------------------------------------------

def test_diffusion_maps_equal_monai():
    "The whole U-Net at the same time step, seen from inside."
    from monai.networks.nets import DiffusionModelUNet
    model = tiny("diffusion_unet", 1).eval()
    whole = DiffusionModelUNet(
        3, 1, 1, 2, [8, 8, 16], (False, False, True), norm_num_groups=4, num_head_channels=8
    ).eval()
    assert not whole.load_state_dict(model.encoder.model.state_dict(), strict=False).unexpected_keys
    seen, x = {}, torch.randn(2, 1, 16, 8, 32)
    for name, part in (
        ("first", whole.down_blocks[0].resnets[-1]), ("second", whole.down_blocks[1].resnets[-1]),
        ("middle", whole.middle_block),
    ):
        part.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        for step in (0, 300):
            model.encoder.model.time.fill_(step)
            whole(x, torch.full((2,), step))
            maps, vector = model.encoder(x)
            assert all(torch.allclose(m, seen[k], atol=1e-5) for m, k in zip(maps, seen)), step
    assert torch.allclose(
        vector.reshape(2, 16, 2, 2, 2), torch.nn.functional.max_pool3d(seen["middle"], (2, 1, 4)), atol=1e-5
    )
    assert not torch.allclose(backbones["diffusion_unet"](1, tiny=True, time=300).encoder.model.time, torch.tensor([0]))


def test_swin_mt_is_swin_unetr_without_its_deepest_level():
    deep, shallow = tiny("swin_unetr_24", 1).eval(), tiny("swin_mt", 1, 1).eval()
    report = compare_keys(deep.state_dict(), shallow)
    assert report.share == 1 and all(".layers4." in k for k in report.unexpected)
    shallow.load_state_dict({k: v for k, v in deep.state_dict().items() if ".layers4." not in k})
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(shallow.encoder(x)[0], deep.encoder(x)[0]))


def test_published_sizes_of_the_sulcus_nets():
    """What the facts of the study count: 1536 numbers for SwinMT's head and 512 for the diffusion net's; 15376 for the
    attention."""
    assert backbones["swin_mt"]().embed_dim == 1536 and backbones["diffusion_unet"]().embed_dim == 512
    net = backbones["simple_mhl"]()
    assert (
        net.embed_dim == 1024
        and net.encoder.head.attention.out.out_features == 124**2
        and net.encoder.head.read.out_channels == 90
    )


def test_second_stream_is_seen_through_attention_alone():
    model = tiny("double_3d", 2).eval()
    x = torch.randn(1, 2, 16, 16, 32)
    other = x.clone()
    other[:, 1] += torch.randn_like(other[:, 1])
    with torch.no_grad():
        a, b, va, vb = *(model.pyramid(t)[-1] for t in (x, other)), *(model.embed(t) for t in (x, other))
    half = model.widths[-1] // 2
    assert (
        torch.equal(a[:, :half], b[:, :half])
        and not torch.allclose(a[:, half:], b[:, half:])
        and not torch.allclose(va, vb)
    )
