// The preparation and the output of RWKV-7, and the output of RWKV-5 and RWKV-6, on the CPU (fused.h): heads one after
// the other, a sum over its channels first and then all of its results.
#include "fused_cpu.h"

namespace ISA {
namespace {

template <class T>
struct Prepare {
  Field<T> wl, al, k, w0, a0, k_k, k_a, vl, v, v_first, v0;
  int64_t size;

  Prepare(const Call &call, Arrays<T> x)
      : wl(x[0]), al(x[1]), k(x[2]), w0(x[3]), a0(x[4]), k_k(x[5]), k_a(x[6]), vl(x[7]), v(x[8]), v_first(x[9]),
        v0(x[10]), size(call.size) {}

  // 1 / max(|k k_k|, eps) of a head whose first channel is number `at` of the tokens and p of the parameters.
  T scale(int64_t at, int64_t p) const {
    V<T> squares = {};
    channels<T>(size, [&](int64_t c, auto n) ALWAYS {
      const V<T> z = k.get(at + c, n) * k_k.get(p + c, n);
      squares += z * z;
    });
    const T norm = root(sum<T>(squares));
    return T(1) / (norm < T(NORMALIZE_EPS) ? T(NORMALIZE_EPS) : norm);
  }
};

template <class T>
void prepare_forward(const Call &call, Arrays<T> arrays) {
  const Prepare<T> in(call, arrays);
  const Field<T> w = arrays[11], key = arrays[12], a = arrays[13], b = arrays[14], value = arrays[15];
  const int64_t width = call.heads * call.size;
  for_blocks(call, [=](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin * call.heads; i < end * call.heads; i++) {
      const int64_t at = i * call.size, p = at % width;
      const T scale = in.scale(at, p);
      channels<T>(call.size, [&](int64_t c, auto n) ALWAYS {
        const V<T> rate = sigmoid<T>(in.a0.get(p + c, n) + in.al.get(at + c, n)), k = in.k.get(at + c, n);
        const V<T> unit = k * in.k_k.get(p + c, n) * scale;
        w.put(at + c, T(SLOWEST) * sigmoid<T>(in.w0.get(p + c, n) + in.wl.get(at + c, n)), n);
        key.put(at + c, k * (T(1) + (rate - T(1)) * in.k_a.get(p + c, n)), n);
        a.put(at + c, -unit, n);
        b.put(at + c, unit * rate, n);
        if (!value) return;
        const V<T> v = in.v.get(at + c, n), mix = sigmoid<T>(in.v0.get(p + c, n) + in.vl.get(at + c, n));
        value.put(at + c, v + mix * (in.v_first.get(at + c, n) - v), n);
      });
    }
  });
}

template <class T>
void prepare_backward(const Call &call, Arrays<T> arrays) {
  const Prepare<T> in(call, arrays);
  const Field<T> dw = arrays[11], dkey = arrays[12], da = arrays[13], db = arrays[14], dvalue = arrays[15];
  const Field<T> dwl = arrays[16], dal = arrays[17], dk = arrays[18];
  const Field<T> dvl = arrays[23], dv = arrays[24], dv_first = arrays[25];
  const int64_t width = call.heads * call.size;
  const Partials<T> partials{arrays.plain(27), 6, width};
  for_blocks(call, [=](int64_t block, int64_t begin, int64_t end) {
    partials.clear(block);
    const Field<T> dw0 = partials.row(block, 0), da0 = partials.row(block, 1), dk_k = partials.row(block, 2);
    const Field<T> dk_a = partials.row(block, 3), dv0 = partials.row(block, 4), rates = partials.row(block, 5);
    for (int64_t i = begin * call.heads; i < end * call.heads; i++) {
      const int64_t at = i * call.size, p = at % width;
      const T scale = in.scale(at, p);
      V<T> products = {};  // of z = k k_k and the gradient of z / |z|
      channels<T>(call.size, [&](int64_t c, auto n) ALWAYS {
        const V<T> rate = sigmoid<T>(in.a0.get(p + c, n) + in.al.get(at + c, n));
        const V<T> z = in.k.get(at + c, n) * in.k_k.get(p + c, n);
        products += z * (db.get(at + c, n) * rate - da.get(at + c, n));
        rates.put(p + c, rate, n);
      });
      const T radial = scale < T(1 / NORMALIZE_EPS) ? sum<T>(products) * scale * scale : T(0);
      channels<T>(call.size, [&](int64_t c, auto n) ALWAYS {
        const V<T> rate = rates.get(p + c, n), k = in.k.get(at + c, n), k_k = in.k_k.get(p + c, n);
        const V<T> k_a = in.k_a.get(p + c, n), own = dkey.get(at + c, n), change = db.get(at + c, n);
        const V<T> dz = (change * rate - da.get(at + c, n) - k * k_k * radial) * scale;
        const V<T> drate = (change * k * k_k * scale + own * k * k_a) * rate * (T(1) - rate);
        dal.put(at + c, drate, n), da0.add(p + c, drate, n);
        dk.put(at + c, own * (T(1) + (rate - T(1)) * k_a) + dz * k_k, n);
        dk_k.add(p + c, dz * k, n), dk_a.add(p + c, own * k * (rate - T(1)), n);
        const V<T> speed = sigmoid<T>(in.w0.get(p + c, n) + in.wl.get(at + c, n));
        const V<T> dspeed = T(SLOWEST) * dw.get(at + c, n) * speed * (T(1) - speed);
        dwl.put(at + c, dspeed, n), dw0.add(p + c, dspeed, n);
        if (!dvalue) return;
        const V<T> mix = sigmoid<T>(in.v0.get(p + c, n) + in.vl.get(at + c, n)), dout = dvalue.get(at + c, n);
        const V<T> dmix = dout * (in.v_first.get(at + c, n) - in.v.get(at + c, n)) * mix * (T(1) - mix);
        dvl.put(at + c, dmix, n), dv0.add(p + c, dmix, n);
        dv.put(at + c, dout * (T(1) - mix), n), dv_first.put(at + c, dout * mix, n);
      });
    }
  });
  const int to[] = {19, 20, 21, 22, 26};  // dw0 da0 dk_k dk_a dv0
  for (int i = 0; i < (dvalue ? 5 : 4); i++) partials.total(call, i, arrays[to[i]]);
}

// What a head of one token is normalised with, and its bonus; `at` and `p` are the numbers of its first channel among
// those of the tokens and of the parameters.
template <class T>
struct Head {
  int64_t at, p;
  T mean, scale, bonus;
};

// rwkv7_output, or without a bonus rwkv6_output.
template <class T, bool Bonus>
struct Output {
  static constexpr int inputs = Bonus ? 8 : 4;
  Field<T> y, g, weight, bias, r, k, v, r_k;

