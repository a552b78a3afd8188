// grinqh::decode_linear on CPUs; what it means is written down in ops/oracle.py.
//
// Work is cut into units: a tile of outputs times a part of the lists. How, depends on shapes and
// lists alone, and a tile's parts are summed up in order: so results are the same for any number
// of threads.
#include <atomic>

#include "tile.h"

namespace grinqh {

constexpr int64_t MIN_UNITS = 32;      // where there are fewer tiles, they are split
constexpr int64_t MIN_WORK = 1 << 16;  // weights, in a unit
constexpr int64_t WORTH_A_THREAD = 1 << 16;

// sums [rows, tile] -> outputs of a tile
template <class T>
void write_tile(const Call& call, const Weight& weight, const Lists& lists, int64_t t,
                const float* sums) {
  const int64_t tile = weight.tile(), first = t * tile, here = std::min(tile, weight.n - first);
  const auto* bias = (const T*)weight.bias;
  for (int64_t row = 0; row < call.rows; ++row) {
    auto* out = (T*)weight.out + row * weight.n;
    for (int64_t i = 0; i < here; ++i) {
      const int64_t n = first + i;
      const float y = sums[row * tile + i] * weight.row_scale[n] * lists.unit[row];
      out[n] = bias ? y + (float)bias[n] : y;
    }
  }
}

bool decode(const Call& call, const Weight* weights, int64_t count) {
  thread_local std::vector<Lists> lists;
  thread_local std::vector<float> partial;
  thread_local std::vector<int64_t> starts;
  int64_t tiles = 0, work = 0;
  for (int64_t w = 0; w < count; ++w) {
    tiles += weights[w].tiles();
    work += weights[w].n * call.k;
  }
  int64_t parts = std::max<int64_t>(1, MIN_UNITS / tiles);
  parts = std::max<int64_t>(1, std::min(parts, work / tiles / MIN_WORK));
  const int64_t rows = call.padded_rows();
  starts.assign(1, 0);  // of a weight's sums among all
  for (int64_t w = 0; w < count; ++w)
    starts.push_back(starts.back() + weights[w].tiles() * weights[w].tile() * rows * parts);
  lists.resize(std::max<size_t>(lists.size(), count));
  partial.resize(std::max<size_t>(partial.size(), starts.back()));

  // Threads have thread_local variables of their own.
  Lists* const all_lists = lists.data();
  float* const all_sums = partial.data();
  const int64_t* const all_starts = starts.data();
  const int threads = (int)std::max<int64_t>(1, std::min(call.threads, work / WORTH_A_THREAD));
  std::atomic<bool> finite{true};
  const auto unit_of = [&](int64_t number) {
    int64_t w = 0, t = number / parts;
    while (t >= weights[w].tiles()) t -= weights[w++].tiles();
    return Unit{weights + w, all_lists + w, t, number % parts, parts};
  };
  const auto sums_of = [&](const Unit& unit) {
    return all_sums + all_starts[unit.weight - weights] +
           (unit.tile * parts + unit.part) * rows * unit.weight->tile();
  };
  const auto write = [&](const Unit& unit) {
    with_type(call.dtype, [&](auto zero) {
      write_tile<decltype(zero)>(call, *unit.weight, *unit.lists, unit.tile, sums_of(unit));
    });
  };
  std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // A thread takes the next unit before it begins one, and so can fetch its first lines in time.
    int64_t number = taken++;
#pragma omp for schedule(dynamic, 1)
    for (int64_t w = 0; w < count; ++w)
      if (!build_lists(call, weights[w], all_lists[w])) finite = false;
    bool fetched = false;
    while (finite && number < tiles * parts) {
      const Unit unit = unit_of(number);
      number = taken++;
      const Unit after = unit_of(std::min(number, tiles * parts - 1));
      const bool fetches = number < tiles * parts && after.weight->words == unit.weight->words;
      add_tile(unit.weight->words)(call, unit, fetched, fetches ? &after : nullptr, sums_of(unit));
      fetched = fetches;
      if (parts == 1) write(unit);
    }
    if (parts > 1) {
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
      for (int64_t tile = 0; tile < (finite ? tiles : 0); ++tile) {
        const Unit first = unit_of(tile * parts);
        const int64_t size = rows * first.weight->tile();
        float* const sums = sums_of(first);
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
        write(first);
      }
    }
  }
  return finite;
}

}  // namespace grinqh
