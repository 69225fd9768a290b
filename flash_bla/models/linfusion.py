"""LinFusion: linear attention for the UNets of Stable Diffusion, as a model of diffusers."""

from __future__ import annotations

from typing import Any

from torch import nn

from flash_bla.layers import GeneralizedLinearAttention
from flash_bla.suggest import did_you_mean

try:
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.attention_processor import Attention
except ModuleNotFoundError as error:
    raise ImportError('LinFusion needs diffusers: pip install "flash-bla[diffusion]"') from error

__all__ = ["PUBLISHED_WEIGHTS", "LinFusion"]

# Pipelines by their name on the Hugging Face Hub, and the weights that were distilled from them or fit them.
PUBLISHED_WEIGHTS = {
    "runwayml/stable-diffusion-v1-5": "Yuanshi/LinFusion-1-5",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "Yuanshi/LinFusion-1-5",
    "stablediffusionapi/realistic-vision-v51": "Yuanshi/LinFusion-1-5",
    "SG161222/Realistic_Vision_V4.0_noVAE": "Yuanshi/LinFusion-1-5",
    "Lykon/dreamshaper-8": "Yuanshi/LinFusion-1-5",
    "stabilityai/stable-diffusion-2-1": "Yuanshi/LinFusion-2-1",
    "stabilityai/stable-diffusion-xl-base-1.0": "Yuanshi/LinFusion-XL",
}


