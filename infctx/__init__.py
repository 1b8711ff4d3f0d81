"""Infinite-context, time-parallel fine-tuning for recurrent language models."""

from infctx import ops
from infctx.config import ModelConfig
from infctx.generate import generate
from infctx.models.rwkv import init_model
from infctx.weights import load_model, save_model

__all__ = ["ModelConfig", "generate", "init_model", "load_model", "ops", "save_model"]
