"""The whole way of somebody with an own network, own weights and own scans, from an empty folder: commands and files.

    python tests/own_way.py SCANS FOLDER        walks it on a folder of the Decathlon's form (images/, labels/), timed

SCANS/images holds one volume a case and SCANS/labels one label map of the same name; the last case is never imported,
and is predicted at the end.
"""

import os
import subprocess
import sys
from pathlib import Path

CODE = '''"""A network of our own."""
from torch import nn
from vfm_notes.backbones.protocol import Backbone
from vfm_notes.foundation.registry import backbones

STEPS = [(1, 2, 2), (1, 2, 2), (2, 2, 2)]

@backbones("lab_cnn", title="CNN of the lab", source="in house", licence="in house", sequences=("mri",),
           size=(16, 32, 16), spacing=(2.0, 2.0, 2.0))
class LabCNN(Backbone):
    "Three convolutions with stride."
    def __init__(self, in_channels=1):
        super().__init__()
        self.name, self.in_channels, self.embed_dim = "lab_cnn", in_channels, 32
        self.widths, self.strides = [8, 16, 32], [(1, 2, 2), (1, 4, 4), (2, 8, 8)]
        widths = [in_channels, *self.widths]
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv3d(a, b, s, s), nn.GroupNorm(1, b), nn.GELU())
                                    for a, b, s in zip(widths, widths[1:], STEPS))

    def pyramid(self, x):
        maps = [self.check_input(x)]
        for stage in self.stages: maps.append(stage(maps[-1]))
        return maps[1:]

    def embed(self, x): return self.pyramid(x)[-1].mean((2, 3, 4))
    def layers(self, x):
        pooled = [m.mean((2, 3, 4)) for m in self.pyramid(x)]
        return {f"stage {i}": p for i, p in enumerate(pooled)} | {"embed": pooled[-1]}
'''

CHECKPOINT = '''import torch
from torch import nn

torch.manual_seed(1)
widths, steps = [1, 8, 16, 32], [(1, 2, 2), (1, 2, 2), (2, 2, 2)]
net = nn.ModuleDict({"stages": nn.ModuleList(nn.Sequential(nn.Conv3d(a, b, s, s), nn.GroupNorm(1, b), nn.GELU())
                                             for a, b, s in zip(widths, widths[1:], steps))})
torch.save({"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}, "epoch": 3}, "lab.ckpt")
'''

STUDY = """name: own
title: My network, my weights, my scans
plugins: [my_code.py]
cohort: cohorts/mine
size: {size}
spacing: {spacing}
cases: {cases}
backbones: [lab_cnn.lab]
tasks:
  segmentation: {{}}
strategies: [scratch, full]
seeds: [0]
budget: {{epochs: {epochs}, batch_size: 2, lr: 0.003}}
"""

COMMANDS = """
vfm init mine
cd mine
cp ../my_code.py ../lab.ckpt .
vfm data import table ../scans cohorts/mine -o name=mine -o licence="in house" -o "classes={classes}"
vfm weights import lab.ckpt --as lab_cnn.lab --licence "in house" --sequences mri --plugin my_code.py
cp ../study.yaml .
vfm run study.yaml --dry-run
vfm run study.yaml
vfm table study.yaml
vfm site study.yaml --renderer smalldocs
vfm predict study.yaml ../unseen/*.nii.gz -o answers --probabilities
vfm weights export study.yaml -o exported --bundle
"""


def write_way(root: Path, size: list, spacing: list, cases: dict, epochs: int, classes: list[str]) -> str:
    "Write what a user has before the first command; the commands, as a script that says how long each took."
    words = "{" + ", ".join(f"{k}: {v}" for k, v in cases.items()) + "}"
    (root/"my_code.py").write_text(CODE, encoding="utf-8")
    (root/"study.yaml").write_text(STUDY.format(size=size, spacing=spacing, cases=words, epochs=epochs))
    made = subprocess.run([sys.executable, "-c", CHECKPOINT], cwd=root, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    lines = COMMANDS.format(classes=f"[{', '.join(classes)}]").strip().splitlines()
    timed = "\n".join(f"echo '$ {line}'\ntime {line}" if line.startswith("vfm") else line for line in lines)
    return f"export VFM_WEIGHTS=$PWD/weights TIMEFORMAT='took %R s, %U s of CPU'\nexec 2>&1\n{timed}\n"


def lay_out(source: Path, root: Path, n: int) -> str:
    "Link the first n cases of a folder of the Decathlon's form, but for the last, which is unseen; its name."
    names = sorted(p.name for p in (source/"images").glob("*.nii.gz"))[:n]
    for folder in ("scans", "unseen"): (root/folder).mkdir(parents=True)
    lines = ["case,mri,label"]
    for name in names[:-1]:
        case = name.removesuffix(".nii.gz")
        for kind in ("images", "labels"): os.symlink(source/kind/name, root/"scans"/f"{case}_{kind}.nii.gz")
        lines.append(f"{case},{case}_images.nii.gz,{case}_labels.nii.gz")
    (root/"scans"/"cases.csv").write_text("\n".join(lines) + "\n")
    os.symlink(source/"images"/names[-1], root/"unseen"/names[-1])
    return names[-1]


def dice_in_space(answer: Path, truth: Path) -> float:
    "How far two label maps overlap where they lie, by SimpleITK: any structure against none."
    import SimpleITK as sitk

    found, wanted = (sitk.ReadImage(str(p)) > 0 for p in (answer, truth))
    found = sitk.Resample(found, wanted, sitk.Transform(), sitk.sitkNearestNeighbor)
    measures = sitk.LabelOverlapMeasuresImageFilter()
    measures.Execute(found, wanted)
    return measures.GetDiceCoefficient()


if __name__ == "__main__":
    source, root = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    name = lay_out(source, root, 40)
    script = write_way(root, [16, 32, 16], [2.0, 2.0, 2.0], {"pretrain": 0, "train": 24, "val": 6, "test": 9}, 12,
                       ["anterior", "posterior"])
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=root, check=True)
    answer = root/"mine"/"answers"/name.replace(".nii.gz", "_segmentation.nii.gz")
    print(f"Dice of the unseen case {name}: {dice_in_space(answer, source/'labels'/name):.3f}")
