"""Segmentation and depth from latents, without training (ReaLS, arXiv 2502.00359, Figure 4).

    python examples/downstream.py --reals outputs/reals --input photographs/ --allow-pickle \\
        --segmentation dinov2_vitb14_ade20k_linear_head.pth --depth dinov2_vitb14_nyu_linear_head.pth
    python examples/downstream.py --reals outputs/reals --input generated.npz --normalized \\
        --segmentation outputs/downstream/head.safetensors
    python examples/downstream.py --reals outputs/reals --fit-head /data/labelled    # images/ and masks/

Latents, encoded or generated → AlignmentNet → features → heads → masks and depth maps. The heads are DINOv2's own, made
for its features, or one that `--fit-head` fits on the teacher's features of labelled pictures; neither ever sees a
latent's features before they are applied. Below `--output`: masks/ as index PNGs, depth/ as .npy in metres,
downstream.png with picture, mask and depth; of `--fit-head` also head.safetensors, and metrics.json with the mean
intersection over union on held-out pictures, of the teacher's features and of the latents'.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import torch
import tyro
from checkpoints import write_text
from data import IMAGE_ENDINGS, UNREADABLE, center_transform, read_image
from fitting import Labelled, fit
from frechet import read_npz
from heads import DepthHead, SegmentationHead, read_head, save_head
from PIL import Image
from reals_models import build_teacher, config_of
from safetensors import SafetensorError
from safetensors.torch import load_file
from sampling import plain_errors, refuse_smaller
from torch import Tensor, nn

from psvae import AlignmentNet, PixelVAE, SemanticEncoder, SemanticEncoderConfig, load_reals
from psvae.errors import RangeWarning
from psvae.shapes import check_map

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LATENT_ENDINGS = {".npz", ".safetensors"}
Tokens = Literal["normed", "pre_norm"]


@dataclass(frozen=True)
class Options:
    """Masks and depth maps from latents."""

    reals: str
    """Folder or Hub id that `load_reals` reads."""
    input: Path | None = None
    """A picture or latents (.safetensors or .npz, `latents` N Z h w), or a folder of either. None, with --fit-head:
    its held-out pictures."""
    segmentation: Path | None = None
    """A linear segmentation head: DINOv2's file, or one that --fit-head left."""
    depth: Path | None = None
    """A linear depth head of DINOv2."""
    fit_head: Path | None = None
    """Labelled folder: images/ and masks/ of the same names, masks as index PNGs."""
    allow_pickle: bool = False
    """Read .pth heads, by PyTorch's restricted unpickler."""
    normalized: bool = False
    """The latents of --input are as a generator makes them, normalised by mean_std.json; else raw, as cached ones."""
    teacher: str | None = None
    """A timm name, or a folder saved by psvae; None takes that of train_reals.py's options.json. For --fit-head, and
    for the final norm where a head reads normed tokens and the latents were aligned with others."""
    teacher_features: Tokens | None = None
    """What the latents were aligned with; None takes that of options.json."""
    max_depth: float | None = None
    """Metres; None: 10 where the depth head's file is named nyu, 80 where kitti."""
    size: int = 256
    """Pictures are resized on their short side and centre-cropped to this."""
    classes: int | None = None
    """In the masks of --fit-head; None counts them."""
    ignore: int = 255
    """Number in the masks that is no class."""
    held_out: int = 5
    """One labelled picture in so many is not fitted to, and measured. Drawn by the seed: classes may come in turn."""
    steps: int = 2000
    """Of fitting. DINOv2's heads took 40 000."""
    lr: float = 1e-3
    """Of fitting, as of DINOv2's heads."""
    batch_size: int = 16
    shown: int = 8
    """Rows of downstream.png."""
    workers: int = 4
    """Loader processes; 0 reads in the program itself."""
    seed: int = 0
    output: Path = Path("outputs/downstream")


class Item(NamedTuple):
    """A batch of what is looked at."""

    names: list[str]
    latents: Tensor
    pictures: Tensor | None
    """``B 3 H W`` in [-1, 1]; None where latents came, which are decoded where they are shown."""


