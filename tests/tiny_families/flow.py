"""Tiny pipelines of the families that predict a flow, with CLIP, T5 and other small text encoders."""

from __future__ import annotations

from typing import Any

import transformers
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
)

from tests import tiny
from tests.tiny_families.parts import (
    CLIPTP,
    clip,
    cliptok,
    gemma2,
    gemma_tokenizer,
    t5,
    vae,
    vocab,
)

BUILDERS: dict[str, Any] = {}


def fam(build: Any) -> Any:
    """Enter a builder under its name."""
    BUILDERS[build.__name__] = build
    return build


def _sd3_16():
    p = tiny._sd3()
    tr = SD3Transformer2DModel.from_config({**p.transformer.config, "in_channels": 16, "out_channels": 16})
    p.register_modules(transformer=tr, vae=vae(16))
    p.tokenizer_3.model_max_length = 512
    p.tokenizer_3.init_kwargs["model_max_length"] = 512
    return p


@fam
def sd3() -> Any:
    return _sd3_16()


@fam
def sd35() -> Any:  # dual attention layers, qk norm
    p = _sd3_16()
    tr = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    p.register_modules(transformer=tr)
    return p


@fam
def chroma() -> Any:
    tok, te = t5(32)
    tr = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae(), text_encoder=te, tokenizer=tok, transformer=tr
    )


@fam
def hidream() -> Any:
    tr = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    ).eval()
    ltok = transformers.LlamaTokenizer(
        vocab={t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "\u2581", *[chr(c) for c in range(33, 127)]])},
        merges=[],
        model_max_length=131072,
    )
    ltok.pad_token = "</s>"
    lm = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=len(ltok) + 4,
            pad_token_id=1,
        )
    ).eval()
    tok3, te3 = t5(32)
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip(CLIPTP, 248),
        tokenizer=cliptok(),
        text_encoder_2=clip(CLIPTP, 248),
        tokenizer_2=cliptok(),
        text_encoder_3=te3,
        tokenizer_3=tok3,
        text_encoder_4=lm,
        tokenizer_4=ltok,
        transformer=tr,
    )


@fam
def auraflow() -> Any:
    tok, te5 = t5(32)
    te = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=te5.config.vocab_size,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    tr = AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        tokenizer=tok, text_encoder=te, vae=vae(flow=False), transformer=tr, scheduler=FlowMatchEulerDiscreteScheduler()
    )


@fam
def lumina2() -> Any:
    tr = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
        transformer=tr,
    )


@fam
def cogview4() -> Any:
    tr = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    te = transformers.GlmModel(
        transformers.GlmConfig(
            hidden_size=32,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=8,
            vocab_size=vocab(),
            pad_token_id=0,
        )
    ).eval()
    from tokenizers.processors import TemplateProcessing

    toks = [*tiny._byte_letters(), "<pad>", "[gMASK]", "<sop>"]
    gt = transformers.Qwen2Tokenizer(
        vocab={t: i for i, t in enumerate(toks)},
        merges=[],
        unk_token="<pad>",
        eos_token="<pad>",
        pad_token="<pad>",
        additional_special_tokens=toks[-2:],
        model_max_length=128000,
        padding_side="left",
    )
    gt._tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 257), ("<sop>", 258)]
    )
    return CogView4Pipeline(
        tokenizer=gt,
        text_encoder=te,
        vae=vae(flow=False),
        transformer=tr,
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    )
