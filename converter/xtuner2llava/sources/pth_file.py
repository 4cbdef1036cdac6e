"""`iter_N.pth` as one file, written by mmengine's CheckpointHook.

Top level: `meta` (with the resolved config as text under `cfg`), `state_dict`, `message_hub` and
more (open-mmlab/mmengine `mmengine/runner/runner.py`, `save_checkpoint`).
"""

from __future__ import annotations

from pathlib import Path

from xtuner2llava.errors import UnsupportedError
from xtuner2llava.sources.artifact import Artifact, artifact_of_state
from xtuner2llava.storage.pickle_reader import TensorReference, Value
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.storage.weights import tensor_references

# What mmengine's `save_checkpoint` writes; the tensors of an optimizer are not weights.
_TOP_LEVEL = ("meta", "state_dict", "message_hub", "optimizer", "param_schedulers")


def open_pth_file(path: Path) -> Artifact:
    """The `.pth` file `path`; no tensor is read.

    Raises `CheckpointError` and says what the file is where it is not a LLaVA checkpoint of XTuner.
    """
    opened = TorchFile(path)
    top = opened.value if isinstance(opened.value, dict) else {}
    if "optimizer_state_dict" in top and "state_dict" not in top:
        raise UnsupportedError(
            "one rank's optimizer states of a DeepSpeed checkpoint",
            where=str(path),
            advice="Give the directory that it lies in.",
        )
    state_dict = top.get("state_dict", opened.value)
    # mmengine's EMAHook saves `ema_state_dict`.
    unread = [
        repr(key)
        for key, entry in top.items()
        if "state_dict" in top and key not in _TOP_LEVEL and _has_tensors(entry)
    ]
    note = (
        f"{path.name} also holds tensors under {', '.join(unread)}, which are not read: XTuner "
        "loads 'state_dict'."
    )
    return artifact_of_state(
        opened.tensors(tensor_references(state_dict, str(path))),
        path,
        "iter .pth file",
        (opened.fingerprint,),
        meta=top.get("meta"),
        meta_file=path,
        notes=(note,) if unread else (),
    )


def _has_tensors(value: Value) -> bool:
    inner = value.values() if isinstance(value, dict) else (value,)
    return any(isinstance(entry, TensorReference) for entry in inner)