@dataclass(frozen=True)
class Reader:
    """Latents → what a head reads.

    Attributes:
        kind: of the tokens that the network was aligned with.
        norm: the teacher's final one, where it is known.
        final_norm: what the teacher's configuration calls it; DINOv2's own is ``"affine"``.
    """

    alignment: AlignmentNet
    kind: Tokens
    norm: nn.Module | None = None
    final_norm: str = "affine"

    def __call__(self, latents: Tensor, wanted: str, normalized: bool = False) -> tuple[Tensor, Tensor]:
        """Patch features ``B D h w`` and the CLS token ``B D``, both of the wanted kind where that can be."""
        patches, cls = self.alignment(latents, normalized=normalized)
        if self.kind == "pre_norm" and wanted == "normed" and self.norm is not None:
            patches, cls = self.norm(patches.movedim(1, -1)).movedim(-1, 1), self.norm(cls)
        return patches, cls

    def remark(self, head: SegmentationHead | DepthHead, published: bool = False) -> str | None:
        """Where the head reads other tokens than the latents carry.

        Args:
            published: it is DINOv2's own.
        """
        if published and head.tokens == "normed" and self.final_norm != "affine":
            return (
                f"the {type(head).__name__} reads DINOv2's normed tokens, and the teacher's final norm is "
                f"{self.final_norm!r}, without DINOv2's scale and shift: expect wrong masks, or take --fit-head"
            )
        what = f"the {type(head).__name__} reads {head.tokens} tokens, the latents were aligned with {self.kind} ones"
        if self.kind == head.tokens:
            return None
        if head.tokens == "pre_norm":
            return f"{what}: the norm cannot be undone, so expect wrong depths"
        if self.norm is None:
            return f"{what}: name the --teacher, so that its final norm is applied to them"
        return f"{what}: the teacher's final norm is applied to them"


@contextmanager
def means() -> Iterator[None]:
    """While a reader sees means of pictures, raw: where the posterior is wide, they lie nearer together than the
    samples that the statistics are of, and it is not told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "latents lie", RangeWarning)
        yield


def load_teacher(name: str, vae: PixelVAE, alignment: AlignmentNet) -> SemanticEncoder:
    """As in training: its own final norm, one token for each alignment feature."""
    merge = alignment.config.merge
    fitting = alignment.config.stride * merge  # this program's sizes the teacher checks itself
    teacher = build_teacher(name, vae, fitting, merge)
    if teacher.feature_dim != alignment.config.feature_dim:
        raise SystemExit(
            f"the teacher {name} gives features of width {teacher.feature_dim} and the alignment network of "
            f"{alignment.config.feature_dim}; wanted the teacher that the latents were aligned with"
        )
    return teacher


def final_norm_of(teacher: str | None) -> str:
    """Of a folder of psvae, what it says; any other teacher keeps its own."""
    config = None if teacher is None else config_of(teacher)
    if config is None or "_class" not in config:
        return "affine"
    return config.get("final_norm", SemanticEncoderConfig.final_norm)


# What is looked at


def items(path: Path, vae: PixelVAE, options: Options) -> Iterator[Item]:
    """Batches of a picture, of latents, or of a folder of either."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    found = {
        kind: [file for file in files if file.suffix.lower() in endings]
        for kind, endings in (("latents", LATENT_ENDINGS), ("pictures", IMAGE_ENDINGS))
    }
    if bool(found["latents"]) == bool(found["pictures"]):
        counts = " and ".join(f"{len(found[kind])} files of {kind}" for kind in found)
        raise SystemExit(
            f"{path} holds {counts}; wanted one of the two: {', '.join(sorted(LATENT_ENDINGS))}, or "
            f"{', '.join(sorted(IMAGE_ENDINGS))}"
        )
    root = path.parent if path.is_file() else path
    if found["pictures"]:
        yield from encoded(found["pictures"], root, vae, options)
    for file in found["latents"]:
        latents, stem = read_latents(file, vae), file.relative_to(root).with_suffix("").as_posix()
        for start in range(0, len(latents), options.batch_size):
            part = latents[start : start + options.batch_size]
            yield Item([f"{stem}_{start + place:06d}" for place in range(len(part))], part.to(vae.device), None)


