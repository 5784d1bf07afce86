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
  const u16 bits = half_of_float(fmaxf(largest / 127, 6.103515625e-05f));  // the least normal float16
  const float divisor = float_of_half(bits);
  for (int i = 0; i < DIM / 32; i++) to[lane + 32 * i] = (Stored)fminf(fmaxf(rintf(values[i] / divisor), -127), 127);
  if (lane == 0) *scale = bits;
#endif
}

// Eight stored values as four words of two 16-bit floats.
DEVICE uint4 load_8(const Stored* from) {
#if KV_BITS == 16
  return *(const uint4*)from;
#else
  const uint2 words = *(const uint2*)from;
  const u32 a = floats_of_bytes_0_2(words.x), b = floats_of_bytes_0_2(words.x >> 8);
  const u32 c = floats_of_bytes_0_2(words.y), d = floats_of_bytes_0_2(words.y >> 8);
  return make_uint4(low_halves(a, b), high_halves(a, b), low_halves(c, d), high_halves(c, d));
#endif
}

#if KV_BITS == 16
#define CACHE_ARGUMENTS const u16 *, const u16 *
#define RESULTS Stored *k_cache, Stored *v_cache
#else
#define CACHE_ARGUMENTS const u8 *, const u16 *, const u8 *, const u16 *
#define RESULTS Stored *k_cache, u16 *k_scales, Stored *v_cache, u16 *v_scales
#endif

// The cache comes as operands and as results, in the same memory. Of `parts_out` (r, h, parts, GROUP, d) and
// `parts_sums` (r, h, parts, GROUP, 2) nothing is left to read.
extern "C" __global__ void __launch_bounds__(THREADS)
    decode(const u16* q, const u16* k, const u16* v, const float* cos, const float* sin, const int* positions,
           const int* slots, CACHE_ARGUMENTS, u16* out, RESULTS, float* parts_out, float* parts_sums) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int part = blockIdx.x, head = blockIdx.y, row = blockIdx.z, of_row = row * HEADS + head;
  u8* queries = shared;                                                  // [16][STRIDE]
  u8* values = queries + 16 * STRIDE + warp * TILE * STRIDE;             // [16][STRIDE] of this warp
  float* sums = (float*)(queries + 16 * STRIDE + WARPS * TILE * STRIDE);  // [WARPS][16][2]: largest score, sum
  float* outs = sums + WARPS * 16 * 2;                                   // [WARPS][GROUP][DIM]
  u32* last = (u32*)(outs + WARPS * GROUP * DIM);

  const int length = min(positions[row] + 1, BOUND), slot = slots[row];
  const int tiles = (length + TILE - 1) / TILE, each = max(1, (tiles + PARTS - 1) / PARTS);
  const int low = min(part * each, tiles), high = min(low + each, tiles);
  k_cache += (u64)of_row * SLOTS * DIM;
  v_cache += (u64)of_row * SLOTS * DIM;
#if KV_BITS == 8
  k_scales += of_row * SLOTS;
  v_scales += of_row * SLOTS;
