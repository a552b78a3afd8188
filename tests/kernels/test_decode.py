"""The CUDA kernels of ``grinqh::decode_linear``, interpreted on the CPU, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import plain
from grinqh_ao import GrinqhTensor
from grinqh_ao.ops.triton import decode as launching
from grinqh_ao.ops.triton.configurations import Configuration, Gpu, form_of
from grinqh_ao.ops.triton.decode import Weight, launch
from grinqh_ao.ops.triton.lists import SELECT
from grinqh_ao.slices import drop_low
from plain import absolute, laplace

LEVEL_SETS = [(0, 2, 4, 6, 8), (0, 2, 4, 8), (2, 4, 8), (0, 2), (4,), (0, 6)]
# Of the largest output. Tensor cores take activations times scales in float16.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


AMPERE, TURING = 80, 75


def decode_together(x, weights, biases, chunk=None, mean=None, capability=AMPERE):
    counters = torch.zeros(sum(w.slices.shape[0] for w in weights), dtype=torch.int32)
    arguments = [
        Weight(w.slices, w.scales, w.vectors, bias, w.low)
        for w, bias in zip(weights, biases, strict=True)
    ]
    form = form_of(capability, x.dtype, weights[0].slices.shape[2])
    cut = Configuration(form, chunk or x.shape[-1])
    found = launch(x, arguments, weights[0].levels, cut, counters, mean=mean, interpret=True)
    assert not counters.any()  # as the next launch needs them
    return found


def decode(x, weight, bias=None, chunk=None, mean=None, capability=AMPERE):
    return decode_together(x, [weight], [bias], chunk, mean, capability)[0]


def assert_decoded(x, weight, bias=None, chunk=None, capability=AMPERE):
    found = decode(x, weight, bias, chunk, capability=capability)
    expected = plain.decode_together(x, weight, bias)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    allowed = TOLERANCE[x.dtype] * float(expected.abs().max())
    allowed += torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps  # of the result
    assert float((found.double() - expected).abs().max()) <= allowed


def compact(weight: GrinqhTensor, share: float) -> GrinqhTensor:
    weight.slices, weight.low = drop_low(weight.slices, torch.rand(weight.shape[1]) < share)
    return weight


@st.composite
def cases(draw):
    n, k = draw(st.integers(1, 600)), draw(st.integers(1, 100))
    levels = draw(st.sampled_from(LEVEL_SETS))
    bits = draw(st.floats(max(levels[0], 0.5), levels[-1]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.randn(n, k) * torch.rand(k)
    dense[:, draw(st.integers(0, k - 1))] = 0
    weight = GrinqhTensor.from_hp(dense, bits, levels)
    if weight.can_be_compact and draw(st.booleans()):
        compact(weight, draw(st.sampled_from([0.0, 0.1, 0.6])))
    if draw(st.booleans()):
        absolute(weight, *weight.thresholds[1].clamp(max=1e30))
    rows = draw(st.sampled_from([1, 1, 1, 2, 3, 5, 8]))
    x = laplace(rows, k).to(draw(st.sampled_from(DTYPES)))
    bias = torch.randn(n).to(x.dtype) if draw(st.booleans()) else None
    return weight, x, bias, draw(st.integers(1, k))


@settings(max_examples=20)
@given(cases())
def test_equals_the_rule(case):
    weight, x, bias, chunk = case
    assert_decoded(x, weight, bias, max(chunk, weight.shape[1] // 2))


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [64, 128, 256, 512])
def test_every_tile_width_and_number_of_rows(n, rows):
    weight = GrinqhTensor.from_hp(torch.randn(n, 40), bits=4)
    assert weight.tile == n
    assert_decoded(laplace(rows, 40), weight, chunk=25)
    assert_decoded(laplace(rows, 40).half(), weight, chunk=25)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("n", [64, 512])
def test_compact_storage(n, rows):
    """Channels without low slices are read at 4 bits however large their activations are."""
    weight = compact(GrinqhTensor.from_hp(torch.randn(n, 40), bits=6), 0.4)
    x = laplace(rows, 40)
    assert set(plain.levels_of(x[0], weight)) >= {4, 8}
    assert_decoded(x, weight, chunk=25)
    assert_decoded(x.half(), weight, chunk=25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "rows"), [(256, 1), (512, 1), (512, 3), (512, 8)])
def test_halves_in_float32_arithmetic(n, rows, dtype):
    """As Turing takes them."""
    weight = GrinqhTensor.from_hp(torch.randn(n, 60), bits=4)
    bias = torch.randn(n).to(dtype)
    assert_decoded(laplace(rows, 60).to(dtype), weight, bias, chunk=25, capability=TURING)


@pytest.mark.parametrize("n", [256, 512])
def test_the_longest_chunks(n):
    weight = GrinqhTensor.from_hp(torch.randn(n, 1100), bits=3)
    assert_decoded(laplace(1, 1100).half(), weight, chunk=512)


@pytest.mark.parametrize(
    ("dtype", "smallest"),
    # Triton's interpreter misreads subnormal bfloat16.
    [(torch.float32, 2.0**-132), (torch.bfloat16, 2.0**-110)],
    ids=str,
)
@pytest.mark.parametrize("n", [128, 256])
def test_rows_are_as_accurate_as_alone_whatever_their_magnitudes(n, dtype, smallest):
    weight = GrinqhTensor.from_hp(torch.randn(n, 40), bits=8)
    x = (laplace(4, 40) * torch.tensor([2.0**120, 1, 2.0**-60, smallest])[:, None]).to(dtype)
    found = decode(x, weight, chunk=25)
    expected = plain.decode_together(x, weight)
    allowed = TOLERANCE[dtype] * expected.abs().amax(1, keepdim=True)
    allowed += 16 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(((found.double() - expected).abs() <= allowed).all())


def test_equal_inputs_give_equal_bits_whatever_the_memory_held():
    weight = GrinqhTensor.from_hp(torch.randn(256, 60))
    for x in (laplace(1, 60), laplace(1, 60).half()):
        found = decode(x, weight, chunk=20)
        assert torch.equal(found, decode(x, weight, chunk=20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestEdges:
    @pytest.fixture
    def weight(self) -> GrinqhTensor:
        torch.manual_seed(0)
        return GrinqhTensor.from_hp(torch.randn(250, 70))

    def test_all_skipped(self, weight, dtype):
        absolute(weight, 9, 9, 9, 9)
        bias = torch.randn(250).to(dtype)
        assert not decode(laplace(1, 70).to(dtype).clamp(-8, 8), weight).any()
        assert torch.equal(decode(torch.ones(1, 70, dtype=dtype), weight, bias)[0], bias)

    @pytest.mark.parametrize("slices", [1, 2, 3, 4])
    def test_all_at_one_level(self, weight, dtype, slices):
        absolute(weight, *[0.0] * slices, *[100.0] * (4 - slices))
        x = laplace(1, 70).to(dtype) + 0.1
        assert plain.levels_of(x[0], weight) == [2 * slices] * 70
        assert_decoded(x, weight, chunk=30)

    def test_one_active_channel(self, weight, dtype):
        absolute(weight, 1, 2, 3, 4)
        x = torch.full((1, 70), 0.5, dtype=dtype)
        for channel, value in [(0, 1.5), (69, -3.5), (31, 5.0)]:
            one = x.clone()
            one[0, channel] = value
            assert_decoded(one, weight, chunk=32)

    def test_ties_at_a_threshold(self, weight, dtype):
        absolute(weight, 0.25, 0.5, 1, 2)
        x = torch.tensor([0.25, -0.5, 1, -2, 2.0, 0, 3]).repeat(10)[None].to(dtype)
        assert plain.levels_of(x[0], weight)[:7] == [0, 2, 4, 6, 6, 0, 8]
        assert_decoded(x, weight)

    def test_negative_zero(self, weight, dtype):
        x = laplace(1, 70).to(dtype)
        x[0, ::2] = -0.0
        assert_decoded(x, weight)
        assert not decode(torch.full((1, 70), -0.0, dtype=dtype), weight).any()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_reaches_every_output(self, weight, dtype, value):
        x = laplace(1, 70).to(dtype)
        x[0, 3] = value
        found = decode(x, weight, chunk=30)
        assert not torch.isfinite(plain.decode_together(x, weight)).any()
        assert not torch.isfinite(found).any()

    def test_extreme_sizes(self, weight, dtype):
        largest = torch.finfo(dtype).max
        x = laplace(1, 70).clamp(-8, 8)
        for size in (largest / 2**40, 1e-6, max(torch.finfo(dtype).tiny * 4, 2.0**-100)):
            assert_decoded((x * size).to(dtype), weight)

    def test_outliers(self, weight, dtype):
        """Massive activations must not take the precision of the others."""
        x = laplace(1, 70)
        x[0, 5] = 3000
        dense = torch.randn(250, 70)
        dense[:, 5] = 0
        weight = absolute(GrinqhTensor.from_hp(dense), 0.0, 0.0, 0.0, 0.0)
        assert_decoded(x.to(dtype), weight)


def test_truth_table_of_the_instruction_that_is_not_interpreted():
    table = int(SELECT.value.rpartition(",")[2].strip(" ;"), 16)
    a, b, mask = 0xF0, 0xCC, 0xAA  # by definition of lop3
    assert table == (a & ~mask) | (b & mask)


@pytest.mark.parametrize(
    ("sizes", "dtype", "stored_compactly"),
    [
        ((500, 1000), torch.float32, False),
        ((500, 1000), torch.bfloat16, False),
        ((230, 250, 256), torch.float32, False),
        ((230, 250, 256), torch.float16, True),
        ((40, 64), torch.float16, True),
        ((40, 64), torch.bfloat16, False),
    ],
    ids=str,
)
def test_several_weights_in_one_launch(sizes, stored_compactly, dtype):
    """Each with its own thresholds and number of outputs; a bias where there is one."""
    x = laplace(1, 60).to(dtype)
    weights = [GrinqhTensor.from_hp(torch.randn(size, 60), 1.0 + i) for i, size in enumerate(sizes)]
    if stored_compactly:
        weights = [compact(weight, 0.2 * i) for i, weight in enumerate(weights)]
    biases = [None, *(torch.randn(size).to(dtype) for size in sizes[1:])]
    found = decode_together(x, weights, biases, chunk=25)
    for y, weight, bias in zip(found, weights, biases, strict=True):
        assert torch.equal(y, decode(x, weight, bias, chunk=25))
    for without in decode_together(x, weights, [None] * len(sizes), chunk=60):
        assert without.isfinite().all()


@pytest.mark.parametrize(
    ("n", "dtype"),
    [*((40, dtype) for dtype in DTYPES), (300, torch.float32), (300, torch.bfloat16)],
    ids=str,
)
def test_experts(n, dtype):
    """Rows with the experts they are routed to, some of them the same, each with its thresholds."""
    weights = [GrinqhTensor.from_hp(torch.randn(n, 40), 1.5 + i) for i in range(3)]
    absolute(weights[2], 0.25, 0.5, 1, 2)
    stack = GrinqhTensor.stack(weights)
    experts = torch.tensor([2, 0, 2])
    x = laplace(3, 40).to(dtype)
    arguments = Weight(stack.slices, stack.scales, stack.vectors, None, None)
    counters = torch.zeros(3 * stack.slices.shape[1], dtype=torch.int32)
    cut = Configuration(form_of(AMPERE, dtype, stack.slices.shape[-1]), chunk=25)
    (found,) = launch(x, [arguments], stack.levels, cut, counters, experts, interpret=True)
    assert not counters.any()
    for row, y, expert in zip(x, found, experts, strict=True):
        assert torch.equal(y[None], decode(row[None], weights[expert], chunk=25))


H100, T4 = Gpu(90, 132), Gpu(75, 40)


def interpret_as_on(gpu, monkeypatch):
    """What a GPU would be asked for, interpreted; the configurations that will be chosen."""
    chosen = []

    def interpreted(x, weights, levels, configuration, counters, *args, **kwargs):
        chosen.append(configuration)
        late = configuration._replace(early=False)
        return launch(x, weights, levels, late, counters, *args, **kwargs, interpret=True)

    zeros = lambda tiles, device: torch.zeros(tiles, dtype=torch.int32)  # noqa: E731
    monkeypatch.setattr(launching, "gpu_of", lambda index: gpu)
    monkeypatch.setattr(launching, "arrivals", zeros)
    monkeypatch.setattr(launching, "launch", interpreted)
    return chosen


@pytest.mark.parametrize(
    ("gpu", "dtype", "form"),
    [(H100, torch.float32, "fma"), (H100, torch.bfloat16, "mma"), (T4, torch.float16, "fma")],
    ids=str,
)
def test_what_ops_launch(gpu, dtype, form, monkeypatch):
    chosen = interpret_as_on(gpu, monkeypatch)
    x = laplace(2, 140).to(dtype)
    weights = [GrinqhTensor.from_hp(torch.randn(n, 140), 3) for n in (230, 250)]
    arguments = [Weight(w.slices, w.scales, w.vectors, None, w.low) for w in weights]
    found = launching.decode_linears(x, arguments, weights[0].levels)
    for y, weight in zip(found, weights, strict=True):
        expected = plain.decode_together(x, weight, None)
        allowed = TOLERANCE[dtype] * float(expected.abs().max())
        assert float((y.double() - expected).abs().max()) <= allowed

    stack = GrinqhTensor.stack([weights[1], weights[1]])
    experts = Weight(stack.slices, stack.scales, stack.vectors, None, None)
    routed = launching.decode_experts(x, torch.tensor([1, 0]), experts, stack.levels)
    for row, y in zip(x, routed, strict=True):
        assert torch.equal(y[None], decode(row[None], weights[1], None, 128, None, gpu.capability))
    assert [each[:3] for each in chosen] == [(form, 128, True)] * 2
    assert all(each.early == (gpu is H100) and each.speculative for each in chosen)


def test_each_row_grades_with_its_own_mean():
    weight = GrinqhTensor.from_hp(torch.randn(256, 60))
    x = laplace(2, 60)
    assert_decoded(torch.stack([x[0], x[1] * 1000]).half(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_parts_grade_with_the_mean_of_the_whole(rows, dtype):
    weight = GrinqhTensor.from_hp(torch.randn(256, 60), 3)
    weight.sensitivity.copy_(torch.rand(60))
    x = laplace(rows, 60).to(dtype)
    x[:, 40:] *= 5
    mean = (x.abs().float() * weight.sensitivity).mean(1)
    parts = [decode(x[:, at], weight[:, at], mean=mean) for at in (slice(0, 40), slice(40, 60))]
    expected = plain.decode_together(x, weight, None)
    allowed = 2 * TOLERANCE[dtype] * float(expected.abs().max())
    assert float((sum(parts).double() - expected).abs().max()) <= allowed
    assert not torch.equal(parts[0], decode(x[:, :40], weight[:, :40]))  # it matters


def test_a_row_that_overflowed_leaves_the_others_alone():
    weight = absolute(GrinqhTensor.from_hp(torch.randn(256, 60)), 0.5, 1, 2, 3)
    x = laplace(2, 60).half()
    x[:, 3] = torch.tensor([1e4, 0])
    expected = plain.decode_together(x, weight)[1]
    x[0, 3] = float("inf")  # read at the highest level, as 1e4 is
    found = decode(x, weight)
    assert not found[0].isfinite().any()
    assert (found[1] - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_arguments_need_not_be_contiguous():
    weight = GrinqhTensor.from_hp(torch.randn(300, 50))
    assert_decoded(laplace(50, 2).half().t(), weight)


def test_what_does_not_fit_is_refused():
    weight = GrinqhTensor.from_hp(torch.randn(70, 12))
    x, bias = laplace(1, 12), torch.randn(70)
    decode(x, weight, bias)
    with pytest.raises(ValueError, match=r"x of shape \(1, 16\) does not fit"):
        decode(laplace(1, 16), weight)
    with pytest.raises(ValueError, match="70 outputs, or its bias"):
        decode(x, weight, bias[:64])
    for name, wrong in (
        ("slices", weight.slices[:, :-1]),
        ("scales", weight.scales[:, :-1]),
        ("vectors", torch.cat([weight.vectors, torch.ones(60)])),
        ("low", torch.zeros(11, dtype=torch.int32)),
    ):
        harmed = weight.with_data(lambda data: data)
        setattr(harmed, name, wrong)
        with pytest.raises(ValueError, match="does not fit"):
            decode(x, harmed)
    stack = GrinqhTensor.stack([weight, weight])
    arguments = Weight(stack.slices, stack.scales, stack.vectors, None, None)
    cut, counters = Configuration("fma", chunk=16), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="or its bias, low or experts"):
        launch(x, [arguments], stack.levels, cut, counters, torch.tensor([0, 1]))
