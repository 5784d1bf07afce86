// Attention of a decode step: one query a row over the live slots of a KV cache, whose new key and value it stores.
//
// A block takes one part of the slots of one row and key/value head, for all query heads of the group. It rotates the
// queries, and the block whose part has the new slot rotates and stores the new key and stores the new value. Each warp
// multiplies 16 slots at a time by tensor cores and keeps its own softmax. The block that is done last joins the parts.
//
// Constants that the compiler gets:
//   KV_BITS 16 or 8 (int8 with one float16 scale for each slot). HALF: 16-bit floats are float16, else bfloat16.
//   ROWS. HEADS of keys and values. GROUP: query heads for each of them, at most 16. DIM of a head: a multiple of 32 up
//   to 128. SLOTS of a row of the cache, a multiple of 16. BOUND: slots that are read at most. PARTS of the slots.
//   WARPS of a block. SCALE of the scores: log2(e) / sqrt(DIM).
// Letters: r rows, h heads, s slots, d dims.

#define TILE 16                             // slots that a warp multiplies at once
#define STRIDE (2 * DIM + 16)               // bytes of a row of 16-bit floats in shared memory; 16 more, for other banks
#define PAIRS (DIM / 2)                     // rotary pairs
#define THREADS (32 * WARPS)
#define HIDDEN -1e30f
#define ALL 0xffffffff

#if KV_BITS == 16
typedef u16 Stored;
#else
typedef signed char Stored;
#endif

__device__ u32 finished[ROWS * HEADS];  // parts that are done; zero between launches

// Dimension d of a rotated head, whose dimensions d and d + PAIRS rotate together.
DEVICE float rotated(const u16* head, const float* cos, const float* sin, int d) {
  const int i = d % PAIRS;
  const float a = value_of(head[i]), b = value_of(head[i + PAIRS]);
  return value_of(rounded(d < PAIRS ? a * cos[i] - b * sin[i] : b * cos[i] + a * sin[i]));
}

// Stores a key or value, with dimension lane + 32 i in values[i], in its slot. In 8 bits it gets a scale.
DEVICE void store(Stored* to, u16* scale, const float values[DIM / 32], int lane) {
#if KV_BITS == 16
  for (int i = 0; i < DIM / 32; i++) to[lane + 32 * i] = rounded(values[i]);
#else
  float largest = 0;
  for (int i = 0; i < DIM / 32; i++) largest = fmaxf(largest, fabsf(values[i]));
  for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
  const u16 bits = (u16)halves(fmaxf(largest / 127, 6.103515625e-05f), 0);  // the least normal float16
  const float divisor = float_of_half(bits);
  for (int i = 0; i < DIM / 32; i++) to[lane + 32 * i] = (Stored)fminf(fmaxf(rintf(values[i] / divisor), -127), 127);
  if (lane == 0) *scale = bits;
#endif
}

#if KV_BITS == 16
typedef uint4 Eight;  // stored values
DEVICE uint4 floats_of(Eight words) { return words; }
#else
typedef uint2 Eight;

// Eight integers as four words of two 16-bit floats.
DEVICE uint4 floats_of(Eight words) {
  const u32 a = floats_of_bytes_0_2(words.x), b = floats_of_bytes_0_2(words.x >> 8);
  const u32 c = floats_of_bytes_0_2(words.y), d = floats_of_bytes_0_2(words.y >> 8);
  return make_uint4(low_halves(a, b), high_halves(a, b), low_halves(c, d), high_halves(c, d));
}
#endif

#if KV_BITS == 16
#define CACHE_ARGUMENTS const u16 *, const u16 *
#define RESULTS Stored *k_cache, Stored *v_cache
#else
#define CACHE_ARGUMENTS const u8 *, const u16 *, const u8 *, const u16 *
#define RESULTS Stored *k_cache, u16 *k_scales, Stored *v_cache, u16 *v_scales
#endif

