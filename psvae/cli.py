"""The ``psvae`` command: look at a checkpoint, convert it, reconstruct images with it, describe its latents."""

import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

import psvae
from psvae.errors import CheckpointError, CheckpointWarning, ConfigError, PSVAEError, RangeWarning
from psvae.hub.formats import Format, same
from psvae.hub.mixin import HubMixin, build_empty, recognise
from psvae.hub.reading import Checkpoint
from psvae.hub.source import CONFIG, Source
from psvae.hub.statistics import MEAN_STD, read_statistics
from psvae.hub.writing import write_text

__all__ = ["main"]

Target = Literal["psvae", "diffusers", "ldm", "timm", "transformers"]
WITH_FOREIGN_FORMATS = ("PixelVAE", "PSVAE", "SemanticEncoder", "ViTPixelDecoder")
WITH_LATENTS = ("PSVAE", "PixelVAE")
Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Location:
    """Where in the source the weights are."""

    file: str | None = None
    """Name of the weights file, where it is not a standard one."""
    variant: str | None = None
    """Such as fp16, where the weights file's name carries one."""
    subfolder: str = ""
    """Of the folder or repository, such as vae in a pipeline."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    allow_pickle: bool = False
    """Read .bin, .pt, .pth and .ckpt files with PyTorch's restricted unpickler."""

    def open(self, source: str) -> Checkpoint:
        """The checkpoint, of which no tensor is read yet."""
        found = Source(source, self.subfolder, revision=self.revision)
        return Checkpoint(found, file=self.file, variant=self.variant, allow_pickle=self.allow_pickle)


Where = Annotated[Location, tyro.conf.arg(name="")]  # its flags without a prefix, the same in every command
ANYWHERE = Location()


def inspect(
    source: Positional[str],
    *,
    where: Where = ANYWHERE,
) -> int:
    """Say what a checkpoint is: files, format, architecture, size, statistics, licence, problems. Reads no tensor of a
    safetensors file.

    Args:
        source: a folder, a weights file, a model of the package, or a Hub id.
    """
    checkpoint = where.open(source)
    cls, layout = _recognise(checkpoint)
    values = checkpoint.own_config() if layout is None else layout.read_config(checkpoint.config, checkpoint.header)
    config: Any = cls.config_class.from_dict(values)
    header = checkpoint.header
    _say("files", ", ".join(path.name for path in checkpoint.files))
    _say("format", "psvae" if layout is None else layout.name + layout.remark(header))
    _say("class", cls.__name__)
    _say("weights", f"{sum(map(_count, header.values())) / 1e6:.2f} M numbers in {len(header)} tensors")
    for name, value in config.to_dict().items():
        _say(f"  {name}", value)
    for name in ("latent_channels", "spatial_compression_ratio", "scaling_factor", "shift_factor"):
        if hasattr(config, name):
            _say(name, getattr(config, name))
    statistics = {name: shape for name, shape in header.items() if name.split(".")[-1].strip("_") in _STATISTICS}
    _say("statistics", ", ".join(f"{name} {shape}" for name, shape in statistics.items()) or "none in the file")
    measured, unfit = _measured(checkpoint.source) if cls.__name__ in WITH_LATENTS else (None, None)
    if measured is not None:
        _say(MEAN_STD, measured)
    _say("licence", _licence(checkpoint.source))
    try:
        expected = build_empty(cls, config, checkpoint).state_dict()
    except ConfigError as problem:
        _say("problems", problem)
        return 1
    rules, ignored = same(list(expected)), ()
    if layout is not None:
        ours = config.to_dict()
        rules, ignored = layout.rules(list(expected), ours, header), layout.unneeded(ours, header)
        left_out = layout.left_out(header, rules, ours)
        _say("not needed", f"{len(left_out)}: {', '.join(left_out[:5])}" if left_out else "nothing")
    try:
        checkpoint.compare(expected, rules, tuple(ignored))
    except CheckpointError as problem:
        _say("problems", problem)
        return 1
    _say("problems", unfit or "none")
    return 0 if unfit is None else 1


_STATISTICS = ("mean", "std", "latents_mean", "latents_std")


