"""DeepSpeed directories of any stage and world size, laid out as DeepSpeed 0.16 does.

Only what is read of them: names after deepspeedai/DeepSpeed `deepspeed/checkpoint/constants.py`,
partitions after `runtime/zero/stage_1_and_2.py` and `runtime/zero/partition_parameters.py`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Params = Mapping[str, torch.Tensor]
# What stands in padding: a wrong cut shows.
GARBAGE = -7777.0


@dataclass
class ZeroRun:
    """A training state: float32 masters in groups, and what stands beside them."""

    groups: Sequence[Params]
    stage: int
    ranks: int
    frozen: Params = field(default_factory=dict)
    buffers: Params = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    step: int = 2
    config: str | None = None
    prefix: str = "bf16_"
    # Of ZeRO-3: at most this many elements of a rank in one flat group.
    sub_group: int = 10**9

    def save(self, folder: Path, only_ranks: Sequence[int] | None = None) -> Path:
        """Writes the files of all ranks, or of some; returns `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for rank in range(self.ranks) if only_ranks is None else only_ranks:
            optimizer = f"{self.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save(self._optimizer_states(rank), folder / optimizer)
            if self.stage == 3:
                name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
                torch.save(self._model_states(rank), folder / name)
            elif rank == 0:
                torch.save(self._model_states(0), folder / "mp_rank_00_model_states.pt")
        return folder

    @property
    def dense(self) -> dict[str, torch.Tensor]:
        """The answer: every tensor by name."""
        found = {**self.buffers, **self.frozen}
        for group in self.groups:
            found |= group
        return found | {name: found[original] for name, original in self.shared.items()}

    def _model_states(self, rank: int) -> dict[str, Any]:
        trained = {name: p for group in self.groups for name, p in group.items()}
        if self.stage == 3:
            module = {name: torch.empty(0, dtype=torch.bfloat16) for name in trained}
            frozen = {n: self._part(p, rank) for n, p in self.frozen.items()}
        else:
            # One storage for all of it.
            flat = torch.cat([p.flatten() for p in trained.values()]).bfloat16()
            sizes = [p.numel() for p in trained.values()]
            parts = zip(trained.items(), flat.split(sizes), strict=True)
            module = {name: part.view(p.shape) for (name, p), part in parts}
            frozen = dict(self.frozen)
        meta = {"iter": self.step} | ({} if self.config is None else {"cfg": self.config})
        return {
            "module": OrderedDict(module | dict(self.buffers)),
            "buffer_names": list(self.buffers),
            "param_shapes": [
                OrderedDict((n, torch.Size(p.shape)) for n, p in group.items())
                for group in self.groups
            ],
            "frozen_param_shapes": {n: p.shape for n, p in self.frozen.items()} or None,
            "frozen_param_fragments": frozen or None,
            "shared_params": dict(self.shared),
            "global_steps": self.step,
            "ds_version": "0.16.2",
            "meta": meta,
        }

    def _optimizer_states(self, rank: int) -> dict[str, Any]:
        state = {0: {"step": torch.tensor(float(self.step)), "exp_avg": torch.zeros(3)}}
        found: dict[str, Any] = {
            "zero_stage": self.stage,
            "partition_count": self.ranks if self.stage == 3 else [self.ranks] * len(self.groups),
        }
        if self.stage == 3:
            found["fp32_flat_groups"] = self._flat_groups(rank)
            found["optimizer_state_dict"] = {"state": state, "param_groups": []}
        else:
            found["single_partition_of_fp32_groups"] = [
                self._partition(group, rank) for group in self.groups
            ]
            found["base_optimizer_state"] = {"state": state, "param_groups": []}
        return {"optimizer_state_dict": found, "ds_version": "0.16.2"}

    def _partition(self, group: Params, rank: int) -> torch.Tensor:
        flat = torch.cat([p.flatten() for p in group.values()])
        # Padded to a multiple of 2 x ranks, each partition 4-byte aligned for NCCL.
        padding = -len(flat) % (2 * self.ranks)
        flat = torch.cat([flat, torch.full((padding,), GARBAGE)])
        return flat.chunk(self.ranks)[rank].clone() if len(flat) else flat

    def _part(self, param: torch.Tensor, rank: int) -> torch.Tensor:
        size = math.ceil(param.numel() / self.ranks)
        padding = size * self.ranks - param.numel()
        flat = torch.cat([param.flatten(), torch.full((padding,), GARBAGE, dtype=param.dtype)])
        return flat[rank * size : (rank + 1) * size].clone()

    def _flat_groups(self, rank: int) -> list[torch.Tensor]:
        """Whole parts, in order, in flat groups that are closed when they are full."""
        groups: list[list[torch.Tensor]] = []
        for group in self.groups:
            elements = self.sub_group
            for param in group.values():
                part = self._part(param, rank)
                if elements >= self.sub_group:
                    groups.append([])
                    elements = 0
                groups[-1].append(part)
                elements += len(part)
        return [torch.cat(parts) for parts in groups]
