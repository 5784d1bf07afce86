// Products of many rows: C = A B, where A has rows and B columns of K values that are summed over.
//
// K is cut into chunks, so that a strip of A stays in the first-level cache and some panels of B in the second. All of A is
// packed first, by all threads, if it cannot be used as it is. A thread packs a few panels of B and multiplies them with a
// block of A; C is in memory between chunks.
#pragma once
#include <algorithm>
#include <unistd.h>
#include "inputs.h"
#include "pool.h"
#include "tiles.h"

#ifdef HAS_AMX
template <class M> constexpr int CHUNK = sizeof(M) == 2 ? 4096 : 2048;  // most bytes of a row in a chunk
#else
template <class M> constexpr int CHUNK = 2048;
#endif
constexpr int BLOCK_ROWS = 512;    // rows of A that a thread multiplies with the panels that it packed
constexpr int BLOCK_PANELS = 16;   // most of these panels, where the second-level cache has room
constexpr int ROWS_AHEAD = 4;      // prefetched rows of B, of which the processor does not foresee the next one
constexpr int TRANSPOSED = 32;     // rows that are packed at a time if A is transposed

static int64_t second_level_cache() {  // bytes
#ifdef _SC_LEVEL2_CACHE_SIZE
  const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}
// The first operand: `count` rows of K values in chunks. Rows beyond `count` may be multiplied, and are dropped.
template <class M> struct Packed {
  M* data; int count, K, chunk, chunks; int64_t stride, between;  // values between rows, and between chunks
  Packed(int count, int K) : count(count), K(K) {
    const int values = CHUNK<M> / (int)sizeof(M), most = std::max(1, (K + values - 1) / values);
    chunk = std::max(ALIGN, rounded_up((K + most - 1) / most, ALIGN)), chunks = std::max(1, (K + chunk - 1) / chunk);
  }
  Packed(Scratch& scratch, int count, int K) : Packed(count, K) {
    stride = chunk + ALIGN;  // rows of a power of two would share lines of the cache
    between = (rounded_up(count, TRANSPOSED) + MOST_ROWS<M>) * stride;
    data = scratch.get<M>(chunks * between);
  }
  M* at(int c, int row) const { return data + c * between + row * stride; }
  int most_panels() const {  // that take half of the second-level cache, from 4 to BLOCK_PANELS
    static const int64_t cache = second_level_cache();
    return (int)std::min<int64_t>(BLOCK_PANELS, std::max<int64_t>(4, cache / 2 / (chunk * (int64_t)sizeof(M) * PANEL)));
  }
  int live(int c) const { return std::min(chunk, K - c * chunk); }  // values of a chunk that are not padding
  int units(int c) const { return rounded_up(live(c), ALIGN) / UNIT<M>; }
  void set(int row, const float* from) const {  // `from` has chunks * chunk values, zero beyond K
    for (int c = 0; c < chunks; c++) narrow(from + c * chunk, chunk, at(c, row));
  }
};

