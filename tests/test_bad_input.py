"""Each bad input gets an error that says what came, what was wanted and what to do.

Checkpoints are in ``tests/hub/test_faults.py``, Hub ids in ``tests/hub/test_hub.py``, a full disk in
``tests/hub/test_atomic.py``, fields of configurations in ``tests/test_config.py``.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from psvae import (
    PSVAE,
    SemanticEncoder,
    SemanticEncoderConfig,
    ViTPixelDecoder,
    ViTPixelDecoderConfig,
    fit_latent_statistics,
)
from psvae.errors import ConfigError, DtypeError, MissingDependencyError, PSVAEError, RangeWarning, ShapeError
from tests.tiny import (
    build,
    features,
    images,
    latents,
    tiny_decoder,
    tiny_decoder_config,
    tiny_encoder,
    tiny_encoder_config,
    tiny_pixel_vae,
    tiny_psvae,
    tiny_psvae_config,
    tiny_vae,
    tiny_vae_config,
)

ROOT = Path(__file__).parents[1]


def psvae_encode(pixels: Any) -> Any:
    return tiny_psvae().encode(pixels)


def psvae_encode_in_slices(pixels: Any) -> Any:
    model = tiny_psvae()
    model.enable_slicing()
    return model.encode(pixels)


def with_last_pixel(value: float) -> Tensor:
    """Two sound images but for one number."""
    pixels = images()
    pixels[-1, -1, -1, -1] = value
    return pixels


# Every public call that takes images.
TAKES_IMAGES: dict[str, Callable[[Any], Any]] = {
    "SemanticEncoder": lambda pixels: tiny_encoder()(pixels),
    "PSVAE.forward": lambda pixels: tiny_psvae()(pixels),
    "PSVAE.encode": psvae_encode,
    "PSVAE.encode in slices": psvae_encode_in_slices,
    "PSVAE.features": lambda pixels: tiny_psvae().features(pixels),
    "fit_latent_statistics": lambda pixels: fit_latent_statistics(tiny_psvae(), [pixels]),
}
each_call = pytest.mark.parametrize("call", TAKES_IMAGES.values(), ids=TAKES_IMAGES.keys())

BAD_IMAGES: dict[str, tuple[Any, type[PSVAEError], str]] = {
    "height": (images(1, 36, 32), ShapeError, "images are 36 x 32; wanted multiples of the stride 8, nearest 32 x 32"),
    "width": (images(1, 32, 46), ShapeError, "nearest 32 x 48: resize, crop or pad first, nothing is resized silently"),
    "smaller than a cell": (images(1, 4, 32), ShapeError, "images are 4 x 32; .* nearest 8 x 32: resize, crop or pad"),
    "grey": (images()[:, :1], ShapeError, r"images have 1 channels, shape \(2, 1, 32, 32\); wanted 3"),
    "alpha": (torch.cat([images(), images()[:, :1]], 1), ShapeError, "images have 4 channels, .* wanted 3"),
    "channels last": (
        images().permute(0, 2, 3, 1),
        ShapeError,
        r"channels come last here, use \.permute\(0, 3, 1, 2\)",
    ),
    "no batch": (
        images()[0],
        ShapeError,
        r"have shape \(3, 32, 32\); wanted 4 axes, \(B, 3, height, width\); add a batch axis with \.unsqueeze\(0\)",
    ),
    "video": (images()[None], ShapeError, r"images have shape \(1, 2, 3, 32, 32\); wanted 4 axes"),
    "no items": (images()[:0], ShapeError, r"shape \(0, 3, 32, 32\); every axis must hold at least one element"),
    "bytes": (
        (images() * 127).byte(),
        DtypeError,
        r"images have dtype torch\.uint8; wanted floating point; bytes become images with x\.float\(\) / 127\.5 - 1",
    ),
    "integers": (images().long(), DtypeError, r"images have dtype torch\.int64; wanted floating point"),
    "mask": (images() > 0, DtypeError, r"images have dtype torch\.bool; wanted floating point"),
    "NaN": (
        with_last_pixel(float("nan")),
        ShapeError,
        "images hold NaN or infinity; wanted finite",
    ),
    "infinity": (
        with_last_pixel(float("-inf")),
        ShapeError,
        "hold NaN or infinity; .* look at the st",
    ),
    "array": (
        images().numpy(),
        DtypeError,
        r"images came as ndarray; wanted one torch\.Tensor of shape \(B, 3, height, w",
    ),
    "a data loader's pair": ([images(), 0], DtypeError, r"images came as list; wanted one torch\.Tensor of shape"),
}


@pytest.mark.bad_input
@each_call
@pytest.mark.parametrize(("bad", "error", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_images(call: Callable[[Any], Any], bad: Any, error: type[PSVAEError], message: str) -> None:
    with pytest.raises(error, match=message):
        call(bad)


@each_call
@pytest.mark.parametrize(
    ("pixels", "span"),
    [
        ((images() + 1) * 127.5, r"\[0\.\d+, 255\]"),
        (images() * 2.5, r"\[-2\.5, 2\.5\]"),
        (images() - 0.9, r"\[-1\.9, 0\.\d+\]"),
    ],
    ids=["0 to 255", "normalised by the caller", "too dark"],
)
def test_images_far_outside_the_range_warn(call: Callable[[Any], Any], pixels: Tensor, span: str) -> None:
    advice = r"pixels in 0\.\.255 become x / 127\.5 - 1, pixels in 0\.\.1 become x \* 2 - 1"
    with pytest.warns(RangeWarning, match=f"images span {span}; wanted \\[-1, 1\\]: {advice}") as caught:
        call(pixels[:1])
    assert len(caught) == 1


@each_call
def test_images_a_little_outside_the_range_do_not_warn(call: Callable[[Any], Any]) -> None:
    """Bicubic resizing overshoots. (A warning would be an error here.)"""
    call(images() * 1.3)


def test_half_precision_images_are_checked_too() -> None:
    with pytest.raises(ShapeError, match="hold NaN or infinity"):
        tiny_encoder().half()(torch.full((1, 3, 32, 32), float("nan"), dtype=torch.float16))


# Latents and features

BAD_MAPS: dict[str, tuple[Callable[[Tensor], Any], type[PSVAEError], str]] = {
    "another Z": (lambda z: z[:, :4], ShapeError, r"have 4 channels, shape \(2, 4, 4, 4\); wanted {channels}"),
    "channels last": (lambda z: z.permute(0, 2, 3, 1), ShapeError, r"channels come last here, use \.permute"),
    "no batch": (lambda z: z[0], ShapeError, r"wanted 4 axes, \(B, {channels}, height, width\); add a batch axis with"),
    "tokens": (lambda z: z.flatten(2), ShapeError, r"wanted 4 axes, \(B, {channels}, height, width\)"),
    "no cells": (lambda z: z[..., :0], ShapeError, r"shape \(2, {channels}, 4, 0\); every axis must hold at least one"),
    "integers": (
        lambda z: z.long(),
        DtypeError,
        r"have dtype torch\.int64; wanted floating point; convert with \.float\(\)",
    ),
    "array": (lambda z: z.numpy(), DtypeError, r"came as ndarray; wanted one torch\.Tensor of shape \(B, {channels}, "),
}
TAKES_MAPS: dict[str, tuple[Callable[[Any], Any], str, int]] = {
    "PixelDecoder": (lambda z: tiny_decoder()(z), "latents", 8),
    "PSVAE.decode": (lambda z: tiny_psvae().decode(z), "latents", 8),
    "PSVAE.decode_features": (lambda z: tiny_psvae().decode_features(z), "latents", 8),
    "SemanticVAE.decode": (lambda z: tiny_vae().decode(z), "latents", 8),
    "SemanticVAE.encode": (lambda f: tiny_vae().encode(f), "features", 48),
    "SemanticVAE.forward": (lambda f: tiny_vae()(f), "features", 48),
    "PSVAE.decode of RAE": (lambda f: tiny_psvae("rae").decode(f), "latents", 48),
}


@pytest.mark.bad_input
@pytest.mark.parametrize(("call", "what", "channels"), TAKES_MAPS.values(), ids=TAKES_MAPS.keys())
@pytest.mark.parametrize(("spoil", "error", "message"), BAD_MAPS.values(), ids=BAD_MAPS.keys())
def test_bad_latents_and_features(
    call: Callable[[Any], Any],
    what: str,
    channels: int,
    spoil: Callable[[Tensor], Any],
    error: type[PSVAEError],
    message: str,
) -> None:
    bad = spoil(latents() if channels == 8 else features())
    with pytest.raises(error, match=f"^{what} .*" + message.replace("{channels}", str(channels))):
        call(bad)


# Half precision for float32 weights

VIT_DECODER = ViTPixelDecoderConfig(8, width=24, depth=1, num_heads=3, mlp_dim=40, patch_size=8, grid=(4, 4))
HALVES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any], str, Callable[[], Tensor]]] = {
    "PixelVAE": (tiny_pixel_vae, lambda model, x: model(x).sample, "images", images),
    "PixelVAE.encode": (tiny_pixel_vae, lambda model, x: model.encode(x).latent_dist.mean, "images", images),
    "PixelVAE.decode": (tiny_pixel_vae, lambda model, z: model.decode(z).sample, "latents", latents),
    "PSVAE.decode": (tiny_psvae, lambda model, z: model.decode(z).sample, "latents", latents),
    "PSVAE.decode_features": (tiny_psvae, lambda model, z: model.decode_features(z), "latents", latents),
    "PixelDecoder": (tiny_decoder, lambda model, z: model(z), "latents", latents),
    "ViTPixelDecoder": (lambda: build(ViTPixelDecoder, VIT_DECODER), lambda model, z: model(z), "latents", latents),
    "SemanticVAE.encode": (tiny_vae, lambda model, f: model.encode(f).mean, "features", features),
    "SemanticVAE.decode": (tiny_vae, lambda model, z: model.decode(z), "latents", latents),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("make_model", "call", "what", "make"), HALVES.values(), ids=HALVES.keys())
def test_half_precision_for_float32_weights(
    make_model: Any, call: Any, what: str, make: Any, dtype: torch.dtype
) -> None:
    """Refused with both remedies, which both work; autocast is the third."""
    message = (
        rf"^{what} have dtype {dtype} and the weights torch\.float32; .*\.to\({dtype}\), or the {what} with \.float"
    )
    model, half = make_model(), make().to(dtype)
    for refused in (half, half.to("meta")):
        with pytest.raises(DtypeError, match=message):
            call(model.to(refused.device), refused)
    model = make_model()
    assert call(model, half.float()).dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert call(model, half).isfinite().all()
    assert call(model.to(dtype), half).dtype == dtype


def test_weights_that_hooks_cast_as_they_are_called_are_no_mistake() -> None:
    """diffusers' layerwise casting keeps weights in a small type and computes in a larger one."""
    decoder, seen = tiny_decoder().bfloat16(), []
    for layer in (layer for layer in decoder.modules() if not list(layer.children())):
        layer.register_forward_pre_hook(lambda layer, _: layer.float() and None)
        layer.register_forward_hook(lambda layer, *_: seen.append(layer.bfloat16()) and None)
    assert decoder(latents()).dtype == torch.float32
    assert seen


