"""Colours for every kind of colour vision, by simulation."""
import itertools

import numpy as np
import pytest

from vfm_notes.foundation.show import OUTLINES, PALETTE, diverging_palette

# Machado, Oliveira & Fernandes 2009, table 1: severity 1.0, in linear RGB
VISION = {
    "trichromat": np.eye(3),
    "protanope": np.array([
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998],
    ]),
    "deuteranope": np.array([
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881],
    ]),
    "tritanope": np.array([
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900],
    ]),
}
XYZ = np.array([
    [0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041],
])


def seen_by(vision, colour):
    "CIE L*a*b* of a colour as somebody sees it."
    v = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.clip(VISION[vision] @ np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4), 0, 1)
    t = XYZ @ linear / np.array([0.95047, 1, 1.08883])
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours, vision):
    "The smallest distance (ΔE 1976) of two of the colours; about 2 can just be told apart."
    lab = [seen_by(vision, c) for c in colours]
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2))


def test_the_simulation_knows_what_is_hard():
    assert np.allclose(seen_by("trichromat", "#ffffff"), [100, 0, 0], atol=0.05)
    # green and brown
    assert closest(("#2f7d32", "#a5562a"), "deuteranope") < 12 < 40 < closest(("#2f7d32", "#a5562a"), "trichromat")


@pytest.mark.parametrize("vision", VISION)
def test_colours_can_be_told_apart_by_everybody(vision):
    assert closest(PALETTE[:2], vision) > 80  # two backbones, the common case
    assert closest(PALETTE, vision) > 15  # all eight
    assert closest(OUTLINES[:5], vision) > 20 and closest(OUTLINES, vision) > 10  # labels on anatomy
    ends = diverging_palette()[[0, 255]]
    assert closest(["#" + "".join(f"{v:02x}" for v in c) for c in ends], vision) > 25  # below and above zero
