"""EleutherAI's lm-evaluation-harness on quantized models (extra ``eval``).

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
from torch import Tensor, nn
from torchao.quantization import quantize_

from grinqh_ao.batches import FIRST_POSITIONS
from grinqh_ao.config import GrinqhConfig
from grinqh_ao.decode_rule import decode_every_row
from grinqh_ao.model import is_quantized, set_bits, summary


@register_model("grinqh")
class GrinqhLM(HFLM):
    """lm-eval's ``HFLM``, with the weights quantized and read as decoding reads them.

    Texts are generated as ever, a dense prefill and then decoding, but one at a time whatever the
    batch size: texts that are decoded together share what is read, and read more than ``bits``.
    Likelihoods (multiple choice, perplexity) come from one pass with the decode rule on every
    token after the first ``dense_prefix``, as if each had been generated.

    Args:
        pretrained: a hub id, a directory, or a model, quantized already or not.
        bits: average bits read per weight and token. None keeps those of a quantized model, and
            is 3 for others.
        head_bits: see :class:`grinqh_ao.GrinqhConfig`; only for models not quantized yet.
        dense_prefix: positions at the start of a text that take the dense path in likelihoods.
        options: of ``HFLM``: ``tokenizer``, ``batch_size``, ``dtype``, ``device``, ``gguf_file``...
    """

    def __init__(
        self,
        pretrained: Any,
        bits: float | None = None,
        head_bits: float | None = 6.0,
        dense_prefix: int = FIRST_POSITIONS,
        **options: Any,
    ) -> None:
        config = GrinqhConfig(bits=3.0 if bits is None else bits, head_bits=head_bits)
        if not isinstance(dense_prefix, int) or dense_prefix < 0:
            raise ValueError(f"dense_prefix={dense_prefix!r}: expected a whole number, 0 or more")
        super().__init__(pretrained=pretrained, **options)
        self.dense_prefix = dense_prefix
        if not is_quantized(self.model):
            quantize_(self.model, config)
        elif bits is not None:
            set_bits(self.model, bits)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad(), decode_every_row(self.dense_prefix):
            logits: Tensor = super()._model_call(inps, *args, **kwargs)
        return logits

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        mask = options.pop("attention_mask", torch.ones_like(context))
        texts = [
            super(GrinqhLM, self)._model_generate(
                context[i : i + 1], max_length, stop, attention_mask=mask[i : i + 1], **options
            )[0]
            for i in range(len(context))
        ]
        padded: Tensor = nn.utils.rnn.pad_sequence(
            texts, batch_first=True, padding_value=self.tokenizer.pad_token_id
        )
        return padded

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        info: dict[str, Any] = super().get_model_info()
        return info | {
            "grinqh_bits": summary(self.model).bits,
            "grinqh_dense_prefix": self.dense_prefix,
        }


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