// A matrix in memory of row-major values, float32 or bfloat16.
struct Matrix { const void* data; Type type; int rows, columns; };
// `count` values of a row as M, and zeros up to `padded`. Values outside of the matrix are zeros.
template <class M> INLINE void read(const Matrix& m, int row, int column, int count, int padded, M* to) {
  const int64_t at = (int64_t)row * m.columns + column;
  auto copy = [&](int n) __attribute__((always_inline)) {
    if (m.type != Type::BF16) narrow((const float*)m.data + at, n, to);
    else if constexpr (sizeof(M) == 2) memcpy(to, (const uint16_t*)m.data + at, n * 2);
    else widen((const uint16_t*)m.data + at, n, to);
  };
  count = row < m.rows ? std::max(0, std::min(count, m.columns - column)) : 0;
  if (count == padded) return copy(padded);  // often a constant
  copy(count), memset(to + count, 0, (padded - count) * sizeof(M));
}
INLINE void prefetch_row(const char* row, int64_t bytes) { for (int64_t i = 0; i < bytes; i += 64) prefetch(row + i); }
INLINE void prefetch_row(const Matrix& m, int row, int column, int count) {
  const int bytes = m.type == Type::BF16 ? 2 : 4;
  prefetch_row((const char*)m.data + ((int64_t)row * m.columns + column) * bytes, count * bytes);
}
// The rows of a matrix, or of its transpose.
template <class M> static Packed<M> in_chunks(Scratch& scratch, const Matrix& m, bool transpose, ffi::ThreadPool& pool) {
  const bool alike = m.type == (sizeof(M) == 2 ? Type::BF16 : Type::F32), spread = m.columns * sizeof(M) % 4096 != 0;
  if (!transpose && alike && m.columns % ALIGN == 0 && (sizeof(M) == 4 || (spread && m.rows % 32 == 0))) {  // as it is: no row beyond it is read (by `turn`, if they are floats)
    Packed<M> a(m.rows, m.columns);
    a.data = (M*)m.data, a.stride = m.columns, a.between = a.chunk;
    return a;
  }
  const Packed<M> a(scratch, transpose ? m.columns : m.rows, transpose ? m.rows : m.columns);
  if (!transpose) {
    parallel(pool, a.count, [&](int row) { for (int c = 0; c < a.chunks; c++) read(m, row, c * a.chunk, a.live(c), a.chunk, a.at(c, row)); });
    return a;
  }
  constexpr int T = TRANSPOSED, U = UNIT<M>, WIDE = 8 * T;  // columns at a time, whose lines follow one another
  parallel(pool, (a.count + WIDE - 1) / WIDE * a.chunks, [&](int i) {
    const int c = i % a.chunks, start = i / a.chunks * WIDE, end = std::min(start + WIDE, a.count);
    for (int k = 0; k < a.chunk; k += 16 * U) for (int row = start; row < end; row += T) {
      M few[U][T]; uint32_t units[16 * T];
      for (int u = 0; u < 16; u++) {
        for (int j = 0; j < U; j++) {
          const int at = k + u * U + j;
          prefetch_row(m, c * a.chunk + at + 16 * U, row, T);
          read(m, at < a.live(c) ? c * a.chunk + at : m.rows, row, T, T, few[j]);
        }
        if constexpr (U == 1) memcpy(units + u * T, few, T * 4);
        else for (int n = 0; n < T; n++) units[u * T + n] = few[0][n] | (uint32_t)few[U - 1][n] << 16;
      }
      for (int n = 0; n < T; n += 16) transpose16(units + n, T, (uint32_t*)(a.at(c, row + n) + k), a.stride / U);
    }
  });
  return a;
}
// Columns from `column` on of a matrix with K rows, for values k ... k + chunk, as panels.
template <class M> static void pack_panels(const Matrix& m, int column, int panels, int k, int chunk, uint32_t* to) {
  M rows[UNIT<M>][PANEL];
  const int units = chunk / UNIT<M>;
  for (int u = 0; u < units; u++) for (int p = 0; p < panels; p++) {
    for (int j = 0; j < UNIT<M>; j++) {
      const int row = k + u * UNIT<M> + j, at = column + p * PANEL;
      prefetch_row(m, row + ROWS_AHEAD, at, PANEL);
      read(m, row, at, PANEL, PANEL, rows[j]);
    }
    pack_rows(rows[0], PANEL, to + ((int64_t)p * units + u) * PANEL);
  }
}

