"""How far pictures are from a reference: FID and its kin where Inception is, else a distance in a named encoder.

    python examples/frechet.py --samples outputs/sit-50k.npz --reference VIRTUAL_imagenet256_labeled.npz \
        --inception weights-inception-2015-12-05-6726825d.pth
    python examples/frechet.py --samples outputs/sit.npz --reference /data/val --features outputs/teacher

FID, sFID, Inception score, precision and recall need torch-fidelity and its Inception weights. They are those of ADM's
evaluator (openai/guided-diffusion, evaluations/evaluator.py) but for one thing: they compare with the pictures of the
reference, and ADM's FID and sFID with the statistics of all of ImageNet, where the reference holds them too.

Without Inception it says so, and measures the Fréchet distance in the features of an encoder, `--features`, averaged
over each picture. That number is comparable with others of the same encoder alone, and is no FID.
"""

import importlib
import importlib.util
import json
import math
import pickle
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from cache_latents import some
from checkpoints import write_text
from data import IMAGE_ENDINGS, UNREADABLE, center_transform, read_image
from measures import eight_bits
from sampling import plain_errors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from psvae import PSVAEError, SemanticEncoder

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names its download
SPATIAL_CHANNELS = 7  # of ADM's sFID
NEIGHBOURS = 3  # of ADM's precision and recall
SCORED = 5000  # pictures of each of the Inception scores that ADM averages, in their order


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    samples: str
    """An .npz with arr_0, uint8 N H W 3, as sample_sit.py writes it, or a folder of images."""
    reference: str
    """The same. Pictures of a folder are centre-cropped to the samples' size."""
    features: str | None = None
    """Folder or Hub id of a SemanticEncoder, or a timm name."""
    inception: Path | None = None
    """torch-fidelity's Inception weights; None looks where torch-fidelity keeps them."""
    size: int = 256
    """Of pictures of folders, where `samples` is a folder too."""
    batch_size: int = 64
    workers: int = 4
    output: Path | None = None
    """JSON file for the numbers."""


class PictureSet(Dataset):
    """One of the two sets: uint8 3 H W, of an .npz or a folder; or why it cannot be read.

    Attributes:
        shape: (3, H, W) of each.
    """

    def __init__(self, source: str, size: int) -> None:
        self.files: list[Path] = []
        self.crop = center_transform(size)
        if Path(source).is_dir():
            self.files = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
            self.array = np.empty((0, size, size, 3), np.uint8)
        else:
            self.array = read_pictures(source)
        if len(self) < 2:
            raise SystemExit(f"{source} holds {len(self)} pictures; wanted two or more")
        self.shape = (3, *self.array.shape[1:3])

    def __len__(self) -> int:
        return len(self.files) or len(self.array)

    def __getitem__(self, place: int) -> Tensor | str:
        if not self.files:
            return torch.from_numpy(self.array[place]).permute(2, 0, 1)
        try:
            return eight_bits(self.crop(read_image(self.files[place])))
        except UNREADABLE as error:
            return f"{self.files[place]} ({error})"


def read_npz(file: str | Path) -> dict[str, np.ndarray]:
    """Its arrays by their names.

    Raises:
        SystemExit: it is damaged, or something else.
    """
    try:
        with open(file, "rb") as opened:  # numpy leaves a damaged one open
            content = np.load(opened, allow_pickle=False)
            if isinstance(content, np.ndarray):
                raise ValueError("it is an .npy, of one array")
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SystemExit(f"{file} cannot be read as an .npz: {error}") from error


def read_pictures(source: str) -> np.ndarray:
    """``arr_0``, uint8 N H W 3."""
    arrays = read_npz(source)
    if "arr_0" not in arrays:
        raise SystemExit(f"{source} holds {', '.join(arrays) or 'nothing'}; wanted arr_0, uint8 N H W 3")
    array = arrays["arr_0"]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise SystemExit(f"{source} holds {array.dtype} of shape {array.shape}; wanted uint8, N H W 3")
    return array


