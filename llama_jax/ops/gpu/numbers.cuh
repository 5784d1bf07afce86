// 16-bit floats in the words of a kernel: float16 if HALF, else bfloat16.

DEVICE float value_of(u16 bits) { return HALF ? float_of_half(bits) : float_of_bfloat16(bits); }
DEVICE u32 pair(float low, float high) { return HALF ? halves(low, high) : bfloat16s(low, high); }
DEVICE u16 rounded(float f) { return (u16)pair(f, 0); }
DEVICE u32 low_halves(u32 a, u32 b) { return (a & 0xffff) | b << 16; }
DEVICE u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000); }

// Bytes 0 and 2 of a word, which are signed integers, as two floats.
DEVICE u32 floats_of_bytes_0_2(u32 word) {
#if HALF  // 1024 + 128 + the integer, minus 1024 + 128
  return minus(((word ^ 0x00800080) & 0x00ff00ff) | 0x64006400, 0x64806480);
#else  // 128 + the last 7 bits, minus 128, or 256 for a negative integer
  return minus((word & 0x007f007f) | 0x43004300, (word & 0x00800080) | 0x43004300);
#endif
}
