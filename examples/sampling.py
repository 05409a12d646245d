"""What sampling takes: the models of a trained generator, its noise, a share of the work, whole files.

For generate.py and edit.py; train_generator.py, sample_sit.py, train_sit.py and visualise_latents.py borrow the models'
half.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from checkpoints import changed, write_text, write_whole
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from psvae import (
    PSVAE,
    DeepFusionDiT,
    DeepFusionDiTConfig,
    PixelVAE,
    PrefixCache,
    PSVAEError,
    flow,
    load_latent_statistics,
)
from psvae.adapt import latent_shape
from psvae.hub.source import Source
from psvae.hub.statistics import MEAN_STD

TOKENIZER = "tokenizer"  # subfolder of a saved generator


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The paper: 50 Euler steps, timestep shift 3, guidance 6.5, for editing too (section 4.1)."""

    model: str
    """Folder or Hub id of the DeepFusionDiT."""
    vae: str
    """Folder or Hub id of the PSVAE or PixelVAE that it was trained on."""
    tokenizer: str | None = None
    """Folder or Hub id; None takes the one that train_generator.py left beside the model."""
    size: int = 256
    """Side of the pictures, in pixels."""
    steps: int = 50
    """Updates of the sampler."""
    shift: float = 3.0
    guidance: float = 6.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guided where low < σ ≤ high."""
    renorm: Literal["global", "channel"] | None = None
    """BAGEL's bound on the length of the guided velocity."""
    solver: Literal["euler", "heun"] = "euler"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the generator; the VAE stays in float32."""
    seed: int = 0


class Sampler:
    """The models, loaded once.

    Args:
        extra: fields of `flow.Guidance` beside those of the options.

    Attributes:
        unit: pixels; sides of pictures are multiples of it.
    """

    def __init__(self, options: SamplingOptions, accelerator: Accelerator, **extra: Any) -> None:
        self.options, self.device, self.dtype = options, accelerator.device, getattr(torch, options.dtype)
        with plain_errors(), accelerator.main_process_first():  # one process downloads, the others find the files
            self.guidance = flow.Guidance(
                options.guidance, interval=options.guidance_interval, renorm=options.renorm, **extra
            )
            self.sigmas = flow.sigma_schedule(options.steps, options.shift)
            self.model = DeepFusionDiT.from_pretrained(options.model, dtype=self.dtype).to(self.device)
            self.vae = load_measured_vae(options.vae, None, self.device, required=False)
            self.shape = latent_shape(self.vae, options.size)
            self.tokenizer = Tokenizer(options.tokenizer, options.model)
        check_generator(self.model.config, self.shape)
        self.unit = options.size // self.shape[1] * self.model.config.patch_size

    @torch.no_grad()
    def __call__(self, texts: list[str], places: list[tuple[int, int]], sources: Tensor | None = None) -> Tensor:
        """Pictures ``B 3 H W`` in [-1, 1], on the CPU.

        Args:
            places: (prompt, number) of each picture, as many for each text; its noise depends on them and the seed
                alone.
            sources: ``B 3 H W`` in [-1, 1], to edit; the pictures are of their size.
        """
        ids, mask = (x.to(self.device) for x in self.tokenizer(texts))
        source_latents, shape = None, self.shape
        if sources is not None:
            with plain_errors():
                posterior = self.vae.encode(sources.to(self.device)).latent_dist
                source_latents = scale_latents(self.vae, posterior.mode()).to(self.dtype)
            shape = source_latents.shape[1:]
        prefixes = branches(self.model, self.guidance, ids, mask, source_latents)
        prefixes = {name: prefix.repeat_interleave(len(places) // len(texts)) for name, prefix in prefixes.items()}
        velocity = flow.guided(self.model, prefixes, self.guidance)
        latents = flow.sample(velocity, self._noise(places, shape), self.sigmas, solver=self.options.solver)
        return decode(self.vae, latents.float()).cpu()

    def _noise(self, places: list[tuple[int, int]], shape: Sequence[int]) -> Tensor:
        rows = [torch.randn(shape, generator=generator_of(self.options.seed, *place)) for place in places]
        return torch.stack(rows).to(self.device, self.dtype)


def generator_of(*position: object) -> torch.Generator:
    """Whose numbers follow from the position alone."""
    return torch.Generator().manual_seed(zlib.crc32(repr(position).encode()))


# Models


class Tokenizer:
    """transformers' tokenizer of a folder or Hub id: texts → ids and mask, both ``B T``, padded on the right.

    Args:
        name: None for the one that train_generator.py left in ``model``.
        length: longer texts are cut, then and whenever it is loaded again; None keeps the tokenizer's own.
    """

    def __init__(self, name: str | None, model: str | Path | None, length: int | None = None) -> None:
        from transformers import AutoTokenizer

        if name is None and model is None:
            raise SystemExit("random weights came without a tokenizer: pass --tokenizer")
        where, subfolder = (str(model), TOKENIZER) if name is None else (name, "")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(where, subfolder=subfolder)
        except (OSError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise SystemExit(f"no tokenizer in {where}/{subfolder}, pass --tokenizer: {said}") from error
        self.tokenizer.padding_side = "right"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.tokenizer.model_max_length = length or self.tokenizer.model_max_length

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        try:
            encoded = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        except Exception as error:  # the class that tokenizers raises
            raise SystemExit(f"{texts!r} cannot be tokenised, a word may be unknown to this model: {error}") from error
        return encoded["input_ids"], encoded["attention_mask"]

    def save(self, model: Path) -> None:
        """Beside the weights."""
        self.tokenizer.save_pretrained(model / TOKENIZER)


def load_vae(name: str, device: torch.device, allow_pickle: bool = False) -> PSVAE | PixelVAE:
    """Frozen, of the class that recognises the checkpoint; where none does, what each said."""
    said = []
    for cls in (PSVAE, PixelVAE):
        try:
            return cls.from_pretrained(name, device=device, allow_pickle=allow_pickle).requires_grad_(False)
        except PSVAEError as error:
            said.append(str(error))
    raise SystemExit("; ".join(dict.fromkeys(said)))


def vae_folder(name: str) -> str:
    """Its vae/, of a ReaLS folder or a diffusers pipeline; all others as they are named."""
    inside = Path(name) / "vae"
    return str(inside) if inside.is_dir() else name


def load_measured_vae(
    name: str, statistics: Path | None, device: torch.device, allow_pickle: bool = False, required: bool = True
) -> PSVAE | PixelVAE:
    """`load_vae`, then `measured`."""
    return measured(load_vae(name, device, allow_pickle), name, statistics, allow_pickle, required)


def measured(
    vae: PSVAE | PixelVAE, name: str, statistics: Path | None, allow_pickle: bool = False, required: bool = True
) -> PSVAE | PixelVAE:
    """The same VAE, whose latents `scale_latents` brings to about N(0, 1): by its constants (SD, FLUX) or by
    statistics, those of a file, of mean_std.json beside its weights, in a folder or on the Hub (ReaLS), or of its own.
    Statistics replace the constants; that they do, or that nobody knows whether there are any, is printed.

    Args:
        required: refuse a VAE that has neither; else its latents stay as they are.

    Raises:
        SystemExit: it has neither.
    """
    spec = vae.latent_spec
    with plain_errors():
        beside = Source(name, "", revision=None, local_files_only=False, token=None, cache_dir=None)
        file = statistics or beside.find(MEAN_STD)
        if file is not None:
            load_latent_statistics(spec, file, allow_pickle=allow_pickle)
    if MEAN_STD in beside.unseen:
        PartialState().print(
            f"{MEAN_STD} of {name} is not in the local cache and the Hub cannot be reached: its latents go on as if "
            "there were none; go online once, or pass a local folder"
        )
    known = bool(((spec.mean != 0) | (spec.std != 1)).any())
    constant = isinstance(vae, PixelVAE) and (vae.config.scaling_factor, vae.config.shift_factor or 0.0) != (1.0, 0.0)
    if required and not known and not constant:
        raise SystemExit(
            f"the latents of {name} have no statistics, so a generator cannot see them as N(0, 1): pass --statistics "
            "(mean_std.json of ReaLS, or latents_stats.pt of cache_latents.py with --allow-pickle), or measure and "
            "save them with psvae.fit_latent_statistics(vae, batches)"
        )
    if known and constant:  # statistics are of raw latents: both would scale twice
        PartialState().print(
            f"{name} has the scale {vae.config.scaling_factor}: its latents go by the statistics "
            f"{'that it has too' if file is None else f'of {file}'} instead"
        )
        vae.config = vae.config.replace(scaling_factor=1.0, shift_factor=None)
    return vae


def check_generator(config: DeepFusionDiTConfig, latents: Sequence[int]) -> None:
    """Whether it goes with such latents, Z h w, and with texts.

    Raises:
        SystemExit: it does not.
    """
    channels, height, width = latents
    if config.fusion == "prefix":
        raise SystemExit("a generator with fusion 'prefix' reads no texts; these scripts take 'shared' or 'mot'")
    if config.in_channels != channels:
        raise SystemExit(f"the VAE's latents have {channels} channels, the generator's {config.in_channels}")
    if height % config.patch_size or width % config.patch_size:
        raise SystemExit(
            f"latents of this size are {height} x {width}, which patches of {config.patch_size} do not fill: take a "
            f"--size that is a multiple of the VAE's stride times {config.patch_size}"
        )


def scale_latents(vae: PSVAE | PixelVAE, latents: Tensor) -> Tensor:
    """As a generator sees them: a PSVAE's come normalised, a PixelVAE leaves shift, scale and statistics to us."""
    if isinstance(vae, PSVAE):
        return latents
    return vae.latent_spec.normalize((latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)


def unscale_latents(vae: PSVAE | PixelVAE, latents: Tensor) -> Tensor:
    """`scale_latents` undone."""
    if isinstance(vae, PSVAE):
        return latents
    return vae.latent_spec.denormalize(latents) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)


