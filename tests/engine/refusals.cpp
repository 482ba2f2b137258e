// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Everything that cannot work is refused when it is bound; the message names field, value and
// range.
#include <limits>

#include "../support/catch.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// `text` contains `part`; prints both when it does not.
void has(std::string const& text, std::string const& part) {
  INFO(text);
  INFO("should contain: " << part);
  CHECK(text.find(part) != std::string::npos);
}

constexpr index_t huge = std::numeric_limits<index_t>::max();

/// A good binding that a case spoils.
struct binding {
  std::string prompt = "snapkv", decode{};  ///< decode: empty means one policy
  policy_options p{}, d{};
  cache_options cache{};
  index_t n_layers = 2;
  limits lim{};

  binding() {
    p.capacity = d.capacity = 16;
    p.window = d.window = 4;
    cache.shape = {2, 4, 2, 8, 6, 40};
    lim.max_sequences = 2;
  }
  std::string message() const {
    return refusal([&] {
      std::vector<test_cache> caches;
      std::vector<layer_spec<>> specs;
      for (index_t l = 0; l < n_layers; ++l) caches.emplace_back(cache);
      for (auto const& c : caches) specs.push_back({c.ref()});
      cpu::context ctx;
      any const a = make(prompt, p);
      any const b = decode.empty() ? a : make(decode, d);
      (void)bind_session(ctx, a, b, std::span<layer_spec<> const>(specs), lim);
    });
  }
};

template <class F>
binding with(F&& edit) {
  binding b;
  edit(b);
  return b;
}
template <class F>
binding with(char const* policy, F&& edit) {
  binding b;
  b.prompt = policy;
  edit(b);
  return b;
}

void refused(binding const& b, std::string const& field, std::string const& value,
             std::string const& allowed) {
  std::string const m = b.message();
  INFO(b.prompt << " " << b.decode << ": " << m);
  has(m, field + " = " + value);
  auto const at = m.find("allowed: ");
  REQUIRE(at != std::string::npos);
  has(m.substr(at), allowed);
}

void accepted(binding const& b) {
  INFO(b.prompt << " " << b.decode);
  CHECK(b.message() == "accepted");
}

}  // namespace

TEST_CASE("good bindings are accepted") {
  for (char const* name :
       {"fullkv", "streamingllm", "snapkv", "pyramidkv", "dynamickv", "cake", "adakv", "h2o",
        "observed_attention", "expected_attention", "tova", "morphkv", "knorm", "keydiff", "lagkv"})
    accepted(with(name, [](auto&) {}));
}

TEST_CASE("unknown names are refused and the known ones listed") {
  refused(with("snapkvv", [](auto&) {}), "policy", "snapkvv", "snapkv, pyramidkv");
  refused(with("", [](auto&) {}), "policy", "", "fullkv, streamingllm");
  refused(with([](auto& b) { b.p.budget = "pyramids"; }), "budget", "pyramids", "uniform, pyramid");
}

TEST_CASE("a policy that nobody has made is refused") {
  binding const b;
  test_cache const cache(b.cache);
  layer_spec<> const spec{cache.ref()};
  any const none{}, good = make(b.prompt, b.p);
  auto const message = [&](any const& prompt, any const& decode) {
    cpu::context ctx;
    return refusal([&] {
      (void)bind_session(ctx, prompt, decode, std::span<layer_spec<> const>(&spec, 1), b.lim);
    });
  };
  has(message(none, none), "policy = none, allowed: one of make_policy's");
  has(message(good, none), "policy = none");
  has(message(none, good), "policy = none");
  has(refusal([&] { check_policy(none, 1, b.cache.shape); }), "policy = none");
}

