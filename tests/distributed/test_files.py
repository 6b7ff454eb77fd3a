"""A folder of the first process reaches the others."""

from __future__ import annotations

import numpy as np
import pytest

from .processes import run


@pytest.mark.slow
def test_a_folder_is_copied(tmp_path):
    folder = tmp_path / "folder"
    (folder / "b" / "none").mkdir(parents=True)
    (folder / "a").mkdir()
    (folder / "a" / "empty").touch()
    (folder / "a" / "large").write_bytes(np.random.RandomState(0).bytes(4321))
    run(tmp_path, 2, "copied", str(folder))
