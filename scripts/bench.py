"""Times `xtuner2llava convert` against `cp`, and against loading everything with torch.

    python scripts/bench.py --size 2GB [--stored float32] [--dtype keep] [--runs 3] [--json]
    python scripts/bench.py --size 6GB --layout zero3 [--ranks 8]
    python scripts/bench.py --size 4GB --layout lora --stored float16 [--rank 512]

It makes a Llama-shaped checkpoint of that size, with a small CLIP tower: `iter_1.pth` as mmengine
writes it, a DeepSpeed ZeRO-3 directory, or LoRA on every linear layer of a base LLM of that size,
which is timed against the bare float32 matrix products too.
Each run takes the contenders in turn; each writes the same bytes, starts from a warm page cache
after `sync`, and ends with its output flushed. `convert` is the command line in a fresh process, so
that starting Python counts. Memory is the largest resident set of the process, CPU its user and
system time. Needs about three times the size of free disk, in DIR, and leaves nothing there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_model import ITEMSIZE, make_input

UNITS = {"MB": 10**6, "GB": 10**9}
CP, CONVERT, NO_VERIFY = "cp and sync", "convert", "convert --no-verify"
NAIVE_NAME, PRODUCTS_NAME = "torch.load, save_file", "float32 products"
CONTENDERS = {
    "file": (CP, CONVERT, NO_VERIFY, NAIVE_NAME),
    "zero3": (CP, CONVERT, NO_VERIFY),
    "lora": (CP, CONVERT, NO_VERIFY, PRODUCTS_NAME),
}
NAMES = tuple(dict.fromkeys(name for names in CONTENDERS.values() for name in names))

NAIVE = """
import json, os, sys, torch
from pathlib import Path
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

work, out, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
out.mkdir()
state = torch.load(work / "iter_1.pth", map_location="cpu")["state_dict"]
tensors = {}
for name, tensor in load_file(work / "vision/model.safetensors").items():
    tensors["model.vision_tower.vision_tower." + name] = tensor
for name, tensor in state.items():
    name = name.replace("projector.model.", "model.mm_projector.").removeprefix("llm.")
    tensors[name] = tensor
if dtype != "keep":
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
split = split_torch_state_dict_into_shards(tensors, max_shard_size="5GB")
for filename, names in split.filename_to_tensors.items():
    save_file({name: tensors[name] for name in names}, out / filename, metadata={"format": "pt"})
os.sync()
"""

# What a merge cannot do without: one product of float32 matrices for each adapted weight, in blocks
# of rows, added to a block that is there. It reads nothing but the shapes, and writes nothing.
PRODUCTS = """
import json, struct, sys, time, torch
from pathlib import Path

work, rank = Path(sys.argv[1]), int(sys.argv[2])
with (work / "llm/model.safetensors").open("rb") as file:
    header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
