// Lets g++ build a CUDA kernel source and run it on the CPU: a test instrument, not for speed.
//
// It knows what the kernels use and no more. The threads of a grid run one after the other to their end, which is
// right only for kernels whose threads never wait for each other.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct Index3 { unsigned x = 0, y = 0, z = 0; };
inline thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct alignas(8) float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

inline float __fmul_rn(float a, float b) { return a * b; }  // built without contraction: each rounds once
inline float __fadd_rn(float a, float b) { return a + b; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
  return static_cast<unsigned>(both >> (shift & 31));
}
inline unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, sizeof u); return u; }
inline float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, sizeof f); return f; }
template <class T> T __ldg(const T* from) { return *from; }
template <class T> void __stcs(T* to, T value) { *to = value; }

namespace cuda_on_cpu {

template <class... Args, std::size_t... I>
void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Args>*>(args[I])...);
}

// Runs a kernel over a grid; args[i] points to the value of argument i, as in cuLaunchKernel.
template <class... Args>
void launch(void (*kernel)(Args...), unsigned grid_x, unsigned grid_y, unsigned block_x, void** args) {
  gridDim = {grid_x, grid_y, 1};
  blockDim = {block_x, 1, 1};
  for (unsigned y = 0; y < grid_y; ++y)
    for (unsigned x = 0; x < grid_x; ++x)
      for (unsigned thread = 0; thread < block_x; ++thread) {
        blockIdx = {x, y, 0};
        threadIdx = {thread, 0, 0};
        call(kernel, args, std::index_sequence_for<Args...>{});
      }
}

}  // namespace cuda_on_cpu
