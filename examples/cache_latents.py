"""Encode a data set once: latents in sharded safetensors, with LightningDiT's names, for any generator to train on.

    python examples/cache_latents.py --vae outputs/psvae/stage2 --data /data/imagenet/train --output latents/
    accelerate launch --num_processes 8 examples/cache_latents.py ...      # the same files, eight times as fast

An image file that cannot be read is named at the end, and its shard is not written. Mend it, or remove it, and run the
same command again: what is finished stays, and a removed image is left out of its shard. A row of a Hugging Face table
cannot be removed: one that cannot be read is left out at once, and named; train_generator.py passes over it.

A shard holds ``latents`` and ``latents_flip`` (of the mirrored image), N Z h w, and ``labels``, N; with --moments also
``mean`` and ``logvar`` of the posterior. Which image is in which shard follows from its place in the data alone, and a
shard appears whole or not at all: a run that was killed goes on where it stopped, by the same command. Read them with
`CachedLatents`, or with LightningDiT's own reader. One run writes into a folder at a time.
"""

import json
import os
import sys
from bisect import bisect
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from checkpoints import changed, write_text, write_whole
from data import UNREADABLE, center_transform, image_files, open_table, read_image
from safetensors import safe_open
from safetensors.torch import save_file
from sampling import digest, load_vae, refuse_smaller
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from psvae import PSVAE, PixelVAE
from psvae.errors import PSVAEError

MANIFEST, NAMES, STATISTICS = (
    "manifest.json",
    "names.json",
    "latents_stats.pt",
)  # LightningDiT takes every .safetensors for a shard
LEFT_TO_CALLERS = {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "statistics_grid"}  # of PixelVAE


@dataclass(frozen=True)
class ImageSource:
    """Where images and their classes come from."""

    data: str
    """A folder with one subfolder per class, or a Hugging Face dataset (id, or folder of parquet files)."""
    split: str | None = None
    """Split of a Hugging Face dataset; without it, `data` is a folder of images."""
    image_column: str = "image"
    """Of a Hugging Face dataset."""
    label_column: str | None = "label"
    """Of a Hugging Face dataset: classes by number or by name. None: every label is 0."""
    size: int = 256
    """Images are resized on their short side and centre-cropped to this."""


@dataclass(frozen=True, kw_only=True)
class Options(ImageSource):
    """What to encode, and where to."""

    vae: str
    """A PSVAE or PixelVAE: a folder or a Hub id."""
    output: Path
    """Folder for the shards. One VAE and one data set per folder."""
    batch_size: int = 32
    shard_size: int = 2048
    """Images per shard."""
    moments: bool = False
    """Also store mean and log-variance, so that a training run can draw anew each time, or take the mean."""
    seed: int = 0
    """Of the draw from the posterior; each image has its own."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the stored tensors."""
    workers: int = min(4, os.cpu_count() or 1)
    """Loader processes on each process."""
    allow_pickle: bool = False


class Images(Dataset):
    """(place, image 3 H W in [-1, 1], label) by place; why it cannot be read instead of the image, where that is so.

    Args:
        otherwise: what to do where there is no folder of images, for messages.

    Attributes:
        names: of the images, in order: a place is one's index here. `resume` makes it the list of the first run.
        left_out: places of images that were removed since, or of rows that cannot be read.
    """

    def __init__(self, source: ImageSource, otherwise: str = "for a Hugging Face dataset name its --split") -> None:
        self.transform = center_transform(source.size)
        self.table: Any = None
        self.left_out: set[int] = set()
        self.root = Path(source.data)
        if source.split is not None:
            self.table = open_images(source)
            self.follow([str(place) for place in range(len(self.table))])
            return
        files = image_files(self.root, otherwise)
        self.follow(sorted(path.relative_to(self.root).as_posix() for path in files))

    def follow(self, names: list[str]) -> None:
        """Take places and classes from this list."""
        self.names = names
        folders = [name.partition("/")[0] if "/" in name else None for name in names]
        classes = {folder: number for number, folder in enumerate(sorted({f for f in folders if f is not None}))}
        self.labels = [classes.get(folder, 0) for folder in folders]

    def without_class(self) -> list[str]:
        """Those of the first list that have none where others have one."""
        if self.table is None:
            return beside_classes(self.names)
        labels = self.table["label"][:] if "label" in self.table.column_names else []
        return [f"row {place}" for place, label in enumerate(labels) if label is None]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str, int]:
        if self.table is None:
            source, label = self.root / self.names[place], self.labels[place]
            name = str(source)
        else:
            row = self.table[place]
            source, label, name = row["image"], row.get("label", 0), f"row {place}"
        try:
            return place, self.transform(read_image(source)), label
        except UNREADABLE as error:
            return place, f"{name} cannot be read ({error})", label


