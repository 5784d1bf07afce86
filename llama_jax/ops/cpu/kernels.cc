// Products with weights, and attention over the live keys, as XLA custom calls for CPUs.
//
// llama_linear: y_i = f(x) w_i^T for one or several weights (out, in) of the same inputs. f is nothing, RMSNorm, or
// SwiGLU's silu(x) * up. A residual may be added. x, up and y are float32 or bfloat16.
// llama_attention: softmax(q k^T / sqrt(H)) v over the first `length` keys of each row, for one query a row.
// llama_attention_many: the same for many queries, each with a range of keys. A second result is the log-sum-exp of scores.
// llama_attention_gradient: the gradient of llama_attention_many.
// llama_layers: all layers of a decode step of up to FEW rows, made of these.
// llama_rotate: rotary positions.
// llama_rows: rows of a table of bfloat16.
// llama_product: the product of two matrices, for gradients.
// llama_loss: maxima and sums of the softmax over a part of the vocabulary; llama_loss_gradient: the gradient of its scores;
// llama_kept_gradient: the same of scores that are in memory.
//
// Up to FEW rows are multiplied with weights as they are read. For more rows the weights are packed first.
// A result does not depend on how many threads run, and within each of the two kinds not on the number of rows; but with
// AMX a single row is a third kind.
// Letters: B rows, K inputs, N outputs.
#include <algorithm>
#include "attention.h"
#include "attention_gradient.h"
#include "decode_attention.h"
#include "few_rows.h"
#include "inputs.h"
#include "layers.h"
#include "loss.h"
#include "many_rows.h"
#include "pool.h"
#include "products.h"
#include "rotation.h"

using Buffer = ffi::AnyBuffer;

// run(M()) with the type that multiplies: bfloat16 if `bf16` and the processor has it, else float.
template <class Run> static void by_type(bool bf16, const Run& run) {
#ifdef HAS_BF16
  if (bf16) return run(uint16_t());
#endif
  run(float());
}
static ffi::Error bad(const char* text) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, text); }

