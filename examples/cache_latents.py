"""Encode a data set once: latents in sharded safetensors, with LightningDiT's names, for any generator to train on.

    python examples/cache_latents.py --vae outputs/psvae/stage2 --data /data/imagenet/train --output latents/
    accelerate launch --num_processes 8 examples/cache_latents.py ...      # the same files, eight times as fast

A shard holds ``latents`` and ``latents_flip`` (of the mirrored image), N Z h w, and ``labels``, N; with --moments also
``mean`` and ``logvar`` of the posterior. Which image is in which shard follows from its place in the data alone, and a
shard appears whole or not at all: a run that was killed goes on where it stopped, by the same command. Read them with
`CachedLatents`, or with LightningDiT's own reader. One run writes into a folder at a time.
"""

import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from psvae import PSVAE, PixelVAE
from psvae.errors import PSVAEError

ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MANIFEST, STATISTICS = "manifest.json", "latents_stats.pt"  # LightningDiT takes every .safetensors for a shard


@dataclass(frozen=True)
class Options:
    """What to encode, and where to."""

    vae: str
    """A PSVAE or PixelVAE: a folder or a Hub id."""
    data: str
    """A folder with one subfolder per class, or a Hugging Face dataset (id, or folder of parquet files)."""
    output: Path
    """Folder for the shards. One VAE and one data set per folder."""
    split: str | None = None
    """Split of a Hugging Face dataset; without it, `data` is a folder of images."""
    image_column: str = "image"
    """Of a Hugging Face dataset."""
    label_column: str | None = "label"
    """Of a Hugging Face dataset: classes by number or by name. None: every label is 0."""
    size: int = 256
    """Images are resized on their short side and centre-cropped to this."""
    batch_size: int = 32
    shard_size: int = 2048
    """Images per shard."""
    moments: bool = False
    """Also store mean and log-variance, so that a training run can draw its own latents."""
    seed: int = 0
    """Of the draw from the posterior; each image has its own."""
    dtype: str = "float32"
    """Of the stored tensors: float32, float16 or bfloat16."""
    workers: int = 4
    """Loader processes on each process."""
    allow_pickle: bool = False