TEST_CASE("capacity, window and sinks") {
  for (char const* name : {"snapkv", "pyramidkv", "dynamickv", "cake", "adakv", "h2o", "morphkv",
                           "knorm", "keydiff"}) {
    refused(with(name, [](auto& b) { b.p.capacity = 4; }), "capacity", "4", "> sinks + window = 4");
    refused(with(name, [](auto& b) { b.p.capacity = 3; }), "capacity", "3", "> sinks + window = 4");
    refused(with(name, [](auto& b) { b.p.capacity = 0; }), "capacity", "0", "> sinks + window = 4");
    refused(with(name, [](auto& b) { b.p.capacity = -5; }), "capacity", "-5", "0..");
    accepted(with(name, [](auto& b) { b.p.capacity = 5; }));
  }
  for (char const* name :
       {"snapkv", "pyramidkv", "dynamickv", "cake", "adakv", "knorm", "keydiff"}) {
    refused(with(name, [](auto& b) { b.p.sinks = 12; }), "capacity", "16", "> sinks + window = 16");
    refused(with(name, [](auto& b) { b.p.sinks = -1; }), "sinks", "-1", "0..");
  }
  refused(with("streamingllm", [](auto& b) { b.p.sinks = 16; }), "capacity", "16",
          "> sinks + window = 16");
  refused(with("streamingllm", [](auto& b) { b.p.sinks = -1; }), "sinks", "-1", "0..");
  accepted(with("streamingllm", [](auto& b) { b.p.sinks = 15; }));
  refused(with("tova", [](auto& b) { b.p.capacity = 1; }), "capacity", "1", "> sinks + window = 1");
  refused(with("h2o", [](auto& b) { b.p.window = -1; }), "window", "-1", "0..");
  refused(with("snapkv", [](auto& b) { b.p.window = 0; }), "window", "0", ">= 1");
  refused(with("lagkv", [](auto& b) { b.p.sinks = -1; }), "sinks", "-1", ">= 0");
  refused(with("lagkv", [](auto& b) { b.p.lag = 0; }), "lag", "0", ">= 1");
  refused(with("expected_attention", [](auto& b) { b.p.ahead = 0; }), "ahead", "0", ">= 1");
  refused(with("expected_attention", [](auto& b) { b.p.rotation.dims = 5; }), "rope.dims", "5",
          "even");
  refused(with("lagkv", [](auto& b) { b.p.capacity = 0; }), "capacity", "0",
          "> sinks + window = 0");
  refused(with("observed_attention", [](auto& b) { b.p.capacity = 0; }), "capacity", "0", ">");
}

TEST_CASE("numbers near the end of the integers do not wrap round") {
  for (char const* name : {"snapkv", "pyramidkv", "dynamickv", "cake", "adakv", "knorm", "keydiff"})
    CHECK(with(name, [](auto& b) { b.p.window = huge, b.p.sinks = 2; }).message() != "accepted");
  for (char const* name : {"h2o", "tova", "morphkv", "knorm", "streamingllm"})
    CHECK(with(name, [](auto& b) { b.p.capacity = huge; }).message() != "accepted");
  CHECK(with("morphkv", [](auto& b) {
          b.p.capacity = 10000000, b.p.evict_after = 1024;
        }).message() != "accepted");
  CHECK(with("h2o", [](auto& b) { b.lim.max_draft = huge; }).message() != "accepted");
}

TEST_CASE("SnapKV, PyramidKV, DynamicKV, CAKE, AdaKV parameters") {
  for (char const* name : {"snapkv", "pyramidkv", "dynamickv", "cake", "adakv"})
    for (index_t const kernel : {0, 2, 4, -1})
      refused(with(name, [=](auto& b) { b.p.kernel = kernel; }), "kernel", std::to_string(kernel),
              "odd");
  refused(with([](auto& b) { b.p.rows = reduction::max; }), "rows", "max", "sum or mean");
  refused(with("pyramidkv", [](auto& b) { b.p.beta = 0; }), "beta", "0", ">= 1");
  refused(with("dynamickv", [](auto& b) { b.p.r_max = 0.5; }), "r_max", "0.5", "1..");
  refused(with("dynamickv", [](auto& b) { b.p.r_min = 1.5; }), "r_min", "1.5", "0..1");
  refused(with("dynamickv", [](auto& b) { b.p.r_min = -0.5; }), "r_min", "-0.5", "0..1");
  refused(with("dynamickv", [](auto& b) { b.p.every = 0; }), "every", "0", ">= 1");
  refused(with("dynamickv", [](auto& b) { b.p.r_max = std::nan(""); }), "r_max", "", "1..");
  refused(with("cake", [](auto& b) { b.p.window = 1; }), "window", "1", ">= 2");
  refused(with("cake", [](auto& b) { b.p.gamma = -1; }), "gamma", "-1", "0..");
  refused(with("cake", [](auto& b) { b.p.gamma = std::nan(""); }), "gamma", "", "0..");
  refused(with("cake", [](auto& b) { b.p.tau1 = 0; }), "tau1", "0", "0.05..20");
  refused(with("cake", [](auto& b) { b.p.tau2 = 21; }), "tau2", "21", "0.05..20");
  refused(with("cake", [](auto& b) { b.p.tau2 = std::nan(""); }), "tau2", "", "0.05..20");
  refused(with("cake", [](auto& b) { b.p.every = 0; }), "every", "0", ">= 1");
  refused(with("adakv", [](auto& b) { b.p.alpha = 1.25; }), "alpha", "1.25", "0..1");
  refused(with("adakv", [](auto& b) { b.p.alpha = -0.25; }), "alpha", "-0.25", "0..1");
  refused(with("adakv", [](auto& b) { b.p.alpha = std::nan(""); }), "alpha", "", "0..1");
}

