"""DeepFusionDiT: (prefix, noisy latents, σ) → velocity."""

import dataclasses

import pytest
import torch

from psvae import DeepFusionDiT, DeepFusionDiTConfig, PrefixCache, flow
from psvae.generators.head import patches_of
from tests.base import ModuleTests
from tests.generators.dense import dense_trunk, image_places, rotary_angles, turn
from tests.tiny import build, fill_weights, latents

Z, VOCABULARY, TEXT_WIDTH = 8, 32, 24


def tiny_config(**fields):
    """Two blocks of width 48, four heads on two of keys, d = 16."""
    default = {
        "in_channels": Z, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "attention_head_dim": 16, "intermediate_size": 96, "vocab_size": VOCABULARY, "rope_theta": 10000.0,
        "head_width": 64, "head_num_heads": 2, "head_intermediate_size": 96,
    }  # fmt: skip
    return DeepFusionDiTConfig(**{**default, **fields})


def tiny_model(**fields):
    return fill_weights(build(DeepFusionDiT, tiny_config(**fields)))


FUSIONS = {
    "shared": {},
    "mot": {"fusion": "mot", "qk_norm": True},
    "prefix": {
        "fusion": "prefix", "qk_norm": True, "text_hidden_size": TEXT_WIDTH, "text_layers": 3, "vocab_size": None,
    },
}  # fmt: skip


def text_of(model, batch=2):
    """Words, or with ``fusion="prefix"`` another model's hidden states of so many."""
    if model.text_projections is None:
        return {"input_ids": words(batch)}
    shape = (model.config.text_layers, batch, 5, TEXT_WIDTH)
    return {"encoder_hidden_states": torch.randn(shape, generator=torch.Generator().manual_seed(1))}


def words(batch=2, length=5, seed=3):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def sigmas(batch=2):
    return torch.linspace(0.2, 0.9, batch)


class TestDeepFusionDiT(ModuleTests):
    module_class = DeepFusionDiT
    config = tiny_config()
    good_sizes = ((4, 4), (3, 5), (1, 7))
    repr_contains = ("Z=8", "fusion='shared'")
    presets = (
        ("deep_fusion_qwen2_5_0_5b", DeepFusionDiTConfig.qwen2_5_0_5b()),
        ("deep_fusion_qwen2_5_1_5b", DeepFusionDiTConfig.qwen2_5_1_5b()),
        ("deep_fusion_qwen2_5_3b", DeepFusionDiTConfig.qwen2_5_3b()),
        ("deep_fusion_tiny", DeepFusionDiTConfig.tiny()),
    )

    def inputs(self, height, width):
        return (latents(2, height, width), sigmas())

    def call(self, module, *inputs):
        x, sigma = inputs
        meta = x.device.type == "meta"
        ids = words(len(x)).to(x.device) if meta or len(x) > 1 else words()[1:]
        source = latents(2, 2, 3, seed=9).to(x)[-len(x) :]
        output = module(x, sigma, input_ids=ids, source_latents=source, return_layers=(0,))
        return [output.sample, output.condition, *output.hidden_states]

    def expected_shapes(self, height, width):
        return [(2, Z, height, width), (2, height * width, 48), (2, height * width, 48)]


class TestMixtureOfTransformers(TestDeepFusionDiT):
    config = tiny_config(fusion="mot", qk_norm=True, head_final_modulation=True, image_rope="mrope")
    repr_contains = ("fusion='mot'",)
    presets = ()


class TestLinearHead(TestDeepFusionDiT):
    config = tiny_config(head="linear", patch_size=2, image_rope="2d", prediction="sample")
    good_sizes = ((4, 4), (2, 6))
    repr_contains = ("head='linear'", "patch_size=2")
    presets = ()

    def call(self, module, *inputs):
        x, sigma = inputs
        output = module(x, sigma, input_ids=words()[-len(x) :].to(x.device), return_layers=(0,))
        return [output.sample, output.condition, *output.hidden_states]

    def expected_shapes(self, height, width):
        tokens = height * width // 4
        return [(2, Z, height, width), (2, tokens, 48), (2, tokens, 48)]


