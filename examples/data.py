"""Images for the examples: a folder, a Hugging Face dataset (streamed or not), or webdataset shards.

Which images come in which order, how each is cropped and flipped, is a function of (seed, position) alone.
So a run that is killed continues with the very next image, by starting the stream at a later position.
An image that cannot be read is replaced by the next readable one, and its name is reported.
"""

import glob
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.transforms import v2

IMAGE_ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
UNREADABLE = (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError)


@dataclass(frozen=True)
class DataOptions:
    """Where images come from and how they are cut. The paper: resize and centre-crop (section 4.1)."""

    path: str
    """Folder of images (searched to any depth), Hugging Face dataset id or folder, or webdataset pattern."""
    kind: Literal["folder", "huggingface", "webdataset"] = "folder"
    """What `path` is."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    column: str = "image"
    """Image column of a Hugging Face dataset; a webdataset sample is searched for its image by file ending."""
    streaming: bool = False
    """Read a Hugging Face dataset while it downloads."""
    size: int = 256
    """Side of the square crop, in pixels."""
    crop: Literal["center", "random", "zoom"] = "center"
    """`center`: short side to `size`, centre crop. `random`: short side to `resize`, random crop. `zoom`: a random
    square of `zoom` of the image's area, resized."""
    resize: int = 384
    """Short side before a `random` crop (RAE: 384 for 256)."""
    zoom: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the area in a `zoom` crop."""
    flip: bool = True
    """Mirror half of the images."""
    workers: int = 4
    """Loader processes on each training process; 0 loads in the training process itself."""


@dataclass
class Batch:
    """Images ``B 3 H W`` in [-1, 1], and the names of files that were skipped on the way to them."""

    images: Tensor
    unreadable: list[str]


def batches(options: DataOptions, batch_size: int, seed: int, rank: int, world: int, start: int = 0) -> Iterator[Batch]:
    """An endless stream of batches for process ``rank`` of ``world``, from batch number ``start`` on."""
    source = _open(options)
    if isinstance(source, Dataset):
        order = Order(len(source), seed, rank, world, start * batch_size)
        pictures: Any = _Pictures(source, training_transform(options), seed)
        loader = DataLoader(
            pictures, batch_size, sampler=order, num_workers=options.workers, **_loading(options.workers)
        )
    else:
        stream = _Stream(options, batch_size, seed, rank, world, start)
        loader = DataLoader(stream, batch_size, num_workers=stream.workers, **_loading(stream.workers))
    return iter(loader)


def validation_images(options: DataOptions, count: int) -> Tensor:
    """At most ``count`` readable images, centre-cropped, ``B 3 H W`` in [-1, 1].

    Spread evenly over a folder or a dataset that is not streamed, so over its classes; of a stream the first. Others
    stand in for what cannot be read.
    """
    transform = center_transform(options.size)
    found: list[Tensor] = []
    source = _open(options)
    if isinstance(source, Dataset):
        places = dict.fromkeys([*spread(len(source), count), *range(len(source))])  # each once, in this order
        items = map(source.__getitem__, places)
    else:
        items = _one_pass(options)
    for item in items:
        try:
            image = read_image(item[1])
        except UNREADABLE:
            continue
        found.append(transform(image))
        if len(found) == count:
            break
    if not found:
        raise SystemExit(f"no readable image in {options.path!r}")
    return torch.stack(found)


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` places, evenly over the length."""
    count = min(count, length)
    return [number * length // count for number in range(count)]


def center_transform(size: int) -> v2.Compose:
    """PIL image → short side to ``size``, centre crop, [-1, 1]."""
    return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), *_to_tensor()])


def training_transform(options: DataOptions) -> v2.Compose:
    """PIL image → cropped and flipped tensor in [-1, 1]; draws from torch's global generator."""
    if options.crop == "center":
        cut: list[v2.Transform] = [v2.Resize(options.size, antialias=True), v2.CenterCrop(options.size)]
    elif options.crop == "random":
        if options.resize < options.size:
            raise SystemExit(f"--data.resize {options.resize} is smaller than the crop, --data.size {options.size}")
        cut = [v2.Resize(options.resize, antialias=True), v2.RandomCrop(options.size)]
    else:
        cut = [v2.RandomResizedCrop(options.size, scale=options.zoom, ratio=(1.0, 1.0), antialias=True)]
    flip = [v2.RandomHorizontalFlip()] if options.flip else []
    return v2.Compose([*cut, *flip, *_to_tensor()])


