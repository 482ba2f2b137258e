// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <algorithm>
#include <cstdio>
#include <functional>

#include "generate/compare.hpp"

namespace kvkeep::generate {

namespace {

/// A column of estimates; null where a row has none.
struct table_column {
  std::string heading;
  std::function<estimate const*(comparison_row const&)> of;
};

table_column accuracy(std::string const& name, std::string const& heading) {
  return {heading, [name](comparison_row const& r) {
            auto const it = r.columns.find(name);
            return it == r.columns.end() ? nullptr : &it->second;
          }};
}

template <class... A>
std::string formatted(char const* format, A... values) {
  char text[160];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

std::string percent_of(estimate const& e) {
  return e.seeds < 2 ? formatted("%.1f", 100 * e.mean)
                     : formatted("%.1f +-%3.0f", 100 * e.mean, 100 * e.half);
}

/// Three decimals below 10, fewer above.
std::string plain(estimate const& e) {
  int const decimals = e.mean < 10 ? 3 : e.mean < 100 ? 2 : 0;
  return e.seeds < 2 ? formatted("%.*f", decimals, e.mean)
                     : formatted("%.*f +-%.*f", decimals, e.mean, decimals, e.half);
}

struct table {
  std::string title;
  std::vector<table_column> columns;
  std::string (*format)(estimate const&);
  int width;
  bool costs;  ///< bytes and speed behind the columns
};

/// The rows of one budget, and the full cache.
std::string text_of(table const& t, std::vector<comparison_row> const& rows, index_t percent) {
  std::string text = "\n" + std::to_string(percent) + "% of the final length: " + t.title + "\n" +
                     formatted("%-26s", "policy");
  for (table_column const& c : t.columns) text += formatted(" %*s", t.width, c.heading.c_str());
  if (t.costs) text += formatted(" | %8s %8s | %8s", "KV KB", "state KB", "tokens/s");
  text += "\n";
  for (comparison_row const& r : rows) {
    if (r.percent != percent && r.policy != "fullkv") continue;
    text += formatted("%-26s", r.policy.c_str());
    for (table_column const& c : t.columns) {
      estimate const* const e = c.of(r);
      text += formatted(" %*s", t.width, e == nullptr ? "-" : t.format(*e).c_str());
    }
    if (t.costs)
      text += formatted(" | %8.1f %8.1f | %8.0f", static_cast<double>(r.kv_bytes) / 1024,
                        static_cast<double>(r.state_bytes) / 1024, r.tokens_per_second);
    text += "\n";
  }
  return text;
}

table tasks_table() {
  table t{"accuracy in percent, 95% interval over seeds", {}, percent_of, 12, true};
  for (char const* c :
       {"complete", "once", "range", "periodic", "average", "passkey", "recall", "requery"})
    t.columns.push_back(accuracy(c, c));
  return t;
}

table depth_table() {
  table t{"passkeys by depth in the prompt (0%: its start), accuracy in percent",
          {},
          percent_of,
          12,
          false};
  for (int const from : {0, 25, 50, 75})
    t.columns.push_back(accuracy("passkey@" + std::to_string(from),
                                 std::to_string(from) + "-" + std::to_string(from + 25) + "%"));
  return t;
}

/// All rows have the same buckets.
table position_table(std::string const& title, estimate position_bucket::*figure,
                     std::vector<position_bucket> const& buckets) {
  table t{
      title +
          " by position of the predicted token, teacher-forced reference text without questions",
      {},
      plain,
      15,
      false};
  for (std::size_t i = 0; i < buckets.size(); ++i)
    t.columns.push_back({i + 1 == buckets.size() ? "all"
                                                 : std::to_string(buckets[i].from) + "-" +
                                                       std::to_string(buckets[i].to - 1),
                         [i, figure](comparison_row const& r) {
                           return i < r.by_position.size() ? &(r.by_position[i].*figure) : nullptr;
                         }});
  return t;
}

bool any_value(table const& t, std::vector<comparison_row> const& rows) {
  for (comparison_row const& r : rows)
    for (table_column const& c : t.columns)
      if (c.of(r) != nullptr) return true;
  return false;
}

}  // namespace

std::string comparison_text(std::vector<comparison_row> const& rows) {
  std::vector<index_t> percents;
  for (comparison_row const& r : rows)
    if (r.policy != "fullkv" &&
        std::find(percents.begin(), percents.end(), r.percent) == percents.end())
      percents.push_back(r.percent);
  if (percents.empty()) percents.push_back(100);
  std::sort(percents.begin(), percents.end());
  auto const buckets = rows.empty() ? std::vector<position_bucket>{} : rows[0].by_position;
  std::string text;
  std::vector<table> tables{tasks_table()};
  if (!buckets.empty()) {  // a quick comparison has too few episodes for either
    tables.push_back(depth_table());
    tables.push_back(
        position_table("KL divergence from the full cache's prediction, nats per token,",
                       &position_bucket::kl, buckets));
    tables.push_back(position_table("perplexity", &position_bucket::perplexity, buckets));
  }
  for (table const& t : tables) {
    if (!any_value(t, rows)) continue;
    for (index_t const percent : percents) text += text_of(t, rows, percent);
  }
  return text;
}

}  // namespace kvkeep::generate