def convert(
    source: Positional[str],
    destination: Positional[Path],
    *,
    to: Target,
    where: Where = ANYWHERE,
    overwrite: bool = False,
) -> int:
    """Write a checkpoint in another layout.

    Args:
        source: a folder, a weights file, a model of the package, or a Hub id.
        destination: a folder, new or empty.
        to: psvae: our own. diffusers: AutoencoderKL for a PixelVAE, AutoencoderPSVAE for a PSVAE. ldm: LDM's names.
            timm, transformers: an encoder for those libraries.
        overwrite: write into a folder that holds something.
    """
    if destination.exists() and not overwrite and (destination.is_file() or any(destination.iterdir())):
        raise ConfigError(f"{destination} holds something; choose another folder, or pass --overwrite")
    cls, _ = _recognise(where.open(source))
    writers: dict[tuple[str, str], Callable[[Any], Any]] = {
        ("PixelVAE", "diffusers"): lambda model: model.export_diffusers(destination),
        ("PixelVAE", "ldm"): lambda model: model.export_ldm(destination),
        ("PSVAE", "diffusers"): lambda model: psvae.AutoencoderPSVAE.from_psvae(model).save_pretrained(destination),
        ("SemanticEncoder", "timm"): lambda model: model.export_timm(destination),
        ("SemanticEncoder", "transformers"): lambda model: model.export_transformers(destination),
    }
    write = writers.get((cls.__name__, to)) if to != "psvae" else lambda model: model.save_pretrained(destination)
    if write is None:
        known = ["psvae", *(layout for name, layout in writers if name == cls.__name__)]
        raise ConfigError(f"a {cls.__name__} has no layout {to!r}; wanted one of: {', '.join(known)}")
    loaded = cls.from_pretrained(source, **asdict(where))
    write(loaded)
    _say("written", f"{cls.__name__} as {to} to {destination}")
    return 0


