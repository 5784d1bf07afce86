// Layers of a decode step of one row, one after the other in one launch.
//
// Each processor has one block, and all blocks work on the same product at a time: q, k and v; attention; o; gate and up
// with SwiGLU; down. Between two they wait for one another. Weights do not depend on anything that is computed: their
// copies into shared memory run ahead of the products, beyond such waits and into the next layers, so that memory is read
// while blocks wait.
//
// A product is divided into tiles of 16 outputs, which the blocks take in turn. The warps of a block share its tiles in
// units of 128 bytes a row of the weight; their sums are added when the block has all its tiles. Gate and up tiles come in
// pairs. Attention is divided into parts of the slots of a key/value head, which are joined for the next product.
//
// Constants that the compiler gets:
//   BITS of the weights: 16, 8 or 4. KV_BITS 16 or 8 (int8 with one float16 scale for each slot). HALF: 16-bit floats are
//   float16, else bfloat16. LAYERS of the launch. EMBED and FFN: values of a token and of the feed-forward layer. HEADS of
//   keys and values. RATIO: query heads for each of them, at most 8. DIM of a head: 64 or 128. SLOTS of the cache, a
//   multiple of 16. BOUND: slots that are read at most. PARTS of the slots. GRID: blocks. WARPS of a block. STAGES of
//   copies. REGION: bytes of shared memory between the stages and the pointers. EPS of the norms. SCALE of the scores:
//   log2(e) / sqrt(DIM). POINTERS: the arguments' declarations. POINTS: their names. COUNT of them.
// Letters: h heads, s slots, d dims, o outputs, k inputs.

#define QUERIES (HEADS * RATIO * DIM)
#define KEYS (HEADS * DIM)
#define PAIRS (DIM / 2)  // rotary pairs
#define THREADS (32 * WARPS)
#define STRIDE (2 * DIM + 16)  // bytes of a query in shared memory; 16 more, for other banks
#define HIDDEN -1e30f
#define ALL 0xffffffff

// The order of the arguments. First x, cosines, sines, position and slot; then the arrays of each layer.
#define OF_WEIGHT (BITS == 16 ? 1 : 2)                     // a weight is its values, then its scales
#define OF_CACHE (KV_BITS == 16 ? 1 : 2)
#define OF_LAYER (2 + 7 * OF_WEIGHT + 2 * OF_CACHE)        // norms, weights, and the cache as an operand
#define RESULTS (5 + LAYERS * OF_LAYER)                    // x, the caches, and two arrays for results between products

#define MOST(a, b) ((a) > (b) ? (a) : (b))
#define MOST_INPUTS MOST(FFN, MOST(EMBED, QUERIES))

enum Product { QKV, OUT, GATE_UP, DOWN, PRODUCTS };

#if KV_BITS == 16
typedef u16 Stored;
typedef uint4 Eight;  // stored values
DEVICE Eight load_eight(const Stored* from) { return load_fresh_16(from); }
DEVICE uint4 floats_of(Eight words) { return words; }
#else
typedef signed char Stored;
typedef uint2 Eight;
DEVICE Eight load_eight(const Stored* from) { return load_fresh_8(from); }

// Eight integers as four words of two 16-bit floats.
DEVICE uint4 floats_of(Eight words) {
  const u32 a = floats_of_bytes_0_2(words.x), b = floats_of_bytes_0_2(words.x >> 8);
  const u32 c = floats_of_bytes_0_2(words.y), d = floats_of_bytes_0_2(words.y >> 8);
  return make_uint4(low_halves(a, b), high_halves(a, b), low_halves(c, d), high_halves(c, d));
}
#endif

// Arrivals at waits, and blocks that have ended. Both are zero between launches.
__device__ u32 arrived, left;


DEVICE constexpr int inputs_of(int product) { return product == OUT ? QUERIES : product == DOWN ? FFN : EMBED; }
DEVICE constexpr int units_of(int product) { return inputs_of(product) * BITS / 8 / UNIT; }
// The tiles of a product, or pairs of tiles, which the blocks take in turn.
DEVICE constexpr int items_of(int product) {
  return (product == QKV ? QUERIES + 2 * KEYS : product == GATE_UP ? FFN : EMBED) / 16;
}

