// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What kvkeep-replay asks of a backend: everything that a case computes. Arrays are plain host memory here;
/// a backend brings them where its ops read.
#pragma once

#include <kvkeep/budget/pyramid.hpp>
#include <kvkeep/engine/policy_table.hpp>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace kvkeep::replay {

/// A policy, a form of one, or a backend that there is not. `what()` says which, and why where that is not
/// plain.
struct unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The library refused a call of a well-formed case: a failed check, not bad input.
struct call_failed : std::exception {
  explicit call_failed(std::string s) : text(std::move(s)) {}
  char const* what() const noexcept override { return text.c_str(); }
  std::string text;
};

inline void expect(status s, char const* call) {
  if (s != status::ok) throw call_failed(std::string(call) + " returned " + to_string(s));
}

constexpr std::size_t uz(std::int64_t n) { return static_cast<std::size_t>(n); }

/// Rows of different lengths: positions, budgets.
using int_rows = std::vector<std::vector<index_t>>;

/// The tokens of B prompts of equal length in one layer. Arrays are the case's, row-major.
struct prompt_data {
  cache_shape shape{};       ///< n_seq = B, max_slots = tokens
  index_t tokens = 0;        ///< T
  float const* k = nullptr;  ///< [B, kv_head, T, dim_k], or null: zeros
  float const* v = nullptr;  ///< [B, kv_head, T, dim_v], or null: zeros
  float const* q = nullptr;  ///< [B, q_head, q_rows, dim_k] of the last q_rows tokens, or null
  index_t q_rows = 0;
};

/// A policy by name: every backend makes its own from it.
struct chosen {
  std::string name;
  policy_options options{};
};

/// What a policy asks to see of a prompt.
struct prompt_demand {
  evidence shown = evidence::none;
  index_t window = 0;  ///< queries at the end, where it is a window
};

/// B sequences of T0 prompt tokens and `steps` decoded ones. Arrays hold T0 + steps tokens.
struct trace_data {
  prompt_data tokens{};  ///< shape.max_slots = tokens = T0 + steps; q of all tokens, or null
  index_t prompt = 0;    ///< T0
  index_t steps = 0;
};

/// When the live set of a step is written down.
enum class moment : std::uint8_t {
  appended,  ///< the token has its slot, its own step has decided nothing yet
  settled    ///< after the step and its decision
};

struct trace_options {
  moment when = moment::settled;
  bool after_prompt = false;  ///< entry 0 is the set after the prompt
  index_t slots = 0;          ///< slots per head of the cache
  layout_kind layout = layout_kind::strided;
};

/// Looks into a trace while it runs; each may be null. What they see is memory that the host reads.
struct trace_hooks {
  /// Scores of the slots in use, before they decide; what it writes decides instead.
  std::function<void(score_input<> const&, score_map<>)> scored;
  /// The slots after the prompt. `rows` stay in place until the trace ends.
  std::function<void(score_input<> const&)> settled;
  /// Live slots of one head, by ascending position, when its set is written down. `head` counts
  /// sequences, then KV heads.
  std::function<void(index_t seq, index_t head, std::vector<index_t> const& slots)> noted;
};

struct trace_log {
  int_rows kept;                 ///< [entry, B, Hkv] positions, ascending
  std::vector<float> attention;  ///< [step, B, Hq, dim_v], empty without queries
};

/// Scores of some maps, `[map, sequence, kv_head, slot]`, the first `candidates` of which compete.
struct joint_scores {
  index_t n_maps = 1;
  index_t n_seq = 1;
  index_t n_heads = 1;
  index_t slots = 0;
  index_t candidates = 0;
  index_t best_per_head = 0;
  bool normalize = false;
  float const* data = nullptr;
};

/// Splits of totals: rows of up to `width` parts.
struct splits {
  index_t rows = 0;
  index_t width = 0;
  index_t const* total = nullptr;   ///< [row]
  index_t const* parts = nullptr;   ///< [row] how many
  index_t const* weight = nullptr;  ///< [row, width]
  index_t const* cap = nullptr;     ///< [row, width]
};

class backend {
 public:
  virtual ~backend() = default;
  virtual char const* name() const = 0;

  virtual prompt_demand demand_of(chosen const& p, cache_shape const& s) const = 0;
  /// A prompt goes through a session with `n_layers` layers of the same content; positions that `layer`
  /// keeps, ascending, in rows of (sequence, KV head).
  virtual int_rows keep_of_prompt(chosen const& p, prompt_data const& d, layout_kind layout,
                                  index_t n_layers, index_t layer) = 0;
  /// Scores `[B, kv_head, T]` of a policy at the end of the prompt, from its scorer alone; joined over the
  /// heads where one set serves a layer.
  virtual std::vector<float> scores_of_prompt(chosen const& p, prompt_data const& d,
                                              layout_kind layout) = 0;
  /// Without queries no attention is computed: the policy must not need evidence.
  virtual trace_log trace(chosen const& p, trace_data const& t, trace_options const& o,
                          trace_hooks const& hooks = {}) = 0;

  /// Members of the best in each map and head, `[map, sequence, kv_head]`.
  virtual std::vector<index_t> counts(joint_scores const& s) = 0;
  /// DynamicKV's budgets `[layer, kv_head]` after each layer's prompt has ended.
  virtual int_rows budgets(dynamic_layers const& b, index_t window, joint_scores const& s) = 0;
  /// PyramidKV's budget of each layer, for prompts of `tokens`.
  virtual std::vector<index_t> budgets(pyramid const& b, index_t n_layers, index_t window,
                                       index_t tokens) = 0;
  /// Exact parts of totals (`apportion`).
  virtual int_rows parts(splits const& s) = 0;
  /// Slots of the `k[row]` best of `n` scores, `[row, n]`, ascending.
  virtual int_rows select(float const* scores, index_t const* k, index_t rows, index_t n) = 0;
};

std::unique_ptr<backend> make_cpu_backend();

/// A backend whose device this machine lacks.
struct no_device : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// @throws unsupported where this build has none, no_device where no device answers
std::unique_ptr<backend> make_cuda_backend();

}  // namespace kvkeep::replay