def decode(vae: PSVAE | PixelVAE, latents: Tensor) -> Tensor:
    """Pictures ``B 3 H W`` in [-1, 1]."""
    return vae.decode(unscale_latents(vae, latents)).sample.float().clamp(-1, 1)


def branches(
    model: DeepFusionDiT, guidance: flow.Guidance, ids: Tensor, mask: Tensor, sources: Tensor | None
) -> dict[str, PrefixCache]:
    """The prefixes that the guidance asks for, each encoded once for all steps."""
    made = {
        "full": lambda: model.encode_prefix(ids, mask, source_latents=sources),
        "text": lambda: model.encode_prefix(ids, mask),
        "image": lambda: model.encode_prefix(source_latents=sources),
        "empty": lambda: PrefixCache.empty(
            model.config, len(ids), device=ids.device, dtype=model.embed_latents.weight.dtype
        ),
    }
    return {name: made[name]() for name in guidance.branches}


def refuse_smaller(options: Any, least: dict[int, tuple[str, ...]]) -> None:
    """Numbers that are smaller than they may be; None is none.

    Args:
        least: names of options by the least that they may be, with a dot where one is in another.

    Raises:
        SystemExit: there is such a number.
    """
    for bound, names in least.items():
        for name in names:
            value = attrgetter(name)(options)
            if value is not None and value < bound:
                raise SystemExit(f"--{name.replace('_', '-')} is {value}; wanted at least {bound}")


