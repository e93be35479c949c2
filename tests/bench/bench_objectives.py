"""Cases per second of pretraining with every objective: our trainer beside a plain PyTorch loop.

The plain loop has the same network, optimiser and mirrored cases, with all data in memory; the difference is what
the trainer
costs. The same loop on one dummy batch that never changes tells what handling data costs. Toys first, then
ProFound's encoder
at its published size, one case a step, each in a process of its own for its peak memory. The three are taken in
turn, and the
best of the repeats counts. Where there is a GPU, precision, compilation and memory layout are chosen by
measurement, and the
share of the rate of a large matrix product and the largest batch are told.
"""
import argparse
import itertools
import os
import subprocess
import sys
import time

import torch

from vfm_notes.data.loader import normalise
from vfm_notes.foundation.registry import VfmError, backbones, objectives
from vfm_notes.foundation.spec import PretrainSpec
from vfm_notes.pretrain.loop import pretraining_batches
from vfm_notes.pretrain.trainer import TrainConfig, Trainer, is_out_of_memory
from vfm_notes.tune import catalog  # fills the registries

TOYS, SIZE, SPACING, BATCH, CASES = ("profound_toy", "provicnet_toy"), (12, 64, 64), (4.0, 1.5, 1.5), 4, 16
WHOLE, WHOLE_SIZE = "profound_tiny", (64, 224, 224)
# on one thread of a shared machine, neighbours then count little
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time


def data(size, n, made=True):
    "Volumes and labels: phantoms, or noise where only time counts."
    if not made: return torch.randn(n, 3, *size), torch.randint(0, 3, (n, *size), dtype=torch.uint8)
    from vfm_notes.data.cohort import phantom_cohort
    cohort = phantom_cohort(size, SPACING, {"pretrain": n}, 0)
    return torch.from_numpy(normalise(cohort.volumes)), torch.from_numpy(cohort.labels)


def build(objective, backbone, device="cpu"):
    "The same objective every time."
    torch.manual_seed(0)
    return objectives[objective](backbones[backbone](3)).to(device).train()


# --- three ways of taking steps; each is endless and yields how many it took ---

def ours(module, volumes, labels, batch):
    "What `pretrain` does, epoch after epoch."
    trainer = Trainer(
        module, lambda m, b: m.loss(b), pretraining_batches(volumes, labels, PretrainSpec(batch_size=batch)),
        TrainConfig(epochs=10_000, lr=1e-4, betas=(0.9, 0.95)),
    )
    while True:
        trainer.run_epoch()
        yield len(trainer.loader)


def plain(module, batches):
    "A page of PyTorch."
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
    for batch in batches:
        optimiser.zero_grad()
        loss, _ = module.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if hasattr(module, "after_step"): module.after_step()
        yield 1


def in_memory(volumes, labels, batch):
    "Shuffled cases, half of them mirrored."
    while True:
        for index in torch.randperm(len(volumes)).split(batch):
            x, y = volumes[index], labels[index]
            turn = torch.rand(len(x)) < 0.5
            x[turn], y[turn] = x[turn].flip(-1), y[turn].flip(-1)
            yield {"volumes": x, "labels": y}


def dummy(volumes, labels, batch): return itertools.repeat({"volumes": volumes[:batch], "labels": labels[:batch]})


def loops(objective, backbone, volumes, labels, batch):
    "Name → endless steps, each with a network of its own."
    return {"ours": ours(build(objective, backbone), volumes, labels, batch),
            "plain": plain(build(objective, backbone), in_memory(volumes, labels, batch)),
            "dummy": plain(build(objective, backbone), dummy(volumes, labels, batch))}


def compared(ways, least=0.3, repeats=4):
    "Seconds of a step of each, taken in turn, best of repeats; in the order of `ways`."
    for steps in ways.values(): next(steps)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, steps in ways.items():
            n, start = 0, CLOCK()
            while n == 0 or CLOCK() - start < least: n += next(steps)
            best[name] = min(best[name], (CLOCK() - start)/n)
    return best