DEVICE constexpr int tiles_of(int product) { return product == GATE_UP ? 2 : 1; }  // of an item

// The items of a product that a block has are first, first + GRID, and so on.
DEVICE int first_item(int start) {
  const int block = (int)blockIdx.x - start;
  return block < 0 ? block + GRID : block;
}
DEVICE int next_start(int start, int product) { return (start + items_of(product)) % GRID; }

// The number of items of a product that a block has.
DEVICE int items_here(int start, int product) {
  const int first = first_item(start);
  return first < items_of(product) ? (items_of(product) - 1 - first) / GRID + 1 : 0;
}

// The position of a warp's next copy.
struct Place {
  int layer, product, start, tile;  // start: block that has the first item. tile: number among this block's tiles
  int unit, row_bytes;
  const u8 *values, *scales;  // of the unit, in the rows that the thread copies
};

// The first unit that a warp has of this block's tile with a number: the units of all tiles are dealt to the warps.
DEVICE int first_unit(int warp, int tile, int units) { return (warp - tile * units) & (WARPS - 1); }

// Moves on to the next tile of which the warp has a unit, and finds its weight.
DEVICE void settle(Place& at, const u64* pointers, int warp, int lane) {
  int item = 0;
  for (; at.layer < LAYERS; at.tile++) {
    item = first_item(at.start) + at.tile / tiles_of(at.product) * GRID;
    at.unit = first_unit(warp, at.tile, units_of(at.product));
    if (item >= items_of(at.product)) {
      at.start = next_start(at.start, at.product);
      at.tile = -1;
      if (++at.product == PRODUCTS) at.product = QKV, at.layer++;
    } else if (at.unit < units_of(at.product)) {
      break;
    }
  }
  if (at.layer == LAYERS) return;
  int weight = 3, row = 16 * item;
  if (at.product == QKV) {
    weight = row < QUERIES ? 0 : row < QUERIES + KEYS ? 1 : 2;
    row -= weight == 0 ? 0 : weight == 1 ? QUERIES : QUERIES + KEYS;
  } else if (at.product != OUT) {
    weight = at.product == DOWN ? 6 : 4 + at.tile % 2;
  }
  const u64* of_weight = pointers + 5 + at.layer * OF_LAYER + 2 + weight * OF_WEIGHT;
  at.row_bytes = units_of(at.product) * UNIT;
  at.values = (const u8*)of_weight[0] + (u64)(row + lane / 8) * at.row_bytes + at.unit * UNIT + lane % 8 * 16;
  at.scales = (const u8*)of_weight[OF_WEIGHT - 1] + (u64)((row + lane % 16) * units_of(at.product) + at.unit) * SCALES;
}

// Starts the copies of the next unit.
DEVICE void copy_next(Place& at, u8* stage, const u64* pointers, int warp, int lane) {
  if (at.layer < LAYERS) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      copy<16>(piece_of(stage, lane / 8 + 4 * i, lane % 8), at.values + (u64)(4 * i) * at.row_bytes, true);
    }
    if (BITS != 16 && lane < 16) copy<SCALES>(stage + 16 * UNIT + lane * SCALES, at.scales, true);
    at.values += WARPS * UNIT;
    at.scales += WARPS * SCALES;
    at.unit += WARPS;
    if (at.unit >= units_of(at.product)) {
      at.tile++;
      settle(at, pointers, warp, lane);
    }
  }
  end_of_copies();  // also without copies, so that their number is the same for all
}

