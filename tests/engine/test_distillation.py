"""Learning from a teacher."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from runs import assert_same_run, interrupt

import train as train_script
from flash_bla.engine.config import RunError, TrainConfig, parse_train
from flash_bla.engine.data import TrainOrder, open_dataset, resolve_data, train_loader
from flash_bla.engine.distillation import Teacher, distillation_loss
from flash_bla.engine.model import create_model

# The student sees two classes alike; the teacher's logits and temperatures are such that its probabilities are 3/4 and
# 1/4 (ln 3 / 1), or 0.9 and 0.1 (ln 81 / 2): KL = 0.75 ln 1.5 + 0.25 ln 0.5, and 0.9 ln 1.8 + 0.1 ln 0.2, times τ².
SOFT = [(math.log(3), 1.0, 0.130812), (math.log(81), 2.0, 4 * 0.368064)]


@pytest.mark.parametrize(("logit", "tau", "expected"), SOFT)
def test_soft_labels(logit, tau, expected):
    student, teacher = torch.zeros(5, 2), torch.tensor([logit, 0.0]).expand(5, 2)
    assert distillation_loss(student, teacher, "soft", tau).item() == pytest.approx(expected, abs=1e-6)
    assert distillation_loss(teacher, teacher, "soft", tau).item() == pytest.approx(0, abs=1e-6)


def test_hard_labels():
    student = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])  # probabilities 3/4 and 1/4
    teacher = torch.tensor([[5.0, 4.0], [-1.0, 0.0]])
    expected = -(math.log(0.75) + math.log(0.25)) / 2
    assert distillation_loss(student, teacher, "hard", 3.0).item() == pytest.approx(expected)


@pytest.fixture
def teacher(tmp_path):
    """A timm model of decided opinions on the digits, and its file."""
    torch.manual_seed(5)
    model = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=16)
    torch.nn.init.normal_(model.head.weight)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "teacher.pth")
    return model.eval(), ("--teacher", "test_vit", "--teacher-weights", str(tmp_path / "teacher.pth"))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_run_with_a_teacher(train, load, model_yaml, teacher, one_process, kind):
    """The loss at a learning rate of 0 is that of a few lines; the teacher has its own normalisation."""
    flags = [*teacher[1], "--distill", kind, "--distill-alpha", "0.3", "--distill-tau", "3", "--img-size", "16"]
    flags += ["--mean", "0.2", "--std", "0.4", "--lr", "0", "--min-lr", "0", "--warmup-epochs", "0", "--epochs", "1"]
    assert train("run", *flags) == 0

    config = parse_train(["--config", str(model_yaml), *flags])
    torch.manual_seed(config.seed)
    student, description = create_model(config, 10)
    dataset, data = open_dataset(config, training=True), resolve_data(config, student, description)
    order, losses = TrainOrder(len(dataset), config, one_process), []
    for images, classes, _ in train_loader(config, dataset, data, order, one_process.device):
        images = images.float() / 255
        with torch.no_grad():
            log_p = student((images - 0.2) / 0.4).log_softmax(dim=1)
            taught = teacher[0]((images - 0.5) / 0.5)
        labels = -0.9 * log_p.gather(1, classes[:, None]).mean() - 0.1 * log_p.mean()  # smoothing of 0.1
        if kind == "hard":
            lesson = -log_p.gather(1, taught.argmax(dim=1)[:, None]).mean()
        else:
            q = (taught / 3).softmax(dim=1)
            lesson = 9 * (q * (q.log() - (log_p / 3).log_softmax(dim=1))).sum(dim=1).mean()
        losses.append(0.7 * labels + 0.3 * lesson)
    assert load("run")["history"][0]["train_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_checkpoint_teaches_and_the_run_goes_on_bit_for_bit(train, load, on_loss, tmp_path):
    assert train("teacher", "--epochs", "2", "--model-kwargs", "depth=1") == 0
    flags = ("--teacher-weights", str(tmp_path / "teacher" / "best.pt"), "--distill", "soft", "--ema-decay", "0.9")
    flags += ("--mesa", "0.5", "--mixup", "0.8", "--precision", "bf16")
    assert train("whole", *flags) == 0
    on_loss(interrupt(9))
    assert train("run", *flags) == train_script.STOPPED
    assert train("run", *flags) == 0
    assert_same_run(load("whole"), load("run"))
    assert load("run")["state_dict"].keys() == load("run")["state_dict_ema"].keys()
    assert not any("teacher" in key for key in load("run"))
    with pytest.raises(RunError, match="teacher_weights: "):  # another teacher is another run
        train("run", *flags, "--teacher-weights", str(tmp_path / "teacher" / "last.pt"))


def test_teachers_that_cannot_teach(teacher, tmp_path, monkeypatch):
    data = {"input_size": [1, 16, 16], "mean": [0.5], "std": [0.5]}

    def error_of(num_classes: int, **settings) -> str:
        with pytest.raises(RunError) as error:
            Teacher(TrainConfig(**settings), num_classes, data, torch.device("cpu"))
        return str(error.value)

    file = teacher[1][3]
    assert error_of(10, teacher_weights=file).endswith("does not say which model it is of: name it with --teacher")
    assert "has 10 classes: new classifier for 3 classes" in error_of(3, teacher="test_vit", teacher_weights=file)
    assert "another model" in error_of(10, teacher="test_resnet", teacher_weights=file)
    assert "no such checkpoint" in error_of(10, teacher="test_vit", teacher_weights=str(tmp_path / "none.pth"))
    assert "model 'no_vit'" in error_of(10, teacher="no_vit")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    assert "it knows 1000 classes, but there are 10 to learn" in error_of(10, teacher="test_vit")