class TestHiddenStates(TestDeepFusionDiT):
    config = tiny_config(fusion="prefix", text_hidden_size=TEXT_WIDTH, text_layers=3, vocab_size=None)
    repr_contains = ("fusion='prefix'",)
    presets = ()

    def call(self, module, *inputs):
        x, sigma = inputs
        states = torch.randn(3, 2, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(1)).to(x)[:, -len(x) :]
        output = module(x, sigma, encoder_hidden_states=states, return_layers=(1,))
        return [output.sample, output.condition, *output.hidden_states]


# Against the same trunk without cache

ROPES = ("shared_index", "1d", "2d", "mrope")


PADDINGS = ("none", "right", "left")


def padded(padding):
    """The mask of two texts of up to five words."""
    mask = torch.ones(2, 5, dtype=torch.long)
    if padding != "none":
        mask[0, :2] = 0
    return mask.flip(1) if padding == "right" else mask


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("image_rope", ROPES)
@pytest.mark.parametrize("sources", [0, 1, 2])
@pytest.mark.parametrize("padding", PADDINGS)
def test_cached_equals_dense_attention(fusion, image_rope, sources, padding):
    model = tiny_model(**FUSIONS[fusion], image_rope=image_rope, max_source_images=2)
    assert_dense(model, padded(padding), latents(2 * sources, 4, 2, seed=5).view(2, sources, Z, 4, 2))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "fields", [{"image_position": "none"}, {"time_conditioning": None}, {"timestep_scale": 1000.0}]
)
def test_other_fields_equal_dense_attention(fields, padding):
    assert_dense(tiny_model(image_rope="2d", **fields), padded(padding), latents(2, 4, 2, seed=5)[:, None])


def assert_dense(model, mask, sources):
    """The trunk's tokens, from a prefix, equal those of each item alone in one attention without cache."""
    x, text = latents(2, 3, 4), text_of(model)
    with torch.no_grad():
        prefix = model.encode_prefix(**text, attention_mask=mask, source_latents=sources if sources.shape[1] else None)
        got = model(x, sigmas(), prefix).condition
        for item in range(2):
            said = said_by(model, text, item, mask[item].bool())
            wanted, *_ = dense_trunk(model, x[item], sigmas()[item].item(), sources=sources[item], **said)
            torch.testing.assert_close(got[item], wanted, rtol=1e-5, atol=1e-5)


def said_by(model, text, item, real=slice(None)):
    """The text of one item without its padding, for `dense_trunk`."""
    if "encoder_hidden_states" in text:
        return {"states": text["encoder_hidden_states"][:, item, real]}
    return {"words": model.embed_tokens(text["input_ids"][item, real])}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_one_call_equals_two(fusion, padding):
    model, x = tiny_model(**FUSIONS[fusion]), latents(2, 3, 4)
    inputs = {**text_of(model), "attention_mask": padded(padding), "source_latents": latents(2, 2, 3, seed=5)}
    with torch.no_grad():
        wanted = model(x, sigmas(), model.encode_prefix(**inputs)).sample
        assert model(x, sigmas(), **inputs).sample.equal(wanted)
        assert not model(x, sigmas()).sample.equal(wanted)


