"""Each bad input of the generator gets an error that says what came, what was wanted and what to do.

Weights are in ``test_weights.py``, of `psvae.flow` only guidance is here.
"""

import pytest
import torch
from transformers import DynamicCache

from psvae import DeepFusionDiT, DeepFusionDiTConfig, PrefixCache, flow
from psvae.errors import ConfigError, DtypeError, PSVAEError, ShapeError
from tests.generators.test_deep_fusion import TEXT_WIDTH, VOCABULARY, Z, sigmas, tiny_config, tiny_model, words
from tests.tiny import latents

pytestmark = pytest.mark.bad_input

SOURCES = latents(2, 2, 2)
MODELS = {
    "shared": {"max_source_images": 2},
    "mot": {"fusion": "mot"},
    "patch": {"patch_size": 2},
    "embeds": {"vocab_size": None},
    "hidden": {"fusion": "prefix", "vocab_size": None, "text_hidden_size": TEXT_WIDTH},
    "layers": {"fusion": "prefix", "vocab_size": None, "text_hidden_size": TEXT_WIDTH, "text_layers": 3},
    "cache": {"fusion": "prefix", "vocab_size": None},
}


def with_nan(x):
    x = x.clone()
    x.view(-1)[-1] = float("nan")
    return x


def states(*shape, width=TEXT_WIDTH):
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(1))


def empty(batch=2, **fields):
    return PrefixCache.empty(tiny_config(**fields), batch)


def cache():
    filled = DynamicCache()
    for layer in range(2):
        filled.update(torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 16), layer)
    return filled


def pairs():
    return tuple((torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 16)) for _ in range(2))


ADDED = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1e9, -1e9]])
ALONE = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
HALVES = torch.full((2, 5), 0.3)

