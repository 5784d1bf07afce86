// The layers of a decode step: one new token of each of B rows, whose keys and values are stored before they are read.
// Between two parallel loops threads wait for one another, ten times a layer, without XLA in between.
#pragma once
#include "decode_attention.h"
#include "few_rows.h"
#include "rotation.h"

struct Norm { const void* scale; bool bf16; };
struct Stored { void* values; uint16_t* scales; };  // (B, K, S, H), and (B, K, S) or null
struct Layer { Norm attention_norm, ffn_norm; Weight qkv[3], o, gate_up[2], down; Stored k, v; };
struct Step {
  int B, D, N, K, S, H, F; bool bf16; float eps; Type stored;  // bf16: of x and of what is computed from it
  const float *cos, *sin; const int32_t *lengths, *slots;      // (B, H/2); (B,): keys of a row, and the slot of the new one, which is dropped beyond S
};
constexpr int LOOPS = 10;  // of a layer

// H values of T as 8 bits and a scale, as cache.py rounds them.
template <class T> static void store_bytes(const T* x, int H, int8_t* to, uint16_t* scale) {
  float largest = 0; bool any = false;
  for (int h = 0; h < H; h++) { const float v = at(x, sizeof(T) == 2, h); largest = std::max(largest, fabsf(v)), any |= v != v; }
  *scale = to_half(any ? NAN : std::max(largest / 127.f, 6.103515625e-5f));
  const float by = from_half(*scale);
  for (int h = 0; h < H; h++) {
    const float v = nearbyintf(at(x, sizeof(T) == 2, h) / by);
    to[h] = v != v ? 0 : (int8_t)std::min(std::max(v, -127.f), 127.f);
  }
}
// One new key or value of a row and a head.
template <class T> static void store_new(const T* x, const Step& in, const Stored& to, int64_t at) {
  if (in.stored == Type::S8) store_bytes(x, in.H, (int8_t*)to.values + at * in.H, to.scales + at);
  else memcpy((T*)to.values + at * in.H, x, in.H * sizeof(T));
}
// x (B, D) of T becomes the hidden state after `count` layers. T is float or bfloat16, which is also the type of a cache that is
// not int8.
template <class T> static void decode_layers(const Step& in, Layer* layers, int count, T* x, Team& team) {
  static thread_local Scratch scratch;
  const int B = in.B, H = in.H, G = in.N / in.K, heads = in.N * H, kv = in.K * H;
  T *q = scratch.get<T>((int64_t)B * (2 * heads + 2 * kv + 2 * in.F)), *k = q + (int64_t)B * heads, *v = k + (int64_t)B * kv, *out = v + (int64_t)B * kv, *gate = out + (int64_t)B * heads, *up = gate + (int64_t)B * in.F;
  auto run = [&](int n, const auto& body) { team.run(n, body); };
  auto inputs = [&](const T* from, int K, int before, Norm with) { Inputs i{}; i.x = from, i.bf16 = in.bf16, i.B = B, i.K = K, i.before = before, i.with = with.scale, i.with_bf16 = with.bf16, i.eps = in.eps; return i; };
  auto product = [&](const Inputs& i, Weight* weights, std::initializer_list<T*> to, const T* plus) {
    int j = 0; for (T* p : to) weights[j].out = (char*)p, weights[j].out_bf16 = in.bf16, weights[j++].plus = (const char*)plus;
    few_rows(i, weights, j, team.threads, run);
  };
  for (Layer* layer = layers; layer < layers + count; layer++) {
    product(inputs(x, in.D, 1, layer->attention_norm), layer->qkv, {q, k, v}, nullptr);
    team.run(B, [&](int b) {
      rotate_heads(k + (int64_t)b * kv, in.cos + b * (H / 2), in.sin + b * (H / 2), in.K, H, k + (int64_t)b * kv);
      const int slot = in.slots[b];
      if (slot >= 0 && slot < in.S) for (int h = 0; h < in.K; h++) {
        const int64_t from = (int64_t)b * kv + h * H, to = ((int64_t)b * in.K + h) * in.S + slot;
        store_new(k + from, in, layer->k, to), store_new(v + from, in, layer->v, to);
      }
    });
    const Keys keys{layer->k.values, layer->v.values, layer->k.scales, layer->v.scales};
    team.run(B * in.N, [&](int i) {
      static thread_local Scratch scratch;
      const int b = i / in.N; T* query = q + (int64_t)i * H; float* wide = scratch.get<float>(H);
      rotate_heads(query, in.cos + b * (H / 2), in.sin + b * (H / 2), 1, H, query);
      widen(query, H, wide);
      attend(wide, keys, in.stored, (int64_t)(i / G) * in.S, std::min(std::max(in.lengths[b], 0), in.S), H, in.bf16, out, (int64_t)i * H);
    });
    product(inputs(out, heads, 0, {}), &layer->o, {x}, x);
    product(inputs(x, in.D, 1, layer->ffn_norm), layer->gate_up, {gate, up}, nullptr);
    product(inputs(gate, in.F, 2, {up, in.bf16}), &layer->down, {x}, x);
  }
}
