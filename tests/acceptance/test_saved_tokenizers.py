"""What the converter makes of tokenizers that each transformers saved loads, and is saved again,
by the transformers that LLaVA pins, fast and slow, with the ids of the version that saved it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from builders.prepared_tokenizer import write_prepared
from builders.saved_tokenizers import SAVED, expected, write_saved
from xtuner2llava.tokenizers.compatibility import readable_tokenizer
from xtuner2llava.tokenizers.tokenizer import read_tokenizer

pytestmark = pytest.mark.acceptance

_RUN = """
import json, sys
from transformers import AutoTokenizer

results = []
for folder, texts in json.load(sys.stdin):
    result = {}
    for fast in (True, False):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast)
            tokenizer.save_pretrained(folder + "-saved")
            again = AutoTokenizer.from_pretrained(folder + "-saved", use_fast=fast)
            made = [
                [[t(text)["input_ids"], t(text, add_special_tokens=False)["input_ids"]]
                 for text in texts]
                for t in (tokenizer, again)
            ]
        except Exception as error:
            made = f"{type(error).__name__}: {error}"
        result["fast" if fast else "slow"] = made
    results.append(result)
print(json.dumps(results))
"""


def test_ids_in_the_transformers_that_llava_pins(
    llava_python: Path, checkpoints: Path, tmp_path: Path
) -> None:
    jobs = []
    for version, kind in SAVED:
        base = write_saved(tmp_path / f"{version}-{kind}", version, kind, checkpoints)
        prepared = readable_tokenizer(read_tokenizer(base), "llava")
        out = write_prepared(prepared, tmp_path / f"{version}-{kind}-out")
        (out / "config.json").write_text('{"model_type": "llama"}')
        jobs.append((str(out), [text for text, *_ in expected(version, kind)]))
    # The files as they were saved: what is newer than 4.40 does not load.
    wrong = tmp_path / "4.57.1-llama3"
    (wrong / "config.json").write_text('{"model_type": "llama"}')
    jobs.append((str(wrong), ["a"]))
    ran = subprocess.run(
        [llava_python, "-c", _RUN],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    *results, unchanged = json.loads(ran.stdout)
    assert "ModelWrapper" in unchanged["fast"]
    for (version, kind), result in zip(SAVED, results, strict=True):
        ids = [list(pair) for _, *pair in expected(version, kind)]
        for how in ("fast", "slow"):
            assert isinstance(result[how], list), (version, kind, how, result[how])
            made, again = result[how]
            assert again == made, (version, kind, how)
            assert made == ids, (version, kind, how)
