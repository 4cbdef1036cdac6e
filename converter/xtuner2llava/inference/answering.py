"""`xtuner2llava try`: what a converted model answers to a picture and a question.

It needs transformers and Pillow only. A folder of the format `hf` is loaded as transformers loads
it, with its processor and chat template. What official LLaVA does with one of the format `llava` is
composed here: the tower, the projector, and the LLM that generates from embeddings
(haotian-liu/LLaVA `llava/model/llava_arch.py`, `mm_utils.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import CheckpointError, ConversionError, UnsupportedError, UsageError
from xtuner2llava.options import TryOptions
from xtuner2llava.planning.chat_template import IMAGE
from xtuner2llava.planning.vision_tower import PUBLISHED
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.sources.model_config import read_model_config, vision_tower_config
from xtuner2llava.storage.json_file import Json, table, text
from xtuner2llava.tokenizers.llama import with_fast_file
from xtuner2llava.tokenizers.prefix import LIKE_LLAMA, adds_bos
from xtuner2llava.tokenizers.tokenizer import FAST, read_tokenizer
from xtuner2llava.verification.checks import structure
from xtuner2llava.verification.folder import ConvertedFolder, open_folder
from xtuner2llava.verification.outcome import FAILED
from xtuner2llava.verification.plain_model import plain_config, project

if TYPE_CHECKING:
    import torch

QUESTION = "What is in this picture?"
_BACKGROUND = 255  # LLaVA pads with the mean, in 8 bits
_VERIFY = "`xtuner2llava verify` says what is wrong with a folder."
# No code of the folder is run, and nothing is unpickled or downloaded.
_LOCAL: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}
# Of Pillow's formats, those of pictures. It gives others to programs: EPS to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_Tensors = dict[str, "torch.Tensor"]
_OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """`prompt` is what the model was given, without its bos token, `tokens` what it answered."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    device: str

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON."""
        return {
            "prompt": self.prompt,
            "answer": self.text,
            "tokens": list(self.tokens),
            "device": self.device,
        }


def memory_needed(folder: Path) -> int:
    """The bytes of all tensors, which have to be in memory; activations come on top."""
    return sum(tensor.nbytes for tensor in open_folder(folder).tensors.values())


def answer(folder: Path, image: Path, question: str, options: TryOptions) -> Answer:
    """What the model in `folder` says, greedily, to `question` about the picture `image`.

    A question with `<image>` in it is taken as the whole prompt. Raises `ConversionError`, also for
    a folder that has not all tensors of its classes.
    """
    import torch

    if question.count(IMAGE) > 1:
        what = f"has {question.count(IMAGE)} places for pictures, and there is one picture"
        raise UsageError(what, where="QUESTION")
    out = open_folder(folder)
    _ = out.tensors  # Raises where a file is damaged.
    picture = _read_picture(image)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    ask = _ask_transformers if out.format == "hf" else _ask_llava
    try:
        with torch.inference_mode():
            prompt, tokenizer, model, inputs = ask(out, picture, question, device)
            made = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=options.max_new_tokens,
                streamer=_streamer(tokenizer, options.on_text),
            )[0]
        # Where the prompt went in as ids, they come out again.
        made = made[inputs["input_ids"].shape[1] :] if "input_ids" in inputs else made
        text = tokenizer.decode(made, skip_special_tokens=True)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{device} has too little memory for this model",
            where="--device",
            advice="Give another device, such as cpu.",
        ) from error
    except (ConversionError, BrokenPipeError):
        raise
    except Exception as error:  # What transformers raises of a damaged file may be any.
        raise CheckpointError(
            f"cannot be asked: {type(error).__name__}: {error}", where=str(folder), advice=_VERIFY
        ) from error
    return Answer(prompt, text.strip(), tuple(made.tolist()), device)


def _check_device(name: str) -> None:
    """Raises `UsageError` where torch cannot compute there, before the model is loaded."""
    import torch

    try:
        torch.zeros(1, device=name).tolist()
    # AssertionError: torch was built without the device.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"torch cannot use '{name}' ({reason})", where="--device", advice="Give cpu, or cuda:0."
        ) from error


# The prompt, the tokenizer, the model, and what it generates from.
_Asked = tuple[str, Any, Any, Mapping[str, Any]]


def _ask_transformers(out: ConvertedFolder, picture: Any, question: str, device: str) -> _Asked:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(out.path, **_LOCAL)
    kind: Any = LlavaForConditionalGeneration
    model = _loaded(kind, out.path, _dtype(out), use_safetensors=True, **_LOCAL)
    model.to(device).eval()
    prompt = question
    if IMAGE not in question:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        conversation = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt").to(device, _dtype(out))
    return prompt, processor.tokenizer, model, inputs


def _ask_llava(out: ConvertedFolder, picture: Any, question: str, device: str) -> _Asked:
    import torch
    import transformers

    result, detail = structure.projector(out)
    if result == FAILED:
        raise CheckpointError(f"the projector: {detail}", where=str(out.path), advice=_VERIFY)
    dtype, parts = _dtype(out), _parts(out)
    # transformers 5 warns of the older word, even where it says nothing.
    text = {k: v for k, v in out.text.items() if k != "rope_scaling" or v is not None}
    kinds: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    plain, vision = plain_config(text), {**_tower_config(out), "model_type": "clip_vision_model"}
    llm = _loaded(kinds[type(plain)], None, dtype, config=plain, state_dict=parts[LLM])
    tower = _loaded(
        transformers.CLIPVisionModel,
        None,
        dtype,
        config=plain_config(vision),
        state_dict=parts[VISUAL_ENCODER],
    )
    for module in (llm, tower):
        module.to(device).eval()
    if (out.path / "generation_config.json").is_file():
        llm.generation_config = transformers.GenerationConfig.from_pretrained(out.path)
    tokenizer, begins = _tokenizer(out, llm.config)
    prompt = question if IMAGE in question else _prompt(out, question)
    before, _, after = prompt.partition(IMAGE)
    pixels = _pixels(out, picture).to(device, dtype)
    states = tower(pixels, output_hidden_states=True).hidden_states
    projector = {name: tensor.to(device, dtype) for name, tensor in parts[PROJECTOR].items()}
    seen = project(states[out.config["mm_vision_select_layer"]], projector)
    embed = llm.get_input_embeddings()

    def embedded(piece: str, first: Sequence[int] = ()) -> Any:
        ids = [*first, *tokenizer.encode(piece, add_special_tokens=False)]
        return embed(torch.tensor([ids], dtype=torch.long, device=device))

    embeds = torch.cat([embedded(before, begins), seen, embedded(after)], dim=1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=device)
    return prompt, tokenizer, llm, {"inputs_embeds": embeds, "attention_mask": mask}


def _tokenizer(out: ConvertedFolder, config: Any) -> tuple[Any, list[int]]:
    """The tokenizer with the ids of training in every transformers, and those before a prompt.

    LlamaTokenizer of 5 leaves tokenizer.json aside, and splits white space otherwise.
    """
    import transformers

    from tokenizers import Tokenizer

    files = read_tokenizer(out.path)
    bos = files.ids.get(files.special("bos_token") or "") if adds_bos(files) else None
    before = [] if bos is None else [bos]
    llama = files.slow_class in LIKE_LLAMA
    made = with_fast_file(files) if llama and FAST not in files.files else files
    auto: Any = transformers.AutoTokenizer
    if not llama or made is None:
        return auto.from_pretrained(out.path, config=config, **_LOCAL), before
    fast = Tokenizer.from_str(json.dumps(made.read(FAST)))
    plain: Any = transformers.PreTrainedTokenizerFast
    return plain(tokenizer_object=fast, clean_up_tokenization_spaces=False), before


def _dtype(out: ConvertedFolder) -> torch.dtype:
    import torch

    named = getattr(torch, str(out.dtype), None)
    return named if isinstance(named, torch.dtype) else torch.float32


def _read_picture(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            "reading pictures needs Pillow, which is not installed",
            where="try",
            advice="Install it: pip install pillow",
        ) from error
    try:
        return Image.open(path, formats=_FORMATS).convert("RGB")
    except Exception as error:  # Each format has its own for a damaged file.
        raise UsageError(f"cannot be read as a picture ({error})", where=str(path)) from error


def _prompt(out: ConvertedFolder, question: str) -> str:
    """The prompt of the training with `question`."""
    prompt = text(table(out.record, "chat"), "prompt")
    if prompt is None or IMAGE not in prompt:
        raise UnsupportedError(
            "does not say which prompt the model was trained with",
            where=str(out.path / "conversion.json"),
            advice="Give the whole prompt, with <image> where the picture goes, as the question.",
        )
    # Without space around it, as in training (InternLM/xtuner `dataset_map_fns/llava_map_fn.py`).
    return prompt.replace(f"{IMAGE}\n{{question}}", f"{IMAGE}\n{question.strip()}".strip())


def _parts(out: ConvertedFolder) -> Mapping[str, _Tensors]:
    """The tensors by component, under the names of the plain classes."""
    from safetensors import safe_open

    parts: dict[str, _Tensors] = {LLM: {}, VISUAL_ENCODER: {}, PROJECTOR: {}}
    for name in out.shards:
        with safe_open(out.path / name, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118 - it is not a dict
                place = out.place(tensor)
                if place is not None:
                    parts[place[0]][place[1]] = file.get_tensor(tensor)
    if not parts[VISUAL_ENCODER]:
        raise UnsupportedError(
            "the vision tower's weights are not in this folder",
            where=str(out.path),
            advice="Convert with --include-vision-tower.",
        )
    return parts


def _tower_config(out: ConvertedFolder) -> Mapping[str, Json]:
    """The config of the tower that `mm_vision_tower` names, as LLaVA looks it up."""
    name = str(out.config.get("mm_vision_tower"))
    published = PUBLISHED.get(name)
    if published is not None:
        return published.config
    if Path(name).is_dir():
        return vision_tower_config(read_model_config(Path(name))).values
    raise UnsupportedError(
        f"mm_vision_tower is '{name}', whose config is not known here",
        where=str(out.path / "config.json"),
        advice="As LLaVA does, `try` takes a folder of that name, where it is run; or convert with "
        "--format hf, which holds the config.",
    )


def _loaded(kind: Any, source: Path | None, dtype: torch.dtype, **arguments: Any) -> Any:
    """A model of transformers. Raises `CheckpointError` for tensors it would make up at random."""
    model, found = kind.from_pretrained(
        # The config may name an attention on the Hub, which is code.
        source,
        torch_dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
        **arguments,
    )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{kind.__name__} lacks {missing[0]}{more}", advice=_VERIFY)
    return model


def _pixels(out: ConvertedFolder, picture: Any) -> torch.Tensor:
    """The picture as LLaVA's `process_images` prepares it."""
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(out.path, **_LOCAL)
    if out.config.get("image_aspect_ratio") == "pad":
        side = max(picture.size)
        colour = tuple(int(mean * _BACKGROUND) for mean in processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    pixels: torch.Tensor = processor(picture, return_tensors="pt")["pixel_values"]
    return pixels


def _streamer(tokenizer: Any, on_text: _OnText | None) -> Any:
    """What calls `on_text` with the answer, piece by piece."""
    if on_text is None:
        return None
    from transformers import TextStreamer

    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
    return streamer