// Attention of eight dims of a head from index k of all heads on, joined from the parts of the slots.
DEVICE uint4 joined(const float* parts_out, const float* parts_sums, int count, int k) {
  constexpr int BATCH = PARTS < 6 ? PARTS : 6;  // loaded at once
  float top = HIDDEN, sum = 0, dims[8] = {};
  for (int first = 0; first < count; first += BATCH) {
    float largest[BATCH], total[BATCH];
    uint4 low[BATCH], high[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int part = min(first + i, count - 1);
      const float* of_head = parts_sums + (part * HEADS * RATIO + k / DIM) * 2;
      largest[i] = load_fresh(of_head), total[i] = load_fresh(of_head + 1);
      low[i] = load_fresh_16(parts_out + part * QUERIES + k), high[i] = load_fresh_16(parts_out + part * QUERIES + k + 4);
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const float above = fmaxf(top, largest[i]), before = power_of_2(top - above);
      const float now = first + i < count ? power_of_2(largest[i] - above) : 0;
      const u32 bits[8] = {low[i].x, low[i].y, low[i].z, low[i].w, high[i].x, high[i].y, high[i].z, high[i].w};
      top = above;
      sum = sum * before + total[i] * now;
      for (int d = 0; d < 8; d++) dims[d] = dims[d] * before + __uint_as_float(bits[d]) * now;
    }
  }
  u32 words[4];
  for (int i = 0; i < 4; i++) words[i] = pair(dims[2 * i] / sum, dims[2 * i + 1] / sum);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Stores the inputs of a product in shared memory: the RMSNorm of x (EMBED,) with a scale (QKV, and for GATE_UP too),
// attention from its parts (OUT), or x (FFN,) as it is (DOWN). `excess` gets what the products of 4 bits are too large by.
template <int PRODUCT>
DEVICE void prepare(const u16* x, const u16* scale, const float* parts_out, const float* parts_sums, int count,
                    u8* inputs, float* excess, float* scratch) {
  constexpr int INPUTS = inputs_of(PRODUCT), TURNS = (INPUTS + 8 * THREADS - 1) / (8 * THREADS);
  constexpr bool NORM = PRODUCT == QKV;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4 loaded[TURNS], scales[TURNS];
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int k = 8 * (threadIdx.x + i * THREADS);
    loaded[i] = scales[i] = make_uint4(0, 0, 0, 0);
    if (k < INPUTS) {
      loaded[i] = PRODUCT == OUT ? joined(parts_out, parts_sums, count, k) : load_fresh_16(x + k);
      if (NORM) scales[i] = *(const uint4*)(scale + k);
    }
  }
  float factor = 1;
  if (NORM) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const u32 words[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
      for (int j = 0; j < 4; j++) {
        const float a = value_of((u16)words[j]), b = value_of((u16)(words[j] >> 16));
        squares += a * a + b * b;
      }
    }
    for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(ALL, squares, step);
    if (lane == 0) scratch[warp] = squares;
    __syncthreads();
    squares = 0;
    for (int i = 0; i < WARPS; i++) squares += scratch[i];
    factor = rsqrtf(squares / INPUTS + EPS);
  }
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int k = 8 * (threadIdx.x + i * THREADS);
    if (k >= INPUTS) break;  // whole warps for 4 bits, whose units are 256 inputs
    u32 words[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
    const u32 by[4] = {scales[i].x, scales[i].y, scales[i].z, scales[i].w};
    float sum = 0;
    for (int j = 0; j < 4; j++) {
      if (NORM) {
        const u32 normed = pair(value_of((u16)words[j]) * factor, value_of((u16)(words[j] >> 16)) * factor);
        words[j] = pair(value_of((u16)normed) * value_of((u16)by[j]),
                        value_of((u16)(normed >> 16)) * value_of((u16)(by[j] >> 16)));
      }
      sum += value_of((u16)words[j]) + value_of((u16)(words[j] >> 16));
    }
    place(inputs, k, words);
#if EXCESS
    sum += __shfl_xor_sync(ALL, sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    if (k / 8 % 4 == 0) excess[k / GROUP] = -EXCESS_FACTOR * sum;
#endif
  }
  __syncthreads();
}

