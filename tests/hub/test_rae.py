"""RAE whole: from its repository's files, and from diffusers' AutoencoderRAE folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from psvae import PSVAE, SemanticEncoder
from psvae.errors import CheckpointError, ConfigError, PSVAEError
from tests.base import assert_close, assert_same_state
from tests.hub.server import commit_of
from tests.hub.test_hub import fill_cache
from tests.hub.test_keymaps_rae import original_names
from tests.tiny import FEATURE_DIM, fill_weights, images, tiny_encoder

diffusers = pytest.importorskip("diffusers", reason="comes with psvae[dev]")
rae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae", reason="comes with psvae[dev]")
transformers = pytest.importorskip("transformers", reason="comes with psvae[dev]")

from tests.encoders import foreign  # noqa: E402  (imports transformers)

WEIGHTS = "diffusion_pytorch_model.safetensors"


def autoencoder_rae(kind, grid=16, **fields):
    """Tiny; the decoder's grid as the encoder's."""
    patch = {"dinov2": 14, "mae": 16}[kind]
    model = diffusers.AutoencoderRAE(
        encoder_type=kind, encoder_hidden_size=64, encoder_patch_size=patch, encoder_num_hidden_layers=2,
        decoder_hidden_size=48, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
        decoder_intermediate_size=64, patch_size=16, encoder_input_size=grid * patch, image_size=grid * 16, **fields,
    )  # fmt: skip
    return fill_weights(model).eval()


STATISTICS = {"latents_mean": torch.randn(64, 16, 16).tolist(), "latents_std": (torch.rand(64, 16, 16) + 0.5).tolist()}


@torch.no_grad()
def assert_equals_diffusers(model, reference):
    x = images(2, reference.config.image_size, reference.config.image_size)
    wanted = reference.encode((x + 1) / 2).latent  # diffusers reads [0, 1]
    got = model.encode(x).latent_dist.mode()
    assert wanted.std() > 0.1
    assert_close([got], [wanted], tolerance=1e-4)
    assert_close([model.decode(wanted).sample], [reference.decode(wanted).sample * 2 - 1], tolerance=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' use of transformers
@pytest.mark.parametrize("fields", [{}, STATISTICS], ids=["plain", "statistics"])
@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_autoencoder_rae(tmp_path, kind, fields):
    reference = autoencoder_rae(kind, noise_tau=0.8, **fields)
    reference.save_pretrained(tmp_path)
    model = PSVAE.from_pretrained(tmp_path)
    assert model.config.latent_noise == 0.8
    assert model.config.statistics_grid == ((16, 16) if fields else None)
    assert_equals_diffusers(model, reference)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("grid", [8, 14, 32])
def test_any_grid_has_diffusers_positions(tmp_path, grid):
    """diffusers rescales the coordinates of its table to a grid of 16; RAE's own files hold integers' table."""
    reference = autoencoder_rae("dinov2", grid)
    reference.save_pretrained(tmp_path)
    model = PSVAE.from_pretrained(tmp_path)
    assert_close([model.decoder.positions], [reference.decoder.decoder_pos_embed])
    assert_equals_diffusers(model, reference)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_whichever_transformers_wrote_it(tmp_path):
    """The attention of DINOv2 had other names before 5.18, and diffusers loads such files with random weights."""
    reference = autoencoder_rae("dinov2")
    reference.save_pretrained(tmp_path)
    old = {}
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        if key.startswith("encoder.encoder"):
            for now, then in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"),
                              ("o_proj", "output.dense")):  # fmt: skip
                key = key.replace(f"attention.{now}.", f"attention.{then}.")
        old[key] = tensor
    assert old.keys() != load_file(tmp_path / WEIGHTS).keys()
    save_file(old, tmp_path / WEIGHTS)
    assert_equals_diffusers(PSVAE.from_pretrained(tmp_path), reference)
    del old["encoder.encoder.layer.1.mlp.fc1.bias"]
    save_file(old, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 missing: encoder.encoder.layer.1.mlp.fc1.bias"):
        PSVAE.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_mae_that_an_older_transformers_wrote(tmp_path):
    reference = autoencoder_rae("mae")
    reference.save_pretrained(tmp_path)
    names = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
             "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
    old = {}
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        if key.startswith("encoder.layers."):
            key = key.replace("encoder.layers.", "encoder.encoder.layer.")
            for now, then in names.items():
                key = key.replace(f".{now}.", f".{then}.")
        old[key] = tensor
    assert old.keys() != load_file(tmp_path / WEIGHTS).keys()
    save_file(old, tmp_path / WEIGHTS)
    assert_equals_diffusers(PSVAE.from_pretrained(tmp_path), reference)


def siglip_rae(folder, prefix, **fields):
    """AutoencoderRAE of SigLIP 2 as a folder, put together of its parts, and its encoder: diffusers 0.42 cannot build
    one beside transformers 5.23."""
    vision = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 96}
    encoder = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision, image_size=64, patch_size=16))
    decoder = rae.RAEDecoder(
        hidden_size=64, decoder_hidden_size=48, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
        decoder_intermediate_size=64, num_patches=16, patch_size=16, image_size=64,
    )  # fmt: skip
    state = {f"decoder.{key}": x for key, x in fill_weights(decoder).state_dict().items()}
    for key, tensor in foreign.fill(encoder).state_dict().items():
        if not key.removeprefix("vision_model.").startswith("post_layernorm."):
            state[f"encoder.{prefix}{key.removeprefix('vision_model.')}"] = tensor
    state |= {"encoder_mean": torch.full((1, 3, 1, 1), 0.5), "encoder_std": torch.full((1, 3, 1, 1), 0.5)}
    state |= {"_latents_mean": torch.zeros(1), "_latents_std": torch.ones(1)}
    config = {"_class_name": "AutoencoderRAE", "encoder_type": "siglip2", "encoder_patch_size": 16, "patch_size": 16,
              "encoder_input_size": 64, "decoder_num_attention_heads": 4, "encoder_norm_mean": [0.5] * 3,
              "encoder_norm_std": [0.5] * 3}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    save_file(state, folder / WEIGHTS)
    return encoder


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "vision_model."], ids=["since 5.6", "before"])
def test_siglip_encoders(tmp_path, prefix):
    encoder = siglip_rae(tmp_path, prefix)
    model = PSVAE.from_pretrained(tmp_path)
    assert model.config.encoder.mean == (0.5, 0.5, 0.5)
    x = images(2, 64, 64)
    states = encoder(x, output_hidden_states=True).hidden_states[-1]  # before the final norm
    wanted = torch.nn.functional.layer_norm(states, (64,), eps=1e-6).mT.unflatten(2, (4, 4)) / (1 + 1e-5)
    assert wanted.std() > 0.1
    assert_close([model.encode(x).latent_dist.mode()], [wanted], tolerance=2e-5)


def test_colours_that_the_file_leaves_out_are_diffusers_own(tmp_path):
    """It takes ImageNet's for every encoder, SigLIP too."""
    siglip_rae(tmp_path, "", encoder_norm_mean=None, encoder_norm_std=None)
    config = PSVAE.from_pretrained(tmp_path).config
    assert config.encoder.mean == config.decoder.output_mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_type": ["siglip2"]}, r"encoder_type \['siglip2'\]; wanted dinov2, siglip2, mae"),
        ({"encoder_input_size": 16 * 10**6}, "encoder_input_size 16000000 .* up to 512 patches"),
        ({"encoder_input_size": 70}, "encoder_input_size 70 and encoder_patch_size 16; wanted a multiple"),
        ({"encoder_input_size": True}, "encoder_input_size True; wanted a positive int"),
        ({"patch_size": 8}, "encoder has stride 8 and the decoder 16"),
        ({"scaling_factor": 2}, "scaling_factor 2; wanted 1"),
        ({"encoder_type": "mae"}, "position_embeddings is missing"),
        ({"decoder_num_attention_heads": 5}, "multiple of 4 and of num_heads 5"),
    ],
)
def test_a_faulty_autoencoder_rae(tmp_path, fields, message):
    siglip_rae(tmp_path, "", **fields)
    with pytest.raises(PSVAEError, match=message):
        PSVAE.from_pretrained(tmp_path)


