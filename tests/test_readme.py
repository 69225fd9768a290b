"""The README holds: its code runs, its commands are valid, its table is what the command prints."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import attention_map as attention_script
import eval as eval_script
import train as train_script
from flash_bla.configs import FOLDER as CONFIGS
from flash_bla.engine.config import parse_eval, parse_train
from flash_bla.layers.attention import _ATTENTIONS
from flash_bla.models import read_config
from flash_bla.models.__main__ import model_row

ROOT = Path(train_script.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"train.py": train_script, "eval.py": eval_script, "attention_map.py": attention_script}
ELSEWHERE = ("pip ", "torchrun ", "/data/", "from_pretrained")  # what needs a network, GPUs or data that are not here


class Block(NamedTuple):
    """A block of code and the line of the README that it begins at."""

    language: str
    code: str
    line: int

    @property
    def runs_here(self) -> bool:
        return not any(word in self.code for word in ELSEWHERE)

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


BLOCKS = [
    Block(match[1], match[2], README.count("\n", 0, match.start(2)))
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder from which the scripts and YAMLs are reached as from the repository, and where output may go."""
    for name in (*SCRIPTS, "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    Image.new("L", (8, 8), 128).save(tmp_path / "digit.png")
    with np.load(ROOT / "tests/models/golden/mlla_tiny.npz") as golden:
        entries = json.loads(str(golden["entries"]))  # names and shapes of an official file
    torch.save({"model": {name: torch.zeros(shape) for name, shape in entries.items()}}, tmp_path / "mlla_tiny.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flash_bla.layers.attention._ATTENTIONS", dict(_ATTENTIONS))  # to be forgotten afterwards


def run_python(block: Block, namespace: dict) -> None:
    """Runs a block and compares what it prints with the comments behind its prints."""
    expected = re.findall(r"^print\(.*\)  # (.+)$", block.code, re.MULTILINE)
    printed = io.StringIO()
    source = "\n" * block.line + block.code  # so that a traceback shows the README's lines
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "README.md", "exec"), namespace)
    assert printed.getvalue().splitlines() == expected


def run_command(words: list[str]) -> None:
    """Runs a command; the scripts in this process, which has imported already what they need, and for one epoch."""
    if words[0] == "python":
        briefly = ["--epochs", "1", "--warmup-epochs", "0"] if words[1] == "train.py" else []
        result = SCRIPTS[words[1]].main([*words[2:], *briefly])
        assert result == 0 or result, words
    else:
        subprocess.run(words, check=True)


def test_all_that_can_run_here_runs_in_order(folder):
    blocks = [block for block in BLOCKS if block.runs_here]
    assert [sum(block.language == language for block in blocks) for language in ("python", "bash")] == [13, 6]
    namespace = {"__name__": "readme"}
    for block in blocks:
        if block.language == "python":
            run_python(block, namespace)
        else:
            for words in block.commands:
                run_command(words)
    assert Path("results/digits.json").is_file() and Path("results/digits.csv").is_file()


def test_commands_that_cannot_run_here_are_valid():
    parsers = {"train.py": parse_train, "eval.py": parse_eval}
    seen = []
    for block in BLOCKS:
        for words in block.commands if block.language == "bash" and not block.runs_here else ():
            for script in parsers.keys() & set(words):
                parsers[script](words[words.index(script) + 1 :])
                seen.append((script, words[0]))
    assert {(script, runner) for script in parsers for runner in ("python", "torchrun")} == set(seen)


def test_all_blocks_say_what_they_are():
    assert {block.language for block in BLOCKS} == {"python", "bash"}


def test_the_table_is_what_the_command_prints():
    """All models are in it, and the lines of the small ones are right: to count all of them takes a minute."""
    _, _, *lines = re.search(r"<!-- models: .+? -->\n(.+?)<!-- end -->", README, re.DOTALL)[1].splitlines()
    table = {line.split("`")[1]: line for line in lines}
    paths = {path.stem: path for path in CONFIGS.glob("*.yaml")}
    assert table.keys() == paths.keys()
    rows = {name: model_row(read_config(paths[name])) for name in table if name.endswith(("_tiny", "_b0"))}
    assert {name: line for name, (_, line) in rows.items()} == {name: table[name] for name in rows}
    assert list(rows) == sorted(rows, key=lambda name: rows[name][0])


def test_links_lead_somewhere():
    headings = {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in re.findall(r"^#+ (.+)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
