// Products of few rows with weights: out = f(x) w^T, for one, two or three weights of the same inputs, in 16, 8 or 4 bits.
//
// A block takes tiles of 16 outputs of a weight. Its warps share the inputs of a tile in units of 128 bytes a row of the
// weight, and add their sums at the end of a tile. Units come by asynchronous copies into shared memory, STAGES - 1 ahead
// of their product, also across tiles. Integers become 16-bit floats in registers, and tensor cores multiply them by the
// inputs of up to 8 rows at once. The sums of a group are multiplied by its scale in float32.
//
// Constants that the compiler gets:
//   BITS 16, 8 or 4. HALF: 16-bit floats are float16, else bfloat16. ROWS of x. INPUTS of the weights.
//   OUTPUTS_0, OUTPUTS_1, OUTPUTS_2: outputs of the weights. PARTS of the inputs, one for each number of a block in y.
//   BEFORE: f(x) is 0 x, 1 the RMSNorm of x with scale `other`, 2 silu(x) * other. EPS of the norm.
//   RESIDUAL: `plus` is added. OUT_FLOAT: the results are float32, else 16-bit floats.
//   WARPS along the inputs, TILES of outputs of a block at once, STAGES of copies.
// Letters: r rows, o outputs, k inputs.

#define UNIT 128                                       // bytes of a unit in each row of the weight
#define GROUP 32                                       // inputs of a group
#define GROUP_BYTES (GROUP * BITS / 8)                 // of the weight
#define GROUPS (UNIT / GROUP_BYTES)                    // of a unit
#define PIECES (GROUP_BYTES / 16)                      // copies of 16 bytes of a group
#define ROW_BYTES (INPUTS * BITS / 8)                  // of the weight
#define UNITS ((ROW_BYTES + UNIT - 1) / UNIT)          // of a row
#define PART_UNITS ((UNITS + PARTS - 1) / PARTS)       // of a part
#define PART_INPUTS (PART_UNITS * GROUPS * GROUP)      // of a part, with those beyond the last, which are zeros
#define THREADS (32 * WARPS * TILES)
#define COLUMNS ((ROWS + 7) / 8)                       // tiles of 8 rows of x
#define X_STRIDE (2 * PART_INPUTS + 64)                // bytes of a row of x; 64 more, for other banks of memory
#define SCALES (BITS == 16 ? 4 : 2 * GROUPS)           // bytes of the scales of a unit, for each of 16 outputs
#define SCALES_ROW (INPUTS / GROUP * 2)                // bytes of the scales of an output
#define SCALES_COPY (SCALES_ROW % SCALES == 0 ? SCALES : 4)  // bytes that one copy reads of them
#define RAGGED (OUTPUTS_0 % 16 || OUTPUTS_1 % 16 || OUTPUTS_2 % 16)
#define STAGE (16 * (UNIT + (BITS == 16 ? 0 : SCALES)))  // bytes of a unit of a tile
#define EXCESS (BITS == 4 && !HALF)                    // products have it
#define EXCESS_ROWS (ROWS == 1 ? 1 : 8 * COLUMNS)      // numbers of a group
#define UP(n) (((n) + 15) / 16)

// A tile of outputs of a weight.
struct Tile {
  const u8* values;
  const u8* scales;
  void* out;    // results of the weight
  int outputs;  // of the weight
  int first;    // output of the tile
};

// Where one thread copies the units of a tile from: every fourth row of the values, and one row of the scales.
struct Source {
  const u8* values;
  const u8* scales;
  int left;         // outputs of the weight after the first row
  int scales_left;  // after the row of the scales
};

// Where this warp is on its way through the units of its tiles.
struct Place {
  int tile;
  int unit;
};

