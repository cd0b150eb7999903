"""What cannot be written is refused before anything is made."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from quantdit.system.output_places import require_file, require_folder


def test_a_link_to_nothing_is_no_place(tmp_path: Path, cli) -> None:
    link = tmp_path / "link"
    link.symlink_to("nothing")
    for folder in (link, link / "below"):
        with pytest.raises(ValueError, match=r"link is a link to nothing, which does not exist; remove it"):
            require_folder(folder)
    ran = cli("gate", tmp_path / "report.json", "--baseline", tmp_path / "baseline.json", "--summary", link)
    assert ran.code == 1 and "is a link to nothing" in ran.error
    (tmp_path / "nothing").mkdir()
    require_folder(link)


def test_a_file_that_may_not_be_written_is_refused(cli) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are open to their owner alone
        os.chmod(place, 0o777)
        summary = Path(place) / "summary.md"
        summary.touch()
        summary.chmod(0o444)
        root = os.geteuid() == 0  # whom no permission stops
        if root:
            os.seteuid(65534)
        try:
            ran = cli("gate", Path(place) / "report.json", "--baseline", Path(place) / "baseline.json", "--summary", summary)
        finally:
            if root:
                os.seteuid(0)
    assert ran.code == 1 and f"{summary} cannot be written" in ran.error


def test_a_pipe_is_not_replaced(tmp_path: Path, cli):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a device or a pipe"):
        require_file(tmp_path / "pipe")
    ran = cli("generate", "fashion-dit", "--output", tmp_path / "pipe")
    assert ran.code == 1 and "a device or a pipe" in ran.error and (tmp_path / "pipe").is_fifo()
