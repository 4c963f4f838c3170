// Attention over the keys of a sequence: its arguments, and its run.
#pragma once
#include <vector>

#include "call.h"

namespace {

// Rows of queries (B, U, .) or (B, .): how many of them a sequence has, and how far apart rows are. The
// numbers of a row stand side by side.
template <class T>
T* query_rows(PyObject* object, int64_t B, int64_t* U, int64_t* size, int64_t* row) {
  const DLTensor t = plain(object);
  if (t.ndim < 2 || t.ndim > 3 || t.shape[0] != B) throw Declined();
  *U = t.ndim == 3 ? t.shape[1] : 1, *size = t.shape[t.ndim - 1];
  *row = t.ndim == 3 && *U > 1 ? t.strides[1] : t.strides[0];
  if (*size > 1 && t.strides[t.ndim - 1] != 1) throw Declined();
  if (t.ndim == 3 && *U > 1 && B > 1 && t.strides[0] != *U * *row) throw Declined();
  return floats<T>(t);
}

template <class T>
T* dense_rows(PyObject* object, int64_t B, int64_t U, int64_t size) {
  int64_t of, width, row;
  T* data = query_rows<T>(object, B, &of, &width, &row);
  if (of != U || width != size || (B * U > 1 && row != size)) throw Declined();
  return data;
}

template <class T>
struct Attend {
  // What both functions take: queries (B, U, A), keys (B, S, A), values (B, S, V), v (A) or None, mask
  // (B, S) of flags or None, scale, weights (B, U, S), and the context (B, U, V) or its gradient. Of one
  // query a sequence the rows may be (B, .).
  enum { QUERIES, KEYS, VALUES, SCORE, MASK, SCALE, WEIGHTS, CONTEXT, SHARED };
  enum { DWEIGHTS = SHARED, DQUERIES, DKEYS, DV, THREADS_BACKWARD, COUNT_BACKWARD };
  enum { THREADS = SHARED, COUNT };

  static AttentionCall<T> shared(PyObject* const* a) {
    AttentionCall<T> call{};
    const DLTensor keys = plain(a[KEYS]), values = plain(a[VALUES]);
    if (keys.ndim != 3 || values.ndim != 3) throw Declined();
    call.B = keys.shape[0], call.S = keys.shape[1], call.A = keys.shape[2], call.V = values.shape[2];
    call.keys = floats<T>(need_shape(keys, std::initializer_list<int64_t>{call.B, call.S, call.A}));
    call.values =
        floats<T>(need_shape(values, std::initializer_list<int64_t>{call.B, call.S, call.V}));
    int64_t width;
    int64_t row;
    query_rows<T>(a[QUERIES], call.B, &call.U, &width, &row);
    call.queries = dense_rows<T>(a[QUERIES], call.B, call.U, call.A);
    if (!is_none(a[SCORE])) call.v = sized<T>(a[SCORE], call.A);
    if (!is_none(a[MASK])) call.mask = flags(a[MASK], call.B * call.S);
    call.scale = static_cast<T>(PyFloat_AsDouble(a[SCALE]));
    call.weights = dense_rows<T>(a[WEIGHTS], call.B, call.U, call.S);
    int64_t U;
    call.context = query_rows<T>(a[CONTEXT], call.B, &U, &width, &call.context_row);
    if (U != call.U || width != call.V) throw Declined();
    return call;
  }

  static PyObject* go(AttentionCall<T>& call, PyObject* threads, bool backward) {
    // a tanh takes as long as some 30 operations of a product
    const double flops = (backward ? 2.0 : 1.0) * call.B * call.U * call.S *
                         ((call.v ? 30.0 : 2.0) * call.A + 2.0 * call.V);
    const int count = useful_threads(static_cast<int>(integer(threads)), flops);
    PyThreadState* state = PyEval_SaveThread();
    run(call, count, backward);
    PyEval_RestoreThread(state);
    Py_RETURN_TRUE;
  }

  static PyObject* forward(PyObject* const* a) {
    AttentionCall<T> call = shared(a);
    return go(call, a[THREADS], false);
  }

  static PyObject* backward(PyObject* const* a) {
    AttentionCall<T> call = shared(a);
    if (!is_none(a[DWEIGHTS])) call.dweights = dense_rows<T>(a[DWEIGHTS], call.B, call.U, call.S);
    call.dqueries = dense_rows<T>(a[DQUERIES], call.B, call.U, call.A);
    call.dkeys = floats<T>(
        need_shape(plain(a[DKEYS]), std::initializer_list<int64_t>{call.B, call.S, call.A}));
    if (call.v) call.dv = dense_rows<T>(a[DV], call.B, 1, call.A);
    std::vector<T> dscores(call.B * call.U * call.S);
    call.dscores = dscores.data();
    return go(call, a[THREADS_BACKWARD], true);
  }
};

template <PyObject* (*F32)(PyObject* const*), PyObject* (*F64)(PyObject* const*), int COUNT>
PyObject* attention(PyObject*, PyObject* const* a, Py_ssize_t count) {
  try {
    need_connection();
    if (count != COUNT) {
      PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", COUNT, count);
      throw PythonError();
    }
    return plain(a[1]).dtype.bits == 64 ? F64(a) : F32(a);
  } catch (const Declined&) {
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

constexpr char ATTEND[] =
    "(queries, keys, values, v, mask, scale, weights, context, threads) -> True | None";
constexpr char ATTEND_BACKWARD[] =
    "(queries, keys, values, v, mask, scale, weights, dcontext, dweights, dqueries, dkeys, dv,"
    " threads) -> True | None";

}  // namespace
