"""The networks against closed forms, explicit loops, published key lists and another implementation."""
import math

import pytest
import torch
from published import published_keys
from torch.nn import functional as F

from vfm_notes.nets.convnext3d import GRN, ConvNeXtBlock, ChannelNorm, ConvNeXt3d, enlarge_mask
from vfm_notes.backbones.lifted import slice_triplets, triplet_index
from vfm_notes.nets.vit import ViT, patch_map


def small(**changes):
    "A small ConvNeXt with thick first patches."
    torch.manual_seed(0)
    sizes = dict(depths=(1, 1, 2), dims=(8, 12, 16), kernel=3, stem=(1, 2, 2), downs=((2, 2, 2), (1, 2, 2)))
    return ConvNeXt3d(2, **{**sizes, **changes}).eval()


def tiny_shapes():
    "The layout of ConvNeXt V2 tiny in 3D, spelt out: name → shape."
    dims, depths, steps, out = (96, 192, 384, 768), (3, 3, 9, 3), (2, 2, 1), {}
    def pair(name, *shape): out.update({f"{name}.weight": list(shape), f"{name}.bias": [shape[0]]})
    pair("downsample_layers.0.0", 96, 3, 4, 4, 4); pair("downsample_layers.0.1", 96)
    for i, k in enumerate(steps, 1):
        pair(f"downsample_layers.{i}.0", dims[i - 1]); pair(f"downsample_layers.{i}.1", dims[i], dims[i - 1], k, k, k)
    for s, (c, n) in enumerate(zip(dims, depths)):
        for b in range(n):
            p = f"stages.{s}.{b}"
            pair(f"{p}.dwconv", c, 1, 7, 7, 7)
            pair(f"{p}.norm", c); pair(f"{p}.pwconv1", 4 * c, c); pair(f"{p}.pwconv2", c, 4 * c)
            out[f"{p}.grn.gamma"] = out[f"{p}.grn.beta"] = [1, 1, 1, 1, 4 * c]
    pair("norm", 768)
    return out


def shapes(module): return {k: list(v.shape) for k, v in module.state_dict().items()}


def test_published_tiny_keys_and_parameters():
    with torch.device("meta"): net = ConvNeXt3d()
    assert shapes(net) == tiny_shapes()
    assert len(net.state_dict()) == 198 and sum(p.numel() for p in net.parameters()) == 29_311_680


def test_published_tiny_key_list():
    with torch.device("meta"): net = ConvNeXt3d()
    assert shapes(net) == published_keys("profound_convnextv2_tiny_encoder")


def test_published_vit_key_list():
    with torch.device("meta"): net = ViT()
    wanted = {
        k.removeprefix("backbone."): v
        for k, v in published_keys("provicnet_plain_vits14reg_4class").items()
        if k.startswith("backbone.")
    }
    assert shapes(net) == wanted


def test_channel_norm_closed_form():
    norm, x = ChannelNorm(6), torch.randn(2, 6, 3, 4, 5) * 3 + 1
    norm.weight.data, norm.bias.data = torch.randn(6), torch.randn(6)
    z, h, w = 1, 2, 3
    v = x[1, :, z, h, w].double()
    wanted = (v - v.mean()) / (((v - v.mean()) ** 2).mean() + 1e-6).sqrt() * norm.weight + norm.bias
    assert torch.allclose(norm(x)[1, :, z, h, w], wanted.float(), atol=1e-5)


def test_grn_closed_form():
    grn, x = GRN(5).double(), torch.randn(2, 2, 3, 4, 5, dtype=torch.double)
    grn.gamma.data, grn.beta.data = torch.randn_like(grn.gamma), torch.randn_like(grn.beta)
    for b in range(2):  # each sample on its own
        lengths = [math.sqrt((x[b, ..., c] ** 2).sum()) for c in range(5)]
        for c in range(5):
            n = lengths[c] / (sum(lengths) / 5 + 1e-6)
            wanted = grn.gamma[..., c] * x[b, ..., c] * n + grn.beta[..., c] + x[b, ..., c]
            assert torch.allclose(grn(x)[b, ..., c], wanted)


def test_strides_and_sizes():
    net, x = small(), torch.randn(1, 2, 4, 16, 24)
    assert net.strides == [(1, 2, 2), (2, 4, 4), (2, 8, 8)]
    assert [tuple(m.shape) for m in net(x)] == [(1, 8, 4, 8, 12), (1, 12, 2, 4, 6), (1, 16, 2, 2, 3)]


