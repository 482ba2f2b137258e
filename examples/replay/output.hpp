// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Files of one replayed case: all of them appear, or none.
#pragma once

#include <filesystem>
#include <fstream>

#include "arrays.hpp"

namespace kvkeep::replay {

/// Keeps the outputs that the case names, padded to the widths that it names.
inline void keep_named(recorded_case const& c, replayed& r) {
  std::map<std::string, npy_array> named;
  for (auto const& [name, info] : c.output_info) {
    auto const it = r.outputs.find(name);
    if (it == r.outputs.end())
      c.fail("outputs." + name, "not an output of " + c.policy() + ", " + c.kind());
    widen(it->second, info.shape);
    named.insert(std::move(*it));
  }
  r.outputs = std::move(named);
}

/// Writes `<output>.npy` and result.json into `dir`, which is made if it does not exist. Files get
/// their names once all of them have been written.
inline void write_results(std::filesystem::path const& dir, replayed const& r,
                          nlohmann::ordered_json const& result) {
  namespace fs = std::filesystem;
  std::vector<std::pair<fs::path, fs::path>> files;  // temporary and final name
  auto const next = [&](std::string const& name) {
    files.emplace_back(dir / ("." + name + ".part"), dir / name);
    return files.back().first;
  };
  try {
    fs::create_directories(dir);
    for (auto const& [name, array] : r.outputs) write_npy(next(name + ".npy"), array);
    std::ofstream out(next("result.json"), std::ios::trunc);
    out << result.dump(1) << '\n';
    if (!out.flush())
      throw std::runtime_error((dir / "result.json").string() + ": file: cannot be written");
    out.close();
    for (auto const& [temporary, name] : files) fs::rename(temporary, name);
  } catch (...) {
    std::error_code ignored;
    for (auto const& [temporary, name] : files) fs::remove(temporary, ignored);
    throw;
  }
}

}  // namespace kvkeep::replay