// Rows first..last of A times `panels` panels of B. pack(k, to) packs them for the values from k, and
// done(row, count, sums, ld) takes rows of C, as soon as they are complete. It may change them. `out` is prefetched for it.
static thread_local Scratch block_columns, block_sums;  // of one thread, for products of every kind
struct Out {  // the first value of a block of C, and the bytes of a value and from row to row
  char* data = nullptr; int value = 0; int64_t row = 0;
  Out() {}
  Out(char* c, bool bf16, int64_t at, int64_t columns) : value(bf16 ? 2 : 4) { data = c + at * value, row = columns * value; }
};
template <class M, class Pack, class Done> static void multiply_block(const Packed<M>& a, int first, int last, int panels, const Pack& pack, const Done& done, const Out& out = {}) {
  const int size = a.chunk / UNIT<M> * PANEL, ld = panels * PANEL, kept = a.chunks > 1 ? last - first : 0;
  uint32_t* b = block_columns.get<uint32_t>((int64_t)panels * size);
  float* c = block_sums.get<float>((int64_t)(kept + rounded_up(MOST_ROWS<M>, 16)) * ld + 16);  // write_columns reads sixteen rows and columns
  alignas(64) float turned[CHUNK<float> / 4 * IN_REGISTERS + STRIP_END];
  const Amx amx;
  for (int k = 0; k < a.chunks; k++) {
    pack(k * a.chunk, b);
    for (int r = first; r < last; r += MOST_ROWS<M>) {
      float* strip = c + (kept ? (int64_t)(r - first) * ld : 0); const int rows = std::min(MOST_ROWS<M>, last - r);
      if constexpr (sizeof(M) == 4) {
        turn(rows, a.at(k, r), a.stride, a.units(k), turned);
        for (int p = 0; p < panels; p++) {
          const int next = IN_REGISTERS * p / panels, end = IN_REGISTERS * (p + 1) / panels;
          char* to = out.data && k + 1 == a.chunks ? out.data + r * out.row + p * PANEL * out.value : nullptr;
          in_registers<true>(rows, turned, 0, b + p * size, a.units(k), strip + p * PANEL, ld, k > 0, {a.at(k, r + IN_REGISTERS + next), a.stride, end - next, to, out.row});
        }
      } else for (int p = 0; p < panels; p++) multiply(rows, a.at(k, r), a.stride, b + p * size, a.units(k), strip + p * PANEL, ld, k > 0);
      if (k + 1 == a.chunks) done(r, rows, strip, ld);
    }
  }
}
// Panels of each task, so that all threads have two tasks: more are narrower, and share less of the work of packing.
template <class M> static int panels_of_task(const Packed<M>& a, int64_t panels, const ffi::ThreadPool& pool) {
  const int64_t blocks = (a.count + BLOCK_ROWS - 1) / BLOCK_ROWS, tasks = 2 * std::max<int64_t>(1, pool.num_threads());
  return (int)std::min<int64_t>(a.most_panels(), (blocks * panels + tasks - 1) / tasks);
}
// body(j, first row, last row, first column, columns) for all blocks of products with matrices of these columns.
template <class Body> static void blocks(ffi::ThreadPool& pool, int rows, const int* columns, int count, int panels, const Body& body) {
  const int width = panels * PANEL, down = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  int across = 0; for (int j = 0; j < count; j++) across += (columns[j] + width - 1) / width;
  parallel(pool, across * down, [&](int i) {
    int j = 0, at = i % across; for (; at >= (columns[j] + width - 1) / width; j++) at -= (columns[j] + width - 1) / width;
    const int row = i / across * BLOCK_ROWS;
    body(j, row, std::min(row + BLOCK_ROWS, rows), at * width, std::min(width, columns[j] - at * width));
  });
}
INLINE void write_rows(const float* sums, int64_t ld, int rows, int columns, bool bf16, char* out, int64_t at, int64_t out_ld, const char* plus = nullptr) {
  for (int r = 0; r < rows; r++) write_row(sums + r * ld, columns, bf16, out, at + r * out_ld, plus);
}
// The same for the transpose of these rows of sums.
INLINE void write_columns(const float* sums, int64_t ld, int rows, int columns, bool bf16, char* out, int64_t at, int64_t out_ld) {
  constexpr int MOST = rounded_up(MOST_ROWS<uint16_t>, 16);
  for (int n = 0; n < columns; n += 16) {
    float few[16][MOST];
    for (int r = 0; r < rows; r += 16) transpose16((const uint32_t*)sums + r * ld + n, ld, (uint32_t*)few[0] + r, MOST);
    for (int i = 0; i < std::min(16, columns - n); i++) write_row(few[i], rows, bf16, out, at + (n + i) * out_ld);
  }
}
// The product of two matrices, a b with b (K, N), or a^T b.
template <class M> static void product(const Matrix& a, bool transpose, const Matrix& b, bool out_bf16, char* out, ffi::ThreadPool& pool) {
  Borrowed scratch;
  const bool swap = transpose && a.columns > b.columns;  // (b^T a)^T: the narrower of both is transposed in memory
  const Matrix& columns = swap ? a : b;
  const Packed<M> rows = in_chunks<M>(scratch, swap ? b : a, transpose, pool);
  const int panels = panels_of_task(rows, (columns.columns + PANEL - 1) / PANEL, pool);
  blocks(pool, rows.count, &columns.columns, 1, panels, [&](int, int first, int last, int column, int width) {
    multiply_block(rows, first, last, (width + PANEL - 1) / PANEL,
      [&](int k, uint32_t* to) { pack_panels<M>(columns, column, (width + PANEL - 1) / PANEL, k, rows.chunk, to); },
      [&](int r, int count, const float* sums, int64_t ld) {
        if (swap) write_columns(sums, ld, count, width, out_bf16, out, (int64_t)column * rows.count + r, rows.count);
        else write_rows(sums, ld, count, width, out_bf16, out, (int64_t)r * columns.columns + column, columns.columns);
      }, swap ? Out() : Out(out, out_bf16, column, columns.columns));
  });
}
