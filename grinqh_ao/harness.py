"""EleutherAI's lm-evaluation-harness on quantized models (``pip install grinqh-ao[eval]``).

    python -m grinqh_ao.harness --model grinqh \\
        --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,bits=3 --tasks gsm8k_cot

takes the arguments of ``lm_eval``. In Python, give ``GrinqhLM(pretrained=model, tokenizer=...)`` to
``lm_eval.simple_evaluate``.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torchao.quantization import quantize_

from grinqh_ao.config import GrinqhConfig
from grinqh_ao.decode_rule import decode_every_row
from grinqh_ao.model import quantized_linears, set_bits


@register_model("grinqh")
class GrinqhLM(HFLM):
    """lm-eval's ``HFLM``, with the weights quantized and read as decoding reads them.

    Texts are generated as ever: a dense prefill, then decoding. Likelihoods (multiple choice,
    perplexity) come from one pass with the decode rule on every token after the first ``prompt``,
    as if each had been generated.

    Args:
        pretrained: a hub id, a directory, or a model, quantized already or not.
        bits: average bits read per weight and token.
        head_bits: see :class:`grinqh_ao.GrinqhConfig`.
        prompt: positions at the start of a text that take the dense path in likelihoods.
        options: of ``HFLM``: ``tokenizer``, ``batch_size``, ``dtype``, ``device``, ``gguf_file``...
    """

    def __init__(
        self,
        pretrained: Any,
        bits: float = 3.0,
        head_bits: float | None = 6.0,
        prompt: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(pretrained=pretrained, **options)
        self.bits, self.prompt = bits, prompt
        if not any(True for _ in quantized_linears(self.model)):
            quantize_(self.model, GrinqhConfig(bits=bits, head_bits=head_bits))
        set_bits(self.model, bits)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad(), decode_every_row(self.prompt):
            logits: Tensor = super()._model_call(inps, *args, **kwargs)
        return logits

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"grinqh_bits": self.bits, "grinqh_prompt": self.prompt}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
