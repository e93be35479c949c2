"""The correction of echo-planar distortion that knows the true field: what distorting must allow."""

import numpy as np

from vfm_notes.data.degrade import phase_axis_last, voxel_borders, redistribute


def epi_correct(volume, field, axis=-2):
    "Undo `epi_distort` with the true field."
    lines, shifts = phase_axis_last(volume, field, axis)
    flat, moved = lines.reshape(-1, lines.shape[-1]), voxel_borders(shifts.reshape(-1, lines.shape[-1]))
    still = np.broadcast_to(np.arange(moved.shape[1], dtype=np.float64), moved.shape)
    return np.moveaxis(redistribute(flat, still, moved).reshape(lines.shape), -1, axis).astype(np.float32)
