"""Reconstruction and meaning of any codec of this library on any pictures, each number with its protocol beside it.

    python examples/evaluate.py --vae outputs/psvae/stage2 --vae stabilityai/sd-vae-ft-mse --data /data/imagenet/val
    python examples/evaluate.py --vae outputs/reals --data /data/val --probe --features outputs/teacher
    accelerate launch --num_processes 8 examples/evaluate.py ...      # the same numbers, eight times as fast

PSNR, SSIM, LPIPS where VGG's weights are; rFID where Inception's are, and with --features the Fréchet distance in the
features of a named encoder, which is no FID; cosine of rebuilt features; active channels; with --probe a linear probe
and nearest neighbours on latents. A reconstruction is measured as the 8-bit picture that it would be saved as.

Printed, and in the JSON of --output with the protocol of each number: which pictures, how they were cut, posterior mean
or draw, precision, extractor, reference. A run that was killed goes on by the same command, and another --vae is added
to the same file by naming it. Parts lie in a folder beside the file until their codec's numbers are in it.
"""

import importlib
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from cache_latents import ImageSource, digest_of, some
from checkpoints import changed, write_text
from frechet import WEIGHTS, load_inception, open_encoder, pooled_features, why_no_inception
from measures import load_lpips, local_lpips
from probes import Probe, plan_probe, refuse_too_large
from protocol import Setting, numbers_of, protocol_of, result_of, show
from reconstruction import MeasuredPictures, Meters, Pass, Work, rows_of, stamp_of
from sampling import asked_for, digest, load_vae, plain_errors, refuse_smaller, vae_folder

from psvae import PSVAE, PixelVAE, SemanticEncoder

