// What cuda_on_cpu.h lacks for kernels whose threads wait for each other: barriers, shared memory, warps, atomics.
//
// Blocks run one after the other. Every thread of a block is a fiber; one that waits at a barrier gives way to the
// next. `thread_order` says in which order they get their turn: 0 forwards, 1 backwards, else shuffled by that number.
// The barriers of a source are numbered by the build; `skipped_barrier` is passed over, as if it were not there.
// A barrier that not every thread reaches ends the process with a message.
//
// Sanitizers are told of every switch. For ThreadSanitizer a fiber is a thread and a barrier orders what lies before
// it and what lies behind it, so that it sees every pair of accesses with no barrier between, in whatever order
// they really ran.
#pragma once
#include "cuda_on_cpu.h"

#include <ucontext.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define ON_TSAN(...) __VA_ARGS__
#else
#define ON_TSAN(...)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define ON_ASAN(...) __VA_ARGS__
#else
#define ON_ASAN(...)
#endif
// The scheduler's own memory is shared by all fibers on purpose.
#define SCHEDULER __attribute__((no_sanitize("thread", "address"), noinline))

#define __noinline__ __attribute__((noinline))
#define __shared__ static
#define __constant__ static const

inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __longlong_as_double(long long bits) { double x; std::memcpy(&x, &bits, sizeof x); return x; }
inline long long __double_as_longlong(double x) { long long bits; std::memcpy(&bits, &x, sizeof bits); return bits; }
inline int __double2hiint(double x) { return int(__double_as_longlong(x) >> 32); }
inline int __double2loint(double x) { return int(__double_as_longlong(x)); }
inline double __hiloint2double(int high, int low) {
  return __longlong_as_double((long long)((unsigned long long)(unsigned(high)) << 32 | unsigned(low)));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline int __double2int_rn(double x) { return int(std::nearbyint(x)); }
inline float __double2float_ru(double x) {
  if (x > 3.4028234663852886e38) return INFINITY;  // in C++ a conversion beyond the largest float is undefined
  if (x < -3.4028234663852886e38) return std::isinf(x) ? -INFINITY : -3.4028234663852886e38f;
  const float nearest = float(x);
  return double(nearest) < x ? std::nextafter(nearest, INFINITY) : nearest;
}
inline unsigned __float2uint_rz(float x) { return x >= 4294967296.0f ? ~0u : x > 0 ? unsigned(x) : 0; }  // NaN: 0

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 1 << 18;

struct Barrier {
  unsigned waiting = 0, generation = 0, collected = 0, result = 0;
  char order[2];  // what ThreadSanitizer hangs the order on; in turn, so that the next round cannot leak into this one
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool is_done = false;
  void* tsan = nullptr;
  void* asan = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<std::uint64_t> slots;  // of the exchange within a warp
  Barrier barrier;
  ucontext_t scheduler;
  void* scheduler_tsan = nullptr;
  void* scheduler_asan = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  unsigned current = 0, live = 0;
  std::uint64_t progress = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

inline Block* block = nullptr;
inline int thread_order = 0;
inline int skipped_barrier = -1;

SCHEDULER inline void switch_to_scheduler(bool is_last) {
  Fiber& fiber = block->fibers[block->current];
  ON_TSAN(__tsan_switch_to_fiber(block->scheduler_tsan, __tsan_switch_to_fiber_no_sync);)
  ON_ASAN(__sanitizer_start_switch_fiber(
      is_last ? nullptr : &fiber.asan, block->scheduler_stack, block->scheduler_stack_bytes);)
  (void)is_last;
  swapcontext(&fiber.context, &block->scheduler);
  ON_ASAN(__sanitizer_finish_switch_fiber(fiber.asan, nullptr, nullptr);)
}

SCHEDULER inline void switch_to_fiber(unsigned thread) {
  Fiber& fiber = block->fibers[thread];
  block->current = thread;
  threadIdx = {thread, 0, 0};
  ON_TSAN(__tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);)
  ON_ASAN(__sanitizer_start_switch_fiber(&block->scheduler_asan, fiber.stack.get(), kStackBytes);)
  swapcontext(&block->scheduler, &fiber.context);
  ON_ASAN(__sanitizer_finish_switch_fiber(block->scheduler_asan, nullptr, nullptr);)
}

// Wait until `expected` threads are here; returns the values of all of them, joined by or.
SCHEDULER inline unsigned arrive(Barrier& barrier, unsigned expected, unsigned value) {
  const unsigned generation = barrier.generation;
  ON_TSAN(__tsan_release(&barrier.order[generation & 1]);)
  barrier.collected |= value;
  ++block->progress;
  if (++barrier.waiting == expected) {
    barrier.result = barrier.collected;
    barrier.waiting = barrier.collected = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) switch_to_scheduler(false);
  ON_TSAN(__tsan_acquire(&barrier.order[generation & 1]);)
  return barrier.result;  // the next round cannot end before this thread has arrived again
}

SCHEDULER inline void fiber_main() {
  ON_ASAN(__sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);)
  block->body(block->argument);
  block->fibers[block->current].is_done = true;
  --block->live;
  ++block->progress;
  switch_to_scheduler(true);
}

