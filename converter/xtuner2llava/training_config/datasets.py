"""How the training fed the model: images, prompts, tokenizer. It decides no tensor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

from xtuner2llava.errors import ConversionError
from xtuner2llava.training_config.values import (
    Section,
    Table,
    Unknown,
    Value,
    dotted,
    is_scalar,
    shown,
)

_T = TypeVar("_T")
_PATH = "pretrained_model_name_or_path"
_IMAGE_KEYS = frozenset({"image_folder", "image_processor", "pad_image_to_square"})
# Arguments of a tokenizer's `from_pretrained` that say where to look, how much to hold, or what
# XTuner does by itself (xtuner/dataset/utils.py): the ids of a text are the same with any value.
WITHOUT_IDS = frozenset(
    "trust_remote_code padding_side truncation_side model_max_length use_fast cache_dir mirror "
    "local_files_only force_download resume_download proxies token use_auth_token verbose".split()
)
_MAX_LENGTH = 2048  # default of LLaVADataset, xtuner/dataset/llava.py
_DATASETS_LIMIT = 1000
_STOP_WORDS_LIMIT = 100
# Of InternLM/xtuner `xtuner/dataset`: they put an image and a question into one form.
_PROMPT_MAKERS = {
    "type": ("LLaVADataset", "RefCOCOJsonDataset", "InvRefCOCOJsonDataset"),
    "dataset_map_fn": ("llava_map_fn",),
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The EvaluateChatHook: its own prompt template, and the bos token of its tokenizer.

    It generates with the id of that, over what `generation_kwargs` say. A template that is written
    out has no name: "". Its stop words are those of `TrainingData.stop_words` and of its template
    (xtuner/engine/hooks/evaluate_chat_hook.py).
    """

    prompt_template: str | None
    bos_token: str | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the config loads with `from_pretrained` beside a model, such as an image processor.

    `type` is the class without its module. `arguments` are all further ones; they override what
    the folder at `path` says, and each may be `Unknown`. Of nothing, all are empty.
    """

    type: str | None = None
    path: str | None = None
    arguments: Mapping[str, Value] = field(default_factory=dict)

    @property
    def is_slow(self) -> bool:
        """Whether it is a tokenizer that leaves tokenizer.json aside."""
        kind = self.type or ""
        named = kind.endswith("Tokenizer") and kind not in ("AutoTokenizer", "PreTrainedTokenizer")
        return named or self.arguments.get("use_fast") is False


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """What the datasets, the tokenizer and the EvaluateChatHook say.

    What cannot be read is None here and a sentence in `notes`: no conversion fails for it. The
    defaults are what holds of a training of which no config is known.

    image_aspect_ratio: `pad` where a dataset has `pad_image_to_square`; LLaVADataset's default is
        False.
    prompt_template: the name in XTuner's PROMPT_TEMPLATE (`qwen_chat`), or a template written out.
    other_tokenizers: where in the config a tokenizer stands that gives other ids than `tokenizer`.
    bos_token: given to the tokenizer by the config: the advice of XTuner #292 for Qwen.
    stop_words: `stop_words` and `stop_word` of the EvaluateChatHook, without the template's own.
    evaluation: the EvaluateChatHook, if there is one.
    used: the values that were read by their dotted names, for a report.
    data_files: `data_path` of each dataset with images, where it can be read.
    """

    image_aspect_ratio: str | None = "pad"  # as XTuner's own export assumes
    prompt_template: str | Table | None = None
    image_processor: Loaded = Loaded()
    tokenizer: Loaded = Loaded()
    other_tokenizers: tuple[str, ...] = ()
    bos_token: str | None = None
    eos_token: str | None = None
    stop_words: tuple[str, ...] = ()
    evaluation: Evaluation | None = None
    notes: tuple[str, ...] = ()
    used: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    data_files: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Section) -> TrainingData:
        return _Reader(config).data()


class _Reader:
    """Reads the config's sections, and collects notes and the values that were used."""

    def __init__(self, config: Section) -> None:
        self._config = config
        self._notes: list[str] = []
        self._used: dict[str, str | int | float | bool] = {}

    def data(self) -> TrainingData:
        datasets, hook = list(self._datasets()), self._hook()
        places = [*datasets, self._config]
        tokenizers, processors = (
            [found for place in places if (found := place.known(key))]
            for key in ("tokenizer", "image_processor")
        )
        tokenizer, processor = (next(iter(found), None) for found in (tokenizers, processors))
        aspect_ratio = self._aspect_ratio(datasets)
        self._note_other_prompts(datasets)
        read = partial(Section.positive, default=_MAX_LENGTH)
        lengths = {self._read(one, "max_length", read) for one in datasets} - {None}
        if len(lengths) > 1:
            self._notes.append(
                f"datasets differ in max_length: {sorted(filter(None, lengths))[:8]}"
            )
        return TrainingData(
            image_aspect_ratio=aspect_ratio,
            prompt_template=self._prompt_template(datasets, hook),
            image_processor=self._loaded(processor),
            tokenizer=self._loaded(tokenizer),
            other_tokenizers=tuple(
                other.path
                for other in tokenizers[1:]
                if _tokenizes(other.table) != _tokenizes(tokenizers[0].table)
            ),
            bos_token=self._read(tokenizer, "bos_token", Section.text),
            eos_token=self._read(tokenizer, "eos_token", Section.text),
            stop_words=self._stop_words(hook),
            evaluation=self._evaluation(hook),
            notes=tuple(dict.fromkeys(self._notes)),
            used=self._used,
            data_files=tuple(
                path for one in datasets if isinstance(path := one.table.get("data_path"), str)
            ),
        )

    def _read(
        self,
        section: Section | None,
        key: str,
        read: Callable[[Section, str], _T],
        *,
        use: bool = True,
    ) -> _T | None:
        """What `section` says under `key`; None where it does not, or cannot be read."""
        if section is None:
            return None
        try:
            value = read(section, key)
        except ConversionError as error:
            fault = error.faults[0]
            self._notes.append(f"{fault.where}: {fault.what}")
            return None
        if use and isinstance(value, (str, int, float)):
            self._used[section.name(key)] = value
        return value

    def _items(self, section: Section, key: str) -> Iterator[tuple[str, Value]]:
        """The names and values of a list."""
        items = self._read(section, key, Section.value, use=False)
        for index, item in enumerate(items if isinstance(items, (list, tuple)) else ()):
            yield f"{section.name(key)}[{index}]", item

    def _loaded(self, section: Section | None) -> Loaded:
        if section is None:
            return Loaded()
        name = dotted(section.table.get("type"))
        return Loaded(
            name.removesuffix(".from_pretrained").rpartition(".")[2] if name else None,
            self._read(section, _PATH, Section.text),
            {
                str(key): value
                for key, value in section.table.items()
                if key not in ("type", _PATH, "trust_remote_code")
            },
        )

    def _datasets(self) -> Iterator[Section]:
        """The datasets with images below `train_dataloader.dataset`, each once."""
        loader = self._read(self._config, "train_dataloader", Section.section)
        root = self._read(loader, "dataset", Section.section)
        todo, seen = deque([root] if root else []), set[int]()
        while todo and len(seen) < _DATASETS_LIMIT:
            section = todo.popleft()
            if id(section.table) in seen:
                continue
            seen.add(id(section.table))
            if "datasets" in section.table:
                for name, part in islice(self._items(section, "datasets"), _DATASETS_LIMIT):
                    if isinstance(part, Table):
                        todo.append(Section(part, name, section.where))
                    elif isinstance(part, Unknown):
                        self._notes.append(f"{section.where}:{part.line}: {name} was not read")
            elif inner := section.known("dataset"):
                todo.append(inner)
            elif _IMAGE_KEYS & section.table.keys():
                yield section

    def _hook(self) -> Section | None:
        for name, hook in self._items(self._config, "custom_hooks"):
            if isinstance(hook, Table):
                kind = dotted(hook.get("type")) or ""
                if kind.rpartition(".")[2] == "EvaluateChatHook":
                    return Section(hook, name, self._config.where)
        return None

    def _aspect_ratio(self, datasets: list[Section]) -> str | None:
        padded = {self._read(one, "pad_image_to_square", Section.flag) for one in datasets}
        if True not in padded and (None in padded or not datasets):
            self._notes.append(
                "Nothing known says whether training padded images to squares: `pad` is written, "
                "as XTuner's own export does. Give --xtuner-config with a config that says it."
            )
            return "pad"
        if {True, False} <= padded:
            self._notes.append(
                "some datasets pad images to squares (pad_image_to_square) and some do not; "
                "`pad` is what XTuner's own chat and evaluation do"
            )
        return "pad" if True in padded else None

    def _note_other_prompts(self, datasets: list[Section]) -> None:
        """Notes functions and classes that make prompts in a way that is not known."""
        for dataset in datasets:
            for key, known in _PROMPT_MAKERS.items():
                value = dataset.table.get(key)
                name = (dotted(value) or shown(value)).rpartition(".")[2]
                if value is not None and name not in known:
                    self._notes.append(
                        f"{dataset.name(key)} is {name[:80]}: prompts are written as XTuner's "
                        "LLaVADataset makes them with llava_map_fn, the image first, then a line "
                        "feed and the question. Training may have had others."
                    )

    def _prompt_template(self, datasets: list[Section], hook: Section | None) -> str | Table | None:
        maps = filter(None, (dataset.known("template_map_fn") for dataset in datasets))
        places = [(section, "template") for section in maps]
        places += [(place, "prompt_template") for place in (self._config, hook) if place]
        found: dict[object, str | Table] = {}
        for section, key in places:
            value = self._read(section, key, Section.value, use=False)
            template = _template(value)
            if template is not None and _identity(template) not in found:
                found[_identity(template)] = template
                self._used[section.name(key)] = (
                    template if isinstance(template, str) else shown(value)
                )
            elif template is None and value is not None:
                self._notes.append(
                    f"{section.name(key)} is {shown(value)}, which is not a prompt template"
                )
        if len(found) > 1:
            names = ", ".join(shown(template) for template in list(found.values())[:8])
            self._notes.append(f"there are several prompt templates: {names}; the first counts")
        return next(iter(found.values()), None)

    def _stop_words(self, hook: Section | None) -> tuple[str, ...]:
        if hook is None:
            return ()
        # Reported only: training itself had no system text (llava_map_fn.py).
        system = self._read(hook, "system", Section.value, use=False)
        if text := system if isinstance(system, str) else dotted(system):
            self._used[hook.name("system")] = shown(text)
        words = list(self._read(hook, "stop_words", Section.texts) or ())
        if words:
            self._used[hook.name("stop_words")] = ", ".join(words)[:200]
        word = self._read(hook, "stop_word", Section.value, use=False)  # deprecated for stop_words
        if isinstance(word, str):
            self._used[hook.name("stop_word")] = word[:200]
            words.append(word)
        return tuple(dict.fromkeys(words))

    def _evaluation(self, hook: Section | None) -> Evaluation | None:
        if hook is None:
            return None
        template = _template(self._read(hook, "prompt_template", Section.value, use=False))
        tokenizer = self._read(hook, "tokenizer", Section.section)
        bos = self._read(tokenizer, "bos_token", Section.text, use=False)
        return Evaluation("" if isinstance(template, Table) else template, bos)


def _template(value: Value) -> str | Table | None:
    """`qwen_chat` for `xtuner.utils.PROMPT_TEMPLATE.qwen_chat`; an inline dict as it is."""
    if isinstance(value, Table):
        return value
    name = dotted(value)
    return name.rpartition(".")[2] if name else None


def _tokenizes(table: Table) -> dict[str, str]:
    """What decides ids, in a form that can be compared."""
    return {
        str(key): repr(value) if is_scalar(value) else shown(value)
        for key, value in table.items()
        if key not in ("type", *WITHOUT_IDS) and value is not None
    }


def _identity(template: str | Table) -> object:
    """Equal for equal templates; never walks into nested values, which may be shared at will."""
    if isinstance(template, str):
        return template
    parts = []
    for key, value in template.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        flat = len(items) <= _STOP_WORDS_LIMIT and all(map(is_scalar, items))
        parts.append((str(key), tuple(items) if flat else id(value)))
    return tuple(sorted(parts, key=lambda part: part[0]))
