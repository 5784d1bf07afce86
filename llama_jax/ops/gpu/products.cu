// Products of few rows with quantized weights: out = f(x) w^T, for one, two or three weights of the same inputs.
//
// A block takes tiles of 16 outputs of a weight. Its warps share the inputs of a tile in units of 128 bytes a row of the
// weight, and add their sums at the end of a tile. Units come by asynchronous copies into shared memory, STAGES - 1 ahead
// of their product, also across tiles.
//
// Constants that the compiler gets:
//   BITS 8 or 4. HALF: 16-bit floats are float16, else bfloat16. ROWS of x, at most 8. INPUTS of the weights.
//   OUTPUTS_0, OUTPUTS_1, OUTPUTS_2: outputs of the weights. PARTS of the inputs, one for each number of a block in y.
//   NORM: f(x) is the RMSNorm of x with a scale, else x. EPS of the norm.
//   RESIDUAL: `plus` is added. OUT_FLOAT: the results are float32, else 16-bit floats.
//   WARPS along the inputs, TILES of outputs of a block at once, STAGES of copies.
// Letters: r rows, o outputs, k inputs.

#define ROW_BYTES (INPUTS * BITS / 8)                  // of the weight
#define UNITS ((ROW_BYTES + UNIT - 1) / UNIT)          // of a row
#define PART_UNITS ((UNITS + PARTS - 1) / PARTS)       // of a part
#define PART_INPUTS (PART_UNITS * GROUPS * GROUP)      // of a part, with those beyond the last, which are zeros
#define THREADS (32 * WARPS * TILES)
#define X_STRIDE (2 * PART_INPUTS + 64)                // bytes of a row of x; 64 more, for other banks of memory
#define SCALES_ROW (INPUTS / GROUP * 2)                // bytes of the scales of an output
#define SCALES_COPY (SCALES_ROW % SCALES == 0 ? SCALES : 4)  // bytes that one copy reads of them
#define RAGGED (OUTPUTS_0 % 16 || OUTPUTS_1 % 16 || OUTPUTS_2 % 16)
#define UP(n) (((n) + 15) / 16)

// A tile of outputs of a weight.
struct Tile {
  const u8* values;
  const u8* scales;
  void* out;    // results of the weight
  int outputs;  // of the weight
  int first;    // output of the tile
};

// The addresses from which a thread copies units of a tile: every fourth row of the values, and one row of the scales.
struct Source {
  const u8* values;
  const u8* scales;
  int left;         // outputs of the weight after the first row
  int scales_left;  // after the row of the scales
};

// The next unit of a warp.
struct Place {
  int tile;
  int unit;
};

// Eight 16-bit floats of a row from input k on; zeros beyond the last.
DEVICE void load_floats(const u16* row, int k, float floats[8]) {
  const uint4 words = k < INPUTS ? *(const uint4*)(row + k) : make_uint4(0, 0, 0, 0);
  const u32 word[4] = {words.x, words.y, words.z, words.w};
  for (int i = 0; i < 8; i++) floats[i] = value_of((u16)(word[i / 2] >> (i % 2 * 16)));
}

// Stores the inputs f(x) of this part in shared memory. `excess` gets what the products of 4 bits are too large by.
DEVICE void prepare(const u16* x, const u16* scale, u8* inputs, float* excess) {
  const int start = blockIdx.y * PART_INPUTS, first = 8 * (threadIdx.x % 32);
  for (int r = threadIdx.x / 32; r < ROWS; r += THREADS / 32) {  // a warp prepares a row
    const u16* row = x + r * INPUTS;
    float factor = 1;
#if NORM
    float squares = 0;
    for (int k = first; k < INPUTS; k += 8 * 32) {
      float values[8];
      load_floats(row, k, values);
      for (int i = 0; i < 8; i++) squares += values[i] * values[i];
    }
    for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(0xffffffff, squares, step);
    factor = rsqrtf(squares / INPUTS + EPS);
#endif
    for (int k = first; k < PART_INPUTS; k += 8 * 32) {  // whole warps for 4 bits, whose units are 256 inputs
      float values[8], scales[8], sum = 0;
      u32 words[4];
      load_floats(row, start + k, values);
      if (NORM) load_floats(scale, start + k, scales);
      for (int i = 0; i < 8; i += 2) {
        float a = values[i], b = values[i + 1];
        if (NORM) {
          const u32 normed = pair(a * factor, b * factor);
          a = value_of((u16)normed) * scales[i], b = value_of((u16)(normed >> 16)) * scales[i + 1];
        }
        words[i / 2] = pair(a, b);
        sum += value_of((u16)words[i / 2]) + value_of((u16)(words[i / 2] >> 16));
      }
      place(inputs + r * X_STRIDE, k, words);
#if EXCESS
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      if (k / 8 % 4 == 0) excess[k / GROUP * 8 + r] = -EXCESS_FACTOR * sum;
#endif
    }
  }
}

