// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Strict reader and writer of .npy files: version 1.0, C order, '<f4' and '<i4' only.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvkeep::tools {

static_assert(std::endian::native == std::endian::little, "the files are little-endian");

/// One array in C order; `f32` holds the elements of '<f4' files, `i32` those of '<i4' files.
struct npy_array {
  std::vector<std::int64_t> shape;
  bool is_float = true;
  std::vector<float> f32;
  std::vector<std::int32_t> i32;

  std::size_t size() const { return is_float ? f32.size() : i32.size(); }
};

namespace detail {

/// Parser of the header's dictionary. Every error names the file and the field.
class npy_header {
 public:
  npy_header(std::string const& file, std::string_view text) : file_(file), text_(text) {}

  std::string descr;
  bool fortran_order = false;
  std::vector<std::int64_t> shape;

  void parse() {
    bool have_descr = false, have_order = false, have_shape = false;
    expect('{', "header");
    while (!accept('}')) {
      std::string const key = quoted("header");
      expect(':', key);
      if (key == "descr") {
        once(have_descr, key);
        descr = quoted(key);
      } else if (key == "fortran_order") {
        once(have_order, key);
        fortran_order = boolean(key);
      } else if (key == "shape") {
        once(have_shape, key);
        tuple(key);
      } else {
        fail("header", "unknown key '" + key + "'");
      }
      if (!accept(',')) {
        expect('}', "header");
        break;
      }
    }
    skip_blank();
    if (at_ != text_.size()) fail("header", "text after the dictionary");
    if (!have_descr) fail("descr", "missing");
    if (!have_order) fail("fortran_order", "missing");
    if (!have_shape) fail("shape", "missing");
  }

  [[noreturn]] void fail(std::string const& field, std::string const& what) const {
    throw std::runtime_error(file_ + ": " + field + ": " + what);
  }

 private:
  void skip_blank() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }
  bool accept(char c) {
    skip_blank();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c, std::string const& field) {
    if (!accept(c)) fail(field, std::string("expected '") + c + "'");
  }
  void once(bool& seen, std::string const& key) const {
    if (seen) fail(key, "given twice");
    seen = true;
  }
  std::string quoted(std::string const& field) {
    expect('\'', field);
    std::size_t const end = text_.find('\'', at_);
    if (end == std::string_view::npos) fail(field, "unterminated string");
    std::string s(text_.substr(at_, end - at_));
    at_ = end + 1;
    return s;
  }
  bool boolean(std::string const& field) {
    skip_blank();
    for (bool const value : {false, true}) {
      std::string_view const word = value ? "True" : "False";
      if (text_.substr(at_, word.size()) != word) continue;
      at_ += word.size();
      return value;
    }
    fail(field, "expected True or False");
  }
  void tuple(std::string const& field) {
    expect('(', field);
    while (!accept(')')) {
      shape.push_back(number(field));
      if (accept(',')) continue;
      expect(')', field);
      if (shape.size() == 1) fail(field, "not a tuple");
      break;
    }
  }
  std::int64_t number(std::string const& field) {
    skip_blank();
    std::size_t const first = at_;
    std::int64_t n = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      n = n * 10 + (text_[at_] - '0');
      if (n > std::numeric_limits<std::int32_t>::max()) fail(field, "extent too large");
    }
    if (at_ == first) fail(field, "expected a non-negative integer");
    return n;
  }

  std::string file_;
  std::string_view text_;
  std::size_t at_ = 0;
};

template <class T>
std::vector<T> npy_elements(std::string_view bytes) {
  std::vector<T> v(bytes.size() / sizeof(T));
  if (!v.empty()) std::memcpy(v.data(), bytes.data(), bytes.size());
  return v;
}

inline std::string read_bytes(std::filesystem::path const& path) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  auto const size = in ? static_cast<std::streamoff>(in.tellg()) : std::streamoff{-1};
  if (size < 0) throw std::runtime_error(path.string() + ": file: cannot be opened");
  std::string bytes(static_cast<std::size_t>(size), '\0');
  in.seekg(0);
  if (!in.read(bytes.data(), size))
    throw std::runtime_error(path.string() + ": file: cannot be read");
  return bytes;
}

}  // namespace detail