# The repository's own files


@pytest.fixture
def collection(tmp_path):
    """Files laid out as RAE's, for an encoder of 4 x 4 tokens."""
    decoder = fill_weights(
        rae.RAEDecoder(
            hidden_size=FEATURE_DIM, decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=3,
            decoder_intermediate_size=40, num_patches=16, patch_size=8, image_size=32,
        )
    )  # fmt: skip
    (tmp_path / "decoders").mkdir()
    torch.save({"model": original_names(decoder)}, tmp_path / "decoders/model.pt")
    for name, shape in (("stat", (4, 4)), ("other", (2, 2))):
        generator = torch.Generator().manual_seed(0)
        torch.save({"mean": None, "var": torch.rand(FEATURE_DIM, *shape, generator=generator)}, tmp_path / f"{name}.pt")
    return tmp_path, decoder.eval()


FILES = {"decoder": "decoders/model.pt", "statistics": "stat.pt", "num_heads": 3}


@torch.no_grad()
def test_original_layout(collection):
    folder, decoder = collection
    encoder = fill_weights(tiny_encoder())
    model = PSVAE.from_rae(folder, encoder=encoder, allow_pickle=True, latent_noise=0.8, **FILES)
    assert (model.config.latent_noise, model.config.statistics_grid, model.config.vae) == (0.8, (4, 4), None)
    x = images()
    features = encoder(x)
    std = (torch.load(folder / "stat.pt", weights_only=True)["var"] + 1e-5).sqrt()
    latents = model.encode(x).latent_dist.mode()
    assert_close([latents], [features / std])
    tokens = features.flatten(2).mT
    wanted = decoder.unpatchify(decoder(tokens, drop_cls_token=False).logits)
    mean, spread = (torch.tensor(v).view(3, 1, 1) for v in (encoder.config.mean, encoder.config.std))
    assert_close([model.decode(latents).sample], [(wanted * spread + mean) * 2 - 1], tolerance=1e-4)


