// What the drivers share: programs that run kernels without Python, for sanitizers and mutants, and
// compare every result with what it should be.
//
//     DRIVER ORDER SEED BLOCKS      as pk_emulation_order and pk_emulation_resident take them
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "philox.h"
#include "types.h"

extern "C" void pk_emulation_order(int order, uint64_t seed);
extern "C" void pk_emulation_resident(int blocks);

namespace pk::driver {

inline std::mt19937 generator(1);
inline int wrong = 0;

// Each array is as large as it is used, so that AddressSanitizer sees the byte behind it.
template <typename T>
std::vector<T> nans(int64_t size) { return std::vector<T>(size, from_float<T>(NAN)); }

// A matrix of T, `offset` elements off a multiple of 16 bytes, filled with NaN until it is drawn.
template <typename T>
struct Matrix {
  int64_t rows, columns;
  std::vector<T> memory;
  T* data;

  Matrix(int64_t rows, int64_t columns, int offset = 0)
      : rows(rows), columns(columns), memory(nans<T>(rows * columns + offset)),
        data(memory.data() + offset) {}
  Matrix draw(double size) {
    std::normal_distribution<float> normal(0.0f, static_cast<float>(size));
    for (int64_t i = 0; i < rows * columns; ++i) data[i] = from_float<T>(normal(generator));
    return std::move(*this);
  }
  double at(int64_t row, int64_t column) const { return to_float(data[row * columns + column]); }
};

inline void expect(const char* name, double actual, double exact, double tolerance = 0) {
  if (actual == exact || std::fabs(actual - exact) <= tolerance * (1.0 + std::fabs(exact))) return;
  if (++wrong < 8) std::printf("%s: %g is not %g\n", name, actual, exact);
}

inline void expect_launched(int status) {
  if (!status) return;
  std::printf("%s\n", device::last_error().c_str());
  std::exit(2);
}

// Do as the arguments say what `checks` does, and return the program's status.
template <typename Checks>
int run(int count, char** arguments, Checks checks) {
  if (count != 4) return 64;
  pk_emulation_order(std::atoi(arguments[1]), std::strtoull(arguments[2], nullptr, 10));
  pk_emulation_resident(std::atoi(arguments[3]));
  checks();
  std::printf(wrong ? "%d values are wrong\n" : "right\n", wrong);
  return wrong != 0;
}

}  // namespace pk::driver