/// Reads `path`. Throws std::runtime_error("FILE: FIELD: reason") on anything but a complete
/// version 1.0 file of '<f4' or '<i4' elements in C order without trailing bytes.
inline npy_array read_npy(std::filesystem::path const& path) {
  std::string const bytes = detail::read_bytes(path);
  std::string_view const all(bytes);
  auto const fail = [&](char const* field, char const* what) {
    throw std::runtime_error(path.string() + ": " + field + ": " + what);
  };
  if (all.substr(0, 6) != "\x93NUMPY") fail("magic", "not a .npy file");
  if (all.size() < 10) fail("header", "truncated");
  if (all[6] != 1 || all[7] != 0) fail("version", "only 1.0 is read");
  std::size_t const length =
      static_cast<unsigned char>(all[8]) + std::size_t{256} * static_cast<unsigned char>(all[9]);
  if (all.size() - 10 < length) fail("header", "truncated");
  detail::npy_header header(path.string(), all.substr(10, length));
  if (length == 0 || all[9 + length] != '\n') fail("header", "does not end in a newline");
  header.parse();
  if (header.fortran_order) fail("fortran_order", "only C order is read");
  if (header.descr != "<f4" && header.descr != "<i4") fail("descr", "only <f4 and <i4 are read");

  // The extents are compared with the bytes that exist before anything of that size is made.
  std::string_view const data = all.substr(10 + length);
  std::uint64_t n = 1;
  bool const empty = std::count(header.shape.begin(), header.shape.end(), 0) > 0;
  for (std::int64_t e : header.shape) {
    n *= static_cast<std::uint64_t>(empty ? 0 : e);
    if (n > data.size()) fail("data", "truncated");
  }
  if (data.size() < n * 4) fail("data", "truncated");
  if (data.size() > n * 4) fail("data", "bytes after the last element");
  npy_array a;
  a.shape = std::move(header.shape);
  a.is_float = header.descr == "<f4";
  if (a.is_float) {
    a.f32 = detail::npy_elements<float>(data);
  } else {
    a.i32 = detail::npy_elements<std::int32_t>(data);
  }
  return a;
}

/// Writes `a` to `path`, replacing it. The bytes are those that numpy.save writes. Throws
/// std::runtime_error when shape and elements differ in number or the file cannot be written.
inline void write_npy(std::filesystem::path const& path, npy_array const& a) {
  std::string shape;
  std::uint64_t n = 1;
  for (std::int64_t e : a.shape) {
    if (e < 0) throw std::runtime_error(path.string() + ": shape: negative extent");
    n *= static_cast<std::uint64_t>(e);
  }
  for (std::size_t i = 0; i < a.shape.size(); ++i) {
    shape += (i ? ", " : "") + std::to_string(a.shape[i]);
  }
  if (a.shape.size() == 1) shape += ",";
  if (n != a.size()) throw std::runtime_error(path.string() + ": shape: differs from the data");
  std::string header = std::string("{'descr': '") + (a.is_float ? "<f4" : "<i4") +
                       "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append(63 - (10 + header.size()) % 64, ' ').append(1, '\n');
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write("\x93NUMPY\x01\x00", 8);
  out.put(static_cast<char>(header.size() % 256)).put(static_cast<char>(header.size() / 256));
  out << header;
  if (n > 0)
    out.write(a.is_float ? reinterpret_cast<char const*>(a.f32.data())
                         : reinterpret_cast<char const*>(a.i32.data()),
              static_cast<std::streamsize>(n * 4));
  if (!out.flush()) throw std::runtime_error(path.string() + ": file: cannot be written");
}

inline void write_npy(std::filesystem::path const& path, std::vector<std::int64_t> shape,
                      std::vector<float> values) {
  write_npy(path, npy_array{std::move(shape), true, std::move(values), {}});
}

inline void write_npy(std::filesystem::path const& path, std::vector<std::int64_t> shape,
                      std::vector<std::int32_t> values) {
  write_npy(path, npy_array{std::move(shape), false, {}, std::move(values)});
}

}  // namespace kvkeep::tools
