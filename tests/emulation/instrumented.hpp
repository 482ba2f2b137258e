// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The functions that code compiled with the compiler's thread instrumentation calls at every access, for a program
/// that watches emulated kernels: included once, by who defines `emulation::access`.
#pragma once

#include <cstddef>

namespace emulation {

enum class access_kind { read, write, atomic };
/// @param code  where in the code: the address behind the call
void access(void const* p, std::size_t bytes, access_kind what, void const* code);

}  // namespace emulation

// What instrumented code calls. Atomic operations of the host's code are of no interest here, but must work.
extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_read_range(void* p, unsigned long bytes) {
  emulation::access(p, bytes, emulation::access_kind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long bytes) {
  emulation::access(p, bytes, emulation::access_kind::write, __builtin_return_address(0));
}

#define KVKEEP_ACCESS(bytes)                                                                 \
  void __tsan_read##bytes(void* p) {                                                         \
    emulation::access(p, bytes, emulation::access_kind::read, __builtin_return_address(0));  \
  }                                                                                          \
  void __tsan_write##bytes(void* p) {                                                        \
    emulation::access(p, bytes, emulation::access_kind::write, __builtin_return_address(0)); \
  }                                                                                          \
  void __tsan_unaligned_read##bytes(void* p) {                                               \
    emulation::access(p, bytes, emulation::access_kind::read, __builtin_return_address(0));  \
  }                                                                                          \
  void __tsan_unaligned_write##bytes(void* p) {                                              \
    emulation::access(p, bytes, emulation::access_kind::write, __builtin_return_address(0)); \
  }
KVKEEP_ACCESS(1)
KVKEEP_ACCESS(2)
KVKEEP_ACCESS(4)
KVKEEP_ACCESS(8)
KVKEEP_ACCESS(16)
#undef KVKEEP_ACCESS

#define KVKEEP_CHANGE(bits, type, name, builtin)                                      \
  type __tsan_atomic##bits##_##name(type volatile* p, type x, int) {                  \
    emulation::access(const_cast<type*>(p), sizeof x, emulation::access_kind::atomic, \
                      __builtin_return_address(0));                                   \
    return builtin(p, x, __ATOMIC_SEQ_CST);                                           \
  }
#define KVKEEP_ATOMIC(bits, type)                                                             \
  KVKEEP_CHANGE(bits, type, exchange, __atomic_exchange_n)                                    \
  KVKEEP_CHANGE(bits, type, fetch_add, __atomic_fetch_add)                                    \
  KVKEEP_CHANGE(bits, type, fetch_sub, __atomic_fetch_sub)                                    \
  type __tsan_atomic##bits##_load(type const volatile* p, int) {                              \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                              \
  }                                                                                           \
  void __tsan_atomic##bits##_store(type volatile* p, type x, int) {                           \
    __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                           \
  int __tsan_atomic##bits##_compare_exchange_strong(type volatile* p, type* old, type x, int, \
                                                    int) {                                    \
    return __atomic_compare_exchange_n(p, old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
KVKEEP_ATOMIC(8, unsigned char)
KVKEEP_ATOMIC(32, unsigned)
KVKEEP_ATOMIC(64, unsigned long)
#undef KVKEEP_ATOMIC
#undef KVKEEP_CHANGE

}  // extern "C"
