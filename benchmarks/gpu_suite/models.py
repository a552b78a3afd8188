"""Whole models of 8B shape with random weights: quantizing, and unchanged ``generate()``."""

from __future__ import annotations

import time
from typing import Any

import torch
from torchao.quantization import Int4WeightOnlyConfig, quantize_

from gpu_suite import timing
from grinqh_ao import GrinqhConfig, fuse_projections, set_bits

BITS = (3, 2, 4)  # the most telling first
NEW_TOKENS = 48
PROMPT = 32
REPETITIONS = 3
MOST_KERNELS = 12


def llama() -> dict[str, Any]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0,
        max_position_embeddings=8192,
    )  # fmt: skip
    return measure(transformers.LlamaForCausalLM, config)


def qwen3() -> dict[str, Any]:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=8192,
    )  # fmt: skip
    return measure(transformers.Qwen3ForCausalLM, config)


def build(model_class: Any, config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(timing.DEVICE):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return model_class(config).eval()
        finally:
            torch.set_default_dtype(previous)


@torch.no_grad()
def measure(model_class: Any, config: Any) -> dict[str, Any]:
    rows: dict[str, float] = {}
    first: dict[str, float] = {}  # compiles, unless it is other bits of the same graph
    kernels: dict[str, dict[str, float]] = {}  # microseconds per token
    result: dict[str, Any] = {
        "tokens_per_second": rows,
        "first_generate_seconds": first,
        "kernels_us_per_token": kernels,
    }

    def run(name: str) -> None:
        first[name], rows[name] = first_seconds_and_tokens_per_second(model)
        print(f"{name}: {rows[name]:.1f} tokens/s, at first {first[name]:.0f} s", flush=True)
        try:
            kernels[name] = kernels_per_token(model)
        except Exception as error:  # no profiler here; the speeds stand
            result["kernels"] = f"{type(error).__name__}: {error}"[:300]
        else:
            took, all_of_it = kernels[name]["all"], 1e6 / rows[name]
            print(f"  kernels take {took:.0f} of {all_of_it:.0f} us a token", flush=True)

    model = build(model_class, config)
    run("bf16")
    begin = time.perf_counter()
    quantize_(model, GrinqhConfig(bits=3))
    timing.wait()
    result["quantize_seconds"] = time.perf_counter() - begin
    result["weights"] = sum(p.numel() for p in model.parameters())
    print(f"{result['quantize_seconds']:.1f} s to quantize", flush=True)
    fuse_projections(model)  # kernels.fused_projections has them apart
    torch._dynamo.reset()
    for bits in BITS:
        set_bits(model, bits)
        run(f"grinqh {bits}, fused")
    del model
    torch.cuda.empty_cache()

    torch._dynamo.reset()
    model = build(model_class, config)
    try:
        quantize_(model, Int4WeightOnlyConfig(128, int4_packing_format="tile_packed_to_4d"))
        run("torchao int4")
    except Exception as error:  # not for this GPU
        result["torchao int4"] = f"{type(error).__name__}: {error}"[:300]
    return result


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Profiler(Clock):
    """Watches the device from the second token on, when prompt and warming up are over."""

    def __init__(self) -> None:
        super().__init__()
        activities = torch.profiler.ProfilerActivity
        on_gpu = timing.DEVICE == "cuda"
        self.profile = torch.profiler.profile(
            activities=[activities.CUDA if on_gpu else activities.CPU]
        )

    def put(self, tokens: torch.Tensor) -> None:
        super().put(tokens)
        if len(self.times) == 3:  # the prompt and two tokens
            self.profile.start()

    def end(self) -> None:
        timing.wait()
        self.profile.stop()


def generate(model: Any, clock: Clock) -> None:
    """With a static cache, which compiles."""
    ids = torch.randint(0, 100, (1, PROMPT), device=timing.DEVICE)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
        cache_implementation="static", max_new_tokens=NEW_TOKENS, eos_token_id=None,
        streamer=clock,
    )  # fmt: skip


def kernels_per_token(model: Any) -> dict[str, float]:
    """Microseconds that a token's kernels take, those that take most by name; what ``generate()``
    takes beyond "all" of them, the device waits for the host, or kernels for each other."""
    profiler = Profiler()
    generate(model, profiler)
    tokens = len(profiler.times) - 3
    kind = "self_device_time_total" if timing.DEVICE == "cuda" else "self_cpu_time_total"
    times = {e.key: getattr(e, kind) / tokens for e in profiler.profile.key_averages()}
    longest = sorted(times, key=lambda name: -times[name])[:MOST_KERNELS]
    return {"all": sum(times.values())} | {name[:120]: times[name] for name in longest}


def first_seconds_and_tokens_per_second(model: Any) -> tuple[float, float]:
    """Of ``generate()``: seconds at first, and the rate of decoding after the first token."""
    first, best = 0.0, 0.0
    for repetition in range(1 + REPETITIONS):
        clock = Clock()
        begin = time.perf_counter()
        generate(model, clock)
        if repetition == 0:
            first = time.perf_counter() - begin
        else:
            decoding = clock.times[-1] - clock.times[1]  # put() gets the prompt first
            best = max(best, (len(clock.times) - 2) / decoding)
    return first, best