// Adds the products of a unit to the sums of outputs g and g + 8, of which each thread of four has the same in sums[0] and
// sums[2].
DEVICE void multiply_unit(const u8* stage, const u8* inputs, const float* excess, int unit, int lane, float sums[4]) {
  const int g = lane / 4, t = lane % 4;
#if BITS != 16
  u32 above[GROUPS / 2], below[GROUPS / 2];  // scales of two groups in each
  const u8* scales = stage + 16 * UNIT + g * SCALES;
  for (int i = 0; i < GROUPS / 4; i++) {
    *(uint2*)(above + 2 * i) = *(const uint2*)(scales + 8 * i);
    *(uint2*)(below + 2 * i) = *(const uint2*)(scales + 8 * SCALES + 8 * i);
  }
#endif
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
    u32 first[4], second[4];
    load_group(stage, group, lane, first, second);
    const int number = unit * GROUPS + group;
    const uint4 x = *(const uint4*)(inputs + number * 2 * GROUP + t * 16);
#if BITS == 16
    multiply_tile(sums, first, x.x, x.y, sums);
    multiply_tile(sums, second, x.z, x.w, sums);
#else
    const float from = EXCESS ? excess[number] : 0;
    const float start[4] = {from, from, from, from};
    float sum[4];
    multiply_tile(sum, first, x.x, x.y, start);
    multiply_tile(sum, second, x.z, x.w, sum);
    sums[0] += float_of_half((u16)(above[group / 2] >> group % 2 * 16)) * sum[0];
    sums[2] += float_of_half((u16)(below[group / 2] >> group % 2 * 16)) * sum[2];
#endif
  }
}

// Waits until all blocks are here. What they wrote before can be read afterwards by functions named `fresh`.
DEVICE void wait_for_blocks(u32& waits) {
  __syncthreads();
  waits++;
  if (threadIdx.x == 0) {
    arrive(&arrived);
    wait_until(&arrived, waits * GRID);
  }
  __syncthreads();
}

// Dimensions 8 i to 8 i + 7 of a head, and those PAIRS further on, which rotate with them. They are rotated if there are
// cosines, and rounded.
struct Pairs {
  float low[8], high[8];
};

DEVICE Pairs pairs_of(const u16* head, const float* cos, const float* sin, int i) {
  u32 low[4], high[4], cosines[8], sines[8];
  *(uint4*)low = load_fresh_16(head + 8 * i), *(uint4*)high = load_fresh_16(head + PAIRS + 8 * i);
  for (int j = 0; j < 8 && cos; j += 4) {
    *(uint4*)(cosines + j) = load_fresh_16(cos + 8 * i + j), *(uint4*)(sines + j) = load_fresh_16(sin + 8 * i + j);
  }
  Pairs pairs;
  for (int j = 0; j < 8; j++) {
    const float first = value_of((u16)(low[j / 2] >> j % 2 * 16)), second = value_of((u16)(high[j / 2] >> j % 2 * 16));
    const float c = __uint_as_float(cosines[j]), s = __uint_as_float(sines[j]);
    pairs.low[j] = cos ? value_of(rounded(first * c - second * s)) : first;
    pairs.high[j] = cos ? value_of(rounded(second * c + first * s)) : second;
  }
  return pairs;
}

DEVICE uint4 words_of(const float f[8]) {
  return make_uint4(pair(f[0], f[1]), pair(f[2], f[3]), pair(f[4], f[5]), pair(f[6], f[7]));
}

#if KV_BITS == 8
DEVICE u32 bytes_of(const float f[4], float divisor) {
  u32 bytes = 0;
  for (int i = 0; i < 4; i++) bytes |= ((u32)(int)fminf(fmaxf(rintf(f[i] / divisor), -127), 127) & 0xff) << 8 * i;
  return bytes;
}
#endif

