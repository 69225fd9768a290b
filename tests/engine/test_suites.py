"""ImageNet's relatives, calibration, several sizes in one run, and results side by side."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import eval as eval_script
from flash_bla.engine.config import RunError, parse_eval
from flash_bla.engine.evaluation import Scores, evaluate
from flash_bla.engine.suites import open_suites

TABLES = resources.files("timm.data") / "_info"
WNIDS = ImageNetInfo().label_names()


@pytest.fixture(autouse=True)
def _short_clock(monkeypatch):
    monkeypatch.setattr("flash_bla.engine.evaluation.THROUGHPUT_SECONDS", 0.01)


@pytest.fixture
def folders(tmp_path):
    """Makes a folder of classes with one image each, the second class with three."""

    def make(name: str, classes: list[str], file: str = "image{}.png") -> Path:
        Image.new("RGB", (16, 16), (10, 20, 30)).save(tmp_path / "image.png")
        content, root, number = (tmp_path / "image.png").read_bytes(), tmp_path / name, 0
        for place, label in enumerate(classes):
            (root / label).mkdir(parents=True)
            for _ in range(3 if place == 1 else 1):
                number += 1
                (root / label / file.format(number)).write_bytes(content)
        return root

    return make


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A model of 1000 classes whose logits are the same for every image: the flags to evaluate it, and the logits."""
    model = timm.create_model("test_vit")
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.normal_(model.head.bias, std=3.0, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("biased") / "model.pth"
    torch.save(model.state_dict(), path)
    flags = ["--model", "test_vit", "--checkpoint", str(path), "--img-size", "16", "--device", "cpu", "--workers", "0"]
    return flags, model.head.bias.detach().double()


def expected(logits: torch.Tensor, labels: list[list[int]]) -> dict[str, float]:
    """The figures of a model that says the same of every image, with the images' right classes among its logits."""
    probabilities = logits.softmax(0)
    best = logits.argsort(descending=True).tolist()
    top1, top5 = (100 * sum(bool(set(best[:k]) & set(right)) for right in labels) / len(labels) for k in (1, 5))
    loss = -sum(math.log(sum(probabilities[c] for c in right)) for right in labels) / len(labels)
    ece = abs(top1 - 100 * probabilities.max().item())
    return {"top1": top1, "top5": top5, "loss": loss, "ece": ece, "images": len(labels)}


def one_image_each(count: int) -> list[list[int]]:
    return [[c] for c in range(count)] + [[1], [1]]  # as `folders` has them


def assert_figures(row: dict, figures: dict) -> None:
    assert {key: row[key] for key in figures} == pytest.approx(figures, rel=1e-5)


def read_csv(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_scores_by_hand(one_process):
    scores = Scores(3, torch.device("cpu"))
    scores.update(torch.tensor([[0.70, 0.2, 0.1], [0.72, 0.2, 0.08]]).log(), torch.tensor([[0], [1]]))
    scores.update(torch.tensor([[0.5, 0.3, 0.2], [0.04, 0.9, 0.06]]).log(), torch.tensor([[2], [1]]))
    # The first two are in one bin, (10/15, 11/15], with one right; then (7/15, 8/15] and (13/15, 14/15].
    ece = (abs(1 - 0.70 - 0.72) + abs(0 - 0.5) + abs(1 - 0.9)) / 4
    loss = -(math.log(0.7) + math.log(0.2) + math.log(0.2) + math.log(0.9)) / 4
    figures = scores.figures(one_process)
    assert figures.pop("classes") == [[1, 1], [2, 1], [1, 0]]
    assert figures == pytest.approx({"top1": 50, "top5": 100, "loss": loss, "ece": 100 * ece, "images": 4})


def test_scores_of_images_with_several_classes(one_process):
    scores = Scores(3, torch.device("cpu"))
    scores.update(torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]).log(), torch.tensor([[0, 2], [1, 3]]))
    figures = scores.figures(one_process)
    assert figures["classes"] == [[1, 1], [1, 0], [1, 1]]
    assert figures["top1"] == 50 and figures["loss"] == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)


def test_shares_add_up_to_the_whole_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(900, 100, generator=generator) * 3, torch.arange(900)[:, None] % 100
    whole, *shares = (Scores(100, torch.device("cpu")) for _ in range(4))
    for start in range(0, 900, 128):
        whole.update(logits[start : start + 128], labels[start : start + 128])
    for rank, share in enumerate(shares):
        share.update(logits[rank::3], labels[rank::3])
    for name in ("hits", "bins", "classes"):
        assert torch.equal(sum(getattr(share, name) for share in shares), getattr(whole, name)), name


