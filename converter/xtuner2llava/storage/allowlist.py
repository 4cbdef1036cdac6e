"""The globals that a checkpoint's pickle may name, each group with its reason.

Allowed means: read as data. None of them is imported or called, see `pickle_reader`. The list is
what XTuner 0.1.23 (mmengine 0.10.7, DeepSpeed 0.16.2) was seen to write, what its LLM trainings
on GPUs add, and what `torch.save` writes for plain tensors.
"""

from __future__ import annotations

# Storage classes and the dtype of their elements (torch/storage.py,
# `_get_dtype_from_pickle_storage_type`).
STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.storage.UntypedStorage": "uint8",
}

_TENSORS = {
    # How torch.save writes tensors and parameters, torch/_utils.py and torch/_tensor.py.
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.Size",
    "torch.device",
    *(f"torch.{name}" for name in "float64 float32 float16 bfloat16 int64 int32 int16".split()),
    *(f"torch.{name}" for name in "int8 uint8 bool uint16 uint32 uint64".split()),
    "torch.float8_e4m3fn",
    "torch.float8_e5m2",
}

_CONTAINERS = {
    "collections.OrderedDict",  # every state_dict
    "collections.defaultdict",  # optimizer state, made by one of the next two
    "builtins.dict",
    "builtins.list",
    "builtins.set",  # DeepSpeed model states
}

_RECORDS = {
    # mmengine's message hub: the history of the losses. Its statistics methods are pickled as
    # getattr(HistoryBuffer, name), which stays an unread record.
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "mmengine.config.config.ConfigDict",
    # The numbers inside that history.
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
    # DeepSpeed's bookkeeping beside the weights.
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}

ALLOWED = frozenset({*STORAGES, *_TENSORS, *_CONTAINERS, *_RECORDS})
