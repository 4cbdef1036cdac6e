"""Prints the names of all targets: `python -m fuzz_targets.names`."""

from fuzz_targets.targets import TARGETS

print(*TARGETS)