@pytest.mark.parametrize("suite", ["imagenet-a", "imagenet-r"])
def test_suites_of_200_classes(suite, folders, biased, tmp_path):
    flags, logits = biased
    names = (TABLES / f"{suite.replace('-', '_')}_synsets.txt").read_text().split()
    numbers = [int(line) for line in (TABLES / f"{suite.replace('-', '_')}_indices.txt").read_text().split()]
    root, output = folders("data", names), tmp_path / "result"
    (row,) = eval_script.main([*flags, "--suite", suite, "--data-dir", str(root), "--output", str(output)])
    assert_figures(row, expected(logits[numbers], one_image_each(200)))
    assert (row["dataset"], row["data_dir"], row["weights"]) == (suite, str(root), "model")

    classes = read_csv(f"{output}.classes.csv")
    best = names[logits[numbers].argmax()]
    assert [entry["class"] for entry in classes] == names and classes[1]["images"] == "3"
    assert [entry["class"] for entry in classes if float(entry["top1"]) > 0] == [best]


def test_suites_of_1000_classes_in_one_run(folders, biased, tmp_path):
    flags, logits = biased
    numbers = folders("v2", [str(number) for number in range(1000)])
    originals = folders("imagenet/val", WNIDS, "ILSVRC2012_val_{:08d}.JPEG").parent  # a root with its split
    suites = [f"imagenet-v2={numbers}", "imagenet-sketch", "imagenet-real"]
    output = str(tmp_path / "results" / "biased")
    rows = eval_script.main([*flags, "--suite", *suites, "--data-dir", str(originals), "--output", output])
    names = [entry.partition("=")[0] for entry in suites]
    assert [row["dataset"] for row in rows] == [row["dataset"] for row in read_csv(f"{output}.csv")] == names
    for row in rows[:2]:
        assert_figures(row, expected(logits, one_image_each(1000)))
    real = json.loads((TABLES / "imagenet_real_labels.json").read_text())[:1002]
    assert_figures(rows[2], expected(logits, [right for right in real if right]))

    classes = read_csv(f"{output}.classes.csv")
    assert (classes[0]["class"], classes[0]["name"]) == (WNIDS[0], "tench, Tinca tinca")
    same = ["imagenet-v2", f"imagenet-v2={numbers}", f"imagenet-v2={numbers}/"]
    other = f"imagenet-v2={shutil.copytree(numbers, tmp_path / 'other')}"
    for several, names_of_rows in ((same, same[:1]), ([*same, other], [same[1], other])):
        rows = eval_script.main([*flags, "--data-dir", str(numbers), "--suite", *several])
        assert [row["dataset"] for row in rows] == names_of_rows

    best = [(row["dataset"], row["class"]) for row in classes if row["top1"] == "100.0"]
    assert best == [(name, WNIDS[logits.argmax()]) for name in names[:2]]
    seen = {row["class"] for row in classes if row["dataset"] == "imagenet-real"}
    assert seen == {WNIDS[c] for right in real for c in right}


def test_sizes_in_one_run_and_results_side_by_side(pictures, tmp_path, capsys):
    flags = ["--model", "test_vit", "--num-classes", "3", "--data-dir", str(pictures()), "--device", "cpu"]
    flags += ["--workers", "0", "--batch-size", "4"]
    first, second = tmp_path / "results" / "first", tmp_path / "results" / "second"
    first.mkdir(parents=True)  # a folder beside the files of its name
    torch.manual_seed(0)  # the weights
    rows = eval_script.main([*flags, "--sizes", "16", "32", "--output", str(first)])
    assert [row["input_size"] for row in rows] == [[3, 16, 16], [3, 32, 32]]
    for row in rows:
        model = timm.create_model("test_vit", num_classes=3, img_size=row["input_size"][1])
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert row["images"] == 9 and row["throughput"] > 0
    assert json.loads(first.with_suffix(".json").read_text()) == rows
    assert len(read_csv(f"{first}.csv")) == 2 and len(read_csv(f"{first}.classes.csv")) == 6
    torch.manual_seed(0)
    alone = eval_script.main([*flags, "--img-size", "16"])[0]
    assert {key for key in alone if alone[key] != rows[0][key]} <= {"images_per_second", "throughput"}

    better = [rows[0] | {"top1": 99.0, "throughput": 1234.4}, rows[0] | {"dataset": "digits"}]
    second.with_suffix(".json").write_text(json.dumps(better))
    capsys.readouterr()
    output = str(tmp_path / "comparison")
    files = [str(path.with_suffix(".json")) for path in (first, second)]
    compared = eval_script.main(["--compare", *files, "--output", output])
    places = [(row["dataset"], row["result"]) for row in compared]
    assert places == [("folder", "second"), ("folder", "first"), ("folder", "first"), ("digits", "second")]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| data set | result | model | size | parameters | images/s | top-1 | top-5 | loss | ECE |"
    assert lines[2].startswith("| folder | second | test_vit | 16x16 | 0.30 M | 1234 | 99.00 | 100.00 | ")
    assert [row["result"] for row in read_csv(f"{output}.csv")] == [result for _, result in places]
    with Image.open(f"{output}.png") as plot:
        assert plot.format == "PNG"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.csv")}
    for taken in (str(first), f"{first}.classes", os.path.relpath(first)):
        with pytest.raises(RunError, match=f"output: {taken}.csv belongs to .*{first.name}.json"):
            eval_script.main(["--compare", *files, "--output", taken])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.csv")}
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=f"output: cannot write to {tmp_path}/file: File exists"):
        eval_script.main(["--compare", *files, "--output", str(tmp_path / "file" / "comparison")])


