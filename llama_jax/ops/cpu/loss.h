// Cross-entropy over a part of the vocabulary, whose scores x table^T are in memory for a few rows at a time only.
//
// Letters: T rows of x, V rows of the table, D their length.
#pragma once
#include <algorithm>
#include "many_rows.h"
#include "products.h"

// `targets` count from the first row of the table; others have their target in another part. Rows from `live` on are padding.
struct Scores { Matrix x, table; const int32_t* targets; int live; };

// use(row, first column, scores, live columns, columns) for every row, in parts of SCORES columns. They do not depend on the
// processor's caches, so that the digits of a loss do not either.
constexpr int PARTS = 8, SCORES = PARTS * PANEL;
template <class M, class Use> static void each_row(const Scores& in, const Use& use, ffi::ThreadPool& pool) {
  Borrowed scratch;
  const Packed<M> rows = in_chunks<M>(scratch, in.x, false, pool);
  blocks(pool, rows.count, &in.table.rows, 1, PARTS, [&](int, int first, int last, int column, int width) {
    const Weight w{(const char*)in.table.data, nullptr, in.table.type, in.table.rows};
    multiply_block(rows, first, last, (width + PANEL - 1) / PANEL,
      [&](int k, uint32_t* to) { pack_weight<M>(w, column, width, rows.K, k, rows.chunk, to); },
      [&](int r, int count, float* sums, int64_t ld) {
        for (int i = 0; i < count; i++, sums += ld) use(r + i, column, sums, std::max(0, std::min(width, in.live - column)), width);
      });
  });
}
// The largest score of each row, the sum of exp(score - largest), and the score of the target, or 0; all scores if they
// are kept. Parts of a row are joined in their order, so that a result does not depend on the number of threads.
template <class M> static void loss(const Scores& in, float* top, float* total, float* hit, float* kept, ffi::ThreadPool& pool) {
  Borrowed scratch;
  struct Part { float top, total; };
  const int T = in.x.rows, parts = (in.table.rows + SCORES - 1) / SCORES;
  Part* all = scratch.scratch->get<Part>((int64_t)T * parts);
  std::fill(hit, hit + T, 0.f);
  each_row<M>(in, [&](int row, int column, float* scores, int live, int width) {
    if (kept) memcpy(kept + (int64_t)row * in.table.rows + column, scores, width * 4);
    const int padded = rounded_up(live, LANES), target = in.targets[row] - column;
    if (target >= 0 && target < live) hit[row] = scores[target];
    std::fill(scores + live, scores + padded, -INFINITY);
    vf largest = splat(-INFINITY), sums{};
    for (int i = 0; i < padded; i += LANES) largest = max(largest, load(scores + i));
    float most = -INFINITY; for (int i = 0; i < LANES; i++) most = std::max(most, largest[i]);
    for (int i = 0; i < live; i += LANES) {
      vf e = exp(load(scores + i) - most);
      for (int j = live - i; j < LANES; j++) e[j] = 0;
      sums += e;
    }
    all[(int64_t)row * parts + column / SCORES] = {most, sum(sums)};
  }, pool);
  parallel(pool, T, [&](int row) {
    const Part* part = all + (int64_t)row * parts;
    float most = -INFINITY, sums = 0;
    for (int p = 0; p < parts; p++) most = std::max(most, part[p].top);
    for (int p = 0; p < parts; p++) if (part[p].total != 0) sums += part[p].total * expf(part[p].top - most);
    top[row] = most, total[row] = sums;
  });
}
// One row of scores becomes their gradient: all * exp(score - lse), minus `hit` at the target.
INLINE void to_gradient(float* scores, int live, int width, int target, float lse, float all, float hit) {
  auto of = [&](const float* from) __attribute__((always_inline)) { return exp(load(from) - lse) * all; };
  int i = 0;
  for (; i + LANES <= live; i += LANES) store(scores + i, of(scores + i));
  float last[LANES] = {};
  if (i < live) memcpy(last, scores + i, (live - i) * 4), store(last, of(last)), memcpy(scores + i, last, (live - i) * 4);
  std::fill(scores + live, scores + width, 0.f);
  if (target >= 0 && target < live) scores[target] -= hit;
}
// The gradient of the scores, (T, V) in the type of x.
template <class M> static void loss_gradient(const Scores& in, const float* lse, const float* all, const float* hit, void* out, ffi::ThreadPool& pool) {
  each_row<M>(in, [&](int row, int column, float* scores, int live, int width) {
    to_gradient(scores, live, width, in.targets[row] - column, lse[row], all[row], hit[row]);
    write_row(scores, width, in.x.type == Type::BF16, (char*)out, (int64_t)row * in.table.rows + column);
  }, pool);
}
