// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What the library kvkeep::cuda_ops does not contain, ops of functors and a decoded token's chains of ops, compiled
// without a device; spilled registers are errors.
#include <kvkeep/cuda.cuh>
#include <kvkeep/engine/detail/token_chain.hpp>
#include <kvkeep/engine/detail/visibility.hpp>
#include <kvkeep/policy/h2o.hpp>
#include <kvkeep/policy/knorm.hpp>
#include <kvkeep/policy/morphkv.hpp>

namespace kvkeep {

template <class Op>
status compile_op(cuda::context& c, Op const& o, workspace& w) {
  return run(c, o, w);
}

struct fill_ones {
  index_t* out;
  KVKEEP_HD void operator()(index_t i) const { out[i] = 1; }
};

#define KVKEEP_COMPILE_OP(...) \
  template status compile_op(cuda::context&, __VA_ARGS__ const&, workspace&)
KVKEEP_COMPILE_OP(op::for_each<fill_ones, device_space>);
KVKEEP_COMPILE_OP(op::score_slots<key_norm_fn, device_space>);
KVKEEP_COMPILE_OP(op::for_each<detail::ring_rows_of<device_space>, device_space>);
KVKEEP_COMPILE_OP(op::for_each<detail::show_plan<device_space>, device_space>);
KVKEEP_COMPILE_OP(
    op::head_chain<device_space, op::for_each<detail::find_faults<device_space>, device_space>,
                   op::for_each<detail::take_slots<device_space>, device_space>>);
#undef KVKEEP_COMPILE_OP

#define KVKEEP_COMPILE_TOKEN(...)                                          \
  template status detail::decide_token(cuda::context&, __VA_ARGS__ const&, \
                                       score_input<device_space> const&,   \
                                       detail::token_steps<device_space> const&, workspace&)
KVKEEP_COMPILE_TOKEN(recent_fused_score);
KVKEEP_COMPILE_TOKEN(heavy_hitter_score);
KVKEEP_COMPILE_TOKEN(slot_score<key_norm_fn>);
#undef KVKEEP_COMPILE_TOKEN

}  // namespace kvkeep
