// What the fiber runtime keeps of a launch, a block, a warp and a thread.
#pragma once

#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "types.h"

namespace pk::emulation {

using device::Grid;

enum class Order { kAscending = 0, kDescending = 1, kRandom = 2 };
enum class State { kReady, kBarrier, kWarp, kDone };
enum class Kind { kSync, kShuffle, kMatrix, kMatrixTransposed, kProductHalf, kProductBFloat16 };

struct Settings {
  Order order = Order::kAscending;
  uint64_t seed = 0;
  int resident = 0;          // blocks at once; 0: by their size
  size_t shared_bytes = 227 * 1024;  // the most that a launch may ask for
  int64_t patience = 20000;  // passes without progress before a deadlock is reported
};

// What one lane brings to a warp function, and what it takes away.
struct Lane {
  uint64_t bits = 0;
  uint16_t row[8] = {};
  uint16_t out16[8] = {};
  uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
};

struct Fiber;

// Two generations of lanes: a fast lane may be at the next function before a slow one took its
// result.
struct Warp {
  Lane lanes[2][32];
  Fiber* fibers[32] = {};
  int arrived = 0;
  unsigned generation = 0;
  Kind kind = Kind::kSync;
  uint64_t slowness = 0;
  char barriers[2] = {};
};

struct FreeMemory {
  void operator()(char* memory) const { std::free(memory); }
};

struct Block {
  int64_t index = 0;
  std::unique_ptr<char, FreeMemory> memory;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<char*> red_zones;
  int arrived = 0, done = 0;
  unsigned generation = 0;
  char barriers[2] = {};
};

struct Copy {
  char* to;
  const void* from;  // null: zeros
  int64_t group;
};

struct Fiber : Place {
  State state = State::kReady;
  bool spun = false;
  Block* block = nullptr;
  Warp* warp = nullptr;
  char* stack = nullptr;
  void* saved = nullptr;
  void* tsan = nullptr;
  const char* file = "its start";
  int line = 0;
  std::vector<Copy> copies;
  int64_t groups = 0;
};

struct Launch {
  Grid grid;
  int block = 0;
  size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::mt19937_64 random;
  std::string failure;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<char*> stacks;
};

inline std::string place_of(const char* file, int line) {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}

inline const char* name_of(State state) {
  switch (state) {
    case State::kReady: return "spinning";
    case State::kBarrier: return "waiting for the block";
    case State::kWarp: return "waiting for the warp";
    case State::kDone: return "done";
  }
  return "?";
}

}  // namespace pk::emulation
