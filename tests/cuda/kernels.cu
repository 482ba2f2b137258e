// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Every op of the CUDA backend, compiled without a device; spilled registers are errors.
#include <kvkeep/cuda.cuh>
#include <kvkeep/policy/knorm.hpp>

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
KVKEEP_COMPILE_OP(op::accumulate<device_space>);
KVKEEP_COMPILE_OP(op::attend<device_space>);
KVKEEP_COMPILE_OP(op::column_sums<device_space>);
KVKEEP_COMPILE_OP(op::compact<device_space>);
KVKEEP_COMPILE_OP(op::evict_one<device_space>);
KVKEEP_COMPILE_OP(op::for_each<fill_ones, device_space>);
KVKEEP_COMPILE_OP(op::fused_rows<device_space>);
KVKEEP_COMPILE_OP(op::key_diff<device_space>);
KVKEEP_COMPILE_OP(op::lag_score<device_space>);
KVKEEP_COMPILE_OP(op::layer_counts<device_space>);
KVKEEP_COMPILE_OP(op::lazy_enter<device_space>);
KVKEEP_COMPILE_OP(op::lazy_victim<device_space>);
KVKEEP_COMPILE_OP(op::mean_heads<device_space>);
KVKEEP_COMPILE_OP(op::mean_layers<device_space>);
KVKEEP_COMPILE_OP(op::pool_rows<device_space>);
KVKEEP_COMPILE_OP(op::reduce_rows<device_space>);
KVKEEP_COMPILE_OP(op::ring_score<device_space>);
KVKEEP_COMPILE_OP(op::row_weights<device_space>);
KVKEEP_COMPILE_OP(op::score_slots<key_norm_fn, device_space>);
KVKEEP_COMPILE_OP(op::select_blocks<device_space>);
KVKEEP_COMPILE_OP(op::select_k<device_space>);
#undef KVKEEP_COMPILE_OP

}  // namespace kvkeep
