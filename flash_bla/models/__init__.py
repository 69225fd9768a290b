"""Backbones, one module a family. Importing this package registers the models of ``flash_bla/configs`` with timm."""

from flash_bla.models.registry import ModelConfig, build_model, describe_model, read_config, register_config
from flash_bla.models.registry import register_packaged_configs as _register_packaged_configs

_register_packaged_configs()

__all__ = ["ModelConfig", "build_model", "describe_model", "read_config", "register_config"]