def test_results_of_one_name_are_told_apart(tmp_path, monkeypatch):
    row = {"dataset": "digits", "model": "m", "input_size": [1, 8, 8], "parameters": 1, "throughput": 1.0}
    row |= {"top5": 9.0, "loss": 1.0, "ece": 1.0}
    for number, name in enumerate(("a/eval", "b/eval", "b/other")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps([row | {"top1": 9.0 - number}]))
    monkeypatch.chdir(tmp_path)
    compared = eval_script.main(["--compare", "a/eval.json", "b/eval.json", "./a/eval.json", "b/other.json"])
    assert [(row["result"], row["top1"]) for row in compared] == [("a/eval", 9.0), ("b/eval", 8.0), ("other", 7.0)]


def test_a_batch_is_scored_among_the_classes_asked_for(one_process):
    class Model(torch.nn.Module):
        num_classes = 4

        def forward(self, images):
            return images

    logits = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 2.0, 1.0, 0.0]])
    batches = [(logits, torch.tensor([1, 1]), [])]
    figures = evaluate(Model(), batches, lambda *batch: batch, one_process, "fp32", classes=[1, 2])
    assert (figures["top1"], figures["classes"]) == (50, [[0, 0], [2, 1]])
    assert figures["loss"] == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2)


def test_folders_that_are_not_of_the_suite(folders):
    def opened(suite, folder="", num_classes=1000, class_names=None, more=()):
        config = parse_eval(["--model", "test_vit", "--suite", f"{suite}={folder}" if folder else suite, *more])
        return open_suites(config, num_classes, class_names)

    names = (TABLES / "imagenet_a_synsets.txt").read_text().split()
    some, foreign = folders("some", names[:150]), folders("foreign", [*names, WNIDS[0]])
    with pytest.raises(RunError, match=f"suite imagenet-a: .*some lacks 50 of its 200 classes, .* '{names[150]}'"):
        opened("imagenet-a", some)
    with pytest.raises(RunError, match=f"^suite imagenet-a={some}: "):
        opened("imagenet-a", some, more=[f"imagenet-a={foreign}"])
    with pytest.raises(
        RunError, match="imagenet-a: the folder .*n01440764 is none of .*; its classes are 200 folders n01498041, "
    ):
        opened("imagenet-a", foreign)
    with pytest.raises(RunError, match="imagenet-v2: .* is none of .*; its classes are 1000 folders 0, 1, "):
        opened("imagenet-v2", some)
    with pytest.raises(RunError, match="suite imagenet-real: labels go by the original names .* there is .*image1.png"):
        opened("imagenet-real", folders("renamed", WNIDS))
    with pytest.raises(RunError, match="suite imagenet-r: no such folder: /nowhere"):
        opened("imagenet-r", "/nowhere")
    with pytest.raises(RunError, match="where is imagenet-r[?] imagenet-r=FOLDER, or --data-dir"):
        opened("imagenet-r")
    with pytest.raises(RunError, match="unknown 'imagenet-q'; did you mean 'imagenet"):
        opened("imagenet-q", some)
    with pytest.raises(RunError, match="1000 classes, but this one has 10"):
        opened("imagenet-a", some, num_classes=10)
    with pytest.raises(RunError, match="those of the checkpoint are others"):
        opened("imagenet-a", some, class_names=WNIDS[::-1])


def test_settings_that_contradict_each_other():
    for flags, message in (
        (["--sizes", "224", "--img-size", "224"], "sizes: it takes the place of img_size"),
        (["--suite", "imagenet=x", "--dataset", "digits"], "suite: it takes the place of dataset"),
        (["--sizes", "0"], "sizes: must be at least 1"),
    ):
        with pytest.raises(RunError, match=message):
            parse_eval(["--model", "test_vit", *flags])


def test_what_is_no_result_cannot_be_compared(tmp_path):
    with pytest.raises(RunError, match="cannot read .*none.json: No such file"):
        eval_script.main(["--compare", str(tmp_path / "none.json")])
    for number, text in enumerate(("{", '{"top1": 1}', '[{"dataset": "digits"}]', "[1]")):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(RunError, match=f"{path} is no result of eval.py --output"):
            eval_script.main(["--compare", str(path)])