  explicit Output(Arrays<T> x)
      : y(x[0]), g(x[1]), weight(x[2]), bias(x[3]), r(x[Bonus ? 4 : 0]), k(x[Bonus ? 5 : 0]), v(x[Bonus ? 6 : 0]),
        r_k(x[Bonus ? 7 : 0]) {}

  // Number i of the heads of all tokens.
  Head<T> head(const Call &call, int64_t i) const {
    const int64_t size = call.size, at = i * size, p = i % call.heads * size;
    V<T> total = {}, squares = {}, products = {};
    channels<T>(size, [&](int64_t c, auto n) ALWAYS {
      total += y.get(at + c, n);
      if constexpr (Bonus) products += r.get(at + c, n) * k.get(at + c, n) * r_k.get(p + c, n);
    });
    const T mean = sum<T>(total) / T(size);
    channels<T>(size, [&](int64_t c, auto n) ALWAYS {
      const V<T> from_mean = only<T>(y.get(at + c, n) - mean, n);
      squares += from_mean * from_mean;
    });
    return {at, p, mean, T(1) / root(sum<T>(squares) / T(size) + T(GROUP_NORM_EPS)), sum<T>(products)};
  }
};

template <bool Bonus, class T>
void output_forward(const Call &call, Arrays<T> arrays) {
  const Output<T, Bonus> in(arrays);
  const Field<T> out = arrays[in.inputs];
  for_blocks(call, [=](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin * call.heads; i < end * call.heads; i++) {
      const Head<T> head = in.head(call, i);
      channels<T>(call.size, [&](int64_t c, auto n) ALWAYS {
        const int64_t at = head.at + c, p = head.p + c;
        V<T> x = (in.y.get(at, n) - head.mean) * head.scale * in.weight.get(p, n) + in.bias.get(p, n);
        V<T> gate = in.g.get(at, n);
        if constexpr (Bonus) x += head.bonus * in.v.get(at, n);
        else gate *= sigmoid<T>(gate);
        out.put(at, x * gate, n);
      });
    }
  });
}

