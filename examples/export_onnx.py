"""Encoder, decoder and the generator's cached step as ONNX files, or as .pt2 of torch.export, held against PyTorch.

    python examples/export_onnx.py --model outputs/quickstart/stage2 --output outputs/onnx
    python examples/export_onnx.py --model outputs/t2i/model --output outputs/onnx --format onnx pt2

Needs `pip install -e '.[train,onnx]'`. All files compute in float32.

encoder  images B 3 H W in [-1, 1] → mean and std of the posterior, B Z h w. A draw is mean + std · noise.
decoder  latents B Z h w → images, nominally in [-1, 1], not clamped.
step     noisy latents, σ, and keys and values of a prefix → the velocity. `prefix_inputs` takes a PrefixCache apart.

Latents are as encode and decode of the class have them: normalised of a PSVAE; raw of a PixelVAE, whose scale, shift
and statistics stay with the caller. The file's metadata under "psvae" say which, with all numbers.

Batch, height and width (from two cells on) and the prefix's length are free where the model lets them be, and what is
free is printed: a ViT decoder and statistics per element have one grid, and torch.export knows one alone of DINOv3's
rotary positions and of the position offset of Meta's DINOv2. `--no-dynamic` frees nothing. Each file is run at several
sizes, an ONNX file by onnxruntime, and put in place where the largest difference from PyTorch is within `--tolerance`;
otherwise it is not kept.

psvae's checks do not travel with a file. Sizes that are no multiple of the stride, or of a generator's patch, are still
refused, in the words of who runs the file: where height and width are free by a reshape that cannot be done (.onnx) or
a guard (.pt2), where they are fixed by the stated shape. NaN and values far outside of [-1, 1] are not refused.
"""

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from sampling import plain_errors
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from psvae import PSVAE, DeepFusionDiT, PixelVAE, PrefixCache, PSVAEError

PARTS = Literal["encoder", "decoder", "step"]
FREE = {"B": "batch", "h": "height", "w": "width", "P": "prefix"}
LEAST = {"B": 1, "h": 2, "w": 2, "P": 0}  # torch.export takes a side of one cell for a constant
MOST = 2**20  # torch 2.7 wants a bound
SIDES = (3, 5, 7, 9)  # cells; two that a position table does not have, or its resize would be left out of the graph


@dataclass(frozen=True)
class Options:
    """Export a PSVAE, a PixelVAE or a DeepFusionDiT."""

    model: str
    """Folder, Hub id, or a model of the package, such as psvae-tiny."""
    output: Path
    """Folder for encoder, decoder or step, .onnx or .pt2."""
    part: tuple[PARTS, ...] = ()
    """Which of those that the model has; none for all."""
    format: tuple[Literal["onnx", "pt2"], ...] = ("onnx",)
    dynamic: bool = True
    """Free batch, height and width where the model can."""
    grid: tuple[int, int] = (16, 16)
    """Latent cells, rows and columns, where they are fixed; free ones are checked at this size too."""
    prefix: int = 77
    """Length of the prefix, likewise."""
    tolerance: float = 1e-3
    """Largest difference allowed, as a share of the largest value."""
    allow_pickle: bool = False
    """Of the model's file."""
    seed: int = 0


class Size(NamedTuple):
    """Of one call: B, (h, w) in latent cells, P."""

    batch: int
    grid: tuple[int, int]
    prefix: int


# What is exported: flat tensors in and out


def without(module: Any, *names: str) -> Any:
    """A copy that lacks these sub-modules and shares the rest: a .pt2 file holds all weights of what was exported."""
    lean = copy.copy(module)
    lean._modules = {name: None if name in names else part for name, part in module._modules.items()}
    return lean


class Encoder(nn.Module):
    """Images → mean and std of the posterior."""

    inputs, outputs = ("images",), ("mean", "std")

    def __init__(self, vae: PSVAE | PixelVAE) -> None:
        super().__init__()
        self.vae, self.stride = without(vae, "decoder", "post_quant_conv"), vae.config.spatial_compression_ratio
        if isinstance(vae, PSVAE) and vae.vae is not None:
            self.vae.vae = without(vae.vae, "decoder")
        self.native = vae.encoder.vit.patch_embed.grid_size if isinstance(vae, PSVAE) else ()
        self.only = vae.latent_spec.grid if isinstance(vae, PSVAE) else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # changes nothing, and fails for sizes that the first convolution would floor
        images = F.pixel_shuffle(F.pixel_unshuffle(images, self.stride), self.stride)
        found = self.vae.encode(images).latent_dist
        return found.mean, found.std

    def example(self, size: Size, generator: torch.Generator) -> tuple[Tensor, ...]:
        sides = [side * self.stride for side in size.grid]
        return (torch.rand(size.batch, self.vae.config.in_channels, *sides, generator=generator) * 2 - 1,)

    def axes(self, free: dict[str, Any]) -> tuple[dict[int, Any], ...]:
        return ({0: free["B"], 2: times(self.stride, free["h"]), 3: times(self.stride, free["w"])},)


