"""DINOv2's one-layer heads: features → segmentation, features → depth. Their published files, and fitting one anew.

    dinov2_{vits14,vitb14,vitl14,vitg14}_{ade20k,voc2012}_linear_head.pth    SegmentationHead: normed patch tokens
    dinov2_{vits14,vitb14,vitl14,vitg14}_{nyu,kitti}_linear_head.pth         DepthHead: pre-norm patch and CLS tokens

The other heads of facebookresearch/dinov2 (ms, linear4, dpt, Mask2Former) read four layers, and latents carry one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from psvae.errors import CheckpointError
from psvae.hub.formats import Rule
from psvae.hub.reading import Checkpoint
from psvae.hub.source import Source

PREFIX = "decode_head."
UPSAMPLE = 4  # of the depth head
MIN_DEPTH = 0.001  # metres
MAX_DEPTH = {"nyu": 10.0, "kitti": 80.0}  # metres, by what a file's name holds
EPS = 0.1  # of "linear" normalisation: no bin is ever quite out


class SegmentationHead(nn.Module):
    """Batch norm and a 1x1 classifier: normed patch features ``B D h w`` → logits ``B K H W``."""

    tokens = "normed"

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv_seg = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(self.conv_seg(self.bn(patches)), size, mode="bilinear")


class DepthHead(nn.Module):
    """256 bins of depth: pre-norm patch features ``B D h w`` and CLS tokens ``B D`` → metres ``B H W``."""

    tokens = "pre_norm"

    def __init__(self, width: int, max_depth: float, bins: int = 256) -> None:
        super().__init__()
        self.conv_depth = nn.Conv2d(2 * width, bins, 1)
        self.register_buffer("bins", torch.linspace(MIN_DEPTH, max_depth, bins), persistent=False)

    def forward(self, patches: Tensor, cls: Tensor, size: tuple[int, int]) -> Tensor:
        both = torch.cat([patches, cls[:, :, None, None].expand_as(patches)], dim=1)
        # DINOv2 resizes the 2D channels first; a 1x1 convolution commutes with that, and here has a 16th of the work
        scores = F.interpolate(self.conv_depth(both), scale_factor=UPSAMPLE, mode="bilinear").relu() + EPS
        depth = torch.einsum("BKhw,K->Bhw", scores / scores.sum(dim=1, keepdim=True), self.bins)
        depth = depth.clamp(self.bins[0], self.bins[-1])
        return F.interpolate(depth[:, None], size, mode="bilinear")[:, 0]


def read_head(
    file: str | Path, width: int, *, allow_pickle: bool = False, max_depth: float | None = None
) -> SegmentationHead | DepthHead:
    """A head in eval mode, of either kind, from DINOv2's file or from `save_head`'s.

    Args:
        width: D of the features that it shall read.
        allow_pickle: needed for .pth; read by PyTorch's restricted unpickler.
        max_depth: of the last bin of a depth head, which its file does not say; None takes it from the file's name.
            DINOv2's own hub builder takes 10 for KITTI's files too, which its configurations train with 80.

    Raises:
        CheckpointError: absent, a pickle without permission, or another head.
    """
    if not Path(file).is_file():
        raise CheckpointError(f"there is no head file {str(file)!r}")
    checkpoint = Checkpoint(Source(file, ""), file=None, variant=None, allow_pickle=allow_pickle)
    with torch.serialization.safe_globals(numpy_numbers()):
        header = checkpoint.header
    channels = {name: header.get(f"{PREFIX}{name}.weight", (0, 0))[1] for name in ("conv_seg", "conv_depth")}
    if channels["conv_seg"] == width:
        head: Any = SegmentationHead(width, header[f"{PREFIX}conv_seg.weight"][0])
    elif channels["conv_depth"] == 2 * width:
        head = DepthHead(width, max_depth or _max_depth(Path(file)))
    else:
        raise CheckpointError(f"{file} {_what_it_is(header, channels)}; {_wanted(width)}")
    expected = head.state_dict()
    rules = {key: Rule((PREFIX + key,)) for key in expected}
    head.load_state_dict(checkpoint.read(expected, rules, ignored=(), dtype=torch.float32, device="cpu"))
    return head.eval().requires_grad_(False)


def save_head(head: SegmentationHead | DepthHead, file: Path) -> None:
    """As safetensors, with DINOv2's names."""
    save_file({PREFIX + key: tensor.cpu().contiguous() for key, tensor in head.state_dict().items()}, file)


def fit_segmentation_head(
    batches: Iterator[tuple[Tensor, Tensor]],
    width: int,
    classes: int,
    steps: int,
    lr: float = 1e-3,
    ignore: int = 255,
    device: torch.device | str = "cpu",
) -> SegmentationHead:
    """Fit to (features ``B D h w``, masks ``B H W``): AdamW and a linear decay, as DINOv2's; then frozen.

    Args:
        ignore: number in the masks that is no class.
    """
    head = SegmentationHead(width, classes).to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _, (features, masks) in zip(trange(steps, desc="head"), batches, strict=False):
        logits = head(features.to(device), tuple(masks.shape[-2:]))
        loss = F.cross_entropy(logits, masks.to(device), ignore_index=ignore, reduction="sum")
        loss = loss / (masks != ignore).sum().clamp(min=1)  # a batch may be unlabelled
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval().requires_grad_(False)


def numpy_numbers() -> list[Any]:
    """What DINOv2's depth files hold beside tensors: numbers of numpy, under the names of numpy 1 and 2."""
    from numpy._core.multiarray import scalar

    return [
        (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), (np.dtype, "numpy.dtype"),
        *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64")),
    ]  # fmt: skip


def _max_depth(file: Path) -> float:
    found = [depth for name, depth in MAX_DEPTH.items() if name in file.name.lower()]
    if len(found) != 1:
        raise CheckpointError(
            f"{file} holds a depth head and not how deep its last bin is; wanted {' or '.join(MAX_DEPTH)} in its name, "
            "or --max-depth, in metres"
        )
    return found[0]


def _what_it_is(header: Any, channels: dict[str, int]) -> str:
    if channels["conv_seg"]:
        return f"is a segmentation head that reads {channels['conv_seg']} channels"
    if channels["conv_depth"]:
        return f"is a depth head that reads {channels['conv_depth']} channels, two for each of a patch token's"
    if any(name.startswith(f"{PREFIX}conv_depth.head.") for name in header):
        return "is a DPT depth head, which reads four layers of the encoder"
    return f"is no head of DINOv2: it holds {', '.join(sorted(header)[:6]) or 'nothing'}{', ...' * (len(header) > 6)}"


def _wanted(width: int) -> str:
    return (
        f"the features have width {width}: wanted a linear head of one layer for it, {PREFIX}bn.* and "
        f"{PREFIX}conv_seg.* of {width} channels or {PREFIX}conv_depth.* of {2 * width}. Files named ms or linear4 "
        "read four layers, and each encoder (vits14, vitb14, ...) has its own"
    )
