"""A tiny whole pipeline, its weights random, of each pipeline class of diffusers that quantdit takes.

Transformers are those of tiny_models.py, with the channels of their autoencoder and the width of their text encoder. Schedulers
are the published ones. Tests load this file by its path: the folder is no package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quantdit.pipelines.call_arguments import PROMPTS
from tiny_models import TINY

WIDTH = 48  # of the text states that the transformers of TINY take
POOLED = 24
WORDS = ("<pad>", "</s>", "<unk>", *sorted({word for prompt in PROMPTS for word in prompt.replace(",", " ,").split()}))
CHAT = (
    "{% for message in messages %}{{ message.role }} : "
    "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}"
    "</s>{% endfor %}"
)


@dataclass(frozen=True)
class TinyPipeline:
    """How a tiny pipeline is made, and how small the samples are that it makes.

    Attributes:
        components: returns what the class's constructor takes, by name.
        size: height, width and, of clips, frames; empty where the class makes samples of one size.
        cls: of the pipeline, where it is not the table's key.
    """

    components: Callable[[], dict]
    size: tuple[int, ...] = (32, 32)
    cls: str = ""

    @property
    def options(self) -> tuple[str | int, ...]:
        """The size, as options of the command line."""
        names = ("--height", "--width", "--frames")
        return tuple(x for pair in zip(names, self.size, strict=False) for x in pair)


def write_tiny(name: str, folder: Path) -> Path:
    """Write the pipeline of this name in PIPELINES into a folder."""
    import diffusers

    torch.manual_seed(0)
    tiny = PIPELINES[name]
    made = getattr(diffusers, tiny.cls or name)(**tiny.components())
    for part in made.components.values():
        for parameter in part.parameters() if isinstance(part, nn.Module) else ():
            if not bool(torch.isfinite(parameter).all()):  # some classes leave parameters unset (Z-Image's padding tokens)
                nn.init.normal_(parameter, std=0.02)
    made.save_pretrained(folder)
    return folder


def _transformer(name: str, **changed: object) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**TINY[name][0] | changed)


def _tokenizer(length: int = 512):
    """One token a word of the built-in prompts, the end of the text marked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", WORDS.index("</s>"))])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=length, padding_side="right", **special)
    made.chat_template = CHAT
    return made


def _t5(name: str = "T5", width: int = WIDTH) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    return getattr(transformers, f"{name}EncoderModel")(config)


def _clip(width: int, projected: bool = False, layers: int = 1) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _llm(cls: str, config: str, width: int = WIDTH, layers: int = 2, **more: object) -> nn.Module:
    """A language model of the class."""
    import transformers

    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    return getattr(transformers, cls)(getattr(transformers, config)(**sizes | more))


def _kl(scale: int, channels: int = 4, **more: object) -> nn.Module:
    """An autoencoder of images whose latents are `scale` times smaller."""
    from diffusers import AutoencoderKL

    levels = scale.bit_length()
    return AutoencoderKL(
        block_out_channels=(2,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=1,
        latent_channels=channels,
        sample_size=32,
        **more,
    )


def _flow(**more: object):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


def _dynamic_flow(**more: object):
    """Flow matching that shifts its steps by the number of patches, as Flux and its like do."""
    return _flow(use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, **more)


# Latents are multiplied by it: random decoders of this kind otherwise draw little but their own biases.
LATENTS_STD = [500.0] * 4
FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def _wan(parts: int = 1, **more: object) -> dict:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    names = ("transformer", "transformer_2")[:parts]
    return {
        "tokenizer": _tokenizer(),
        "text_encoder": _t5("UMT5"),
        "vae": AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=LATENTS_STD
        ),
        "scheduler": UniPCMultistepScheduler(**flow),
        **{name: _transformer("WanTransformer3DModel") for name in names},
        **more,
    }


def _flux() -> dict:
    return {
        "scheduler": _dynamic_flow(),
        "vae": _kl(8, **FLUX_VAE),
        "text_encoder": _clip(POOLED),
        "tokenizer": _tokenizer(77),
        "text_encoder_2": _t5(),
        "tokenizer_2": _tokenizer(),
        "transformer": _transformer("FluxTransformer2DModel"),
    }


