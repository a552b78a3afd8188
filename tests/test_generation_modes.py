"""``generate()`` in all its modes: equal to a model of the same rule in plain float64."""

import copy

import pytest
import torch
import transformers
from torchao.quantization import quantize_

import plain
from grinqh_ao import GrinqhConfig
from models import tiny_model

FAMILIES = ["llama", "qwen3", "gemma3", "mistral", "phi", "qwen3_moe", "gpt_oss"]
NEW_TOKENS = 8
PROMPT = torch.tensor([[5, 17, 99, 5, 17, 42, 7, 5, 17, 99, 3]])


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    """A quantized model, one of the same rule, and an assistant for both."""
    model = tiny_model(request.param, tied=request.param != "phi")
    quantize_(model, GrinqhConfig(bits=3))
    assistant = tiny_model("llama", tied=True)
    return model, plain.plain_model(copy.deepcopy(model)), assistant


def padded(rows):
    """Prompts of several lengths, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


ONE = padded([PROMPT[0].tolist()])
EVEN = padded([[5, 17, 99, 3], [8, 2, 250, 77], [300, 1, 2, 3]])
UNEVEN = padded([[5, 17, 99, 3, 8, 120], [8, 2], [300]])
MANY = padded([[5 + i, 17, 99 + i, 3] for i in range(10)])  # more rows than are decoded together

MODES = {
    "greedy": (ONE, {}),
    "short prompt": (padded([[5, 17, 99]]), {}),
    "sampling": (ONE, {"do_sample": True, "temperature": 0.7, "top_k": 20}),
    "beams": (ONE, {"num_beams": 3}),
    "batch": (EVEN, {}),
    "large batch": (MANY, {}),
    "left padding": (UNEVEN, {}),
    "beams, left padding": (UNEVEN, {"num_beams": 2}),
    "assisted": (ONE, {"assistant_model": True}),
    "prompt lookup": (ONE, {"prompt_lookup_num_tokens": 3}),
    "static cache": (ONE, {"cache_implementation": "static"}),
    "no cache": (ONE, {"use_cache": False}),
    "repetition penalty": (ONE, {"repetition_penalty": 1.3}),
}


def generate(model, inputs, assistant, **options):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0} | options
    if options.get("assistant_model"):
        options["assistant_model"] = assistant
    transformers.set_seed(0)
    return model.generate(**inputs, **options).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_equals_a_plain_model(models, mode):
    model, same, assistant = models
    inputs, options = MODES[mode]
    found = generate(model, inputs, assistant, **options)
    assert found == generate(same, inputs, assistant, **options)
    assert len({tuple(row) for row in found}) == len(found)


def compiled(model):
    """What a compiled model generates, and how many graphs that took."""
    graphs = []

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward

    config = transformers.CompileConfig(fullgraph=True, backend=backend)
    config._compile_all_devices = True
    torch._dynamo.reset()
    options = {"cache_implementation": "static", "compile_config": config}
    return generate(model, ONE, None, **options), len(graphs)


def test_static_cache_compiled(models):
    """As ``generate()`` does by itself on GPUs; in no more graphs than a dense model."""
    model, same, _ = models
    found, graphs = compiled(model)
    assert found == generate(same, ONE, None, cache_implementation="static")
    family = {"gemma3_text": "gemma3"}.get(model.config.model_type, model.config.model_type)
    assert 0 < graphs <= compiled(tiny_model(family, tied=True))[1]


def test_static_cache_compiled_by_inductor():
    model = tiny_model("llama", tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    expected = generate(model, ONE, None, cache_implementation="static")
    config = transformers.CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    assert generate(model, ONE, None, **options) == expected
