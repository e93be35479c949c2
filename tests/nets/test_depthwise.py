"""The depthwise convolution against the framework in float64, explicit loops, and its own rule."""
import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vfm_notes.foundation.registry import VfmError
from vfm_notes.nets import depthwise_conv3d
from vfm_notes.nets.convnext3d import ConvNeXt3d, DepthwiseConv3d
from vfm_notes.nets.mae3d import ConvMAE3d

# smaller than the kernel
SHAPES = [((1, 2, 3, 4, 5), (3, 3, 3)), ((2, 3, 2, 5, 4), (5, 3, 7)), ((3, 2, 1, 2, 3), (7, 7, 7)),
          # one slice to a piece
          ((2, 1, 1, 1, 1), (3, 3, 3)), ((2, 4, 3, 3, 3), (1, 1, 1)), ((1, 2, 3, 96, 100), (3, 5, 3)),
          ((5, 2, 5, 40, 60), (3, 3, 3)), ((40, 2, 2, 12, 12), (3, 3, 3))]  # uneven pieces of slices, and of cases


def inputs(shape, kernel, dtype=torch.double, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in (shape, (shape[1], 1, *kernel), (shape[1],))
    ]


def framework(x, w, b=None): return F.conv3d(x, w, b, padding=[k // 2 for k in w.shape[2:]], groups=len(w))


@pytest.mark.parametrize("shape, kernel", SHAPES)
def test_value_and_gradients_are_the_frameworks(shape, kernel):
    args = inputs(shape, kernel)
    g = torch.randn(shape, dtype=torch.double)
    for ours, theirs in zip((y := depthwise_conv3d(*args, own=True), *torch.autograd.grad(y, args, g)),
                            (y := framework(*args), *torch.autograd.grad(y, args, g))):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_against_explicit_loops():
    (x, w, b), k = inputs((2, 2, 2, 3, 4), (3, 3, 3)), 3
    y = depthwise_conv3d(x, w, b, own=True)
    wanted = b.detach()[None, :, None, None, None].expand(x.shape).clone()
    gradient = torch.zeros_like(w)  # of the sum of squares: 2 y at every output
    for z, r, c in ((z, r, c) for z in range(2) for r in range(3) for c in range(4)):
        for i, j, m in ((i, j, m) for i in range(k) for j in range(k) for m in range(k)):
            a, e, f = z + i - 1, r + j - 1, c + m - 1
            if 0 <= a < 2 and 0 <= e < 3 and 0 <= f < 4:
                wanted[:, :, z, r, c] += w.detach()[:, 0, i, j, m] * x.detach()[:, :, a, e, f]
                gradient[:, 0, i, j, m] += (2 * y.detach()[:, :, z, r, c] * x.detach()[:, :, a, e, f]).sum(0)
    assert torch.allclose(y, wanted)
    y.square().sum().backward()
    assert torch.allclose(w.grad, gradient) and torch.allclose(b.grad, 2 * y.detach().sum((0, 2, 3, 4)))


@pytest.mark.parametrize("shape, kernel", [((2, 2, 2, 3, 3), (3, 3, 3)), ((1, 2, 2, 1, 3), (5, 1, 3))])
def test_gradcheck_and_second_derivatives(shape, kernel):
    args = inputs(shape, kernel)
    assert torch.autograd.gradcheck(lambda *a: depthwise_conv3d(*a, own=True), args)
    assert torch.autograd.gradgradcheck(lambda *a: depthwise_conv3d(*a, own=True), args)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_wanted_gradients(wanted):
    args = [a.detach().requires_grad_(w) for a, w in zip(inputs((2, 3, 3, 4, 4), (3, 3, 3)), wanted)]
    depthwise_conv3d(*args, own=True).square().sum().backward()
    given = [a.grad for a in args]
    assert [g is not None for g in given] == list(wanted)
    other = [a.detach().requires_grad_(w) for a, w in zip(args, wanted)]
    framework(*other).square().sum().backward()
    assert all(torch.allclose(g, o.grad) for g, o in zip(given, other) if g is not None)


def test_without_bias():
    x, w, _ = inputs((2, 3, 3, 4, 4), (3, 3, 3))
    ours, theirs = (
        torch.autograd.grad(f(x, w).square().sum(), (x, w))
        for f in (lambda x, w: depthwise_conv3d(x, w, own=True), framework)
    )
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize(
    "layout", [lambda v: v.to(memory_format=torch.channels_last_3d), lambda v: v[..., ::2], lambda v: v.transpose(3, 4)]
)
def test_layouts(layout):
    "Channels last, strided, and transposed inputs and gradients, in the type that training uses."
    x, w, b = inputs((3, 16, 4, 12, 12), (3, 3, 3), torch.float)
    y = depthwise_conv3d(layout(x), w, b)
    assert "DepthwiseConv" in type(y.grad_fn).__name__
    g = layout(torch.randn(3, 16, 4, 12, 12))
    exact = [a.detach().double().requires_grad_() for a in (x, w, b)]
    wanted = torch.autograd.grad(framework(layout(exact[0]), *exact[1:]), exact, g.double())
    for a, e in zip(torch.autograd.grad(y, (x, w, b), g), wanted): assert (a - e).abs().max() < 3e-6 * e.abs().max()


def test_rounding_of_a_large_map():
    x, w, b = inputs((1, 16, 8, 56, 56), (7, 7, 7), torch.float)
    g, exact = torch.randn(x.shape), [a.detach().double() for a in (x, w, b)]
    (ours,) = torch.autograd.grad(depthwise_conv3d(x, w, b, own=True), w, g)
    # 3 slices and 2 rows on, 1 column back
    lag = (exact[0][:, :, 3:, 2:, :-1] * g.double()[:, :, :-3, :-2, 1:]).sum((0, 2, 3, 4))
    # that many random terms have this size
    assert (ours[:, 0, 6, 5, 2] - lag).abs().max() < 5e-6 * g[0, 0].numel() ** 0.5


def test_two_runs_are_identical_whatever_the_threads():
    x, w, b = inputs((2, 32, 4, 14, 14), (7, 7, 7), torch.float)
    before, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            runs.append(torch.autograd.grad(depthwise_conv3d(x, w, b).square().sum(), (x, w)))
    finally: torch.set_num_threads(before)
    assert all(torch.equal(a, r) for other in runs[1:] for a, r in zip(runs[0], other))


def test_the_rule_depends_on_shape_and_type_only():
    def own(x, w, b=None): return "DepthwiseConv" in type(depthwise_conv3d(x, w, b).grad_fn).__name__
    large, small = inputs((4, 16, 6, 12, 12), (3, 3, 3), torch.float), inputs((1, 8, 4, 8, 8), (3, 3, 3), torch.float)
    assert own(*large) and not own(*small) and not own(*[a.double() for a in large])
    with torch.no_grad(): assert torch.equal(depthwise_conv3d(*large), framework(*large))
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv3d(*large)
        assert y.dtype == torch.bfloat16 and not own(*large) and torch.equal(y, framework(*large))
    meta = depthwise_conv3d(*[a.to("meta") for a in large])
    assert meta.shape == large[0].shape


def test_refuses_what_is_not_depthwise():
    x = torch.randn(1, 4, 3, 3, 3)
    for w in (torch.randn(4, 1, 2, 3, 3), torch.randn(4, 2, 3, 3, 3), torch.randn(2, 1, 3, 3, 3)):
        with pytest.raises(VfmError, match="odd sides"): depthwise_conv3d(x, w)


def test_refuses_own_gradients_in_half_precision():
    args = inputs((1, 16, 3, 4, 4), (3, 3, 3), torch.float)
    with pytest.raises(VfmError, match="float32 and float64"): depthwise_conv3d(*[a.bfloat16() for a in args], own=True)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(VfmError, match="autocast"):
        depthwise_conv3d(*args, own=True)


def test_layer_is_the_frameworks_to_state_and_seed():
    torch.manual_seed(0); ours = DepthwiseConv3d(32, 5)
    torch.manual_seed(0); theirs = torch.nn.Conv3d(32, 32, 5, padding=2, groups=32)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    x = torch.randn(1, 32, 2, 7, 8)
    assert torch.equal(ours(x), theirs(x))


def plain_gradients(net, x, monkeypatch):
    "Features and gradients of a network whose depthwise layers are the framework's."
    with monkeypatch.context() as m:
        m.setattr(DepthwiseConv3d, "forward", torch.nn.Conv3d.forward)
        return gradients(net, x)


def gradients(net, x, once=lambda f, x: f(x)):
    "Features and the gradients of all parameters."
    net.zero_grad()
    maps = once(net, x)
    sum(m.square().mean() for m in maps).backward()
    return maps, {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def encoder():
    torch.manual_seed(0)
    return ConvNeXt3d(3, depths=(1, 1, 1), dims=(16, 32, 32), kernel=7, stem=(2, 4, 4), downs=(2, 1)), torch.randn(
        2, 3, 8, 48, 48
    )


def close(a, b): return (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_encoder_keeps_features_and_gradients(monkeypatch):
    net, x = encoder()
    assert all(isinstance(m, DepthwiseConv3d) for n, m in net.named_modules() if n.endswith("dwconv"))
    (maps, ours), (plain, theirs) = gradients(net, x), plain_gradients(net, x, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(maps, plain))
    assert ours.keys() == theirs.keys() and all(close(ours[k], theirs[k]) for k in ours)


def test_checkpointing_changes_nothing():
    net, x = encoder()
    (_, wanted), (_, again) = gradients(net, x), gradients(net, x, lambda f, x: checkpoint(f, x, use_reentrant=False))
    assert all(torch.equal(again[k], wanted[k]) for k in wanted)


def test_compiled_in_one_graph():
    args = inputs((1, 16, 2, 9, 9), (7, 7, 7), torch.float)
    compiled = torch.compile(depthwise_conv3d, backend="aot_eager", fullgraph=True)
    ours, wanted = (torch.autograd.grad(f(*args).square().sum(), args) for f in (compiled, depthwise_conv3d))
    assert all(close(a, b) for a, b in zip(ours, wanted))


def test_conv_mae_uses_it():
    with torch.device("meta"): net = ConvMAE3d()
    assert {type(m) for n, m in net.named_modules() if n.endswith("dw_conv")} == {DepthwiseConv3d}
