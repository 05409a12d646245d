"""DeepFusionDiT: prefix, noisy latents, σ → velocity (PS-VAE, section 3.4).

    [source latents | text | noisy latents] ─blocks─▶ condition ─head, which reads the noisy latents again─▶ velocity

A segment attends to the segments before it and to itself, text causally, latents in full. Only the noisy latents see
the noise, so whatever stands before them is encoded once, into a `PrefixCache`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psvae.errors import ConfigError
from psvae.flow import velocity_from_clean
from psvae.generators import checks
from psvae.generators.build import decoder_blocks, freeze_dead_ends, head_of, initialise, text_projections
from psvae.generators.config import DeepFusionDiTConfig
from psvae.generators.head import image_of, patches_of
from psvae.generators.inputs import TimeEmbedding
from psvae.generators.loading import language_model_config, read_part
from psvae.generators.masks import causal_mask, check_mask, without, word_positions
from psvae.generators.prefix import PrefixCache
from psvae.hub.keymaps.bagel import BAGEL
from psvae.hub.keymaps.ddt import DDT_HEAD
from psvae.hub.keymaps.llm import LANGUAGE_MODEL
from psvae.hub.mixin import HubMixin, build_empty
from psvae.hub.reading import Checkpoint
from psvae.hub.source import Source
from psvae.hub.writing import write_file
from psvae.nn.attention import Backend, check_backend
from psvae.nn.decoder import KeysValues, RMSNorm
from psvae.nn.positions import sincos_grid
from psvae.nn.rope import Rope, grid_positions, rope
from psvae.shapes import Latents, Tokens, check_dtype

__all__ = ["DeepFusionDiT", "DeepFusionOutput"]


class DeepFusionOutput(NamedTuple):
    """What `DeepFusionDiT` returns.

    Attributes:
        sample: the velocity, ``B Z h w``.
        condition: the trunk's tokens ``B N D``, which the head read.
        hidden_states: of the noisy tokens after the blocks asked for, each ``B N D``.
    """

    sample: Latents
    condition: Tokens
    hidden_states: tuple[Tokens, ...] = ()


class DeepFusionDiT(nn.Module, HubMixin):
    """Text-to-image and editing by flow matching on latents.

    σ is 0 for clean latents and 1 for noise; `forward` returns the velocity ε − x (see `psvae.flow`). The head gives
    zeros before the first training step: so is the velocity, or with ``prediction="sample"`` x_σ / max(σ, floor).

    Attributes:
        layers: the blocks of text and images (``fusion="shared"``), of text (``"mot"``), of images (``"prefix"``).
        image_layers: the blocks of images with ``"mot"``, otherwise None.
    """

    config_class = DeepFusionDiTConfig
    foreign_formats = (BAGEL,)
    pipeline_tag = "text-to-image"

    def __init__(self, config: DeepFusionDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend: Backend = "sdpa"
        width, eps = config.hidden_size, config.rms_norm_eps
        two = config.fusion == "mot"
        has_words = config.fusion != "prefix" and config.vocab_size is not None
        self.embed_tokens = nn.Embedding(config.vocab_size or 0, width) if has_words else None
        self.embed_latents = nn.Linear(config.in_channels * config.patch_size**2, width)
        self.embed_time = TimeEmbedding(width, config.timestep_scale) if config.time_conditioning else None
        self.text_projections = text_projections(config)
        self.layers = decoder_blocks(config)
        self.norm = RMSNorm(width, eps)
        self.image_layers = decoder_blocks(config) if two else None
        self.image_norm = RMSNorm(width, eps) if two else None
        self.head = head_of(config)
        initialise(self, new=(self.embed_latents, *(self.text_projections or ())), head=self.head)
        if two:
            freeze_dead_ends(self.layers, self.norm)

    # The data's path

    def forward(
        self,
        latents: Latents,
        timestep: Float[Tensor, " B"],
        prefix: PrefixCache | None = None,
        *,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tokens | None = None,
        encoder_hidden_states: Tensor | None = None,
        source_latents: Tensor | None = None,
        drop_text: Bool[Tensor, " B"] | None = None,
        drop_source: Bool[Tensor, " B"] | None = None,
        condition: Tokens | None = None,
        return_layers: tuple[int, ...] = (),
    ) -> DeepFusionOutput:
        """The velocity at x_σ.

        Args:
            latents: noisy, ``B Z h w``, h and w multiples of ``patch_size``.
            timestep: σ in [0, 1], not 0..1000.
            prefix: from `encode_prefix`; one serves every sampling step. Or its arguments, ``input_ids`` to
                ``drop_source``: the form for training. With neither, nothing conditions.
            condition: of an earlier output: the head alone is run (DDT's shared condition), no prefix is needed.
            return_layers: blocks whose noisy tokens to return, counted from 0; a place for REPA's loss.

        Raises:
            ShapeError: wrong rank, channels, grid or batch; σ outside [0, 1]; NaN. DtypeError: integers, or another
                precision than the weights'. ConfigError: a prefix of another geometry; inputs that exclude each other.
        """
        config = self.config
        inputs: dict[str, Any] = {
            "input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states, "source_latents": source_latents, "drop_text": drop_text,
            "drop_source": drop_source,
        }  # fmt: skip
        given = checks.check_given(config, {"prefix": prefix, **inputs}, condition, return_layers)
        checks.check_noisy(config, latents, timestep)
        check_dtype(latents, self.embed_latents, "latents")
        batch = latents.shape[0]  # len() would be a constant of an exported graph
        patches, grid = patches_of(latents, config.patch_size)
        time = self.embed_time(timestep, latents.dtype) if self.embed_time else None
        hidden_states: dict[int, Tokens] = {}
        if condition is None:
            if not given:
                prefix = PrefixCache.empty(config, batch, device=latents.device, dtype=latents.dtype)
            elif prefix is None:
                prefix = self.encode_prefix(**inputs)
            checks.check_prefix(config, prefix, batch)
            condition, hidden_states = self._trunk(patches, grid, time, prefix, return_layers)
        else:
            checks.check_condition(config, condition, batch, patches.shape[1])
        output = image_of(self.head(patches, condition, time, grid, self.attention_backend), grid, config.patch_size)
        if config.prediction == "sample":
            output = velocity_from_clean(latents, output, timestep, config.sigma_floor)
        return DeepFusionOutput(output, condition, tuple(hidden_states[layer] for layer in return_layers))

    def encode_prefix(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tokens | None = None,
        encoder_hidden_states: Tensor | None = None,
        source_latents: Tensor | None = None,
        prefix: PrefixCache | None = None,
        drop_text: Bool[Tensor, " B"] | None = None,
        drop_source: Bool[Tensor, " B"] | None = None,
    ) -> PrefixCache:
        """Keys and values of [source latents | text]; with ``fusion="prefix"`` of [text | source latents].

        Args:
            input_ids: ``B T``; or ``inputs_embeds`` ``B T D``; or with ``fusion="prefix"``
                ``encoder_hidden_states``, ``B T D`` or ``L B T D``.
            attention_mask: ``B T``, 1 for words, 0 for padding on either side; None for no padding.
            source_latents: clean, ``B Z h w`` or ``B S Z h w``; each image sees those before it.
            prefix: to go on from, such as ``PrefixCache.from_hf(...)``.
            drop_text, drop_source: ``B``, True where an item goes without, as in training for guidance. It then
                equals an item that never had it.

        Raises:
            ShapeError: unequal batches, padding alone, more source images than configured, wrong shapes, NaN.
            DtypeError: integers, or another precision than the weights'. ConfigError: a kind of text that this
                fusion does not read, an order of segments that it does not know, or nothing to encode.
        """
        config = self.config
        if prefix is not None:
            checks.check_prefix(config, prefix)
        text = checks.check_text(
            config, input_ids=input_ids, inputs_embeds=inputs_embeds, encoder_hidden_states=encoder_hidden_states
        )
        sources = checks.check_sources(config, source_latents, prefix, self.embed_latents)
        shape = None if text is None else tuple(text.shape if text is input_ids else text.shape[-3:-1])
        batch = checks.check_batch(shape, sources, prefix, drop_text, drop_source)
        visible = check_mask(shape, attention_mask, drop_text)
        if input_ids is not None:
            text = cast(nn.Embedding, self.embed_tokens)(input_ids)
        elif text is not None:
            text = self._clean_states(text, visible)
        if prefix is None:
            like = sources[0] if text is None else text
            prefix = PrefixCache.empty(config, batch, device=like.device, dtype=like.dtype)
        if text is not None and config.fusion == "prefix":
            prefix = self._add_hidden_states(prefix, text, visible)
        for source in sources:
            prefix = self._add_source(prefix, source, drop_source)
        if text is not None and config.fusion != "prefix":
            prefix, _ = self._add_words(prefix, text, visible)
        return prefix

    def encode_text(self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None) -> Tokens:
        """The text's last hidden states ``B T D``, after the final norm: the language model that is inside.

        Its logits are these times the transposed ``embed_tokens.weight``, where the two are tied.
        """
        checks.check_text(self.config, input_ids=input_ids)
        visible = check_mask(tuple(input_ids.shape), attention_mask, None)
        words = cast(nn.Embedding, self.embed_tokens)(input_ids)
        empty = PrefixCache.empty(self.config, len(words), device=words.device, dtype=words.dtype)
        return self.norm(self._add_words(empty, words, visible)[1])

    # Segments

    def _trunk(
        self, patches: Tensor, grid: tuple[int, int], time: Tensor | None, prefix: PrefixCache, keep: Sequence[int]
    ) -> tuple[Tokens, dict[int, Tokens]]:
        """Noisy latents: in full attention, seeing all of the prefix."""
        tokens = self._embed_image(patches, grid, time)
        positions, _ = grid_positions(prefix.next_position, grid, self.config.image_rope)
        tokens, _, kept = self._attend(tokens, positions, prefix, image=True, keep=keep)
        return self.norm(tokens) if self.image_norm is None else self.image_norm(tokens), kept

    def _embed_image(self, patches: Tensor, grid: tuple[int, int], time: Tensor | None) -> Tokens:
        """Patches ``B N p²Z`` → tokens, with position and time added (as in BAGEL)."""
        tokens = self.embed_latents(patches)
        if self.config.image_position == "additive_2d":
            tokens = tokens + sincos_grid(self.config.hidden_size, grid, device=tokens.device).to(tokens.dtype)
        return tokens if time is None else tokens + time[:, None]

    def _clean_states(self, states: Tensor, visible: Tensor | None) -> Tensor:
        """Embeddings or hidden states, with zeros for padding: it may hold NaN, and 0 · NaN is NaN."""
        if visible is not None:
            states = states.masked_fill(~visible[..., None], 0)
        reader = self.layers[0].qkv if self.text_projections is None else self.text_projections[0].kv
        checks.check_states(states, cast(nn.Module, reader))
        return states

    def _add_source(self, prefix: PrefixCache, source: Latents, drop: Tensor | None) -> PrefixCache:
        """Clean latents: in full attention, at σ = 0."""
        patches, grid = patches_of(source, self.config.patch_size)
        clean = torch.zeros(len(source), device=source.device)
        time = self.embed_time(clean, source.dtype) if self.embed_time else None
        tokens = self._embed_image(patches, grid, time)
        positions, after = grid_positions(prefix.next_position, grid, self.config.image_rope)
        _, keys_values, _ = self._attend(tokens, positions, prefix, image=True)
        if drop is not None:
            after = torch.where(drop, prefix.next_position, after)
        return prefix.extend(keys_values, without(None, drop, tokens.shape[1]), after, "source")

    def _add_words(self, prefix: PrefixCache, words: Tokens, visible: Tensor | None) -> tuple[PrefixCache, Tokens]:
        """Text: causal, and sees all of the prefix so far."""
        positions, after = word_positions(prefix.next_position, words.shape[1], visible)
        masked = visible is not None or prefix.key_mask is not None
        mask = causal_mask(prefix.all_keys(), words.shape[1], visible) if masked else None
        tokens, keys_values, _ = self._attend(words, positions, prefix, image=False, mask=mask)
        return prefix.extend(keys_values, visible, after, "text"), tokens

    def _add_hidden_states(self, prefix: PrefixCache, states: Tensor, visible: Tensor | None) -> PrefixCache:
        """Another model's text: projected to each block's keys and values, once."""
        states = states if states.ndim == 4 else states[None]
        positions, after = word_positions(prefix.next_position, states.shape[2], visible)
        turns = self._rope(positions)
        layers, projections = self.config.text_layer_of_block, self.text_projections or ()
        pairs = [project(states[layer], turns) for project, layer in zip(projections, layers, strict=True)]
        return prefix.extend(pairs, visible, after, "text")

    def _attend(
        self,
        tokens: Tokens,
        positions: Int[Tensor, "B N 3"],
        prefix: PrefixCache,
        *,
        image: bool,
        mask: Bool[Tensor, "B 1 N1 P"] | None = None,
        keep: Sequence[int] = (),
    ) -> tuple[Tokens, list[KeysValues], dict[int, Tokens]]:
        """One segment through all blocks: (tokens, its own keys and values by layer, its tokens after those to keep).

        Without a mask, images see all of the prefix that is real and themselves, words are causal.
        """
        blocks = self.image_layers if image and self.image_layers is not None else self.layers
        if mask is None and prefix.key_mask is not None:
            own = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            mask = torch.cat([prefix.key_mask, own], dim=1)[:, None, None]
        causal, turns = not image and mask is None, self._rope(positions)
        keys_values, kept = [], {}
        for index, block in enumerate(blocks):
            past = (prefix.keys[index], prefix.values[index])
            arguments = (tokens, turns, past, mask, self.attention_backend, causal)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens, own = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens, own = block(*arguments)
            keys_values.append(own)
            if index in keep:
                kept[index] = tokens
        return tokens, keys_values, kept

    def _rope(self, positions: Int[Tensor, "B N 3"]) -> Rope:
        config = self.config
        return rope(positions, config.attention_head_dim, config.rope_theta, config.image_rope, config.rope_scaling)

    # Weights of others

    @classmethod
    def from_llm(
        cls,
        repo_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str = "",
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        allow_pickle: bool = False,
        **fields: Any,
    ) -> Self:
        """A new generator whose blocks are a language model's, as the paper's are Qwen2.5's; the rest is fresh.

        With ``fusion="mot"`` the images' blocks start as copies of the text's (BAGEL, LMFusion).

        Args:
            repo_or_folder: of transformers, such as ``"Qwen/Qwen2.5-0.5B"``: Qwen2, Qwen2.5, Qwen3 or Llama.
            revision, subfolder, local_files_only, token, cache_dir, allow_pickle: as in `from_pretrained`.
            **fields: of `DeepFusionDiTConfig`, such as ``in_channels``; over those that the folder tells.

        Raises:
            CheckpointError: not such a model, or of another geometry than the fields say.
            ConfigError: ``fusion="prefix"``, which has no text blocks.
        """
        source = Source(
            repo_or_folder, subfolder, revision=revision, local_files_only=local_files_only, token=token,
            cache_dir=cache_dir,
        )  # fmt: skip
        checkpoint = Checkpoint(source, file=None, variant=None, allow_pickle=allow_pickle)
        config = language_model_config(checkpoint, fields)
        empty = build_empty(cls, config, checkpoint).state_dict()  # compared before memory is taken
        text = {key: x for key, x in empty.items() if key.startswith(("embed_tokens.", "layers.", "norm."))}
        text = read_part(text, checkpoint, LANGUAGE_MODEL, config.to_dict())
        model = cls(config)
        model.load_state_dict(text, strict=False)  # the rest is fresh
        if model.image_layers is not None and model.image_norm is not None:
            model.image_layers.load_state_dict(model.layers.state_dict())
            model.image_norm.load_state_dict(model.norm.state_dict())
        return model

    def load_rae_head(self, file: str | os.PathLike[str], *, allow_pickle: bool = False) -> None:
        """Overwrite the wide head with that of RAE's generator (its stage-2 file); its trunk is left alone.

        Raises:
            CheckpointError: of another geometry; nothing is overwritten then. ConfigError: the head is not wide.
        """
        self.config.require(self.config.head == "ddt", "head", "'ddt': RAE's head is a wide one")
        checkpoint = Checkpoint(Source(file, ""), file=None, variant=None, allow_pickle=allow_pickle)
        self.head.load_state_dict(read_part(self.head.state_dict(), checkpoint, DDT_HEAD, self.config.to_dict()))

    def export_rae_head(self, file: str | os.PathLike[str]) -> None:
        """Write the wide head under RAE's names, as safetensors. An older file stays until the new one is whole.

        Raises:
            CheckpointError: it could not be written. ConfigError: the head is not wide.
        """
        self.config.require(self.config.head == "ddt", "head", "'ddt': RAE's head is a wide one")
        write_file(Path(file), DDT_HEAD.save(self.head.state_dict(), self.config.to_dict(), {}))

    # Settings

    def freeze_text(self) -> None:
        """LMFusion: the text's words and blocks stay; all that images go through, and the head, go on learning.

        Raises:
            ConfigError: text and images share their blocks.
        """
        if self.config.fusion != "mot":
            raise ConfigError(f"fusion={self.config.fusion!r} has no blocks for text alone; wanted 'mot'")
        for module in (self.embed_tokens, self.layers, self.norm):
            if module is not None:
                module.requires_grad_(False)

    def set_attention_backend(self, backend: Backend) -> None:
        """Choose the kernels; the numbers stay the same to rounding.

        Raises:
            MissingDependencyError: xformers is absent or does not run on the weights' device.
        """
        check_backend(backend, self.embed_latents.weight.device)
        self.attention_backend = backend

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the blocks, the wide head's too, in backward instead of keeping their activations."""
        self.gradient_checkpointing = self.head.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing = self.head.gradient_checkpointing = False

    def extra_repr(self) -> str:
        config = self.config
        return f"Z={config.in_channels}, patch_size={config.patch_size}, fusion={config.fusion!r}, head={config.head!r}"
