// The runtime behind emulated_device.h: blocks of fibers on one host thread, and who runs next.
//
// A pass lets every thread that can run do so until it waits (barrier, warp function, spin).
// Several blocks are resident at once, so that a protocol between blocks is exercised; further
// ones start when one ends. Compiled without ThreadSanitizer's instrumentation: it is told only of
// what orders threads on a GPU, and of the memory that asynchronous copies touch.
#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(PK_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__)
#error "the fiber switch is written for x86-64"
#endif

extern "C" void pk_switch_fiber(void** save, void* load);
asm(R"(
.text
.globl pk_switch_fiber
.hidden pk_switch_fiber
.type pk_switch_fiber, @function
pk_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pk_switch_fiber, .-pk_switch_fiber
)");

namespace pk::emulation {

Place* current = nullptr;

namespace {

constexpr size_t kStackBytes = 128 * 1024, kGuardBytes = 256;
constexpr int kInvalidValue = 1, kOutOfMemory = 2, kInvalidConfiguration = 9, kLaunchFailure = 719;

Settings settings;
Launch* launch = nullptr;
std::vector<std::string> launched;
int launches_with_memory = -1;  // from now on; -1: every one
std::vector<char*> free_stacks;
void* scheduler_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_bottom = nullptr;
size_t scheduler_bytes = 0;
#endif
#if defined(PK_TSAN)
void* scheduler_fiber = nullptr;
#endif

void release(void* object) {
#if defined(PK_TSAN)
  __tsan_release(object);
#else
  (void)object;
#endif
}
void acquire(void* object) {
#if defined(PK_TSAN)
  __tsan_acquire(object);
#else
  (void)object;
#endif
}

char* new_stack() {
  if (!free_stacks.empty()) {
    char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  // The lowest page stays unmapped, so that an overflow faults.
  char* pages = static_cast<char*>(mmap(
      nullptr, kStackBytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (pages == MAP_FAILED) std::abort();
  mprotect(pages, 4096, PROT_NONE);
  return pages + 4096;
}

void to_scheduler(Fiber& fiber, bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake, scheduler_bottom, scheduler_bytes);
#endif
#if defined(PK_TSAN)
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  (void)ends;
  pk_switch_fiber(&fiber.saved, scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void fiber_main() {
  Fiber& fiber = *static_cast<Fiber*>(current);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
#endif
  launch->body(launch->context);
  fiber.state = State::kDone;
  release(launch);
  to_scheduler(fiber, true);
}

void run_fiber(Fiber& fiber) {
  current = &fiber;
  fiber.spun = false;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
#endif
#if defined(PK_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, 0);
#endif
  pk_switch_fiber(&scheduler_stack, fiber.saved);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  current = nullptr;
}

[[noreturn]] void fail(const std::string& text, const char* file, int line) {
  Fiber& fiber = *static_cast<Fiber*>(current);
  launch->failure = text + " (" + place_of(file, line) + ", thread " +
                    std::to_string(fiber.thread_x) + " of block " + std::to_string(fiber.block_x) + ")";
  to_scheduler(fiber);
  std::abort();
}

Fiber& waiting_at(const char* file, int line) {
  Fiber& fiber = *static_cast<Fiber*>(current);
  fiber.file = file;
  fiber.line = line;
  return fiber;
}

// All lanes of a warp bring `lane_in`; the last to come computes, each takes its own result.
template <typename Compute>
Lane& meet(Kind kind, const Lane& lane_in, const char* file, int line, Compute compute) {
  Fiber& fiber = waiting_at(file, line);
  Warp& warp = *fiber.warp;
  Lane* lanes = warp.lanes[warp.generation & 1];
  Lane& own = lanes[fiber.thread_x % 32];
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("lanes of a warp meet at different functions", file, line);
  own = lane_in;
  if (++warp.arrived == 32) {
    compute(lanes);
    warp.arrived = 0;
    ++warp.generation;
    for (int i = 0; i < 32; ++i) warp.fibers[i]->state = State::kReady;
    if (settings.order != Order::kRandom || launch->random() % 2) to_scheduler(fiber);
  } else {
    fiber.state = State::kWarp;
    to_scheduler(fiber);
  }
  return own;
}

Block* start_block(int64_t index) {
  auto block = std::make_unique<Block>();
  const Grid& grid = launch->grid;
  // Fresh for every block of a launch: what one block wrote must not order it before another.
  const size_t bytes = launch->shared_bytes + kGuardBytes;
  block->memory.reset(static_cast<char*>(std::aligned_alloc(128, (bytes + 127) / 128 * 128)));
  std::memset(block->memory.get(), 0xFF, bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block->memory.get() + launch->shared_bytes, kGuardBytes);
#endif
  block->warps.resize(launch->block / 32);
  block->red_zones.reserve(32);
  for (int thread = 0; thread < launch->block; ++thread) {
    auto fiber = std::make_unique<Fiber>();
    fiber->thread_x = thread;
    fiber->block_x = static_cast<int>(index % grid.x);
    fiber->block_y = static_cast<int>(index / grid.x % grid.y);
    fiber->block_z = static_cast<int>(index / grid.x / grid.y);
    fiber->grid_x = static_cast<int>(grid.x);
    fiber->grid_y = static_cast<int>(grid.y);
    fiber->grid_z = static_cast<int>(grid.z);
    fiber->block_size = launch->block;
    fiber->shared = block->memory.get();
    fiber->block = block.get();
    fiber->warp = &block->warps[thread / 32];
    fiber->warp->fibers[thread % 32] = fiber.get();
    fiber->stack = new_stack();
    launch->stacks.push_back(fiber->stack);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber->stack, kStackBytes);
#endif
#if defined(PK_TSAN)
    fiber->tsan = __tsan_create_fiber(0);
#endif
    // What pk_switch_fiber pops: six registers, then the address to go to. On entry the stack is
    // aligned as after a call.
    void** top = reinterpret_cast<void**>(fiber->stack + kStackBytes) - 2;
    top[0] = reinterpret_cast<void*>(&fiber_main);
    top[1] = nullptr;
    fiber->saved = top - 6;
    std::fill(top - 6, top, nullptr);
    block->fibers.push_back(std::move(fiber));
  }
  launch->blocks.push_back(std::move(block));
  return launch->blocks.back().get();
}

// Whether nobody wrote behind shared memory or between its arrays. Under ASan a touch is an error.
void check_guards(const Block& block) {
#if !defined(__SANITIZE_ADDRESS__)
  const auto untouched = [](const char* zone, size_t bytes) {
    return std::all_of(zone, zone + bytes, [](char c) { return c == '\xFF'; });
  };
  if (!untouched(block.memory.get() + launch->shared_bytes, kGuardBytes))
    launch->failure = "wrote behind the end of shared memory";
  for (const char* zone : block.red_zones)
    if (!untouched(zone, device::kRedZone)) launch->failure = "wrote behind an array in shared memory";
#else
  (void)block;
#endif
}

void end_block(Block& block) {
  check_guards(block);
  // For ThreadSanitizer, what a thread used is used again only when the launch has ended: until
  // then nothing orders it before what other threads do.
#if defined(PK_TSAN)
  for (auto& fiber : block.fibers) __tsan_destroy_fiber(fiber->tsan);
#else
  for (auto& fiber : block.fibers) {
    free_stacks.push_back(fiber->stack);
    launch->stacks.erase(std::find(launch->stacks.begin(), launch->stacks.end(), fiber->stack));
  }
  block.fibers.clear();
#endif
}

std::string standing() {
  std::map<std::tuple<int64_t, std::string, std::string>, std::vector<int>> places;
  for (const auto& block : launch->blocks)
    for (const auto& fiber : block->fibers)
      places[{block->index, name_of(fiber->state), place_of(fiber->file, fiber->line)}].push_back(
          fiber->thread_x);
  std::string text;
  for (const auto& [where, threads] : places) {
    const auto& [block, state, line] = where;
    text += "\n  block " + std::to_string(block) + ": " + std::to_string(threads.size()) +
            " threads from " + std::to_string(threads.front()) + " on " + state + " at " + line;
  }
  return text;
}

// In random order a warp may be slow for a while: a pass then often leaves it out.
bool left_out(const Fiber& fiber) {
  const uint64_t slowness = fiber.warp->slowness;
  return slowness && launch->random() % (slowness + 1);
}

void run_blocks() {
  Launch& run = *launch;
  std::vector<int64_t> waiting(run.grid.x * run.grid.y * run.grid.z);
  for (size_t i = 0; i < waiting.size(); ++i) waiting[i] = static_cast<int64_t>(i);
  // Taken from the back.
  if (settings.order == Order::kAscending) std::reverse(waiting.begin(), waiting.end());
  if (settings.order == Order::kRandom) std::shuffle(waiting.begin(), waiting.end(), run.random);
  const size_t resident = settings.resident
                              ? static_cast<size_t>(settings.resident)
                              : static_cast<size_t>(std::max(2, 512 / run.block));
  std::vector<Block*> live;
  std::vector<Fiber*> order;
  int64_t idle = 0;
  for (int64_t pass = 0; !live.empty() || !waiting.empty(); ++pass) {
    while (live.size() < resident && !waiting.empty()) {
      live.push_back(start_block(waiting.back()));
      live.back()->index = waiting.back();
      waiting.pop_back();
    }
    order.clear();
    for (Block* block : live) {
      if (settings.order == Order::kRandom && pass % 64 == 0)
        for (Warp& warp : block->warps) warp.slowness = run.random() % 3 ? 0 : run.random() % 40;
      for (auto& fiber : block->fibers)
        if (fiber->state == State::kReady) order.push_back(fiber.get());
    }
    if (settings.order == Order::kDescending) std::reverse(order.begin(), order.end());
    if (settings.order == Order::kRandom) std::shuffle(order.begin(), order.end(), run.random);
    bool progress = false, skipped = false;
    for (Fiber* fiber : order) {
      if (settings.order == Order::kRandom && left_out(*fiber)) {
        skipped = true;
        continue;
      }
      run_fiber(*fiber);
      progress |= !fiber->spun;
      if (fiber->state == State::kDone) ++fiber->block->done;
      if (!run.failure.empty()) return;
    }
    idle = progress ? 0 : idle + 1;
    if (idle > settings.patience || (order.empty() && !skipped)) {
      run.failure = "deadlock: no thread makes progress" + standing();
      return;
    }
    for (size_t i = 0; i < live.size();) {
      if (live[i]->done < run.block) {
        ++i;
        continue;
      }
      end_block(*live[i]);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (!run.failure.empty()) return;
  }
}

int refuse(const char* name, int code, const char* text) {
  device::last_error() = std::string(name) + ": " + text;
  return code;
}

}  // namespace

void sync_threads(const char* file, int line) {
  Fiber& fiber = waiting_at(file, line);
  Block& block = *fiber.block;
  // Two objects in turns: who is past this barrier must not order those that still leave it.
  void* object = &block.barriers[block.generation & 1];
  release(object);
  if (++block.arrived == launch->block) {
    block.arrived = 0;
    ++block.generation;
    for (auto& each : block.fibers) each->state = State::kReady;
  } else {
    fiber.state = State::kBarrier;
  }
  to_scheduler(fiber);
  acquire(object);
}

void sync_warp(const char* file, int line) {
  Fiber& fiber = waiting_at(file, line);
  void* object = &fiber.warp->barriers[fiber.warp->generation & 1];
  release(object);
  meet(Kind::kSync, Lane{}, file, line, [](Lane*) {});
  acquire(object);
}

void spin(const char* file, int line) {
  Fiber& fiber = waiting_at(file, line);
  fiber.spun = true;
  to_scheduler(fiber);
}

void maybe_yield(const char* file, int line) {
  if (settings.order == Order::kRandom && launch->random() % 2)
    to_scheduler(waiting_at(file, line));
}

uint64_t shuffle(uint64_t bits, int lane, const char* file, int line) {
  Lane in;
  in.bits = bits;
  Lane& own = meet(Kind::kShuffle, in, file, line, [](Lane*) {});
  // The other lanes' words stay until all lanes have met twice more.
  const Lane* lanes = &own - static_cast<Fiber*>(current)->thread_x % 32;
  return lanes[lane & 31].bits;
}

void ldmatrix(uint32_t* r, const void* row, bool transposed, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from an unaligned row", file, line);
  Lane in;
  std::memcpy(in.row, row, 16);
  const Kind kind = transposed ? Kind::kMatrixTransposed : Kind::kMatrix;
  const Lane& own = meet(kind, in, file, line, [transposed](Lane* lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        for (int word = 0; word < 2; ++word) {
          const int major = lane / 4, minor = lane % 4 * 2 + word;
          lanes[lane].out16[matrix * 2 + word] = transposed ? lanes[8 * matrix + minor].row[major]
                                                            : lanes[8 * matrix + major].row[minor];
        }
  });
  for (int i = 0; i < 4; ++i) r[i] = own.out16[2 * i] | static_cast<uint32_t>(own.out16[2 * i + 1]) << 16;
}

void mma(bool bfloat16, float* d, const uint32_t* a, const uint32_t* b, const char* file, int line) {
  Lane in;
  for (int i = 0; i < 4; ++i) in.a[i] = a[i], in.d[i] = d[i];
  for (int i = 0; i < 2; ++i) in.b[i] = b[i];
  const Kind kind = bfloat16 ? Kind::kProductBFloat16 : Kind::kProductHalf;
  const Lane& own = meet(kind, in, file, line, [bfloat16](Lane* lanes) {
    float left[16][16], right[8][16], sum[16][8];
    const auto value = [bfloat16](uint32_t words, int i) {
      const uint16_t bits = static_cast<uint16_t>(words >> (16 * i));
      return bfloat16 ? device::bfloat16_to_float(bits) : device::half_to_float(bits);
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 2; ++i) {
        left[g][t + i] = value(lanes[lane].a[0], i);
        left[g + 8][t + i] = value(lanes[lane].a[1], i);
        left[g][t + 8 + i] = value(lanes[lane].a[2], i);
        left[g + 8][t + 8 + i] = value(lanes[lane].a[3], i);
        right[g][t + i] = value(lanes[lane].b[0], i);
        right[g][t + 8 + i] = value(lanes[lane].b[1], i);
        sum[g][t + i] = lanes[lane].d[i];
        sum[g + 8][t + i] = lanes[lane].d[2 + i];
      }
    }
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n)
        for (int k = 0; k < 16; ++k) sum[m][n] += left[m][k] * right[n][k];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) {
        lanes[lane].d[i] = sum[lane / 4][lane % 4 * 2 + i];
        lanes[lane].d[2 + i] = sum[lane / 4 + 8][lane % 4 * 2 + i];
      }
  });
  for (int i = 0; i < 4; ++i) d[i] = own.d[i];
}

void cp_async(void* shared, const void* global, bool valid, const char* file, int line) {
  Fiber& fiber = waiting_at(file, line);
  if (reinterpret_cast<uintptr_t>(shared) % 16) fail("cp_async_16 to an unaligned address", file, line);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16)
    fail("cp_async_16 from an unaligned address", file, line);
  char* to = static_cast<char*>(shared);
  const Block& block = *fiber.block;
  if (to < block.memory.get() || to + 16 > block.memory.get() + launch->shared_bytes)
    fail("cp_async_16 outside shared memory", file, line);
  std::memset(to, 0xFF, 16);
  fiber.copies.push_back({to, valid ? global : nullptr, fiber.groups});
}

void cp_async_commit() { ++static_cast<Fiber*>(current)->groups; }

void cp_async_wait(int groups, const char* file, int line) {
  Fiber& fiber = waiting_at(file, line);
  size_t done = 0;
  for (; done < fiber.copies.size() && fiber.copies[done].group + groups < fiber.groups; ++done) {
    const Copy& copy = fiber.copies[done];
#if defined(PK_TSAN)
    __tsan_write_range(copy.to, 16);
#endif
    if (copy.from)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

void mark_red_zone(char* zone) {
  Fiber& fiber = *static_cast<Fiber*>(current);
  auto& zones = fiber.block->red_zones;
  if (std::find(zones.begin(), zones.end(), zone) != zones.end()) return;
  const char* begin = fiber.block->memory.get();
  if (zone < begin || zone + device::kRedZone > begin + launch->shared_bytes)
    fail("shared memory is too small for the arrays carved from it", "carve", 0);
  zones.push_back(zone);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(zone, device::kRedZone);
#endif
}

int run(
    const char* name, const Grid& grid, int block, size_t shared_bytes, void (*body)(void*),
    void* context) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 2147483647 || grid.y > 65535 ||
      grid.z > 65535 || block < 1 || block > 1024)
    return refuse(name, kInvalidConfiguration, "invalid configuration argument");
  if (block % 32) return refuse(name, kInvalidConfiguration, "emulated blocks are of full warps");
  if (shared_bytes > settings.shared_bytes) return refuse(name, kInvalidValue, "invalid argument");
  if (launches_with_memory == 0) return refuse(name, kOutOfMemory, "out of memory");
  if (launches_with_memory > 0) --launches_with_memory;
  launched.emplace_back(name);
  Launch state;
  state.grid = grid;
  state.block = block;
  state.shared_bytes = shared_bytes;
  state.body = body;
  state.context = context;
  state.random.seed(settings.seed);
  launch = &state;
#if defined(PK_TSAN)
  scheduler_fiber = __tsan_get_current_fiber();
#endif
  run_blocks();
  acquire(&state);
  launch = nullptr;
  for (char* stack : state.stacks) free_stacks.push_back(stack);
#if defined(__SANITIZE_ADDRESS__)
  for (const auto& each : state.blocks)
    __asan_unpoison_memory_region(each->memory.get(), shared_bytes + kGuardBytes);
#endif
  if (state.failure.empty()) return 0;
  device::last_error() = std::string(name) + ": " + state.failure;
  return kLaunchFailure;
}

}  // namespace pk::emulation

extern "C" {

#define PK_EXPORT __attribute__((visibility("default")))

PK_EXPORT void pk_emulation_order(int order, uint64_t seed) {
  pk::emulation::settings.order = static_cast<pk::emulation::Order>(order);
  pk::emulation::settings.seed = seed;
}

// Blocks that run at once; 0 chooses by their size.
PK_EXPORT void pk_emulation_resident(int blocks) { pk::emulation::settings.resident = blocks; }

// A block may have so many bytes of shared memory from now on.
PK_EXPORT void pk_emulation_shared_bytes(int bytes) {
  pk::emulation::settings.shared_bytes = static_cast<size_t>(bytes);
}

// So many launches from now on find memory; -1: every one.
PK_EXPORT void pk_emulation_launches_with_memory(int launches) {
  pk::emulation::launches_with_memory = launches;
}

PK_EXPORT const char* pk_emulation_last_error() { return pk::device::last_error().c_str(); }

// The names of the kernels launched since the last call, a line each.
PK_EXPORT const char* pk_emulation_launched() {
  static std::string names;
  names.clear();
  for (const std::string& name : pk::emulation::launched) names += name + "\n";
  pk::emulation::launched.clear();
  return names.c_str();
}

}