// What a warp has loaded of 16 slots: the keys that its threads multiply, and values in 8 bits. Values in 16 bits are
// copied to shared memory.
struct Loaded {
  Eight keys[2][DIM / 32];
#if KV_BITS == 8
  uint4 values[DIM / 32];
  u32 k_scales[2], v_scales[2];  // of two slots each
#endif
};

// The largest scores, the sums of exponentials, and how much the new largest scores reduce what was summed before.
struct Softmax {
  float largest[2], total[2], correction[2];
};

// Turns scores of slots 8 n + 2 t and the next (for head g, then for head g + 8) into weights.
DEVICE void weigh(float scores[2][4], const Loaded& loaded, Softmax& softmax, u32 weights[4]) {
  for (int below = 0; below < 2; below++) {  // head g, then head g + 8
    float top = softmax.largest[below];
    for (int n = 0; n < 2; n++) top = fmaxf(top, fmaxf(scores[n][2 * below], scores[n][2 * below + 1]));
    top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
    top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
    softmax.correction[below] = power_of_2(softmax.largest[below] - top);
    softmax.largest[below] = top;
    softmax.total[below] *= softmax.correction[below];
    for (int n = 0; n < 2; n++) {
      float a = power_of_2(scores[n][2 * below] - top), b = power_of_2(scores[n][2 * below + 1] - top);
      softmax.total[below] += a + b;
#if KV_BITS == 8
      a *= float_of_half((u16)loaded.v_scales[n]), b *= float_of_half((u16)(loaded.v_scales[n] >> 16));
#endif
      weights[2 * n + below] = pair(a, b);
    }
  }
}

// The result of all parts of one row and key/value head, from their results and sums, by one block.
DEVICE void join(const float* parts_out, const float* parts_sums, u16* out, float* shares, int warp, int lane) {
  for (int h = warp; h < GROUP; h += WARPS) {  // shares (GROUP, PARTS): the weight of each part
    float top = HIDDEN, sum = 0;
    for (int p = lane; p < PARTS; p += 32) top = fmaxf(top, load_fresh(parts_sums + (p * GROUP + h) * 2));
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, step));
    for (int p = lane; p < PARTS; p += 32) {
      const float weight = power_of_2(load_fresh(parts_sums + (p * GROUP + h) * 2) - top);
      shares[h * PARTS + p] = weight;
      sum += weight * load_fresh(parts_sums + (p * GROUP + h) * 2 + 1);
    }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    for (int p = lane; p < PARTS; p += 32) shares[h * PARTS + p] /= sum;
  }
  __syncthreads();
  for (int i = 4 * threadIdx.x; i < GROUP * DIM; i += 4 * THREADS) {
    float a = 0, b = 0, c = 0, d = 0;
#pragma unroll 8
    for (int p = 0; p < PARTS; p++) {
      const float share = shares[i / DIM * PARTS + p];
      const float4 part = load_fresh_4(parts_out + p * GROUP * DIM + i);
      a += share * part.x, b += share * part.y, c += share * part.z, d += share * part.w;
    }
    *(uint2*)(out + i) = make_uint2(pair(a, b), pair(c, d));
  }
}

// The cache comes as operands and as results, in the same memory. Of `parts_out` (r, h, parts, GROUP, d) and
// `parts_sums` (r, h, parts, GROUP, 2) nothing is left to read.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    decode(const u16* q, const u16* k, const u16* v, const float* cos, const float* sin, const int* positions,
           const int* slots, CACHE_ARGUMENTS, u16* out, RESULTS, float* parts_out, float* parts_sums) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int part = blockIdx.x, head = blockIdx.y, row = blockIdx.z, of_row = row * HEADS + head;
  u8* queries = shared;                                                   // [16][STRIDE]
  u8* values = queries + 16 * STRIDE + warp * TILE * STRIDE;              // [16][STRIDE] of this warp
  float* sums = (float*)(queries + 16 * STRIDE + WARPS * TILE * STRIDE);  // [WARPS][16][2]: largest score, sum
  float* outs = sums + WARPS * 16 * 2;                                    // [WARPS][GROUP][DIM]
  u32* arrived = (u32*)(outs + WARPS * GROUP * DIM);

  const int length = min(positions[row] + 1, BOUND), slot = slots[row];
  const int tiles = (length + TILE - 1) / TILE, each = max(1, (tiles + PARTS - 1) / PARTS);
  const int low = min(part * each, tiles), high = min(low + each, tiles), first_tile = low + warp;
  k_cache += (u64)of_row * SLOTS * DIM;
  v_cache += (u64)of_row * SLOTS * DIM;
