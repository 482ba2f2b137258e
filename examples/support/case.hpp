// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Recorded cases of schema 1: a folder with case.json and the arrays that it names.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "npy.hpp"

namespace kvkeep::tools {

/// One recorded case. Arrays agree with the json's dtype and shape.
struct recorded_case {
  /// What case.json says of an array.
  struct array_info {
    std::string file;
    bool is_float = true;
    std::vector<std::int64_t> shape;
  };

  std::filesystem::path dir;
  nlohmann::json meta;
  std::map<std::string, array_info> output_info;     ///< every output that the case names
  std::map<std::string, npy_array> inputs, outputs;  ///< outputs: empty if they were not asked for

  std::string name() const { return text("name"); }
  std::string policy() const { return text("policy"); }
  std::string kind() const { return text("kind"); }
  bool is_official() const { return text("origin") == "official"; }

  /// shape.FIELD or params.FIELD as T; throws when missing or of another type.
  template <class T = std::int32_t>
  T shape(char const* field) const {
    return get<T>("shape", field);
  }
  template <class T = std::int32_t>
  T param(char const* field) const {
    return get<T>("params", field);
  }
  template <class T>
  T param_or(char const* field, T fallback) const {
    return meta.at("params").contains(field) ? param<T>(field) : fallback;
  }
  npy_array const& input(std::string const& n) const { return find(inputs, "inputs", n); }
  npy_array const& output(std::string const& n) const { return find(outputs, "outputs", n); }

  [[noreturn]] void fail(std::string const& field, std::string const& what) const {
    throw std::runtime_error((dir / "case.json").string() + ": " + field + ": " + what);
  }

 private:
  std::string text(char const* field) const {
    if (!meta.contains(field) || !meta[field].is_string()) fail(field, "missing or not a string");
    return meta[field].get<std::string>();
  }
  template <class T>
  T get(char const* group, char const* field) const {
    std::string const full = std::string(group) + "." + field;
    if (!meta.contains(group) || !meta[group].contains(field)) fail(full, "missing");
    try {
      return meta[group][field].get<T>();
    } catch (nlohmann::json::exception const& e) {
      fail(full, e.what());
    }
  }
  npy_array const& find(std::map<std::string, npy_array> const& arrays, std::string const& group,
                        std::string const& n) const {
    auto const it = arrays.find(n);
    if (it == arrays.end()) fail(group + "." + n, "missing");
    return it->second;
  }
};

namespace detail {

inline recorded_case::array_info read_array_info(recorded_case const& c, std::string const& field,
                                                 nlohmann::json const& entry) {
  recorded_case::array_info info;
  auto const need = [&](char const* key, bool ok) {
    if (!ok) c.fail(field + "." + key, "missing or of another type");
  };
  if (!entry.is_object()) c.fail(field, "not an object");
  auto const value = [&](char const* key) { return entry.value(key, nlohmann::json()); };
  need("file", value("file").is_string());
  need("dtype", value("dtype").is_string());
  need("shape", value("shape").is_array());
  info.file = entry["file"].get<std::string>();
  if (info.file.empty() || std::filesystem::path(info.file).filename() != info.file ||
      info.file == "." || info.file == "..")
    c.fail(field + ".file", "'" + info.file + "' is not a plain file name");
  std::string const dtype = entry["dtype"].get<std::string>();
  if (dtype != "float32" && dtype != "int32")
    c.fail(field + ".dtype", dtype + ", allowed: float32 or int32");
  info.is_float = dtype == "float32";
  for (nlohmann::json const& e : entry["shape"]) {
    if (!e.is_number_integer() || e.get<std::int64_t>() < 0)
      c.fail(field + ".shape", "extents are integers >= 0");
    info.shape.push_back(e.get<std::int64_t>());
  }
  return info;
}

inline void load_arrays(recorded_case& c, char const* group, bool with_data,
                        std::map<std::string, npy_array>& into) {
  if (!c.meta.contains(group) || !c.meta[group].is_object())
    c.fail(group, "missing or not an object");
  for (auto const& [name, entry] : c.meta[group].items()) {
    std::string const field = std::string(group) + "." + name;
    auto const info = read_array_info(c, field, entry);
    if (&into == &c.outputs) c.output_info.emplace(name, info);
    if (!with_data) continue;
    npy_array a = read_npy(c.dir / info.file);
    if (info.is_float != a.is_float) c.fail(field, "dtype differs from " + info.file);
    if (info.shape != a.shape) c.fail(field, "shape differs from " + info.file);
    into.emplace(name, std::move(a));
  }
}

}  // namespace detail

/// Loads dir/case.json and its arrays. Throws std::runtime_error("FILE: FIELD: reason").
/// @param with_outputs  false: the files of the expected outputs are not read and need not exist
inline recorded_case load_case(std::filesystem::path const& dir, bool with_outputs = true) {
  recorded_case c;
  c.dir = dir;
  std::ifstream in(dir / "case.json");
  if (!in) c.fail("file", "cannot be opened");
  try {
    c.meta = nlohmann::json::parse(in);
  } catch (nlohmann::json::exception const& e) {
    c.fail("json", e.what());
  }
  if (!c.meta.is_object()) c.fail("json", "not an object");
  if (c.meta.value("schema", nlohmann::json()) != 1) c.fail("schema", "only 1 is read");
  for (char const* group : {"shape", "params"})
    if (!c.meta.contains(group) || !c.meta[group].is_object())
      c.fail(group, "missing or not an object");
  detail::load_arrays(c, "inputs", true, c.inputs);
  detail::load_arrays(c, "outputs", with_outputs, c.outputs);
  return c;
}

/// Every folder directly below `root` that holds a case.json, by name.
inline std::vector<std::filesystem::path> case_dirs(std::filesystem::path const& root) {
  std::vector<std::filesystem::path> dirs;
  for (auto const& entry : std::filesystem::directory_iterator(root))
    if (std::filesystem::exists(entry.path() / "case.json")) dirs.push_back(entry.path());
  std::sort(dirs.begin(), dirs.end());
  return dirs;
}

}  // namespace kvkeep::tools
