"""The objectives' equations against slow explicit computations, closed forms and other libraries."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from test_layouts import SMALL, dense, sparse_encoder
from vfm_notes.backbones.profound import ProFound, profound_toy
from profound_networks import FCMAE, sparse_state
from vfm_notes.backbones.profound import profound_convmae, profound_vit
from vfm_notes.backbones.provicnet import provicnet_toy
from vfm_notes.data.loader import Loader
from vfm_notes.foundation.registry import VfmError, backbones
from vfm_notes.nets.convnext3d import enlarge_mask
from vfm_notes.pretrain.reconstruction import Adversarial, discriminator_bce
from vfm_notes.pretrain.reconstruction import Autoencoding, image_loss, ssim_loss
from vfm_notes.pretrain.diffusion import Diffusion, predict_clean, sample_volume, schedulers
from vfm_notes.pretrain.distillation import SelfDistillation, Teacher, distillation_loss, small_crop
from vfm_notes.pretrain.reconstruction import MaskedReconstruction, draw_mask, normalised_patches
from vfm_notes.pretrain.distillation import MaskedTokens, token_encoder
from vfm_notes.pretrain.trainer import TrainConfig, Trainer
from vfm_notes.pretrain.contrast import NTXent, VIEWS, draw_views, nt_xent


# masking

@pytest.mark.parametrize("ratio,what", [(0.99, "nothing would be visible"), (0.01, "nothing would be hidden")])
def test_masks_of_all_or_nothing_are_refused(ratio, what):
    with pytest.raises(VfmError, match=f"mask_ratio {ratio} hides .* of the 8 patches .*{what}"):
        draw_mask(torch.zeros(1, 1, 4, 8, 8), (2, 4, 4), (2, 4, 4), ratio)
    with pytest.raises(VfmError, match="of the 1 patches .* in a slice"):
        draw_mask(torch.zeros(1, 1, 4, 4, 4), (1, 4, 4), (1, 4, 4), 0.6, by_slice=True)


def test_masks_by_slice_hide_the_same_number_everywhere():
    keep = draw_mask(torch.zeros(3, 1, 6, 32, 32), (2, 8, 8), (1, 8, 8), 0.75, by_slice=True)
    assert (
        keep.shape == (3, 1, 6, 4, 4)
        and (keep.sum((3, 4)) == 4).all()
        and torch.equal(keep[:, :, ::2], keep[:, :, 1::2])
    )
    assert not torch.equal(keep[0], keep[1])


def test_dense_masked_loss_equals_the_sparse_encoders():
    """The same decoder on the map of an independent sparse encoder, which never computes a hidden cell, gives the same
    prediction and the same loss."""
    torch.manual_seed(0)
    objective = MaskedReconstruction(ProFound("profound_toy", 2, **SMALL), width=8).double().eval()
    for p in objective.parameters(): nn.init.normal_(p, std=0.3)
    layout = FCMAE(objective.backbone.encoder, 8, 3).double()
    x, keep = torch.randn(1, 2, 32, 32, 32, dtype=torch.float64), torch.ones(1, 1, 2, 2, 2, dtype=torch.float64)
    keep[0, 0, 0, 1, 0] = keep[0, 0, 1, 0, 1] = keep[0, 0, 1, 1, 1] = 0
    with torch.no_grad():
        seen = sparse_encoder(
            x, sparse_state(layout), SMALL["depths"], 3,
            active=lambda u: keep[0, 0, u[0] // 4, u[1] // 4, u[2] // 4] > 0,
        )[-1]
        assert len(seen) == int(keep.sum())  # nothing else exists
        y = objective.proj(
            dense(seen, objective.backbone.masked_pyramid(x, keep)[-1])
        ) * keep + objective.mask_token * (1 - keep)
        wanted = objective.pred(objective.decoder(y))
        got = objective(x, keep)
        assert (got - wanted).abs().max() < 1e-10 * wanted.abs().max()
        target = normalised_patches(x, objective.cell)[0]
        hidden = (keep == 0).expand_as(target)
        objective.keep = lambda x: keep
        assert math.isclose(objective.loss({"volumes": x})[0], (wanted - target)[hidden].square().mean(), rel_tol=1e-10)


TRANSFORMERS = {
    "provicnet": (provicnet_toy, (4, 32, 32)), "vit": (lambda: profound_vit(3, tiny=True), (16, 64, 64)),
    "convmae": (lambda: profound_convmae(3, tiny=True), (16, 64, 64)),
    "dinov2": (lambda: backbones["dinov2_small"](3, tiny=True), (2, 64, 64)),
    "dinov2 in triplets": (lambda: backbones["dinov2_small_triplets"](3, tiny=True), (3, 64, 64)),
    "monai": (lambda: backbones["vit_3d"](3, tiny=True), (16, 24, 32)),
}


@pytest.fixture(params=TRANSFORMERS)
def tokens(request):
    torch.manual_seed(0)
    make, size = TRANSFORMERS[request.param]
    backbone = make()
    size = tuple(-(-s // c) * c if s % c else s for s, c in zip(size, backbone.strides[-1]))
    return MaskedTokens(backbone, 0.5).eval(), torch.randn(2, 3, *size)


def test_hidden_voxels_do_not_matter_bit_for_bit(tokens):
    objective, x = tokens
    keep = objective.keep(x)
    hidden = enlarge_mask(1 - keep, x.shape[2:]).bool()
    for other in (torch.randn_like(x), torch.full_like(x, 1e6)):
        assert torch.equal(objective(x, keep), objective(torch.where(hidden, other, x), keep))
    moved = objective(torch.where(hidden, x, x + 0.1 * torch.randn_like(x)), keep)
    assert not torch.allclose(objective(x, keep), moved, atol=1e-4)


def test_only_visible_tokens_are_encoded(tokens):
    objective, x = tokens
    cells = [n // c for n, c in zip(x.shape[2:], objective.cell)]
    whole, sequences = (
        (cells[1] * cells[2], len(x) * cells[0]) if objective.by_slice else (cells[0] * cells[1] * cells[2], len(x))
    )
    lengths = set()
    hooks = [
        m.register_forward_hook(lambda m, given, out: lengths.add(given[0].shape[1] if given[0].ndim == 3 else 0))
        for m in objective.backbone.modules()
        if type(m) is nn.LayerNorm
    ]
    objective.read(objective.backbone, x, torch.arange(whole // 2).expand(sequences, -1))
    for hook in hooks: hook.remove()
    assert whole // 2 <= max(lengths) <= whole // 2 + 7  # class, register and slice tokens


def test_with_all_tokens_visible_it_is_the_encoder(tokens):
    objective, x = tokens
    backbone, last = objective.backbone, objective.backbone.pyramid(x)[-1]
    cells = last.permute(0, 2, 3, 4, 1)
    rows = cells.flatten(0, 1).flatten(1, 2) if objective.by_slice else cells.flatten(1, 3)
    got = token_encoder(backbone)(backbone, x, torch.arange(rows.shape[1]).expand(len(rows), -1))
    assert torch.allclose(got, rows, atol=1e-5)


# NT-Xent

def test_nt_xent_by_double_loop():
    torch.manual_seed(0)
    a, b, tau = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64), 0.3
    z = [v / v.norm() for v in torch.cat([a, b])]
    total = 0.0
    for i in range(10):
        partner = i + 5 if i < 5 else i - 5
        s = [math.exp(float(z[i] @ z[k]) / tau) for k in range(10)]
        total += -math.log(s[partner] / sum(s[k] for k in range(10) if k != i))
    assert math.isclose(nt_xent(a, b, tau), total / 10, rel_tol=1e-12)


def test_nt_xent_equals_monai():
    from monai.losses import ContrastiveLoss
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    assert torch.allclose(nt_xent(a, b, 0.5), ContrastiveLoss(temperature=0.5)(a, b), atol=1e-5)


def test_views_differ_and_follow_the_seed():
    x = torch.randn(3, 2, 4, 16, 16)
    draw = lambda: (torch.manual_seed(3), draw_views(x, VIEWS, 3))[1]
    a, b = draw(), draw()
    assert all(torch.equal(p, q) for p, q in zip(a, b)) and not any(
        torch.equal(p, q) for p, q in itertools.combinations(a, 2)
    )


def test_one_case_cannot_be_contrasted():
    with pytest.raises(VfmError, match="batch of one; set batch_size to 2"):
        NTXent(provicnet_toy()).loss({"volumes": torch.zeros(1, 3, 4, 16, 16)})


# self-distillation

def test_distillation_by_loops():
    torch.manual_seed(0)
    t, s, c = (
        [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)],
        [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)], torch.randn(4, dtype=torch.float64),
    )
    terms = []
    for i, j in itertools.product(range(2), range(3)):
        if i == j: continue
        for b in range(3):
            q = [math.exp((float(v) - float(m)) / 0.05) for v, m in zip(t[i][b], c)]
            p = [math.exp(float(v) / 0.2) for v in s[j][b]]
            terms.append(-sum(qk / sum(q) * math.log(pk / sum(p)) for qk, pk in zip(q, p)))
    assert math.isclose(distillation_loss(t, s, c, (0.05, 0.2)), sum(terms) / len(terms), rel_tol=1e-10)


def test_centre_and_teacher_follow_their_recursions():
    torch.manual_seed(0)
    student = nn.Linear(3, 4).double()
    teacher = Teacher(student, 4, momentum=0.8, centre_momentum=0.7).double()
    w, c = [student.weight.detach().clone()], torch.zeros(4, dtype=torch.float64)
    for _ in range(5):
        views = [torch.randn(6, 3, dtype=torch.float64) for _ in range(2)]
        out = torch.cat([v @ w[-1].T + teacher.net.bias for v in views])
        assert torch.allclose(torch.cat(teacher(views)), out, atol=1e-12)
        with torch.no_grad(): student.weight += torch.randn_like(student.weight)
        teacher.follow(student)
        c = 0.7 * c + 0.3 * out.mean(0)
        w.append(0.8 * w[-1] + 0.2 * student.weight.detach())
        assert torch.allclose(teacher.centre, c, atol=1e-12) and torch.allclose(teacher.net.weight, w[-1], atol=1e-12)


def test_the_trainer_moves_the_teacher_and_gradients_do_not_reach_it():
    torch.manual_seed(0)
    objective = SelfDistillation(provicnet_toy(), momentum=0.5)
    start = {n: p.clone() for n, p in objective.teacher.net.named_parameters()}
    loader = Loader({"volumes": torch.randn(4, 3, 2, 16, 16)}, 2)
    trainer = Trainer(objective, lambda m, b: m.loss(b), loader, TrainConfig(epochs=1, lr=1e-3))
    trainer.run_epoch()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert (
        any(not torch.equal(p, start[n]) for n, p in objective.teacher.net.named_parameters())
        and objective.teacher.centre.abs().sum() > 0
    )
    again = SelfDistillation(provicnet_toy(), momentum=0.5)
    again.load_state_dict(objective.state_dict())  # a checkpoint holds teacher and centre
    assert torch.equal(again.teacher.centre, objective.teacher.centre)


def test_small_crops_are_windows():
    x = torch.arange(2 * 48 * 64.).reshape(1, 1, 2, 48, 64)
    for _ in range(20):
        crop = small_crop(x, (1, 16, 16), 0.5)
        y, z = divmod(int(crop[0, 0, 0, 0, 0]), 64)
        assert crop.shape[3:] == (32, 32) and torch.equal(crop, x[..., y:y + 32, z:z + 32])


# autoencoding and adversarial

def test_ssim_takes_its_range_from_each_case():
    from scipy.signal import correlate2d
    rng, g = np.random.default_rng(0), np.exp(-np.arange(-3, 4) ** 2 / (2 * 1.5 ** 2))
    window = np.outer(g, g) / g.sum() ** 2
    x = np.stack([rng.normal(0, s, (1, 3, 24, 24)) for s in (1, 50)])
    made, values, mean = (
        x + np.stack([rng.normal(0, s, (1, 3, 24, 24)) for s in (0.5, 10)]), [],
        lambda v: correlate2d(v, window, "valid"),
    )
    for v, m in zip(x, made):
        c1, c2 = (0.01 * np.ptp(v)) ** 2, (0.03 * np.ptp(v)) ** 2
        for a, b in zip(v[0], m[0]):
            va, vb, ab = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2, mean(a * b) - mean(a) * mean(b)
            values.append(
                (
                    (2 * mean(a) * mean(b) + c1) * (2 * ab + c2) / ((mean(a) ** 2 + mean(b) ** 2 + c1) * (va + vb + c2))
                ).mean()
            )
    assert math.isclose(ssim_loss(torch.tensor(made), torch.tensor(x)), 1 - np.mean(values), rel_tol=1e-4)


def test_image_loss_mixes():
    x, y = torch.randn(2, 1, 2, 16, 16), torch.randn(2, 1, 2, 16, 16)
    assert torch.allclose(image_loss(y, x, 0.25), 0.75 * (x - y).square().mean() + 0.25 * ssim_loss(y, x))
    assert torch.equal(image_loss(y, x, 0.0), F.mse_loss(y, x))


def test_nothing_leads_around_the_encoder():
    "Made volumes of a constant map are constant: the decoder sees the map alone."
    objective, x = Autoencoding(profound_toy()).eval(), torch.randn(2, 3, 4, 32, 32)
    objective.backbone.pyramid = lambda x: [torch.zeros(len(x), 128, 2, 2, 2)]
    made = objective(x)
    assert torch.equal(made[0], made[1])


@pytest.fixture(params=[False, True], ids=["sum", "alternate"])
def game(request):
    torch.manual_seed(0)
    return Adversarial(provicnet_toy(), weight=0.3, alternate=request.param), torch.randn(2, 3, 2, 32, 32)


def gradients(objective, loss):
    objective.zero_grad()
    loss.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in objective.named_parameters()}


def test_each_term_moves_its_own_parameters_only(game):
    objective, x = game
    made = objective(x)
    g = gradients(objective, objective.generator_loss(made, x)[0])
    d = gradients(objective, objective.discriminator_loss(objective(x), x)[0])
    judge = {n for n in g if n.startswith("discriminator.")}
    assert all(g[n] is None for n in judge) and all(d[n] is None for n in set(d) - judge)
    assert (
        all(d[n].abs().sum() > 0 for n in judge)
        and sum(g[n].abs().sum() > 0 for n in set(g) - judge if g[n] is not None) > 20
    )


def test_one_backward_gives_the_gradients_of_two_optimisers(game):
    objective, x = game
    made = objective(x)
    # plain: then only the generator's gradients are read
    rec = (made - x).square().mean() + 0.3 * discriminator_bce(objective.discriminator(made), True)
    g = gradients(objective, rec)
    score = lambda v: objective.discriminator(v)
    d = gradients(objective, (F.softplus(-score(x)).mean() + F.softplus(score(objective(x).detach())).mean()) / 2)
    turns = []
    for _ in range(2):
        turns.append(gradients(objective, objective.loss({"volumes": x})[0]))
        objective.after_step()
    for n in g:
        mine, wanted = n.startswith("discriminator."), (d if n.startswith("discriminator.") else g)[n]
        if wanted is None: continue
        if not objective.alternate: assert all(torch.allclose(t[n], wanted, atol=1e-7) for t in turns)
        else: assert torch.allclose(turns[mine][n], wanted, atol=1e-7) and turns[not mine][n] is None


def test_cross_entropy_equals_monai():
    from monai.losses import PatchAdversarialLoss
    scores = torch.randn(2, 1, 5, 5)
    for real in (True, False):
        assert torch.allclose(
            discriminator_bce(scores, real),
            PatchAdversarialLoss(criterion="bce")(scores, real, for_discriminator=True), atol=1e-6,
        )


# diffusion

def test_betas_are_scaled_linear():
    ours, _ = schedulers("epsilon", 1000, (0.005, 0.02))
    betas = np.linspace(0.005 ** 0.5, 0.02 ** 0.5, 1000) ** 2
    assert np.allclose(ours.betas, betas, rtol=1e-5) and np.allclose(
        ours.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-3
    )


def test_noised_volumes_have_the_marginals_of_the_chain():
    "x_t at once has the mean and variance of t + 1 small steps."
    objective, t = Diffusion(provicnet_toy(), steps=50), 20
    betas = np.linspace(0.005 ** 0.5, 0.02 ** 0.5, 50) ** 2
    mean, variance = 3.0, 0.0
    for beta in betas[:t + 1]: mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    torch.manual_seed(0)
    noisy, _ = objective.noised(torch.full((1, 1, 10, 100, 100), 3.0), torch.tensor([t]))
    assert abs(noisy.mean() - mean) < 0.01 and abs(noisy.var() - variance) < 0.01


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_a_perfect_answer_gives_the_volume_back(prediction):
    objective, x, t = (
        Diffusion(provicnet_toy(), prediction), torch.randn(2, 1, 2, 8, 8, dtype=torch.float64), torch.tensor([3, 400]),
    )
    noisy, noise = objective.noised(x, t)
    assert torch.allclose(predict_clean(objective, noise if prediction == "epsilon" else x, noisy, t), x, atol=1e-6)
    objective.forward = lambda noisy, t: objective.answer
    torch.manual_seed(4); t = torch.randint(1000, (2,)); noisy, noise = objective.noised(x, t)
    objective.answer = noise if prediction == "epsilon" else x
    torch.manual_seed(4)
    assert objective.loss({"volumes": x})[0] < 1e-12


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_drawing_with_the_best_answer_gives_the_distribution(prediction):
    "Data N(2, 0.5²): the best possible answers are known, and drawing with them must give that mean and spread."
    objective = Diffusion(provicnet_toy(), prediction)
    def best(noisy, t):
        kept = objective.forwards.alphas_cumprod[t[0]]
        x0 = 2 + 0.25 * kept.sqrt() / (0.25 * kept + 1 - kept) * (noisy - kept.sqrt() * 2)
        return x0 if prediction == "sample" else (noisy - kept.sqrt() * x0) / (1 - kept).sqrt()
    objective.forward = best
    torch.manual_seed(0)
    drawn = sample_volume(objective, torch.randn(1, 1, 5, 50, 50), steps=1000)
    assert abs(drawn.mean() - 2) < 0.02 and abs(drawn.std() - 0.5) < 0.02


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: Diffusion(provicnet_toy(), steps=1), "steps 1"),
        (lambda: Diffusion(provicnet_toy(), betas=(0.1, 0.01)), "betas"),
        (lambda: Diffusion(provicnet_toy(), look=1.0), "look is 1.0"),
        (lambda: NTXent(provicnet_toy(), temperature=-1), "temperature is -1"),
        (lambda: SelfDistillation(provicnet_toy(), centre_momentum=1), "centre_momentum 1"),
        (lambda: MaskedTokens(provicnet_toy(), width=10), "width 10 is not a multiple"),
        (lambda: MaskedTokens(provicnet_toy(), mask_ratio=1.5), "mask_ratio is 1.5"),
        (lambda: Adversarial(provicnet_toy(), weight=-1), "weight is -1"),
        (lambda: Autoencoding(provicnet_toy(), ssim=2), "ssim is 2"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(VfmError, match=match): make()
