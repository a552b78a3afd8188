"""GRINQH for PyTorch: LLM decoding that reads fewer weight bits per token.

>>> from torchao.quantization import quantize_
>>> from grinqh_ao import GrinqhConfig, set_bits
>>> quantize_(model, GrinqhConfig(bits=3))
>>> set_bits(model, 2.5)
"""

# Imported for what they register: ATen ops, what torch.load may call, FSDP2's hooks.
from grinqh_ao import aten_ops, checkpoint, gathering  # noqa: F401
from grinqh_ao.batches import token_batches
from grinqh_ao.calibration import calibrate
from grinqh_ao.config import GrinqhConfig, all_but_head
from grinqh_ao.decode_rule import decode_every_row
from grinqh_ao.errors import CheckpointError
from grinqh_ao.evaluation import evaluate, reference
from grinqh_ao.fusion import fuse_projections, unfuse_projections
from grinqh_ao.metering import measure
from grinqh_ao.model import set_bits, summary
from grinqh_ao.stepping import guard_steps
from grinqh_ao.torchao_tensor import GrinqhTensor

try:  # teaches transformers to load and save, wherever it is installed
    from grinqh_ao.huggingface import GrinqhHfConfig, defer_stop_checks, load, save
except ImportError as _error:
    _why_not = str(_error)
else:
    _why_not = ""

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "GrinqhConfig",
    "GrinqhHfConfig",
    "GrinqhTensor",
    "all_but_head",
    "calibrate",
    "decode_every_row",
    "defer_stop_checks",
    "evaluate",
    "fuse_projections",
    "guard_steps",
    "load",
    "measure",
    "reference",
    "save",
    "set_bits",
    "summary",
    "token_batches",
    "unfuse_projections",
]

if _why_not:
    _OF_TRANSFORMERS = ("GrinqhHfConfig", "defer_stop_checks", "load", "save")
    __all__ = [name for name in __all__ if name not in _OF_TRANSFORMERS]

    def __getattr__(name: str) -> object:
        if name in _OF_TRANSFORMERS:  # no AttributeError, whose message "from ... import" drops
            raise ImportError(f"grinqh_ao.{name} needs transformers 5.17 or newer: {_why_not}")
        raise AttributeError(f"grinqh_ao has no attribute {name!r}")
