// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Options of policies chosen by name, and which numbers of these a policy reads, with their ranges.
#pragma once

#include <charconv>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "../budget/cake_layers.hpp"
#include "../budget/dynamic_layers.hpp"
#include "../policy/adakv.hpp"
#include "../policy/cake.hpp"
#include "../policy/dynamickv.hpp"
#include "../policy/expected_attention.hpp"
#include "../policy/fullkv.hpp"
#include "../policy/h2o.hpp"
#include "../policy/keydiff.hpp"
#include "../policy/knorm.hpp"
#include "../policy/lagkv.hpp"
#include "../policy/morphkv.hpp"
#include "../policy/pyramidkv.hpp"
#include "../policy/snapkv.hpp"
#include "../policy/streamingllm.hpp"
#include "../policy/tova.hpp"

namespace kvkeep {

/// Options of all policies; a policy reads those that `policy_info::parameters` names for it. Without a value an
/// optional one is what the policy's maker takes.
struct policy_options {
  index_t capacity = uniform{}.tokens;
  /// W; H2O: the recent tokens, half of the capacity if none is given; TOVA: 1 protects the newest token.
  std::optional<index_t> window{};
  std::optional<index_t> sinks{};
  index_t kernel = window_options{}.kernel;
  op::pooling pooling = window_options{}.pooling;
  reduction group = window_options{}.group;
  reduction rows = window_options{}.rows;
  bool group_before_pool = window_options{}.group_before_pool;
  index_t beta = pyramid{}.beta;
  bool exact_total = pyramid{}.exact_total;
  double r_max = dynamickv_options{}.r_max;
  double r_min = dynamickv_options{}.r_min;
  std::optional<index_t> every{};  ///< layers between checkpoints
  double tau1 = cake_options{}.tau1;
  double tau2 = cake_options{}.tau2;
  double gamma = cake_options{}.gamma;
  double alpha = adakv_options{}.alpha;
  bool normalize = adakv_options{}.normalize;
  ada_form form = adakv_options{}.form;
  bool published = false;  ///< DynamicKV's and CAKE's published arithmetic
  reduction fusion = morphkv_options{}.fusion;
  index_t n_rows = morphkv_options{}.n_rows;
  double evict_after = morphkv_options{}.evict_after;
  bool include_current = morphkv_options{}.include_current;
  bool per_head_mask = morphkv_options{}.per_head_mask;
  std::optional<morph_rows> evaluation{};  ///< none: the cheapest that serves the other options
  bool make_room_first = streamingllm_options{}.make_room_first;
  index_t lag = lagkv_options{}.lag;
  bool cross_scoring = lagkv_options{}.cross_scoring;
  rope rotation{};                                      ///< the model's: nobody notices another one
  bool rotated = expected_attention_options{}.rotated;  ///< queries come with it
  index_t ahead = expected_attention_options{}.ahead;
  bool covariance = expected_attention_options{}.covariance;
  bool value_norms = expected_attention_options{}.value_norms;
  double epsilon = expected_attention_options{}.epsilon;
  scope per = scope::head;
  /// Replaces the policy's own budget: "", "uniform", "pyramid", "dynamic", "cake", "ada", "per_head",
  /// "inherit".
  std::string_view budget{};
  std::span<index_t const> head_tokens{};  ///< [layer][kv_head] of budget "per_head"
  index_t block = 1;                       ///< > 1: packed blocks, or whole ones
  bool whole_blocks = false;
};

/// A number that a policy reads, with its range.
struct parameter_info {
  char const* name;
  double least;
  double most;
};

namespace detail {

inline constexpr double big = 2147483647.0;
inline constexpr double token_limit = most_tokens;
inline constexpr parameter_info capacity_only[] = {{"capacity", 1, token_limit}};
inline constexpr parameter_info streaming_parameters[] = {{"capacity", 1, token_limit},
                                                          {"sinks", 0, token_limit}};
inline constexpr parameter_info guarded_parameters[] = {{"capacity", 1, token_limit},
                                                        {"sinks", 0, token_limit},
                                                        {"window", 0, token_limit},
                                                        {"evict_after", 1, 1024}};
inline constexpr parameter_info window_parameters[] = {{"capacity", 2, token_limit},
                                                       {"window", 1, token_limit},
                                                       {"kernel", 1, big},
                                                       {"sinks", 0, token_limit}};
inline constexpr parameter_info pyramid_parameters[] = {{"capacity", 2, token_limit},
                                                        {"window", 1, token_limit},
                                                        {"kernel", 1, big},
                                                        {"sinks", 0, token_limit},
                                                        {"beta", 1, big}};
inline constexpr parameter_info dynamic_parameters[] = {{"capacity", 2, token_limit},
                                                        {"window", 1, token_limit},
                                                        {"kernel", 1, big},
                                                        {"sinks", 0, token_limit},
                                                        {"r_max", 1, 1e6},
                                                        {"r_min", 0, 1},
                                                        {"every", 1, big}};
inline constexpr parameter_info cake_parameters[] = {
    {"capacity", 3, token_limit}, {"window", 2, token_limit}, {"kernel", 1, big},
    {"sinks", 0, token_limit},    {"gamma", 0, 1e9},          {"tau1", 0.05, 20},
    {"tau2", 0.05, 20},           {"every", 1, big}};
inline constexpr parameter_info ada_parameters[] = {{"capacity", 2, token_limit},
                                                    {"window", 1, token_limit},
                                                    {"kernel", 1, big},
                                                    {"sinks", 0, token_limit},
                                                    {"alpha", 0, 1}};
inline constexpr parameter_info h2o_parameters[] = {{"capacity", 1, token_limit},
                                                    {"window", 0, token_limit}};
inline constexpr parameter_info tova_parameters[] = {
    {"capacity", 1, token_limit}, {"window", 0, 1}, {"sinks", 0, token_limit}};
inline constexpr parameter_info morph_parameters[] = {{"capacity", 3, token_limit},
                                                      {"window", 2, token_limit},
                                                      {"n_rows", 0, token_limit},
                                                      {"evict_after", 1, 1024}};
inline constexpr parameter_info lag_parameters[] = {
    {"capacity", 1, token_limit}, {"sinks", 0, token_limit}, {"lag", 1, token_limit}};
inline constexpr parameter_info expected_parameters[] = {{"capacity", 1, token_limit},
                                                         {"sinks", 0, token_limit},
                                                         {"ahead", 1, token_limit},
                                                         {"epsilon", 0, 1}};

/// Calls f(option) for the option of that name. @return whether there is one
template <class F>
bool with_parameter(policy_options& o, std::string_view name, F&& f) {
  auto const is = [&](char const* n, auto& option) { return name == n && (f(option), true); };
  return is("capacity", o.capacity) || is("window", o.window) || is("sinks", o.sinks) ||
         is("kernel", o.kernel) || is("beta", o.beta) || is("r_max", o.r_max) ||
         is("r_min", o.r_min) || is("every", o.every) || is("gamma", o.gamma) ||
         is("tau1", o.tau1) || is("tau2", o.tau2) || is("alpha", o.alpha) ||
         is("n_rows", o.n_rows) || is("evict_after", o.evict_after) || is("lag", o.lag) ||
         is("ahead", o.ahead) || is("epsilon", o.epsilon);
}

/// In the fewest digits that mean this value: refusals name it.
inline std::string number_text(double value) {
  char text[32];
  auto const end = std::to_chars(text, text + sizeof text, value).ptr;
  return {text, end};
}

}  // namespace detail

}  // namespace kvkeep
