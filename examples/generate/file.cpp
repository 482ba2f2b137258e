// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/file.hpp"

#include <fstream>

namespace kvkeep::generate {

namespace fs = std::filesystem;

namespace detail {

file_reader::file_reader(fs::path const& file) : name_(file.string()) {
  std::error_code error;
  if (!fs::exists(file, error)) fail("file", "does not exist");
  std::uintmax_t const size = fs::is_regular_file(file, error) ? fs::file_size(file, error) : 0;
  std::ifstream in(file, std::ios::binary);
  if (error || size == 0 || !in)
    fail("file", size == 0 ? "empty, or not a file" : "cannot be read");
  bytes_.resize(size);
  in.read(reinterpret_cast<char*>(bytes_.data()), static_cast<std::streamsize>(size));
  if (in.gcount() != static_cast<std::streamsize>(size)) fail("file", "cannot be read");
}

std::span<std::byte const> file_reader::peek(std::uint64_t offset, std::uint64_t n,
                                             std::string_view field) const {
  if (offset > bytes_.size() || n > bytes_.size() - offset)
    fail(field, "truncated: " + std::to_string(n) + " bytes at " + std::to_string(offset) +
                    ", but the file has " + std::to_string(bytes_.size()));
  return {bytes_.data() + offset, n};
}

std::span<std::byte const> file_reader::take(std::uint64_t n, std::string_view field) {
  auto const part = peek(at_, n, field);
  at_ += n;
  return part;
}

std::vector<float> file_reader::floats(std::uint64_t n, std::string_view field) {
  if (n > left() / sizeof(float)) peek(at_, n > left() ? n : n * sizeof(float), field);
  auto const part = take(n * sizeof(float), field);
  std::vector<float> values(n);
  std::memcpy(values.data(), part.data(), part.size());
  return values;
}

}  // namespace detail

namespace {

fs::path temporary(fs::path const& file) {
  return file.parent_path() / ("." + file.filename().string() + ".part");
}

}  // namespace

void write_whole(fs::path const& file, std::string const& content) {
  fs::path const part = temporary(file);
  std::error_code error;
  {
    std::ofstream out(part, std::ios::trunc | std::ios::binary);
    out << content;
    if (!out.flush()) {
      fs::remove(part, error);
      throw bad_input(file.string(), "file", "cannot be written");
    }
  }
  fs::rename(part, file, error);
  if (!error) return;
  fs::remove(part, error);
  throw bad_input(file.string(), "file", "cannot be written");
}

void check_writable(fs::path const& file) {
  fs::path const part = temporary(file);
  std::error_code error;
  bool const folder = fs::is_directory(file, error) || file.filename().empty();
  bool const writes = !folder && std::ofstream(part, std::ios::trunc).is_open();
  fs::remove(part, error);
  if (!writes) throw bad_input(file.string(), "file", "cannot be written");
}

}  // namespace kvkeep::generate