@pytest.mark.compile
@torch.no_grad()
@pytest.mark.parametrize("name", ["PixelDecoder", "ViTPixelDecoder", "SemanticVAE.decode"])
def test_autocast_in_one_compiled_graph(name: str) -> None:
    make_model, call, _, make = HALVES[name]
    model, half = make_model(), make().bfloat16()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: call(model, x), fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(half), call(model, half))


def test_latents_of_another_grid_than_the_statistics() -> None:
    model = tiny_psvae(statistics_grid=(4, 4))
    for call in (lambda: model.encode(images(1, 32, 48)), lambda: model.decode(latents(1, 4, 6))):
        with pytest.raises(
            ShapeError, match=r"grid \(4, 6\); the statistics are per element at \(4, 4\): use images of"
        ):
            call()


def test_a_wrong_number_of_generators() -> None:
    with pytest.raises(ShapeError, match="1 generators came for a batch of 2; wanted one per item"):
        tiny_psvae()(images(), sample_posterior=True, generator=[torch.Generator()])


# Configurations that only show when a module is built, or that do not fit together


def vit(**changes: Any) -> dict[str, Any]:
    return {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **changes}


BAD_CONFIGS: dict[str, tuple[Callable[[], Any], str]] = {
    "norm_eps": (
        lambda: tiny_decoder_config(norm_eps=-1e-6),
        r"PixelDecoderConfig\.norm_eps is -1e-06; wanted a positive",
    ),
    "norm_eps NaN": (
        lambda: tiny_vae_config(norm_eps=float("nan")),
        r"SemanticVAEConfig\.norm_eps is nan; wanted a finite number",
    ),
    "initial_logvar": (lambda: tiny_vae_config(initial_logvar=50.0), r"initial_logvar is 50\.0; wanted -30 to 20"),
    "sample_size": (
        lambda: tiny_psvae_config(sample_size=0),
        r"PSVAEConfig\.sample_size is 0; wanted a multiple of the str",
    ),
    "statistics_grid": (
        lambda: tiny_psvae_config(statistics_grid=(4, 0)),
        r"statistics_grid is \(4, 0\); wanted None or",
    ),
    "stride": (
        lambda: tiny_psvae_config(encoder=tiny_encoder_config(stride=14)),
        "encoder has stride 14 and the decoder 8",
    ),
    "mean not finite": (
        lambda: tiny_encoder_config(mean=(math.nan, 0, 0)),
        r"mean\[0\] is nan; wanted a finite number",
    ),
    "model_args not JSON": (lambda: tiny_encoder_config(model_args={"norm_layer": dict}), "cannot be saved as JSON"),
    "norm that is no LayerNorm": (
        lambda: tiny_encoder(model_args={"global_pool": "avg"}),
        r"final_norm is 'plain'; 'vit_tiny.* ends in Identity.*wanted 'none'",
    ),
    "positions of a rotary model": (
        lambda: SemanticEncoder(SemanticEncoderConfig("eva02_tiny_patch14_224", position_antialias=False)),
        "no learned position table",
    ),
    "layer": (lambda: tiny_encoder(layer=2), r"SemanticEncoderConfig\.layer is 2; wanted -2 to 1 for 'vit_tiny"),
    "misspelt name": (
        lambda: tiny_encoder(name="vit_base_patch14_reg5_dinov2", model_args={}),
        "has no model 'vit_base_patch14_reg5_dinov2'; nearest: vit_base_patch14_reg4_dinov2",
    ),
    "not a ViT": (
        lambda: tiny_encoder(name="swin_tiny_patch4_window7_224", model_args={}),
        "'swin_tiny_patch4_window7_224' is a SwinTransformer; wanted a Vision Transformer",
    ),
    "a convolutional network": (
        lambda: tiny_encoder(name="resnet18", model_args={}),
        r"timm refused model_args \{\} for 'r",
    ),
    "misspelt argument": (
        lambda: tiny_encoder(model_args=vit(embed_dimm=8)),
        "timm refused model_args .* unexpected keyword",
    ),
    "number of heads": (
        lambda: tiny_encoder(model_args=vit(num_heads=5)),
        "timm refused .*'num_heads': 5.* divisible by",
    ),
    "negative width": (
        lambda: tiny_encoder(model_args=vit(embed_dim=-48)),
        "timm refused model_args .* negative dimension",
    ),
    "no patch": (lambda: tiny_encoder(model_args=vit(patch_size=0)), "timm refused model_args .*'patch_size': 0"),
    "another feature width": (
        lambda: tiny_psvae(encoder=tiny_encoder_config(model_args=vit(embed_dim=96))),
        r"'vit_tiny_patch16_224' has features of width 96; vae\.feature_dim is 48",
    ),
    "another feature width without a SemanticVAE": (
        lambda: tiny_psvae("rae", encoder=tiny_encoder_config(model_args=vit(embed_dim=96))),
        r"has features of width 96; decoder\.latent_channels is 48",
    ),
    "too few blocks to copy": (
        lambda: PSVAE.from_encoder(
            tiny_encoder(), tiny_psvae_config(vae=tiny_vae_config(depth=3, block_init="encoder"))
        ),
        r"the encoder has 2 blocks; SemanticVAEConfig\.depth is 3",
    ),
    "blocks of another kind to copy": (
        lambda: PSVAE.from_encoder(tiny_encoder(), tiny_psvae_config(vae=tiny_vae_config(block_init="encoder"))),
        "does not fit a SemanticVAE block; match feature_dim, mlp_dim and layer_scale, or use block_init='fresh'",
    ),
    "tile size": (
        lambda: tiny_psvae().enable_tiling(100, 32),
        "tiling asks for 100 pixels; wanted a multiple of the stride 8, nearest 96",
    ),
    "negative tile": (
        lambda: tiny_psvae().enable_tiling(-32),
        "tiling asks for -32 pixels; .* of the stride 8, nearest 8",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize(("build", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_configurations(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.bad_input
def test_a_misspelt_field_in_python() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'latent_chanels'"):
        tiny_vae_config(latent_chanels=8)
    with pytest.raises(ConfigError, match="SemanticEncoderConfig has no field 'strid'; did you mean 'stride'"):
        SemanticEncoder.from_timm("vit_tiny_patch16_224", pretrained=False, strid=8)


def test_every_error_is_a_psvae_error_and_the_built_in_one() -> None:
    with pytest.raises(PSVAEError):
        tiny_encoder()(images(1, 36, 32))
    with pytest.raises(ValueError, match="wanted multiples"):
        tiny_encoder()(images(1, 36, 32))
    assert issubclass(DtypeError, TypeError)
    assert issubclass(MissingDependencyError, ImportError)


def test_a_refused_input_leaves_the_model_as_it_was() -> None:
    model = tiny_psvae().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ShapeError):
        model(images(1, 36, 32))
    with pytest.raises(ShapeError):
        fit_latent_statistics(model, [images(), images(1, 36, 32)])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


# torch without a working torchvision

BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
ABSENT = "raise ModuleNotFoundError(\"No module named 'torchvision'\")\n"

WITHOUT_TORCHVISION = """
import json, sys, warnings
warnings.simplefilter("error")
import psvae
from psvae import PSVAE, PixelDecoder, SemanticEncoder, SemanticEncoderConfig
from tests.tiny import tiny_decoder, tiny_psvae_config, tiny_vae
results = {"timm": "timm" in sys.modules}
tiny_decoder().save_pretrained(sys.argv[1])
tiny_vae()
results["others work"] = isinstance(PixelDecoder.from_pretrained(sys.argv[1]), PixelDecoder)
for name, build in {
    "SemanticEncoder": lambda: SemanticEncoder(SemanticEncoderConfig()),
    "from_timm": lambda: SemanticEncoder.from_timm("vit_tiny_patch16_224"),
    "PSVAE": lambda: PSVAE(tiny_psvae_config()),
    "again": lambda: PSVAE(tiny_psvae_config()),
}.items():
    try:
        build()
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""


@pytest.mark.parametrize(
    ("stub", "cause"), [(BROKEN, "RuntimeError: operator"), (ABSENT, "ModuleNotFoundError: No mod")]
)
def test_torch_without_a_working_torchvision(tmp_path: Path, stub: str, cause: str) -> None:
    """A torchvision for another torch fails at import. All that needs no encoder works; encoders name the remedy."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(stub)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", WITHOUT_TORCHVISION, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results.pop("timm") is False, "importing psvae loads no timm"
    assert results.pop("others work")
    assert set(results) == {"SemanticEncoder", "from_timm", "PSVAE", "again"}
    for message in results.values():
        assert message.startswith(f"MissingDependencyError: timm builds the encoder and could not be imported ({cause}")
        assert "It needs a torchvision that matches torch" in message
        assert "pip install --upgrade torch torchvision timm" in message
