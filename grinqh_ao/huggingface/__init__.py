"""transformers: quantizing while loading, saving, loading. Importing this registers all of it."""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from grinqh_ao.experts import IMPLEMENTATION, experts_forward
from grinqh_ao.huggingface.config import GrinqhHfConfig
from grinqh_ao.huggingface.quantizer import GrinqhHfQuantizer, attach
from grinqh_ao.huggingface.saving import load, save
from grinqh_ao.huggingface.stop_check import defer_stop_checks

__all__ = ["GrinqhHfConfig", "GrinqhHfQuantizer", "attach", "defer_stop_checks", "load", "save"]

ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
