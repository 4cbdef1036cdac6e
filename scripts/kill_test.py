"""Kills conversions at random moments, resumes them, and compares what comes out.

    python scripts/kill_test.py [--kills 200] [--interrupts 20] [--size 300MB] [--seed 0]

It makes a Llama-shaped `iter_1.pth` of that size, in which no two tensors are alike, and converts
it once in each of several modes: those are the right bytes. Then it starts conversions and kills
them, with SIGKILL at a random moment, or aimed at the end, where OUT appears. After each kill, OUT
must be what it was before (absent, or with --overwrite the old folder) or complete; and the same
command again, which is killed in its turn, must go on and end in the right bytes. Ctrl-C (SIGINT)
must be answered, end with status 130 and leave no OUT; how long that takes is reported. Needs three
times the size of free disk.

For each kill, the table says how much of the shards was on disk then, and how much of that the next
run would write again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench_model import make_input

UNITS = {"MB": 10**6, "GB": 10**9}
TOWER = "openai/clip-vit-large-patch14-336"
PARTIAL = ".partial"
OLD_RECORD = json.dumps(
    {"tool": {"name": "xtuner2llava"}, "shards": [{"file": "old"}], "files": {}}
)

# Run as its own process, so that torch's memory is not this one's.
MAKE_ALL_DIFFERENT = """
import sys, torch
path = sys.argv[1]
torch.manual_seed(1)
value = torch.load(path, weights_only=True)
for name, tensor in value["state_dict"].items():
    value["state_dict"][name] = torch.randn(tensor.shape) * 0.02
