"""What `scripts/fuzz` attacks, and how; the tests run the same targets on the kept corpus.

inputs.py     how a folder of checkpoint files is written from one JSON text
models.py     the tiny models that all inputs start from
mutation.py   changes to an input that keep most of its structure
targets.py    a function for each kind of file: bytes in, `ConversionError` or nothing out
guard.py      stops the process when a target starts a program, connects, or unpickles
replay.py     runs the corpus, and mutations of it, without atheris
run.py        runs one target under atheris
"""
