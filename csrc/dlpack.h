// The part of DLPack 1.x's C exchange interface that we use: how a framework's tensors are read and
// made without its headers. torch offers it as torch.Tensor.__dlpack_c_exchange_api__.
#pragma once
#include <cstdint>

extern "C" {

struct DLDevice {
  int32_t type;  // 1: CPU
  int32_t id;
};

struct DLDataType {
  uint8_t code;  // 0: signed, 1: unsigned integer, 2: float, 6: bool
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensorVersioned;

struct DLExchangeApi {
  uint32_t major, minor;
  DLExchangeApi* previous;
  int (*allocate)(DLTensor* prototype, DLManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*from_object)(void* object, DLManagedTensorVersioned** out);
  int (*to_object)(DLManagedTensorVersioned* tensor, void** out);
  int (*view)(void* object, DLTensor* out);  // borrowed; may be null
  int (*current_stream)(int32_t type, int32_t id, void** out);
};

}  // extern "C"
