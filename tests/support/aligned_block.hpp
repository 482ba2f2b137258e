// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What workspaces and sessions are given to work in.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <span>

namespace kvkeep::test {

/// Memory of exactly `n` bytes on a 64-byte boundary, every one 0xff: what is read before it is written shows.
class aligned_block {
 public:
  explicit aligned_block(std::size_t n) : n_(n) {
    data_ = static_cast<std::byte*>(::operator new (n, std::align_val_t{64}));
    std::memset(data_, 0xff, n);
  }
  aligned_block(aligned_block const&) = delete;
  aligned_block& operator=(aligned_block const&) = delete;
  ~aligned_block() { ::operator delete (data_, std::align_val_t{64}); }
  std::span<std::byte> span(std::size_t less = 0) const { return {data_, n_ - less}; }

 private:
  std::byte* data_;
  std::size_t n_;
};

}  // namespace kvkeep::test