def prefix_kinds():
    shared, hidden = tiny_model(max_source_images=2), tiny_model(
        fusion="prefix", text_hidden_size=TEXT_WIDTH, text_layers=2, vocab_size=None, max_source_images=2
    )  # fmt: skip
    sources = latents(6, 3, 3, seed=4).view(3, 2, Z, 3, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    states = torch.randn(2, 3, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    yield shared, {"input_ids": words(3), "attention_mask": mask, "source_latents": sources}
    yield shared, {"input_ids": words(3), "attention_mask": mask.flip(1), "source_latents": sources}
    yield tiny_model(fusion="mot"), {"input_ids": words(3), "attention_mask": mask}
    mixture = tiny_model(fusion="mot", max_source_images=2)
    yield mixture, {"input_ids": words(3), "attention_mask": mask, "source_latents": sources}
    yield hidden, {"encoder_hidden_states": states, "attention_mask": mask, "source_latents": sources}
    yield hidden, {"encoder_hidden_states": states, "attention_mask": mask.flip(1), "source_latents": sources}


KINDS = range(6)


@pytest.mark.parametrize("kind", KINDS)
def test_three_together_equal_three_alone(kind):
    model, inputs = list(prefix_kinds())[kind]
    x, sigma = latents(3, 4, 4), sigmas(3)
    with torch.no_grad():
        together = model(x, sigma, **inputs).sample
        for item in range(3):
            real = inputs["attention_mask"][item].bool()
            alone = {
                name: value[:, item : item + 1] if name == "encoder_hidden_states" else value[item : item + 1]
                for name, value in inputs.items()
            }
            del alone["attention_mask"]
            for name in ("input_ids", "encoder_hidden_states"):
                if name in alone:
                    alone[name] = alone[name][:, :, real] if name == "encoder_hidden_states" else alone[name][:, real]
            single = model(x[item : item + 1], sigma[item : item + 1], **alone).sample
            torch.testing.assert_close(together[item : item + 1], single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_text_never_leaks(kind):
    model, inputs = list(prefix_kinds())[kind]
    x, sigma, hidden = latents(3, 4, 4), sigmas(3), ~inputs["attention_mask"].bool()
    changed = dict(inputs)
    if "input_ids" in inputs:
        changed["input_ids"] = torch.where(hidden, (inputs["input_ids"] + 7) % VOCABULARY, inputs["input_ids"])
    else:
        states = inputs["encoder_hidden_states"]
        changed["encoder_hidden_states"] = torch.where(hidden[None, :, :, None], states * 100, states)
    with torch.no_grad():
        assert model(x, sigma, **inputs).sample.equal(model(x, sigma, **changed).sample)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_items_never_had_it(kind):
    model, inputs = list(prefix_kinds())[kind]
    x, sigma = latents(3, 4, 4), sigmas(3)
    drop = torch.tensor([True, False, True])
    text_only = {name: value for name, value in inputs.items() if name != "source_latents"}
    source_only = {name: value for name, value in inputs.items() if name == "source_latents"}
    with torch.no_grad():
        whole = model(x, sigma, **inputs).sample
        without_text = model(x, sigma, **inputs, drop_text=drop).sample
        torch.testing.assert_close(without_text[1], whole[1], rtol=1e-5, atol=1e-5)
        wanted = model(x, sigma, **source_only).sample
        torch.testing.assert_close(without_text[drop], wanted[drop], rtol=1e-5, atol=1e-5)
        drops = {"drop_text": drop}
        if source_only:
            drops["drop_source"] = drop
            without_source = model(x, sigma, **inputs, drop_source=drop).sample
            wanted = model(x, sigma, **text_only).sample
            torch.testing.assert_close(without_source[drop], wanted[drop], rtol=1e-5, atol=1e-5)
        bare = model(x, sigma, **inputs, **drops).sample
        torch.testing.assert_close(bare[drop], model(x, sigma).sample[drop], rtol=1e-5, atol=1e-5)
        assert (whole - bare)[drop].abs().max() > 1e-3


def test_nothing_is_the_empty_prefix():
    model, x = tiny_model(), latents(2, 3, 4)
    with torch.no_grad():
        empty = model(x, sigmas(), PrefixCache.empty(model.config, 2)).sample
        assert empty.equal(model(x, sigmas()).sample)
        assert not empty.equal(model(x, sigmas(), input_ids=words()).sample)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_prefix_sees_neither_noise_nor_sigma(fusion):
    """In one attention without cache its keys and values are the same whatever is denoised, and those of the cache;
    the noisy tokens do see both."""
    model, source = tiny_model(**FUSIONS[fusion]), latents(2, 2, 2)
    text, samples, dense = text_of(model), [], []
    with torch.no_grad():
        prefix = model.encode_prefix(**text, source_latents=source)
        before = torch.stack([prefix.keys, prefix.values])
        for seed, sigma in ((1, 0.9), (1, 0.1), (2, 0.1)):
            x = latents(2, 3, 3, seed=seed)
            samples.append(model(x, torch.full((2,), sigma), prefix).sample)
            _, *found = dense_trunk(model, x[1], sigma, sources=source[1:], **said_by(model, text, 1))
            dense.append(torch.stack(found))
        again = model.encode_prefix(**text, source_latents=source)
    assert torch.stack([prefix.keys, prefix.values]).equal(before)
    assert torch.stack([again.keys, again.values]).equal(before)
    for found in dense:
        torch.testing.assert_close(found, dense[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, before[:, :, 1], rtol=1e-5, atol=1e-5)
    assert not samples[0].equal(samples[1])
    assert not samples[1].equal(samples[2])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_padding_never_leaks(kind):
    """0 · NaN is NaN: language models leave it behind where all keys of a row are masked."""
    model, inputs = list(prefix_kinds())[kind]
    x, sigma, hidden = latents(3, 4, 4), sigmas(3), ~inputs["attention_mask"].bool()
    name = "encoder_hidden_states"
    if name not in inputs:
        name = "inputs_embeds"
        inputs[name] = model.embed_tokens(inputs.pop("input_ids")).detach()
    nan = {**inputs, name: inputs[name].masked_fill(hidden[..., None], torch.nan)}
    with torch.no_grad():
        wanted = model(x, sigma, **inputs).sample
        torch.testing.assert_close(model(x, sigma, **nan).sample, wanted, rtol=1e-6, atol=1e-6)
        dropped = torch.tensor([True, False, False])
        nan[name][..., 0, :, :] = torch.nan
        wanted = model(x, sigma, **inputs, drop_text=dropped).sample
        torch.testing.assert_close(model(x, sigma, **nan, drop_text=dropped).sample, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_item_may_be_padding_alone(kind):
    """As an empty text is tokenised."""
    model, inputs = list(prefix_kinds())[kind]
    mask, drop = inputs["attention_mask"].clone(), torch.tensor([False, True, False])
    mask[1] = 0
    with torch.no_grad():
        got = model(latents(3), sigmas(3), **{**inputs, "attention_mask": mask}, drop_text=drop).sample
        wanted = model(latents(3), sigmas(3), **inputs, drop_text=drop).sample
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_layers_come_in_the_order_asked_for():
    model = tiny_model()
    with torch.no_grad():
        first, last = model(latents(2), sigmas(), return_layers=(0, 1)).hidden_states
        got = model(latents(2), sigmas(), return_layers=(1, 0, 1)).hidden_states
    assert not first.equal(last)
    assert [x.equal(y) for x, y in zip(got, (last, first, last), strict=True)] == [True] * 3


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_sigma_in_half_precision_is_scaled_in_fp32(scale):
    model, sigma = tiny_model(timestep_scale=scale), torch.tensor([0.7012, 0.0391]).bfloat16()
    with torch.no_grad():
        exact = model(latents(2), sigma.float()).sample
        assert model(latents(2), sigma).sample.equal(exact)


def test_rope_beyond_256_in_bf16():
    """Neighbours stay apart, though bf16 holds no odd number above 256: of one word again and again, the first
    layer's keys differ by their place alone."""
    model, ids = tiny_model().bfloat16(), torch.full((1, 300), 7)
    with torch.no_grad():
        keys = model.encode_prefix(ids).keys[0, 0]
        assert_turned(model, model.embed_tokens(ids[0]), keys, [(place,) * 3 for place in range(300)])
    keys = keys.float()
    turned = (keys[:, 256:299] - keys[:, 257:]).norm(dim=-1) / keys[:, 257:].norm(dim=-1)
    assert turned.min() > 0.1


@pytest.mark.parametrize("image_rope", ROPES)
def test_image_tokens_beyond_256_in_bf16(image_rope):
    """Of a source behind 300 others, on each axis."""
    model = tiny_model(image_rope=image_rope, image_position="none", time_conditioning=None).bfloat16()
    before = PrefixCache.empty(model.config, 1, dtype=torch.bfloat16)
    before = dataclasses.replace(before, next_position=torch.tensor([300]))
    source = latents(1, 3, 4).bfloat16()
    with torch.no_grad():
        keys = model.encode_prefix(source_latents=source, prefix=before).keys[0, 0]
        tokens = model.embed_latents(patches_of(source, 1)[0])
        assert_turned(model, tokens[0], keys, image_places(300, 3, 4, model.config)[0])


def assert_turned(model, tokens, keys, places):
    """The first layer's keys ``kv P d`` of these tokens, turned by angles in fp32 and rounded once."""
    block, angles = model.layers[0], rotary_angles(places, model.config)
    plain = block.qkv(block.norm1(tokens)).split(block.split, dim=-1)[1].float()
    for own, key in zip(plain.split(model.config.attention_head_dim, dim=-1), keys, strict=True):
        torch.testing.assert_close(key.float(), turn(own, angles), rtol=2**-8, atol=1e-3)


def test_checkpointing_spares_the_heads_blocks_too():
    """Backward keeps nothing of them but what goes in."""
    model = tiny_model(num_layers=1).train()
    sizes = []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        kept = []
        condition = torch.zeros(2, 16, 48)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            model(latents(2), sigmas(), condition=condition).sample.sum()
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 2


def test_fresh_weights():
    """Blocks as a language model's, new layers Xavier, modulations and the last layer zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = {"hidden_size": 64, "head_width": 128, "head_final_modulation": True, "num_layers": 1}
        models = [
            DeepFusionDiT(tiny_config(**wide)),
            DeepFusionDiT(tiny_config(fusion="prefix", vocab_size=None, text_hidden_size=96, **wide)),
        ]
    spread = {}
    for model in models:
        spread |= {name: (x.std().item(), x.shape) for name, x in model.named_parameters() if x.ndim > 1}
        assert all(not x.any() for name, x in model.named_parameters() if name.endswith("bias"))
        assert all((x == 1).all() for name, x in model.named_parameters() if "norm" in name)
    xavier = {"embed_latents", "text_projections.0.kv", "head.condition", "head.embed"}
    xavier |= {f"head.blocks.{i}.{part}" for i in range(2) for part in ("qkv", "proj", "mlp.gate_up", "mlp.down")}
    zero = {"head.out", "head.modulation", "head.blocks.0.modulation", "head.blocks.1.modulation"}
    assert {f"{name}.weight" for name in xavier | zero} < set(spread)
    for name, (std, shape) in spread.items():
        part = name.removesuffix(".weight")
        wanted = 0.0 if part in zero else (2 / sum(shape)) ** 0.5 if part in xavier else 0.02
        assert std == pytest.approx(wanted, rel=0.1), name


def test_a_mixture_is_built_with_its_dead_ends_frozen():
    """What the velocity does not depend on, and nothing else; `encode_text` reads it."""
    model = DeepFusionDiT(tiny_config(fusion="mot", qk_norm=True))
    frozen = {name for name, x in model.named_parameters() if not x.requires_grad}
    ends = ("proj", "norm2", "mlp.gate_up", "mlp.down", "q_norm")
    assert frozen == {"norm.weight", *(f"layers.1.{end}.weight" for end in ends)}
    model = tiny_model(fusion="mot", qk_norm=True).train().requires_grad_()
    model(latents(2), sigmas(), input_ids=words()).sample.sum().backward()
    assert {name for name, x in model.named_parameters() if x.grad is None} == frozen
    model.encode_text(words()).sum().backward()
    assert {name for name, x in model.named_parameters() if x.grad is None} == set()
    assert all(x.requires_grad for x in DeepFusionDiT(tiny_config()).parameters())


@pytest.mark.parametrize("fusion", ["shared", "mot"])
def test_unpadded_text_is_masked_by_no_table(fusion, monkeypatch):
    """Of B T (P + T) booleans; the kernel knows what causal means where nothing precedes the text."""
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):
        seen.append(None if attn_mask is None else tuple(attn_mask.shape))
        return sdpa(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr("psvae.nn.attention.scaled_dot_product_attention", watched)
    model = tiny_model(fusion=fusion, head="linear")
    with torch.no_grad():
        prefix = model.encode_prefix(words())
        model.encode_prefix(words(), torch.ones(2, 5))
        model(latents(2, 3, 4), sigmas(), prefix)
        assert set(seen) == {None}
        seen.clear()
        prefix = model.encode_prefix(words(), source_latents=latents(2, 2, 2))
        assert set(seen) == {None, (1, 1, 10, 9)}  # one for all items; two queries share a key head
        seen.clear()
        model(latents(2, 3, 4), sigmas(), prefix)
        assert set(seen) == {None}
        prefix = model.encode_prefix(words(), padded("left"))
        seen.clear()
        model(latents(2, 3, 4), sigmas(), prefix)
        assert set(seen) == {(2, 1, 1, 5 + 12)}  # one row for all queries


def test_output_is_zero_at_first():
    for fields in ({"head": "linear"}, *FUSIONS.values()):
        model = DeepFusionDiT(tiny_config(**fields))
        assert model(latents(2), sigmas(), **text_of(model)).sample.abs().max() == 0


def linear_toy(factor, **fields):
    """A model that predicts factor · x_σ: its block adds nothing, and beside one loud channel, the last, the norm
    divides all others by one number."""
    model, loud = tiny_model(num_layers=1, head="linear", image_position="none", time_conditioning=None, **fields), 1e4
    block, embed, out = model.layers[0], model.embed_latents, model.head.out
    with torch.no_grad():
        for x in (block.proj.weight, block.mlp.down.weight, embed.weight, embed.bias, out.weight, out.bias):
            x.zero_()
        model.norm.weight.fill_(1)
        embed.bias[-1] = loud
        embed.weight[:Z] = torch.eye(Z)
        out.weight[:, :Z] = torch.eye(Z) * factor * loud / model.config.hidden_size**0.5
    return model


@pytest.mark.parametrize(("sigma", "floor"), [(0.9, 0.05), (0.3, 0.05), (0.01, 0.05), (0.3, 0.5)])
def test_both_predictions_mean_one_velocity(sigma, floor):
    """A linear toy: where x̂ = c x_σ, v = (1 − c) x_σ / max(σ, floor)."""
    x, c = latents(2, 3, 3), 0.7
    wanted = (1 - c) / max(sigma, floor)
    by_clean = linear_toy(c, prediction="sample", sigma_floor=floor)
    by_velocity = linear_toy(wanted)
    with torch.no_grad():
        for model in (by_clean, by_velocity):
            got = model(x, torch.full((2,), sigma), input_ids=words()).sample
            torch.testing.assert_close(got, wanted * x, rtol=1e-4, atol=1e-4)


def test_the_heads_numbers_are_read_as_clean_latents():
    x, sigma = latents(2, 3, 3), sigmas()
    model = tiny_model(prediction="sample", head="linear")
    with torch.no_grad():
        velocity = model(x, sigma, input_ids=words()).sample
        twin = DeepFusionDiT(model.config.replace(prediction="velocity")).eval()
        twin.load_state_dict(model.state_dict())
        clean = twin(x, sigma, input_ids=words()).sample  # the same numbers, read as x̂
    torch.testing.assert_close(flow.clean_latents(x, velocity, sigma), clean, rtol=1e-5, atol=1e-5)


def test_condition_runs_the_head_alone():
    model, x = tiny_model(), latents(2, 3, 3)
    with torch.no_grad():
        whole = model(x, sigmas(), input_ids=words())
        head = model(x, sigmas(), condition=whole.condition)
        other = model(latents(2, 3, 3, seed=8), sigmas(), condition=whole.condition)
    assert head.sample.equal(whole.sample)
    assert not other.sample.equal(whole.sample)  # the head reads the noisy latents itself


def test_frozen_text_stays():
    model = tiny_model(fusion="mot").train()
    model.freeze_text()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(latents(2), sigmas(), input_ids=words()).sample.square().mean().backward()
    optimizer.step()
    changed = {name.split(".")[0] for name, x in model.state_dict().items() if not x.equal(before[name])}
    assert changed == {"embed_latents", "embed_time", "image_layers", "image_norm", "head"}


def test_one_batch_is_learned():
    """To below 1 % of the first loss."""
    torch.manual_seed(0)
    model = DeepFusionDiT(tiny_config(hidden_size=64, head_width=128))
    x, noise, sigma = latents(4, 4, 4), latents(4, 4, 4, seed=11), torch.linspace(0.1, 0.9, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(300):
        output = model(flow.add_noise(x, noise, sigma), sigma, input_ids=words(4))
        loss = flow.flow_loss(output.sample, x, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] < 0.01 * losses[0]:
            break
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.compile
def test_cached_step_compiles_without_break():
    """One graph for one prefix length, at most a second one, dynamic, for all others."""
    torch.compiler.reset()
    model, x = tiny_model(), latents(2, 4, 4)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda prefix: model(x, sigmas(), prefix).sample, fullgraph=True, backend=backend)
    with torch.no_grad():
        for length in (3, 5, 9, 17, 30):
            prefix = model.encode_prefix(words(2, length))
            torch.testing.assert_close(step(prefix), model(x, sigmas(), prefix).sample, rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 2


def test_parameter_counts():
    """The paper's, Table 1 and section 4.3, less BAGEL's stored table of 64 x 64 positions: here they are computed."""
    for preset, millions in (("qwen2_5_0_5b", 653), ("qwen2_5_1_5b", 1708)):
        config = getattr(DeepFusionDiTConfig, preset)()
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in DeepFusionDiT(config).parameters())
        assert (count + 64 * 64 * config.hidden_size) / 1e6 == pytest.approx(millions, rel=0.002)


def test_layer_map_is_even_and_ends_at_the_last():
    def spread(blocks, layers):
        config = tiny_config(
            fusion="prefix", num_layers=blocks, text_layers=layers, text_hidden_size=8, vocab_size=None
        )
        return config.text_layer_of_block

    assert spread(4, 1) == (0, 0, 0, 0)
    assert spread(4, 4) == (0, 1, 2, 3)
    assert spread(2, 4) == (1, 3)
    assert spread(4, 2) == (0, 0, 1, 1)
    assert spread(3, 8)[-1] == 7


def test_gradient_reaches_the_prefix():
    """Text embeddings and source are trained through keys and values."""
    model = tiny_model().train()
    source = latents(2, 2, 2).requires_grad_()
    output = model(latents(2), sigmas(), input_ids=words(), source_latents=source)
    output.sample.square().mean().backward()
    assert source.grad.abs().max() > 0
    assert model.embed_tokens.weight.grad.abs().max() > 0


def test_config_is_saved_with_its_nested_part(tmp_path):
    from psvae.nn.rope import RopeScaling

    config = tiny_config(rope_scaling=RopeScaling(factor=32.0))
    DeepFusionDiT(config).save_pretrained(tmp_path)
    assert DeepFusionDiT.from_pretrained(tmp_path).config == config
    assert dataclasses.asdict(config)["rope_scaling"]["factor"] == 32.0
