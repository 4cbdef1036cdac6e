"""Lazy tensors: what they are, and the operations on them."""

from xtuner2llava.tensors import thread_cache
from xtuner2llava.tensors.computed import Columns, Fill, Normalize, Transpose, cast
from xtuner2llava.tensors.dtype import BFLOAT16, BY_CODE, BY_NAME, FLOAT16, FLOAT32, FLOAT64, DType
from xtuner2llava.tensors.files import FileRange, SourceFile, ZipMember
from xtuner2llava.tensors.lazy import LazyTensor, Shape, row_blocks
from xtuner2llava.tensors.lora import Merge, Reshaped
from xtuner2llava.tensors.mean import Mean
from xtuner2llava.tensors.rounding import first_overflow, round_into
from xtuner2llava.tensors.rows import Piece, Rows, concat, deinterleave, split, unstack
from xtuner2llava.tensors.stored import Stored, view_of_storage

__all__ = [
    "BFLOAT16",
    "BY_CODE",
    "BY_NAME",
    "FLOAT16",
    "FLOAT32",
    "FLOAT64",
    "Columns",
    "DType",
    "FileRange",
    "Fill",
    "LazyTensor",
    "Mean",
    "Merge",
    "Normalize",
    "Piece",
    "Reshaped",
    "Rows",
    "Shape",
    "SourceFile",
    "Stored",
    "Transpose",
    "ZipMember",
    "cast",
    "concat",
    "deinterleave",
    "first_overflow",
    "round_into",
    "row_blocks",
    "split",
    "thread_cache",
    "unstack",
    "view_of_storage",
]