def toys(names):
    print(
        f"{BATCH} cases of {'x'.join(map(str, SIZE))} voxels a step; cases per second\n"
        f"{'objective':24}{'toy':16}{'ours':>8}{'plain':>8}{'dummy':>8}{'ours/plain':>12}{'plain/dummy':>12}",
        flush=True,
    )
    volumes, labels, worst = *data(SIZE, CASES), []
    for name, toy in itertools.product(names, TOYS):
        try: took = compared(loops(name, toy, volumes, labels, BATCH))
        except VfmError as e:
            print(f"{name:24}{toy:16}refused: {e}")
            continue
        rate = {k: BATCH/s for k, s in took.items()}
        worst.append(rate["ours"]/rate["plain"])
        print(
            f"{name:24}{toy:16}{rate['ours']:8.1f}{rate['plain']:8.1f}{rate['dummy']:8.1f}"
            f"{worst[-1]:12.2f}{rate['plain'] / rate['dummy']:12.2f}",
            flush=True,
        )
    print(f"slowest beside the plain loop: {min(worst):.2f}; wanted: 0.9 or more")
    return min(worst)


# --- ProFound's encoder at its published size ---

def whole(objective):
    "One step of ours between two of the plain loop (the first of them warms up); a line for the parent."
    batch = 2 if getattr(objectives[objective], "whole_batches", False) else 1
    volumes, labels = data(WHOLE_SIZE, batch, made=False)
    module = build(objective, WHOLE)
    took = []
    for steps in (
        plain(module, dummy(volumes, labels, batch)), ours(module, volumes, labels, batch),
        plain(module, dummy(volumes, labels, batch)),
    ):
        start = CLOCK()
        next(steps)
        took.append(CLOCK() - start)
    peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])/1024
    print(f"RESULT {batch} {took[1]} {took[2]} {peak}")


def wholes(names, limit):
    print(
        f"\n{WHOLE}, {'x'.join(map(str, WHOLE_SIZE))}, one case a step (two where cases are compared), 1 thread\n"
        f"{'objective':24}{'cases':>6}{'ours, s':>10}{'dummy, s':>10}{'ours/dummy':>12}{'cases/min':>11}"
        f"{'peak MiB':>10}",
        flush=True,
    )
    for name in names:
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--one", name], capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            print(f"{name:24}left out: over {limit} s", flush=True)
            continue
        found = [l.split()[1:] for l in done.stdout.splitlines() if l.startswith("RESULT")]
        if not found:
            print(
                f"{name:24}left out: "
                f"{(done.stderr.strip().splitlines() or [f'ended with {done.returncode}'])[-1][:150]}",
                flush=True,
            )
            continue
        cases, mine, other, peak = map(float, found[0])
        print(
            f"{name:24}{cases:6.0f}{mine:10.1f}{other:10.1f}{other / mine:12.2f}{60 * cases / mine:11.1f}{peak:10.0f}",
            flush=True,
        )


# --- on a GPU ---

# half precision, compilation, channels last
VARIANTS = [dict(zip(("bf16", "compiled", "last"), v)) for v in itertools.product((False, True), repeat=3)]


def arranged(batch, last):
    "Volumes in a memory layout."
    return batch | {
        "volumes": batch["volumes"].contiguous(
            memory_format=torch.channels_last_3d if last else torch.contiguous_format
        )
    }


def stepper(module, batch, bf16, compiled, last):
    "A call that takes a step of a variant."
    device, batch = batch["volumes"].device.type, arranged(batch, last)
    if last:
        for m in module.modules():
            if isinstance(m, (torch.nn.Conv3d, torch.nn.ConvTranspose3d)): m.to(memory_format=torch.channels_last_3d)
    loss = torch.compile(module.loss) if compiled else module.loss
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4)
    def step():
        optimiser.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bf16): found = loss(batch)[0]
        found.backward()
        optimiser.step()
    return step


