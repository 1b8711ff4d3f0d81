// The token shift with its mixes, and the squared ReLU, on the CPU (fused.h).
#include "fused_cpu.h"

namespace ISA {
namespace {

// The last sequence that begins at or before a token: the one that holds it.
int64_t sequence_of(const Call &call, int64_t t) {
  int64_t low = 0, high = call.sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (call.borders[middle] <= t ? low : high) = middle;
  }
  return low;
}

template <class T>
void copy_states_of_empty(const Call &call, const T *from, T *to) {
  for (int64_t s = 0; s < call.sequences; s++)
    if (call.borders[s] == call.borders[s + 1])
      __builtin_memcpy(to + s * call.size, from + s * call.size, sizeof(T) * call.size);
}

// What both functions of shift_mix have; backward has the gradients of y and last.
template <class T, int Mixes>
struct Shift {
  Field<T> x, carried, moved, mix[Mixes], y[Mixes], last;
  int64_t width, area;

  template <int... i>
  Shift(const Call &call, Arrays<T> in, std::integer_sequence<int, i...>)
      : x(in[0]), carried(in[1]), moved(in[2]), mix{in[3 + i]...}, y{in[3 + Mixes + i]...}, last(in[3 + 2 * Mixes]),
        width(call.size), area(call.tokens * call.size) {}
  Shift(const Call &call, Arrays<T> in) : Shift(call, in, std::make_integer_sequence<int, Mixes>()) {}

