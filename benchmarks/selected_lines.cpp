// Reads runs of bytes and adds them up, nothing else: what memory allows a decode step.
#include <cstdint>
#include <cstring>

using Bytes = uint64_t __attribute__((vector_size(64)));

extern "C" uint64_t read_runs(const char* base, const int64_t* starts, const int64_t* sizes,
                              int64_t count, int64_t ahead, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    if (i + ahead < count)
      for (int64_t at = 0; at < sizes[i + ahead]; at += 64)
        __builtin_prefetch(base + starts[i + ahead] + at, 0, 2);
    Bytes sum = {};
    for (int64_t at = 0; at < sizes[i]; at += 64) {
      Bytes bytes;
      std::memcpy(&bytes, base + starts[i] + at, sizeof(bytes));
      sum += bytes;
    }
    for (int lane = 0; lane < 8; ++lane) total += sum[lane];
  }
  return total;
}
