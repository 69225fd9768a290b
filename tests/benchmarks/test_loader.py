"""The loader's benchmark on as few images as it takes."""

from __future__ import annotations

import re

import pytest

from benchmarks import loader


def test_pipelines_and_their_stages(capsys):
    with pytest.raises(SystemExit):
        loader.main(["--images", "49", "--size", "32"])
    assert "--images: at least one batch of 50, got 49" in capsys.readouterr().err
    loader.main(["--images", "50", "--size", "32"])
    said = capsys.readouterr().out
    rates = dict(re.findall(r"^(\w+) +(\d+) images/s", said, re.MULTILINE))
    assert rates.keys() == {"floats", "bytes", "device"} and all(int(rate) > 0 for rate in rates.values())
    assert said.count("read and decode") == 3