TEST_CASE("MorphKV parameters") {
  auto const morph = [](auto&& edit) { return with("morphkv", edit); };
  refused(morph([](auto& b) { b.p.window = 1; }), "n_rows", "0", ">= 1");
  refused(morph([](auto& b) { b.p.n_rows = -1; }), "n_rows", "-1", ">= 1");
  refused(morph([](auto& b) { b.p.n_rows = 5; }), "n_rows", "5", "<= window");
  refused(morph([](auto& b) { b.p.window = 0; }), "window", "0", ">= 1");
  refused(morph([](auto& b) { b.p.fusion = reduction::mean; }), "fusion", "mean", "sum or max");
  for (double const x : {0.5, 0.0, -1.0})
    refused(morph([=](auto& b) { b.p.evict_after = x; }), "evict_after",
            std::to_string(x).substr(0, 3), "1..");
  refused(morph([](auto& b) { b.p.evict_after = std::nan(""); }), "evict_after", "", "1..");
  refused(morph([](auto& b) { b.p.evict_after = 2000; }), "evict_after", "2000", "1..1024");
  refused(with("keydiff", [](auto& b) { b.p.evict_after = 0.5; }), "evict_after", "0.5", "1..");
  for (bool const mask : {false, true}) {
    auto const special = [=](auto&& edit) {
      return with("morphkv", [&](auto& b) {
        (mask ? b.p.per_head_mask : b.p.include_current) = true;
        edit(b);
      });
    };
    refused(special([](auto& b) { b.lim.max_draft = 1; }), "when.before_attention", "true",
            "false with drafts");
    refused(special([](auto& b) { b.lim.max_prompt = 30; }), "when.before_attention", "true",
            "transient");
    refused(special([](auto& b) { b.lim.engine_commits = true; }), "when.before_attention", "true",
            "engine_commits");
    refused(special([](auto& b) { b.p.per = scope::layer; }), "limits.decode", "attend",
            "one set per head");
  }
  any odd = make("h2o", {});
  odd.budget = uniform{600};
  odd.when.before_attention = true;
  test_cache const cache = test_cache::make(layout_id::hnd, dtype::f32, {1, 2, 2, 8, 8, 700});
  layer_spec<> const spec{cache.ref()};
  cpu::context ctx;
  std::string const m = refusal([&] {
    (void)bind_session(ctx, odd, odd, std::span<layer_spec<> const>(&spec, 1), limits{});
  });
  has(m, "when.before_attention = heavy_hitter");
}

