"""Tiny random models of many families, built from their configs, and prompts for them.

``ARCHITECTURES`` are decoded by every test of the sweep, ``FAMILIES`` are all; ``STREAMLESS`` give
hidden_states without the embedding in front of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from dsteer.data.tokens import Encoded
from dsteer.models.load import quiet

VOCAB = 128
LENGTHS = (1, 2, 3, 5, 8, 8, 13, 21, 34, 34, 40, 7)


def small(**changes: object) -> dict[str, object]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def old(**changes: object) -> dict[str, object]:
    """GPT-2's names for the same things."""
    return {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
            "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, **changes}  # fmt: skip


FALCON = {"alibi": False, "new_decoder_architecture": False, "multi_query": True,
          "parallel_attn": True, "bias": False}  # fmt: skip

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small())),
    "llama-eager": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**small(attn_implementation="eager"))
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**old())),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**small())),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**small(head_dim=8))),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**small(head_dim=8, sliding_window=6, query_pre_attn_scalar=8))
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **small(head_dim=8, sliding_window=6, query_pre_attn_scalar=8, num_hidden_layers=6)
        )
    ),
    "mistral-window": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**small(sliding_window=6, head_dim=8))
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**small(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2))
    ),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**small(**FALCON))),
    "falcon-alibi": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**small(**{**FALCON, "alibi": True, "parallel_attn": False}))
    ),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.2)
    ),
    "mpt": lambda: tf.MptForCausalLM(
        tf.MptConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=VOCAB, max_seq_len=64,
                     initializer_range=0.2)
    ),
    "gpt-j": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**old(rotary_dim=4))),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**small())),
    "phi3-longrope": lambda: tf.Phi3ForCausalLM(
        tf.Phi3Config(
            **small(
                original_max_position_embeddings=16,
                rope_parameters={
                    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
                    "long_factor": [4.0] * 4, "short_factor": [1.0] * 4,
                    "original_max_position_embeddings": 16,
                },
            )
        )
    ),
    "llama-dynamic-rope": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **small(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            )
        )
    ),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**small())),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**small(num_local_experts=4, num_experts_per_tok=2, head_dim=8))
    ),
    "qwen2-moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**small(num_experts=4, num_experts_per_tok=2,
                                  moe_intermediate_size=24, shared_expert_intermediate_size=24))
    ),
    "gpt-oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**small(num_local_experts=4, num_experts_per_tok=2, head_dim=8,
                                sliding_window=6))
    ),
}  # fmt: skip


WINDOW = ["sliding_attention", "sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "layer_types": LINEAR}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {**EXPERTS, "moe_intermediate_size": 24}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
       "mamba_chunk_size": 8}  # fmt: skip
GEMMA4 = {"head_dim": 8, "global_head_dim": 8, "sliding_window": 6, "num_kv_shared_layers": 0,
          "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
          "layer_types": WINDOW}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
QWEN_VISION = {"hidden_size": 16, "depth": 1, "out_hidden_size": 32, "num_heads": 2,
               "patch_size": 4, "intermediate_size": 16}  # fmt: skip
IMAGE = {"image_token_id": 127, "video_token_id": 126, "vision_start_token_id": 125,
         "vision_end_token_id": 124}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                             "mrope_section": [1, 1, 2]}}  # fmt: skip