class LinFusion(ModelMixin, ConfigMixin):
    """The linear attentions that take the place of all self-attentions (``attn1``) of a UNet.

    The cost of an image then grows with its area and not with the square of it; the UNet's other modules stay. Weights
    are read and written as diffusers does (``from_pretrained``, ``save_pretrained``), under the official names:
    ``i.to_q.weight`` and so on for the i-th attn1 in the order of ``unet.named_modules()``.

        linfusion = LinFusion.construct_for(pipeline)
        image = pipeline("An astronaut floating in space").images[0]
        linfusion.unmount()

    Args:
        modules_list: For each module that is replaced: ``module_name`` in the UNet, width ``dim_n``, ``heads``, and
            ``projection_mid_dim`` of ``GeneralizedLinearAttention``.

    Reference:
        Liu et al., "LinFusion: 1 GPU, 1 Minute, 16K Image", 2024.
    """

    @register_to_config
    def __init__(self, modules_list: list[dict[str, Any]]) -> None:
        super().__init__()
        for i, entry in enumerate(modules_list):
            attention = GeneralizedLinearAttention(
                entry["dim_n"], entry["heads"], projection_mid_dim=entry["projection_mid_dim"]
            )
            self.add_module(str(i), attention)
        # The UNet and what was taken out of it, by name; in a tuple, which keeps them out of this model's own modules.
        self._mounted: tuple[nn.Module, dict[str, nn.Module]] | None = None

    @classmethod
    def get_default_config(cls, pipeline=None, unet: nn.Module | None = None) -> dict[str, Any]:
        """Arguments of the LinFusion that fits a pipeline or a UNet, to be changed or given as they are.

        Raises:
            ValueError: No UNet, one without self-attentions called attn1, or one in which a LinFusion is mounted.
        """
        unet = _find_unet(pipeline, unet)
        modules_list = []
        for name, module in unet.named_modules():
            if isinstance(module, GeneralizedLinearAttention):
                raise ValueError(f"a LinFusion is mounted in this {type(unet).__name__} already; unmount it first")
            # In some UNets attn1 attends to the text too.
            if name.endswith("attn1") and isinstance(module, Attention) and not module.is_cross_attention:
                width = module.to_q.out_features
                modules_list.append(
                    {"module_name": name, "dim_n": width, "heads": module.heads, "projection_mid_dim": None}
                )
        if not modules_list:
            raise ValueError(
                f"LinFusion replaces the self-attentions of a Stable Diffusion UNet, which are called attn1; "
                f"{type(unet).__name__} has none"
            )
        return {"modules_list": modules_list}

    @classmethod
    def construct_for(
        cls,
        pipeline=None,
        unet: nn.Module | None = None,
        load_pretrained: bool = True,
        pretrained_model_name_or_path: str | None = None,
        pipe_name_path: str | None = None,
    ) -> LinFusion:
        """Builds the LinFusion for a pipeline or a UNet, and mounts it.

        Args:
            pipeline: A pipeline of Stable Diffusion 1.5, 2.1 or XL, or of a model made from one of them.
            unet: Or its UNet alone.
            load_pretrained: Loads weights; False leaves them random, for training.
            pretrained_model_name_or_path: Whose weights: of the Hub, or a folder that ``save_pretrained`` wrote. By
                default those of ``PUBLISHED_WEIGHTS`` for this pipeline.
            pipe_name_path: The pipeline's name in that table, if it was loaded from elsewhere.

        Raises:
            ValueError: No weights are known for the pipeline; weights for another UNet; or a UNet that
                ``get_default_config`` cannot take.
        """
        unet = _find_unet(pipeline, unet)
        config = cls.get_default_config(unet=unet)  # also where weights are loaded: if it cannot be, nothing is fetched
        if not load_pretrained:
            linfusion = cls(**config)
        else:
            if not pretrained_model_name_or_path:
                source = unet if pipeline is None else pipeline
                name = pipe_name_path or getattr(source, "config", {}).get("_name_or_path")
                if name not in PUBLISHED_WEIGHTS:
                    raise ValueError(
                        f"no LinFusion weights are known for the pipeline {name!r}: give "
                        f"pretrained_model_name_or_path, or load_pretrained=False to train some; pipe_name_path may "
                        f"name the pipeline{did_you_mean(name, PUBLISHED_WEIGHTS)}"
                    )
                pretrained_model_name_or_path = PUBLISHED_WEIGHTS[name]
            linfusion = cls.from_pretrained(pretrained_model_name_or_path)
        linfusion.mount_to(unet=unet)
        return linfusion

    def mount_to(self, pipeline=None, unet: nn.Module | None = None) -> None:
        """Replaces the self-attentions of a pipeline's UNet, or of a UNet, by these, on its device and in its type.

        What is replaced is kept for ``unmount``, on the device where it is. Unmount before you save the UNet: its files
        have no place for what is mounted.

        Raises:
            ValueError: The UNet's self-attentions are others, its weights are offloaded, or this LinFusion is mounted
                already.
        """
        unet = _find_unet(pipeline, unet)
        if self._mounted:
            raise ValueError("this LinFusion is mounted already; unmount it first")
        own = _describe(self.config.modules_list)
        wanted = _describe(self.get_default_config(unet=unet)["modules_list"])
        differ = [
            f"{name} ({own.get(name, 'none')} here, {wanted.get(name, 'none')} in the UNet)"
            for name in {**own, **wanted}
            if own.get(name) != wanted.get(name)
        ]
        if differ:
            more = f" and {len(differ) - 8} more" if len(differ) > 8 else ""
            raise ValueError(f"this LinFusion is for another UNet; modules differ: {', '.join(differ[:8])}{more}")
        replaced = {name: unet.get_submodule(name) for name in own}
        _replace(unet, dict(zip(own, self.children(), strict=True)))
        self._mounted = unet, replaced

    def unmount(self) -> None:
        """Gives the UNet its self-attentions back, on the device and in the type that it has now.

        Raises:
            ValueError: The UNet's weights are offloaded.
        """
        if self._mounted:
            _replace(*self._mounted)
            self._mounted = None


def _replace(unet: nn.Module, modules: dict[str, nn.Module]) -> None:
    device, dtype = unet.device, unet.dtype
    if device.type == "meta" and any(hasattr(module, "_hf_hook") for module in unet.modules()):
        raise ValueError(  # there the weights of what is moved would be lost
            "Accelerate's hooks keep the UNet's weights elsewhere: remove them before you mount or unmount (diffusers: "
            "pipeline.remove_all_hooks()), and offload again after that"
        )
    for name, module in modules.items():
        unet.set_submodule(name, module.to(device, dtype))


def _describe(modules_list: list[dict[str, Any]]) -> dict[str, str]:
    return {entry["module_name"]: f"width {entry['dim_n']} in {entry['heads']} heads" for entry in modules_list}


def _find_unet(pipeline, unet: nn.Module | None) -> nn.Module:
    """The UNet that is meant; it may stand in the place of the pipeline, and may be compiled."""
    if unet is None:
        unet = getattr(pipeline, "unet", pipeline)
    if not isinstance(unet, nn.Module):
        raise ValueError(f"LinFusion needs a pipeline that has a unet, or unet=..., got {type(pipeline).__name__}")
    return getattr(unet, "_orig_mod", unet)