TEST_CASE("evidence that cannot serve the scorer") {
  for (char const* name : {"h2o", "observed_attention"})
    for (prompt_offer const o :
         {prompt_offer::nothing, prompt_offer::window_queries, prompt_offer::scores})
      refused(with(name, [=](auto& b) { b.lim.prompt = o; }), "limits.prompt", to_string(o),
              "all_queries");
  for (char const* name : {"snapkv", "pyramidkv", "dynamickv", "adakv", "tova", "morphkv"})
    for (prompt_offer const o : {prompt_offer::nothing, prompt_offer::scores})
      refused(with(name, [=](auto& b) { b.lim.prompt = o; }), "limits.prompt", to_string(o),
              "window_queries or all_queries");
  for (char const* name : {"h2o", "tova"})
    for (decode_offer const o : {decode_offer::nothing, decode_offer::scores})
      refused(with(name, [=](auto& b) { b.lim.decode = o; }), "limits.decode", to_string(o),
              "attend or attention_rows");
  for (decode_offer const o :
       {decode_offer::nothing, decode_offer::scores, decode_offer::attention_rows})
    refused(with("morphkv", [=](auto& b) { b.lim.decode = o; }), "limits.decode", to_string(o),
            "attend");
  // The prompt policy is served, the decode policy beside it is not.
  refused(with([](auto& b) { b.decode = "h2o", b.lim.prompt = prompt_offer::window_queries; }),
          "limits.prompt", "window_queries", "all_queries");
  refused(with([](auto& b) { b.decode = "morphkv", b.lim.decode = decode_offer::nothing; }),
          "limits.decode", "nothing", "attend");
  accepted(with("knorm", [](auto& b) {
    b.lim.prompt = prompt_offer::nothing;
    b.lim.decode = decode_offer::nothing;
  }));

  policy<engine_score> own;
  own.budget.tokens = 8;
  any const p = erase_policy<cpu::context>(own);
  test_cache const cache = test_cache::make(layout_id::hnd, dtype::f32, {1, 2, 2, 8, 8, 20});
  layer_spec<> const spec{cache.ref()};
  cpu::context ctx;
  auto const message = [&](limits const& l) {
    return refusal(
        [&] { (void)bind_session(ctx, p, p, std::span<layer_spec<> const>(&spec, 1), l); });
  };
  limits l;
  has(message(l), "limits.prompt = all_queries, allowed: scores");
  l.prompt = prompt_offer::scores;
  has(message(l), "limits.decode = attend, allowed: scores");
  l.decode = decode_offer::scores;
  CHECK(message(l) == "accepted");
  l.max_draft = 1;  // the engine's scores are not staged
  has(message(l), "limits.max_draft = 1, allowed: 0");
}

TEST_CASE("opaque rows need a reader to be scored or attended to") {
  auto cache = test_cache::make(layout_id::hnd, dtype::opaque, {1, 2, 2, 8, 8, 20});
  cpu::context ctx;
  auto const message = [&](char const* name, decode_offer d, bool reader) {
    kv_ref<> kv = cache.ref();
    if (!reader) kv.k.reader = kv.v.reader = {};
    layer_spec<> const spec{kv};
    policy_options o;
    o.capacity = 8;
    o.window = 2;
    limits l;
    l.decode = d;
    any const p = make(name, o);
    return refusal(
        [&] { (void)bind_session(ctx, p, p, std::span<layer_spec<> const>(&spec, 1), l); });
  };
  CHECK(message("streamingllm", decode_offer::nothing, false) == "accepted");
  has(message("streamingllm", decode_offer::attend, false), "reader");
  has(message("knorm", decode_offer::nothing, false), "reader = null, allowed: a row_reader");
  CHECK(message("knorm", decode_offer::nothing, true) == "accepted");
  has(message("h2o", decode_offer::attention_rows, false), "reader");
}

