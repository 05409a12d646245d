"""Weights of others in `DeepFusionDiT`: language models of transformers, BAGEL, RAE's head.

Every language model here is a real one of transformers, a few thousand random numbers large, written with
``save_pretrained``; BAGEL and RAE are written a second time in `tests.generators.foreign`.
"""

import json

import pytest
import torch
import transformers
from einops import rearrange
from safetensors.torch import load_file, save_file

from psvae import DeepFusionDiT, PrefixCache
from psvae.errors import CheckpointError, ConfigError, PSVAEError
from psvae.hub.keymaps.bagel import BAGEL
from psvae.hub.keymaps.llm import LANGUAGE_MODEL
from tests.base import assert_equal
from tests.generators.foreign import Z, bagel_forward, bagel_weights, language_model, rae_head, rae_weights
from tests.tiny import latents

T = transformers
FRESH = {"in_channels": Z, "head_width": 64, "head_num_heads": 2, "head_intermediate_size": 96}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
KINDS = {
    "qwen2": (T.Qwen2Config, {}),
    "qwen3": (T.Qwen3Config, {"head_dim": 24}),
    "llama": (T.LlamaConfig, {"rms_norm_eps": 1e-5, "num_key_value_heads": 4}),
    "llama3": (T.LlamaConfig, {"rope_parameters": LLAMA3}),
}
MASKS = {
    "none": None,
    "right": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
    "left": torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
}


def kind(name, **fields):
    config_class, own = KINDS[name]
    return language_model(config_class, **{**own, **fields})


def words(batch=2, length=6):
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(3))


