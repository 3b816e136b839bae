// The exponential race: the K positions of each row that arrive first, and the mass of all others.
//
//   key(i) = log E(i) - logit(i)      E(i) = -log(1 - u(i)), u(i) of 53 Philox bits; ties go to the lower index
//
// sample_race reads the logits once, several blocks ("parts") to a row; sample_merge makes one result of the
// parts of a row. Each keeps the first arrivals seen so far in shared memory, and their last key, the threshold,
// lets nearly all positions be turned away by a comparison with their high Philox word, before any logarithm:
// arriving by the threshold means E <= e^(threshold + logit), and E >= u >= word 2^-32.
//
// What stays outside is summed in whole numbers, so the result does not depend on parts, blocks or their order:
// see ats_stream/sampling/mass.py. All float64 arithmetic that reaches the result is written in operations that
// round once each and that no compiler may join; it is that of ats_stream/sampling/logarithm.py.
//
// Letters: B rows, M positions, K arrivals kept, P parts of a row. No includes: the file goes through NVRTC as it is.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

struct bfloat16 { u16 bits; };
struct float16 { u16 bits; };

constexpr u32 MAX_THREADS = 256;  // as sample.py plans
constexpr u32 CAPACITY = 2048;     // likewise
constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr u32 NOWHERE = 0xffffffffu;           // the place of no position
constexpr i64 PADDING_INDEX = i64(1) << 62;
#define INFINITE __longlong_as_double(0x7ff0000000000000ll)
#define NEVER (-INFINITE)

// ---- float64 operations, each rounded once ----

