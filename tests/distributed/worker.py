"""What each rank of test_tensor_parallel.py does: ``worker.py JOBS``.

JOBS is a JSON file: a list of [name, model, how]. A report of each is written beside it. Many at
once, since processes take longer to start than to do one.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

import grinqh_ao
from grinqh_ao.model import quantized_linears


def touched(file: Path) -> int:
    """Bytes of a file that this process has read through mappings of it."""
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            resident += 1024 * int(line.split()[1])
    return resident


def report_of(model_path: str, how: str, place: Path) -> dict[str, Any]:
    options = {"tp_plan": "auto"} if "RANK" in os.environ else {}
    if how == "quantize":
        options["quantization_config"] = grinqh_ao.GrinqhHfConfig(bits=3)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_path, **options)
    except ValueError as error:
        return {"error": str(error)}
    report = {"shapes": {name: list(w.shape) for name, _, w in quantized_linears(model)}}
    ids = torch.arange(5, 17)[None]
    for bits in (3, 2):
        grinqh_ao.set_bits(model, bits)
        for rows in (1, 2):
            prompts = torch.cat([ids + 3 * row for row in range(rows)])
            made = model.generate(
                prompts, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0,
                attention_mask=torch.ones_like(prompts), output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            logits = torch.stack(made.logits)
            first, second = logits.topk(2).values.unbind(-1)
            what = f"{bits} bits, {rows} rows"
            report[what] = made.sequences[:, prompts.shape[1] :].tolist()
            report[f"{what}: lead"] = ((first - second).amin(1) / logits.std()).tolist()  # of steps
    file = next(Path(model_path).glob("*.safetensors")).resolve()
    report["read"] = touched(file) / file.stat().st_size
    for attempt in ("save", "calibrate"):
        try:
            if attempt == "save":
                grinqh_ao.save(model, place)
            else:
                grinqh_ao.calibrate(model, [ids])
        except ValueError as error:
            report[attempt] = str(error)
    return report


jobs = Path(sys.argv[1])
for name, model_path, how in json.loads(jobs.read_text()):
    report = report_of(model_path, how, jobs.parent / f"{name}-saved")
    if os.environ.get("RANK", "0") == "0":
        (jobs.parent / f"{name}.json").write_text(json.dumps(report))
if distributed.is_initialized():
    distributed.destroy_process_group()
