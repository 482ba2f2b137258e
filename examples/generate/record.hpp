// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Records a generated sequence as cases for kvkeep-replay: queries, keys, values and kept sets per layer.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "generate/engine.hpp"

namespace kvkeep::generate {

/// Watches the first sequence that an engine begins. Outlives the engine.
class trace_recorder final : public step_observer {
 public:
  /// @throws std::invalid_argument for a policy that decode_trace cases do not know
  trace_recorder(policy_request const& request, policy_pair const& policies, model_config const& c);

  /// The same policies, with a view of what cannot be told from kept sets: H2O's sums. For the engine.
  policy_pair watched(policy_pair p);
  /// The engine that is watched; before its first sequence begins.
  void watch(engine const& e) { engine_ = &e; }
  void on_token(token const& t) override;
  void on_attended(index_t layer, index_t id, float const* out) override;
  void on_confirmed(std::span<index_t const> ids) override;

  /// Writes `dir`/layer_N for all layers, each under a temporary name until it is complete. H2O's cases hold
  /// the sums `acc` in kept order and, where the prompt was cut, `acc_prompt` `[1, kv_head, T0]` before that.
  void write(std::filesystem::path const& dir) const;

 private:
  using position_sets = std::vector<std::vector<index_t>>;
  struct layer_trace {
    std::vector<float> q, k, v;            ///< [token, head, dim]
    std::vector<float> attention;          ///< [step, q_head, dim]
    position_sets kept;                    ///< [entry, kv_head] ascending positions
    std::vector<std::vector<float>> sums;  ///< [entry, kv_head] H2O: of the kept positions
    std::vector<float> prompt_sums;        ///< [kv_head, token] H2O: where the prompt was cut
    tensor_ref<float, 4> rows{};           ///< the session's, where H2O sums
  };
  struct case_writer;
  layer_trace& at(index_t layer) { return layers_[static_cast<std::size_t>(layer)]; }
  bool decides_first() const;
  void note_kept(index_t layer);
  void note_prompt_sums(score_input<> const& in, score_map<> sums);
  void add_parameters(case_writer& w) const;
  void add_streaming(case_writer& w, layer_trace const& t) const;
  void add_inputs(case_writer& w, layer_trace const& t) const;
  void add_sums(case_writer& w, layer_trace const& t) const;
  void add_morphkv(case_writer& w, layer_trace const& t) const;
  void write_case(std::filesystem::path const& dir, std::string const& name,
                  layer_trace const& t) const;

  std::string policy_;
  model_config config_;
  index_t capacity_, window_, sinks_;
  bool max_fused_, room_first_;
  double evict_after_;
  engine const* engine_ = nullptr;
  index_t id_ = -1;
  index_t prompt_ = 0;  ///< tokens; 0: under way
  index_t steps_ = 0;
  std::size_t settled_ = 0, scored_ = 0;  ///< layers of the prompt, which come in order
  std::vector<layer_trace> layers_;
};

/// @throws bad_input unless the folder is new or empty, and can be made
void check_record_folder(std::filesystem::path const& dir);

}  // namespace kvkeep::generate
