"""MMD against the matrix products it cannot do without, measured beside it, and against the usual way.

With P = 2n pooled points, f features and B permutations the products are P²/2 (f+2) multiply-adds for one triangle
of the
kernel and P²/2 (B+1) for one triangle of kernel times labels. Their time is that of large products of the same
shape.
Every time is the best of repeats, every bound the best of those measured before and after each repeat.
"""
import subprocess
import sys
import time

import numpy as np
import torch

from vfm_notes.shift.mmd import MEDIAN_EXACT, choose_bandwidth, mmd2, two_sample_test

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


def torchdrift(x, y, permutations):
    """TorchDrift's kernel_mmd: the package where it is installed, else its algorithm: all of the kernel, gathered anew
    for every permutation."""
    try:
        from torchdrift.detectors.mmd import GaussianKernel, kernel_mmd
        return float(kernel_mmd(x, y, permutations, GaussianKernel(SIGMA))[0]), "TorchDrift itself"
    except ImportError: pass
    n, m = len(x), len(y)
    xy = torch.cat([x, y])
    k = torch.exp((-0.5 / SIGMA**2) * torch.cdist(xy, xy, p=2.0) ** 2)
    def value(k):
        return k[:n, :n].sum() / (n * (n - 1)) + k[n:, n:].sum() / (m * (m - 1)) - 2 * k[:n, n:].sum() / (n * m)
    seen, count = value(k), 0
    for _ in range(permutations):
        p = torch.randperm(n + m)
        k = k[p][:, p]
        count = count + (value(k) > seen)
    return float(seen), "TorchDrift's algorithm"


def against_torchdrift(x, y, ours, rounds=2):
    "Seconds of 1000 permutations, from the difference of 3 and 1, and of ours, turn about; the best of each."
    own, theirs = [], []
    for _ in range(rounds):
        own.append(seconds(ours))
        one = seconds(lambda: torchdrift(x, y, 1))
        three = seconds(lambda: torchdrift(x, y, 3))
        own.append(seconds(ours))
        theirs.append((three - one) / 2 * B)
    return min(own), min(theirs)


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


def others(x, y):
    "Other kernels beside scikit-learn's tables and the median rule beside scipy's; 1 thread, processor time."
    from scipy.spatial.distance import pdist
    from sklearn.metrics import pairwise
    def table(kernel, **options):
        k = kernel(np.concatenate([x, y]), **options)
        n = len(x)
        return (
            (k[:n, :n].sum() - np.trace(k[:n, :n])) / (n * (n - 1))
            + (k[n:, n:].sum() - np.trace(k[n:, n:])) / (n * (n - 1))
            - 2 * k[:n, n:].mean()
        )
    sklearn = {
        "gaussian": lambda: table(pairwise.rbf_kernel, gamma=1 / (2 * SIGMA**2)),
        "linear": lambda: table(pairwise.linear_kernel), "polynomial": lambda: table(pairwise.polynomial_kernel),
        "laplace": lambda: table(pairwise.laplacian_kernel, gamma=1 / SIGMA),
        "mixture": lambda: sum(table(pairwise.rbf_kernel, gamma=1 / (2 * (c * SIGMA) ** 2)) for c in (0.5, 1, 2)) / 3,
    }
    x, y = x.double(), y.double()
    print(f"n = m = {len(x)}, {D} features, float64, 1 thread, processor time{'':12}ours    other  ratio")
    def line(name, ours, other, note=""):
        a, b = seconds(ours, 2), seconds(other)
        print(f"{name:70}{a:8.3f}{b:9.3f}{b / a:7.1f}   {note}", flush=True)
    for kernel, other in sklearn.items():
        def ours():
            return mmd2(x, y, kernel=kernel, **({} if kernel in ("linear", "polynomial") else {"bandwidth": SIGMA}))
        line(
            f"{kernel} kernel; scikit-learn's whole table", ours, other,
            "sum of absolute differences there"
            if kernel == "laplace"
            else f"values differ by {abs(ours() - other()):.0e}",
        )
    z = torch.cat([x, y])
    line(
        "median bandwidth of 2048 drawn points; scipy's pdist of all",
        lambda: choose_bandwidth(z.repeat(2, 1)[: MEDIAN_EXACT + 1], "median"),
        lambda: np.median(pdist(z.numpy(), "sqeuclidean")),
    )


def gpu():
    "The statistic and the test on a GPU, where there is one; float32 products in full precision."
    if not torch.cuda.is_available():
        return print(
            "no GPU here: n = m = 50000, 1024 features, 1000 permutations on a GPU not measured (wanted: under 1 s)"
        )
    x, y = torch.randn(50_000, 1024, device="cuda"), torch.randn(50_000, 1024, device="cuda") + 0.01
    def timed(f):
        def g(): f(); torch.cuda.synchronize()
        g()
        return seconds(g, 3)
    print(
        f"GPU, n = m = 50000, 1024 features: statistic {timed(lambda: mmd2(x, y, bandwidth=32)):.2f} s, 1000 "
        f"permutations {timed(lambda: two_sample_test(x, y, paired=False, bandwidth=32)):.2f} s (wanted: under 1 s), "
        f"swaps within pairs {timed(lambda: two_sample_test(x, y, paired=True, bandwidth=32)):.2f} s"
    )


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
    row(
        "  swaps within pairs",
        *beside(lambda: two_sample_test(x, y, paired=True, permutations=B, bandwidth=SIGMA), both, 2),
    )
    value, name = torchdrift(x[:1000].double(), y[:1000].double(), 1)
    print(
        f"{name}: value {value:.3e}, of which {2 / 999:.3e} are its diagonals; ours "
        f"{mmd2(x[:1000].double(), y[:1000].double(), bandwidth=SIGMA):.3e}"
    )
    took, theirs = against_torchdrift(x, y, test)
    print(
        f"{'  ' + name + ', 1000 permutations from 3':52}{theirs:9.1f}{'':16}   ours {took:.2f} s is "
        f"{theirs / took:.0f} times faster (wanted: 500)"
    )
    clock = time.process_time
    took, theirs = against_torchdrift(x, y, test, 1)
    print(
        f"{'  the same in processor time':52}{theirs:9.1f}{'':16}   ours {took:.2f} s is {theirs / took:.0f} times "
        "faster"
    )
    torch.set_num_threads(1)
    clock = time.process_time  # neighbours on the machine do not count
    row("statistic, 1 thread, processor time", *beside(statistic, kernel_bound, 2))
    row("test, pooled permutations, 1 thread, processor time", *beside(test, both, 2))
    exact = mmd2(x.double(), y.double(), bandwidth=SIGMA)
    print(f"error against float64: {abs(mmd2(x, y, bandwidth=SIGMA) - exact):.1e} of {exact:.2e}")
    clock = time.process_time
    others(x[:2000], y[:2000])
    took, peak = map(
        float, subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True).stdout.split()
    )
    print(f"n = m = 50000: statistic {took:.1f} s, {peak:.0f} MiB above its input (wanted: under 500)")
    clock = time.perf_counter
    gpu()


if __name__ == "__main__": main()
