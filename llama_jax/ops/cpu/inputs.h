// The rows that are multiplied with weights, after a norm or an activation, and the weights.
#pragma once
#include <algorithm>
#include "pool.h"
#include "simd.h"
#include "tiles.h"

using Type = ffi::DataType;

enum Math { FLOAT, BF16 };  // how inputs are multiplied: in float32, or as bfloat16 pairs
constexpr int ROWS = 8;            // rows of x at a time, if they are few
constexpr int FEW = 16;            // most rows that are few
constexpr int FEWEST_BY_AMX = 2;   // rows; one is faster without
constexpr int MANY = 4096;         // rows of x at a time, if they are many
constexpr int MOST_WEIGHTS = 4;    // of one call
constexpr int TILE = 252;          // most outputs of a tile, whose results wait in float32
constexpr int AHEAD = 8192;        // least bytes between the prefetched and the multiplied weights
constexpr int GROUP = 32;          // values that share a scale

struct Inputs {
  const void* x; bool bf16; int first, B, K, pad;  // rows first..first + B; pad: K rounded up to 64 or 128
  int before; const void* with; bool with_bf16; float eps;  // before: 0 nothing, 1 RMSNorm (with: its weight), 2 silu(x) * with
  float* f;      // for few rows: (B, pad), zero beyond K
  uint16_t* h;   // the same as bfloat16; for grouped weights, in the order of in_order; by AMX, of in_tiles or in_pairs
};

INLINE float at(const void* p, bool bf16, int64_t i) { return bf16 ? from_bf16(((const uint16_t*)p)[i]) : ((const float*)p)[i]; }

template <class T> INLINE void widen(const T* x, int K, float* f) {
  int k = 0;
  for (; k + LANES <= K; k += LANES) store(f + k, load(x + k));
  for (; k < K; k++) f[k] = at(x, sizeof(T) == 2, k);
}
static void round_to_bf16(float* f, int K) {
  int k = 0;
  for (; k + LANES <= K; k += LANES) { uint16_t h[LANES]; narrow(f + k, LANES, h); store(f + k, load(h)); }
  for (; k < K; k++) f[k] = from_bf16(to_bf16(f[k]));
}
// Row b of x as floats, after the norm or the activation, with the roundings of the same operations in x's type.
static void read_row(const Inputs& in, int b, float* f) {
  const int K = in.K; const int64_t start = (int64_t)(in.first + b) * K;
  auto row = [&](const void* from, float* out) {
    if (in.bf16) widen((const uint16_t*)from + start, K, out); else widen((const float*)from + start, K, out);
    memset(out + K, 0, (in.pad - K) * 4);
  };
  row(in.x, f);
  if (in.before == 1) {
    vf squares[4] = {};
    for (int k = 0; k < in.pad; k += 4 * LANES) UNROLL for (int j = 0; j < 4; j++) { vf v = load(f + k + j * LANES); squares[j] += v * v; }
    const float r = 1.f / sqrtf(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / K + in.eps);
    static thread_local Scratch scratch;
    float* scale = scratch.get<float>(in.pad);
    if (in.with_bf16) widen((const uint16_t*)in.with, K, scale); else widen((const float*)in.with, K, scale);
    for (int k = 0; k < K; k++) f[k] *= r;
    if (in.bf16) round_to_bf16(f, K), round_to_bf16(scale, K);
    for (int k = 0; k < K; k++) f[k] *= scale[k];
    if (in.bf16) round_to_bf16(f, K);
  } else if (in.before == 2) {
    static thread_local Scratch scratch;
    float* up = scratch.get<float>(in.pad);
    row(in.with, up);
    for (int k = 0; k < in.pad; k += LANES) { vf g = load(f + k); store(f + k, g / (1.f + exp(-g)) * load(up + k)); }
    if (in.bf16) round_to_bf16(f, K);
  }
}
struct Weight { const char* w; const uint16_t* scales; Type type; int N; char* out; bool out_bf16; const char* plus; };  // plus: of the type of out, or null
template <class T> INLINE void write_row(const float* sums, int n, const T* plus, T* out) {
  if (!plus) return narrow(sums, n, out);
  T product[LANES]; float added[LANES];
  int i = 0;
  for (; i + LANES <= n; i += LANES) narrow(sums + i, LANES, product), store(added, load(plus + i) + load(product)), narrow(added, LANES, out + i);
  for (; i < n; i++) narrow(sums + i, 1, product), added[0] = at(plus, sizeof(T) == 2, i) + at(product, sizeof(T) == 2, 0), narrow(added, 1, out + i);
}
// Writes n sums of one row from place `at` of the results on. `plus` is added to the rounded sums, as XLA would.
INLINE void write_row(const float* sums, int n, bool bf16, char* out, int64_t at, const char* plus = nullptr) {
  if (bf16) write_row(sums, n, plus ? (const uint16_t*)plus + at : nullptr, (uint16_t*)out + at);
  else write_row(sums, n, plus ? (const float*)plus + at : nullptr, (float*)out + at);
}
static int64_t row_bytes(Type t, int K) { return t == Type::F32 ? 4ll * K : t == Type::BF16 ? 2ll * K : t == Type::S8 ? K : K / 2; }