class Images(Dataset):
    """(image 3 H W in [-1, 1], label) by place. An unreadable file stops the run and is named."""

    def __init__(self, options: Options) -> None:
        short = v2.Resize(options.size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        scale = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
        self.transform = v2.Compose([short, v2.CenterCrop(options.size), *scale])
        self.table: Any = None
        if options.split is not None:
            self.table = open_table(options)
            self.names = [str(place) for place in range(len(self.table))]
            return
        root = Path(options.data)
        self.files = sorted(path for path in root.rglob("*") if path.suffix.lower() in ENDINGS)
        if not self.files:
            endings = ", ".join(sorted(ENDINGS))
            raise SystemExit(f"{root} holds no images ({endings}); for a Hugging Face dataset name its --split")
        classes = sorted({path.relative_to(root).parts[0] for path in self.files if path.parent != root})
        self.labels = [classes.index(p.relative_to(root).parts[0]) if p.parent != root else 0 for p in self.files]
        self.names = [path.relative_to(root).as_posix() for path in self.files]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        if self.table is None:
            source, name, label = self.files[place], self.files[place], self.labels[place]
        else:
            row = self.table[place]
            raw = row["image"]["bytes"]
            source, name = (io.BytesIO(raw) if raw else row["image"]["path"]), f"row {place}"
            label = row.get("label", 0)
        try:
            return self.transform(Image.open(source).convert("RGB")), label
        except (OSError, UnidentifiedImageError) as error:
            raise RuntimeError(f"{name} cannot be read ({error}); mend it or take it out of the data") from error


def open_table(options: Options) -> Any:
    """The Hugging Face dataset with columns ``image``, undecoded, and ``label``, by number."""
    from datasets import Image as ImageColumn
    from datasets import load_dataset

    table = load_dataset(options.data, split=options.split)
    wanted = {options.image_column: "image"} | ({options.label_column: "label"} if options.label_column else {})
    absent = [column for column in wanted if column not in table.column_names]
    if absent or not len(table):
        raise SystemExit(
            f"{options.data} has {len(table)} rows of columns {', '.join(table.column_names)}; wanted rows with "
            f"{' and '.join(wanted)}: see --image-column and --label-column (None where there are no classes)"
        )
    table = table.select_columns(list(wanted)).rename_columns(wanted).cast_column("image", ImageColumn(decode=False))
    if options.label_column and table.features["label"].dtype == "string":
        table = table.class_encode_column("label")  # numbered in the order of the alphabet
    return table


class CachedLatents(Dataset):
    """The latents of a finished folder, by place, as (latents Z h w, label); opened shard by shard, where needed.

    Args:
        flip: give the mirrored image's latents half of the time (LightningDiT's augmentation).
        normalise: (z − mean) / std with the folder's statistics.
        draw: draw from the posterior anew each time; takes a folder written with --moments, and no ``flip``.
    """

    def __init__(self, folder: str | Path, flip: bool = False, normalise: bool = False, draw: bool = False) -> None:
        self.folder, self.flip, self.draw = Path(folder), flip, draw
        self.manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        if draw and (flip or not self.manifest["moments"]):
            raise ValueError(f"draw takes the moments of the straight images: no flip, and --moments for {folder}")
        lost = [name for name in self._names() if not (self.folder / name).exists()]
        if lost:
            raise FileNotFoundError(
                f"{self.folder} lacks {len(lost)} shards ({lost[0]}, ...); run the same command again"
            )
        self.statistics: dict[str, Tensor] = {}
        if normalise:
            found = torch.load(self.folder / STATISTICS, weights_only=True)
            self.statistics = {name: tensor[0] for name, tensor in found.items()}
        self._open: dict[int, Any] = {}

    def _names(self) -> list[str]:
        return [shard_name(shard) for shard in range(-(-self.manifest["count"] // self.manifest["shard_size"]))]

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        if not 0 <= place < len(self):
            raise IndexError(place)
        shard, row = divmod(place, self.manifest["shard_size"])
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / shard_name(shard), framework="pt")
        file = self._open[shard]
        mirrored = self.flip and bool(torch.rand(()) < 0.5)
        if self.draw:
            mean, logvar = (file.get_slice(name)[row] for name in ("mean", "logvar"))
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        else:
            latents = file.get_slice("latents_flip" if mirrored else "latents")[row]
        if self.statistics:
            latents = (latents.float() - self.statistics["mean"]) / self.statistics["std"]
        return latents, int(file.get_slice("labels")[row])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # file handles do not travel to the loader's processes


def shard_name(shard: int) -> str:
    return f"latents_{shard:06d}.safetensors"


def load_vae(options: Options, device: torch.device) -> PSVAE | PixelVAE:
    """Of the class that recognises the checkpoint; where none does, what each said."""
    said = []
    for cls in (PSVAE, PixelVAE):
        try:
            return cls.from_pretrained(options.vae, device=device, allow_pickle=options.allow_pickle)
        except PSVAEError as error:
            said.append(str(error))
    raise SystemExit("\n".join(dict.fromkeys(said)))


def manifest_of(options: Options, vae: PSVAE | PixelVAE, images: Images) -> dict[str, Any]:
    """What must not change between two runs into one folder."""
    digest = hashlib.sha256(json.dumps(vae.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    names = hashlib.sha256("\n".join(images.names).encode()).hexdigest()
    kept = "data", "split", "image_column", "label_column", "size", "shard_size", "moments", "seed", "dtype"
    ours = {name: asdict(options)[name] for name in kept}
    return {"count": len(images), "names": names, "vae": digest.hexdigest(), **ours}


def claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or refuse a folder that holds another."""
    path = folder / MANIFEST
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in manifest if before.get(name) != manifest[name]]
        if changed:
            said = "; ".join(f"{name}: {before.get(name)!r} before, {manifest[name]!r} now" for name in changed)
            raise SystemExit(f"{folder} holds latents of another run ({said}); choose another --output")
        for half_written in folder.glob(".latents_*"):  # by a run that was killed
            half_written.unlink()
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda place: place.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8"))


def write_whole(path: Path, write: Any) -> None:
    """All of a file or nothing."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    write(staging)
    os.replace(staging, path)


@torch.no_grad()
def encode_shard(vae: PSVAE | PixelVAE, images: Images, places: range, options: Options) -> dict[str, Tensor]:
    """The tensors of one shard."""
    subset = torch.utils.data.Subset(images, places)
    parts: dict[str, list[Tensor]] = {}
    first = places.start
    for batch, labels in DataLoader(subset, options.batch_size, num_workers=options.workers):
        generators = [torch.Generator().manual_seed(options.seed * 2**32 + first + i) for i in range(len(batch))]
        first += len(batch)
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
    return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}


def measure(folder: Path, shards: int) -> None:
    """Mean and std per channel over every latent, in LightningDiT's layout 1 Z 1 1."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for shard in range(shards):
        with safe_open(folder / shard_name(shard), framework="pt") as file:
            latents = file.get_tensor("latents").double()
        count += latents.numel() // latents.shape[1]
        total = total + latents.sum((0, 2, 3))
        squares = squares + latents.square().sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    tensors = {name: x.float().view(1, -1, 1, 1) for name, x in (("mean", mean), ("std", std))}
    write_whole(folder / STATISTICS, lambda place: torch.save(tensors, place))


def main(options: Options) -> None:
    accelerator = Accelerator()
    vae, images = load_vae(options, accelerator.device), Images(options)
    if accelerator.is_main_process:
        claim(options.output, manifest_of(options, vae, images))
    accelerator.wait_for_everyone()
    shards = -(-len(images) // options.shard_size)
    missing = [shard for shard in range(shards) if not (options.output / shard_name(shard)).exists()]
    accelerator.wait_for_everyone()  # all have looked before one writes, so that all share the same list
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for shard in tqdm(mine, "shards", disable=not accelerator.is_main_process):
        places = range(shard * options.shard_size, min((shard + 1) * options.shard_size, len(images)))
        tensors = encode_shard(vae, images, places, options)
        write_whole(options.output / shard_name(shard), lambda place, tensors=tensors: save_file(tensors, place))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        measure(options.output, shards)
        print(f"{len(images)} images in {shards} shards, {len(missing)} of them written now: {options.output}")
    accelerator.end_training()


if __name__ == "__main__":
    main(tyro.cli(Options))