#if KV_BITS == 8
  k_scales += (u64)of_row * SLOTS;
  v_scales += (u64)of_row * SLOTS;
#endif
  cos += row * PAIRS;
  sin += row * PAIRS;

  Loaded loaded;
  auto load = [&](int tile) {
    const int start = tile * TILE;
#if KV_BITS == 16
    for (int i = 0; i < DIM / 16; i++) {
      const int at = (lane + 32 * i) * 8;
      copy<16>(values + at / DIM * STRIDE + at % DIM * 2, v_cache + start * DIM + at, true);
    }
    end_of_copies();
#else
    for (int i = 0; i < DIM / 32; i++) loaded.values[i] = *(const uint4*)(v_cache + start * DIM + (lane + 32 * i) * 16);
    for (int n = 0; n < 2; n++) {
      loaded.k_scales[n] = *(const u32*)(k_scales + start + 8 * n + 2 * t);
      loaded.v_scales[n] = *(const u32*)(v_scales + start + 8 * n + 2 * t);
    }
#endif
    for (int n = 0; n < 2; n++) {
      for (int j = 0; j < DIM / 32; j++) {
        loaded.keys[n][j] = *(const Eight*)(k_cache + (start + 8 * n + g) * DIM + 32 * j + 8 * t);
      }
    }
  };
  const bool stores = 0 <= slot && slot < SLOTS && part == min(slot / TILE / each, PARTS - 1);
  if (!stores && first_tile < high) load(first_tile);  // on its way while the queries are rotated

  for (int i = threadIdx.x; i < 16 * DIM; i += THREADS) {
    const int h = i / DIM, d = i % DIM;
    const u16* from = q + (u64)(of_row * GROUP + h) * DIM;
    ((u16*)(queries + h * STRIDE))[d] = h < GROUP ? rounded(rotated(from, cos, sin, d)) : 0;
  }
  if (stores && warp < 2) {
    const u16* from = (warp ? v : k) + of_row * DIM;
    float numbers[DIM / 32];
    for (int i = 0; i < DIM / 32; i++) {
      numbers[i] = warp ? value_of(from[lane + 32 * i]) : rotated(from, cos, sin, lane + 32 * i);
    }
#if KV_BITS == 16
    store((warp ? v_cache : k_cache) + slot * DIM, nullptr, numbers, lane);
#else
    store((warp ? v_cache : k_cache) + slot * DIM, (warp ? v_scales : k_scales) + slot, numbers, lane);
#endif
  }
  __syncthreads();
  if (stores && first_tile < high) load(first_tile);

  // Products have the heads of the group as rows: those numbered g and g + 8 are this thread's.
  u32 first[DIM / 32][4], second[DIM / 32][4];
  for (int j = 0; j < DIM / 32; j++) {
    const uint4 above = *(const uint4*)(queries + g * STRIDE + 64 * j + 16 * t);
    const uint4 below = *(const uint4*)(queries + (g + 8) * STRIDE + 64 * j + 16 * t);
    first[j][0] = above.x, first[j][1] = below.x, first[j][2] = above.y, first[j][3] = below.y;
    second[j][0] = above.z, second[j][1] = below.z, second[j][2] = above.w, second[j][3] = below.w;
  }
  Softmax softmax = {{HIDDEN, HIDDEN}, {0, 0}, {1, 1}};
  float mine[DIM / 8][4] = {};
  for (int tile = first_tile; tile < high; tile += WARPS) {
    if (tile != first_tile) load(tile);
    float scores[2][4] = {};
    for (int n = 0; n < 2; n++) {
      for (int j = 0; j < DIM / 32; j++) {
        const uint4 keys = floats_of(loaded.keys[n][j]);
        multiply_tile(scores[n], first[j], keys.x, keys.y, scores[n]);
        multiply_tile(scores[n], second[j], keys.z, keys.w, scores[n]);
      }
      for (int i = 0; i < 4; i++) {
        float scale = SCALE;
#if KV_BITS == 8
        scale *= float_of_half((u16)(loaded.k_scales[n] >> i % 2 * 16));
#endif
        scores[n][i] = tile * TILE + 8 * n + 2 * t + i % 2 < length ? scores[n][i] * scale : HIDDEN;
      }
    }
    u32 weights[4];
    weigh(scores, loaded, softmax, weights);
#if KV_BITS == 16
    wait_for_copies<0>();
#else
    for (int i = 0; i < DIM / 32; i++) {
      const int at = (lane + 32 * i) * 16;
      uint4* to = (uint4*)(values + at / DIM * STRIDE + at % DIM * 2);
      to[0] = floats_of(make_uint2(loaded.values[i].x, loaded.values[i].y));
      to[1] = floats_of(make_uint2(loaded.values[i].z, loaded.values[i].w));
    }
#endif
    __syncwarp();
    for (int j = 0; j < DIM / 16; j++) {
      u32 columns[4];  // slots 0 to 7 and 8 to 15 of dims 16 j to 16 j + 7, then of the next 8
      load_transposed(columns, values + (lane % 16) * STRIDE + 32 * j + lane / 16 * 16);
      for (int n = 0; n < 2; n++) {
        float* to = mine[2 * j + n];
        to[0] *= softmax.correction[0], to[1] *= softmax.correction[0];
        to[2] *= softmax.correction[1], to[3] *= softmax.correction[1];
        multiply_tile(to, weights, columns[2 * n], columns[2 * n + 1], to);
      }
    }
    __syncwarp();  // all threads have read the values, which the next 16 slots replace
  }

  for (int below = 0; below < 2; below++) {
    float total = softmax.total[below];
    total += __shfl_xor_sync(ALL, total, 1);
    total += __shfl_xor_sync(ALL, total, 2);
    const int h = g + 8 * below;
    if (t == 0) sums[(warp * 16 + h) * 2] = softmax.largest[below], sums[(warp * 16 + h) * 2 + 1] = total;
    for (int j = 0; j < DIM / 8; j++) {
      float* to = outs + (warp * GROUP + h) * DIM + 8 * j + 2 * t;
      if (h < GROUP) *(float2*)to = make_float2(mine[j][2 * below], mine[j][2 * below + 1]);
    }
  }
  __syncthreads();
  parts_out += (u64)of_row * PARTS * GROUP * DIM;
  parts_sums += (u64)of_row * PARTS * GROUP * 2;
  out += (u64)of_row * GROUP * DIM;
  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
    const int h = i / DIM;
    float top = HIDDEN, sum = 0, result = 0;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, sums[(w * 16 + h) * 2]);
    for (int w = 0; w < WARPS; w++) {
      const float weight = power_of_2(sums[(w * 16 + h) * 2] - top);
      sum += weight * sums[(w * 16 + h) * 2 + 1];
      result += weight * outs[w * GROUP * DIM + i];
    }
    if (PARTS == 1) {
      out[i] = rounded(result / sum);
    } else {
      parts_out[part * GROUP * DIM + i] = result;
      if (i % DIM == 0) parts_sums[(part * GROUP + h) * 2] = top, parts_sums[(part * GROUP + h) * 2 + 1] = sum;
    }
  }
  if (PARTS == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) *arrived = arrive(&finished[of_row]);
  __syncthreads();
  if (*arrived != PARTS - 1) return;
  join(parts_out, parts_sums, out, outs, warp, lane);
  if (threadIdx.x == 0) finished[of_row] = 0;
}
