// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// An engine that commits plans itself: due, choose, commit, report; packed and whole blocks, freed blocks and the
/// tables to use from then on.
#pragma once

#include <numeric>
#include <set>

#include "oracle_budget.hpp"
#include "session_run.hpp"

namespace kvkeep::test {

struct pool_options {
  index_t n_layers = 2;
  index_t block = 4;
  bool table_per_head = false;
  bool layers_share = false;  ///< one table for all layers
  index_t n_seq = 2;
};

/// How the engine below talks to a session.
struct host_calls {
  using space = host_space;
  using policy_type = any;
  using session_type = any_session;
  static policy_type make_policy(char const* name, policy_options const& o) {
    return make(name, o);
  }

  cpu::context ctx;
  std::optional<session_type> session;
  void bind(policy_type const& p, policy_type const& d, std::span<layer_spec<> const> specs,
            limits const& lim) {
    session.emplace(bind_session(ctx, p, d, specs, lim));
  }
  struct one {
    index_t ids[1], rows[1];
    batch to_batch() const { return {ids, rows}; }
  };
  status append_at(one const& s, std::int64_t const* map) {
    return session->append_at(s.to_batch(), map);
  }
  status confirm(one const& s) { return session->confirm(s.to_batch(), 1); }
  status choose(one const& s, session_type::plan_type& p) {
    return session->choose(s.to_batch(), p);
  }
  /// What else a session knows.
  void look(one const& s, bool due) {
    REQUIRE(session->due(s.to_batch()) == due);
    REQUIRE(session->verify() == status::ok);
  }
  /// A token before the report of tables, or a plan that has been committed: both are refused.
  void refuse_token(one const& s) {
    REQUIRE(session->append_at(s.to_batch()) == status::bad_order);
  }
  void refuse_plan(one const&, session_type::plan_type const& p) {
    CHECK(session->commit(p) == status::stale_plan);
  }
  static void wait() {}
};

/// A paged cache whose tables the engine rewrites after every report.
template <class Calls>
class block_engine {
 public:
  static constexpr index_t heads = 2, q_heads = 4, dim = 8;
  using policy_type = typename Calls::policy_type;
  using one = typename Calls::one;
  using plan_type = typename Calls::session_type::plan_type;

  block_engine(pool_options const& o, policy_type const& p, limits const& lim)
      : block_engine(o, p, p, lim) {}
  block_engine(pool_options const& o, policy_type const& p, policy_type const& d, limits lim,
               index_t slots = 64)
      : o_(o), per_table_((slots + o.block - 1) / o.block) {
    index_t const n_tables = o.layers_share ? 1 : o.n_layers;
    index_t const rows = o.n_seq * (o.table_per_head ? heads : 1);
    tables_.assign(uz(n_tables), std::vector<index_t>(uz(rows * per_table_), -1));
    n_blocks_ = rows * per_table_ + 2;
    free_.resize(uz(n_tables));
    for (auto& f : free_) {
      f.resize(uz(n_blocks_));
      std::iota(f.begin(), f.end(), 0);
      generator(7).shuffle(f);
    }
    std::size_t const floats = uz(n_blocks_) * uz(o.block) * uz(heads) * uz(dim);
    for (index_t l = 0; l < o.n_layers; ++l) {
      k_.emplace_back(floats, nan_);
      v_.emplace_back(floats, nan_);
    }
    cache_shape const s{o.n_seq, q_heads, heads, dim, dim, per_table_ * o.block};
    for (index_t l = 0; l < o.n_layers; ++l) {
      page_geometry g{o.block,    n_blocks_,        tables_[table_of(l)].data(),
                      per_table_, o.table_per_head, axis_order::nhd};
      views_.push_back(paged_view(k_[uz(l)].data(), v_[uz(l)].data(), s, g));
      specs_.push_back({views_.back()});
    }
    lim.max_sequences = o.n_seq;
    calls_.bind(p, d, specs_, lim);
  }

  auto& session() { return *calls_.session; }
  Calls& calls() { return calls_; }
  std::span<layer_spec<> const> specs() const { return specs_; }
  std::size_t table_of(index_t l) const { return o_.layers_share ? 0 : uz(l); }
  index_t& entry(index_t l, index_t row, index_t h, index_t block) {
    index_t const at = o_.table_per_head ? row * heads + h : row;
    return tables_[table_of(l)][uz(at * per_table_ + block)];
  }
  index_t per_table() const { return per_table_; }

