"""How far pictures are from a reference: FID and its kin where Inception is, else a distance in a named encoder.

    python examples/frechet.py --samples outputs/sit-50k.npz --reference VIRTUAL_imagenet256_labeled.npz \
        --inception weights-inception-2015-12-05-6726825d.pth             # pip install torch-fidelity
    python examples/frechet.py --samples outputs/sit.npz --reference /data/val --encoder outputs/teacher

FID, sFID, Inception score, precision and recall need torch-fidelity and its Inception weights. Without them it says so,
and measures the Fréchet distance between the features of `--encoder`, averaged over each picture. That number is
comparable with others of the same encoder alone, and is no FID.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from checkpoints import write_text
from data import IMAGE_ENDINGS, center_transform, read_image
from sampling import plain_errors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from psvae import SemanticEncoder

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names its download
SPATIAL_CHANNELS = 7  # of Inception's third 17 x 17 block, ADM's sFID


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    samples: str
    """An .npz with arr_0, uint8 N H W 3, as sample_sit.py writes it, or a folder of images."""
    reference: str
    """The same. Pictures of a folder are centre-cropped to the samples' size."""
    encoder: str | None = None
    """Folder or Hub id of a SemanticEncoder."""
    inception: Path | None = None
    """torch-fidelity's Inception weights; None looks where torch-fidelity keeps them."""
    size: int = 256
    """Of pictures of folders, where `samples` is a folder too."""
    batch_size: int = 64
    workers: int = 4
    output: Path | None = None
    """JSON file for the numbers."""


class Pictures(Dataset):
    """uint8 3 H W, of an .npz or a folder."""

    def __init__(self, source: str, size: int) -> None:
        self.files: list[Path] = []
        self.crop = center_transform(size)
        if Path(source).is_dir():
            self.files = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
            self.array = np.empty((0, size, size, 3), np.uint8)
        else:
            self.array = read_npz(source)
        if len(self) < 2:
            raise SystemExit(f"{source} holds {len(self)} pictures; wanted two or more")

    def __len__(self) -> int:
        return len(self.files) or len(self.array)

    def __getitem__(self, place: int) -> Tensor:
        if self.files:
            return (self.crop(read_image(self.files[place])) * 127.5 + 127.5).round().byte()
        return torch.from_numpy(self.array[place]).permute(2, 0, 1)


def read_npz(source: str) -> np.ndarray:
    """``arr_0``, uint8 N H W 3."""
    try:
        with np.load(source) as content:
            array = content["arr_0"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{source} is no folder, and no .npz with arr_0: {error}") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise SystemExit(f"{source} holds {array.dtype} of shape {array.shape}; wanted uint8, N H W 3")
    return array


@torch.no_grad()
def features_of(pictures: Dataset, read: Callable[[Tensor], Tensor], options: Options, device: torch.device) -> Tensor:
    """``N D`` in float64: what ``read`` says of uint8 batches."""
    loader = DataLoader(pictures, options.batch_size, num_workers=options.workers)
    return torch.cat([read(batch.to(device)).double().cpu() for batch in loader])


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ₁ − μ₂|² + Tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of the Gaussians with the mean and covariance of features, ``N D``."""
    first, second = first.double(), second.double()
    if not (first.isfinite().all() and second.isfinite().all()):
        raise SystemExit("the features hold NaN or infinity; wanted finite ones: look at the pictures and the encoder")
    covariances = [torch.atleast_2d(features.T.cov()) for features in (first, second)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    between = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()  # Tr (Σ₁ Σ₂)^½
    spread = sum(covariance.trace() for covariance in covariances) - 2 * between
    return max(0.0, float((first.mean(0) - second.mean(0)).square().sum() + spread))


def encoder_measures(samples: Dataset, reference: Dataset, options: Options, device: torch.device) -> dict[str, Any]:
    """The Fréchet distance in a SemanticEncoder's features, and whose they are."""
    with plain_errors():
        encoder = SemanticEncoder.from_pretrained(options.encoder, device=device).requires_grad_(False).eval()
        found = [
            features_of(
                pictures, lambda batch: encoder(batch.float() / 127.5 - 1).float().mean((2, 3)), options, device
            )
            for pictures in (reference, samples)
        ]
    count, width = min(map(len, found)), found[0].shape[1]
    if count <= width:
        print(
            f"{count} pictures for {width} features: the distance is biased upwards; wanted many more", file=sys.stderr
        )
    return {"frechet_distance": frechet_distance(*found), "features": f"{options.encoder}, mean over the grid"}


def inception_measures(
    samples: Dataset, reference: Dataset, weights: Path, options: Options, device: torch.device
) -> dict[str, float]:
    """FID, Inception score, precision and recall by torch-fidelity, and ADM's sFID on the same network."""
    fidelity = importlib.import_module("torch_fidelity")
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    found = fidelity.calculate_metrics(
        input1=samples, input2=reference, isc=True, fid=True, prc=True, feature_extractor="inception-v3-compat",
        feature_layer_prc="2048", feature_extractor_weights_path=str(weights),  # as ADM: its default is VGG's
        batch_size=options.batch_size, cuda=device.type == "cuda", verbose=False,
    )  # fmt: skip
    network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.conv.register_forward_hook(
        lambda _module, _inputs, maps: seen.append(maps[:, :SPATIAL_CHANNELS].flatten(1))
    )

    def spatial(batch: Tensor) -> Tensor:
        network(batch)
        return seen.pop()

    both = [features_of(pictures, spatial, options, device) for pictures in (reference, samples)]
    names = {"fid": "frechet_inception_distance", "is": "inception_score_mean"}
    names |= {"precision": "precision", "recall": "recall"}
    return {ours: float(found[theirs]) for ours, theirs in names.items()} | {"sfid": frechet_distance(*both)}


def why_no_inception(weights: Path) -> str:
    """In words; empty where it is there."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return "torch-fidelity is not installed (pip install torch-fidelity)"
    return "" if weights.is_file() else f"there are no Inception weights at {weights}"


def main(options: Options) -> dict[str, Any]:
    """Measure; returns the numbers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = options.inception or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    absent = why_no_inception(weights)
    if absent:
        print(f"no FID, sFID, Inception score, precision and recall: {absent}")
        if options.encoder is None:
            raise SystemExit("nothing to measure with: pass --encoder, a SemanticEncoder, or bring Inception")
    samples = Pictures(options.samples, options.size)
    side = samples[0].shape[-1]
    reference = Pictures(options.reference, side)
    if reference[0].shape != samples[0].shape:
        raise SystemExit(f"samples are {tuple(samples[0].shape)}, the reference {tuple(reference[0].shape)}")
    numbers: dict[str, Any] = {"samples": len(samples), "reference": len(reference)}
    if not absent:
        numbers |= inception_measures(samples, reference, weights, options, device)
    if options.encoder is not None:
        numbers |= encoder_measures(samples, reference, options, device)
    text = json.dumps(numbers, indent=2)
    print(text)
    if options.output is not None:
        write_text(options.output, text + "\n")
    return numbers


if __name__ == "__main__":
    main(tyro.cli(Options))