def rewrite_config(folder, **changes):
    """Change ``config.json``; None removes a key."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def assert_text_is(model, hf, tolerance=1e-4):
    with torch.no_grad():
        wanted = hf(words()).last_hidden_state
        torch.testing.assert_close(model.encode_text(words()), wanted, rtol=tolerance, atol=tolerance)


# Language models of transformers


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", KINDS)
def test_text_is_what_transformers_computes(name, padding, tmp_path):
    hf, mask = kind(name), MASKS[padding]
    hf.save_pretrained(tmp_path)
    model = DeepFusionDiT.from_llm(tmp_path, **FRESH)
    with torch.no_grad():
        wanted = hf(words(), attention_mask=mask).last_hidden_state
        got = model.encode_text(words(), mask)
    seen = torch.ones(2, 6, dtype=torch.bool) if mask is None else mask.bool()
    assert wanted.std() > 0.1
    torch.testing.assert_close(got[seen], wanted[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", KINDS)
def test_prefix_is_the_cache_of_transformers(name, padding, tmp_path):
    """Keys, values, mask and next position, and so the velocity."""
    hf, mask = kind(name), MASKS[padding]
    hf.save_pretrained(tmp_path)
    model = DeepFusionDiT.from_llm(tmp_path, **FRESH)
    torch.nn.init.normal_(model.head.out.weight)
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` counts
    with torch.no_grad():
        cache = hf(words(), attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
        theirs = PrefixCache.from_hf(cache, mask, position_ids=positions)
        ours = model.encode_prefix(words(), mask)
        seen = ours.all_keys()
        assert theirs.all_keys().equal(seen)
        assert theirs.next_position.equal(ours.next_position)
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            a, b = (x.permute(1, 3, 0, 2, 4)[seen] for x in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        x, sigma = latents(2, 3, 3), torch.tensor([0.2, 0.7])
        got, wanted = model(x, sigma, theirs).sample, model(x, sigma, ours).sample
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_every_layout_of_a_folder(tied, headed, shard_size, tmp_path):
    """With a language head or without, tied or not, in one file or in shards."""
    config = language_model(T.Qwen2Config).config
    config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(5)
        hf = (T.Qwen2ForCausalLM if headed else T.Qwen2Model)(config).eval()
    hf.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    model = DeepFusionDiT.from_llm(tmp_path, **FRESH)
    assert_text_is(model, hf.model if headed else hf)
    if headed and tied:
        with torch.no_grad():
            logits = model.encode_text(words()) @ model.embed_tokens.weight.T
            torch.testing.assert_close(logits, hf(words()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_config_of_transformers_4(name, tmp_path):
    """``rope_theta`` stands by itself there, and ``rope_scaling`` says how it is stretched."""
    hf = kind(name)
    hf.save_pretrained(tmp_path)
    rope = dict(hf.config.rope_parameters)
    theta = rope.pop("rope_theta")
    scaling = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    rewrite_config(
        tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling=scaling if name == "llama3" else None,
        torch_dtype="float32", dtype=None,
    )  # fmt: skip
    model = DeepFusionDiT.from_llm(tmp_path, **FRESH)
    assert model.config.rope_theta == theta
    assert (model.config.rope_scaling is None) == (name != "llama3")
    assert_text_is(model, hf)


def test_config_before_rope_theta(tmp_path):
    """The first Llamas' says neither the base nor the number of key heads."""
    hf = language_model(T.LlamaConfig, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    hf.save_pretrained(tmp_path)
    rewrite_config(tmp_path, rope_parameters=None)
    assert DeepFusionDiT.from_llm(tmp_path, **FRESH).config.rope_theta == 10000.0


def test_half_precision_file_is_read_as_fp32(tmp_path):
    kind("qwen2").bfloat16().save_pretrained(tmp_path)
    hf = T.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    model = DeepFusionDiT.from_llm(tmp_path, **FRESH)
    assert {x.dtype for x in model.state_dict().values()} == {torch.float32}
    assert_text_is(model, hf)


def test_mixture_starts_as_a_copy(tmp_path):
    hf = kind("qwen3")
    hf.save_pretrained(tmp_path)
    model = DeepFusionDiT.from_llm(tmp_path, fusion="mot", **FRESH)
    assert_text_is(model, hf)
    assert_equal(model.image_layers.state_dict().values(), model.layers.state_dict().values())
    assert_equal(model.image_norm.state_dict().values(), model.norm.state_dict().values())
    with torch.no_grad():  # copies, not the same memory
        model.image_layers[0].proj.weight.zero_()
        model.image_norm.weight.zero_()
    assert_text_is(model, hf)


def test_the_rest_is_fresh_and_the_velocity_zero(tmp_path):
    kind("qwen2").save_pretrained(tmp_path)
    model = DeepFusionDiT.from_llm(tmp_path, **FRESH)
    assert model.training
    assert model(latents(2), torch.tensor([0.2, 0.7]), input_ids=words()).sample.abs().max() == 0
    model.save_pretrained(tmp_path / "own")
    assert_text_is(DeepFusionDiT.from_pretrained(tmp_path / "own"), kind("qwen2"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_size": 64}, "of another shape: model.embed_tokens.weight is"),
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
        ({"num_key_value_heads": 4}, "of another shape"),
        ({"intermediate_size": 100}, "mlp.gate_proj.weight"),
    ],
)
def test_weights_of_another_geometry_are_refused(fields, says, tmp_path):
    T.Qwen2ForCausalLM(language_model(T.Qwen2Config).config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(CheckpointError, match="do not fit its configuration; nothing was loaded") as caught:
        DeepFusionDiT.from_llm(tmp_path, **FRESH)
    assert says in str(caught.value)


def test_fields_of_another_geometry_are_refused(tmp_path):
    T.Qwen2ForCausalLM(language_model(T.Qwen2Config).config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"num_layers=3 came and the model in .* has 2; wanted the same: leave it"
    ):
        DeepFusionDiT.from_llm(tmp_path, **FRESH, num_layers=3)


@pytest.mark.parametrize("fusion", ["shared", "mot"])
@pytest.mark.parametrize(("name", "has"), [("qwen2", False), ("qwen3", True)])
def test_norms_of_q_and_k_are_the_language_models(name, has, fusion, tmp_path):
    """A norm of weight 1 is no identity: with one more, or one less, the text would be another."""
    kind(name).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        DeepFusionDiT.from_llm(tmp_path, qk_norm=not has, fusion=fusion, **FRESH)
    assert f"qk_norm is {not has}; wanted {has}: the language model has {'' if has else 'no '}norms of queries" in str(
        caught.value
    )


@pytest.mark.parametrize("headed", [True, False])
def test_without_an_embedding_words_come_embedded(headed, tmp_path):
    hf = kind("qwen3")
    (T.Qwen3ForCausalLM(hf.config) if headed else hf).save_pretrained(tmp_path)
    bare, whole = (DeepFusionDiT.from_llm(tmp_path, **fields, **FRESH) for fields in ({"vocab_size": None}, {}))
    assert bare.embed_tokens is None
    with torch.no_grad():
        embedded = whole.embed_tokens(words())
        got, wanted = bare.encode_prefix(inputs_embeds=embedded), whole.encode_prefix(words())
    assert got.keys.equal(wanted.keys)
    assert got.values.equal(wanted.values)


def assert_goes_back(layout, model, state, source):
    """The key map's other direction gives each of the file's tensors, and no others."""
    header = {name: tuple(x.shape) for name, x in source.items()}
    theirs = layout.save(state, model.config.to_dict(), header)
    wanted = {
        name: x for name, x in source.items() if not name.startswith(layout.unneeded(model.config.to_dict(), header))
    }
    assert set(theirs) == set(wanted)
    assert_equal([theirs[name] for name in wanted], wanted.values())


@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_language_model_goes_back_bit_for_bit(name, headed, tmp_path):
    hf = kind(name)
    (T.AutoModelForCausalLM.from_config(hf.config) if headed else hf).save_pretrained(tmp_path)
    model = DeepFusionDiT.from_llm(tmp_path, **FRESH)
    text = {key: x for key, x in model.state_dict().items() if key.startswith(("embed_tokens.", "layers.", "norm."))}
    assert_goes_back(LANGUAGE_MODEL, model, text, load_file(tmp_path / "model.safetensors"))


@pytest.mark.bad_input
def test_weights_in_memory_are_saved_first():
    hf = kind("qwen2")
    for given in (hf, hf.state_dict()):
        for load in (DeepFusionDiT.from_llm, DeepFusionDiT.from_pretrained, head_model().load_rae_head):
            with pytest.raises(CheckpointError, match=f"{type(given).__name__} came; wanted a folder, a file or a Hub"):
                load(given)


def test_prefix_fusion_takes_no_weights(tmp_path):
    kind("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"fusion='prefix' has no text blocks.*PrefixCache\.from_hf"):
        DeepFusionDiT.from_llm(tmp_path, fusion="prefix", **FRESH)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"num_hidden_layers": 10**9},
            r"num_layers 1000000000; wanted a number of layers, and the weights have \d+ tensors in all",
        ),
        ({"hidden_size": 480_000}, r"of another shape: embed_tokens.weight is"),
    ],
)
def test_an_absurd_size_is_not_built(fields, says, tmp_path):
    kind("qwen2").save_pretrained(tmp_path)
    rewrite_config(tmp_path, **fields)
    with pytest.raises(PSVAEError, match=says):
        DeepFusionDiT.from_llm(tmp_path, **FRESH)


