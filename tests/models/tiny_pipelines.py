"""Pipelines of Stable Diffusion 1.5's and XL's shape, tiny and random."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT = {
    "vocab_size": 54,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 16,
    "bos_token_id": 52,
    "eos_token_id": 53,
}
UNET = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer of letters."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def tiny_unet(kind: str, **config) -> UNet2DConditionModel:
    """Of 4 self-attentions, one a block as in Stable Diffusion 1.5, or of 8, two a block as XL has up to ten."""
    if kind == "sd":
        return UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,  # in truth the number of heads
            cross_attention_dim=16,
            **UNET,
            **config,
        )
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),  # in truth the number of heads
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        **UNET,
        **config,
    )


def tiny_pipeline(kind: str, folder: Path) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )
    parts = {"vae": vae, "unet": tiny_unet(kind), "tokenizer": tokenizer(folder)}
    text = CLIPTextConfig(**TEXT)
    if kind == "sd":
        pipeline = StableDiffusionPipeline(
            text_encoder=CLIPTextModel(text),
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    else:
        pipeline = StableDiffusionXLPipeline(
            text_encoder=CLIPTextModel(text),
            text_encoder_2=CLIPTextModelWithProjection(text),
            tokenizer_2=parts["tokenizer"],
            scheduler=EulerDiscreteScheduler(),
            add_watermarker=False,
            **parts,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