// Stores a key or value of which the first PAIRS / 8 threads of a warp have pairs. In 8 bits it gets a scale.
DEVICE void store(Stored* to, u16* scale, const Pairs& pairs, int lane) {
  const bool has = lane < PAIRS / 8;
#if KV_BITS == 16
  if (has) {
    *(uint4*)(to + 8 * lane) = words_of(pairs.low);
    *(uint4*)(to + PAIRS + 8 * lane) = words_of(pairs.high);
  }
#else
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) largest = fmaxf(largest, has ? fmaxf(fabsf(pairs.low[i]), fabsf(pairs.high[i])) : 0);
  for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
  const u16 bits = (u16)halves(fmaxf(largest / 127, 6.103515625e-05f), 0);  // the least normal float16
  const float divisor = float_of_half(bits);
  if (has) {
    *(uint2*)(to + 8 * lane) = make_uint2(bytes_of(pairs.low, divisor), bytes_of(pairs.low + 4, divisor));
    *(uint2*)(to + PAIRS + 8 * lane) = make_uint2(bytes_of(pairs.high, divisor), bytes_of(pairs.high + 4, divisor));
  }
  if (lane == 0) *scale = bits;
#endif
}

// The tiles of 16 live slots that a part has. Each warp has one, if there are enough.
DEVICE int tiles_of_part(int length) {
  const int tiles = (length + 15) / 16;
  return max(WARPS, (tiles + PARTS - 1) / PARTS);
}

// The number of parts that have slots.
DEVICE int parts_of(int length) {
  const int each = 16 * tiles_of_part(length);
  return (length + each - 1) / each;
}

// The keys and values of a head in the cache of a layer, and what a block has to do with them.
struct Slots {
  Stored *keys, *values;
  u16 *key_scales, *value_scales;
  int head, part;
  int low, high;  // tiles of 16 slots of this part
};

DEVICE Slots slots_of(const u64* pointers, int layer, int length) {
  Slots s;
  s.head = blockIdx.x % HEADS, s.part = blockIdx.x / HEADS;
  const u64* cache = pointers + RESULTS + 1 + layer * 2 * OF_CACHE;
  const u64 first = (u64)s.head * SLOTS;
  s.keys = (Stored*)cache[0] + first * DIM;
  s.values = (Stored*)cache[OF_CACHE] + first * DIM;
  s.key_scales = (u16*)cache[OF_CACHE - 1] + first;
  s.value_scales = (u16*)cache[2 * OF_CACHE - 1] + first;
  const int tiles = (length + 15) / 16, each = tiles_of_part(length);
  s.low = min(s.part * each, tiles), s.high = min(s.low + each, tiles);
  return s;
}

// The scores and sums of a warp for query head g: the largest score, and the sum of exponentials.
struct Softmax {
  float largest, total;
};

// Turns scores of 16 slots, 8 n + 2 t and the next, into weights. Returns how much it reduces what was summed before.
DEVICE float weigh(const float scores[2][4], Softmax& softmax, const u32 scales[2], u32 weights[4]) {
  float top = softmax.largest;
  for (int n = 0; n < 2; n++) top = fmaxf(top, fmaxf(scores[n][0], scores[n][1]));
  top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
  top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
  const float correction = power_of_2(softmax.largest - top);
  softmax.largest = top;
  softmax.total *= correction;
  for (int n = 0; n < 2; n++) {
    float a = power_of_2(scores[n][0] - top), b = power_of_2(scores[n][1] - top);
    softmax.total += a + b;
#if KV_BITS == 8
    a *= float_of_half((u16)scales[n]), b *= float_of_half((u16)(scales[n] >> 16));
#endif
    weights[2 * n] = pair(a, b), weights[2 * n + 1] = 0;
  }
  return correction;
}

