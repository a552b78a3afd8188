// grinqh::* as PyTorch's dispatcher calls them: no Python lies in between. Only PyTorch's stable
// ABI is used, whose headers compile fast.
//
// What the kernels do not take (float64, more than 8 rows, activations that are not finite) goes to
// the oracle: overload "oracle" of the same op.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "kernels.h"

namespace grinqh {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Levels = std::vector<int64_t>;

template <class Result, class... Arguments>
Result oracle(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "oracle", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

Tensor in_order(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

std::optional<Dtype> dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::FLOAT32;
    case ScalarType::BFloat16: return Dtype::BFLOAT16;
    case ScalarType::Half: return Dtype::FLOAT16;
    default: return std::nullopt;
  }
}

// The tensors of a weight [N, K], or of a stack of them, as ops/oracle.py describes them.
struct WeightTensors {
  Tensor slices, scales, vectors;
  Maybe bias = {}, low = {}, mean = {};

  int64_t k() const { return scales.size(-2); }
  int64_t n() const { return vectors.size(-1) - row_scale_at(k()); }

  void make_contiguous(ScalarType dtype) {
    for (Tensor* t : {&slices, &scales, &vectors}) *t = in_order(*t);
    if (bias) {
      const bool as_is = bias->scalar_type() == dtype;
      bias = in_order(as_is ? *bias : torch::stable::to(*bias, dtype));
    }
    if (low) low = in_order(*low);
    if (mean) mean = in_order(*mean);
  }