  /// Blocks for `n` slots of a row.
  void grow(index_t l, index_t row, index_t h, index_t n) {
    for (index_t b = 0; b * o_.block < n; ++b)
      if (entry(l, row, h, b) < 0) {
        entry(l, row, h, b) = free_[table_of(l)].back();
        free_[table_of(l)].pop_back();
      }
  }
  void write(index_t l, index_t row, index_t h, index_t slot, text const& t, index_t position) {
    offset_t const at = specs_[uz(l)].kv.k.layout.paged.offset(row, h, slot);
    for (index_t d = 0; d < dim; ++d) {
      k_[uz(l)][uz(at + d)] = static_cast<float>(t.layer[uz(l)].k.at(h, position, d));
      v_[uz(l)][uz(at + d)] = static_cast<float>(t.layer[uz(l)].v.at(h, position, d));
    }
  }
  /// Positions in slot order; every slot must hold the keys of its position.
  oracle::kept_set slots(index_t l, index_t id, index_t row, index_t h, text const& t) {
    oracle::kept_set p;
    for (index_t s = 0; s < session().lengths(l)(id, h); ++s) {
      p.push_back(session().positions(l)(id, h, s));
      offset_t const at = specs_[uz(l)].kv.k.layout.paged.offset(row, h, s);
      for (index_t d = 0; d < dim; ++d) {
        REQUIRE(static_cast<double>(k_[uz(l)][uz(at + d)]) == t.layer[uz(l)].k.at(h, p.back(), d));
        REQUIRE(static_cast<double>(v_[uz(l)][uz(at + d)]) == t.layer[uz(l)].v.at(h, p.back(), d));
      }
    }
    return p;
  }

  void prompt(index_t id, index_t row, text const& t, index_t n) {
    for (index_t l = 0; l < o_.n_layers; ++l) {
      for (index_t h = 0; h < heads; ++h) grow(l, row, h, n);
      for (index_t h = 0; h < heads; ++h)
        for (index_t p = 0; p < n; ++p) write(l, row, h, p, t, p);
      REQUIRE(session().observe(l, id, tokens_only(n), nullptr, row) == status::ok);
      REQUIRE(session().end_prompt(l, id, nullptr, row) == status::ok);
      calls_.wait();
    }
  }
  /// One token at the tail of every layer, checked against the engine's slot mapping where one
  /// serves all.
  void token(index_t id, index_t row, text const& t, index_t position) {
    one const at{{id}, {row}};
    for (index_t l = 0; l < o_.n_layers; ++l)
      for (index_t h = 0; h < heads; ++h) grow(l, row, h, session().lengths(l)(id, h) + 1);
    index_t const slot = session().lengths(0)(id, 0);
    std::vector<std::int64_t> const map{std::int64_t{entry(0, row, 0, slot / o_.block)} * o_.block +
                                        slot % o_.block};
    bool const one_map = !o_.table_per_head && (o_.layers_share || o_.n_layers == 1);
    REQUIRE(calls_.append_at(at, one_map ? map.data() : nullptr) == status::ok);
    calls_.wait();
    for (index_t l = 0; l < o_.n_layers; ++l)
      for (index_t h = 0; h < heads; ++h)
        write(l, row, h, session().lengths(l)(id, h) - 1, t, position);
    REQUIRE(calls_.confirm(at) == status::ok);
    calls_.wait();
  }