// The next argument, which is a weight, with its scales if it is grouped.
template <class Take> static Weight weight(const Take& take) {
  Buffer w = take(); const Type type = w.element_type();
  const void* scales = type == Type::S8 || type == Type::U8 ? take().untyped_data() : nullptr;
  return {(const char*)w.untyped_data(), (const uint16_t*)scales, type, (int)w.dimensions()[0], nullptr, false, nullptr};
}
// Arguments: x, norm weight or up (before = 1, 2), then each weight, with scales if grouped, then what is added to the
// first product, if there is such an argument. Results: a product for each weight.
static ffi::Error Linear(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t before, float eps) {
  size_t next = 0;
  auto take = [&] { return *args.get<Buffer>(next++); };
  Buffer x = take();
  const int B = (int)x.dimensions()[0];
  Inputs in{}; in.x = x.untyped_data(), in.bf16 = x.element_type() == Type::BF16;
  in.K = (int)x.dimensions()[1], in.before = before, in.eps = eps;
  if (before) { Buffer with = take(); in.with = with.untyped_data(), in.with_bf16 = with.element_type() == Type::BF16; }
  Weight weights[MOST_WEIGHTS]; int count = 0;
  if (rets.size() > MOST_WEIGHTS) return bad("llama_linear takes at most 4 weights");
  for (; count < (int)rets.size(); count++) {
    weights[count] = weight(take);
    Buffer out = *(*rets.get<Buffer>(count)); weights[count].out = (char*)out.untyped_data(), weights[count].out_bf16 = out.element_type() == Type::BF16;
  }
  if (next < args.size()) {
    Buffer plus = take(); weights[0].plus = (const char*)plus.untyped_data();
    Buffer out = *(*rets.get<Buffer>(0));
    if (plus.element_type() != out.element_type() || plus.element_count() != out.element_count()) return bad("llama_linear adds what has the type and the shape of its result");
  }
  in.B = B;
  if (B <= FEW) {
    few_rows(in, weights, count, (int)std::max<int64_t>(1, pool.num_threads()), [&](int n, const auto& body) { parallel(pool, n, body); });
    return ffi::Error::Success();
  }
  const bool bf16 = math_of(in, weights[0].type) == BF16;
  in.pad = rounded_up(in.K, 64);
  for (in.first = 0; in.first < B; in.first += in.B) {
    in.B = std::min(MANY, B - in.first);
    by_type(bf16, [&](auto m) { many_rows<decltype(m)>(in, weights, count, pool); });
  }
  return ffi::Error::Success();
}
static Matrix matrix(const Buffer& a) { return {a.untyped_data(), a.element_type(), (int)a.dimensions()[0], (int)a.dimensions()[1]}; }
// Arguments: a (M, K), or (K, M) if it is transposed, and b (K, N) of the same type.
static ffi::Error Product(ffi::ThreadPool pool, Buffer a, Buffer b, ffi::Result<Buffer> out, int32_t transposed) {
  by_type(a.element_type() == Type::BF16, [&](auto m) {
    product<decltype(m)>(matrix(a), transposed, matrix(b), out->element_type() == Type::BF16, (char*)out->untyped_data(), pool);
  });
  return ffi::Error::Success();
}
static Scores scores(const Buffer& x, const Buffer& table, const Buffer& targets, const Buffer& live) {
  return {matrix(x), matrix(table), (const int32_t*)targets.untyped_data(), *(const int32_t*)live.untyped_data()};
}
// Arguments: x (T, D), table (V, D) of the same type, targets (T,), number of live rows of the table (). Results: the
// largest score, the sum, and the target's score (T,), and the scores (T, V) if they are kept.
static ffi::Error Loss(ffi::ThreadPool pool, Buffer x, Buffer table, Buffer targets, Buffer live, ffi::RemainingRets results) {
  const Scores in = scores(x, table, targets, live);
  auto result = [&](size_t i) { return i < results.size() ? (float*)(*results.get<Buffer>(i))->untyped_data() : nullptr; };
  by_type(in.x.type == Type::BF16, [&](auto m) { loss<decltype(m)>(in, result(0), result(1), result(2), result(3), pool); });
  return ffi::Error::Success();
}
// Arguments: those of Loss, then the log-sum-exp of all scores, and the factors of the softmax and of the target (T,).
static ffi::Error LossGradient(ffi::ThreadPool pool, Buffer x, Buffer table, Buffer targets, Buffer live, Buffer lse, Buffer all, Buffer hit, ffi::Result<Buffer> out) {
  const Scores in = scores(x, table, targets, live);
  const float *l = (const float*)lse.untyped_data(), *a = (const float*)all.untyped_data(), *h = (const float*)hit.untyped_data();
  by_type(in.x.type == Type::BF16, [&](auto m) { loss_gradient<decltype(m)>(in, l, a, h, out->untyped_data(), pool); });
  return ffi::Error::Success();
}
// Arguments: all scores, which Loss kept, and those of LossGradient from the targets on. The result takes the place of the scores.
static ffi::Error KeptGradient(ffi::ThreadPool pool, Buffer scores, Buffer targets, Buffer live, Buffer lse, Buffer all, Buffer hit, ffi::Result<Buffer> out) {
  if (out->untyped_data() != scores.untyped_data()) memcpy(out->untyped_data(), scores.untyped_data(), scores.size_bytes());
  const int64_t V = scores.dimensions()[1]; const int count = std::min((int)V, *(const int32_t*)live.untyped_data());
  const float *l = (const float*)lse.untyped_data(), *a = (const float*)all.untyped_data(), *h = (const float*)hit.untyped_data();
  parallel(pool, (int)scores.dimensions()[0], [&](int row) {
    to_gradient((float*)out->untyped_data() + row * V, count, (int)V, ((const int32_t*)targets.untyped_data())[row], l[row], a[row], h[row]);
  });
  return ffi::Error::Success();
}

