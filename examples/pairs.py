"""Pictures with words for the examples: (picture, caption) pairs, and (source, instruction, target) triples.

From a Hugging Face dataset or webdataset shards. Which rows come in which order is a function of (seed, position)
alone, so a killed run goes on with the very next row. Pictures are not mirrored: captions say left and right.
"""

import itertools
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from cache_latents import CachedLatents
from checkpoints import changed
from data import UNREADABLE, Order, center_transform, open_table, read_image, shard_samples, share_of, tar_files
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from psvae import DiagonalGaussian


@dataclass(frozen=True)
class PairOptions:
    """Where pictures and words come from. The paper: CC12M with long captions, then OmniEdit's triples, at 256 px."""

    path: str
    """Hugging Face dataset id or folder (parquet, or pictures with a metadata.jsonl), or webdataset pattern."""
    kind: Literal["huggingface", "webdataset"] = "huggingface"
    """What `path` is."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    image: str = "image"
    """Column, or ending in a webdataset sample such as `jpg`, of the picture to generate."""
    text: str = "text"
    """Column or ending (`txt`, or `json:caption` for a field) of the caption or instruction; of several, the first."""
    source: str | None = None
    """Column or ending of the picture to edit."""
    latents: Path | None = None
    """Folder of cache_latents.py, row by row those of `image`, read in its place (Hugging Face datasets). Written with
    `--moments`, they are drawn anew each time, as of pictures; without, always the same draw."""
    source_latents: Path | None = None
    """The same for `source`, which is named too; written with `--moments`, for a source is its posterior's mean."""
    size: int = 256
    """Side of the centre crop, in pixels."""
    workers: int = 4
    """Loader processes on each training process; 0 loads in the training process itself."""


@dataclass
class Pairs:
    """A batch. Pictures ``B 3 H W`` in [-1, 1] or cached latents ``B Z h w``; None where there are none."""

    texts: list[str]
    images: Tensor | None
    latents: Tensor | DiagonalGaussian | None
    """A posterior where the cache has moments."""
    sources: Tensor | None
    source_latents: Tensor | None
    unreadable: list[str]
    """What was skipped on the way to these, and why."""

    @property
    def has_source(self) -> bool:
        return self.sources is not None or self.source_latents is not None


Batches = Callable[[int, int, int, int, int], Iterator[Pairs]]  # batch size, seed, rank, world, start


def pair_batches(options: PairOptions) -> Batches:
    """(batch size, seed, rank, world, start) → an endless stream of `Pairs` from batch number ``start`` on.

    Raises:
        SystemExit: the data cannot be opened, lacks a column, or does not go with its cached latents.
    """
    table = Table(options) if options.kind == "huggingface" else None
    if table is None:
        check_shards(options)

    def stream(batch_size: int, seed: int, rank: int, world: int, start: int) -> Iterator[Pairs]:
        generator = torch.Generator()  # the loader draws worker seeds from it instead of from the global one
        if table is not None:
            data: Any = table
            workers, order = options.workers, Order(len(table), seed, rank, world, start * batch_size)
        else:
            data, order = Shards(options, batch_size, seed, rank, world, start), None
            workers = data.workers
        loader = DataLoader(
            data, batch_size, sampler=order, num_workers=workers, collate_fn=collate, generator=generator
        )
        return iter(loader)

    return stream


