"""GRINQH for PyTorch: LLM decoding that reads fewer weight bits per token.

>>> from torchao.quantization import quantize_
>>> from grinqh_ao import GrinqhConfig, set_bits
>>> quantize_(model, GrinqhConfig(bits=3))
>>> set_bits(model, 2.5)
"""

from grinqh_ao import aten_ops  # noqa: F401
from grinqh_ao.calibration import calibrate, token_batches
from grinqh_ao.config import GrinqhConfig, all_but_head
from grinqh_ao.decode_rule import decode_every_row
from grinqh_ao.evaluation import evaluate, reference
from grinqh_ao.fusion import fuse_projections, unfuse_projections
from grinqh_ao.metering import measure
from grinqh_ao.model import set_bits, summary
from grinqh_ao.torchao_tensor import GrinqhTensor

__version__ = "0.1.0"

__all__ = [
    "GrinqhConfig",
    "GrinqhTensor",
    "all_but_head",
    "calibrate",
    "decode_every_row",
    "evaluate",
    "fuse_projections",
    "measure",
    "reference",
    "set_bits",
    "summary",
    "token_batches",
    "unfuse_projections",
]