  // Where it lies, or where weight number `expert` of a stack lies; contiguous.
  Weight at(int64_t expert, const void* x, void* out) const {
    const auto start = [expert](const Tensor& tensor) {
      return expert ? expert * (tensor.numel() / tensor.size(0)) : 0;
    };
    const float* const parts = vectors.const_data_ptr<float>() + start(vectors);
    return {
        x,
        (const uint32_t*)slices.const_data_ptr<int32_t>() + start(slices),
        scales.const_data_ptr<uint8_t>() + start(scales),
        parts,
        parts + GAINS_AT,
        parts + SENSITIVITY_AT,
        parts + row_scale_at(k()),
        bias ? bias->const_data_ptr() : nullptr,
        low ? low->const_data_ptr<int32_t>() : nullptr,
        mean ? mean->const_data_ptr<float>() : nullptr,
        out,
        n(),
        slices.size(-2),
        slices.size(-1),
    };
  }
};

void check_levels(const Levels& levels) {
  STD_TORCH_CHECK(!levels.empty() && levels.size() <= MAX_LEVELS, "expected 1 to ", MAX_LEVELS,
                  " levels");
  int64_t last = -2;
  for (const int64_t level : levels) {
    STD_TORCH_CHECK(last < level && level <= 8 && level % 2 == 0, "level ", level,
                    ": expected ascending ones of 0, 2, 4, 6 and 8");
    last = level;
  }
}

// Only addresses go further.
void check_shapes(const WeightTensors& weight, int64_t k, const Levels& levels) {
  const int64_t tile = weight.slices.size(-1) * FIELDS_PER_WORD, tiles = weight.slices.size(-3);
  const int64_t n = weight.n(), lines = levels.back() / 2 * k;
  const int64_t stacked = weight.slices.dim() - 3;
  STD_TORCH_CHECK(
      weight.scales.dim() == 3 + stacked && weight.vectors.dim() == 1 + stacked &&
          (stacked == 0 || (weight.scales.size(0) == weight.slices.size(0) &&
                            weight.vectors.size(0) == weight.slices.size(0))),
      "slices, scales and vectors do not fit each other");
  STD_TORCH_CHECK(tile == 64 || tile == 128 || tile == 256 || tile == 512, "slices of tiles of ",
                  tile, " outputs: expected 64, 128, 256 or 512");
  STD_TORCH_CHECK(weight.k() == k, "x has ", k, " channels, the weight ", weight.k());
  STD_TORCH_CHECK(weight.scales.size(-3) == tiles && weight.scales.size(-1) * SCALE_GROUP == tile,
                  "scales do not fit the slices: expected [", tiles, ", ", k, ", ",
                  tile / SCALE_GROUP, "]");
  STD_TORCH_CHECK((n + tile - 1) / tile == tiles, "vectors for ", n, " outputs do not fit ", tiles,
                  " tiles of ", tile);
  STD_TORCH_CHECK(weight.low || weight.slices.size(-2) == lines, "slices do not fit: expected ",
                  lines, " lines, not ", weight.slices.size(-2));
  STD_TORCH_CHECK(!weight.low || weight.low->numel() == k, "low does not fit ", k, " channels");
  STD_TORCH_CHECK(!weight.bias || weight.bias->numel() == n, "bias does not fit ", n, " outputs");
}

Call call_of(Dtype dtype, int64_t rows, int64_t k, const Levels& levels) {
  const int64_t threads = torch::stable::get_num_threads();
  Call call{dtype, rows, k, threads, levels.back(), (int64_t)levels.size()};
  std::copy(levels.begin(), levels.end(), call.levels);
  return call;
}

Tensor allocate(std::vector<int64_t> shape, const Tensor& like) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  int32_t dtype;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

int64_t rows_of(const Tensor& x) {
  const int64_t k = x.dim() ? x.size(-1) : 0;
  return k ? x.numel() / k : 0;
}

// x [..., K] times each weight -> [..., N] each; nothing if the kernels do not take this.
std::vector<Tensor> decode_all(const Tensor& given, std::vector<WeightTensors>& all,
                               const Levels& levels) {
  check_levels(levels);
  const auto dtype = dtype_of(given);
  const int64_t rows = rows_of(given);
  if (!dtype || rows < 1 || rows > MAX_ROWS || all.empty()) return {};
  const int64_t k = given.size(-1);
  const Tensor x = in_order(given);
  const Call call = call_of(*dtype, rows, k, levels);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  std::vector<Tensor> outs;
  std::vector<Weight> weights;
  for (WeightTensors& weight : all) {
    if (weight.n() <= 0) return {};
    STD_TORCH_CHECK(weight.slices.dim() == 3, "slices do not fit: expected those of one weight");
    check_shapes(weight, k, levels);
    STD_TORCH_CHECK(!weight.mean || weight.mean->numel() == rows, "mean does not fit ", rows,
                    " rows");
    weight.make_contiguous(x.scalar_type());
    shape.back() = weight.n();
    outs.push_back(allocate(shape, x));
    weights.push_back(weight.at(0, x.const_data_ptr(), outs.back().mutable_data_ptr()));
  }
  if (!decode(call, weights.data(), weights.size())) return {};
  return outs;
}

Tensor decode_linear(const Tensor& x, const Tensor& slices, const Tensor& scales,
                     const Tensor& vectors, const Maybe& bias, const Maybe& low,
                     const Levels& levels, const Maybe& mean) {
  std::vector<WeightTensors> weight{{slices, scales, vectors, bias, low, mean}};
  const auto outs = decode_all(x, weight, levels);
  if (!outs.empty()) return outs[0];
  return oracle<Tensor>("grinqh::decode_linear", x, slices, scales, vectors, bias, low,
                        levels, mean);
}

std::vector<Tensor> decode_linears(const Tensor& x, const std::vector<Tensor>& slices,
                                   const std::vector<Tensor>& scales,
                                   const std::vector<Tensor>& vectors,
                                   const std::vector<Maybe>& biases, const std::vector<Maybe>& lows,
                                   const Levels& levels) {
  std::vector<WeightTensors> weights;
  for (size_t i = 0; i < slices.size(); ++i)
    weights.push_back({slices[i], scales.at(i), vectors.at(i), biases.at(i), lows.at(i)});
  auto outs = decode_all(x, weights, levels);
  if (outs.size() == weights.size()) return outs;
  return oracle<std::vector<Tensor>>("grinqh::decode_linears", x, slices, scales, vectors,
                                     biases, lows, levels);
}

Tensor decode_experts(const Tensor& given, const Tensor& experts, const Tensor& slices,
                      const Tensor& scales, const Tensor& vectors, const Levels& levels) {
  const auto left_to_the_oracle = [&] {
    return oracle<Tensor>("grinqh::decode_experts", given, experts, slices, scales, vectors,
                          levels);
  };
  check_levels(levels);
  const auto dtype = dtype_of(given);
  WeightTensors stack{slices, scales, vectors};
  if (!dtype || given.numel() == 0 || stack.n() <= 0) return left_to_the_oracle();
  STD_TORCH_CHECK(given.dim() == 2 && experts.numel() == given.size(0) && slices.dim() == 4,
                  "expected x [S, K], experts [S] and a stack of weights");
  const int64_t tokens = given.size(0), k = given.size(1), n = stack.n();
  check_shapes(stack, k, levels);
  stack.make_contiguous(given.scalar_type());
  const Tensor x = in_order(given), chosen = in_order(experts), out = allocate({tokens, n}, x);
  const int64_t* numbers = chosen.const_data_ptr<int64_t>();
  const auto* from = (const char*)x.const_data_ptr();
  auto* to = (char*)out.mutable_data_ptr();
  std::vector<Weight> weights;
  for (int64_t i = 0; i < tokens; ++i) {
    STD_TORCH_CHECK(0 <= numbers[i] && numbers[i] < slices.size(0), "expert ", numbers[i],
                    ": expected 0 to ", slices.size(0) - 1);
    const int64_t bytes = size_of(*dtype);
    weights.push_back(stack.at(numbers[i], from + i * k * bytes, to + i * n * bytes));
  }
  if (!decode(call_of(*dtype, 1, k, levels), weights.data(), tokens)) return left_to_the_oracle();
  return out;
}

// The weight at `level`, from tile `first` on: to out [outputs, K], or transposed to [K, whole
// tiles], as much as that has room for.
void dequantize_into(const Tensor& slices, const Tensor& scales, const Tensor& vectors,
                     const Maybe& low, int64_t level, int64_t stored_bits, int64_t first,
                     bool transposed, Tensor& out) {
  const auto dtype = dtype_of(out);
  WeightTensors weight{slices, scales, vectors, {}, low};
  const int64_t k = weight.k(), tile = slices.size(2) * FIELDS_PER_WORD;
  check_levels({stored_bits});
  check_levels({level});
  check_shapes(weight, k, {stored_bits});
  STD_TORCH_CHECK(out.dim() == 2, "out does not fit the weight");
  const int64_t outputs = out.size(transposed ? 1 : 0), tiles = (outputs + tile - 1) / tile;
  const int64_t expected =
      transposed ? tiles * tile : std::min(tiles * tile, weight.n() - first * tile);
  STD_TORCH_CHECK(dtype && out.is_contiguous() && 0 < level && level <= stored_bits && 0 <= first &&
                      first + tiles <= slices.size(0) && out.size(transposed ? 0 : 1) == k &&
                      outputs == expected,
                  "out does not fit the weight");
  weight.make_contiguous(out.scalar_type());
  Weight some = weight.at(0, nullptr, out.mutable_data_ptr());
  some.slices += first * some.lines * some.words;
  some.scales += first * k * (tile / SCALE_GROUP);
  some.row_scale += first * tile;
  some.n = std::min(tiles * tile, some.n - first * tile);
  dequantize(call_of(*dtype, 0, k, {stored_bits}), some, level, transposed);
}

}  // namespace
}  // namespace grinqh

// Makes these the ops' kernels for CPUs; returns what grinqh_unregister takes, or null.
extern "C" __attribute__((visibility("default"))) void* grinqh_register() {
  using namespace grinqh;
  TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_impl("grinqh", "CPU", __FILE__, __LINE__, &library)) return nullptr;
  const auto add = [library](const char* name, auto* function) {
    return torch_library_impl(library, name, function, TORCH_ABI_VERSION);
  };
  const bool failed = add("decode_linear", TORCH_BOX(&decode_linear)) ||
                      add("decode_linears", TORCH_BOX(&decode_linears)) ||
                      add("decode_experts", TORCH_BOX(&decode_experts)) ||
                      add("dequantize_into", TORCH_BOX(&dequantize_into));
  if (!failed) return library;
  aoti_torch_delete_library_object(library);
  return nullptr;
}

extern "C" __attribute__((visibility("default"))) void grinqh_unregister(void* library) {
  aoti_torch_delete_library_object((TorchLibraryHandle)library);
}
