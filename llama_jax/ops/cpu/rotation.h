// Rotary positions: values h and h + H/2 of a head turn together, by an angle of the token.
#pragma once
#include <algorithm>
#include "inputs.h"

constexpr int64_t ROTATED = 8192;  // least values of a task

// N heads of H values of one token, and the cosines and sines (H/2) of its angles. `to` may be `from`.
template <class T> static void rotate_heads(const T* from, const float* cos, const float* sin, int N, int H, T* to) {
  const int half = H / 2;
  for (int n = 0; n < N; n++, from += H, to += H) {
    int h = 0;
    for (; h + LANES <= half; h += LANES) {
      const vf a = load(from + h), b = load(from + half + h), turn = load(cos + h), by = load(sin + h); float rotated[LANES];
      store(rotated, a * turn - b * by); narrow(rotated, LANES, to + h);
      store(rotated, b * turn + a * by); narrow(rotated, LANES, to + half + h);
    }
    for (; h < half; h++) {
      const float a = at(from, sizeof(T) == 2, h), b = at(from, sizeof(T) == 2, half + h), rotated[] = {a * cos[h] - b * sin[h], b * cos[h] + a * sin[h]};
      narrow(rotated, 1, to + h), narrow(rotated + 1, 1, to + half + h);
    }
  }
}
// Heads (tokens, N, H) of T, and the cosines and sines (tokens, H/2) of their angles. `out` has the shape of x.
template <class T> static void rotate(const T* x, const float* cos, const float* sin, int64_t tokens, int N, int H, T* out, ffi::ThreadPool& pool) {
  const int64_t of_token = (int64_t)N * H, each = std::max<int64_t>(1, ROTATED / std::max<int64_t>(1, of_token));
  parallel(pool, (int)((tokens + each - 1) / each), [&](int i) {
    for (int64_t t = i * each; t < std::min((i + 1) * each, tokens); t++) rotate_heads(x + t * of_token, cos + t * (H / 2), sin + t * (H / 2), N, H, out + t * of_token);
  });
}