def recurrent(**changes: object) -> dict[str, object]:
    """A Mamba's names."""
    return {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3,
            "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "tie_word_embeddings": False, **changes}  # fmt: skip


MORE: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**small())),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**small(head_dim=8, **SMALL_EXPERTS))
    ),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**small(head_dim=8))),
    "gemma4": lambda: tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**small(**GEMMA4))),
    "gemma4-shared-keys": lambda: tf.Gemma4ForCausalLM(
        tf.Gemma4TextConfig(
            **small(
                **{**GEMMA4, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                   "layer_types": ["sliding_attention", "full_attention"] * 2}
            )
        )
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**small())),
    "olmo": lambda: tf.OlmoForCausalLM(tf.OlmoConfig(**small())),
    "olmo3": lambda: tf.Olmo3ForCausalLM(tf.Olmo3Config(**small(sliding_window=6))),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**small(**EXPERTS))),
    "deepseek-v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **small(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
                    topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=16,
                    qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
                    moe_intermediate_size=24, n_shared_experts=1)
        )
    ),
    "gpt-neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(vocab_size=VOCAB, hidden_size=32, num_layers=3, num_heads=4,
                        max_position_embeddings=64, window_size=6, initializer_range=0.2,
                        attention_types=[[["global", "local"], 1], [["global"], 1]],
                        bos_token_id=1, eos_token_id=2)
    ),
    "codegen": lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(**old(rotary_dim=4))),
    "gpt-bigcode": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**old())),
    "stablelm": lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**small())),
    "starcoder2": lambda: tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**small())),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**small())),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**small())),
    "smollm3": lambda: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**small())),
    "glm4": lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**small(head_dim=8))),
    # recurrent and hybrid
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**recurrent())),
    "mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(**recurrent(num_heads=8, head_dim=8, n_groups=2, chunk_size=8))
    ),
    "falcon-mamba": lambda: tf.FalconMambaForCausalLM(tf.FalconMambaConfig(**recurrent())),
    "bamba": lambda: tf.BambaForCausalLM(tf.BambaConfig(**small(attn_layer_indices=[1], **SSM))),
    "falcon-h1": lambda: tf.FalconH1ForCausalLM(
        tf.FalconH1Config(**small(mamba_d_ssm=64, **SSM))
    ),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(**small(num_experts=2, num_experts_per_tok=1, attn_layer_period=3,
                               attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                               mamba_d_state=8, use_mamba_kernels=False))
    ),
    "zamba": lambda: tf.ZambaForCausalLM(
        tf.ZambaConfig(**small(num_hidden_layers=6, attn_layer_period=3, attn_layer_offset=2,
                               mamba_d_state=8, n_mamba_heads=2, use_mamba_kernels=False,
                               attention_hidden_size=64, attention_head_dim=16,
                               num_key_value_heads=4))
    ),
    "zamba2": lambda: tf.Zamba2ForCausalLM(
        tf.Zamba2Config(
            **small(num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2,
                    mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1,
                    chunk_size=8, num_key_value_heads=4, num_mem_blocks=1, use_mem_rope=True)
        )
    ),
    "recurrent-gemma": lambda: tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(
            **small(lru_width=32, attention_window_size=6, tie_word_embeddings=False)
        )
    ),
    "granite-moe-hybrid": lambda: tf.GraniteMoeHybridForCausalLM(
        tf.GraniteMoeHybridConfig(
            **small(num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=24,
                    layer_types=["mamba", "attention", "mamba"], **SSM)
        )
    ),
    "nemotron-h": lambda: tf.NemotronHForCausalLM(
        tf.NemotronHConfig(
            **small(layers_block_type=["mamba", "attention", "moe"], mamba_num_heads=8,
                    mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8, head_dim=8,
                    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                    moe_shared_expert_intermediate_size=24, n_group=1, topk_group=1)
        )
    ),
    "lfm2": lambda: tf.Lfm2ForCausalLM(
        tf.Lfm2Config(**small(layer_types=["conv", "full_attention", "conv"]))
    ),
    "qwen3-next": lambda: tf.Qwen3NextForCausalLM(
        tf.Qwen3NextConfig(
            **small(head_dim=8, shared_expert_intermediate_size=24, **SMALL_EXPERTS, **DELTA)
        )
    ),
    "qwen3.5": lambda: tf.Qwen3_5ForCausalLM(tf.Qwen3_5TextConfig(**small(head_dim=8, **DELTA))),
    # text decoders of image-text models
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**VISION), image_token_index=127,
                       text_config=tf.LlamaConfig(**small()))
    ),
    "gemma3-vision": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            vision_config=tf.SiglipVisionConfig(**VISION), mm_tokens_per_image=4,
            image_token_index=127, boi_token_index=126, eoi_token_index=125,
            text_config=tf.Gemma3TextConfig(
                **small(head_dim=8, sliding_window=6, query_pre_attn_scalar=8)
            ),
        )
    ),
    "qwen2-vl": lambda: tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(vision_config={"embed_dim": 16, "depth": 1, "hidden_size": 32,
                                        "num_heads": 2, "patch_size": 4},
                         text_config=small(**MROPE), **IMAGE)
    ),
    "qwen2.5-vl": lambda: tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(vision_config={**QWEN_VISION, "fullatt_block_indexes": [0]},
                            text_config=small(**MROPE), **IMAGE)
    ),
    "qwen3-vl": lambda: tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0],
                                        "num_position_embeddings": 16},
                         text_config=small(head_dim=8, **MROPE), **IMAGE)
    ),
    "idefics3": lambda: tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(vision_config=VISION, text_config=tf.LlamaConfig(**small()),
                          image_token_id=127, scale_factor=2)
    ),
    "mistral3": lambda: tf.Mistral3ForConditionalGeneration(
        tf.Mistral3Config(vision_config=tf.PixtralVisionConfig(**VISION), image_token_index=127,
                          text_config=tf.MistralConfig(**small()))
    ),
}  # fmt: skip
FAMILIES = {**ARCHITECTURES, **MORE}

STREAMLESS = frozenset({"mamba", "mamba2", "falcon-mamba"})
"""Their hidden_states are the output of each block and the final norm, without the embedding."""


def build(name: str) -> Any:
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(7)
        return FAMILIES[name]().float().eval()


def prompts_of(lengths: tuple[int, ...] = LENGTHS) -> list[Encoded]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [Encoded(tuple(row), len(row)) for row in rows]