def _to_tensor() -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]


def _loading(workers: int) -> dict[str, Any]:
    generator = torch.Generator()  # the loader draws worker seeds from it instead of from the global one
    return {"collate_fn": _collate, "generator": generator, "persistent_workers": workers > 0}


def _collate(items: list[tuple[Tensor, list[str]]]) -> Batch:
    return Batch(torch.stack([image for image, _ in items]), [name for _, names in items for name in names])


def read_image(content: Any) -> Image.Image:
    """A PIL image from a path, bytes, a {bytes, path} record or an opened image."""
    if isinstance(content, dict):
        content = content["bytes"] if content.get("bytes") is not None else content["path"]
    if content is None:
        raise ValueError("no picture")
    if isinstance(content, Image.Image):
        return content.convert("RGB")
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:  # closed if damaged, too
        return image.convert("RGB")


def _transform(transform: v2.Compose, image: Image.Image, seed: int, position: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):  # crops and flips depend on (seed, position), not on who loads what when
        torch.manual_seed((seed * 1_000_003 + position) % 2**63)
        return transform(image)


def image_files(folder: Path, otherwise: str) -> list[Path]:
    """All at any depth of a folder, in no order.

    Args:
        otherwise: how to name what is no folder, for the message.

    Raises:
        SystemExit: there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        said = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise SystemExit(f"{said}; wanted a folder of images; {otherwise}")
    files = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS]
    if not files:
        raise SystemExit(f"{folder} holds no images ({', '.join(sorted(IMAGE_ENDINGS))}); {otherwise}")
    return files


class _Folder(Dataset):
    """(name, content) of every image file under a folder, in name order."""

    def __init__(self, folder: str) -> None:
        self.files = sorted(image_files(Path(folder), "for data of another kind see --data.kind"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        return str(self.files[index]), self.files[index]


class _Table(Dataset):
    """(name, content) of every row of a Hugging Face dataset."""

    def __init__(self, table: Any, column: str) -> None:
        self.table, self.column = table, column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        content = self.table[index][self.column]
        return str((isinstance(content, dict) and content.get("path")) or f"row {index}"), content


class _Pictures(Dataset):
    """Decoded and transformed; indexed by (position in the stream, index of the item)."""

    def __init__(self, source: Any, transform: v2.Compose, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, list[str]]:
        position, index = key
        unreadable: list[str] = []
        for offset in range(len(self.source)):
            name, content = self.source[(index + offset) % len(self.source)]
            try:
                image = read_image(content)
            except UNREADABLE:
                unreadable.append(name)
                continue
            return _transform(self.transform, image, self.seed, position), unreadable
        raise RuntimeError(f"none of the {len(self.source)} images can be read; the first is {unreadable[0]}")


class Order(Sampler):
    """(position, index) without end: a new permutation each epoch, every ``world``-th position for each process."""

    def __init__(self, length: int, seed: int, rank: int, world: int, start: int) -> None:
        self.length, self.seed, self.rank, self.world, self.start = length, seed, rank, world, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order, position = -1, torch.empty(0), self.start * self.world + self.rank
        while True:
            if position // self.length != epoch:
                epoch = position // self.length
                order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 9973 + epoch))
            yield position, int(order[position % self.length])
            position += self.world


def share_of(start: int, batch_size: int, rank: int, world: int) -> tuple[int, int, int]:
    """(reader, readers, given) of this loader process: the stream has ``readers``, of which it is one, and it gave that
    many items before batch number ``start``."""
    info = get_worker_info()
    workers = info.num_workers if info else 1
    role = ((info.id if info else 0) + start) % workers  # batch k comes from worker k mod workers
    given = (start - role + workers - 1) // workers * batch_size
    return rank * workers + role, world * workers, given


class _Stream(IterableDataset):
    """A stream that is read in order; to continue, each loader process passes over what it gave before."""

    def __init__(self, options: DataOptions, batch_size: int, seed: int, rank: int, world: int, start: int) -> None:
        self.options, self.seed, self.share = options, seed, (start, batch_size, rank, world)
        self.workers = min(options.workers, _shards(options) // world)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        reader, readers, given = share_of(*self.share)
        transform = training_transform(self.options)
        readable = 0
        unreadable: list[str] = []
        for position, (name, content) in enumerate(_samples(self.options, self.seed, reader, readers)):
            try:
                image = read_image(content)
            except UNREADABLE:
                unreadable.append(name)
                continue
            readable += 1
            if readable > given:
                yield _transform(transform, image, self.seed, position * readers + reader), unreadable
                unreadable = []


def _open(options: DataOptions) -> Any:
    """A `Dataset` of (name, content) where items can be addressed, else None: `_samples` streams them."""
    if options.kind == "folder":
        return _Folder(options.path)
    if options.kind == "huggingface" and not options.streaming:
        return _Table(_huggingface(options), options.column)
    return None


def _huggingface(options: DataOptions) -> Any:
    import datasets

    table = open_table(options.path, options.split, options.streaming)
    return table.cast_column(options.column, datasets.Image(decode=False))


def open_table(path: str, split: str, streaming: bool = False) -> Any:
    """A Hugging Face dataset: of the Hub, or of a folder, whose parquet files of that split are taken as they are."""
    import datasets

    local = sorted(glob.glob(f"{path}/**/{split}*.parquet", recursive=True))
    if local:
        return datasets.load_dataset("parquet", data_files={split: local}, split=split, streaming=streaming)
    try:
        return datasets.load_dataset(path, split=split, streaming=streaming)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"{path!r} has no split {split!r} that can be read: {error}") from error


def _shards(options: DataOptions) -> int:
    if options.kind == "webdataset":
        return len(tar_files(options.path))
    return _huggingface(options).num_shards


def tar_files(path: str) -> list[str]:
    """The shards of a webdataset pattern, which may have braces and stars."""
    import braceexpand

    patterns = braceexpand.braceexpand(path)
    return [file for pattern in patterns for file in sorted(glob.glob(pattern)) or [pattern]]


def _samples(options: DataOptions, seed: int, reader: int, readers: int) -> Iterator[tuple[str, Any]]:
    """(name, content) without end, for one of ``readers`` that share the stream."""
    epoch = 0
    while True:
        found = False
        for item in _one_pass(options, seed + epoch, reader, readers):
            found = True
            yield item
        if not found:
            raise RuntimeError(f"{options.path!r} gave no sample to reader {reader} of {readers}; use fewer workers")
        epoch += 1


def _one_pass(
    options: DataOptions, seed: int | None = None, reader: int = 0, readers: int = 1
) -> Iterator[tuple[str, Any]]:
    """(name, content) once through, shuffled where there is a seed."""
    if options.kind == "webdataset":
        for sample in shard_samples(options.path, seed, reader, readers):
            ending = next((key for key in sample if f".{key.split('.')[-1].lower()}" in IMAGE_ENDINGS), None)
            if ending is not None:
                yield f"{sample['__url__']}:{sample['__key__']}", sample[ending]
    else:
        table = _huggingface(options)
        if seed is not None:
            table = table.shuffle(seed=seed, buffer_size=1000)
        by_sample = table.num_shards < readers
        rows = iter(table if by_sample else table.shard(num_shards=readers, index=reader))
        for number, row in enumerate(islice(rows, reader, None, readers) if by_sample else rows):
            content = row[options.column]
            yield str((isinstance(content, dict) and content.get("path")) or f"row {number}"), content


def shard_samples(path: str, seed: int | None = None, reader: int = 0, readers: int = 1) -> Iterator[dict[str, Any]]:
    """The samples of webdataset shards once through, for one of ``readers`` that share them; a seed shuffles shards."""
    import webdataset as wds

    shards = tar_files(path)
    if seed is not None:
        random.Random(seed).shuffle(shards)
    by_sample = len(shards) < readers  # too few shards to share: share the samples
    mine = shards if by_sample else shards[reader::readers]
    samples = iter(
        wds.WebDataset(  # which shares nothing out by itself
            mine, shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False,
            handler=wds.warn_and_continue,
        )
    )  # fmt: skip
    yield from islice(samples, reader, None, readers) if by_sample else samples
