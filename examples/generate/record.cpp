// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/record.hpp"

#include <algorithm>
#include <fstream>
#include <string_view>

#include <nlohmann/json.hpp>

#include "generate/file.hpp"
#include "support/npy.hpp"
#include "support/watched_score.hpp"

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

}  // namespace

/// One case folder under way: arrays and the text that names them.
struct trace_recorder::case_writer {
  fs::path dir;
  ordered_json meta;

  void add(char const* list, std::string const& name, tools::npy_array const& a) {
    tools::write_npy(dir / (name + ".npy"), a);
    meta[list][name] = {
        {"file", name + ".npy"}, {"dtype", a.is_float ? "float32" : "int32"}, {"shape", a.shape}};
  }
};

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
  std::string_view constexpr known[] = {"h2o",     "tova",  "streamingllm",
                                        "morphkv", "knorm", "keydiff"};
  if (std::find(std::begin(known), std::end(known), policy_) == std::end(known))
    refuse(policy_ + ": expected h2o, tova, streamingllm, morphkv, knorm or keydiff");
  if (request.granularity != scope::head || !request.layer_budget.empty())
    refuse("expected one set per head and a uniform budget");
  if (policy_ == "tova" && sinks_ > 0) refuse("expected tova without sinks");
}

policy_pair trace_recorder::watched(policy_pair p) {
  if (policy_ != "h2o") return p;
  tools::watched_score see;
  see.settled = [this](score_input<> const& in) {
    if (settled_ < layers_.size()) layers_[settled_++].rows = in.rows;
  };
  see.scored = [this](score_input<> const& in, score_map<> sums) {
    bool const first_prompt = in.newest_row == nullptr && prompt_ == 0;
    if (first_prompt && scored_ < layers_.size()) note_prompt_sums(in, sums);
  };
  p.prompt = p.decode = tools::watch(p.decode, see);
  return p;
}

void trace_recorder::note_prompt_sums(score_input<> const& in, score_map<> sums) {
  auto& all = layers_[scored_++].prompt_sums;
  for (index_t h = 0; h < config_.n_kv_heads; ++h) {
    float const* const first = sums.at(0, h);
    all.insert(all.end(), first, first + in.layer.slots.lengths(in.batch.id_of(0), h));
  }
}

/// MorphKV, and StreamingLLM where room is made first, decide before the token comes: the set with it counts.
bool trace_recorder::decides_first() const { return policy_ == "morphkv" || room_first_; }

void trace_recorder::on_token(token const& t) {
  if (id_ < 0) id_ = t.id;
  if (t.id != id_) return;
  auto& l = at(t.layer);
  l.q.insert(l.q.end(), t.q, t.q + config_.q_width());
  l.k.insert(l.k.end(), t.k, t.k + config_.kv_width());
  l.v.insert(l.v.end(), t.v, t.v + config_.kv_width());
  if (prompt_ > 0 && decides_first()) note_kept(t.layer);
}

void trace_recorder::on_attended(index_t layer, index_t id, float const* out) {
  if (id != id_) return;
  auto& l = at(layer);
  l.attention.insert(l.attention.end(), out, out + config_.q_width());
}

void trace_recorder::on_confirmed(std::span<index_t const> ids) {
  if (std::find(ids.begin(), ids.end(), id_) == ids.end()) return;
  bool const prompt = prompt_ == 0;
  if (prompt)
    prompt_ = engine_->tokens(id_);
  else
    ++steps_;
  if (decides_first() || (prompt && policy_ == "streamingllm")) return;
  for (index_t l = 0; l < config_.n_layers; ++l) note_kept(l);
}

void trace_recorder::note_kept(index_t layer) {
  auto& l = at(layer);
  float const mean = static_cast<float>(config_.n_kv_heads) / static_cast<float>(config_.n_q_heads);
  for (index_t h = 0; h < config_.n_kv_heads; ++h) {
    auto const slots = engine_->positions(id_, layer, h);
    std::vector<std::pair<index_t, index_t>> live;  // position and slot
    for (std::size_t i = 0; i < slots.size(); ++i)
      if (slots[i] >= 0) live.emplace_back(slots[i], static_cast<index_t>(i));
    std::sort(live.begin(), live.end());
    auto& kept = l.kept.emplace_back();
    for (auto const& [position, slot] : live) kept.push_back(position);
    if (l.rows.data == nullptr) continue;
    auto& sums = l.sums.emplace_back();
    for (auto const& [position, slot] : live)
      sums.push_back(tools::heavy_hitter_sum(l.rows, id_, h, slot, mean));
  }
}

