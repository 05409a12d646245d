"""`PrefixCache`: from transformers, joined, moved, and as the condition of a model of another width."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import psvae
from psvae import DeepFusionDiT, DeepFusionDiTConfig, PrefixCache
from psvae.errors import ShapeError
from psvae.nn.positions import sincos_grid
from tests.generators.dense import rotary_angles
from tests.generators.foreign import Z, language_model
from tests.tiny import build, fill_weights, latents

T = transformers
WINDOW = 4  # shorter than the prompts below


def words(batch=2, length=6, seed=3):
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(hf, ids=None, mask=None, **inputs):
    """The cache of a language model on a prompt."""
    with torch.no_grad():
        return hf(words() if ids is None else ids, attention_mask=mask, use_cache=True, **inputs).past_key_values


def tiny_model(**fields):
    """Conditioned by `language_model`'s two layers of 2 key heads of 12, at another width of its own."""
    default = {
        "in_channels": Z, "fusion": "prefix", "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "attention_head_dim": 12, "intermediate_size": 64, "vocab_size": None,
        "rope_theta": 10000.0, "head": "linear",
    }  # fmt: skip
    return fill_weights(build(DeepFusionDiT, DeepFusionDiTConfig(**{**default, **fields})))


def shared_model(**fields):
    return tiny_model(**{"fusion": "shared", "vocab_size": 40, "max_source_images": 2, **fields})


def velocity(model, prefix, batch=2, seed=0):
    with torch.no_grad():
        return model(latents(batch, 3, 4, seed=seed), torch.linspace(0.2, 0.9, batch), prefix).sample


def assert_same(a, b):
    for field in dataclasses.fields(PrefixCache):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert x.equal(y), field.name
            assert x.dtype == y.dtype, field.name
        else:
            assert x == y, field.name


# From transformers


def test_the_copy_and_the_cache_do_not_touch_each_other():
    hf, model = language_model(T.Qwen2Config), tiny_model()
    cache = run(hf)
    prefix = PrefixCache.from_hf(cache)
    kept, theirs = copy.deepcopy(prefix), [(x.keys.clone(), x.values.clone()) for x in cache.layers]
    velocity(model, prefix)
    with torch.no_grad():
        model.encode_prefix(source_latents=latents(2, 2, 2), prefix=prefix)
    assert_same(prefix, kept)
    for layer, (keys, values) in zip(cache.layers, theirs, strict=True):
        assert layer.keys.equal(keys)
        assert layer.values.equal(values)
    run(hf, words(2, 3, seed=4), past_key_values=cache)
    assert cache.get_seq_length() == 9
    for layer in cache.layers:
        layer.keys.zero_()
    assert_same(prefix, kept)
    prefix.keys.fill_(7.0)
    assert all((layer.keys == 0).all() for layer in cache.layers)


def test_pairs_of_keys_and_values_will_do():
    cache = run(language_model(T.Qwen2Config))
    assert_same(PrefixCache.from_hf([(x.keys, x.values) for x in cache.layers]), PrefixCache.from_hf(cache))


def test_layer_map_picks_layers():
    cache = run(language_model(T.LlamaConfig, num_hidden_layers=4))
    prefix = PrefixCache.from_hf(cache, layer_map=(1, 3))
    assert prefix.keys.equal(torch.stack([cache.layers[i].keys for i in (1, 3)]))
    assert prefix.values.equal(torch.stack([cache.layers[i].values for i in (1, 3)]))
    assert velocity(tiny_model(), prefix).isfinite().all()
    repeated = PrefixCache.from_hf(cache, layer_map=[0, 0, 1, 1])
    assert repeated.keys[0].equal(repeated.keys[1])
    for wrong in ((1, 4), (-1, 2)):
        with pytest.raises(ShapeError, match=r"the cache has 4 layers; wanted layers .*layer_map"):
            PrefixCache.from_hf(cache, layer_map=wrong)