shapes = [e["shape"] for name, e in header.items() if "_proj" in name]
block = {shape[1]: torch.randn(max(1, (16 << 20) // (4 * shape[1])), shape[1]) for shape in shapes}
right = {columns: torch.randn(rank, columns) for columns in block}
left = torch.randn(max(b.shape[0] for b in block.values()), rank)
start = time.perf_counter()
for rows, columns in shapes:
    for done in range(0, rows, block[columns].shape[0]):
        count = min(block[columns].shape[0], rows - done)
        block[columns][:count].addmm_(left[:count], right[columns], alpha=1e-3)
seconds = time.perf_counter() - start
flops = sum(2 * rows * columns * rank for rows, columns in shapes)
(work / "llava-bench").mkdir()
(work / "llava-bench/products.json").write_text(json.dumps({"seconds": seconds, "flops": flops}))
"""


@dataclass(frozen=True)
class Measured:
    """One contender: medians over the runs, in seconds and bytes."""

    name: str
    seconds: float
    best_seconds: float
    cpu_seconds: float
    peak_bytes: int
    bytes_per_second: float
    times_cp: float


def main() -> None:
    options = parse()
    work = Path(tempfile.mkdtemp(prefix="xtuner2llava-bench-", dir=options.work))
    try:
        talk(f"Making a checkpoint of about {options.size:,} bytes in {work}")
        make_input(work, options.size, options.stored, options.layout, options.ranks, options.rank)
        runs = measure(work, options)
        written = sum(path.stat().st_size for path in (work / "reference").iterdir())
        result = {
            "layout": options.layout,
            "checkpoint_bytes": sum(path.stat().st_size for path in files(work / "iter_1.pth")),
            "output_bytes": written,
            "stored": options.stored,
            "dtype": options.dtype,
            "runs": options.runs,
            "cores": len(os.sched_getaffinity(0)),
            "contenders": [asdict(measured) for measured in summarise(runs, written)],
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{written / 1e9:.2f} GB written, {options.runs} runs, medians (best)")
    print(f"{'':24}{'seconds':>16}{'MB/s':>8}{'x cp':>7}{'CPU s':>8}{'peak MB':>9}")
    for m in summarise(runs, written):
        print(
            f"{m.name:24}{m.seconds:8.2f} ({m.best_seconds:5.2f}){m.bytes_per_second / 1e6:8.0f}"
            f"{m.times_cp:7.2f}{m.cpu_seconds:8.2f}{m.peak_bytes / 1e6:9.0f}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=size, default="2GB", help="of the checkpoint, e.g. 2GB")
    parser.add_argument("--stored", choices=ITEMSIZE, default="float32", help="the input's dtype")
    parser.add_argument("--dtype", choices=("keep", *ITEMSIZE), default="keep", help="the output's")
    parser.add_argument("--layout", choices=CONTENDERS, default="file")
    parser.add_argument("--ranks", type=int, default=8, help="of ZeRO-3")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=NAMES, metavar="NAME",
                        help=f"of {', '.join(NAMES)}")  # fmt: skip
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", type=Path, help="where to put the files; default: temporary")
    return parser.parse_args()


def size(text: str) -> int:
    if text[-2:].upper() not in UNITS:
        raise argparse.ArgumentTypeError("expected a size such as 500MB or 2GB")
    return int(float(text[:-2]) * UNITS[text[-2:].upper()])


def talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(work: Path, options: argparse.Namespace) -> dict[str, list[tuple[float, float, int]]]:
    """(seconds, CPU seconds, peak bytes) of each contender in each run."""
    out, reference = work / "llava-bench", work / "reference"
    convert = [sys.executable, "-m", "xtuner2llava", "convert", work / "iter_1.pth", out,
               "--llm", work / "llm", "--vision", work / "vision", "--dtype", options.dtype,
               "--vision-tower-name", "openai/clip-vit-large-patch14-336", "-q"]  # fmt: skip
    commands = {
        CP: ["sh", "-c", 'cp -r "$0" "$1" && sync', reference, out],
        CONVERT: convert,
        NO_VERIFY: [*convert, "--no-verify"],
        NAIVE_NAME: [sys.executable, "-c", NAIVE, work, out, options.dtype],
        PRODUCTS_NAME: [sys.executable, "-c", PRODUCTS, work, options.rank],
    }
    # Makes what cp copies, and warms the cache.
    subprocess.run(list(map(str, convert)), check=True, stdout=subprocess.DEVNULL)
    out.rename(reference)
    names = options.contenders or CONTENDERS[options.layout]
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    inputs = [*files(work / "iter_1.pth"), *files(work / "llm"), *files(reference)]
    for run in range(options.runs):
        for name in names:
            for path in inputs:
                read(path)
            os.sync()
            seconds, cpu, peak = timed([str(word) for word in commands[name]])
            if name == PRODUCTS_NAME:
                # Only the products count, not the start of torch.
                seconds = json.loads((out / "products.json").read_text())["seconds"]
            found[name].append((seconds, cpu, peak))
            if name == NAIVE_NAME and run == 0:
                check_same(out, reference)
            shutil.rmtree(out)
            talk(f"run {run + 1}: {name}: {seconds:.2f} s")
    return found


def files(path: Path) -> list[Path]:
    """`path` itself, or the files in that folder."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def check_same(out: Path, reference: Path) -> None:
    """The contenders did the same work: the headers of their shards tell the same tensors."""
    for path in sorted(out.glob("*.safetensors")):
        with path.open("rb") as ours, (reference / path.name).open("rb") as theirs:
            length = ours.read(8)
            same = theirs.read(8) == length
            if not same or ours.read(1 << 20) != theirs.read(1 << 20):
                talk(f"Warning: {path.name} of torch.load, save_file begins differently")


def read(path: Path) -> None:
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def timed(command: list[str]) -> tuple[float, float, int]:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def summarise(runs: dict[str, list[tuple[float, float, int]]], written: int) -> list[Measured]:
    medians = {name: statistics.median(run[0] for run in values) for name, values in runs.items()}
    base = medians.get(NAMES[0], float("nan"))
    return [
        Measured(
            name,
            medians[name],
            min(run[0] for run in values),
            statistics.median(run[1] for run in values),
            max(run[2] for run in values),
            written / medians[name],
            medians[name] / base,
        )
        for name, values in runs.items()
    ]


if __name__ == "__main__":
    main()