// Attention of a head's group over a part of the slots, of which `length` are live, and the new key and value are stored
// in `slot`. `parts_out` (parts, h, RATIO, d) gets its result, to be divided by the sum, and `parts_sums` (parts, h, RATIO,
// 2) the largest score and the sum of the exponentials.
DEVICE void attend(const Slots& s, int length, int slot, const u16* qkv, const float* cos, const float* sin,
                   float* parts_out, float* parts_sums, u8* region, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  u8* queries = region;                          // [8][STRIDE]
  float* sums = (float*)(queries + 8 * STRIDE);  // [WARPS][8][2]: largest score, sum
  float* outs = sums + WARPS * 8 * 2;            // [WARPS][RATIO][DIM]

  Eight keys[2][DIM / 32], values[DIM / 64][4];
  u32 key_scales[2] = {}, value_scales[2] = {};  // of two slots each
  auto load_keys = [&](int tile) {
    for (int n = 0; n < 2; n++) {
      const int of_slot = 16 * tile + 8 * n;
      for (int j = 0; j < DIM / 32; j++) keys[n][j] = load_eight(s.keys + (of_slot + g) * DIM + 32 * j + 8 * t);
#if KV_BITS == 8
      key_scales[n] = load_fresh_4(s.key_scales + of_slot + 2 * t);
#endif
    }
  };
  // Eight dims of slots 2 t, 2 t + 1, 2 t + 8 and 2 t + 9; dim j of them is column g of the product with number j.
  auto load_values = [&](int tile) {
    for (int n = 0; n < 4; n++) {
      const Stored* of_slot = s.values + (16 * tile + 2 * t + n % 2 + n / 2 * 8) * DIM + 8 * g;
      for (int i = 0; i < DIM / 64; i++) values[i][n] = load_eight(of_slot + 64 * i);
    }
#if KV_BITS == 8
    for (int n = 0; n < 2; n++) value_scales[n] = load_fresh_4(s.value_scales + 16 * tile + 8 * n + 2 * t);
#endif
  };
  const int first = s.low + warp;
  const bool stores = s.low <= slot / 16 && slot / 16 < s.high;
  if (!stores && first < s.high) load_keys(first), load_values(first);  // on their way while the queries are rotated

  for (int i = threadIdx.x; i < PAIRS; i += THREADS) {  // 8 heads, of which RATIO are live
    const int h = i / (PAIRS / 8), j = i % (PAIRS / 8);
    u8* to = queries + h * STRIDE + 16 * j;
    Pairs pairs = {};
    if (h < RATIO) pairs = pairs_of(qkv + (s.head * RATIO + h) * DIM, cos, sin, j);
    *(uint4*)to = words_of(pairs.low);
    *(uint4*)(to + 2 * PAIRS) = words_of(pairs.high);
  }
  if (stores && warp >= WARPS - 2) {
    const bool key = warp == WARPS - 2;
    const u16* from = qkv + QUERIES + (key ? 0 : KEYS) + s.head * DIM;
    Pairs pairs = {};
    if (lane < PAIRS / 8) pairs = pairs_of(from, key ? cos : nullptr, sin, lane);
    store((key ? s.keys : s.values) + slot * DIM, (key ? s.key_scales : s.value_scales) + slot, pairs, lane);
  }
  __syncthreads();
  if (stores && first < s.high) load_keys(first), load_values(first);

  // Products have the heads of the group as rows, of which g is this thread's.
  u32 query[DIM / 32][2][4] = {};
  for (int j = 0; j < DIM / 32; j++) {
    const uint4 words = *(const uint4*)(queries + g * STRIDE + 64 * j + 16 * t);
    query[j][0][0] = words.x, query[j][0][2] = words.y, query[j][1][0] = words.z, query[j][1][2] = words.w;
  }
  Softmax softmax = {HIDDEN, 0};
  float mine[DIM / 64][8][2] = {};  // head g, dims 64 i + 8 (2 t) + j and 64 i + 8 (2 t + 1) + j
  for (int tile = first; tile < s.high; tile += WARPS) {
    const bool more = tile + WARPS < s.high;
    float scores[2][4] = {};
    for (int n = 0; n < 2; n++) {
      for (int j = 0; j < DIM / 32; j++) {
        const uint4 words = floats_of(keys[n][j]);
        multiply_tile(scores[n], query[j][0], words.x, words.y, scores[n]);
        multiply_tile(scores[n], query[j][1], words.z, words.w, scores[n]);
      }
      for (int i = 0; i < 2; i++) {
        const float scale = KV_BITS == 8 ? SCALE * float_of_half((u16)(key_scales[n] >> i * 16)) : SCALE;
        scores[n][i] = tile * 16 + 8 * n + 2 * t + i < length ? scores[n][i] * scale : HIDDEN;
      }
    }
    if (more) load_keys(tile + WARPS);
    u32 weights[4];
    const float correction = weigh(scores, softmax, value_scales, weights);
    for (int i = 0; i < DIM / 64; i++) {
      u32 words[4][4];
      for (int n = 0; n < 4; n++) {
        const uint4 of_slot = floats_of(values[i][n]);
        words[n][0] = of_slot.x, words[n][1] = of_slot.y, words[n][2] = of_slot.z, words[n][3] = of_slot.w;
      }
      for (int j = 0; j < 8; j++) {
        const int w = j / 2;
        const u32 upper = j % 2 ? high_halves(words[0][w], words[1][w]) : low_halves(words[0][w], words[1][w]);
        const u32 lower = j % 2 ? high_halves(words[2][w], words[3][w]) : low_halves(words[2][w], words[3][w]);
        const float before[4] = {mine[i][j][0] * correction, mine[i][j][1] * correction, 0, 0};
        float after[4];
        multiply_tile(after, weights, upper, lower, before);
        mine[i][j][0] = after[0], mine[i][j][1] = after[1];
      }
    }
    if (more) load_values(tile + WARPS);
  }

  float total = softmax.total;
  total += __shfl_xor_sync(ALL, total, 1);
  total += __shfl_xor_sync(ALL, total, 2);
  if (t == 0) sums[(warp * 8 + g) * 2] = softmax.largest, sums[(warp * 8 + g) * 2 + 1] = total;
  if (g < RATIO) {
    for (int i = 0; i < DIM / 64; i++) {
      for (int j = 0; j < 16; j++) outs[(warp * RATIO + g) * DIM + 64 * i + 16 * t + j] = mine[i][j % 8][j / 8];
    }
  }
  __syncthreads();
  parts_out += s.part * QUERIES + s.head * RATIO * DIM;
  parts_sums += (s.part * HEADS + s.head) * RATIO * 2;
  for (int i = threadIdx.x; i < RATIO * DIM; i += THREADS) {
    const int h = i / DIM;
    float top = HIDDEN, sum = 0, result = 0;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, sums[(w * 8 + h) * 2]);
    for (int w = 0; w < WARPS; w++) {
      const float weight = power_of_2(sums[(w * 8 + h) * 2] - top);
      sum += weight * sums[(w * 8 + h) * 2 + 1];
      result += weight * outs[w * RATIO * DIM + i];
    }
    parts_out[i] = result;
    if (i % DIM == 0) parts_sums[2 * h] = top, parts_sums[2 * h + 1] = sum;
  }
}

