"""What a card says of torch.compile, bfloat16 and gradient checkpointing, on the smallest version of every backbone."""
import copy
import os

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("transformers")
from vfm_notes.backbones.protocol import backbone_card, repeated_blocks, checkpoint_blocks
from vfm_notes.backbones.keys import build_tiny
from vfm_notes.foundation.registry import VfmError, backbones
from vfm_notes.tune import catalog  # fills the registries

NAMES, QUICK = list(backbones), ("profound_toy", "efficientnet_toy", "dinov2_small", "simple_mhl")


def same_network(name):
    "What two backbones share when their smallest versions are the same code: classes and shapes."
    with torch.random.fork_rng(): model = build_tiny(name, 1)
    return str([type(m).__qualname__ for m in model.modules()]) + str([tuple(p.shape) for p in model.parameters()])


@pytest.fixture(scope="module")
def firsts():  # signature → the first backbone that has it
    found = {}
    for n in NAMES: found.setdefault(same_network(n), n)
    return set(found.values())


def case(name):
    torch.manual_seed(0)
    model = build_tiny(name, 1)
    torch.manual_seed(1)
    return model, torch.randn(2, 1, *(max(2 * s, 2) for s in model.strides[-1]))


def gradients(model, x):
    "Of a training step with the same random numbers, and the state after it."
    torch.manual_seed(2)
    (sum(m.square().mean() for m in model.pyramid(x)) + model.embed(x).square().mean()).backward()
    return {k: p.grad for k, p in model.named_parameters()}, model.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients(name, firsts):
    if name not in firsts: pytest.skip("the same code as another backbone")
    model, x = case(name)
    if not backbone_card(name).checkpointing:
        with pytest.raises(VfmError, match="checkpointing"): checkpoint_blocks(model)
        return
    less = copy.deepcopy(model).train()
    assert checkpoint_blocks(less) == checkpoint_blocks(less) == len(repeated_blocks(model)) > 1
    assert list(less.state_dict()) == list(model.state_dict())
    calls = [0]
    repeated_blocks(less)[0].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    inside = next(m for m in repeated_blocks(less)[0].modules() if not list(m.children()))
    inside.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1000))
    (wanted, state), (got, after) = gradients(model.train(), x), gradients(less, x)
    assert calls[0] >= 1000 * 2 * (calls[0] % 1000) > 0, "nothing was computed a second time"
    for k, g in wanted.items():
        assert (g is None) == (got[k] is None) and (g is None or torch.allclose(g, got[k], rtol=1e-4, atol=1e-6)), k
    assert all(torch.equal(state[k], after[k]) for k in state), "running statistics were counted twice"


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name, firsts):
    if name not in firsts: pytest.skip("the same code as another backbone")
    if not backbone_card(name).bf16: pytest.skip("its card declares it unsupported")
    model, x = case(name)
    model.eval()
    with torch.no_grad():
        exact = [model.embed(x), *model.pyramid(x)]
        with torch.autocast("cpu", torch.bfloat16): low = [model.embed(x), *model.pyramid(x)]
    assert all((a.float() - b).norm() < 0.05 * b.norm() for a, b in zip(low, exact))
    assert not all(torch.equal(a.float(), b) for a, b in zip(low, exact)), "nothing ran in bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_compile_captures_one_graph(name, firsts):
    """`fullgraph` raises at the first break; the graph is run without code generation. Transformers sets something up
    in a first, uncompiled call."""
    if name not in firsts: pytest.skip("the same code as another backbone")
    if not backbone_card(name).compile: pytest.skip("its card declares it unsupported")
    if name not in QUICK and not os.environ.get("VFM_TEST_SLOW"): pytest.skip("minutes for all: set VFM_TEST_SLOW=1")
    model, x = case(name)
    model.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model.embed(x)
        assert torch.allclose(torch.compile(model.embed, backend="eager", fullgraph=True)(x), wanted, atol=1e-5)


def test_a_card_that_declares_it_unsupported_is_obeyed(monkeypatch):
    model, _ = case("profound_toy")
    monkeypatch.setitem(backbones._cards, "profound_toy", backbones.card("profound_toy") | dict(checkpointing=False))
    with pytest.raises(VfmError, match="does not support gradient checkpointing"): checkpoint_blocks(model)


def test_checkpointing_needs_less_memory():
    "Bytes that autograd keeps for the way back."
    kept = []
    for on in (False, True):
        model, x = case("profound_toy")
        if on: checkpoint_blocks(model)
        total = [0]
        def pack(t):
            total[0] += t.numel()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model.embed(torch.randn(1, 1, 12, 64, 64)).sum()
        kept.append(total[0])
        del loss
    assert kept[1] < 0.6 * kept[0], kept
