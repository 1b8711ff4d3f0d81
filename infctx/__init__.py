"""Infinite-context, time-parallel fine-tuning for recurrent language models."""

from infctx import ops
from infctx.config import ModelConfig
from infctx.models.rwkv import init_model

__all__ = ["ModelConfig", "init_model", "ops"]
