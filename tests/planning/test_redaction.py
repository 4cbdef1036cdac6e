"""No published file reveals the machine, its user, the training data, or a secret."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from command import run
from hub_server import HubServer, content
from xtuner2llava import plan, verify
from xtuner2llava.planning.redaction import redact_json, redact_name, redact_text

# What a training machine may have in its config, and must not be published.
REPO = "ann/llava-qwen"
CLIP = "openai/clip-vit-large-patch14-336"
USER, HOST = "zoedoe", "trainhost17"
SECRETS = (USER, HOST, "corpus", "10.1.2.3", "wandb_secret", "hf_" + "c" * 34, "zoe@corp.example")
CONFIG = f"""\
# written by {USER} on {HOST}
data_root = './corpus/llava/'
data_path = data_root + 'corpus_mix.json'
image_folder = '/data/{USER}/corpus/images'
work_dir = '/home/{USER}/runs/first'
pretrained_pth = '/home/{USER}/runs/zero/iter_9.pth'
load_from = None
resume = False
llava_dataset = dict(
    data_path=data_path,
    image_folder=image_folder,
    pad_image_to_square=True,
    template_map_fn=dict(
        template='xtuner.utils.PROMPT_TEMPLATE.qwen_chat',
        type='xtuner.dataset.map_fns.template_map_fn_factory'),
    type='xtuner.dataset.LLaVADataset')
model = dict(
    freeze_llm=False,
    llm=dict(pretrained_model_name_or_path='/home/{USER}/models/llm_qwen2',
             type='transformers.AutoModelForCausalLM.from_pretrained'),
    visual_encoder=dict(pretrained_model_name_or_path='/home/{USER}/models/vision_clip',
                        type='transformers.CLIPVisionModel.from_pretrained'),
    type='xtuner.model.LLaVAModel')
train_dataloader = dict(dataset=llava_dataset)
env_cfg = dict(dist_cfg=dict(init_method='tcp://10.1.2.3:29500', master_addr='{HOST}'))
visualizer = dict(vis_backends=[dict(
    init_kwargs=dict(api_key='wandb_secret', entity='{USER}', email='zoe@corp.example'),
    type='mmengine.visualization.WandbVisBackend')])
custom_hooks = [dict(
    evaluation_images=['/data/{USER}/corpus/a.jpg', 'https://{HOST}/b.jpg'],
    evaluation_inputs=['What is this? See /data/{USER}/corpus/a.jpg', 'and/or?'],
    note='by {USER}@{HOST}.example with hf_{"c" * 34}',
    type='xtuner.engine.hooks.EvaluateChatHook')]
