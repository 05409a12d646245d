"""The papers' own numbers."""

from reproduction.spaces import PS_VAE

PAPER: dict[str, dict[str, float]] = {  # Tables 4, 5 and 6; psnr, ssim, rFID, linear probe, GenEval
    "rae": {"psnr": 19.20, "ssim": 0.436, "rfid": 0.619, "probe": 83.0, "geneval": 71.3},
    "s-vae": {"psnr": 17.78, "ssim": 0.390, "rfid": 1.407, "probe": 81.1, "geneval": 73.7},
    PS_VAE: {"psnr": 28.79, "ssim": 0.817, "rfid": 0.203, "probe": 79.5, "geneval": 76.6},
    "rae-hd": {"psnr": 33.10, "ssim": 0.916, "rfid": 0.193, "geneval": 60.2},
    "p-vae": {"psnr": 29.81, "ssim": 0.850, "rfid": 0.398, "probe": 11.8, "geneval": 75.2},
    "mlp": {"psnr": 28.94, "ssim": 0.812, "rfid": 0.205, "probe": 44.5, "geneval": 70.3},
    "on-features": {"psnr": 29.64, "ssim": 0.840, "rfid": 0.193, "probe": 80.4, "geneval": 74.4},
    "plain": {"psnr": 26.18, "ssim": 0.715, "rfid": 0.534, "probe": 5.4, "geneval": 75.7},  # MAR-VAE
}
PAPER_REALS = {  # FID without guidance after 400 000 steps, in the plain SD-VAE's latents and in ReaLS'
    "DiT-B/2": (43.5, 35.27), "SiT-B/2": (33.0, 27.53), "SiT-L/2": (18.8, 16.39), "SiT-XL/2": (17.2, 14.24),
}  # fmt: skip
PAPER_SWEEP = {32: 24.53, 48: 25.43, 64: 26.65, 80: 27.38, 96: 28.79, 112: 30.51, 256: 30.30}  # Figure 11, PSNR