REFUSED = {
    "gemma": (T.GemmaConfig, {"head_dim": 16}, "a model of type 'gemma'"),
    "mistral": (T.MistralConfig, {}, "a model of type 'mistral'"),
    "sliding window": (T.Qwen2Config, {"use_sliding_window": True, "sliding_window": 4}, "use_sliding_window True"),
    "bias on o_proj": (T.LlamaConfig, {"attention_bias": True}, "attention_bias True"),
    "bias of Qwen3": (T.Qwen3Config, {"attention_bias": True, "head_dim": 16}, "attention_bias True"),
    "bias of the MLP": (T.LlamaConfig, {"mlp_bias": True}, "mlp_bias True"),
    "activation": (T.LlamaConfig, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "yarn": (
        T.Qwen2Config,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                             "original_max_position_embeddings": 16}},
        "rope_type 'yarn'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_models_are_refused(case, tmp_path):
    config_class, fields, says = REFUSED[case]
    language_model(config_class, **fields).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        DeepFusionDiT.from_llm(tmp_path, **FRESH)
    assert says in str(caught.value)
    assert "wanted" in str(caught.value)


def test_yarn_of_transformers_4_is_refused(tmp_path):
    kind("qwen2").save_pretrained(tmp_path)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rewrite_config(tmp_path, rope_parameters=None, rope_theta=1e6, rope_scaling=yarn)
    with pytest.raises(CheckpointError, match="rope_type 'yarn'"):
        DeepFusionDiT.from_llm(tmp_path, **FRESH)


def test_config_without_a_size_is_named(tmp_path):
    kind("qwen2").save_pretrained(tmp_path)
    rewrite_config(tmp_path, intermediate_size=None)
    with pytest.raises(CheckpointError, match=r"config.json of a qwen2 lacks 'intermediate_size'"):
        DeepFusionDiT.from_llm(tmp_path, **FRESH)


def test_a_folder_of_ours_is_no_language_model(tmp_path):
    kind("qwen2").save_pretrained(tmp_path)
    DeepFusionDiT.from_llm(tmp_path, **FRESH).save_pretrained(tmp_path / "own")
    with pytest.raises(CheckpointError, match="wanted a qwen2, qwen3 or llama folder"):
        DeepFusionDiT.from_llm(tmp_path / "own")
    with pytest.raises(CheckpointError, match="DeepFusionDiT reads psvae's own folders and those of BAGEL"):
        DeepFusionDiT.from_pretrained(tmp_path)


# BAGEL


def bagel_folder(folder, weights):
    """As on the Hub: ``ema.safetensors`` beside a ``config.json`` that names other things."""
    save_file(weights, folder / "ema.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bagel", "architectures": ["BagelForConditional"]}))
    return folder


