"""Names of files that untrusted files give."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.storage.small_file import inside


@pytest.mark.parametrize("letter", ["a", "é"])
def test_names_may_have_255_bytes(letter: str, tmp_path: Path) -> None:
    longest = "a" + letter * (254 // len(letter.encode()))
    assert len(longest.encode()) == 255
    assert inside(tmp_path, longest) == tmp_path / longest
    with pytest.raises(CorruptFileError, match="which is not a plain file name"):
        inside(tmp_path, longest + "a")
