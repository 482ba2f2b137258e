// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/sha256.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>

namespace kvkeep::generate {

namespace {

using words = std::array<std::uint32_t, 64>;

/// First 32 bits of the fractional part of a root, as the standard defines its constants.
std::uint32_t fraction(long double root) {
  return static_cast<std::uint32_t>((root - std::floor(root)) * 4294967296.0L);
}

words first_primes() {
  words p{};
  std::size_t n = 0;
  for (std::uint32_t i = 2; n < p.size(); ++i) {
    bool prime = true;
    for (std::size_t j = 0; j < n; ++j) prime = prime && i % p[j] != 0;
    if (prime) p[n++] = i;
  }
  return p;
}

struct hasher {
  std::array<std::uint32_t, 8> state{};
  words constants{};

  hasher() {
    words const primes = first_primes();
    for (std::size_t i = 0; i < 64; ++i)
      constants[i] = fraction(std::cbrt(static_cast<long double>(primes[i])));
    for (std::size_t i = 0; i < 8; ++i)
      state[i] = fraction(std::sqrt(static_cast<long double>(primes[i])));
  }

  void block(unsigned char const* p) {
    words w{};
    for (std::size_t i = 0; i < 16; ++i)
      w[i] = std::uint32_t{p[4 * i]} << 24 | std::uint32_t{p[4 * i + 1]} << 16 |
             std::uint32_t{p[4 * i + 2]} << 8 | std::uint32_t{p[4 * i + 3]};
    for (std::size_t i = 16; i < 64; ++i) {
      std::uint32_t const a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + w[i - 7] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) +
             (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
    }
    auto s = state;
    for (std::size_t i = 0; i < 64; ++i) {
      std::uint32_t const e = s[4], a = s[0];
      std::uint32_t const t = s[7] + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                              ((e & s[5]) ^ (~e & s[6])) + constants[i] + w[i];
      std::uint32_t const u = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) +
                              ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
      s = {t + u, s[0], s[1], s[2], s[3] + t, s[4], s[5], s[6]};
    }
    for (std::size_t i = 0; i < 8; ++i) state[i] += s[i];
  }
};

}  // namespace

std::string sha256(std::string_view bytes) {
  std::string padded(bytes);
  padded += '\x80';
  padded.append((120 - padded.size() % 64) % 64, '\0');
  std::uint64_t const bits = std::uint64_t{bytes.size()} * 8;
  for (int shift = 56; shift >= 0; shift -= 8) padded += static_cast<char>(bits >> shift & 0xff);
  hasher h;
  for (std::size_t i = 0; i < padded.size(); i += 64)
    h.block(reinterpret_cast<unsigned char const*>(padded.data()) + i);
  std::string text;
  for (std::uint32_t const word : h.state) {
    char digits[9];
    std::snprintf(digits, sizeof digits, "%08x", word);
    text += digits;
  }
  return text;
}

}  // namespace kvkeep::generate