@torch.no_grad()
def features_of(pictures: Dataset, read: Callable[[Tensor], Tensor], options: Options, device: torch.device) -> Tensor:
    """``N D`` in float64: what ``read`` says of uint8 batches.

    Raises:
        SystemExit: some cannot be read; all of them are named.
    """
    found: list[Tensor] = []
    faults: list[str] = []
    loader = DataLoader(pictures, options.batch_size, num_workers=options.workers, collate_fn=list)
    for batch in loader:
        faults += [picture for picture in batch if isinstance(picture, str)]
        if not faults:  # else the rest is read to name all at once
            found.append(read(torch.stack(batch).to(device)).double().cpu())
    if faults:
        raise SystemExit(
            f"{len(faults)} pictures cannot be read: {some(faults)}; wanted all of them, for the distance is of sets: "
            "mend or remove them"
        )
    return torch.cat(found)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ₁ − μ₂|² + Tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of the Gaussians with the mean and covariance of features, ``N D``."""
    first, second = first.double(), second.double()
    if not (first.isfinite().all() and second.isfinite().all()):
        raise SystemExit("the features hold NaN or infinity; wanted finite ones: look at the pictures and the encoder")
    centred = [(rows - rows.mean(0)) / math.sqrt(len(rows) - 1) for rows in (first, second)]
    one, two = (torch.linalg.qr(rows, mode="r").R for rows in centred)  # Σ = Rᵀ R
    between = torch.linalg.svdvals(one @ two.T).sum()  # the singular values of R₁ R₂ᵀ are the roots of Σ₁ Σ₂'s values
    spread = one.square().sum() + two.square().sum() - 2 * between
    return max(0.0, float((first.mean(0) - second.mean(0)).square().sum() + spread))


def too_few(count: int, width: int) -> str:
    """What is to be said of a distance from so many pictures and features; empty where they are enough."""
    if count > width:
        return ""
    return (
        f"{count} pictures for {width} features: their covariance has not full rank and the distance is biased "
        "upwards; wanted many more"
    )


def warned_distance(first: Tensor, second: Tensor) -> float:
    """`frechet_distance`, and a word where the pictures are too few for it."""
    if said := too_few(min(len(first), len(second)), first.shape[1]):
        print(said, file=sys.stderr)
    return frechet_distance(first, second)


def open_encoder(name: str, device: torch.device) -> SemanticEncoder:
    """Frozen, of a folder, a Hub id or a timm name; what is not on this machine is fetched."""
    with plain_errors():
        if Path(name).exists() or "/" in name:
            encoder = SemanticEncoder.from_pretrained(name, device=device)
        else:
            try:
                encoder = SemanticEncoder.from_timm(name).to(device)
            except PSVAEError:
                raise
            except (OSError, RuntimeError, ValueError) as error:
                raise SystemExit(
                    f"{name} is no folder here, and timm's weights of that name could not be fetched: {error}"
                ) from error
    return encoder.requires_grad_(False).eval()


def pooled_features(encoder: SemanticEncoder, pictures: Tensor) -> Tensor:
    """uint8 ``B 3 H W`` → ``B D``, the mean of its grid."""
    return encoder(pictures.float() / 127.5 - 1).float().mean((2, 3))


def load_inception(weights: Path, layers: list[str], device: torch.device) -> Any:
    """torch-fidelity's: uint8 ``B 3 H W`` → the features of each layer.

    Raises:
        SystemExit: the file is damaged, or something else.
    """
    inception = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    try:
        return inception.FeatureExtractorInceptionV3("inception-v3-compat", layers, str(weights)).to(device)
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, pickle.UnpicklingError) as error:
        said = " ".join(str(error).split())[:300]
        raise SystemExit(
            f"{weights} cannot be read as torch-fidelity's Inception ({said}); wanted {WEIGHTS}"
        ) from error


def encoder_measures(samples: Dataset, reference: Dataset, options: Options, device: torch.device) -> dict[str, Any]:
    """The Fréchet distance in a SemanticEncoder's features, and whose they are."""
    encoder = open_encoder(options.features, device)
    with plain_errors():
        found = [
            features_of(pictures, partial(pooled_features, encoder), options, device)
            for pictures in (reference, samples)
        ]
    return {"frechet_distance": warned_distance(*found), "features": f"{options.features}, mean over the grid"}


def inception_measures(
    samples: Dataset, reference: Dataset, weights: Path, options: Options, device: torch.device
) -> dict[str, float]:
    """By torch-fidelity's Inception, score and manifolds; one pass over the pictures."""
    if min(len(samples), len(reference)) <= NEIGHBOURS:
        raise SystemExit(
            f"{len(samples)} pictures came, and {len(reference)} as the reference; precision and recall go by the "
            f"{NEIGHBOURS} nearest others: wanted more of each"
        )
    score, manifold = (importlib.import_module(f"torch_fidelity.{part}") for part in ("metric_isc", "metric_prc"))
    network = load_inception(weights, ["2048", "logits_unbiased"], device)
    # ADM takes mixed_6/conv of TensorFlow's graph after its ReLU: the block's first branch, so its first channels
    seen: list[Tensor] = []
    network.Mixed_6d.register_forward_hook(
        lambda _module, _inputs, maps: seen.append(maps[:, :SPATIAL_CHANNELS].flatten(1))
    )

    def read(batch: Tensor) -> Tensor:
        return torch.cat([*network(batch), seen.pop()], dim=1)

    sizes = (2048, network.fc.out_features, SPATIAL_CHANNELS * 17 * 17)
    found = (features_of(pictures, read, options, device).split(sizes, dim=1) for pictures in (reference, samples))
    (real, _, real_maps), (made, logits, made_maps) = found
    scores = score.isc_features_to_metric(logits, splits=math.ceil(len(logits) / SCORED), shuffle=False)
    shares = manifold.prc_features_to_metric(
        made.float(), real.float(), prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
    )
    return {
        "fid": frechet_distance(real, made), "sfid": frechet_distance(real_maps, made_maps),
        "is": scores["inception_score_mean"], "precision": shares["precision"], "recall": shares["recall"],
    }  # fmt: skip


def why_no_inception(weights: Path) -> str:
    """In words; empty where it is there."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return "torch-fidelity is not installed (pip install 'torch-fidelity>=0.4')"
    return "" if weights.is_file() else f"there are no Inception weights at {weights}"


def main(options: Options) -> dict[str, Any]:
    """Measure; returns the numbers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = options.inception or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    absent = why_no_inception(weights)
    if absent:
        print(f"no FID, sFID, Inception score, precision and recall: {absent}")
        if options.features is None:
            raise SystemExit("nothing to measure with: pass --features, a SemanticEncoder, or bring Inception")
    samples = PictureSet(options.samples, options.size)
    reference = PictureSet(options.reference, samples.shape[-1])
    if reference.shape != samples.shape:
        raise SystemExit(f"samples are {samples.shape}, the reference {reference.shape}")
    numbers: dict[str, Any] = {"samples": len(samples), "reference": len(reference)}
    if not absent:
        numbers |= inception_measures(samples, reference, weights, options, device)
    if options.features is not None:
        numbers |= encoder_measures(samples, reference, options, device)
    text = json.dumps(numbers, indent=2)
    print(text)
    if options.output is not None:
        write_text(options.output, text + "\n")
    return numbers


if __name__ == "__main__":
    main(tyro.cli(Options))