def encoded(files: list[Path], root: Path, vae: PixelVAE, options: Options) -> Iterator[Item]:
    """Pictures and the means of their latents."""
    transform = center_transform(options.size)
    for start in range(0, len(files), options.batch_size):
        pictures: dict[str, Tensor] = {}
        for file in files[start : start + options.batch_size]:
            try:
                pictures[file.relative_to(root).with_suffix("").as_posix()] = transform(read_image(file))
            except UNREADABLE as error:
                print(f"{file} cannot be read and is left out ({error})")
        if pictures:
            batch = torch.stack(list(pictures.values())).to(vae.device)
            yield Item(list(pictures), vae.encode(batch).latent_dist.mode(), batch)


def read_latents(file: Path, vae: PixelVAE) -> Tensor:
    """``N Z h w`` in fp32: the array named latents, or the only one of an .npz."""
    try:
        if file.suffix == ".safetensors":
            content: dict[str, Any] = load_file(file)
        else:
            content = {name: torch.from_numpy(array) for name, array in read_npz(file).items()}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{file} cannot be read: {error}") from error
    only = next(iter(content.values())) if file.suffix == ".npz" and len(content) == 1 else None
    latents = content.get("latents", only)
    if latents is None:
        names = ", ".join(list(content)[:6]) + ", ..." * (len(content) > 6)
        raise SystemExit(f"{file} holds {names or 'nothing'}; wanted an array named latents, N Z h w")
    if not latents.is_floating_point():
        raise SystemExit(f"{file} holds {latents.dtype} of shape {tuple(latents.shape)}, no latents; wanted N Z h w")
    with plain_errors():
        check_map(latents, vae.latent_spec.channels, f"the latents of {file}")
    return latents.float()


# What comes out


@torch.no_grad()
def apply(
    found: Iterable[Item], vae: PixelVAE, reader: Reader, heads: list[SegmentationHead | DepthHead], options: Options
) -> int:
    """Write masks and depth maps, and the picture of the first; returns how many there were."""
    rows: list[dict[str, np.ndarray]] = []
    count = 0
    for names, latents, pictures in found:
        normalized = options.normalized and pictures is None
        stride = vae.latent_spec.stride
        size = (latents.shape[-2] * stride, latents.shape[-1] * stride)
        maps: dict[str, np.ndarray] = {}
        for head in heads:
            with nullcontext() if pictures is None else means():
                patches, cls = reader(latents, head.tokens, normalized)
            if isinstance(head, DepthHead):
                maps["depth"] = head(patches, cls, size).cpu().numpy()
            else:
                maps["mask"] = head(patches, size).argmax(dim=1).cpu().numpy()
        for place, name in enumerate(names):
            if "mask" in maps:
                kind = np.uint8 if maps["mask"].max() < 256 else np.uint16
                Image.fromarray(maps["mask"][place].astype(kind)).save(new(options.output / "masks" / f"{name}.png"))
            if "depth" in maps:
                np.save(new(options.output / "depth" / f"{name}.npy"), maps["depth"][place])
        wanted = max(0, options.shown - count)
        if wanted:
            if pictures is None:
                raw = latents[:wanted]
                raw = vae.latent_spec.denormalize(raw) if normalized else raw
                pictures = vae.decode(raw).sample
            shown = (pictures[:wanted].float().clamp(-1, 1) * 0.5 + 0.5).movedim(1, -1).cpu().numpy()
            rows += [
                {"picture": picture, **{name: values[place] for name, values in maps.items()}}
                for place, picture in enumerate(shown)
            ]
        count += len(names)
    if rows:
        save_figure(rows, new(options.output / "downstream.png"))
    return count


