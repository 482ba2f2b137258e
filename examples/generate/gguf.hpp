// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The GGUF container (versions 2 and 3): typed metadata and a table of tensors.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "generate/file.hpp"

namespace kvkeep::generate::detail {

/// Integers of any width, floats, bools and strings; arrays of numbers or strings.
using gguf_value = std::variant<std::int64_t, double, bool, std::string, std::vector<double>,
                                std::vector<std::string>>;

enum class gguf_type : std::uint32_t { f32 = 0, f16 = 1, q8_0 = 8 };

struct gguf_tensor {
  std::vector<std::uint64_t> extent;  ///< fastest first, as in the file
  std::uint32_t type = 0;
  std::uint64_t offset = 0;  ///< from the start of the data
};

class gguf_file {
 public:
  /// @throws bad_input naming file and field
  explicit gguf_file(file_reader& in);

  /// A number, or `otherwise` where the key is absent (without it: refused).
  std::int64_t integer(std::string const& key, std::optional<std::int64_t> otherwise = {}) const;
  double real(std::string const& key, std::optional<double> otherwise = {}) const;
  std::string text(std::string const& key, std::optional<std::string> otherwise = {}) const;
  /// Null where the key is absent; another type is refused.
  std::vector<std::string> const* strings(std::string const& key) const;
  std::vector<double> const* numbers(std::string const& key) const;

  bool has_tensor(std::string const& name) const { return tensors_.count(name) > 0; }
  /// A tensor as fp32. @param extent  the shape that it must have, fastest first
  std::vector<float> tensor(std::string const& name,
                            std::vector<std::uint64_t> const& extent) const;
  std::string const& name() const { return in_.name(); }
  [[noreturn]] void fail(std::string const& field, std::string const& what) const {
    in_.fail(field, what);
  }

 private:
  template <class T>
  T const* find(std::string const& key, char const* kind) const;
  std::string read_text(std::string_view field);
  gguf_value read_value(std::uint32_t type, std::string const& key);
  gguf_value read_array(std::string const& key);
  void read_tensor_info(std::uint64_t number);

  file_reader& in_;
  std::map<std::string, gguf_value> values_;
  std::map<std::string, gguf_tensor> tensors_;
  std::uint64_t data_ = 0;  ///< offset of the tensors' data
};

}  // namespace kvkeep::generate::detail