// An output of this block's tiles: the sum over the warps in `parts` (tiles, WARPS, 16).
DEVICE float total_of(const float* parts, int tile, int output) {
  float sum = 0;
  for (int w = 0; w < WARPS; w++) sum += parts[(tile * WARPS + w) * 16 + output];
  return value_of(rounded(sum));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) layers(POINTERS) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u8 *const ring = shared + warp * STAGES * STAGE, *const region = shared + WARPS * STAGES * STAGE;
  u64* const pointers = (u64*)(region + REGION);
  float* scratch = (float*)(pointers + COUNT);  // [WARPS]
  {
    const void* const points[COUNT] = {POINTS};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {  // each warp has other pointers
      if (warp != w) continue;
#pragma unroll
      for (int i = w; i < COUNT; i += WARPS) pointers[i] = (u64)points[i];
    }
  }
  __syncthreads();

  Place at = {0, QKV, 0, 0};
  settle(at, pointers, warp, lane);
  int copied = 0, multiplied = 0;  // stages
  auto copy_ahead = [&] {
    copy_next(at, ring + copied * STAGE, pointers, warp, lane);
    copied = copied + 1 == STAGES ? 0 : copied + 1;
  };
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) copy_ahead();

  float* excess = (float*)(region + 2 * MOST_INPUTS);
  float* parts = excess + (EXCESS ? MOST_INPUTS / GROUP : 0);
  const float *cos = (const float*)pointers[1], *sin = (const float*)pointers[2];
  const int length = max(1, min(*(const int*)pointers[3] + 1, BOUND)), slot = *(const int*)pointers[4];
  const int count = parts_of(length);
  u16* const out = (u16*)pointers[RESULTS];
  u16* const qkv = (u16*)pointers[RESULTS + 1 + LAYERS * 2 * OF_CACHE];
  u16* const hidden = qkv + QUERIES + 2 * KEYS;
  float* const parts_out = (float*)pointers[RESULTS + 2 + LAYERS * 2 * OF_CACHE];
  float* const parts_sums = parts_out + QUERIES * PARTS;

  int start = 0;
  u32 waits = 0;
  const u16* x = (const u16*)pointers[0];
