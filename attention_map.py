#!/usr/bin/env python
"""Draw what a token of a picture attends to.

    python attention_map.py --checkpoint runs/digits/best.pt --image digit.png
    python attention_map.py --model mlla_tiny --pretrained --image cat.jpg --layer 9 --token 7 3 --each-head
    python attention_map.py --model my_vit --checkpoint my_vit.pth --image cat.jpg --layer blocks.11 --token 0

The picture goes through the model's own resizing and cropping, and the map is drawn over what remains of it. See
`attention_map` in flash_bla/engine/pictures.py for what is drawn, and for the same from Python.
"""

from __future__ import annotations

import argparse
import sys

from timm.data import create_transform

from eval import load_model
from flash_bla.engine.checkpoint import write_atomically
from flash_bla.engine.config import EvalConfig, RunError
from flash_bla.engine.images import read_picture
from flash_bla.engine.pictures import AttentionMap, attention_map, draw_attention, pixels
from flash_bla.engine.processes import start_processes


def main(argv: list[str] | None = None) -> AttentionMap:
    """Model, picture, map, drawing."""
    parser = argparse.ArgumentParser(
        usage="attention_map.py (--checkpoint FILE | --model NAME) --image FILE [settings]",
        description="Draw what a token of a picture attends to.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", help="checkpoint of train.py; with --model, any file of weights")
    parser.add_argument("--model", help="name of a flash_bla model")
    parser.add_argument("--pretrained", action="store_true", help="take the weights that timm knows for the model")
    parser.add_argument("--img-size", type=int, nargs="+", help="one number or height width (default: the model's own)")
    parser.add_argument("--image", required=True, help="the picture")
    parser.add_argument(
        "--layer", default="-1", help="number of the block from 0, or from the end if negative, or name (default: -1)"
    )
    parser.add_argument(
        "--token",
        type=int,
        nargs="+",
        metavar="N",
        help="row and column on the layer's grid, or one number: a prefix token, 0 is the class token "
        "(default: the middle)",
    )
    parser.add_argument("--each-head", action="store_true", help="a panel for each head, beside their mean")
    parser.add_argument("--output", default="attention.png", help="PNG to write (default: attention.png)")
    parser.add_argument("--device", default="cpu", help="cuda, cpu, ... (default: cpu)")
    args = parser.parse_args(argv)
    if not (args.checkpoint or args.model):
        raise RunError("name the model: --checkpoint FILE, --model NAME, or both")
    if args.token and len(args.token) > 2:
        raise RunError(f"token: row and column, or the number of a prefix token, got {args.token}")

    settings = {"checkpoint": args.checkpoint, "model": args.model, "pretrained": args.pretrained}
    model, data, _ = load_model(EvalConfig(**settings, img_size=args.img_size))
    device = start_processes(args.device).device
    model.to(device).eval()
    transform = create_transform(
        data["input_size"], interpolation=data["interpolation"], mean=data["mean"], std=data["std"],
        crop_pct=data["crop_pct"], crop_mode=data["crop_mode"],
    )  # fmt: skip
    image = transform(read_picture(args.image, data["mode"]))[None]

    layer = int(args.layer) if args.layer.lstrip("-").isdigit() else args.layer
    token = args.token and (tuple(args.token) if len(args.token) == 2 else args.token[0])
    try:
        attention = attention_map(model, image.to(device), layer, token)
    except ValueError as error:
        raise RunError(str(error)) from error
    write_atomically(args.output, draw_attention(attention, pixels(image, data)[0], args.each_head))
    (heads, height, width), prefix = attention.rows.shape, attention.prefix.shape[1]
    print(f"{attention.layer}: token {attention.token} of {height}x{width} and {prefix} prefix tokens, {heads} rows")
    print(f"written to {args.output}")
    return attention


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"error: {error}")
