"""What a training config says of a run, from a config file and from a checkpoint's text."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest

from xtuner2llava.errors import CheckpointError, UnsupportedError
from xtuner2llava.training_config.config import TrainingConfig
from xtuner2llava.training_config.datasets import Loaded, TrainingData

CONFIG = """\
from mmengine.hooks import CheckpointHook
from peft import LoraConfig
from transformers import (AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig,
                          CLIPImageProcessor, CLIPVisionModel)
import torch
from xtuner.dataset import LLaVADataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook, EvaluateChatHook
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

llm = 'Qwen/Qwen1.5-7B-Chat'
vision = 'openai/clip-vit-large-patch14-336'
data_root = './secret_data/'
prompt_template = PROMPT_TEMPLATE.qwen_chat
max_length = int(2048 - (336 / 14)**2)
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=llm,
    bos_token='<|im_start|>',
    eos_token='<|im_end|>',
    padding_side='right')
image_processor = dict(
    type=CLIPImageProcessor.from_pretrained,
    pretrained_model_name_or_path=vision,
    trust_remote_code=True)
model = dict(
    type=LLaVAModel,
    freeze_llm=True,
    freeze_visual_encoder=True,
    pretrained_pth='./work_dirs/pretrain/iter_2181.pth',
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm,
        trust_remote_code=True,
        torch_dtype=torch.float16,
        quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True)),
    llm_lora=dict(
        type=LoraConfig,
        r=512,
        lora_alpha=256,
        lora_dropout=0.05,
        bias='none',
        task_type='CAUSAL_LM'),
    visual_encoder=dict(
        type=CLIPVisionModel.from_pretrained,
        pretrained_model_name_or_path=vision),
    visual_encoder_lora=dict(type=LoraConfig, r=64, lora_alpha=16))
dataset = dict(
    type=LLaVADataset,
    data_path=data_root + 'train.json',
    image_folder=data_root + 'images',
    tokenizer=tokenizer,
    image_processor=image_processor,
    dataset_map_fn=llava_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    max_length=max_length,
    pad_image_to_square=True)
train_dataloader = dict(batch_size=16, dataset=dataset)
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateChatHook,
        tokenizer=tokenizer,
        evaluation_inputs=['hi'],
        system='Be brief.',
        stop_words=['<|im_end|>'],
        stop_word='<|endoftext|>',
        prompt_template=prompt_template)
]
"""

# The same, as mmengine would store it: sorted, resolved, names as strings.
RESOLVED = """\
custom_hooks = [
    dict(
        tokenizer=dict(type='transformers.AutoTokenizer.from_pretrained'),
        type='xtuner.engine.hooks.DatasetInfoHook'),
    dict(
        evaluation_inputs=[
            'hi',
        ],
        prompt_template='xtuner.utils.PROMPT_TEMPLATE.qwen_chat',
        stop_word='<|endoftext|>',
        stop_words=[
            '<|im_end|>',
        ],
        system='Be brief.',
        tokenizer=dict(
            bos_token='<|im_start|>',
            type='transformers.AutoTokenizer.from_pretrained'),
        type='xtuner.engine.hooks.EvaluateChatHook'),
]
launcher = 'none'
model = dict(
    freeze_llm=True,
    freeze_visual_encoder=True,
    llm=dict(
        pretrained_model_name_or_path='Qwen/Qwen1.5-7B-Chat',
        quantization_config=dict(
            load_in_4bit=True, type='transformers.BitsAndBytesConfig'),
        torch_dtype='torch.float16',
        trust_remote_code=True,
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    llm_lora=dict(
        bias='none',
        lora_alpha=256,
        lora_dropout=0.05,
        r=512,
        task_type='CAUSAL_LM',
        type='peft.LoraConfig'),
    pretrained_pth='./work_dirs/pretrain/iter_2181.pth',
    type='xtuner.model.LLaVAModel',
    visual_encoder=dict(
        pretrained_model_name_or_path='openai/clip-vit-large-patch14-336',
        type='transformers.CLIPVisionModel.from_pretrained'),
    visual_encoder_lora=dict(lora_alpha=16, r=64, type='peft.LoraConfig'))
train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        data_path='./secret_data/train.json',
        dataset_map_fn='xtuner.dataset.map_fns.llava_map_fn',
        image_folder='./secret_data/images',
        image_processor=dict(
            pretrained_model_name_or_path='openai/clip-vit-large-patch14-336',
            trust_remote_code=True,
            type='transformers.CLIPImageProcessor.from_pretrained'),
        max_length=1472,
        pad_image_to_square=True,
        template_map_fn=dict(
            template='xtuner.utils.PROMPT_TEMPLATE.qwen_chat',
            type='xtuner.dataset.map_fns.template_map_fn_factory'),
        tokenizer=dict(
            bos_token='<|im_start|>',
            eos_token='<|im_end|>',
            padding_side='right',
            pretrained_model_name_or_path='Qwen/Qwen1.5-7B-Chat',
            type='transformers.AutoTokenizer.from_pretrained'),
        type='xtuner.dataset.LLaVADataset'))