@pytest.mark.parametrize("counted", ["from the first token", "from the first word"])
def test_left_padding(counted):
    """Both ways of counting positions condition an item as its prompt alone does."""
    hf, model = language_model(T.LlamaConfig), tiny_model(image_rope="1d")
    ids, mask = words(), torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    positions = None if counted == "from the first token" else (mask.cumsum(1) - 1).clamp(min=0)
    prefix = PrefixCache.from_hf(run(hf, ids, mask, position_ids=positions), mask, position_ids=positions)
    assert prefix.key_mask.equal(mask.bool())
    assert prefix.next_position.tolist() == ([6, 6] if positions is None else [6, 4])
    alone = PrefixCache.from_hf(run(hf, ids[1:, 2:]))
    with torch.no_grad():
        together = model(latents(2, 3, 4), torch.tensor([0.3, 0.6]), prefix).sample[1:]
        single = model(latents(2, 3, 4)[1:], torch.tensor([0.6]), alone).sample
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)


def test_right_padding():
    hf, model = language_model(T.Qwen3Config, head_dim=12), tiny_model(image_rope="1d")
    ids, mask = words(), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    prefix = PrefixCache.from_hf(run(hf, ids, mask), mask)
    assert prefix.next_position.tolist() == [6, 3]
    with torch.no_grad():
        together = model(latents(2, 3, 4), torch.tensor([0.3, 0.6]), prefix).sample[1:]
        alone = PrefixCache.from_hf(run(hf, ids[1:, :3]))
        single = model(latents(2, 3, 4)[1:], torch.tensor([0.6]), alone).sample
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)


def test_padding_of_a_cache_is_set_to_zero():
    """It may hold NaN, and 0 · NaN is NaN."""
    hf, model = language_model(T.Qwen2Config), tiny_model()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    cache = run(hf, words(), mask)
    wanted = velocity(model, PrefixCache.from_hf(cache, mask))
    for layer in cache.layers:
        layer.keys[1, :, 3:] = layer.values[1, :, 3:] = torch.nan
    prefix = PrefixCache.from_hf(cache, mask)
    assert velocity(model, prefix).equal(wanted)
    assert not prefix.values[:, 1, :, 3:].any()
    assert prefix.values[:, 1, :, :3].all()


def test_a_mask_that_hides_nothing_is_left_out():
    cache = run(language_model(T.Qwen2Config))
    for ones in (torch.ones(2, 6), torch.ones(2, 6).bool(), torch.ones(2, 6).long()):
        assert_same(PrefixCache.from_hf(cache, ones), PrefixCache.from_hf(cache))


def test_positions_of_one_row_serve_all():
    cache = run(language_model(T.Qwen2Config))
    assert PrefixCache.from_hf(cache, position_ids=torch.arange(4, 10)[None]).next_position.tolist() == [10, 10]


def test_a_prefix_knows_what_is_in_it():
    model = shared_model()
    with torch.no_grad():
        source = model.encode_prefix(source_latents=latents(4, 2, 2).view(2, 2, Z, 2, 2))
        text = model.encode_prefix(words())
        both = model.encode_prefix(words(), prefix=source)
    external = PrefixCache.from_hf(run(language_model(T.Qwen2Config)))
    empty = PrefixCache.empty(model.config, 2)
    joined = PrefixCache.concat_batch([text, empty, source])
    found = [(x.source_images, x.has_text) for x in (empty, source, text, both, external, joined)]
    assert found == [(0, False), (2, False), (0, True), (2, True), (0, True), (2, True)]
    assert (joined.repeat_interleave(2).source_images, both.detach().to("cpu").has_text) == (2, True)


