"""The model card: right for each family and format, read by the Hub's own parser, and run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from command import run
from hub_server import HubServer
from reference.cases import CASES, Converted

FAMILIES = {
    "qwen2": "qwen2_e_full_fullvis",
    "llama": "llama_d_lora_vislora",
    "phi3": "phi3_e_full_fullvis",
}
FORMATS = ("llava", "hf")
ALL = [(family, name) for family in FAMILIES for name in FORMATS]
PROMPTS = {
    "qwen2": "<|im_start|>user\n<image>\nWhat is in this picture?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama": "USER: <image>\nWhat is in this picture? ASSISTANT:",
    "phi3": "<|user|>\n<image>\nWhat is in this picture?<|end|>\n<|assistant|>\n",
}
CLIP = "openai/clip-vit-large-patch14-336"


@pytest.fixture(scope="module")
def folder(converted: Converted) -> Callable[[str, str], Path]:
    def make(family: str, format_name: str) -> Path:
        return converted(FAMILIES[family], format=format_name, vision_tower_name=CLIP)

    return make


@pytest.fixture(scope="module")
def card(folder: Callable[[str, str], Path]) -> Callable[[str, str], str]:
    return lambda family, name: (folder(family, name) / "README.md").read_text(encoding="utf-8")


def metadata(text: str) -> dict[str, Any]:
    """As huggingface_hub reads it, which raises for what the Hub would not take."""
    from huggingface_hub import ModelCard

    return dict(ModelCard(text).data.to_dict())


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# What it says


@pytest.mark.parametrize(("family", "name"), ALL)
def test_metadata(card: Callable[[str, str], str], family: str, name: str) -> None:
    data = metadata(card(family, name))
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["tags"] == ["llava", "xtuner", "qwen2" if family == "qwen2" else "llama"]
    assert data.get("library_name") == ("transformers" if name == "hf" else None)
    assert "license" not in data  # Nothing says what it is.
    assert "datasets" not in data
    assert not any(key.startswith("model-index") for key in data)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_who_reads_it(card: Callable[[str, str], str], family: str, name: str) -> None:
    text = card(family, name)
    loads_with = {
        "transformers]": name == "hf",
        "[LLaVA]": name == "llava" and family != "qwen2",
        "[LLaVA-NeXT]": name == "llava",
        "LlavaForConditionalGeneration": name == "hf",
        "load_pretrained_model": name == "llava",
        "SGLang does not load it": name == "llava",
    }
    assert {words: words in text for words in loads_with} == loads_with
    # Who downloads it has nothing to convert; the command that made it is all that has flags of it.
    without_command = re.sub(r"^```console\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"--[a-z][a-z-]+", without_command)) <= {"--chat-template"}
    assert ("must contain `llava` and `qwen`" in text) == ((family, name) == ("qwen2", "llava"))


@pytest.mark.parametrize(("family", "name"), ALL)
def test_the_prompt_is_that_of_the_training(
    card: Callable[[str, str], str], family: str, name: str
) -> None:
    text = card(family, name)
    (code,) = python_blocks(text)
    if name == "hf":
        assert "prompt = processor.apply_chat_template(conversation, " in code
    else:
        assert f"prompt = {PROMPTS[family]!r}\n" in code
    assert f"```text\n{PROMPTS[family]}\n```" in text
    stops = {"qwen2": "`<|im_end|>`, `<|endoftext|>`", "phi3": "`<|end|>`"}
    assert ("A turn ends with" in text) == (family in stops)
    assert stops.get(family, "") in text


@pytest.mark.parametrize(("family", "name"), ALL)
def test_what_it_is_made_of(card: Callable[[str, str], str], family: str, name: str) -> None:
    text = card(family, name)
    origin = "LoRA (rank 16, alpha 32) on base" if family == "llama" else "trained"
    assert re.search(rf"^\| LLM \| .* \| {re.escape(origin)}", text, re.MULTILINE)
    assert "| projector (`mlp2x_gelu`) | - | trained |" in text
    assert "read back and compared with their sources, bit for bit" in text
    assert "mapping `" + family + "` → `" + name + "`" in text
    assert "by 56 pixels" in text


def test_a_model_type_for_servers(converted: Converted) -> None:
    out = converted(FAMILIES["llama"], model_type="llava", vision_tower_name=CLIP)
    text = (out / "README.md").read_text()
    assert "python -m sglang.launch_server --model-path llava-" in text
    tower = converted(FAMILIES["llama"], model_type="llava", vision_tower_name="eva")
    assert "sglang" not in (tower / "README.md").read_text().lower()  # It wants clip in the name.


def test_a_frozen_tower_that_is_left_out(converted: Converted) -> None:
    out = converted("llama_b_full_frozenvis", include_vision_tower=False, vision_tower_name=CLIP)
    text = (out / "README.md").read_text()
    assert "frozen in training, as the base model; not in these files" in text
    assert "--no-include-vision-tower" in text
    assert "its weights from here" not in text
    assert "computes NaN" in text  # A caveat of the plan.


def test_without_verification_it_claims_none(checkpoints: Path, tmp_path: Path) -> None:
    from xtuner2llava import convert

    out = tmp_path / "llava-qwen2"
    convert(
        checkpoints / "qwen2_e_full_fullvis/iter_2.pth", out, verify=False, **bases(checkpoints)
    )
    assert "bit for bit" not in (out / "README.md").read_text()


def bases(checkpoints: Path, case: str = "qwen2_e_full_fullvis") -> dict[str, Path]:
    return {"llm": checkpoints / CASES[case].llm, "vision": checkpoints / CASES[case].vision}


def test_a_template_written_out_in_the_config(checkpoints: Path, tmp_path: Path) -> None:
    from xtuner2llava import convert

    config = (checkpoints / "qwen2_e_full_fullvis/config.py").read_text()
    own = "dict(SYSTEM='', INSTRUCTION='Q {round}: {input}\\nA:', SUFFIX='</a>', SEP='\\n')"
    assert "PROMPT_TEMPLATE.qwen_chat" in config
    (tmp_path / "config.py").write_text(config.replace("PROMPT_TEMPLATE.qwen_chat", own))
    out = tmp_path / "llava-qwen2"
    convert(
        checkpoints / "qwen2_e_full_fullvis/iter_2.pth",
        out,
        xtuner_config=tmp_path / "config.py",
        **bases(checkpoints),
    )
    text = (out / "README.md").read_text()
    assert "prompt = 'Q 1: <image>\\nWhat is in this picture?\\nA:'" in text
    assert "qwen_chat" not in text


def test_what_a_checkpoint_says_stays_text(checkpoints: Path, tmp_path: Path) -> None:
    """Its templates and names end no block of the card, and bring no line of Markdown or Python."""
    from xtuner2llava import convert

    config = (checkpoints / "qwen2_e_full_fullvis/config.py").read_text()
    own = (
        "dict(SYSTEM='', INSTRUCTION='Q {input}\\n```\\n# Buy\\nA:', SUFFIX='</a>', SEP='\\n', "
        "STOP_WORDS=['`[x](http://a.example)\\n# Buy'])"
    )
    name = """'qwen" + evil() + "'"""
    assert "'bases/llm_qwen2'" in config
    config = config.replace("'bases/llm_qwen2'", name).replace("PROMPT_TEMPLATE.qwen_chat", own)
    (tmp_path / "config.py").write_text(config)
    out = tmp_path / "llava-qwen2"
    convert(
        checkpoints / "qwen2_e_full_fullvis/iter_2.pth",
        out,
        xtuner_config=tmp_path / "config.py",
        **bases(checkpoints),
    )
    text = (out / "README.md").read_text()
    (code,) = python_blocks(text)
    assert "evil()" not in code
    assert 'folder = "llava-qwen-evil-' in code
    assert "````text\nQ <image>\nWhat is in this picture?\n```\n# Buy\nA:\n````" in text
    assert "A turn ends with `` `[x](http://a.example)\\n# Buy ``." in text
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "\n# Buy" not in outside
    (note,) = re.findall("^- Stop words.*$", outside, re.MULTILINE)
    assert r"\[x](http://a.example) # Buy" in note


def test_the_command_makes_the_same_files(
    folder: Callable[[str, str], Path], checkpoints: Path, tmp_path: Path
) -> None:
    """Run in a folder where its names are files, it gives what it stands in, byte for byte."""
    original = folder("qwen2", "llava")
    text = (original / "README.md").read_text()
    (shown,) = re.findall(r"^\$ (xtuner2llava convert .*)$", text, re.MULTILINE)
    words = shlex.split(shown)
    assert words[:3] == ["xtuner2llava", "convert", "iter_2.pth"]
    (tmp_path / "iter_2.pth").symlink_to(checkpoints / "qwen2_e_full_fullvis/iter_2.pth")
    for option in ("--llm", "--vision"):
        name = words[words.index(option) + 1]
        (base,) = (checkpoints / "bases").glob(Path(name).name)
        (tmp_path / name).symlink_to(base)
    assert run(*words[1:], "-q", cwd=tmp_path).returncode == 0
    made = tmp_path / words[3]
    for path in original.iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes(), path.name


def test_links_are_of_the_known_places(card: Callable[[str, str], str]) -> None:
    known = {"github.com", "huggingface.co"}
    for family, name in ALL:
        links = re.findall(r"\]\((.*?)\)", card(family, name))
        assert links
        assert {re.match(r"https://([^/]+)/", link)[1] for link in links} <= known  # type: ignore[index]


@pytest.mark.parametrize(("family", "name"), ALL)
def test_the_hub_takes_it(
    hub: HubServer, folder: Callable[[str, str], Path], family: str, name: str
) -> None:
    """`upload_file` has the Hub validate it, here the one on loopback."""
    from huggingface_hub import HfApi

    api, readme = HfApi(token=hub.token), folder(family, name) / "README.md"
    api.create_repo("ann/card")
    api.upload_file(path_or_fileobj=readme, path_in_repo="README.md", repo_id="ann/card")
    assert hub.log("POST", "/api/validate-yaml")
    assert hub.repos["ann/card"].content() == {"README.md": readme.read_bytes()}


# Running what it says


def run_card(python: Path | str, folder: Path, bases: Path, work: Path) -> str:
    """What the lines of the card print, run in `work`, where its names are files."""
    (code,) = python_blocks((folder / "README.md").read_text())
    (name,) = re.findall(r'^folder = "([^"]+)"', code, re.MULTILINE)
    (work / name).symlink_to(folder)
    (work / "bases").symlink_to(bases)
    picture = (
        "from PIL import Image\n"
        "Image.linear_gradient('L').resize((100, 80)).convert('RGB').save('picture.jpg')\n"
    )
    short = code.replace("max_new_tokens=256", "max_new_tokens=3")
    assert short != code
    done = subprocess.run(
        [python, "-c", picture + short], cwd=work, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_runs_its_lines(
    folder: Callable[[str, str], Path], checkpoints: Path, tmp_path: Path, family: str
) -> None:
    pytest.importorskip("PIL", reason="the image processor of transformers needs Pillow")
    if family != "qwen2" and int(version("transformers").partition(".")[0]) < 5:
        pytest.importorskip("sentencepiece", reason="Llama's tokenizer is made of tokenizer.model")
    out = run_card(sys.executable, folder(family, "hf"), checkpoints / "bases", tmp_path)
    assert out.endswith("\n")
    assert "What is in this picture" not in out  # The answer, and not the question.


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_llava_runs_its_lines(
    converted: Converted, checkpoints: Path, tmp_path: Path, family: str
) -> None:
    environment = Path(__file__).parents[1] / "acceptance" / "environment"
    made = subprocess.run([environment], stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode == 77:
        pytest.skip("no Python from 3.10 to 3.12, which the transformers that LLaVA pins need")
    assert made.returncode == 0, "the environment could not be made, see above"
    # Tiny towers have no name on the Hub; `mm_vision_tower` is a path where the lines run.
    case = "llama_e_full_fullvis" if family == "llama" else FAMILIES[family]
    out = converted(case, vision_tower_name=CASES[case].vision)
    assert run_card(made.stdout.strip(), out, checkpoints / "bases", tmp_path).endswith("\n")


@pytest.mark.parametrize(("family", "name"), ALL)
def test_its_lines_are_python(card: Callable[[str, str], str], family: str, name: str) -> None:
    (code,) = python_blocks(card(family, name))
    compile(code, "README.md", "exec")


# A card of the user's own


def template(checkpoints: Path, folder: Path, text: str) -> str:
    """The README.md that a conversion makes with the template `text`."""
    from xtuner2llava import convert

    (folder / "card.md").write_text(text, encoding="utf-8")
    out = folder / "llava-qwen2"
    convert(
        checkpoints / "qwen2_e_full_fullvis/iter_2.pth",
        out,
        card_template=folder / "card.md",
        overwrite=True,
        **bases(checkpoints),
    )
    return (out / "README.md").read_text(encoding="utf-8")


def test_a_card_of_ones_own_is_taken_word_by_word(checkpoints: Path, tmp_path: Path) -> None:
    own = (
        "---\n# mine\nlicense:   mit\ntags: [mine]\n---\n\n# 我的模型\n\nI wrote this {not that}.\n"
    )
    text = template(checkpoints, tmp_path, own)
    head, rest = own.removesuffix("---\n\n# 我的模型\n\nI wrote this {not that}.\n"), "\n# 我的模型"
    assert text.startswith(head)
    assert text.endswith("---\n\n# 我的模型\n\nI wrote this {not that}.\n")
    assert rest in text
    data = metadata(text)
    assert data["license"] == "mit"
    assert data["tags"] == ["mine"]
    assert data["pipeline_tag"] == "image-text-to-text"  # What it does not say is added.


def test_metadata_ends_at_a_line(checkpoints: Path, tmp_path: Path) -> None:
    text = template(checkpoints, tmp_path, "---\nmodel_name: Owl---\nlicense: mit\n---\n\nMine.\n")
    assert text.startswith("---\nmodel_name: Owl---\nlicense: mit\n")
    assert text.count("---\n") == 3  # That of the name, and two lines.
    assert metadata(text)["model_name"] == "Owl---"
    empty = template(checkpoints, tmp_path, "---\n---\n\nMine.\n")
    assert metadata(empty)["pipeline_tag"] == "image-text-to-text"
    assert empty.endswith("---\n\nMine.\n")


def test_places_are_filled(checkpoints: Path, tmp_path: Path) -> None:
    text = template(checkpoints, tmp_path, "# {{ name }}\n\n{{usage}}\n\n{{ parts }}\n")
    assert "# llava-llm_qwen2-xtuner\n" in text
    assert "load_pretrained_model(" in text
    assert "| LLM |" in text
    assert "{{" not in text
    assert "## Prompt" not in text
    assert metadata(text)["pipeline_tag"] == "image-text-to-text"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ nothing }}", "has no place 'nothing'"),
        ("---\nlicense: [mit\n---\n", "its metadata between --- lines"),
        ("---\n- mit\n---\n", "is not a table of keys and values"),
        ("---\na: &x [1]\nb: *x\n---\n", "`&x` is an anchor, which is not read here"),
    ],
)
def test_a_wrong_template_is_a_usage_error(
    checkpoints: Path, tmp_path: Path, text: str, said: str
) -> None:
    from xtuner2llava import UsageError

    with pytest.raises(UsageError) as error:
        template(checkpoints, tmp_path, text)
    assert said in str(error.value)
    assert "card.md" in str(error.value)
    assert not (tmp_path / "llava-qwen2").exists()


def test_the_card_of_a_base_may_be_anything(checkpoints: Path, tmp_path: Path) -> None:
    """It decides nothing but metadata, so what cannot be read of it is as if it were not there."""
    from xtuner2llava.metadata.front_matter import _inherited

    llm = tmp_path / "llm"
    shutil.copytree(checkpoints / "bases/llm_qwen2", llm)
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)
    )
    for text in (
        f"---\n{bomb}license: mit\n---\n",
        "---\nlicense: [apache-2.0, mit]\nlanguage: 7\n---\n",
        "---\nlicense: 'a\\nb: c'\nlicense_link: javascript:alert(1)\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\nlicense: mit\na: !!bool x\n---\n",
        "---\nlicense: mit\na: !!timestamp x\n---\n",
        "---\nlicense: mit\na: !!int ''\n---\n",
        "---\n\x00\n---\n",
        "no metadata",
    ):
        (llm / "README.md").write_text(text)
        assert _inherited(llm, None) == {}
    (llm / "README.md").write_text(
        "---\nlicense: llama3\nlicense_link: LICENSE\nlanguage: en\n---\n"
    )
    assert _inherited(llm, None) == {"license": "llama3", "language": ["en"]}
    assert _inherited(llm, "meta/llama")["license_link"] == (
        "https://huggingface.co/meta/llama/blob/main/LICENSE"
    )
    (llm / "README.md").write_text(
        f"---\nlicense: mit\nlanguage: [no, sv]\na: {'1:' * 400}1.0\n---\n"
    )
    assert _inherited(llm, None) == {"license": "mit", "language": ["no", "sv"]}


def test_metadata_on_the_hub_means_what_it_did() -> None:
    """YAML 1.2, as the Hub reads it: PyYAML's own loaders would make false, 90 and a date of it."""
    from xtuner2llava.metadata.front_matter import MARK, merged_card, parse, split

    own = "language: no\nratio: 1:30\ndate: 2024-01-01\n"
    merged = merged_card(f"---\nlicense: mit\n---\n{MARK}\n", f"---\n{own}---\n{MARK}\n")
    assert merged is not None
    expected = {"license": "mit", "language": "no", "ratio": "1:30", "date": "2024-01-01"}
    assert parse(split(merged)[0] or "") == expected
    assert "'no'" in merged
    assert merged_card("---\na: b\n---\n", "---\n# A comment\n---\n") == "---\na: b\n---\n"
