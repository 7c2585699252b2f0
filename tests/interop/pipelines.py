"""Tiny pipelines of the four families, randomly initialised, with tokenizers made here."""

from __future__ import annotations

import functools
import string
from typing import Any

import torch
from tests.stirring import stirred

SIZE = (16, 16)
"""Height and width of the images; their latents are 4 x 8 x 8."""
PROMPTS = ["a red fox", "two blue doors"]
MANY = [f"{word} fox" for word in ("a", "one", "the", "my", "no")]


def clip_tokenizer() -> Any:
    """Letters, and letters that end a word."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def clip(projection: bool = False, seed: int = 0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return stirred(kind(config))


def t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=16)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    return stirred(
        T5EncoderModel(
            T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    )


def vae(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(4)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 2}
    return AutoencoderKL(
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 8), **blocks, **config
    ).eval()


def unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(6)
    options = {"cross_attention_dim": 8, "attention_head_dim": 2, **config}
    return stirred(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            **options,
        ),
        0.03,
    )


def ddim(**config: Any) -> Any:
    """Stable Diffusion's schedule, ending at clean data unless asked otherwise."""
    from diffusers import DDIMScheduler

    options = {"set_alpha_to_one": True, "steps_offset": 1, "clip_sample": False, **config}
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options
    )


def sd(scheduler: Any = None) -> Any:
    from diffusers import StableDiffusionPipeline

    return quiet(
        StableDiffusionPipeline(
            vae=vae(),
            text_encoder=clip(),
            tokenizer=clip_tokenizer(),
            unet=unet(),
            scheduler=scheduler or ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl(scheduler: Any = None) -> Any:
    from diffusers import StableDiffusionXLPipeline

    network = unet(
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,
        use_linear_projection=True,
    )
    return quiet(
        StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.13025),
            text_encoder=clip(),
            text_encoder_2=clip(projection=True, seed=1),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=network,
            scheduler=scheduler or ddim(),
            add_watermarker=False,
        )
    )


def flow_scheduler(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def sd3(scheduler: Any = None, *, medium: bool = False) -> Any:
    """Stable Diffusion 3, or 3.5 with dual attention and normalised queries."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(7)
    options: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        **(options if medium else {}),
    )
    return quiet(
        StableDiffusion3Pipeline(
            transformer=stirred(network),
            scheduler=scheduler or flow_scheduler(shift=3.0),
            vae=vae(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=clip(projection=True),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip(projection=True, seed=1),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5(),
            tokenizer_3=t5_tokenizer(),
        )
    )


def flux(scheduler: Any = None) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(8)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return quiet(
        FluxPipeline(
            scheduler=scheduler or flow_scheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae(shift_factor=0.1, scaling_factor=0.4),
            text_encoder=clip(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=t5_tokenizer(),
            transformer=stirred(network),
        )
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def shared(name: str) -> Any:
    """A pipeline of a family that tests read and leave as it is."""
    return {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}[name]()


def tokens(name: str) -> int | None:
    """A short T5 part, for the families that have one."""
    return 12 if name in ("sd3", "flux") else None


def noises(count: int = len(PROMPTS)) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def stock(name: str, pipe: Any, steps: int, *, guidance: float = 1.0, latents: Any = None) -> Any:
    """Latents that the stock pipeline makes of the prompts and the noises."""
    x = noises() if latents is None else latents
    options: dict[str, Any] = {"guidance_scale": guidance}
    if name in ("sd3", "flux"):
        options["max_sequence_length"] = tokens(name)
    if name == "flux":
        x = pipe._pack_latents(x, len(x), 4, 8, 8)
    found = pipe(
        PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=steps,
        latents=x,
        output_type="latent",
        **options,
    ).images
    return pipe._unpack_latents(found, *SIZE, pipe.vae_scale_factor) if name == "flux" else found
