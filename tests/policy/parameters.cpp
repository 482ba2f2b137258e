// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Parameters by name: every one of every policy can be set within its range, and nothing else.
#include <cmath>
#include <limits>

#include "../support/catch.hpp"
#include "../support/engine.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// The value of an option, as its type has it.
double value_of(policy_options o, char const* name) {
  double v = std::nan("");
  detail::with_parameter(o, name, [&](auto& option) {
    if constexpr (requires { option.value(); })
      v = option ? *option : std::nan("");
    else
      v = option;
  });
  return v;
}

bool is_integer(char const* name) {
  policy_options o;
  bool integer = true;
  detail::with_parameter(
      o, name, [&](auto& option) { integer = !std::is_same_v<decltype(option), double&>; });
  return integer;
}

/// What all policies are with these options.
std::vector<std::uint64_t> keys(policy_options const& o) {
  std::vector<std::uint64_t> k;
  list_policies([&](policy_info const& i) { k.push_back(make(i.name, o).key()); });
  return k;
}

/// Refused, and nothing has changed. @return the message
std::string refused(std::string_view policy, std::string_view name, double value) {
  policy_options o;
  auto const before = keys(o);
  std::string const message = refusal([&] { set_parameter(o, policy, name, value); });
  INFO(policy << "." << name << " = " << value << ": " << message);
  CHECK(message.find(std::string(policy) + "." + std::string(name) + " = ") != std::string::npos);
  CHECK(message.find(", allowed: ") != std::string::npos);
  CHECK(keys(o) == before);
  return message;
}

bool has(std::string const& message, char const* part) {
  INFO(message);
  return message.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("every parameter of every policy takes the ends of its range, and nothing beyond") {
  index_t parameters = 0;
  list_policies([&](policy_info const& i) {
    for (parameter_info const& p : i.parameters) {
      INFO(i.name << "." << p.name);
      ++parameters;
      for (double const value : {p.least, p.most}) {
        policy_options o;
        set_parameter(o, i.name, p.name, value);
        CHECK(value_of(o, p.name) == value);
      }
      double const infinity = std::numeric_limits<double>::infinity();
      for (double const value :
           {p.least - 1, p.most + 1, std::nextafter(p.least, -infinity),
            std::nextafter(p.most, infinity), infinity, -infinity, std::nan("")})
        refused(i.name, p.name, value);
      if (is_integer(p.name)) refused(i.name, p.name, p.least + 0.5);
    }
    refused(i.name, "capacty", 8);
    refused(i.name, "", 8);
  });
  CHECK(parameters > 40);
}

TEST_CASE("refusals of parameters say what is allowed") {
  CHECK(refused("tova", "window", 2) == "kvkeep: tova.window = 2, allowed: 0..1, integers");
  CHECK(refused("adakv", "alpha", 1.25) == "kvkeep: adakv.alpha = 1.25, allowed: 0..1");
  CHECK(refused("h2o", "kernel", 3) ==
        "kvkeep: h2o.kernel = 3, allowed: parameters capacity, window");
  CHECK(refused("fullkv", "capacity", 3) == "kvkeep: fullkv.capacity = 3, allowed: no parameter");
  CHECK(has(refused("snapkv", "window", 0.5), "snapkv.window = 0.5, allowed: 1.."));
  CHECK(has(refused("nobody", "window", 8), "nobody.window = 8, allowed: policies fullkv, "));
  CHECK(has(refused("", "window", 8), "allowed: policies fullkv, "));
}

TEST_CASE("a parameter that was set takes effect") {
  policy_options o;
  set_parameter(o, "h2o", "capacity", 64);
  set_parameter(o, "h2o", "window", 8);
  CHECK(make("h2o", o).key() == erase_policy<cpu::context>(make_h2o({64, 8})).key());
  o = {};
  set_parameter(o, "streamingllm", "sinks", 7);
  CHECK(make("streamingllm", o).keep.sinks == 7);
  set_parameter(o, "knorm", "evict_after", 1.5);
  CHECK(make("knorm", o).when.evict_after == 1.5);
  set_parameter(o, "morphkv", "n_rows", 3);
  CHECK(make("morphkv", o).key() ==
        erase_policy<cpu::context>(make_morphkv({.evict_after = 1.5, .n_rows = 3})).key());
  o = {};
  set_parameter(o, "cake", "tau1", 1.6);
  set_parameter(o, "cake", "gamma", 100);
  set_parameter(o, "cake", "every", 2);
  CHECK(make("cake", o).key() ==
        erase_policy<cpu::context>(make_cake({.gamma = 100, .tau1 = 1.6, .every = 2})).key());
  // Each one tells its policy from the same with defaults.
  list_policies([&](policy_info const& i) {
    for (parameter_info const& p : i.parameters) {
      INFO(i.name << "." << p.name);
      policy_options x, y;
      set_parameter(x, i.name, p.name, p.least);
      set_parameter(y, i.name, p.name, std::min(p.most, p.least + 1));
      CHECK(make(i.name, x).key() != make(i.name, y).key());
    }
  });
}
