"""Whole models of 8B shape with random weights: quantizing, and unchanged ``generate()``.

Each model is in a process of its own: all compile at a time, if the GPU has room for them, and then
generate in turn.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torchao.quantization import Int4WeightOnlyConfig, quantize_

from gpu_suite import timing
from grinqh_ao import GrinqhConfig, calibrate, defer_stop_checks, fuse_projections, set_bits

# And the bits of each; the most telling first.
KINDS: dict[str, Sequence[float | None]] = {
    "bf16": [None],
    "grinqh": [3, 2, 4],
    "torchao int4": [None],
}
# What docs/transformers.md recommends, alone and together, and generate() as it comes.
WAYS = ("", ", deferred", ", unchecked", ", deferred, unchecked")
ROOM_FOR_ALL = 72 << 30  # as long as their dense weights are all there
NEW_TOKENS = 128
PROMPT = 32
CALIBRATION = 256
ROUNDS = 2
PROFILED_TOKENS = 16
MAX_KERNELS = 12


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


class Model:
    """One that has generated once, and so is compiled."""

    @torch.no_grad()  # as generate() is
    def __init__(self, kind: str, model_class: Any, config: Any) -> None:
        self.model: Any = build(model_class, config)
        self.facts: dict[str, Any] = {"weights": sum(p.numel() for p in self.model.parameters())}
        begin = time.perf_counter()
        if kind == "grinqh":
            quantize_(self.model, GrinqhConfig(bits=3))
            timing.wait()
            self.facts["quantize_seconds"] = time.perf_counter() - begin
            text = torch.randint(0, config.vocab_size, (1, CALIBRATION), device=timing.DEVICE)
            calibrate(self.model, text, importance=False)  # so that thresholds are static
            fuse_projections(self.model)  # kernels.fused_projections has them apart
        elif kind == "torchao int4":
            quantize_(
                self.model, Int4WeightOnlyConfig(128, int4_packing_format="tile_packed_to_4d")
            )
        begin = time.perf_counter()
        generate(self.model, Clock())
        self.facts["first_generate_seconds"] = time.perf_counter() - begin

    def seconds(self, bits: float | None, way: str) -> tuple[list[float], float, list[int]]:
        """Of every token after the second, and of all of ``generate()``: its static cache is a new
        one, for which the compiled model is captured again at the second token. And the tokens.

        Args:
            way: one of WAYS. "deferred": whether to stop is looked at a token later. "unchecked":
                it is not checked whether what was compiled still holds.
        """
        self.read(bits)
        defer_stop_checks("deferred" in way)
        clock = Clock()
        begin = time.perf_counter()
        try:
            with torch.compiler.set_stance(skip_guard_eval_unsafe="unchecked" in way):
                tokens = generate(self.model, clock)
        finally:
            defer_stop_checks(False)
        all_of_it = time.perf_counter() - begin
        times = clock.times[2:]  # the prompt and the first token came before
        return [b - a for a, b in itertools.pairwise(times)], all_of_it, tokens

    def kernels(self, bits: float | None) -> dict[str, float]:
        """Microseconds that a token's kernels take, those that take most by name; what
        ``generate()`` takes beyond "all", the device waits for the host, or kernels for others."""
        self.read(bits)
        profiler = Profiler()
        generate(self.model, profiler)
        kind = "self_device_time_total" if timing.DEVICE == "cuda" else "self_cpu_time_total"
        events = profiler.profile.key_averages()
        times = {e.key: getattr(e, kind) / profiler.tokens for e in events}
        longest = sorted(times, key=lambda name: -times[name])[:MAX_KERNELS]
        return {"all": sum(times.values())} | {name[:120]: times[name] for name in longest}

    def read(self, bits: float | None) -> None:
        if bits is not None:
            set_bits(self.model, bits)


class Here:
    """A model in this process."""

    def __init__(self, *arguments: Any) -> None:
        self.model = Model(*arguments)

    def facts(self) -> dict[str, Any]:
        return self.model.facts

    def ask(self, method: str, *arguments: Any) -> Any:
        return getattr(self.model, method)(*arguments)

    def close(self) -> None:
        del self.model


class Elsewhere:
    """A model in another process, which makes it while this one goes on."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(
            target=serve, args=(there, timing.DEVICE, *arguments), daemon=True
        )
        self.process.start()
        there.close()

    def facts(self) -> dict[str, Any]:
        """Waits for the model."""
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, *question: Any) -> Any:
        self.connection.send(question)
        return self.facts()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def serve(connection: Any, device: str, *arguments: Any) -> None:
    timing.DEVICE = device
    try:
        model = Model(*arguments)
        connection.send(model.facts)
        while True:
            method, *arguments = connection.recv()
            connection.send(getattr(model, method)(*arguments))
    except Exception as error:  # many cannot be sent as they are
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"[:300]))


