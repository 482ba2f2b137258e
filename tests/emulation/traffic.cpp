// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Lanes of a warp that are in one place of the code for the n-th time since they last met are taken to be there at
/// once: that is one request. Kernels are compiled with the compiler's thread instrumentation and linked to this
/// file instead of the sanitizer's own runtime.
#include "traffic.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include "instrumented.hpp"

namespace kvkeep::cuda {
extern uint4 shared_words[227 * 1024 / 16];
}

namespace {

using namespace emulation;

constexpr std::size_t bank_bytes = 4, round_bytes = 128, widest = 16;

struct array {
  std::string name;
  std::uintptr_t begin, end;
};

/// What one lane does in one instruction.
struct lane_access {
  std::uintptr_t at = 0;
  unsigned bytes = 0;
  bool write = false;
};
using lanes = std::array<lane_access, warp_size>;

/// One place in the code, since the warp's threads last met, for the n-th time.
struct request_key {
  std::uintptr_t code;
  unsigned warp, warp_syncs, turn;
  bool operator==(request_key const&) const = default;
};
struct place_key {
  std::uintptr_t code;
  unsigned thread;
  bool operator==(place_key const&) const = default;
};
struct key_hash {
  static std::size_t mixed(std::uint64_t x) { return static_cast<std::size_t>(x ^ x >> 29); }
  std::size_t operator()(place_key const& k) const {
    return mixed((k.code << 10 ^ k.thread) * 0x9e3779b97f4a7c15ull);
  }
  std::size_t operator()(request_key const& k) const {
    std::uint64_t x = k.code << 5 ^ k.warp;
    for (unsigned const part : {k.warp_syncs, k.turn})
      x = (x ^ part) * 0x9e3779b97f4a7c15ull + (x >> 31);
    return mixed(x);
  }
};
struct visits {
  unsigned warp_syncs = 0, n = 0;
};
/// A thread's last access: the parts of a struct that are read or written one after the other are one access.
struct last_access {
  lane_access* access = nullptr;
  std::uintptr_t code = 0;
  unsigned warp_syncs = 0;
};

struct counter {
  std::vector<array> arrays;
  traffic total;
  std::unordered_map<std::string, std::array<std::unordered_set<std::uintptr_t>, 2>> touched;
  unsigned launch = 0, block = 0, block_syncs = 0;  ///< of the requests
  std::unordered_map<request_key, lanes, key_hash> requests;
  std::unordered_map<place_key, visits, key_hash> places;
  std::array<last_access, 1024> last;
};
counter& all() {
  static counter c;
  return c;
}

bool in_shared(std::uintptr_t at) {
  return at - reinterpret_cast<std::uintptr_t>(kvkeep::cuda::shared_words) <
         sizeof kvkeep::cuda::shared_words;
}
array const* array_of(std::uintptr_t at) {
  for (array const& a : all().arrays)
    if (at - a.begin < a.end - a.begin) return &a;
  return nullptr;
}

unsigned width_of(lanes const& request) {
  unsigned width = 0;
  for (lane_access const& l : request) width = std::max(width, l.bytes);
  return width;
}

/// Lanes take turns by as many as make 128 bytes. Of each bank one word is served at a time.
void count_shared(lanes const& request) {
  shared_traffic& to = all().total.shared;
  ++to.requests;
  std::size_t const at_once =
      std::clamp<std::size_t>(round_bytes / std::bit_ceil(width_of(request)), 1, warp_size);
  for (std::size_t first = 0; first < warp_size; first += at_once) {
    std::array<std::unordered_set<std::uintptr_t>, round_bytes / bank_bytes> banks;
    for (std::size_t l = first; l < first + at_once; ++l)
      for (std::uintptr_t word = request[l].at / bank_bytes;
           request[l].bytes > 0 && word <= (request[l].at + request[l].bytes - 1) / bank_bytes;
           ++word)
        banks[word % banks.size()].insert(word);
    std::size_t rounds = 0;
    for (auto const& b : banks) rounds = std::max(rounds, b.size());
    to.rounds += static_cast<double>(rounds);
    to.least += rounds > 0 ? 1 : 0;
  }
}

void count_array(array const& a, lanes const& request, bool write) {
  std::unordered_set<std::uintptr_t> sectors, bytes;
  for (lane_access const& l : request)
    for (std::uintptr_t at = l.at; at < l.at + l.bytes; ++at) {
      bytes.insert(at);
      sectors.insert(at / sector_bytes);
    }
  array_traffic& to = (write ? all().total.written : all().total.read)[a.name];
  ++to.requests;
  to.bytes += static_cast<double>(bytes.size());
  to.sectors += static_cast<double>(sectors.size());
  auto& seen = all().touched[a.name][write ? 1 : 0];
  for (std::uintptr_t const s : sectors) to.distinct += seen.insert(s).second ? 1 : 0;
}

/// Counts the requests since the block's threads last met: they are whole.
void end_stretch() {
  counter& c = all();
  for (auto const& [key, request] : c.requests) {
    auto const first = std::find_if(request.begin(), request.end(),
                                    [](lane_access const& l) { return l.bytes > 0; });
    if (in_shared(first->at))
      count_shared(request);
    else
      count_array(*array_of(first->at), request, first->write);
  }
  c.requests.clear();
  c.places.clear();
  c.last.fill({});
  c.block = standing.block;
  c.block_syncs = standing.syncs.block;
  if (c.launch != standing.launch) c.touched.clear();
  c.launch = standing.launch;
}

/// Whether this access goes on where the thread's last one ended, inside of what one instruction moves.
bool goes_on(last_access const& last, std::uintptr_t at, std::size_t bytes, bool write,
             std::uintptr_t code) {
  if (last.access == nullptr || last.code == code || last.access->write != write) return false;
  if (last.warp_syncs != standing.syncs.warp) return false;
  lane_access const& a = *last.access;
  return at == a.at + a.bytes && a.at / widest == (at + bytes - 1) / widest;
}

}  // namespace

namespace emulation {

void access(void const* p, std::size_t bytes, access_kind what, void const* code) {
  auto const at = reinterpret_cast<std::uintptr_t>(p),
             where = reinterpret_cast<std::uintptr_t>(code);
  if (!standing.running || bytes == 0) return;
  if (!in_shared(at) && array_of(at) == nullptr) return;
  counter& c = all();
  auto const& now = standing.syncs;
  if (c.block != standing.block || c.block_syncs != now.block) end_stretch();
  unsigned const thread = standing.thread;
  last_access& last = c.last[thread];
  bool const write = what != access_kind::read;
  if (goes_on(last, at, bytes, write, where)) {
    last.access->bytes += static_cast<unsigned>(bytes);
    last.code = where;
    return;
  }
  visits& v = c.places[{where, thread}];
  if (v.warp_syncs != now.warp) v = {now.warp, 0};
  lane_access& mine = c.requests[{where, thread / warp_size, now.warp, v.n++}][thread % warp_size];
  mine = {at, static_cast<unsigned>(bytes), write};
  last = {&mine, where, now.warp};
}

void watch_array(std::string name, void const* begin, std::size_t bytes) {
  auto const at = reinterpret_cast<std::uintptr_t>(begin);
  all().arrays.push_back({std::move(name), at, at + bytes});
}

void forget_traffic() {
  end_stretch();
  all().touched.clear();
  all().arrays.clear();
  all().total = {};
}

traffic const& traffic_so_far() {
  end_stretch();
  return all().total;
}

}  // namespace emulation