def seconds(step, repeats=5):
    "Best time of a step after two that warm up."
    wait, took = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None), []
    for _ in range(2 + repeats):
        wait(); start = time.perf_counter(); step(); wait()
        took.append(time.perf_counter() - start)
    return min(took[2:])


def fastest(make, batch, variants=VARIANTS):
    "The variant whose step is shortest, and the seconds of all; one that cannot run is left out with its reason."
    took, why = {}, {}
    for v in variants:
        name = " + ".join(k for k, on in v.items() if on) or "plain"
        try: took[name] = seconds(stepper(make(), batch, **v))
        except Exception as e: why[name] = str(e).splitlines()[0][:120]
    return min(took, key=took.get), took, why


def largest(fits, most=1024):
    "The largest power of two for which `fits(batch)` does not run out of memory."
    batch = 0
    while (n := max(1, 2*batch)) <= most:
        try: fits(n)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e): raise
            break
        batch = n
    return batch


def operations(make, batch):
    "Floating-point operations of a step."
    from torch.utils.flop_counter import FlopCounterMode
    step = stepper(make(), batch, False, False, False)
    with FlopCounterMode(display=False) as count: step()
    return count.get_total_flops()


def matmul_rate(device, n=8192):
    "Operations per second of a large product in half precision: what the device can do here."
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2*n**3/seconds(lambda: a @ a)


def gpu(names):
    if not torch.cuda.is_available(): return print("\nGPU: torch sees none, left out.")
    torch.backends.cudnn.benchmark = True
    peak = matmul_rate("cuda")
    print(
        f"\n{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s in a {8192}² product of bf16; {WHOLE} at "
        f"{'x'.join(map(str, WHOLE_SIZE))}",
        flush=True,
    )
    for name in names:
        n = 2 if getattr(objectives[name], "whole_batches", False) else 1
        make = lambda name=name: build(name, WHOLE, "cuda")
        cases = lambda n: dict(zip(("volumes", "labels"), (t.cuda() for t in data(WHOLE_SIZE, n, made=False))))
        try:
            how, took, why = fastest(make, cases(n))
            share, variant = (
                operations(make, cases(n)) / took[how] / peak,
                {k: k in how.split(" + ") for k in ("bf16", "compiled", "last")},
            )
            torch.cuda.reset_peak_memory_stats()
            top = largest(lambda n: stepper(make(), cases(n), **variant)())
            print(
                f"{name:24}{n / took[how]:8.2f} cases/s with {how} ({took[how] / took.get('plain', float('nan')):.2f} "
                f"of plain's time), {100 * share:.0f} % of the product's rate; largest batch {top}, "
                f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" + (f"; cannot: {why}" if why else ""),
                flush=True,
            )
        except VfmError as e: print(f"{name:24}refused: {e}")


def main():
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--objectives", nargs="+", default=None, help="registered names; default: all")
    ask.add_argument(
        "--whole", nargs="*", default=None,
        help="those measured at full size; default: the same; nothing after it: none",
    )
    ask.add_argument("--limit", type=float, default=900, help="seconds that one objective may take at full size")
    ask.add_argument("--one", help=argparse.SUPPRESS)
    args = ask.parse_args()
    torch.set_num_threads(1)
    if args.one: return whole(args.one)
    names = args.objectives or list(objectives)
    print(
        f"1 thread, load on the machine {os.getloadavg()[0]:.1f}; "
        f"{'wall' if torch.cuda.is_available() else 'processor'} time"
    )
    slowest = toys(names)
    # which needs a plain transformer
    wholes([n for n in (names if args.whole is None else args.whole) if n != "masked_tokens"], args.limit)
    gpu([n for n in names if n != "masked_tokens"])
    assert slowest > 0.8, f"the trainer costs more than a fifth beside the plain loop: {slowest:.2f}"


if __name__ == "__main__": main()
