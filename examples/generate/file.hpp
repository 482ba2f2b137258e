// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Files in memory, read with every size checked, and files that appear whole or not at all.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace kvkeep::generate {

static_assert(std::endian::native == std::endian::little, "the files are little-endian");

/// What the user gave cannot be used: one line, "file: field: what is wrong".
struct bad_input : std::runtime_error {
  using std::runtime_error::runtime_error;
  bad_input(std::string const& file, std::string const& field, std::string const& what)
      : std::runtime_error(file + ": " + field + ": " + what) {}
};

namespace detail {

/// One file, read front to back. Everything that does not fit the file is refused by the field's name.
class file_reader {
 public:
  explicit file_reader(std::filesystem::path const& file);
  file_reader(std::string name, std::vector<std::byte> bytes)
      : name_(std::move(name)), bytes_(std::move(bytes)) {}

  std::string const& name() const { return name_; }
  std::uint64_t size() const { return bytes_.size(); }
  std::uint64_t at() const { return at_; }
  std::uint64_t left() const { return bytes_.size() - at_; }

  /// The next `n` bytes.
  std::span<std::byte const> take(std::uint64_t n, std::string_view field);
  /// `n` bytes at an offset, wherever reading stands.
  std::span<std::byte const> peek(std::uint64_t offset, std::uint64_t n,
                                  std::string_view field) const;
  template <class T>
  T number(std::string_view field) {
    T value;
    std::memcpy(&value, take(sizeof value, field).data(), sizeof value);
    return value;
  }
  std::string text(std::uint64_t n, std::string_view field) {
    auto const part = take(n, field);
    return {reinterpret_cast<char const*>(part.data()), part.size()};
  }
  std::vector<float> floats(std::uint64_t n, std::string_view field);
  [[noreturn]] void fail(std::string_view field, std::string const& what) const {
    throw bad_input(name_, std::string(field), what);
  }

 private:
  std::string name_;
  std::vector<std::byte> bytes_;
  std::uint64_t at_ = 0;
};

}  // namespace detail

/// Writes a file under a temporary name and renames it. @throws bad_input if it cannot be written
void write_whole(std::filesystem::path const& file, std::string const& content);
/// @throws bad_input if `write_whole` could not write there
void check_writable(std::filesystem::path const& file);

}  // namespace kvkeep::generate
