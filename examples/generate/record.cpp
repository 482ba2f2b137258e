// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/record.hpp"

#include <algorithm>
#include <fstream>

#include <nlohmann/json.hpp>

#include "generate/file.hpp"
#include "support/npy.hpp"

namespace kvkeep::generate {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

namespace {

/// `[token, head, dim]` to `[1, head, token, dim]`.
tools::npy_array by_head(std::vector<float> const& v, index_t n_heads, index_t n_tokens,
                         index_t dim) {
  tools::npy_array a;
  a.shape = {1, n_heads, n_tokens, dim};
  for (index_t h = 0; h < n_heads; ++h)
    for (index_t t = 0; t < n_tokens; ++t) {
      auto const at = v.begin() + (offset_t{t} * n_heads + h) * dim;
      a.f32.insert(a.f32.end(), at, at + dim);
    }
  return a;
}

/// Sets of positions, padded with -1.
tools::npy_array padded(std::vector<std::vector<index_t>> const& sets,
                        std::vector<std::int64_t> shape) {
  std::size_t most = 0;
  for (auto const& s : sets) most = std::max(most, s.size());
  tools::npy_array a;
  a.is_float = false;
  a.shape = std::move(shape);
  a.shape.push_back(static_cast<std::int64_t>(most));
  for (auto const& s : sets) {
    a.i32.insert(a.i32.end(), s.begin(), s.end());
    a.i32.insert(a.i32.end(), most - s.size(), -1);
  }
  return a;
}

/// One case folder under way: arrays and the text that names them.
struct case_writer {
  fs::path dir;
  ordered_json meta;

