"""Lifting image encoders to volumes, and the natural-domain backbones on tiny versions of themselves."""

import pytest
import torch
from torch import nn

import vfm_notes.backbones.natural as natural
import vfm_notes.backbones.profound  # registers
import vfm_notes.backbones.volumetric  # registers
import vfm_notes.backbones.provicnet  # registers
from vfm_notes.backbones.lifted import LIFTS, Lifted, inflate
from vfm_notes.backbones.keys import build_tiny, compare_keys, load_weights
from vfm_notes.backbones.weights import weights, weights_card
from vfm_notes.foundation.registry import VfmError, backbones
from vfm_notes.nets.vit import FocalBlock, FocalModulation, FocalNet

SLICED = [*natural.NETS, "seem_focal_t", "efficientnet_lite0", "lite_medsam"]


def tiny(name, channels, seed=0):
    torch.manual_seed(seed)
    return build_tiny(name, channels)


def volume(model, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, model.in_channels, *(max(2 * s, 2) for s in model.strides[-1]))


# ---- readings -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SLICED)
def test_slices_are_read_one_by_one(name):
    "A volume's maps are its slices' maps, its vector the mean of theirs."
    model = tiny(name, 3).eval()
    x = volume(model)[:, :, :1].repeat(1, 1, 3, 1, 1) + torch.arange(3.).reshape(1, 1, 3, 1, 1)
    with torch.no_grad():
        one = [model.embed(x[:, :, i:i + 1]) for i in range(3)]
        assert torch.allclose(model.embed(x), torch.stack(one).mean(0), atol=1e-5)
        for whole, part in zip(model.pyramid(x), model.pyramid(x[:, :, 1:2])):
            assert torch.allclose(whole[:, :, 1:2], part, atol=1e-4)


def outputs(name, x):
    "What transformers itself gives for an image."
    model = tiny(name, 3).eval()
    net, options = model.encoder.model, model.encoder.options
    with torch.no_grad(): return model.embed(x[:, :, None]), net(pixel_values=x, **options)


def test_features_are_the_ones_of_the_study():
    x = torch.randn(2, 3, 32, 32)
    vector, out = outputs("dinov2_base", x)
    assert torch.equal(vector, out.pooler_output), "DINOv2: normalised class token"
    vector, out = outputs("blip_base_token1", x)
    assert torch.equal(vector, out.last_hidden_state[:, 1]), "BLIP as the study's code reads it: the first patch"
    vector, out = outputs("blip_base", x)
    assert torch.equal(vector, out.last_hidden_state[:, 0]), "BLIP: class token"
    vector, out = outputs("openclip_b16", x)
    assert torch.equal(vector, out.image_embeds) and vector.shape[1] == 12, "OpenCLIP: projected"
    vector, out = outputs("siglip2_base", x)
    assert torch.equal(vector, out.pooler_output)
    vector, out = outputs("vit_base", x)
    assert torch.equal(vector, out.last_hidden_state[:, 0])


def head_tokens(name):
    "A backbone, its tokens of two images, and what transformers gives for them."
    model = tiny(name, 3).eval()
    x = torch.randn(2, 3, 32, 48)
    net, options = model.encoder.model, model.encoder.options
    with torch.no_grad():
        return model, model.tokens(x[:, :, None]), net(pixel_values=x, output_hidden_states=True, **options)


@pytest.mark.parametrize("name, extra", [("dinov2_base", 1), ("dinov2_reg_small", 3)])
def test_dinov2_gives_a_transformer_head_its_patches_before_the_norm(name, extra):
    model, tokens, out = head_tokens(name)
    assert tokens.shape == (2, 24, 24) and torch.equal(tokens, out.hidden_states[-1][:, extra:])
    with torch.no_grad(): normed = model.encoder.model.layernorm(tokens)
    assert torch.allclose(normed, out.last_hidden_state[:, extra:], atol=1e-6) and not torch.allclose(
        tokens, out.last_hidden_state[:, extra:], atol=1e-2
    )


@pytest.mark.parametrize("name", ["blip_base", "blip_base_token1", "deit_base", "openclip_b16"])
def test_other_transformers_give_their_patches_after_the_last_block(name):
    model, tokens, out = head_tokens(name)
    assert tokens.shape == (2, 24, 24) and torch.equal(tokens, out.last_hidden_state[:, 1:])
    if name == "blip_base_token1":  # the study's reading takes the first patch for the class token
        assert torch.equal(model.embed(torch.zeros(1, 3, 1, 32, 32)), model.tokens(torch.zeros(1, 3, 1, 32, 32))[:, 0])