SLIDING = {
    "mistral": (T.MistralConfig, {"sliding_window": WINDOW, "head_dim": 12}),
    "gemma3": (
        T.Gemma3TextConfig,
        {"sliding_window": WINDOW, "head_dim": 12, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", SLIDING)
def test_a_sliding_windows_cache_is_refused_unless_whole(name, masked):
    config_class, fields = SLIDING[name]
    hf = language_model(config_class, **fields)
    mask = torch.ones(2, 6, dtype=torch.long) if masked else None
    with pytest.raises(ShapeError, match=r"keeps 3 of 6 tokens.*wanted all.*past_key_values=DynamicCache\(\)"):
        PrefixCache.from_hf(run(hf, mask=mask), mask)
    cache = run(hf, mask=mask, past_key_values=T.DynamicCache())
    prefix = PrefixCache.from_hf(cache, mask)
    assert prefix.length == 6
    assert prefix.next_position.tolist() == [6, 6]
    assert velocity(tiny_model(), prefix).isfinite().all()
    short = words(2, WINDOW - 1)  # nothing is dropped from a prompt within the window
    assert PrefixCache.from_hf(run(hf, short)).length == WINDOW - 1


def test_a_static_cache_is_read_to_its_content():
    hf = language_model(T.Qwen2Config)
    cache = run(hf, past_key_values=T.StaticCache(config=hf.config, max_cache_len=16))
    assert cache.layers[0].keys.shape[2] == 16
    assert_same(PrefixCache.from_hf(cache), PrefixCache.from_hf(run(hf)))


def test_layers_of_unequal_heads_are_refused():
    cache = run(language_model(T.Qwen2Config))
    other = run(language_model(T.Qwen3Config, head_dim=16))
    mixed = [cache.layers[0], other.layers[1], other.layers[0]]
    with pytest.raises(ShapeError, match=r"\(2, 2, 6, 12\), \(2, 2, 6, 16\).*wanted one.*layer_map"):
        PrefixCache.from_hf(mixed)
    assert PrefixCache.from_hf(mixed, layer_map=(1, 2)).keys.shape[-1] == 16


def test_a_cache_that_was_not_filled_is_refused():
    hf = language_model(T.Qwen2Config)
    for empty in (T.DynamicCache(config=hf.config), T.DynamicCache(), []):
        with pytest.raises(ShapeError, match=r"holds no keys .*run the language model|has 0 layers"):
            PrefixCache.from_hf(empty)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_a_mask_of_another_prompt_is_refused(name):
    cache = run(language_model(T.Qwen2Config))
    with pytest.raises(ShapeError, match=rf"{name} has shape \(2, 5\); the cache holds \(2, 6\): it is another prompt"):
        PrefixCache.from_hf(cache, **{name: torch.ones(2, 5, dtype=torch.long)})


def test_an_empty_branch_decides_no_dtype():
    model = shared_model()
    with torch.no_grad():
        text = model.encode_prefix(words()).to(dtype=torch.bfloat16)
    empty = PrefixCache.empty(model.config, 2)
    for parts in ([text, empty], [empty, text]):
        assert PrefixCache.concat_batch(parts).keys.dtype == torch.bfloat16


# As the condition of a model of another width


def test_conditioned_on_a_real_cache():
    """Finite, dependent on the text, and what one dense attention over [text | noisy latents] computes."""
    hf, model = language_model(T.Qwen2Config), tiny_model(image_rope="2d")
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    cache = run(hf, mask=mask)
    prefix = PrefixCache.from_hf(cache, mask)
    assert model.config.hidden_size != hf.config.hidden_size
    x, sigma = latents(2, 3, 4), torch.tensor([0.3, 0.6])
    with torch.no_grad():
        got = model(x, sigma, prefix)
        other = model(x, sigma, PrefixCache.from_hf(run(hf, words(seed=8), mask), mask)).sample
        bare = model(x, sigma).sample
        wanted = torch.stack([direct(model, cache, x[i], sigma[i].item(), i, int(mask[i].sum())) for i in range(2)])
    assert got.sample.isfinite().all()
    assert (got.sample - other).abs().max() > 1e-3
    assert (got.sample - bare).abs().max() > 1e-3
    torch.testing.assert_close(got.condition, wanted, rtol=1e-5, atol=1e-5)


def direct(model, cache, x, sigma, item, length):
    """One item: the cache's own keys and values beside the noisy latents', head by head."""
    config = model.config
    tokens = model.embed_latents(x.flatten(1).T) + sincos_grid(config.hidden_size, (3, 4))[0]
    tokens = tokens + model.embed_time(torch.tensor([sigma]), torch.float32)
    places = [(length, length + row, length + column) for row in range(3) for column in range(4)]
    angles = rotary_angles(places, config)
    for layer, own in zip(cache.layers, model.layers, strict=True):
        keys, values = layer.keys[item, :, :length], layer.values[item, :, :length]
        tokens = cross_block(own, tokens, angles, keys, values, config)
    return model.norm(tokens)


def cross_block(own, x, angles, keys, values, config):
    d, heads, pairs = config.attention_head_dim, config.num_attention_heads, config.num_key_value_heads
    q, k, v = own.qkv(own.norm1(x)).split([heads * d, pairs * d, pairs * d], dim=-1)
    turns = torch.polar(torch.ones_like(angles), angles)

    def turned(z):
        y = torch.complex(z[:, : d // 2], z[:, d // 2 :]) * turns
        return torch.cat([y.real, y.imag], dim=-1)

    outs = []
    for head in range(heads):
        pair = head * pairs // heads
        k_head = torch.cat([keys[pair], turned(k[:, pair * d : (pair + 1) * d])])
        v_head = torch.cat([values[pair], v[:, pair * d : (pair + 1) * d]])
        scores = turned(q[:, head * d : (head + 1) * d]) @ k_head.T / d**0.5
        outs.append(scores.softmax(-1) @ v_head)
    x = x + own.proj(torch.cat(outs, dim=-1))
    gate, up = own.mlp.gate_up(own.norm2(x)).chunk(2, dim=-1)
    return x + own.mlp.down(F.silu(gate) * up)


def test_hidden_states_go_through_each_blocks_projection():
    """Norm, keys and values of its own layer; keys turned by their place; then as any prefix."""
    model = tiny_model(text_hidden_size=20, text_layers=3, num_layers=2, layer_map=(0, 2), qk_norm=True)
    config, states = model.config, torch.randn(3, 1, 5, 20, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        prefix = model.encode_prefix(encoder_hidden_states=states)
        turns = rotary_angles([(i, i, i) for i in range(5)], config)
        for index, layer in enumerate((0, 2)):
            project = model.text_projections[index]
            keys, values = project.kv(project.norm(states[layer, 0])).chunk(2, dim=-1)
            keys = project.k_norm(keys.view(5, 2, 12)).transpose(0, 1)
            y = torch.complex(keys[..., :6], keys[..., 6:]) * torch.polar(torch.ones_like(turns), turns)
            torch.testing.assert_close(prefix.keys[index, 0], torch.cat([y.real, y.imag], -1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(prefix.values[index, 0], values.view(5, 2, 12).transpose(0, 1))
    assert prefix.next_position.tolist() == [5]


WITHOUT_THE_LANGUAGE_MODEL = """
import sys, torch
from safetensors.torch import load_file, save_file
from psvae import DeepFusionDiT

text, model = load_file("text.safetensors"), DeepFusionDiT.from_pretrained("model")
with torch.no_grad():
    prefix = model.encode_prefix(encoder_hidden_states=text["states"], attention_mask=text["mask"])
    sample = model(text["noise"], text["sigmas"], prefix).sample
save_file({"sample": sample.contiguous()}, "sample.safetensors")
print("transformers" in sys.modules)
"""


def test_hidden_states_of_a_file_need_no_language_model(tmp_path):
    """A text model runs once, over all captions; its states are stored and condition where it is not installed."""
    ids, mask = words(), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    hf = language_model(T.Qwen2Config)
    with torch.no_grad():
        states = torch.stack(hf(ids, attention_mask=mask, output_hidden_states=True).hidden_states)
    model, noise, sigmas = tiny_model(text_hidden_size=48, text_layers=3), latents(2, 3, 4), torch.tensor([0.3, 0.6])
    model.save_pretrained(tmp_path / "model")
    save_file({"states": states, "mask": mask, "noise": noise, "sigmas": sigmas}, tmp_path / "text.safetensors")
    command = [sys.executable, "-c", WITHOUT_THE_LANGUAGE_MODEL]
    environment = os.environ | {"PYTHONPATH": str(Path(psvae.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.stdout.strip() == "False", done.stderr
    with torch.no_grad():
        wanted = model(noise, sigmas, encoder_hidden_states=states, attention_mask=mask).sample
    torch.testing.assert_close(load_file(tmp_path / "sample.safetensors")["sample"], wanted)


@pytest.mark.parametrize("image_rope", ["shared_index", "mrope"])
def test_source_after_an_external_prefix(image_rope):
    """The source sees the text, the noisy latents see both, and positions go on; the external prefix stays as it is."""
    hf, model = language_model(T.Qwen2Config), tiny_model(image_rope=image_rope, max_source_images=2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    text = PrefixCache.from_hf(run(hf, mask=mask), mask)
    other = PrefixCache.from_hf(run(hf, words(seed=8), mask), mask)
    source = latents(2, 2, 3, seed=5)
    with torch.no_grad():
        both = model.encode_prefix(source_latents=source, prefix=text)
        changed = model.encode_prefix(source_latents=source, prefix=other)
        again = model.encode_prefix(source_latents=latents(2, 2, 2, seed=6), prefix=both)
    step = 1 if image_rope == "shared_index" else 3
    assert both.length == 12
    assert both.next_position.tolist() == [6 + step, 4 + step]
    assert both.key_mask.equal(torch.cat([mask.bool(), torch.ones(2, 6, dtype=torch.bool)], dim=1))
    assert both.keys[:, :, :, :6].equal(text.keys)
    assert not both.keys[1, :, :, 6:].equal(changed.keys[1, :, :, 6:])
    assert both.keys[0, :, :, 6:].equal(changed.keys[0, :, :, 6:])  # the first layer's see nothing else yet
    assert again.length == 16
    assert text.length == 6
    alone = PrefixCache.from_hf(run(hf, words()[1:, :4]))
    with torch.no_grad():
        one = model.encode_prefix(source_latents=source[1:], prefix=alone)
        single = model(latents(2, 3, 4)[1:], torch.tensor([0.9]), one).sample
    torch.testing.assert_close(velocity(model, both)[1:], single, rtol=1e-4, atol=1e-4)


def test_text_after_an_earlier_prefix_goes_on_from_it():
    """Two calls are one: the source first, then the words."""
    model, ids, source = shared_model(), words(), latents(2, 2, 3, seed=5)
    with torch.no_grad():
        first = model.encode_prefix(source_latents=source)
        assert_same(model.encode_prefix(ids, prefix=first), model.encode_prefix(ids, source_latents=source))


# Joined, repeated, moved


def parts(model):
    """Prefixes of 1, 2 and 1 items, of different lengths, one padded, one empty."""
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        yield model.encode_prefix(words(1, 3))
        yield model.encode_prefix(words(2, 5), mask, source_latents=latents(2, 2, 2))
        yield PrefixCache.empty(model.config, 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_joined_prefixes_equal_separate_ones(order):
    model = shared_model()
    given = list(parts(model))
    together = PrefixCache.concat_batch([given[i] for i in order])
    assert together.batch_size == 4
    assert together.length == 9
    x, sigma = latents(4, 3, 4), torch.linspace(0.1, 0.9, 4)
    with torch.no_grad():
        got = model(x, sigma, together).sample
        start = 0
        for index in order:
            rows = slice(start, start + given[index].batch_size)
            alone = model(x[rows], sigma[rows], given[index]).sample
            torch.testing.assert_close(got[rows], alone, rtol=1e-5, atol=1e-5)
            start = rows.stop


def test_joined_equal_lengths_need_no_mask():
    model = shared_model()
    with torch.no_grad():
        a, b = model.encode_prefix(words(2, 4)), model.encode_prefix(words(1, 4, seed=5))
    assert PrefixCache.concat_batch([a, b]).key_mask is None
    empty = PrefixCache.empty(model.config, 2)
    assert_same(PrefixCache.concat_batch([empty, empty]), PrefixCache.empty(model.config, 4))
    assert_same(PrefixCache.concat_batch([a]), a)


def test_joining_other_geometries_is_refused():
    shared = shared_model()
    other = PrefixCache.empty(shared.config.replace(num_layers=3), 1)
    with pytest.raises(ShapeError, match=r"\(2, 2, 12\), \(3, 2, 12\)\]; wanted equal ones"):
        PrefixCache.concat_batch([PrefixCache.empty(shared.config, 1), other])
    with pytest.raises(ShapeError, match="no prefixes came; wanted at least one"):
        PrefixCache.concat_batch([])


@pytest.mark.parametrize("kind", range(3))
def test_repeated_prefixes_serve_several_images(kind):
    model = shared_model()
    prefix = list(parts(model))[kind]
    many = prefix.repeat_interleave(3)
    count = prefix.batch_size
    x = latents(3 * count, 3, 4)
    with torch.no_grad():
        got = model(x, torch.full((3 * count,), 0.5), many).sample
        for image in range(3):
            wanted = model(x[image::3], torch.full((count,), 0.5), prefix).sample
            torch.testing.assert_close(got[image::3], wanted, rtol=1e-5, atol=1e-5)


def test_moved_to_another_dtype_or_device():
    prefix = list(parts(shared_model()))[1]
    half = prefix.to(dtype=torch.bfloat16)
    assert (half.keys.dtype, half.values.dtype) == (torch.bfloat16, torch.bfloat16)
    assert half.key_mask.dtype == torch.bool
    assert half.next_position.dtype == torch.long
    assert_same(half.to(dtype=torch.float32).to(dtype=torch.bfloat16), half)
    assert_same(prefix.to(), prefix)
    assert_same(prefix.to("cpu"), prefix)
    far = prefix.to("meta")
    assert all(x.is_meta for x in (far.keys, far.values, far.key_mask, far.next_position))
    model = copy.deepcopy(shared_model()).to("meta")
    output = model(latents(2, 3, 4).to("meta"), torch.ones(2, device="meta"), far).sample
    assert output.shape == (2, Z, 3, 4)


def test_a_prefix_in_another_dtype_serves():
    """A language model in bf16 may condition a generator in fp32, and the other way round."""
    hf, model = language_model(T.Qwen2Config), tiny_model()
    prefix = PrefixCache.from_hf(run(hf))
    exact = velocity(model, prefix)
    rough = velocity(model, prefix.to(dtype=torch.bfloat16))
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() / exact.norm() < 0.05
    with torch.no_grad():
        source = model.encode_prefix(source_latents=latents(2, 2, 2), prefix=prefix.to(dtype=torch.bfloat16))
    assert source.keys.dtype == torch.float32


def test_detached_prefixes_hold_no_graph():
    model = shared_model().train()
    prefix = model.encode_prefix(words(), source_latents=latents(2, 2, 2))
    assert prefix.keys.requires_grad
    loose = prefix.detach()
    assert not loose.keys.requires_grad
    assert not loose.values.requires_grad
    model(latents(2, 3, 4), torch.tensor([0.2, 0.9]), loose).sample.square().mean().backward()
    assert model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("kind", range(3))
def test_pickled_and_copied(kind):
    prefix = list(parts(shared_model()))[kind]
    assert_same(pickle.loads(pickle.dumps(prefix)), prefix)
    twin = copy.deepcopy(prefix)
    assert_same(twin, prefix)
    assert twin.keys.data_ptr() != prefix.keys.data_ptr() or not prefix.length


def test_it_is_read_only():
    prefix = PrefixCache.empty(shared_model().config, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prefix.keys = None
