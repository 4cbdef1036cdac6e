"""The tiny models that all inputs start from: names, shapes and configs, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.tensors.computed import Fill
from xtuner2llava.tensors.dtype import FLOAT32
from xtuner2llava.tensors.lazy import LazyTensor

HIDDEN, INNER, VOCABULARY = 8, 16, 12
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LLM_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_SIZES},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_SIZES},
    "internlm2": {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        **_SIZES,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "sliding_window": 32,
        **_SIZES,
    },
    "qwen": {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "kv_channels": 4,
        "seq_length": 64,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    },
}
_FUSED: dict[str, dict[str, tuple[int, ...]]] = {
    "internlm2": {
        "model.tok_embeddings.weight": (VOCABULARY, HIDDEN),
        "model.layers.0.attention.wqkv.weight": (16, HIDDEN),
        "model.layers.0.attention.wo.weight": (HIDDEN, HIDDEN),
        "model.layers.0.feed_forward.w1.weight": (INNER, HIDDEN),
        "model.layers.0.feed_forward.w3.weight": (INNER, HIDDEN),
        "model.layers.0.feed_forward.w2.weight": (HIDDEN, INNER),
        "model.layers.0.attention_norm.weight": (HIDDEN,),
        "model.layers.0.ffn_norm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
        "output.weight": (VOCABULARY, HIDDEN),
    },
    "phi3": {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.layers.0.self_attn.qkv_proj.weight": (16, HIDDEN),
        "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "model.layers.0.mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    },
    "qwen": {
        "transformer.wte.weight": (VOCABULARY, HIDDEN),
        "transformer.h.0.ln_1.weight": (HIDDEN,),
        "transformer.h.0.ln_2.weight": (HIDDEN,),
        "transformer.h.0.attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
        "transformer.h.0.attn.c_attn.bias": (3 * HIDDEN,),
        "transformer.h.0.attn.c_proj.weight": (HIDDEN, HIDDEN),
        "transformer.h.0.mlp.w1.weight": (INNER, HIDDEN),
        "transformer.h.0.mlp.w2.weight": (INNER, HIDDEN),
        "transformer.h.0.mlp.c_proj.weight": (HIDDEN, INNER),
        "transformer.ln_f.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    },
}
CLIP: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 4,
    "patch_size": 2,
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 4, "width": 4},
    "size": {"shortest_edge": 4},
}
_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
XTUNER_CONFIG = """\
llava_dataset = dict(
    pad_image_to_square=True,
    template_map_fn=dict(
        template='xtuner.utils.PROMPT_TEMPLATE.qwen_chat',
        type='xtuner.dataset.map_fns.template_map_fn_factory'),
    type='xtuner.dataset.LLaVADataset')
