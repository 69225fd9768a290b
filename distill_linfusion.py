#!/usr/bin/env python
"""Distil a LinFusion: linear attention for the UNet of a Stable Diffusion pipeline (1.5, 2.1, XL or made from them).

    python distill_linfusion.py --pipeline stabilityai/stable-diffusion-xl-base-1.0 --data-dir pictures --bf16

Beside every picture of the folder lies its caption: cat.jpg, cat.txt. The student is the pipeline's UNet with the
LinFusion mounted, which alone is trained: to predict the noise, to give the output of the original UNet, and to give in
each replaced attention what the original one gives. The output folder is what `LinFusion.construct_for` takes as
`pretrained_model_name_or_path`; given as --weights, training goes on from it.

Reference: Liu et al., "LinFusion: 1 GPU, 1 Minute, 16K Image", 2024.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor
from tqdm import tqdm

from flash_bla.engine.images import read_picture
from flash_bla.models import LinFusion


class CaptionedPictures(Dataset):
    """The pictures of a folder that have a caption beside them, as squares with values from -1 to 1."""

    def __init__(self, folder: str, size: int) -> None:
        files = sorted(Path(folder).iterdir())
        captions = {path.stem: path for path in files if path.suffix == ".txt"}
        self.pairs = [(path, captions[path.stem]) for path in files if path.suffix != ".txt" and path.stem in captions]
        if not self.pairs:
            sys.exit(f"error: no pictures with captions in {folder}: cat.jpg needs a cat.txt beside it")
        self.transform = Compose([Resize(size), CenterCrop(size), ToTensor(), Normalize([0.5], [0.5])])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        picture, caption = self.pairs[index]
        return self.transform(read_picture(picture, "RGB")), caption.read_text(encoding="utf-8").strip()


def forever(loader: DataLoader) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    while True:
        yield from loader


def record_outputs(unet: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """A list that receives the named modules' outputs whenever the UNet runs."""
    outputs = []
    for name in names:
        unet.get_submodule(name).register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


def condition(
    pipeline: DiffusionPipeline, captions: tuple[str, ...], size: int
) -> dict[str, Tensor | dict[str, Tensor]]:
    """The UNet's arguments that depend on the captions, and for XL on the size of the picture."""
    device = pipeline.unet.device
    texts = pipeline.encode_prompt(
        prompt=list(captions), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if pipeline.unet.config.addition_embed_type != "text_time":
        return {"encoder_hidden_states": texts[0]}
    times = torch.tensor([size, size, 0, 0, size, size], device=device).expand(len(captions), -1)
    return {"encoder_hidden_states": texts[0], "added_cond_kwargs": {"text_embeds": texts[2], "time_ids": times}}


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="name on the Hugging Face Hub, or a folder")
    parser.add_argument("--data-dir", required=True, help="pictures, and beside each its caption")
    parser.add_argument("--output", default="output/linfusion", help="folder for the weights")
    parser.add_argument("--weights", help="LinFusion to go on from")
    parser.add_argument("--size", type=int, help="side of the training pictures; by default that of the pipeline's")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--save-every", type=int, default=1000, help="steps")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    # The original is a copy of the UNet from before the LinFusion is mounted.
    pipeline = DiffusionPipeline.from_pretrained(args.pipeline).to(args.device)
    vae, student = pipeline.vae, pipeline.unet
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    teacher = copy.deepcopy(student)
    linfusion = LinFusion.construct_for(
        pipeline, load_pretrained=args.weights is not None, pretrained_model_name_or_path=args.weights
    ).train()
    names = [entry["module_name"] for entry in linfusion.config.modules_list]
    features, teacher_features = record_outputs(student, names), record_outputs(teacher, names)
    # As it was trained: the pipeline's own scheduler may be one for few steps.
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(linfusion.parameters(), lr=args.lr, weight_decay=0.0)
    size = args.size or student.config.sample_size * pipeline.vae_scale_factor
    pictures = CaptionedPictures(args.data_dir, size)
    batches = forever(DataLoader(pictures, args.batch_size, shuffle=True, num_workers=args.workers))

    history = []
    for step in tqdm(range(1, args.steps + 1), unit="step", disable=None):
        images, captions = next(batches)
        with torch.autocast(student.device.type, torch.bfloat16, enabled=args.bf16):
            with torch.no_grad():
                latents = vae.encode(images.to(args.device)).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
                noisy = scheduler.add_noise(latents, noise, times)
                texts = condition(pipeline, captions, size)
                taught = teacher(noisy, times, **texts).sample
            predicted = student(noisy, times, **texts).sample
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, times) if velocity else noise
        losses = {
            "noise": F.mse_loss(predicted.float(), target.float()),
            "output": F.mse_loss(predicted.float(), taught.float()),
            "features": torch.stack(
                [F.mse_loss(a.float(), b.float()) for a, b in zip(features, teacher_features, strict=True)]
            ).mean(),
        }
        features.clear()
        teacher_features.clear()
        (losses["noise"] + 0.5 * losses["output"] + 0.5 * losses["features"]).backward()
        optimizer.step()
        optimizer.zero_grad()

        if step % args.save_every == 0 or step == args.steps:
            history.append({name: loss.item() for name, loss in losses.items()})
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {loss:.5f}" for name, loss in history[-1].items()))
            linfusion.save_pretrained(args.output)
    return history


if __name__ == "__main__":
    main()
