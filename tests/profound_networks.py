"""The whole networks whose checkpoints ProFound publishes: what lists of keys are compared with."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vfm_notes.nets.convnext3d import ConvNeXtBlock, ChannelNorm, ConvNeXt3d
from vfm_notes.nets.decoder import FCNHead, UNETRDecoder, UPerHead
from vfm_notes.nets.mae3d import to_patches


class Classifier(nn.Module):
    "ProFound's classification layout."
    def __init__(self,
                 encoder: ConvNeXt3d,  # dense
                 n_classes: int = 4,  # number of scores; 4 are PI-RADS 2 to 5
                 hidden: int = 256,  # width between
                ):
        super().__init__()
        self.encoder, e = encoder, encoder.norm.normalized_shape[0]
        self.head = nn.Sequential(nn.Linear(e, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, n_classes))

    def forward(self, x: Tensor) -> Tensor: return self.head(self.encoder.pool(self.encoder(x)[-1]))


def stage_widths(
    encoder: ConvNeXt3d,  # any size
) -> list[int]:  # channels per stage
    "The widths of an encoder's maps."
    return [stage[-1].pwconv2.out_features for stage in encoder.stages]


class UPerNet(nn.Module):
    "ProFound's UPerNet layout: one score map per class at full size, and a second one while training."
    def __init__(self,
                 encoder: ConvNeXt3d,  # dense
                 n_classes: int = 1,  # 1 lesion, 9 anatomy
                 width: int = 512,  # channels of the head
                 aux_width: int = 256,  # channels of the training head
                ):
        super().__init__()
        self.encoder, widths = encoder, stage_widths(encoder)
        self.decode_head = UPerHead(widths, n_classes, width)
        self.auxiliary_head = FCNHead(widths[2], n_classes, aux_width)
        self.hidden_norm = nn.ModuleList(ChannelNorm(w) for w in widths)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        maps = [norm(m) for norm, m in zip(self.hidden_norm, self.encoder(x))]
        scores = [self.decode_head(maps)] + ([self.auxiliary_head(maps[2])] if self.training else [])
        scores = [F.interpolate(s, size=x.shape[2:], mode="trilinear") for s in scores]
        return scores if self.training else scores[0]


class UNETR(nn.Module):
    "ProFound's UNETR layout: class scores at full size; the encoder's own norm serves the last stage."
    def __init__(self,
                 encoder: ConvNeXt3d,  # dense
                 n_classes: int = 1,  # number of scores
                 feature: int = 32,  # channels at full size
                ):
        super().__init__()
        self.encoder, widths = encoder, stage_widths(encoder)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(w, eps=1e-6) for w in widths[:3])
        self.decoder = UNETRDecoder(encoder.downsample_layers[0][0].in_channels, widths, n_classes, feature)

    def forward(self, x: Tensor) -> Tensor:
        norms = (self.norm1, self.norm2, self.norm3, self.encoder.norm)
        last = lambda norm, m: rearrange(norm(rearrange(m, "b c d h w -> b d h w c")), "b d h w c -> b c d h w")
        return self.decoder(x, [last(n, m) for n, m in zip(norms, self.encoder(x))])


class FCMAE(nn.Module):
    "ProFound's masked auto-encoder with a dense encoder that skips hidden cells."
    def __init__(self,
                 encoder: ConvNeXt3d,  # dense
                 width: int = 512,  # channels of the decoder
                 kernel: int = 7,  # side of the decoder's depthwise kernel
                ):
        super().__init__()
        self.encoder, self.patch = encoder, encoder.strides[-1]
        channels = encoder.downsample_layers[0][0].in_channels
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1, 1))
        self.proj, self.decoder = (
            nn.Conv3d(stage_widths(encoder)[-1], width, 1), nn.Sequential(ConvNeXtBlock(width, kernel)),
        )
        self.pred = nn.Conv3d(width, self.patch[0] * self.patch[1] * self.patch[2] * channels, 1)

    def forward(self,
                x: Tensor,  # b c d h w
                keep: Tensor,  # b 1 d h w on the coarsest grid: 1 kept, 0 hidden
               ) -> Tensor:  # b patches (d·h·w·c), the predicted voxels
        y = self.proj(self.encoder(x, keep)[-1])
        y = self.pred(self.decoder(y * keep + self.mask_token * (1 - keep)))
        return rearrange(y, "b v d h w -> b (d h w) v")

    def loss(self, x: Tensor, keep: Tensor) -> Tensor:
        "Mean squared error on hidden patches, each target patch normalised over all its voxels and channels."
        target = to_patches(x, self.patch)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        hidden = 1 - rearrange(keep, "b 1 d h w -> b (d h w)")
        return ((self(x, keep) - target).square().mean(-1) * hidden).sum() / hidden.sum()


def sparse_kernel(
    weight: Tensor,  # out in d h w
    depthwise: bool,  # one channel in, per group
) -> Tensor:  # (offset, in, out), (in, out), or (offset, channels)
    "A dense convolution's weight as a sparse kernel."
    kernel = rearrange(weight, "o i d h w -> (w h d) i o")
    return kernel[:, 0] if depthwise else kernel[0] if len(kernel) == 1 else kernel


def sparse_state(
    model: FCMAE,  # with a dense encoder
) -> dict[str, Tensor]:  # the published names and shapes
    "The state of a pretraining network as ProFound publishes it."
    out = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    for name, value in model.encoder.state_dict().items():
        part = name.split(".")
        conv = part[0] == "downsample_layers" and part[2] == "1" or part[-2] == "dwconv"
        if name.startswith("norm."): continue  # has no place in a pretraining checkpoint
        if part[:2] == ["downsample_layers", "0"]: pass
        elif conv and part[-1] == "weight": name, value = name[:-6] + "kernel", sparse_kernel(value, "dwconv" in name)
        elif conv or part[-2] == "grn": value = value.reshape(1, -1)
        else: name = ".".join([*part[:-1], "linear" if part[-2].startswith("pwconv") else "ln", part[-1]])
        out[f"encoder.{name}"] = value
    return out