@pytest.mark.parametrize("by_name", [True, False])
def test_bagel_is_read(by_name, tmp_path):
    weights = bagel_weights()
    bagel_folder(tmp_path, weights)
    if by_name:
        model = DeepFusionDiT.from_pretrained(tmp_path, file="ema.safetensors")
    else:
        model = DeepFusionDiT.from_pretrained(tmp_path / "ema.safetensors")
    config = model.config
    assert (config.fusion, config.head, config.patch_size, config.in_channels) == ("mot", "linear", 2, Z)
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (48, 2, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim) == (4, 2, 12)
    state = model.state_dict()
    language = "language_model.model."
    for kind, suffix in (("layers", ""), ("image_layers", "_moe_gen")):
        for i in range(2):
            ours, theirs = f"{kind}.{i}.", f"{language}layers.{i}."
            for leaf in ("weight", "bias"):
                parts = [weights[f"{theirs}self_attn.{x}_proj{suffix}.{leaf}"] for x in "qkv"]
                assert state[f"{ours}qkv.{leaf}"].equal(torch.cat(parts))
            gate, up = (weights[f"{theirs}mlp{suffix}.{x}_proj.weight"] for x in ("gate", "up"))
            assert state[f"{ours}mlp.gate_up.weight"].equal(torch.cat([gate, up]))
            names = {
                "mlp.down": f"mlp{suffix}.down_proj", "proj": f"self_attn.o_proj{suffix}",
                "q_norm": f"self_attn.q_norm{suffix}", "k_norm": f"self_attn.k_norm{suffix}",
                "norm1": f"input_layernorm{suffix}", "norm2": f"post_attention_layernorm{suffix}",
            }  # fmt: skip
            for own, name in names.items():
                assert state[f"{ours}{own}.weight"].equal(weights[f"{theirs}{name}.weight"]), own
    top = {
        "embed_latents": "vae2llm", "head.out": "llm2vae", "embed_time.fc1": "time_embedder.mlp.0",
        "embed_time.fc2": "time_embedder.mlp.2", "embed_tokens": f"{language}embed_tokens",
        "norm": f"{language}norm", "image_norm": f"{language}norm_moe_gen",
    }  # fmt: skip
    for own, name in top.items():
        for leaf in ("weight", "bias"):
            if f"{own}.{leaf}" in state:
                assert state[f"{own}.{leaf}"].equal(weights[f"{name}.{leaf}"])