#ifdef HAS_BF16
// Inputs in the order of the weights of four_groups, 128 at a time.
static void in_order(const float* f, int count, bool four_bits, uint16_t* h) {
  alignas(64) uint16_t evens_and_odds[GROUP];  // even values of the first 16 and of the last, then odd ones
  for (int i = 0; i < GROUP; i++) evens_and_odds[i] = 16 * (i >> 3 & 1) + 2 * (i & 7) + (i >> 4);
  for (int k = 0; k < count; k += GROUP) {
    uint16_t from[GROUP], *to = h + (k & ~127); const int g = k / GROUP & 3;
    narrow(f + k, GROUP, from);
    if (four_bits) {
      uint16_t lanes[GROUP];
      _mm512_storeu_si512(lanes, _mm512_permutexvar_epi16(_mm512_load_si512(evens_and_odds), _mm512_loadu_si512(from)));
      UNROLL for (int i = 0; i < 4; i++) memcpy(to + 32 * i + 8 * g, lanes + 8 * i, 16);
    }
    else UNROLL for (int i = 0; i < 16; i++) memcpy(to + 64 * (i >> 2 & 1) + 32 * (i & 1) + 16 * (g & 1) + 8 * (i >> 3) + 4 * (i >> 1 & 1) + 2 * (g >> 1), from + 2 * i, 4);
  }
}
#endif
#ifdef HAS_AMX
INLINE int tile_rows(int B) { return B <= 2 ? 2 : B <= 4 ? 4 : B <= 8 ? 8 : 16; }  // with any in the rows behind B
constexpr int groups_of_a_tile(int rows) { return rows <= 4 ? 4 : 1; }  // whose sums share a tile, since a store of one row takes as long as one of 16
// Inputs of grouped weights as first operands of AMX, in the order of sixteen_outputs: row b of tiles of `rows` rows and 32
// inputs. `rows` zero rows stand for each of the other groups of a tile of sums.
static void in_tiles(const float* f, int b, int rows, int count, Type type, uint16_t* h) {
  alignas(64) uint16_t order[GROUP], from[GROUP];
  for (int i = 0; i < GROUP; i++) order[i] = 2 * (i & 1) + (type == Type::U8 ? (i >> 3) * 4 + (i >> 2 & 1) + 8 * (i & 2) : (i & ~3) + (i >> 1 & 1));
  const int groups = groups_of_a_tile(rows);
  for (int k = 0; k < count; k += GROUP, h += GROUP * rows * groups) {
    narrow(f + k, GROUP, from);
    _mm512_storeu_si512(h + GROUP * (k / GROUP % groups * rows + b), _mm512_permutexvar_epi16(_mm512_load_si512(order), _mm512_loadu_si512(from)));
  }
}
// Inputs of bfloat16 weights as second operands of AMX: pairs of inputs of `rows` rows, of which those behind B are zeros.
// h has room for 16 - rows pairs more.
static void in_pairs(const float* f, int B, int rows, int count, uint16_t* h) {
  for (int k = 0; k < count; k += 32) {
    __m512i pairs[16] = {};
    for (int b = 0; b < B; b++) { uint16_t from[32]; narrow(f + (int64_t)b * count + k, 32, from); pairs[b] = _mm512_loadu_si512(from); }
    transpose16(pairs, (uint32_t*)(h + (int64_t)k * rows), rows);  // a pair overwrites the end of the one before it
  }
}
#endif
// True if few rows are multiplied by AMX.
INLINE bool few_by_amx(Math math, int rows) {
#ifdef HAS_AMX
  return math == BF16 && rows >= FEWEST_BY_AMX && amx_allowed();
#else
  return false;
#endif
}
INLINE Math math_of(const Inputs& in, Type weights) {
#ifdef HAS_BF16
  if (in.bf16 && weights != Type::F32) return BF16;
#endif
  return FLOAT;
}
// Few inputs, as float32 and, if they are multiplied so, as bfloat16. Rows beyond in.B may be multiplied too, and are dropped.
// run(n, body) is a parallel loop.
template <class Run> static void prepare(Inputs& in, Math math, Type type, const Run& run) {
  static thread_local Scratch floats, halves;
  const bool grouped = type == Type::S8 || type == Type::U8, tiles = few_by_amx(math, in.B);
  in.pad = rounded_up(in.K, grouped ? 128 : 64);
  const int64_t values = (int64_t)rounded_up(in.B, ROWS) * in.pad;
  in.f = floats.get<float>(values);
  if (math == BF16) in.h = halves.get<uint16_t>(tiles ? (int64_t)FEW * in.pad : values);
#ifdef HAS_AMX
  if (tiles && grouped) { const int tile = tile_rows(in.B); memset(in.h, 0, 2ll * tile * groups_of_a_tile(tile) * in.pad); }
#endif
  auto one = [&](int b) {
    float* f = in.f + (int64_t)b * in.pad;
    read_row(in, b, f);
    if (math != BF16) return;
#ifdef HAS_AMX
    if (tiles) { if (grouped) in_tiles(f, b, tile_rows(in.B), in.pad, type, in.h); return; }
#endif
    uint16_t* h = in.h + (int64_t)b * in.pad;
#ifdef HAS_BF16
    if (grouped) return in_order(f, in.pad, type == Type::U8, h);
#endif
    narrow(f, in.pad, h);
  };
  run(in.B, one);
#ifdef HAS_AMX
  if (tiles && !grouped) in_pairs(in.f, in.B, tile_rows(in.B), in.pad, in.h);
#endif
}