#pragma unroll 1
  for (int step = 0; step < LAYERS * PRODUCTS; step++) {  // one loop, so that the code of products stays at hand
    const int product = step % PRODUCTS, layer = step / PRODUCTS;
    if (step) wait_for_blocks(waits);
    if (product == OUT) {
      const Slots slots = slots_of(pointers, layer, length);
      if (slots.part < count) attend(slots, length, slot, qkv, cos, sin, parts_out, parts_sums, region, warp, lane);
      wait_for_blocks(waits);
      prepare<OUT>(nullptr, nullptr, parts_out, parts_sums, count, region, excess, scratch);
    } else if (product == DOWN) {
      prepare<DOWN>(hidden, nullptr, nullptr, nullptr, 0, region, excess, scratch);
    } else {
      const u64* norms = pointers + 5 + layer * OF_LAYER;
      prepare<QKV>(x, (const u16*)norms[product == QKV ? 0 : 1], nullptr, nullptr, 0, region, excess, scratch);
    }
    const int first = first_item(start), items = items_here(start, product), units = units_of(product);
    const bool adds = product == OUT || product == DOWN;
    u16 before = 0;  // x of the first output of this thread, loaded early
    if (adds && threadIdx.x < 16 * items) before = load_fresh_2(x + 16 * (first + threadIdx.x / 16 * GRID) + threadIdx.x % 16);

    for (int tile = 0; tile < tiles_of(product) * items; tile++) {
      float sums[4] = {};
      for (int unit = first_unit(warp, tile, units); unit < units; unit += WARPS) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();  // all threads have their copies, and are done with the stage that is copied to next
        copy_ahead();
        multiply_unit(ring + multiplied * STAGE, region, excess, unit, lane, sums);
        multiplied = multiplied + 1 == STAGES ? 0 : multiplied + 1;
      }
      if (lane % 4 == 0) {
        float* to = parts + (tile * WARPS + warp) * 16 + lane / 4;
        to[0] = sums[0], to[8] = sums[2];
      }
    }
    __syncthreads();
    start = next_start(start, product);

    for (int i = threadIdx.x; i < 16 * items; i += THREADS) {
      const int o = 16 * (first + i / 16 * GRID) + i % 16;
      if (product == QKV) {
        qkv[o] = rounded(total_of(parts, i / 16, i % 16));
      } else if (product == GATE_UP) {
        const float gate = total_of(parts, i / 16 * 2, i % 16), up = total_of(parts, i / 16 * 2 + 1, i % 16);
        hidden[o] = rounded(quotient(gate, 1 + exponential(-gate)) * up);
      } else {
        const float sum = total_of(parts, i / 16, i % 16);
        out[o] = rounded(sum + value_of(i < THREADS ? before : load_fresh_2(x + o)));
      }
    }
    if (product == OUT) x = out;
  }
  __syncthreads();
  if (threadIdx.x == 0 && arrive(&left) == GRID - 1) arrived = 0, left = 0;
}
