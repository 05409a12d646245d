"""`DeepFusionDiT`'s trunk written a second time, from the paper's words: one sequence, one dense mask, no cache.

Weights are the module's own; rotary positions, masks and attention are computed here, item by item.
"""

import torch
from torch.nn import functional as F

from psvae.nn.positions import sincos_grid


def dense_trunk(model, latents, sigma, words=None, sources=()):
    """One item: noisy latents ``Z h w``, σ, the text's embeddings ``T D``, sources ``Z h w`` → condition ``N D``."""
    config = model.config
    tokens, positions, kinds, start = [], [], [], 0
    for number, source in enumerate(sources):
        tokens.append(image_tokens(model, source, 0.0))
        places, start = image_places(start, *source.shape[-2:], config)
        positions += places
        kinds += [f"source {number}"] * len(places)
    if words is not None:
        tokens.append(words)
        positions += [(start + i,) * 3 for i in range(len(words))]
        kinds += ["text"] * len(words)
        start += len(words)
    tokens.append(image_tokens(model, latents, sigma))
    places, _ = image_places(start, *latents.shape[-2:], config)
    positions += places
    kinds += ["noisy"] * len(places)
    x = torch.cat(tokens)
    mask = visibility(kinds)
    angles = rotary_angles(positions, config)
    image = torch.tensor([kind != "text" for kind in kinds])
    for index, text_block in enumerate(model.layers):
        image_block = text_block if model.image_layers is None else model.image_layers[index]
        x = block(text_block, image_block, image[:, None], x, angles, mask, config)
    norm = model.norm if model.image_norm is None else model.image_norm
    return norm(x[-latents.shape[-2] * latents.shape[-1] :])


def image_tokens(model, latents, sigma):
    config = model.config
    x = model.embed_latents(latents.flatten(1).T)
    if config.image_position == "additive_2d":
        x = x + sincos_grid(config.hidden_size, latents.shape[-2:])[0]
    if model.embed_time is not None:
        x = x + model.embed_time(torch.tensor([sigma]), x.dtype)
    return x


def image_places(start, h, w, config):
    cells = [(i, j) for i in range(h) for j in range(w)]
    if config.image_rope == "shared_index":
        return [(start,) * 3 for _ in cells], start + 1
    if config.image_rope == "1d":
        return [(start + n,) * 3 for n in range(h * w)], start + h * w
    return [(start, start + i, start + j) for i, j in cells], start + max(h, w)


def visibility(kinds):
    order = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
    count = len(kinds)
    mask = torch.zeros(count, count, dtype=torch.bool)
    for i, query in enumerate(kinds):
        for j, key in enumerate(kinds):
            same_causal = query == key and (query != "text" or j <= i)
            mask[i, j] = order[key] < order[query] or same_causal
    return mask


def rotary_angles(positions, config):
    d = config.attention_head_dim
    rows = []
    for time, row, column in positions:
        angles = []
        for k in range(d // 2):
            where = time
            if config.image_rope == "2d":
                where = (row, column)[k % 2]
            if config.image_rope == "mrope":
                sections = (d // 8, d // 8 + 3 * d // 16)
                where = time if k < sections[0] else row if k < sections[1] else column
            angles.append(where * config.rope_theta ** (-2 * k / d))
        rows.append(angles)
    return torch.tensor(rows)


def block(text, images, is_image, x, angles, mask, config):
    """The Qwen block of Hugging Face's documentation, head by head; each token by its own kind's weights."""
    d, heads, pairs = config.attention_head_dim, config.num_attention_heads, config.num_key_value_heads

    def own(compute):
        return torch.where(is_image, compute(images), compute(text))

    q, k, v = own(lambda m: m.qkv(m.norm1(x))).split([heads * d, pairs * d, pairs * d], dim=-1)
    outs = []
    for head in range(heads):
        pair = head * pairs // heads
        q_head, k_head = q[:, head * d : (head + 1) * d], k[:, pair * d : (pair + 1) * d]
        q_head = turn(own(lambda m, q=q_head: m.q_norm(q)), angles)
        k_head = turn(own(lambda m, k=k_head: m.k_norm(k)), angles)
        scores = (q_head @ k_head.T / d**0.5).masked_fill(~mask, -torch.inf)
        outs.append(scores.softmax(dim=-1) @ v[:, pair * d : (pair + 1) * d])
    attended = torch.cat(outs, dim=-1)
    x = x + own(lambda m: m.proj(attended))
    gate, up = own(lambda m: m.mlp.gate_up(m.norm2(x))).chunk(2, dim=-1)
    return x + own(lambda m: m.mlp.down(F.silu(gate) * up))


def turn(x, angles):
    half = x.shape[-1] // 2
    pairs = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)
