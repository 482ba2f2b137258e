// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Errors: an exception (or abort) while setting up, a status afterwards.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "config.hpp"

namespace kvkeep {

/// Result of every call after `bind_session`. A call that does not return `ok` has changed nothing.
enum class [[nodiscard]] status : std::uint8_t{
    ok,
    bad_argument,  ///< a shape, id or count that the call cannot take
    bad_sequence,  ///< unknown, ended or not yet begun sequence id
    bad_order,     ///< call out of order (attend before append, confirm of more than was appended)
    capacity_exceeded,    ///< no slot, sequence or draft slot is left
    stale_plan,           ///< the plan belongs to another cache generation
    workspace_too_small,  ///< less memory than the measuring run asked for
    unsupported,          ///< the backend or policy has no such operation
    bad_table,            ///< a block table entry is out of range
    corrupt,              ///< verify: state and slots disagree
    over_budget,          ///< verify: more live tokens than the budget allows
    lost_token,           ///< verify: a protected token is gone
    duplicate_position,   ///< verify: a position occurs twice in a head
    backend_error         ///< the device reported an error
};

constexpr char const* to_string(status s) noexcept {
  constexpr char const* names[] = {"ok",
                                   "bad_argument",
                                   "bad_sequence",
                                   "bad_order",
                                   "capacity_exceeded",
                                   "stale_plan",
                                   "workspace_too_small",
                                   "unsupported",
                                   "bad_table",
                                   "corrupt",
                                   "over_budget",
                                   "lost_token",
                                   "duplicate_position",
                                   "backend_error"};
  return names[static_cast<int>(s)];
}

/// Reports a mistake of the caller while setting up: throws std::invalid_argument, or prints and aborts
/// where exceptions are off.
[[noreturn]] KVKEEP_COLD inline void fail_setup(std::string const& message) {
#if KVKEEP_HAS_EXCEPTIONS
  throw std::invalid_argument("kvkeep: " + message);
#else
  std::fprintf(stderr, "kvkeep: %s\n", message.c_str());
  std::abort();
#endif
}

/// Refuses a configuration value with field, value and allowed range in the message.
template <class T>
[[noreturn]] KVKEEP_COLD void refuse(char const* field, T value, std::string const& allowed) {
  if constexpr (std::is_convertible_v<T, std::string>)
    fail_setup(std::string(field) + " = " + std::string(value) + ", allowed: " + allowed);
  else
    fail_setup(std::string(field) + " = " + std::to_string(value) + ", allowed: " + allowed);
}

}  // namespace kvkeep

/// Returns from the enclosing function when an operation did not succeed.
#define KVKEEP_TRY(...)                                        \
  do {                                                         \
    if (::kvkeep::status const kvkeep_status_ = (__VA_ARGS__); \
        kvkeep_status_ != ::kvkeep::status::ok)                \
      return kvkeep_status_;                                   \
  } while (false)

/// Precondition of a set-up function: `field = value` with the allowed range, unless `condition` holds.
#define KVKEEP_EXPECTS(condition, field, value, allowed)             \
  do {                                                               \
    if (!(condition)) ::kvkeep::refuse((field), (value), (allowed)); \
  } while (false)