class Decoder(nn.Module):
    """Latents → images."""

    inputs, outputs, native = ("latents",), ("images",), ()

    def __init__(self, vae: PSVAE | PixelVAE) -> None:
        super().__init__()
        self.vae = without(vae, "encoder", "quant_conv")
        if isinstance(vae, PSVAE) and vae.vae is not None:
            reads_features = vae.config.decoder_reads == "features"
            self.vae.vae = without(vae.vae, "encoder") if reads_features else None
        own = vae.latent_spec.grid if isinstance(vae, PSVAE) else None
        self.only = own or getattr(vae.config.decoder, "grid", None)

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample

    def example(self, size: Size, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(size.batch, self.vae.config.latent_channels, *size.grid, generator=generator),)

    def axes(self, free: dict[str, Any]) -> tuple[dict[int, Any], ...]:
        return ({0: free["B"], 2: free["h"], 3: free["w"]},)


class Step(nn.Module):
    """Noisy latents ``B Z h w``, σ ``B`` and a prefix → velocity ``B Z h w``.

    Keys and values are ``L B kv P d``, the mask ``B P``, True where a key is real, the position ``B``: the first rotary
    one after the prefix. Without a condition P is 0.
    """

    inputs = ("latents", "timestep", "keys", "values", "key_mask", "next_position")
    outputs, native, only = ("velocity",), (), None

    def __init__(self, model: DeepFusionDiT) -> None:
        super().__init__()
        unread = ("layers", "norm") if model.image_layers is not None else ()  # those of text alone
        self.model = without(model, "embed_tokens", "text_projections", *unread)

    def forward(
        self, latents: Tensor, timestep: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor, next_position: Tensor
    ) -> Tensor:
        return self.model(latents, timestep, PrefixCache(keys, values, key_mask, next_position)).sample

    def example(self, size: Size, generator: torch.Generator) -> tuple[Tensor, ...]:
        config = self.model.config
        sides = [side * config.patch_size for side in size.grid]
        past = (config.num_layers, size.batch, config.num_key_value_heads, size.prefix, config.attention_head_dim)
        keys, values = (torch.randn(past, generator=generator) for _ in range(2))
        mask = torch.rand(size.batch, size.prefix, generator=generator) < 0.8
        return (
            torch.randn(size.batch, config.in_channels, *sides, generator=generator),
            torch.rand(size.batch, generator=generator), keys, values, mask, mask.sum(1),
        )  # fmt: skip

    def axes(self, free: dict[str, Any]) -> tuple[dict[int, Any], ...]:
        sides = {2 + axis: times(self.model.config.patch_size, free[name]) for axis, name in enumerate("hw")}
        past = {1: free["B"], 3: free["P"]}
        return ({0: free["B"], **sides}, {0: free["B"]}, past, past, {0: free["B"], 1: free["P"]}, {0: free["B"]})


Part = Encoder | Decoder | Step


def times(unit: int, side: Any) -> Any:
    return side if side is None or unit == 1 else unit * side


def prefix_inputs(prefix: PrefixCache) -> dict[str, Tensor]:
    """What the step takes of a prefix, by name; ``.numpy()`` of each is onnxruntime's."""
    return {
        "keys": prefix.keys, "values": prefix.values, "key_mask": prefix.all_keys(),
        "next_position": prefix.next_position,
    }  # fmt: skip


def metadata_of(name: str, part: Part) -> str:
    """What a reader of the file must know, as JSON."""
    if isinstance(part, Step):
        config = part.model.config
        return json.dumps({"part": name, "class": "DeepFusionDiT", "config": config.to_dict()})
    vae, spec = part.vae, part.vae.latent_spec
    own = isinstance(vae, PSVAE)
    statistics = None if own else {key: getattr(spec, key).tolist() for key in ("mean", "std")}
    return json.dumps(
        {
            "part": name, "class": type(vae).__name__, "channels": spec.channels, "stride": spec.stride,
            "latents": "normalised" if own else "raw", "scaling_factor": 1.0 if own else vae.config.scaling_factor,
            "shift_factor": 0.0 if own else vae.config.shift_factor or 0.0, "left_to_callers": statistics,
        }
    )  # fmt: skip


