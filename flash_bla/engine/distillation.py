"""Learning from a teacher, as in DeiT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.engine.checkpoint import is_own, load_weights, read_checkpoint
from flash_bla.engine.config import RunError, TrainConfig
from flash_bla.engine.data import resolve_data
from flash_bla.engine.evaluation import autocast
from flash_bla.engine.model import create_model, rebuild_model


class Teacher:
    """A fixed model that says what it sees on the student's images.

    Args:
        config: The settings; `teacher` and `teacher_weights` name the model.
        num_classes: Classes of the student.
        data: What the student's images go through (see `resolve_data`). The teacher gets the same images, in its own
            normalisation.
        device: Where it computes.

    Raises:
        RunError: There is no such model or file, it does not say what model it is of, or it has other classes.
    """

    def __init__(self, config: TrainConfig, num_classes: int, data: dict[str, Any], device: torch.device):
        file = config.teacher_weights
        content = read_checkpoint(file) if file else {}
        # The student's own settings mean nothing to the teacher, but it sees the same images.
        like = replace(config, model=config.teacher, model_kwargs={}, pretrained=not file, mean=None, std=None)
        like.img_size, like.in_chans = data["input_size"][1:], data["input_size"][0]
        if config.teacher:
            model, description = create_model(like, num_classes if file else None)
        elif is_own(content):
            model, description = rebuild_model(like, content["model"]), content["model"]
        else:
            raise RunError(f"{file} does not say which model it is of: name it with --teacher")
        if content and (notes := load_weights(model, content, file)):
            raise RunError(f"teacher: {notes[0]}, which has learned nothing")
        if model.num_classes != num_classes:
            raise RunError(f"teacher: it knows {model.num_classes} classes, but there are {num_classes} to learn")
        own = resolve_data(like, model, description, content.get("data") if is_own(content) else None)
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=device).view(-1, 1, 1)
            for values in (data["mean"], data["std"], own["mean"], own["std"])
        )
        self.factor, self.shift = std / own_std, (mean - own_mean) / own_std
        model = model.to(device).eval().requires_grad_(False)
        self.model = torch.compile(model) if config.compile else model
        self.precision = config.precision

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images as the student gets them to logits, in float32."""
        with autocast(images.device, self.precision):
            return self.model(images * self.factor + self.shift).float()


def distillation_loss(logits: Tensor, taught: Tensor, kind: Literal["soft", "hard"], tau: float) -> Tensor:
    r"""What the student lacks of the teacher.

    .. math::
        soft: τ^2\, KL(softmax(t / τ) \,\|\, softmax(s / τ)), \quad hard: CE(s, argmax(t))

    averaged over the batch.

    Args:
        logits: s, the student's ``(B, classes)``.
        taught: t, the teacher's.
        kind: Which of the two.
        tau: Temperature τ of the soft one.

    Reference:
        Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021. Its
        code divides the soft loss by the number of classes besides, which the paper does not say.
    """
    if kind == "hard":
        return F.cross_entropy(logits, taught.argmax(dim=1))
    ours, theirs = (F.log_softmax(x / tau, dim=1) for x in (logits, taught))
    return tau**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
