"""A small world for the generator's examples: pictures with words, a VAE, a language model with its tokenizer.

The scripts run in this process wherever that shows the same as a process of their own, which costs seconds of imports.
"""

import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from psvae import DeepFusionDiT, DeepFusionDiTConfig
from tests.tiny import LATENT_CHANNELS, build, fill_weights, tiny_pixel_vae, tiny_psvae

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
SIZE = 32
VOCABULARY = 300
CAPTIONS = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("dog", "cat", "tree")][:8]
HEAD = {"head_width": 64, "head_num_heads": 2, "head_intermediate_size": 96}


def script(name):
    """A module of the examples, which import each other by their bare names."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def fresh_accelerator():
    """Forget the precision and the accumulation of the run before, as a new process would."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def command(name, *arguments, processes=1):
    """How a user starts a script, on one process or on several."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launch if processes > 1 else []), str(EXAMPLES / f"{name}.py"), *map(str, arguments)]


def environment():
    return os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip


def run(arguments):
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def png(seed, height=SIZE, width=SIZE):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def make_vae(folder):
    fill_weights(tiny_psvae()).save_pretrained(folder)


def make_release(folder, measured):
    """A VAE as ReaLS' authors publish theirs, constant and all, and with the same statistics as psvae keeps them."""
    vae = fill_weights(tiny_pixel_vae())
    vae.export_diffusers(folder)
    (folder / "mean_std.json").write_text('{"mean": 0.5, "std": 2.0}')
    vae.config = vae.config.replace(scaling_factor=1.0)
    vae.latent_spec.mean.fill_(0.5)
    vae.latent_spec.std.fill_(2.0)
    vae.save_pretrained(measured)


def make_language_model(folder):
    """A Qwen2 of two layers and a tokenizer of its kind, as transformers saves them."""
    import transformers

    from tests.generators.foreign import language_model

    language_model(transformers.Qwen2Config, vocab_size=VOCABULARY).save_pretrained(folder)
    make_tokenizer(folder)


def make_tokenizer(folder):
    """Bytes, and the words of the captions."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(CAPTIONS, VOCABULARY - 1, min_frequency=1, show_progress=False)
    content = json.loads(learnt.to_str())["model"]
    merges = [tuple(merge) for merge in content["merges"]]
    vocabulary = {**content["vocab"], "<|endoftext|>": VOCABULARY - 1}
    transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)


def tiny_generator(**fields):
    """With weights that say something: a fresh one returns zero."""
    shape = {
        "in_channels": LATENT_CHANNELS, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "attention_head_dim": 12, "intermediate_size": 80, "vocab_size": VOCABULARY,
    }  # fmt: skip
    return fill_weights(build(DeepFusionDiT, DeepFusionDiTConfig(**{**shape, **HEAD, **fields})))


def make_table(file, **columns):
    """Parquet: bytes are pictures, or None among them; the rest is as it comes."""
    import datasets

    pictures = [name for name, values in columns.items() if isinstance(values[0], bytes)]
    rows = {
        name: [value and {"bytes": value, "path": None} for value in values] if name in pictures else values
        for name, values in columns.items()
    }
    table = datasets.Dataset.from_dict(rows)
    for name in pictures:
        table = table.cast_column(name, datasets.Image())
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(file)


def make_triples(file):
    """Parquet, 7 rows with columns image, source, text and captions, a list."""
    make_table(
        file,
        image=[png(row, SIZE + row, SIZE + 9) for row in range(7)],
        source=[png(100 + row, SIZE + row, SIZE + 9) for row in range(7)],
        text=CAPTIONS[:7],
        captions=[[caption, "something else"] for caption in CAPTIONS[:7]],
    )


def make_picture_folder(folder):
    """Pictures beside a metadata.jsonl, as `datasets` reads them."""
    folder.mkdir(parents=True)
    lines = []
    for row, caption in enumerate(CAPTIONS):
        (folder / f"{row}.png").write_bytes(png(row))
        lines.append(json.dumps({"file_name": f"{row}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def make_shards(folder, shards):
    """Webdataset shards as img2dataset writes them, with a source picture beside each."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row in range(shard, len(CAPTIONS), shards):
                contents = {
                    "jpg": png(row), "source.jpg": png(100 + row), "txt": CAPTIONS[row].encode(),
                    "json": json.dumps({"caption": CAPTIONS[row]}).encode(),
                }  # fmt: skip
                for ending, content in contents.items():
                    record = tarfile.TarInfo(f"{row:04d}.{ending}")
                    record.size = len(content)
                    tar.addfile(record, io.BytesIO(content))
