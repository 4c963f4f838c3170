// The two entries: layers by recurrences forward, and backward.
#pragma once
#include "call.h"

namespace {

// Packing a weight costs about as much as its use for 8 rows, a few at each step (H = 128 and 512, B = 1
// and 4). A single step has all of its rows together, and weights beyond the cache cost more to pack:
// LSTM I768 H512 on one thread of Zen 4, B = 16, 32, 64 and 128, takes 1.3, 2.2, 4.4 and 8.4 ms, packed
// 2.4, 3.4, 5.0 and 8.1; I192 H128, of 0.7 MB, is faster packed from 18 rows on. Weights of bfloat16
// are multiplied packed alone.
template <class T>
bool worth_packing(const Input<T>& in, int gates, bool bf16) {
  const bool large = sizeof(T) * gates * in.H * (in.I + in.P) > 2e6;
  return in.rows > (in.steps == 1 && large && !bf16 ? 64 : 8);
}

// (..., save, trajectory, known) -> (y, states, saved): what of each layer `each_kept` names, its other
// states at every step, and, but for the last layer, its y.
//
// states: the final ones; with `trajectory` the last layer's other states at every step behind them.
// known: y as it was, of one layer: what is saved is made again, and nothing else is given.
template <class T>
PyObject* forward(PyObject* const* a) {
  Call<T> s(a);
  const bool save = truth(a[COMMON]), trajectory = truth(a[COMMON + 1]);
  const int R = s.R, C = s.form.C;
  const int64_t B = s.in.batch, H = s.in.H, P = s.in.P;
  const bool again = !is_none(a[COMMON + 2]);
  if (s.L > 1 && again) throw Declined();
  const T* known = sized<T>(a[COMMON + 2], s.capacity * R * P);
  New<T> h_n(s.of_states(P)), c_n[MOST_EACH], c_all[MOST_EACH], y;
  for (int k = 0; k < C; ++k) c_n[k] = New<T>(s.of_states(H));
  List saved;
  for (int layer = 0; layer < s.L; ++layer) {
    const New<T> x = s.input_of(layer, y.data());
    s.enter(layer, x ? x.data() : y.data());
    New<T> out;
    std::vector<New<T>> buffers;
    if (!known) {
      out = New<T>(s.with(R * P));
      s.zero_padding(out.data(), R * P);
    }
    for (int d = 0; d < R; ++d) {
      Recurrence<T>& r = s.recurrence[d];
      r.h_n = h_n.data() + (layer * R + d) * B * P;
      for (int k = 0; k < C; ++k) r.c_n[k] = c_n[k].data() + (layer * R + d) * B * H;
      if (!save) continue;
      s.each_kept(r, [&](T*& pointer, int64_t width) {
        buffers.emplace_back(std::vector<int64_t>{s.capacity, width});
        pointer = buffers.back().data();
      });
    }
    ForwardCall<T> call{};
    const bool wanted = trajectory && layer + 1 == s.L;
    for (int k = 0; (save || wanted) && k < C; ++k) {
      c_all[k] = New<T>(s.with(R * H));
      s.zero_padding(call.c_all[k] = c_all[k].data(), R * H);
    }
    call.cell = s.cell, call.R = R, call.input = s.in, call.recurrence = s.recurrence.data();
    call.y = out.data(), call.known = known;
    call.pack = s.deterministic || known || worth_packing(s.in, s.form.G, s.bf16);
    call.bf16 = s.bf16, call.halves = s.halves;
    if (call.halves && !call.pack) throw Declined();
    if (!run_released(call, s.threads())) return PyErr_NoMemory();
    for (New<T>& buffer : buffers) saved.add(buffer.give());
    for (int k = 0; save && k < C; ++k) saved.add(wanted ? c_all[k].share() : c_all[k].give());
    if (save && layer) saved.add(y.give());
    y = std::move(out);
  }
  if (again) return tuple_of({nullptr, nullptr, saved.give()});
  PyObject* states = PyTuple_New(1 + C + trajectory * C);
  if (!states) throw PythonError();
  PyTuple_SetItem(states, 0, h_n.give());
  for (int k = 0; k < C; ++k) PyTuple_SetItem(states, 1 + k, c_n[k].give());
  for (int k = 0; trajectory && k < C; ++k) PyTuple_SetItem(states, 1 + C + k, c_all[k].give());
  return tuple_of({y.give(), states, saved.give()});
}

// (..., y, saved, dy, dstates, dtrajectory, wants x, wants weights, wants states)
// -> [dx or None, *dstates, *gradients of the weights that are there]
//
// saved: what forward gave.
// dtrajectory: (), or of the last layer a gradient or None for each other state.
template <class T>
PyObject* backward(PyObject* const* a) {
  enum { Y, SAVED, DY, DSTATES, DTRAJECTORY, WANTS_X, WANTS_WEIGHTS, WANTS_STATES };
  Call<T> s(a);
  PyObject* const* b = a + COMMON;
  const bool wants_x = truth(b[WANTS_X]), wants_weights = truth(b[WANTS_WEIGHTS]);
  const bool wants_states = truth(b[WANTS_STATES]);
  const int R = s.R, C = s.form.C;
  const int64_t B = s.in.batch, H = s.in.H, P = s.in.P, N = s.in.rows;
  const Py_ssize_t trajectory = PyTuple_Size(b[DTRAJECTORY]);
  if (trajectory && trajectory != C) throw Declined();

  struct Kept {  // of a layer
    std::vector<Recurrence<T>> of;
    const T *c_all[MOST_EACH], *y;
  };
  std::vector<Kept> kept(s.L);
  Py_ssize_t at = 0;
  auto next = [&](int64_t width) { return sized<T>(item(b[SAVED], at++), s.capacity * width); };
  for (int layer = 0; layer < s.L; ++layer) {
    Kept& one = kept[layer];
    one.of.resize(R);
    for (Recurrence<T>& r : one.of)
      s.each_kept(r, [&](T*& pointer, int64_t width) { pointer = next(width); });
    for (int k = 0; k < C; ++k) one.c_all[k] = next(R * H);
    if (layer) kept[layer - 1].y = next(R * P);
  }
  kept[s.L - 1].y = sized<T>(b[Y], s.capacity * R * P);

  New<T> dstate[1 + MOST_EACH];
  for (int k = 0; k < 1 + C; ++k) {
    const int64_t count = s.L * R * B * (k ? H : P);
    dstate[k] = New<T>(s.of_states(k ? H : P));
    const T* given = sized<T>(item(b[DSTATES], k), count);
    if (given)
      std::memcpy(dstate[k].data(), given, sizeof(T) * count);
    else
      std::memset(dstate[k].data(), 0, sizeof(T) * count);
  }
  std::vector<New<T>> out(wants_weights ? s.L * R * s.slots.each : 0);
  const T* dy = sized<T>(b[DY], s.capacity * R * P);
  New<T> dx;
  for (int layer = s.L - 1; layer >= 0; --layer) {
    const Kept& one = kept[layer];
    const T* below = layer ? kept[layer - 1].y : nullptr;
    const New<T> x = s.input_of(layer, below);  // made again, not kept
    s.enter(layer, x ? x.data() : below);
    BackwardCall<T> call{};
    std::vector<RecurrenceGradients<T>> gradients(R);
    for (int d = 0; d < R; ++d) {
      Recurrence<T>& r = s.recurrence[d];
      const Recurrence<T>& from = one.of[d];
      r.gates = from.gates, r.m = from.m;
      for (int k = 0; k < C; ++k) r.made[k] = from.made[k];
      for (int k = 0; k < s.form.E; ++k) r.extra[k] = from.extra[k];
      RecurrenceGradients<T>& to = gradients[d];
      const int64_t rows = (layer * R + d) * B;
      to.dh = dstate[0].data() + rows * P;
      for (int k = 0; k < C; ++k) to.dc[k] = dstate[1 + k].data() + rows * H;
      if (!wants_weights) continue;
      New<T>* made = &out[(layer * R + d) * s.slots.each];
      s.each_weight(to.out, [&](int slot, const T*& pointer, std::initializer_list<int64_t> shape) {
        if (is_none(s.weight(layer, d, slot))) return;
        made[slot] = New<T>(shape);
        pointer = made[slot].data();
      });
    }
    New<T> above = std::move(dx);  // dy, until the call is done
    if (layer || wants_x) {
      dx = New<T>(s.with(s.in.I));
      s.zero_padding(dx.data(), s.in.I);
      if (R > 1) std::memset(dx.data(), 0, sizeof(T) * N * s.in.I);  // all recurrences add
    }
    call.cell = s.cell, call.R = R, call.input = s.in, call.recurrence = s.recurrence.data();
    call.gradients = gradients.data();
    call.y = one.y, call.dy = dy, call.dx = dx.data();
    for (int k = 0; k < C; ++k) {
      call.c_all[k] = one.c_all[k];
      if (trajectory && layer + 1 == s.L)
        call.dc_all[k] = sized<T>(item(b[DTRAJECTORY], k), s.capacity * R * H);
    }
    call.weights = wants_weights, call.states = wants_states;
    call.bf16 = s.bf16, call.halves = s.halves;
    if (!run_released(call, s.threads())) return PyErr_NoMemory();
    if (dx) s.input_gradient(layer, dx.data());
    dy = dx.data();
  }
  List list;
  if (wants_x)
    list.add(dx.give());
  else
    list.add_none();
  for (int k = 0; k < 1 + C; ++k) list.add(dstate[k].give());
  for (New<T>& tensor : out)
    if (tensor) list.add(tensor.give());
  return list.give();
}

}  // namespace