def test_masked_pass_ignores_hidden_voxels_and_their_gradient_is_zero():
    net = small()
    for p in net.parameters(): p.data.add_(torch.randn_like(p) * 0.1)  # GRN and biases no longer trivial
    x, keep = torch.randn(2, 2, 4, 16, 16, requires_grad=True), (torch.rand(2, 1, 2, 2, 2) > 0.4).float()
    seen = enlarge_mask(keep, x.shape[2:]).expand_as(x).bool()
    maps = net(x, keep)
    for a, b in zip(maps, net(torch.where(seen, x, 1e3 * torch.randn_like(x)), keep)): assert torch.equal(a, b)
    sum(m.square().sum() for m in maps).backward()
    assert (x.grad[~seen] == 0).all() and (x.grad[seen] != 0).any()


def test_masked_pass_with_everything_kept_is_the_plain_pass():
    net, x = small(), torch.randn(1, 2, 4, 16, 16)
    for a, b in zip(net(x), net(x, torch.ones(1, 1, 2, 2, 2))): assert torch.allclose(a, b, atol=1e-6)


def test_masked_block_equals_sparse_computation():
    "A block written site by site over the kept voxels only."
    torch.manual_seed(1)
    block, x = ConvNeXtBlock(3, kernel=3).double(), torch.randn(1, 3, 2, 3, 4, dtype=torch.double)
    for p in block.parameters(): p.data.copy_(torch.randn_like(p) * 0.5)
    keep = (torch.rand(1, 1, 2, 3, 4) > 0.5).double()
    sites = [tuple(s) for s in keep[0, 0].nonzero().tolist()]
    hidden = []
    for z, h, w in sites:
        y = block.dwconv.bias.clone()
        for z2, h2, w2 in sites:
            if max(abs(z - z2), abs(h - h2), abs(w - w2)) <= 1:
                y = y + block.dwconv.weight[:, 0, z2 - z + 1, h2 - h + 1, w2 - w + 1] * x[0, :, z2, h2, w2]
        hidden.append(F.gelu(block.pwconv1(F.layer_norm(y, (3,), block.norm.weight, block.norm.bias, 1e-6))))
    hidden = torch.stack(hidden)  # kept sites x 12
    g = hidden.norm(dim=0)
    hidden = block.grn.gamma.flatten() * hidden * g / (g.mean() + 1e-6) + block.grn.beta.flatten() + hidden
    out = block(x, keep)
    for site, y in zip(sites, block.pwconv2(hidden)):
        assert torch.allclose(out[(0, slice(None), *site)], x[(0, slice(None), *site)] + y)


def test_vit_equals_transformers():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    torch.manual_seed(0)
    other = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=40, patch_size=8,
            num_register_tokens=4,
        )
    ).eval()
    for p in other.parameters(): p.data.add_(torch.randn_like(p) * 0.2)
    theirs, net, state = other.state_dict(), ViT(3, patch=8, dim=24, depth=2, heads=3, registers=4, grid=5).eval(), {}
    head = {
        "cls_token": "cls_token", "mask_token": "mask_token", "register_tokens": "register_tokens",
        "pos_embed": "position_embeddings", "patch_embed.proj.weight": "patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "patch_embeddings.projection.bias",
    }
    for ours, name in head.items(): state[ours] = theirs[f"embeddings.{name}"]
    # "encoder.layer." in most versions
    inner = next(k for k in theirs if k.endswith("0.norm1.weight")).removesuffix("0.norm1.weight")
    def attention(i, short, long, kind):  # names of newer and older transformers
        return next(
            theirs[k]
            for k in (f"{inner}{i}.attention.{short}.{kind}", f"{inner}{i}.attention.{long}.{kind}")
            if k in theirs
        )
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [attention(i, f"{n[0]}_proj", f"attention.{n}", kind) for n in ("query", "key", "value")]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"blocks.{i}.attn.proj.{kind}"] = attention(i, "o_proj", "output.dense", kind)
            for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"blocks.{i}.{n}.{kind}"] = theirs[f"{inner}{i}.{n}.{kind}"]
        for n in (1, 2): state[f"blocks.{i}.ls{n}.gamma"] = theirs[f"{inner}{i}.layer_scale{n}.lambda1"]
    for kind in ("weight", "bias"): state[f"norm.{kind}"] = theirs[f"layernorm.{kind}"]
    net.load_state_dict(state)
    for size in ((40, 40), (64, 48)):  # the stored grid, and a resized one
        x = torch.randn(2, 3, *size)
        with torch.no_grad(): assert (net(x)[-1] - other(x).last_hidden_state).abs().max() < 1e-5


def test_patch_map_puts_tokens_where_their_patches_are():
    net = ViT(3, patch=4, dim=8, depth=0, heads=1, registers=2, grid=4)
    net.pos_embed.data.zero_()
    x = torch.randn(1, 3, 16, 12)
    tokens = net.tokens(x, torch.randn(1, 2, 8))
    assert torch.allclose(patch_map(tokens, (4, 3)), net.patch_embed["proj"](x), atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 9])