  Field<T> before(const Call &call, int64_t s, int64_t t) const {
    return t == call.borders[s] ? carried + s * width : x + (t - 1) * width;
  }
  template <class Lanes>
  ALWAYS V<T> factor(int i, int64_t t, int64_t c, Lanes n) const {
    const V<T> m = mix[i].get(c, n);
    return moved ? m + moved.get(i * area + t * width + c, n) : m;
  }
};

template <int Mixes, class T>
void shift_forward(const Call &call, Arrays<T> arrays) {
  const Shift<T, Mixes> in(call, arrays);
  for_blocks(call, [=](int64_t, int64_t begin, int64_t end) {
    for (int64_t t = begin, s = sequence_of(call, begin); t < end; t++) {
      while (call.borders[s + 1] <= t) s++;
      const Field<T> now = in.x + t * in.width, before = in.before(call, s, t);
      channels<T>(in.width, [&](int64_t c, auto n) ALWAYS {
        const V<T> own = now.get(c, n), change = before.get(c, n) - own;
        UNROLL for (int i = 0; i < Mixes; i++)
          in.y[i].put(t * in.width + c, own + change * in.factor(i, t, c, n), n);
      });
      if (t + 1 == call.borders[s + 1])
        channels<T>(in.width, [&](int64_t c, auto n) ALWAYS { in.last.put(s * in.width + c, now.get(c, n), n); });
    }
  });
  copy_states_of_empty(call, arrays.plain(1), arrays.plain(3 + 2 * Mixes));
}

// Of the y_i of a token, back = sum dy_i (mix_i + moved_i) goes to the token before, and sum dy_i - back to itself: that
// waits in a row of its own for what comes back from the next token.
template <int Mixes, class T>
void shift_backward(const Call &call, Arrays<T> arrays) {
  const Shift<T, Mixes> in(call, arrays);
  const Arrays<T> out = arrays + (4 + 2 * Mixes);
  const Field<T> dx = out[0], dcarried = out[1], dmoved = out[2];
  const Partials<T> partials{out.plain(3 + Mixes), Mixes + 1, in.width};
  for_blocks(call, [=](int64_t block, int64_t begin, int64_t end) {
    partials.clear(block);
    const Field<T> dmix = partials.row(block, 0), waiting = partials.row(block, Mixes);
    int64_t s = sequence_of(call, begin);
    for (int64_t t = begin; t < end; t++) {
      while (call.borders[s + 1] <= t) s++;
      const bool first = t == call.borders[s], last = t + 1 == call.borders[s + 1];
      const Field<T> now = in.x + t * in.width, before = in.before(call, s, t);
      const Field<T> to = first ? dcarried + s * in.width : dx + (t - 1) * in.width;
      channels<T>(in.width, [&](int64_t c, auto n) ALWAYS {
        const V<T> change = before.get(c, n) - now.get(c, n);
        V<T> total = {}, back = {};
        UNROLL for (int i = 0; i < Mixes; i++) {
          const V<T> dy = in.y[i].get(t * in.width + c, n), dm = dy * change;
          total += dy;
          back += dy * in.factor(i, t, c, n);
          dmix.add(i * in.width + c, dm, n);
          if (dmoved) dmoved.put(i * in.area + t * in.width + c, dm, n);
        }
        if (first) to.put(c, back, n);
        else if (t > begin) to.put(c, waiting.get(c, n) + back, n);
        if (last) dx.put(t * in.width + c, total - back + in.last.get(s * in.width + c, n), n);
        waiting.put(c, total - back, n);
      });
    }
    if (end < call.borders[s + 1]) {
      channels<T>(in.width, [&](int64_t c, auto n) ALWAYS {
        V<T> back = {};
        UNROLL for (int i = 0; i < Mixes; i++)
          back += in.y[i].get(end * in.width + c, n) * in.factor(i, end, c, n);
        dx.put((end - 1) * in.width + c, waiting.get(c, n) + back, n);
      });
    }
  });
  copy_states_of_empty(call, arrays.plain(3 + 2 * Mixes), out.plain(1));
  for (int i = 0; i < Mixes; i++) partials.total(call, i, out[3 + i]);
}

template <class T>
void relu_forward(const Call &call, Arrays<T> arrays) {
  const Field<T> x = arrays[0], y = arrays[1];
  const int64_t width = call.heads * call.size;
  for_blocks(call, [=](int64_t, int64_t begin, int64_t end) {
    channels<T>((end - begin) * width, [&](int64_t c, auto n) ALWAYS {
      const V<T> own = x.get(begin * width + c, n), positive = own < 0 ? V<T>{} : own;
      y.put(begin * width + c, positive * positive, n);
    });
  });
}

template <class T>
void relu_backward(const Call &call, Arrays<T> arrays) {
  const Field<T> y = arrays[0], dy = arrays[1], dx = arrays[2];
  const int64_t width = call.heads * call.size;
  for_blocks(call, [=](int64_t, int64_t begin, int64_t end) {
    channels<T>((end - begin) * width, [&](int64_t c, auto n) ALWAYS {
      const int64_t at = begin * width + c;
      dx.put(at, T(2) * roots<T>(y.get(at, n)) * dy.get(at, n), n);
    });
  });
}

template <int n>
struct Constant {
  static constexpr int value = n;
};

// f of the number of mixes as a constant, or -1.
template <int Most = 6, class F>
int with_mixes(int64_t mixes, const F &f) {
  if constexpr (Most > 0) return mixes == Most ? f(Constant<Most>()) : with_mixes<Most - 1>(mixes, f);
  return -1;
}

}  // namespace

int shift_mix_forward(const Call &call, void *const *arrays) {
  return with_mixes(call.heads, [&](auto mixes) {
    return with_arrays(call, arrays, 4 + 2 * mixes.value, [&](auto x) { shift_forward<mixes.value>(call, x); });
  });
}

int shift_mix_backward(const Call &call, void *const *arrays) {
  return with_mixes(call.heads, [&](auto mixes) {
    return with_arrays(call, arrays, 8 + 3 * mixes.value, [&](auto x) { shift_backward<mixes.value>(call, x); });
  });
}

int64_t shift_mix_workspace(const Call &call) { return workspace(call, call.heads + 1, call.size); }

DEFINE(relu_squared, relu_forward, 2, relu_backward, 4, 0)

}  // namespace ISA