struct Weights {
  const u8 *w0, *s0, *w1, *s1, *w2, *s2;
  void *out0, *out1, *out2;

  DEVICE_METHOD Tile tile(int number) const {
    if (number < UP(OUTPUTS_0)) return {w0, s0, out0, OUTPUTS_0, 16 * number};
    number -= UP(OUTPUTS_0);
    if (number < UP(OUTPUTS_1)) return {w1, s1, out1, OUTPUTS_1, 16 * number};
    number -= UP(OUTPUTS_1);
    return {w2, s2, out2, OUTPUTS_2, 16 * number};
  }
};

DEVICE Source source_of(const Tile& tile, int lane) {
  const int first = tile.first + lane / 8, of_scales = tile.first + lane % 16;
  return {tile.values + (u64)first * ROW_BYTES + lane % 8 * 16, tile.scales + (u64)of_scales * SCALES_ROW,
          tile.outputs - 1 - first, tile.outputs - 1 - of_scales};
}

// Starts the copies of a unit of a tile. Outputs beyond the last are read as the last, and inputs as zeros.
DEVICE void copy_unit(const Source& source, int unit, u8* stage, int lane) {
  const int at = unit * UNIT + lane % 8 * 16;
  const bool wanted = ROW_BYTES % UNIT == 0 || at < ROW_BYTES;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int from = RAGGED ? min(4 * i, source.left) : 4 * i;
    u8* to = piece_of(stage, lane / 8 + 4 * i, lane % 8);
    copy<16>(to, source.values + (wanted ? (long long)from * ROW_BYTES + unit * UNIT : 0), wanted);
  }
  const u8* scales = source.scales + (RAGGED ? min(0, source.scales_left) * SCALES_ROW : 0);
#pragma unroll
  for (int i = 0; i < SCALES; i += 2 * SCALES_COPY) {  // two copies at a time, by the two halves of the warp
    const int within = i + lane / 16 * SCALES_COPY, from = unit * SCALES + within;
    const bool live = SCALES_ROW % SCALES == 0 || from < SCALES_ROW;
    if (within < SCALES) copy<SCALES_COPY>(stage + 16 * UNIT + lane % 16 * SCALES + within, scales + (live ? from : 0), live);
  }
}

// Adds the products of a unit to the sums of this thread.
DEVICE void multiply_unit(const u8* stage, const u8* inputs, const float* excess, int unit, int lane, float sums[4]) {
  const int g = lane / 4, t = lane % 4;
  const u16* scales = (const u16*)(stage + 16 * UNIT);
  const u8* x_row = inputs + min(g, ROWS - 1) * X_STRIDE;  // columns beyond the last row are not stored
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
    u32 first[4], second[4];
    load_group(stage, group, lane, first, second);
    const float scale_above = float_of_half(scales[g * GROUPS + group]);
    const float scale_below = float_of_half(scales[(g + 8) * GROUPS + group]);
    const int number = unit * GROUPS + group;  // of the part
    const uint4 x = *(const uint4*)(x_row + number * 2 * GROUP + t * 16);
    float2 more = {0, 0};
    if (EXCESS) more = *(const float2*)(excess + number * 8 + 2 * t);
    const float start[4] = {more.x, more.y, more.x, more.y};
    float sum[4];
    multiply_tile(sum, first, x.x, x.y, start);
    multiply_tile(sum, second, x.z, x.w, sum);
    sums[0] += scale_above * sum[0], sums[1] += scale_above * sum[1];
    sums[2] += scale_below * sum[2], sums[3] += scale_below * sum[3];
  }
}

