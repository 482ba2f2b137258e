// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// kvkeep-replay on the CPU backend.
#include <kvkeep/kvkeep.hpp>

#include "trace_on.hpp"

namespace kvkeep::replay {

namespace {

struct cpu_machine {
  using context = cpu::context;
  template <class T>
  using allocator = std::allocator<T>;
  class session;

  void wait() {}

  context ctx;
};

/// A session, whose refusals are exceptions.
class cpu_machine::session {
 public:
  using policy_type = any_policy<cpu::context>;

  session(cpu_machine& m, policy_type const& prompt, policy_type const& decode,
          std::vector<layer_spec<>> const& layers, limits const& lim)
      : s_(bind_session(m.ctx, prompt, decode, std::span<layer_spec<> const>(layers), lim)),
        attends_(lim.decode == decode_offer::attend) {}

  void begin(index_t id) {
    index_t got = -1;
    expect(s_.begin(got, {id}), "begin");
  }
  void observe(index_t layer, index_t id, queries const& q) {
    expect(s_.observe(layer, id, q), "observe");
  }
  void end_prompt(index_t id) { expect(s_.end_prompt(id), "end_prompt"); }
  void append(std::vector<index_t> const& ids, index_t* slots) {
    expect(s_.append(0, {ids}, slots), "append");
  }
  void attend(std::vector<index_t> const& ids, queries const& q, float* out) {
    if (attends_) expect(s_.attend(0, {ids}, q, out), "attend");
    expect(s_.confirm({ids}, 1), "confirm");
  }
  void verify() { expect(s_.verify(), "verify"); }
  auto lengths(index_t layer) const { return s_.lengths(layer); }
  auto positions(index_t layer) const { return s_.positions(layer); }
  auto free_slots(index_t layer) const { return s_.free_slots(layer); }

 private:
  kvkeep::session<cpu::context, policy_type, policy_type> s_;
  bool attends_;
};

}  // namespace

std::unique_ptr<backend> make_cpu_backend() { return std::make_unique<backend_on<cpu_machine>>(); }

}  // namespace kvkeep::replay