# model, latents, σ, the error, its words
OF_THE_STEP = {
    "sigma above 1": ("shared", latents(), torch.tensor([0.1, 1.2]), ShapeError, r"span \[0.1, 1.2\]; wanted σ in"),
    "sigma below 0": ("shared", latents(), torch.tensor([-0.1, 0.5]), ShapeError, r"span \[-0.1, 0.5\]; wanted σ in"),
    "a diffusers timestep": ("shared", latents(), torch.tensor([20.0, 999.0]), ShapeError,
                             r"a timestep of 0 to 1000 is divided by 1000"),
    "a whole timestep": ("shared", latents(), torch.tensor([20, 999]), DtypeError, "timesteps came as torch.int64"),
    "sigma NaN": ("shared", latents(), torch.tensor([0.5, float("nan")]), ShapeError, r"timesteps span \[.*nan"),
    "sigma a number": ("shared", latents(), 0.5, DtypeError, r"timesteps came as float; wanted .*torch.full"),
    "one sigma": ("shared", latents(), torch.tensor([0.5]), ShapeError, r"timesteps have shape \(1,\); wanted"),
    "sigma 0-d": ("shared", latents(), torch.tensor(0.5), ShapeError, r"timesteps have shape \(\); wanted"),
    "patch": ("patch", latents(2, 4, 5), sigmas(), ShapeError, "latents are 4 x 5; wanted multiples of patch_size 2"),
    "channels": ("shared", latents(2, channels=Z + 1), sigmas(), ShapeError, "latents have 9 channels.*; wanted 8"),
    "no batch": ("shared", latents()[0], sigmas(), ShapeError, "wanted 4 axes.*unsqueeze"),
    "no tensor": ("shared", [latents()], sigmas(), DtypeError, "latents came as list; wanted one torch.Tensor"),
    "bytes": ("shared", latents().byte(), sigmas(), DtypeError, "latents have dtype torch.uint8; wanted floating"),
    "NaN": ("shared", with_nan(latents()), sigmas(), ShapeError, "latents hold NaN or infinity; wanted finite"),
    "infinity": ("shared", latents() / 0, sigmas(), ShapeError, "latents hold NaN or infinity; wanted finite"),
    "bf16": ("shared", latents().bfloat16(), sigmas(), DtypeError, "latents have dtype torch.bfloat16 and the weights"),
    "fp64": ("shared", latents().double(), sigmas(), DtypeError, r"latents have dtype torch.float64 and the weights"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(**fields) for name, fields in MODELS.items()}


@pytest.mark.parametrize("case", OF_THE_STEP)
def test_of_the_step(case, models):
    model, x, sigma, error, says = OF_THE_STEP[case]
    with pytest.raises(error, match=says) as caught:
        models[model](x, sigma)
    assert isinstance(caught.value, PSVAEError)


# model, what the prefix is made of, the error, its words
OF_THE_PREFIX = {
    "nothing": ("shared", {"prefix": None}, ConfigError, "neither text nor source_latents came; wanted one"),
    # ids
    "ids no tensor": ("shared", {"input_ids": [[1, 2]]}, DtypeError, "input_ids came as list; wanted a torch.Tensor"),
    "ids bool": ("shared", {"input_ids": words() > 3}, DtypeError, "input_ids have dtype torch.bool; wanted"),
    "ids uint8": ("shared", {"input_ids": words().byte()}, DtypeError, "input_ids have dtype torch.uint8; wanted"),
    "ids int16": ("shared", {"input_ids": words().short()}, DtypeError, "input_ids have dtype torch.int16; wanted"),
    "ids float": ("shared", {"input_ids": words().float()}, DtypeError, "input_ids have dtype torch.float32; wanted"),
    "ids one row": ("shared", {"input_ids": words()[0]}, ShapeError, r"shape \(5,\); wanted \(B, T\).*unsqueeze"),
    "ids none": ("shared", {"input_ids": words()[:, :0]}, ShapeError, r"shape \(2, 0\); wanted .* a word at least"),
    "ids unknown": ("shared", {"input_ids": words() + VOCABULARY}, ShapeError, "input_ids span .*; wanted 0 to 31"),
    "ids negative": ("shared", {"input_ids": words() - VOCABULARY}, ShapeError, "input_ids span -.*; wanted 0 to 31"),
    "ids of no vocabulary": ("embeds", {"input_ids": words()}, ConfigError, "input_ids came; .* reads inputs_embeds"),
    "ids for hidden states": ("hidden", {"input_ids": words()}, ConfigError, "came; .* reads encoder_hidden_states"),
    "ids for a cache": ("cache", {"input_ids": words()}, ConfigError, "came; .* reads a PrefixCache.from_hf alone"),
    "states for ids": ("mot", {"encoder_hidden_states": states(2, 5)}, ConfigError, "reads input_ids or inputs_embeds"),
    "two texts": ("shared", {"input_ids": words(), "inputs_embeds": states(2, 5, width=48)}, ConfigError,
                  "input_ids and inputs_embeds came together; wanted one"),
    # states
    "embeds width": ("embeds", {"inputs_embeds": states(2, 5)}, ShapeError, r"\(2, 5, 24\); wanted \(B, T, 48\)"),
    "embeds none": ("embeds", {"inputs_embeds": states(2, 0, width=48)}, ShapeError, r"\(2, 0, 48\); wanted .*a word"),
    "embeds one row": ("embeds", {"inputs_embeds": states(5, width=48)}, ShapeError, r"\(5, 48\); wanted \(B, T, 48\)"),
    "embeds whole": ("embeds", {"inputs_embeds": torch.ones(2, 5, 48).int()}, DtypeError,
                     "inputs_embeds have dtype torch.int32; wanted floating point: token ids"),
    "embeds bf16": ("embeds", {"inputs_embeds": states(2, 5, width=48).bfloat16()}, DtypeError, "torch.bfloat16 and"),
    "embeds NaN": ("embeds", {"inputs_embeds": with_nan(states(2, 5, width=48))}, ShapeError, "states hold NaN"),
    "states none": ("hidden", {"encoder_hidden_states": states(2, 0)}, ShapeError, r"wanted \(B, T, 24\), a word at"),
    "states layers": ("layers", {"encoder_hidden_states": states(2, 2, 5)}, ShapeError, r"wanted \(3, B, T, 24\)"),
    "states one layer": ("layers", {"encoder_hidden_states": states(2, 5)}, ShapeError, r"wanted \(3, B, T, 24\)"),
    "states whole": ("hidden", {"encoder_hidden_states": torch.ones(2, 5, 24).long()}, DtypeError, "wanted floating"),
    "states bf16": ("hidden", {"encoder_hidden_states": states(2, 5).bfloat16()}, DtypeError, "torch.bfloat16 and"),
    "states fp64": ("hidden", {"encoder_hidden_states": states(2, 5).double()}, DtypeError, r"\.to\(torch.float32\)"),
    "states NaN": ("hidden", {"encoder_hidden_states": with_nan(states(2, 5))}, ShapeError, "states hold NaN"),
    # masks
    "padding alone": ("shared", {"input_ids": words(), "attention_mask": ALONE}, ShapeError,
                      "leaves an item with padding alone; wanted a word in each.*drop_text="),
    "another's dropped": ("shared", {"input_ids": words(), "attention_mask": ALONE,
                                     "drop_text": torch.tensor([True, False])}, ShapeError, "with padding alone"),
    "added mask": ("shared", {"input_ids": words(), "attention_mask": ADDED}, ShapeError,
                   r"attention_mask holds -1e\+09; wanted 1 for words, 0 for padding: .* becomes \(mask == 0\)"),
    "infinite mask": ("hidden", {"encoder_hidden_states": states(2, 5), "attention_mask": ADDED * 1e30}, ShapeError,
                      r"attention_mask holds -inf; wanted .*\(mask == 0\)"),
    "mask of 0.3": ("shared", {"input_ids": words(), "attention_mask": HALVES}, ShapeError, "mask holds 0.3; wanted 1"),
    "mask of 2": ("shared", {"input_ids": words(), "attention_mask": words() * 0 + 2}, ShapeError, "mask holds 2"),
    "mask NaN": ("shared", {"input_ids": words(), "attention_mask": with_nan(HALVES.ceil())}, ShapeError, "holds nan"),
    "mask shape": ("shared", {"input_ids": words(), "attention_mask": torch.ones(2, 4)}, ShapeError,
                   r"attention_mask has shape \(2, 4\); wanted \(2, 5\), as the text"),
    "mask no tensor": ("shared", {"input_ids": words(), "attention_mask": [[1] * 5] * 2}, DtypeError, "came as list"),
    "mask without text": ("shared", {"attention_mask": ALONE, "source_latents": SOURCES}, ConfigError,
                          "attention_mask came without text; pass the text too, or neither"),
    # sources
    "source channels": ("shared", {"source_latents": latents(2, channels=4)}, ShapeError, "source_latents have 4"),
    "source patch": ("patch", {"source_latents": latents(2, 3, 4)}, ShapeError, "source_latents are 3 x 4; wanted"),
    "source NaN": ("shared", {"source_latents": with_nan(SOURCES)}, ShapeError, "source_latents hold NaN or infinity"),
    "source bf16": ("shared", {"source_latents": SOURCES.bfloat16()}, DtypeError, "source_latents have dtype torch"),
    "sources in a list": ("shared", {"source_latents": [SOURCES]}, DtypeError, "source_latents came as list; wanted"),
    "three sources": ("shared", {"source_latents": SOURCES[:, None].expand(-1, 3, -1, -1, -1)}, ShapeError,
                      "3 source images came; wanted at most 2, None for none: .*max_source_images"),
    "no sources": ("shared", {"source_latents": SOURCES[:, None][:, :0]}, ShapeError, "0 source images came; wanted"),
    # who goes without
    "drop of numbers": ("shared", {"input_ids": words(), "drop_text": torch.tensor([1, 0])}, DtypeError,
                        "drop_text came as torch.int64; wanted a boolean tensor"),
    "drop of a list": ("shared", {"input_ids": words(), "drop_text": [True, False]}, DtypeError, "came as list"),
    "drop rank": ("shared", {"input_ids": words(), "drop_text": torch.ones(2, 1).bool()}, ShapeError, "another rank"),
    "drop batch": ("shared", {"source_latents": SOURCES, "drop_source": torch.ones(3).bool()}, ShapeError,
                   "the batches differ: source_latents 2, drop_source 3; wanted one size"),
    "drop of no text": ("shared", {"source_latents": SOURCES, "drop_text": torch.ones(2).bool()}, ConfigError,
                        "drop_text came without text; there is nothing to go without"),
    "drop of no source": ("shared", {"input_ids": words(), "drop_source": torch.ones(2).bool()}, ConfigError,
                          "drop_source came without source_latents"),
    "batches": ("shared", {"input_ids": words(3), "source_latents": SOURCES}, ShapeError,
                "the batches differ: text 3, source_latents 2; wanted one size"),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_THE_PREFIX)
def test_of_the_prefix(case, models):
    model, inputs, error, says = OF_THE_PREFIX[case]
    with pytest.raises(error, match=says):
        models[model].encode_prefix(**inputs)
    if inputs != {"prefix": None}:  # that is the unconditional forward
        with pytest.raises(error, match=says):
            models[model](latents(), sigmas(), **inputs)


NO_PREFIX = {
    "ids": (words(), "prefix came as Tensor; wanted a PrefixCache: pass token ids as input_ids="),
    "a cache of transformers": (cache(), r"came as DynamicCache; .*PrefixCache.from_hf\(past_key_values"),
    "an old cache of transformers": (pairs(), r"prefix came as tuple; wanted .*PrefixCache.from_hf"),
    "a tokenizer's output": ({"input_ids": words()}, "prefix came as dict; wanted a PrefixCache: pass token ids"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_PREFIX)
def test_what_is_no_prefix(case, models):
    given, says = NO_PREFIX[case]
    with pytest.raises(DtypeError, match=says):
        models["shared"](latents(), sigmas(), given)
    with pytest.raises(DtypeError, match=says):
        models["shared"].encode_prefix(words(), prefix=given)


# what comes beside latents and σ, the error, its words
OF_THE_CALL = {
    "prefix of more layers": ({"prefix": empty(num_layers=3)}, ConfigError, r"\(3, 2, 16\); wanted \(2, 2, 16\)"),
    "prefix of more heads": ({"prefix": empty(num_key_value_heads=4)}, ConfigError, r"\(2, 4, 16\); wanted"),
    "prefix of wider heads": ({"prefix": empty(attention_head_dim=24)}, ConfigError, r"\(2, 2, 24\); wanted"),
    "prefix of one": ({"prefix": empty(1)}, ShapeError, r"a batch of 1; wanted 2, as the latents: .*repeat_interleave"),
    "ids of one": ({"input_ids": words(1)}, ShapeError, "the prefix is for a batch of 1; wanted 2"),
    "prefix and ids": ({"prefix": empty(), "input_ids": words()}, ConfigError, "prefix came together with input_ids;"),
    "prefix and mask": ({"prefix": empty(), "attention_mask": ALONE}, ConfigError, "together with attention_mask"),
    "layers as a number": ({"return_layers": 1}, ConfigError, "return_layers is 1; wanted a tuple of numbers"),
    "layers beyond": ({"return_layers": (0, 2)}, ConfigError, r"is \(0, 2\); wanted a tuple of numbers from 0 to 1"),
    "layers from behind": ({"return_layers": (-1,)}, ConfigError, r"is \(-1,\); wanted a tuple of numbers"),
    "layers by name": ({"return_layers": "01"}, ConfigError, "return_layers is '01'; wanted a tuple"),
    "condition of a list": ({"condition": [1.0]}, DtypeError, "condition came as list; wanted the tensor .condition"),
    "condition of another size": ({"condition": torch.zeros(2, 9, 48)}, ShapeError, r"\(2, 9, 48\); wanted"),
    "condition and prefix": ({"condition": torch.zeros(2, 16, 48), "prefix": empty()}, ConfigError,
                             "condition came together with prefix; with a condition the head alone"),
    "condition and ids": ({"condition": torch.zeros(2, 16, 48), "input_ids": words()}, ConfigError, "with input_ids; "),
    "condition and layers": ({"condition": torch.zeros(2, 16, 48), "return_layers": (0,)}, ConfigError,
                             "condition came together with return_layers; with a condition"),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_THE_CALL)
def test_of_the_call(case, models):
    inputs, error, says = OF_THE_CALL[case]
    with pytest.raises(error, match=says):
        models["shared"](latents(), sigmas(), **inputs)


@pytest.mark.parametrize("fields", [{"num_layers": 3}, {"num_key_value_heads": 4}, {"attention_head_dim": 24}])
@pytest.mark.parametrize("inputs", [{"input_ids": words()}, {"source_latents": SOURCES}], ids=["text", "source"])
def test_another_models_prefix_is_not_gone_on_from(inputs, fields, models):
    with pytest.raises(ConfigError, match=r"wanted \(2, 2, 16\): it was made by another model, encode it with this"):
        models["shared"].encode_prefix(**inputs, prefix=empty(**fields))


def test_a_misspelt_input(models):
    for call in (lambda **x: models["shared"](latents(), sigmas(), **x), models["shared"].encode_prefix):
        with pytest.raises(TypeError, match="unexpected keyword argument 'inputs_ids'"):
            call(inputs_ids=words())


def test_more_sources_one_call_after_the_other(models):
    """The configured number is that of the whole prefix; a joined one counts its fullest item."""
    model = models["shared"]
    two = model.encode_prefix(source_latents=SOURCES, prefix=model.encode_prefix(source_latents=SOURCES))
    joined = PrefixCache.concat_batch([two, empty()])
    with pytest.raises(ShapeError, match="1 source images came after 2 in the prefix; wanted at most 2"):
        model.encode_prefix(source_latents=SOURCES, prefix=two)
    with pytest.raises(ShapeError, match="1 source images came after 2 in the prefix; wanted at most 2"):
        model.encode_prefix(source_latents=latents(4, 2, 2), prefix=joined)
    with pytest.raises(ShapeError, match="after 2 in the prefix"):
        model.encode_prefix(source_latents=latents(6, 2, 2), prefix=two.to("cpu").detach().repeat_interleave(3))


@pytest.mark.parametrize("fusion", ["shared", "mot"])
def test_source_after_text(fusion, models):
    """Trained on [source | text]; behind an empty prefix or another source it may come."""
    model = models[fusion]
    text = model.encode_prefix(words())
    for prefix in (text, PrefixCache.concat_batch([text, empty(0)]), PrefixCache.from_hf(cache())):
        with pytest.raises(
            ConfigError, match=r"source_latents came after a prefix with text; .*encode the source first"
        ):
            model.encode_prefix(source_latents=SOURCES, prefix=prefix)
    assert model.encode_prefix(source_latents=SOURCES, prefix=empty()).source_images == 1
    assert models["hidden"].encode_prefix(source_latents=SOURCES, prefix=PrefixCache.from_hf(cache())).length == 9


def test_encode_text_checks_too(models):
    with pytest.raises(ShapeError, match="input_ids span"):
        models["shared"].encode_text(words() + VOCABULARY)
    with pytest.raises(ShapeError, match="padding alone"):
        models["shared"].encode_text(words(), ALONE)
    for model in ("embeds", "hidden"):
        with pytest.raises(ConfigError, match="input_ids came"):
            models[model].encode_text(words())


def test_half_precision_runs_under_autocast(models):
    with torch.autocast("cpu", torch.bfloat16):
        sample = models["shared"](latents().bfloat16(), sigmas(), input_ids=words()).sample
        with pytest.raises(DtypeError, match=r"latents have dtype torch.float64"):
            models["shared"](latents().double(), sigmas())
    assert sample.isfinite().all()


def test_guidance_without_an_unconditional_branch(models):
    full = models["shared"].encode_prefix(words())
    with pytest.raises(ConfigError, match=r"guidance needs full, empty, of which empty is missing"):
        flow.guided(models["shared"], {"full": full}, flow.Guidance())


@pytest.mark.parametrize("fields", [{}, {"fusion": "prefix", "vocab_size": None}])
def test_only_a_mixture_has_text_to_freeze(fields):
    model = DeepFusionDiT(tiny_config(**fields))
    with pytest.raises(ConfigError, match=r"fusion='(shared|prefix)' has no blocks for text alone; wanted 'mot'"):
        model.freeze_text()
    assert all(x.requires_grad for x in model.parameters())


MASKS_OF_A_CACHE = {
    "added": (ADDED, r"attention_mask holds -1e\+09; wanted 1 for words"),
    "halves": (HALVES, "attention_mask holds 0.3; wanted 1 for words"),
    "of one": (torch.ones(1, 5), r"attention_mask has shape \(1, 5\); the cache holds \(2, 5\)"),
    "padding alone": (ALONE, r"leaves an item with padding alone; wanted a word in each.*PrefixCache.empty\("),
}


@pytest.mark.parametrize("case", MASKS_OF_A_CACHE)
def test_masks_of_a_cache(case):
    mask, says = MASKS_OF_A_CACHE[case]
    with pytest.raises(ShapeError, match=says):
        PrefixCache.from_hf(cache(), mask)


@pytest.mark.parametrize("given", [None, {"input_ids": 1}, torch.zeros(2)])
def test_what_is_no_cache(given):
    with pytest.raises(DtypeError, match=r"the cache came as .*; wanted one of transformers.*past_key_values"):
        PrefixCache.from_hf(given)


PREFIX = {"fusion": "prefix", "vocab_size": None}
FIELDS = {
    "vocabulary": ({"fusion": "prefix"}, "vocab_size is 32; wanted None with fusion='prefix'"),
    "layers of text": ({**PREFIX, "text_layers": 3}, "text_layers is 3; wanted 1 without text_hidden_size"),
    "map of text": ({**PREFIX, "layer_map": (0, 0)}, r"layer_map is \(0, 0\); wanted None without text_hidden_size"),
    "map in shared": ({"layer_map": (0, 0)}, r"layer_map is \(0, 0\); wanted None without text_hidden_size"),
    "map too short": ({**PREFIX, "text_hidden_size": 8, "layer_map": (0,)}, "layer_map is .*; wanted 2 numbers from 0"),
    "map beyond": ({**PREFIX, "text_hidden_size": 8, "layer_map": (0, 1)}, "layer_map is .*; wanted 2 numbers from 0"),
    "text in shared": ({"text_hidden_size": 8}, "text_hidden_size is 8; wanted at least 1 with fusion='prefix', None"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads is 3; wanted a divisor of num_attention_heads 4"),
    "odd heads": ({"attention_head_dim": 15}, "attention_head_dim is 15; wanted an even number from 8"),
    "width": ({"hidden_size": 50}, "hidden_size is 50; wanted a multiple of 4, for its positions"),
    "head's width": ({"head_width": 60}, "head_width is 60; wanted a multiple of 4 x 2 heads"),
    "no layers": ({"num_layers": 0}, "num_layers is 0; wanted at least 1"),
    "no scale": ({"timestep_scale": 0.0}, "timestep_scale is 0.0; wanted a positive number"),
    "no words": ({"vocab_size": 0}, "vocab_size is 0; wanted None or at least 1"),
    "sources": ({"max_source_images": -1}, "max_source_images is -1; wanted 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_fields(case):
    fields, says = FIELDS[case]
    with pytest.raises(ConfigError, match=f"DeepFusionDiTConfig.{says}"):
        tiny_config(**fields)
    with pytest.raises(ConfigError, match="has no field 'fushion'; did you mean 'fusion'"):
        DeepFusionDiTConfig.from_dict({"fushion": "mot"})