TEST_CASE("budgets and scopes that a policy cannot do") {
  for (auto const& [name, budget] : {std::pair{"pyramidkv", "pyramid"},
                                     {"dynamickv", "dynamic_layers"},
                                     {"cake", "cake_layers"}})
    refused(with(name, [](auto& b) { b.p.per = scope::sequence; }), "budget", budget,
            "uniform, for one set per sequence");
  // Nobody else says how a layer's attention spreads.
  for (char const* name : {"snapkv", "h2o", "knorm", "expected_attention", "fullkv"})
    refused(with(name, [](auto& b) { b.p.budget = "cake"; }), "budget", "cake_layers", "(cake)");
  for (scope const per : {scope::layer, scope::sequence})
    refused(with("adakv", [=](auto& b) { b.p.per = per; }), "budget", "ada_heads",
            "without differences among heads");
  refused(with("tova", [](auto& b) { b.p.budget = "ada"; }), "budget", "ada_heads", "per layer");
  // Positions of different heads say nothing about each other.
  for (char const* budget : {"ada", "dynamic"})
    refused(with("streamingllm", [=](auto& b) { b.p.budget = budget; }), "budget",
            budget == std::string("ada") ? "ada_heads" : "dynamic_layers", "(recency)");
  refused(with([](auto& b) { b.p.budget = "inherit"; }), "budget", "inherit", "beside another");
  refused(with([](auto& b) { b.decode = "morphkv", b.d.budget = "dynamic"; }), "decode.budget",
          "dynamic_layers", "inherit");
  refused(with([](auto& b) { b.decode = "morphkv", b.d.budget = "cake"; }), "budget", "cake_layers",
          "(cake)");
  auto const after_ada = [](index_t capacity) {
    return with("adakv", [=](auto& b) {
      b.p.capacity = capacity, b.p.window = 2;
      b.decode = "streamingllm", b.d.sinks = 4, b.d.budget = "inherit";
    });
  };
  refused(after_ada(4), "prompt.capacity", "4", "> sinks + window = 4 of the decode policy");
  accepted(after_ada(5));
  refused(with([](auto& b) { b.decode = "tova"; }), "prompt.per", "head",
          "layer or sequence, before tova");
  refused(
      with([](auto& b) { b.p.per = scope::layer, b.decode = "h2o", b.d.per = scope::sequence; }),
      "decode.per", "sequence", "head");
  accepted(with([](auto& b) { b.p.per = scope::layer, b.decode = "tova"; }));
  refused(with([](auto& b) { b.p.per = scope::sequence, b.lim.max_prompt = 30; }),
          "limits.max_prompt", "30", "0");

  binding b = with("h2o", [](auto&) {});
  test_cache const cache(b.cache);
  std::vector<layer_spec<>> const specs{{cache.ref()}, {cache.ref()}};
  cpu::context ctx;
  auto const message = [&](per_layer const& x, scope per) {
    any p = make("h2o", b.p);
    p.budget = x;
    p.per = per;
    return refusal(
        [&] { (void)bind_session(ctx, p, p, std::span<layer_spec<> const>(specs), b.lim); });
  };
  per_layer x;
  x.n = 2;
  x.tokens[0] = x.tokens[1] = 10;
  CHECK(message(x, scope::head) == "accepted");
  has(message(x, scope::sequence), "budget = per_layer, allowed: uniform");
  x.tokens[1] = 3;
  has(message(x, scope::head), "per_layer.tokens = 3, allowed: >= sinks + window = 4");
  x.tokens[1] = most_tokens + 1;
  has(message(x, scope::head),
      "per_layer.tokens = 268435457, allowed: >= sinks + window = 4 and <= 268435456");
  x.tokens[1] = 10;
  x.n = 3;
  has(message(x, scope::head), "per_layer.n = 3, allowed: 2 (layers)");
  x.n = huge;
  has(message(x, scope::head), "per_layer.n = 2147483647, allowed: 2 (layers)");
  // More layers than there is room for.
  x.n = x.max_layers + 1;
  has(refusal([&] { x.check(x.n, b.cache.shape, 4); }), "per_layer.n = 257, allowed: <= 256");
  CHECK(x.capacity() == 20 / 256);
  CHECK(x.most(x.n, b.cache.shape, 4, 0) == 10);
  CHECK(x.most_in(x.max_layers, x.n, b.cache.shape, 4, 0) == 0);
}