def measure(model_class: Any, config: Any) -> dict[str, Any]:
    result: dict[str, Any] = {
        "tokens_per_second": {},  # by the median of the tokens after the second
        "new_tokens_per_second": {},  # of all of generate()
        "kernels_us_per_token": {},
        "same_tokens": {},  # as generate() gives as it comes
    }
    on_gpu = timing.DEVICE == "cuda"
    room = on_gpu and torch.cuda.mem_get_info()[0] > ROOM_FOR_ALL
    for group in [list(KINDS)] if room else [[kind] for kind in KINDS]:
        place: Any = Elsewhere if on_gpu else Here
        models = {kind: place(kind, model_class, config) for kind in group}
        try:
            measure_in_turn(models, result)
        finally:
            for model in models.values():
                model.close()
    result["problems"] = problems_of(result)
    return result


def problems_of(result: dict[str, Any]) -> list[str]:
    """What makes a run a failure. That another quantizer's model does not run here does not."""
    ours = [name for name in result if name.startswith("grinqh")]
    found = [f"{name}: {result[name]}" for name in ours if isinstance(result[name], str)]
    same = result["same_tokens"].items()
    return found + [f"{name}: other tokens" for name, is_same in same if not is_same]


def measure_in_turn(models: dict[str, Any], result: dict[str, Any]) -> None:
    candidates: dict[str, tuple[Any, float | None, str]] = {}
    for kind, model in models.items():
        try:
            result[kind] = model.facts()
        except Exception as error:  # not for this GPU
            result[kind] = f"{type(error).__name__}: {error}"[:300]
        else:
            for bits in KINDS[kind]:
                name = kind if bits is None else f"{kind} {bits:g}, fused"
                for way in WAYS:
                    candidates[name + way] = model, bits, way
        print(f"{kind}: {result[kind]}", flush=True)
    of_tokens: dict[str, list[float]] = {name: [] for name in candidates}
    of_all: dict[str, list[float]] = {name: [] for name in candidates}
    tokens: dict[str, list[int]] = {}
    for _ in range(ROUNDS):
        for name, (model, bits, way) in list(candidates.items()):
            try:
                times, all_of_it, tokens[name] = model.ask("seconds", bits, way)
            except Exception as error:  # its process has ended; the others stand
                result[name] = f"{type(error).__name__}: {error}"[:300]
                del candidates[name]
                continue
            of_tokens[name] += times
            of_all[name].append(all_of_it)
            print(f"{name}: {1e3 * statistics.median(times):.2f} ms a token", flush=True)
    for name, (model, bits, way) in candidates.items():
        median = statistics.median(of_tokens[name])
        result["tokens_per_second"][name] = 1 / median
        result["new_tokens_per_second"][name] = NEW_TOKENS / statistics.median(of_all[name])
        if way:
            same = tokens[name] == tokens.get(name.removesuffix(way))
            result["same_tokens"][name] = same
            print(f"{name}: {1 / median:.1f} tokens/s, the same tokens: {same}", flush=True)
            continue
        try:
            kernels = model.ask("kernels", bits)
            result["kernels_us_per_token"][name] = kernels
            all_kernels = f"{kernels['all']:.0f}"
        except Exception as error:  # no profiler here; the speeds stand
            result["kernels"] = f"{type(error).__name__}: {error}"[:300]
            all_kernels = "?"
        print(
            f"{name}: {1 / median:.1f} tokens/s, {result['new_tokens_per_second'][name]:.1f} with "
            f"all; kernels take {all_kernels} of {1e6 * median:.0f} us a token",
            flush=True,
        )


class Clock:
    """A streamer that notes when tokens come. They are fetched for it, a moment before they would
    be waited for anyway."""

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
        self.tokens = 0  # that were watched
        activities = torch.profiler.ProfilerActivity
        on_gpu = timing.DEVICE == "cuda"
        self.profile = torch.profiler.profile(
            activities=[activities.CUDA if on_gpu else activities.CPU]
        )

    def put(self, tokens: torch.Tensor) -> None:
        super().put(tokens)
        if len(self.times) == 3:  # the prompt and two tokens
            self.profile.start()
        elif len(self.times) == 3 + PROFILED_TOKENS:
            self.stop()

    def end(self) -> None:
        if not self.tokens:
            self.stop()

    def stop(self) -> None:
        timing.wait()
        self.profile.stop()
        self.tokens = len(self.times) - 3


def generate(model: Any, clock: Clock) -> list[int]:
    """With a static cache, which compiles."""
    ids = torch.arange(PROMPT, device=timing.DEVICE)[None]
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
        cache_implementation="static", max_new_tokens=NEW_TOKENS, eos_token_id=None,
        streamer=clock,
    )  # fmt: skip
    return tokens[0].tolist()