def _sd3() -> dict:
    # Both CLIPs side by side give the pooled vector, and are padded to the width of T5.
    return {
        "scheduler": _flow(shift=3.0),
        "vae": _kl(8, **FLUX_VAE),
        "text_encoder": _clip(POOLED // 2, projected=True, layers=2),
        "tokenizer": _tokenizer(77),
        "text_encoder_2": _clip(POOLED // 2, projected=True, layers=2),
        "tokenizer_2": _tokenizer(77),
        "text_encoder_3": _t5(),
        "tokenizer_3": _tokenizer(),
        "transformer": _transformer("SD3Transformer2DModel"),
    }


def _pixart(scale: int, **changed: object) -> dict:
    from diffusers import DPMSolverMultistepScheduler

    return {
        "tokenizer": _tokenizer(),
        "text_encoder": _t5(),
        "vae": _kl(scale),
        "transformer": _transformer("PixArtTransformer2DModel", out_channels=8, **changed),
        "scheduler": DPMSolverMultistepScheduler(),
    }


def _dit() -> dict:
    from diffusers import DDIMScheduler

    # The pipeline fixes the number of classes.
    return {
        "transformer": _transformer("DiTTransformer2DModel", num_embeds_ada_norm=1000),
        "vae": _kl(2),
        "scheduler": DDIMScheduler(),
    }


def _hunyuan_video() -> dict:
    from diffusers import AutoencoderKLHunyuanVideo

    return {
        # The third state from the end is taken.
        "text_encoder": _llm("LlamaModel", "LlamaConfig", layers=3),
        "tokenizer": _tokenizer(),
        "transformer": _transformer("HunyuanVideoTransformer3DModel"),
        "vae": AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            mid_block_add_attention=False,
        ),
        "scheduler": _flow(shift=7.0),
        "text_encoder_2": _clip(POOLED),
        "tokenizer_2": _tokenizer(77),
    }


def _cogvideox() -> dict:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler

    blocks = 4
    return {
        "tokenizer": _tokenizer(),
        "text_encoder": _t5(),
        "vae": AutoencoderKLCogVideoX(
            block_out_channels=(4,) * blocks,
            down_block_types=("CogVideoXDownBlock3D",) * blocks,
            up_block_types=("CogVideoXUpBlock3D",) * blocks,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        "transformer": _transformer("CogVideoXTransformer3DModel", max_text_seq_length=226),
        "scheduler": CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0),
    }


def _ltx() -> dict:
    from diffusers import AutoencoderKLLTXVideo

    return {
        "scheduler": _dynamic_flow(base_image_seq_len=1024, max_image_seq_len=4096, shift_terminal=0.1),
        "vae": AutoencoderKLLTXVideo(
            latent_channels=16,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        "text_encoder": _t5(),
        "tokenizer": _tokenizer(),
        "transformer": _transformer("LTXVideoTransformer3DModel"),
    }


def _latte() -> dict:
    from diffusers import DDIMScheduler

    return {
        "tokenizer": _tokenizer(),
        "text_encoder": _t5(),
        "vae": _kl(8),
        "transformer": _transformer("LatteTransformer3DModel"),
        "scheduler": DDIMScheduler(beta_schedule="linear", clip_sample=False),
    }


def _sana() -> dict:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler

    levels = 7
    return {
        "tokenizer": _tokenizer(),
        "text_encoder": _llm("Gemma2Model", "Gemma2Config"),
        "vae": AutoencoderDC(
            latent_channels=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(4,) * levels,
            decoder_block_out_channels=(4,) * levels,
            encoder_qkv_multiscales=((),) * levels,
            decoder_qkv_multiscales=((),) * levels,
            encoder_layers_per_block=(1,) * levels,
            decoder_layers_per_block=(1,) * levels,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        # The pipeline knows the samples of four sizes of latents, 16 the smallest.
        "transformer": _transformer("SanaTransformer2DModel", sample_size=16),
        "scheduler": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def _qwen_image() -> dict:
    from diffusers import AutoencoderKLQwenImage
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [4, 4, 4], "rope_type": "default", "type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    return {
        "scheduler": _dynamic_flow(base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02),
        "vae": AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=LATENTS_STD
        ),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        "tokenizer": _tokenizer(2048),
        "transformer": _transformer("QwenImageTransformer2DModel"),
    }


def _z_image() -> dict:
    return {
        "scheduler": _flow(shift=3.0),
        "vae": _kl(8, **FLUX_VAE),
        "text_encoder": _llm("Qwen3Model", "Qwen3Config"),
        "tokenizer": _tokenizer(),
        "transformer": _transformer("ZImageTransformer2DModel"),
    }


def _aura_flow() -> dict:
    return {
        "tokenizer": _tokenizer(),
        "text_encoder": _t5("UMT5"),
        "vae": _kl(8),
        "transformer": _transformer("AuraFlowTransformer2DModel"),
        "scheduler": _flow(shift=1.73),
    }


def _chroma() -> dict:
    return {
        "scheduler": _flow(),
        "vae": _kl(8, **FLUX_VAE),
        "text_encoder": _t5(),
        "tokenizer": _tokenizer(),
        "transformer": _transformer("ChromaTransformer2DModel"),
    }


def _cogview4() -> dict:
    return {
        "tokenizer": _tokenizer(),
        "text_encoder": _llm("GlmModel", "GlmConfig"),
        "vae": _kl(8),
        "transformer": _transformer("CogView4Transformer2DModel"),
        "scheduler": _flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256),
    }


def _flux2(text_encoder: nn.Module) -> dict:
    from diffusers import AutoencoderKLFlux2

    levels = 4
    return {
        "scheduler": _dynamic_flow(),
        "vae": AutoencoderKLFlux2(
            block_out_channels=(4,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=1,
            latent_channels=4,
            layers_per_block=1,
        ),
        "text_encoder": text_encoder,
        "tokenizer": _tokenizer(),
        "transformer": _transformer("Flux2Transformer2DModel"),
    }


# Flux 2 takes the states of three layers side by side.


def _flux2_dev() -> dict:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH // 3,
        intermediate_size=32,
        num_hidden_layers=30,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    vision = PixtralVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    return _flux2(Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)))