TEST_CASE("blocks need paged views and engine_commits") {
  auto const whole = [](auto&& edit) {
    return with("knorm", [&](auto& b) {
      b.p.whole_blocks = true;
      b.p.block = 4;
      b.cache.layout = layout_id::paged_per_head;
      b.lim.engine_commits = true;
      edit(b);
    });
  };
  accepted(whole([](auto&) {}));
  for (layout_id const layout :
       {layout_id::hnd, layout_id::nhd, layout_id::ragged, layout_id::custom})
    for (bool const packed : {false, true})
      refused(whole([=](auto& b) { b.cache.layout = layout, b.p.whole_blocks = !packed; }),
              "view.k.layout",
              layout == layout_id::ragged   ? "ragged"
              : layout == layout_id::custom ? "custom"
                                            : "strided",
              "paged");
  refused(whole([](auto& b) { b.p.block = 8; }), "select.block", "8", "block_size = 4");
  refused(whole([](auto& b) { b.p.block = 0; }), "block", "0", ">= 1");
  refused(whole([](auto& b) { b.p.block = 1; }), "select.block", "1", "block_size = 4");
  refused(whole([](auto& b) { b.p.block = 1, b.cache.layout = layout_id::hnd; }), "view.k.layout",
          "strided", "paged");
  // Fewer tokens than a block would be none at all.
  for (bool const packed : {false, true}) {
    auto const of = [=](index_t capacity) {
      return with("knorm", [=](auto& b) {
        b.p.whole_blocks = !packed, b.p.block = b.cache.block_size = 16;
        b.p.window = 2, b.p.capacity = capacity;
        b.cache.layout = layout_id::paged_per_head, b.lim.engine_commits = true;
      });
    };
    refused(of(15), "capacity", "15", ">= block = 16");
    accepted(of(16));
    auto const after_ada = [=](index_t capacity) {
      binding b = of(16);
      std::swap(b.p, b.d), b.p.capacity = capacity, b.p.window = 2;
      b.prompt = "adakv", b.decode = "knorm", b.d.budget = "inherit";
      return b;
    };
    refused(after_ada(15), "prompt.capacity", "15", ">= block = 16 of the decode policy");
    accepted(after_ada(16));
  }
  // Sinks lie in one block, the window's four tokens in another, and so many have to stay.
  auto const guarded = [&](index_t capacity, index_t window, bool packed) {
    return whole([=](auto& b) {
      b.p.sinks = 1, b.p.window = window, b.p.capacity = capacity, b.p.whole_blocks = !packed;
    });
  };
  refused(guarded(7, 4, false), "capacity", "7",
          ">= 8, for sinks and window may lie in 2 blocks of 4");
  refused(guarded(11, 5, false), "capacity", "11",
          ">= 12, for sinks and window may lie in 3 blocks of 4");
  accepted(guarded(8, 4, false));
  accepted(guarded(12, 5, false));
  accepted(guarded(7, 4, true));
  accepted(whole([](auto& b) { b.prompt = b.decode = "fullkv", b.p.capacity = 1; }));
  refused(whole([](auto& b) { b.lim.engine_commits = false; }), "decode.select", "whole_blocks",
          "engine_commits");
  refused(whole([](auto& b) { b.lim.engine_commits = false, b.p.whole_blocks = false; }),
          "decode.select", "packed_blocks", "engine_commits");
  refused(whole([](auto& b) { b.cache.layout = layout_id::paged; }), "per", "head",
          "layer or sequence");
  refused(whole([](auto& b) { b.lim.max_prompt = 30; }), "limits.max_prompt", "30", "never move");
  // A layer that is cut twice before the engine knows of the first time.
  refused(whole([](auto& b) { b.prompt = "dynamickv", b.decode = "fullkv"; }), "prompt.budget",
          "dynamic", "cuts each layer once");
}

TEST_CASE("limits") {
  auto const lim = [](auto&& edit) { return with([&](auto& b) { edit(b.lim); }); };
  refused(lim([](auto& l) { l.max_sequences = 0; }), "limits.max_sequences", "0", "1..");
  refused(lim([](auto& l) { l.max_batch = 3; }), "limits.max_batch", "3", "1..2");
  refused(lim([](auto& l) { l.max_batch = -1; }), "limits.max_batch", "-1", "1..");
  refused(lim([](auto& l) { l.max_prompt = -1; }), "limits.max_prompt", "-1", "0..");
  refused(lim([](auto& l) { l.max_chunk = 0; }), "limits.max_chunk", "0", "1..");
  refused(lim([](auto& l) { l.max_draft = -1; }), "limits.max_draft", "-1", "0..");
}

