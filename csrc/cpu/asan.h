// Tells AddressSanitizer which bytes of a block may be touched: it did not hand out the pieces.
#pragma once
#include <cstddef>

#if defined(__has_feature)  // Clang; GCC has a macro
#if __has_feature(address_sanitizer)
#define FASTSEQ_ASAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define FASTSEQ_ASAN
#endif

#if defined(FASTSEQ_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace fastseq {

#if defined(FASTSEQ_ASAN)
constexpr size_t RED_ZONE = 256;  // bytes behind each piece that nobody may touch
inline void forbid(void* from, size_t size) { __asan_poison_memory_region(from, size); }
inline void allow(void* from, size_t size) { __asan_unpoison_memory_region(from, size); }
#else
constexpr size_t RED_ZONE = 0;
inline __attribute__((always_inline)) void forbid(void*, size_t) {}
inline __attribute__((always_inline)) void allow(void*, size_t) {}
#endif

}  // namespace fastseq
