"""Configurations: strict, immutable, the same after a trip through JSON."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from psvae import PixelDecoderConfig, PSVAEConfig, SemanticEncoderConfig, SemanticVAEConfig
from psvae.config import Config
from psvae.errors import ConfigError, PSVAEError
from tests.tiny import PSVAE_VARIANTS, tiny_decoder_config, tiny_encoder_config, tiny_psvae_config, tiny_vae_config

CONFIGS = [
    SemanticEncoderConfig(),
    SemanticVAEConfig(),
    PixelDecoderConfig(),
    PSVAEConfig(),
    PixelDecoderConfig.small(),
    PSVAEConfig.dinov2_base(32),
    PSVAEConfig.siglip2_so400m(),
    PSVAEConfig(statistics_grid=(16, 16)),
    *(variant() for variant in PSVAE_VARIANTS.values()),
]


@dataclass(frozen=True)
class Inner(Config):
    width: int = 1

    def validate(self) -> None:
        self.require(self.width >= 1, "width", "at least 1")


@dataclass(frozen=True)
class Outer(Config):
    """A field of every kind that configurations use."""

    count: int = 1
    rate: float = 1.0
    name: str = "a"
    flag: bool = False
    choice: Literal["x", "y"] = "x"
    pair: tuple[int, int] | None = None
    many: tuple[int, ...] = (1,)
    arguments: dict[str, Any] = field(default_factory=dict)
    inner: Inner | None = field(default_factory=Inner)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_json_round_trip(config):
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_frozen(config):
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.new_field = 1


def test_defaults_are_the_papers():
    """Section 4.1: DINOv2-B, stride 16, three blocks each side, 96 channels, LDM's f16 decoder."""
    assert PSVAEConfig() == PSVAEConfig.dinov2_base(96)
    assert PSVAEConfig().encoder.stride == PSVAEConfig().decoder.stride == 16
    assert (PSVAEConfig().latent_channels, SemanticVAEConfig().depth) == (96, 3)


def test_lists_become_tuples_and_integers_floats():
    config = Outer.from_dict({"pair": [1, 2], "many": [3, 4, 5], "rate": 2, "arguments": {"size": [7, 8]}})
    assert (config.pair, config.many, config.rate) == ((1, 2), (3, 4, 5), 2.0)
    assert type(config.rate) is float
    assert config.arguments == {"size": (7, 8)}
    assert Outer.from_dict({"inner": {"width": 5}}).inner == Inner(5)
    assert Outer.from_dict({"inner": None}).inner is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": "1"}, "Outer.count is '1'; wanted int"),
        ({"count": 1.5}, "Outer.count is 1.5; wanted int"),
        ({"count": True}, "Outer.count is True; wanted int"),
        ({"count": None}, "Outer.count is None; wanted int"),
        ({"rate": "fast"}, "Outer.rate is 'fast'; wanted float"),
        ({"rate": False}, "Outer.rate is False; wanted float"),
        ({"name": 3}, "Outer.name is 3; wanted str"),
        ({"flag": 1}, "Outer.flag is 1; wanted bool"),
        ({"choice": "z"}, r"Outer.choice is 'z'; wanted Literal\['x', 'y'\]"),
        ({"pair": (1,)}, r"Outer.pair is \(1,\); wanted tuple\[int, int\] | None"),
        ({"pair": (1, "2")}, "Outer.pair is"),
        ({"many": 3}, "Outer.many is 3; wanted tuple"),
        ({"many": (1, "2")}, r"Outer.many\[1\] is '2'; wanted int"),
        ({"arguments": [1]}, r"Outer.arguments is \[1\]; wanted dict"),
        ({"inner": 3}, "Outer.inner is 3; wanted"),
        ({"inner": {"width": 0}}, "Inner.width is 0; wanted at least 1"),
        ({"inner": {"widht": 1}}, "Inner has no field 'widht'; did you mean 'width'"),
    ],
)
def test_wrong_types_raise(fields, message):
    with pytest.raises(ConfigError, match=message):
        Outer(**fields)


def test_unknown_fields_name_the_nearest():
    with pytest.raises(
        ConfigError, match=r"SemanticVAEConfig has no field 'latent_chanels'; did you mean 'latent_channels'\?"
    ):
        SemanticVAEConfig.from_dict({"latent_chanels": 8})
    with pytest.raises(ConfigError, match="Inner has no field 'zzz'; valid fields: width"):
        Inner.from_dict({"zzz": 8})
    with pytest.raises(ConfigError, match=r"SemanticVAEConfig has no field 'dept'; did you mean 'depth'\?"):
        PSVAEConfig.from_dict({"vae": {"dept": 3}})


def test_replace_checks_like_a_new_one():
    config = tiny_vae_config()
    assert config.replace(depth=2).depth == 2
    assert config.depth == 1
    with pytest.raises(ConfigError, match="num_heads is 5; wanted a divisor of feature_dim 48"):
        config.replace(num_heads=5)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (tiny_encoder_config, {"name": ""}, "name is ''; wanted a timm model name"),
        (tiny_encoder_config, {"stride": 0}, "stride is 0; wanted at least 1"),
        (tiny_encoder_config, {"std": (0.2, 0.0, 0.2)}, "std is .* wanted three positive numbers"),
        (tiny_vae_config, {"feature_dim": 0}, "feature_dim is 0; wanted at least 1"),
        (tiny_vae_config, {"latent_channels": 0}, "latent_channels is 0; wanted at least 1"),
        (tiny_vae_config, {"depth": -1}, "depth is -1; wanted 0 or more"),
        (tiny_vae_config, {"projection_dim": 0}, "projection_dim is 0; wanted None or at least 1"),
        (tiny_decoder_config, {"channel_multipliers": ()}, "channel_multipliers is .* wanted one or more"),
        (tiny_decoder_config, {"channel_multipliers": (1, 0)}, "channel_multipliers is .* wanted one or more"),
        (tiny_decoder_config, {"attention_levels": 5}, "attention_levels is 5; wanted 0 to 4"),
        (tiny_decoder_config, {"norm_groups": 5}, "norm_groups is 5; wanted a divisor of every level's width"),
        (tiny_decoder_config, {"num_res_blocks": 0}, "num_res_blocks is 0; wanted at least 1"),
        (tiny_psvae_config, {"encoder": tiny_encoder_config(stride=16)}, "encoder has stride 16 and the decoder 8"),
        (
            tiny_psvae_config,
            {"decoder": tiny_decoder_config(latent_channels=4)},
            "takes 4 channels and reads latents of 8",
        ),
        (tiny_psvae_config, {"decoder_reads": "features"}, "takes 8 channels and reads features of 48"),
        (
            tiny_psvae_config,
            {"vae": None, "decoder_reads": "features"},
            "wanted 'latents' where there is no SemanticVAE",
        ),
        (tiny_psvae_config, {"sample_size": 30}, "sample_size is 30; wanted a multiple of the stride 8"),
    ],
)
def test_out_of_range_fields_raise(make, fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(**fields)
    assert isinstance(caught.value, PSVAEError)
    assert isinstance(caught.value, ValueError)
