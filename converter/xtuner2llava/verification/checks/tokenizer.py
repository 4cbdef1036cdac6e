"""Whether the tokenizer of the folder loads, and fits the vocabulary."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xtuner2llava.errors import ConversionError
from xtuner2llava.storage.json_file import Json, integer, items, table
from xtuner2llava.tokenizers.compatibility import tokenizer_faults
from xtuner2llava.tokenizers.tokenizer import FILES, read_tokenizer
from xtuner2llava.verification.folder import ConvertedFolder
from xtuner2llava.verification.outcome import FAILED, SKIPPED, WARNING, Finding, judge

# Twice the largest of real ones; transformers takes several times that in memory.
_MAX_BYTES = 64 << 20
_SAMPLE = "A picture of 2 cats.\nWhat is it?"


def loads(out: ConvertedFolder) -> Finding:
    """Loads the tokenizer with transformers, without remote code, and counts its tokens."""
    rows = integer(out.text, "vocab_size") or 0
    faults = [*_faults_of_files(out, rows)]
    try:
        tokenizer = load_tokenizer(out.path, out.text.get("model_type"))
        ids: Mapping[str, int] = tokenizer.get_vocab()
        encoded = tokenizer(_SAMPLE)["input_ids"]
    except Exception as error:
        if not lacks_sentencepiece(out.path) or (out.path / "tokenizer.json").is_file():
            return FAILED, f"does not load: {type(error).__name__}: {error}"
        what = "loading it needs the packages sentencepiece and protobuf"
        return judge(faults, "") if faults else (SKIPPED, what)
    highest = max(ids.values(), default=-1)
    if highest >= rows or len(tokenizer) > rows:
        faults.append(
            f"has {len(tokenizer)} tokens up to id {highest}, the embedding has {rows} rows: LLaVA "
            "would add random ones"
        )
    if not encoded:
        faults.append("encodes a text as no tokens")
    faults += _missing_stops(out, ids)
    if out.format == "hf":
        image = out.config.get("image_token_index", out.config.get("image_token_id"))
        if image not in ids.values():
            faults.append(f"image_token_index {image} is not a token")
    return judge(faults, f"{type(tokenizer).__name__}, {len(tokenizer)} ≤ {rows} rows")


def bos(out: ConvertedFolder) -> Finding | None:
    """Whether LLaVA drops tokens, as it does with a Qwen2 that has a bos token."""
    token = None
    if out.text.get("model_type") == "qwen2":
        with suppress(ConversionError):  # It does not load.
            token = read_tokenizer(out.path).special("bos_token")
    if token is None:
        return None
    return WARNING, (
        f"it is {token}: a prompt that begins with it loses the first token of every chunk after "
        "an image (LLaVA `mm_utils.py`, tokenizer_image_token)"
    )


def _faults_of_files(out: ConvertedFolder, rows: int) -> Iterator[str]:
    """Ids beyond the embedding, and what other versions that the format is for do not load."""
    try:
        tokenizer = read_tokenizer(out.path)
    except ConversionError as error:
        yield from (fault.what for fault in error.faults)
        return
    yield from tokenizer_faults(tokenizer, out.format)
    if tokenizer.highest_id >= rows:
        yield f"has ids up to {tokenizer.highest_id}, the embedding has {rows} rows"


def load_tokenizer(source: Path, model_type: Json) -> Any:
    """The tokenizer of a folder, as transformers loads it without remote code.

    Its files are put beside the config of a plain model of `model_type`: `config.json` of a LLaVA
    folder names a class that plain transformers does not have. Raises what transformers raises.
    """
    import transformers

    classes: Any = transformers

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in FILES:
            if (source / file).is_file():
                size = (source / file).stat().st_size
                if size > _MAX_BYTES:
                    raise ValueError(f"{file} has {size:,} bytes, expected at most {_MAX_BYTES:,}")
                shutil.copyfile(source / file, folder / file)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        try:
            return classes.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except Exception:
            # Before transformers 5, some Llama tokenizers are read from tokenizer.model, which
            # needs a package that may be missing; tokenizer.json has the same tokens.
            if lacks_sentencepiece(folder) and (folder / "tokenizer.json").is_file():
                return classes.PreTrainedTokenizerFast(
                    tokenizer_file=str(folder / "tokenizer.json"),
                    clean_up_tokenization_spaces=False,
                )
            raise


def lacks_sentencepiece(folder: Path) -> bool:
    """Whether `folder` has a SentencePiece tokenizer, and the packages that read it are missing.

    transformers reads it with sentencepiece, from 5 on with protobuf.
    """
    return (folder / "tokenizer.model").is_file() and not has_sentencepiece()


def has_sentencepiece() -> bool:
    try:
        return find_spec("sentencepiece") is not None and find_spec("google.protobuf") is not None
    except ModuleNotFoundError:  # Not even `google`.
        return False


def _missing_stops(out: ConvertedFolder, ids: Mapping[str, int]) -> Iterator[str]:
    """Stop words of the training that are single tokens, and that generation does not stop at."""
    eos = out.json("generation_config.json").get("eos_token_id")
    stops = eos if isinstance(eos, list) else [eos]
    for word in items(table(out.record, "chat"), "stop_words"):
        if isinstance(word, str) and word in ids and ids[word] not in stops:
            yield f"{word} (id {ids[word]}) ended each turn in training, and is not an eos_token_id"