#define WEIGHT(i) const u8 *w##i, const u8 *s##i
#if OUTPUTS_2
#define WEIGHTS WEIGHT(0), WEIGHT(1), WEIGHT(2), void *out0, void *out1, void *out2
#define GIVEN w0, s0, w1, s1, w2, s2, out0, out1, out2
#elif OUTPUTS_1
#define WEIGHTS WEIGHT(0), WEIGHT(1), void *out0, void *out1
#define GIVEN w0, s0, w1, s1, w0, s0, out0, out1, out0
#else
#define WEIGHTS WEIGHT(0), void *out0
#define GIVEN w0, s0, w0, s0, w0, s0, out0, out0, out0
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    products(const u16* x, const u16* scale, const void* plus, WEIGHTS) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int along = warp % WARPS, mine = warp / WARPS;  // units along, along + WARPS, ... of tile `mine` of the block
  u8* stages = shared + warp * STAGES * STAGE;
  u8* inputs = shared + WARPS * TILES * STAGES * STAGE;
  float* excess = (float*)(inputs + ROWS * X_STRIDE);
  float* parts = excess + (EXCESS ? PART_INPUTS / GROUP * 8 : 0);  // [2][TILES][WARPS][16][8]

  const Weights weights = {GIVEN};
  const int tiles = UP(OUTPUTS_0) + UP(OUTPUTS_1) + UP(OUTPUTS_2);
  const int first_unit = blockIdx.y * PART_UNITS;
  const int units = min(PART_UNITS, UNITS - first_unit);
  const int turns = (tiles + TILES * gridDim.x - 1) / (TILES * gridDim.x);  // each block takes part in every turn
  Place next = {(int)blockIdx.x * TILES + mine, along};
  if (along >= units) next.tile = tiles;
  Source source = source_of(weights.tile(next.tile), lane);
  u8* const end = stages + STAGES * STAGE;
  u8 *to_copy = stages, *to_multiply = stages;
  auto copy_next = [&] {
    if (next.tile < tiles) {
      copy_unit(source, first_unit + next.unit, to_copy, lane);
      next.unit += WARPS;
      if (next.unit >= units) {
        next = {next.tile + TILES * (int)gridDim.x, along};
        source = source_of(weights.tile(next.tile), lane);
      }
    }
    to_copy = to_copy + STAGE == end ? stages : to_copy + STAGE;
    end_of_copies();  // also without copies, so that their number is the same for all
  };
  for (int i = 0; i < STAGES - 1; i++) copy_next();
  prepare(x, scale, inputs, excess);
  __syncthreads();

  for (int turn = 0; turn < turns; turn++) {
    const int of_block = (turn * gridDim.x + blockIdx.x) * TILES;
    float sums[4] = {};
    if (of_block + mine < tiles) {
      for (int unit = along; unit < units; unit += WARPS) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();  // all threads have their copies, and are done with the stage that is copied to next
        copy_next();
        multiply_unit(to_multiply, inputs, excess, unit, lane, sums);
        to_multiply = to_multiply + STAGE == end ? stages : to_multiply + STAGE;
      }
    }
    float *to = parts + turn % 2 * TILES * WARPS * 128, *mine_to = to + (mine * WARPS + along) * 128;
    *(float2*)(mine_to + g * 8 + 2 * t) = make_float2(sums[0], sums[1]);
    *(float2*)(mine_to + (g + 8) * 8 + 2 * t) = make_float2(sums[2], sums[3]);
    __syncthreads();  // the sums of the turn before are read by now, so that two places are enough
    for (int i = threadIdx.x; i < TILES * ROWS * 16; i += THREADS) {
      const int row = i / 16 % ROWS, within = i / 16 / ROWS, number = of_block + within;
      if (number >= tiles) continue;
      const Tile of = weights.tile(number);
      if (of.first + i % 16 >= of.outputs) continue;
      const float* from = to + within * WARPS * 128 + i % 16 * 8 + row;
      float total = 0;
      for (int w = 0; w < WARPS; w++) total += from[w * 128];
      const u64 at = (u64)(blockIdx.y * ROWS + row) * of.outputs + of.first + i % 16;
#if OUT_FLOAT
      ((float*)of.out)[at] = RESIDUAL ? total + ((const float*)plus)[at] : total;
#else
      const u16 product = rounded(total);
      ((u16*)of.out)[at] = RESIDUAL ? rounded(value_of(product) + value_of(((const u16*)plus)[at])) : product;
#endif
    }
  }
}