def test_triplets_by_hand(depth):
    for j, triplet in enumerate(triplet_index(depth).tolist()):
        if depth < 3: assert set(triplet) <= set(range(depth))
        else:
            c = min(max(j, 1), depth - 2)
            assert triplet == [c - 1, c, c + 1]


def test_slice_triplets_layout():
    x = torch.randn(2, 2, 4, 3, 3)
    images = slice_triplets(x)
    assert torch.equal(
        images[1 * 4 + 2], torch.stack([x[1, 0, 1], x[1, 1, 1], x[1, 0, 2], x[1, 1, 2], x[1, 0, 3], x[1, 1, 3]])
    )


def test_space_to_depth_by_indexing():
    from vfm_notes.nets.decoder import depth_to_space, space_to_depth
    x, (fd, fh, fw) = torch.randn(2, 3, 4, 6, 4), (2, 3, 2)
    y = space_to_depth(x, (fd, fh, fw))
    assert y.shape == (2, 3 * 12, 2, 2, 2)
    for c in range(3):
        for i in range(fd):
            for j in range(fh):
                for k in range(fw):
                    assert torch.equal(y[:, c * 12 + i * 6 + j * 2 + k], x[:, c, i::fd, j::fh, k::fw])
    assert torch.equal(depth_to_space(y, (fd, fh, fw)), x)


def test_subpixel_equals_pixel_shuffle_in_two_dimensions():
    from vfm_notes.nets.decoder import depth_to_space
    x = torch.randn(2, 12, 1, 5, 4)
    assert torch.equal(depth_to_space(x, (1, 2, 2))[:, :, 0], F.pixel_shuffle(x[:, :, 0], 2))


@pytest.mark.parametrize(
    "strides",
    [
        [(1, 8, 8)] * 3, [(2, 4, 4), (4, 8, 8), (4, 16, 16)], [(4, 4, 4), (8, 8, 8), (16, 16, 16), (16, 16, 16)],
        [(1, 14, 14)],
    ],
)
def test_dense_decoder_fits_any_strides(strides):
    from types import SimpleNamespace
    from vfm_notes.nets.decoder import DenseDecoder
    size = [2 * max(s[a] for s in strides) for a in range(3)]
    backbone = SimpleNamespace(widths=[6] * len(strides), strides=strides)
    x = torch.randn(1, 2, *size, requires_grad=True)
    maps = [torch.randn(1, 6, *(s // t for s, t in zip(size, stride)), requires_grad=True) for stride in strides]
    out = DenseDecoder(backbone, 2, 5, width=8)(maps, x)
    assert out.shape == (1, 5, *size)
    out.square().mean().backward()
    assert x.grad.abs().sum() > 0 and all(m.grad.abs().sum() > 0 for m in maps)


def test_residual_decoder_starts_as_the_identity_and_can_leave_it():
    from types import SimpleNamespace
    from vfm_notes.nets.decoder import DenseDecoder
    backbone, x = SimpleNamespace(widths=[6], strides=[(2, 4, 4)]), torch.randn(1, 3, 4, 16, 16)
    decoder, maps = DenseDecoder(backbone, 3, 1, residual_channel=2), [torch.randn(1, 6, 2, 4, 4)]
    assert torch.equal(decoder(maps, x), x[:, 2:])
    decoder(maps, x).square().mean().backward()
    assert decoder.last.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [(3, 16, 16), (1, 16, 18), (4, 16, 16)])
def test_decoder_fills_up_what_its_cells_do_not_divide(size):
    from types import SimpleNamespace
    from vfm_notes.nets.decoder import DenseDecoder
    torch.manual_seed(0)
    decoder = DenseDecoder(SimpleNamespace(widths=[6], strides=[(1, 4, 4)]), 1, 1).eval()
    maps, x = [torch.randn(1, 6, size[0], 4, 4)], torch.randn(1, 1, *size)
    full = [-(-s // 2) * 2 for s in size]
    copied = x[:, :, [min(i, size[0] - 1) for i in range(full[0])]]
    assert decoder(maps, x).shape == (1, 1, *size)
    torch.testing.assert_close(decoder(maps, x), decoder(maps, copied)[:, :, :size[0]])


def test_published_provicnet_head_key_list():
    from vfm_notes.nets.decoder import TokenHead
    wanted = {
        k.removeprefix("head."): v
        for k, v in published_keys("provicnet_plain_vits14reg_4class").items()
        if k.startswith("head.")
    }
    assert shapes(TokenHead(384, 4)) == wanted
