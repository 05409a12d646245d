"""Pictures with words for the examples: (image, caption) pairs and (source, instruction, target) triples.

From a Hugging Face dataset or webdataset shards. Which rows come in which order is a function of (seed, position)
alone, so a killed run goes on with the very next row. Pictures are not mirrored: captions say left and right.
"""

import glob
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from cache_latents import CachedLatents
from data import UNREADABLE, _Order, _read, center_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info


@dataclass(frozen=True)
class PairOptions:
    """Where pictures and words come from. The paper: CC12M with long captions, then OmniEdit's triples, at 256 px."""

    path: str
    """Hugging Face dataset id, folder of parquet files, or webdataset pattern."""
    kind: Literal["huggingface", "webdataset"] = "huggingface"
    """What `path` is."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    image: str = "image"
    """Column, or ending in a webdataset sample such as `jpg`, of the picture to generate."""
    text: str = "text"
    """Column or ending (`txt`, or `json:caption` for a field) of the caption or instruction."""
    source: str | None = None
    """Column or ending of the picture to edit."""
    latents: Path | None = None
    """Folder of cache_latents.py, row by row those of `image`, read in its place (Hugging Face datasets)."""
    source_latents: Path | None = None
    """The same for `source`."""
    size: int = 256
    """Side of the centre crop, in pixels."""
    workers: int = 4
    """Loader processes on each training process; 0 loads in the training process itself."""


@dataclass
class Pairs:
    """A batch. Pictures ``B 3 H W`` in [-1, 1] or cached latents ``B Z h w``; None where there are none."""

    texts: list[str]
    images: Tensor | None
    latents: Tensor | None
    sources: Tensor | None
    source_latents: Tensor | None
    unreadable: list[str]

    @property
    def has_source(self) -> bool:
        return self.sources is not None or self.source_latents is not None


Batches = Callable[[int, int, int, int, int], Iterator[Pairs]]  # batch size, seed, rank, world, start


def pair_batches(options: PairOptions) -> Batches:
    """(batch size, seed, rank, world, start) → an endless stream of `Pairs` from batch number ``start`` on."""

    def stream(batch_size: int, seed: int, rank: int, world: int, start: int) -> Iterator[Pairs]:
        generator = torch.Generator()  # the loader draws worker seeds from it instead of from the global one
        loading: dict[str, Any] = {"collate_fn": collate, "generator": generator}
        if options.kind == "huggingface":
            table = Table(options)
            order = _Order(len(table), seed, rank, world, start * batch_size)
            return iter(DataLoader(table, batch_size, sampler=order, num_workers=options.workers, **loading))
        shards = Shards(options, batch_size, seed, rank, world, start)
        return iter(DataLoader(shards, batch_size, num_workers=shards.workers, **loading))

    return stream


class Table(Dataset):
    """Rows of a Hugging Face dataset, indexed by (position in the stream, row)."""

    def __init__(self, options: PairOptions) -> None:
        self.options, self.crop = options, center_transform(options.size)
        self.rows = open_rows(options)
        folders = (options.latents, options.source_latents)
        self.latents, self.source_latents = (None if f is None else CachedLatents(f) for f in folders)
        for cached in (self.latents, self.source_latents):
            if cached is not None and len(cached) != len(self.rows):
                raise SystemExit(
                    f"{cached.folder} holds {len(cached)} latents; {options.path} has {len(self.rows)} rows"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        _, start = key
        unreadable: list[str] = []
        for offset in range(len(self.rows)):
            row = (start + offset) % len(self.rows)
            try:
                return self._read(row) | {"unreadable": unreadable}
            except UNREADABLE as error:
                unreadable.append(f"row {row}: {error}")
        raise RuntimeError(f"none of the {len(self.rows)} rows can be read; the first is {unreadable[0]}")

    def _read(self, row: int) -> dict[str, Any]:
        content, options = self.rows[row], self.options
        item: dict[str, Any] = {"text": text_of(content, options.text)}
        if self.latents is not None:
            item["latents"] = self.latents[row][0]
        else:
            item["image"] = self.crop(_read(content[options.image]))
        if self.source_latents is not None:
            item["source_latents"] = self.source_latents[row][0]
        elif options.source is not None:
            item["source"] = self.crop(_read(content[options.source]))
        return item


class Shards(IterableDataset):
    """Samples of webdataset shards; to continue, each loader process passes over what it gave before."""

    def __init__(self, options: PairOptions, batch_size: int, seed: int, rank: int, world: int, start: int) -> None:
        if options.latents or options.source_latents:
            raise SystemExit("cached latents go by row: they need a Hugging Face dataset, not webdataset shards")
        import braceexpand

        patterns = braceexpand.braceexpand(options.path)
        self.files = [file for pattern in patterns for file in sorted(glob.glob(pattern)) or [pattern]]
        if len(self.files) < world:
            raise SystemExit(f"{len(self.files)} shards for {world} processes; wanted one each at least")
        self.options, self.batch_size, self.seed = options, batch_size, seed
        self.rank, self.world, self.start = rank, world, start
        self.workers = min(options.workers, len(self.files) // world)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        role = ((info.id if info else 0) + self.start) % workers  # batch k comes from worker k mod workers
        given = (self.start - role + workers - 1) // workers * self.batch_size
        crop = center_transform(self.options.size)
        names = {"image": self.options.image, "source": self.options.source}
        unreadable: list[str] = []
        readable = 0
        for sample in self._samples(self.rank * workers + role, self.world * workers):
            try:
                item = {"text": text_of(sample, self.options.text)}
                item |= {kind: crop(_read(sample[name])) for kind, name in names.items() if name is not None}
            except (*UNREADABLE, KeyError) as error:
                unreadable.append(f"{sample['__url__']}:{sample['__key__']}: {error}")
                continue
            readable += 1
            if readable > given:
                yield item | {"unreadable": unreadable}
                unreadable = []

    def _samples(self, reader: int, readers: int) -> Iterator[dict[str, Any]]:
        import webdataset as wds

        epoch = 0
        while True:
            files = list(self.files)
            random.Random(self.seed + epoch).shuffle(files)
            mine = files[reader::readers]
            yield from iter(wds.WebDataset(mine, shardshuffle=False, empty_check=False, handler=wds.warn_and_continue))
            epoch += 1


def open_rows(options: PairOptions) -> Any:
    """The table, its pictures left as bytes."""
    import datasets

    local = sorted(glob.glob(f"{options.path}/**/{options.split}*.parquet", recursive=True))
    if local:
        table: Any = datasets.load_dataset("parquet", data_files={options.split: local}, split=options.split)
    else:
        table = datasets.load_dataset(options.path, split=options.split)
    cached = {options.image: options.latents, options.source: options.source_latents}
    wanted = [options.text, *(name for name, folder in cached.items() if name is not None and folder is None)]
    lost = [name for name in wanted if name not in table.column_names]
    if lost:
        raise SystemExit(f"{options.path} has no column {', '.join(lost)}; it has {', '.join(table.column_names)}")
    table = table.select_columns(wanted)
    for name in wanted[1:]:
        table = table.cast_column(name, datasets.Image(decode=False))
    return table


def text_of(content: dict[str, Any], name: str) -> str:
    """A string, bytes, a list of captions (the first), or with `json:field` a field of a JSON document."""
    name, _, field = name.partition(":")
    value = content[name]
    if field:
        value = (json.loads(value) if isinstance(value, str | bytes) else value)[field]
    value = value[0] if isinstance(value, list) else value
    text = value.decode() if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"no text under {name!r}")
    return text


def collate(items: list[dict[str, Any]]) -> Pairs:
    def stack(name: str) -> Tensor | None:
        return torch.stack([item[name] for item in items]) if name in items[0] else None

    return Pairs(
        [item["text"] for item in items],
        stack("image"),
        stack("latents"),
        stack("source"),
        stack("source_latents"),
        [name for item in items for name in item["unreadable"]],
    )
