// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/gguf.hpp"

#include <kvkeep/core/types.hpp>

#include <limits>

namespace kvkeep::generate::detail {

namespace {

/// Numbers of metadata types, in the format's order.
enum : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

constexpr std::uint64_t block_floats = 32;  // of Q8_0
constexpr std::uint64_t block_bytes = sizeof(fp16) + block_floats;

std::uint64_t bytes_of(std::uint32_t type) {
  constexpr std::uint64_t n[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
  return n[type];
}

}  // namespace

gguf_file::gguf_file(file_reader& in) : in_(in) {
  in.text(4, "magic");
  auto const version = in.number<std::uint32_t>("version");
  if (version != 2 && version != 3)
    in.fail("version", std::to_string(version) + ", expected 2 or 3");
  auto const n_tensors = in.number<std::uint64_t>("tensor_count");
  auto const n_values = in.number<std::uint64_t>("metadata_kv_count");
  // The shortest entries have 13 and 32 bytes.
  if (n_values > in.left() / 13)
    in.fail("metadata_kv_count", std::to_string(n_values) + ", more than the file holds");
  if (n_tensors > in.left() / 32)
    in.fail("tensor_count", std::to_string(n_tensors) + ", more than the file holds");
  for (std::uint64_t i = 0; i < n_values; ++i) {
    std::string const key = read_text("metadata key " + std::to_string(i));
    auto const type = in.number<std::uint32_t>(key);
    if (!values_.emplace(key, read_value(type, key)).second) in.fail(key, "occurs twice");
  }
  for (std::uint64_t i = 0; i < n_tensors; ++i) read_tensor_info(i);
  std::int64_t const alignment = integer("general.alignment", 32);
  if (alignment < 1 || alignment > 1 << 20)
    in.fail("general.alignment", std::to_string(alignment) + ", expected 1..1048576");
  auto const a = static_cast<std::uint64_t>(alignment);
  data_ = (in.at() + a - 1) / a * a;
}

std::string gguf_file::read_text(std::string_view field) {
  auto const n = in_.number<std::uint64_t>(field);
  return in_.text(n, field);
}

gguf_value gguf_file::read_value(std::uint32_t type, std::string const& key) {
  auto const as_integer = [&](auto example) {
    return gguf_value{static_cast<std::int64_t>(in_.number<decltype(example)>(key))};
  };
  switch (type) {
    case u8:
      return as_integer(std::uint8_t{});
    case i8:
      return as_integer(std::int8_t{});
    case u16:
      return as_integer(std::uint16_t{});
    case i16:
      return as_integer(std::int16_t{});
    case u32:
      return as_integer(std::uint32_t{});
    case i32:
      return as_integer(std::int32_t{});
    case i64:
      return as_integer(std::int64_t{});
    case u64: {
      auto const v = in_.number<std::uint64_t>(key);
      if (v > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
        in_.fail(key, std::to_string(v) + ", expected less than 2^63");
      return static_cast<std::int64_t>(v);
    }
    case f32:
      return static_cast<double>(in_.number<float>(key));
    case f64:
      return in_.number<double>(key);
    case boolean:
      return in_.number<std::uint8_t>(key) != 0;
    case string:
      return read_text(key);
    case array:
      return read_array(key);
    default:
      in_.fail(key, "metadata type " + std::to_string(type) + ", expected 0..12");
  }
}

gguf_value gguf_file::read_array(std::string const& key) {
  auto const type = in_.number<std::uint32_t>(key);
  if (type > f64 || type == array) in_.fail(key, "array of metadata type " + std::to_string(type));
  auto const n = in_.number<std::uint64_t>(key);
  if (n > in_.left() / bytes_of(type)) in_.fail(key, "truncated: an array of " + std::to_string(n));
  if (type == string) {
    std::vector<std::string> list(n);
    for (auto& s : list) s = read_text(key);
    return list;
  }
  std::vector<double> list(n);
  for (auto& v : list) {
    gguf_value const value = read_value(type, key);
    v = std::visit(
        [](auto const& x) -> double {
          if constexpr (std::is_arithmetic_v<std::decay_t<decltype(x)>>)
            return static_cast<double>(x);
          return 0;
        },
        value);
  }
  return list;
}

void gguf_file::read_tensor_info(std::uint64_t number) {
  std::string const name = read_text("tensor " + std::to_string(number));
  gguf_tensor t;
  auto const n_dims = in_.number<std::uint32_t>(name);
  if (n_dims < 1 || n_dims > 4)
    in_.fail(name, std::to_string(n_dims) + " dimensions, expected 1..4");
  for (std::uint32_t d = 0; d < n_dims; ++d) t.extent.push_back(in_.number<std::uint64_t>(name));
  t.type = in_.number<std::uint32_t>(name);
  t.offset = in_.number<std::uint64_t>(name);
  if (!tensors_.emplace(name, std::move(t)).second) in_.fail(name, "occurs twice");
}

template <class T>
T const* gguf_file::find(std::string const& key, char const* kind) const {
  auto const it = values_.find(key);
  if (it == values_.end()) return nullptr;
  T const* const v = std::get_if<T>(&it->second);
  if (v == nullptr) fail(key, std::string("expected ") + kind);
  return v;
}

std::int64_t gguf_file::integer(std::string const& key,
                                std::optional<std::int64_t> otherwise) const {
  if (auto const* v = find<std::int64_t>(key, "an integer")) return *v;
  if (!otherwise) fail(key, "missing");
  return *otherwise;
}

double gguf_file::real(std::string const& key, std::optional<double> otherwise) const {
  if (auto const* v = find<double>(key, "a float")) return *v;
  if (!otherwise) fail(key, "missing");
  return *otherwise;
}

std::string gguf_file::text(std::string const& key, std::optional<std::string> otherwise) const {
  if (auto const* v = find<std::string>(key, "a string")) return *v;
  if (!otherwise) fail(key, "missing");
  return *otherwise;
}

std::vector<std::string> const* gguf_file::strings(std::string const& key) const {
  return find<std::vector<std::string>>(key, "an array of strings");
}

std::vector<double> const* gguf_file::numbers(std::string const& key) const {
  return find<std::vector<double>>(key, "an array of numbers");
}

namespace {

std::string shape_text(std::vector<std::uint64_t> const& extent) {
  std::string s;
  for (auto const e : extent) s += (s.empty() ? "[" : ", ") + std::to_string(e);
  return s + "]";
}

float half_at(std::byte const* p) {
  fp16 h;
  std::memcpy(&h.bits, p, sizeof h.bits);
  return to_float(h);
}

void dequantise(std::byte const* block, float* to) {
  float const scale = half_at(block);
  for (std::uint64_t i = 0; i < block_floats; ++i) {
    auto const q = static_cast<std::int8_t>(block[sizeof(fp16) + i]);
    to[i] = scale * static_cast<float>(q);
  }
}

}  // namespace

std::vector<float> gguf_file::tensor(std::string const& name,
                                     std::vector<std::uint64_t> const& extent) const {
  auto const it = tensors_.find(name);
  if (it == tensors_.end()) fail(name, "missing");
  gguf_tensor const& t = it->second;
  if (t.extent != extent)
    fail(name, "shape " + shape_text(t.extent) + ", expected " + shape_text(extent));
  std::uint64_t n = 1;
  for (auto const e : extent) n *= e;  // bounded by check_config
  std::uint64_t bytes = 0;
  switch (static_cast<gguf_type>(t.type)) {
    case gguf_type::f32:
      bytes = n * sizeof(float);
      break;
    case gguf_type::f16:
      bytes = n * sizeof(fp16);
      break;
    case gguf_type::q8_0:
      bytes = n / block_floats * block_bytes;
      break;
    default:
      fail(name,
           "tensor type " + std::to_string(t.type) + ", expected 0 (F32), 1 (F16) or 8 (Q8_0)");
  }
  if (static_cast<gguf_type>(t.type) == gguf_type::q8_0 && extent[0] % block_floats != 0)
    fail(name, "rows of " + std::to_string(extent[0]) + " in Q8_0, expected a multiple of 32");
  if (t.offset > in_.size()) fail(name, "truncated: data at " + std::to_string(t.offset));
  auto const data = in_.peek(data_ + t.offset, bytes, name);
  std::vector<float> values(n);
  switch (static_cast<gguf_type>(t.type)) {
    case gguf_type::f32:
      std::memcpy(values.data(), data.data(), bytes);
      break;
    case gguf_type::f16:
      for (std::uint64_t i = 0; i < n; ++i) values[i] = half_at(data.data() + i * sizeof(fp16));
      break;
    case gguf_type::q8_0:
      for (std::uint64_t b = 0; b < n / block_floats; ++b)
        dequantise(data.data() + b * block_bytes, values.data() + b * block_floats);
      break;
  }
  return values;
}

}  // namespace kvkeep::generate::detail