def reconstruct(
    images: Positional[tuple[Path, ...]],
    *,
    model: str,
    output: Path = Path("reconstructions"),
    device: str = "cpu",
    where: Where = ANYWHERE,
) -> int:
    """Encode and decode images; prints the PSNR. Writes NAME_reconstructed.png and NAME_side_by_side.png.

    Args:
        images: image files. What exceeds a multiple of the stride at the right and below is cropped, and it is said.
        model: a PSVAE or PixelVAE: a folder, a weights file, a model of the package, or a Hub id.
        output: folder for the pictures.
        device: such as cpu or cuda.
    """
    from PIL import Image

    if not images:
        raise ConfigError("no image came; wanted one or more files")
    _refuse_folders(images)
    twice = [stem for stem, count in Counter(path.stem for path in images).items() if count > 1]
    if twice:
        raise ConfigError(f"several images are named {twice[0]}, so are their pictures; run the command once for each")
    vae = _load_vae(model, where, device)
    output.mkdir(parents=True, exist_ok=True)
    for path in images:
        pixels = _read_picture(path, vae.config.spatial_compression_ratio).to(device)
        with torch.no_grad():
            rebuilt = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        psnr = 10 * torch.log10(4 / (rebuilt - pixels).square().mean())
        pictures = {"reconstructed": rebuilt, "side_by_side": torch.cat([pixels, rebuilt], dim=3)}
        for name, shown in pictures.items():
            array = (shown[0] * 127.5 + 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            Image.fromarray(array).save(output / f"{path.stem}_{name}.png")
        _say(path.name, f"{psnr.item():.2f} dB, {output / path.stem}_reconstructed.png")
    return 0


def descriptor(
    model: Positional[str],
    output: Positional[Path],
    *,
    by: Literal["statistics", "constants"] | None = None,
    statistics: Path | None = None,
    images: tuple[Path, ...] = (),
    name: str = "PSVAELatent",
    device: str = "cpu",
    where: Where = ANYWHERE,
) -> int:
    """Write what ComfyUI must know of a VAE's latents: channels, stride, process_in and process_out, preview colours.

    Args:
        model: a PSVAE or PixelVAE: a folder, a weights file, a model of the package, or a Hub id.
        output: a .py file, with a class that a model of ComfyUI takes as its latent_format; or a .json file.
        by: what a PixelVAE's generator sees latents by, where it has both.
        statistics: a file of them, such as the mean_std.json of ReaLS; None for those in the weights.
        images: photographs to fit the preview's colours on; without any, there is no preview.
        name: of the class.
        device: such as cpu or cuda.
    """
    from psvae.integrations.comfyui import fit_preview, latent_format

    if output.suffix not in (".py", ".json"):
        raise ConfigError(f"{output} is neither a .py nor a .json file; choose one")
    _refuse_folders(images)
    vae = _load_vae(model, where, device)
    if statistics is not None:
        psvae.load_latent_statistics(vae.latent_spec, statistics, allow_pickle=where.allow_pickle)
    preview = None
    if images:
        stride = vae.config.spatial_compression_ratio
        preview = fit_preview(vae, (_read_picture(path, stride).to(device) for path in images), by=by)
        _say("preview", f"explains {100 * preview.explained:.1f} % of the colours' variance over {len(images)} images")
    found = latent_format(vae, by=by, preview=preview)
    write_text(output, found.to_json() if output.suffix == ".json" else found.to_python(name))
    _say(
        "written",
        f"{output}: {found.latent_channels} channels, stride {found.spacial_downscale_ratio}, "
        f"process_in applies {found.applied or 'nothing'}",
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 well, 1 problems found, 2 a mistake in what was asked."""
    commands = {"inspect": inspect, "convert": convert, "reconstruct": reconstruct, "descriptor": descriptor}
    asked = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            if asked == ["--version"]:
                sys.stdout.write(f"psvae {psvae.__version__}\n")
                return 0
            with warnings.catch_warnings():
                warnings.simplefilter("always", CheckpointWarning)
                warnings.showwarning = _warn
                return tyro.extras.subcommand_cli_from_dict(
                    commands,
                    prog="psvae",
                    description="Image latents that also carry meaning. psvae --version prints the version.",
                    args=asked,
                )
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        return 128 + 13  # as a shell reports SIGPIPE
    except (PSVAEError, OSError) as error:
        sys.stderr.write(f"psvae: {_as_flags(str(error))}\n")
        return 2


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, CheckpointWarning | RangeWarning):  # other libraries' are not for the people who type
        sys.stderr.write(f"psvae: warning: {message}\n")


def _as_flags(message: str) -> str:
    """The remedies of an error as they are typed: ``--variant fp16`` for ``variant='fp16'``."""
    message = message.replace("allow_pickle=True", "--allow-pickle").replace("pass token=...", "set HF_TOKEN")
    message = re.sub(r"\bby='(\w+)'", r"--by \1", message)
    return re.sub(r"\b(file|variant|subfolder|revision)='([^']*)'", r"--\1 \2", message)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # CUDA that PyTorch was built without is an assertion
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device is {name!r}, which cannot be used here ({reason}); cpu always can") from error


def _load_vae(model: str, where: Location, device: str) -> Any:
    """A PSVAE or a PixelVAE."""
    _check_device(device)
    cls, _ = _recognise(where.open(model))
    if cls.__name__ not in WITH_LATENTS:
        raise ConfigError(f"{model} holds a {cls.__name__}; wanted a PSVAE or a PixelVAE")
    return cls.from_pretrained(model, device=device, **asdict(where))


def _refuse_folders(images: tuple[Path, ...]) -> None:
    folder = next((path for path in images if path.is_dir()), None)
    if folder is not None:
        raise ConfigError(f"{folder} is a folder; wanted image files, such as {folder}/*.png")


def _read_picture(path: Path, stride: int) -> torch.Tensor:
    """``1 3 H W`` in [-1, 1], upright, cropped to multiples of the stride, which is said."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"{path} cannot be read as an image ({error})") from error
    width, height = (side // stride * stride for side in picture.size)
    if not width or not height:
        raise ConfigError(f"{path} is {picture.size[0]} x {picture.size[1]}; wanted at least {stride} on each side")
    if (width, height) != picture.size:
        _say(path.name, f"cropped from {picture.size[0]} x {picture.size[1]} to {width} x {height}")
        picture = picture.crop((0, 0, width, height))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1


def _recognise(checkpoint: Checkpoint) -> tuple[type[HubMixin], Format | None]:
    """The class that reads a checkpoint, and its foreign layout if it has one."""
    name = None if checkpoint.config is None else checkpoint.config.get("_class")
    if isinstance(name, str) and name in psvae.__all__ and hasattr(getattr(psvae, name), "from_pretrained"):
        return getattr(psvae, name), None
    refusals = []
    for candidate in WITH_FOREIGN_FORMATS:
        cls = getattr(psvae, candidate)
        try:
            return cls, recognise(cls, checkpoint)
        except CheckpointError as error:
            refusals.append(str(error))
    if not checkpoint.header:
        raise CheckpointError(refusals[0])
    known = sorted({layout.name for name in WITH_FOREIGN_FORMATS for layout in getattr(psvae, name).foreign_formats})
    some = ", ".join(list(checkpoint.header)[:3])
    raise CheckpointError(
        f"{checkpoint.source} is of no layout that psvae reads (names like {some}); it reads its own and: "
        + ", ".join(known)
    )


def _measured(source: Source) -> tuple[str, str | None]:
    """What ReaLS' file of statistics beside the weights says, and what is wrong with it or without it."""
    file = source.find(MEAN_STD)
    if file is not None:
        try:
            _, mean, std = read_statistics(file)
        except CheckpointError as error:
            return "cannot be used", str(error)
        return f"mean {mean.item():g}, std {std.item():g}: what a generator's latents go by", None
    if MEAN_STD in source.unseen:
        return "not in the local cache, and the Hub cannot be reached", None
    weights = None if source.folder is None else (source.folder / source.subfolder).absolute()
    if weights is not None and weights.name == "vae" and (weights.parent / "alignment" / CONFIG).is_file():
        return "none", (
            f"{weights} lies beside alignment/, as of ReaLS, and has no {MEAN_STD}, without which load_reals refuses "
            "both: copy the file from where the folder came from, or measure it with "
            "psvae.fit_latent_statistics(vae, batches) and save both again with save_reals"
        )
    return "none beside the weights", None


def _licence(source: Source) -> str:
    """Of the model card's metadata."""
    card = source.find("README.md")
    text = card.read_text(encoding="utf-8", errors="replace") if card is not None else ""
    found = re.search(r"\A---\n.*?^license:\s*(.+?)\s*$.*?^---$", text, flags=re.DOTALL | re.MULTILINE)
    return found[1] if found else "not stated"


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _say(name: str, value: Any) -> None:
    sys.stdout.write(f"{name + ':':<28}{value}\n")


if __name__ == "__main__":
    sys.exit(main())
