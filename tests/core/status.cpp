// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Status names, the early return, and refusals that name field, value and range.
#include <kvkeep/core/status.hpp>

#include <set>

#include "../support/catch.hpp"

namespace {

using namespace kvkeep;

int calls = 0;

status counted(status s) {
  ++calls;
  return s;
}

status two_steps(status first, status second) {
  KVKEEP_TRY(counted(first));
  KVKEEP_TRY(counted(second));
  return status::ok;
}

std::string message_of(void (*f)()) {
  try {
    f();
  } catch (std::invalid_argument const& e) {
    return e.what();
  }
  return "nothing thrown";
}

}  // namespace

TEST_CASE("every status has a name of its own") {
  std::set<std::string> names;
  int n = 0;
  for (; n <= static_cast<int>(status::backend_error); ++n)
    names.insert(to_string(static_cast<status>(n)));
  CHECK(names.size() == static_cast<std::size_t>(n));
  CHECK(std::string(to_string(status::ok)) == "ok");
  CHECK(std::string(to_string(status::workspace_too_small)) == "workspace_too_small");
  CHECK(std::string(to_string(status::bad_table)) == "bad_table");
  CHECK(std::string(to_string(status::duplicate_position)) == "duplicate_position");
  CHECK(std::string(to_string(status::backend_error)) == "backend_error");
}

TEST_CASE("KVKEEP_TRY stops at the first failure and evaluates once") {
  calls = 0;
  CHECK(two_steps(status::ok, status::ok) == status::ok);
  CHECK(calls == 2);
  calls = 0;
  CHECK(two_steps(status::bad_order, status::ok) == status::bad_order);
  CHECK(calls == 1);
  CHECK(two_steps(status::ok, status::corrupt) == status::corrupt);
}

TEST_CASE("a refusal names the field, the value and what is allowed") {
  CHECK(message_of([] { KVKEEP_EXPECTS(1 > 2, "window", 7, "1..6"); }) ==
        "kvkeep: window = 7, allowed: 1..6");
  CHECK(message_of([] { KVKEEP_EXPECTS(false, "policy", "lru", "snapkv or h2o"); }) ==
        "kvkeep: policy = lru, allowed: snapkv or h2o");
  CHECK(message_of([] { KVKEEP_EXPECTS(true, "window", 7, "1..6"); }) == "nothing thrown");
}