@pytest.mark.parametrize("has_source", [True, False])
def test_bagel_computes_what_its_equations_do(has_source, tmp_path):
    """Token by token, on a sequence without the tokens that begin and end an image in BAGEL's own."""
    weights = bagel_weights()
    model = DeepFusionDiT.from_pretrained(bagel_folder(tmp_path, weights), file="ema.safetensors")
    x, sigma, source = latents(1, 4, 6), torch.tensor([0.4]), latents(1, 6, 4, seed=2)
    ids = words(1, 5) % 32
    with torch.no_grad():
        got = model(x, sigma, input_ids=ids, source_latents=source if has_source else None).sample
        wanted = bagel_forward(weights, x[0], 0.4, ids[0], source[0] if has_source else None)
    assert wanted.std() > 0.05
    torch.testing.assert_close(got[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "vae2llm.bias",
        "llm2vae.weight",
        "time_embedder.mlp.2.bias",
        "language_model.model.norm_moe_gen.weight",
        "language_model.model.layers.1.mlp_moe_gen.up_proj.weight",
        "language_model.model.layers.0.self_attn.k_norm.weight",
        "language_model.model.embed_tokens.weight",
    ],
)
def test_bagel_without_a_tensor_names_it(name, tmp_path):
    weights = bagel_weights()
    del weights[name]
    with pytest.raises(CheckpointError) as caught:
        DeepFusionDiT.from_pretrained(bagel_folder(tmp_path, weights), file="ema.safetensors")
    assert name in str(caught.value)
    assert "missing" in str(caught.value)


def test_bagel_goes_back_bit_for_bit(tmp_path):
    weights = bagel_weights()
    model = DeepFusionDiT.from_pretrained(bagel_folder(tmp_path, weights), file="ema.safetensors")
    assert_goes_back(BAGEL, model, model.state_dict(), weights)


def test_bagel_of_another_patch_is_refused(tmp_path):
    weights = bagel_weights()
    weights["vae2llm.weight"] = weights["vae2llm.weight"][:, :-1].contiguous()
    with pytest.raises(CheckpointError, match=r"vae2llm.weight is \(48, 31\); wanted \(D, 4 Z\), BAGEL's patch is 2"):
        DeepFusionDiT.from_pretrained(bagel_folder(tmp_path, weights), file="ema.safetensors")


