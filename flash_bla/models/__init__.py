"""Backbones, one module a family. Importing this package registers the models of ``flash_bla/configs`` with timm."""

from flash_bla.models.inference import fuse_for_inference
from flash_bla.models.registry import ModelConfig, build_model, describe_model, read_config, register_config
from flash_bla.models.registry import register_packaged_configs as _register_packaged_configs

_register_packaged_configs()

__all__ = ["ModelConfig", "build_model", "describe_model", "fuse_for_inference", "read_config", "register_config"]


def __getattr__(name: str):
    if name == "LinFusion":  # not above, because it imports diffusers, which not everyone has
        from flash_bla.models.linfusion import LinFusion

        return LinFusion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