  void add(char const* list, std::string const& name, tools::npy_array const& a) {
    tools::write_npy(dir / (name + ".npy"), a);
    meta[list][name] = {
        {"file", name + ".npy"}, {"dtype", a.is_float ? "float32" : "int32"}, {"shape", a.shape}};
  }
};

}  // namespace

trace_recorder::trace_recorder(policy_request const& request, policy_pair const& policies,
                               model_config const& c)
    : policy_(request.policy),
      config_(c),
      capacity_(request.capacity),
      window_(policies.decode.keep.recent),
      sinks_(policies.decode.keep.sinks),
      max_fused_(request.fusion == reduction::max),
      room_first_(policies.decode.when.room > 0),
      evict_after_(policies.decode.when.evict_after),
      layers_(static_cast<std::size_t>(c.n_layers)) {
  auto const refuse = [](std::string const& what) {
    throw std::invalid_argument("--record: " + what);
  };
  if (policy_ != "h2o" && policy_ != "tova" && policy_ != "streamingllm" && policy_ != "morphkv")
    refuse(policy_ + ": expected h2o, tova, streamingllm or morphkv");
  if (request.granularity != scope::head || !request.layer_budget.empty())
    refuse("expected one set per head and a uniform budget");
  if (policy_ == "tova" && sinks_ > 0) refuse("expected tova without sinks");
}

void trace_recorder::on_token(token const& t) {
  if (id_ < 0) id_ = t.id;
  if (t.id != id_) return;
  auto& l = layers_[static_cast<std::size_t>(t.layer)];
  l.q.insert(l.q.end(), t.q, t.q + config_.q_width());
  l.k.insert(l.k.end(), t.k, t.k + config_.kv_width());
  l.v.insert(l.v.end(), t.v, t.v + config_.kv_width());
  // MorphKV and StreamingLLM with room made first decide before the token comes: the set with it counts.
  if (prompt_ > 0 && (policy_ == "morphkv" || room_first_)) note_kept(t.layer);
}

void trace_recorder::on_attended(index_t layer, index_t id, float const* out) {
  if (id != id_) return;
  auto& l = layers_[static_cast<std::size_t>(layer)];
  l.attention.insert(l.attention.end(), out, out + config_.q_width());
}

void trace_recorder::on_confirmed(std::span<index_t const> ids) {
  if (std::find(ids.begin(), ids.end(), id_) == ids.end()) return;
  if (prompt_ == 0)
    prompt_ = engine_->tokens(id_);
  else
    ++steps_;
  if (policy_ == "morphkv" || room_first_) return;
  for (index_t l = 0; l < config_.n_layers; ++l) note_kept(l);
}

void trace_recorder::note_kept(index_t layer) {
  for (index_t h = 0; h < config_.n_kv_heads; ++h) {
    auto kept = engine_->positions(id_, layer, h);
    kept.erase(std::remove(kept.begin(), kept.end(), -1), kept.end());
    std::sort(kept.begin(), kept.end());
    layers_[static_cast<std::size_t>(layer)].kept.push_back(std::move(kept));
  }
}

void trace_recorder::write_case(fs::path const& dir, std::string const& name,
                                layer_trace const& t) const {
  index_t const heads = config_.n_kv_heads, dim = config_.head_dim;
  bool const streaming = policy_ == "streamingllm";
  // Room is made for a next token that does not come.
  index_t const steps = streaming && room_first_ ? steps_ - 1 : steps_;
  case_writer w{dir, {}};
  w.meta = {{"schema", 1},
            {"name", name},
            {"policy", policy_},
            {"kind", "decode_trace"},
            {"origin", "spec"}};
  w.meta["shape"] = {{"B", 1},        {"Hq", config_.n_q_heads}, {"Hkv", heads},
                     {"T0", prompt_}, {"steps", steps},          {"D", dim}};
  if (streaming)
    w.meta["params"] = {{"start_size", sinks_}, {"recent_size", capacity_ - sinks_}};
  else if (policy_ == "h2o")
    w.meta["params"] = {{"hh_size", capacity_ - window_}, {"recent_size", window_}};
  else if (policy_ == "tova")
    w.meta["params"] = {{"capacity", capacity_}, {"protect_last", window_ > 0}};
  else
    w.meta["params"] = {{"window", window_},
                        {"capacity", capacity_},
                        {"n_query_rows", window_ - 1},
                        {"fusion", max_fused_ ? "max_fused" : "sum_fused"},
                        {"evict_after", evict_after_}};
  w.meta["inputs"] = ordered_json::object();
  w.meta["outputs"] = ordered_json::object();
  if (streaming) {
    std::vector<std::vector<index_t>> first;  // its heads keep the same positions
    for (std::size_t i = 0; i < t.kept.size(); i += static_cast<std::size_t>(heads))
      first.push_back(t.kept[i]);
    w.add("outputs", room_first_ ? "kept_space" : "kept_post", padded(first, {steps + 1}));
  } else {
    w.add("inputs", "q", by_head(t.q, config_.n_q_heads, prompt_ + steps, dim));
    w.add("inputs", "k", by_head(t.k, heads, prompt_ + steps, dim));
    w.add("inputs", "v", by_head(t.v, heads, prompt_ + steps, dim));
    bool const morph = policy_ == "morphkv";
    w.add("outputs", "kept", padded(t.kept, {morph ? steps : steps + 1, 1, heads}));
    if (morph)
      w.add("outputs", "attn_out_kept",
            {{steps, 1, config_.n_q_heads, dim}, true, t.attention, {}});
  }
  std::ofstream out(dir / "case.json");
  out << w.meta.dump(1) << '\n';
  if (!out.flush()) throw bad_input((dir / "case.json").string(), "file", "cannot be written");
}

void trace_recorder::write(fs::path const& dir) const {
  if (steps_ < 2) throw bad_input(dir.string(), "steps", "expected at least 2 decoded tokens");
  std::vector<std::pair<fs::path, fs::path>> folders;  // temporary and final name
  try {
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      std::string const name = "layer_" + std::to_string(l);
      folders.emplace_back(dir / ("." + name + ".part"), dir / name);
      fs::create_directories(folders.back().first);
      write_case(folders.back().first, name, layers_[l]);
    }
    for (auto const& [part, name] : folders) fs::rename(part, name);
  } catch (...) {
    std::error_code ignored;
    for (auto const& [part, name] : folders) fs::remove_all(part, ignored);
    throw;
  }
}

void check_record_folder(fs::path const& dir) {
  std::error_code error;
  bool const there = fs::exists(dir, error);
  if (there && (!fs::is_directory(dir, error) || !fs::is_empty(dir, error)))
    throw bad_input(dir.string(), "folder", "expected a new or empty one");
  if (!there) fs::create_directory(dir, error);
  if (error) throw bad_input(dir.string(), "folder", "cannot be made");
  check_writable(dir / "case.json");
  if (!there) fs::remove(dir, error);
}

}  // namespace kvkeep::generate