def _flux2_klein() -> dict:
    return _flux2(_llm("Qwen3ForCausalLM", "Qwen3Config", width=WIDTH // 3, layers=27))


def _lumina2() -> dict:
    return {
        "transformer": _transformer("Lumina2Transformer2DModel", axes_lens=(300, 16, 16)),
        "scheduler": _flow(shift=6.0),
        "vae": _kl(8, **FLUX_VAE),
        "text_encoder": _llm("Gemma2Model", "Gemma2Config"),
        "tokenizer": _tokenizer(),
    }


def _mochi() -> dict:
    from diffusers import AutoencoderKLMochi

    return {
        "scheduler": _flow(invert_sigmas=True),
        "vae": AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        "text_encoder": _t5(),
        "tokenizer": _tokenizer(),
        "transformer": _transformer("MochiTransformer3DModel", in_channels=12, max_sequence_length=256),
    }


PIPELINES: dict[str, TinyPipeline] = {
    "AuraFlowPipeline": TinyPipeline(_aura_flow),
    "ChromaPipeline": TinyPipeline(_chroma),
    "CogVideoXPipeline": TinyPipeline(_cogvideox, (32, 32, 9)),
    "CogView4Pipeline": TinyPipeline(_cogview4),
    "DiTPipeline": TinyPipeline(_dit, ()),
    "Flux2KleinPipeline": TinyPipeline(_flux2_klein),
    "Flux2Pipeline": TinyPipeline(_flux2_dev),
    "FluxPipeline": TinyPipeline(_flux),
    "HunyuanVideoPipeline": TinyPipeline(_hunyuan_video, (32, 32, 5)),
    "LTXPipeline": TinyPipeline(_ltx, (32, 64, 9)),
    "LattePipeline": TinyPipeline(_latte, (32, 32, 3)),
    "Lumina2Pipeline": TinyPipeline(_lumina2),
    "MochiPipeline": TinyPipeline(_mochi, (32, 32, 7)),
    # Samples are made in the nearest of the sizes that the model was trained at, and shrunk.
    "PixArtAlphaPipeline": TinyPipeline(lambda: _pixart(128)),
    "PixArtSigmaPipeline": TinyPipeline(lambda: _pixart(32, sample_size=32)),
    "QwenImagePipeline": TinyPipeline(_qwen_image),
    "SanaPipeline": TinyPipeline(_sana),
    "StableDiffusion3Pipeline": TinyPipeline(_sd3),
    "WanPipeline": TinyPipeline(_wan, (32, 32, 5)),
    "WanPipeline with two transformers": TinyPipeline(lambda: _wan(2, boundary_ratio=0.875), (32, 32, 5), "WanPipeline"),
    "WanPipeline with a time for each token": TinyPipeline(lambda: _wan(expand_timesteps=True), (32, 32, 5), "WanPipeline"),
    "ZImagePipeline": TinyPipeline(_z_image),
}