"""


PARTS = ("llm", "visual_encoder")
DATASET = "train_dataloader.dataset"


def training_config(text: str) -> TrainingConfig:
    return TrainingConfig.from_text(text, "config.py")


def of_model(arguments: str, rest: str = "") -> TrainingConfig:
    return training_config(f"model = dict(type='xtuner.model.LLaVAModel', {arguments})\n{rest}")


def asked(run: TrainingConfig, name: str) -> object:
    """What a caller gets who asks for one value of the model."""
    if name in PARTS:
        return run.base_path(name)
    if name.startswith("freeze_"):
        return run.frozen(name.removeprefix("freeze_"))
    if name.endswith("_lora"):
        return run.lora(name.removesuffix("_lora"))
    return getattr(run, name)


def of_dataset(arguments: str, before: str = "") -> TrainingConfig:
    return of_model("", f"{before}\ntrain_dataloader = dict(dataset=dict({arguments}))")


def test_resolved_is_what_reading_the_config_gives() -> None:
    file, stored = training_config(CONFIG), training_config(RESOLVED)
    plain = [
        name
        for name, kind in vars(TrainingConfig).items()
        if isinstance(kind, property) and name not in ("model", "used")
    ]
    assert len(plain) > 4
    assert [name for name in plain if getattr(file, name) != getattr(stored, name)] == []
    for key in ("pretrained_pth", "load_from"):
        assert file.started_from(key) == stored.started_from(key)
    for part in PARTS:
        for read in (TrainingConfig.base_path, TrainingConfig.overrides, TrainingConfig.frozen):
            assert read(file, part) == read(stored, part)
    data = [one.name for one in fields(TrainingData) if one.name != "used"]
    assert len(data) > 10
    assert [n for n in data if getattr(file.data, n) != getattr(stored.data, n)] == []
    assert file.used == stored.used


@pytest.mark.parametrize("text", [CONFIG, RESOLVED], ids=["config", "resolved"])
def test_every_field(text: str) -> None:
    run = training_config(text)
    run.check_model()
    assert run.base_path("llm") == "Qwen/Qwen1.5-7B-Chat"
    assert run.base_path("visual_encoder") == "openai/clip-vit-large-patch14-336"
    assert "trained as QLoRA" in run.inexact[0]
    for part in PARTS:
        assert run.overrides(part) == {}
        assert run.frozen(part)
    assert (run.visual_select_layer, run.projector_depth) == (-2, 2)
    assert run.started_from("pretrained_pth") == "./work_dirs/pretrain/iter_2181.pth"
    assert run.max_position_embeddings is None
    assert run.data.image_aspect_ratio == "pad"
    assert run.data.prompt_template == "qwen_chat"
    assert run.data.image_processor.path == "openai/clip-vit-large-patch14-336"
    assert run.data.tokenizer.path == "Qwen/Qwen1.5-7B-Chat"
    assert (run.data.bos_token, run.data.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert run.data.stop_words == ("<|im_end|>", "<|endoftext|>")
    assert run.notes == ()
    for part, r, alpha in (("llm", 512, 256), ("visual_encoder", 64, 16)):
        lora = run.lora(part)
        assert lora is not None
        assert (lora.table["r"], lora.table["lora_alpha"]) == (r, alpha)


def test_used_names_what_was_read_and_no_data_path() -> None:
    used = training_config(CONFIG).used
    assert used["model.llm_lora.lora_alpha"] == 256
    assert used["model.llm.torch_dtype"] == "torch.float16"
    assert used["train_dataloader.dataset.pad_image_to_square"] is True
    assert used["train_dataloader.dataset.max_length"] == 1472
    assert used["custom_hooks[1].system"] == "'Be brief.'"
    assert used["model.type"] == "xtuner.model.LLaVAModel"
    assert "secret_data" not in repr(used)


def test_defaults_are_those_of_llavamodel() -> None:
    run = of_model("llm_lora=dict(), visual_encoder_lora=None")
    for part in PARTS:
        assert (run.frozen(part), run.base_path(part), run.overrides(part)) == (False, None, {})
    assert (run.visual_select_layer, run.projector_depth) == (-2, 2)
    assert run.started_from("pretrained_pth") is run.started_from("load_from") is None
    assert (run.max_position_embeddings, run.inexact) == (None, ())
    assert (run.data.image_aspect_ratio, run.data.prompt_template) == ("pad", None)
    assert run.lora("llm") is not None
    assert run.lora("visual_encoder") is None


def test_values_that_are_not_the_default() -> None:
    run = of_model(
        "visual_select_layer=-1, projector_depth=3, max_position_embeddings=32768,"
        "llm=dict(type='a.B.from_pretrained', torch_dtype='bfloat16', rope_theta=1e6,"
        " revision='v1'), quantization_config=dict(load_in_4bit=True)"
    )
    assert (run.visual_select_layer, run.projector_depth) == (-1, 3)
    assert run.max_position_embeddings == 32768
    assert run.overrides("llm") == {"rope_theta": 1e6}


def test_other_models_are_read_and_left_to_be_refused() -> None:
    run = training_config(
        "from xtuner.model import SupervisedFinetune\n"
        "model = dict(type=SupervisedFinetune, lora=dict(r=64),"
        " llm=dict(pretrained_model_name_or_path='a/b'))"
    )
    with pytest.raises(UnsupportedError, match="SupervisedFinetune, which is another class"):
        run.check_model()
    assert (run.base_path("llm"), run.base_path("visual_encoder")) == ("a/b", None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("lr = 1\nepochs = 2", "missing, found: lr, epochs"),
        ("", "missing, found: nothing"),
        ("model = 'x'", "model is 'x', a dict was expected"),
        ("model = build()", "a call of `build` is code"),
        ("with read_base():\n  from .base import *", "base config, which is not followed"),
        ("_base_ = ['base.py']\nmodel = dict(llm=1)", "base config, which is not followed"),
    ],
)
def test_without_a_model_the_error_says_what_was_found(text: str, found: str) -> None:
    with pytest.raises(CheckpointError, match="model") as caught:
        training_config(text).check_model()
    (fault,) = caught.value.faults
    assert found in fault.what
    assert "--xtuner-config" in fault.advice
    assert fault.where.startswith("config.py")


@pytest.mark.parametrize(
    ("arguments", "name", "flag"),
    [
        ("llm=build()", "llm", "--llm"),
        ("llm=dict(pretrained_model_name_or_path=build())", "llm", "--llm"),
        ("visual_encoder=dict(pretrained_model_name_or_path=a + b)", "visual_encoder", "--vision"),
        ("freeze_llm=build()", "freeze_llm", "--xtuner-config"),
        ("projector_depth=build()", "projector_depth", "--xtuner-config"),
        ("llm_lora=build()", "llm_lora", "--xtuner-config"),
    ],
)
def test_only_who_asks_for_an_unknown_value_fails(arguments: str, name: str, flag: str) -> None:
    run = training_config(f"model = dict(\n  type='LLaVAModel',\n  {arguments})")
    run.check_model()
    assert run.used
    with pytest.raises(CheckpointError, match="without running code") as caught:
        asked(run, name)
    assert caught.value.faults[0].where == "config.py:3"
    assert flag in caught.value.faults[0].advice


@pytest.mark.parametrize(
    ("arguments", "name", "found"),
    [
        ("llm=dict(pretrained_model_name_or_path=3)", "llm", "3, a text"),
        ("llm=dict(pretrained_model_name_or_path='a\\0')", "llm", "printable"),
        ("llm='x'", "llm", "'x', a dict"),
        ("freeze_llm='no'", "freeze_llm", "True or False"),
        ("freeze_llm=2", "freeze_llm", "True or False"),
        ("projector_depth=0", "projector_depth", "a positive integer"),
        ("projector_depth=True", "projector_depth", "a positive integer"),
        ("visual_select_layer=1.5", "visual_select_layer", "an integer"),
        ("visual_select_layer=2**60", "visual_select_layer", "an integer"),
        (f"visual_select_layer=0x{'f' * 256}", "visual_select_layer", "an integer"),
        ("max_position_embeddings=-1", "max_position_embeddings", "a positive integer"),
    ],
)
def test_wrong_types_are_said(arguments: str, name: str, found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        asked(of_model(arguments), name)
    assert found in caught.value.faults[0].what
    assert caught.value.faults[0].where == "config.py:1"


@pytest.mark.parametrize(
    ("datasets", "ratio", "noted"),
    [
        ("dict(image_folder='a', pad_image_to_square=True)", "pad", False),
        ("dict(image_folder='a', pad_image_to_square=False)", None, False),
        ("dict(image_folder='a')", None, False),
        ("dict(image_folder='a', pad_image_to_square=True), dict(image_folder='b')", "pad", True),
        ("dict(image_folder='a', pad_image_to_square=True), dict(type='text')", "pad", False),
        ("dict(dataset=dict(image_folder='a', pad_image_to_square=True))", "pad", False),
        ("dict(datasets=[dict(image_folder='a', pad_image_to_square=True)])", "pad", False),
        ("dict(image_folder='a', pad_image_to_square=build())", "pad", True),
        ("dict(image_folder='a', pad_image_to_square=f()), dict(image_folder='b')", "pad", True),
        ("build(), dict(image_folder='a', pad_image_to_square=True)", "pad", True),
    ],
)
def test_padding_is_gathered_from_all_datasets(
    datasets: str, ratio: str | None, noted: bool
) -> None:
    run = of_dataset(f"type='xtuner.dataset.ConcatDataset', datasets=[{datasets}]")
    assert run.data.image_aspect_ratio == ratio
    assert bool(run.notes) is noted


def test_lengths_and_templates_of_several_datasets() -> None:
    run = of_dataset(
        "datasets=[dict(image_folder='a', max_length=5, template_map_fn=dict(template='x.y.a')),"
        " dict(image_folder='b', template_map_fn=dict(template='x.y.b'))]"
    )
    # The default of LLaVADataset is longer than 5.
    assert "datasets differ in max_length: [5, 2048]" in run.notes
    assert run.data.prompt_template == "a"
    assert len(run.notes) == 2


def test_an_inline_template() -> None:
    template = "dict(SYSTEM='s', STOP_WORDS=['e'])"
    run = of_dataset(
        f"datasets=[dict(image_folder='a', template_map_fn=dict(template={template})),"
        f"dict(image_folder='b', template_map_fn=dict(template={template}))]"
    )
    assert run.data.prompt_template == {"SYSTEM": "s", "STOP_WORDS": ["e"]}
    assert run.notes == ()


def test_the_arguments_of_an_image_processor() -> None:
    run = of_dataset(
        "image_folder='a', image_processor=dict(type='transformers.CLIPImageProcessor"
        ".from_pretrained', trust_remote_code=True, size=dict(height=1))"
    )
    assert run.data.image_processor == Loaded("CLIPImageProcessor", None, {"size": {"height": 1}})
    assert run.notes == ()


def test_what_only_describes_never_fails() -> None:
    run = of_model(
        "",
        "prompt_template = build()\ntrain_dataloader = build()\ncustom_hooks = build()\n"
        "tokenizer = dict(bos_token=build())\nimage_processor = build()",
    )
    assert (run.data.prompt_template, run.data.bos_token, run.data.image_aspect_ratio) == (
        None,
        None,
        "pad",
    )
    assert run.data.stop_words == ()
    assert len(run.notes) == 5
    assert sum(note.startswith("config.py:") for note in run.notes) == 4
    assert "`pad` is written" in " ".join(run.notes)


def test_shared_and_endless_datasets_end() -> None:
    wide = "d = [dict(image_folder='a')]\n" + "d = d + d\n" * 19
    assert of_dataset("datasets=d", wide).used[f"{DATASET}.datasets[0].max_length"] == 2048
    bomb = "d = [dict(image_folder='a')]\n" + "d = [dict(datasets=d), dict(datasets=d)]\n" * 30
    run = of_dataset("datasets=d", bomb)
    assert [value for name, value in run.used.items() if name.endswith("max_length")] == [2048]


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("\ufeff" + CONFIG.replace("Be brief.", "简短回答。"), encoding="utf-8")
    assert "'简短回答。'" in TrainingConfig.from_file(path).used.values()
    path.write_bytes(CONFIG.replace("\n", "\r\n").encode())
    assert training_config(CONFIG).used == TrainingConfig.from_file(str(path)).used


def test_what_is_no_config_file(tmp_path: Path) -> None:
    latin, large, pipe = tmp_path / "latin.py", tmp_path / "large.py", tmp_path / "pipe.py"
    latin.write_bytes(b"x = '\xe9'")
    large.write_bytes(b"#" * ((4 << 20) + 1))
    os.mkfifo(pipe)
    for path, what in [
        (latin, "UTF-8"),
        (large, "more than"),
        (pipe, "not a plain file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none.py", "No such file"),
        (Path("a\0b"), "cannot be read"),
    ]:
        with pytest.raises(CheckpointError, match=what):
            TrainingConfig.from_file(path)


LORA = "from peft import LoraConfig, AdaLoraConfig\nfrom mine import Llm\n"


@pytest.mark.parametrize(
    "text",
    [
        "from xtuner.model import LLaVAModel\nmodel = dict(type=LLaVAModel)",
        "from xtuner.model import LLaVAModel as Model\nmodel = dict(type=Model)",
        "from xtuner.model.llava import LLaVAModel\nmodel = dict(type=LLaVAModel)",
        "import xtuner.model\nmodel = dict(type=xtuner.model.LLaVAModel)",
        "import xtuner.model as m\nmodel = dict(type=m.LLaVAModel, _scope_='xtuner')",
        "model = dict(type='LLaVAModel')",
        "model = dict(type='xtuner.model.LLaVAModel')",
        "model = dict(type='<xtuner.model.LLaVAModel>')",
        "model = dict(type='LLaVAModel', use_activation_checkpointing=build(), freeze_llm=f())",
        LORA + "model = dict(type='LLaVAModel', llm_lora=dict(type=LoraConfig))",
        "model = dict(type='LLaVAModel', llm=dict(type='transformers.LlamaForCausalLM.x'))",
        "model = dict(type='LLaVAModel', llm=dict(type=build()))",
    ],
)
def test_xtuners_own_model_by_all_its_names(text: str) -> None:
    training_config(text).check_model()


@pytest.mark.parametrize(
    ("text", "found", "line"),
    [
        ("from xtuner.model import AnyShapeLLaVAModel as LLaVAModel\nmodel = dict("
         "type=LLaVAModel)", "xtuner.model.AnyShapeLLaVAModel, which is another class", 2),
        ("model = dict(type='fork.model.LLaVAModel')", "fork.model.LLaVAModel, which is", 1),
        ("model = dict(type='xtuner.model.anyres.LLaVAModel')", "which is another class", 1),
        ("from .llava import LLaVAModel\nmodel = dict(type=LLaVAModel)", "a relative import", 1),
        ("class LLaVAModel(Base): pass\nmodel = dict(type=LLaVAModel)", "of the config itself", 1),
        ("model = dict(type=build())", "without running code", 1),
        ("model = dict(llm=dict())", "model.type is missing", None),
        ("model = dict(type='LLaVAModel',\n  freeze_llm=True,\n  template=None, x=1)",
         "model has arguments that XTuner's LLaVAModel does not have: template, x", 3),
        (LORA + "model = dict(type='LLaVAModel',\n llm=dict(type=Llm.from_pretrained))",
         "model.llm.type is mine.Llm.from_pretrained, which is not a class of transformers", 4),
        (LORA + "model = dict(type='LLaVAModel',\n visual_encoder_lora=dict(type=AdaLoraConfig))",
         "is peft.AdaLoraConfig, peft.LoraConfig was expected", 4),
    ],
)  # fmt: skip
def test_another_class_is_refused_with_the_reason(text: str, found: str, line: int | None) -> None:
    with pytest.raises(CheckpointError) as caught:
        training_config(text).check_model()
    (fault,) = caught.value.faults
    assert found in fault.what
    assert fault.where == ("config.py" if line is None else f"config.py:{line}")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("dataset_map_fn=llava_map_fn", "dataset_map_fn=llava_image_only_map_fn", "only_map_fn: "),
        ("dataset_map_fn=llava_map_fn", "dataset_map_fn='my.code.to_prompt'", " is to_prompt: "),
        ("type=LLaVADataset", "type='my.code.MyDataset'", "type is MyDataset: "),
        ("dataset_map_fn=llava_map_fn", "dataset_map_fn=None", ""),
        ("type=LLaVADataset", "type='xtuner.dataset.LLaVADataset'", ""),
    ],
)
def test_what_makes_prompts_otherwise_is_said(before: str, after: str, said: str) -> None:
    text = CONFIG.replace("import llava_map_fn,", "import llava_map_fn, llava_image_only_map_fn,")
    assert text.count(before) == 1
    notes = TrainingConfig.from_text(text.replace(before, after), "config.py").data.notes
    found = [note for note in notes if "prompts are written as" in note]
    assert [said in note for note in found] == [True] * bool(said)