SCHEDULER inline std::vector<unsigned> turns(unsigned num_threads) {
  std::vector<unsigned> order(num_threads);
  for (unsigned i = 0; i < num_threads; ++i) order[i] = thread_order == 1 ? num_threads - 1 - i : i;
  std::uint64_t state = std::uint64_t(thread_order);
  for (unsigned i = num_threads - 1; thread_order > 1 && i > 0; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i], order[(state >> 33) % (i + 1)]);
  }
  return order;
}

SCHEDULER inline void run_block(const std::vector<unsigned>& order) {
  const unsigned num_threads = unsigned(block->fibers.size());
  block->live = num_threads;
  ON_TSAN(block->scheduler_tsan = __tsan_get_current_fiber();)
  for (Fiber& fiber : block->fibers) {
    fiber.is_done = false;
    ON_TSAN(fiber.tsan = __tsan_create_fiber(0);)
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  while (block->live) {
    const std::uint64_t before = block->progress;
    for (unsigned thread : order) {
      if (!block->fibers[thread].is_done) switch_to_fiber(thread);
    }
    if (block->progress == before) {
      std::fprintf(stderr, "cuda_on_cpu: no progress in block %u: a barrier waits for all threads\n", blockIdx.x);
      std::_Exit(86);
    }
  }
  // what this block wrote lies before what later blocks read
  ON_TSAN(for (Fiber& fiber : block->fibers) {
    __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_release(block);
    __tsan_switch_to_fiber(block->scheduler_tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(fiber.tsan);
  } __tsan_acquire(block);)
}

// As launch(), with fibers.
template <class... Args>
SCHEDULER void launch_fibers(
    void (*kernel)(Args...), unsigned grid_x, unsigned grid_y, unsigned block_x, void** args) {
  gridDim = {grid_x, grid_y, 1};
  blockDim = {block_x, 1, 1};
  using Call = std::pair<void (*)(Args...), void**>;
  Call call_it{kernel, args};
  Block own;
  own.body = [](void* argument) {
    auto& it = *static_cast<Call*>(argument);
    call(it.first, it.second, std::index_sequence_for<Args...>{});
  };
  own.argument = &call_it;
  own.fibers.resize(block_x);
  for (Fiber& fiber : own.fibers) fiber.stack.reset(new char[kStackBytes]);
  own.warps.resize((block_x + kWarp - 1) / kWarp);
  own.slots.resize(block_x);
  block = &own;
  const std::vector<unsigned> order = turns(block_x);
  for (unsigned y = 0; y < grid_y; ++y)
    for (unsigned x = 0; x < grid_x; ++x) {
      blockIdx = {x, y, 0};
      run_block(order);
    }
  block = nullptr;
}

SCHEDULER inline unsigned arrive_in_warp() {
  return arrive(block->warps[block->current / kWarp], kWarp, 0);
}

template <class T> SCHEDULER T exchange(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t), "one slot per thread");
  const unsigned thread = block->current;
  std::memcpy(&block->slots[thread], &value, sizeof value);
  arrive_in_warp();
  T other;
  std::memcpy(&other, &block->slots[thread / kWarp * kWarp + lane], sizeof other);
  arrive_in_warp();
  return other;
}

}  // namespace cuda_on_cpu

// The build writes these in the place of __syncthreads() and __syncthreads_or(value).
inline void __syncthreads_at(int number) {
  using namespace cuda_on_cpu;
  if (number != skipped_barrier) arrive(block->barrier, blockDim.x, 0);
}
inline int __syncthreads_or_at(int number, int value) {
  using namespace cuda_on_cpu;
  return number != skipped_barrier ? int(arrive(block->barrier, blockDim.x, value != 0)) : value;
}

template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::exchange(value, (cuda_on_cpu::block->current ^ unsigned(mask)) % cuda_on_cpu::kWarp);
}
// Ordered with nothing else, as on a device.
template <class T> T atomicAdd(T* to, T value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