TEST_CASE("pools that are too small for a decode policy") {
  for (char const* name : {"h2o", "tova", "knorm", "keydiff", "morphkv"}) {
    refused(with(name, [](auto& b) { b.cache.shape.max_slots = 16; }), "layers[0].shape.max_slots",
            "16", ">= 17");
    accepted(with(name, [](auto& b) { b.cache.shape.max_slots = 17; }));
  }
  refused(with("streamingllm", [](auto& b) { b.cache.shape.max_slots = 15; }),
          "layers[0].shape.max_slots", "15", ">= 16");
  accepted(with("streamingllm", [](auto& b) { b.cache.shape.max_slots = 16; }));
  refused(
      with("morphkv", [](auto& b) { b.cache.shape.max_slots = 17, b.p.include_current = true; }),
      "layers[0].shape.max_slots", "17", ">= 18");
  refused(with("morphkv", [](auto& b) { b.cache.shape.max_slots = 25, b.p.evict_after = 1.6; }),
          "layers[0].shape.max_slots", "25", ">= ");
  refused(with("h2o", [](auto& b) { b.cache.shape.max_slots = 19, b.lim.max_draft = 3; }),
          "layers[0].shape.max_slots", "19", ">= 20");
}

TEST_CASE("layers: none, all skipped, and shapes that differ") {
  binding const b;
  any const p = make("snapkv", b.p);
  cpu::context ctx;
  auto const message = [&](std::vector<layer_spec<>> const& specs) {
    return refusal(
        [&] { (void)bind_session(ctx, p, p, std::span<layer_spec<> const>(specs), b.lim); });
  };
  has(message({}), "layers = 0, allowed: at least one");
  test_cache const cache(b.cache);
  has(message({{cache.ref(), true}}), "layers = 1, allowed: at least one that is not skipped");
  auto const other = [&](index_t cache_shape::*field, index_t value) {
    cache_options o = b.cache;
    o.shape.*field = value;
    test_cache const different(o);
    return message({{cache.ref()}, {different.ref()}});
  };
  has(other(&cache_shape::n_kv_heads, 4), "layers[1].shape.n_kv_heads = 4, allowed: 2");
  has(other(&cache_shape::n_q_heads, 8), "layers[1].shape.n_q_heads = 8, allowed: 4");
  has(other(&cache_shape::dim_k, 16), "layers[1].shape.dim_k = 16, allowed: 8");
  has(other(&cache_shape::dim_v, 16), "layers[1].shape.dim_v = 16, allowed: 6");
  CHECK(other(&cache_shape::max_slots, 64) == "accepted");
  has(other(&cache_shape::n_seq, 1), "n_seq");
  kv_ref<> bad = cache.ref();
  bad.shape.n_q_heads = 5;
  has(message({{bad}}), "shape.n_q_heads = 5, allowed: a multiple of n_kv_heads = 2");
  bad = cache.ref();
  bad.k.layout.strided.head_stride = 3;
  has(message({{cache.ref()}, {bad}}), "layers[1].k.layout.head_stride = 3");
  bad = cache.ref();
  bad.v.layout.strided.seq_stride = std::numeric_limits<offset_t>::max();
  has(message({{bad}}), "layers[0].v.layout.seq_stride");
}

TEST_CASE("what a part of a policy cannot do beside the others") {
  // By bounds, MorphKV protects its window and nothing else.
  test_cache const cache(binding().cache);
  std::vector<layer_spec<>> const specs{{cache.ref()}};
  cpu::context ctx;
  auto const message = [&](auto const& p) {
    return refusal(
        [&] { (void)bind_session(ctx, p, std::span<layer_spec<> const>(specs), limits{}); });
  };
  for (morph_rows const rows : {morph_rows::lazy, morph_rows::cached, morph_rows::direct}) {
    morphkv p = make_morphkv({.capacity = 20, .window = 8, .evaluation = rows});
    CHECK(message(p) == "accepted");
    bool const lazy = rows == morph_rows::lazy;
    p.keep.sinks = 4;
    has(message(p), lazy ? "keep.sinks = 4, allowed: 0" : "accepted");
    p.keep = {0, 9};
    has(message(p), lazy ? "keep.recent = 9, allowed: the window = 8" : "accepted");
  }
  // Sizes whose sum is no number.
  has(message(make_lagkv({.capacity = 16, .sinks = huge, .lag = 4})),
      "sinks = 2147483647, allowed: >= 0 and <= ");
  has(message(make_lagkv({.capacity = 16, .lag = huge})),
      "lag = 2147483647, allowed: >= 1 and <= ");
}