def test_cells_are_the_tokens_of_sam_and_seem():
    for name, cells in (("sam_vit_b", (4, 6)), ("seem_focal_t", (1, 2))):
        model, x = tiny(name, 3).eval(), torch.randn(2, 3, 1, 32, 48 if name == "sam_vit_b" else 64)
        with torch.no_grad(): tokens, last = model.tokens(x), model.pyramid(x)[-1]
        assert tokens.shape[:2] == (2, cells[0] * cells[1]) and torch.equal(
            tokens.mT.reshape(last[:, :, 0].shape), last[:, :, 0]
        )


@pytest.mark.parametrize(
    "name, wanted",
    [("sam_vit_b", (196, 768)), ("dinov2_base", (256, 768)), ("blip_base", (196, 768)), ("seem_focal_t", (49, 768))],
)
def test_numbers_of_tokens_at_224_are_the_studys(name, wanted):
    "Full-size networks, without making their numbers."
    with torch.device("meta"): assert backbones[name](3).tokens(torch.zeros(1, 3, 1, 224, 224)).shape == (1, *wanted)


def test_tokens_of_a_volume_are_those_of_its_slices():
    model = tiny("dinov2_small", 1).eval()
    x = torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad(): whole, parts = model.tokens(x), [model.tokens(x[:, :, i:i + 1]) for i in range(3)]
    assert torch.allclose(whole, torch.cat(parts, 1), atol=1e-5)


def test_sam_without_neck_equals_transformers_at_its_own_size(evidence):
    import transformers
    torch.manual_seed(0)
    net = transformers.SamVisionModel(natural.network_config("sam_vit_b", tiny=True)).eval()
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn_like(p) * 0.1)
        x, seen = torch.randn(1, 3, 32, 32), {}
        net.vision_encoder.neck.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
        net(x)
        reader = natural.SamMaps(net)
        maps, vector = reader(x)
        evidence(
            "equality", "SAM's encoder without neck (small)", against="transformers' SamVisionModel, before its neck",
            difference=(maps[-1].permute(0, 2, 3, 1) - seen["x"]).abs().max().item(),
            largest=seen["x"].abs().max().item(),
        )
        assert torch.allclose(maps[-1].permute(0, 2, 3, 1), seen["x"], atol=1e-5) and torch.allclose(
            vector, seen["x"].mean((1, 2)), atol=1e-5
        )
        assert reader(torch.randn(1, 3, 24, 40))[0][-1].shape == (1, 24, 3, 5)  # other sizes: resized position tables


@pytest.mark.parametrize("name", natural.NETS)
def test_published_sizes(name):
    "Number of values of the full-size networks, without making them."
    wanted = {
        "sam_vit_b": 89.7 - 0.8, "sam2_hiera_t": 26.9, "dinov2_small": 22.1, "dinov2_base": 86.6, "dinov2_large": 304.4,
        "dinov2_reg_small": 22.1, "dinov2_reg_base": 86.6, "dinov3_base": 85.6, "blip_base": 86.1,
        "blip_base_token1": 86.1, "openclip_b16": 86.2, "clip_b16": 86.2, "siglip2_base": 92.9, "vit_base": 85.8,
        "deit_base": 85.8, "deit_base_distilled": 85.8, "dino_base": 85.8, "resnet50": 23.5, "resnet152": 58.1,
        "curia": 86.0, "dinov3_small": 21.6, "dinov3_large": 303.1, "medsiglip": 428.6, "vit_large": 303.3,
    }[name]
    with torch.device("meta"): model = backbones[name](3)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - wanted) < 0.6


# ---- lifting --------------------------------------------------------------------------------------------------------

def test_unknown_lift_names_the_nearest():
    with pytest.raises(VfmError, match="triplets"): Lifted("x", FocalNet(8, (1,)), 3, "triplet")


def test_triplets_see_neighbours_and_slices_do_not():
    x = torch.randn(1, 1, 5, 32, 32)
    other = x.clone()
    other[:, :, 3] += 1
    for lift, seen in (("slices", False), ("triplets", True)):
        torch.manual_seed(0)
        model = backbones["dinov2_small"](1, tiny=True, lift=lift).eval()
        with torch.no_grad(): a, b = model.pyramid(x)[-1], model.pyramid(other)[-1]
        assert torch.equal(a[:, :, 2], b[:, :, 2]) != seen and torch.equal(a[:, :, 0], b[:, :, 0])


