"""One alphabet of axes, and the checks at the public boundary.

=======  ==========================================================
``B``    batch
``C``    image channels (3)
``H W``  pixels
``h w``  token grid, ``h = H / stride`` (``N = h·w`` tokens)
``D``    feature width of the encoder
``Z``    latent channels
``T``    text length
``L``    layers
``P``    keys that queries look at, such as a prefix
``kv``   heads of keys and values
``d``    width of a head
=======  ==========================================================

Images are in [-1, 1] at every public boundary. Annotations with these letters are enforced while the
tests run (``pytest --shapes``) and cost nothing otherwise.
"""

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from psvae.errors import DtypeError, RangeWarning, ShapeError

__all__ = ["Features", "Images", "Latents", "Tokens", "check_dtype", "check_images", "check_map", "readable"]

Images = Float[Tensor, "B C H W"]
Features = Float[Tensor, "B D h w"]
Latents = Float[Tensor, "B Z h w"]
Tokens = Float[Tensor, "B N D"]

_FAR_OUTSIDE = 1.5  # resampling overshoots [-1, 1] a little; ImageNet-normalised or 0..255 images overshoot a lot


def check_map(x: Tensor, channels: int, what: str) -> None:
    """Require a floating-point ``B {channels} h w`` tensor.

    Args:
        what: the tensor's name in the message, such as ``"latents"``.

    Raises:
        ShapeError: wrong rank, wrong channel count, or an empty axis.
        DtypeError: not a tensor, or an integer or boolean one.
    """
    if not isinstance(x, Tensor):
        raise DtypeError(
            f"{what} came as {type(x).__name__}; wanted one torch.Tensor of shape (B, {channels}, height, width)"
        )
    if x.ndim != 4:
        hint = "; add a batch axis with .unsqueeze(0)" if x.ndim == 3 else ""
        raise ShapeError(f"{what} have shape {tuple(x.shape)}; wanted 4 axes, (B, {channels}, height, width){hint}")
    if x.shape[1] != channels:
        last = x.shape[-1] == channels
        hint = "; channels come last here, use .permute(0, 3, 1, 2)" if last else ""
        raise ShapeError(f"{what} have {x.shape[1]} channels, shape {tuple(x.shape)}; wanted {channels}{hint}")
    if not x.is_floating_point():
        hint = "; bytes become images with x.float() / 127.5 - 1" if what == "images" else "; convert with .float()"
        raise DtypeError(f"{what} have dtype {x.dtype}; wanted floating point{hint}")
    if not torch.compiler.is_compiling() and 0 in x.shape:
        raise ShapeError(f"{what} have shape {tuple(x.shape)}; every axis must hold at least one element")


def readable(x: Tensor) -> bool:
    """Whether the values may be looked at: not while compiling, capturing a CUDA graph, or on the meta device."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def check_dtype(x: Tensor, reader: nn.Module, what: str) -> None:
    """Refuse half precision for float32 weights, unless autocast converts; and float64 for less, which it leaves alone.

    Any other mixture is left to PyTorch: layers may be quantised, or cast by hooks as they are called.

    Args:
        reader: the layer that takes ``x`` first.

    Raises:
        DtypeError: ``x`` is float16 or bfloat16 and the weights are float32, or ``x`` float64 and they are not.
    """
    half = (torch.float16, torch.bfloat16)
    weight, place = getattr(reader, "weight", None), x.device.type
    if x.dtype not in (*half, torch.float64) or not isinstance(weight, Tensor):
        return
    if x.dtype == torch.float64 and weight.dtype in (*half, torch.float32):
        raise DtypeError(
            f"{what} have dtype {x.dtype} and the weights {weight.dtype}; wanted one dtype: convert the {what} with "
            f".to({weight.dtype})"
        )
    cast = place != "meta" and torch.is_autocast_enabled(place)
    if x.dtype in half and weight.dtype == torch.float32 and not cast:
        raise DtypeError(
            f"{what} have dtype {x.dtype} and the weights {weight.dtype}; wanted one dtype: convert the model with "
            f".to({x.dtype}), or the {what} with .float(), or run under torch.autocast"
        )


def check_images(images: Tensor, stride: int, channels: int = 3) -> None:
    """Require ``B C H W`` images in [-1, 1] with H and W multiples of ``stride``.

    The values are read only in eager mode: a compiled or exported graph skips that check.

    Raises:
        ShapeError: wrong rank, channels or size, or NaN or infinity among the values.
        DtypeError: an integer tensor.

    Warns:
        RangeWarning: values far outside [-1, 1].
    """
    check_map(images, channels, "images")
    height, width = images.shape[-2:]
    if height % stride or width % stride:
        near = " x ".join(str(max(stride, round(side / stride) * stride)) for side in (height, width))
        raise ShapeError(
            f"images are {height} x {width}; wanted multiples of the stride {stride}, nearest {near}: "
            "resize, crop or pad first, nothing is resized silently"
        )
    if not readable(images):
        return
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()  # one transfer from the device
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ShapeError(
            "images hold NaN or infinity; wanted finite values in [-1, 1]: look at the step that made them"
        )
    if low < -_FAR_OUTSIDE or high > _FAR_OUTSIDE:
        warnings.warn(
            f"images span [{low:.3g}, {high:.3g}]; wanted [-1, 1]: pixels in 0..255 become x / 127.5 - 1, "
            "pixels in 0..1 become x * 2 - 1, and mean and std belong to the encoder, not to the caller",
            RangeWarning,
            stacklevel=3,
        )
