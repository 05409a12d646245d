"""PixelVAE against diffusers' AutoencoderKL on the same weights, and the memory that loading takes.

    python benchmarks/dropin.py                # about ten minutes on two CPU cores
    python benchmarks/dropin.py --compiled     # also under torch.compile

Every row is the median of ratios inside one run, the two taken in turn; below 1 is in our favour.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from psvae import PixelVAE, PixelVAEConfig


def ratio(ours, theirs, argument, repeats):
    """Median of our time over theirs, after one call of each to warm up."""
    found = []
    with torch.no_grad():
        ours(argument), theirs(argument)
        for _ in range(repeats):
            times = []
            for call in (ours, theirs):
                start = time.perf_counter()
                call(argument)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            found.append(times[0] / times[1])
    return statistics.median(found)


def speed(options, device):
    """One row per direction, size, dtype and mode."""
    torch.manual_seed(0)
    config = PixelVAEConfig()
    with tempfile.TemporaryDirectory() as folder:
        ours = PixelVAE(config).eval()
        ours.export_diffusers(folder)
        theirs = AutoencoderKL.from_pretrained(folder)
    print(f"{'what':<44}{'ratio':>8}{'wanted':>8}")
    for dtype, wanted in ((torch.float32, 1.0), (torch.bfloat16, 0.5)):
        ours, theirs = ours.to(device, dtype), theirs.to(device, dtype)
        for compiled in (False, True) if options.compiled else (False,):
            for size in options.sizes:
                images = torch.rand(1, 3, size, size, device=device, dtype=dtype) * 2 - 1
                latents = torch.randn(1, 4, size // 8, size // 8, device=device, dtype=dtype)
                for name, argument in (("encode", images), ("decode", latents)):
                    calls = [getattr(model, name) for model in (ours, theirs)]
                    calls = [torch.compile(call) for call in calls] if compiled else calls
                    row = f"{name} {size} px, {str(dtype).removeprefix('torch.')}{', compiled' if compiled else ''}"
                    print(f"{row:<44}{ratio(*calls, argument, options.repeats):>8.2f}{wanted:>8.2f}", flush=True)


# VmHWM and not ru_maxrss: the latter starts from the parent's, which wrote the file
PEAK = """
import json, sys, torch
from pathlib import Path
from psvae import PixelVAE, PixelVAEConfig
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak()
vae = PixelVAE.from_pretrained(sys.argv[1])
total = sum(tensor.sum().item() for tensor in vae.state_dict().values())  # touch every page
print(json.dumps(peak() - before))
"""


def memory():
    """Peak resident memory of loading a checkpoint of about 1 GB, over its size, in a fresh process. Linux."""
    config = PixelVAEConfig()
    wide = config.replace(
        encoder=config.encoder.replace(base_channels=224), decoder=config.decoder.replace(base_channels=224)
    )
    with tempfile.TemporaryDirectory() as folder, torch.device("cpu"):
        with torch.device("meta"):
            model = PixelVAE(wide)
        state = {key: torch.zeros(tensor.shape) for key, tensor in model.state_dict().items()}
        (Path(folder) / "config.json").write_text(json.dumps({"_class": "PixelVAE", **wide.to_dict()}))
        save_file(state, Path(folder) / "model.safetensors")
        size = (Path(folder) / "model.safetensors").stat().st_size
        del state
        done = subprocess.run([sys.executable, "-c", PEAK, folder], capture_output=True, text=True, check=True)
        peak = json.loads(done.stdout)
    print(f"{f'peak memory of loading {size / 1e9:.2f} GB':<44}{peak / size:>8.2f}{1.2:>8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("speed", "memory"))
    chosen = parser.parse_args()
    if chosen.only != "memory":
        speed(chosen, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.only != "speed":
        memory()