#endif
  cos += row * PAIRS;
  sin += row * PAIRS;

  for (int i = threadIdx.x; i < 16 * DIM; i += THREADS) {
    const int h = i / DIM, d = i % DIM;
    const u16* from = q + (u64)(of_row * GROUP + h) * DIM;
    ((u16*)(queries + h * STRIDE))[d] = h < GROUP ? rounded(rotated(from, cos, sin, d)) : 0;
  }
  if (0 <= slot && slot < SLOTS && part == min(slot / TILE / each, PARTS - 1) && warp < 2) {
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

  // Products have the heads of the group as rows: those numbered g and g + 8 are this thread's.
  u32 first[DIM / 32][4], second[DIM / 32][4];
  for (int j = 0; j < DIM / 32; j++) {
    const uint4 above = *(const uint4*)(queries + g * STRIDE + 64 * j + 16 * t);
    const uint4 below = *(const uint4*)(queries + (g + 8) * STRIDE + 64 * j + 16 * t);
    first[j][0] = above.x, first[j][1] = below.x, first[j][2] = above.y, first[j][3] = below.y;
    second[j][0] = above.z, second[j][1] = below.z, second[j][2] = above.w, second[j][3] = below.w;
  }
  float largest[2] = {HIDDEN, HIDDEN}, total[2] = {0, 0}, mine[DIM / 8][4] = {};
  for (int tile = low + warp; tile < high; tile += WARPS) {
    const int start = tile * TILE;
    uint4 keys[2][DIM / 32], loaded[DIM / 16];
    for (int n = 0; n < 2; n++) {
      for (int j = 0; j < DIM / 32; j++) keys[n][j] = load_8(k_cache + (start + 8 * n + g) * DIM + 32 * j + 8 * t);
    }
    for (int i = 0; i < DIM / 16; i++) loaded[i] = load_8(v_cache + start * DIM + (lane + 32 * i) * 8);

    float scores[2][4] = {};  // of slots 8 n + 2 t and the next, for head g, then for head g + 8
    for (int n = 0; n < 2; n++) {
      for (int j = 0; j < DIM / 32; j++) {
        multiply_tile(scores[n], first[j], keys[n][j].x, keys[n][j].y, scores[n]);
        multiply_tile(scores[n], second[j], keys[n][j].z, keys[n][j].w, scores[n]);
      }
      for (int i = 0; i < 4; i++) {
        const int s = start + 8 * n + 2 * t + i % 2;
        float scale = SCALE;
#if KV_BITS == 8
        scale *= float_of_half(k_scales[s]);
#endif
        scores[n][i] = s < length ? scores[n][i] * scale : HIDDEN;
      }
    }
    u32 weights[4];
    float correction[2];
    for (int below = 0; below < 2; below++) {  // head g, then head g + 8
      float top = largest[below];
      for (int n = 0; n < 2; n++) top = fmaxf(top, fmaxf(scores[n][2 * below], scores[n][2 * below + 1]));
      top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
      top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
      correction[below] = power_of_2(largest[below] - top);
      largest[below] = top;
      total[below] *= correction[below];
      for (int n = 0; n < 2; n++) {
        float a = power_of_2(scores[n][2 * below] - top), b = power_of_2(scores[n][2 * below + 1] - top);
        total[below] += a + b;
#if KV_BITS == 8
        const int s = start + 8 * n + 2 * t;
        a *= float_of_half(v_scales[s]), b *= float_of_half(v_scales[s + 1]);
#endif
        weights[2 * n + below] = pair(a, b);
      }
    }
    __syncwarp();  // all threads have read the values before
    for (int i = 0; i < DIM / 16; i++) {
      const int at = (lane + 32 * i) * 8;
      *(uint4*)(values + at / DIM * STRIDE + at % DIM * 2) = loaded[i];
    }
    __syncwarp();
    for (int j = 0; j < DIM / 16; j++) {
      u32 columns[4];  // slots 0 to 7 and 8 to 15 of dims 16 j to 16 j + 7, then of the next 8
      load_transposed(columns, values + (lane % 16) * STRIDE + 32 * j + lane / 16 * 16);
      for (int n = 0; n < 2; n++) {
        float* to = mine[2 * j + n];
        to[0] *= correction[0], to[1] *= correction[0], to[2] *= correction[1], to[3] *= correction[1];
        multiply_tile(to, weights, columns[2 * n], columns[2 * n + 1], to);
      }
    }
  }

  for (int below = 0; below < 2; below++) {
    total[below] += __shfl_xor_sync(ALL, total[below], 1);
    total[below] += __shfl_xor_sync(ALL, total[below], 2);
    const int h = g + 8 * below;
    if (t == 0) sums[(warp * 16 + h) * 2] = largest[below], sums[(warp * 16 + h) * 2 + 1] = total[below];
    for (int j = 0; j < DIM / 8; j++) {
      float* to = outs + (warp * GROUP + h) * DIM + 8 * j + 2 * t;
      if (h < GROUP) *(float2*)to = make_float2(mine[j][2 * below], mine[j][2 * below + 1]);
    }
  }
  __syncthreads();
  parts_out += (u64)of_row * PARTS * GROUP * DIM;
  parts_sums += of_row * PARTS * GROUP * 2;
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
  __threadfence();  // before this part counts as done
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(&finished[of_row], 1u) == PARTS - 1;
  __syncthreads();
  if (!*last) return;
  __threadfence();
  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
    const int h = i / DIM;
    float top = HIDDEN, sum = 0, result = 0;
    for (int p = 0; p < PARTS; p++) top = fmaxf(top, load_fresh(parts_sums + (p * GROUP + h) * 2));
    for (int p = 0; p < PARTS; p++) {
      const float weight = power_of_2(load_fresh(parts_sums + (p * GROUP + h) * 2) - top);
      sum += weight * load_fresh(parts_sums + (p * GROUP + h) * 2 + 1);
      result += weight * load_fresh(parts_out + p * GROUP * DIM + i);
    }
    out[i] = rounded(result / sum);
  }
  if (threadIdx.x == 0) finished[of_row] = 0;
}
