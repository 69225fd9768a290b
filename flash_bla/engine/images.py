"""Pictures with 8 bits a channel, from whatever their files hold."""

from __future__ import annotations

import numpy as np
from PIL import Image

from flash_bla.engine.config import RunError


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image in a mode of 8 bits a channel; grey values of 16 bits are scaled, where Pillow would clip them at 255.

    Raises:
        RunError: Its values are numbers of 32 bits, whose range nobody knows.
    """
    # 16 bits are "I" in a PPM, and in a PNG for older versions of Pillow.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise RunError(f"a grey picture of 32 bits (mode {image.mode}), wanted are 8 or 16 bits a channel")
    return image.convert(mode)


def read_picture(file: str, mode: str) -> Image.Image:
    """The picture of a file in a mode.

    Raises:
        RunError: It cannot be read; the file is named.
    """
    try:
        return in_mode(Image.open(file), mode)
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise RunError(f"cannot read {file}: {error}") from error