# Export


def main(options: Options) -> None:
    found = parts_of(load(options))
    wanted = options.part or tuple(found)
    absent = [name for name in wanted if name not in found]
    if absent:
        raise SystemExit(f"{options.model} has no {absent[0]}; it has {' and '.join(found)}: see --part")
    if min(*options.grid, options.prefix) < 1 or not options.format:
        raise SystemExit("wanted a --grid of two numbers from 1, a --prefix from 1, and a --format")
    with torch.no_grad(), plain_errors():
        for name in wanted:
            export_part(name, found[name], options)


def load(options: Options) -> PSVAE | PixelVAE | DeepFusionDiT:
    said = []
    for cls in (PSVAE, PixelVAE, DeepFusionDiT):
        try:
            return cls.from_pretrained(options.model, allow_pickle=options.allow_pickle).requires_grad_(False)
        except PSVAEError as error:
            said.append(str(error))
    raise SystemExit("; ".join(dict.fromkeys(said)))


def parts_of(model: PSVAE | PixelVAE | DeepFusionDiT) -> dict[str, Part]:
    return {"step": Step(model)} if isinstance(model, DeepFusionDiT) else {
        "encoder": Encoder(model), "decoder": Decoder(model),
    }  # fmt: skip


def export_part(name: str, part: Part, options: Options) -> None:
    """Write the formats asked for, each where it agrees with PyTorch.

    Raises:
        SystemExit: one does not; earlier files of its name are left as they were.
    """
    part = part.eval()
    program, free, sizes = trace(part, options)
    staging = options.output / ".exporting"
    with cleared(staging):
        for kind in options.format:
            file = staging / f"{name}.{kind}"
            if kind == "onnx":
                save_onnx(program, part, name, file)
            else:
                torch.export.save(program, file, extra_files={"psvae.json": metadata_of(name, part)})
            difference, share = compare(file, part, sizes, options)
            size = sum(written.stat().st_size for written in staging.iterdir())
            target = options.output / file.name
            place(sorted(staging.iterdir(), reverse=True), target)
            said = ", ".join(word for letter, word in FREE.items() if letter in free) or "nothing"
            fixed = "" if "h" in free else f" (fixed: {' x '.join(map(str, sizes[0].grid))} cells)"
            print(
                f"{target}: {size / 1e6:.1f} MB, free: {said}{fixed}; differs from PyTorch by at most "
                f"{difference:.2g}, {share:.2g} of the largest value, at {len(sizes)} size{'s' * (len(sizes) > 1)}"
            )


def place(written: list[Path], target: Path) -> None:
    """Replace ``target`` and the weights beside it, where the file is too large to hold them; those come first."""
    weights = target.with_name(f"{target.name}.data")
    if len(written) > 1:
        target.unlink(missing_ok=True)  # one file's graph never lies beside another's weights
    for file in written:
        file.replace(target.with_name(file.name))
    if len(written) == 1:
        weights.unlink(missing_ok=True)