def beside_classes(names: list[str]) -> list[str]:
    """The images that lie beside the subfolders of others, which are their classes."""
    beside = [name for name in names if "/" not in name]
    return beside if len(beside) < len(names) else []


Fault = tuple[int, str]  # a place, and why its image cannot be read


def collate(items: list[tuple[int, Tensor | str, int]]) -> tuple[list[int], Tensor | None, Tensor, list[Fault]]:
    """(places, images, labels, faults); no images where one of them has a fault."""
    places, images, labels = zip(*items, strict=True)
    faults = [(place, image) for place, image in zip(places, images, strict=True) if isinstance(image, str)]
    return list(places), None if faults else torch.stack(images), torch.tensor(labels), faults  # type: ignore[arg-type]


def open_images(source: ImageSource) -> Any:
    """The Hugging Face dataset with columns ``image``, undecoded, and ``label``, by number."""
    import datasets

    table = open_table(source.data, source.split)
    wanted = {source.image_column: "image"} | ({source.label_column: "label"} if source.label_column else {})
    absent = [column for column in wanted if column not in table.column_names]
    if absent or not len(table):
        raise SystemExit(
            f"{source.data} has {len(table)} rows of columns {', '.join(table.column_names)}; wanted rows with "
            f"{' and '.join(wanted)}: see --image-column and --label-column (None where there are no classes)"
        )
    table = table.select_columns(list(wanted)).rename_columns(wanted).cast_column("image", datasets.Image(decode=False))
    if source.label_column and table.features["label"].dtype == "string":
        table = table.class_encode_column("label")  # numbered in the order of the alphabet
    return table


class CachedLatents(Dataset):
    """The latents of a finished folder, by place, as (latents Z h w, label); opened shard by shard, where needed.

    Args:
        flip: give the mirrored image's latents half of the time (LightningDiT's augmentation).
        normalise: (z − mean) / std with the folder's statistics.
    """

    def __init__(self, folder: str | Path, flip: bool = False, normalise: bool = False) -> None:
        self.folder, self.flip = Path(folder), flip
        self.manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        counts = [len(places) for places in shard_places(self.manifest)]
        self._ends = list(accumulate(counts))
        names = [shard_name(shard) for shard, count in enumerate(counts) if count]
        lost = [name for name in names if not (self.folder / name).exists()]
        if lost:
            raise FileNotFoundError(
                f"{self.folder} lacks {len(lost)} shards ({lost[0]}, ...); run the same command again"
            )
        self.statistics: dict[str, Tensor] = {}
        if normalise:
            found = torch.load(self.folder / STATISTICS, weights_only=True)
            self.statistics = {name: tensor[0] for name, tensor in found.items()}
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def moments(self, place: int) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, both Z h w, of the posterior of a folder written with --moments."""
        file, row = self._find(place)
        return file.get_slice("mean")[row], file.get_slice("logvar")[row]

    def stored(self, place: int, mirrored: bool) -> Tensor:
        """``Z h w`` as it was drawn for the shard, of the image or of the mirrored one."""
        file, row = self._find(place)
        return file.get_slice("latents_flip" if mirrored else "latents")[row]

    def label(self, place: int) -> int:
        file, row = self._find(place)
        return int(file.get_slice("labels")[row])

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        latents = self.stored(place, self.flip and bool(torch.rand(()) < 0.5))
        if self.statistics:
            latents = (latents.float() - self.statistics["mean"]) / self.statistics["std"]
        return latents, self.label(place)

    def _find(self, place: int) -> tuple[Any, int]:
        """Its shard, opened, and the row there."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        shard = bisect(self._ends, place)
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / shard_name(shard), framework="pt")
        return self._open[shard], place - (self._ends[shard - 1] if shard else 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # file handles do not travel to the loader's processes


def shard_name(shard: int) -> str:
    return f"latents_{shard:06d}.safetensors"


def shard_places(manifest: dict[str, Any]) -> list[list[int]]:
    """Which images are in each shard, by their places in the list of the first run."""
    count, size, left_out = manifest["count"], manifest["shard_size"], set(manifest["left_out"])
    return [
        [place for place in range(first, min(first + size, count)) if place not in left_out]
        for first in range(0, count, size)
    ]


def digest_of(vae: PSVAE | PixelVAE) -> str:
    """Of its weights and configuration, but for the scale and the statistics that a PixelVAE leaves to the caller."""
    config, state = vae.config.to_dict(), vae.state_dict()
    if vae.latent_spec.applied_by == "caller":
        config = {name: value for name, value in config.items() if name not in LEFT_TO_CALLERS}
        state = {name: tensor for name, tensor in state.items() if not name.startswith("latent_spec.")}
    return digest(config, state)


def manifest_of(options: Options, vae: PSVAE | PixelVAE, images: Images) -> dict[str, Any]:
    """What must not change between two runs into one folder; and ``left_out``, which may."""
    kept = "data", "split", "image_column", "label_column", "size", "shard_size", "moments", "seed", "dtype"
    ours = {name: asdict(options)[name] for name in kept}
    return {"count": len(images), "vae": digest_of(vae), **ours, "left_out": sorted(images.left_out)}


def resume(folder: Path, images: Images) -> None:
    """Give images the places that they had in the first run into this folder. Removed ones are left out, and rows that
    could not be read; anything else that changed the list is refused."""
    if not (folder / MANIFEST).exists():
        return
    if not (folder / NAMES).exists():
        raise SystemExit(f"{folder} lacks {NAMES}, the list of its images; choose another --output")
    before, now = json.loads((folder / NAMES).read_text(encoding="utf-8")), images.names
    if images.table is not None:
        if len(before) != len(now):
            raise SystemExit(
                f"the data set has {len(now)} rows and had {len(before)} when {folder} was begun: rows have no names "
                "by which to tell which are new; choose another --output"
            )
        images.left_out = set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["left_out"])
        return
    known, present = set(before), set(now)
    added = [name for name in now if name not in known]
    if added:
        raise SystemExit(
            f"{images.root} holds {len(added)} images that it did not when {folder} was begun: {some(added)}. What is "
            "finished is untouched: take them out and run the same command again, or choose another --output"
        )
    images.follow(before)
    images.left_out = {place for place, name in enumerate(before) if name not in present}