template <bool Bonus, class T>
void output_backward(const Call &call, Arrays<T> arrays) {
  const Output<T, Bonus> in(arrays), grad(arrays + (Output<T, Bonus>::inputs + 1));
  const Field<T> dout = arrays[in.inputs];
  const int64_t rows = Bonus ? 3 : 2;
  const Partials<T> partials{arrays.plain(2 * in.inputs + 1), rows, call.heads * call.size};
  for_blocks(call, [=](int64_t block, int64_t begin, int64_t end) {
    partials.clear(block);
    const Field<T> dweight = partials.row(block, 0), dbias = partials.row(block, 1);
    const Field<T> dr_k = partials.row(block, rows - 1);
    for (int64_t i = begin * call.heads; i < end * call.heads; i++) {
      const Head<T> head = in.head(call, i);
      V<T> total = {}, along = {}, products = {};  // of the gradient of norm(y): its sum, times norm(y), times v
      channels<T>(call.size, [&](int64_t c, auto n) ALWAYS {
        const int64_t at = head.at + c, p = head.p + c;
        const V<T> norm = (in.y.get(at, n) - head.mean) * head.scale, weight = in.weight.get(p, n);
        const V<T> g = in.g.get(at, n), dy = dout.get(at, n);
        V<T> x = norm * weight + in.bias.get(p, n), dx = dy * g, dg = dy;
        if constexpr (Bonus) {
          const V<T> v = in.v.get(at, n);
          x += head.bonus * v, products += dx * v;
          grad.v.put(at, head.bonus * dx, n);
        } else {
          const V<T> s = sigmoid<T>(g);
          dx *= s, dg *= s * (T(1) + g * (T(1) - s));
        }
        grad.g.put(at, dg * x, n);
        dweight.add(p, dx * norm, n), dbias.add(p, dx, n);
        total += dx * weight, along += dx * weight * norm;
      });
      const T mean = sum<T>(total) / T(call.size), radial = sum<T>(along) / T(call.size), dbonus = sum<T>(products);
      channels<T>(call.size, [&](int64_t c, auto n) ALWAYS {
        const int64_t at = head.at + c, p = head.p + c;
        const V<T> norm = (in.y.get(at, n) - head.mean) * head.scale, g = in.g.get(at, n);
        V<T> dx = dout.get(at, n) * g;
        if constexpr (Bonus) {
          const V<T> r = in.r.get(at, n), k = in.k.get(at, n), r_k = in.r_k.get(p, n);
          grad.r.put(at, dbonus * k * r_k, n), grad.k.put(at, dbonus * r * r_k, n);
          dr_k.add(p, dbonus * r * k, n);
        } else {
          dx *= sigmoid<T>(g);
        }
        grad.y.put(at, head.scale * (dx * in.weight.get(p, n) - mean - norm * radial), n);
      });
    }
  });
  partials.total(call, 0, grad.weight);
  partials.total(call, 1, grad.bias);
  if (Bonus) partials.total(call, 2, grad.r_k);
}

}  // namespace

DEFINE(rwkv7_prepare, prepare_forward, 16, prepare_backward, 28, 6)
DEFINE(rwkv7_output, output_forward<true>, 9, output_backward<true>, 18, 3)
DEFINE(rwkv6_output, output_forward<false>, 5, output_backward<false>, 10, 2)

}  // namespace ISA
