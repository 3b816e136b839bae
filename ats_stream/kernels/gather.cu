// Pixels of patches to network input: out = fma(x, scale[c], shift[c]) in float32, rounded once more to the output
// type. Two kernels: gather_crops for packed crops that stay as they are, gather_patches for everything else.
//
// Pixels are u8, u16 or float, at any address their type allows; out is float, bfloat16 or float16 and begins at a
// multiple of 16 bytes. A run is 16 bytes of output, RUN consecutive elements, written by one thread in one store.
//
// No includes: the file goes through NVRTC as it is.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

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

// Two values as the lower and the upper half of a word; one instruction where the device has it.
template <typename Out> __device__ __forceinline__ u32 rounded_pair(float low, float high) {
  return rounded_bits<Out>(low) | rounded_bits<Out>(high) << 16;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ u32 rounded_pair<bfloat16>(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <> __device__ __forceinline__ u32 rounded_pair<float16>(float low, float high) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif

__device__ __forceinline__ void store_one(float* to, float v) { *to = v; }
__device__ __forceinline__ void store_one(bfloat16* to, float v) { to->bits = u16(rounded_bits<bfloat16>(v)); }
__device__ __forceinline__ void store_one(float16* to, float v) { to->bits = u16(rounded_bits<float16>(v)); }

// One 16-byte store of 16 / sizeof(Out) values. The streaming hint also keeps the compiler from splitting it.
template <typename Out> __device__ __forceinline__ void store_run(Out* to, const float* v) {
  u32 word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    word[i] = sizeof(Out) == 4 ? rounded_bits<Out>(v[i]) : rounded_pair<Out>(v[2 * i], v[2 * i + 1]);
  }
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
}

// ---- packed crops as they are ----
//
//   crops  (N, C, S)  S = elements of one patch
//   out    (N, C, S)
//   grid   x: one block column per plane, a (crop, channel) pair; y: shares the runs of a plane
//
// Runs begin at multiples of RUN from the start of `out`, so every whole run is one aligned store whatever the size
// of a patch. The runs at the two ends of a plane may reach into its neighbours; their own elements are written one
// by one.

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
  const bool aligned = reinterpret_cast<u64>(crops) % (RUN * sizeof(In)) == 0;
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

// ---- patches through a table of chunks, moved as they are read ----
//
//   pixels       chunks of one shape (Cc, z, y, x) or (z, y, x, Cc), anywhere in one piece of memory
//   starts       first element of each chunk, negative for one that is absent (all its pixels are `absent`)
//   images (I,7) where the chunks of an image begin in `starts`; its size z y x; its chunks along z y x. The chunks
//                of an image follow each other by channel, z, y, x. Without images each patch is one chunk: a crop.
//   image_of (N,), offsets (N, axes)  which image, and its pixel where the patch begins, which may lie outside
//   orientation (N,) or null   how the pixels are moved, see Orientation
//   intensity (N,2) or null    gain and offset of the pixels inside the image; integers are rounded and clamped
//   out          (N, C, z, y, x), or (N, z, y, x, C)
//   grid         x: one block column per patch; y: shares the runs of a patch, run = RUN pixels of each channel
//
// Safe for any content of image_of, offsets and orientation: what does not fit is outside, and `fill`. The tables of
// chunks are checked on the host, once.


enum Store { PLANAR, LAST, LAST_OF_3 };  // channels of out: before the pixels; after them; after, and three of them

struct Axes { int z, y, x; };
__device__ __forceinline__ int pick(const Axes& v, int axis) { return axis == 0 ? v.z : axis == 1 ? v.y : v.x; }

// A code is 8 * permutation + 4 * (z is flipped) + 2 * (y is) + (x is): pixel o of the patch comes from s, where
// s[source(a)] = flips(a) ? size_a - 1 - o_a : o_a for each axis a of the patch.
struct Orientation {
  u32 code;
  __device__ __forceinline__ int source(int axis) const {
    // two bits for each of the axes z y x: 012 021 102 120 201 210
    return int(0x192261624ULL >> (code / 8 * 6 + 2 * axis)) & 3;
  }
  __device__ __forceinline__ bool flips(int axis) const { return code >> (2 - axis) & 1; }
};

// One axis of the patch, as it lies in the image.
struct Axis {
  int size, begin, space, chunk;  // pixels of the patch, of the image before it, of the image, of a chunk
  u32 next_chunk;                 // entries of `starts` from one chunk to the next
  int next_pixel;                 // elements from one pixel to the next in a chunk
  bool flipped;

  __device__ __forceinline__ int at(int o) const { return begin + (flipped ? size - 1 - o : o); }
  __device__ __forceinline__ bool contains(int p) const { return u32(p) < u32(space); }
};

// COUNT consecutive pixels as words, from any address that their type allows.
template <typename In, int COUNT>
__device__ __forceinline__ void load_words(const In* from, const In* memory, i64 num_pixels, u32* word) {
  constexpr int WORDS = COUNT * int(sizeof(In)) / 4;
  const u64 address = reinterpret_cast<u64>(from);
  if (sizeof(In) == 4) {
    if (WORDS % 4 == 0 && address % 16 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS / 4; ++i) {
        const uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + i);
        word[4 * i] = four.x, word[4 * i + 1] = four.y, word[4 * i + 2] = four.z, word[4 * i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) word[i] = __float_as_uint(float(__ldg(from + i)));
    }
    return;
  }
  const u32 skew = u32(address) & 3u;
  const u64 first = address - skew, behind = first + 4 * (WORDS + (skew ? 1 : 0));
  if (first >= reinterpret_cast<u64>(memory) && behind <= reinterpret_cast<u64>(memory + num_pixels)) {
    const u32* aligned = reinterpret_cast<const u32*>(first);
    u32 low = __ldg(aligned);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const u32 high = i + 1 < WORDS || skew ? __ldg(aligned + i + 1) : 0u;
      word[i] = __funnelshift_r(low, high, 8 * skew);
      low = high;
    }
  } else {  // a word would reach over the ends of the memory
    constexpr int PER_WORD = 4 / int(sizeof(In));
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      word[i] = 0;
#pragma unroll
      for (int j = 0; j < PER_WORD; ++j) word[i] |= u32(__ldg(from + PER_WORD * i + j)) << (8 * int(sizeof(In)) * j);
    }
  }
}

