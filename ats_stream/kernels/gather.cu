// Normalise sampled crops: out = fma(x, scale[c], shift[c]) in float32, rounded once more to the output type.
//
//   crops  (N, C, S)  u8 or u16, S = elements of one patch; any address its type allows
//   scale  (C,)       float
//   shift  (C,)       float
//   out    (N, C, S)  float, bfloat16 or float16; its first byte is 16-byte aligned
//   grid   x: one block column per plane, a (crop, channel) pair; y: shares the runs of a plane
//
// A run is 16 bytes of output: RUN consecutive elements that begin at a multiple of RUN from the start of
// `out`, so every whole run is one aligned store whatever the size of a patch. The runs at the two ends of a
// plane may reach into its neighbours; their own elements are written one by one.
//
// No includes: the file goes through NVRTC as it is.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

struct bfloat16 { u16 bits; };
struct float16 { u16 bits; };

// ---- rounding to the output type: round to nearest, ties to even; a NaN stays a NaN ----

template <typename Out> __device__ __forceinline__ u32 rounded_bits(float v);

template <> __device__ __forceinline__ u32 rounded_bits<float>(float v) { return __float_as_uint(v); }

template <> __device__ __forceinline__ u32 rounded_bits<bfloat16>(float v) {
  const u32 u = __float_as_uint(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return u >> 16;  // fmaf gives quiet NaN: the bit that says so is kept
  return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

template <> __device__ __forceinline__ u32 rounded_bits<float16>(float v) {
  const u32 u = __float_as_uint(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  u32 half;
  if (magnitude >= 0x47800000u) {         // 65536 and above, infinity, NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: move the exponent bias from 127 to 15; a carry reaches infinity
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  } else {                                // below 2^-14: float32 has the same spacing, 2^-24, from 0.5 to 1
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  return sign | half;
}

__device__ __forceinline__ void store_one(float* to, float v) { *to = v; }
__device__ __forceinline__ void store_one(bfloat16* to, float v) { to->bits = u16(rounded_bits<bfloat16>(v)); }
__device__ __forceinline__ void store_one(float16* to, float v) { to->bits = u16(rounded_bits<float16>(v)); }

// One 16-byte store of 16 / sizeof(Out) values. The streaming hint also keeps the compiler from splitting it.
template <typename Out> __device__ __forceinline__ void store_run(Out* to, const float* v) {
  u32 word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (sizeof(Out) == 4) {
      word[i] = rounded_bits<Out>(v[i]);
    } else {
      word[i] = rounded_bits<Out>(v[2 * i]) | rounded_bits<Out>(v[2 * i + 1]) << 16;
    }
  }
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
}

// ---- reading a run of crops ----

template <typename In, int RUN> struct alignas(RUN * sizeof(In)) Pixels { In value[RUN]; };

template <typename In, int RUN> __device__ __forceinline__ void load_run(const In* from, bool aligned, float* v) {
  if (aligned) {
    const Pixels<In, RUN> pixels = *reinterpret_cast<const Pixels<In, RUN>*>(from);
#pragma unroll
    for (int i = 0; i < RUN; ++i) v[i] = float(pixels.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < RUN; ++i) v[i] = float(__ldg(from + i));
  }
}

template <typename In, typename Out>
__global__ void __launch_bounds__(256) gather_crops(
    const In* __restrict__ crops, const float* __restrict__ scale, const float* __restrict__ shift,
    Out* __restrict__ out, i64 num_channels, i64 patch_size) {
  constexpr int RUN = 16 / int(sizeof(Out));
  // runs begin at multiples of RUN, so the first address decides for all of them
  const bool aligned = reinterpret_cast<unsigned long long>(crops) % (RUN * sizeof(In)) == 0;
  const u32 channel = blockIdx.x % u32(num_channels);
  const float a = __ldg(scale + channel), b = __ldg(shift + channel);
  const i64 begin = i64(blockIdx.x) * patch_size, end = begin + patch_size;
  const i64 step = i64(gridDim.y) * blockDim.x * RUN;
  for (i64 at = (begin / RUN + i64(blockIdx.y) * blockDim.x + threadIdx.x) * RUN; at < end; at += step) {
    if (at >= begin && at + RUN <= end) {
      float v[RUN];
      load_run<In, RUN>(crops + at, aligned, v);
#pragma unroll
      for (int i = 0; i < RUN; ++i) v[i] = fmaf(v[i], a, b);
      store_run(out + at, v);
    } else {
#pragma unroll 1
      for (i64 i = at < begin ? begin : at; i < at + RUN && i < end; ++i) {
        store_one(out + i, fmaf(float(__ldg(crops + i)), a, b));
      }
    }
  }
}