// The integers of eight inputs of one output, as four words of two 16-bit floats each: an exponent, and the integer in
// the last bits. In bfloat16 an integer v becomes 128 + 8 + v, which `excess` makes up for; in float16 it is exact.
DEVICE void floats_of_4_bits(u32 word, u32& low_a, u32& low_b, u32& high_a, u32& high_b) {
  u32* const all[4] = {&low_a, &high_a, &low_b, &high_b};
  for (int i = 0; i < 4; i++) {
    const u32 bits = (word >> (4 * i)) & 0x000f000f;
    *all[i] = HALF ? minus(bits | 0x64006400, 0x64086408) : bits | 0x43004300;  // 1024 + 8 + v, minus 1032
  }
}

// The values of group `group` of output `row` as the operands of two products. Which inputs they belong to is the order
// that `place` gives to x.
DEVICE void load_values(const u8* unit, int row, int group, int t, u32 first[2], u32 second[2]) {
  // Copies lie in another order in each row, so that eight rows are read from different banks.
  const int swap = (row * PIECES) & 7;
  const u8* values = unit + row * UNIT;
#if BITS == 16
  const uint4 words = *(const uint4*)(values + ((group * PIECES + t) ^ swap) * 16);
  first[0] = words.x, first[1] = words.y, second[0] = words.z, second[1] = words.w;
#elif BITS == 8
  const uint2 words = *(const uint2*)(values + ((group * PIECES + t / 2) ^ swap) * 16 + (t & 1) * 8);
  first[0] = floats_of_bytes_0_2(words.x), first[1] = floats_of_bytes_0_2(words.x >> 8);
  second[0] = floats_of_bytes_0_2(words.y), second[1] = floats_of_bytes_0_2(words.y >> 8);
#else
  const u32 word = *(const u32*)(values + (group ^ swap) * 16 + t * 4);
  floats_of_4_bits(word, first[0], first[1], second[0], second[1]);
#endif
}

// Stores eight inputs of a row of x, two in each word, from input k of the part on, in the order in which products read
// them.
DEVICE void place(u8* row, int k, const u32 x[4]) {
#if BITS == 16
  *(uint4*)(row + 2 * k) = make_uint4(x[0], x[1], x[2], x[3]);
#else
  const u32 a = low_halves(x[0], x[1]), b = high_halves(x[0], x[1]);  // inputs 0 and 2, 1 and 3
  const u32 c = low_halves(x[2], x[3]), d = high_halves(x[2], x[3]);
#if BITS == 8
  *(uint4*)(row + 2 * k) = make_uint4(a, b, c, d);
#else
  const int eighth = k / 8 % 4;
  u8* to = row + 2 * (k / GROUP * GROUP) + eighth % 2 * 32 + eighth / 2 * 8;
  *(uint2*)to = make_uint2(a, b);
  *(uint2*)(to + 16) = make_uint2(c, d);
#endif
#endif
}

// The sum over the threads that prepare a row: a warp, or for a single row all.
DEVICE float sum_of_row(float value, float* scratch) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
#if ROWS == 1
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < THREADS / 32; i++) value += scratch[i];
#endif
  return value;
}

// Eight 16-bit floats of a row from input k on; zeros beyond the last.
DEVICE void load_floats(const u16* row, int k, float floats[8]) {
  const uint4 words = k < INPUTS ? *(const uint4*)(row + k) : make_uint4(0, 0, 0, 0);
  const u32 word[4] = {words.x, words.y, words.z, words.w};
  for (int i = 0; i < 8; i++) floats[i] = value_of((u16)(word[i / 2] >> (i % 2 * 16)));
}

