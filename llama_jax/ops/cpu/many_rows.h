// Products of many rows with weights, which are packed first, and dequantized if they are quantized.
#pragma once
#include <algorithm>
#include "inputs.h"
#include "products.h"
#include "tiles.h"

// Values k ... k + count of row n of a weight as M, rounded as XLA rounds a dequantized weight. k is a multiple of GROUP.
template <class M> static void widen_row(const Weight& w, int n, int K, int k, int count, M* to) {
  if (!w.scales) return read(Matrix{w.w, w.type, w.N, K}, n, k, count, count, to);
  const char* p = w.w + n * row_bytes(w.type, K) + row_bytes(w.type, k); const uint16_t* scales = w.scales + (int64_t)n * (K / GROUP) + k / GROUP;
  for (int g = 0; g < count / GROUP; g++, to += GROUP, p += row_bytes(w.type, GROUP)) {
    int8_t values[GROUP]; float wide[GROUP];
    if (w.type == Type::U8) nibbles((const uint8_t*)p, values, values + GROUP / 2); else memcpy(values, p, GROUP);
    for (int i = 0; i < GROUP; i += LANES) store(wide + i, load(values + i) * from_half(scales[g]));
    narrow(wide, GROUP, to);
  }
}
// Rows n ... n + count of a weight as the columns of panels, for values k ... k + chunk.
template <class M> static void pack_weight(const Weight& w, int n, int count, int K, int k, int chunk, uint32_t* to) {
  static thread_local Scratch scratch;
  M* few = scratch.get<M>((int64_t)PANEL * chunk);
  const int live = std::min(chunk, K - k), padded = rounded_up(live, ALIGN);
  const bool as_it_is = !w.scales && w.type == (sizeof(M) == 2 ? Type::BF16 : Type::F32) && live == padded && K % UNIT<M> == 0;
  for (; count > 0; count -= PANEL, n += PANEL, to += (int64_t)chunk / UNIT<M> * PANEL) {
    if (as_it_is && count >= PANEL) { pack_columns((const M*)w.w + (int64_t)n * K + k, K, live, to, PANEL); continue; }
    for (int i = 0; i < PANEL; i++) {
      M* row = few + (int64_t)i * padded; const int values = i < count ? live : 0;
      prefetch_row(w.w + (n + i + ROWS_AHEAD) * row_bytes(w.type, K) + row_bytes(w.type, k), row_bytes(w.type, values));
      if (values) widen_row(w, n + i, K, k, values, row);
      std::fill(row + values, row + padded, M(0));
    }
    pack_columns(few, padded, padded, to);
  }
}
// Rows in.first ... in.first + in.B.
template <class M> static Packed<M> inputs(Scratch& scratch, const Inputs& in, ffi::ThreadPool& pool) {
  if (!in.before) return in_chunks<M>(scratch, {(const char*)in.x + (int64_t)in.first * in.K * (in.bf16 ? 2 : 4), in.bf16 ? Type::BF16 : Type::F32, in.B, in.K}, false, pool);
  const Packed<M> rows(scratch, in.B, in.K);
  const int width = std::max(in.pad, rows.chunks * rows.chunk);
  parallel(pool, in.B, [&](int b) {
    static thread_local Scratch floats;
    float* f = floats.get<float>(width);
    read_row(in, b, f);
    std::fill(f + in.K, f + width, 0.f);
    rows.set(b, f);
  });
  return rows;
}
// All products of rows in.first ... in.first + in.B with `count` weights.
template <class M> static void many_rows(const Inputs& in, const Weight* weights, int count, ffi::ThreadPool& pool) {
  Borrowed scratch;
  const Packed<M> rows = inputs<M>(scratch, in, pool);
  int columns[MOST_WEIGHTS]; int64_t panels = 0;
  for (int j = 0; j < count; j++) columns[j] = weights[j].N, panels += (weights[j].N + PANEL - 1) / PANEL;
  blocks(pool, in.B, columns, count, panels_of_task(rows, panels, pool), [&](int j, int first, int last, int column, int width) {
    const Weight& w = weights[j];
    multiply_block(rows, first, last, (width + PANEL - 1) / PANEL,
      [&](int k, uint32_t* to) { pack_weight<M>(w, column, width, in.K, k, rows.chunk, to); },
      [&](int r, int live, const float* sums, int64_t ld) { write_rows(sums, ld, live, width, w.out_bf16, w.out, (int64_t)(in.first + r) * w.N + column, w.N, w.plus); },
      Out(w.out, w.out_bf16, (int64_t)in.first * w.N + column, w.N));
  });
}
