// Conditional random fields: a call read from Python's arguments, and the three entries.
//
// What a user can do wrong inside a tensor of numbers, lengths and tags, is found here, where they are
// read anyway, before anything is computed. All else that the kernels do not read is declined.
#pragma once
#include <algorithm>
#include <numeric>

#include "call.h"

namespace {

template <class T>
struct ChainArguments {
  enum { EMISSIONS, LENGTHS, START, END, TRANSITIONS, COMMON };
  ChainCall<T> call{};

  explicit ChainArguments(PyObject* const* a) {
    const DLTensor e = view(a[EMISSIONS]);
    if (e.ndim != 3) throw Declined();
    call.steps = e.shape[0], call.batch = e.shape[1], call.K = e.shape[2];
    call.emissions = floats<T>(e), call.e_step = e.strides[0], call.e_row = e.strides[1];
    if (call.K < 1 || (call.K > 1 && e.strides[2] != 1)) throw Declined();
    call.start = sized<T>(a[START], call.K), call.end = sized<T>(a[END], call.K);
    call.transitions = sized<T>(a[TRANSITIONS], call.K * call.K);
    order_.resize(call.batch);
    std::iota(order_.begin(), order_.end(), 0);
    call.order = order_.data();
    if (!is_none(a[LENGTHS])) read_lengths(a[LENGTHS]);
  }

  void read_tags(PyObject* object) {
    if (is_none(object)) return;
    const DLTensor tags = view(object);
    if (tags.ndim != 2 || tags.dtype.code != 0 || tags.dtype.bits != 64 || tags.device.type != 1 ||
        tags.shape[0] != call.steps || tags.shape[1] != call.batch)
      throw Declined();
    call.tags = static_cast<const int64_t*>(tags.data);
    call.tags_step = tags.strides[0], call.tags_row = tags.strides[1];
    for (int64_t b = 0; b < call.batch; ++b)
      for (int64_t t = 0, n = call.length(b); t < n; ++t)
        if (static_cast<uint64_t>(call.tag(t, b)) >= static_cast<uint64_t>(call.K)) {
          PyErr_Format(PyExc_IndexError,
                       "tags: expected 0 to %lld, got %lld at step %lld of sequence %lld",
                       (long long)(call.K - 1), (long long)call.tag(t, b), (long long)t, (long long)b);
          throw PythonError();
        }
  }

  // each: about what a tag of a step costs beside its K products.
  void run_released(PyObject* threads, double each) {
    const double K = static_cast<double>(call.K);
    const double flops = static_cast<double>(call.steps * call.batch) * K * (2 * K + each);
    if (call.batch && !::run_released(call, useful_threads(static_cast<int>(integer(threads)), flops)))
      throw std::bad_alloc();
  }

 private:
  void read_lengths(PyObject* object) {
    call.lengths = whole_numbers(object, call.batch);
    bool even = true;
    for (int64_t b = 0; b < call.batch; ++b) {
      const int64_t n = call.lengths[b];
      if (n < 0 || n > call.steps) {
        PyErr_Format(PyExc_ValueError, "lengths: expected 0 to T = %lld, got %lld of sequence %lld",
                     (long long)call.steps, (long long)n, (long long)b);
        throw PythonError();
      }
      even = even && n == call.lengths[0];
    }
    if (even) return;
    std::stable_sort(order_.begin(), order_.end(), [this](int64_t one, int64_t other) {
      return call.lengths[one] > call.lengths[other];
    });
  }

  std::vector<int64_t> order_;
};

constexpr double FORWARD_EACH = 80, BACKWARD_EACH = 120, VITERBI_EACH = 40;

// (..., tags, save, threads) -> (value, u)
template <class T>
PyObject* crf(PyObject* const* a) {
  using A = ChainArguments<T>;
  enum { TAGS = A::COMMON, SAVE, THREADS };
  A given(a);
  given.read_tags(a[TAGS]);
  ChainCall<T>& call = given.call;
  call.what = Chains::FORWARD;
  New<T> value({call.batch}), u;
  if (truth(a[SAVE])) u = New<T>({call.steps, call.batch, call.K});
  call.value = value.data(), call.u = u.data();
  given.run_released(a[THREADS], FORWARD_EACH);
  return tuple_of({value.give(), u.give()});
}

// (..., tags, u, dvalue, wants_parameters, threads) -> [demissions, and dstart, dend, dtransitions]
template <class T>
PyObject* crf_backward(PyObject* const* a) {
  using A = ChainArguments<T>;
  enum { TAGS = A::COMMON, U, DVALUE, WANTS_PARAMETERS, THREADS };
  A given(a);
  given.read_tags(a[TAGS]);
  ChainCall<T>& call = given.call;
  call.what = Chains::BACKWARD;
  const int64_t K = call.K;
  call.u = sized<T>(a[U], call.steps * call.batch * K);
  const DLTensor dvalue = view(a[DVALUE]);  // often one number, expanded
  if (is_none(a[U]) || dvalue.ndim != 1 || dvalue.shape[0] != call.batch) throw Declined();
  call.dvalue = floats<T>(dvalue), call.dvalue_row = dvalue.strides[0];
  New<T> demissions({call.steps, call.batch, K}), dstart, dend, dtransitions;
  call.demissions = demissions.data();
  if (truth(a[WANTS_PARAMETERS])) {
    dstart = New<T>({K}), dend = New<T>({K}), dtransitions = New<T>({K, K});
    call.dstart = dstart.data(), call.dend = dend.data(), call.dtransitions = dtransitions.data();
    if (!call.batch) {
      std::fill_n(call.dstart, K, T(0)), std::fill_n(call.dend, K, T(0));
      std::fill_n(call.dtransitions, K * K, T(0));
    }
  }
  given.run_released(a[THREADS], BACKWARD_EACH);
  List list;
  list.add(demissions.give());
  if (dtransitions) list.add(dstart.give()), list.add(dend.give()), list.add(dtransitions.give());
  return list.give();
}

// (..., n, threads) -> (scores, tags)
template <class T>
PyObject* crf_viterbi(PyObject* const* a) {
  using A = ChainArguments<T>;
  enum { N = A::COMMON, THREADS };
  A given(a);
  ChainCall<T>& call = given.call;
  call.what = Chains::VITERBI;
  call.n = integer(a[N]);
  if (call.n < 1) throw Declined();
  New<T> scores({call.batch, call.n});
  New<int64_t> paths({call.batch, call.n, call.steps});
  call.scores = scores.data(), call.paths = paths.data();
  given.run_released(a[THREADS], VITERBI_EACH * static_cast<double>(call.n * call.n));
  return tuple_of({scores.give(), paths.give()});
}

// Calls F32 or F64 by the type of emissions; None where the call is declined.
template <PyObject* (*F32)(PyObject* const*), PyObject* (*F64)(PyObject* const*), int COUNT>
PyObject* dispatch_chains(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != COUNT) {
    PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", COUNT, count);
    return nullptr;
  }
  try {
    need_connection();
    if (!PyObject_IsInstance(a[0], tensor_type)) throw Declined();
    const DLTensor emissions = view(a[0]);
    if (emissions.dtype.code == 2 && emissions.dtype.bits == 32) return F32(a);
    if (emissions.dtype.code == 2 && emissions.dtype.bits == 64) return F64(a);
    throw Declined();
  } catch (const Declined&) {
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

}  // namespace
