"""The YAML between the `---` lines of a model card: what the Hub files a model under."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import cast

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.yaml import read_document
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.redaction import hub_id
from xtuner2llava.storage.json_file import Json

CARD_NAME = "README.md"
# Of a card without this line, the Hub has its owner's.
MARK = (
    "<!-- Written by xtuner2llava. Take this line out to keep your own text when it is pushed "
    "again. -->"
)
# As huggingface_hub finds it (`repocard.py`, REGEX_YAML_BLOCK), with the body apart.
_BLOCK = re.compile(
    r"\A\ufeff?\s*---[ \t]*\r?\n(?P<yaml>.*?)(?<=\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL
)
_ORDER = (
    "license license_name license_link language base_model base_model_relation datasets "
    "pipeline_tag library_name tags"
).split()
_MAX_CARD_BYTES = 4 << 20
# Published training data by the names of its files, which XTuner's configs take as they are
# (configs/llava; docs/zh_cn/user_guides/dataset_prepare.md).
_DATASETS = {
    "blip_laion_cc_sbu_558k.json": "liuhaotian/LLaVA-Pretrain",
    "llava_instruct_150k.json": "liuhaotian/LLaVA-Instruct-150K",
    "llava_v1_5_mix665k.json": "liuhaotian/LLaVA-Instruct-150K",
    "share-captioner_coco_lcs_sam_1246k_1107.json": "Lin-Chen/ShareGPT4V",
    "sharegpt4v_instruct_gpt4-vision_cap100k.json": "Lin-Chen/ShareGPT4V",
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json": "Lin-Chen/ShareGPT4V",
}
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
_NAME = re.compile(r"[\w .()/+-]{1,100}")


def front_matter(plan: Plan) -> dict[str, Json]:
    """The metadata of the output: what it is based on, what of the base's card holds for it, and
    published data that it was trained on.

    An LLM's license binds what is made of it; so do its languages. The tower brings none.
    """
    checkpoint = plan.checkpoint
    values: dict[str, Json] = {}
    llm_id = hub_id(checkpoint.llm.name, checkpoint.llm.folder)
    if checkpoint.llm.folder is not None:
        values |= _inherited(checkpoint.llm.folder, llm_id)
    tower_id = hub_id(checkpoint.visual_encoder.name, checkpoint.visual_encoder.folder)
    bases: list[Json] = [name for name in dict.fromkeys((llm_id, tower_id)) if name is not None]
    if bases:
        values["base_model"] = bases
        # Of several bases, the Hub would otherwise say that they were merged.
        values["base_model_relation"] = "finetune"
    names = [PurePath(path).name for path in checkpoint.training_data.data_files]
    datasets: list[Json] = [*dict.fromkeys(_DATASETS[n] for n in names if n in _DATASETS)]
    if datasets:
        values["datasets"] = datasets
    values["pipeline_tag"] = "image-text-to-text"
    if plan.mapping.format == "hf":
        # Official LLaVA folders are read by LLaVA's own code, which the Hub has no name for.
        values["library_name"] = "transformers"
    values["tags"] = ["llava", "xtuner", plan.mapping.target_class]
    return values


def split(text: str) -> tuple[str | None, str]:
    """The YAML of a card, None where it has none, and the text after it."""
    match = _BLOCK.match(text)
    return (match["yaml"], text[match.end() :]) if match else (None, text)


def parse(text: str) -> dict[str, Json]:
    """The metadata that `text` spells. Raises `ValueError` where it is not a plain YAML mapping.

    As on the Hub, `no` is a language and not false.
    """
    if all(line.lstrip()[:1] in ("", "#") for line in text.splitlines()):
        return {}
    try:
        table = read_document(text.encode("utf-8", "replace"), "").table
    except MappingError as error:
        raise ValueError(error.faults[0].what) from error
    return {key: cast("Json", node.data) for key, node in table.items()}


def dump(values: Mapping[str, Json]) -> str:
    """The YAML of `values`, the usual keys first, between its `---` lines."""
    import yaml

    ordered = {key: values[key] for key in (*_ORDER, *sorted(values)) if key in values}
    text = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"


def merged_card(ours: str, theirs: str) -> str | None:
    """The card to publish where `theirs` is on the Hub; None where that stays.

    Of one that this tool wrote, the metadata that only it has is kept, such as datasets added by
    hand. All metadata counts of one that has nothing else: such cards the Hub makes when a
    repository is created with a license. Any other one is its owner's.
    """
    (yaml_text, body), is_generated = split(theirs), MARK in theirs
    if not is_generated and (yaml_text is None or body.strip()):
        return None
    own_yaml, text = split(ours)
    try:
        own, other = parse(own_yaml or ""), parse(yaml_text or "")
    except ValueError:
        return ours if is_generated else None
    return dump(other | own if is_generated else own | other) + text


def _inherited(folder: Path, llm_id: str | None) -> dict[str, Json]:
    """License and languages of the base LLM, from the card beside its weights."""
    path = folder / CARD_NAME
    try:
        if not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
            return {}
        found = parse(split(path.read_text(encoding="utf-8", errors="replace"))[0] or "")
    except (OSError, ValueError):
        return {}
    values: dict[str, Json] = {}
    licenses = found.get("license")
    if isinstance(licenses, str) and _LICENSE.fullmatch(licenses):
        values["license"] = licenses
        name, link = found.get("license_name"), found.get("license_link")
        if isinstance(name, str) and _NAME.fullmatch(name):
            values["license_name"] = name
        if isinstance(link, str) and (address := _address(link, llm_id)):
            values["license_link"] = address
    language = found.get("language")
    listed = language if isinstance(language, list) else [language]
    known: list[Json] = [x for x in listed if isinstance(x, str) and _LANGUAGE.fullmatch(x)]
    if known:
        values["language"] = known
    return values


def _address(link: str, llm_id: str | None) -> str | None:
    """The base's license as an address that means the same from another repository."""
    if re.fullmatch(r"https://[\w./%?=&#:+-]{1,300}", link):
        return link
    if llm_id is not None and re.fullmatch(r"\w[\w.-]{0,60}", link):
        return f"https://huggingface.co/{llm_id}/blob/main/{link}"
    return None