template <typename In> __device__ __forceinline__ float pixel_of(const u32* word, int i) {
  if (sizeof(In) == 4) return __uint_as_float(word[i]);
  if (sizeof(In) == 2) return float(word[i / 2] >> (16 * (i % 2)) & 0xffffu);
  return float(word[i / 4] >> (8 * (i % 4)) & 0xffu);
}

// Gain and offset in two roundings, as two operations of torch make them.
template <typename In> __device__ __forceinline__ float adjusted(float x, float gain, float offset) {
  const float changed = __fadd_rn(__fmul_rn(x, gain), offset);
  if (sizeof(In) == 4) return changed;
  const float whole = __fadd_rn(rintf(changed), 0.0f);  // an integer knows no -0
  return fminf(fmaxf(whole, 0.0f), sizeof(In) == 1 ? 255.0f : 65535.0f);
}

// 16 bytes of output that are filled from the end, one value after the other.
template <typename Out> struct Run {
  u32 word[4] = {0, 0, 0, 0};

  __device__ __forceinline__ void push(float v) {
    const u32 bits = rounded_bits<Out>(v);
    if (sizeof(Out) == 4) {
      word[0] = word[1], word[1] = word[2], word[2] = word[3], word[3] = bits;
    } else {
      word[0] = __funnelshift_r(word[0], word[1], 16);
      word[1] = __funnelshift_r(word[1], word[2], 16);
      word[2] = __funnelshift_r(word[2], word[3], 16);
      word[3] = __funnelshift_r(word[3], bits, 16);
    }
  }
  __device__ __forceinline__ void store(Out* to) const {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
  }
};

