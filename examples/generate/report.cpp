// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/report.hpp"

#include <sys/resource.h>

#include <cstdio>

#include <nlohmann/json.hpp>

namespace kvkeep::generate {

namespace {

double ratio(double a, double b) { return b > 0 ? a / b : 0; }

/// Kilobytes that the program has held at most.
long peak_memory() {
  rusage u{};
  return getrusage(RUSAGE_SELF, &u) == 0 ? u.ru_maxrss : 0;
}

double per_second(std::int64_t n, double seconds) { return ratio(static_cast<double>(n), seconds); }

}  // namespace

void print_report(run_figures const& f) {
  engine_usage const& u = f.usage;
  double const busy = u.prefill + u.decode;
  std::string const kept =
      f.evicts ? std::to_string(f.capacity) + " tokens per KV head" : "all tokens kept";
  std::printf("\n%s, %s, %s cache, %d thread%s\n", f.policy.c_str(), kept.c_str(), f.layout.c_str(),
              f.threads, f.threads == 1 ? "" : "s");
  std::printf("  prefill    %8.0f tokens/s  (%lld tokens)\n",
              per_second(u.prompt_tokens, u.prefill), static_cast<long long>(u.prompt_tokens));
  std::printf("  decode     %8.0f tokens/s  (%lld tokens)\n",
              per_second(u.decoded_tokens, u.decode), static_cast<long long>(u.decoded_tokens));
  std::printf(
      "  cache      %8zu bytes of K and V at most, %zu of policy state; full cache %zu (%.1f%%)\n",
      u.peak_bytes(), u.state_bytes, f.full_bytes,
      100 * ratio(static_cast<double>(f.bytes()), static_cast<double>(f.full_bytes)));
  if (u.peak_blocks > 0)
    std::printf("  blocks     %8zu at most, %zu bytes\n", u.peak_blocks,
                u.peak_blocks * u.block_bytes);
  std::printf("  evictions  %8lld slots, %lld of them reused in place, %lld cuts\n",
              static_cast<long long>(u.count.evicted), static_cast<long long>(u.count.victims),
              static_cast<long long>(u.count.cuts));
  std::printf(
      "  eviction   %8.1f%% of the time (session calls; of attention what exceeds attention "
      "alone, %lld samples)\n",
      100 * ratio(u.eviction(), busy), static_cast<long long>(u.sampled_steps));
  std::printf("  memory     %8ld KB at most, weights included\n", peak_memory());
  if (f.checks > 0) std::printf("  checks     %8d of %d held\n", f.checks_held, f.checks);
}

std::string to_json(run_figures const& f) {
  engine_usage const& u = f.usage;
  nlohmann::ordered_json j;
  j["schema"] = 1;
  j["model"] = f.model_file;
  j["policy"] = f.policy;
  j["evicts"] = f.evicts;
  j["capacity"] = f.capacity;
  j["slots_per_head"] = f.slots_per_head;
  j["layout"] = f.layout;
  j["threads"] = f.threads;
  j["prompt"] = f.prompt;
  j["tokens"] = f.written;
  if (!f.text.empty()) j["text"] = f.text;
  j["prefill"] = {{"tokens", u.prompt_tokens},
                  {"seconds", u.prefill},
                  {"tokens_per_second", per_second(u.prompt_tokens, u.prefill)}};
  j["decode"] = {{"tokens", u.decoded_tokens},
                 {"steps", u.steps},
                 {"seconds", u.decode},
                 {"tokens_per_second", per_second(u.decoded_tokens, u.decode)}};
  j["bytes"] = {{"kv_peak", u.peak_bytes()},
                {"state", u.state_bytes},
                {"full", f.full_bytes},
                {"share", ratio(static_cast<double>(f.bytes()), static_cast<double>(f.full_bytes))},
                {"session", u.session_bytes},
                {"blocks_peak", u.peak_blocks * u.block_bytes}};
  j["peak_memory_kb"] = peak_memory();
  j["evictions"] = {{"slots", u.count.evicted},
                    {"victims", u.count.victims},
                    {"cuts", u.count.cuts},
                    {"moved_bytes", u.count.moved_bytes}};
  j["seconds"] = {{"observe", u.observe},
                  {"end_prompt", u.end_prompt},
                  {"append", u.append},
                  {"attend", u.attend},
                  {"confirm", u.confirm},
                  {"sampled_attend", u.sampled_attend},
                  {"sampled_attention_alone", u.sampled_plain},
                  {"sampled_steps", u.sampled_steps},
                  {"eviction", u.eviction()}};
  j["eviction_share"] = ratio(u.eviction(), u.prefill + u.decode);
  if (f.checks > 0) j["checks"] = {{"held", f.checks_held}, {"of", f.checks}};
  return j.dump(1) + "\n";
}

}  // namespace kvkeep::generate
