"""Others' models in small: language models of transformers, BAGEL's transformer and RAE's head, written a second time.

BAGEL and RAE are plain functions of a dict of tensors under their own names, for one item and head by head, from what
their papers and code say they compute. BAGEL's sequence is simplified as ours is: its code puts a start and an end
token, in the text's weights, inside each image's segment, and the tokens of its vision encoder before a source's.
"""

import numpy as np
import torch
from torch.nn import functional as F

Z = 8
BAGEL_WIDTH, BAGEL_HEADS, BAGEL_PAIRS, BAGEL_DIM, BAGEL_PATCH, BAGEL_SIDE = 48, 4, 2, 12, 2, 64
RAE_TRUNK, RAE_WIDTH = 48, 64
GEN = "_moe_gen"


def language_model(config_class, **fields):
    """A base model of transformers; norms and biases are random too, so that one left out shows."""
    import transformers

    default = {
        "vocab_size": 40, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = config_class(**{**default, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model.eval()


def randoms(shapes, seed):
    """Random tensors by name: matrices by their inputs, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        centre = float("norm" in name and name.endswith("weight"))
        weights[name] = x / x[0].numel() ** 0.5 if len(shape) > 1 else centre + 0.3 * x
    return weights


# BAGEL


def bagel_weights(layers=2, hidden=80, vocabulary=32):
    """Under the names of BAGEL's ``ema.safetensors``."""
    D, q, kv, p = BAGEL_WIDTH, BAGEL_HEADS * BAGEL_DIM, BAGEL_PAIRS * BAGEL_DIM, BAGEL_PATCH
    shapes = {
        "vae2llm.weight": (D, p * p * Z), "vae2llm.bias": (D,), "llm2vae.weight": (p * p * Z, D),
        "llm2vae.bias": (p * p * Z,), "time_embedder.mlp.0.weight": (D, 256), "time_embedder.mlp.0.bias": (D,),
        "time_embedder.mlp.2.weight": (D, D), "time_embedder.mlp.2.bias": (D,),
        "language_model.model.embed_tokens.weight": (vocabulary, D), "language_model.model.norm.weight": (D,),
        "language_model.model.norm_moe_gen.weight": (D,), "language_model.lm_head.weight": (vocabulary, D),
        "connector.fc1.weight": (D, 20), "connector.fc1.bias": (D,), "vit_pos_embed.pos_embed": (9, D),
        "vit_model.vision_model.encoder.layers.0.layer_norm1.weight": (20,),
        "vit_model.vision_model.embeddings.patch_embedding.weight": (20, 588),
    }  # fmt: skip
    for i in range(layers):
        for gen in ("", GEN):
            layer = f"language_model.model.layers.{i}."
            for part, size in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{layer}self_attn.{part}_proj{gen}.weight"] = (size, D)
                shapes[f"{layer}self_attn.{part}_proj{gen}.bias"] = (size,)
            shapes[f"{layer}self_attn.o_proj{gen}.weight"] = (D, q)
            shapes[f"{layer}self_attn.q_norm{gen}.weight"] = shapes[f"{layer}self_attn.k_norm{gen}.weight"] = (
                BAGEL_DIM,
            )
            shapes[f"{layer}mlp{gen}.gate_proj.weight"] = shapes[f"{layer}mlp{gen}.up_proj.weight"] = (hidden, D)
            shapes[f"{layer}mlp{gen}.down_proj.weight"] = (D, hidden)
            shapes[f"{layer}input_layernorm{gen}.weight"] = (D,)
            shapes[f"{layer}post_attention_layernorm{gen}.weight"] = (D,)
    return {**randoms(shapes, seed=1), "latent_pos_embed.pos_embed": bagel_positions()}


def bagel_positions():
    """The frozen table of 64 x 64 places, row by row; each axis has half of the width, the column's first."""
    rates = 1 / 10000 ** (np.arange(BAGEL_WIDTH // 4) / (BAGEL_WIDTH / 4))
    rows = []
    for row in range(BAGEL_SIDE):
        for column in range(BAGEL_SIDE):
            halves = [np.concatenate([np.sin(place * rates), np.cos(place * rates)]) for place in (column, row)]
            rows.append(np.concatenate(halves))
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def bagel_forward(weights, latents, t, ids, source):
    """[clean source | text | noisy latents] → velocity ``Z h w`` of the noisy latents ``Z h w``; t = 1 is noise."""
    language = "language_model.model."
    parts = [weights[f"{language}embed_tokens.weight"][ids], bagel_image(weights, latents, t)]
    kinds, positions = ["text"] * len(ids) + ["noise"] * len(parts[1]), list(range(len(ids)))
    if source is not None:  # a whole image takes one position
        parts.insert(0, bagel_image(weights, source, 0.0))
        kinds = ["source"] * len(parts[0]) + kinds
        positions = [0] * len(parts[0]) + [1 + position for position in positions]
    positions += [1 + positions[-1]] * len(parts[-1])
    x, image = torch.cat(parts), torch.tensor([kind != "text" for kind in kinds])[:, None]
    order = ["source", "text", "noise"]
    sees = torch.zeros(len(x), len(x), dtype=torch.bool)
    for i in range(len(x)):
        for j in range(len(x)):
            a, b = order.index(kinds[i]), order.index(kinds[j])
            sees[i, j] = b < a or (a == b and (kinds[i] != "text" or j <= i))
    for index in range(2):
        x = bagel_block(weights, f"{language}layers.{index}.", x, image, torch.tensor(positions), sees)
    x = rms(x, weights[f"{language}norm_moe_gen.weight"])[-len(parts[-1]) :]
    x = x @ weights["llm2vae.weight"].T + weights["llm2vae.bias"]
    h, w = latents.shape[1] // BAGEL_PATCH, latents.shape[2] // BAGEL_PATCH
    x = x.reshape(h, w, BAGEL_PATCH, BAGEL_PATCH, Z)
    return torch.einsum("hwpqc->chpwq", x).reshape(latents.shape)


def bagel_image(weights, latents, t):
    p = BAGEL_PATCH
    h, w = latents.shape[1] // p, latents.shape[2] // p
    patches = torch.einsum("chpwq->hwpqc", latents.reshape(Z, h, p, w, p)).reshape(h * w, p * p * Z)
    places = [row * BAGEL_SIDE + column for row in range(h) for column in range(w)]
    rates = torch.exp(-np.log(10000) * torch.arange(128) / 128)
    waves = torch.cat([torch.cos(t * rates), torch.sin(t * rates)])
    time = F.silu(waves @ weights["time_embedder.mlp.0.weight"].T + weights["time_embedder.mlp.0.bias"])
    time = time @ weights["time_embedder.mlp.2.weight"].T + weights["time_embedder.mlp.2.bias"]
    tokens = patches @ weights["vae2llm.weight"].T + weights["vae2llm.bias"]
    return tokens + time + weights["latent_pos_embed.pos_embed"][places]


def bagel_block(weights, layer, x, image, positions, sees):
    """Each token goes through its own set of weights; attention is joint."""

    def own(x, name, leaf_of):
        return torch.where(image, leaf_of(x, name(GEN)), leaf_of(x, name("")))

    def linear(x, name):
        bias = weights.get(f"{layer}{name}.bias")
        return x @ weights[f"{layer}{name}.weight"].T + (0 if bias is None else bias)

    def norm(x, name):
        return rms(x, weights[f"{layer}{name}.weight"])

    y = own(x, lambda gen: f"input_layernorm{gen}", norm)
    q, k, v = (own(y, lambda gen, part=part: f"self_attn.{part}_proj{gen}", linear) for part in "qkv")
    outs = []
    for head in range(BAGEL_HEADS):
        pair = head * BAGEL_PAIRS // BAGEL_HEADS
        q_head, k_head, v_head = (
            z[:, i * BAGEL_DIM : (i + 1) * BAGEL_DIM] for z, i in ((q, head), (k, pair), (v, pair))
        )
        q_head = rotate_halves(own(q_head, lambda gen: f"self_attn.q_norm{gen}", norm), positions, 1e6)
        k_head = rotate_halves(own(k_head, lambda gen: f"self_attn.k_norm{gen}", norm), positions, 1e6)
        scores = (q_head @ k_head.T / BAGEL_DIM**0.5).masked_fill(~sees, -torch.inf)
        outs.append(scores.softmax(-1) @ v_head)
    x = x + own(torch.cat(outs, dim=-1), lambda gen: f"self_attn.o_proj{gen}", linear)
    y = own(x, lambda gen: f"post_attention_layernorm{gen}", norm)

    def mlp(y, name):
        gate, up = linear(y, f"{name}.gate_proj"), linear(y, f"{name}.up_proj")
        return linear(F.silu(gate) * up, f"{name}.down_proj")

    return x + own(y, lambda gen: f"mlp{gen}", mlp)


def rotate_halves(x, positions, theta):
    d = x.shape[-1]
    angles = positions[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    first, second = x[:, : d // 2], x[:, d // 2 :]
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    return torch.cat(turned, dim=-1)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


# RAE


def rae_weights(trunk, depth, seed=2, patch=1):
    """Under the names of RAE's stage-2 file: ``trunk`` blocks of its own generator, then the head's."""
    h, w, p = RAE_TRUNK, RAE_WIDTH, patch
    shapes = {
        "pos_embed": (1, 16, h), "s_embedder.proj.weight": (h, Z, p, p), "s_embedder.proj.bias": (h,),
        "x_embedder.proj.weight": (w, Z, p, p), "x_embedder.proj.bias": (w,), "s_projector.weight": (w, h),
        "s_projector.bias": (w,), "t_embedder.W": (256,), "t_embedder.mlp.0.weight": (h, 512),
        "t_embedder.mlp.0.bias": (h,), "t_embedder.mlp.2.weight": (h, h), "t_embedder.mlp.2.bias": (h,),
        "y_embedder.embedding_table.weight": (11, h), "enc_feat_rope.freqs_cos": (16, 24),
        "enc_feat_rope.freqs_sin": (16, 24), "dec_feat_rope.freqs_cos": (16, 32), "dec_feat_rope.freqs_sin": (16, 32),
        "final_layer.norm_final.weight": (w,), "final_layer.linear.weight": (p * p * Z, w),
        "final_layer.linear.bias": (p * p * Z,),
        "final_layer.adaLN_modulation.1.weight": (2 * w, w), "final_layer.adaLN_modulation.1.bias": (2 * w,),
    }  # fmt: skip
    for i in range(trunk + depth):
        D = h if i < trunk else w
        hidden = int(2 / 3 * int(4 * D))
        sizes = {
            "attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.w12": (2 * hidden, D), "mlp.w3": (D, hidden),
            "adaLN_modulation.1": (6 * D, D),
        }  # fmt: skip
        for name, size in sizes.items():
            shapes |= {f"blocks.{i}.{name}.weight": size, f"blocks.{i}.{name}.bias": size[:1]}
        shapes |= {f"blocks.{i}.norm1.weight": (D,), f"blocks.{i}.norm2.weight": (D,)}
    return randoms(shapes, seed)


def rae_head(weights, latents, s, t, *, first, depth, heads, theta):
    """Noisy latents ``B C h w``, the trunk's tokens ``B N h`` and the embedding of t ``B h`` → ``B C h w``."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]

    def modulation(name, count):
        return linear(F.silu(s), f"{name}.adaLN_modulation.1").chunk(count, dim=-1)

    kernel = weights["x_embedder.proj.weight"]
    p = kernel.shape[-1]
    s = linear(F.silu(t[:, None] + s), "s_projector")
    x = F.conv2d(latents, kernel, weights["x_embedder.proj.bias"], stride=p)
    h, w = x.shape[2:]
    x = torch.einsum("bchw->bhwc", x).reshape(len(latents), h * w, -1)
    for i in range(first, first + depth):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(name, 6)
        y = rms(x, weights[f"{name}.norm1.weight"]) * (1 + scale1) + shift1
        x = x + gate1 * linear(rae_attention(linear(y, f"{name}.attn.qkv"), heads, (h, w), theta), f"{name}.attn.proj")
        y = rms(x, weights[f"{name}.norm2.weight"]) * (1 + scale2) + shift2
        first_half, second_half = linear(y, f"{name}.mlp.w12").chunk(2, dim=-1)
        x = x + gate2 * linear(F.silu(first_half) * second_half, f"{name}.mlp.w3")
    shift, scale = modulation("final_layer", 2)
    x = linear(rms(x, weights["final_layer.norm_final.weight"]) * (1 + scale) + shift, "final_layer.linear")
    x = x.reshape(len(latents), h, w, p, p, latents.shape[1])
    return torch.einsum("nhwpqc->nchpwq", x).reshape(latents.shape)


def rae_attention(qkv, heads, grid, theta):
    """Neighbouring channels are turned together; the first half of a head by the row, the second by the column."""
    outs = []
    width = qkv.shape[-1] // 3
    d = width // heads
    half = d // 2
    rates = torch.tensor([1 / theta ** (2 * i / half) for i in range(half // 2)])
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    angles = torch.stack([torch.cat([row * rates, column * rates]) for row, column in cells]).repeat_interleave(2, -1)

    def turned(x):
        swapped = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return x * angles.cos() + swapped * angles.sin()

    for head in range(heads):
        q, k, v = (qkv[..., part * width + head * d : part * width + (head + 1) * d] for part in range(3))
        outs.append((turned(q) @ turned(k).mT / d**0.5).softmax(-1) @ v)
    return torch.cat(outs, dim=-1)