def test_original_layout_from_the_hub(collection, tmp_path_factory):
    folder, _ = collection
    cache = tmp_path_factory.mktemp("cache")
    fill_cache(cache, "org/rae", commit_of(1), folder)
    encoder = tiny_encoder()
    wanted = PSVAE.from_rae(folder, encoder=encoder, allow_pickle=True, **FILES)
    got = PSVAE.from_rae("org/rae", encoder=encoder, allow_pickle=True, cache_dir=cache, local_files_only=True, **FILES)
    assert_same_state(got, wanted)


def test_it_saves_and_loads_as_our_own(collection, tmp_path):
    folder, _ = collection
    model = PSVAE.from_rae(folder, encoder=tiny_encoder(), allow_pickle=True, **FILES)
    model.save_pretrained(tmp_path / "own")
    again = PSVAE.from_pretrained(tmp_path / "own")
    assert again.config == model.config
    with torch.no_grad():
        assert_close([again(images()).sample], [model(images()).sample])


def test_faults(collection):
    folder, _ = collection
    encoder = tiny_encoder()
    with pytest.raises(CheckpointError, match="is a pickle"):
        PSVAE.from_rae(folder, encoder=encoder, **FILES)
    with pytest.raises(CheckpointError, match=r"has no file 'no\.pt'"):
        PSVAE.from_rae(folder, encoder=encoder, allow_pickle=True, **{**FILES, "decoder": "no.pt"})
    with pytest.raises(ConfigError, match=r"statistics are of grid \(2, 2\), the decoder of \(4, 4\)"):
        PSVAE.from_rae(folder, encoder=encoder, allow_pickle=True, **{**FILES, "statistics": "other.pt"})
    narrow = SemanticEncoder(encoder.config.replace(model_args={**encoder.config.model_args, "embed_dim": 24}))
    with pytest.raises(ConfigError, match=r"features of width 24; decoder.latent_channels is 48"):
        PSVAE.from_rae(folder, encoder=narrow, allow_pickle=True, **FILES)