// Stores the inputs f(x) of this part in shared memory. `excess` gets what the products of 4 bits are too large by.
DEVICE void prepare(const u16* x, const u16* other, u8* inputs, float* excess, float* scratch) {
  const int start = blockIdx.y * PART_INPUTS, team = ROWS == 1 ? THREADS : 32;
  for (int r = threadIdx.x / team; r < ROWS; r += THREADS / team) {
    const u16 *row = x + r * INPUTS, *beside = BEFORE == 2 ? other + r * INPUTS : other;
    const int first = 8 * (threadIdx.x % team);
    float factor = 1;
#if BEFORE == 1
    float squares = 0;
    for (int k = first; k < INPUTS; k += 8 * team) {
      float values[8];
      load_floats(row, k, values);
      for (int i = 0; i < 8; i++) squares += values[i] * values[i];
    }
    factor = rsqrtf(sum_of_row(squares, scratch) / INPUTS + EPS);
#endif
    for (int k = first; k < PART_INPUTS; k += 8 * team) {  // whole warps for 4 bits, whose units are 256 inputs
      float values[8], others[8], sum = 0;
      u32 words[4];
      load_floats(row, start + k, values);
      if (BEFORE) load_floats(beside, start + k, others);
      for (int i = 0; i < 8; i += 2) {
        float a = values[i], b = values[i + 1];
        if (BEFORE) {
          const u32 between = BEFORE == 1 ? pair(a * factor, b * factor)
                                          : pair(quotient(a, 1 + exponential(-a)), quotient(b, 1 + exponential(-b)));
          a = value_of((u16)between) * others[i], b = value_of((u16)(between >> 16)) * others[i + 1];
        }
        words[i / 2] = pair(a, b);
        sum += value_of((u16)words[i / 2]) + value_of((u16)(words[i / 2] >> 16));
      }
      place(inputs + r * X_STRIDE, k, words);
#if EXCESS
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      if (k / 8 % 4 == 0) excess[k / GROUP * EXCESS_ROWS + r] = -136 * sum;
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
    const int row = lane / 8 + 4 * i, from = RAGGED ? min(4 * i, source.left) : 4 * i;
    u8* to = stage + row * UNIT + (lane % 8 ^ (row * PIECES & 7)) * 16;
    copy<16>(to, source.values + (wanted ? (long long)from * ROW_BYTES + unit * UNIT : 0), wanted);
  }
#if BITS != 16
  const u8* scales = source.scales + (RAGGED ? min(0, source.scales_left) * SCALES_ROW : 0);
#pragma unroll
  for (int i = 0; i < SCALES; i += 2 * SCALES_COPY) {  // two copies at a time, by the two halves of the warp
    const int within = i + lane / 16 * SCALES_COPY, from = unit * SCALES + within;
    const bool live = SCALES_ROW % SCALES == 0 || from < SCALES_ROW;
    if (within < SCALES) copy<SCALES_COPY>(stage + 16 * UNIT + lane % 16 * SCALES + within, scales + (live ? from : 0), live);
  }
#endif
}

// Adds the products of a unit to the sums of this thread.
DEVICE void multiply_unit(const u8* stage, const u8* inputs, const float* excess, int unit, int lane,
                          float sums[COLUMNS][4], float of_excess[2]) {
  const int g = lane / 4, t = lane % 4;
  const u16* scales = (const u16*)(stage + 16 * UNIT);
#if EXCESS && ROWS == 1
  for (int group = t; group < GROUPS; group += 4) {  // each of the four threads of an output takes a quarter
    of_excess[0] += float_of_half(scales[g * GROUPS + group]) * excess[unit * GROUPS + group];
    of_excess[1] += float_of_half(scales[(g + 8) * GROUPS + group]) * excess[unit * GROUPS + group];
  }
#endif
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
    u32 first[4], second[4];
    u32 above[2][2], below[2][2];
    load_values(stage, g, group, t, above[0], above[1]);
    load_values(stage, g + 8, group, t, below[0], below[1]);
    first[0] = above[0][0], first[2] = above[0][1], second[0] = above[1][0], second[2] = above[1][1];
    first[1] = below[0][0], first[3] = below[0][1], second[1] = below[1][0], second[3] = below[1][1];
#if BITS != 16
    const float scale_above = float_of_half(scales[g * GROUPS + group]);
    const float scale_below = float_of_half(scales[(g + 8) * GROUPS + group]);
#endif
    const int number = unit * GROUPS + group;  // of the part
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const int row = min(8 * c + g, ROWS - 1);  // columns beyond the last row are not stored
      const uint4 x = *(const uint4*)(inputs + row * X_STRIDE + number * 2 * GROUP + t * 16);
#if BITS == 16
      multiply_tile(sums[c], first, x.x, x.y, sums[c]);
      multiply_tile(sums[c], second, x.z, x.w, sums[c]);
#else
      float sum[4];
#if EXCESS && ROWS > 1
      const float2 more = *(const float2*)(excess + number * EXCESS_ROWS + 8 * c + 2 * t);
      const float start[4] = {more.x, more.y, more.x, more.y};
#else
      const float start[4] = {0, 0, 0, 0};
#endif
      multiply_tile(sum, first, x.x, x.y, start);
      multiply_tile(sum, second, x.z, x.w, sum);
      sums[c][0] += scale_above * sum[0], sums[c][1] += scale_above * sum[1];
      sums[c][2] += scale_below * sum[2], sums[c][3] += scale_below * sum[3];
#endif
    }
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
    products(const u16* x, const u16* other, const void* plus, WEIGHTS) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int along = warp % WARPS, mine = warp / WARPS;  // units along, along + WARPS, ... of tile `mine` of the block
  u8* stages = shared + warp * STAGES * STAGE;
  u8* inputs = shared + WARPS * TILES * STAGES * STAGE;
  float* excess = (float*)(inputs + ROWS * X_STRIDE);
  float* parts = excess + (EXCESS ? (PART_INPUTS / GROUP * EXCESS_ROWS + 3) / 4 * 4 : 0);  // [2][TILES][WARPS][COLUMNS][16][8]

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
  prepare(x, other, inputs, excess, parts);
  __syncthreads();

  for (int turn = 0; turn < turns; turn++) {
    const int of_block = (turn * gridDim.x + blockIdx.x) * TILES;
    float sums[COLUMNS][4] = {}, more[2] = {};
    if (of_block + mine < tiles) {
      for (int unit = along; unit < units; unit += WARPS) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();  // all threads have their copies, and are done with the stage that is copied to next
        copy_next();
        multiply_unit(to_multiply, inputs, excess, unit, lane, sums, more);
        to_multiply = to_multiply + STAGE == end ? stages : to_multiply + STAGE;
      }
    }
#if EXCESS && ROWS == 1
    for (int i = 0; i < 2; i++) {
      more[i] += __shfl_xor_sync(0xffffffff, more[i], 1);
      sums[0][2 * i] += more[i] + __shfl_xor_sync(0xffffffff, more[i], 2);
    }
#endif
    float* to = parts + turn % 2 * TILES * WARPS * COLUMNS * 128;
    for (int c = 0; c < COLUMNS; c++) {
      float* mine_to = to + ((mine * WARPS + along) * COLUMNS + c) * 128;
      *(float2*)(mine_to + g * 8 + 2 * t) = make_float2(sums[c][0], sums[c][1]);
      *(float2*)(mine_to + (g + 8) * 8 + 2 * t) = make_float2(sums[c][2], sums[c][3]);
    }
    __syncthreads();  // the sums of the turn before are read by now, so that two places are enough
    for (int i = threadIdx.x; i < TILES * ROWS * 16; i += THREADS) {
      const int row = i / 16 % ROWS, within = i / 16 / ROWS, number = of_block + within;
      if (number >= tiles) continue;
      const Tile of = weights.tile(number);
      if (of.first + i % 16 >= of.outputs) continue;
      const float* from = to + (within * WARPS * COLUMNS + row / 8) * 128 + i % 16 * 8 + row % 8;
      float total = 0;
      for (int w = 0; w < WARPS; w++) total += from[w * COLUMNS * 128];
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
