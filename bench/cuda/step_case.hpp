// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Layers under a device session, what an engine does around it, and what must hold afterwards.
#pragma once

#include <optional>

#include <kvkeep/cuda.cuh>
#include <kvkeep/engine/device_session.hpp>

#include "suite.hpp"

namespace bench {

/// What an engine without a session does with new rows. Index: entry, KV head, feature.
struct write_token {
  bf16 *k, *v;
  bf16 const *new_k, *new_v;  ///< [entry, kv_head, dim]
  index_t const* slots;       ///< [entry, kv_head]
  index_t dim;
  KVKEEP_HD void operator()(index_t i) const {
    index_t const head = i / dim;
    offset_t const at = static_cast<offset_t>(head + slots[head]) * dim + i % dim;
    k[at] = new_k[i];
    v[at] = new_v[i];
  }
};

/// Caches of some layers under one session, queries and new rows of `tokens` tokens for each. With `drafts` tokens are
/// drafts, so many at a time.
template <class Policy>
class step_case {
 public:
  step_case(suite& s, point const& p, Policy const& policy, std::size_t layers, std::size_t tokens,
            index_t drafts = 0)
      : s_(s),
        p_(p),
        layers_(layers),
        tokens_(tokens),
        drafts_(drafts),
        slots_(p.capacity + 1 + drafts) {
    k_ = {layers, plane_bytes(p, slots_)};
    v_ = {layers, plane_bytes(p, slots_)};
    auto const heads = product(p.batch, p.kv_heads), rows = heads * product(p.group, p.dim);
    q_ = {tokens * layers, rows};
    out_ = {layers, rows};
    plain_out_ = {layers, rows};
    new_k_ = {tokens * layers, heads * product(p.dim)};
    new_v_ = {tokens * layers, heads * product(p.dim)};
    plain_slot_ = {1, heads};
    plain_k_ = {layers, heads * product(p.dim)};
    plain_v_ = {layers, heads * product(p.dim)};
    lengths_ = {1, heads};
    numbers_ = {1, product(p.batch)};
    accepted_ = {1, product(p.batch)};
    fill_random(s.ctx, k_.data(), p.type, k_.size() / sizeof(bf16), 11);
    fill_random(s.ctx, v_.data(), p.type, v_.size() / sizeof(bf16), 12);
    fill(s.ctx, heads, counted{plain_slot_.data(), 0, 1});
    fill(s.ctx, heads, counted{lengths_.data(), slots_, 1});
    fill(s.ctx, product(p.batch), counted{numbers_.data(), 0, p.batch});
    fill(s.ctx, product(p.batch), counted{accepted_.data(), drafts, 1});
    out_.poison();
    plain_out_.poison();
    bind(policy);
    tickets_ = {1, rows};
    fill(s.ctx, rows, counted{tickets_.data(), 0, 1});
    memory_plain_ = scratch_for(s.ctx, plain(0));
  }

  /// Decisions run in the suite's second context.
  void decide_aside() {
    memory_aside_ = {1, session_->aside_bytes(s_.aside)};
    std::span<std::byte> const memory(memory_aside_.data(), memory_aside_.size());
    expect(session_->decide_in(s_.aside, memory), "decide_in");
  }
  /// Prompts that fill the capacity.
  void fill_prompts(bool all_queries) {
    index_t const q_heads = p_.kv_heads * p_.group, n = p_.capacity;
    index_t const rows = all_queries ? n : std::min(p_.window, n);
    rotated<float> const q(1, product(q_heads, rows, p_.dim));
    queries shown = make_queries(q.data(), q_heads, rows, p_.dim);
    shown.tokens = n;
    for (index_t i = 0; i < p_.batch; ++i) {
      fill_queries(s_.ctx, q, p_.type, 13 + static_cast<std::uint64_t>(i));
      index_t id = 0;
      expect(session_->begin(id), "begin");
      for (index_t l = 0; l < static_cast<index_t>(layers_); ++l) {
        expect(session_->observe(l, id, shown), "observe");
        expect(session_->end_prompt(l, id), "end_prompt");
      }
      wait_for(s_.ctx.stream);  // the queries change
    }
  }

  /// Queries, keys and values of the next tokens, untimed.
  void next_tokens() {
    auto const draw = [&](std::size_t n, auto numbers) {
      workspace none(std::span<std::byte>{});
      numbers.seed = scrambled(++draws_);
      op::for_each<decltype(numbers), device_space> const o{static_cast<index_t>(n), numbers};
      expect(run(s_.ctx, o, none), "the next tokens");
    };
    draw(q_.size(), rounded_numbers<bf16>{q_.data(), 0});
    draw(new_k_.size(), normal_numbers<bf16>{new_k_.data(), 0});
    draw(new_v_.size(), normal_numbers<bf16>{new_v_.data(), 0});
  }
  /// A token in every layer.
  void step(std::size_t token) {
    for (std::size_t l = 0; l < layers_; ++l) {
      auto const layer = static_cast<index_t>(l);
      auto const at = token * layers_ + l;
      token_kv const rows = make_token_kv(new_k_.at(at), new_v_.at(at), specs_[l].kv.shape);
      token_io const t{rows, shown(token, l), out_.at(l)};
      expect(session_->decode(layer, entries(), t), "decode");
    }
    expect(session_->join(), "join");
  }
  /// Accepts all drafts.
  void confirm() { expect(session_->confirm(entries(), accepted_.data()), "confirm"); }
  /// The same without a session, which owns the caches: new rows go to slots beside them.
  void plain_step(std::size_t token) {
    for (std::size_t l = 0; l < layers_; ++l) {
      auto const at = token * layers_ + l;
      workspace none(std::span<std::byte>{});
      op::for_each<write_token, device_space> const write{
          static_cast<index_t>(new_k_.per_set()),
          {plain_k_.at(l), plain_v_.at(l), new_k_.at(at), new_v_.at(at), plain_slot_.data(),
           p_.dim}};
      expect(run(s_.ctx, write, none), "write");
      auto o = plain(l);
      o.q.data = q_.at(token * layers_ + l);
      workspace ws = placed_in(memory_plain_);
      expect(enqueue(s_.ctx, o, ws), "attend");
    }
  }

