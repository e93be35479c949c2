"""The depthwise 3D convolution against the framework's own, at the sizes that the networks use.

Processor time of one thread, best of repeats, the two taken in turn, so that neighbours on the machine count
little. The
layout is the one that the encoder's first layers hand on (channels last) and the framework's default (channels
first).
"""
import subprocess
import sys
import time

import torch

from vfm_notes.nets import depthwise_conv3d

SHAPES = [
    ("ProFound stage 1", (1, 96, 16, 56, 56), 7), ("ProFound stage 2", (1, 192, 8, 28, 28), 7),
    ("ProFound stage 3", (1, 384, 4, 14, 14), 7), ("ProFound stage 4", (1, 768, 4, 14, 14), 7),
    ("ConvMAE stage 1", (1, 64, 4, 64, 64), 5), ("ConvMAE stage 2", (1, 128, 4, 32, 32), 5),
    ("toy stage 1", (4, 16, 6, 12, 12), 3), ("toy stage 2", (4, 32, 3, 6, 6), 3), ("toy stage 3", (4, 64, 3, 3, 3), 3),
    ("toy stage 4", (4, 128, 3, 3, 3), 3), ("few channels", (1, 4, 16, 200, 200), 3),
    ("wide map", (1, 16, 32, 128, 128), 3), ("below the rule", (1, 8, 4, 8, 8), 3),
]
LAYOUTS = {"last": torch.channels_last_3d, "first": torch.contiguous_format}

ENCODER = """
import sys, time, torch
from vfm_notes.nets.convnext3d import ConvNeXt3d, DepthwiseConv3d
if sys.argv[1] == "framework": DepthwiseConv3d.forward = torch.nn.Conv3d.forward
torch.set_num_threads(1)
torch.manual_seed(0)
net, x = ConvNeXt3d(), torch.randn(1, 3, 64, 224, 224)
start = time.process_time()
sum(m.square().mean() for m in net(x)).backward()
took = time.process_time() - start
peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]
print(took, int(peak) / 1024)
"""


def best(calls, budget=0.3):
    "Seconds of one call of each, taken in turn, best of repeats."
    took = [float("inf")] * len(calls)
    for f in calls: f()
    spent = 0.
    while spent < budget * len(calls):
        for i, f in enumerate(calls):
            n = max(int(0.01 / took[i]), 1)
            start = time.process_time()
            for _ in range(n): f()
            spent += (e := time.process_time() - start)
            took[i] = min(took[i], e / n)
    return took


def compare(shape, k, layout):
    "Milliseconds (framework, ours) of the forward and of forward + backward."
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    w, b, g = (
        torch.randn(shape[1], 1, k, k, k).requires_grad_(), torch.randn(shape[1]).requires_grad_(), torch.randn_like(x),
    )
    def forward(own): return lambda: depthwise_conv3d(x, w, b, own)
    def both(own): return lambda: torch.autograd.grad(depthwise_conv3d(x, w, b, own), (x, w, b), g)
    return [t * 1e3 for f in (forward, both) for t in best([f(False), f(None)])]


def encoder(which):
    done = subprocess.run([sys.executable, "-c", ENCODER, which], capture_output=True, text=True, check=True)
    return [float(v) for v in done.stdout.split()]


def main():
    torch.set_num_threads(1)
    print(
        "milliseconds of processor time, 1 thread, float32, by the rule of depthwise_conv3d\n"
        f"{'what':18}{'shape':24}{'k':>2} "
        f"{'channels':9}{'forward':>9}{'ours':>9}{'fwd+bwd':>10}{'ours':>9}{'ratio':>7}"
    )
    for name, shape, k in SHAPES:
        for label, layout in LAYOUTS.items():
            a, b, c, d = compare(shape, k, layout)
            print(f"{name:18}{str(shape):24}{k:2} {label:9}{a:9.3f}{b:9.3f}{c:10.3f}{d:9.3f}{c / d:7.1f}", flush=True)
    (slow, high), (fast, low) = encoder("framework"), encoder("ours")
    print(
        f"whole ProFound encoder, 64x224x224, forward + backward: {slow:.1f} s and {high:.0f} MiB with the "
        f"framework's, {fast:.1f} s and {low:.0f} MiB with ours: {slow / fast:.1f} times faster"
    )


if __name__ == "__main__": main()