torch.save(value, path)
"""


@dataclass(frozen=True)
class Mode:
    """Options of `convert`; the size of shards in bytes, so that there are several or one."""

    name: str
    dtype: str
    jobs: int
    shards: int
    verify: bool = True
    overwrite: bool = False

    def options(self, size: int) -> list[str]:
        options = ["--dtype", self.dtype, "--jobs", str(self.jobs)]
        options += ["--max-shard-size", f"{max(1, size // self.shards // 1000)}KB"]
        options += [] if self.verify else ["--no-verify"]
        return options + (["--overwrite"] if self.overwrite else [])


MODES = (
    Mode("copy, 8 shards, 2 jobs", "keep", 2, 8),
    Mode("cast, 8 shards, 1 job", "float16", 1, 8),
    Mode("copy, 1 shard", "keep", 1, 1),
    Mode("cast, 16 shards, 2 jobs, not verified", "bfloat16", 2, 16, verify=False),
    Mode("copy over an old folder, 4 shards, 2 jobs", "keep", 2, 4, overwrite=True),
)


class Wrong(Exception):
    """What must not happen."""


def main() -> None:
    options = parse()
    # Shells have what they start in the background ignore Ctrl-C, and conversions would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work = Path(tempfile.mkdtemp(prefix="xtuner2llava-kill-", dir=options.work))
    try:
        talk(f"Making iter_1.pth of about {options.size:,} bytes in {work}")
        make_input(work, options.size, "float32")
        path = work / "iter_1.pth"
        subprocess.run([sys.executable, "-c", MAKE_ALL_DIFFERENT, path], check=True)
        modes = [MODES[number] for number in options.modes]
        generator = random.Random(options.seed)  # noqa: S311
        result = Test(work, options.size, generator).run(modes, options.kills, options.interrupts)
    except Wrong as wrong:
        sys.exit(f"WRONG: {wrong}\nSeed {options.seed}.")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(result, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--interrupts", type=int, default=20)
    parser.add_argument("--size", type=size, default="300MB", help="of the checkpoint")
    parser.add_argument("--modes", type=int, nargs="+", default=range(len(MODES)), metavar="N",
                        help=f"which of the {len(MODES)} modes, counted from 0")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where to put the files; default: temporary")
    return parser.parse_args()


def size(text: str) -> int:
    if text[-2:].upper() not in UNITS:
        raise argparse.ArgumentTypeError("expected a size such as 5MB or 1GB")
    return int(float(text[:-2]) * UNITS[text[-2:].upper()])


def talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Test:
    """The conversions of one checkpoint, and what was seen of them."""

    def __init__(self, work: Path, size: int, generator: random.Random) -> None:
        self._work, self._size, self._random = work, size, generator
        self._out = work / "llava-killed"
        self._expected: dict[str, dict[str, str]] = {}
        self._seconds: dict[str, float] = {}
        self._seen: Counter[str] = Counter()
        self._bytes: dict[str, int] = {}
        self._rows: list[tuple[str, float, int, int]] = []

    def run(self, modes: list[Mode], kills: int, interrupts: int) -> dict[str, object]:
        for mode in modes:
            start = time.monotonic()
            out = self._work / "llava-right"
            self._finish(self._start(mode, out), 0)
            self._seconds[mode.name] = time.monotonic() - start
            self._expected[mode.name] = sums(out)
            self._bytes[mode.name] = sum(p.stat().st_size for p in out.glob("*.safetensors"))
            shutil.rmtree(out)
            talk(f"{mode.name}: {self._seconds[mode.name]:.1f} s undisturbed")
        for round_ in range(10**9):
            if self._seen["kills"] >= kills:
                break
            self._until_complete(modes[round_ % len(modes)], kills)
        waits = [self._interrupt(modes[n % len(modes)]) for n in range(interrupts)]
        return {
            "checkpoint_bytes": (self._work / "iter_1.pth").stat().st_size,
            "modes": len(modes),
            **dict(sorted(self._seen.items())),
            "where it was killed": self.table(),
            "longest_wait_after_interrupt": round(max(waits, default=0.0), 2),
            "wrong": 0,
        }

    def _until_complete(self, mode: Mode, kills: int) -> None:
        """Starts and kills one conversion again and again, until it is complete."""
        self._clear()
        before = None
        if mode.overwrite:
            self._out.mkdir()
            (self._out / "old").write_text("what was there before")
            (self._out / "conversion.json").write_text(OLD_RECORD)
            before = sums(self._out)
        is_first = True
        while True:
            process = self._start(mode, self._out)
            # In the end some must come through: a shard takes its time, however often it is killed.
            ends = self._seen["kills"] >= kills or self._random.random() < 0.15
            killed = not ends and self._kill(process, mode)
            if not killed:
                self._finish(process, 0)
                self._check_complete(mode)
                self._seen["completed at once" if is_first else "completed by going on"] += 1
                return
            self._seen["kills"] += 1
            self._measure(mode)
            if self._seen["kills"] % 20 == 0:
                talk(f"{self._seen['kills']} kills")
            if self._is_complete_after_kill(mode, before):
                return
            is_first = False

    def _measure(self, mode: Mode) -> None:
        """Notes how many bytes of shards are on disk, and how many of them are recorded."""
        partial = self._out.with_name(self._out.name + PARTIAL)
        written = recorded = 0
        for path in partial.glob("*.safetensors"):
            size = path.stat().st_size
            written += size
            record = partial / ".xtuner2llava/records" / f"{path.name}.json"
            if record.exists():
                recorded += min(size, json.loads(record.read_bytes())["size"])
        if written:
            share = written / self._bytes[mode.name]
            self._rows.append((mode.name, share, written, written - recorded))

    def table(self) -> list[str]:
        lines = ["on disk when killed | kills | bytes on disk | written again | at most"]
        for tenth in range(11):
            rows = [row for row in self._rows if int(row[1] * 10) == tenth]
            if rows:
                on_disk, again = sum(row[2] for row in rows), sum(row[3] for row in rows)
                shown = f"{on_disk:,} | {again:,} | {max(row[3] for row in rows):,}"
                lines.append(f"{tenth * 10:>3} % | {len(rows)} | {shown}")
        return lines

    def _kill(self, process: subprocess.Popen[str], mode: Mode) -> bool:
        """Kills at a random moment; False if the conversion was done before."""
        deadline = time.monotonic() + self._random.uniform(0, 1.1 * self._seconds[mode.name])
        aimed = self._random.random() < 0.4
        partial = self._out.with_name(self._out.name + PARTIAL)
        while time.monotonic() < deadline or aimed:
            if process.poll() is not None:
                return False
            if aimed and (partial / "config.json").exists():
                time.sleep(self._random.uniform(0, 0.03))
                break
            time.sleep(0.0005)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            return False
        process.communicate()
        self._seen["kills aimed at the end"] += aimed
        return True

    def _is_complete_after_kill(self, mode: Mode, before: dict[str, str] | None) -> bool:
        """Whether OUT is there; if it is, it must be the whole of it, or what was there before."""
        if not self._out.exists():
            self._seen["OUT absent after a kill"] += 1
            return False
        if before is not None and sums(self._out) == before:
            self._seen["OUT unchanged after a kill"] += 1
            return False
        self._check_complete(mode)
        self._seen["OUT complete after a kill"] += 1
        return True

    def _check_complete(self, mode: Mode) -> None:
        found, expected = sums(self._out), self._expected[mode.name]
        if found != expected:
            names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            raise Wrong(f"{mode.name}: OUT differs in {', '.join(names)}")

    def _interrupt(self, mode: Mode) -> float:
        """The seconds from a Ctrl-C to the end of the process."""
        self._clear()
        while True:
            process = self._start(mode, self._out)
            partial = self._out.with_name(self._out.name + PARTIAL)
            # Before there is anything to clean up, Python itself answers.
            while not partial.exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(self._random.uniform(0, 0.8 * self._seconds[mode.name]))
            process.send_signal(signal.SIGINT)
            start = time.monotonic()
            _, told = process.communicate()
            waited = time.monotonic() - start
            if self._out.exists():  # It came too late.
                self._check_complete(mode)
                self._clear()
                continue
            break
        if process.returncode not in (130, -signal.SIGINT):
            raise Wrong(f"{mode.name}: status {process.returncode} after Ctrl-C: {told}")
        if "Interrupted" not in told and process.returncode == 130:
            raise Wrong(f"{mode.name}: Ctrl-C is not answered: {told}")
        kept = list(partial.glob(".xtuner2llava/records/*.json"))
        if kept and "same command again" not in told:
            raise Wrong(f"{mode.name}: shards are kept, and it is not said how to go on: {told}")
        self._seen["interrupts"] += 1
        self._seen["interrupts that kept shards"] += bool(kept)
        self._finish(self._start(mode, self._out), 0)
        self._check_complete(mode)
        return waited

    def _start(self, mode: Mode, out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "xtuner2llava", "convert", self._work / "iter_1.pth", out,
                   "--llm", self._work / "llm", "--vision", self._work / "vision",
                   "--vision-tower-name", TOWER, "-q", *mode.options(self._size)]  # fmt: skip
        return subprocess.Popen(
            [os.fspath(part) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _finish(self, process: subprocess.Popen[str], status: int) -> None:
        _, told = process.communicate()
        if process.returncode != status:
            raise Wrong(f"status {process.returncode}, expected {status}: {told}")

    def _clear(self) -> None:
        for path in self._out.parent.glob(self._out.name + "*"):
            shutil.rmtree(path)


def sums(folder: Path) -> dict[str, str]:
    """The sha256 of each file of `folder`, by its name within it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else (
                    hashlib.sha256(file.read()))  # fmt: skip
            found[str(path.relative_to(folder))] = digest.hexdigest()
        else:
            found[f"{path.relative_to(folder)}/"] = ""
    return found


if __name__ == "__main__":
    main()