  /// Work of a step in one layer: what attention reads, and the new rows.
  work work_of_step() const {
    double const rows = 1.0 * p_.batch * p_.kv_heads * p_.group;
    work w;
    w.read = static_cast<double>(k_.per_set() + v_.per_set()) + rows * p_.dim * 4;
    w.moved = 8.0 * p_.batch * p_.kv_heads * p_.dim + rows * p_.dim * 4;
    w.mma = 4 * rows * slots_ * p_.dim;
    w.exps = rows * slots_;
    return w;
  }

  /// What is wrong after `steps` tokens beyond the prompts.
  std::string fault(index_t steps) const {
    if (!written(out_) || !written(plain_out_)) return "some outputs were not written";
    std::vector<index_t> sticky(product(p_.batch));
    copy_to_host(sticky.data(), session_->faults(), sticky.size() * sizeof(index_t));
    for (index_t f : sticky)
      if (f != 0) return "a sequence has a fault";
    for (std::size_t l = 0; l < layers_; ++l)
      if (std::string const what = fault_of_layer(static_cast<index_t>(l), steps); !what.empty())
        return what;
    return "";
  }

 private:
  using session_type = device_session<cuda::context, Policy, Policy>;

  void bind(Policy const& policy) {
    for (std::size_t l = 0; l < layers_; ++l)
      specs_.push_back({cache_view<device_space>(p_, slots_, k_.at(l), v_.at(l))});
    limits lim;
    lim.max_sequences = p_.batch;
    lim.max_draft = drafts_;
    std::span<layer_spec<device_space> const> const specs(specs_);
    memory_ = {1, device_session_bytes(s_.ctx, policy, policy, specs, lim)};
    session_.emplace(bind_device_session(s_.ctx, policy, policy, specs, lim,
                                         std::span<std::byte>(memory_.data(), memory_.size())));
  }
  template <int R>
  static std::vector<index_t> read(tensor_ref<index_t const, R, device_space> const& t) {
    std::vector<index_t> all(product(t.extent[0], t.stride[0]));
    copy_to_host(all.data(), t.data, all.size() * sizeof(index_t));
    return all;
  }
  std::string fault_of_layer(index_t layer, index_t steps) const {
    auto const lengths = session_->lengths(layer);
    auto const positions = session_->positions(layer);
    std::vector<index_t> const length = read(lengths), position = read(positions);
    for (index_t i = 0; i < p_.batch * p_.kv_heads; ++i) {
      index_t const id = i / p_.kv_heads, h = i % p_.kv_heads;
      index_t const n = length[static_cast<std::size_t>(lengths.offset(id, h))];
      if (n != (drafts_ > 0 ? p_.capacity : slots_)) return "a head is not at its capacity";
      auto const first = position.begin() + positions.offset(id, h);
      std::vector<index_t> live(first, first + n);
      std::sort(live.begin(), live.end());
      if (std::adjacent_find(live.begin(), live.end()) != live.end())
        return "a position occurs twice";
      // A cut may drop the newest token too.
      index_t const newest = p_.capacity + steps - 1;
      if (drafts_ > 0 ? live.back() > newest : live.back() != newest)
        return "the newest token is not there";
    }
    return "";
  }
  batch_ref<device_space> entries() const { return {p_.batch, numbers_.data(), numbers_.data()}; }
  queries shown(std::size_t token, std::size_t l) const {
    float const* const q = q_.at(token * layers_ + l);
    return make_queries(q, p_.kv_heads * p_.group, 1, p_.dim);
  }
  op::attend<device_space> plain(std::size_t l) const {
    index_t const q_heads = p_.kv_heads * p_.group;
    op::attend<device_space> o;
    o.batch.n = p_.batch;
    o.layer.kv = specs_[l].kv;
    o.layer.slots.lengths = row_major<device_space>(lengths_.data(), p_.batch, p_.kv_heads);
    o.q = row_major<device_space>(static_cast<float const*>(q_.data()), p_.batch, q_heads, p_.dim);
    o.out = row_major<device_space>(plain_out_.at(l), p_.batch, q_heads, p_.dim);
    o.tickets = tickets_.data();
    return o;
  }

  suite& s_;
  point p_;
  std::size_t layers_, tokens_;
  index_t drafts_, slots_;
  rotated<std::byte> k_, v_, memory_, memory_aside_, memory_plain_;
  rotated<float> q_, out_, plain_out_;
  rotated<bf16> new_k_, new_v_, plain_k_, plain_v_;
  rotated<index_t> plain_slot_, tickets_, lengths_, numbers_, accepted_;
  std::vector<layer_spec<device_space>> specs_;
  std::optional<session_type> session_;
  std::uint64_t draws_ = 0;
};

}  // namespace bench