log = f'/home/{{1}}/{USER}'
"""


@pytest.fixture
def machine(checkpoints: Path, tmp_path: Path) -> Path:
    """A home on a shared machine with base models whose files say where they were."""
    home = tmp_path / "home" / USER
    for name in ("llm_qwen2", "vision_clip"):
        shutil.copytree(checkpoints / "bases" / name, home / "models" / name)
    path = home / "models/llm_qwen2/tokenizer_config.json"
    values = json.loads(path.read_text())
    values |= {
        "name_or_path": f"/home/{USER}/models/llm_qwen2",
        "tokenizer_file": f"/root/.cache/{USER}/tokenizer.json",
    }
    path.write_text(json.dumps(values, indent=2))
    path = home / "models/llm_qwen2/config.json"
    values = json.loads(path.read_text()) | {"_name_or_path": f"/home/{USER}/models/base"}
    path.write_text(json.dumps(values))
    (home / "config.py").write_text(CONFIG)
    shutil.copy(checkpoints / "qwen2_e_full_fullvis/iter_2.pth", home / "iter_2.pth")
    return home


@pytest.mark.parametrize("format_name", ["llava", "hf"])
def test_no_published_file_tells(
    hub: HubServer, machine: Path, monkeypatch: pytest.MonkeyPatch, format_name: str
) -> None:
    words = [
        *("convert", machine / "iter_2.pth"),
        *(machine / "runs" / "llava-qwen", "--format", format_name, "-q"),
        *("--llm", machine / "models/llm_qwen2", "--vision", machine / "models/vision_clip"),
        *("--xtuner-config", machine / "config.py"),
        *("--vision-tower-name", CLIP),
    ]
    if format_name == "llava":
        monkeypatch.setenv("HF_TOKEN", hub.token)
        done = run(*words, "--push-to-hub", REPO, "--low-disk", cwd=machine)
        assert done.returncode == 0
        files = hub.repos[REPO].content()
    else:  # `push` sends the files of the folder: tests/hub/test_push.py
        assert run(*words, cwd=machine).returncode == 0
        files = content(machine / "runs" / "llava-qwen")
    assert {"README.md", "conversion.json", "config.json"} <= files.keys()
    assert not [name for name in files if name.endswith(".py")]
    for name, data in files.items():
        text = data.decode("utf-8", "replace")
        found = [secret for secret in (*SECRETS, hub.token, str(machine)) if secret in text]
        assert found == [], name
        if not name.endswith((".safetensors", ".model", "tokenizer.json", "vocab.json")):
            assert re.search(r"(?<![\w:/<])/(?:[\w.-]+/)+[\w.-]+", text) is None, name
    # All else of these files is as it was.
    given = json.loads((machine / "models/llm_qwen2/tokenizer_config.json").read_text())
    written = json.loads(files["tokenizer_config.json"])
    if format_name == "llava":
        assert {key for key in given if given[key] != written[key]} == {
            "name_or_path",
            "tokenizer_file",
        }
    assert written.get("name_or_path", "llm_qwen2") == "llm_qwen2"


def test_the_scan_finds_what_is_there(machine: Path) -> None:
    """So the test before could fail."""
    assert all(secret in CONFIG for secret in SECRETS)
    assert USER in (machine / "models/llm_qwen2/tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen/Qwen1.5-7B-Chat", "Qwen/Qwen1.5-7B-Chat"),
        ("/data/models/vicuna-7b", "vicuna-7b"),
        ("~/models/vicuna-7b", "vicuna-7b"),
        ("../vicuna-7b", "vicuna-7b"),
        ("./vicuna-7b", "vicuna-7b"),
        ("runs/ann/models/vicuna-7b", "vicuna-7b"),
        ("work/iter_9.pth", "iter_9.pth"),
        ("C:\\Users\\ann\\vicuna-7b", "vicuna-7b"),
    ],
)
def test_names(name: str, published: str) -> None:
    assert redact_name(name) == published


def test_texts_lose_their_paths() -> None:
    text = "mm_vision_tower is '/data/ann/clip', as ~/x/config.py has it (https://a.b/c/d)"
    assert redact_text(text) == ("mm_vision_tower is 'clip', as config.py has it (https://a.b/c/d)")


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("from '/content/My Drive/a/clip x', which", "from 'clip x', which"),
        ('the `C:\\Users\\Jane Doe\\clip` and "~/My Models/llm/".', 'the `clip` and "llm".'),
        ("it isn't '/a b/c' or '/d/e'", "it isn't 'c' or 'e'"),
        ("after '</s>', '[/INST]', '/s', /home", "after '</s>', '[/INST]', '/s', /home"),
    ],
)
def test_quoted_paths_may_have_spaces_and_tokens_slashes(text: str, published: str) -> None:
    assert redact_text(text) == published


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/content/My Drive/a b/cfg.py:3: no type", "cfg.py:3: no type"),
        ("base /data/Jane Doe/llm, /x y/z.json says", "base llm, z.json says"),
        ("C:\\Users\\Jane Doe\\clip is used. See docs/cli.md", "clip is used. See docs/cli.md"),
        ("/a/b and /c d/e, or either/or", "b and e, or either/or"),
    ],
)
def test_folders_may_have_spaces_without_quotes(text: str, published: str) -> None:
    assert redact_text(text) == published


@pytest.mark.parametrize(
    "name", ["zebra zebra", "zebra's (zebra), zebra", "zebra: zebra; zebra. zebra"]
)
def test_a_note_leaves_nothing_of_a_folder(checkpoints: Path, tmp_path: Path, name: str) -> None:
    """Notes name the config, the checkpoint, and a base by what the training called it."""
    home = tmp_path / USER / name
    shutil.copytree(checkpoints / "llama_d_lora_vislora/iter_2_xtuner", home / "iter_2_xtuner")
    shutil.copytree(checkpoints / "bases/llm_llama_gqa", home / "llm_llama_gqa")
    config = (home / "iter_2_xtuner/xtuner_config.py").read_text()
    config = config.replace("max_length=", "max_length=open('x') or ")
    config = config.replace("'bases/llm_llama_gqa'", repr(f"models of {USER}/{name}/llm_llama_gqa"))
    (home / "my cfg.py").write_text(config)
    out = home / "llava-llama"
    done = run(
        *("convert", home / "iter_2_xtuner", out, "-q", "--vision-tower-name", CLIP),
        *("--vision", checkpoints / "bases/vision_clip", "--xtuner-config", home / "my cfg.py"),
        *("--lora-alpha", "17"),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "conversion.json").read_text())
    notes = " ".join(record["notes"])
    assert "my cfg.py:" in notes
    assert "adapter_config.json says lora_alpha" in notes
    assert record["parts"]["llm"]["weights"].endswith("base llm_llama_gqa")
    for file in ("README.md", "conversion.json"):
        text = (out / file).read_text()
        assert USER not in text, file
        assert "zebra" not in text, file


@pytest.mark.parametrize(
    "recorded", ["/home/{}/qwen2", "C:\\Users\\{}\\qwen2", "\\\\nas\\{}\\qwen2", "../{}/qwen2"]
)
def test_the_suggested_name_is_of_the_last_component(
    checkpoints: Path, tmp_path: Path, recorded: str
) -> None:
    config = (checkpoints / "qwen2_e_full_fullvis/config.py").read_text()
    assert config.count("'bases/llm_qwen2'") == 1
    named = repr(recorded.format(USER))
    (tmp_path / "config.py").write_text(config.replace("'bases/llm_qwen2'", named))
    made = plan(
        checkpoints / "qwen2_e_full_fullvis/iter_2.pth",
        xtuner_config=tmp_path / "config.py",
        llm=checkpoints / "bases/llm_qwen2",
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name=CLIP,
    )
    assert made.suggested_name == "llava-qwen2-xtuner"


@pytest.mark.parametrize("words", ["/think/off", "/home/end", "~/bye"])
def test_words_of_a_prompt_are_not_paths(checkpoints: Path, tmp_path: Path, words: str) -> None:
    """Neither in what is said of them, nor for `verify`; a path beside them is one."""
    config = (checkpoints / "qwen2_e_full_fullvis/config.py").read_text()
    own = f"dict(INSTRUCTION='{{input}} {words} A:', SUFFIX='</s>', STOP_WORDS=['{words}', '/s'])"
    (tmp_path / "config.py").write_text(config.replace("PROMPT_TEMPLATE.qwen_chat", own))
    shutil.copytree(checkpoints / "bases/llm_qwen2", tmp_path / "llm")
    settings = tmp_path / "llm/generation_config.json"
    values = json.loads(settings.read_text())
    draft = {"assistant": {"model": f"/data/{USER}/draft"}, "seen_in": [f"~/{USER}"]}
    settings.write_text(json.dumps({**values, "stop_strings": [words], **draft}))
    out = tmp_path / "llava-qwen"
    done = run(
        *("convert", checkpoints / "qwen2_e_full_fullvis/iter_2.pth", out, "-q"),
        *("--llm", tmp_path / "llm", "--vision", checkpoints / "bases/vision_clip"),
        *("--xtuner-config", tmp_path / "config.py", "--format", "hf"),
    )
    assert done.returncode == 0, done.stderr
    card = (out / "README.md").read_text()
    assert f"not a single token here: {words}, /s. Stop at them" in card
    assert "without assistant, seen_in: a path of the machine" in card
    written = json.loads((out / "generation_config.json").read_text())
    assert written["stop_strings"] == [words]
    assert not draft.keys() & written.keys()
    assert verify(out).named("no local paths").result == "ok"
    (out / "README.md").write_text(f"{card} {words} /data/{USER}")
    assert f"'/data/{USER}'" in verify(out).named("no local paths").detail


def test_a_text_takes_no_longer_than_it_is_long() -> None:
    for text in ("'" + "/a" * 100_000, "'/" * 100_000, "/" * 200_000, "'" + "/" * 200_000 + "x"):
        assert len(redact_text(text)) <= len(text)


def test_json_has_a_path_in_any_spelling() -> None:
    """As `json.dump` writes what is not ASCII by default, and as PHP and JavaScript may."""
    data = json.dumps({"name_or_path": "/home/中文/qwen", "cache_dir": '/a/"b"/c'}).encode()
    assert b"u4e2d" in data
    assert json.loads(redact_json(data)) == {"name_or_path": "qwen", "cache_dir": "c"}
    assert (
        redact_json(rb'{"vocab_file": "\/home\/ann\/vocab.json"}')
        == b'{"vocab_file": "vocab.json"}'
    )
    assert redact_json(rb'{"name_or_path": "/home/ann/\ud800"}') == rb'{"name_or_path": "\ud800"}'


@pytest.mark.parametrize(
    ("path", "short"),
    [("/data/ann/x", "x"), ("~/ann/x", "x"), (r"C:\ann\x", "x"), (r"\\host\ann\x", "x"),
     ("/s", "/s"), ("a/b", "a/b"), ("data/ann/x", "data/ann/x"), ("https://host/ann", None)],
)  # fmt: skip
def test_json_has_no_path_of_a_machine_under_any_key(path: str, short: str | None) -> None:
    words = {"eos_token": path, "chat_template": path, "added": {"7": {"content": path}}}
    values = {"logs": path, "of": {"run": path, "words": [path]}, **words}
    expected = {**values, "logs": short or path, "of": {"run": short or path, "words": [path]}}
    assert json.loads(redact_json(json.dumps(values).encode())) == expected


def test_json_keeps_all_other_bytes() -> None:
    data = b'{"name_or_path" :  "/data/\xc3\xa9/qwen",\n "x": "/kept", "tokenizer_file": null}'
    assert redact_json(data) == (
        b'{"name_or_path" :  "qwen",\n "x": "/kept", "tokenizer_file": null}'
    )
    for same in (b"no JSON", b"[1]", b'{"name_or_path": "Qwen/Qwen2-7B"}', b"\xff",
                 rb'{"name_or_path": "/a\x"}'):  # fmt: skip
        assert redact_json(same) == same