model = dict(
    freeze_llm=False,
    freeze_visual_encoder=True,
    llm=dict(
        pretrained_model_name_or_path='llm',
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    llm_lora=dict(r=2, lora_alpha=4, type='peft.LoraConfig'),
    type='xtuner.model.LLaVAModel',
    visual_encoder=dict(
        pretrained_model_name_or_path='openai/clip-vit-large-patch14-336',
        type='transformers.CLIPVisionModel.from_pretrained'))
train_dataloader = dict(dataset=llava_dataset)
"""


def llm_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the LLM of that kind."""
    if kind in _FUSED:
        return _FUSED[kind]
    return _shapes(kind, LLM_CONFIGS[kind])


def fills(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """Tensors of these shapes that no file has."""
    return {name: Fill(FLOAT32, shape, 0.0) for name, shape in shapes.items()}


def clip_shapes() -> dict[str, tuple[int, ...]]:
    return _shapes("clip_vision_model", CLIP)


def _shapes(name: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    plain = Catalogue.shipped().classes[name]
    values, faults = plain.complete(dict(config))
    assert not faults, faults  # noqa: S101
    return {name: tuple(expected.shape) for name, expected in plain.tensors(values).items()}


def projector_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "model.0.weight": (HIDDEN, HIDDEN),
        "model.0.bias": (HIDDEN,),
        "model.2.weight": (HIDDEN, HIDDEN),
        "model.2.bias": (HIDDEN,),
    }


def adapter_shapes(name: str, rows: int, columns: int, leaf: str = "") -> dict[str, Any]:
    """The LoRA factors of a module, of rank 2."""
    module = f"base_model.model.{name.removesuffix('.weight')}"
    return {
        f"{module}.lora_A{leaf}.weight": (2, columns),
        f"{module}.lora_B{leaf}.weight": (rows, 2),
    }


def header(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A safetensors header for float32 tensors of these shapes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        entries[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    return entries


def state(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Tensors of these shapes for a file of `torch.save`."""
    return {f"{prefix}{name}": {"$tensor": ["float32", list(s)]} for name, s in shapes.items()}


def base_files(kind: str, *, weights: bool) -> dict[str, Any]:
    """The base models, in the folders `llm` and `vision`."""
    tokens = dict(zip(_TOKENS, range(6), strict=True))
    files: dict[str, Any] = {
        "llm/config.json": LLM_CONFIGS[kind],
        "llm/generation_config.json": {"bos_token_id": 1, "eos_token_id": [2], "do_sample": True},
        "llm/tokenizer.json": {
            "version": "1.0",
            "added_tokens": [
                {"id": i, "content": t, "special": True, "single_word": False, "lstrip": False,
                 "rstrip": False, "normalized": False}
                for t, i in tokens.items()
            ],
            "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "<unk>"},
        },
        "llm/tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "special": True},
            "unk_token": "<unk>",
            "pad_token": None,
            "added_tokens_decoder": {"5": {"content": "<|im_end|>", "special": True}},
        },
        "llm/special_tokens_map.json": {"bos_token": "<s>", "additional_special_tokens": ["</s>"]},
        "llm/added_tokens.json": {"<|im_end|>": 5},
        "vision/config.json": CLIP,
        "vision/preprocessor_config.json": PREPROCESSOR,
        "vision/model.safetensors": header(clip_shapes()),
    }  # fmt: skip
    if weights:
        files["llm/model.safetensors"] = header(llm_shapes(kind))
    return files


def pth_files(kind: str, *, lora: bool = False) -> dict[str, Any]:
    """`iter_2.pth` of a full training, or of one of a LoRA on the embedding, and its bases."""
    shapes = llm_shapes(kind)
    if lora:
        first = next(name for name, shape in shapes.items() if len(shape) == 2)
        shapes = adapter_shapes(first, *shapes[first], leaf=".default")
    tensors = state("llm.", shapes) | state("projector.", projector_shapes())
    history = {"$call": ["mmengine.logging.history_buffer.HistoryBuffer", [], {"_count": 1}]}
    value = {
        "meta": {"iter": 2, "epoch": 0, "cfg": XTUNER_CONFIG, "mmengine_version": "0.10.7"},
        "state_dict": tensors,
        "message_hub": {"log_scalars": {"loss": history}},
        "param_schedulers": [],
    }
    return {"iter_2.pth": value, **base_files(kind, weights=lora)}


def folder_files(kind: str, *, lora: bool = False, sharded: bool = False) -> dict[str, Any]:
    """`iter_2_xtuner/`, at top level of the files, and its bases."""
    shapes = llm_shapes(kind)
    files: dict[str, Any] = {
        "iter_2_xtuner/projector/config.json": {"depth": 2, "hidden_act": "gelu"},
        "iter_2_xtuner/projector/model.safetensors": header(projector_shapes()),
        "iter_2_xtuner/xtuner_config.py": XTUNER_CONFIG,
    }
    if lora:
        first = next(name for name, shape in shapes.items() if len(shape) == 2)
        home = "iter_2_xtuner/llm_adapter"
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none",
                    "target_modules": ["q_proj"], "use_rslora": False, "task_type": "CAUSAL_LM",
                    "alpha_pattern": {}, "init_lora_weights": True}  # fmt: skip
        files[f"{home}/adapter_config.json"] = settings
        adapter = adapter_shapes(first, *shapes[first])
        files[f"{home}/adapter_model.safetensors"] = header(adapter)
    elif sharded:
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        halves = (dict(list(shapes.items())[::2]), dict(list(shapes.items())[1::2]))
        weight_map = {n: file for file, half in zip(names, halves, strict=True) for n in half}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        files["iter_2_xtuner/model.safetensors.index.json"] = index
        for file, half in zip(names, halves, strict=True):
            files[f"iter_2_xtuner/{file}"] = header(half)
    else:
        files["iter_2_xtuner/pytorch_model.bin"] = state("", shapes)
    if not lora:
        small = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
        base = base_files(kind, weights=False)
        files |= {f"iter_2_xtuner/{name}": base[f"llm/{name}"] for name in small}
    return files | base_files(kind, weights=lora)


def zero_files(kind: str, stage: int) -> dict[str, Any]:
    """`iter_2.pth/`, a DeepSpeed directory of two ranks, and its bases."""
    shapes = {f"llm.{n}": s for n, s in llm_shapes(kind).items()}
    shapes |= {f"projector.{n}": s for n, s in projector_shapes().items()}
    counts = []
    for shape in shapes.values():
        count = 1
        for n in shape:
            count *= n
        counts.append(count)
    each = sum(-(-n // 2) for n in counts) if stage == 3 else -(-sum(counts) // 4) * 2
    sizes = {n: {"$call": ["torch.Size", [list(s)]]} for n, s in shapes.items()}
    meta = {"iter": 2, "cfg": XTUNER_CONFIG}
    files: dict[str, Any] = {}
    for rank in range(2):
        model = {
            "module": {n: {"$tensor": ["bfloat16", [0] if stage == 3 else list(s)]}
                       for n, s in shapes.items()},
            "param_shapes": [sizes],
            "shared_params": {},
            "buffer_names": [],
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "global_steps": 2,
            "meta": meta,
        }  # fmt: skip
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        zero_stage = {"$call": ["deepspeed.runtime.zero.config.ZeroStageEnum", [stage]]}
        optimizer = {
            "optimizer_state_dict": {
                key: [{"$tensor": ["float32", [each]]}],
                "zero_stage": zero_stage,
                "partition_count": 2 if stage == 3 else [2],
                "base_optimizer_state": {"state": {"0": {"step": 2}}},
            }
        }
        home = "iter_2.pth"
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        if stage == 3:
            files[f"{home}/{name}_model_states.pt"] = model
        elif rank == 0:
            files[f"{home}/mp_rank_00_model_states.pt"] = model
        files[f"{home}/{name}_optim_states.pt"] = optimizer
    return files | base_files(kind, weights=False)