def claim(folder: Path, manifest: dict[str, Any], images: Images) -> None:
    """Write the manifest, or refuse a folder that holds another's shards."""
    path = folder / MANIFEST
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        said = changed(before | {"left_out": manifest["left_out"]}, manifest)
        if said:
            raise SystemExit(f"{folder} holds latents of another run ({said}); choose another --output")
        pairs = zip(shard_places(before), shard_places(manifest), strict=True)
        stale = [n for n, (was, now) in enumerate(pairs) if was != now and (folder / shard_name(n)).exists()]
        if stale:
            moved = sorted(set(before["left_out"]) ^ set(manifest["left_out"]))
            inside = [images.names[place] for place in moved if place // manifest["shard_size"] in stale]
            raise SystemExit(
                f"images were removed or came back after their shards were written: {some(inside)}. Undo that, or "
                f"delete {some([shard_name(shard) for shard in stale])} in {folder} and run the same command again: "
                "those alone are written anew"
            )
        for half_written in folder.glob(".latents_*"):  # by a run that was killed
            half_written.unlink()
    else:
        write_text(folder / NAMES, json.dumps(images.names))
    write_text(path, json.dumps(manifest, indent=2) + "\n")


def some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@torch.no_grad()
def check(vae: PSVAE | PixelVAE, images: Images, options: Options) -> None:
    """Stop before anything is written where the run could not begin."""
    refuse_smaller(options, {0: ("workers",), 1: ("batch_size", "shard_size", "size")})
    lacking = images.without_class()
    if lacking and images.table is not None:
        raise SystemExit(
            f"{options.data} has no label in {some(lacking)}; wanted one in each row: see --label-column (None where "
            "there are no classes)"
        )
    if lacking:
        PartialState().print(f"{some(lacking)} beside the subfolders, which are the classes, get the label 0")
    try:
        vae.encode(torch.zeros(1, 3, options.size, options.size, device=vae.device))
    except PSVAEError as error:
        raise SystemExit(f"--size {options.size} does not fit {options.vae}: {error}") from error


def generators_of(seed: int, places: list[int]) -> list[torch.Generator]:
    """One for each place; PyTorch's on the CPU take the lowest 32 bits of a seed alone."""
    return [torch.Generator().manual_seed((seed * 2_654_435_761 + place) % 2**32) for place in places]


@torch.no_grad()
def encode_shard(
    vae: PSVAE | PixelVAE, images: Images, places: list[int], options: Options
) -> tuple[dict[str, Tensor], list[Fault]]:
    """The tensors of one shard, and why images in it cannot be read: then there is no shard."""
    subset = torch.utils.data.Subset(images, places)
    parts: dict[str, list[Tensor]] = {}
    faults: list[Fault] = []
    loader = DataLoader(subset, options.batch_size, num_workers=options.workers, collate_fn=collate)
    for batch_places, batch, labels, unreadable in loader:
        faults += unreadable
        if faults:
            continue  # to name all of them at once
        generators = generators_of(options.seed, batch_places)
        posterior = vae.encode(batch.to(vae.device)).latent_dist
        mirrored = vae.encode(batch.flip(-1).to(vae.device)).latent_dist
        found = {"latents": posterior.sample(generators), "latents_flip": mirrored.sample(generators)}
        if options.moments:
            logvar = posterior.logvar  # a point's says nothing: -30 is the smallest that a posterior takes
            found |= {"mean": posterior.mean}
            found |= {"logvar": torch.full_like(logvar, -30.0) if posterior.deterministic else logvar}
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor.to("cpu", getattr(torch, options.dtype)))
        parts.setdefault("labels", []).append(labels.long())
    return ({} if faults else {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}), faults