  /// Takes the report: the freed blocks are the ones that left the tables. Returns their number.
  index_t adopt(index_t id, index_t row) {
    index_t const n_tables = (o_.layers_share ? 1 : o_.n_layers) * (o_.table_per_head ? heads : 1);
    std::vector<index_t> lengths(uz(o_.n_layers * heads), -9), freed(500, -9),
        freed_of(uz(n_tables), -9), tables(uz(n_tables * per_table_), -9), sizes(uz(n_tables), -9),
        fault(1, -9);
    REQUIRE(session().report(id, {lengths, freed, freed_of, tables, sizes, fault}, row) ==
            status::ok);
    calls_.wait();
    REQUIRE(fault[0] == 0);
    for (index_t l = 0; l < o_.n_layers; ++l)
      for (index_t h = 0; h < heads; ++h)
        REQUIRE(lengths[uz(l * heads + h)] == session().lengths(l)(id, h));
    std::size_t next = 0;
    index_t table = 0, total = 0;
    for (index_t l = 0; l < (o_.layers_share ? 1 : o_.n_layers); ++l)
      for (index_t h = 0; h < (o_.table_per_head ? heads : 1); ++h, ++table) {
        std::multiset<index_t> before, after, gone;
        for (index_t b = 0; b < per_table_ && entry(l, row, h, b) >= 0; ++b)
          before.insert(entry(l, row, h, b));
        for (index_t b = 0; b < sizes[uz(table)]; ++b)
          after.insert(tables[uz(table * per_table_ + b)]);
        for (index_t i = 0; i < freed_of[uz(table)]; ++i) gone.insert(freed[next++]);
        std::multiset<index_t> joined = after;
        joined.insert(gone.begin(), gone.end());
        REQUIRE(joined == before);
        for (index_t b = 0; b < per_table_; ++b)
          entry(l, row, h, b) = b < sizes[uz(table)] ? tables[uz(table * per_table_ + b)] : -1;
        total += freed_of[uz(table)];
        for (index_t const b : gone) release(l, h, b);
      }
    return total;
  }

 private:
  void release(index_t l, index_t h, index_t block) {
    free_[table_of(l)].insert(free_[table_of(l)].begin(), block);
    for (index_t x = 0; x < o_.n_layers; ++x)
      if (table_of(x) == table_of(l))
        for (index_t s = 0; s < o_.block; ++s)
          for (index_t g = 0; g < heads; ++g)
            if (!o_.table_per_head || g == h)
              for (index_t d = 0; d < dim; ++d) {
                auto const at = uz(((offset_t{block} * o_.block + s) * heads + g) * dim + d);
                k_[uz(x)][at] = v_[uz(x)][at] = nan_;
              }
  }