@contextmanager
def cleared(folder: Path) -> Iterator[None]:
    """An empty folder, gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def trace(part: Part, options: Options) -> tuple[ExportedProgram, str, list[Size]]:
    """(the program, the letters of its free axes, the sizes to check it at).

    What torch.export makes a constant, whatever it was told, is then fixed for all to see.
    """
    generator = torch.Generator().manual_seed(options.seed)
    fixed = Size(1, part.only or options.grid, options.prefix)
    rows, columns = [side for side in SIDES if side not in part.native][:2]
    always = "BP" if isinstance(part, Step) else "B"
    for letters in [always + "hw", always] if options.dynamic else []:
        if "h" in letters and part.only is not None:
            continue
        free = {letter: Dim(letter, min=LEAST[letter], max=MOST) if letter in letters else None for letter in FREE}
        size = Size(2, (rows, columns) if "h" in letters else fixed.grid, 4)
        turned = Size(3, size.grid[::-1], 1) if "h" in letters else Size(3, size.grid, 1)
        shapes = tuple({axis: dim for axis, dim in axes.items() if dim is not None} for axes in part.axes(free))
        try:
            program = torch.export.export(part, part.example(size, generator), dynamic_shapes=shapes, strict=False)
            inputs = part.example(turned, generator)
            found = differences(part, program.module()(*inputs), part(*inputs))
        except (torch._dynamo.exc.UserError, AssertionError, RuntimeError) as error:
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            print(f"with {', '.join(FREE[letter] for letter in letters)} free: {said}", file=sys.stderr)
            continue
        if any(not share <= options.tolerance for _, _, share in found):  # constant, and torch.export did not say so
            continue
        return program, letters, [size, fixed, turned, *[Size(1, size.grid, 0)] * ("P" in letters)]
    return torch.export.export(part, part.example(fixed, generator), strict=False), "", [fixed]


def save_onnx(program: ExportedProgram, part: Part, name: str, file: Path) -> None:
    """Weights of more than 2 GB lie beside it, in FILE.data."""
    made = torch.onnx.export(
        program, dynamo=True, verbose=False,
        input_names=list(part.inputs), output_names=list(part.outputs),
    )  # fmt: skip
    name_axes(made.model, part)
    made.model.metadata_props["psvae"] = metadata_of(name, part)
    made.save(file)


def name_axes(model: Any, part: Part) -> None:
    """torch.onnx calls axes s34 and 8*s39; here they are B and 8*h."""
    letters = {letter: letter for letter in FREE}
    wanted = part.axes({**letters, "h": Named("h"), "w": Named("w")})
    names = {}
    for value, axes in zip(model.graph.inputs, wanted, strict=True):
        for axis, letter in axes.items():
            symbol = re.search(r"[a-z]+\d+", str(value.shape[axis]))
            if symbol:
                names[symbol[0]] = str(letter).rpartition("*")[2]
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for axis, side in enumerate(value.shape or ()):
            text = getattr(side, "value", None)
            if isinstance(text, str):
                value.shape[axis] = re.sub(r"[a-z]+\d+", lambda found: names.get(found[0], found[0]), text)


class Named(str):
    """A letter that a number can be multiplied with, as a Dim can."""

    def __rmul__(self, unit: int) -> str:  # type: ignore[override]
        return f"{unit}*{self}"


# Check


def compare(file: Path, part: Part, sizes: list[Size], options: Options) -> tuple[float, float]:
    """The largest difference from PyTorch over all outputs and sizes, and the largest as a share of that output's
    largest value.

    Raises:
        SystemExit: it is beyond the tolerance, or the file does not run.
    """
    run: Any = None
    generator = torch.Generator().manual_seed(options.seed + 1)
    worst, worst_share = 0.0, 0.0
    for size in sizes:
        inputs = part.example(size, generator)
        wanted = part(*inputs)
        remedy = "; pass --no-dynamic, with the --grid that you need" if len(sizes) > 1 else ""
        try:
            run = run or runner(file)
            got = run(*inputs)
        except Exception as error:  # of onnxruntime's own kind, or an assertion of the program's
            said = " ".join(str(error).split())[:300]
            raise SystemExit(f"{file.name} does not run at {said_of(size)} ({said}): it is not kept{remedy}") from error
        for name, difference, share in differences(part, got, wanted):
            if not share <= options.tolerance:
                raise SystemExit(
                    f"{file.name} differs from PyTorch at {said_of(size)}: {name} by {difference:.3g}, {share:.2g} of "
                    f"its largest value; wanted at most {options.tolerance:g} (--tolerance): it is not kept{remedy}"
                )
            worst, worst_share = max(worst, difference), max(worst_share, share)
    return worst, worst_share


def differences(part: Part, got: Any, wanted: Any) -> list[tuple[str, float, float]]:
    """By output: its name, the largest difference, and that as a share of the largest value."""
    got, wanted = ([x] if isinstance(x, Tensor) else x for x in (got, wanted))
    found = []
    for name, a, b in zip(part.outputs, got, wanted, strict=True):
        agree = a.shape == b.shape and bool(a.isfinite().all())
        difference = float((a - b).abs().max()) if agree else float("inf")
        found.append((name, difference, difference / (float(b.abs().max()) or 1.0)))
    return found


def said_of(size: Size) -> str:
    return f"batch {size.batch}, {size.grid[0]} x {size.grid[1]} cells, prefix {size.prefix}"


def runner(file: Path) -> Callable[..., Any]:
    """The file as a function of tensors."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    import onnxruntime

    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 4  # errors come as exceptions
    session = onnxruntime.InferenceSession(file, quiet, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, feeds)]

    return run


if __name__ == "__main__":
    main(tyro.cli(Options))
