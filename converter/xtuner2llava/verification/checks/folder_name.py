"""Names that decide what a loader does: the folder's own, and `mm_vision_tower`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from xtuner2llava.planning.vision_tower_name import is_known_to_llava
from xtuner2llava.verification.out_folder import OutFolder
from xtuner2llava.verification.outcome import FAILED, OK, WARNING, Check

_LLAMA = "LlavaLlamaForCausalLM"
_MISTRAL = "LlavaMistralForCausalLM"
_MIXTRAL = "LlavaMixtralForCausalLM"
_QWEN = "LlavaQwenForCausalLM"
# What each names in its builder; LLaVA has no Qwen and no Mixtral.
_HAS = {"LLaVA": (_LLAMA, _MISTRAL), "LLaVA-NeXT": (_LLAMA, _MISTRAL, _MIXTRAL, _QWEN)}


def name_checks(out: OutFolder) -> Iterator[Check]:
    """Checks of names, which only the `llava` format depends on."""
    if out.layout.format != "llava":
        return
    yield _folder_name(out)
    yield _vision_tower(out)


def model_name(folder: Path) -> str:
    """The name by which a loader calls the folder (LLaVA `mm_utils.py`, get_model_name_from_path).

    A snapshot in a Hugging Face cache is called by its repo id.
    """
    path = folder.resolve()
    repo = path.parent.parent.name
    if path.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.rpartition("--")[2]
    if path.name.startswith("checkpoint-"):
        return f"{path.parent.name}_{path.name}"
    return path.name


def class_in_llava(name: str) -> str:
    """The class that haotian-liu/LLaVA `llava/model/builder.py` loads a folder of this name as."""
    low = name.lower()
    if "llava" not in low:
        return "no LLaVA"
    if "mpt" in low:
        return "LlavaMptForCausalLM"
    return _MISTRAL if "mistral" in low else _LLAMA


def class_in_next(name: str) -> str:
    """The same for LLaVA-VL/LLaVA-NeXT, which compares in another order."""
    low = name.lower()
    if "llava" not in low:
        return "no LLaVA"
    if "mixtral" in low:
        return _MIXTRAL
    if "mistral" in low or "zephyr" in low:
        return _MISTRAL
    llama = ("llama", "yi", "nous-hermes", "llava-v1.6-34b", "llava-v1.5")
    if any(word in low for word in llama) or ("wizardlm-2" in low and "vicuna" in low):
        return _LLAMA
    if "qwen" in low or "quyen" in low:
        return "LlavaQwenMoeForCausalLM" if "moe" in low else _QWEN
    return "LlavaGemmaForCausalLM" if "gemma" in low else _LLAMA


def _folder_name(out: OutFolder) -> Check:
    name, wanted = model_name(out.path), out.layout.architecture
    chosen = {"LLaVA": class_in_llava(name), "LLaVA-NeXT": class_in_next(name)}
    able = [loader for loader, classes in _HAS.items() if wanted in classes]
    right = [loader for loader in able if chosen[loader] == wanted]
    wrong = [f"{loader} loads it as {chosen[loader]}" for loader in able if loader not in right]
    detail = f"'{name}' is {wanted} to {' and '.join(right)}"
    if not right:
        detail = f"'{name}': {' and '.join(wrong)}, not {wanted}; rename the folder"
    elif wrong:
        detail += f"; {' and '.join(wrong)}"
    # The model is right under any name, so no name fails.
    return Check("folder name", WARNING if wrong else OK, detail)


def _vision_tower(out: OutFolder) -> Check:
    """LLaVA fetches the tower's config and image processor by this name."""
    name = "mm_vision_tower"
    value = out.layout.config.get(name)
    if not isinstance(value, str) or not value:
        return Check(name, FAILED, f"is {value!r}")
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    if absolute or value.startswith("~"):
        return Check(name, FAILED, f"'{value}' is a path of one machine")
    if is_known_to_llava(value):
        return Check(name, OK, f"'{value}'")
    return Check(
        name,
        WARNING,
        f"LLaVA finds '{value}' only where that path exists: other names begin with openai or "
        "laion",
    )