class Table(Dataset):
    """Rows of a Hugging Face dataset, indexed by (position in the stream, row)."""

    def __init__(self, options: PairOptions) -> None:
        self.options, self.crop = options, center_transform(options.size)
        self.rows = open_rows(options)
        self.latents = Cache.open(options.latents, options.split, options.image, len(self.rows))
        self.source_latents = Cache.open(options.source_latents, options.split, options.source, len(self.rows))
        if self.source_latents is not None and not self.source_latents.has_moments:
            raise SystemExit(
                f"{options.source_latents} holds draws of the posterior, and a source is its mean, which "
                "cache_latents.py --moments stores: run it so, into another --output"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        _, start = key
        unreadable: list[str] = []
        for offset in range(len(self.rows)):
            row = (start + offset) % len(self.rows)
            try:
                return self._item(row) | {"unreadable": unreadable}
            except UNREADABLE as error:
                unreadable.append(f"row {row}: {type(error).__name__}")
        raise RuntimeError(f"none of the {len(self.rows)} rows can be read; the first is {unreadable[0]}")

    def _item(self, row: int) -> dict[str, Any]:
        content, options = self.rows[row], self.options
        item: dict[str, Any] = {"text": text_of(content, options.text)}
        if self.latents is not None and self.latents.has_moments:
            item["moments"] = self.latents.moments(row)
        elif self.latents is not None:
            item["latents"] = self.latents.stored(row)
        else:
            item["image"] = self.crop(read_image(content[options.image]))
        if self.source_latents is not None:
            item["source_latents"] = self.source_latents.mean(row)
        elif options.source is not None:
            item["source"] = self.crop(read_image(content[options.source]))
        return item


class Shards(IterableDataset):
    """Samples of webdataset shards; to continue, each loader process passes over what it gave before."""

    def __init__(self, options: PairOptions, batch_size: int, seed: int, rank: int, world: int, start: int) -> None:
        self.options, self.seed, self.share = options, seed, (start, batch_size, rank, world)
        self.workers = min(options.workers, len(tar_files(options.path)) // world)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader, readers, given = share_of(*self.share)
        crop, readable = center_transform(self.options.size), 0
        unreadable: list[str] = []
        for epoch in itertools.count():
            for sample in shard_samples(self.options.path, self.seed + epoch, reader, readers):
                try:
                    item = self._item(sample, crop)
                except (*UNREADABLE, KeyError) as error:
                    unreadable.append(f"{sample['__url__']}:{sample['__key__']}: {type(error).__name__}")
                    continue
                readable += 1
                if readable > given:
                    yield item | {"unreadable": unreadable}
                    unreadable = []
            if not readable:
                said = f"; the first of {len(unreadable)} is {unreadable[0]}" if unreadable else ": use fewer workers"
                raise RuntimeError(
                    f"{self.options.path!r} gave reader {reader} of {readers} nothing that can be read{said}"
                )

    def _item(self, sample: dict[str, Any], crop: Any) -> dict[str, Any]:
        item = {"text": text_of(sample, self.options.text), "image": crop(read_image(sample[self.options.image]))}
        if self.options.source is not None:
            item["source"] = crop(read_image(sample[self.options.source]))
        return item


def open_rows(options: PairOptions) -> Any:
    """The table, its pictures left as bytes."""
    import datasets

    table = open_table(options.path, options.split)
    pictures = [options.image] if options.latents is None else []
    if options.source is not None and options.source_latents is None:
        pictures.append(options.source)
    columns = [options.text.partition(":")[0], *pictures]
    lost = [name for name in columns if name not in table.column_names]
    if lost:
        raise SystemExit(f"{options.path} has no column {', '.join(lost)}; it has {', '.join(table.column_names)}")
    table = table.select_columns(columns)
    for name in pictures:
        table = table.cast_column(name, datasets.Image(decode=False))
    return table


class NotCached(ValueError):
    """The row could not be read when the latents were cached."""


class Cache:
    """Cached latents by row of the table.

    Attributes:
        has_moments: whether mean and log-variance are there.
    """

    def __init__(self, latents: CachedLatents) -> None:
        self.latents = latents
        self.left_out: list[int] = sorted(latents.manifest["left_out"])
        self.has_moments: bool = latents.manifest["moments"]

    @classmethod
    def open(cls, folder: Path | None, split: str, column: str | None, rows: int) -> "Cache | None":
        """Of that column's pictures.

        Raises:
            SystemExit: not a finished folder of cache_latents.py, or of other pictures.
        """
        if folder is None:
            return None
        try:
            cached = CachedLatents(folder)
        except FileNotFoundError as error:
            raise SystemExit(f"{folder} holds no latents of cache_latents.py: {error}") from error
        said = changed(cached.manifest, {"split": split, "image_column": column, "count": rows})
        if said:
            raise SystemExit(f"{folder} holds latents of other pictures than the data's ({said})")
        return cls(cached)

    def stored(self, row: int) -> Tensor:
        """``Z h w``, always the same."""
        return self.latents[self._place(row)][0]

    def moments(self, row: int) -> Tensor:
        """Mean and log-variance, ``2Z h w``."""
        return torch.cat(self.latents.moments(self._place(row))).float()

    def mean(self, row: int) -> Tensor:
        """``Z h w``."""
        return self.latents.moments(self._place(row))[0]

    def _place(self, row: int) -> int:
        before = bisect_left(self.left_out, row)
        if row in self.left_out[before : before + 1]:
            raise NotCached(f"row {row} could not be read when its latents were cached")
        return row - before


def check_shards(options: PairOptions) -> None:
    """Look at the first sample: it has what is asked for, or the run ends here."""
    if options.latents or options.source_latents:
        raise SystemExit("cached latents go by row: they need a Hugging Face dataset, not webdataset shards")
    first = next(shard_samples(options.path), None)
    if first is None:
        raise SystemExit(f"no sample in {options.path!r}")
    wanted = [options.text.partition(":")[0], options.image, options.source]
    lost = [name for name in wanted if name is not None and name not in first]
    if lost:
        found = ", ".join(name for name in first if not name.startswith("__"))
        raise SystemExit(f"the first sample of {options.path} has no {', '.join(lost)}; it has {found}")


def text_of(content: dict[str, Any], name: str) -> str:
    """A string, bytes, the first of a list, or with `json:field` one field of a JSON document."""
    column, _, field = name.partition(":")
    value = content[column]
    if field:
        value = json.loads(value) if isinstance(value, str | bytes) else value
        value = value.get(field) if isinstance(value, dict) else None
    if isinstance(value, list) and value:
        value = value[0]
    text = value.decode() if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"no text in {name!r}")
    return text.strip()


def collate(items: list[dict[str, Any]]) -> Pairs:
    def stack(name: str) -> Tensor | None:
        return torch.stack([item[name] for item in items]) if name in items[0] else None

    moments = stack("moments")
    latents = stack("latents") if moments is None else DiagonalGaussian(moments)
    return Pairs(
        [item["text"] for item in items], stack("image"), latents, stack("source"), stack("source_latents"),
        [name for item in items for name in item["unreadable"]],
    )  # fmt: skip