def test_inflated_resnet_starts_as_the_slicewise_one():
    state = tiny("resnet50", 3).state_dict()
    flat, deep = tiny("resnet50", 3, 1).eval(), tiny("resnet50_inflated", 3, 2).eval()
    flat.load_state_dict(state)
    from vfm_notes.backbones.lifted import inflated_state
    deep.load_state_dict(inflated_state(state))
    x = torch.randn(1, 3, 4, 64, 32)
    with torch.no_grad():
        for a, b in zip(flat.pyramid(x), deep.pyramid(x)): assert torch.allclose(a, b, atol=1e-4)
        assert torch.allclose(flat.embed(x), deep.embed(x), atol=1e-4)
    middle = [p for n, p in deep.named_parameters() if p.ndim == 5 and p.shape[2] == 3][0]
    deep.pyramid(x)[-1].square().mean().backward()
    assert middle.grad[:, :, 0].abs().sum() > 0  # neighbours can learn


def test_lifts_and_attention_start_equal():
    x = torch.randn(2, 3, 4, 32, 32)
    vectors = []
    for lift in ("slices", "attention"):
        torch.manual_seed(0)
        with torch.no_grad(): vectors.append(backbones["dinov2_small"](3, tiny=True, lift=lift).eval().embed(x))
    assert torch.allclose(*vectors, atol=1e-6) and set(LIFTS) == {"slices", "attention", "triplets", "inflated"}


def test_inflate_leaves_nothing_flat():
    net = inflate(tiny("resnet50", 3).encoder)
    assert not [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d))]


# ---- weights through transformers' own loader -----------------------------------------------------------------------

def drawn(name, seed):
    torch.manual_seed(seed)
    import transformers
    net = getattr(transformers, natural.NETS[name][0])(natural.network_config(name, tiny=True))
    with torch.no_grad():
        for v in net.state_dict().values():
            if v.is_floating_point(): v.copy_(torch.rand(v.shape) * 0.2)
    return net.eval()


@pytest.mark.parametrize(
    "name",
    [
        "sam_vit_b", "sam2_hiera_t", "dinov2_small", "dinov2_reg_small", "dinov3_base", "blip_base", "openclip_b16",
        "siglip2_base", "vit_base", "deit_base_distilled", "resnet50",
    ],
)
def test_hub_files_load_whole(name, tmp_path):
    "A folder as the hub has it fills the backbone, opened by transformers and by the key map, with the same features."
    from safetensors.torch import load_file
    net = drawn(name, 3)
    net.save_pretrained(tmp_path)
    opened = natural.Lifted(name, natural.wrap_model(name, natural.open_model(name, tmp_path)[0]), 3).eval()
    model = tiny(name, 3, 7).eval()
    state = natural.hub_state(load_file(tmp_path/"model.safetensors"), name, natural.network_config(name, tiny=True))
    report = load_weights(model, state)
    assert report.share == 1 and not report.missing, str(report)
    x = volume(model)
    with torch.no_grad(): assert torch.equal(model.embed(x), opened.embed(x))


def test_values_that_transformers_would_draw_do_not_count(tmp_path):
    from safetensors.torch import load_file
    drawn("dinov2_small", 3).save_pretrained(tmp_path)
    state = {k: v for k, v in load_file(tmp_path/"model.safetensors").items() if "mlp" not in k}
    mapped = natural.hub_state(state, "dinov2_small", natural.network_config("dinov2_small", tiny=True))
    report = compare_keys(mapped, tiny("dinov2_small", 3))
    assert len(report.missing) == 8 and all("mlp" in k for k in report.missing)


def test_a_folder_of_another_model_is_refused(tmp_path):
    with pytest.raises(VfmError, match="folder"): natural.open_model("dinov2_small", tmp_path/"nothing")
    drawn("resnet50", 0).save_pretrained(tmp_path)
    assert natural.open_model("dinov2_small", tmp_path)[1].share < 0.9