__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double sub(double a, double b) { return __dadd_rn(a, -b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double mul_add(double a, double b, double c) { return add(mul(a, b), c); }  // rounds twice
__device__ __forceinline__ u64 bits_of(double x) { return u64(__double_as_longlong(x)); }
__device__ __forceinline__ double larger(double a, double b) { return a > b ? a : b; }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
template <typename W> __device__ __forceinline__ W largest_of_four(const W* v) {
  return larger(larger(v[0], v[1]), larger(v[2], v[3]));
}

// In constant memory, from where float64 operations take them without a register.
__constant__ double LOG2_E = 1.4426950408889634;
__constant__ double LN2_HIGH = 0.6931471824645996;  // of 21 bits
__constant__ double LN2_LOW = -1.904654299957768e-09;
__constant__ double ATANH[12] = {1.0, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17,
                                 1.0 / 19, 1.0 / 21, 1.0 / 23};
__constant__ double EXP[13] = {1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                               1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600};
constexpr double SQRT_HALF = 0.7071067811865476;
constexpr double INTEGER = 6755399441055744.0;  // 1.5 2^52: leaves the nearest integer in the low bits of a sum

__device__ __forceinline__ double twice_atanh(double s) {
  const double square = mul(s, s);
  double series = ATANH[11];
#pragma unroll
  for (int term = 10; term >= 0; --term) series = mul_add(series, square, ATANH[term]);
  return mul(mul(s, 2.0), series);
}

// Logarithm of a positive, normal number.
__device__ __noinline__ double log_of(double x) {
  const u64 bits = bits_of(x);
  int exponent = int(bits >> 52) - 1022;
  double mantissa = __longlong_as_double(i64((bits & 0xfffffffffffffull) | 0x3fe0000000000000ull));
  if (mantissa < SQRT_HALF) {
    mantissa = mul(2.0, mantissa);
    exponent -= 1;
  }
  const double k = double(exponent);
  const double residue = twice_atanh(__ddiv_rn(sub(mantissa, 1.0), add(mantissa, 1.0)));
  return add(mul(k, LN2_HIGH), add(mul(k, LN2_LOW), residue));
}

__device__ __forceinline__ double minus_log1m(double u) {
  return u < 0.25 ? twice_atanh(__ddiv_rn(u, sub(2.0, u))) : -log_of(sub(1.0, u));
}

// e^x 2^exponent for |x| up to a little over 2^30, where the result is a normal number.
__device__ __forceinline__ double scaled_exp(double x, int exponent) {
  const double z = mul_add(x, LOG2_E, INTEGER);
  const double k = sub(z, INTEGER);
  const double r = sub(fma(-k, LN2_HIGH, x), mul(k, LN2_LOW));  // k LN2_HIGH is exact, joined or not
  const double square = mul(r, r), fourth = mul(square, square);
  const double low = add(add(r, 1.0), mul(mul_add(r, EXP[3], 0.5), square));
  const double middle = add(mul_add(r, EXP[5], EXP[4]), mul(mul_add(r, EXP[7], EXP[6]), square));
  const double high = add(
      add(mul_add(r, EXP[9], EXP[8]), mul(mul_add(r, EXP[11], EXP[10]), square)), mul(fourth, EXP[12]));
  const double p = add(add(low, mul(middle, fourth)), mul(high, mul(fourth, fourth)));
  // times 2^(k + exponent)
  const u32 upper = u32(__double2hiint(p)) + ((u32(__double2loint(z)) + u32(exponent)) << 20);
  return __hiloint2double(i32(upper), __double2loint(p));
}

// ---- Philox4x32-10 ----

struct Words { u32 word[4]; };

__device__ __forceinline__ Words philox(u32 group, u64 stream, u32 purpose, u64 seed) {
  u32 c0 = group, c1 = u32(stream), c2 = u32(stream >> 32), c3 = purpose;
  u32 key0 = u32(seed), key1 = u32(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ u32 pick(const Words& words, u32 lane) {
  const u32 even = lane == 0 ? words.word[0] : words.word[2], odd = lane == 1 ? words.word[1] : words.word[3];
  return lane & 1 ? odd : even;
}

__device__ __noinline__ u32 word_at(i64 index, u64 stream, u32 purpose, u64 seed) {
  return pick(philox(u32(index >> 2), stream, purpose, seed), u32(index) & 3);
}

// log E of a position; one function for every caller, not inlined, so that none sees it rounded differently.
__device__ __noinline__ double log_wait(i64 index, u64 stream, u64 seed) {
  const u64 high = word_at(index, stream, 0, seed), low = word_at(index, stream, 1, seed);
  double u = mul(add(double(i64(high << 21 | low >> 11)), 0.5), 1.0 / 9007199254740992.0);
  if (u > 1 - 1.0 / 9007199254740992.0) u = 1 - 1.0 / 9007199254740992.0;
  return log_of(minus_log1m(u));
}

// ---- sums of e^logit in whole numbers on three levels of 28 bits, see ats_stream/sampling/mass.py ----

constexpr int LEVEL_BITS = 28, SPARE_BITS = 1;
constexpr double REACH = 120.0, FAR = 1073741824.0;
constexpr double ROUNDER0 = 1.5 * (1 << 24), ROUNDER1 = 1.5 / 16, ROUNDER2 = 1.5 / 4294967296.0;

__device__ __forceinline__ bool is_far(double peak) { return !(fabs(peak) <= FAR); }

// Number of the unit of a peak that is not far: floor(round(peak / ln 2) / 28).
__device__ __forceinline__ int unit_of(double peak) {
  const int k = __double2int_rn(mul(peak, LOG2_E));
  return (k >= 0 ? k : k - (LEVEL_BITS - 1)) / LEVEL_BITS;
}

struct Sum {
  double peak;   // the largest logit of the sum; NEVER if there is none
  int exponent;  // that scales weights: -28 (unit + 1) - 1; of no meaning where the peak is far
  i64 level[3];
};

__device__ __forceinline__ Sum empty_sum() { return {NEVER, 0, {0, 0, 0}}; }

// Bring levels under the unit of a peak that is not lower.
__device__ __forceinline__ void lift(i64* level, double peak, double new_peak) {
  if (is_far(peak) || is_far(new_peak)) {
    if (peak != new_peak) level[0] = level[1] = level[2] = 0;
    return;
  }
  const int steps = unit_of(new_peak) - unit_of(peak);
  if (steps == 0) return;
  level[2] = steps == 1 ? level[1] : steps == 2 ? level[0] : 0;
  level[1] = steps == 1 ? level[0] : 0;
  level[0] = 0;
}

__device__ __forceinline__ void raise_peak(Sum& sum, double peak) {
  lift(sum.level, sum.peak, peak);
  sum.peak = peak;
  if (!is_far(peak)) sum.exponent = -LEVEL_BITS * (unit_of(peak) + 1) - SPARE_BITS;
}

// Add one weight, rounded to the three levels. The bits that the rounders leave are those of ROUNDER* too many.
__device__ __forceinline__ void add_rounded(u64* level, double weight) {
  const double rounded0 = add(weight, ROUNDER0);
  const double rest0 = sub(weight, sub(rounded0, ROUNDER0));
  const double rounded1 = add(rest0, ROUNDER1);
  const double rest1 = sub(rest0, sub(rounded1, ROUNDER1));
  level[0] += bits_of(rounded0);
  level[1] += bits_of(rounded1);
  level[2] += bits_of(add(rest1, ROUNDER2));
}

__device__ __forceinline__ void take_rounders_off(u64* level, u32 count) {
  level[0] -= count * bits_of(ROUNDER0);
  level[1] -= count * bits_of(ROUNDER1);
  level[2] -= count * bits_of(ROUNDER2);
}

__device__ __noinline__ void add_logit(Sum& sum, double logit) {
  if (!(logit > NEVER)) return;
  if (logit > sum.peak) raise_peak(sum, logit);
  if (is_far(sum.peak)) {
    sum.level[0] += logit == sum.peak;
  } else if (logit >= larger(sum.peak - REACH, -FAR)) {
    u64 level[3] = {0, 0, 0};
    add_rounded(level, scaled_exp(logit, sum.exponent));
    take_rounders_off(level, 1);
    for (int i = 0; i < 3; ++i) sum.level[i] += i64(level[i]);
  }
}

__device__ __forceinline__ void add_sum(Sum& sum, double peak, const i64* levels) {
  i64 level[3] = {levels[0], levels[1], levels[2]};
  if (peak > sum.peak) raise_peak(sum, peak);
  lift(level, peak, sum.peak);
  for (int i = 0; i < 3; ++i) sum.level[i] += level[i];
}

// Logarithm of a sum: of (high + middle 2^-28 + low 2^-56) / (e^peak / unit), and the peak beside it.
__device__ __noinline__ double log_of(const Sum& sum) {
  if (sum.peak == NEVER) return NEVER;
  const double own = is_far(sum.peak) ? 1.0 : scaled_exp(sum.peak, sum.exponent + LEVEL_BITS);
  const i64 mask = (1 << LEVEL_BITS) - 1, low = sum.level[2];
  const i64 middle = sum.level[1] + (low >> LEVEL_BITS), high = sum.level[0] + (middle >> LEVEL_BITS);
  const double below = double((middle & mask) << LEVEL_BITS | (low & mask));
  const double total = mul_add(below, 1.0 / (i64(1) << 2 * LEVEL_BITS), double(high));
  return add(sum.peak, log_of(__ddiv_rn(total, own)));
}

// ---- what a block does together ----

// The largest of two logits, NaN if one is.
__device__ __forceinline__ double largest_of(double a, double b) { return a != a || a > b ? a : b; }

// Sums of all threads of the block, and the largest of `largest`; every thread gets both.
__device__ __noinline__ void sum_block(Sum& sum, double& largest) {
  __shared__ double warp_peak[MAX_THREADS / WARP], warp_largest[MAX_THREADS / WARP];
  __shared__ i64 warp_level[MAX_THREADS / WARP][3];
  const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, num_warps = blockDim.x / WARP;
  double peak = sum.peak;
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) {
    peak = larger(peak, __shfl_xor_sync(ALL_LANES, peak, step));
    largest = largest_of(largest, __shfl_xor_sync(ALL_LANES, largest, step));
  }
  if (lane == 0) {
    warp_peak[warp] = peak;
    warp_largest[warp] = largest;
  }
  __syncthreads();
  for (u32 i = 0; i < num_warps; ++i) {
    peak = larger(peak, warp_peak[i]);
    largest = largest_of(largest, warp_largest[i]);
  }
  raise_peak(sum, peak);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
      sum.level[i] += __shfl_xor_sync(ALL_LANES, sum.level[i], step);
    }
    if (lane == 0) warp_level[warp][i] = sum.level[i];
  }
  __syncthreads();
  for (int i = 0; i < 3; ++i) {
    sum.level[i] = 0;
    for (u32 other = 0; other < num_warps; ++other) sum.level[i] += warp_level[other][i];
  }
}

// Arrivals in shared memory: the first ones so far, in order, and behind them candidates that came since.
struct Held {
  double key[CAPACITY];
  u32 place[CAPACITY];
  u32 count;  // may pass the room that there is: who found none waits
};

// Whether an arrival comes before another; `index_of` names the place, at which nobody looks without need.
template <typename Source>
__device__ __forceinline__ bool is_before(
    double key, u32 place, double other_key, u32 other_place, const Source& source) {
  if (key != other_key) return key < other_key;
  if (place == NOWHERE || other_place == NOWHERE) return false;  // both are: keys of positions are finite
  return source.index_of(place) < source.index_of(other_place);
}

// Sort `held`, keep its first `num_kept`, add the others to `sum`; returns how many were kept. All threads call it,
// after a barrier behind the last candidate that came; there are num_sorted in order already.
template <typename Source>
__device__ __noinline__ u32 keep_first(
    Held& held, u32 room, u32 num_sorted, u32 num_kept, Source source, Sum& sum) {
  const u32 count = held.count < room ? held.count : room;
  u32 size = 1;
  while (size < count) size *= 2;
  for (u32 i = num_sorted + threadIdx.x; i < size; i += blockDim.x) {
    if (i < count) {
      held.key[i] = source.key_of(held.place[i], held.key[i]);
    } else {
      held.key[i] = INFINITE;
      held.place[i] = NOWHERE;
    }
  }
  // bitonic: runs of `length` are sorted upwards and downwards in turn
  for (u32 length = 2; length <= size; length *= 2) {
    for (u32 stride = length / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (u32 pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const u32 a = 2 * pair - (pair & (stride - 1)), b = a + stride;
        const double key_a = held.key[a], key_b = held.key[b];
        const u32 place_a = held.place[a], place_b = held.place[b];
        const bool is_upwards = (a & length) == 0;
        if (is_before(key_b, place_b, key_a, place_a, source) == is_upwards) {
          held.key[a] = key_b;
          held.key[b] = key_a;
          held.place[a] = place_b;
          held.place[b] = place_a;
        }
      }
    }
  }
  __syncthreads();
  for (u32 i = num_kept + threadIdx.x; i < count; i += blockDim.x) add_logit(sum, source.logit_of(held.place[i]));
  const u32 kept = count < num_kept ? count : num_kept;
  if (threadIdx.x == 0) held.count = kept;
  __syncthreads();
  return kept;
}

// ---- the parts of a row ----

// A part in memory: K keys, K indices, K logits, the peak and the levels of its rest, its largest logit; 8 bytes each.
struct Part {
  u64* words;
  u32 num_kept;
  __device__ __forceinline__ double* key() const { return reinterpret_cast<double*>(words); }
  __device__ __forceinline__ i64* index() const { return reinterpret_cast<i64*>(words + num_kept); }
  __device__ __forceinline__ double* logit() const { return reinterpret_cast<double*>(words + 2 * num_kept); }
  __device__ __forceinline__ double& peak() const { return *reinterpret_cast<double*>(words + 3 * num_kept); }
  __device__ __forceinline__ i64* level() const { return reinterpret_cast<i64*>(words + 3 * num_kept + 1); }
  __device__ __forceinline__ double& largest() const {
    return *reinterpret_cast<double*>(words + 3 * num_kept + 4);
  }
};

__device__ __forceinline__ Part part_of(u64* parts, i64 number, u32 num_kept) {
  return {parts + number * (3 * i64(num_kept) + 5), num_kept};
}

// ---- reading logits ----

__device__ __forceinline__ double widened(double v) { return v; }
__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ float widened(bfloat16 v) { return __uint_as_float(u32(v.bits) << 16); }
__device__ __forceinline__ float widened(float16 v) {
  const u32 magnitude = v.bits & 0x7fffu;
  // a float of the same bits is 2^112 too small, subnormals included
  const float value = magnitude >= 0x7c00u ? __uint_as_float(magnitude << 13 | 0x7f800000u)
                                           : __uint_as_float(magnitude << 13) * 5192296858534827628530496329220096.0f;
  return v.bits & 0x8000u ? -value : value;
}

template <typename T> struct Wide { using Type = float; };
template <> struct Wide<double> { using Type = double; };

template <typename T> struct alignas(4 * sizeof(T)) Four { T value[4]; };

// One row of logits, with the names of its positions if it has any.
template <typename T> struct Row {
  const T* logits;
  const i64* names;
  u64 stream, seed;
  bool by_logit;

  __device__ __forceinline__ i64 index_of(u32 place) const { return names == nullptr ? place : __ldg(names + place); }
  __device__ __forceinline__ double logit_of(u32 place) const { return widened(logits[place]); }
  __device__ __forceinline__ double key_of(u32 place, double) const {
    return by_logit ? -logit_of(place) : sub(log_wait(index_of(place), stream, seed), logit_of(place));
  }
};

// ---- the race ----

// A float that is not below x.
__device__ __forceinline__ float not_below(float x) { return x; }
__device__ __forceinline__ float not_below(double x) { return __double2float_ru(x); }

// The largest high word with which a logit may arrive by the threshold, which is given with some margin.
__device__ __forceinline__ u32 word_limit(float threshold, float logit) {
  return __float2uint_rz(exp2f((threshold + logit) * 1.44269504f) * (4294967296.0f * 1.0001f) + 2.0f);
}

// Which of four places, with the given high words, may arrive by the threshold, as four bits. `top` is their largest.
template <typename W>
__device__ __forceinline__ u32 candidates(const Words& words, const W* logit, W top, float threshold) {
  const u32 least01 = words.word[0] < words.word[1] ? words.word[0] : words.word[1];
  const u32 least23 = words.word[2] < words.word[3] ? words.word[2] : words.word[3];
  if ((least01 < least23 ? least01 : least23) > word_limit(threshold, not_below(top))) return 0;
  u32 found = 0;
#pragma unroll
  for (u32 j = 0; j < 4; ++j) {
    const bool may = logit[j] > W(NEVER) && words.word[j] <= word_limit(threshold, not_below(logit[j]));
    found |= u32(may) << j;
  }
  return found;
}

// The same where positions have names, or where logits alone count.
template <typename T, typename W>
__device__ __noinline__ u32 unusual_candidates(
    Row<T> row, u32 place, W logit0, W logit1, W logit2, W logit3, double threshold, float word_threshold) {
  const W logit[4] = {logit0, logit1, logit2, logit3};
  u32 found = 0;
  for (u32 j = 0; j < 4; ++j) {
    if (!(logit[j] > W(NEVER))) continue;
    const bool may = row.by_logit ? -double(logit[j]) <= threshold
                                  : word_at(row.index_of(place + j), row.stream, 0, row.seed) <=
                                        word_limit(word_threshold, not_below(logit[j]));
    found |= u32(may) << j;
  }
  return found;
}

// The sum that all common logits go to, in registers: no call takes its address.
template <typename W> struct FastSum {
  W peak;
  int exponent;
  u64 level[3];
};

// Add four logits, the largest of which is given and not NEVER; to `spare` where the common way does not do.
template <typename W>
__device__ __forceinline__ void add_four(FastSum<W>& sum, Sum& spare, const W* logit, W top) {
  if (top > W(FAR) || top < W(REACH - FAR)) {
    for (int j = 0; j < 4; ++j) add_logit(spare, double(logit[j]));
    return;
  }
  if (top > sum.peak) {
    Sum raised = {double(sum.peak), sum.exponent, {i64(sum.level[0]), i64(sum.level[1]), i64(sum.level[2])}};
    raise_peak(raised, double(top));
    sum = {top, raised.exponent, {u64(raised.level[0]), u64(raised.level[1]), u64(raised.level[2])}};
  }
  // from e^-60 of the peak on nothing is left on any level; that many and more are taken off, floats being up to 64
  // apart here
  const W lowest = sum.peak - W(100);
#pragma unroll
  for (int j = 0; j < 4; ++j) add_rounded(sum.level, scaled_exp(double(larger(logit[j], lowest)), sum.exponent));
  take_rounders_off(sum.level, 4);
}

// Read four logits from `place` on, NEVER behind the end of the row.
template <typename T, typename W>
__device__ __forceinline__ void load_four(
    const T* logits, u32 place, u32 num_positions, bool is_aligned, W* logit) {
  if (is_aligned && place + 4 <= num_positions) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(logits + place);
#pragma unroll
    for (int j = 0; j < 4; ++j) logit[j] = widened(four.value[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) logit[j] = place + j < num_positions ? widened(logits[place + j]) : W(NEVER);
  }
}

// Grid: B * num_parts blocks. Part p of a row takes every num_parts-th tile of it from tile p on; a tile has four
// places for each thread. M and the places of all parts in one round are below 2^31 each; K < room <= CAPACITY.
template <typename T>
__global__ void __launch_bounds__(MAX_THREADS, sizeof(T) == 8 ? 2 : 3) sample_race(
    const T* __restrict__ logits, i64 row_stride, i64 row_length, const i64* __restrict__ names, i64 names_stride,
    const i64* __restrict__ streams, const i64* __restrict__ seed, i32 by_logit, u32 num_kept, u32 room, u32 num_parts,
    u64* __restrict__ parts) {
  using W = typename Wide<T>::Type;
  __shared__ Held held;
  const i64 number = blockIdx.x / num_parts;
  const Row<T> row = {
      logits + number * row_stride, names == nullptr ? nullptr : names + number * names_stride,
      u64(__ldg(streams + number)), u64(__ldg(seed)), by_logit != 0};
  const bool is_aligned = reinterpret_cast<u64>(row.logits) % (4 * sizeof(T)) == 0;
  const bool is_usual = names == nullptr && by_logit == 0;
  if (threadIdx.x == 0) held.count = 0;
  __syncthreads();

  FastSum<W> sum = {W(NEVER), 0, {0, 0, 0}};
  Sum spare = empty_sum();
  bool has_nan = false, has_inf = false;
  float word_threshold = not_below(INFINITE);
  W highest = W(NEVER);
  u32 kept = 0;
  const u32 num_positions = u32(row_length), step = num_parts * 4 * blockDim.x;
  u32 begin = blockIdx.x % num_parts * 4 * blockDim.x;
  W next[4];
  load_four(row.logits, begin + 4 * threadIdx.x, num_positions, is_aligned, next);
  for (; begin < num_positions; begin += step) {
    const u32 place = begin + 4 * threadIdx.x;
    W logit[4] = {next[0], next[1], next[2], next[3]};
    load_four(row.logits, place + step, num_positions, is_aligned, next);
    if (!(logit[0] < W(INFINITE) && logit[1] < W(INFINITE) && logit[2] < W(INFINITE) && logit[3] < W(INFINITE))) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(logit[j] < W(INFINITE))) {  // NaN or +inf: tells it and counts as never
          (logit[j] != logit[j] ? has_nan : has_inf) = true;
          logit[j] = W(NEVER);
        }
      }
    }
    W top = largest_of_four(logit);
    highest = larger(highest, top);
    for (;;) {
      u32 waiting = 0;
      if (!is_usual) {
        const double threshold = kept == num_kept ? held.key[num_kept - 1] : INFINITE;
        waiting = unusual_candidates(row, place, logit[0], logit[1], logit[2], logit[3], threshold, word_threshold);
      } else if (top > W(NEVER)) {
        waiting = candidates(philox(place / 4, row.stream, 0, row.seed), logit, top, word_threshold);
      }
      if (waiting) {
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
          if (waiting >> j & 1) {
            const u32 slot = atomicAdd(&held.count, 1u);
            if (slot < room) {
              held.place[slot] = place + j;
              logit[j] = W(NEVER);
              waiting &= ~(1u << j);
            }
          }
        }
        top = largest_of_four(logit);
      }
      if (!__syncthreads_or(waiting != 0)) break;
      kept = keep_first(held, room, kept, num_kept, row, spare);
      if (kept == num_kept) {
        const double threshold = held.key[num_kept - 1];
        // covers every rounding in keys and here
        word_threshold = not_below(threshold + 4e-15 * fabs(threshold) + 1e-9);
      }
    }
    if (top > W(NEVER)) add_four(sum, spare, logit, top);
  }
  kept = keep_first(held, room, kept, num_kept, row, spare);
  const i64 levels[3] = {i64(sum.level[0]), i64(sum.level[1]), i64(sum.level[2])};
  add_sum(spare, double(sum.peak), levels);
  double largest = has_nan ? INFINITE - INFINITE : has_inf ? INFINITE : double(highest);
  sum_block(spare, largest);

  const Part part = part_of(parts, blockIdx.x, num_kept);
  for (u32 i = threadIdx.x; i < num_kept; i += blockDim.x) {
    const bool is_there = i < kept;
    part.key()[i] = is_there ? held.key[i] : INFINITE;
    part.index()[i] = is_there ? row.index_of(held.place[i]) : PADDING_INDEX;
    part.logit()[i] = is_there ? row.logit_of(held.place[i]) : NEVER;
  }
  if (threadIdx.x == 0) {
    part.peak() = spare.peak;
    for (int i = 0; i < 3; ++i) part.level()[i] = spare.level[i];
    part.largest() = largest;
  }
}

