// torch's tensors, read and made through DLPack's C exchange interface, and the few Python objects
// beside them. Reading a tensor takes 50 ns, making one 0.7 us.
//
// A view is borrowed: it lives as long as the object that a caller of the module holds. A `New` and a
// `List` own what they made until it is given away.
#pragma once
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../dlpack.h"

namespace {

const DLExchangeApi* api = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr;
PyObject* is_neg = nullptr;  // the method of Tensor

// An error that Python knows of already.
struct PythonError {};
// The call is not laid out as the kernels read it.
struct Declined {};

void set_error(void*, const char*, const char* message) {
  PyErr_SetString(PyExc_RuntimeError, message);
}

bool is_none(PyObject* object) { return object == Py_None; }

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

bool truth(PyObject* object) { return PyObject_IsTrue(object) == 1; }

PyObject* item(PyObject* tuple, Py_ssize_t k) {  // borrowed
  PyObject* object = PyTuple_GetItem(tuple, k);
  if (!object) throw PythonError();
  return object;
}

void need_connection() {
  if (api) return;
  PyErr_SetString(PyExc_RuntimeError, "fastseq._cpu: connect() must be called first");
  throw PythonError();
}

// Reading

DLTensor view(PyObject* object) {
  DLTensor tensor;
  if (api->view(object, &tensor)) throw PythonError();
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return tensor;
}

// Whether what lies in memory is the negative of a tensor's numbers; 0.15 us.
bool negated(PyObject* object) {
  PyObject* answer = PyObject_CallFunctionObjArgs(is_neg, object, nullptr);
  if (!answer) throw PythonError();
  const bool yes = answer == Py_True;
  Py_DECREF(answer);
  return yes;
}

// The same of a tensor of this very type: a subclass may mean something else by its data.
DLTensor plain(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_type && type != parameter_type) throw Declined();
  try {
    return view(object);
  } catch (const PythonError&) {  // it has no memory of its own, on meta or inside a transform
    PyErr_Clear();
    throw Declined();
  }
}

bool contiguous(const DLTensor& t) {
  int64_t expected = 1;
  for (int k = t.ndim - 1; k >= 0; --k) {
    if (t.shape[k] != 1 && t.strides[k] != expected) {
      for (int j = 0; j < t.ndim; ++j)
        if (t.shape[j] == 0) return true;
      return false;
    }
    expected *= t.shape[k];
  }
  return true;
}

int64_t numbers(const DLTensor& t) {
  int64_t size = 1;
  for (int k = 0; k < t.ndim; ++k) size *= t.shape[k];
  return size;
}

// Declines all but contiguous tensors of this shape, which is a range of sizes.
template <class Sizes>
const DLTensor& need_shape(const DLTensor& t, const Sizes& shape) {
  if (t.ndim != static_cast<int>(shape.size()) || !contiguous(t)) throw Declined();
  int k = 0;
  for (int64_t size : shape)
    if (t.shape[k++] != size) throw Declined();
  return t;
}

// The numbers of a tensor on the CPU that are of type T.
template <class T>
T* floats(const DLTensor& t) {
  if (t.device.type != 1 || t.dtype.code != 2 || t.dtype.bits != 8 * sizeof(T)) throw Declined();
  return static_cast<T*>(t.data);
}

template <class T>
T* dense(PyObject* object) {
  if (is_none(object)) return nullptr;
  const DLTensor t = view(object);
  if (!contiguous(t)) throw Declined();
  return floats<T>(t);
}

// The same of so many numbers: hooks on saved tensors may give back anything.
template <class T>
T* sized(PyObject* object, int64_t count) {
  if (!is_none(object) && numbers(view(object)) != count) throw Declined();
  return dense<T>(object);
}

// int64 on the CPU: one number, or so many side by side.
const int64_t* whole_numbers(PyObject* object, int64_t count) {
  const DLTensor t = plain(object);
  if (t.device.type != 1 || t.dtype.code != 0 || t.dtype.bits != 64 || !contiguous(t) ||
      numbers(t) != count || negated(object))
    throw Declined();
  return static_cast<const int64_t*>(t.data);
}

// So many flags, a byte each.
const uint8_t* flags(PyObject* object, int64_t count) {
  const DLTensor t = view(object);
  if (t.dtype.bits != 8 || !contiguous(t) || numbers(t) != count) throw Declined();
  return static_cast<const uint8_t*>(t.data);
}

// Making

// Asks for large pages where new memory is large: its first touch costs 0.4 ms a MB in pages of 4 KB,
// 0.05 in pages of 2 MB.
void on_large_pages(void* data, int64_t size) {
#if defined(__linux__)
  constexpr int64_t LARGE = int64_t(2) << 20;
  if (size < 2 * LARGE) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + LARGE - 1) / LARGE * LARGE;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + size) / LARGE * LARGE;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)size;
#endif
}

template <class T>
constexpr uint8_t CODE = 2;  // floating point
template <>
constexpr uint8_t CODE<bool> = 6;
template <>
constexpr uint8_t CODE<int64_t> = 0;

template <class T>
class New {
 public:
  New() = default;
  explicit New(std::vector<int64_t> shape) {
    DLTensor prototype{};
    prototype.device = {1, 0};
    prototype.ndim = static_cast<int32_t>(shape.size());
    prototype.dtype = {CODE<T>, 8 * sizeof(T), 1};
    prototype.shape = shape.data();
    DLManagedTensorVersioned* tensor = nullptr;
    if (api->allocate(&prototype, &tensor, nullptr, set_error)) throw PythonError();
    void* made = nullptr;
    if (api->to_object(tensor, &made)) throw PythonError();
    object_ = static_cast<PyObject*>(made);
    data_ = static_cast<T*>(view(object_).data);
    int64_t size = sizeof(T);
    for (int64_t n : shape) size *= n;
    on_large_pages(data_, size);
  }
  New(New&& other) noexcept : object_(other.object_), data_(other.data_) { other.object_ = nullptr; }
  New& operator=(New&& other) noexcept {
    Py_XDECREF(object_);
    object_ = other.object_, data_ = other.data_;
    other.object_ = nullptr;
    return *this;
  }
  ~New() { Py_XDECREF(object_); }
  explicit operator bool() const { return object_; }
  T* data() const { return object_ ? data_ : nullptr; }  // null for no numbers, too
  PyObject* give() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  PyObject* share() {  // gives it, and keeps it
    Py_XINCREF(object_);
    return object_;
  }

 private:
  PyObject* object_ = nullptr;
  T* data_ = nullptr;
};

class List {
 public:
  List() : list_(PyList_New(0)) {
    if (!list_) throw PythonError();
  }
  ~List() { Py_XDECREF(list_); }
  List(const List&) = delete;
  void add(PyObject* object) {  // takes it over
    if (!object || PyList_Append(list_, object)) {
      Py_XDECREF(object);
      throw PythonError();
    }
    Py_DECREF(object);
  }
  void add_none() {
    Py_INCREF(Py_None);
    add(Py_None);
  }
  PyObject* give() {
    PyObject* list = list_;
    list_ = nullptr;
    return list;
  }

 private:
  PyObject* list_;
};

// A tuple of objects, which it takes over; None where one is null.
PyObject* tuple_of(std::initializer_list<PyObject*> objects) {
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(objects.size()));
  Py_ssize_t k = 0;
  for (PyObject* object : objects) {
    if (!tuple) {
      Py_XDECREF(object);
      continue;
    }
    if (!object) Py_INCREF(object = Py_None);
    PyTuple_SetItem(tuple, k++, object);
  }
  return tuple;
}

}  // namespace