def new(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def save_figure(rows: list[dict[str, np.ndarray]], path: Path) -> None:
    """One row per picture; columns picture, mask, depth, as in the paper's Figure 4."""
    colours = matplotlib.colormaps["tab20"]
    depths = [row["depth"] for row in rows if "depth" in row]
    scale = {"vmin": min(d.min() for d in depths), "vmax": max(d.max() for d in depths)} if depths else {}
    high, wide = len(rows), len(rows[0])
    figure, axes = plt.subplots(high, wide, figsize=(2.4 * wide, 2.4 * high + 0.3), squeeze=False, layout="constrained")
    for row, line in zip(rows, axes, strict=True):
        for (name, values), axis in zip(row.items(), line, strict=True):
            if name == "depth":
                drawn = axis.imshow(values, cmap="magma_r", **scale)
            else:
                axis.imshow(colours(values % 20) if name == "mask" else values)
            axis.axis("off")
    for name, axis in zip(rows[0], axes[0], strict=True):
        axis.set_title(name)
    if depths:
        figure.colorbar(drawn, ax=axes[:, -1], shrink=0.8, label="metres")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def remembered(options: Options) -> tuple[Tokens | None, str | None]:
    """(kind of tokens, teacher): as asked for, else as train_reals.py wrote them beside vae/ and alignment/."""
    file = Path(options.reals) / "options.json"
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(
            f"{file}, which says what the latents were aligned with, cannot be read ({error}); remove it, and pass "
            "--teacher and --teacher-features"
        ) from error
    kind = options.teacher_features or before.get("teacher_features")
    return kind, options.teacher or before.get("teacher")


def check(options: Options) -> None:
    """Stop before anything is loaded where nothing could be done."""
    refuse_smaller(options, {0: ("shown", "workers"), 1: ("batch_size", "steps", "size"), 2: ("held_out",)})
    if options.segmentation and options.fit_head:
        raise SystemExit("--segmentation is a head and --fit-head makes one; wanted one of them")
    if not (options.segmentation or options.depth or options.fit_head):
        raise SystemExit("no head came; wanted --segmentation, --depth or --fit-head")
    if options.input is None and not options.fit_head:
        raise SystemExit("nothing to look at came; wanted --input, pictures or latents")
    if options.input is not None and not options.input.exists():
        raise SystemExit(f"there is no --input {options.input}")


def main(options: Options) -> dict[str, float]:
    """Returns the measures of --fit-head."""
    check(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, name = remembered(options)
    if kind is None:
        kind = "normed"
        print(f"{options.reals} does not say what its latents were aligned with; taken: {kind} (--teacher-features)")
    scores: dict[str, float] = {}
    with plain_errors():
        vae, alignment = load_reals(options.reals, device=device)
        alignment = alignment.requires_grad_(False)
        vae = vae.requires_grad_(False)
        width = alignment.config.feature_dim
        heads: list[Any] = []
        published: list[Any] = []  # of them: DINOv2's files are pickles, and save_head writes safetensors
        for file, expected in ((options.segmentation, SegmentationHead), (options.depth, DepthHead)):
            if file is not None:
                head = read_head(file, width, allow_pickle=options.allow_pickle, max_depth=options.max_depth)
                if not isinstance(head, expected):
                    raise SystemExit(f"{file} holds a {type(head).__name__}; wanted a {expected.__name__}")
                heads.append(head.to(device))
                if file.suffix != ".safetensors":
                    published.append(heads[-1])
        teacher = None
        if options.fit_head or (options.segmentation and kind == "pre_norm" and name):
            if name is None:
                raise SystemExit("--fit-head needs the --teacher that the latents were aligned with")
            teacher = load_teacher(name, vae, alignment).to(device)
        final_norm = final_norm_of(name) if published else "affine"
        reader = Reader(alignment, kind, None if teacher is None else teacher.vit.norm, final_norm)
        look_at: Callable[[], Iterator[Item]] = partial(items, options.input, vae, options)
        if options.fit_head:
            labelled = Labelled(options.fit_head, options.size, options.classes, options.ignore)

            def latent_features(images: Tensor) -> Tensor:
                with means():
                    return reader(vae.encode(images.to(device)).latent_dist.mode(), SegmentationHead.tokens)[0]

            head, held_out, scores = fit(
                labelled, teacher, latent_features, one_in=options.held_out, steps=options.steps, lr=options.lr,
                batch_size=options.batch_size, workers=options.workers, seed=options.seed,
            )  # fmt: skip
            heads.insert(0, head)
            save_head(head, new(options.output / "head.safetensors"))
            write_text(options.output / "metrics.json", json.dumps(scores, indent=2) + "\n")
            print(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
            if options.input is None:
                look_at = partial(encoded, held_out, options.fit_head / "images", vae, options)
        for head in heads:
            remark = reader.remark(head, published=head in published)
            if remark:
                print(remark)
        count = apply(look_at(), vae, reader, heads, options)
    if not count:
        raise SystemExit(f"none of the pictures of {options.input or options.fit_head} can be read; wanted one or more")
    print(f"{count} pictures: {options.output}")
    return scores


if __name__ == "__main__":
    main(tyro.cli(Options))