def measure(folder: Path, shards: list[int]) -> None:
    """Mean and std per channel over every latent, in LightningDiT's layout 1 Z 1 1."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for shard in shards:
        with safe_open(folder / shard_name(shard), framework="pt") as file:
            latents = file.get_tensor("latents").double()
        count += latents.numel() // latents.shape[1]
        total = total + latents.sum((0, 2, 3))
        squares = squares + latents.square().sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    tensors = {name: x.float().view(1, -1, 1, 1) for name, x in (("mean", mean), ("std", std))}
    write_whole(folder / STATISTICS, lambda place: torch.save(tensors, place))


def encode_missing(
    vae: PSVAE | PixelVAE, images: Images, options: Options, accelerator: Accelerator
) -> tuple[int, list[Fault]]:
    """Write the shards that are not there, shared by the processes: how many those are, and the faults of all."""
    folder = options.output
    places = shard_places(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    missing = [shard for shard, held in enumerate(places) if held and not (folder / shard_name(shard)).exists()]
    accelerator.wait_for_everyone()  # all have looked before one writes, so that all share the same list
    faults: list[Fault] = []
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for shard in tqdm(mine, "shards", disable=not accelerator.is_main_process):
        tensors, unreadable = encode_shard(vae, images, places[shard], options)
        for _, fault in unreadable:
            print(f"{fault}; {'its shard is not written' if images.table is None else 'left out'}", file=sys.stderr)
        faults += unreadable
        if tensors:
            write_whole(folder / shard_name(shard), lambda place, tensors=tensors: save_file(tensors, place))
    return len(missing), sorted(gather_object(faults))


def leave_out(images: Images, faults: list[Fault], folder: Path, accelerator: Accelerator) -> None:
    """Rows that cannot be read, which cannot be removed as a file can: written down before their shards are."""
    images.left_out |= {place for place, _ in faults}
    if len(images.left_out) == len(images):
        raise SystemExit(
            f"none of the {len(images)} rows can be read: {faults[0][1]}" if accelerator.is_main_process else 1
        )
    if accelerator.is_main_process:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        write_text(folder / MANIFEST, json.dumps(manifest | {"left_out": sorted(images.left_out)}, indent=2) + "\n")
    accelerator.wait_for_everyone()


def main(options: Options) -> None:
    accelerator = Accelerator()
    vae, images = load_vae(options.vae, accelerator.device, options.allow_pickle), Images(options)
    check(vae, images, options)
    if accelerator.is_main_process:
        resume(options.output, images)
        claim(options.output, manifest_of(options, vae, images), images)
    accelerator.wait_for_everyone()
    resume(options.output, images)  # the others too
    written, faults = encode_missing(vae, images, options, accelerator)
    while faults and images.table is not None:
        leave_out(images, faults, options.output, accelerator)
        _, faults = encode_missing(vae, images, options, accelerator)
    if faults:
        said = (
            f"{len(faults)} images are unreadable: {some([fault for _, fault in faults])}. All other shards are "
            f"finished in {options.output} and stay: mend or remove them, and run the same command again"
        )
        raise SystemExit(said if accelerator.is_main_process else 1)
    if accelerator.is_main_process:
        places = shard_places(json.loads((options.output / MANIFEST).read_text(encoding="utf-8")))
        shards = [shard for shard, held in enumerate(places) if held]
        measure(options.output, shards)
        count = sum(map(len, places))
        print(f"{count} images in {len(shards)} shards, {written} of them written now: {options.output}")
        if images.table is not None and images.left_out:
            rows = some([f"row {place}" for place in sorted(images.left_out)])
            print(f"{len(images.left_out)} cannot be read and are left out: {rows}. Once mended, take another --output")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(tyro.cli(Options))
    PartialState().destroy_process_group()  # not in main, which other programs call