// ------------------------------------------------------------------------------------------------ attention
// Arguments: q (B, N, H), k and v (B, K, S, H), lengths (B,) int32, then the scales (B, K, S) of k and v if they are int8.
static ffi::Error Attention(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::Result<Buffer> result) {
  Buffer q = *args.get<Buffer>(0), k = *args.get<Buffer>(1), v = *args.get<Buffer>(2), lengths = *args.get<Buffer>(3);
  const int B = (int)q.dimensions()[0], N = (int)q.dimensions()[1], H = (int)q.dimensions()[2], K = (int)k.dimensions()[1], S = (int)k.dimensions()[2], G = N / K;
  if (H % 16) return bad("llama_attention takes heads of a multiple of 16");
  Keys keys{k.untyped_data(), v.untyped_data(), nullptr, nullptr};
  if (args.size() > 4) keys.k_scales = (const uint16_t*)(*args.get<Buffer>(4)).untyped_data(), keys.v_scales = (const uint16_t*)(*args.get<Buffer>(5)).untyped_data();
  const bool bf16 = q.element_type() == Type::BF16;
  parallel(pool, B * N, [&](int i) {
    const int length = std::min(std::max(((const int32_t*)lengths.untyped_data())[i / N], 0), S); const int64_t first = (int64_t)i * H;
    static thread_local Scratch scratch;
    float* query = scratch.get<float>(H);
    for (int h = 0; h < H; h++) query[h] = at(q.untyped_data(), bf16, first + h);
    attend(query, keys, k.element_type(), (int64_t)(i / G) * S, length, H, bf16, result->untyped_data(), first);
  });
  return ffi::Error::Success();
}
// Arguments: x (B, D), the cosines and sines (B, H/2) of its positions, the number of keys and the new slot of each row
// (B,) int32, then for each layer: norm, q, k, v, o, norm, gate, up and down, each weight with its scales if it is grouped,
// and the keys and values (B, K, S, H), with scales (B, K, S) if they are int8. Results: x, and all keys and values in
// the place of the arguments.
static ffi::Error Layers(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t count, float eps) {
  size_t next = 0, result = 0;
  auto take = [&] { return *args.get<Buffer>(next++); };
  auto norm = [&] { Buffer scale = take(); return Norm{scale.untyped_data(), scale.element_type() == Type::BF16}; };
  Buffer x = take(), cos = take(), sin = take(), lengths = take(), slots = take(), out = *(*rets.get<Buffer>(result++));
  Step in{}; in.bf16 = x.element_type() == Type::BF16, in.eps = eps, in.B = (int)x.dimensions()[0], in.D = (int)x.dimensions()[1];
  in.cos = (const float*)cos.untyped_data(), in.sin = (const float*)sin.untyped_data(), in.lengths = (const int32_t*)lengths.untyped_data(), in.slots = (const int32_t*)slots.untyped_data();
  auto stored = [&] {
    Buffer a = take(); in.K = (int)a.dimensions()[1], in.S = (int)a.dimensions()[2], in.H = (int)a.dimensions()[3], in.stored = a.element_type();
    if (in.stored == Type::S8) take();
    void* values = (*rets.get<Buffer>(result++))->untyped_data();
    return Stored{values, in.stored == Type::S8 ? (uint16_t*)(*rets.get<Buffer>(result++))->untyped_data() : nullptr};
  };
  std::vector<Layer> layers(count);
  for (Layer& layer : layers) {
    layer.attention_norm = norm();
    for (Weight& w : layer.qkv) w = weight(take);
    layer.o = weight(take), layer.ffn_norm = norm();
    for (Weight& w : layer.gate_up) w = weight(take);
    layer.down = weight(take), layer.k = stored(), layer.v = stored();
  }
  if (in.B > FEW || in.H % 16) return bad("llama_layers takes up to 16 rows, and heads of a multiple of 16");
  in.N = layers[0].qkv[0].N / in.H, in.F = layers[0].gate_up[0].N;
  memcpy(out.untyped_data(), x.untyped_data(), x.size_bytes());
  Team team(pool, LOOPS * count);
  if (in.bf16) decode_layers(in, layers.data(), count, (uint16_t*)out.untyped_data(), team);
  else decode_layers(in, layers.data(), count, (float*)out.untyped_data(), team);
  return ffi::Error::Success();
}
static Queries queries(const Buffer& q, const Buffer& k, const Buffer& low, const Buffer& high) {
  auto size = [](const Buffer& a, int axis) { return (int)a.dimensions()[axis]; };
  return {q.untyped_data(), q.element_type() == Type::BF16, k.element_type(), size(q, 1), size(q, 2), size(k, 1), size(k, 2), size(q, 3), (const int32_t*)low.untyped_data(), (const int32_t*)high.untyped_data()};
}
// Arguments: q (B, T, N, H), k and v (B, K, S, H), low and high (B, T) int32, then the scales (B, K, S) of k and v if they are int8.
// Results: (B, T, N, H), and the log-sum-exp (B, T, N) of the scores if it is wanted.
static ffi::Error AttentionMany(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Buffer q = *args.get<Buffer>(0), k = *args.get<Buffer>(1), v = *args.get<Buffer>(2);
  Queries in = queries(q, k, *args.get<Buffer>(3), *args.get<Buffer>(4));
  in.out = (*rets.get<Buffer>(0))->untyped_data(), in.lse = rets.size() > 1 ? (float*)(*rets.get<Buffer>(1))->untyped_data() : nullptr;
  const int B = (int)q.dimensions()[0], G = in.N / in.K;
  Keys keys{k.untyped_data(), v.untyped_data(), nullptr, nullptr};
  if (args.size() > 5) keys.k_scales = (const uint16_t*)(*args.get<Buffer>(5)).untyped_data(), keys.v_scales = (const uint16_t*)(*args.get<Buffer>(6)).untyped_data();
  const int each = std::max(1, std::min(in.T, QUERIES / G)), blocks = (in.T + each - 1) / each;
  parallel(pool, B * in.K * blocks, [&](int i) {
    const int block = blocks - 1 - i % blocks, first = block * each, last = std::min(first + each, in.T);  // the longest first
    by_type(in.bf16, [&](auto m) { attend_many<decltype(m)>(in, keys, i / blocks / in.K, i / blocks % in.K, first, last); });
  });
  return ffi::Error::Success();
}
// Arguments: q, k, v, low and high as above, out (B, T, N, H), its log-sum-exp (B, T, N) and its gradient (B, T, N, H).
// Results: the gradients of q, k and v. All but k and v have the type of q.
static ffi::Error AttentionGradient(ffi::ThreadPool pool, Buffer q, Buffer k, Buffer v, Buffer low, Buffer high, Buffer out, Buffer lse, Buffer g, ffi::Result<Buffer> dq, ffi::Result<Buffer> dk, ffi::Result<Buffer> dv) {
  const Queries in = queries(q, k, low, high);
  const Keys keys{k.untyped_data(), v.untyped_data(), nullptr, nullptr};
  const Gradient gradient{out.untyped_data(), g.untyped_data(), (const float*)lse.untyped_data(), dq->untyped_data(), dk->untyped_data(), dv->untyped_data()};
  parallel(pool, (int)q.dimensions()[0] * in.K, [&](int i) {
    by_type(in.bf16, [&](auto m) { attention_gradient<decltype(m)>(in, keys, gradient, i / in.K, i % in.K); });
  });
  return ffi::Error::Success();
}
// Arguments: x (B, T, N, H), float32 or bfloat16, and the cosines and sines (B, T, H/2) of its angles, float32.
static ffi::Error Rotate(ffi::ThreadPool pool, Buffer x, Buffer cos, Buffer sin, ffi::Result<Buffer> out) {
  const int64_t angles = x.dimensions()[0] * x.dimensions()[1] * (x.dimensions()[3] / 2);
  if (x.dimensions()[3] % 2 || (int64_t)cos.element_count() != angles || (int64_t)sin.element_count() != angles) return bad("llama_rotate takes one angle for each pair of a head");
  auto run = [&](auto type) {
    using T = decltype(type);
    rotate((const T*)x.untyped_data(), (const float*)cos.untyped_data(), (const float*)sin.untyped_data(), x.dimensions()[0] * x.dimensions()[1],
           (int)x.dimensions()[2], (int)x.dimensions()[3], (T*)out->untyped_data(), pool);
  };
  if (x.element_type() == Type::BF16) run(uint16_t()); else run(float());
  return ffi::Error::Success();
}
// The rows of a table (V, D) of bfloat16 for int32 ids. Ids outside of the table give NaN.
static ffi::Error Rows(Buffer table, Buffer ids, ffi::Result<Buffer> result) {
  const int64_t V = table.dimensions()[0], D = table.dimensions()[1], count = (int64_t)ids.element_count();
  const int32_t* id = (const int32_t*)ids.untyped_data(); const uint16_t* from = (const uint16_t*)table.untyped_data();
  uint16_t* to = (uint16_t*)result->untyped_data();
  for (int64_t i = 0; i < count; i++, to += D)
    if (id[i] >= 0 && id[i] < V) memcpy(to, from + id[i] * D, D * 2); else std::fill(to, to + D, (uint16_t)0x7fc0);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_rotate, Rotate, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_rows, Rows, ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_attention_many, AttentionMany, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_attention_gradient, AttentionGradient, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_linear, Linear, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int32_t>("before").Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_attention, Attention, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_layers, Layers, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int32_t>("layers").Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_product, Product, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Attr<int32_t>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_loss, Loss, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_loss_gradient, LossGradient, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_kept_gradient, KeptGradient, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
