"""Times `xtuner2llava convert` against `cp`, `dd`, bare loops, and loading everything with torch.

    python scripts/bench.py copy-2GB copy-6GB cast ...      tables of docs/performance.md
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
`convert` is the command line in a fresh process, so that starting Python counts. Its parts are
contenders too: the start of Python with torch, BLAKE3 of the output, the products, and the system
calls of the conversion with its checks and nothing else.
Memory is the largest resident set of the process, CPU its user and system time; read and written
are its `rchar` and `wchar` of /proc/self/io for each byte of the output. Needs about three times
the size of free disk, in DIR, and leaves nothing there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
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
    "start": "start of Python with torch",
    "loop": "system calls and checks, bare",
    "convert": "convert",
    "no-verify": "convert --no-verify",
    "torch": "torch.load, save_file",
    "products64": "float64 products",
    "peft": "PEFT merge, save_pretrained",
}
BY_LAYOUT = {
    "file": ("cp", "dd", "blake3", "start", "loop", "convert", "no-verify", "torch"),
    "zero3": ("cp", "dd", "blake3", "loop", "convert", "no-verify"),
    "lora": ("cp", "blake3", "start", "loop", "convert", "no-verify", "products64", "peft"),
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

# The system calls of a conversion, and its checks: what is kept is copied in the kernel, what is
# computed is read and written; all is read back, looked at, and flushed. It computes nothing.
LOOP = """
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from blake3 import blake3
from isal.isal_zlib import crc32

BLOCK = 4 << 20
out, computed, written, *sources = Path(sys.argv[1]), sys.argv[2] == "True", *sys.argv[3:]
out.mkdir()
file = os.open(out / "loop", os.O_RDWR | os.O_CREAT)
sources = [(os.open(path, os.O_RDONLY), os.stat(path).st_size) for path in sources]
share = int(written) / sum(size for _, size in sources) if computed else 1
blocks = enumerate((s, start, min(BLOCK, size - start))
                   for s, size in sources for start in range(0, size, BLOCK))
taking, writing, turn = threading.Lock(), threading.Lock(), threading.Condition()
digest, place, hashed = blake3(), 0, 0
flusher = ThreadPoolExecutor(1)