// ---- one result of the parts of a row ----

// The arrivals of all parts of a row: place i is arrival i / num_parts of part i % num_parts, so that the first
// ones of every part come first.
struct Parts {
  u64* first;
  u32 num_kept, num_parts;

  __device__ __forceinline__ Part of(u32 place) const { return part_of(first, place % num_parts, num_kept); }
  __device__ __forceinline__ i64 index_of(u32 place) const { return of(place).index()[place / num_parts]; }
  __device__ __forceinline__ double logit_of(u32 place) const { return of(place).logit()[place / num_parts]; }
  __device__ __forceinline__ double key_of(u32, double key) const { return key; }
};

// Grid: B blocks. `logs` (2, B): log-sum-exp of all logits, and of those behind the first K - 1 arrivals.
__global__ void __launch_bounds__(MAX_THREADS, 2) sample_merge(
    u64* __restrict__ all_parts, u32 num_kept, u32 room, u32 num_parts, double* __restrict__ keys, i64* __restrict__ indices,
    double* __restrict__ logits, double* __restrict__ peaks, i64* __restrict__ levels, double* __restrict__ logs,
    double* __restrict__ largests) {
  __shared__ Held held;
  const i64 row = blockIdx.x;
  const Parts parts = {part_of(all_parts, row * num_parts, num_kept).words, num_kept, num_parts};
  if (threadIdx.x == 0) held.count = 0;
  __syncthreads();

  Sum sum = empty_sum();
  double threshold = INFINITE, largest = NEVER;
  u32 kept = 0;
  for (u32 i = threadIdx.x; i < num_parts; i += blockDim.x) {
    const Part part = parts.of(i);
    add_sum(sum, part.peak(), part.level());
    largest = largest_of(largest, part.largest());
  }
  const u32 count = num_parts * num_kept;
  for (u32 begin = 0; begin < count; begin += blockDim.x) {
    const u32 place = begin + threadIdx.x;
    const double key = place < count ? parts.of(place).key()[place / num_parts] : INFINITE;
    bool waiting = key < INFINITE;
    for (;;) {
      if (waiting) {
        if (key > threshold) {
          add_logit(sum, parts.logit_of(place));
          waiting = false;
        } else {
          const u32 slot = atomicAdd(&held.count, 1u);
          if (slot < room) {
            held.key[slot] = key;
            held.place[slot] = place;
            waiting = false;
          }
        }
      }
      if (!__syncthreads_or(waiting)) break;
      kept = keep_first(held, room, kept, num_kept, parts, sum);
      if (kept == num_kept) threshold = held.key[num_kept - 1];
    }
  }
  kept = keep_first(held, room, kept, num_kept, parts, sum);
  sum_block(sum, largest);

  Sum others = empty_sum();  // the arrivals but the last one
  for (u32 i = threadIdx.x; i < num_kept; i += blockDim.x) {
    const bool is_there = i < kept;
    const double logit = is_there ? parts.logit_of(held.place[i]) : NEVER;
    keys[row * num_kept + i] = is_there ? held.key[i] : INFINITE;
    indices[row * num_kept + i] = is_there ? parts.index_of(held.place[i]) : PADDING_INDEX;
    logits[row * num_kept + i] = logit;
    if (i + 1 < num_kept) add_logit(others, logit);
  }
  double unused = NEVER;
  sum_block(others, unused);
  if (threadIdx.x == 0) {
    peaks[row] = sum.peak;
    for (int i = 0; i < 3; ++i) levels[3 * row + i] = sum.level[i];
    largests[row] = largest;
    if (kept == num_kept) add_logit(sum, parts.logit_of(held.place[num_kept - 1]));
    logs[gridDim.x + row] = log_of(sum);
    add_sum(sum, others.peak, others.level);
    logs[row] = log_of(sum);
  }
}
