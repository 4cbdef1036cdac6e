"""Times `xtuner2llava convert` against `cp`, `dd`, bare loops, and loading everything with torch.

    python scripts/bench.py --size 2GB [--stored float32] [--dtype keep] [--runs 5]
    python scripts/bench.py --size 6GB --layout zero3 [--ranks 8]
    python scripts/bench.py --size 4GB --layout lora --stored float16 [--rank 512]
    ... [--contenders cp loop convert ...] [--json | --markdown]

It makes a Llama-shaped checkpoint of that size, with a small CLIP tower: `iter_1.pth` as mmengine
writes it, a DeepSpeed ZeRO-3 directory, or LoRA on every linear layer of a base LLM of that size,
which is timed against the bare matrix products and, if `--peft-python` is a Python that has it,
PEFT's merge.
Each run takes the contenders in turn, so that what else the machine does falls on all of them; the
first is not counted. Each starts from a warm page cache after `sync`, and those that write end with
their output flushed. Ratios are to the baseline of the same run: median, lowest and highest.
`convert` is the command line in a fresh process, so that starting Python counts. Two parts of it
are contenders too: BLAKE3 of the output, and the system calls of a copy with its checks and nothing
else.
Memory is the largest resident set of the process, CPU its user and system time; read and written
are its `rchar` and `wchar` of /proc/self/io for each byte of the output. Needs about three times
the size of free disk, in DIR, and leaves nothing there. docs/performance.md has the commands that
made its tables.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench_model import ITEMSIZE, make_input

UNITS = {"MB": 10**6, "GB": 10**9}
CONTENDERS = {
    "cp": "cp and sync",
    "dd": "dd: read all, write all",
    "blake3": "BLAKE3 of the output",
    "loop": "system calls and checks, bare",
    "convert": "convert",
    "no-verify": "convert --no-verify",
    "torch": "torch.load, save_file",
    "products32": "float32 products",
    "products64": "float64 products",
    "peft": "PEFT merge, save_pretrained",
}
BY_LAYOUT = {
    "file": ("cp", "dd", "blake3", "loop", "convert", "no-verify", "torch"),
    "zero3": ("cp", "dd", "blake3", "loop", "convert", "no-verify"),
    "lora": ("cp", "blake3", "convert", "no-verify", "products32", "products64", "peft"),
}

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

# As many files at a time as there are cores, as `convert` does.
BLAKE3 = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from blake3 import blake3

def digest(path):
    found, view = blake3(), memoryview(bytearray(1 << 19))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            found.update(view[:count])

shards = sorted(Path(sys.argv[1]).glob("*.safetensors"))
list(ThreadPoolExecutor(len(os.sched_getaffinity(0))).map(digest, shards))
"""

# What a copy cannot do without: it is copied in the kernel, read back, looked at, and flushed.
LOOP = """
import os, sys, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from blake3 import blake3

def check(file, start, stop, digest, crc, view):
    for place in range(start, stop, len(view)):
        part = view[: stop - place]
        os.preadv(file, [part], place)
        digest.update(part)
        crc[0] = zlib.crc32(part, crc[0])
        bits = np.frombuffer(part[: len(part) // 4 * 4], "<u4")
        bits.max(), bits.view("<i4").max()

def copy(path, out):
    source, size = os.open(path, os.O_RDONLY), path.stat().st_size
    file = os.open(out, os.O_RDWR | os.O_CREAT)
    digest, crc, view = blake3(), [0], memoryview(bytearray(1 << 19))
    with ThreadPoolExecutor(1) as checker, ThreadPoolExecutor(1) as flusher:
        checked = flushed = None
        for start in range(0, size, 8 << 20):
            done, stop = start, min(start + (8 << 20), size)
            while done < stop:
                done += os.copy_file_range(source, file, stop - done, done, done)
            checked and checked.result()
            checked = checker.submit(check, file, start, stop, digest, crc, view)
            if start % (256 << 20) == 0 and start:
                flushed = flusher.submit(os.fsync, file)
    checked.result()
    os.fsync(file)

work, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as files:
    shards = sorted(work.glob("*.safetensors"))
    list(files.map(lambda path: copy(path, out / path.name), shards))
"""

PEFT = """
import os, sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

work, rank = Path(sys.argv[1]), int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(work / "llm", dtype="auto")
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
state = torch.load(work / "iter_1.pth", map_location="cpu")["state_dict"]
state = {name.removeprefix("llm."): value for name, value in state.items() if "lora" in name}
missing, unexpected = model.load_state_dict(state, strict=False)
assert not unexpected and not any("lora" in name for name in missing)
model.merge_and_unload().save_pretrained(work / "llava-bench")
os.sync()
"""