def work():
    global place, hashed
    view, back = memoryview(bytearray(BLOCK)), bytearray(BLOCK)
    while True:
        with taking:
            number, (source, start, count) = next(blocks, (None, (0, 0, 0)))
            end = place + (length := int(count * share))
            at, place = place, end
        if number is None:
            return
        if computed:
            os.preadv(source, [view[:count]], start)
            with writing:
                os.pwrite(file, view[:length], at)
        else:
            done = 0
            while done < count:
                with writing:
                    done += os.copy_file_range(source, file, count - done, start + done, at + done)
        data = memoryview(back)[:length]
        os.preadv(file, [data], at)
        bits = np.frombuffer(data[: length // 4 * 4], "<u4")
        bits.max(), bits.view("<i4").max()
        with turn:
            turn.wait_for(lambda: hashed == number)
        digest.update(data)
        with turn:
            hashed = number + 1
            turn.notify_all()
        crc32(view[:count] if computed else data)
        if at >> 28 != end >> 28:
            flusher.submit(os.fsync, file)

threads = [threading.Thread(target=work) for _ in os.sched_getaffinity(0)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
flusher.shutdown()
os.fsync(file)
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
rows = {columns: max(1, (16 << 20) // (4 * columns)) for _, columns in shapes}
block = {columns: torch.randn(count, columns, dtype=dtype) for columns, count in rows.items()}
right = {columns: torch.randn(rank, columns, dtype=dtype) for columns in rows}
left = torch.randn(max(rows.values()), rank, dtype=dtype)
start = time.perf_counter()
for height, columns in shapes:
    for done in range(0, height, rows[columns]):
        count = min(rows[columns], height - done)
        block[columns][:count].addmm_(left[:count], right[columns], alpha=1e-3)
seconds = time.perf_counter() - start
(work / "llava-bench").mkdir()
(work / "llava-bench/products.json").write_text(json.dumps({"seconds": seconds}))
"""

# What docs/performance.md shows.
TABLES = {
    "copy-2GB": "--size 2GB --runs 5 --contenders cp blake3 loop convert no-verify torch",
    "copy-6GB": "--size 6GB --runs 3 --contenders cp blake3 loop convert no-verify",
    "cast": "--size 8GB --dtype float16 --runs 3 --contenders dd start loop convert",
    "zero3": "--size 6GB --layout zero3 --runs 3 --contenders cp loop convert",
    "lora-64": "--size 4GB --layout lora --stored float16 --rank 64 --runs 3 "
    "--contenders cp start loop products64 convert",
    "lora-512": "--size 4GB --layout lora --stored float16 --rank 512 --runs 3 "
    "--contenders products64 start loop convert",
    "peft": "--size 1GB --layout lora --stored float16 --rank 512 --runs 2 "
    "--contenders convert peft",
    "memory": "--size 1GB 4GB 12GB --runs 1 --contenders cp convert",
    "memory-cast": "--size 1GB 4GB 12GB --dtype float16 --runs 1 --contenders dd convert",
}


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
    options = parse(sys.argv[1:])
    more = [word for word in sys.argv[1:] if word not in TABLES]
    tables = [parse([*shlex.split(TABLES[name]), *more]) for name in options.tables]
    results = [measured(each, size) for each in tables or [options] for size in each.size]
    if options.json:
        print(json.dumps(results if len(results) > 1 else results[0], indent=2))


def measured(options: argparse.Namespace, size: int) -> dict[str, object]:
    """What one table says, which is printed unless it is wanted as JSON."""
    work = Path(tempfile.mkdtemp(prefix="xtuner2llava-bench-", dir=options.work))
    try:
        talk(f"Making a checkpoint of about {size:,} bytes in {work}")
        make_input(work, size, options.stored, options.layout, options.ranks, options.rank)
        runs = measure(work, options)
        written = sum(path.stat().st_size for path in (work / "reference").iterdir())
        read = sum(path.stat().st_size for path in files(work / "iter_1.pth"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found = summarise(runs, written)
    if not options.json:
        show(options, read, written, "x " + baseline(runs), found)
    return {
        "layout": options.layout,
        "checkpoint_bytes": read,
        "output_bytes": written,
        "stored": options.stored,
        "dtype": options.dtype,
        "runs": options.runs,
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "baseline": baseline(runs),
        "contenders": [asdict(one) for one in found],
    }


def show(
    options: argparse.Namespace, read: int, written: int, times: str, found: list[Measured]
) -> None:
    what = f"{options.layout}, {options.stored} to {options.dtype}, {read / 1e9:.1f} GB"
    if options.markdown:
        print(f"| {what}, {options.runs} runs | seconds | {times} | CPU s | x CPU | read | written "
              "| peak memory |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    else:
        print(f"{what}, {written / 1e9:.2f} GB written, {options.runs} runs, medians (best)")
        print(f"{'':31}{'seconds':>16}{'MB/s':>8}{times:>13}{'(range)':>13}"
              f"{'CPU s':>8}{'x CPU':>7}{'peak MB':>9}{'read':>7}{'written':>9}")  # fmt: skip
    for m in found:
        low, high = m.ratios
        if options.markdown:
            print(f"| {m.name} | {m.seconds:.1f} | {m.ratio:.2f} ({low:.2f} to {high:.2f}) | "
                  f"{m.cpu_seconds:.1f} | {m.cpu_ratio:.2f} | {m.read:.2f} | {m.written:.2f} | "
                  f"{m.peak_bytes / 1e6:.0f} MB |")  # fmt: skip
        else:
            print(f"{m.name:31}{m.seconds:8.2f} ({m.best_seconds:5.2f})"
                  f"{m.bytes_per_second / 1e6:8.0f}{m.ratio:13.2f}"
                  f"{f'({low:.2f}-{high:.2f})':>13}{m.cpu_seconds:8.2f}{m.cpu_ratio:7.2f}"
                  f"{m.peak_bytes / 1e6:9.0f}{m.read:7.2f}{m.written:9.2f}")  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], metavar="TABLE",
                        help=f"of docs/performance.md: {', '.join(TABLES)}")  # fmt: skip
    parser.add_argument("--size", type=in_bytes, nargs="+", default=[2 * 10**9],
                        help="of the checkpoint, e.g. 2GB; several in turn")  # fmt: skip
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
    options = parser.parse_args(arguments)
    options.computed = options.layout == "lora" or options.dtype not in ("keep", options.stored)
    return options


def in_bytes(text: str) -> int:
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
    weights = [path for path in inputs if path.suffix in (".pth", ".safetensors", ".pt")]
    products = [sys.executable, "-c", PRODUCTS, work, options.rank]
    commands = {
        "cp": ["sh", "-c", 'cp -r "$0" "$1" && sync', reference, out],
        "dd": ["sh", "-c",
               'mkdir "$0"; dd if=/dev/zero of="$0/zeros" bs=1M iflag=count_bytes count="$1" '
               'conv=fsync; shift; for file; do dd if="$file" of=/dev/null bs=1M; done',
               out, written, *inputs],
        "blake3": [sys.executable, "-c", BLAKE3, reference],
        "start": [sys.executable, "-c", "import torch"],
        "loop": [sys.executable, "-c", LOOP, out, options.computed, written, *weights],
        "convert": convert,
        "no-verify": [*convert, "--no-verify"],
        "torch": [sys.executable, "-c", NAIVE, work, out, options.dtype],
        "products64": [*products, "float64"],
        "peft": [options.peft_python, "-c", PEFT, work, options.rank],
    }  # fmt: skip
    names = options.contenders or BY_LAYOUT[options.layout]
    names = [name for name in names if name != "peft" or options.peft_python]
    found: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(options.runs + 1):
        for name in names:
            for path in outputs if name in ("cp", "blake3") else inputs:
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