@contextmanager
def plain_errors() -> Iterator[None]:
    """What psvae refuses, in one line instead of a traceback."""
    try:
        yield
    except PSVAEError as error:
        raise SystemExit(str(error)) from error


# Many pictures


def share(jobs: list[Any], accelerator: Accelerator) -> Iterator[Any]:
    """This process's share of the jobs whose ``files`` are not all there, with a progress bar."""
    waiting = [job for job in jobs if not all(file.exists() for file in job.files)]
    accelerator.wait_for_everyone()  # all have looked before one writes, so that all share the same list
    accelerator.print(f"{len(jobs)} texts, {len(jobs) - len(waiting)} of them done before")
    mine = waiting[accelerator.process_index :: accelerator.num_processes]
    return iter(tqdm(mine, disable=not accelerator.is_main_process))


def claim(options: Any, output: Path, accelerator: Accelerator, **models: nn.Module) -> None:
    """Keep the pictures of two runs apart: what was asked for lies beside the folder, and a digest of the weights; it
    takes no others.

    Args:
        models: by the names of their options.

    Raises:
        SystemExit: the folder holds pictures of other options, or of other weights.
    """
    beside, asked = output.with_name(f"{output.name}.json"), asked_for(options)
    weights = {name: digest({}, model.state_dict()) for name, model in models.items()}
    if beside.exists() and any(path.is_file() for path in output.rglob("*")):
        try:
            before = dict(json.loads(beside.read_text(encoding="utf-8")))
        except ValueError as error:
            said = f"{beside}, which says of what options the pictures in {output} are, cannot be read ({error})"
            raise SystemExit(f"{said}; choose another --output") from error
        said = changed(before, asked)
        if said:
            raise SystemExit(f"{output} holds pictures of another run, see {beside} ({said}); choose another --output")
        known = before.get("weights", {})
        others = [f"--{name} {asked[name]}" for name, found in weights.items() if known.get(name) != found]
        if others:
            raise SystemExit(
                f"{output} holds pictures of other weights than those that are in {' and '.join(others)} now"
                f"{'' if known else ', or of ones that were not noted'}, see {beside}: remove the folder, or choose "
                "another --output"
            )
    accelerator.wait_for_everyone()  # all have looked before one writes
    if accelerator.is_main_process:
        write_text(beside, json.dumps(asked | {"weights": weights}, indent=2) + "\n")


def asked_for(options: Any) -> dict[str, Any]:
    """As JSON gives it back, but for the output; files and folders by the whole of their paths."""
    found = {name: value for name, value in asdict(options).items() if name != "output"}
    for name, value in found.items():
        if isinstance(value, Path) or (isinstance(value, str) and Path(value).exists()):
            found[name] = str(Path(value).resolve())
    return json.loads(json.dumps(found))


def digest(config: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Of a configuration and of weights, to the bit."""
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def save_image(image: Tensor, path: Path) -> None:
    """``3 H W`` in [-1, 1] as a PNG, whole or not at all; no evaluator takes the half-written one for a picture."""
    pixels = (image.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).numpy()
    write_whole(path, lambda partial: Image.fromarray(pixels).save(partial, format="PNG"))
