"""MMD against the matrix products it cannot do without, measured beside it, and against the usual way.

With P = 2n pooled points, f features and B permutations the products are P²/2 (f+2) multiply-adds for one triangle of the
kernel and P²/2 (B+1) for one triangle of kernel times labels. Their time is that of large products of the same shape.
Every time is the best of repeats, every bound the best of those measured before and after each repeat.
"""
import subprocess
import sys
import time

import torch

from vfm_notes.shift.mmd import mmd2, two_sample_test

THREADS, N, D, B, SIGMA = 2, 5000, 384, 1000, 19.6  # cores, cases in each set, features, permutations, bandwidth


clock = time.perf_counter  # what is read: wall time, or processor time on a busy machine


def seconds(f, repeats=1):
    "Time of one call, best of repeats."
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        f()
        best = min(best, clock() - start)
    return best


def triangle(inner, columns):
    "Seconds for P²/2 points at the rate of a product (2048 x inner) @ (inner x columns)."
    a, b, out = torch.randn(2048, inner), torch.randn(inner, columns), torch.empty(2048, columns)
    return seconds(lambda: torch.mm(a, b, out=out), 3) * (2 * N) ** 2 / 2 / 2048**2


def kernel_bound(): return triangle(D + 2, 2048)
def label_bound(): return triangle(2048, B + 1)


def beside(f, bound, repeats):
    "Best seconds and best bound measured beside them."
    took, floor = [], []
    for _ in range(repeats):
        floor.append(bound())
        took.append(seconds(f))
        floor.append(bound())
    return min(took), min(floor)


def usual(x, y, permutations):
    "The usual way: the whole kernel, gathered anew for every permutation; seconds for 1000 of them, from a few."
    z, n = torch.cat([x, y]), len(x)
    k = torch.exp(-torch.cdist(z, z).square() / (2 * SIGMA**2))
    def one():
        p = torch.randperm(len(z))
        g = k[p][:, p]
        return g[:n, :n].sum() + g[n:, n:].sum() - 2 * g[:n, n:].sum()
    return seconds(lambda: [one() for _ in range(permutations)]) / permutations * B


LARGE = """
import time, torch
torch.set_num_threads(2)
from vfm_notes.shift.mmd import mmd2
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
x, y = torch.randn(50_000, 384), torch.randn(50_000, 384)
mmd2(x[:600], y[:600], bandwidth=19.6)
before, start = peak(), time.perf_counter()
mmd2(x, y, bandwidth=19.6)
print(time.perf_counter() - start, peak() - before)
"""


def row(name, took, floor, wanted=""):
    print(f"{name:52}{took:9.3f}{floor:9.3f}{took / floor:7.2f}   {wanted}", flush=True)
    return took, floor


def main():
    global clock
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, D, generator=g), torch.randn(N, D, generator=g) + 0.02
    def both(): return kernel_bound() + label_bound()
    def statistic(): mmd2(x, y, bandwidth=SIGMA)
    def test(): two_sample_test(x, y, paired=False, permutations=B, bandwidth=SIGMA)
    print(f"n = m = {N}, {D} features, {B} permutations, float32; bound: the matrix products alone, measured beside it")
    print(f"{'what':52}{'seconds':>9}{'bound':>9}{'ratio':>7}   wanted")
    torch.set_num_threads(THREADS)
    row(f"statistic, {THREADS} threads", *beside(statistic, kernel_bound, 6), "at most 1.3")
    row("  with median bandwidth", *beside(lambda: mmd2(x, y), kernel_bound, 2))
    took, floor = row(f"test, pooled permutations, {THREADS} threads", *beside(test, both, 4), "at most 1.6")
    row("  swaps within pairs", *beside(lambda: two_sample_test(x, y, paired=True, permutations=B, bandwidth=SIGMA), both, 2))
    naive = usual(x, y, 1)
    print(f"{'  usual: kernel gathered anew per permutation':52}{naive:9.1f}{floor:9.3f}{naive / floor:7.0f}   from 1 permutation; ours is {naive / took:.0f} times faster")
    torch.set_num_threads(1)
    clock = time.process_time  # neighbours on the machine do not count
    row("statistic, 1 thread, processor time", *beside(statistic, kernel_bound, 2))
    row("test, pooled permutations, 1 thread, processor time", *beside(test, both, 2))
    exact = mmd2(x.double(), y.double(), bandwidth=SIGMA)
    print(f"error against float64: {abs(mmd2(x, y, bandwidth=SIGMA) - exact):.1e} of {exact:.2e}")
    took, peak = map(float, subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True).stdout.split())
    print(f"n = m = 50000: statistic {took:.1f} s, {peak:.0f} MiB above its input (wanted: under 500)")


if __name__ == "__main__": main()
