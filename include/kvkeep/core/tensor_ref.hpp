// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Non-owning strided reference to a rank-R array in a memory space.
#pragma once

#include "types.hpp"

namespace kvkeep {

/// Elements `data[i0 * stride[0] + i1 * stride[1] + ...]`. Strides are in elements and may be zero
/// (broadcast). Trivially copyable; passed by value to kernels.
template <class T, int R, class Space = host_space>
struct tensor_ref {
  static_assert(R >= 1);
  using element = T;
  using space = Space;

  T* data = nullptr;
  index_t extent[R] = {};
  offset_t stride[R] = {};

  tensor_ref() = default;
  /// A reference to constant elements.
  template <class U>
  requires(!std::is_const_v<U> && std::is_same_v<U const, T>) KVKEEP_HD
      tensor_ref(tensor_ref<U, R, Space> const& other)
  noexcept : data(other.data) {
    for (int a = 0; a < R; ++a) {
      extent[a] = other.extent[a];
      stride[a] = other.stride[a];
    }
  }

  template <class... I>
  KVKEEP_HD offset_t offset(I... i) const noexcept {
    static_assert(sizeof...(I) <= R);
    offset_t at = 0;
    int axis = 0;
    ((at += static_cast<offset_t>(i) * stride[axis++]), ...);
    return at;
  }
  /// Element at a full index.
  template <class... I>
  KVKEEP_HD T& operator()(I... i) const noexcept {
    static_assert(sizeof...(I) == R);
    return data[offset(i...)];
  }
  /// Address of the first element below a leading index.
  template <class... I>
  KVKEEP_HD T* at(I... i) const noexcept {
    return data + offset(i...);
  }
  KVKEEP_HD explicit operator bool() const noexcept { return data != nullptr; }
};

/// Row-major reference: the last extent is contiguous.
template <class Space = host_space, class T, class... E>
KVKEEP_HD tensor_ref<T, static_cast<int>(sizeof...(E)), Space> row_major(T* data, E... extents) {
  constexpr int rank = static_cast<int>(sizeof...(E));
  tensor_ref<T, rank, Space> r;
  r.data = data;
  index_t const list[] = {static_cast<index_t>(extents)...};
  offset_t step = 1;
  for (int a = rank - 1; a >= 0; --a) {
    r.extent[a] = list[a];
    r.stride[a] = step;
    step *= list[a];
  }
  return r;
}

}  // namespace kvkeep