def test_bagel_with_a_stranger_names_it(tmp_path):
    weights = bagel_weights() | {"vae2llm_2.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"1 unexpected: vae2llm_2\.weight"):
        DeepFusionDiT.from_pretrained(bagel_folder(tmp_path, weights), file="ema.safetensors")


# RAE's head


def head_model(depth=2, **fields):
    return DeepFusionDiT(
        DeepFusionDiT.config_class(
            in_channels=Z, hidden_size=48, num_layers=1, num_attention_heads=4, num_key_value_heads=2,
            attention_head_dim=12, intermediate_size=32, vocab_size=8, head_depth=depth, head_intermediate_size=170,
            **{"head_width": 64, "head_num_heads": 2, "head_final_modulation": True, **fields},
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("theta", [10000.0, 100.0])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("trunk", [0, 3])
def test_rae_head_computes_what_rae_does(depth, trunk, theta, patch, tmp_path):
    weights = rae_weights(trunk=trunk, depth=depth, patch=patch)
    save_file(weights, tmp_path / "stage2.safetensors")
    model = head_model(depth, head_rope_theta=theta, patch_size=patch)
    before = {name: x.clone() for name, x in model.state_dict().items() if not name.startswith("head.")}
    model.load_rae_head(tmp_path / "stage2.safetensors")
    assert_equal([model.state_dict()[name] for name in before], before.values())
    x, trunk_tokens, time = latents(2, 3 * patch, 5 * patch), torch.randn(2, 15, 48), torch.randn(2, 48)
    patches = "B Z (h p) (w q) -> B (h w) (p q Z)"
    with torch.no_grad():
        got = model.head(rearrange(x, patches, p=patch, q=patch), trunk_tokens, time, (3, 5), "sdpa")
        wanted = rae_head(weights, x, trunk_tokens, time, first=trunk, depth=depth, heads=2, theta=theta)
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, rearrange(wanted, patches, p=patch, q=patch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_rae_head_goes_back_bit_for_bit(patch, tmp_path):
    weights = rae_weights(trunk=0, depth=2, patch=patch)
    save_file(weights, tmp_path / "in.safetensors")
    model = head_model(patch_size=patch)
    model.load_rae_head(tmp_path / "in.safetensors")
    model.export_rae_head(tmp_path / "out.safetensors")
    back = load_file(tmp_path / "out.safetensors")
    ours = {name: x for name, x in weights.items() if not name.startswith(("s_embedder", "pos_embed", "t_emb", "y_"))}
    ours = {name: x for name, x in ours.items() if "_rope" not in name}
    assert set(back) == set(ours)
    assert_equal([back[name] for name in ours], ours.values())
    twin = head_model(patch_size=patch)
    twin.load_rae_head(tmp_path / "out.safetensors")
    assert_equal(twin.head.state_dict().values(), model.head.state_dict().values())


def test_rae_head_of_the_trunks_width_has_no_projection(tmp_path):
    model = head_model(head_width=48)
    model.export_rae_head(tmp_path / "out.safetensors")
    assert not any(name.startswith("s_projector") for name in load_file(tmp_path / "out.safetensors"))
    model.load_rae_head(tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"head_final_modulation": False}, "unexpected: final_layer.adaLN_modulation.1"),
        ({"head_width": 32}, "of another shape"),
        ({"in_channels": Z + 1}, "x_embedder.proj.weight"),
        ({"hidden_size": 52}, "s_projector.weight is (64, 48), wanted (64, 52)"),
        ({"head_intermediate_size": 171}, "mlp.w12.weight"),
        ({"in_channels": Z // 4, "patch_size": 2}, "x_embedder.proj.weight is (64, 8, 1, 1)"),
    ],
)
def test_rae_head_of_another_geometry_is_refused(fields, says, tmp_path):
    save_file(rae_weights(trunk=1, depth=2), tmp_path / "stage2.safetensors")
    model = head_model()
    model = DeepFusionDiT(model.config.replace(**fields))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="nothing was loaded") as caught:
        model.load_rae_head(tmp_path / "stage2.safetensors")
    assert says in str(caught.value)
    assert_equal(model.state_dict().values(), before.values())


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_rae_head_of_another_number_of_heads_is_refused(heads, tmp_path):
    """No weight's shape tells it; the table of rotary positions does."""
    weights = rae_weights(trunk=1, depth=2)
    save_file(weights, tmp_path / "stage2.safetensors")
    model = head_model(head_num_heads=heads)
    with pytest.raises(CheckpointError, match=f"head_num_heads is {heads}; wanted 2, the file's table of rotary"):
        model.load_rae_head(tmp_path / "stage2.safetensors")
    untold = {name: x for name, x in weights.items() if "_rope" not in name}
    save_file(untold, tmp_path / "untold.safetensors")
    model.load_rae_head(tmp_path / "untold.safetensors")


@pytest.mark.parametrize("place", ["nowhere/out.safetensors", "folder"])
def test_rae_head_that_cannot_be_written_leaves_nothing(place, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=rf"could not write .*{place} .*what was there is untouched"):
        head_model().export_rae_head(tmp_path / place)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_linear_head_is_not_raes(tmp_path):
    model = head_model(head="linear")
    save_file(rae_weights(trunk=1, depth=2), tmp_path / "stage2.safetensors")
    for call in (model.load_rae_head, model.export_rae_head):
        with pytest.raises(ConfigError, match="head is 'linear'; wanted 'ddt'"):
            call(tmp_path / "stage2.safetensors")


def test_rae_training_checkpoint_gives_its_average(tmp_path):
    """A pickle with ``ema`` beside ``model``: RAE samples with the average."""
    average, raw = rae_weights(trunk=1, depth=2), rae_weights(trunk=1, depth=2, seed=9)
    torch.save({"ema": average, "model": raw, "epoch": 3}, tmp_path / "stage2_model.pt")
    model = head_model()
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        model.load_rae_head(tmp_path / "stage2_model.pt")
    model.load_rae_head(tmp_path / "stage2_model.pt", allow_pickle=True)
    assert model.head.out.weight.equal(average["final_layer.linear.weight"])
