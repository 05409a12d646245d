"""RAE's decoder files, in its repository's names and in diffusers'."""

import json

import pytest
import torch
from safetensors.torch import save_file

from psvae import ViTPixelDecoder, ViTPixelDecoderConfig
from psvae.errors import CheckpointError, ConfigError
from psvae.hub.keymaps.rae import RAE_DECODER
from tests.base import assert_close, assert_same_state
from tests.tiny import fill_weights, latents

rae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae", reason="comes with psvae[dev]")


def reference(grid=4):
    return fill_weights(
        rae.RAEDecoder(
            hidden_size=8, decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
            decoder_intermediate_size=40, num_patches=grid**2, patch_size=8, image_size=8 * grid,
        )
    ).eval()  # fmt: skip


def original_names(model):
    """As RAE's own files: transformers' ViT-MAE names, and the position table among the weights."""
    state = {}
    for key, tensor in model.state_dict().items():
        for now, then in (("to_q", "attention.query"), ("to_k", "attention.key"), ("to_v", "attention.value"),
                          ("to_out.0", "output.dense")):  # fmt: skip
            key = key.replace(f"attention.{now}.", f"attention.{then}.")
        state[key] = tensor
    return state | {"decoder_pos_embed": model.decoder_pos_embed}


@torch.no_grad()
def assert_same_outputs(decoder, model):
    z = latents(2, 4, 4)
    wanted = model.unpatchify(model(z.flatten(2).mT, drop_cls_token=False).logits)
    assert wanted.std() > 0.1
    assert_close([decoder(z)], [wanted * 2 * 0.25 + 2 * 0.5 - 1])  # std 0.25, mean 0.5


OUTPUT = {"output_mean": (0.5,) * 3, "output_std": (0.25,) * 3, "num_heads": 3}


@pytest.mark.parametrize("prefix", ["", "module.", "decoder.", "module.decoder."])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "step": 3}])
def test_original_file(tmp_path, prefix, wrap):
    model = reference()
    model.decoder_pos_embed.mul_(0.5)  # a table of its own, which must be kept
    torch.save(wrap({prefix + key: x for key, x in original_names(model).items()}), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="is a pickle"):
        ViTPixelDecoder.from_pretrained(tmp_path / "model.pt", **OUTPUT)
    decoder = ViTPixelDecoder.from_pretrained(tmp_path / "model.pt", allow_pickle=True, **OUTPUT)
    assert decoder.config.grid == (4, 4)
    assert_same_outputs(decoder, model)


def test_file_without_a_table_gets_raes_own(tmp_path):
    model = reference()
    save_file(model.state_dict(), tmp_path / "decoder.safetensors")
    decoder = ViTPixelDecoder.from_pretrained(tmp_path / "decoder.safetensors", grid=(4, 4), **OUTPUT)
    model.decoder_pos_embed.copy_(decoder.positions)
    assert_same_outputs(decoder, model)
    assert_close([decoder.positions], [ViTPixelDecoder(decoder.config).positions])


def test_heads_of_an_unknown_width_must_be_said(tmp_path):
    save_file(original_names(reference()), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"num_heads is None; wanted int"):
        ViTPixelDecoder.from_pretrained(tmp_path)


def test_a_configuration_beside_the_decoder_says_the_heads(tmp_path):
    """As Scale-RAE's repositories have it."""
    save_file(original_names(reference()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"decoder_num_attention_heads": 3, "layer_norm_eps": 1e-12}))
    colours = {name: OUTPUT[name] for name in ("output_mean", "output_std")}
    assert_same_outputs(ViTPixelDecoder.from_pretrained(tmp_path, **colours), reference())


def test_the_moving_average_beside_the_weights_is_read(tmp_path, caplog):
    state = original_names(reference())
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": state, "ema": other, "step": 3}, tmp_path / "model.pt")
    read = ViTPixelDecoder.from_pretrained(tmp_path / "model.pt", allow_pickle=True, **OUTPUT)
    assert "holds 'ema' and 'model': 'ema' is read" in caplog.text
    assert read.norm.bias.equal(other["decoder_norm.bias"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda s: s.pop("decoder_norm.bias"), "1 missing: decoder_norm.bias"),
        (lambda s: s.update({"decoder_extra": torch.zeros(1)}), "1 unexpected: decoder_extra"),
        (lambda s: s.update({"trainable_cls_token": torch.zeros(1, 2, 24)}), r"trainable_cls_token is \(1, 2, 24\)"),
        (lambda s: s.pop("decoder_layers.0.intermediate.dense.weight"), "intermediate.dense.weight is missing"),
        (lambda s: s.update({"decoder_pos_embed": torch.zeros(1, 16, 24)}), r"decoder_pos_embed is \(1, 16, 24\)"),
    ],
)
def test_faults_in_the_words_of_the_file(tmp_path, fault, message):
    state = original_names(reference())
    fault(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        ViTPixelDecoder.from_pretrained(tmp_path, **OUTPUT)


@pytest.mark.parametrize("preset", ["base", "large", "xlarge"])
def test_the_map_is_one_to_one_and_the_layouts_are_raes(preset, tmp_path):
    config = getattr(ViTPixelDecoderConfig, preset)()
    with torch.device("meta"):
        state = ViTPixelDecoder(config).state_dict()
    rules = RAE_DECODER.rules(list(state), config.to_dict(), {})
    out = {}
    for key, tensor in state.items():
        out |= rules[key].save(rules[key].theirs, tensor)
    assert list(out) == RAE_DECODER.needed(rules)
    for key, rule in rules.items():
        assert rule.load(*(out[name] for name in rule.theirs)).shape == state[key].shape
    fields = RAE_DECODER.read_config(None, {name: tuple(tensor.shape) for name, tensor in out.items()})
    assert ViTPixelDecoderConfig.from_dict(fields) == config


def test_own_format_round_trip(tmp_path):
    save_file(original_names(reference()), tmp_path / "model.safetensors")
    decoder = ViTPixelDecoder.from_pretrained(tmp_path, **OUTPUT)
    decoder.save_pretrained(tmp_path / "own")
    assert_same_state(ViTPixelDecoder.from_pretrained(tmp_path / "own"), decoder)