def test_original_vit_files_give_the_same_tokens(evidence):
    "The original layout (one qkv matrix), run by a few lines here, equals the mapped network."
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g) * 0.2
    e, n = 24, 2
    s = {
        "cls_token": r(1, 1, e), "pos_embed": r(1, 17, e), "patch_embed.proj.weight": r(e, 3, 8, 8),
        "patch_embed.proj.bias": r(e), "norm.weight": r(e), "norm.bias": r(e), "head.weight": r(5, e),
    }
    for i in range(n):
        p = f"blocks.{i}."
        s |= {
            p + "norm1.weight": r(e), p + "norm1.bias": r(e), p + "norm2.weight": r(e), p + "norm2.bias": r(e),
            p + "attn.qkv.weight": r(3 * e, e), p + "attn.qkv.bias": r(3 * e), p + "attn.proj.weight": r(e, e),
            p + "attn.proj.bias": r(e), p + "mlp.fc1.weight": r(48, e), p + "mlp.fc1.bias": r(48),
            p + "mlp.fc2.weight": r(e, 48), p + "mlp.fc2.bias": r(e),
        }
    x = torch.randn(2, 3, 32, 32, generator=g)
    f, config = nn.functional, natural.network_config("deit_base", tiny=True)
    norm = lambda t, k: f.layer_norm(t, (e,), s[k + ".weight"], s[k + ".bias"], config.layer_norm_eps)
    lin = lambda t, k: f.linear(t, s[k + ".weight"], s[k + ".bias"])
    t = (
        torch.cat(
            [
                s["cls_token"].expand(2, -1, -1),
                f.conv2d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=8).flatten(2).mT,
            ],
            1,
        )
        + s["pos_embed"]
    )
    for i in range(n):
        p = f"blocks.{i}."
        q, k, v = lin(norm(t, p + "norm1"), p + "attn.qkv").reshape(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
        t = t + lin(((q @ k.mT / 12 ** 0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 17, e), p + "attn.proj")
        t = t + lin(f.gelu(lin(norm(t, p + "norm2"), p + "mlp.fc1")), p + "mlp.fc2")
    model = tiny("deit_base", 3).eval()
    report = load_weights(model, natural.hub_state(natural.original_vit(s), "deit_base", config))
    assert report.share == 1 and report.unexpected == ("head.weight",)
    with torch.no_grad(): difference = (model.embed(x[:, :, None]) - norm(t, "norm")[:, 0]).abs().max().item()
    assert difference < 1e-4
    evidence(
        "equality", "DeiT from the original file's layout (small)", against="a ViT written out in the test",
        difference=difference, largest=norm(t, "norm").abs().max().item(),
    )


def test_every_card_belongs_to_a_backbone():
    for name in weights:
        assert name.split(".")[0] in backbones, name
        assert weights_card(name).licence


# ---- SEEM's focal modulation, written out ---------------------------------------------------------------------------

def test_focal_modulation_written_out_pixel_by_pixel():
    torch.manual_seed(0)
    net = FocalModulation(4).double()
    x = torch.randn(1, 5, 6, 4, dtype=torch.float64)
    f = net.f(x)
    q, context, gates = f[..., :4], f[..., 4:8], f[..., 8:]
    total = torch.zeros_like(q)
    for level, layer in enumerate(net.focal_layers):
        k, new = layer[0].kernel_size[0], torch.zeros_like(context)
        for i in range(5):
            for j in range(6):
                for a in range(k):
                    for b in range(k):
                        u, v = i + a - k // 2, j + b - k // 2
                        if 0 <= u < 5 and 0 <= v < 6: new[0, i, j] += context[0, u, v] * layer[0].weight[:, 0, a, b]
        context = nn.functional.gelu(new)
        total = total + context * gates[..., level:level + 1]
    total = (total + nn.functional.gelu(context.mean((1, 2), keepdim=True)) * gates[..., 3:]) / 4
    mixed = torch.einsum("bhwc,oc->bhwo", total, net.h.weight[:, :, 0, 0]) + net.h.bias
    with torch.no_grad(): assert (net.proj(q * mixed) - net(x)).abs().max() < 1e-12


def test_focal_block_without_its_convolutions_is_a_post_norm_block():
    torch.manual_seed(0)
    block = FocalBlock(8)
    for conv in (block.dw1, block.dw2): nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    nn.init.ones_(block.gamma_1), nn.init.ones_(block.gamma_2)
    x = torch.randn(1, 4, 4, 8)
    y = block.norm1(x + block.modulation(x))
    with torch.no_grad(): assert torch.allclose(block(x), block.norm2(y + block.mlp(y)), atol=1e-6)


def test_seem_files_load_by_their_prefix():
    model = tiny("seem_focal_t", 3)
    file = {f"backbone.{k.removeprefix('encoder.')}": v for k, v in model.state_dict().items()} | {
        "sem_seg_head.x": torch.zeros(1)
    }
    assert compare_keys(weights["seem_focal_t.v0"](file), model).share == 1
    keys = {k.split(".", 1)[1] for k in model.state_dict()}
    assert {
        "patch_embed.proj.weight", "patch_embed.norm.bias", "layers.0.blocks.0.dw1.weight",
        "layers.0.blocks.0.modulation.focal_layers.2.0.weight", "layers.0.blocks.0.gamma_1",
        "layers.0.downsample.proj.weight", "norm3.weight",
    } <= keys and not [k for k in keys if k.startswith("layers.3.downsample")]