# What a merge cannot do without: one product of matrices for each adapted weight, in blocks
# of rows, added to a block that is there. It reads nothing but the shapes, and writes nothing.
PRODUCTS = """
import json, struct, sys, time, torch
from pathlib import Path

work, rank, dtype = Path(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
with (work / "llm/model.safetensors").open("rb") as file:
    header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
shapes = [e["shape"] for name, e in header.items() if "_proj" in name]
rows = lambda columns: max(1, (16 << 20) // (4 * columns))
block = {shape[1]: torch.randn(rows(shape[1]), shape[1], dtype=dtype) for shape in shapes}
right = {columns: torch.randn(rank, columns, dtype=dtype) for columns in block}
left = torch.randn(max(b.shape[0] for b in block.values()), rank, dtype=dtype)
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
class Run:
    """One run of a contender, in seconds and bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Measured:
    """One contender: medians over the runs, in seconds and bytes.

    `ratio` is the median of the ratios to the baseline of the same run, of `ratios` the lowest and
    highest; `cpu_ratio` is that of CPU seconds. `read` and `written` are bytes for each byte of the
    output.
    """

    name: str
    seconds: float
    best_seconds: float
    cpu_seconds: float
    peak_bytes: int
    bytes_per_second: float
    ratio: float
    ratios: tuple[float, float]
    cpu_ratio: float
    read: float
    written: float


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
            "processor": processor(),
            "baseline": baseline(runs),
            "contenders": [asdict(measured) for measured in summarise(runs, written)],
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    measured = summarise(runs, written)
    times = "x " + baseline(runs)
    if options.markdown:
        print(f"| {written / 1e9:.1f} GB, {options.runs} runs | seconds | {times} | CPU s | read "
              "| written | peak memory |\n|---|---|---|---|---|---|---|")  # fmt: skip
    else:
        print(f"{written / 1e9:.2f} GB written, {options.runs} runs, medians (best)")
        print(f"{'':31}{'seconds':>16}{'MB/s':>8}{times:>13}{'(range)':>13}"
              f"{'CPU s':>8}{'x CPU':>7}{'peak MB':>9}{'read':>7}{'written':>9}")  # fmt: skip
    for m in measured:
        low, high = m.ratios
        if options.markdown:
            print(f"| {m.name} | {m.seconds:.1f} | {m.ratio:.2f} ({low:.2f} to {high:.2f}) | "
                  f"{m.cpu_seconds:.1f} | {m.read:.2f} | {m.written:.2f} | "
                  f"{m.peak_bytes / 1e6:.0f} MB |")  # fmt: skip
        else:
            print(f"{m.name:31}{m.seconds:8.2f} ({m.best_seconds:5.2f})"
                  f"{m.bytes_per_second / 1e6:8.0f}{m.ratio:13.2f}"
                  f"{f'({low:.2f}-{high:.2f})':>13}{m.cpu_seconds:8.2f}{m.cpu_ratio:7.2f}"
                  f"{m.peak_bytes / 1e6:9.0f}{m.read:7.2f}{m.written:9.2f}")  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=size, default="2GB", help="of the checkpoint, e.g. 2GB")
    parser.add_argument("--stored", choices=ITEMSIZE, default="float32", help="the input's dtype")
    parser.add_argument("--dtype", choices=("keep", *ITEMSIZE), default="keep", help="the output's")
    parser.add_argument("--layout", choices=BY_LAYOUT, default="file")
    parser.add_argument("--ranks", type=int, default=8, help="of ZeRO-3")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME",
                        help=f"of {', '.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--peft-python", metavar="PATH", help="a Python that has peft")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="a table as in README.md")
    parser.add_argument("--work", type=Path, help="where to put the files; default: temporary")
    return parser.parse_args()


def size(text: str) -> int:
    if text[-2:].upper() not in UNITS:
        raise argparse.ArgumentTypeError("expected a size such as 500MB or 2GB")
    return int(float(text[:-2]) * UNITS[text[-2:].upper()])


def talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(work: Path, options: argparse.Namespace) -> dict[str, list[Run]]:
    """The runs of each contender."""
    out, reference, checkpoint = work / "llava-bench", work / "reference", work / "iter_1.pth"
    convert = [sys.executable, "-m", "xtuner2llava", "convert", checkpoint, out,
               "--llm", work / "llm", "--vision", work / "vision", "--dtype", options.dtype,
               "--vision-tower-name", "openai/clip-vit-large-patch14-336", "-q"]  # fmt: skip
    # Makes what cp copies, and warms the cache.
    subprocess.run(list(map(str, convert)), check=True, stdout=subprocess.DEVNULL)
    out.rename(reference)
    inputs = [*files(checkpoint), *files(work / "llm"), *files(work / "vision")]
    outputs = files(reference)
    written = sum(path.stat().st_size for path in outputs)
    products = [sys.executable, "-c", PRODUCTS, work, options.rank]
    commands = {
        "cp": ["sh", "-c", 'cp -r "$0" "$1" && sync', reference, out],
        "dd": ["sh", "-c",
               'mkdir "$0"; dd if=/dev/zero of="$0/zeros" bs=1M iflag=count_bytes count="$1" '
               'conv=fsync; shift; for file; do dd if="$file" of=/dev/null bs=1M; done',
               out, written, *inputs],
        "blake3": [sys.executable, "-c", BLAKE3, reference],
        "loop": [sys.executable, "-c", LOOP, reference, out],
        "convert": convert,
        "no-verify": [*convert, "--no-verify"],
        "torch": [sys.executable, "-c", NAIVE, work, out, options.dtype],
        "products32": [*products, "float32"],
        "products64": [*products, "float64"],
        "peft": [options.peft_python, "-c", PEFT, work, options.rank],
    }  # fmt: skip
    names = options.contenders or BY_LAYOUT[options.layout]
    names = [name for name in names if name != "peft" or options.peft_python]
    found: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(options.runs + 1):
        for name in names:
            for path in outputs if name in ("cp", "blake3", "loop") else inputs:
                read(path)
            os.sync()
            run = timed([str(word) for word in commands[name]])
            if "products" in name:
                # Only the products count, not the start of torch.
                seconds = json.loads((out / "products.json").read_text())["seconds"]
                run = replace(run, seconds=seconds)
            if number:
                found[name].append(run)
            if name == "torch" and number == 0:
                check_same(out, reference)
            shutil.rmtree(out, ignore_errors=True)
            talk(f"run {number}: {name}: {run.seconds:.2f} s, {run.cpu_seconds:.2f} CPU s")
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


def timed(command: list[str]) -> Run:
    # As it is once it is installed: compiled.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = counts()
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    with process.stderr or Path(os.devnull).open("rb") as stream:
        told = stream.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{told.decode(errors='replace')}")
    # A process that ended is counted for the one that waited for it.
    read_bytes, written_bytes = (b - a for a, b in zip(before, counts(), strict=True))
    cpu = usage.ru_utime + usage.ru_stime
    return Run(seconds, cpu, usage.ru_maxrss * 1024, read_bytes, written_bytes)


def counts() -> tuple[int, int]:
    """Bytes that this process and its ended children read and wrote, from memory or disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    values = dict(line.split(": ") for line in lines)
    return int(values["rchar"]), int(values["wchar"])


def processor() -> str:
    """Its model, and the instructions that the contenders' speed depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    known = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = known.get("flags", known.get("Features", "")).split()
    shown = [flag for flag in flags if flag.startswith(("sha", "avx", "pclmul", "crc32", "asimd"))]
    return f"{known.get('model name', 'unknown')} ({' '.join(shown)})"


def baseline(runs: dict[str, list[Run]]) -> str:
    """What the others are compared with: `cp` where it was measured, else the first."""
    return "cp" if "cp" in runs else next(iter(runs))


def summarise(runs: dict[str, list[Run]], written: int) -> list[Measured]:
    base = runs[baseline(runs)]
    result = []
    for name, values in runs.items():
        seconds = statistics.median(run.seconds for run in values)
        pairs = list(zip(values, base, strict=True))
        ratios = [run.seconds / other.seconds for run, other in pairs]
        result.append(
            Measured(
                CONTENDERS[name],
                seconds,
                min(run.seconds for run in values),
                statistics.median(run.cpu_seconds for run in values),
                max(run.peak_bytes for run in values),
                written / seconds,
                statistics.median(ratios),
                (min(ratios), max(ratios)),
                statistics.median(run.cpu_seconds / other.cpu_seconds for run, other in pairs),
                statistics.median(run.read_bytes for run in values) / written,
                statistics.median(run.written_bytes for run in values) / written,
            )
        )
    return result


if __name__ == "__main__":
    main()