Form = Literal["pooled", "flat"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure codecs on pictures."""

    vae: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Folder, file or Hub id of a PSVAE or PixelVAE (RAE's, SD's and others' formats too), or a ReaLS folder; once for
    each column."""
    data: str
    """A folder of images (for --probe with one subfolder per class), or a Hugging Face dataset (id, or folder of
    parquet files)."""
    split: str | None = None
    """Split of a Hugging Face dataset; without it, `data` is a folder of images."""
    image_column: str = "image"
    label_column: str = "label"
    """Of a Hugging Face dataset; read for --probe alone."""
    size: int = 256
    """Pictures are resized on their short side and centre-cropped to this."""
    count: int | None = None
    """At most so many pictures, spread evenly over the data; None takes all."""
    sample: bool = False
    """Reconstruct from a draw of the posterior instead of its mean. Probes read the mean."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the codec; what measures it stays in float32."""
    features: str | None = None
    """Folder or Hub id of a SemanticEncoder, or a timm name: adds a Fréchet distance in its features."""
    inception: Path | None = None
    """torch-fidelity's Inception weights; None looks where torch-fidelity keeps them."""
    frozen: str | None = None
    """Encoder as for --features, whose features the rebuilt ones are compared with: the one before stage 2. None takes
    the codec's own."""
    allow_download: bool = False
    """Fetch the weights of LPIPS and Inception where they are absent."""
    probe: bool = False
    """Linear probe and nearest neighbours on latents."""
    probe_on: tuple[Form, ...] = ("pooled", "flat")
    """Of latents: their mean over cells, or all their numbers."""
    probe_train: str | None = None
    """What probes learn from, of the same kind as `data`; without it and --probe-train-split, a share of `data`."""
    probe_train_split: str | None = None
    """Its split, of a Hugging Face dataset; alone, another split of `data`."""
    probe_count: int | None = None
    """At most so many pictures of it, spread evenly."""
    probe_share: float = 0.2
    """Of each class in `data`, held out to test probes where there is no --probe-train."""
    seed: int = 0
    """Of draws from the posterior, and of the choice of what is held out."""
    skip_unreadable: bool = False
    """Leave out pictures that cannot be read, and say which, instead of stopping."""
    allow_pickle: bool = False
    """Of codecs' files."""
    batch_size: int = 16
    part: int = 256
    """Pictures between two saves; processes share the parts."""
    workers: int = min(4, os.cpu_count() or 1)
    """Loader processes on each process."""
    output: Path = Path("outputs/evaluate.json")


# Before anything is measured


def check(options: Options) -> None:
    refuse_smaller(options, {0: ("workers",), 1: ("batch_size", "part"), 2: ("count",), 16: ("size",)})
    if not options.vae:
        raise SystemExit("no codec came; wanted --vae, once for each column")
    if len(set(options.vae)) < len(options.vae):
        raise SystemExit(f"a --vae came twice: {', '.join(options.vae)}; wanted each once")
    if not 0 < options.probe_share < 1:
        raise SystemExit(f"--probe-share is {options.probe_share}; wanted a number between 0 and 1")
    if probing(options) and not options.probe_on:
        raise SystemExit("--probe-on is empty; wanted pooled, flat or both")
    if options.precision == "fp16" and not torch.cuda.is_available():
        raise SystemExit("--precision fp16 came without a GPU; wanted no or bf16")


def probing(options: Options) -> bool:
    return options.probe or bool(options.probe_train or options.probe_train_split)


def open_pictures(options: Options, data: str, split: str | None, count: int | None) -> MeasuredPictures:
    label = options.label_column if probing(options) else None
    source = ImageSource(data, split, options.image_column, label, options.size)
    if split is None and not Path(data).is_dir():
        raise SystemExit(f"there is no folder {data}; for a Hugging Face dataset name its split")
    return MeasuredPictures(source, count)


def open_codec(name: str, options: Options, device: torch.device) -> PSVAE | PixelVAE:
    """Frozen, and tried.

    Raises:
        SystemExit: it cannot be opened, or such pictures are not for it.
    """
    vae = load_vae(vae_folder(name), device, options.allow_pickle).eval()
    try:
        with plain_errors(), torch.no_grad():
            blank = torch.zeros(1, 3, options.size, options.size, device=device)
            shape = vae.decode(vae.encode(blank).latent_dist.mode()).sample.shape
    except SystemExit as error:
        raise SystemExit(f"--size {options.size} does not fit {name}: {error}") from error
    if shape != blank.shape:
        raise SystemExit(f"{name} makes {tuple(shape[1:])} of pictures {tuple(blank.shape[1:])}; wanted the same")
    return vae


# What measures


def meters_of(options: Options, accelerator: Accelerator) -> tuple[Meters, dict[str, Any]]:
    """And what each of them is, for the settings: None where it is left out, which is printed."""
    device, fetch = accelerator.device, options.allow_download
    if fetch:
        with accelerator.main_process_first():
            load_lpips("without --allow-download it is left out")
    lpips = load_lpips() if fetch else local_lpips()
    if lpips is None:
        accelerator.print(
            "no LPIPS: torchvision's VGG-16 weights are not on this machine; --allow-download fetches them"
        )
    extractors: dict[str, Any] = {}
    identity: dict[str, Any] = {"lpips": None if lpips is None else "VGG-16", "rfid": None, "frechet_distance": None}
    weights = inception_file(options, accelerator)
    if weights is not None:
        network = load_inception(weights, ["2048"], device)
        extractors["rfid"] = lambda pixels: network(pixels)[0]
        identity["rfid"] = digest({}, network.state_dict())
    if options.features is not None:
        with accelerator.main_process_first():
            encoder = open_encoder(options.features, device)
        refuse_other_sizes(encoder, options.size, f"--features {options.features}")
        extractors["frechet_distance"] = partial(pooled_features, encoder)
        identity["frechet_distance"] = digest(encoder.config.to_dict(), encoder.state_dict())
    frozen = None
    if options.frozen is not None:
        with accelerator.main_process_first():
            frozen = open_encoder(options.frozen, device)
        refuse_other_sizes(frozen, options.size, f"--frozen {options.frozen}")
        identity["frozen"] = digest(frozen.config.to_dict(), frozen.state_dict())
    lpips = None if lpips is None else lpips.to(device)
    forms = options.probe_on if probing(options) else ()
    return Meters(lpips, extractors, frozen, forms, options.sample, options.seed, accelerator), identity


def inception_file(options: Options, accelerator: Accelerator) -> Path | None:
    """None, and why, where there is none."""
    weights = options.inception or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    absent = why_no_inception(weights)
    if absent and options.inception is not None:
        raise SystemExit(f"no rFID: {absent}")
    if absent and options.allow_download:
        try:
            address = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").URL_INCEPTION_V3
            with accelerator.main_process_first():
                torch.hub.load_state_dict_from_url(address, map_location="cpu", progress=False)
        except (ImportError, OSError) as error:
            raise SystemExit(
                f"no rFID: {absent}, and they could not be fetched ({error}); without --allow-download it is left out"
            ) from error
    elif absent:
        beside = "" if options.features else "; --features measures a distance in another encoder, which is no FID"
        accelerator.print(f"no rFID: {absent}; --allow-download fetches them{beside}")
        return None
    return weights


@torch.no_grad()
def refuse_other_sizes(encoder: torch.nn.Module, size: int, whose: str) -> None:
    device = next(encoder.parameters()).device
    try:
        with plain_errors():
            encoder(torch.zeros(1, 3, size, size, device=device))
    except SystemExit as error:
        raise SystemExit(f"--size {size} does not fit {whose}: {error}") from error


@torch.no_grad()
def refuse_other_features(vae: PSVAE | PixelVAE, frozen: SemanticEncoder | None, size: int, name: str) -> None:
    if frozen is None or not isinstance(vae, PSVAE) or vae.vae is None:
        return
    blank = torch.zeros(1, 3, size, size, device=vae.device)
    theirs, ours = (tuple(model(blank).shape[1:]) for model in (frozen, vae.encoder))
    if theirs != ours:
        raise SystemExit(f"--frozen has features of {theirs}, D h w, and {name} rebuilds {ours}; wanted the same")


# The run


def settings_of(
    options: Options, identity: dict[str, Any], pictures: MeasuredPictures, probe: Probe | None
) -> dict[str, Any]:
    """What must not change between two runs into one file."""
    apart = ("vae", "batch_size", "part", "workers", "allow_download", "allow_pickle", "skip_unreadable", "inception")
    asked = {name: value for name, value in asked_for(options).items() if name not in apart}
    asked["pictures"] = pictures.stamp(pictures.places)
    if probe is not None and probe.train is not None:
        asked["probe_pictures"] = probe.train.stamp(probe.train.places)
    return asked | {"measured with": identity}


def earlier(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of the runs before.

    Raises:
        SystemExit: the file is of other settings, or something else.
    """
    if not file.exists():
        return []
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        said, results = changed(before["settings"], settings), list(before["results"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{file} is there and no file of evaluate.py ({error}); choose another --output") from error
    if said:
        raise SystemExit(f"{file} holds numbers of another protocol ({said}); choose another --output")
    return results


def main(options: Options) -> dict[str, Any]:
    """Returns what is in the file."""
    check(options)
    waits = InitProcessGroupKwargs(timeout=timedelta(days=1))  # while the main process fits probes
    accelerator = Accelerator(mixed_precision=options.precision, kwargs_handlers=[waits])
    device = accelerator.device
    pictures = open_pictures(options, options.data, options.split, options.count)
    if len(pictures.places) < 2:
        raise SystemExit(f"{options.data} holds {len(pictures.places)} pictures; wanted two or more")
    train = None
    if options.probe_train or options.probe_train_split:
        where = options.probe_train or options.data
        train = open_pictures(options, where, options.probe_train_split, options.probe_count)
    probe = None
    if probing(options):
        probe = plan_probe(pictures, train, options.probe_on, options.probe_share, options.seed)
    meters, identity = meters_of(options, accelerator)
    weights = {}
    for name in options.vae:  # all of them, before hours of work for the first
        vae = open_codec(name, options, device)
        weights[name] = digest_of(vae)
        refuse_other_features(vae, meters.frozen, options.size, name)
        if probe is not None:
            refuse_too_large(vae, probe, options.size, name)
    settings = settings_of(options, identity, pictures, probe)
    results = earlier(options.output, settings)
    waiting = [name for name in options.vae if not any(is_of(result, name, weights) for result in results)]
    stale = [result["vae"] for result in results if result["vae"] in waiting]
    if stale:
        raise SystemExit(
            f"{options.output} holds numbers of other weights than those that are in {some(stale)} now; choose another "
            "--output"
        )
    folder = options.output.with_name(f"{options.output.stem}-parts")
    work = Work(accelerator, folder, options.batch_size, options.part, options.workers, options.skip_unreadable)
    key, no_rows = [stamp_of(settings["measured with"] | {"size": options.size})], Pass({}, [], [])
    setting = Setting(pictures, options.features, options.frozen, options.precision, options.sample, seed=options.seed)
    reference = no_rows
    if waiting and meters.extractors:
        reference = rows_of(pictures, [*key, "reference"], meters.of_pictures, work, "reference")
    for name in waiting:
        vae = open_codec(name, options, device)
        how = [weights[name], *[str(settings[n]) for n in ("sample", "seed", "precision")], *meters.probed]
        found = rows_of(pictures, [*key, *how], partial(meters.of_codec, vae, pictures), work, name)
        learned = no_rows
        if probe is not None and probe.train is not None:
            read = partial(meters.of_latents, vae)
            learned = rows_of(probe.train, [*key, *how, "latents"], read, work, f"{name}, to learn from")
        if accelerator.is_main_process:
            numbers = numbers_of(vae, found, reference.rows, learned.rows, probe, setting)
            common = protocol_of(vae, found, setting)
            results.append(result_of(name, vae, weights[name], numbers, common))
            text = json.dumps({"settings": settings, "results": results}, indent=2, ensure_ascii=False)
            write_text(options.output, text + "\n")
            for file in [*found.files, *learned.files]:
                file.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in reference.files:
            file.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        show([result for result in results if result["vae"] in options.vae], options.frozen, options.output)
    return {"settings": settings, "results": results}


def is_of(result: dict[str, Any], name: str, weights: dict[str, str]) -> bool:
    return result["vae"] == name and result["weights"] == weights[name]


if __name__ == "__main__":
    main(tyro.cli(Options))
    PartialState().destroy_process_group()  # not in main, which tests call
