"""``save`` and ``load``: a quantized model with all that others need to use it."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from grinqh_ao.huggingface.atomic import replaced
from grinqh_ao.huggingface.config import QUANT_METHOD
from grinqh_ao.huggingface.quantizer import attach
from grinqh_ao.model import summary

_MODULE = "modeling_grinqh"
# Options of from_pretrained that configs are found by, too.
_OF_CONFIGS = (
    "revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code",
    "code_revision",
)  # fmt: skip

_CODE = '''"""For trust_remote_code=True: lets transformers load this, with grinqh_ao installed."""

import grinqh_ao  # noqa: F401
import transformers


class {config}(transformers.{config}):
    pass


class {architecture}(transformers.{architecture}):
    pass
'''

_CARD = """---
library_name: transformers
tags:
- grinqh
---

# {title}

Quantized with [GRINQH](https://arxiv.org/abs/2606.23419), by grinqh_ao {version}: at every decode
step each input channel is read at 0, 2, 4, 6 or 8 bits, as its activation deserves.

```
{summary}
```

## How to load it

With grinqh_ao and its extra `hf` installed:

```python
import grinqh_ao  # before from_pretrained: it teaches transformers the format

model = grinqh_ao.load("{name}")
grinqh_ao.set_bits(model, 2.5)  # average bits read per weight and token, at any time
```

`AutoModelForCausalLM.from_pretrained` does the same after the import; without it, loading fails.
Programs that import nothing, such as `transformers serve`, need `--trust-remote-code`.
"""


def save(
    model: PreTrainedModel,
    directory: str | PathLike[str],
    tokenizer: Any = None,
    **options: Any,
) -> None:
    """``model.save_pretrained(directory)``, all or nothing, and with what makes it easy to load.

    Writes beside ``directory`` first, and then puts that in its place: a model that was saved there
    before is either as it was, or replaced as a whole, even if the process is killed or the disk is
    full. Room for both is needed. Other files of the directory stay. (A mount point, the current
    directory, or one whose parent cannot be written to: :func:`.atomic.replaced`.)

    Adds a model card that says how, unless there is a README.md already, and a module that lets
    programs without ``import grinqh_ao`` load it with ``trust_remote_code=True``.

    Args:
        model: a model with weights quantized by GRINQH in any way.
        directory: made if need be.
        tokenizer: of transformers; saved too.
        options: of ``save_pretrained``: ``max_shard_size``, for example.

    Raises:
        ValueError: ``model`` is none of transformers, nothing in it is quantized by GRINQH, or
            something by another quantizer, or it has PEFT's adapters, which transformers would save
            instead, or is under tensor parallelism; or ``directory`` is empty; or it is to be
            pushed to the hub: ``push_to_hub`` uploads the weights alone, and
            ``huggingface_hub.upload_folder`` the whole directory. Nothing was written.
        OSError: it could not be written; ``directory`` is as it was.
    """
    from grinqh_ao import __version__

    model = getattr(model, "_orig_mod", model)  # of what torch.compile(model) gave
    if options.get("push_to_hub"):
        raise ValueError(
            "push_to_hub=True: it would upload the weights without the rest; save first, then "
            "huggingface_hub.upload_folder(repo_id=..., folder_path=directory)"
        )
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"model={type(model).__name__}: has adapters: save them with model.save_pretrained, to "
            "another directory, and the quantized model without them, before they are added"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(  # noqa: TRY004
            f"model={type(model).__name__}: expected a model of transformers; the state_dict of "
            "others can be saved and loaded by torch.save and torch.load"
        )
    if not os.fspath(directory):
        raise ValueError("directory='': expected the name of a directory")
    attach(model)
    path = Path(directory)
    config: Any = model.config
    architecture = type(model).__name__
    # The names of a model that was itself loaded through such a module are the same.
    names = {"config": type(config).__name__, "architecture": architecture}
    known = all(hasattr(transformers, name) for name in names.values())
    before = getattr(config, "auto_map", None)
    if known:
        config.auto_map = {
            "AutoConfig": f"{_MODULE}.{names['config']}",
            auto_class_of(architecture): f"{_MODULE}.{architecture}",
        }
    try:
        with replaced(path) as staging:
            _save_pretrained(model, staging, options)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            if known:
                (staging / f"{_MODULE}.py").write_text(_CODE.format(**names))
            if not (path / "README.md").exists():
                base = Path(getattr(config, "_name_or_path", "") or architecture).name
                text = _CARD.format(
                    title=f"{base}, GRINQH", version=__version__, summary=summary(model),
                    name=path.name,
                )  # fmt: skip
                (staging / "README.md").write_text(text)
    finally:
        if before is not None:
            config.auto_map = before
        elif known:
            del config.auto_map


def _save_pretrained(model: PreTrainedModel, directory: Path, options: dict[str, Any]) -> None:
    try:
        model.save_pretrained(directory, **options)
    except SafetensorError as error:
        raise OSError(f"{directory}: {error}") from error


def auto_class_of(architecture: str) -> str:
    """The name of transformers' class that loads models of a class, by its name."""
    _, separator, task = architecture.rpartition("For")
    if not separator:
        return "AutoModel"
    auto = f"AutoModelFor{task}"
    return auto if hasattr(transformers, auto) else "AutoModelForImageTextToText"


def load(path: str | PathLike[str], **options: Any) -> Any:
    """A saved model, from a directory or a hub id, in evaluation mode.

    Args:
        options: of ``from_pretrained``: ``dtype``, ``device_map``, for example.

    Raises:
        ValueError: it is not a model quantized by GRINQH.
        CheckpointError: its files are not what they should be.
    """
    hub = {key: options[key] for key in _OF_CONFIGS if key in options}
    config = AutoConfig.from_pretrained(path, **hub)
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method != QUANT_METHOD:
        raise ValueError(
            f"{path}: expected a model quantized by GRINQH, found quant_method={method!r}; to "
            "quantize it while loading, give from_pretrained a quantization_config=GrinqhHfConfig()"
        )
    architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
    model_class = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    return model_class.from_pretrained(path, **options)
