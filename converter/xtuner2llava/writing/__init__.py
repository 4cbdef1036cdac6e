"""Writing safetensors shards and the output folder. It knows tensors, and neither XTuner nor LLaVA.

The order of use: `plan_shards`, `OutputFolder`, `write_shards` (which verifies), small files,
`OutputFolder.publish`.
"""

from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.jobs import OnProgress
from xtuner2llava.writing.nonfinite import NonFinite
from xtuner2llava.writing.shards import (
    INDEX_NAME,
    Entry,
    Shard,
    ShardPlan,
    plan_shards,
)
from xtuner2llava.writing.writer import Deliver, Written, WrittenShard, computing_jobs, write_shards

__all__ = [
    "INDEX_NAME",
    "Deliver",
    "Entry",
    "NonFinite",
    "OnProgress",
    "OutputFolder",
    "Shard",
    "ShardPlan",
    "Written",
    "WrittenShard",
    "computing_jobs",
    "plan_shards",
    "write_shards",
]
