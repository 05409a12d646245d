"""What a codec makes of pictures: each one's measures, features and latents, in parts that a killed run does not lose.

For evaluate.py. A part's file is named for all that decides its numbers, its pictures' files among it, so nothing stale
is taken up.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from cache_latents import Images, ImageSource, generators_of, some
from checkpoints import write_whole
from data import center_transform, spread
from measures import each_picture, eight_bits
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from psvae import PSVAE, PixelVAE, SemanticEncoder
from psvae.losses import cosine_similarity_map

Rows = dict[str, Tensor]  # a number, or more of them, of each picture


class MeasuredPictures(Images):
    """(place, (pixels uint8 3 H W, whether they were enlarged), label), or why it cannot be read instead of the pixels.

    Args:
        count: at most so many, spread evenly over all.

    Attributes:
        places: of those.
    """

    def __init__(self, source: ImageSource, count: int | None) -> None:
        super().__init__(source)
        self.source, self.crop, self.transform = source, center_transform(source.size), self._pixels
        self.places = list(range(len(self))) if count is None else spread(len(self), count)

    def _pixels(self, image: Image.Image) -> tuple[Tensor, bool]:
        return eight_bits(self.crop(image)), min(image.size) < self.source.size

    def name(self, place: int) -> str:
        return f"row {place}" if self.table is not None else str(self.root / self.names[place])

    def identity(self, place: int) -> str:
        """The same for the same picture in another list."""
        if self.table is not None:
            return f"{self.name(place)} of {self.table._fingerprint}"
        return str(Path(self.name(place)).resolve())

    def classes(self) -> list[str]:
        """By place; empty where there is none."""
        if self.table is None:
            return [name.partition("/")[0] if "/" in name else "" for name in self.names]
        if "label" not in self.table.column_names:
            return [""] * len(self)
        names = getattr(self.table.features["label"], "names", None)
        return [
            "" if label is None or label == -1 else names[label] if names else str(label)  # -1: not told, in test sets
            for label in self.table["label"][:]
        ]

    def stamp(self, places: list[int]) -> str:
        """A digest of the pictures at these places: another if one is replaced, and if their files are written anew."""
        if self.table is not None:
            return stamp_of([self.table._fingerprint, places])
        return stamp_of([[self.names[place], *self._state(self.root / self.names[place])] for place in places])

    @staticmethod
    def _state(file: Path) -> tuple[int, int]:
        try:
            found = file.stat()
        except OSError:  # a link to nothing: reading it says so
            return 0, 0
        return found.st_size, found.st_mtime_ns


def stamp_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Work:
    """How a pass over pictures is done.

    Attributes:
        folder: of the parts.
        part: pictures in each.
        skip: leave out what cannot be read, instead of stopping.
    """

    accelerator: Accelerator
    folder: Path
    batch_size: int
    part: int
    workers: int
    skip: bool


class Pass(NamedTuple):
    """On the main process; the others have no rows.

    Attributes:
        files: that the rows came from, to be removed once the numbers are safe.
        left_out: what cannot be read, in words.
    """

    rows: Rows
    files: list[Path]
    left_out: list[str]


def rows_of(
    pictures: MeasuredPictures, key: list[str], read: Callable[[Tensor, list[int]], Rows], work: Work, title: str
) -> Pass:
    """What ``read`` says of uint8 ``B 3 H W`` and their places, with ``place`` and ``enlarged``. All processes call it
    and share the parts.

    Args:
        key: all that decides it but the pictures.

    Raises:
        SystemExit: some pictures cannot be read, or none.
    """
    accelerator, places = work.accelerator, pictures.places
    parts = [places[first : first + work.part] for first in range(0, len(places), work.part)]
    files = [work.folder / f"{stamp_of([*key, pictures.stamp(part)])}.safetensors" for part in parts]
    waiting = [(part, file) for part, file in zip(parts, files, strict=True) if not file.exists()]
    accelerator.wait_for_everyone()  # all have looked before one writes, so that all share the same list
    faults = _read_parts(pictures, waiting[accelerator.process_index :: accelerator.num_processes], read, work, title)
    if faults := sorted(gather_object(faults)):  # which waits for all
        raise SystemExit(
            f"{len(faults)} of {len(places)} pictures cannot be read: {some(faults)}. Mend or remove them, or pass "
            "--skip-unreadable, and run the same command again: what is finished stays"
            if accelerator.is_main_process
            else 1
        )
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return Pass({}, [], [])
    found = [part for part in map(load_file, files) if len(part["place"])]
    if not found:
        raise SystemExit(f"none of the {len(places)} pictures of {pictures.source.data} can be read")
    rows = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    kept = set(rows["place"].tolist())
    left_out = [pictures.name(place) for place in places if place not in kept]
    if left_out and not work.skip:
        raise SystemExit(
            f"an earlier run left out {len(left_out)} pictures that cannot be read: {some(left_out)}. Mend them, or "
            "pass --skip-unreadable again"
        )
    return Pass(rows, files, left_out)


def _read_parts(
    pictures: MeasuredPictures,
    parts: list[tuple[list[int], Path]],
    read: Callable[[Tensor, list[int]], Rows],
    work: Work,
    title: str,
) -> list[str]:
    """Write them; why pictures cannot be read, where that stops the run."""
    batches = [
        [part[first : first + work.batch_size] for first in range(0, len(part), work.batch_size)] for part, _ in parts
    ]
    if not parts:
        return []
    loader = iter(
        DataLoader(
            pictures, batch_sampler=[batch for part in batches for batch in part], num_workers=work.workers,
            collate_fn=list,
        )
    )  # fmt: skip
    faults: list[str] = []
    hidden = not work.accelerator.is_main_process
    with tqdm(total=sum(len(part) for part, _ in parts), desc=title, unit="picture", disable=hidden) as bar:
        for (_, file), part in zip(parts, batches, strict=True):
            found: list[Rows] = [{"place": torch.empty(0, dtype=torch.long)}]
            for items in islice(loader, len(part)):
                bad = [said for _, said, _ in items if isinstance(said, str)]
                for said in bad:
                    print(said, file=sys.stderr)
                faults += [] if work.skip else bad
                good = [(place, *seen) for place, seen, _ in items if not isinstance(seen, str)]
                if good and not faults:  # else the rest is opened to name all at once
                    places, pixels, enlarged = (list(column) for column in zip(*good, strict=True))
                    rows = read(torch.stack(pixels).to(work.accelerator.device), places)
                    found.append(
                        {"place": torch.tensor(places), "enlarged": torch.tensor(enlarged)}
                        | {name: row.cpu() for name, row in rows.items()}
                    )
                bar.update(len(items))
            if not faults:
                write_part(file, found)
    return faults


def write_part(file: Path, found: list[Rows]) -> None:
    names = found[-1]
    rows = {name: torch.cat([batch[name] for batch in found if name in batch]).contiguous() for name in names}
    write_whole(file, lambda partial: save_file(rows, partial))


@dataclass(frozen=True)
class Meters:
    """What every codec is measured with.

    Attributes:
        lpips: None leaves it out.
        extractors: by the number that they give: uint8 ``B 3 H W`` → features ``B D``, for a Fréchet distance.
        frozen: whose features the rebuilt ones are compared with; None takes the codec's own encoder's.
        probed: forms of the latent for probes, see `latent_forms`.
        sample: draw latents from the posterior instead of taking its mean.
        seed: of those draws; each picture has its own.
    """

    lpips: nn.Module | None
    extractors: dict[str, Callable[[Tensor], Tensor]]
    frozen: SemanticEncoder | None
    probed: tuple[str, ...]
    sample: bool
    seed: int
    accelerator: Accelerator

    @torch.no_grad()
    def of_pictures(self, pixels: Tensor, places: list[int]) -> Rows:
        """Of what reconstructions are compared with."""
        return {f"{name} features": extract(pixels) for name, extract in self.extractors.items()}

    @torch.no_grad()
    def of_latents(self, vae: PSVAE | PixelVAE, pixels: Tensor, places: list[int]) -> Rows:
        """For a probe to learn from."""
        with self.accelerator.autocast():
            posterior = vae.encode(as_images(pixels)).latent_dist
        return latent_forms(posterior.mode().float(), self.probed)

    @torch.no_grad()
    def of_codec(self, vae: PSVAE | PixelVAE, pictures: MeasuredPictures, pixels: Tensor, places: list[int]) -> Rows:
        """Of reconstructions, features and latents.

        Raises:
            SystemExit: a reconstruction holds NaN or infinity.
        """
        images = as_images(pixels)
        generators = generators_of(self.seed, places)
        with self.accelerator.autocast():
            output = vae(images, sample_posterior=self.sample, generator=generators)
            whole = output.sample.flatten(1).isfinite().all(dim=1)
            if not whole.all():
                broken = [pictures.name(place) for place, good in zip(places, whole.tolist(), strict=True) if not good]
                raise SystemExit(
                    f"the reconstruction of {some(broken)} holds NaN or infinity; wanted finite numbers: look at the "
                    "weights, or at --precision"
                )
        made = eight_bits(output.sample)
        rows = each_picture(made, pixels, self.lpips)
        rows |= {f"{name} features": extract(made) for name, extract in self.extractors.items()}
        rebuilt = getattr(output, "rebuilt_features", None)
        if rebuilt is not None:
            wanted = output.features if self.frozen is None else self.frozen(images)
            rows["feature_cosine"] = cosine_similarity_map(rebuilt, wanted).mean(dim=(1, 2))
        posterior = output.posterior
        if not posterior.deterministic:
            mean, var = posterior.mean.double(), posterior.var.double()
            moments = [moment.mean(dim=(2, 3)) for moment in (mean, mean.square(), var)]
            rows["moments"] = torch.stack(moments, dim=1)  # B 3 Z
        mean = posterior.mode().float()
        if isinstance(vae, PSVAE) and self.probed:
            mean = vae.latent_spec.normalize(mean)  # as its encode gives them
        return rows | latent_forms(mean, self.probed)


def as_images(pixels: Tensor) -> Tensor:
    """uint8 → [-1, 1]."""
    return pixels.float() / 127.5 - 1


def latent_forms(latents: Tensor, forms: tuple[str, ...]) -> Rows:
    """``B Z h w`` as probes read them: ``pooled``, their mean over cells, ``B Z``; ``flat``, all of them, ``B Zhw``."""
    found = {"pooled": latents.mean(dim=(2, 3)), "flat": latents.flatten(1)}
    return {f"{form} latents": found[form] for form in forms}
