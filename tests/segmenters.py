"""Two whole published networks, as they are used: for tests of their real weights, whose encoders are backbones."""

import torch
from einops import repeat
from torch import nn
from torch.nn import functional as F

from vfm_notes.backbones.keys import load_weights
from vfm_notes.backbones.volumetric import LiteMedSAM
from vfm_notes.backbones.volumetric import reverse_axes
from vfm_notes.backbones.weights import fetch_weights
from vfm_notes.nets.files import read_state, strip_prefix


class Segmenter(nn.Module):
    "MONAI's SegResNetDS for volumes `b 1 d h w`; scores of one class at full size."
    def __init__(self,
                 width: int = 32,  # channels at full size
                ):
        super().__init__()
        from monai.networks.nets.segresnet_ds import SegResNetDS
        kinds = dict(act=("MISH", {"inplace": True}), norm=("GROUP", {"num_groups": 8}))
        self.net = SegResNetDS(3, width, 1, 1, **kinds, dsdepth=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(reverse_axes(x))
        return reverse_axes(y[0] if isinstance(y, list) else y)

    def windows(self, x: torch.Tensor, size=(32, 128, 128), overlap: float = 0.25) -> torch.Tensor:
        "Scores of a volume of any size, window by window."
        from monai.inferers import sliding_window_inference
        return sliding_window_inference(x, size, 1, self, overlap)


def gland_segmenter() -> Segmenter:  # gland where the sigmoid exceeds 0.55
    "The TAPS network with its published weights, ready to be used or fine-tuned."
    model, state = Segmenter(), read_state(fetch_weights("segresnet_ds.taps"))
    encoder = {f"encoder.{k}": v for k, v in strip_prefix(state, "encoder.model.").items()}
    load_weights(model.net, encoder | {k: v for k, v in state.items() if k.startswith("up_layers.")})
    return model.eval()


def box_segmenter() -> LiteMedSAM:  # in eval mode
    "LiteMedSAM with its published weights, ready to be used or fine-tuned."
    model = LiteMedSAM()
    name = lambda k: f"image_{k}" if k.startswith("encoder.") else k
    load_weights(model, {name(k): v for k, v in read_state(fetch_weights("lite_medsam.medsam")).items()}, share=1)
    return model.eval()


def unit_range(
    volume: torch.Tensor,  # d h w, raw intensities
) -> torch.Tensor:  # d h w in [0, 1]
    "Clip at percentiles of the non-zero voxels and scale."
    seen = volume[volume != 0].float()
    low, high = (seen.kthvalue(max(round(len(seen) * q), 1)).values for q in (0.005, 0.995))
    return ((volume.clamp(low, high) - low) / (high - low).clamp_min(1e-6)).float()


def mask_boxes(
    mask: torch.Tensor,  # d h w, boolean
    margin: int = 0,  # pixels around
) -> tuple[torch.Tensor, torch.Tensor]:  # slices with something in them, and x0 y0 x1 y1 of each
    "The box of a mask in every slice that has one."
    slices = mask.flatten(1).any(1).nonzero()[:, 0]
    boxes = []
    for i in slices:
        y, x = mask[i].nonzero(as_tuple=True)
        boxes.append(torch.stack([x.min() - margin, y.min() - margin, x.max() + margin, y.max() + margin]))
    return slices, torch.stack(boxes).clamp_min(0) if boxes else torch.zeros(0, 4, dtype=torch.long)


@torch.no_grad()
def segment_boxes(
    model: LiteMedSAM,  # in eval mode
    volume: torch.Tensor,  # d h w in [0, 1]
    slices: torch.Tensor,  # slice numbers
    boxes: torch.Tensor,  # a box per slice, x0 y0 x1 y1 pixels
) -> torch.Tensor:  # d h w, boolean
    "Masks of boxes, slice by slice."
    side, (h, w) = model.prompt_encoder.image, volume.shape[1:]
    scale = side / max(h, w)
    nh, nw = round(h * scale), round(w * scale)
    out = torch.zeros(volume.shape, dtype=torch.bool)
    for i, box in zip(slices, boxes):
        image = F.interpolate(volume[i][None, None], size=(nh, nw), mode="bilinear", antialias=scale < 1)
        image = repeat(F.pad(image, (0, side - nw, 0, side - nh)), "1 1 h w -> 1 c h w", c=3)
        scores = model(image, box[None] * scale)[..., :nh, :nw]
        out[i] = F.interpolate(scores, size=(h, w), mode="bilinear")[0, 0] > 0
    return out
