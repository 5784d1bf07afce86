// A unit of a weight in shared memory: 128 bytes of each of 16 outputs, and the scales of their groups.
//
// BITS of the weights: 16, 8 or 4. Warps copy units and multiply them by tensor cores. Integers become 16-bit floats in
// registers. The sums of a group are multiplied by its scale in float32.

#define UNIT 128                                       // bytes of a unit in each row
#define GROUP 32                                       // inputs of a group
#define GROUP_BYTES (GROUP * BITS / 8)                 // of the weight
#define GROUPS (UNIT / GROUP_BYTES)                    // of a unit
#define PIECES (GROUP_BYTES / 16)                      // copies of 16 bytes of a group
#define SCALES (2 * GROUPS)                            // bytes of the scales of a unit, for each of 16 outputs
#define STAGE (16 * (UNIT + (BITS == 16 ? 0 : SCALES)))  // bytes of a unit of a tile
#define EXCESS (BITS == 4 && !HALF)                    // products are too large by EXCESS_FACTOR times the inputs' sum
#define EXCESS_FACTOR 136

// The integers of eight inputs of one output, as four words of two 16-bit floats each: an exponent, and the integer in
// the last bits. In bfloat16 an integer v becomes 128 + 8 + v, which `excess` makes up for; in float16 it is exact.
DEVICE void floats_of_4_bits(u32 word, u32& low_a, u32& low_b, u32& high_a, u32& high_b) {
  u32* const all[4] = {&low_a, &high_a, &low_b, &high_b};
  for (int i = 0; i < 4; i++) {
    const u32 bits = (word >> (4 * i)) & 0x000f000f;
    *all[i] = HALF ? minus(bits | 0x64006400, 0x64086408) : bits | 0x43004300;  // 1024 + 8 + v, minus 1032
  }
}

// Where a unit has a piece of 16 bytes of a row: each row has its pieces in another order, so that eight rows are read from
// different banks.
DEVICE u8* piece_of(u8* unit, int row, int piece) { return unit + row * UNIT + (piece ^ (row * PIECES & 7)) * 16; }

// The values of group `group` of a row as the operands of two products. Which inputs they belong to is the order that
// `place` gives to x. The row has its pieces in the order of their numbers XOR `swap`, as in `piece_of`.
DEVICE void load_values(const u8* row, int swap, int group, int t, u32 first[2], u32 second[2]) {
#if BITS == 16
  const uint4 words = *(const uint4*)(row + ((group * PIECES + t) ^ swap) * 16);
  first[0] = words.x, first[1] = words.y, second[0] = words.z, second[1] = words.w;
#elif BITS == 8
  const uint2 words = *(const uint2*)(row + ((group * PIECES + t / 2) ^ swap) * 16 + (t & 1) * 8);
  first[0] = floats_of_bytes_0_2(words.x), first[1] = floats_of_bytes_0_2(words.x >> 8);
  second[0] = floats_of_bytes_0_2(words.y), second[1] = floats_of_bytes_0_2(words.y >> 8);
#else
  const u32 word = *(const u32*)(row + (group ^ swap) * 16 + t * 4);
  floats_of_4_bits(word, first[0], first[1], second[0], second[1]);
#endif
}

// The values of a group of a unit as the left operands of two products: outputs g and g + 8 are this thread's.
DEVICE void load_group(const u8* unit, int group, int lane, u32 first[4], u32 second[4]) {
  const int g = lane / 4, t = lane % 4, swap = g * PIECES & 7;
  u32 pairs[2][2][2];
  load_values(unit + g * UNIT, swap, group, t, pairs[0][0], pairs[0][1]);
  load_values(unit + (g + 8) * UNIT, swap, group, t, pairs[1][0], pairs[1][1]);
  for (int i = 0; i < 4; i++) first[i] = pairs[i % 2][0][i / 2], second[i] = pairs[i % 2][1][i / 2];
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
