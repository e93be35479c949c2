"""Heads at several learning rates on a frozen encoder: features once (`tune.probe`), against training through the
encoder.

Both take the same steps on the same cases in the same order, without augmentation, with the same trainer. The
encoder is in
evaluation mode and without gradients in both, so the alternative is the best that one can do without keeping its
features.
The alternative trains one head and is multiplied, unless --whole asks for every head.
"""
import argparse
import copy
import time
from dataclasses import replace

import torch

from vfm_notes.foundation.registry import backbones
from vfm_notes.foundation.spec import RunSpec
from vfm_notes.nets.decoder import ClassificationHead, Network
from vfm_notes.tune import catalog  # fills the registries
from vfm_notes.tune.fit import fit, training_batches
from vfm_notes.tune.probe import CachedHead, cache_features
from vfm_notes.tune.strategy import apply_strategy
from vfm_notes.tune.task import TaskData

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 1e-1)
ENCODERS = {"profound_toy": (12, 48, 48), "provicnet_toy": (12, 48, 48), "resnet18_3d": (32, 64, 64)}


class Classes:
    "A loss, and nothing else of a task."
    def loss(self, output, target): return torch.nn.functional.cross_entropy(output, target)


def network(name):
    torch.manual_seed(0)
    backbone = backbones[name](in_channels=3)
    model = Network(backbone, ClassificationHead(backbone, 3))
    apply_strategy("probe", model)
    return model


def train(net, data, spec):
    return (
        fit(net, Classes(), training_batches(data, spec, ()), spec, lambda epoch: {})[0]
        .query("name == 'loss'")
        .value.to_numpy()
    )


def compare(name, size, cases, epochs, whole):
    "Seconds of both ways, and the largest difference of a loss."
    torch.manual_seed(1)
    names = [str(i) for i in range(cases)]
    data = TaskData(torch.randn(cases, 3, *size), torch.arange(cases) % 3, names, names, (1, 1, 1))
    specs = [RunSpec(epochs=epochs, lr=lr, batch_size=8) for lr in RATES]
    train(network(name), data.first(4), replace(specs[0], epochs=1))  # imports, first calls; not timed
    start = time.perf_counter()
    net, rows = cache_features(network(name), {"train": data})
    encoder = time.perf_counter() - start
    fresh = network(name).head
    quick = [train(CachedHead(copy.deepcopy(fresh), net.shapes), rows["train"], s) for s in specs]
    once = time.perf_counter() - start
    start = time.perf_counter()
    slow = [train(network(name), data, s) for s in (specs if whole else specs[2:3])]
    through = (time.perf_counter() - start) * (1 if whole else len(specs))
    return once, encoder, through, max(abs(a - b).max() for a, b in zip(quick if whole else quick[2:3], slow))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--whole", action="store_true", help="train every head through the encoder, not one")
    parser.add_argument("--encoders", nargs="*", default=list(ENCODERS))
    given = parser.parse_args()
    print(
        f"{len(RATES)} heads (learning rates), {given.cases} cases, {given.epochs} epochs, batches of 8, "
        f"{torch.get_num_threads()} thread(s)"
    )
    print(
        f"{'encoder':<16} {'size':<14} {'features once, s':>17} {'of it encoder, s':>17} {'through encoder, s':>19} "
        f"{'ratio':>7} {'loss differs by':>16}"
    )
    for name in given.encoders:
        once, encoder, through, gap = compare(name, ENCODERS[name], given.cases, given.epochs, given.whole)
        print(
            f"{name:<16} {str(ENCODERS[name]):<14} {once:>17.2f} {encoder:>17.2f} {through:>19.2f} "
            f"{through / once:>7.1f} {gap:>16.1e}",
            flush=True,
        )
