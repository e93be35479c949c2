"""Time and peak memory of backbones: forward, and forward with backward, one case, each in a process of its own.

Without arguments: the toys, as ratios against the first. `--all --write` measures every registered backbone and
keeps the result
for the report's page (nbs/report/backbone_costs.json). A size that needs too much time or memory is left for the
next smaller one,
and the row says so; nothing is extrapolated.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

KEPT = Path(__file__).resolve().parents[2]/"nbs"/"report"/"backbone_costs.json"
SHARES = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4))  # size over these: slices, rows and columns


def sizes(card, stride):
    "The card's size and smaller ones, each rounded up to cells of the coarsest stride, two in the plane at least."
    out = []
    for deep, wide in SHARES:
        cells = [
            max(math.ceil(s / f / t), least) for s, f, t, least in zip(card.size, (deep, wide, wide), stride, (1, 2, 2))
        ]
        out.append(tuple(c * t for c, t in zip(cells, stride)))
    return list(dict.fromkeys(out))


def timed(f, torch, cuda):
    "Best wall and processor seconds of a call: once when it is slow, else twice after a warm-up."
    took = []
    for _ in range(3):
        start, cpu = time.perf_counter(), time.process_time()
        f()
        if cuda: torch.cuda.synchronize()
        took.append((time.perf_counter() - start, time.process_time() - cpu))
        if took[0][1] > 4: break
    return [round(min(t), 4) for t in zip(*(took[1:] or took))]


def one(name, size, threads):
    "Measure one backbone at one size; a JSON line after each step, so that what was done before a limit is not lost."
    import torch
    from vfm_notes.foundation.meter import PeakMemory
    from vfm_notes.foundation.registry import backbones
    from vfm_notes.tune import catalog  # fills the registries
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    with PeakMemory() as whole:
        model = backbones[name]().train().to(device)
        x = torch.randn(1, model.in_channels, *size, device=device)
        weights = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()]) / 2**20
        def forward():
            with torch.no_grad(): model.pyramid(x)
        def both():
            model.zero_grad(set_to_none=True)
            sum(m.square().mean() for m in model.pyramid(x)).backward()
        with PeakMemory() as inner: seconds = timed(forward, torch, cuda)
        print(
            json.dumps(
                dict(
                    forward_s=seconds[0], forward_cpu_s=seconds[1],
                    forward_mib=round(inner.mib + (0 if cuda else weights)), weights_mib=round(weights, 1),
                )
            ),
            flush=True,
        )
        seconds = timed(both, torch, cuda)
    print(json.dumps(dict(step_s=seconds[0], step_cpu_s=seconds[1], step_mib=round(whole.mib))), flush=True)


def spent(pid):
    "Processor seconds of a process."
    try: fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    except OSError: return 0.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid):
    "GiB of a process."
    try: return int(next(l for l in open(f"/proc/{pid}/status") if l.startswith("VmRSS")).split()[1]) / 2**20
    except (OSError, StopIteration): return 0.


def attempt(name, size, a):
    "One size in its own process: what it measured, and why it ended early."
    job = subprocess.Popen(
        [sys.executable, __file__, "--one", name, "--size", *map(str, size), "--threads", str(a.threads)],
        env=os.environ | {"OMP_NUM_THREADS": str(a.threads)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    why = ""
    while job.poll() is None and not why:
        time.sleep(0.1)
        why = (
            f"over {a.gib:g} GiB"
            if resident(job.pid) > a.gib
            else f"over {a.seconds:g} s"
            if spent(job.pid) > a.seconds * a.threads
            else ""
        )
    if why: job.kill()
    out, err = job.communicate()
    if not why and job.returncode: why = (err.strip().splitlines() or [f"ended with status {job.returncode}"])[-1][:200]
    found = {}
    for line in out.splitlines():
        if line.startswith("{"): found |= json.loads(line)
    return found, why


def measure(name, a):
    "A row: the largest size at which a whole step could be measured, or the largest forward."
    from vfm_notes.backbones.protocol import backbone_card
    from vfm_notes.tune.catalog import describe_backbone
    card, told = backbone_card(name), describe_backbone(name)
    row, left, best = (
        dict(name=name, card_size=list(card.size), channels=told["in_channels"], parameters=told["parameters"]), [], {},
    )
    for size in sizes(card, told["strides"][-1]):
        found, why = attempt(name, size, a)
        if found and not best: best = found | dict(size=list(size))
        if not why: return row | found | dict(size=list(size), left_out="; ".join(left))
        left.append(f"{' x '.join(map(str, size))}: {'backward ' if found else ''}{why}")
    return row | best | dict(left_out="; ".join(left))


def keep(run):
    "Put a run's rows in place of those of the same device; rows of other backbones stay."
    runs = {r["kind"]: r for r in json.loads(KEPT.read_text())} if KEPT.is_file() else {}
    rows = {r["name"]: r for r in runs.get(run["kind"], {}).get("rows", [])} | {r["name"]: r for r in run["rows"]}
    runs[run["kind"]] = run | dict(rows=[rows[n] for n in sorted(rows)])
    lines = [
        json.dumps({k: v for k, v in r.items() if k != "rows"})[:-1]
        + ', "rows": [\n'
        + ",\n".join(map(json.dumps, r["rows"]))
        + "\n]}"
        for r in runs.values()
    ]
    KEPT.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("names", nargs="*", help="backbones; default: the toys")
    p.add_argument("--all", action="store_true", help="every registered backbone")
    p.add_argument("--write", action="store_true", help=f"keep the rows in {KEPT}")
    p.add_argument(
        "--threads", type=int, default=1,
        help="more than one misleads on a machine with other work: threads wait for each other",
    )
    p.add_argument("--seconds", type=float, default=120, help="most processor seconds of a process, per thread")
    p.add_argument("--gib", type=float, default=20, help="most memory of a process")
    p.add_argument("--note", default="", help="what a reader must know about the machine")
    p.add_argument("--one", help=argparse.SUPPRESS)
    p.add_argument("--size", type=int, nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return one(a.one, a.size, a.threads)
    from vfm_notes.backbones.protocol import backbone_card
    from vfm_notes.foundation.meter import provenance
    from vfm_notes.foundation.registry import backbones
    from vfm_notes.tune import catalog  # fills the registries
    import torch
    names = list(backbones) if a.all else a.names or [n for n in backbones if backbone_card(n).toy]
    run = {k: v for k, v in provenance().items() if k != "host"} | dict(
        kind="cuda" if torch.cuda.is_available() else "cpu", threads=a.threads, seconds=a.seconds, gib=a.gib,
        note=a.note, date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), rows=[],
    )
    print(
        f"{'backbone':24}{'size':>16}{'forward s':>11}{'MiB':>7}{'step s':>9}{'MiB':>7}{'/ first':>9}   left out",
        flush=True,
    )
    first = None
    for name in names:
        row = measure(name, a)
        run["rows"] = [row]
        first = first or row.get("step_s")
        show = lambda k, places=3: f"{row[k]:.{places}f}" if k in row else "-"
        size = "x".join(map(str, row.get("size", ["-"])))
        times = row["step_s"] / first if "step_s" in row and first else math.nan
        print(
            f"{name:24}{size:>16}{show('forward_s'):>11}{show('forward_mib', 0):>7}{show('step_s'):>9}"
            f"{show('step_mib', 0):>7}{times:9.2f}   {row['left_out']}",
            flush=True,
        )
        if a.write: keep(run)


if __name__ == "__main__": main()
