"""A Llama-shaped checkpoint of any size, as XTuner leaves it, and what its conversion needs.

It is a file of mmengine, a DeepSpeed ZeRO-3 directory, or a file of LoRA factors beside the base
model that they belong to. Making it needs no more memory than one tensor, mapped from a file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}

XTUNER_CONFIG = """\
llava_dataset = dict(
    pad_image_to_square=True,
    template_map_fn=dict(
        template='xtuner.utils.PROMPT_TEMPLATE.vicuna',
        type='xtuner.dataset.map_fns.template_map_fn_factory'),
    type='xtuner.dataset.LLaVADataset')
model = dict(
    freeze_llm=False,
    freeze_visual_encoder=True,
    llm=dict(
        pretrained_model_name_or_path='lmsys/vicuna-7b-v1.5',
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    type='xtuner.model.LLaVAModel',
    visual_encoder=dict(
        pretrained_model_name_or_path='openai/clip-vit-large-patch14-336',
        type='transformers.CLIPVisionModel.from_pretrained'))
train_dataloader = dict(dataset=llava_dataset)
"""

LORA_CONFIG = XTUNER_CONFIG.replace(
    "    type='xtuner.model.LLaVAModel',",
    "    llm_lora=dict(r={rank}, lora_alpha={rank}, type='peft.LoraConfig'),\n"
    "    type='xtuner.model.LLaVAModel',",
)

# Run as its own process, so that torch's memory is not that of the process that measures.
# All tensors are mapped from one file of random numbers: nothing is held in memory.
MAKE = """
import json, sys, torch
from collections import OrderedDict
from pathlib import Path
from safetensors.torch import save_file

work, spec = Path(sys.argv[1]), json.load(sys.stdin)
dtype = getattr(torch, spec["stored"])
torch.manual_seed(0)
pool = work / "pool.bin"
count = max(torch.Size(shape).numel() for _, shape in spec["llm"] + spec["projector"])
tile = (torch.randn(1 << 20) * 0.02).to(dtype).view(torch.uint8).numpy().tobytes()
with pool.open("wb") as file:
    for _ in range(-(-count // (1 << 20))):
        file.write(tile)

def mapped(shape):
    size = torch.Size(shape).numel()
    return torch.from_file(str(pool), shared=False, size=size, dtype=dtype).view(shape)

trained = spec["llm"] + spec["projector"]
meta = {"epoch": 1, "iter": 1, "cfg": spec["config"], "seed": 0, "mmengine_version": "0.10.7"}
layout, ranks = spec["layout"], spec["ranks"]
if layout == "zero3":
    folder = work / "iter_1.pth"
    folder.mkdir()
    shapes = OrderedDict((name, torch.Size(shape)) for name, shape in trained)
    flat = sum(-(-shape.numel() // ranks) for shape in shapes.values())
    if flat > count:
        with pool.open("ab") as file:
            for _ in range(-(-(flat - count) // (1 << 20))):
                file.write(tile)
    for rank in range(ranks):
        model = {"module": {}, "param_shapes": [shapes], "shared_params": {}, "buffer_names": [],
                 "frozen_param_shapes": None, "frozen_param_fragments": None, "meta": meta,
                 "dp_world_size": ranks, "ds_version": "0.16.2", "global_steps": 1}
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        states = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [mapped((flat,))]}
        torch.save({"optimizer_state_dict": states, "ds_version": "0.16.2"},
                   folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
elif layout == "lora":
    base = {name.removeprefix("llm."): mapped(shape) for name, shape in spec["llm"]}
    save_file({name: tensor.clone() if tensor.numel() < 1 << 16 else tensor
               for name, tensor in base.items()}, work / "llm/model.safetensors",
              metadata={"format": "pt"})
    state = OrderedDict()
    for name, shape in spec["llm"]:
        if "_proj" in name:
            module = name.removeprefix("llm.").removesuffix(".weight")
            start = f"llm.base_model.model.{module}.lora_"
            state[f"{start}A.default.weight"] = torch.randn(spec["rank"], shape[1]) * 0.02
            state[f"{start}B.default.weight"] = torch.randn(shape[0], spec["rank"]) * 0.02
    state.update((name, mapped(shape).float()) for name, shape in spec["projector"])
    torch.save({"meta": meta, "state_dict": state}, work / "iter_1.pth")
else:
    state = OrderedDict((name, mapped(shape)) for name, shape in trained)
    torch.save({"meta": meta, "state_dict": state}, work / "iter_1.pth")
pool.unlink()
tower = {name: torch.randn(shape) for name, shape in spec["vision"]}
save_file(tower, work / "vision/model.safetensors", metadata={"format": "pt"})
"""


def make_input(
    work: Path, total: int, stored: str, layout: str = "file", ranks: int = 8, rank: int = 64
) -> None:
    """`iter_1.pth` and the folders `llm` and `vision`, without weights that nobody reads.

    `total` counts bytes of the LLM; `ranks` are those of ZeRO-3, `rank` is that of LoRA.
    """
    hidden, intermediate, vocabulary = (2048, 5632, 32000) if total >= 10**9 else (256, 688, 2000)
    layer = [
        *((f"self_attn.{x}_proj.weight", (hidden, hidden)) for x in "qkvo"),
        ("mlp.gate_proj.weight", (intermediate, hidden)),
        ("mlp.up_proj.weight", (intermediate, hidden)),
        ("mlp.down_proj.weight", (hidden, intermediate)),
        ("input_layernorm.weight", (hidden,)),
        ("post_attention_layernorm.weight", (hidden,)),
    ]
    per_layer = 4 * hidden**2 + 3 * hidden * intermediate
    layers = max(1, round((total / ITEMSIZE[stored] - 2 * vocabulary * hidden) / per_layer))
    llm = [("llm.model.embed_tokens.weight", (vocabulary, hidden))]
    llm += [(f"llm.model.layers.{i}.{name}", shape) for i in range(layers) for name, shape in layer]
    llm += [("llm.model.norm.weight", (hidden,)), ("llm.lm_head.weight", (vocabulary, hidden))]
    projector = [
        ("projector.model.0.weight", (hidden, 64)),
        ("projector.model.0.bias", (hidden,)),
        ("projector.model.2.weight", (hidden, hidden)),
        ("projector.model.2.bias", (hidden,)),
    ]
    write_llm(work / "llm", hidden, intermediate, vocabulary, layers)
    write_vision(work / "vision")
    spec = {
        "stored": stored,
        "llm": llm,
        "projector": projector,
        "vision": tower_tensors(),
        "config": XTUNER_CONFIG if layout != "lora" else LORA_CONFIG.format(rank=rank),
        "layout": layout,
        "ranks": ranks,
        "rank": rank,
    }
    # Thousands of names are more than an argument may be long.
    command = [sys.executable, "-c", MAKE, work]
    subprocess.run(command, input=json.dumps(spec), text=True, check=True)


def write_llm(folder: Path, hidden: int, intermediate: int, vocabulary: int, layers: int) -> None:
    """The config and the tokenizer of a Llama of that shape."""
    folder.mkdir()
    llm_config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    write_json(folder / "config.json", llm_config)
    vocabulary_of_words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    special = [
        {"id": i, "content": word, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for word, i in vocabulary_of_words.items()
    ]  # fmt: skip
    model = {"type": "WordLevel", "vocab": vocabulary_of_words, "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "added_tokens": special, "model": model}
    write_json(folder / "tokenizer.json", tokenizer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    )


def write_vision(folder: Path) -> None:
    """The config and the processor of a CLIP tower of two layers."""
    folder.mkdir()
    tower = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
    }
    write_json(folder / "config.json", tower)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 56, "width": 56},
        "size": {"shortest_edge": 56},
    }
    write_json(folder / "preprocessor_config.json", processor)


def tower_tensors() -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a `CLIPVisionModel` of hidden size 64 with two layers."""
    embeddings = "vision_model.embeddings"
    found: list[tuple[str, tuple[int, ...]]] = [
        (f"{embeddings}.class_embedding", (64,)),
        (f"{embeddings}.patch_embedding.weight", (64, 3, 14, 14)),
        (f"{embeddings}.position_embedding.weight", (17, 64)),
    ]
    linears = [(f"self_attn.{x}_proj", 64, 64) for x in "qkv"]
    linears += [("self_attn.out_proj", 64, 64), ("mlp.fc1", 128, 64), ("mlp.fc2", 64, 128)]
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for i in range(2):
        layer = f"vision_model.encoder.layers.{i}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for name, rows, columns in linears:
            found += [
                (f"{layer}.{name}.weight", (rows, columns)),
                (f"{layer}.{name}.bias", (rows,)),
            ]
    for name in norms:
        found += [(f"{name}.weight", (64,)), (f"{name}.bias", (64,))]
    return found


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
