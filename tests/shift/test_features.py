"""Collecting features and the distance to pretraining: nothing is disturbed, everything is said."""
import numpy as np
import pytest
import torch
from torch import nn
from vfm_notes.foundation.registry import VfmError
from vfm_notes.shift.features import collect_features, distance_to_pretraining, layer_distances, standardise_pair


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv3d(2, 5, 1), nn.BatchNorm3d(5), nn.Dropout(0.5)
    def layers(self, x):
        y = self.norm(self.conv(x)).mean((2, 3, 4))
        return {"early": y, "embed": self.drop(y)}


def u_statistic(x, y):
    "Gretton et al. 2012, eq. 4, written out: no term compares a case with itself."
    pooled = np.concatenate([x, y])
    sigma2 = np.median([((a - b)**2).sum() for i, a in enumerate(pooled) for b in pooled[:i]])/2
    def k(a, b): return np.exp(-((a - b)**2).sum()/(2*sigma2))
    n = len(x)
    return sum(
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i in range(n) for j in range(n) if i != j
    ) / (n * (n - 1))


def test_collect_disturbs_nothing():
    torch.manual_seed(0)
    net, x = Noisy(), torch.randn(7, 2, 3, 4, 4)
    net.norm.eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    one, two = collect_features(net, x, batch_size=3), collect_features(net, x.numpy(), batch_size=7)
    assert list(one) == ["early", "embed"] and one["embed"].shape == (7, 5)
    for k in one: torch.testing.assert_close(one[k], two[k])
    assert not one["embed"].requires_grad and one["embed"].dtype == torch.float32
    assert net.training and net.drop.training and not net.norm.training
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    class Broken(Noisy):
        def layers(self, x): raise RuntimeError("out of memory")
    broken = Broken()
    with pytest.raises(RuntimeError): collect_features(broken, x)
    assert broken.training and broken.norm.training


def test_standardised_by_the_pretrained_features_only():
    r = np.random.default_rng(0)
    before, after = r.normal(5, [1.0, 100.0, 1e-3], (30, 3)), r.normal(6, [2.0, 300.0, 1e-3], (30, 3))
    a, b, dropped = standardise_pair(torch.from_numpy(before), torch.from_numpy(after))
    np.testing.assert_allclose(a, (before - before.mean(0)) / before.std(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(b, (after - before.mean(0)) / before.std(0), rtol=1e-9, atol=1e-9)
    assert dropped == 0
    before[:, 1] = 7.25
    a, b, dropped = standardise_pair(torch.from_numpy(before).float(), torch.from_numpy(after).float())
    assert dropped == 1 and a.shape == b.shape == (30, 2)
    with pytest.raises(VfmError, match="layer 'x'"): standardise_pair(torch.ones(5, 2), torch.rand(5, 2), "x")


def test_distance_says_everything_and_agrees():
    g = torch.Generator().manual_seed(1)
    before = {k: torch.randn(24, 8, generator=g) for k in ("a", "b", "c")}
    after = {"a": before["a"].clone(), "b": before["b"] * 5 + 3, "c": before["c"] + torch.randn(24, 8, generator=g)}
    t = distance_to_pretraining(before, after, permutations=99, seed=4)
    assert list(t.layer) == ["a", "b", "c"]
    assert {
        "mmd2", "p_value", "bandwidth", "n", "estimator", "bandwidth_rule", "pooling", "standardised", "seed",
    } <= set(t.columns)
    assert list(t.n) == [24] * 3 and t.p_value[0] == 1 and t.p_value[1] == 0.01
    assert t.mmd2[0] == pytest.approx(0, abs=1e-12) and t.mmd2_independent[0] < 0 < t.mmd2[1]
    for (k, v), value in zip(layer_distances(before, after).items(), t.mmd2):
        b, a = (z.double().numpy() for z in (before[k], after[k]))
        assert v == pytest.approx(value, abs=1e-12)
        assert v == pytest.approx(u_statistic((b - b.mean(0)) / b.std(0), (a - b.mean(0)) / b.std(0)), abs=1e-9)
    scaled = distance_to_pretraining({"a": before["c"] * 1000}, {"a": after["c"] * 1000}, permutations=9)
    assert scaled.mmd2[0] == pytest.approx(t.mmd2[2], abs=1e-6)


@pytest.mark.parametrize("after,words", [
    ({"a": torch.rand(5, 2)}, "'b' (only before)"),
    ({"a": torch.rand(5, 2), "b": torch.rand(5, 2), "z": torch.rand(5, 2)}, "'z' (only after)"),
    ({"a": torch.rand(5, 2), "b": torch.rand(5, 3)}, "'b' (5, 2) against (5, 3)"),
    ({"a": torch.rand(4, 2), "b": torch.rand(5, 2)}, "'a' (5, 2) against (4, 2)"),
])
def test_layers_that_do_not_match_are_named(after, words):
    for f in (layer_distances, distance_to_pretraining):
        with pytest.raises(VfmError) as e: f({"a": torch.rand(5, 2), "b": torch.rand(5, 2)}, after)
        assert words in str(e.value)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_cases(n):
    with pytest.raises(VfmError): layer_distances({"a": torch.rand(n, 2)}, {"a": torch.rand(n, 2)})


def test_features_that_are_not_numbers_name_their_layer():
    bad = torch.rand(6, 2); bad[1, 1] = float("nan")
    for before, after in (({"late": torch.rand(6, 2)}, {"late": bad}), ({"late": bad}, {"late": torch.rand(6, 2)})):
        for f in (layer_distances, distance_to_pretraining):
            with pytest.raises(VfmError, match="late"): f(before, after)