void trace_recorder::add_parameters(case_writer& w) const {
  auto& p = w.meta["params"];
  if (policy_ == "streamingllm")
    p = {{"start_size", sinks_}, {"recent_size", capacity_ - sinks_}};
  else if (policy_ == "h2o")
    p = {{"hh_size", capacity_ - window_}, {"recent_size", window_}};
  else if (policy_ == "tova")
    p = {{"capacity", capacity_}, {"protect_last", window_ > 0}};
  else if (policy_ == "morphkv")
    p = {{"window", window_},
         {"capacity", capacity_},
         {"n_query_rows", window_ - 1},
         {"fusion", max_fused_ ? "max_fused" : "sum_fused"},
         {"evict_after", evict_after_}};
  else
    p = {{"capacity", capacity_},
         {"n_sink", sinks_},
         {"window", window_},
         {"evict_after", evict_after_}};
}

/// Both published forms hold the same tokens. What is seen of a step is its set with the new token: the set
/// that attends, where room is made first, and the set that is left, where it is made afterwards.
void trace_recorder::add_streaming(case_writer& w, layer_trace const& t) const {
  auto const heads = static_cast<std::size_t>(config_.n_kv_heads);
  position_sets space, post(1);
  for (index_t i = 0; i < prompt_; ++i)  // no step sees what room afterwards leaves of the prompt
    if (i < sinks_ || i >= prompt_ - (capacity_ - sinks_)) post[0].push_back(i);
  for (std::size_t i = 0; i < t.kept.size(); i += heads) space.push_back(t.kept[i]);
  post.insert(post.end(), space.begin(), space.end() - 1);
  w.add("outputs", "kept_post", padded(post, {steps_}));
  w.add("outputs", "kept_space", padded(space, {steps_}));
}

void trace_recorder::add_inputs(case_writer& w, layer_trace const& t) const {
  index_t const n = prompt_ + steps_, dim = config_.head_dim;
  w.add("inputs", "q", by_head(t.q, config_.n_q_heads, n, dim));
  w.add("inputs", "k", by_head(t.k, config_.n_kv_heads, n, dim));
  w.add("inputs", "v", by_head(t.v, config_.n_kv_heads, n, dim));
}

void trace_recorder::add_sums(case_writer& w, layer_trace const& t) const {
  tools::npy_array a;
  a.shape = padded(t.kept, {steps_ + 1, 1, config_.n_kv_heads}).shape;
  for (auto const& s : t.sums) {
    a.f32.insert(a.f32.end(), s.begin(), s.end());
    a.f32.resize(a.f32.size() + static_cast<std::size_t>(a.shape.back()) - s.size());
  }
  w.add("outputs", "acc", a);
  if (!t.prompt_sums.empty())
    w.add("outputs", "acc_prompt", {{1, config_.n_kv_heads, prompt_}, true, t.prompt_sums, {}});
}

void trace_recorder::add_morphkv(case_writer& w, layer_trace const& t) const {
  tools::npy_array lens{{steps_}, false, {}, {}}, evicted = lens;
  auto before = static_cast<std::size_t>(prompt_);
  for (std::size_t i = 0; i < t.kept.size(); i += static_cast<std::size_t>(config_.n_kv_heads)) {
    std::size_t const n = t.kept[i].size();
    lens.i32.push_back(static_cast<std::int32_t>(n));
    evicted.i32.push_back(n < before + 1 ? 1 : 0);
    before = n;
  }
  w.add("outputs", "lens", lens);
  w.add("outputs", "evicted", evicted);
  w.add("outputs", "attn_out_kept",
        {{steps_, 1, config_.n_q_heads, config_.head_dim}, true, t.attention, {}});
}

void trace_recorder::write_case(fs::path const& dir, std::string const& name,
                                layer_trace const& t) const {
  bool const streaming = policy_ == "streamingllm", morph = policy_ == "morphkv";
  index_t const heads = config_.n_kv_heads;
  case_writer w{dir, {}};
  w.meta = {{"schema", 1},
            {"name", name},
            {"policy", policy_},
            {"kind", "decode_trace"},
            {"origin", "spec"}};
  // StreamingLLM's entries are steps_ in number, and there is one more than there are steps.
  w.meta["shape"] = {{"B", 1},
                     {"Hq", config_.n_q_heads},
                     {"Hkv", heads},
                     {"T0", prompt_},
                     {"steps", streaming ? steps_ - 1 : steps_},
                     {"D", config_.head_dim}};
  add_parameters(w);
  w.meta["inputs"] = ordered_json::object();
  w.meta["outputs"] = ordered_json::object();
  if (streaming) {
    add_streaming(w, t);
  } else {
    add_inputs(w, t);
    w.add("outputs", "kept", padded(t.kept, {morph ? steps_ : steps_ + 1, 1, heads}));
  }
  if (policy_ == "h2o") add_sums(w, t);
  if (morph) add_morphkv(w, t);
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