  static constexpr float nan_ = std::numeric_limits<float>::quiet_NaN();
  pool_options o_;
  index_t per_table_, n_blocks_ = 0;
  std::vector<std::vector<index_t>> tables_, free_;
  std::vector<std::vector<float>> k_, v_;
  std::vector<kv_view<float, host_space, paged_layout>> views_;
  std::vector<layer_spec<>> specs_;
  Calls calls_;
};

inline text words_of(std::uint64_t seed, index_t n_layers, index_t n) {
  generator g(seed);
  return make_text(g, {1, 4, 2, 8, 8, 1}, n_layers, n);
}

inline limits own_commits(prompt_offer prompt = prompt_offer::nothing,
                          decode_offer decode = decode_offer::nothing) {
  limits l;
  l.engine_commits = true;
  l.prompt = prompt;
  l.decode = decode;
  return l;
}

/// KNorm in blocks beside the oracle: slot order is position order where nothing moves.
struct block_case {
  pool_options pool;
  policy_options policy;
  index_t prompt = 21;
};

/// What a decision leaves of `live` (per layer, per head).
inline void cut(block_case const& c, text const& t, std::vector<oracle::kept_sets>& live) {
  policy_options const& o = c.policy;
  index_t const layers = c.pool.n_layers;
  oracle::guard const keep{o.sinks.value_or(0), o.window.value(), 0};
  bool due = false;
  for (auto const& l : live)
    for (auto const& h : l)
      due = due ||
            (oracle::count(h) > o.capacity && oracle::count(h) / o.block > o.capacity / o.block);
  if (!due) return;
  std::vector<std::vector<std::vector<double>>> s(uz(layers));
  for (index_t l = 0; l < layers; ++l)
    for (index_t h = 0; h < 2; ++h) {
      s[uz(l)].emplace_back();
      for (index_t p : live[uz(l)][uz(h)])
        s[uz(l)].back().push_back(-oracle::norm(t.layer[uz(l)].k.row(h, p)));
    }
  if (o.per != scope::head) {
    index_t const n = oracle::count(live[0][0]);
    oracle::array all({layers, 2, n});
    for (index_t l = 0; l < layers; ++l)
      for (index_t h = 0; h < 2; ++h)
        for (index_t j = 0; j < n; ++j) all.at(l, h, j) = s[uz(l)][uz(h)][uz(j)];
    for (index_t l = 0; l < layers; ++l)
      for (index_t h = 0; h < 2; ++h)
        s[uz(l)][uz(h)] = o.per == scope::layer ? oracle::layer_scores(all.slice(l))
                                                : oracle::sequence_scores(all);
  }
  for (std::size_t l = 0; l < live.size(); ++l)
    for (std::size_t h = 0; h < 2; ++h)
      live[l][h] = o.whole_blocks
                       ? oracle::select_blocks(s[l][h], live[l][h], o.block, o.capacity, keep)
                       : oracle::select(s[l][h], live[l][h], o.capacity / o.block * o.block, keep);
}

template <class Calls>
void run_blocks(block_case const& c, std::uint64_t seed) {
  block_engine<Calls> e(c.pool, Calls::make_policy("knorm", c.policy), own_commits());
  text const words[] = {words_of(seed, c.pool.n_layers, 90),
                        words_of(seed + 50, c.pool.n_layers, 90)};
  std::vector<std::vector<oracle::kept_sets>> live;
  index_t id[2], freed = 0, cuts = 0;
  index_t const row[] = {1, 0};
  auto const compare = [&](std::size_t i) {
    for (index_t l = 0; l < c.pool.n_layers; ++l)
      for (index_t h = 0; h < 2; ++h) {
        auto got = e.slots(l, id[i], row[i], h, words[i]);
        if (!c.policy.whole_blocks) std::sort(got.begin(), got.end());
        INFO("sequence " << i << " layer " << l << " head " << h);
        REQUIRE(got == live[i][uz(l)][uz(h)]);
      }
  };
  for (std::size_t i = 0; i < 2; ++i) {
    index_t const n = i == 0 ? c.prompt : 3;
    REQUIRE(e.session().begin(id[i]) == status::ok);
    e.prompt(id[i], row[i], words[i], n);
    live.emplace_back(uz(c.pool.n_layers), oracle::kept_sets(2, oracle::iota_positions(n)));
    cut(c, words[i], live.back());
    INFO("end of prompt");
    freed += e.adopt(id[i], row[i]);
    compare(i);
  }
  for (index_t step = 0; step < 60; ++step)
    for (std::size_t i = 0; i < 2; ++i) {
      index_t const position = (i == 0 ? c.prompt : 3) + step;
      e.token(id[i], row[i], words[i], position);
      for (auto& l : live[i])
        for (auto& h : l) h.push_back(position);
      auto const before = live[i];
      cut(c, words[i], live[i]);
      INFO("step " << step << " sequence " << i);
      typename Calls::one const at{{id[i]}, {row[i]}};
      bool const due = before != live[i];
      e.calls().look(at, due);
      if (!due) continue;
      typename decltype(e)::plan_type plan;
      REQUIRE(e.calls().choose(at, plan) == status::ok);
      e.calls().wait();
      REQUIRE(plan.n == 1);
      REQUIRE(plan.n_layers == c.pool.n_layers);
      for (index_t l = 0; l < plan.n_layers;
           ++l)  // nothing has moved, and the plan is the oracle's set
        for (index_t h = 0; h < 2; ++h) {
          oracle::kept_set chosen;
          for (index_t k = 0; k < plan.count(l, h); ++k)
            chosen.push_back(e.session().positions(l)(id[i], h, plan.slots(l, h, k)));
          std::sort(chosen.begin(), chosen.end());
          REQUIRE(chosen == live[i][uz(l)][uz(h)]);
        }
      REQUIRE(e.session().commit(plan) == status::ok);
      if (c.policy.whole_blocks) e.calls().refuse_token(at);  // the table is the engine's to change
      freed += e.adopt(id[i], row[i]);
      compare(i);
      e.calls().look(at, false);
      ++cuts;
      e.calls().refuse_plan(at, plan);
    }
  CHECK(cuts > 5);
  CHECK(freed > 5);
}

inline policy_options block_policy(bool whole, scope per, index_t block = 4) {
  policy_options o;
  o.capacity = 18;
  o.window = 3;
  o.sinks = 1;
  o.block = block;
  o.whole_blocks = whole;
  o.per = per;
  return o;
}

}  // namespace kvkeep::test