template <typename In, typename Out, bool RGB, Store STORE>
__global__ void __launch_bounds__(256, RGB || STORE == LAST_OF_3 ? 3 : 4) gather_patches(
    const In* __restrict__ pixels, i64 num_pixels, const i64* __restrict__ starts, const i64* __restrict__ images,
    i64 num_images, const i64* __restrict__ image_of, const i64* __restrict__ offsets, int num_axes,
    const u8* __restrict__ orientation, const float2* __restrict__ intensity, const float* __restrict__ scale,
    const float* __restrict__ shift, Out* __restrict__ out, int num_channels, int chunk_channels, int chunk_z,
    int chunk_y, int chunk_x, i64 next_channel, int next_z, int next_y, int next_x, int patch_z, int patch_y,
    int patch_x, float fill, float absent) {
  constexpr int RUN = 16 / int(sizeof(Out));
  constexpr bool THREE = RGB || STORE == LAST_OF_3;  // the number of channels is known
  constexpr int TOGETHER = RGB ? 3 : 1;              // channels that lie side by side and are read at once
  const u32 patch = blockIdx.x;
  const int channels = THREE ? 3 : num_channels;
  const i64 crop_size = i64(chunk_channels) * chunk_z * chunk_y * chunk_x;
  const u32 patch_size = u32(patch_z) * u32(patch_y) * u32(patch_x);

  // which image, and where in it
  const Axes size = {patch_z, patch_y, patch_x}, chunk = {chunk_z, chunk_y, chunk_x};
  Axes space = chunk, next = {0, 0, 0};
  u32 first_entry = 0;
  u32 next_part = 0;
  bool is_there = true;
  if (images) {
    const i64 image = __ldg(image_of + patch);
    is_there = u64(image) < u64(num_images);
    const i64* row = images + (is_there ? image : 0) * 7;
    first_entry = u32(__ldg(row));
    space = {int(__ldg(row + 1)), int(__ldg(row + 2)), int(__ldg(row + 3))};
    next = {int(__ldg(row + 6)) * int(__ldg(row + 5)), int(__ldg(row + 6)), 1};
    next_part = u32(next.z) * u32(__ldg(row + 4));
  }
  const u32 code = orientation ? __ldg(orientation + patch) : 0u;
  const Orientation turn = {code < 48u ? code : 0u};
  Axis axis[3];
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    const int source = turn.source(a), column = source - (3 - num_axes);
    axis[a].size = pick(size, a);
    axis[a].space = pick(space, source);
    axis[a].chunk = pick(chunk, source);
    axis[a].next_chunk = u32(pick(next, source));
    axis[a].next_pixel = source == 0 ? next_z : source == 1 ? next_y : next_x;
    axis[a].flipped = turn.flips(a);
    const i64 offset = images && column >= 0 ? __ldg(offsets + i64(patch) * num_axes + column) : 0;
    is_there = is_there && offset > -i64(axis[a].size) && offset < i64(axis[a].space);
    axis[a].begin = is_there ? int(offset) : 0;
  }
  const Axis &Z = axis[0], &Y = axis[1], &X = axis[2];
  const int stride = X.flipped ? -X.next_pixel : X.next_pixel;  // elements from one pixel of the patch to the next
  const bool is_adjusted = intensity != nullptr;
  const float2 change = is_adjusted ? __ldg(intensity + patch) : make_float2(1.0f, 0.0f);

  // where a pixel of the patch lies: in which chunk, at which element; and how many pixels from it on lie so too
  bool inside = false;
  u32 entry = 0;
  i64 element = 0;
  int left = 0;
  const auto locate = [&](u32 pixel) {
    const u32 line = pixel / u32(patch_x), oz = line / u32(patch_y);
    const int ox = int(pixel - line * u32(patch_x));
    const int z = Z.at(int(oz)), y = Y.at(int(line - oz * u32(patch_y))), x = X.at(ox);
    inside = is_there && Z.contains(z) && Y.contains(y) && X.contains(x);
    left = 1;
    if (!inside) return;
    const int kz = z / Z.chunk, ky = y / Y.chunk, kx = x / X.chunk, rest = x - kx * X.chunk;
    entry = first_entry + kz * Z.next_chunk + ky * Y.next_chunk + kx * X.next_chunk;
    element = i64(z - kz * Z.chunk) * Z.next_pixel + i64(y - ky * Y.chunk) * Y.next_pixel + i64(rest) * X.next_pixel;
    // to the end of the line, of the chunk, of the image
    const int of_chunk = X.flipped ? rest + 1 : min(X.chunk - rest, X.space - x);
    left = min(patch_x - ox, of_chunk);
  };
  // the element of the present pixel in a channel; null if its chunk is absent
  const auto source_of = [&](int channel) -> const In* {
    const int part = chunk_channels == channels ? 0 : channel / chunk_channels;
    const i64 start = images ? __ldg(starts + (entry + part * next_part)) : i64(patch) * crop_size;
    return start < 0 ? nullptr : pixels + start + (channel - part * chunk_channels) * next_channel + element;
  };

  const u32 num_runs = (patch_size + RUN - 1) / RUN;
  for (u32 run = blockIdx.y * blockDim.x + threadIdx.x; run < num_runs; run += gridDim.y * blockDim.x) {
    const u32 at = run * RUN;
    const int count = int(min(u32(RUN), patch_size - at));
    const bool is_wide = patch_size % RUN == 0;  // every run then begins at a multiple of 16 bytes
    locate(at);
    const bool is_straight = is_wide && inside && left >= RUN && X.next_pixel == TOGETHER;
    const int back = X.flipped ? RUN - 1 : 0;

    if (STORE != LAST && is_straight) {
      // consecutive elements: read as words, whichever way they run
      u32 word[TOGETHER * RUN * sizeof(In) / 4];
      bool is_present = false;
      const auto values = [&](int channel, float* v, int step) {
        if (!RGB || channel == 0) {
          const In* from = source_of(channel);
          is_present = from != nullptr;
          if (is_present) load_words<In, TOGETHER * RUN>(from - back * TOGETHER, pixels, num_pixels, word);
        }
        const float a = __ldg(scale + channel), b = __ldg(shift + channel);
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
          const float forward = pixel_of<In>(word, RGB ? 3 * i + channel : i);
          const float backward = pixel_of<In>(word, RGB ? 3 * (RUN - 1 - i) + channel : RUN - 1 - i);
          float x = is_present ? (X.flipped ? backward : forward) : absent;
          if (is_adjusted) x = adjusted<In>(x, change.x, change.y);
          v[step * i] = fmaf(x, a, b);
        }
      };
      if (STORE == LAST_OF_3) {
        float v[3 * RUN];
#pragma unroll
        for (int c = 0; c < 3; ++c) values(c, v + c, 3);
        Out* to = out + (i64(patch) * patch_size + at) * 3;
#pragma unroll
        for (int i = 0; i < 3; ++i) store_run(to + i * RUN, v + i * RUN);
      } else {
        const auto store = [&](int channel) {
          float v[RUN];
          values(channel, v, 1);
          store_run(out + (i64(patch) * channels + channel) * patch_size + at, v);
        };
        if (THREE) {
#pragma unroll
          for (int c = 0; c < 3; ++c) store(c);
        } else {
#pragma unroll 1
          for (int c = 0; c < channels; ++c) store(c);
        }
      }
      continue;
    }

    // value by value, in the order of the output
    int channel = 0, pixel = 0;
#pragma unroll 1
    for (int part = 0; part < channels; ++part) {  // `count` values each
      Run<Out> values;
      Out* const to = STORE == PLANAR ? out + (i64(patch) * channels + part) * patch_size + at
                                      : out + (i64(patch) * patch_size + at) * channels + i64(part) * count;
      const In* from = nullptr;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        if (left == 0) locate(at + pixel);
        float x = fill;
        if (inside) {
          from = source_of(channel);
          x = from ? float(__ldg(from)) : absent;
          if (is_adjusted) x = adjusted<In>(x, change.x, change.y);
        }
        const float v = fmaf(x, __ldg(scale + channel), __ldg(shift + channel));
        if (is_wide) {
          values.push(v);
        } else {
          store_one(to + i, v);
        }
        if (STORE == PLANAR || ++channel == channels) {
          ++pixel, --left, element += stride;
          channel = STORE == PLANAR ? channel : 0;
        }
      }
      if (is_wide) values.store(to);
      if (STORE == PLANAR) {
        ++channel, pixel = 0, left = 0;
      }
    }
  }
}
