"""Parts that several tiny families share: tokenizers, text encoders and autoencoders."""

from __future__ import annotations

import functools

import transformers
from diffusers import AutoencoderKL, AutoencoderKLQwenImage

from tests import tiny

CLIPT, CLIPTP = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection

QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] if c['type']=='text' else '' }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def qwen_tokenizer():
    toks = [*tiny._byte_letters(), *QWEN_SPECIAL]
    tok = transformers.Qwen2Tokenizer(
        vocab={t: i for i, t in enumerate(toks)},
        merges=[],
        model_max_length=131072,
        additional_special_tokens=QWEN_SPECIAL[1:],
    )
    tok.chat_template = CHAT
    return tok


def vocab():
    return len(qwen_tokenizer()) + 4


def qwen_ids():
    t = qwen_tokenizer()
    c = t.convert_tokens_to_ids
    return {
        "vision_start_token_id": c("<|vision_start|>"),
        "vision_end_token_id": c("<|vision_end|>"),
        "image_token_id": c("<|image_pad|>"),
        "video_token_id": c("<|video_pad|>"),
    }


def qwen25vl(h=16, mrope=(1, 1, 2)):
    cfg = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": h,
            "intermediate_size": h,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": vocab(),
            "rope_scaling": {"mrope_section": list(mrope), "rope_type": "default", "type": "default"},
            "rope_theta": 1e6,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": h,
            "fullatt_block_indexes": [1],
        },
        hidden_size=h,
        vocab_size=vocab(),
        **qwen_ids(),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(cfg).eval()


def qwen3_vl_config(layers=2):
    return transformers.Qwen3VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": vocab(),
        },
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        **qwen_ids(),
    )


def qwen3(cls, h=16):
    return cls(
        transformers.Qwen3Config(
            hidden_size=h,
            intermediate_size=h,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=vocab(),
            max_position_embeddings=2048,
        )
    ).eval()


@functools.cache
def gemma_tokenizer():
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *[chr(c) for c in range(33, 127)]]
    return transformers.GemmaTokenizer(vocab={t: i for i, t in enumerate(pieces)}, merges=[], model_max_length=8192)


def gemma2(h=8):
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            head_dim=16,
            hidden_size=h,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            num_key_value_heads=2,
            vocab_size=len(gemma_tokenizer()) + 4,
            attn_implementation="eager",
        )
    ).eval()


def vae(channels=4, blocks=4, flow=True, **kw):
    f = (
        {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609, "scaling_factor": 1.5035}
        if flow
        else {}
    )
    f.update(kw)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32)[:blocks],
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=128,
        **f,
    )


def qwen_vae():
    return AutoencoderKLQwenImage(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def t5(width=32):
    tok, te = tiny._t5(width=width)
    tok.model_max_length = 512
    tok.init_kwargs["model_max_length"] = 512
    return tok, te


def clip(kind, positions=77):
    if positions == 77:
        return tiny._clip(kind)
    m = tiny._clip(kind)
    c = m.config
    c.max_position_embeddings = positions
    return kind(c).eval()


def cliptok():
    return tiny._clip_tokenizer()
