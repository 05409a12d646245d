"""`DeepFusionDiT`'s trunk written a second time, from the paper's words: one sequence, one dense mask, no cache.

Weights are the module's own; rotary positions, masks and attention are computed here, item by item. The sequence is
[sources | text | noisy latents]; with another model's hidden states, the text comes first.
"""

import torch
from torch.nn import functional as F

from psvae.nn.positions import sincos_grid


def dense_trunk(model, latents, sigma, words=None, sources=(), states=None):
    """One item: noisy latents ``Z h w``, σ, the text's embeddings ``T D`` or hidden states ``L T D``, the sources
    ``Z h w`` → condition ``N D``, and of what stands before the noisy latents keys and values, each ``L kv P d``.
    """
    config = model.config
    if states is not None:  # of these a block has keys and values; the tokens in their place are read by none
        words = torch.zeros(states.shape[1], config.hidden_size)
    segments = [(f"source {number}", source) for number, source in enumerate(sources)]
    if words is not None:
        segments.insert(len(segments) if states is None else 0, ("text", words))
    segments.append(("noisy", latents))
    tokens, positions, kinds, start = [], [], [], 0
    for kind, content in segments:
        if kind == "text":
            tokens.append(content)
            places, start = [(start + i,) * 3 for i in range(len(content))], start + len(content)
        else:
            tokens.append(image_tokens(model, content, sigma if kind == "noisy" else 0.0))
            places, start = image_places(start, *content.shape[-2:], config)
        positions += places
        kinds += [kind] * len(places)
    before = kinds.index("noisy")
    x = torch.cat(tokens)
    mask = visibility(kinds)
    angles = rotary_angles(positions, config)
    image = torch.tensor([kind != "text" for kind in kinds])
    cache = []
    for index, text_block in enumerate(model.layers):
        image_block = text_block if model.image_layers is None else model.image_layers[index]
        given = None if states is None else projected(model, index, states)
        x, *keys_values = block(text_block, image_block, image[:, None], x, angles, mask, config, given)
        cache.append([part[:, :before] for part in keys_values])
    norm = model.norm if model.image_norm is None else model.image_norm
    return norm(x[before:]), *(torch.stack(part) for part in zip(*cache, strict=True))


def projected(model, index, states):
    """One block's keys, not yet turned, and values of hidden states, each ``kv T d``."""
    config, project = model.config, model.text_projections[index]
    found = project.kv(project.norm(states[config.text_layer_of_block[index]]))
    keys, values = found.view(-1, 2, config.num_key_value_heads, config.attention_head_dim).permute(1, 2, 0, 3)
    return project.k_norm(keys), values


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


def block(text, images, is_image, x, angles, mask, config, given=None):
    """The Qwen block of Hugging Face's documentation, head by head; each token by its own kind's weights.

    ``given``: keys and values of the first tokens, in place of the block's own. Returns the tokens, keys and values.
    """
    d, heads, pairs = config.attention_head_dim, config.num_attention_heads, config.num_key_value_heads

    def own(compute):
        return torch.where(is_image, compute(images), compute(text))

    q, k, v = own(lambda m: m.qkv(m.norm1(x))).split([heads * d, pairs * d, pairs * d], dim=-1)
    keys, values = [], []
    for pair in range(pairs):
        k_pair, v_pair = k[:, pair * d : (pair + 1) * d], v[:, pair * d : (pair + 1) * d]
        k_pair = own(lambda m, k=k_pair: m.k_norm(k))
        if given is not None:
            length = given[0].shape[1]
            k_pair, v_pair = (torch.cat([x[pair], y[length:]]) for x, y in zip(given, (k_pair, v_pair), strict=True))
        keys.append(turn(k_pair, angles))
        values.append(v_pair)
    outs = []
    for head in range(heads):
        pair = head * pairs // heads
        q_head = turn(own(lambda m, q=q[:, head * d : (head + 1) * d]: m.q_norm(q)), angles)
        scores = (q_head @ keys[pair].T / d**0.5).masked_fill(~mask, -torch.inf)
        outs.append(scores.softmax(dim=-1) @ values[pair])
    attended = torch.cat(outs, dim=-1)
    x = x + own(lambda m: m.proj(attended))
    gate, up = own(lambda m: m.mlp.gate_up(m.norm2(x))).chunk(2, dim=-1)
    return x + own(lambda m: m.mlp.down(F.silu(gate) * up)), torch.stack(keys), torch.stack(values)


def turn(x, angles):
    half = x.shape[-1] // 2
    pairs = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)
